"""UniME-V2's parts on the demo's miniature: mined negatives, soft labels and reranking, on three seeds.

    python benchmarks/reranking.py                             # three seeds; goes on where it was stopped
    python benchmarks/reranking.py --split validation --seeds 0   # what the settings were chosen by

From one start, an encoder is trained on drawings and labels, and its nearest wrong labels are mined. A reranker, begun
at the encoder's weights, learns right from wrong pairs, and judges the mined labels. Then the encoder trains on, for as
many steps in each case: as before (the control), with mined negatives, with the reranker's soft labels, and with those
of a judge that knows the right labels (the demo's text teacher, which compares labels). Each is scored by itself and
reranked, drawing -> label, on concepts never trained on, by both trained vendors. Writes
`benchmarks/results/reranking.json` and `.md` beside it, or `reranking-validation`.
"""

from __future__ import annotations

from basics import RESULTS, keep, machine, over_seeds, parser, percent, read, table

# isort: split
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ablation import SETTINGS as DEMO
from emoji.settings import StageSettings


@dataclass(frozen=True)
class Settings:
    """What is done, chosen on the validation split."""

    rows: int = 2048  # drawings with their labels that are trained on
    first: StageSettings = field(default_factory=lambda: StageSettings(16, 128, 3e-4))
    second_rows: int = 768  # of them, those that are judged, and that the encoder trains on with
    second: StageSettings = field(default_factory=lambda: StageSettings(12, 64, 1e-4))
    pool: int = 12  # nearest wrong labels of each drawing
    negatives: int = 4  # of them, in training
    reranker_rows: int = 1024  # of the rows, those that the reranker learns from
    reranker_batch: int = 16  # pairs a step: of three, one right, one mined and one drawn at random
    reranker_rate: float = 1e-4
    judge_temperature: float = 0.2  # of the reranker's scores
    temperature: float = 0.05  # of the cosines
    margin: float = 0.01  # a label that the reranker scores above the right one's score less this is dropped
    stride: int = 2
    depth: int = 10  # labels reranked


SETTINGS = Settings()
CASES = ("control", "mined negatives", "soft labels", "teacher's soft labels")
NAMES = {"encoder": "encoder", "control": "trained on as before", "mined negatives": "+ mined negatives",
         "soft labels": "+ soft labels of the reranker",
         "teacher's soft labels": "+ soft labels of the text teacher"}  # fmt: skip


class Run:
    """One seed."""

    def __init__(self, seed: int, split: str, cache: Path, work: Path, settings: Settings) -> None:
        from transformers import set_seed

        from emoji.benchmark import EmojiBenchmark

        self.seed, self.split, self.settings, self.cache = seed, split, settings, cache
        self.start, self.folder = work / "checkpoints" / "start", work / f"seed{seed}"
        self.demo = replace(DEMO, seed=seed)
        self.benchmark = EmojiBenchmark(cache / "benchmark")
        self.seconds: dict[str, float] = {}
        set_seed(seed)

    def timed(self, name: str, make: Callable[[], Any]) -> Any:
        """Do a step, and note its seconds of processor time."""
        began = time.process_time()
        made = make()
        self.seconds[name] = round(time.process_time() - began, 1)
        print(f"seed {self.seed}, {name}: {self.seconds[name]:.0f} s", flush=True)
        return made

    def result(self) -> dict[str, Any]:
        """Everything, and the numbers."""
        shutil.rmtree(self.folder, ignore_errors=True)
        encoder = self.timed("encoder", lambda: self.train("encoder", self.start, self.rows(), self.contrast()))
        pool = self.timed("mining", lambda: self.mined(encoder))
        reranker = self.timed("reranker", lambda: self.reranker(encoder, pool))
        judged = self.timed("judging", lambda: self.judged(self.second(pool), reranker))
        data = {
            "control": (self.second(self.rows()), self.contrast()),
            "mined negatives": (self.with_negatives(self.second(pool)), self.contrast()),
            "soft labels": (judged, self.distil()),
            "teacher's soft labels": (self.by_teacher(self.second(pool)), self.distil()),
        }
        checkpoints = {"encoder": encoder}
        for name in CASES:
            rows, loss = data[name]
            checkpoints[name] = self.timed(name, lambda n=name, r=rows, o=loss: self.train(n, encoder, r, o))  # type: ignore[misc]
        scores = {
            name: self.timed(f"evaluation, {name}", lambda p=path: self.score(p, reranker))  # type: ignore[misc]
            for name, path in checkpoints.items()
        }
        shutil.rmtree(self.folder)
        return {"scores": scores, "judged": self.told, "cpu_seconds": self.seconds}

    def rows(self) -> Any:
        """Drawings and their labels."""
        from emoji.training import stage2_rows

        return stage2_rows(self.benchmark).shuffle(seed=self.seed).select(range(self.settings.rows))

    def second(self, rows: Any) -> Any:
        """The rows that the encoder trains on with."""
        return rows.select(range(self.settings.second_rows))

    def contrast(self) -> Callable[[Any], Any]:
        from unime_st.losses import HardNegativeInfoNCELoss

        options = {"temperature": self.settings.temperature, "margin": self.demo.margin, "num_hard_negatives": None}
        return lambda model: HardNegativeInfoNCELoss(model, **options, mini_batch_size=64)

    def distil(self) -> Callable[[Any], Any]:
        from unime_st.losses import CandidateKLLoss

        given = self.settings
        temperatures = {"temperature": given.temperature, "teacher_temperature": given.judge_temperature}
        return lambda model: CandidateKLLoss(model, **temperatures, mini_batch_size=64)

    def train(self, name: str, start: Path, rows: Any, loss: Callable[[Any], Any]) -> Path:
        from emoji.training import run_stage

        stage = self.settings.first if name == "encoder" else self.settings.second
        quiet = {"save_strategy": "no", "disable_tqdm": True}
        return run_stage(name.replace(" ", "-"), start, rows, loss, stage, self.demo, self.folder, **quiet)

    def mined(self, encoder: Path) -> Any:
        """Each drawing with the wrong labels nearest to it."""
        from unime_st import load_encoder
        from unime_st.data import load_mined_negatives, mine_hard_negatives

        model = load_encoder(encoder, device="cpu")
        folder = mine_hard_negatives(
            self.rows(), model, self.folder / "pool", num_negatives=self.settings.pool, margin=None,
            show_progress_bar=False,
        )  # fmt: skip
        return load_mined_negatives(folder)

    def with_negatives(self, pool: Any) -> Any:
        """Rows with the nearest wrong labels of each."""
        names = pool.column_names[: 2 + self.settings.negatives]
        return pool.remove_columns([name for name in pool.column_names if name not in names])

    def reranker(self, encoder: Path, pool: Any) -> Any:
        """Train a reranker that begins at the encoder's weights, on right pairs and mined wrong ones."""
        from datasets import Dataset
        from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

        from unime_st import build_reranker
        from unime_st.rerank_prompts import PairPrompt

        given = self.settings
        words = PairPrompt("", " This shows: ", ". True?", yes="Yes", no="No")
        model = build_reranker(encoder, prompt=words, device="cpu")
        backbone: Any = model[0].model  # type: ignore[index]
        backbone.model.vision_tower.requires_grad_(False)
        backbone.get_input_embeddings().requires_grad_(False)
        rng = np.random.default_rng(self.seed)
        root = pool.format["format_kwargs"]["transform"].image_root
        plain = pool.with_format(None)
        pairs: dict[str, list[Any]] = {"query": [], "candidate": [], "label": []}
        labels = [cell["text"] for cell in plain[plain.column_names[1]]]
        for number in range(given.reranker_rows):
            query, right, *wrong = (plain[number][name] for name in plain.column_names)
            image = {"image": str(root / query["image"])}
            strange = next(text for text in rng.choice(labels, len(labels)) if text != right["text"])
            nearest = wrong[rng.integers(len(wrong))]["text"]
            for text, label in ((right["text"], 1.0), (nearest, 0.0), (str(strange), 0.0)):
                pairs["query"].append(image)
                pairs["candidate"].append(text)
                pairs["label"].append(label)
        arguments = CrossEncoderTrainingArguments(
            str(self.folder / "reranker"), num_train_epochs=1, per_device_train_batch_size=given.reranker_batch,
            learning_rate=given.reranker_rate, warmup_steps=20, weight_decay=0.0, save_strategy="no", logging_steps=20,
            report_to="none", use_cpu=True, disable_tqdm=True, seed=self.seed, data_seed=self.seed,
        )  # fmt: skip
        loss = BinaryCrossEntropyLoss(model)
        CrossEncoderTrainer(model, arguments, train_dataset=Dataset.from_dict(pairs), loss=loss).train()
        return model

    def judged(self, pool: Any, reranker: Any) -> Any:
        """Rows with negatives chosen by the reranker's scores, which are their soft labels."""
        from unime_st.data import judge_negatives, load_judged_negatives

        given = self.settings
        folder = judge_negatives(
            pool, reranker, self.folder / "judged", num_negatives=given.negatives, margin=given.margin,
            stride=given.stride, rows_per_file=256, show_progress_bar=False,
        )  # fmt: skip
        told = read(folder / "mined.json")
        self.told = {name: told[name] for name in ("rows", "kept", "too_few", "without_negatives", "pairs")}
        return load_judged_negatives(folder)

    def by_teacher(self, pool: Any) -> Any:
        """The nearest wrong labels of each drawing, scored by how near the text teacher puts them to the right one."""
        from emoji.miniature import text_teacher
        from emoji.packages import fetch

        rows = self.with_negatives(pool)
        plain, transform = rows.with_format(None), rows.format["format_kwargs"]["transform"]
        columns = [[cell["text"] for cell in plain[name]] for name in rows.column_names[1:]]
        vectors = text_teacher(fetch(self.cache, print)).encode([text for own in columns for text in own])
        by_column = vectors.reshape(len(columns), len(rows), -1)
        scores = np.clip((by_column * by_column[:1]).sum(axis=2).T, 0, 1)
        return plain.add_column("label", scores.astype(np.float32).tolist()).with_transform(transform)

    def score(self, checkpoint: Path, reranker: Any) -> dict[str, float]:
        """Drawing -> label among all labels of the split, by the encoder alone and reranked."""
        from unime_st import load_encoder
        from unime_st.evaluation import MMEBEvaluator

        evaluator = MMEBEvaluator(
            None, [label_task(self.benchmark, self.split)], name="", reranker=reranker,
            rerank_depth=self.settings.depth, cache_dir=self.folder / "cache",
        )  # fmt: skip
        found = evaluator(load_encoder(checkpoint, device="cpu"))
        in_reach = (evaluator.results["labels"].rank <= self.settings.depth).mean()
        names = ("labels_precision@1", "reranked_labels_precision@1", "rerank_seconds", "rerank_pairs")
        return {name: float(found[name]) for name in names} | {"within_depth": float(in_reach)}


def label_task(benchmark: Any, split: str) -> Any:
    """Plain drawings by the trained vendors, each to find its label among those of all concepts of the split."""
    from emoji.concepts import TRAINED_VENDORS
    from unime_st.data.mmeb.eval_rows import EvalTask
    from unime_st.evaluation.mmeb.tasks import MMEBTask

    labels = list(dict.fromkeys(benchmark.texts(split)["label"]))
    place = {label: number for number, label in enumerate(labels)}
    images, right = [], []
    for vendor in TRAINED_VENDORS:
        paths, captions = benchmark.retrieval(split, vendor)
        images += [{"image": str(path.absolute())} for path in paths]
        right += [place[own[0]] for own in captions]
    queries = len(labels) + np.arange(len(images))
    rows = EvalTask([*({"text": label} for label in labels), *images], np.arange(len(images)), queries,
                    np.array(right), np.arange(len(images) + 1), corpus=np.arange(len(labels)))  # fmt: skip
    return MMEBTask("labels", lambda *, on_error: rows)  # noqa: ARG005 the protocol's argument


def run_one(seed: int, split: str, cache: Path, work: Path, settings: Settings) -> dict[str, Any]:
    """One seed; kept in a file, so that it is done once."""
    file = work / DEMO.key(*asdict(DEMO)) / split / f"{seed}-{_key(settings)}.json"
    if not file.is_file():
        import torch

        torch.set_num_threads(1)
        keep(file, Run(seed, split, cache, work, settings).result())
    return read(file)


def _key(settings: Settings) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]


def summarise(runs: dict[int, dict[str, Any]], split: str, settings: Settings) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over seeds."""
    rows: dict[str, Any] = {}
    for name in NAMES:
        scores = [run["scores"][name] for run in runs.values()]
        rows[name] = {metric: over_seeds([score[metric] for score in scores]) for metric in scores[0]}
        gains = [score["reranked_labels_precision@1"] - score["labels_precision@1"] for score in scores]
        rows[name]["gain"] = over_seeds(gains)
    totals = [sum(run["cpu_seconds"].values()) for run in runs.values()]
    return {
        "split": split, "seeds": sorted(runs), "settings": asdict(settings), "table": rows,
        "judged": [run["judged"] for run in runs.values()],
        "cpu_seconds": [run["cpu_seconds"] for run in runs.values()],
        "cpu_minutes_a_seed": round(statistics.mean(totals) / 60, 1), "machine": machine(),
    }  # fmt: skip


def score_table(summary: dict[str, Any]) -> str:
    """The table, in percent."""
    depth = summary["settings"]["depth"]
    head = ("", "drawing→label R@1", f"right label in the first {depth}", "reranked R@1", "change by reranking")
    metrics = ("labels_precision@1", "within_depth", "reranked_labels_precision@1", "gain")
    rows = [[NAMES[name], *(percent(row[metric]) for metric in metrics)] for name, row in summary["table"].items()]
    return "\n".join(table(head, rows))


def markdown(summary: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"# UniME-V2's parts on unseen emoji concepts, {summary['split']} split",
        "",
        f"`python benchmarks/reranking.py`; mean ± standard deviation over {len(summary['seeds'])} seed(s), percent.",
        f"A seed took {summary['cpu_minutes_a_seed']} minutes of processor time.",
        "",
    ]
    return "\n".join([*lines, score_table(summary)]) + "\n"


def main() -> None:
    options = parser(__doc__, cache=True)
    options.add_argument("--work", type=Path, default=Path(".demo_cache/reranking"), help="checkpoints and single runs")
    options.add_argument("--split", choices=("test", "validation"), default="test", help="concepts to score on")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = options.parse_args()
    from emoji.pipeline import Demo

    demo = Demo(given.cache, given.work / "start", DEMO)
    demo.start(*demo.benchmark())
    runs = {seed: run_one(seed, given.split, given.cache, given.work / "start", SETTINGS) for seed in given.seeds}
    summary = summarise(runs, given.split, SETTINGS)
    name = "reranking" if given.split == "test" else "reranking-validation"
    keep(RESULTS / f"{name}.json", summary)
    keep(RESULTS / f"{name}.md", markdown(summary))
    print(markdown(summary))


if __name__ == "__main__":
    sys.exit(main())
