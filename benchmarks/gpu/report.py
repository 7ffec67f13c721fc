"""The results as one page, `gpu.md`, in the folder that is given: what `run.sh` ends with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PARTS = ("families", "encode", "steps", "loss", "fsdp", "kills")


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-2 else f"{value:,.3f}".rstrip("0").rstrip(".")
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def table(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of one kind, those with the same columns, in one table each."""
    lines: list[str] = []
    columns: list[str] = []
    for name, row in measured.items():
        if not isinstance(row, dict):
            lines += ["", f"{name}: {shown(row)}"]
            columns = []
            continue
        if list(row) != columns:
            columns = list(row)
            lines += ["", f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        lines.append(f"| {name} | {' | '.join(shown(row[column]) for column in columns)} |")
    return lines


def page(found: list[dict[str, Any]]) -> str:
    lines = ["# On a GPU", ""]
    for part in found:
        about = ", ".join(f"{name} {value}" for name, value in part["machine"].items())
        lines += [f"## {part['part']}", "", f"{about}; {part.get('seconds', 0):.0f} s{', in small' * part['tiny']}."]
        lines += table(part["measured"])
        for name, told in part["errors"].items():
            lines += ["", f"**{name} failed**", "", "```text", *(line.rstrip() for line in told[-8:]), "```"]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    out = Path(sys.argv[1])
    found = [json.loads((out / f"{part}.json").read_text()) for part in PARTS if (out / f"{part}.json").is_file()]
    (out / "gpu.md").write_text(page(found))
    print(f"written: {out / 'gpu.md'}")


if __name__ == "__main__":
    main()
