"""The whole recipe on real input: miniature, align, stage 1, stage 2, evaluate, report. Every step is kept."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emoji import measure
from emoji.align import (
    caption_states,
    fit_projections,
    fold_of_images,
    load_projections,
    save_projections,
)
from emoji.benchmark import EmojiBenchmark, build_benchmark, concepts_of
from emoji.concepts import TRAINED_VENDORS
from emoji.miniature import build_miniature
from emoji.packages import Fetched, fetch
from emoji.reporting import write_report
from emoji.ridge import ridge_baseline, vision_features
from emoji.settings import DemoSettings
from emoji.training import LOG_FILE, hard_negative_loss, run_stage, run_stage1, stage2_rows
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.files import write_atomically
from unime_st.samplers import FalseNegativeAwareBatchSampler

PROJECTIONS = "projections.safetensors"
STEPS = ("aligned", "stage1", "stage2")
"""Checkpoints in order: the projector fitted, text distilled, pairs contrasted."""


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
                    measured = measure.evaluate(model, benchmark, self.settings, self.cache / "embeddings")
                    write_atomically(kept, json.dumps(measured, indent=1) + "\n")
                results[name] = json.loads(kept.read_text(encoding="utf-8"))
        with self._timed("report"):
            final = self.output / "unime-emoji-miniature"
            if not (final / "modules.json").is_file():
                shutil.copytree(checkpoints["stage2"], final, dirs_exist_ok=True)
            report = write_report(
                self.output,
                self.settings,
                benchmark,
                embeddings=self.cache / "embeddings",
                ridge=ridge,
                results=results,
                checkpoints=checkpoints,
                final=final,
                seconds=self.seconds,
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kB on Linux
        taken = time.monotonic() - self._started
        self.say(f"done in {taken:.0f} s, at most {peak:.1f} GB; checkpoint: {final}; report: {report}")
        return report

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
        folder = self.output / "checkpoints"
        self.aligned(fetched, benchmark)
        with self._timed("stage 1"):
            self._stage1(fetched, benchmark, folder)
        with self._timed("stage 2"):
            self._stage2(fetched, benchmark, folder)
        return {name: folder / name for name in STEPS}

    def aligned(self, fetched: Fetched, benchmark: EmojiBenchmark) -> Path:
        """Make the checkpoint that both stages start from, and its projections, or find them made."""
        folder = self.output / "checkpoints"
        settings = self.settings
        with self._timed("miniature"):
            backbone = build_miniature(
                fetched,
                self.cache / f"miniature-{settings.key('layers', 'image_size')}",
                layers=settings.layers,
                image_size=settings.image_size,
            )
        with self._timed("align"):
            self._aligned(fetched, benchmark, backbone, folder)
        return folder / "aligned"

    def _aligned(self, fetched: Fetched, benchmark: EmojiBenchmark, backbone: Path, folder: Path) -> None:
        if (folder / "aligned" / "modules.json").is_file():
            return
        self.say("fitting the projector to the language model's own states of the captions")
        model = build_encoder(backbone, prompt_template="chatml_open", device="cpu")
        features, captions = self.training_features(fetched, benchmark)
        images, _ = benchmark.retrieval("train", TRAINED_VENDORS[0])
        folds = self.folds(fetched, benchmark)
        own = [folds[path.relative_to(benchmark.image_root).as_posix()] for path in images]
        targets = caption_states(model, captions, self.settings.align_layer).double()
        projections = fit_projections(features, targets, own, self.settings.align_penalty)
        save_projections(projections, folder / PROJECTIONS)
        projections[0].write(model)
        export_encoder(model, folder / "aligned")

    def folds(self, fetched: Fetched, benchmark: EmojiBenchmark) -> dict[str, int]:
        """Path of each training drawing -> the fold its concept is in."""
        concepts = concepts_of(fetched, benchmark)["train"]
        return fold_of_images(concepts, TRAINED_VENDORS, self.settings.folds, self.settings.seed)

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
        stage = self.settings.stage1
        self.say(f"stage 1: {stage.steps} steps of {stage.batch_size} texts against the teacher")
        run_stage1(fetched, benchmark, folder / "aligned", self.settings, folder, self.cache)

    def _stage2(self, fetched: Fetched, benchmark: EmojiBenchmark, folder: Path) -> None:
        if (folder / "stage2" / LOG_FILE).is_file():
            return
        settings = self.settings
        self.say(f"stage 2: {settings.stage2.steps} steps of {settings.stage2.batch_size} pairs with hard negatives")
        rows = stage2_rows(benchmark, settings, self.folds(fetched, benchmark))
        loss = hard_negative_loss(settings.stage2, settings)
        run_stage(
            "stage2",
            folder / "stage1",
            rows,
            loss,
            settings.stage2,
            settings,
            folder,
            projections=load_projections(folder / PROJECTIONS),
            batch_sampler=FalseNegativeAwareBatchSampler,
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
