import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from emoji.settings import SHORT, DemoSettings
from unime_st.published import PUBLISHED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_kept_results(readme):
    texts = {str(page): page.read_text(encoding="utf-8") for page in readme.pages()}
    assert len(texts) > 5
    assert readme.filled(texts) == texts, "run `python benchmarks/readme.py`"
    text = texts[str(ROOT / "README.md")]
    results = json.loads((readme.RESULTS / "demo" / "results.json").read_text())
    final = results["tables"]["trained"]["stage 1 + 2"]["text→image R@1"]
    assert f"| two trained vendors: stage 1 + 2 | {100 * final['mean']:.1f} ± {100 * final['error']:.1f} |" in text


def test_a_missing_place_is_an_error(readme):
    with pytest.raises(ValueError, match="0 places between <!-- demo -->"):
        readme.filled({"README.md": "# nothing to fill in\n"})


def test_a_table_in_two_pages_is_an_error(readme):
    texts = {str(page): page.read_text(encoding="utf-8") for page in readme.pages()}
    with pytest.raises(ValueError, match="2 places between <!-- families -->"):
        readme.filled({**texts, "again.md": "<!-- families -->\n<!-- /families -->\n"})


def test_the_cards_of_published_models_are_those_generated_and_parse(readme):
    for name, card in readme.cards().items():
        assert (ROOT / "model_cards" / name).read_text(encoding="utf-8") == card, "run `python benchmarks/readme.py`"
        data = ModelCard(card).data
        assert data.library_name == "sentence-transformers"
        assert f'load_encoder("{data.base_model}")' in card
        said = {  # by each group of models, and by no other
            "Summary above image in one word:": name.startswith("UniME-") and "V2" not in name,
            "Find an image caption describing the given image.": "UniME-V2" in name,
            "<\\|im_start\\|>system\\nRepresent the user's input.": name.startswith("Qwen3-VL-Embedding"),
        }
        assert {words: words in card for words in said} == said
    assert len(readme.cards()) == len(PUBLISHED)


def test_a_short_demo_is_not_kept(readme, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    (tmp_path / "demo").mkdir()
    for settings, named in ((SHORT, "media_rows.*stage1.*swap_limit"), (replace(DemoSettings(), seed=1), "seed")):
        (tmp_path / "demo" / "settings.json").write_text(json.dumps(asdict(settings)))
        with pytest.raises(ValueError, match=f"of other settings \\({named}"):
            readme.keep(tmp_path / "demo")
    assert not (tmp_path / "results").exists()
