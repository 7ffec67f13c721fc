"""Which negatives, how many, in which batch: the settings of stage 2's loss, on heads over frozen features.

    python benchmarks/heads.py            # all runs; goes on where it was stopped

A run takes seconds, so that ten seeds and intervals are to be had, where one of the whole miniature takes minutes. A
text is the untrained miniature's mean state (4 layers, 576 dimensions), an image the frozen tower's features, pooled;
a linear head on each begins as a ridge regression to the teacher's embeddings (of stage 1's texts, and of the labels of
the training drawings) and is trained by `HardNegativeInfoNCELoss`. Three sets:

* `text`: terms of WordNet and their glosses, labels and their keywords;
* `image`: drawings and labels, both ways, half of the vision features left out at random; swaps ask whether a drawing
  prefers its own label to one with another number, gender, colour, hair or direction;
* `crowded`: 150 concepts whose drawings, labels, keywords and definitions meet in a batch, so that a query has several
  right answers which no comparison of contents can tell from wrong ones. `precision` is the share of what the margin
  leaves out that is of the query's concept, `recall` that of what is of its concept which is left out.

All settings of a set see the same batches, seed by seed, and are compared with the stock loss (all negatives, nothing
left out) on the same queries: the interval is the middle 95 % of differences over resampled seeds and queries. The
temperature and the learning rate of the stock loss and of k = 8 are chosen on the validation split, each for itself and
for each set; other settings take those of the loss they are a variant of. Scored are concepts and terms never trained
on. Writes `benchmarks/results/heads.json`, and `heads.md` beside it.
"""

from __future__ import annotations

from basics import RESULTS, compared, difference, keep, kept, machine, over_seeds, parser, percent, table

# isort: split
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize

from emoji.benchmark import EmojiBenchmark
from emoji.concepts import TRAINED_VENDORS, VENDORS
from emoji.measure import ranks
from emoji.miniature import text_teacher
from emoji.pipeline import Demo
from emoji.ridge import VisionFeatures, choose_penalty, fit_ridge, pooled
from emoji.settings import DemoSettings
from unime_st import load_encoder
from unime_st.files import write_atomically
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.samplers import FalseNegativeAwareBatchSampler

STEPS, WEIGHT_DECAY, TUNING_SEEDS = 60, 0.01, (100, 101)
TEMPERATURES, LEARNING_RATES = (0.02, 0.05, 0.1, 0.2, 0.4), (1e-4, 3e-4, 1e-3, 3e-3)
BATCHES = {"text": (128, 512, 1024), "image": (256, 512), "crowded": (256,)}
SEEDS = 10
SPLITS = ("validation", "test")
SWAPS = "attribute swaps"
GLOSSES, CROWDED, FITTED = 20000, 150, 10000  # of WordNet; concepts; texts that the head on texts is fitted to
CHOSEN = ("stock", "k = 8, both filters")
"""Variants whose temperature and learning rate are chosen."""
STOCK: dict[str, Any] = {"num_hard_negatives": None, "margin": None, "contents": False}
ALL: dict[str, Any] = {"num_hard_negatives": None, "margin": 0.1}
FULL: dict[str, Any] = {"num_hard_negatives": 8, "margin": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "stock": STOCK,
    "all, contents": ALL | {"margin": None},
    "all, both filters": ALL,
    **{f"all, margin {margin}": ALL | {"margin": margin} for margin in (-0.1, 0.0, 0.2)},
    "k = 8, both filters": FULL,
    "k = 8, contents": FULL | {"margin": None},
    "k = 8, margin 0.0": FULL | {"margin": 0.0},
    "k = 8, margin -0.1": FULL | {"margin": -0.1},
    "k = 8 after 12 steps of all": FULL | {"hard_negatives_warmup_steps": 12},
    "k = 4": FULL | {"num_hard_negatives": 4},
    "k = 32": FULL | {"num_hard_negatives": 32},
    "k = B / 32": FULL | {"num_hard_negatives": "share"},
    "8 at random": FULL | {"negative_selection": "random"},
    "all, explicit negatives": ALL | {"negatives": True},
    "all, explicit negatives trusted": ALL | {"negatives": True, "filter_explicit_negatives": False},
    "all, hard rows together": ALL | {"batches": {"hard_negatives_together": 4}},
    "all, B3 batches": ALL | {"batches": {"cluster_size": 32}},
    "k = 8, B3 batches": FULL | {"batches": {"cluster_size": 32}},
    "all, hardness 5": ALL | {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0},
}
"""Name -> the loss's arguments; "contents": whether it is told which contents are equal; "negatives": whether each row
has the label that its drawing is most easily taken for; "batches": what the package's sampler is told, with the heads'
start as its guide, in place of batches at random."""
ONLY = {"negatives": ("image",), "batches": ("text", "image")}
"""Which sets a part of a variant belongs to; the others skip it."""


Asked = dict[str, list[tuple[Tensor, Tensor]]]
"""What is asked -> its queries and candidates."""


@dataclass(frozen=True)
class Pairs:
    """Rows to train on: numbers of inputs, whose features are `Data.texts` or `Data.images`."""

    queries: Tensor  # (R,) of texts where >= 0, of images as -1 - number
    targets: Tensor  # (R,)
    concepts: Tensor  # (R,) the truth that the loss is not told
    negatives: Tensor | None = None  # (R,) explicit ones


@dataclass(frozen=True)
class Data:
    """Features of everything, and what is asked of heads."""

    texts: Tensor  # (T, 576)
    images: Tensor  # (I, 2560), standardised
    text_start: tuple[Tensor, Tensor]  # weight (D, 576) and bias of the head
    image_start: tuple[Tensor, Tensor]
    train: dict[str, Pairs]  # a set -> its rows
    asked: dict[str, dict[str, Asked]]  # a set -> split -> what is asked


class Heads(nn.Module):
    """Two linear maps into one space, and unit length."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.data = data
        self.maps = nn.ModuleDict()
        for kind, (weight, bias) in (("texts", data.text_start), ("images", data.image_start)):
            self.maps[kind] = nn.Linear(weight.shape[1], weight.shape[0])
            self.maps[kind].load_state_dict({"weight": weight.clone(), "bias": bias.clone()})

    def forward(self, inputs: Tensor) -> Tensor:
        """Embeddings of inputs (N,) by their numbers, (N, D)."""
        found = torch.zeros(len(inputs), len(self.data.text_start[1]))
        for kind, chosen, numbers in (("texts", inputs >= 0, inputs), ("images", inputs < 0, -1 - inputs)):
            if chosen.any():
                rows = getattr(self.data, kind)[numbers[chosen]]
                if kind == "images":
                    rows = dropout(rows, 0.5, self.training)
                found = found.masked_scatter(chosen[:, None], self.maps[kind](rows))
        return normalize(found, dim=1)


def loss_of(changed: dict[str, Any], batch: int, temperature: float) -> tuple[HardNegativeInfoNCELoss, bool]:
    """The loss of a variant, and whether it is told of contents."""
    options = {name: value for name, value in changed.items() if name not in ONLY}
    told = options.pop("contents", True)
    if options["num_hard_negatives"] == "share":
        options["num_hard_negatives"] = batch // 32
    options["directions"] = ("query_to_doc", "doc_to_query")
    return HardNegativeInfoNCELoss(None, temperature=temperature, **options), told


def train(
    data: Data, kind: str, changed: dict[str, Any], batch: int, temperature: float, rate: float, seed: int
) -> tuple[Heads, dict[str, float | None]]:
    """Heads after `STEPS` steps, and what the loss tells of the filters."""
    torch.manual_seed(seed)
    heads = Heads(data)
    loss, told = loss_of(changed, batch, temperature)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    falls = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 10, 1 - step / STEPS))
    pairs = data.train[kind]
    sides = [pairs.queries, pairs.targets]
    if changed.get("negatives") and pairs.negatives is not None:
        sides.append(pairs.negatives)
    drawn = batches(data, kind, batch, changed.get("batches"), seed)
    dropped = right = there = 0.0
    for step in range(STEPS):
        rows = next(drawn)
        columns = [side[rows] for side in sides]
        embeddings = list(heads(torch.cat(columns)).split(batch))
        loss.global_step = step
        value = loss.compute_loss_from_embeddings(embeddings, content_ids=columns if told else None)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        falls.step()
        if kind == "crowded" and loss.margin is not None:
            counted = filtered(embeddings, pairs.concepts[rows], columns[1], loss.margin)
            dropped, right, there = dropped + counted[0], right + counted[1], there + counted[2]
    told_of = {"precision": right / dropped if dropped else None, "recall": right / there if there else None}
    return heads.eval(), told_of | {"negative_similarity": float(loss.last_metrics["negative_similarity"])}


def batches(data: Data, kind: str, batch: int, options: dict[str, Any] | None, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after the other, at random or by the package's sampler."""
    pairs = data.train[kind]
    if options is None:
        order = np.random.default_rng(seed)
        while True:
            yield torch.from_numpy(order.choice(len(pairs.queries), batch, replace=False))
    sampler = _sampler(kind, batch, json.dumps(options), data)
    for epoch in itertools.count(1000 * seed):
        sampler.set_epoch(epoch)
        yield from map(torch.tensor, sampler)


_SAMPLERS: dict[tuple[str, int, str], FalseNegativeAwareBatchSampler] = {}


@torch.no_grad()
def _sampler(kind: str, batch: int, options: str, data: Data) -> FalseNegativeAwareBatchSampler:
    """The sampler of these options, which looks at the rows once."""
    key = (kind, batch, options)
    if key not in _SAMPLERS:
        pairs, heads = data.train[kind], Heads(data).eval()
        sides = {"query": pairs.queries, "target": pairs.targets}
        guides = {
            f"guide_{name}": heads(side).numpy()
            for name, side in zip(("queries", "targets"), sides.values(), strict=True)
        }
        rows = Dataset.from_dict({name: list(map(str, side.tolist())) for name, side in sides.items()})
        given = json.loads(options) | guides | {"margin": 1.0}  # by the start, nearly all are false by 0.1
        _SAMPLERS[key] = FalseNegativeAwareBatchSampler(rows, batch, drop_last=True, exact_neighbors=True, **given)
    return _SAMPLERS[key]


@torch.no_grad()
def filtered(embeddings: Sequence[Tensor], concepts: Tensor, targets: Tensor, margin: float) -> tuple[int, int, int]:
    """How many candidates of other contents the margin drops, how many of these are right answers, and how many are."""
    scores = embeddings[0] @ embeddings[1].T
    other = targets[:, None] != targets[None]
    dropped = (scores > scores.diagonal()[:, None] + margin) & other
    same = (concepts[:, None] == concepts[None]) & other
    return int(dropped.sum()), int((dropped & same).sum()), int(same.sum())


@torch.no_grad()
def score(heads: Heads, data: Data, kind: str, split: str) -> dict[str, np.ndarray]:
    """What is asked -> reciprocal rank of each query's answer, or whether a drawing prefers its own label, (N,)."""
    found = {}
    for name, asked in data.asked[kind][split].items():
        own = []
        for queries, candidates in asked:
            embedded = heads(queries), heads(candidates)
            if name == SWAPS:
                scores = (embedded[0][:, None] * embedded[1].unflatten(0, (-1, 2))).sum(2)  # (N, 2), its own first
                own.append((scores[:, 0] > scores[:, 1]).double().numpy())
            else:
                own.append(1 / ranks(*embedded).double().numpy())
        found[name] = np.mean(own, axis=0).round(4)
    return found


class Inputs:
    """Numbers of inputs: texts count from 0, images down from -1."""

    def __init__(self, benchmark: EmojiBenchmark, vision: VisionFeatures) -> None:
        self.benchmark = benchmark
        self.words: dict[str, int] = {}
        self.first: dict[tuple[str, str], int] = {}
        maps: list[Tensor] = []
        shown = [*itertools.product(("train",), TRAINED_VENDORS), *itertools.product(SPLITS, VENDORS)]
        for split, vendor in shown:
            self.first[split, vendor] = sum(len(rows) for rows in maps)
            maps.append(pooled(vision(split, vendor)))
        self.features = torch.cat(maps)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self.words.setdefault(text, len(self.words)) for text in texts])

    def images(self, split: str, vendor: str, concepts: Tensor) -> Tensor:
        return -1 - (self.first[split, vendor] + concepts)

    def with_text(self, split: str, *kinds: str) -> Tensor:
        """Numbers of a split's concepts that have these kinds of text, (N,)."""
        said = self.benchmark.texts(split)
        texts = zip(*(said[kind] for kind in kinds), strict=True)
        return torch.tensor([place for place, own in enumerate(texts) if all(own)])

    def said(self, split: str, kind: str, concepts: Tensor) -> Tensor:
        said = self.benchmark.texts(split)[kind]
        return self.texts([said[place] for place in concepts.tolist()])

    def rows(self, kind: str) -> Pairs:
        """What a set trains on."""
        concepts = self.with_text("train", "label")
        negatives = None
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        if kind == "text":
            glosses = self.benchmark.glosses("train", GLOSSES)
            sides = self.texts([entry.term for entry in glosses]), self.texts([entry.gloss for entry in glosses])
            parts.append((*sides, -1 - torch.arange(len(glosses))))
            concepts = self.with_text("train", "keywords")
            parts.append((self.said("train", "label", concepts), self.said("train", "keywords", concepts), concepts))
        elif kind == "image":
            labels = self.said("train", "label", concepts)
            parts += [(self.images("train", vendor, concepts), labels, concepts) for vendor in TRAINED_VENDORS]
            taken_for = self.taken_for()
            own = [taken_for[label] for label in self.benchmark.texts("train")["label"]]
            negatives = self.texts(own).repeat(len(TRAINED_VENDORS))
        else:
            concepts = self.with_text("train", "keywords", "definition")[:CROWDED]
            told = {text: self.said("train", text, concepts) for text in ("label", "keywords", "definition")}
            parts += [(told["label"], told[text], concepts) for text in ("keywords", "definition")]
            shown = [self.images("train", vendor, concepts) for vendor in TRAINED_VENDORS]
            parts += [(text, images, concepts) for text in told.values() for images in shown]
        queries, targets, numbers = (torch.cat(column) for column in zip(*parts, strict=True))
        return Pairs(queries, targets, numbers, negatives)

    def taken_for(self) -> dict[str, str]:
        """Training label -> the label that its drawing is most easily taken for."""
        (file,) = (self.benchmark.train_root / "EmojiCaption").glob("*.parquet")
        table = pq.read_table(file, columns=["pos_text", "neg_text"]).to_pydict()
        return dict(zip(table["pos_text"], table["neg_text"], strict=True))

    def swaps(self, split: str) -> list[tuple[Tensor, Tensor]]:
        """Drawings, and the own label of each followed by one with another attribute."""
        places = {label: place for place, label in enumerate(self.benchmark.texts(split)["label"])}
        rows = list(json.loads(self.benchmark.swaps(split)["replace_att"].read_text(encoding="utf-8")).values())
        rows = [row for row in rows if row["caption"] in places]
        shown = [
            self.images(split, Path(row["filename"]).parts[0], torch.tensor([places[row["caption"]]])) for row in rows
        ]
        return [
            (torch.cat(shown), self.texts([text for row in rows for text in (row["caption"], row["negative_caption"])]))
        ]

    def asked(self, kind: str, split: str) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """What a set is scored by: names, each with lists of queries and of their answers."""
        concepts = self.with_text(split, "label")
        worded = self.with_text(split, "keywords")
        labels, keywords = self.said(split, "label", concepts), self.said(split, "keywords", worded)
        if kind == "text":
            glosses = self.benchmark.glosses(split)
            sides = self.texts([entry.term for entry in glosses]), self.texts([entry.gloss for entry in glosses])
            return {"term -> gloss": [sides], "label -> keywords": [(self.said(split, "label", worded), keywords)]}
        seen = [self.images(split, vendor, concepts) for vendor in TRAINED_VENDORS]
        (other,) = (self.images(split, vendor, concepts) for vendor in VENDORS if vendor not in TRAINED_VENDORS)
        found = {
            "label -> drawing": [(labels, images) for images in seen],
            "drawing -> label": [(images, labels) for images in seen],
        }
        if kind == "image":
            return found | {"held-out vendor, both ways": [(labels, other), (other, labels)], SWAPS: self.swaps(split)}
        return found | {"keywords -> drawing": [(keywords, images[worded]) for images in seen]}


def read_data(cache: Path) -> Data:
    """Make or read the features, and lay out rows and questions."""
    demo = Demo(cache, cache / "heads", DemoSettings())
    fetched, benchmark = demo.benchmark()
    start = demo.start(fetched, benchmark)
    inputs = Inputs(benchmark, demo.features(fetched, benchmark))
    rows = {kind: inputs.rows(kind) for kind in BATCHES}
    trained = len(inputs.words)
    asked = {kind: {split: inputs.asked(kind, split) for split in SPLITS} for kind in BATCHES}
    words = list(inputs.words)
    states = _embeddings(words, cache / "heads-states", lambda: load_encoder(start, device="cpu"))
    fitted = torch.randperm(trained, generator=torch.Generator().manual_seed(0))[:FITTED]
    told = _embeddings([words[place] for place in fitted], cache / "heads-teacher", lambda: text_teacher(fetched))
    labels = benchmark.texts("train")["label"]
    taught = _embeddings(labels, cache / "heads-labels", lambda: text_teacher(fetched))
    own = [inputs.features[slice(inputs.first["train", vendor], None)][: len(labels)] for vendor in TRAINED_VENDORS]
    seen, targets = torch.cat(own), taught.repeat(len(own), 1)
    mean, deviation = seen.mean(0), seen.std(0) + 1e-6
    return Data(
        states,
        (inputs.features - mean) / deviation,
        _linear(states[fitted], told, 1.0),
        _linear((seen - mean) / deviation, targets, choose_penalty(own, taught)),
        rows,
        asked,
    )


def _linear(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of a ridge regression as a linear layer has them."""
    fit = fit_ridge(features, targets, [penalty])[0]
    weight = (fit.weight / fit.deviation[:, None]).T
    return weight.float(), (fit.bias - weight @ fit.mean).float()


def _embeddings(texts: Sequence[str], folder: Path, model: Callable[[], SentenceTransformer]) -> Tensor:
    """Embeddings of texts, kept by what they are."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    file = folder / f"{digest}.npy"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(file, model().encode(list(texts), batch_size=256, show_progress_bar=True))
    return torch.from_numpy(np.load(file))


def tuned(data: Data, kind: str, batch: int, grid: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Temperature and learning rate that are best on validation, of the stock loss and of k = 8."""
    chosen = {}
    for name in CHOSEN:
        for temperature, rate in itertools.product(TEMPERATURES, LEARNING_RATES):
            key = f"{name}, {temperature}, {rate}"
            if key not in grid:
                runs = [train(data, kind, VARIANTS[name], batch, temperature, rate, seed) for seed in TUNING_SEEDS]
                found = [score(heads, data, kind, "validation") for heads, _ in runs]
                grid[key] = statistics.mean(float(values.mean()) for of in found for values in of.values())
        best = max((key for key in grid if key.startswith(f"{name}, ")), key=grid.__getitem__)
        first, second = best.removeprefix(f"{name}, ").split(", ")
        chosen[name] = (float(first), float(second))
        print(f"{kind}, batch of {batch}, {best}: {100 * grid[best]:.1f}", flush=True)
    return chosen


def run(data: Data, kind: str, batch: int, name: str, settings: tuple[float, float]) -> dict[str, Any]:
    """One variant on all seeds: reciprocal ranks, (seeds, queries) of each thing asked, and what the loss told."""
    began = time.process_time()
    runs = [train(data, kind, VARIANTS[name], batch, *settings, seed) for seed in range(SEEDS)]
    found = [score(heads, data, kind, "test") for heads, _ in runs]
    told = {key: [value for _, of in runs if (value := of[key]) is not None] for key in runs[0][1]}
    return {
        "temperature": settings[0],
        "learning_rate": settings[1],
        "seconds": round((time.process_time() - began) / SEEDS, 1),
        "told": {key: statistics.mean(values) for key, values in told.items() if values},
        "values": {asked: [of[asked].tolist() for of in found] for asked in found[0]},
    }


def measure(data: Data, kind: str, batch: int, work: Path) -> dict[str, Any]:
    """All variants of a set and a batch size, each kept when done, and their differences from the stock loss."""
    file = work / f"{kind}-{batch}.json"
    made = kept(file) or {"tuning": {}, "runs": {}}
    chosen = tuned(data, kind, batch, made["tuning"])
    reference: dict[str, np.ndarray] = {}
    rows = {}
    for name, changed in VARIANTS.items():
        if any(kind not in sets and part in changed for part, sets in ONLY.items()):
            continue
        settings = chosen[CHOSEN[1] if changed["num_hard_negatives"] else CHOSEN[0]]
        before = made["runs"].get(name, {})
        if (before.get("temperature"), before.get("learning_rate")) != settings:
            made["runs"][name] = run(data, kind, batch, name, settings)
            write_atomically(file, json.dumps(made))
        row = dict(made["runs"][name])
        gains = {asked: np.array(values) for asked, values in row.pop("values").items()}
        reference = reference or gains
        row["scores"] = {asked: over_seeds(values.mean(axis=1).tolist()) for asked, values in gains.items()}
        row["error"] = {asked: values.mean(0).std(ddof=1) / values.shape[1] ** 0.5 for asked, values in gains.items()}
        row["against_stock"] = {asked: difference(values, reference[asked]) for asked, values in gains.items()}
        rows[name] = row
        told = ", ".join(f"{asked} {percent(score)}" for asked, score in row["scores"].items())
        print(f"{kind}, batch of {batch}, {name}, {row['seconds']} s a run: {told}", flush=True)
    return {"tuning": made["tuning"], "rows": rows}


def markdown(results: dict[str, Any]) -> str:
    """The tables for people."""
    lines = [
        "# Settings of stage 2's loss on heads over frozen features",
        "",
        f"`python benchmarks/heads.py`: mean reciprocal rank in percent, mean ± standard deviation over {SEEDS} seeds,",
        "on concepts and terms never trained on; then the difference from the stock loss with the interval of",
        "95 % over resampled seeds and queries, bold where it leaves out 0.",
    ]
    for title, found in results["sets"].items():
        rows = found["rows"]
        asked = list(rows["stock"]["scores"])
        errors = ", ".join(f"{name} {100 * rows['stock']['error'][name]:.1f}" for name in asked)
        lines += ["", f"## {title}", "", f"Standard error of the test set itself: {errors}.", ""]
        told = [name for name in ("precision", "recall") if any(name in row["told"] for row in rows.values())]
        cells = []
        for name, row in rows.items():
            cells.append([name, row["temperature"], row["learning_rate"]])
            for what in asked:
                against = "" if name == "stock" else f"; {compared(row['against_stock'][what])}"
                cells[-1].append(percent(row["scores"][what]) + against)
            cells[-1] += [f"{100 * row['told'][key]:.0f} %" if key in row["told"] else "–" for key in told]
        lines += table(["loss", "temperature", "learning rate", *asked, *told], cells)
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__, cache=True)
    options.add_argument("--sets", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    given = options.parse_args()
    torch.set_num_threads(1)
    data = read_data(given.cache)
    work = given.cache / "heads" / "runs"
    work.mkdir(parents=True, exist_ok=True)
    results = kept(RESULTS / "heads.json") or {"sets": {}}
    titles = [f"{kind}, batch of {batch}" for kind, batches in BATCHES.items() for batch in batches]
    results["sets"] = {title: results["sets"][title] for title in titles if title in results["sets"]}
    for kind in given.sets:
        for batch in BATCHES[kind]:
            results["sets"][f"{kind}, batch of {batch}"] = measure(data, kind, batch, work)
            results |= {"command": "python benchmarks/heads.py", "steps": STEPS, "seeds": SEEDS, "machine": machine()}
            keep(RESULTS / "heads.json", results)
            keep(RESULTS / "heads.md", markdown(results))


if __name__ == "__main__":
    main()
