"""A report of results: tables, plots and a gallery, as Markdown, as one HTML page and as JSON."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from unime_st.evaluation.report.html import to_html
from unime_st.evaluation.report.markdown import FILES, to_markdown
from unime_st.evaluation.report.plots import Series, bar_plot, heat_map, line_plot, require_matplotlib
from unime_st.evaluation.report.section import Section
from unime_st.evaluation.settings import versions
from unime_st.files import write_atomically
from unime_st.images import IMAGE_FILES
from unime_st.videos import even_places

THUMBNAIL = 128  # pixels of the longer side
STRIP = 4  # frames of a video
_GAP = 4  # pixels between them


class Report:
    """Collects results and writes them for people and for programs.

    All text is shown as it is: nothing in it is taken as HTML or Markdown. Right and wrong are written in words, not
    only shown in colour.

    Args:
        title: Title of the report.

    Example:
        >>> import tempfile
        >>> report = Report("Results")
        >>> report.add_table("Precision@1", ["model", "score"], [["before", 0.05], ["after", 0.42]])
        >>> report.write(tempfile.mkdtemp()).name
        'report.html'
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.sections: list[Section] = []

    def add_text(self, text: str, *, title: str = "") -> None:
        """Add paragraphs of plain text, which are separated by empty lines."""
        self.sections.append(Section("text", title, {"text": text}))

    def add_table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any] | Mapping[str, Any]],
        *,
        note: str = "",
        digits: int = 3,
        percent: bool = False,
        highest: Sequence[str] = (),
    ) -> None:
        """Add a table.

        Args:
            title: Heading of the table.
            columns: Names of the columns.
            rows: Cells in the order of the columns, or mappings from column to cell; a missing cell, None or NaN is
                shown as "–".
            note: Text below the table.
            digits: Decimal places of floats.
            percent: Show floats times 100, with two decimal places fewer.
            highest: Columns whose highest number is in bold type, as often as it occurs.

        Raises:
            ValueError: If a row has more or fewer cells than there are columns, or it or `highest` names no column.
        """
        if unknown := [name for name in highest if name not in columns]:
            raise ValueError(f"`highest` names {unknown}, but the columns of table {title!r} are {list(columns)}.")
        table = [_cells(row, columns, f"Row {number} of table {title!r}") for number, row in enumerate(rows)]
        shown = [[_shown(cell, digits, percent=percent) for cell in row] for row in table]
        numeric = [all(_is_number(row[at]) for row in table) for at in range(len(columns))]
        best = [[name in highest and _is_highest(table, row, at) for at, name in enumerate(columns)] for row in table]
        data = {"columns": list(columns), "rows": table, "shown": shown, "numeric": numeric, "best": best, "note": note}
        self.sections.append(Section("table", title, data))

    def add_settings(self, settings: Mapping[str, Any], *, title: str = "Settings and versions") -> None:
        """Add the settings of the results, followed by the versions of Python and of the packages that matter.

        Args:
            settings: Name -> value.
            title: Heading of the table.
        """
        rows = [[name, str(value)] for name, value in {**settings, **versions()}.items()]
        self.add_table(title, ["setting", "value"], rows)

    def add_line_plot(
        self, title: str, series: Series, xlabel: str = "", ylabel: str = "", *, note: str = "", log_y: bool = False
    ) -> None:
        """Add a plot of lines.

        Args:
            title: Heading of the plot.
            series: Name -> (xs, ys), with as many xs as ys.
            xlabel: Label of the horizontal axis.
            ylabel: Label of the vertical axis.
            note: Text below the plot.
            log_y: Whether the vertical axis is logarithmic.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If a series does not have as many xs as ys.
        """
        require_matplotlib()
        for name, (xs, ys) in series.items():
            if len(xs) != len(ys):
                raise ValueError(f"Series {name!r} of plot {title!r} has {len(xs)} xs and {len(ys)} ys.")
        drawn = {theme: line_plot(series, xlabel, ylabel, theme, log_y=log_y) for theme in ("light", "dark")}
        values = {name: {"x": list(xs), "y": list(ys)} for name, (xs, ys) in series.items()}
        self._add_plot(title, {"series": values, "xlabel": xlabel, "ylabel": ylabel, "note": note}, drawn)

    def add_bar_plot(
        self,
        title: str,
        groups: Sequence[str],
        series: Mapping[str, Sequence[float]],
        ylabel: str = "",
        *,
        errors: Mapping[str, Sequence[float]] | None = None,
        note: str = "",
    ) -> None:
        """Add a plot of bars.

        Args:
            title: Heading of the plot.
            groups: Names of the groups of bars.
            series: Name -> one value per group.
            ylabel: Label of the axis of values.
            errors: Name of a series -> length of the whiskers, one per group.
            note: Text below the plot.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If a series does not have one value per group.
        """
        require_matplotlib()
        for name, values in [*series.items(), *(errors or {}).items()]:
            if len(values) != len(groups):
                raise ValueError(
                    f"Series {name!r} of plot {title!r} has {len(values)} values for {len(groups)} groups."
                )
        drawn = {theme: bar_plot(groups, series, ylabel, theme, errors=errors) for theme in ("light", "dark")}
        data = {"groups": list(groups), "series": {name: list(values) for name, values in series.items()}}
        whiskers = {name: list(values) for name, values in (errors or {}).items()}
        self._add_plot(title, {**data, "errors": whiskers, "ylabel": ylabel, "note": note}, drawn)

    def add_heat_map(
        self, title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]],
        *, note: str = "",
    ) -> None:  # fmt: skip
        """Add a table of shades with numbers in them, from the darkest for the lowest of a column to the brightest.

        Args:
            title: Heading of the plot.
            rows: Names of the rows.
            columns: Names of the columns.
            values: One list per row, with None where there is no value.
            note: Text below the plot.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there are not as many values as rows and columns, or a column has none.
        """
        require_matplotlib()
        table = np.array([[np.nan if cell is None else float(cell) for cell in row] for row in values], dtype=float)
        if table.shape != (len(rows), len(columns)) or np.isnan(table).all(axis=0).any():
            raise ValueError(
                f"Heat map {title!r} has values of shape {table.shape} for {len(rows)} rows and {len(columns)} "
                "columns, or a column without any."
            )
        drawn = {theme: heat_map(rows, columns, table, theme) for theme in ("light", "dark")}
        data = {"rows": list(rows), "columns": list(columns), "values": table.tolist(), "note": note}
        self._add_plot(title, data, drawn)

    def _add_plot(self, title: str, data: dict[str, Any], drawn: dict[str, bytes]) -> None:
        number = sum(section.kind == "plot" for section in self.sections) + 1
        name = f"plot-{number:02d}.png"
        section = Section("plot", title, {**data, "picture": name}, {name: drawn["light"]}, {name: drawn["dark"]})
        self.sections.append(section)

    def add_gallery(self, title: str, entries: Sequence[Mapping[str, Any]], *, note: str = "") -> None:
        """Add queries with the results of each.

        Args:
            title: Heading of the gallery.
            entries: Each has a `query` (text, a PIL image, the path of one, or `{"image", "text"}`), `results` (best
                first, each with an `image` or a `text`, `right`, whether it is a right answer, and its `rank` if that
                is not its place here) and, if known, `rank`, the rank of the best right answer. A `video`, a list of
                images, in place of an `image` is shown as a strip of at most four of its frames.
            note: Text below the gallery.

        Raises:
            FileNotFoundError: If an image is missing.
        """
        section = Section("gallery", title, {"note": note, "entries": []})
        for entry in entries:
            results: list[dict[str, Any]] = []
            for found in entry["results"]:
                rank = {} if found.get("rank") is None else {"rank": int(found["rank"])}
                results.append({**_side(found, section.pictures), "right": bool(found["right"]), **rank})
            shown = {"query": _side(entry["query"], section.pictures), "results": results, "rank": entry.get("rank")}
            section.data["entries"].append(shown)
        self.sections.append(section)

    def to_dict(self) -> dict[str, Any]:
        """Return all results as plain data, ready for JSON: numbers that are not finite become None."""
        sections = [
            {
                "kind": part.kind,
                "title": part.title,
                **{key: part.data[key] for key in part.data if key not in {"shown", "best"}},
            }
            for part in self.sections
        ]
        return _plain({"title": self.title, "sections": sections})

    def write(self, folder: str | Path) -> Path:
        """Write `report.json`, `report.md` with its pictures in `report_files/`, and the self-contained `report.html`.

        Args:
            folder: Folder of the report, which is made when missing.

        Returns:
            The path of the HTML page.
        """
        folder = Path(folder)
        for section in self.sections:
            for name, png in section.pictures.items():
                write_atomically(folder / FILES / name, png)
        write_atomically(folder / "report.json", json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        write_atomically(folder / "report.md", to_markdown(self.title, self.sections))
        page = folder / "report.html"
        write_atomically(page, to_html(self.title, self.sections))
        return page


def _cells(row: Sequence[Any] | Mapping[str, Any], columns: Sequence[str], where: str) -> list[Any]:
    if isinstance(row, Mapping):
        unknown = [key for key in row if key not in columns]
        if unknown:
            raise ValueError(f"{where} names {unknown}, but the columns are {list(columns)}.")
        return [row.get(column) for column in columns]
    if len(row) != len(columns):
        raise ValueError(f"{where} has {len(row)} cells for {len(columns)} columns.")
    return list(row)


def _is_highest(table: Sequence[Sequence[Any]], row: Sequence[Any], at: int) -> bool:
    numbers = [
        other[at] for other in table if _is_number(other[at]) and other[at] is not None and other[at] == other[at]
    ]
    return bool(numbers) and row[at] == max(numbers)


def _is_number(cell: Any) -> bool:
    return cell is None or (isinstance(cell, int | float | np.number) and not isinstance(cell, bool))


def _shown(cell: Any, digits: int, *, percent: bool) -> str:
    if cell is None or (isinstance(cell, float | np.floating) and math.isnan(cell)):
        return "–"
    if isinstance(cell, float | np.floating):
        return f"{100 * cell:.{max(0, digits - 2)}f}" if percent else f"{cell:.{digits}f}"
    return str(cell)


def _side(side: Any, pictures: dict[str, bytes]) -> dict[str, Any]:
    """The text of a query or a result, and the name of its thumbnail, which is added to `pictures`."""
    if not isinstance(side, Mapping):
        is_path = isinstance(side, Path) or (isinstance(side, str) and _is_image_file(side))
        side = {"image": side} if is_path or isinstance(side, Image.Image) else {"text": str(side)}
    image, text, frames = side.get("image"), side.get("text"), side.get("video")
    shown: dict[str, Any] = {"text": None if text is None else str(text), "image": None}
    if frames:
        strip = [_thumbnail(frames[place]) for place in even_places(len(frames), STRIP)]
        return {**shown, "image": _add(_strip(strip), pictures), "frames": len(strip)}
    return shown if image is None else {**shown, "image": _add(_thumbnail(image), pictures)}


def _is_image_file(text: str) -> bool:
    return len(text) < 1024 and "\n" not in text and Path(text).suffix.lower() in IMAGE_FILES and Path(text).is_file()


def _thumbnail(image: Any) -> Image.Image:
    """An image made small, on white."""
    if isinstance(image, Mapping):  # the form in which data sets store images
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            image = ImageOps.exif_transpose(opened).copy()
    thumbnail = image.convert("RGBA")
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    paper = Image.new("RGBA", thumbnail.size, "white")
    return Image.alpha_composite(paper, thumbnail).convert("RGB")


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames side by side, in order."""
    width = sum(frame.width for frame in frames) + _GAP * (len(frames) - 1)
    strip = Image.new("RGB", (width, max(frame.height for frame in frames)), "white")
    place = 0
    for frame in frames:
        strip.paste(frame, (place, 0))
        place += frame.width + _GAP
    return strip


def _add(picture: Image.Image, pictures: dict[str, bytes]) -> str:
    """Add a picture to those of the report, and return its file name, equal for equal pictures."""
    png = io.BytesIO()
    picture.save(png, "png")
    name = f"image-{hashlib.sha256(png.getvalue()).hexdigest()[:16]}.png"
    pictures[name] = png.getvalue()
    return name


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
