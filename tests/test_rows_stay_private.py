"""Rows of training sets are in nothing that is saved or uploaded, unless that is asked for."""

import io
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Image
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from tiny import picture
from unime_st import build_encoder, export_encoder
from unime_st.losses import HardNegativeInfoNCELoss

SECRET = "a sentence of nobody's business"


def png(number):
    buffer = io.BytesIO()
    picture((number * 20, 9, 9)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def rows(kind):
    texts = [f"{SECRET} {number}" for number in range(8)]
    if kind == "texts":
        return Dataset.from_dict({"anchor": texts, "positive": [f"positive {text}" for text in texts]})
    images = Dataset.from_dict({"anchor": texts, "positive": [png(number) for number in range(8)]})
    images = images.cast_column("positive", Image())
    return DatasetDict(one=images, two=rows("texts")) if kind == "several" else images


def trained(folder, output, kind, **card):
    model = build_encoder(folder, device="cpu", peft_config=True)
    for name, value in card.items():
        setattr(model.model_card_data, name, value)
    arguments = SentenceTransformerTrainingArguments(
        str(output), per_device_train_batch_size=4, max_steps=2, save_steps=1, report_to=[], disable_tqdm=True,
        use_cpu=True, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=None)
    data = rows(kind)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, eval_dataset=data, loss=loss)
    trainer.train()
    trainer.create_model_card()
    return model


def leaks(folder):
    """Files below a folder that show a row."""
    found = {path for path in Path(folder).rglob("*") if path.is_file() and path.parent.name == "assets"}
    for path in Path(folder).rglob("*"):
        if path.is_file() and SECRET.encode() in path.read_bytes():
            found.add(path)
    return sorted(path.name for path in found)


@pytest.mark.parametrize("kind", ["texts", "images", "several"])
def test_nothing_saved_shows_a_row(kind, backbone, tmp_path):
    model = trained(backbone("qwen2_vl"), tmp_path / "run", kind)
    assert len(list((tmp_path / "run").rglob("README.md"))) == 3  # two checkpoints, and the run's own
    export_encoder(model, tmp_path / "exported")
    model.save_pretrained(str(tmp_path / "saved"))
    assert leaks(tmp_path) == []
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "anchor" in card  # columns, sizes and lengths are told
    assert "The weather is lovely today." in card


def test_rows_are_shown_when_asked_for(backbone, tmp_path):
    model = trained(backbone("qwen2_vl"), tmp_path / "run", "images")
    export_encoder(model, tmp_path / "exported", widget_images=True)
    shown = leaks(tmp_path / "exported")
    assert "README.md" in shown
    assert any(name.startswith(("image_", "example_")) for name in shown)
    export_encoder(model, tmp_path / "again")
    assert leaks(tmp_path / "again") == []
    asked = trained(backbone("qwen2_vl"), tmp_path / "asked", "texts", widget_images=True)
    asked.save_pretrained(str(tmp_path / "saved"))
    assert leaks(tmp_path / "saved") == ["README.md"]
    export_encoder(asked, tmp_path / "refused", widget_images=False)
    assert leaks(tmp_path / "refused") == []
