"""Temperature, direction and diagonal of stage 1, swept on a deeper miniature, scored on texts never trained on.

    python benchmarks/stage1_sweep.py             # one process, one thread, under an hour; goes on where it was stopped

    python benchmarks/stage1_sweep.py --collect   # only the tables and the plot, of the runs that are kept

Every run has the same texts, steps, batch size, learning rate, schedule and LoRA as its neighbours; a seed decides the
order of the texts and the start of the LoRA weights. First the whole grid with seed 0; then the `FINALISTS` best of it
by `CRITERION`, and `ALWAYS`, with the other seeds. Scored on validation glosses and captions: the test split is not
read. Steps are few and the model is small: what is compared is how settings of the loss learn within a budget.

The layers below those with LoRA are frozen, so their states are computed once and shared by all runs; no image is read.
Writes `benchmarks/results/stage1_sweep.json`, `.md` and `.png`.
"""

from __future__ import annotations

from basics import RESULTS, keep, over_seeds, parser, percent, read
from basics import table as lines_of

# isort: split
import json
import statistics
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from stage1_lab import SweepSettings
from unime_st.functional import KL_DIRECTIONS

SETTINGS = SweepSettings()
TEMPERATURES = (0.02, 0.05, 0.1, 0.2)
HELD_OUT = 180  # pairs of each kind, at most
RECIPE_BATCH = 1536  # texts compared with each other in the recipes: 8 processes x 96 rows x 2 columns
FINALISTS = 4
CRITERION = "mean_reciprocal_rank"
SCORES = (
    CRITERION, *(f"{pairs}_recall@{k}" for pairs in ("term_to_gloss", "label_to_keywords") for k in (1, 5)),
    "spearman_with_teacher", "nearest_neighbor_agreement",
)  # fmt: skip


class Variant(NamedTuple):
    """What differs between runs."""

    temperature: float
    direction: str
    include_diagonal: bool

    def __str__(self) -> str:
        return f"{self.temperature:g}, {self.direction}, diagonal {'in' if self.include_diagonal else 'out'}"


GRID = [Variant(*values) for values in product(TEMPERATURES, KL_DIRECTIONS, (False, True))]
ALWAYS = (
    Variant(0.05, "teacher_student", False),  # the recipes' values
    Variant(0.05, "student_teacher", True),  # the paper's formula as printed, at the same temperature
)
Runs = dict[Variant, dict[int, dict[str, Any]]]


def finalists(runs: Runs) -> list[Variant]:
    """The best of the grid by seed 0, best first, and those always compared."""
    ranked = sorted(GRID, key=lambda variant: -runs[variant][0][CRITERION])
    return list(dict.fromkeys([*ranked[:FINALISTS], *ALWAYS]))


def run_one(variant: Variant, seed: int, lab: Any) -> dict[str, Any]:
    """Train and score one variant with one seed."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    from unime_st.losses import DistillKLLoss

    stage, model = SETTINGS.stage1, lab.model
    parameters = model.reset(seed)
    loss_function = DistillKLLoss(None, **variant._asdict())
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, stage.steps // 10), stage.steps)
    began, log = time.monotonic(), []
    for rows in lab.batches(seed):
        embeddings = model([lab.train[row] for row in rows])
        loss = loss_function.compute_loss_from_embeddings([embeddings], lab.targets[torch.tensor(rows)])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # the Trainer's
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        told = {name: value.item() for name, value in loss_function.last_metrics.items()}
        log.append({"loss": loss.item(), "gradient_norm": norm.item()} | told)
    seconds = time.monotonic() - began
    with torch.inference_mode():
        return lab.scores(model) | {"seconds": round(seconds, 1), "log": log}


def run_all(lab: Any, work: Path, seeds: int) -> None:
    """Do the runs that are not kept yet: the grid with the first seed, then its best with the others."""
    began = time.monotonic()

    def go(variants: list[Variant], seed: int) -> None:
        for number, variant in enumerate(variants, start=1):
            kept = work / f"{seed}-{GRID.index(variant)}.json"
            if not kept.is_file():
                result = {"variant": str(variant), **run_one(variant, seed, lab)}
                keep(kept, result)
                shown = ", ".join(f"{name} {100 * result[name]:.1f}" for name in SCORES)
                passed = time.monotonic() - began
                print(f"[{passed:5.0f} s] seed {seed}, {number} of {len(variants)}: {variant}: {shown}", flush=True)

    go(GRID, 0)
    chosen = finalists(kept_runs(work))
    for seed in range(1, seeds):
        go(chosen, seed)


def kept_runs(work: Path) -> Runs:
    """Variant -> seed -> result of the runs finished so far, seeds in order."""
    runs: Runs = {}
    for seed, index, file in sorted((*map(int, file.stem.split("-")), file) for file in work.glob("[0-9]*-*.json")):
        result = read(file)
        if result["variant"] != str(GRID[index]):
            raise ValueError(f"{file} is of another grid ({result['variant']}). Remove it, or give another --work.")
        runs.setdefault(GRID[index], {})[seed] = result
    return {variant: runs[variant] for variant in GRID if variant in runs}


def prepare(cache: Path, work: Path) -> Any:
    """Packages, texts, teacher and model; what is no run's is scored and kept."""
    from emoji.benchmark import build_benchmark
    from emoji.miniature import build_miniature
    from emoji.packages import fetch
    from stage1_lab import Lab

    work.mkdir(parents=True, exist_ok=True)
    fetched = fetch(cache, print)
    benchmark = build_benchmark(fetched, cache / "benchmark")
    backbone = build_miniature(fetched, work / "miniature", layers=SETTINGS.layers, image_size=SETTINGS.image_size)
    lab = Lab(fetched, benchmark, backbone, SETTINGS, HELD_OUT, work)
    if not (work / "anchors.json").is_file():
        sizes = (SETTINGS.stage1.batch_size, RECIPE_BATCH)
        anchors = {
            "base": lab.base_scores(),
            "teacher": lab.scores(None),
            "held_out_pairs": {name: len(pairs) for name, pairs in lab.pairs.items()},
            "teacher_self_probability": {
                str(size): {f"{value:g}": lab.self_probability(benchmark, value, size) for value in TEMPERATURES}
                for size in sizes
            },
        }
        keep(work / "anchors.json", anchors)
        print(json.dumps(anchors, indent=1), flush=True)
    return lab


def summarise(runs: Runs, anchors: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over seeds, the spread of seeds pooled, and how far each is behind the best.

    Raises:
        ValueError: if the grid is not complete.
    """
    missing = [str(variant) for variant in GRID if 0 not in runs.get(variant, {})]
    if missing:
        raise ValueError(f"{len(missing)} runs are missing: {'; '.join(missing)}. Run the sweep to its end.")
    table, repeated = {}, [variant for variant in finalists(runs) if len(runs[variant]) > 1]
    for variant in GRID:
        by_seed = [runs[variant][seed] for seed in sorted(runs[variant])]
        table[str(variant)] = {
            **variant._asdict(),
            "seeds": sorted(runs[variant]),
            "first_gradient_norm": by_seed[0]["log"][0]["gradient_norm"],
            **{name: over_seeds([result[name] for result in by_seed]) for name in SCORES},
        }
    spread = {
        name: statistics.mean(table[str(variant)][name]["std"] ** 2 for variant in repeated) ** 0.5 for name in SCORES
    } if repeated else None  # fmt: skip
    return {
        "settings": asdict(SETTINGS) | {"held_out_pairs": anchors["held_out_pairs"]}, "criterion": CRITERION,
        "anchors": {name: anchors[name] for name in ("base", "teacher")},
        "teacher_self_probability": anchors["teacher_self_probability"], "table": table, "spread_of_seeds": spread,
        "finalists": _against_best(runs, repeated),
        "mean_of_grid": {field: _main_effect(runs, field) for field in Variant._fields},
    }  # fmt: skip


def _against_best(runs: Runs, variants: list[Variant]) -> dict[str, Any]:
    """Of each variant run with several seeds, best mean first: how far it is behind the best, seed by seed."""
    mean = {v: statistics.mean(result[CRITERION] for result in runs[v].values()) for v in variants}
    ranked = sorted(variants, key=lambda variant: -mean[variant])
    rows = {}
    for variant in ranked:
        both = sorted(set(runs[variant]) & set(runs[ranked[0]]))
        behind = [runs[ranked[0]][seed][CRITERION] - runs[variant][seed][CRITERION] for seed in both]
        later = [runs[variant][seed][CRITERION] for seed in both if seed]  # seed 0 chose who is here
        rows[str(variant)] = {"behind_best": over_seeds(behind), "mean_without_seed_0": statistics.mean(later)}
    return rows


def _main_effect(runs: Runs, field: str) -> dict[str, float]:
    """Value of a setting -> mean of the criterion over the grid's runs with it, seed 0."""
    values: dict[str, list[float]] = {}
    for variant in GRID:
        values.setdefault(f"{getattr(variant, field)}", []).append(runs[variant][0][CRITERION])
    return {value: statistics.mean(scores) for value, scores in values.items()}


def grid_table(summary: dict[str, Any]) -> list[str]:
    """The criterion by temperature, direction and diagonal, all of seed 0, so that every two cells compare."""
    columns = list(product((False, True), KL_DIRECTIONS))
    own = summary["teacher_self_probability"]
    head = [
        "temperature",
        *(f"{direction}, {'in' if diagonal else 'out'}" for diagonal, direction in columns),
        *(f"teacher's self-probability, {size} texts" for size in own),
    ]
    rows = []
    for value in TEMPERATURES:
        cells = [summary["table"][str(Variant(value, direction, diagonal))] for diagonal, direction in columns]
        shown = [f"{100 * cell[summary['criterion']]['values'][0]:.1f}" for cell in cells]
        rows.append([f"{value:g}", *shown, *(f"{size[f'{value:g}']:.3f}" for size in own.values())])
    return lines_of(head, rows)


def markdown(summary: dict[str, Any]) -> str:
    """The tables for people."""
    stage, pairs = summary["settings"]["stage1"], summary["settings"]["held_out_pairs"]
    means = [
        f"{field} " + ", ".join(f"{value} {100 * mean:.1f}" for value, mean in found.items())
        for field, found in summary["mean_of_grid"].items()
    ]
    lines = [
        "# Stage 1 on the miniature: temperature, direction, diagonal",
        "",
        f"`python benchmarks/stage1_sweep.py`; {stage['steps']} steps of {stage['batch_size']} texts. Percent, on the",
        f"validation split: {pairs['term_to_gloss']} WordNet terms, {pairs['label_to_keywords']} emoji labels.",
        "Mean reciprocal rank (the mean of both sets), all with seed 0:",
        "",
        *grid_table(summary),
        "",
        "![by temperature](stage1_sweep.png)",
        "",
        f"Means over the grid, seed 0: {'; '.join(means)}.",
        "",
    ]
    finalists = []
    for name, row in summary["finalists"].items():
        mean, behind = (percent(value) for value in (summary["table"][name][CRITERION], row["behind_best"]))
        finalists.append((name, mean, f"{100 * row['mean_without_seed_0']:.1f}", behind))
    head = ("repeated with more seeds", "mean reciprocal rank", "without seed 0", "behind the best, seed by seed")
    rows = [
        [name, *(f"{100 * scores[score]:.1f}" for score in SCORES), "–", "–"]
        for name, scores in summary["anchors"].items()
    ]
    for name, row in summary["table"].items():
        scores = (percent(row[score]) for score in SCORES)
        rows.append([name, *scores, len(row["seeds"]), f"{row['first_gradient_norm']:.2g}"])
    heads = ["", *(name.replace("_", " ") for name in SCORES), "seeds", "first gradient's norm"]
    return "\n".join([*lines, *lines_of(head, finalists), "", *lines_of(heads, rows)]) + "\n"


def plot(summary: dict[str, Any]) -> bytes:
    """The criterion by temperature, a line for each direction and diagonal."""
    from unime_st.evaluation.report.plots import line_plot

    series: dict[str, Any] = {}
    for row in summary["table"].values():
        name = f"{row['direction']}, diagonal {'in' if row['include_diagonal'] else 'out'}"
        xs, ys = series.setdefault(name, ([], []))
        xs.append(row["temperature"])
        ys.append(100 * row[CRITERION]["values"][0])
    series["before training"] = (list(TEMPERATURES), [100 * summary["anchors"]["base"][CRITERION]] * len(TEMPERATURES))
    return line_plot(series, "temperature", "mean reciprocal rank, %")


def report(summary: dict[str, Any]) -> None:
    """Write the tables and the plot, and print them."""
    for kind, content in {"json": summary, "md": markdown(summary), "png": plot(summary)}.items():
        keep(RESULTS / f"stage1_sweep.{kind}", content)
    print(markdown(summary), flush=True)


def main() -> None:
    options = parser(__doc__, cache=True)
    options.add_argument("--work", type=Path, default=Path(".demo_cache/stage1_sweep"), help="states and single runs")
    options.add_argument("--seeds", type=int, default=3, help="of the best; the whole grid has one")
    options.add_argument("--collect", action="store_true", help="run nothing: the tables of the runs that are kept")
    arguments = options.parse_args()
    work = arguments.work / f"{SETTINGS.key(*asdict(SETTINGS))}-{HELD_OUT}"
    if not arguments.collect:
        import torch

        torch.set_num_threads(1)
        run_all(prepare(arguments.cache, work), work, arguments.seeds)
    report(summarise(kept_runs(work), read(work / "anchors.json")))


if __name__ == "__main__":
    sys.exit(main())
