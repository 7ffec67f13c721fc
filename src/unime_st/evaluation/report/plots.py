"""The report's plots, as PNG bytes for a light and for a dark page; they need matplotlib, an optional extra."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from numbers import Integral
from typing import Any

import numpy as np

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]

# Colours that people who confuse red and green can distinguish (Okabe and Ito 2008, without yellow); lines can also be
# distinguished by their markers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK = {"light": "#1f2328", "dark": "#e6edf3"}
_PAPER = {"light": "#ffffff", "dark": "#15191f"}
_MOST_UPRIGHT = 8  # more groups of bars than this are drawn lying
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def require_matplotlib() -> None:
    """Raise an ``ImportError`` unless plots can be drawn."""
    if find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib, which is not installed: `pip install 'unime_st[eval]'`.")


def line_plot(series: Series, xlabel: str, ylabel: str, theme: str = "light", *, log_y: bool = False) -> bytes:
    """Draw one line per series of (xs, ys); missing values (NaN) leave gaps."""
    figure, axes = _figure(theme)
    for number, (name, (xs, ys)) in enumerate(series.items()):
        axes.plot(
            list(xs),
            list(ys),
            label=_plain(name),
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markevery=max(1, len(xs) // 12),
            markersize=4,
            linewidth=1.5,
        )
    if log_y:
        axes.set_yscale("log")
    if all(isinstance(x, Integral) for xs, _ in series.values() for x in xs):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _not_below_zero(axes, "x", [xs for xs, _ in series.values()])
    _not_below_zero(axes, "y", [ys for _, ys in series.values()])
    return _finish(figure, axes, xlabel, ylabel, theme, legend=bool(series))


def bar_plot(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    ylabel: str = "",
    theme: str = "light",
    *,
    errors: Mapping[str, Sequence[float]] | None = None,
) -> bytes:
    """Draw one bar per series in each group, many groups one below the other; `errors` are lengths of whiskers."""
    lying = len(groups) > _MOST_UPRIGHT
    height = 0.5 + len(groups) * max(0.24, 0.14 * len(series))
    figure, axes = _figure(theme, height=height) if lying else _figure(theme)
    width = 0.8 / max(1, len(series))
    centres = np.arange(len(groups))
    for number, (name, values) in enumerate(series.items()):
        whiskers = (errors or {}).get(name)
        (axes.barh if lying else axes.bar)(
            centres + (number - (len(series) - 1) / 2) * width,
            [float(value) for value in values],
            width,
            label=_plain(name),
            color=_COLOURS[number % len(_COLOURS)],
            hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor=_PAPER[theme],
            ecolor=_INK[theme],
            capsize=2,
            **{"xerr" if lying else "yerr": None if whiskers is None else [float(value) for value in whiskers]},
        )
    lengths = [(np.asarray(own, float) - np.asarray((errors or {}).get(name, 0))) for name, own in series.items()]
    _not_below_zero(axes, "x" if lying else "y", lengths)
    names = [_plain(group) for group in groups]
    if lying:
        axes.set_yticks(centres, names)
        axes.set_ylim(len(groups) - 0.5, -0.5)  # the first group is on top
        return _finish(figure, axes, ylabel, "", theme, legend=bool(series), grid="x")
    slanted = len(groups) > 4 or any(len(group) > 14 for group in groups)
    axes.set_xticks(centres, names, **({"rotation": 30, "ha": "right"} if slanted else {}))
    return _finish(figure, axes, "", ylabel, theme, legend=bool(series))


def heat_map(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, theme: str = "light") -> bytes:
    """Draw values (rows, columns) as shades with the numbers in them, each column shaded by its own range."""
    figure, axes = _figure(theme, width=max(7.0, 0.9 * len(columns) + 2.5), height=max(2.0, 0.36 * len(rows) + 1.2))
    low, high = (reduce(values, axis=0) for reduce in (np.nanmin, np.nanmax))
    shade = np.where(high > low, (values - low) / np.where(high > low, high - low, 1.0), 0.5)
    axes.imshow(np.ma.masked_invalid(shade), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row in range(len(rows)):
        for column in range(len(columns)):
            value = values[row, column]
            dark = not np.isnan(value) and shade[row, column] < 0.5
            colour = _INK[theme] if np.isnan(value) else "#ffffff" if dark else "#000000"
            axes.text(
                column,
                row,
                "–" if np.isnan(value) else f"{value:.1f}",
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
            )
    axes.set_xticks(range(len(columns)), [_plain(name) for name in columns], rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [_plain(name) for name in rows])
    return _finish(figure, axes, "", "", theme, legend=False, grid=None)


def _plain(text: str) -> str:
    """Text that matplotlib shows unchanged: no formulas, no label hidden for its leading underscore."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def _figure(theme: str, width: float = 7.0, height: float = 3.6) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no global state, no window, any thread

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor=_PAPER[theme])
    axes = figure.add_subplot()
    axes.set_facecolor(_PAPER[theme])
    return figure, axes


def _not_below_zero(axes: Any, axis: str, values: Sequence[Any]) -> None:
    """Keep the margin around numbers that are never negative from reaching below zero."""
    numbers = np.concatenate([np.zeros(0), *(np.asarray(own, dtype=float) for own in values)])
    low, high = getattr(axes, f"get_{axis}lim")()
    if low < 0 and not (numbers < 0).any():
        getattr(axes, f"set_{axis}lim")(0, high)


def _finish(
    figure: Any, axes: Any, xlabel: str, ylabel: str, theme: str, *, legend: bool, grid: str | None = "y"
) -> bytes:
    ink = _INK[theme]
    axes.set_xlabel(_plain(xlabel), color=ink)
    axes.set_ylabel(_plain(ylabel), color=ink)
    axes.tick_params(colors=ink)
    if grid is not None:
        axes.grid(visible=True, axis=grid, color=ink, alpha=0.15)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(ink)
    if legend:
        figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=ink, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return png.getvalue()
