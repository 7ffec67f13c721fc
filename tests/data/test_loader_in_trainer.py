"""Rows of the loader through the real Trainer: mixed columns, explicit negatives, images opened in workers."""

import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from tiny import picture, tiny_encoder
from unime_st.data import load_mmeb_train
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.samplers import FalseNegativeAwareBatchSampler


def test_a_step_on_every_kind_of_row(tmp_path):
    colours = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple"]
    (tmp_path / "images").mkdir()
    rows = []
    for number, colour in enumerate(colours):
        picture(colour).save(tmp_path / "images" / f"{colour}.png")
        image, text = (f"{colour}.png", f"<|image_1|>\nName the colour {number}.\n"), ("", colour)
        (query_image, query), (positive_image, positive) = (image, text) if number % 2 else (text, image)
        rows.append(
            {
                "qry": query,
                "qry_image_path": query_image,
                "pos_text": positive,
                "pos_image_path": positive_image,
                "neg_text": "grey" if number % 3 else "",
                "neg_image_path": "",
            }
        )
    (tmp_path / "Colours").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "Colours" / "original-00000-of-00001.parquet")
    dataset = load_mmeb_train(tmp_path)
    model = tiny_encoder("llava_onevision", tmp_path / "model")
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=2, margin=None, mini_batch_size=2)
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=2, report_to="none", use_cpu=True,
        dataloader_num_workers=1, batch_sampler=FalseNegativeAwareBatchSampler, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, args, train_dataset=dataset, loss=loss)
    result = trainer.train()
    assert 0 < result.training_loss < 100
    assert float(loss.last_metrics["rows_without_negatives"]) == 0
