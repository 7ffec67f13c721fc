"""All speed benchmarks, one after the other, and a report of them: what `make bench` runs.

    python benchmarks/bench.py                 # all; some hours, most of them of `evaluate` and `scale`
    python benchmarks/bench.py encode parts    # some
    python benchmarks/bench.py --report        # run nothing, write the report from the results that are kept

Each writes its own results into `benchmarks/results`, so what was measured stays when a later one is stopped. The
report is `benchmarks/results/bench.md`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import readme
import speed_tables
from basics import RESULTS, keep, parser, read

SCRIPTS: dict[str, list[str]] = {
    "encode": ["encode.py"], "stage1_step": ["stage1_step.py"], "train_step": ["train_step.py"],
    "parts": ["where_time_goes.py"], "sampler": ["scale.py", "sampler"], "evaluate": ["evaluate.py"],
}  # fmt: skip
"""Name -> script and arguments; `evaluate` needs what `make demo` made."""


def results() -> dict[str, Any]:
    """What the benchmarks have written, by file."""
    names = ("encode", "train_step", "stage1_step", "where_time_goes", "scale", "evaluate")
    files = {name: RESULTS / f"{name}.json" for name in names}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"There are no results yet in {', '.join(missing)}. Run `make bench`.")
    return {name: read(path) for name, path in files.items()}


def report(found: dict[str, Any]) -> str:
    """All tables as Markdown."""
    sections = {
        "What must be reached": speed_tables.floors_table(found["encode"], found["train_step"], found["stage1_step"]),
        "`encode` by workload": speed_tables.workloads_table(found["encode"]),
        "`encode` on tiny models of each family, where the work beside the model is what counts": (
            speed_tables.families_table(found["encode"])
        ),
        "Where the time goes": speed_tables.parts_table(found["where_time_goes"]),
        "A step of stage 1": readme.stage1_step_table(found["stage1_step"]),
        "A step of stage 2": readme.train_step_table(found["train_step"]),
        "Evaluation": readme.evaluate_table(found["evaluate"]),
        "Sampler and loss": readme.scale_table(found["scale"]),
    }
    return "# Speed\n\n" + "\n\n".join(f"## {title}\n\n{table}" for title, table in sections.items()) + "\n"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(SCRIPTS)}; all when none is given")
    options.add_argument("--report", action="store_true", help="run nothing")
    given = options.parse_args()
    if unknown := set(given.names) - set(SCRIPTS):
        options.error(f"There is no benchmark {sorted(unknown)}; there are {', '.join(SCRIPTS)}.")
    names = [] if given.report else given.names or list(SCRIPTS)
    for number, name in enumerate(names, start=1):
        print(f"== {name} ({number} of {len(names)})", flush=True)
        started = time.monotonic()
        script, *arguments = SCRIPTS[name]
        subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *arguments], check=True)
        print(f"== {name}: {(time.monotonic() - started) / 60:.0f} minutes", flush=True)
    keep(RESULTS / "bench.md", report(results()))


if __name__ == "__main__":
    main()
