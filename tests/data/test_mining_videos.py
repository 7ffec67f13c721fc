"""Mining among videos: folders of frames, lists of images in files and in the data set, against cosines by hand."""

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pillow

from unime_st import build_encoder
from unime_st.data import load_mined_negatives, mine_hard_negatives
from unime_st.data.mining.encoder import MiningEncoder

ROWS, VIDEOS, NEGATIVES = 12, 9, 3


def frames_of(number):
    """Frames of noise; the videos differ in length."""
    generator = np.random.default_rng(number)
    return [Pillow.fromarray(generator.integers(0, 255, (28, 28, 3), dtype=np.uint8)) for _ in range(2 + number % 3)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folders of frames, whose order is not that of their letters, and a copy of the first."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(VIDEOS):
        (root / str(number)).mkdir()
        for place, frame in enumerate(frames_of(number)):
            frame.save(root / str(number) / f"frame_{place + 9}.png")
    (root / "copy").mkdir()
    for path in (root / "0").iterdir():
        (root / "copy" / path.name).write_bytes(path.read_bytes())
    return root


def folder_cell(root, name):
    return {"video": str(root / name), "text": None}


def list_cell(root, name):
    paths = sorted((root / name).iterdir(), key=lambda path: int(path.stem.rpartition("_")[2]))
    return {"video": [str(path) for path in paths], "text": "watch"}


def bytes_cell(root, name):
    return {"video": [{"bytes": Path(path).read_bytes(), "path": None} for path in list_cell(root, name)["video"]]}


FORMS = {
    "folders": (folder_cell, {"video": Value("string"), "text": Value("string")}),
    "lists of files": (list_cell, {"video": Sequence(Value("string")), "text": Value("string")}),
    "lists of images": (bytes_cell, {"video": Sequence(Image(decode=False))}),
}


def training_set(root, form):
    """Captions and their videos; two rows show the same, one from a copy; one explicit negative."""
    cell, features = FORMS[form]
    names = [*map(str, range(VIDEOS)), "copy", "1", "2"]
    columns = {
        "anchor": [f"caption {number % VIDEOS} of {number}" for number in range(ROWS)],
        "positive": [cell(root, name) for name in names],
        "negative_1": [cell(root, str((number + 4) % VIDEOS)) for number in range(ROWS)],
        "label": [VIDEOS if name == "copy" else int(name) for name in names],
    }
    told = {"anchor": Value("string"), "positive": features, "negative_1": features, "label": Value("int64")}
    return Dataset.from_dict(columns, Features(told))


def plain(cell):
    return {key: value for key, value in cell.items() if value is not None}


@pytest.fixture(scope="module")
def model(backbone):
    return build_encoder(backbone("qwen2_vl"), device="cpu")


@pytest.mark.parametrize("form", FORMS)
def test_videos_are_mined_as_by_hand(stored, model, tmp_path, form):
    dataset = training_set(stored, form)
    options = {"num_negatives": NEGATIVES, "margin": 0.05, "shard_size": 4, "rows_per_file": 5}
    folder = mine_hard_negatives(dataset, model, tmp_path / "mined", **options)
    mined = load_mined_negatives(folder)
    cell, _ = FORMS[form]
    cells = [plain(cell(stored, str(number))) for number in range(VIDEOS)]
    targets, queries = model.encode(cells), model.encode([{"text": text} for text in dataset["anchor"]])
    scores = queries @ targets.T
    kept = []
    for row, label in enumerate(dataset["label"]):
        video = 0 if label == VIDEOS else label
        right = {video}  # a copy of a right answer is one
        valid = [other for other in np.argsort(-scores[row], kind="stable").tolist()
                 if other not in right and scores[row, other] <= scores[row, video] + 0.05]  # fmt: skip
        if valid:
            kept.append((row, [valid[place % len(valid)] for place in range(NEGATIVES)]))
    assert len(mined) == len(kept) > ROWS // 2
    for found, (row, expected) in zip(mined, kept, strict=True):
        assert found["anchor"] == dataset[row]["anchor"]
        assert plain(found["positive"]) == plain(dataset[row]["positive"])
        names = [f"negative_{place + 1}" for place in range(NEGATIVES)]
        shown = model.encode([plain(found[name]) for name in names])
        np.testing.assert_allclose(shown, targets[expected], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_is_stopped_goes_on(stored, model, tmp_path, monkeypatch, form):
    dataset = training_set(stored, form)
    options = {"num_negatives": NEGATIVES, "margin": None, "shard_size": 4, "rows_per_file": 5}
    whole = mine_hard_negatives(dataset, model, tmp_path / "whole", **options)
    asked, real = [], MiningEncoder._encode

    def dying(encoder, cells, prompt):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(cells))
        return real(encoder, cells, prompt)

    monkeypatch.setattr(MiningEncoder, "_encode", dying)
    with pytest.raises(KeyboardInterrupt):
        mine_hard_negatives(dataset, model, tmp_path / "killed", **options)
    before = sum(asked)
    asked.clear()
    asked.extend([0, 0, 0])  # never again
    folder = mine_hard_negatives(dataset, model, tmp_path / "killed", **options)
    assert before + sum(asked) == ROWS + VIDEOS  # each once, the copy of a video being none of its own
    assert load_mined_negatives(folder)[:] == load_mined_negatives(whole)[:]
    for path in whole.glob("part-*.parquet"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_video_that_cannot_be_read_is_named(stored, model, tmp_path):
    dataset = training_set(stored, "folders")
    rows = [*dataset, {**dataset[0], "positive": folder_cell(stored, "none")}]
    with pytest.raises(FileNotFoundError, match=r"Row 12, 'positive': There is no .*none"):
        mine_hard_negatives(Dataset.from_list(rows, dataset.features), model, tmp_path / "mined")
    (tmp_path / "empty").mkdir()
    rows[-1]["positive"] = folder_cell(tmp_path, "empty")
    with pytest.raises(ValueError, match=r"Row 12, 'positive': The folder .*empty.* holds no frame"):
        mine_hard_negatives(Dataset.from_list(rows, dataset.features), model, tmp_path / "mined")


def test_frames_that_change_are_another_video(stored, model, tmp_path):
    """What a folder holds counts, not its name."""
    copy = tmp_path / "videos"
    for number in range(VIDEOS):
        (copy / str(number)).mkdir(parents=True)
        for place, frame in enumerate(frames_of(number)):
            frame.save(copy / str(number) / f"frame_{place}.png")
    (copy / "copy").symlink_to(copy / "0")
    options = {"num_negatives": 1, "margin": None}
    mine_hard_negatives(training_set(copy, "folders"), model, tmp_path / "mined", **options)
    content = io.BytesIO()
    frames_of(77)[0].save(content, "png")
    (copy / "3" / "frame_0.png").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="mined otherwise: data differ"):
        mine_hard_negatives(training_set(copy, "folders"), model, tmp_path / "mined", **options)
