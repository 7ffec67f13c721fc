"""How the files of the emoji benchmark are written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emoji.concepts import (
    SPLITS,
    TRAINED_VENDORS,
    VENDORS,
    load_concepts,
    minimal_pairs,
    split_concepts,
)
from emoji.images import write_collage, write_drawing
from emoji.packages import Fetched
from emoji.swaps import attribute_swaps
from emoji.tasks import DRAWINGS, TASKS, TRAIN_ONLY_TASKS, Example, Pool
from emoji.texts import caption_texts, definitions, keywords_of, split_glosses, wordnet_glosses

HARDEST = 3  # a training row's negative is one of so many hardest wrong answers


class BenchmarkWriter:
    """Writes the files of one benchmark into an empty folder: tables first, then the images that they name."""

    def __init__(self, fetched: Fetched, root: Path, settings: dict[str, Any], report: Callable[[str], None]) -> None:
        self.fetched, self.root, self.settings, self.report = fetched, root, settings, report
        self.concepts = load_concepts(fetched)
        self.splits = split_concepts(self.concepts, seed=settings["seed"])
        self.pairs = minimal_pairs(self.concepts)
        self.images: set[str] = set()
        self.collages: dict[str, tuple[str, ...]] = {}
        self.subgroups: dict[str, list[str]] = {}
        for concept in self.concepts:
            names = self.subgroups.setdefault(concept.group, [])
            if concept.subgroup not in names:
                names.append(concept.subgroup)

    def write(self) -> dict[str, Any]:
        """Write everything; returns the content of `benchmark.json`."""
        info = {
            "settings": self.settings,
            "concepts": {split: len(concepts) for split, concepts in self.splits.items()},
            "train": self._train(),
            "eval": self._evaluation(),
            "retrieval": self._retrieval(),
            "swaps": self._swaps(),
            "texts": self._texts(),
        }
        self.report(f"emoji benchmark: tables written, now {len(self.images) + len(self.collages)} images")
        return info | {"images": self._images()}

    def _pool(self, split: str, vendors: Sequence[str], purpose: str) -> Pool:
        seed = f"{self.settings['seed']} {split} {vendors} {purpose}"
        prefix = "-".join((split, vendors[0] if len(vendors) == 1 else "trained", purpose))
        rng = random.Random(seed)
        num_wrong = self.settings["num_candidates"] - 1
        return Pool(self.splits[split], vendors, self.subgroups, rng, prefix, num_wrong=num_wrong)

    def _examples(self, pool: Pool, examples: Iterable[Example], most: int) -> list[Example]:
        """At most `most` examples, chosen evenly by chance; their images are remembered."""
        made = list(examples)
        chosen = pool.rng.sample(made, min(most, len(made)))
        self._remember(pool, (item.image for row in chosen for item in (row.query, row.target, *row.wrong)))
        return chosen

    def _remember(self, pool: Pool, images: Iterable[str]) -> None:
        for image in images:
            if image in pool.collages:
                self.collages[image] = pool.collages[image]
                self.images.update(pool.collages[image])
            elif image:
                self.images.add(image)

    def _train(self) -> dict[str, int]:
        counts = {}
        for name, task in (TASKS | TRAIN_ONLY_TASKS).items():
            pool = self._pool("train", TRAINED_VENDORS, name)
            rows = []
            for example in self._examples(pool, task(pool), self.settings["train_rows"]):
                negative = pool.rng.choice(example.wrong[:HARDEST])
                rows.append(
                    {
                        "qry": example.query.text,
                        "qry_image_path": example.query.image,
                        "pos_text": example.target.text,
                        "pos_image_path": example.target.image,
                        "neg_text": negative.text,
                        "neg_image_path": negative.image,
                    }
                )
            self._table(f"train/{name}/original-00000-of-00001.parquet", rows)
            counts[name] = len(rows)
        return counts

    def _evaluation(self) -> dict[str, Any]:
        counts: dict[str, Any] = {}
        for split in SPLITS[1:]:
            for drawings, vendors in DRAWINGS.items():
                for name, task in TASKS.items():
                    pool = self._pool(split, vendors, name)
                    rows = []
                    for example in self._examples(pool, task(pool), self.settings["eval_rows"]):
                        candidates = (example.target, *example.wrong)
                        rows.append(
                            {
                                "qry_text": example.query.text,
                                "qry_img_path": example.query.image,
                                "tgt_text": [item.text for item in candidates],
                                "tgt_img_path": [item.image for item in candidates],
                            }
                        )
                    self._table(f"eval/{split}/{drawings}/{name}/test-00000-of-00001.parquet", rows)
                    chance = sum(1 / len(row["tgt_text"]) for row in rows) / len(rows)
                    place = counts.setdefault(split, {}).setdefault(drawings, {})
                    place[name] = {"rows": len(rows), "chance": round(chance, 4)}
        return counts

    def _retrieval(self) -> dict[str, int]:
        counts = {}
        for split, concepts in self.splits.items():
            for vendor in TRAINED_VENDORS if split == "train" else VENDORS:
                rows = [{"image": concept.image(vendor), "captions": [concept.label]} for concept in concepts]
                self.images.update(str(row["image"]) for row in rows)
                self._json(f"retrieval/{split}-{vendor}.json", rows)
                counts[f"{split}-{vendor}"] = len(rows)
        return counts

    def _swaps(self) -> dict[str, Any]:
        counts: dict[str, Any] = {}
        for split in SPLITS[1:]:
            for drawings, vendors in DRAWINGS.items():
                pool = self._pool(split, vendors, "swaps")
                for name, rows in attribute_swaps(pool, self.pairs).items():
                    self._remember(pool, (row["filename"] for row in rows))
                    content = {str(index): row for index, row in enumerate(rows)}
                    self._json(f"swaps/{split}/{drawings}/{name}.json", content)
                    counts.setdefault(split, {}).setdefault(drawings, {})[name] = len(rows)
        return counts

    def _texts(self) -> dict[str, int]:
        glosses = wordnet_glosses(self.fetched)
        unseen = {concept.label.lower() for split in SPLITS[1:] for concept in self.splits[split]}
        parts = split_glosses(
            (entry for entry in glosses if entry.term.lower() not in unseen), seed=self.settings["seed"]
        )
        counts = {}
        for split, own in zip(SPLITS, parts, strict=True):
            self._table(f"texts/wordnet-{split}.parquet", [asdict(gloss) for gloss in own])
            counts[f"wordnet-{split}"] = len(own)
            concepts = self.splits[split]
            rows = [
                {"label": concept.label, "keywords": keywords_of(concept), "definition": definition}
                for concept, definition in zip(concepts, definitions(concepts, glosses), strict=True)
            ]
            self._json(f"texts/concepts-{split}.json", rows)
            counts |= {f"{kind}-{split}": sum(bool(row[kind]) for row in rows) for kind in ("keywords", "definition")}
        captions = caption_texts(self.splits["train"])
        self._table("texts/captions-train.parquet", [{"text": text} for text in captions])
        return counts | {"captions-train": len(captions)}

    def _images(self) -> int:
        sources: dict[str, Path] = {}
        for concept in self.concepts:
            for vendor, paths in concept.sources.items():
                sources |= {concept.image(vendor, tone): path for tone, path in enumerate(paths)}
        folder = self.root / "images"
        for name in (*VENDORS, "collage"):
            (folder / name).mkdir(parents=True)
        with ThreadPoolExecutor(max_workers=2) as pool:
            plain = pool.map(lambda name: write_drawing(sources[name], folder / name), sorted(self.images))
            for count, _ in enumerate(plain, start=1):
                if count % 2000 == 0:
                    self.report(f"emoji benchmark: {count} drawings written")
            collages = sorted(self.collages.items())
            list(pool.map(lambda entry: write_collage([folder / p for p in entry[1]], folder / entry[0]), collages))
        return len(self.images) + len(self.collages)

    def _table(self, name: str, rows: list[dict[str, Any]]) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)

    def _json(self, name: str, content: Any) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
