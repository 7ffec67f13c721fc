"""The whole recipe on real input: miniature, closed-form start, stages 1 and 2, evaluate, report. Each step is kept."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from emoji import measure
from emoji.align import calibrate_norm, fit_projector
from emoji.benchmark import EmojiBenchmark, build_benchmark
from emoji.concepts import TRAINED_VENDORS
from emoji.media import build_media, evaluate_media
from emoji.miniature import build_miniature, start_encoder
from emoji.packages import Fetched, fetch
from emoji.reporting import write_report
from emoji.ridge import VisionFeatures, ridge_baseline
from emoji.searching import search_command
from emoji.settings import DemoSettings
from emoji.training import hard_negative_loss, run_stage, run_stage1, stage2_rows
from unime_st import export_encoder, load_encoder
from unime_st.files import write_atomically
from unime_st.samplers import FalseNegativeAwareBatchSampler

STEPS = ("start", "stage1", "stage2", "stage2_only")
"""Checkpoints: projector fitted to the untrained language model; text distilled and projector fitted again; pairs
contrasted after that; and pairs contrasted without stage 1."""


class Demo:
    """The demo's steps and where their results are.

    Args:
        cache: for packages, benchmark, features and embeddings; shared by runs of other settings.
        output: for checkpoints, results and the report of these settings.
        settings: what to do.
        say: called with each line of progress.
    """

    def __init__(
        self, cache: str | Path, output: str | Path, settings: DemoSettings, say: Callable[[str], None] = print
    ) -> None:
        self.cache = Path(cache)
        self.output = Path(output)
        self.settings = settings
        self.say = say
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def run(self) -> Path:
        """Do everything that is not yet done; returns the report's path."""
        fetched, benchmark = self.benchmark()
        with self._timed("ridge baseline"):
            features = self.features(fetched, benchmark)
            ridge = self._kept("ridge", lambda: {"ranks": ridge_baseline(features, "test")})
        checkpoints = self.checkpoints(fetched, benchmark)
        results = {"ridge": ridge}
        for name, checkpoint in checkpoints.items():
            with self._timed(f"evaluation of {name}"):
                results[name] = self._kept(name, partial(self.evaluate, checkpoint, benchmark, "test"))
        with self._timed("videos and pages"):
            media = build_media(benchmark, self.cache / "media", rows=self.settings.media_rows, seed=self.settings.seed)
            for name, checkpoint in checkpoints.items():
                self.say(f"videos and pages of {name}")
                asked = partial(evaluate_media, checkpoint, media, self.cache / "embeddings")
                results[name]["media"] = self._kept(f"{name}_media", asked)
        with self._timed("report"):
            final = self.output / "unime-emoji-miniature"
            if not (final / "modules.json").is_file():
                shutil.copytree(checkpoints["stage2"], final, dirs_exist_ok=True)
            report = write_report(
                self.output,
                self.settings,
                benchmark,
                media=media,
                embeddings=self.cache / "embeddings",
                results=results,
                checkpoints=checkpoints,
                final=final,
                seconds=self.seconds,
            )
        with self._timed("search page"):
            search = search_command(final, benchmark, self.output / "corpus")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kB on Linux
        taken = time.monotonic() - self._started
        self.say(f"done in {taken:.0f} s, at most {peak:.1f} GB; checkpoint: {final}; report: {report}")
        self.say(f"to search drawings that it never saw, by text or image: {search}")
        return report

    def features(self, fetched: Fetched, benchmark: EmojiBenchmark) -> VisionFeatures:
        """Frozen features of the drawings, kept in the cache."""
        return VisionFeatures(fetched, benchmark, self.cache / "features", self.settings.image_size)

    def evaluate(self, checkpoint: Path, benchmark: EmojiBenchmark, split: str) -> dict[str, Any]:
        """A checkpoint's numbers on a split."""
        self.say(f"evaluating {checkpoint.name} on concepts never trained on")
        model = load_encoder(checkpoint, device="cpu")
        return measure.evaluate(model, benchmark, split, self.settings, self.cache / "embeddings")

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The results of this name, made if they are not there."""
        file = self.output / "results" / f"{name}.json"
        if not file.is_file():
            write_atomically(file, json.dumps(make()) + "\n")
        return json.loads(file.read_text(encoding="utf-8"))

    def benchmark(self) -> tuple[Fetched, EmojiBenchmark]:
        """Fetch the packages and build the benchmark, or find both made, and claim the output for these settings."""
        self._claim_output()
        with self._timed("packages"):
            fetched = fetch(self.cache, self.say)
        with self._timed("benchmark"):
            benchmark = build_benchmark(fetched, self.cache / "benchmark", seed=self.settings.seed, report=self.say)
        return fetched, benchmark

    def checkpoints(self, fetched: Fetched, benchmark: EmojiBenchmark) -> dict[str, Path]:
        """Make the checkpoints, or find them made."""
        start = self.start(fetched, benchmark)
        with self._timed("stage 1"):
            stage1 = self.stage1(fetched, benchmark, start)
        with self._timed("stage 2"):
            stage2 = self.stage2(benchmark, stage1, "stage2")
        with self._timed("stage 2 without stage 1"):
            return dict(zip(STEPS, (start, stage1, stage2, self.stage2(benchmark, start, "stage2_only")), strict=True))

    def start(self, fetched: Fetched, benchmark: EmojiBenchmark) -> Path:
        """Make the checkpoint that training starts from, or find it made."""
        target = self.output / "checkpoints" / "start"
        settings = self.settings
        with self._timed("miniature"):
            if (target / "modules.json").is_file():
                return target
            backbone = build_miniature(
                fetched,
                self.cache / f"miniature-{settings.key('layers', 'image_size')}",
                layers=range(settings.layers),
                image_size=settings.image_size,
            )
            model = start_encoder(backbone)
            calibrate_norm(model, benchmark.texts("train")["label"])
            self._fit(model, fetched, benchmark)
            return export_encoder(model, target)

    def stage1(self, fetched: Fetched, benchmark: EmojiBenchmark, start: Path, **options: Any) -> Path:
        """Train stage 1 and fit the projector to what it made, or find it done; see `run_stage` for options."""
        return run_stage1(
            fetched,
            benchmark,
            start,
            self.settings,
            self.output / "checkpoints",
            self.cache,
            finish=lambda model: self._fit(model, fetched, benchmark),
            **options,
        )

    def stage2(self, benchmark: EmojiBenchmark, start: Path, name: str) -> Path:
        """Train stage 2 from a checkpoint, or find it done."""
        settings = self.settings
        return run_stage(
            name,
            start,
            stage2_rows(benchmark),
            hard_negative_loss(settings),
            settings.stage2,
            settings,
            self.output / "checkpoints",
            batch_sampler=FalseNegativeAwareBatchSampler,
        )

    def _fit(self, model: SentenceTransformer, fetched: Fetched, benchmark: EmojiBenchmark) -> None:
        """Fit a model's projector to the training drawings."""
        features = self.features(fetched, benchmark)
        shown = [features("train", vendor) for vendor in TRAINED_VENDORS]
        fit_projector(model, shown, benchmark.texts("train")["label"], self.settings.penalty)

    def _claim_output(self) -> None:
        """Refuse to mix results of other settings."""
        self.output.mkdir(parents=True, exist_ok=True)
        marker = self.output / "settings.json"
        settings = json.loads(json.dumps(asdict(self.settings)))
        if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != settings:
            raise FileExistsError(
                f"{self.output} holds a run with other settings. Give another --output, or remove that folder."
            )
        write_atomically(marker, json.dumps(settings, indent=1) + "\n")

    @contextmanager
    def _timed(self, step: str) -> Any:
        began = time.monotonic()
        yield
        taken = time.monotonic() - began
        times = self.output / "seconds.json"
        kept = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else {}
        kept[step] = max(round(taken, 1), kept.get(step, 0.0))
        write_atomically(times, json.dumps(kept, indent=1) + "\n")
        self.seconds = kept
        if taken > 1:
            self.say(f"[{time.monotonic() - self._started:6.0f} s] {step}: {taken:.0f} s")
