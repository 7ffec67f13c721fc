import json

import numpy as np
import pytest
from PIL import Image

from emoji.media import DIRECTIONS, FRAMES, TASKS, build_media, guessing, media_tasks, page
from emoji.reporting import above_chance
from unime_st.evaluation import MMEBEvaluator

ROWS = 12


@pytest.fixture(scope="module")
def media(benchmark_folder, tmp_path_factory):
    return build_media(benchmark_folder, tmp_path_factory.mktemp("media") / "media", rows=ROWS)


def rows_of(folder):
    return json.loads((folder / "media.json").read_text())["rows"]


def frame(folder, kind, row, place):
    return np.asarray(Image.open(folder / kind / str(row) / f"frame-{place}.png"), dtype=float)


def test_drawings_move_as_is_said(media):
    seen = set()
    for number, row in enumerate(rows_of(media)):
        places = []
        for place in (0, FRAMES - 1):
            pixels = frame(media, "moving", number, place)
            differs = np.abs(pixels - pixels[0, 80 if "left" in row["direction"] else 0]).sum(axis=2)
            drawn = np.argwhere(differs > 60)
            places.append(drawn.mean(axis=0)[::-1])  # across, down
        way = np.sign(np.round((places[1] - places[0]) / 40)).tolist()
        assert way == list(DIRECTIONS[row["direction"]])
        seen.add(row["direction"])
    assert len(seen) > 1


def test_drawings_turn_into_what_is_said(media, benchmark_folder):
    for number, row in enumerate(rows_of(media)):
        for place, name in ((0, "image"), (FRAMES - 1, "becomes_image")):
            with Image.open(benchmark_folder.image_root / row[name]) as drawn:
                expected = np.asarray(drawn.convert("RGB").resize((160, 160), Image.Resampling.BICUBIC), dtype=float)
            assert np.array_equal(frame(media, "turning", number, place), expected)
        assert len({row["label"], row["becomes"], row["other"]}) == 3


def test_pages_show_their_words_and_the_drawing_where_they_are_illustrated(media):
    plain, other = page("red heart", "a heart", "love"), page("red heart", "a heart", "hate")
    assert np.any(np.asarray(plain) != np.asarray(other))
    longest = page("long words " * 5, "meaning " * 25, "keyword, " * 12, Image.new("RGB", (160, 160), "red"))
    assert np.asarray(longest)[-1].min() == np.asarray(longest)[:, -1].min() == 255  # nothing runs off the page
    for number in range(ROWS):
        text, illustrated = (
            np.asarray(Image.open(media / kind / f"{number}.png").convert("RGB")) for kind in ("text", "illustrated")
        )
        assert np.ptp(text[:80].astype(int)) > 200  # the title
        assert np.array_equal(text[:80], illustrated[:80])
        assert not np.array_equal(text[90:250], illustrated[90:250])


def test_the_tasks_ask_for_what_the_files_show(media):
    tasks = {task.name: task for task in media_tasks(media)}
    assert list(tasks) == list(TASKS.values())
    for name, task in tasks.items():
        own = task.load(on_error="raise")
        for place, row in enumerate(rows_of(media)):
            query, candidates = own.items[own.queries[place]], [own.items[item] for item in own.own(place)]
            right = [own.items[item] for item in own.right_of(place)]
            assert len(right) == 1
            if name == "EmojiMoving":
                assert right == candidates[:1] == [{"text": row["direction"]}]
                assert {item["text"] for item in candidates} == set(DIRECTIONS)
                assert query["video"][0].endswith(f"moving/{place}/frame-0.png")
            elif name == "EmojiTurning":
                assert right == candidates[:1] == [{"text": f"{row['label']} turns into {row['becomes']}"}]
                assert len(candidates) == 4
            elif name == "EmojiVideo_t2v":
                assert query == {"text": row["label"]}
                assert right[0]["video"][-1].endswith(f"moving/{place}/frame-{FRAMES - 1}.png")
            else:
                assert query == {"text": row["keywords"]}
                folder = "illustrated" if "Illustrated" in name else "text"
                assert right[0]["image"].endswith(f"{folder}/{place}.png")
            if name not in {"EmojiMoving", "EmojiTurning"}:
                assert len(own.corpus) == ROWS


class Guessing:
    """Gives every input an embedding by chance."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def encode(self, items, **options):
        return self.rng.normal(size=(len(items), 8)).astype(np.float32)


def test_the_levels_of_chance_are_what_guessing_scores(media):
    found = {task: [] for task in TASKS.values()}
    model = Guessing()
    for _ in range(40):
        evaluator = MMEBEvaluator(None, media_tasks(media), meta_tasks={})
        evaluator(model)
        for task, scores in found.items():
            scores += evaluator.results[task].scores.tolist()
    for column, level in guessing(ROWS).items():
        scores = np.array(found[TASKS[column]])
        assert abs(scores.mean() - level) < 4 * scores.std() / len(scores) ** 0.5


def test_files_are_made_once_and_again_for_other_settings(media, benchmark_folder, tmp_path):
    copy = build_media(benchmark_folder, tmp_path / "copy", rows=ROWS)
    assert rows_of(copy) == rows_of(media)  # all choices come from the seed
    stamp = (copy / "media.json").stat().st_mtime_ns
    assert build_media(benchmark_folder, copy, rows=ROWS) == copy
    assert (copy / "media.json").stat().st_mtime_ns == stamp
    build_media(benchmark_folder, copy, rows=2)
    assert len(rows_of(copy)) == 2
    assert len(list((copy / "moving").iterdir())) == 2
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="no videos and pages made here"):
        build_media(benchmark_folder, tmp_path / "mine", rows=2)


def test_what_is_said_of_chance_follows_the_intervals():
    found = {"a": {"low": 0.26}, "b": {"low": 0.25}}
    level = {"mean": 0.25}
    assert above_chance(found, dict.fromkeys("ab", level)) == (
        "Stage 1 + 2 is above chance in a; not shown to be above it in b."
    )
    assert above_chance({"b": {"low": 0.1}}, {"b": level}) == "Stage 1 + 2 is not shown to be above chance in b."
    assert above_chance({"a": {"low": 0.5}}, {"a": level}) == "Stage 1 + 2 is above chance in a."
