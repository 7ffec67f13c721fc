"""What a check of pairs has found: to be printed, and as a dict."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

_SHOWN = 10


@dataclass(frozen=True)
class Finding:
    """Something about a row."""

    row: int  # its number in the data set
    place: str  # file and line, where known
    column: str
    what: str  # the image and what is wrong with it, or what else was found


@dataclass(frozen=True)
class Shared:
    """Rows that have a content in common with others."""

    contents: int = 0  # that several rows have
    rows: int = 0  # that have one of them
    pairs: int = 0  # of rows that are false negatives of each other by it
    largest: int = 0  # rows of the content that most have
    examples: tuple[tuple[str, ...], ...] = ()  # places of the rows of the largest ones


@dataclass(frozen=True)
class PairsReport:
    """What :func:`~unime_st.data.check_pairs` has found.

    Attributes:
        name: Of the data.
        rows: Their number.
        kinds: Column -> kind of cell (``text``, ``image``, ``image+text``, ``empty``) -> how many.
        bad_images: Images that are missing or damaged, one entry a row and column.
        empty_cells: Cells that say nothing.
        bad_rows: Rows with a bad image or an empty cell, ascending.
        duplicates: Rows equal to another on both sides.
        equal_queries: Rows whose query another row has too, with another target.
        equal_targets: Rows whose target another row has too, with another query.
        own_targets: Rows whose query and target are one content.
        tokens: Column -> ``p50``, ``p95``, ``max``, ``over`` (rows above ``max_seq_length``), if a model was given.
        max_seq_length: Of the model; None for no limit.
        plan: Batch size, epochs, steps and tokens a step, roughly.
        resources: What training asks of a GPU, a :class:`~unime_st.training.TrainingPlan`, where it was asked for.
        notes: What was found out when the data were read.
    """

    name: str
    rows: int
    kinds: dict[str, dict[str, int]]
    bad_images: tuple[Finding, ...] = ()
    empty_cells: tuple[Finding, ...] = ()
    bad_rows: tuple[int, ...] = ()
    duplicates: Shared = field(default_factory=Shared)
    equal_queries: Shared = field(default_factory=Shared)
    equal_targets: Shared = field(default_factory=Shared)
    own_targets: tuple[str, ...] = ()
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)
    max_seq_length: int | None = None
    plan: dict[str, float] = field(default_factory=dict)
    resources: Any = None
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """What must be mended before training, each with what to do; empty when nothing must."""
        found = []
        if self.bad_images:
            rows = len({finding.row for finding in self.bad_images})
            different = len({finding.what.partition(": ")[0] for finding in self.bad_images})
            found.append(
                f"{different} image{'s' * (different != 1)} in {rows} of {self.rows} rows cannot be read: "
                f"{_places(self.bad_images)}. Mend them, or leave their rows out with "
                '`bad_images="drop"` (--bad-images drop).'
            )
        if self.empty_cells:
            rows = len({finding.row for finding in self.empty_cells})
            found.append(
                f"{rows} of {self.rows} rows have a side with nothing on it: {_places(self.empty_cells)}. Fill them "
                'in, or leave them out with `empty_cells="drop"` (--empty-cells drop).'
            )
        if self.rows < 2:
            found.append(f"{self.rows} row: contrastive training compares rows, so at least two are needed.")
        sides = (("query", self.equal_queries), ("target", self.equal_targets))
        found += [
            f"All {self.rows} rows have one {side}, so there is nothing to tell apart. Is it the right column?"
            for side, shared in sides
            if self.rows > 1 and shared.largest == self.rows
        ]
        if self.rows > 1 and self.kinds.get("label", {}).get("different") == 1:
            found.append(
                f"All {self.rows} rows have one label, so none is a negative of another. A label tells which target is "
                'meant; leave out what means something else with `label=""`.'
            )
        return found

    def raise_for_problems(self) -> None:
        """Refuse the data with all :attr:`problems`, if there are any."""
        if self.problems:
            raise ValueError(f"{self.name} is not fit for training.\n" + "\n".join(f"* {one}" for one in self.problems))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, with the problems, as plain values."""
        return {**asdict(self), "problems": self.problems}

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.rows:,} pairs", *(f"  {note}" for note in self.notes)]
        for column, kinds in self.kinds.items():
            lines.append(f"  {column:<12} {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}")
        lines += [*_listed("bad images", self.bad_images), *_listed("empty cells", self.empty_cells)]
        shared = (("duplicates", self.duplicates), ("equal queries", self.equal_queries))
        for title, found in (*shared, ("equal targets", self.equal_targets)):
            lines += _shared(title, found)
        if self.own_targets:
            lines.append(f"  {len(self.own_targets)} rows ask for their own query: {_some(self.own_targets)}")
        limit = "no limit" if self.max_seq_length is None else f"{self.max_seq_length:,}"
        for column, counts in self.tokens.items():
            numbers = f"p50 {counts['p50']:.0f}, p95 {counts['p95']:.0f}, max {counts['max']:.0f}"
            lines.append(f"  tokens of {column}: {numbers}; {counts['over']:.0f} over max_seq_length ({limit})")
        if self.plan:
            lines.append("  plan: " + ", ".join(f"{name.replace('_', ' ')} {_n(v)}" for name, v in self.plan.items()))
        if self.resources is not None:
            lines.append(str(self.resources))
        lines += [f"PROBLEM: {one}" for one in self.problems] or ["No problem found."]
        return "\n".join(lines)


def _listed(title: str, findings: tuple[Finding, ...]) -> list[str]:
    lines = [f"  {title}: {len(findings)}"]
    lines += [f"    {one.place}, column {one.column!r}: {one.what}" for one in findings[:_SHOWN]]
    return lines + ([f"    and {len(findings) - _SHOWN} more"] if len(findings) > _SHOWN else [])


def _shared(title: str, shared: Shared) -> list[str]:
    if not shared.rows:
        return [f"  {title}: none"]
    told = f"{shared.rows:,} rows share {shared.contents:,} contents, {shared.pairs:,} pairs of rows"
    return [f"  {title}: {told}; the most, {shared.largest}: {_some(shared.examples[0])}"]


def _places(findings: tuple[Finding, ...]) -> str:
    return _some(tuple(dict.fromkeys(finding.place for finding in findings)))


def _some(places: tuple[str, ...]) -> str:
    """Places, the name of the file once."""
    first, *others = places[:_SHOWN]
    name = first.rpartition(", ")[0]
    told = [first, *(other.removeprefix(f"{name}, ") if name else other for other in others)]
    return ", ".join(told) + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")


def _n(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or value >= 100 else f"{value:.2f}"
