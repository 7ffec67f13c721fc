"""The Python blocks of the README files and of the docs run, in order and in one namespace.

They run in a folder that has what they name: tiny stand-ins of models and data. A Hub name is a relative path too, and
a folder of that name is loaded in place of the Hub's, so the blocks run as they are printed.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tiny import picture
from tiny_data import tiny_teacher, tiny_world
from training_sets_data import colpali_rows, conversations, write_hound, write_parquet
from unime_st import build_encoder, export_encoder
from unime_st.published import PUBLISHED

ROOT = Path(__file__).parents[1]
BACKBONES = {  # what the files name -> the family of the stand-in
    "llava-hf/llava-v1.6-mistral-7b-hf": "llava_next",
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl",
    **{name: known.family for name, known in PUBLISHED.items()},
}
TEACHERS = ("sentence-transformers/all-MiniLM-L6-v2", "Qwen/Qwen3-Embedding-8B", "Qwen/Qwen3-Embedding-0.6B")
SAVED = ("path/to/an/exported/encoder", "unime-emoji-miniature")
IMAGES = {"bus.jpg": "red", "boat.jpg": "green"}
PAGES = ["README.md", "examples/README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
CARDS = [f"model_cards/{page.name}" for page in sorted((ROOT / "model_cards").glob("*.md"))]
NOT_RUN = {
    "src/unime_st/model_card_template.md": "a template: the miniature's card, which it makes, is run",
    "src/unime_st/published_card_template.md": "a template: the cards that it makes are run",
}


def blocks(name):
    """The Python blocks of a file, each with the number of its first line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


def write_videos_and_pages(folder):
    """The sets that VLM2Vec-V2 trains on beside MMEB's."""
    (folder / "sft").mkdir()
    for name in ("video_caption_300k.jsonl", "video_240k_caption_15k.jsonl"):
        write_hound(folder, conversations(), f"sft/{name}")
    pages = colpali_rows()
    write_parquet(pages, folder / "colpali_train_set" / "data" / "train-00000-of-00001.parquet")
    visrag = {"query": pages["query"], "image": pages["image"], "source": ["ArxivQA"] * len(pages["query"])}
    write_parquet(visrag, folder / "VisRAG-Ret-Train-In-domain-data" / "a.parquet")


@pytest.fixture
def stand_ins(tmp_path, monkeypatch, backbone):
    """A folder with all of the above in it, as the current one."""

    def prepare(code):
        for name, family in BACKBONES.items():
            if f'"{name}"' in code:
                shutil.copytree(backbone(family), tmp_path / name)
        for name in TEACHERS:
            if f'"{name}"' in code:
                tiny_teacher(tmp_path / name)
        for name in SAVED:
            if f'"{name}"' in code:
                export_encoder(build_encoder(backbone("qwen2_vl"), device="cpu"), tmp_path / name)
        for name, color in IMAGES.items():
            picture(color).save(tmp_path / name)
        world = tiny_world(tmp_path / "world")
        shutil.copy(world / "texts.txt", tmp_path)
        for folder, source in (("MMEB-train", "train"), ("MMEB-eval", "eval")):
            shutil.copytree(world / source, tmp_path / folder)
            shutil.copytree(world / "images", tmp_path / folder / "images")
        for folder, source in (("flickr30k", "captions"), ("sugar-crepe/data", "sugarcrepe"), ("val2017", "images")):
            shutil.copytree(world / source, tmp_path / folder)
        if "load_llava_hound" in code:
            write_videos_and_pages(tmp_path)
        monkeypatch.chdir(tmp_path)

    return prepare


@pytest.mark.parametrize("name", [name for name in [*PAGES, *CARDS] if blocks(name)])
def test_python_blocks_run(name, stand_ins):
    found = blocks(name)
    stand_ins("".join(code for _, code in found))
    namespace = {"__name__": "readme"}
    for line, code in found:
        padded = "\n" * (line - 1) + code  # so that a traceback names the line in the file
        exec(compile(padded, str(ROOT / name), "exec"), namespace)  # the project's own text


def test_no_block_is_left_out():
    """Every Python in a page of the repository is run above, or says why not; none hides in a block of text."""
    found = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {*PAGES, *CARDS, *NOT_RUN} <= set(found.splitlines())
    for name in found.splitlines():
        text = (ROOT / name).read_text(encoding="utf-8")
        fenced = re.findall(r"^ *(```+|~~~+) *(\w*)[^\n]*\n(.*?)^ *\1 *$", text, flags=re.MULTILINE | re.DOTALL)
        python = [code for _, kind, code in fenced if kind in ("python", "py", "python3", "pycon")]
        assert name in NOT_RUN or len(python) == len(blocks(name)), f"{name} has a block that `blocks` does not find"
        assert not python or name in (*PAGES, *CARDS, *NOT_RUN), f"{name} has Python that no test runs"
        hidden = [code for _, kind, code in fenced if kind not in ("python", "bibtex")]
        assert not [code for code in hidden if re.search(r"^(from [\w.]+ )?import \w", code, re.MULTILINE)], name


def test_pages_have_blocks():
    found = {name: len(blocks(name)) for name in PAGES}
    assert found["README.md"] >= 2
    assert all(found[name] for name in ("examples/README.md", "docs/encode.md", "docs/train.md", "docs/evaluate.md"))


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not gone
    if name == "README.md":
        assert {link for link in links if link.startswith("docs/") and link.endswith(".md")} == {
            one for one in PAGES if one.startswith("docs/")
        }


def test_commands_name_scripts_and_recipes_that_are_there():
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for path in re.findall(r"examples/[\w./-]+\.(?:py|yaml)", text):
            assert (ROOT / path).is_file(), f"{name} names {path}"
        for path in re.findall(r"`(\w+\.(?:py|yaml))`", text if name.startswith("examples") else ""):
            assert list((ROOT / "examples").rglob(path)), f"{name} names {path}"
