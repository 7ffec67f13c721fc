"""An error of a row in training says what the row holds, so that it can be found in the data set."""

import pytest
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from tiny import picture
from unime_st import build_encoder
from unime_st.losses import HardNegativeInfoNCELoss


@pytest.fixture
def model(backbone):
    return build_encoder(backbone("qwen2_vl"), device="cpu")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("broken", ["damaged", "thin", "missing"])
def test_training_names_the_file_of_a_bad_image(model, tmp_path, broken, workers):
    picture().save(tmp_path / "fine.png")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    Image.new("RGB", (2, 900)).save(tmp_path / "thin.png")
    files = ["fine"] * 6 + [broken]
    rows = [
        {"anchor": f"query {row}", "positive": {"image": str(tmp_path / f"{name}.png"), "text": f"answer {row}"}}
        for row, name in enumerate(files)
    ]
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=7,
        dataloader_num_workers=workers,
        max_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), loss=HardNegativeInfoNCELoss(model)
    )
    with pytest.raises((OSError, ValueError)) as caught:
        trainer.train()
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])  # a worker's are in its traceback
    assert f"{broken}.png" in told
    assert "'text': 'answer 6'" in told
    assert "in training, in one column of a batch" in told


@pytest.mark.parametrize(
    ("inputs", "held"),
    [
        (["a", "see <|image_pad|>"], "Row 1 is 'see <|image_pad|>'."),
        ([{"image": None, "text": " "}, "b"], "Row 0 is {'image': None, 'text': ' '}."),
        (["a", "b", b"no image"], "Row 2 is b'no image'."),
        (["a", "b" * 10**6 + "<|image_pad|>"], "Row 1 is 'bbbbb"),
    ],
)
def test_what_a_row_holds_is_told_in_short(model, inputs, held):
    with pytest.raises((OSError, ValueError)) as caught:
        model.preprocess(inputs)
    (note,) = caught.value.__notes__
    assert held in note
    assert len(note) < 400


def test_rows_that_the_caller_has_numbered_need_no_note(model):
    with pytest.raises(ValueError, match="Row 1") as caught:
        model.encode(["a", {"image": None, "text": None}])
    assert not getattr(caught.value, "__notes__", [])
