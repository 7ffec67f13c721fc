"""Tables of the speed benchmarks, for the pages of `docs` and for `benchmarks/results/bench.md`."""

from __future__ import annotations

from typing import Any

TRAINING = {
    "stage-2 step, frozen vision, 25 % repeats": ("stock cached ranking loss", 1.5),
    "stage-1 step, sentences of mixed length": ("stock modules, the same loss in plain form", 1.5),
}


def floors_table(encode: dict[str, Any], train_step: dict[str, Any], stage1_step: dict[str, Any]) -> str:
    """Each comparison, what was measured, and what it must reach."""
    lines = ["| workload | against | at least | times as fast | spread | reached |", "|---|---|---|---|---|---|"]
    rows = {
        name: (row["against"], row["at_least"], row["times_as_fast"], row["spread"])
        for name, row in encode["floors"].items()
    }
    second = train_step["questions about drawings, a quarter of the targets repeated"]
    first = stage1_step["5 to 100 words, most short"]["unime_st: times as fast"]
    measured = (
        (second["times_as_fast"], second["spread"]),
        (first["median"], [first["least"], first["most"]]),
    )
    for (name, (against, least)), found in zip(TRAINING.items(), measured, strict=True):
        rows[name] = (against, least, *found)
    for name, (against, least, found, (low, high)) in rows.items():
        reached = "yes" if found >= least else "**no**"
        lines.append(f"| {name} | {against} | {least} | {found:.2f} | {low:.2f} to {high:.2f} | {reached} |")
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
        found = (
            "The batch size at which stock is fastest is found on a third of the inputs; beside it, in one run each: "
        )
        lines.append(f"{found}{'; '.join(told)}.")
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
        "| miniature | times as fast | spread | forward calls | stock | places | stock | padding of stock | distinct |"
    )
    lines = [head, "|---" * 9 + "|"]
    for name, row in encode["workloads"].items():
        ours, stock = row["counts"].values()
        lines.append(
            f"| {name} | {row['times_as_fast']:.2f} | {row['spread'][0]:.2f} to {row['spread'][1]:.2f} "
            f"| {ours['forward_calls']} | {stock['forward_calls']} | {ours['places']:,} | {stock['places']:,} "
            f"| {row['padding_share_of_peer']:.0%} | {row['distinct']} of {row['inputs']} |"
        )
    return "\n".join(lines)


def families_table(encode: dict[str, Any]) -> str:
    """Both peers on tiny models of each family, by share of duplicates."""
    shares = list(next(iter(encode["families"].values())))
    head = [f"stock, {share}" for share in shares] + [f"published style, {share}" for share in shares]
    lines = [f"| tiny model | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for family, row in encode["families"].items():
        cells = [
            f"{row[share][peer]['times_as_fast']:.2f}" for peer in ("stock", "published style") for share in shares
        ]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parts_table(found: dict[str, Any]) -> str:
    """Where each path spends its time."""
    parts = list(next(iter(found["paths"].values()))["share"])
    lines = [f"| share of time, % | {' | '.join(parts)} | seconds |", "|---" * (2 + len(parts)) + "|"]
    for name, row in found["paths"].items():
        cells = [f"{100 * row['share'][part]:.1f}" for part in parts]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['seconds']:.1f} |")
    return "\n".join(lines)
