"""The emoji benchmark on disk, in the layout of MMEB-train and MMEB-eval, so that code meant for those runs on it.

```
benchmark.json  README.md                        settings and counts; card with licences
images/<vendor>/*.png  images/collage/*.png      every image once, on white
train/<Subset>/original-00000-of-00001.parquet
eval/<split>/<drawings>/<Task>/test-00000-of-00001.parquet
retrieval/<split>-<vendor>.json                  image and captions, for text->image and image->text
swaps/<split>/<drawings>/<set>.json              SugarCrepe-like
texts/*.parquet                                  stage 1: WordNet glosses, training captions; held-out glosses
texts/concepts-<split>.json                      label, keywords and definition of each concept
```

`split` is "validation" or "test": concepts never trained on. `drawings` is "trained" (the two vendors seen in training)
or "heldout" (the third vendor's, never seen).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from emoji.card import card
from emoji.concepts import Concept, load_concepts, split_concepts
from emoji.packages import Fetched, whole_folder
from emoji.tasks import META_TASKS
from emoji.texts import Gloss
from emoji.writer import BenchmarkWriter

FORMAT = 2  # of the files; a change rebuilds them


@dataclass(frozen=True)
class EmojiBenchmark:
    """Where the parts of the benchmark are, below the folder that `build_benchmark` wrote."""

    root: Path

    @cached_property
    def info(self) -> dict[str, Any]:
        """Settings, counts and chance levels: the content of `benchmark.json`."""
        return json.loads((self.root / "benchmark.json").read_text(encoding="utf-8"))

    @property
    def image_root(self) -> Path:
        """The folder all image paths are relative to."""
        return self.root / "images"

    @property
    def train_root(self) -> Path:
        """A folder in MMEB-train layout."""
        return self.root / "train"

    @property
    def meta_tasks(self) -> dict[str, str]:
        """Task -> its meta-task: Classification, VQA, Retrieval or Grounding."""
        return dict(META_TASKS)

    def eval_root(self, split: str, drawings: str = "trained") -> Path:
        """A folder in MMEB-eval layout."""
        return _existing(self.root / "eval" / split / drawings)

    def retrieval(self, split: str, vendor: str) -> tuple[list[Path], list[list[str]]]:
        """One vendor's plain drawings of a split's concepts and the captions of each, in the order of the concepts."""
        rows = json.loads(_existing(self.root / "retrieval" / f"{split}-{vendor}.json").read_text(encoding="utf-8"))
        return [self.image_root / row["image"] for row in rows], [row["captions"] for row in rows]

    def texts(self, split: str) -> dict[str, list[str]]:
        """Kind of text -> that of each of a split's concepts, "" where one has none: label, keywords, definition."""
        rows = json.loads(_existing(self.root / "texts" / f"concepts-{split}.json").read_text(encoding="utf-8"))
        return {kind: [row[kind] for row in rows] for kind in rows[0]}

    def swaps(self, split: str, drawings: str = "trained") -> dict[str, Path]:
        """Name of each attribute-swap set -> its JSON file."""
        folder = _existing(self.root / "swaps" / split / drawings)
        return {path.stem: path for path in sorted(folder.glob("*.json"))}

    def glosses(self, split: str = "train", limit: int | None = None) -> list[Gloss]:
        """WordNet terms with their glosses, shuffled; "validation" and "test" hold terms that training lacks."""
        table = pq.read_table(_existing(self.root / "texts" / f"wordnet-{split}.parquet"))
        return [Gloss(**row) for row in table.slice(0, limit).to_pylist()]

    def captions(self) -> list[str]:
        """Labels and keyword lists of the training concepts, for stage 1."""
        return pq.read_table(_existing(self.root / "texts" / "captions-train.parquet"))["text"].to_pylist()


def build_benchmark(
    fetched: Fetched,
    root: str | Path,
    *,
    seed: int = 0,
    num_candidates: int = 10,
    train_rows: int = 4000,
    eval_rows: int = 160,
    report: Callable[[str], None] = print,
) -> EmojiBenchmark:
    """Write the benchmark to `root`, unless it is there with the same settings (about half a minute).

    Everything follows from `seed`. The folder appears only when complete.

    Args:
        fetched: the unpacked packages.
        root: the folder to make; replaced if it holds a benchmark of other settings.
        seed: of the split and of all choices.
        num_candidates: answers shown in an evaluation row (classification shows all its classes).
        train_rows: rows a training subset, at most.
        eval_rows: rows a task, split and kind of drawings, at most.
        report: called with each line of progress.

    Raises:
        FileExistsError: `root` is a folder that this function did not make.
    """
    target = Path(root)
    settings = {
        "format": FORMAT,
        "seed": seed,
        "num_candidates": num_candidates,
        "train_rows": train_rows,
        "eval_rows": eval_rows,
    }
    done = EmojiBenchmark(target)
    if target.exists():
        if not (target / "benchmark.json").is_file():
            raise FileExistsError(f"{target} exists and is not a benchmark made here. Give another `root`.")
        if done.info["settings"] == settings:
            report(f"emoji benchmark: in {target}")
            return done
    report(f"emoji benchmark: writing {target}")
    with whole_folder(target) as scratch:
        info = BenchmarkWriter(fetched, scratch, settings, report).write()
        (scratch / "README.md").write_text(card(info), encoding="utf-8")
        (scratch / "benchmark.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    return EmojiBenchmark(target)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: check split, vendor and drawings, or run `build_benchmark` again."
        )
    return path


def concepts_of(fetched: Fetched, benchmark: EmojiBenchmark) -> dict[str, list[Concept]]:
    """The concepts behind a benchmark, split as it is: labels, keywords, categories, roles."""
    return split_concepts(load_concepts(fetched), seed=benchmark.info["settings"]["seed"])
