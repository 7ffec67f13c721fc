"""Keep the demo's results in the repository, and write the pages' tables and the published models' cards.

python benchmarks/readme.py --demo demo_output   # after `make demo`: copy its numbers and pictures, then fill in
python benchmarks/readme.py                      # fill in only
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import speed_tables
from ablation import ALL, ALONE, STOCK, WARMED, tables
from basics import RESULTS, ROOT, compared, parser, percent, read, table
from emoji.reporting import NAMES, SEEN, SWAPS, between, shown, verdict
from emoji.settings import DemoSettings
from reranking import score_table
from stage1_sweep import grid_table
from unime_st.published import PUBLISHED
from unime_st.published_card import published_card

_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 8: "eight"}
RECIPES = {
    "phi3_v": "Phi-3.5-Vision", "llava_next": "LLaVA-1.6-7B", "llava_onevision": "LLaVA-OneVision-7B",
    "qwen2_vl": "Qwen2-VL-2B", "qwen3_vl": "Qwen3-VL-2B",
}  # fmt: skip
COLUMNS = ("text→image R@1", "image→text R@1", "keywords→image R@1", "definition→image R@1", SWAPS)
COMPARED = COLUMNS[:-1]
ROWS = [name for step, name in NAMES.items() if step != "start"]


def keep(output: Path) -> None:
    """Copy the numbers, the settings and the pictures of a finished demo.

    Raises:
        ValueError: if it was a short one, whose numbers mean nothing.
    """
    settings = read(output / "settings.json")
    full = json.loads(json.dumps(asdict(DemoSettings())))
    if settings != full:
        other = sorted(name for name in full if settings.get(name) != full[name])
        raise ValueError(f"{output} is a demo of other settings ({', '.join(other)}). Give that of `make demo`.")
    target = RESULTS / "demo"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(output / "report", target, ignore=shutil.ignore_patterns("report.html", "report.json"))
    for name in ("results.json", "settings.json", "seconds.json"):
        shutil.copy(output / name, target / name)
    shutil.copy(output / "unime-emoji-miniature" / "README.md", ROOT / "model_cards" / "unime-emoji-miniature.md")


def demo_tables(
    results: dict[str, Any], seconds: dict[str, float], ablation: dict[str, Any], heads: dict[str, Any]
) -> str:
    """The demo's table, what was compared, and its time."""
    whose = {drawings: title.removeprefix("Drawings by the ") for drawings, title in SEEN.items()}
    rows = [
        [f"{whose[drawings]}: {name}", *(shown(found[name].get(column)) for column in COLUMNS)]
        for drawings, found in results["tables"].items()
        for name in ROWS
    ]
    pairs = [f"{NAMES['stage2']} − {NAMES[other]}" for other in ("ridge", "stage2_only")]
    differences = {
        drawings: {pair: {column: found[pair][column] for column in COMPARED} for pair in pairs}
        for drawings, found in results["differences"].items()
    }
    compared = [
        [f"{whose[drawings]}: {pair}", *map(between, found[pair].values())]
        for pair in pairs
        for drawings, found in differences.items()
    ]
    training = sum(taken for step, taken in seconds.items() if step.startswith("stage"))
    told = (
        f"{verdict(differences, NAMES['ridge'])} {verdict(differences, NAMES['stage2_only'])} ± is the standard error "
        f"over the test's concepts ({results['queries'][COLUMNS[0]]}; keywords {results['queries'][COLUMNS[2]]}, "
        f"definitions {results['queries'][COLUMNS[3]]}), one seed. With the images shuffled among the captions, "
        f"text→image R@1 is {100 * results['shuffled']:.1f} % (chance {100 * results['chance']:.1f} %). The run took "
        f"{sum(seconds.values()) / 60:.0f} minutes after set-up, {training / 60:.0f} of them training. "
        f"{by_seeds(ablation, heads)}"
    )
    lines = [*table(("drawings by", *COLUMNS), rows), "", *table(("95 % interval, by concept", *COMPARED), compared)]
    return "\n".join([*lines, "", told])


def by_seeds(ablation: dict[str, Any], heads: dict[str, Any]) -> str:
    """What stage 1 and hard negatives bring, over seeds, in two sentences."""
    found = ablation["batches"]["256"]["differences"]
    asked = ("text→image", "image→text", "keywords→image")

    def told(name: str) -> str:
        return ", ".join(f"{what} {compared(found[name][what])}" for what in asked)

    sets = {
        "text in batches of 128": ("text, batch of 128", "k = 8, both filters", "term -> gloss"),
        "of 1,024": ("text, batch of 1024", "k = 8, both filters", "term -> gloss"),
        "attribute swaps with hardness weighting": ("image, batch of 512", "all, hardness 5", "attribute swaps"),
    }
    on_heads = ", ".join(
        f"{what} {compared(heads['sets'][kind]['rows'][name]['against_stock'][answered])}"
        for what, (kind, name, answered) in sets.items()
    )
    return (
        "Over five seeds of a smaller budget, in points of MRR (swaps: accuracy), stage 1 brings "
        f"{told(f'{ALL} − {ALONE}')}; hard negatives (k = 8 after a warm-up) against the stock loss "
        f"{told(f'{WARMED} − {STOCK}')}; on heads over frozen features {on_heads}."
    )


def ablation_table(results: dict[str, Any]) -> str:
    """The ablation's tables, a batch size after the other."""
    parts = [[f"Batches of {batch}:", "", *tables(found)] for batch, found in results["batches"].items()]
    return "\n".join("\n".join([*part, ""]) for part in parts).rstrip()


def heads_table(results: dict[str, Any]) -> str:
    """What settings of the loss gain over the stock loss, on heads."""
    sets = results["sets"]
    asked = [
        *((f"text, batch of {batch}", "term -> gloss", f"term → gloss, {batch}") for batch in (128, 512, 1024)),
        *((f"image, batch of {batch}", "label -> drawing", f"label → drawing, {batch}") for batch in (256, 512)),
        *((f"image, batch of {batch}", "attribute swaps", f"swaps, {batch}") for batch in (256, 512)),
        ("crowded, batch of 256", "drawing -> label", "crowded, drawing → label, 256"),
    ]

    def cell(name: str, kind: str, what: str) -> str:
        if (row := sets[kind]["rows"].get(name)) is None:
            return "–"
        if name == "stock":
            return percent(row["scores"][what])
        return compared(row["against_stock"][what])

    names = dict.fromkeys(name for found in sets.values() for name in found["rows"])
    rows = [[name, *(cell(name, kind, what) for kind, what, _ in asked)] for name in names]
    return "\n".join(table(["", *(title for _, _, title in asked)], rows))


def cards() -> dict[str, str]:
    """File name -> card of each published model."""
    return {f"{name.rpartition('/')[2]}.md": published_card(known) for name, known in PUBLISHED.items()}


def families_table(results: dict[str, dict[str, str]]) -> str:
    """What works for which family; a cell is "yes", or the reason why not."""
    checks = list(next(iter(results.values())))
    return "\n".join(table(["", *checks], ([family, *(row[c] for c in checks)] for family, row in results.items())))


def evaluate_table(result: dict[str, Any]) -> str:
    """How fast an evaluation is, beside two peers."""
    cases = (
        ("loop in the style of published scripts", "published style", "unime_st", "the published-style loop"),
        ("stock `encode` of the distinct inputs", "stock encode", "unime_st encode", "stock encode"),
    )
    rows = []
    for label, peer, ours, key in cases:
        seconds = [f"{statistics.median(result['seconds'][which]):.0f}" for which in (peer, ours)]
        rows.append((label, *seconds, f"{result[f'faster than {key}']['ratio']:.2f}"))
    lines = table(("the emoji benchmark's six tasks, all rows", "seconds", "unime_st", "times as fast"), rows)
    inputs, tokens = result["inputs"], result["tokens"]
    differences = result["largest difference of an embedding"].values()
    count, style = len(result["seconds"]["unime_st"]), result["batch size"]["published style"]
    cores = _word(result["machine"]["cores"])
    text = (
        f"Medians of {count} alternating runs, {cores} CPU cores: `python benchmarks/evaluate.py`. Of "
        f"{inputs['total']:,} inputs {inputs['distinct within tasks']:,} are distinct within tasks, "
        f"{inputs['distinct']:,} over all; for "
        f"their {tokens['of distinct inputs']:,} tokens the language model runs over "
        f"{tokens['computed by the language model']:,} places, padding included. Embeddings differ by at most "
        f"{max(differences):.0e}. The published-style loop has batches of {style}, in the order given, and computes "
        "all logits."
    )
    return "\n".join([*lines, "", text])


def stage1_sweep_table(summary: dict[str, Any]) -> str:
    """Stage 1's temperature, direction and diagonal, and how sure the teacher is of the text itself."""
    criterion = summary["criterion"]
    base, teacher = (100 * summary["anchors"][name][criterion] for name in ("base", "teacher"))
    stage, pairs = summary["settings"]["stage1"], summary["settings"]["held_out_pairs"]
    seeds = _word(len(summary["table"][next(iter(summary["finalists"]))]["seeds"]))
    finalists = [
        (name, percent(summary["table"][name][criterion]), percent(row["behind_best"]))
        for name, row in summary["finalists"].items()
    ]
    head = (f"{seeds} seeds", "mean reciprocal rank", "behind the first, seed by seed")
    text = (
        f"Mean reciprocal rank in percent on {pairs['term_to_gloss']} WordNet terms (the right gloss is sought) and "
        f"{pairs['label_to_keywords']} emoji labels (their keywords), never trained on, after {stage['steps']} steps "
        f"of {stage['batch_size']} texts; {base:.1f} before training, the teacher {teacher:.1f}. The upper "
        "table is of one seed; the lower is mean ± standard deviation over seeds."
    )
    return "\n".join([*grid_table(summary), "", *table(head, finalists), "", text])


def train_step_table(results: dict[str, Any]) -> str:
    """A training step against the stock loss."""
    head = (
        "a step of 64 pairs, frozen vision", "times as fast", "spread", "MB", "MB, stock", "tokens", "tokens, stock",
    )  # fmt: skip
    cases = {name: case for name, case in results.items() if isinstance(case, dict)}
    rows = []
    for name, case in cases.items():
        megabytes = [case["peak_megabytes"][kind] for kind in ("unime_st", "stock")]
        tokens = [f"{case['counts'][kind]['tokens']:,}" for kind in ("unime_st", "stock")]
        rows.append(
            (name, f"{case['times_as_fast']:.2f}", "{:.2f} to {:.2f}".format(*case["spread"]), *megabytes, *tokens)
        )
    lines = table(head, rows)
    worst = max(case["difference_of_gradients"] for case in cases.values())
    runs = min(case["runs"] for case in cases.values())
    return "\n".join(lines) + (
        f"\n\n`python benchmarks/train_step.py`: against `CachedMultipleNegativesRankingLoss` in mini-batches of "
        f"{results['mini_batch']}, medians of {runs} alternating steps in CPU time, two layers of the miniature "
        "(the last feeds forward last tokens alone, which counts for less in a deep model). MB is what a step adds at "
        f"its peak. Gradients differ by at most {worst:.0e} of the largest one: with repeats, "
        "which the stock loss takes for wrong answers, from those of our plain loss, else from those of the stock one, "
        "whose frozen tower is put into evaluation mode."
    )


def media_memory_table(results: dict[str, Any]) -> str:
    """Memory and time of a step over image files, with media at once and left."""
    names = ("stock", "unime_st, all at once", "unime_st, late media")
    cases = {name: case for name, case in results.items() if isinstance(case, dict) and names[0] in case}

    def told(case: dict[str, Any], what: str) -> list[str]:
        return [f"{case[kind][what]:,.0f}" if kind in case else "–" for kind in names]

    rows = [[name, *told(case, "megabytes"), *told(case, "seconds")] for name, case in cases.items()]
    head = ("", "MB, stock", "MB, all at once", "MB, late media", "seconds, stock", "all at once", "late media")
    share = max(case[names[2]]["megabytes"] / case[names[0]]["megabytes"] for case in cases.values())
    worst = {
        what: max(case[kind][f"difference of {what}"] for case in cases.values() for kind in case)
        for what in ("loss", "gradients")
    }
    text = (
        f"`python benchmarks/media_memory.py`: a batch of {results['batch']} texts, each with an image file of about "
        f"1,000 pixels a side, from the data collator to the end of the backward pass, in mini-batches of "
        f"{results['mini_batch']}, against `CachedMultipleNegativesRankingLoss` on stock modules. LLaVA-NeXT with its "
        "real tiles, 2,928 tokens an image, but tiny weights: MB are what is added to the model. Of a real one "
        "activations come on top, the same for all, and for ours, where the model is, the features of its frozen tower "
        "that a step keeps. Late media take at most "
        f"{share:.2f} of stock's. Seconds are of the processor, on one thread. Losses differ by at most "
        f"{worst['loss']:.0e}, gradients by {worst['gradients']:.0e} of the largest one."
    )
    return "\n".join([*table(head, rows), "", text])


def stage1_step_table(results: dict[str, Any]) -> str:
    """A step of stage 1 against stock modules."""
    head = (f"{results['batch']} sentences", "times as fast", "spread", "last layer whole", "MB", "stock")
    cases = {name: case for name, case in results.items() if isinstance(case, dict)}
    rows = []
    for name, case in cases.items():
        ours, whole = (case[f"{kind}: times as fast"] for kind in ("unime_st", "unime_st, whole last layer"))
        megabytes = [case["peak_megabytes"][kind] for kind in ("unime_st", "stock")]
        tokens = [f"{case['tokens'][kind]:,}" for kind in ("unime_st", "stock")]
        spread = f"{ours['least']:.2f} to {ours['most']:.2f}"
        rows.append((name, f"{ours['median']:.2f}", spread, f"{whole['median']:.2f}", *megabytes, *tokens))
    lines = table((*head, "tokens", "padded"), rows)
    worst = max(case["difference_of_gradients"] for case in cases.values())
    runs = min(case["runs"] for case in cases.values())
    return "\n".join(lines) + (
        f"\n\n`python benchmarks/stage1_step.py`: `DistillKLLoss` against the same loss of one padded pass of stock "
        f"modules, medians of {runs} alternating steps in CPU time, two layers of the miniature. The last layer feeds "
        f'forward last tokens alone, which counts for less in a deep model: "whole last layer" is without that. '
        f"Gradients differ by at most {worst:.0e} of the largest one, with weights in double precision."
    )


def gpu_table(encode: dict[str, Any], steps: dict[str, Any]) -> str:
    """What was measured on a GPU against stock, at a real model's shape."""
    rows = []
    for name, row in [pair for found in (encode, steps) for pair in found["measured"].items()]:
        if "times as fast" in row:
            of = (
                f", {row['inputs']} inputs" if "inputs" in row else f": a step of {row['pairs']} pairs, LoRA, GradCache"
            )
            times = (f"{row[key]:.2f}" for key in ("seconds", "stock, seconds", "times as fast"))
            megabytes = (f"{row[key]:,}" for key in ("MB", "stock, MB"))
            rows.append((name.removeprefix("qwen2_vl: ") + of, *times, *megabytes))
    head = ("Qwen2-VL-2B's shape, bfloat16", "seconds", "stock", "times as fast", "MB", "stock, MB")
    about = encode["machine"]
    text = (
        f"`bash benchmarks/gpu/run.sh OUT`, on an {about['card']} with torch {about['torch']} and transformers "
        f"{about['transformers']}, wall time, each at its best batch size "
        "([all figures](../benchmarks/results/gpu/gpu.md))."
    )
    return "\n".join([*table(head, rows), "", text])


def scale_table(results: dict[str, Any]) -> str:
    """The sampler, the loss and the teacher's cache at full size."""
    sampler = [
        (one["variant"], f"{one['rows']:,}", f"{one['set_up_and_first_plan_s']:.0f}", f"{one['cpu_s']:.0f}",
         f"{one['batch_us']:.1f}", f"{one['peak_mb']:,.0f}") for one in results["sampler"]["measured"]
    ]  # fmt: skip
    loss = [
        (f"{one['global_batch']:,} rows", f"{one['seconds']:.1f}", f"{one['peak_above_inputs_mb']:,.0f}",
         f"{one['a_tensor_n_1k_d_mb']:,.0f}") for one in results["loss"]["measured"]
    ]  # fmt: skip
    head = ("sampler, 256 dimensions", "rows", "set-up and first plan, s", "of CPU, s", "a batch, µs", "peak, MB")
    text = (
        "`python benchmarks/scale.py`, memory of the whole process but for the loss, where it is what is added. "
        f"Filling the teacher's cache takes {results['teacher']['cache_over_encode']:.2f} of the time of bare `encode`."
    )
    of_loss = table(("the loss alone, D = 1024", "seconds", "MB", "an (N, 1+k, D) tensor, MB"), loss)
    return "\n".join([*table(head, sampler), "", *of_loss, "", text])


def recipes_table(results: dict[str, Any]) -> str:
    """What each recipe trains, and the estimate of a GPU's memory."""
    rows = []
    for name, row in results.items():
        stage, _, backbone = name.partition("_")
        parameters = (f"{row[key] / 1e6:,.0f}" for key in ("trained", "frozen"))
        gib = row["gib"]
        rows.append(
            (f"{RECIPES[backbone]}, stage {stage[-1]}", row["rank"], f"{row['learning_rate']:g}", row["length"],
             *parameters, f"{gib['weights']:.1f}", f"{gib['gradients'] + gib['AdamW']:.1f}",
             f"{gib['activations']:.1f}", f"{sum(gib.values()):.0f}")
        )  # fmt: skip
    head = ("recipe", "LoRA rank", "learning rate", "length", "trained, M", "frozen, M", "weights",
            "LoRA's gradients, AdamW", "activations", "estimate, GiB a GPU")  # fmt: skip
    return "\n".join(table(head, rows))


def sides_table(results: dict[str, Any]) -> str:
    """What a pair with an image of so many pixels a side asks of a backbone that keeps its resolution."""
    rows = [
        (RECIPES[name.partition("_")[2]], f"{side} x {side}", f"{of['tokens']:,}", f"{of['patches']:,}",
         f"{of['tflop']:.2f}", f"{of['tflop'] * 1024 / 100:,.0f}")
        for name, row in results.items()
        for side, of in row["by_side"].items()
    ]  # fmt: skip
    head = ("", "image", "tokens of a pair", "patches", "TFLOP a pair", "seconds for 1,024 pairs at 100 TFLOP/s")
    return "\n".join(table(head, rows))


def newcomer_transcript(results: dict[str, Any]) -> str:
    """Three commands with what they said, and what the page finds."""
    lines = []
    for step in results["steps"]:
        cpu = f", {step['cpu_seconds']} of the processor's" if "cpu_seconds" in step else " until it answers"
        told = [line for line in step["said"] if "recall@" not in line or "to_image_recall@1:" in line]
        lines += [f"$ {step['command']}    # {step['seconds']} seconds{cpu}", *(f"  {line}" for line in told)]
    page, minutes = results["steps"][-1], sum(step["seconds"] for step in results["steps"]) / 60
    told = (
        f"{minutes:.1f} minutes in all, on {_word(results['machine']['cores'])} CPU cores. Of the {results['rows']} "
        f"captions, typed into the page, {page['first']} find their drawing first and {page['among_five']} among five, "
        "most of them having been trained on: `python benchmarks/newcomer.py`."
    )
    return "\n".join(["```text", *lines, "```", "", told])


def serve_table(results: dict[str, Any]) -> str:
    """The server under many clients, beside one at a time."""
    head = ("model", "one, answers/s", f"{results['tiny']['many']['clients']}, answers/s", "times", "p50 / p99, s",
            "errors", "memory growth, MB", "furthest from `encode`")  # fmt: skip
    names = {"tiny": "the tests' tiny model", "small": "7.9 M random weights"}
    rows = []
    for model, name in names.items():
        one, many = results[model]["one_at_a_time_without_wait"], results[model]["many"]
        rows.append(
            (name, f"{one['answers_a_second']:.1f}", f"{many['answers_a_second']:.1f}",
             f"{results[model]['times_the_throughput_of_one_at_a_time']:.1f}",
             f"{many['p50_ms'] / 1000:.1f} / {many['p99_ms'] / 1000:.1f}", f"{many['errors']} of {many['answers']}",
             f"{many['memory_growth_mb']:.1f}", f"{many['furthest_from_encode']:.0e}")
        )  # fmt: skip
    return "\n".join(table(head, rows))


def structure_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The package's structure before and after it was laid out anew."""

    def lines(found: dict[str, Any]) -> tuple[int, int]:
        package = sum(part["lines"] for name, part in found["lines"].items() if name.startswith("src/"))
        demo = found["lines"].get("src/unime_st/demo", {"lines": 0})["lines"]
        return package - demo, package + sum(found["lines"][name]["lines"] for name in ("examples", "benchmarks"))

    def row(name: str, value: Callable[[dict[str, Any]], Any]) -> tuple[str, ...]:
        return (name, *(f"{value(found):,}" if isinstance(value(found), int) else str(value(found)) for found in both))

    def parts(found: dict[str, Any], walk: str) -> int:
        return round(found["walks"][walk]["hashes"]["_parts"])

    both = (before, after)
    walks = [
        row(f"{name}: files entered; deepest stack before the model runs",
            lambda found, name=name: "{files}; {deepest_before_forward}".format(**found["walks"][name]))
        for name in before["walks"]
    ]  # fmt: skip
    rows = [
        row("lines of the package, the demo left out", lambda found: lines(found)[0]),
        row("lines of package, demo, examples and benchmarks", lambda found: lines(found)[1]),
        row("files: p50, p90, longest", lambda found: "{p50}, {p90}, {max}".format(**found["files"])),
        row("functions of more than 40 lines", lambda found: len(found["functions"]["long"])),
        row("import circles", lambda found: len(found["imports"]["src/unime_st"]["circles"])),
        row("times that `encode` takes an input apart and hashes it", lambda found: parts(found, "encode")),
        row("times that an MMEB task does", lambda found: parts(found, "MMEB task")),
        *walks,
    ]  # fmt: skip
    left_out = ", ".join(f"`{folder}`" for folder in after["without"])
    text = (
        f"`python benchmarks/structure.py --walks`, at {before['commit']} and {after['commit']}; what is new since is "
        f"left out: {left_out}."
    )
    return "\n".join([*table(("", "before", "after"), rows), "", text])


def pages() -> list[Path]:
    """The files with tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(texts: dict[str, str]) -> dict[str, str]:
    """Pages, by name, with their tables written from the kept results.

    Raises:
        ValueError: if a table has no place, or more than one.
    """
    made = {
        "demo": (demo_tables, "demo/results", "demo/seconds", "ablation", "heads"),
        "ablation": (ablation_table, "ablation"), "heads": (heads_table, "heads"),
        "evaluate": (evaluate_table, "evaluate"),
        "families": (families_table, "families"), "stage1_sweep": (stage1_sweep_table, "stage1_sweep"),
        "reranking": (score_table, "reranking"),
        "media_memory": (media_memory_table, "media_memory"),
        "train_step": (train_step_table, "train_step"), "stage1_step": (stage1_step_table, "stage1_step"),
        "scale": (scale_table, "scale"), "speed": (speed_tables.floors_table, "encode", "train_step", "stage1_step"),
        "structure": (structure_table, "structure/before", "structure/after"),
        "recipes": (recipes_table, "recipes"), "sides": (sides_table, "recipes"),
        "newcomer": (newcomer_transcript, "newcomer"), "serve": (serve_table, "serve"),
        "gpu": (gpu_table, "gpu/encode", "gpu/steps"), "parts": (speed_tables.parts_table, "where_time_goes"),
    }  # fmt: skip
    parts = {name: make(*(read(RESULTS / f"{file}.json") for file in files)) for name, (make, *files) in made.items()}
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        written = {
            page: pattern.subn(lambda match, part=part: f"{match[1]}{part}\n{match[2]}", text)
            for page, text in texts.items()
        }
        if (count := sum(places for _, places in written.values())) != 1:
            raise ValueError(
                f"{', '.join(texts)} have {count} places between <!-- {name} --> and <!-- /{name} -->, not one."
            )
        texts = {page: text for page, (text, _) in written.items()}
    return texts


def _word(number: int) -> str:
    return _WORDS.get(number, str(number))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--demo", type=Path, help="output folder of a finished demo")
    if demo := options.parse_args().demo:
        keep(demo)
    for name, card in cards().items():
        (ROOT / "model_cards" / name).write_text(card, encoding="utf-8")
    texts = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages()}
    for name, text in filled(texts).items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(f"written: {name}")


if __name__ == "__main__":
    main()
