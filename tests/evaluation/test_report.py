import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from unime_st.evaluation import Report
from unime_st.evaluation.report import plots
from unime_st.evaluation.report.markdown import escape

NASTY = "<script>alert('x')</script> & | `code` *b* [a](b) $x$ \"q\""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    Image.new("RGBA", (400, 200), (255, 0, 0, 0)).save(folder / "clear.png")
    made = Report(f"Results {NASTY}")
    made.add_text(f"First.\n\n{NASTY}", title="About")
    made.add_table(
        "Scores",
        ["model", "t2i", "rows"],
        [[NASTY, 0.12345, 3], {"model": "after", "t2i": float("nan"), "rows": None}],
        percent=True,
        note="By task.",
    )
    steps = list(range(30))
    made.add_line_plot(f"Loss {NASTY}", {"_a $1": (steps, np.exp(-np.array(steps) / 9.0)), "b": ([1], [0.5])}, "step")
    made.add_bar_plot("R@1", ["one", "two"], {"x": [1, np.float32(2)], "y": [3, 4]}, errors={"x": [0.1, 0.2]})
    made.add_gallery(
        "Found",
        [
            {"query": NASTY, "results": [{"image": folder / "clear.png", "right": True}], "rank": 1},
            {
                "query": {"image": Image.new("RGB", (10, 10)), "text": "which?"},
                "results": [{"text": "this", "right": False}, {"text": NASTY, "right": np.bool_(True)}],
            },
        ],
    )
    made.write(folder / "out")
    return made, folder / "out"


class Reader(html.parser.HTMLParser):
    void = frozenset({"meta", "img", "source", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.text, self.seen = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(report):
    page = (report[1] / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    tags = [tag for tag, _ in reader.seen]
    assert "script" not in tags
    assert "link" not in tags
    pictures = [attrs.get("src") or attrs.get("srcset") for tag, attrs in reader.seen if tag in {"img", "source"}]
    assert len(pictures) == 2 * 2 + 2
    for picture in pictures:
        data = picture.removeprefix("data:image/png;base64,")
        assert data != picture
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            opened.load()
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "prefers-color-scheme: dark" in page
    assert "viewport" in page
    text = "".join(reader.text)
    assert text.count(NASTY) >= 5
    assert "✓ right" in text
    assert "✗ wrong" in text
    assert "12.3" in text
    assert "–" in text


def test_markdown_shows_text_as_it_is_and_its_pictures_exist(report):
    text = (report[1] / "report.md").read_text()
    assert text.startswith("# Results \\<script\\>")
    named = re.findall(r"!\[.*?\]\((report_files/[^)]*)\)", text)
    assert len(named) == 4
    for name in named:
        with Image.open(report[1] / name) as picture:
            picture.load()
    table = text[text.index("## Scores") :].splitlines()[2:6]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {4}
    assert "right" in text
    assert "wrong" in text


def test_json_holds_the_numbers(report):
    data = json.loads((report[1] / "report.json").read_text(), parse_constant=pytest.fail)
    sections = {section["title"].split()[0]: section for section in data["sections"]}
    assert sections["Scores"]["rows"] == [[NASTY, 0.12345, 3], ["after", None, None]]
    assert sections["R@1"]["series"] == {"x": [1, 2.0], "y": [3, 4]}
    assert sections["Found"]["entries"][1]["results"][1] == {"text": NASTY, "image": None, "right": True}
    assert data["title"] == f"Results {NASTY}"


def test_plots_differ_by_theme_and_thumbnails_are_small(report):
    plot = next(section for section in report[0].sections if section.kind == "plot")
    (light,), (dark,) = plot.pictures.values(), plot.dark.values()
    corner = [Image.open(io.BytesIO(png)).convert("L").getpixel((0, 0)) for png in (light, dark)]
    assert corner[0] > 200
    assert corner[1] < 60
    thumbnails = [Image.open(path) for path in (report[1] / "report_files").glob("image-*.png")]
    assert max(max(picture.size) for picture in thumbnails) == 128
    assert any(picture.getpixel((0, 0)) == (255, 255, 255) for picture in thumbnails)  # transparency on white


def test_writing_again_leaves_no_other_files(report):
    before = sorted(path.name for path in report[1].rglob("*"))
    report[0].write(report[1])
    assert sorted(path.name for path in report[1].rglob("*")) == before
    assert not [name for name in before if name.endswith(".tmp")]


def test_refusals(tmp_path):
    made = Report("x")
    with pytest.raises(ValueError, match="Row 1 of table 't' has 1 cells for 2"):
        made.add_table("t", ["a", "b"], [[1, 2], [1]])
    with pytest.raises(ValueError, match=r"names \['c'\]"):
        made.add_table("t", ["a", "b"], [{"c": 1}])
    with pytest.raises(ValueError, match="'s' of plot 'p' has 2 xs and 1 ys"):
        made.add_line_plot("p", {"s": ([1, 2], [1])})
    with pytest.raises(ValueError, match="1 values for 2 groups"):
        made.add_bar_plot("p", ["a", "b"], {"s": [1]})
    with pytest.raises(FileNotFoundError, match="none"):
        made.add_gallery("g", [{"query": "q", "results": [{"image": tmp_path / "none.png", "right": True}]}])
    assert made.sections == []


def test_without_matplotlib_the_advice_is_to_install_it(monkeypatch):
    monkeypatch.setattr("unime_st.evaluation.report.plots.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"unime_st\[eval\]"):
        Report("x").add_line_plot("p", {"s": ([1], [1])})


def test_the_highest_number_is_bold(tmp_path):
    made = Report("x")
    made.add_table(
        "t", ["model", "score"], [["a", 0.5], ["b", float("nan")], ["c", 0.75], ["d", None]], highest=["score"]
    )
    made.add_settings({"batch size": 32})
    page = made.write(tmp_path).read_text()
    assert "<strong>0.750</strong>" in page
    assert page.count("<strong>") == 1
    text = (tmp_path / "report.md").read_text()
    assert "**0.750**" in text
    assert "| batch size | 32 |" in text
    assert "sentence-transformers" in text
    with pytest.raises(ValueError, match="`highest` names"):
        made.add_table("t", ["a"], [], highest=["b"])


def test_escape_keeps_lines_from_becoming_lists():
    assert escape("- item").startswith("\u200b")
    assert escape("12. item").startswith("\u200b")
    assert "\n" not in escape("a\nb")


@pytest.mark.parametrize("number", ["0.5", "-0.5", "12", "+3"])
def test_numbers_stay_as_they_are(number):
    assert escape(number) == number


def found_far_down():
    """A query whose right answer is among those found, and one whose right answer is not."""
    near = {"query": "near", "rank": 2, "results": [{"text": "a", "right": False}, {"text": "b", "right": True}]}
    far = {
        "query": "far",
        "rank": 152,
        "results": [
            {"text": "c", "right": False},
            {"text": "d", "right": False},
            {"text": "e", "right": True, "rank": 152},
        ],
    }
    return [near, far]


def test_a_right_answer_that_is_out_of_place_is_shown_with_its_rank(tmp_path):
    made = Report("x")
    made.add_gallery("Found", found_far_down())
    page = made.write(tmp_path).read_text()
    assert page.count("✓ right<") == 1
    assert page.count("✓ right, rank 152<") == 1
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| query | 1 | 2 | further down |" in lines
    assert "| near<br>rank 2 | a<br>✗ wrong | b<br>✓ right |  |" in lines
    assert "| far<br>rank 152 | c<br>✗ wrong | d<br>✗ wrong | e<br>✓ right, rank 152 |" in lines
    made = Report("x")
    made.add_gallery("Found", found_far_down()[:1])
    made.write(tmp_path)
    assert "| query | 1 | 2 |" in (tmp_path / "report.md").read_text().splitlines()


def test_a_video_is_a_strip_of_its_frames(tmp_path):
    colours = [(0, 0, 0), (90, 0, 0), (0, 90, 0), (0, 0, 90), (90, 90, 0), (0, 90, 90), (200, 0, 0)]
    frames = []
    for number, colour in enumerate(colours):
        frames.append(tmp_path / f"{number}.png")
        Image.new("RGB", (300, 200), colour).save(frames[-1])
    made = Report("x")
    results = [{"video": [frames[0]], "right": False}, {"video": frames, "text": "a film", "right": True}]
    made.add_gallery("Found", [{"query": {"video": frames[:2], "text": "which way?"}, "results": results}])
    page = made.write(tmp_path / "out").read_text()
    assert page.count('<li class="right strip">') == 1
    assert page.count('<li class="wrong">') == 1  # one frame is a picture
    entry = made.to_dict()["sections"][0]["entries"][0]
    assert entry["query"]["frames"] == 2
    assert entry["results"][1]["frames"] == 4
    with Image.open(tmp_path / "out" / "report_files" / entry["results"][1]["image"]) as strip:
        assert strip.height == 85
        middles = [strip.getpixel((64 + place * 132, 40)) for place in range(4)]
        assert middles == [colours[place] for place in (0, 2, 4, 6)]


def limits(monkeypatch, draw, *arguments, **options):
    """Horizontal and vertical limits of a plot."""
    seen = []
    plain = plots._finish
    monkeypatch.setattr(
        plots, "_finish", lambda figure, axes, *rest, **kept: seen.append(axes) or plain(figure, axes, *rest, **kept)
    )
    draw(*arguments, **options)
    (axes,) = seen
    return axes.get_xlim(), axes.get_ylim()


@pytest.mark.parametrize("values", [[0.0, 3.0, 0.5], [0.0, 0.0, 0.0], [0.0, float("nan"), 9.0], [0.2, 5.0, 0.2]])
def test_axes_of_what_is_never_negative_begin_at_zero_or_above(monkeypatch, values):
    (left, _), (low, high) = limits(monkeypatch, plots.line_plot, {"loss": ([0, 1, 2], values)}, "step", "loss")
    assert (left, low >= 0, high >= np.nanmax(values)) == (0, True, True)
    (_, _), (low, _) = limits(monkeypatch, plots.bar_plot, ["a", "b", "c"], {"x": values})
    assert low == 0


def test_what_is_negative_is_not_cut_off(monkeypatch):
    (left, _), (low, _) = limits(monkeypatch, plots.line_plot, {"cosine": ([-1, 2], [-0.4, 0.3])}, "", "")
    assert left < -1
    assert low < -0.4
    bars = {"difference": [0.1, 0.2]}
    _, (low, _) = limits(monkeypatch, plots.bar_plot, ["a", "b"], bars, errors={"difference": [0.3, 0.1]})
    assert low < -0.2  # a whisker below zero says that the difference may be none


def test_many_groups_lie_below_each_other(monkeypatch):
    groups = [f"task {number}" for number in range(36)]
    (left, right), (bottom, top) = limits(monkeypatch, plots.bar_plot, groups, {"mine": list(range(36))}, "percent")
    assert (left, bottom, top) == (0, 35.5, -0.5)
    assert right >= 35
    with Image.open(io.BytesIO(plots.bar_plot(groups, {"mine": list(range(36)), "theirs": [1] * 36}))) as picture:
        assert picture.width < 1000 < picture.height


def test_a_wide_table_may_leave_the_column(tmp_path):
    made = Report("x")
    made.add_table("wide", [f"a column of some length {n}" for n in range(14)], [list(range(14))])
    page = made.write(tmp_path).read_text()
    assert '<div class="scroll wide"><table>' in page
    assert not re.search(r"\nth \{[^}]*nowrap", page)  # headings wrap, so that numbers need no room for words
    assert re.search(r"section > \.wide \{[^}]*grid-column: 1 / -1", page)
