"""`encode` against its peers, on texts, images and both, with duplicates or not; and against the bare model.

    python benchmarks/encode.py                  # all sections
    python benchmarks/encode.py floors limit     # some; the others' results stay

1. ``floors``: the comparisons that must not fall below a number: stock `encode`, a loop in the style of published
   scripts, mteb's wrappers of the same architecture, our own without sharing.
2. ``workloads``: texts, images and both at 0, 25 and 50 % duplicates against stock `encode`, on the miniature.
3. ``families``: both kinds mixed, on tiny models of every family.
4. ``limit``: the time of `encode` over that of the bare model on packed, prepared, distinct inputs.
5. ``bfloat16``: cosine between embeddings in bfloat16 and in float32.

The model is the demo's miniature in 12 layers, its projector not aligned (weights change no time). Contenders take
turns in one process, on one thread, and CPU time counts, so that other work on the machine does not. Ours has batches
of 32. Stock `encode` runs at the batch size that is fastest for it; among the floors, once, also at 32 and at the
largest that takes no more memory than ours, a tenth allowed. Writes `benchmarks/results/encode.json`.
"""

from __future__ import annotations

from basics import RESULTS, keep, kept, machine, megabytes_of, parser, peak_above

# isort: split
import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import workloads
from measuring import Counts, alternating, largest_difference, times_as_fast
from peers import BATCH, STOCK_BATCHES, Encode, Ours, PublishedStyle, Stock, unime_v2, vlm2vec_v2
from small_models import SQUARE, miniature, small_llava_onevision, small_qwen2_vl
from tiny import FAMILIES, tiny_backbone
from unime_st import build_encoder, export_encoder
from unime_st.placement import with_every_image
from unime_st.token_budget import CPU_TOKENS

SECTIONS = ("floors", "workloads", "families", "limit", "bfloat16")
LAYERS = 12
COUNTS = {"texts": 32, "images": 48, "mixed": 48}
SHARES = (0.0, 0.25, 0.5)
TINY_COUNT = 96
MANY = 24
TOLERANCE = 1e-5


class Inputs:
    """The miniature's workloads, drawn once."""

    def __init__(self, tokens: Callable[[str], int], folder: Path, most: int = 48) -> None:
        self.texts = workloads.texts(most, tokens)
        self.images = workloads.images(most, folder)
        self.mixed = workloads.mixed(self.texts, self.images)

    def draw(self, kind: str, share: float, count: int) -> list[Any]:
        if kind == "texts" and count < len(self.texts):  # keep the spread of lengths
            items = self.texts[:: len(self.texts) // count][:count]
            return workloads.with_duplicates(items, count, share)
        return workloads.with_duplicates(getattr(self, kind), count, share)


def tokens_of(model: Any) -> Callable[[str], int]:
    tokenize = model[0].tokenizer
    return lambda text: len(tokenize(text, add_special_tokens=False)["input_ids"])


def inputs_for(checkpoint: Path, folder: Path) -> Inputs:
    """Workloads by the tokenizer of a checkpoint."""
    return Inputs(tokens_of(Stock(checkpoint).model), folder)


def fastest_batch(stock: Stock, items: Sequence[Any]) -> int:
    """The batch size at which stock `encode` is fastest on these inputs, or on a third of them if they are many."""
    items = items[::3] if len(items) > MANY else items
    contenders = timed({str(size): stock.at(size) for size in STOCK_BATCHES}, items)
    seconds, _ = alternating(contenders, 1, lambda line: print(f"  stock by batch size:{line.partition(':')[2]}"))
    return int(min(seconds, key=lambda name: min(seconds[name])))


def timed(contenders: dict[str, Any], items: Sequence[Any]) -> dict[str, Callable[[], Any]]:
    """What is timed of each: a call with these inputs."""
    return {name: partial(encode, items) for name, encode in contenders.items()}


def peak_megabytes(checkpoint: Path, kind: str) -> dict[str, int]:
    """What encoding a workload without duplicates adds to a process, ours and stock at each batch size."""
    contenders = ["unime_st", *(str(size) for size in STOCK_BATCHES)]
    return {who: megabytes_of(__file__, "--peak", who, str(checkpoint), kind) for who in contenders}


def compare(ours: Any, peer: dict[str, Any], items: Sequence[Any], runs: int) -> dict[str, Any]:
    """Time ours and a peer in turn; count what each runs over; refuse embeddings that differ."""
    contenders = {"unime_st": ours, **peer}
    counts = {}
    for name, contender in contenders.items():
        if hasattr(contender, "inner"):
            with Counts(contender.inner) as counted:
                contender(items)
            counts[name] = counted.read()
        else:
            contender(items[:4])
    seconds, found = alternating(timed(contenders, items), runs)
    (name,) = peer
    difference = largest_difference(found["unime_st"], found[name])
    if difference > TOLERANCE:
        raise ValueError(f"Embeddings differ by {difference}, more than {TOLERANCE}.")
    result = {
        **times_as_fast(seconds, "unime_st", name), "seconds": seconds, "runs": runs, "inputs": len(items),
        "distinct": len({json.dumps(item, sort_keys=True) for item in items}), "counts": counts,
        "largest_difference": difference,
    }  # fmt: skip
    if isinstance(ours, Ours):
        every = sum(int(ours.model.preprocess([item])["attention_mask"].sum()) for item in items)  # no padding
        result["tokens_of_all_inputs"] = every
        result["padding_share_of_peer"] = round(1 - every / counts[name]["places"], 3)
    return result


def loaded(checkpoint: Path, inputs: Inputs) -> tuple[Ours, Stock]:
    """Ours and stock, warmed up."""
    models = Ours(checkpoint), Stock(checkpoint)
    for model in models:
        model(inputs.mixed[:6])
    return models


def against_fastest(ours: Ours, stock: Stock, items: Sequence[Any], runs: int) -> dict[str, Any]:
    """Ours against stock in the batches that are fastest for it."""
    size = fastest_batch(stock, items)
    return compare(ours, {f"stock, batches of {size}": stock.at(size)}, items, runs)


def other_batches(ours: Ours, stock: Stock, items: Sequence[Any], memory: dict[str, int]) -> dict[str, Any]:
    """Stock once in as many inputs a batch as ours, and once in as many as take no more memory."""
    fitting = [batch for batch in STOCK_BATCHES if memory[str(batch)] <= 1.1 * memory["unime_st"]]
    sizes = {"as many inputs": BATCH, "as much memory": max(fitting, default=min(STOCK_BATCHES))}
    peers = {name: stock.at(size) for name, size in sizes.items()}
    seconds, _ = alternating(timed({"unime_st": ours, **peers}, items), 1)
    return {name: {"batch_size": size, **times_as_fast(seconds, "unime_st", name)} for name, size in sizes.items()}


def floors(checkpoint: Path, inputs: Inputs, runs: int, folder: Path) -> dict[str, Any]:
    """Each comparison with the number it must reach."""
    ours, stock = loaded(checkpoint, inputs)
    published = PublishedStyle(checkpoint)
    published(inputs.mixed[:6])
    memory = peak_megabytes(checkpoint, "mixed")
    drawn = {(kind, share): inputs.draw(kind, share, COUNTS[kind])
             for kind, share in (("mixed", 0.5), ("mixed", 0.0), ("texts", 0.0))}  # fmt: skip
    few = inputs.draw("mixed", 0.25, COUNTS["mixed"] // 2)
    asked, pictures = workloads.questions(inputs.images[:6]), inputs.draw("images", 0.25, 24)

    def stock_row(kind: str, share: float) -> dict[str, Any]:
        found = against_fastest(ours, stock, drawn[kind, share], runs)
        if kind == "mixed":
            found["other_batches_of_stock"] = other_batches(ours, stock, drawn[kind, share], memory)
            found["peak_megabytes"] = memory
        return found

    def mteb_row(theirs: Encode, mine: Encode) -> dict[str, Any]:
        return compare(mine, {"mteb": theirs}, pictures, runs)

    fastest = "stock encode at its fastest"
    cases: tuple[tuple[str, str, float, Callable[[], dict[str, Any]]], ...] = (
        ("mixed, 50 % duplicates", fastest, 2.5, lambda: stock_row("mixed", 0.5)),
        ("mixed, no duplicates", fastest, 1.25, lambda: stock_row("mixed", 0.0)),
        ("texts of 5 to 300 tokens", fastest, 1.1, lambda: stock_row("texts", 0.0)),
        ("mixed, 25 % duplicates", "the published-style loop", 2.5,
         lambda: compare(ours, {"published style": published}, few, runs)),
        ("image+text questions, 8 to an image", "itself without sharing", 1.5,
         lambda: compare(ours, {"without sharing": Ours(checkpoint, share_prefixes=False)}, asked, runs)),
        ("images, 25 % duplicates, Qwen2-VL", "mteb's VLM2Vec-V2.0 wrapper", 1.6,
         lambda: mteb_row(*vlm2vec_v2(small_qwen2_vl(folder / "qwen2_vl")))),
        ("images, 25 % duplicates, LLaVA-OneVision", "mteb's UniME-V2 wrapper", 1.6,
         lambda: mteb_row(*unime_v2(small_llava_onevision(folder / "onevision"), SQUARE))),
    )  # fmt: skip
    rows: dict[str, Any] = {}
    for name, against, least, measure in cases:
        rows[name] = {"against": against, "at_least": least, **measure()}
        print(f"{name}, against {against}: {rows[name]['times_as_fast']}x (at least {least})", flush=True)
    return rows


def by_workload(checkpoint: Path, inputs: Inputs, runs: int) -> dict[str, Any]:
    """Three kinds of inputs at three shares of duplicates, against stock `encode`."""
    ours, stock = loaded(checkpoint, inputs)
    rows = {}
    for kind, count in COUNTS.items():
        for share in SHARES:
            print(name := _named(share, kind), flush=True)
            rows[name] = against_fastest(ours, stock, inputs.draw(kind, share, count // 3), runs)
    return rows


def by_family(folder: Path, runs: int) -> dict[str, Any]:
    """Mixed inputs at three shares of duplicates on a tiny model of each family."""
    rows: dict[str, Any] = {}
    for family in FAMILIES:
        checkpoint = folder / family / "encoder"
        export_encoder(build_encoder(tiny_backbone(family, folder / family / "backbone"), device="cpu"), checkpoint)
        ours, stock = Ours(checkpoint), Stock(checkpoint)
        peers = {"stock": stock, "published style": PublishedStyle(checkpoint)}
        inputs, rows[family] = Inputs(tokens_of(stock.model), folder / "images", TINY_COUNT), {}
        for share in SHARES:
            items = inputs.draw("mixed", share, TINY_COUNT)
            stock.batch_size = fastest_batch(stock, items)
            print(family, flush=True)
            seconds, found = alternating(timed({"unime_st": ours, **peers}, items), runs)
            rows[family][_named(share)] = {peer: times_as_fast(seconds, "unime_st", peer) for peer in peers} | {
                "largest_difference": {peer: largest_difference(found["unime_st"], found[peer]) for peer in peers}
            }
    return rows


def _named(share: float, kind: str = "") -> str:
    """A share of duplicates, and what of."""
    return f"{kind}, {100 * share:.0f} % duplicates" if kind else f"{100 * share:.0f} %"


def limit(checkpoint: Path, inputs: Inputs, runs: int) -> dict[str, Any]:
    """Time of `encode` over that of the model alone, on distinct inputs that are prepared and packed perfectly."""
    ours = Ours(checkpoint)
    rows = {}
    for kind, share in (("texts", 0.0), ("mixed", 0.25), ("images", 0.0)):
        items = inputs.draw(kind, share, COUNTS[kind])
        seconds, _ = alternating({"encode": partial(ours, items), "bare": bare_pass(ours, items)}, runs)
        result = times_as_fast(seconds, "bare", "encode")
        told = {"of_the_bare_pass": result["times_as_fast"], "spread": result["spread"]}
        rows[_named(share, kind)] = {**told, "seconds": seconds, "runs": runs}
        print(f"{kind}: {result['times_as_fast']} of the bare pass", flush=True)
    return rows


def bare_pass(ours: Ours, items: Sequence[Any]) -> Callable[[], None]:
    """The vision tower and projector over each distinct image, then the language model over packed tokens.

    They are as many tokens as a tree of the distinct inputs has, in rows of one length, without padding, masks or
    planning, in passes of as many tokens as ours.
    """
    inner = ours.inner
    distinct = list({json.dumps(item, sort_keys=True): item for item in items}.values())
    with ours.model[0].prefixes.encoding():
        features = with_every_image(ours.model.preprocess(distinct))
    mask = features["attention_mask"].bool()
    kept_keys = [tuple(keys[own].tolist()) for keys, own in zip(features["prefix_key"], mask, strict=True)]
    beginnings = {keys[:end] for keys in kept_keys for end in range(1, 1 + len(keys))}
    length = int(mask.sum()) // len(distinct)
    rows = max(1, round(len(beginnings) / length))
    embeddings = torch.randn(rows, len(beginnings) // rows, inner.config.text_config.hidden_size) * 0.02
    pixels = features.get("pixel_values")
    if pixels is not None:
        pixels = torch.unique(pixels, dim=0).contiguous(memory_format=torch.channels_last)
    at_once = max(1, CPU_TOKENS // embeddings.shape[1])

    @torch.inference_mode()
    def run() -> None:
        for part in () if pixels is None else pixels.split(4):
            inner.get_image_features(part)
        for part in embeddings.split(at_once):
            inner.language_model(inputs_embeds=part, use_cache=False)

    return run


def bfloat16(checkpoint: Path, inputs: Inputs) -> dict[str, Any]:
    """Cosine of embeddings in bfloat16 with those in float32, and how much longer or shorter it takes here."""
    ours, half = Ours(checkpoint), Ours(checkpoint)
    half.model.bfloat16()
    items = inputs.mixed[:24]
    contenders = {"float32": lambda: ours(items), "bfloat16": lambda: half(items).astype(np.float32)}
    seconds, found = alternating(contenders, 1)
    one, other = (found[name] / np.linalg.norm(found[name], axis=1, keepdims=True) for name in contenders)
    cosines = (one * other).sum(axis=1)
    ranks = [(-(side @ side.T) + 9 * np.eye(len(side))).argmin(axis=1) for side in (one, other)]
    return {
        "cosine": {"least": round(float(cosines.min()), 5), "mean": round(float(cosines.mean()), 5)},
        "same_nearest_neighbour": round(float((ranks[0] == ranks[1]).mean()), 3),
        "inputs": len(items),
        "seconds": seconds,
    }


def peak(who: str, checkpoint: Path, kind: str) -> int:
    """Bytes that encoding a workload adds to this process, after a small call; by us, or by stock in such batches."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = inputs_for(checkpoint, Path(folder))
        contender = Ours(checkpoint) if who == "unime_st" else Stock(checkpoint).at(int(who))
        contender(inputs.mixed[:3])
        items = inputs.draw(kind, 0.0, COUNTS[kind])
        with peak_above() as peak_of:
            contender(items)
        return peak_of.bytes


def main() -> None:
    options = parser(__doc__, cache=True, runs=7, output=RESULTS / "encode.json")
    options.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    options.add_argument("--layers", type=int, default=LAYERS, help="of the miniature, for a quick look")
    options.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        who, checkpoint, kind = given.peak
        print(peak(who, Path(checkpoint), kind))
        return
    checkpoint = miniature(given.cache, given.layers)
    results = kept(given.output)
    results |= {"command": "python benchmarks/encode.py", "machine": machine(threads=1), "layers": given.layers}
    few = min(3, given.runs)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        inputs = inputs_for(checkpoint, folder / "images")
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "floors": lambda: floors(checkpoint, inputs, given.runs, folder),
            "workloads": lambda: by_workload(checkpoint, inputs, few), "families": lambda: by_family(folder, few),
            "limit": lambda: limit(checkpoint, inputs, few), "bfloat16": lambda: bfloat16(checkpoint, inputs),
        }  # fmt: skip
        for section in given.sections or SECTIONS:
            print(f"== {section}", flush=True)
            results[section] = work[section]()
            keep(given.output, results)


if __name__ == "__main__":
    main()
