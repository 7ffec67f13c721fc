"""Tables of the speed benchmarks, for the pages of `docs` and for `benchmarks/results/bench.md`."""

from __future__ import annotations

from typing import Any

from basics import table

TRAINING = {
    "stage-2 step, frozen vision, 25 % repeats": ("stock cached ranking loss", 1.5),
    "stage-1 step, sentences of mixed length": ("stock modules, the same loss in plain form", 1.5),
}


def floors_table(encode: dict[str, Any], train_step: dict[str, Any], stage1_step: dict[str, Any]) -> str:
    """Each comparison, what was measured, and what it must reach."""
    found = {n: (r["against"], r["at_least"], r["times_as_fast"], *r["spread"]) for n, r in encode["floors"].items()}
    second = train_step["questions about drawings, a quarter of the targets repeated"]
    first = stage1_step["5 to 100 words, most short"]["unime_st: times as fast"]
    measured = ((second["times_as_fast"], *second["spread"]), (first["median"], first["least"], first["most"]))
    found |= {name: (*asked, *told) for (name, asked), told in zip(TRAINING.items(), measured, strict=True)}
    rows = [
        (name, against, least, f"{times:.2f}", f"{low:.2f} to {high:.2f}", "yes" if times >= least else "**no**")
        for name, (against, least, times, low, high) in found.items()
    ]
    lines = table(("workload", "against", "at least", "times as fast", "spread", "reached"), rows)
    lines += ["", *_explained(encode), ""]
    limits = ", ".join(f"{row['of_the_bare_pass']:.2f} ({name})" for name, row in encode["limit"].items())
    halves, seconds = encode["bfloat16"]["cosine"], encode["bfloat16"]["seconds"]
    share = seconds["bfloat16"][0] / seconds["float32"][0]
    runs = {row["runs"] for row in encode["floors"].values()}
    lines.append(
        f"`python benchmarks/encode.py`, `stage1_step.py` and `train_step.py`: medians of {min(runs)} alternating "
        "runs, CPU time on one thread; spread is that of single runs. `encode` takes, of the time of the bare model on "
        f"packed, prepared, distinct inputs: {limits}. In bfloat16 embeddings have a cosine of at least "
        f"{halves['least']:.4f} with those in float32 (mean {halves['mean']:.4f}) and take {share:.2f} of the time on "
        "this machine; that is less only where the processor has instructions for it."
    )
    return "\n".join(lines)


def _explained(encode: dict[str, Any]) -> list[str]:
    """What stock reaches in other batches, and for each comparison that fell short the arithmetic of it."""
    told = []
    for name, row in encode["floors"].items():
        if "other_batches_of_stock" in row:
            peer = next(key for key in row["counts"] if key != "unime_st")
            others = [
                f"{other['times_as_fast']:.2f} against {who} ({other['batch_size']} a batch)"
                for who, other in row["other_batches_of_stock"].items()
            ]
            told.append(f"{name}: {row['times_as_fast']:.2f} against {peer}, {', '.join(others)}")
    lines = []
    if told:
        found = "The batch size at which stock is fastest is found on a third of the inputs; beside it, in one run each"
        lines.append(f"{found}: {'; '.join(told)}.")
    for name, row in encode["floors"].items():
        if row["times_as_fast"] >= row["at_least"]:
            continue
        counts = row["counts"]
        if counts:
            ours, peer = (counts[who] for who in counts)
            lines.append(
                f"Not reached, {name}: the peer's language model runs over {peer['places']:,} places, of which "
                f"{row['padding_share_of_peer']:.0%} are padding, ours over {ours['places']:,}: "
                f"{peer['places'] / ours['places']:.2f} times as many. The last layer and the vision tower save "
                "more; each further pass reads all weights once more."
            )
        else:
            lines.append(
                f"Not reached, {name}: {row['inputs']} inputs, {row['distinct']} of them distinct, make "
                f"{row['inputs'] / row['distinct']:.2f}; all have as many tokens, so there is no padding to save."
            )
    return lines


def workloads_table(encode: dict[str, Any]) -> str:
    """Stock `encode` by kind of input and share of duplicates, with counts."""
    head = (
        "miniature", "times as fast", "spread", "forward calls", "stock", "places", "stock", "padding of stock",
        "distinct",
    )  # fmt: skip
    rows = []
    for name, row in encode["workloads"].items():
        (low, high), counts = row["spread"], row["counts"].values()
        calls, places = ([f"{count[key]:,}" for count in counts] for key in ("forward_calls", "places"))
        shares = f"{row['padding_share_of_peer']:.0%}", f"{row['distinct']} of {row['inputs']}"
        rows.append((name, f"{row['times_as_fast']:.2f}", f"{low:.2f} to {high:.2f}", *calls, *places, *shares))
    return "\n".join(table(head, rows))


def families_table(encode: dict[str, Any]) -> str:
    """Both peers on tiny models of each family, by share of duplicates."""
    shares = list(next(iter(encode["families"].values())))
    columns = [(peer, share) for peer in ("stock", "published style") for share in shares]
    rows = [
        (family, *(f"{row[share][peer]['times_as_fast']:.2f}" for peer, share in columns))
        for family, row in encode["families"].items()
    ]
    return "\n".join(table(["tiny model", *(f"{peer}, {share}" for peer, share in columns)], rows))


def parts_table(found: dict[str, Any]) -> str:
    """Where each path spends its time."""
    parts = list(next(iter(found["paths"].values()))["share"])
    rows = [
        (name, *(f"{100 * row['share'][part]:.1f}" for part in parts), f"{row['seconds']:.1f}")
        for name, row in found["paths"].items()
    ]
    return "\n".join(table(["share of time, %", *parts, "seconds"], rows))
