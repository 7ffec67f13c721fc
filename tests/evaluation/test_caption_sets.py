"""Retrieval and SugarCrepe from the layouts they are published in."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from evaluation_fakes import TableModel, numbered_picture

from unime_st.evaluation import ImageTextRetrievalEvaluator, Report, SugarCrepeEvaluator
from unime_st.evaluation.report.summary import add_retrieval


class CellModel(TableModel):
    """Knows images that come as cells of a data set, too."""

    def number(self, item):
        if isinstance(item, dict) and isinstance(item.get("image"), dict):
            from io import BytesIO

            from PIL import Image as Pillow

            return Pillow.open(BytesIO(item["image"]["bytes"])).convert("RGB").getpixel((0, 0))[0]
        return super().number(item)


def scores(evaluator):
    return {name: value for name, value in evaluator(CellModel(np.eye(8)[:, :6] + 0.1)).items() if "recall@1" in name}


def test_karpathys_splits(tmp_path):
    entries = []
    for number, split in ((1, "test"), (2, "train"), (3, "test")):
        numbered_picture(number, tmp_path / "val2014" / f"{number}.png")
        sentences = [{"raw": f" caption #{number} "}] + [{"raw": f"also #{number}"}] * 6
        entries.append({"filepath": "val2014", "filename": f"{number}.png", "split": split, "sentences": sentences})
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": entries}))
    evaluator = ImageTextRetrievalEvaluator.from_karpathy_split(path, tmp_path, name="COCO", ks=(1,))
    assert [image.name for image in evaluator.images] == ["1.png", "3.png"]
    assert len(evaluator.texts) == 10  # five an image
    assert evaluator.texts[0] == "caption #1"
    assert set(scores(evaluator).values()) == {1.0}
    one = ImageTextRetrievalEvaluator.from_karpathy_split(path, tmp_path, split="train", captions_per_image=1)
    assert one.texts == ["caption #2"]
    with pytest.raises(ValueError, match="no image of split 'val'; there are test, train"):
        ImageTextRetrievalEvaluator.from_karpathy_split(path, tmp_path, split="val")
    path.write_text(json.dumps({"images": [{"filename": "../secret.png", "split": "test", "sentences": []}]}))
    with pytest.raises(ValueError, match="leaves the image folder"):
        ImageTextRetrievalEvaluator.from_karpathy_split(path, tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"dataset_coco\.json"):
        ImageTextRetrievalEvaluator.from_karpathy_split(path, tmp_path)


def test_two_folders_of_equal_names(tmp_path):
    (tmp_path / "caption").mkdir()
    for number in (1, 2):
        numbered_picture(number, tmp_path / "image" / f"{number}.png")
        (tmp_path / "caption" / f"{number}.txt").write_text(f"a long caption #{number}\n")
    evaluator = ImageTextRetrievalEvaluator.from_paired_folders(tmp_path / "image", tmp_path / "caption", ks=(1,))
    assert set(scores(evaluator).values()) == {1.0}
    (tmp_path / "caption" / "2.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 names are in only one of.*: 2"):
        ImageTextRetrievalEvaluator.from_paired_folders(tmp_path / "image", tmp_path / "caption")


def rows_of(columns, **features):
    kinds = {name: Image() if name == "image" else Value("string") for name in columns}
    return Dataset.from_dict(columns, features=Features({**kinds, **features}))


def test_data_sets_and_the_hub(tmp_path, monkeypatch):
    pictures = [numbered_picture(number) for number in (1, 1, 3)]
    rows = rows_of({"image": pictures, "caption_0": ["#1", "also #1", "#3"], "caption_1": [None, None, "more #3"]})
    given = {"caption_columns": ("caption_0", "caption_1"), "ks": (1,)}
    evaluator = ImageTextRetrievalEvaluator.from_dataset(rows, **given)
    assert len(evaluator.images) == 2  # rows of one image add up
    assert evaluator.texts == ["#1", "also #1", "#3", "more #3"]
    assert set(scores(evaluator).values()) == {1.0}
    report = Report("x")
    wrong = ImageTextRetrievalEvaluator.from_dataset(rows, **given)
    add_retrieval(report, wrong, wrong(CellModel(np.eye(8)[:, ::-1][:, :6] * np.arange(6))))
    assert any(section.kind == "gallery" and section.pictures for section in report.sections)
    asked = []
    monkeypatch.setattr("unime_st.data.caption_sets.load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    hub = ImageTextRetrievalEvaluator.from_dataset("owner/flickr", split="test", captions_per_image=1, **given)
    assert hub.texts == ["#1", "#3"]
    assert asked == [(("owner/flickr",), {"split": "test"})]
    with pytest.raises(ValueError, match="no column caption; it has image, caption_0"):
        ImageTextRetrievalEvaluator.from_dataset(rows)


def test_sugarcrepe_from_data_sets(monkeypatch):
    rows = rows_of({"image": [numbered_picture(1), numbered_picture(2)], "caption": ["#1", "#3"],
                    "negative_caption": ["#4", "#2"]})  # fmt: skip
    model = CellModel(np.eye(6))
    assert SugarCrepeEvaluator.from_datasets({"swap_att": rows})(model)["sugarcrepe_swap_att_accuracy"] == 0.5
    asked = []
    monkeypatch.setattr("unime_st.data.caption_sets.load_dataset", lambda *a, **k: asked.append(a) or rows)
    SugarCrepeEvaluator.from_datasets({"swap_att": "owner/crepe:swap_att", "add_att": "owner/other"})(model)
    assert asked == [("owner/crepe", "swap_att"), ("owner/other",)]
    with pytest.raises(ValueError, match="no column negative_caption"):
        SugarCrepeEvaluator.from_datasets({"swap_att": rows.remove_columns("negative_caption")})
