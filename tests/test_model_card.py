"""The card tells what a reader needs, and its code runs."""

import re

import numpy as np
import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from tiny import picture
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.hub import encoder_card
from unime_st.published import PUBLISHED
from unime_st.published_card import published_card


@pytest.fixture
def model(backbone):
    return build_encoder(backbone("llava_next"), device="cpu", prompts={"caption": "Find its caption: "})


def test_what_it_says(model):
    model.model_card_data.license = "apache-2.0"
    evaluator = EmbeddingSimilarityEvaluator(["a cat", "a dog"], ["a lion", "a wolf"], [0.8, 0.7], name="animals")
    evaluator(model)
    card = encoder_card(model, repo_id="me/unime-tiny")
    data = ModelCard(card).data
    assert data.license == "apache-2.0"
    assert {"sentence-transformers", "multimodal", "unime"} <= set(data.tags)
    assert data.library_name == "sentence-transformers"
    assert "# unime-tiny\n" in card
    assert 'SentenceTransformer("me/unime-tiny")' in card
    assert "| image | `[INST] <image>\\nSummary above image in one word: [/INST]` |" in card
    assert "| text | `[INST] <your text>\\nSummary above sentence in one word: [/INST]` |" in card
    assert "`caption`" in card
    assert "| dimensions | 32 |" in card
    assert "| licence | apache-2.0 |" in card
    assert "### animals" in card
    assert "spearman" in card
    assert "arXiv:2504.17432" in card
    assert "{{" not in card
    assert "{%" not in card


def test_results_are_metadata_that_the_hub_reads(model):
    for name in ("animals", "plants"):
        evaluator = EmbeddingSimilarityEvaluator(["a cat", "a dog"], ["a lion", "a wolf"], [0.8, 0.7], name=name)
        evaluator(model)
    data = ModelCard(encoder_card(model, repo_id="me/unime-tiny")).data
    assert data.model_name == "me/unime-tiny"
    found = {(result.dataset_name, result.metric_type) for result in data.eval_results}
    assert {("animals", "spearman_cosine"), ("plants", "spearman_cosine")} <= found
    assert "### animals, plants\n" in encoder_card(model, repo_id="me/unime-tiny")


def test_its_example_runs_in_stock_code(model, tmp_path, monkeypatch):
    folder = export_encoder(model, tmp_path / "encoder")
    picture().save(tmp_path / "bus.jpg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", encoder_card(model, repo_id="encoder"), re.DOTALL).group(1)
    names = {}
    exec(code, names)
    assert type(names["model"]) is SentenceTransformer
    np.testing.assert_allclose(names["embeddings"][0], model.encode("a red bus in the rain"), atol=1e-5)
    assert (folder / "README.md").is_file()


def test_a_vertical_bar_in_a_prompt_does_not_break_the_table(backbone):
    card = encoder_card(build_encoder(backbone("qwen2_vl"), device="cpu"))
    rows = [line for line in card.splitlines() if line.startswith(("| text |", "| image |"))]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_a_model_that_is_no_encoder():
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match=r"StaticEmbedding, has no chat template.*build_encoder"):
        encoder_card(SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu"))


@pytest.mark.parametrize("published", PUBLISHED)
def test_cards_cite_the_models_own_paper(published, backbone, tmp_path):
    known = PUBLISHED[published]
    card = published_card(known)
    assert re.findall(r"(?:arXiv:|eprint=\{)(\d{4}\.\d{5})", card) == [known.paper]
    model = load_encoder(backbone(known.family), published=published, device="cpu")
    again = load_encoder(export_encoder(model, tmp_path / "encoder"), device="cpu")
    for one in (model, again):
        for paper in ("2510.13515", "2601.04720"):
            assert (f"eprint={{{paper}}}" in encoder_card(one)) is (known.paper == paper)
        assert "arXiv:2504.17432" in encoder_card(one)  # the recipe's


def test_a_card_shows_the_models_turn_that_a_template_of_ones_own_opens(backbone):
    own = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    )
    for asked in (True, False):
        model = build_encoder(backbone("llava_next"), device="cpu", prompt_template=own, add_generation_prompt=asked)
        end = " ASSISTANT:" if asked else ""
        assert f"| text | `<your text>{end}` |" in encoder_card(model)
        assert f"| image | `<image>{end}` |" in encoder_card(model)
