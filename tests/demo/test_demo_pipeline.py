"""The whole demo on made-up packages and a tiny model: each of its steps, kept, and none of them twice."""

import json
import os
import shlex
import subprocess
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from emoji import measure, media, pipeline, ridge, training
from emoji.benchmark import build_benchmark
from emoji.concepts import HELD_OUT_VENDOR
from emoji.evaluation import evaluate_demo
from emoji.pipeline import Demo
from emoji.reporting import does_it_see
from emoji.reporting import shown as shown_as
from emoji.settings import MEANS_NOTHING, SHORT, DemoSettings, StageSettings
from tiny_data import tiny_teacher
from unime_st.embedding import distinct as encoding

SETTINGS = DemoSettings(layers=2, stage1=StageSettings(2, 6, 1e-2), stage2=StageSettings(2, 6, 1e-2), swap_limit=2,
                        media_rows=3)  # fmt: skip
CHANNELS = 256  # of the tiny vision tower


@pytest.fixture
def demo(fake, linear_backbone, tmp_path, monkeypatch):
    teacher = tiny_teacher(tmp_path / "teacher")

    def features(self, split, vendor):
        images, _ = self.benchmark.retrieval(split, vendor)
        return np.random.default_rng(len(images)).normal(size=(len(images), 4, CHANNELS)).astype(np.float32)

    def benchmark(fetched, root, **options):
        return build_benchmark(fetched, root, eval_rows=6, **options)

    def text_teacher(fetched):
        return SentenceTransformer(str(teacher), device="cpu")

    monkeypatch.setattr(pipeline, "fetch", lambda cache, say: fake)
    monkeypatch.setattr(pipeline, "build_benchmark", benchmark)
    monkeypatch.setattr(pipeline, "build_miniature", lambda *arguments, **options: linear_backbone)
    monkeypatch.setattr(ridge.VisionFeatures, "__call__", features)
    monkeypatch.setattr(training, "text_teacher", text_teacher)
    monkeypatch.setattr(ridge, "text_teacher", text_teacher)
    lines = []
    made = Demo(tmp_path / "cache", tmp_path / "output", SETTINGS, lines.append)
    made.lines = lines
    return made


@pytest.mark.slow
def test_the_demo_ends_with_report_table_gallery_and_checkpoint(demo, monkeypatch):
    page = demo.run()
    html = page.read_text()
    assert demo.lines[-2].endswith(str(page))
    assert "to search drawings" in demo.lines[-1]
    results = json.loads((demo.output / "results.json").read_text())
    for table in results["tables"].values():
        assert list(table)[:2] == ["chance", "linear baseline (ridge)"]
        assert len(table) == 6
        assert all(0 <= value["mean"] <= 1 for row in table.values() for value in row.values())
    assert all(found["low"] <= found["mean"] <= found["high"] for pairs in results["differences"].values()
               for pair in pairs.values() for found in pair.values())  # fmt: skip
    assert next(iter(results["media"])) == "chance"
    assert set(results["media"]) == set(results["tables"]["heldout"]) - {"linear baseline (ridge)"}
    assert all(0 <= value["mean"] <= 1 for row in results["media"].values() for value in row.values())
    for task in ("EmojiMoving", "EmojiTurning", "EmojiVideo_t2v", "EmojiPages", "EmojiIllustratedPages"):
        assert f"stage 1 + 2: {task}" in html
    assert '<li class="right strip">' in html
    for title in (
        "Videos and pages: scores",
        "Does it see?",
        "False negatives filtered",
        "the cone opens",
        "top 5",
        "never trained on",
    ):
        assert title in html
    assert html.count("<img") > 20

    final = demo.output / "unime-emoji-miniature"
    card = (final / "README.md").read_text()
    bench = pipeline.build_benchmark(pipeline.fetch(None, None), demo.cache / "benchmark")
    stock = SentenceTransformer(str(final), device="cpu")
    images, captions = bench.retrieval("test", HELD_OUT_VENDOR)
    shown, said = stock.encode([{"image": str(path)} for path in images]), stock.encode([own[0] for own in captions])
    scores = said @ shown.T
    right = (scores > np.where(np.eye(len(scores)), -2, scores).max(1, keepdims=True)).diagonal().mean()
    measured = results["tables"]["heldout"]["stage 1 + 2"]["text→image R@1"]
    assert right == pytest.approx(measured["mean"], abs=1e-9)
    assert shown_as(measured) in card
    assert "2 steps of stage 1 and 2 of stage 2" in card
    for text in (html, card):
        assert MEANS_NOTHING in text[: text.index("text→image")]
    assert "model-index" not in card
    assert "|---" not in html  # Markdown of the benchmark's card
    assert "Licences of the parts and drawings" in html

    def never(*arguments, **options):
        raise AssertionError("the second run did again what was done")

    for module, name in (
        (training, "SentenceTransformerTrainer"), (measure, "evaluate"), (pipeline, "fit_projector"),
        (pipeline, "evaluate_media"), (media, "_write"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    assert Demo(demo.cache, demo.output, SETTINGS, demo.lines.append).run() == page


@pytest.mark.slow
def test_the_command_that_the_demo_ends_with_opens_a_page_on_the_drawings(demo):
    demo.run()
    command = shlex.split(demo.lines[-1].partition(": ")[2])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    served = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        address = served.stdout.readline().split()[3]
        with urllib.request.urlopen(f"{address}/about", timeout=60) as answer:
            about = json.loads(answer.read())
        drawings = list((demo.cache / "benchmark" / "images" / HELD_OUT_VENDOR).glob("*.png"))
        assert about["rows"] == len(drawings) > 3
        with urllib.request.urlopen(f"{address}/thumbnails/0", timeout=60) as answer:
            assert answer.read()[8:12] == b"WEBP"
    finally:
        served.kill()
        served.wait()


@pytest.mark.slow
def test_a_whole_run_publishes_what_it_measured(demo, monkeypatch):
    """The same run, as if its settings were those that results are stated for."""
    demo.run()
    monkeypatch.setattr(DemoSettings, "is_short", False)
    page = Demo(demo.cache, demo.output, SETTINGS, demo.lines.append).run()
    card = (demo.output / "unime-emoji-miniature" / "README.md").read_text()
    assert ModelCard(card).data.eval_results
    for text in (page.read_text(), card):
        assert MEANS_NOTHING not in text


def test_which_run_is_short():
    full = DemoSettings()
    assert SHORT.is_short
    assert SETTINGS.is_short
    assert not full.is_short
    assert not replace(full, seed=3, margin=0.2).is_short
    assert replace(full, swap_limit=13).is_short
    assert replace(full, media_rows=13).is_short
    assert replace(full, stage2=replace(full.stage2, steps=full.stage2.steps - 1)).is_short


@pytest.mark.parametrize(
    ("recall", "shuffled", "told"),
    [
        (0.13, 0.0, "1 %): the answers depend on what is in the images."),
        (0.5, 0.003, "1 %): the answers depend on what is in the images."),
        (0.0, 0.0, "does not show that the answers depend on what is in the images."),
        (0.006, 0.003, "does not show that the answers depend on what is in the images."),
        (0.003, 0.13, "does not show that the answers depend on what is in the images."),
        (0.13, 0.12, "does not show that the answers depend on what is in the images."),
        (0.5, 0.2, "the answers depend on what is in the images, but more are right than chance makes right."),
    ],
)
def test_what_is_said_of_seeing_follows_the_figures(recall, shuffled, told):
    said = does_it_see(recall, shuffled, 1000)
    assert said.endswith(told)
    assert f"{100 * shuffled:.1f} % in place of {100 * recall:.1f} % (chance 0.1 %)" in said


def test_an_output_of_other_settings_is_refused(demo):
    demo._claim_output()
    with pytest.raises(FileExistsError, match="other settings"):
        Demo(demo.cache, demo.output, replace(SETTINGS, seed=1), demo.lines.append).run()


def test_the_evaluation_goes_on_after_a_kill_and_comes_from_the_cache_then(demo, monkeypatch):
    encoded = []
    plain = encoding._Run.encode

    def counting(run, keys):
        if len(encoded) == 2 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        encoded.append(keys)
        return plain(run, keys)

    killed = []
    monkeypatch.setattr(encoding, "_BATCHES_A_CHUNK", 1)
    monkeypatch.setattr(encoding._Run, "encode", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate_demo(demo)
    page = evaluate_demo(demo)
    assert killed
    keys = [key for chunk in encoded for key in chunk]
    assert len(keys) == len(set(keys)) > 64  # what the killed run had done is not done again
    first = json.loads((page.parent / "emoji_results.json").read_text())
    assert evaluate_demo(demo) == page
    assert sum(map(len, encoded)) == len(keys)  # nothing the third time
    assert json.loads((page.parent / "emoji_results.json").read_text()) == first
    assert first["emoji_tasks"] == 12
    assert "the worst mistakes" in page.read_text()
    assert any("rows of 12 tasks evaluated in" in line for line in demo.lines)
