"""The whole recipe on real input: miniature, align, stage 1, stage 2, evaluate, report. Every step is kept."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from unime_st.data import teacher_embeddings, with_teacher_labels
from unime_st.demo import measure
from unime_st.demo.align import align_projector
from unime_st.demo.concepts import TRAINED_VENDORS
from unime_st.demo.emoji import EmojiBenchmark, build_benchmark
from unime_st.demo.miniature import build_miniature, text_teacher
from unime_st.demo.packages import Fetched, fetch
from unime_st.demo.reporting import write_report
from unime_st.demo.ridge import ridge_baseline, vision_features
from unime_st.demo.settings import DemoSettings
from unime_st.demo.training import LOG_FILE, hard_negative_loss, run_stage, stage1_texts, stage2_rows
from unime_st.losses import DistillKLLoss
from unime_st.modules import build_encoder, export_encoder, load_encoder

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
STEPS = ("start", "aligned", "stage1", "stage2")
"""Checkpoints in order: the parts put together, the projector fitted, text distilled, pairs contrasted."""


class Demo:
    """The demo's steps and where their results are.

    Args:
        cache: for packages, benchmark, features and embeddings; shared by runs of other settings.
        output: for checkpoints, results and the report of these settings.
        settings: what to do.
        say: called with each line of progress.
    """

    def __init__(self, cache: str | Path, output: str | Path, settings: DemoSettings, say: Say = print) -> None:
        self.cache = Path(cache)
        self.output = Path(output)
        self.settings = settings
        self.say = say
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def run(self) -> Path:
        """Do everything that is not yet done; returns the report's path."""
        self._claim_output()
        with self._timed("packages"):
            fetched = fetch(self.cache, self.say)
        with self._timed("benchmark"):
            benchmark = build_benchmark(fetched, self.cache / "benchmark", seed=self.settings.seed, report=self.say)
        with self._timed("ridge baseline"):
            ridge = ridge_baseline(
                fetched, benchmark, self.cache / "features", image_size=self.settings.image_size, report=self.say
            )
        checkpoints = self.checkpoints(fetched, benchmark)
        results = {}
        for name in STEPS:
            with self._timed(f"evaluation of {name}"):
                kept = self.output / "results" / f"{name}.json"
                if not kept.is_file():
                    self.say(f"evaluating {name} on concepts never trained on")
                    model = load_encoder(checkpoints[name], device="cpu")
                    measure.evaluate(model, benchmark, self.settings, self.cache / "embeddings", kept)
                results[name] = json.loads(kept.read_text(encoding="utf-8"))
        with self._timed("report"):
            final = self.output / "unime-emoji-miniature"
            if not (final / "modules.json").is_file():
                shutil.copytree(checkpoints["stage2"], final, dirs_exist_ok=True)
            report = write_report(self, benchmark, ridge, results, checkpoints, final)
        self.say(f"done in {time.monotonic() - self._started:.0f} s; checkpoint: {final}; report: {report}")
        return report

    def checkpoints(self, fetched: Fetched, benchmark: EmojiBenchmark) -> dict[str, Path]:
        """Make the four checkpoints, or find them made."""
        folder = self.output / "checkpoints"
        settings = self.settings
        with self._timed("miniature"):
            backbone = build_miniature(
                fetched,
                self.cache / f"miniature-{settings.key('layers', 'image_size')}",
                layers=settings.layers,
                image_size=settings.image_size,
            )
            if not (folder / "start" / "modules.json").is_file():
                self.say("building the encoder")
                export_encoder(build_encoder(backbone, prompt_template="chatml_open", device="cpu"), folder / "start")
        with self._timed("align"):
            self._aligned(fetched, benchmark, folder)
        with self._timed("stage 1"):
            self._stage1(fetched, benchmark, folder)
        with self._timed("stage 2"):
            self._stage2(benchmark, folder)
        return {name: folder / name for name in STEPS}

    def _aligned(self, fetched: Fetched, benchmark: EmojiBenchmark, folder: Path) -> None:
        if (folder / "aligned" / "modules.json").is_file():
            return
        self.say("fitting the projector to the language model's own states of the captions")
        model = load_encoder(folder / "start", device="cpu")
        features, captions = self.training_features(fetched, benchmark)
        align_projector(model, features, captions, self.settings.align_layer, self.settings.align_penalty)
        export_encoder(model, folder / "aligned")

    def training_features(self, fetched: Fetched, benchmark: EmojiBenchmark) -> tuple[list[Any], list[str]]:
        """Frozen vision features of the training drawings, one array a vendor, and their captions."""
        name = f"{benchmark.info['settings']['format']}-{self.settings.seed}-{self.settings.image_size}"
        features, captions = [], []
        for vendor in TRAINED_VENDORS:
            images, lists = benchmark.retrieval("train", vendor)
            file = self.cache / "features" / f"vision-{name}-train-{vendor}.npy"
            size = self.settings.image_size
            features.append(vision_features(fetched, images, file, image_size=size, report=self.say))
            captions = [own[0] for own in lists]
        return features, captions

    def _stage1(self, fetched: Fetched, benchmark: EmojiBenchmark, folder: Path) -> None:
        if (folder / "stage1" / LOG_FILE).is_file():
            return
        settings = self.settings
        self.say(f"stage 1: {settings.stage1.steps} steps of {settings.stage1.batch_size} texts against the teacher")
        texts = stage1_texts(benchmark, settings)
        targets = teacher_embeddings(text_teacher(fetched), texts, self.cache / "teacher")
        rows = with_teacher_labels(texts, targets)

        def loss(model: SentenceTransformer) -> DistillKLLoss:
            return DistillKLLoss(model, temperature=settings.stage1.temperature, include_diagonal=False)

        run_stage("stage1", folder / "aligned", rows, loss, settings.stage1, settings, folder)

    def _stage2(self, benchmark: EmojiBenchmark, folder: Path) -> None:
        if (folder / "stage2" / LOG_FILE).is_file():
            return
        settings = self.settings
        self.say(f"stage 2: {settings.stage2.steps} steps of {settings.stage2.batch_size} pairs with hard negatives")
        rows = stage2_rows(benchmark, settings)
        loss = hard_negative_loss(settings.stage2, settings)
        run_stage(
            "stage2", folder / "stage1", rows, loss, settings.stage2, settings, folder, gather_false_negatives=True
        )

    def _claim_output(self) -> None:
        """Refuse to mix results of other settings."""
        self.output.mkdir(parents=True, exist_ok=True)
        marker = self.output / "settings.json"
        settings = json.loads(json.dumps(asdict(self.settings)))
        if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != settings:
            raise FileExistsError(
                f"{self.output} holds a run with other settings. Give another --output, or remove that folder."
            )
        marker.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def _timed(self, step: str) -> Any:
        began = time.monotonic()
        yield
        taken = time.monotonic() - began
        times = self.output / "seconds.json"
        kept = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else {}
        kept[step] = max(round(taken, 1), kept.get(step, 0.0))
        times.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        self.seconds = kept
        if taken > 1:
            self.say(f"[{time.monotonic() - self._started:6.0f} s] {step}: {taken:.0f} s")
