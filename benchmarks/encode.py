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

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

import workloads
from measuring import Counts, alternating, largest_difference, machine, times_as_fast
from memory import megabytes_of, peak_above
from peers import BATCH, STOCK_BATCHES, Ours, PublishedStyle, Stock, unime_v2, vlm2vec_v2
from small_models import SQUARE, miniature, small_llava_onevision, small_qwen2_vl
from tiny import FAMILIES, tiny_backbone
from unime_st import build_encoder, export_encoder
from unime_st.files import write_atomically
from unime_st.modules.speed.batches import CPU_TOKENS

RESULTS = Path(__file__).parent / "results" / "encode.json"
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
    contenders = {}
    for size in STOCK_BATCHES:

        def encode(size: int = size) -> np.ndarray:
            return stock.at(size)(items)

        contenders[str(size)] = encode
    seconds, _ = alternating(contenders, 1, lambda line: print(f"  stock by batch size:{line.partition(':')[2]}"))
    return int(min(seconds, key=lambda name: min(seconds[name])))


def peak_megabytes(checkpoint: Path, kind: str) -> dict[str, int]:
    """What encoding a workload without duplicates adds to a process, ours and stock at each batch size."""
    contenders = ["unime_st", *(str(size) for size in STOCK_BATCHES)]
    return {who: megabytes_of(__file__, ["--peak", who, str(checkpoint), kind]) for who in contenders}


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
    timed = {name: lambda encode=encode: encode(items) for name, encode in contenders.items()}
    seconds, found = alternating(timed, runs, lambda line: print(line, flush=True))
    (name,) = peer
    difference = largest_difference(found["unime_st"], found[name])
    if difference > TOLERANCE:
        raise ValueError(f"Embeddings differ by {difference}, more than {TOLERANCE}.")
    result = {
        **times_as_fast(seconds, "unime_st", name),
        "seconds": seconds,
        "runs": runs,
        "inputs": len(items),
        "distinct": len({json.dumps(item, sort_keys=True) for item in items}),
        "counts": counts,
        "largest_difference": difference,
    }
    if isinstance(ours, Ours):
        every = _tokens(ours, items)
        result["tokens_of_all_inputs"] = every
        result["padding_share_of_peer"] = round(1 - every / counts[name]["places"], 3)
    return result


def _tokens(ours: Ours, items: Sequence[Any]) -> int:
    """Tokens of all inputs, duplicates counted each time, padding not at all."""
    return sum(int(ours.model.preprocess([item])["attention_mask"].sum()) for item in items)


# --- sections --------------------------------------------------------------------------------------------------------


def floors(checkpoint: Path, inputs: Inputs, runs: int, folder: Path) -> dict[str, Any]:
    """Each comparison with the number it must reach."""
    ours, stock, published = Ours(checkpoint), Stock(checkpoint), PublishedStyle(checkpoint)
    for model in (ours, stock, published):
        model(inputs.mixed[:6])
    rows: dict[str, Any] = {}

    def row(name: str, against: str, least: float, result: dict[str, Any]) -> None:
        rows[name] = {"against": against, "at_least": least, **result}
        print(f"{name}, against {against}: {result['times_as_fast']}x (at least {least})", flush=True)

    memory = peak_megabytes(checkpoint, "mixed")
    for name, kind, share, least in (
        ("mixed, 50 % duplicates", "mixed", 0.5, 2.5),
        ("mixed, no duplicates", "mixed", 0.0, 1.25),
        ("texts of 5 to 300 tokens", "texts", 0.0, 1.1),
    ):
        items = inputs.draw(kind, share, COUNTS[kind])
        size = fastest_batch(stock, items)
        result = compare(ours, {f"stock, batches of {size}": stock.at(size)}, items, runs)
        row(name, "stock encode at its fastest", least, result)
        if kind == "mixed":
            fitting = [batch for batch in STOCK_BATCHES if memory[str(batch)] <= 1.1 * memory["unime_st"]]
            sizes = {"as many inputs": BATCH, "as much memory": max(fitting, default=min(STOCK_BATCHES))}
            once = {"unime_st": lambda items=items: ours(items)}
            once |= {name: lambda items=items, size=size: stock.at(size)(items) for name, size in sizes.items()}
            seconds, _ = alternating(once, 1)
            rows[name]["other_batches_of_stock"] = {
                name: {"batch_size": size, **times_as_fast(seconds, "unime_st", name)} for name, size in sizes.items()
            }
            rows[name]["peak_megabytes"] = memory
    items = inputs.draw("mixed", 0.25, COUNTS["mixed"] // 2)
    result = compare(ours, {"published style": published}, items, runs)
    row("mixed, 25 % duplicates", "the published-style loop", 2.5, result)
    asked = workloads.questions(inputs.images[:6])
    alone = Ours(checkpoint, share_prefixes=False)
    result = compare(ours, {"without sharing": alone}, asked, runs)
    row("image+text questions, 8 to an image", "itself without sharing", 1.5, result)
    pictures = inputs.draw("images", 0.25, 24)
    for name, (theirs, mine) in (
        ("images, 25 % duplicates, Qwen2-VL", vlm2vec_v2(small_qwen2_vl(folder / "qwen2_vl"))),
        ("images, 25 % duplicates, LLaVA-OneVision", unime_v2(small_llava_onevision(folder / "onevision"), SQUARE)),
    ):
        wrapper = "VLM2Vec-V2.0" if "Qwen" in name else "UniME-V2"
        result = compare(mine, {"mteb": theirs}, pictures, runs)
        row(name, f"mteb's {wrapper} wrapper", 1.6, result)
    return rows


def by_workload(checkpoint: Path, inputs: Inputs, runs: int) -> dict[str, Any]:
    """Three kinds of inputs at three shares of duplicates, against stock `encode`."""
    ours, stock = Ours(checkpoint), Stock(checkpoint)
    for model in (ours, stock):
        model(inputs.mixed[:6])
    rows = {}
    for kind, count in COUNTS.items():
        for share in SHARES:
            name = f"{kind}, {share:.0%} duplicates".replace("%", " %")
            print(name, flush=True)
            items = inputs.draw(kind, share, count // 3)
            size = fastest_batch(stock, items)
            rows[name] = compare(ours, {f"stock, batches of {size}": stock.at(size)}, items, runs)
    return rows


def by_family(folder: Path, runs: int) -> dict[str, Any]:
    """Mixed inputs at three shares of duplicates on a tiny model of each family."""
    rows: dict[str, Any] = {}
    for family in FAMILIES:
        checkpoint = folder / family / "encoder"
        export_encoder(build_encoder(tiny_backbone(family, folder / family / "backbone"), device="cpu"), checkpoint)
        ours, stock, published = Ours(checkpoint), Stock(checkpoint), PublishedStyle(checkpoint)
        inputs = Inputs(tokens_of(stock.model), folder / "images", TINY_COUNT)
        rows[family] = {}
        for share in SHARES:
            items = inputs.draw("mixed", share, TINY_COUNT)
            stock.batch_size = fastest_batch(stock, items)
            contenders = {
                "unime_st": lambda items=items, ours=ours: ours(items),
                "stock": lambda items=items, stock=stock: stock(items),
                "published style": lambda items=items, published=published: published(items),
            }
            seconds, found = alternating(contenders, runs, lambda line, name=family: print(f"  {name}{line}"))
            rows[family][f"{share:.0%}".replace("%", " %")] = {
                "stock": times_as_fast(seconds, "unime_st", "stock"),
                "published style": times_as_fast(seconds, "unime_st", "published style"),
                "largest_difference": {
                    peer: largest_difference(found["unime_st"], found[peer]) for peer in ("stock", "published style")
                },
            }
    return rows


def limit(checkpoint: Path, inputs: Inputs, runs: int) -> dict[str, Any]:
    """Time of `encode` over that of the model alone, on distinct inputs that are prepared and packed perfectly.

    The bare pass: the vision tower and projector over each distinct image, then the language model over as many
    tokens as a tree of the distinct inputs has, in rows of one length, without padding, masks or planning, in passes of
    as many tokens as ours.
    """
    ours = Ours(checkpoint)
    rows = {}
    for kind, share in (("texts", 0.0), ("mixed", 0.25), ("images", 0.0)):
        items = inputs.draw(kind, share, COUNTS[kind])
        bare = bare_pass(ours, items)
        contenders = {"encode": lambda items=items: ours(items), "bare": bare}
        seconds, _ = alternating(contenders, runs, lambda line: print(line, flush=True))
        result = times_as_fast(seconds, "bare", "encode")
        rows[f"{kind}, {share:.0%} duplicates".replace("%", " %")] = {
            "of_the_bare_pass": result["times_as_fast"],
            "spread": result["spread"],
            "seconds": seconds,
            "runs": runs,
        }
        print(f"{kind}: {result['times_as_fast']} of the bare pass", flush=True)
    return rows


def bare_pass(ours: Ours, items: Sequence[Any]) -> Callable[[], None]:
    """The model over prepared, distinct, packed inputs; see `limit`."""
    inner = ours.inner
    distinct = list({json.dumps(item, sort_keys=True): item for item in items}.values())
    with ours.model[0].prefixes.encoding():
        features = ours.model.preprocess(distinct)
    mask = features["attention_mask"].bool()
    keys = features["prefix_key"]
    beginnings = {
        tuple(keys[row][mask[row]][:end].tolist())
        for row in range(len(keys))
        for end in range(1, 1 + int(mask[row].sum()))
    }
    length = int(mask.sum()) // len(distinct)
    rows = max(1, round(len(beginnings) / length))
    embeddings = torch.randn(rows, len(beginnings) // rows, inner.config.text_config.hidden_size) * 0.02
    pixels = features.get("pixel_values")
    if pixels is not None:
        pixels = torch.unique(pixels, dim=0).contiguous(memory_format=torch.channels_last)
    at_once = max(1, CPU_TOKENS // embeddings.shape[1])

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, 0 if pixels is None else len(pixels), 4):
            inner.get_image_features(pixels[start : start + 4])
        for start in range(0, rows, at_once):
            inner.language_model(inputs_embeds=embeddings[start : start + at_once], use_cache=False)

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"), help="folder of the demo's packages")
    parser.add_argument("--runs", type=int, default=7, help="of each comparison among the floors; others take 3")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the miniature, for a quick look")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        who, checkpoint, kind = given.peak
        print(peak(who, Path(checkpoint), kind))
        return
    checkpoint = miniature(given.cache, given.layers)
    results = json.loads(given.output.read_text(encoding="utf-8")) if given.output.is_file() else {}
    results |= {"command": "python benchmarks/encode.py", "machine": machine(), "layers": given.layers}
    few = min(3, given.runs)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        inputs = inputs_for(checkpoint, folder / "images")
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "floors": lambda: floors(checkpoint, inputs, given.runs, folder),
            "workloads": lambda: by_workload(checkpoint, inputs, few),
            "families": lambda: by_family(folder, few),
            "limit": lambda: limit(checkpoint, inputs, few),
            "bfloat16": lambda: bfloat16(checkpoint, inputs),
        }
        for section in given.sections or SECTIONS:
            print(f"== {section}", flush=True)
            results[section] = work[section]()
            write_atomically(given.output, json.dumps(results, indent=1) + "\n")
    print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
