"""Streams train as stored rows do, on one process and two; without the argument that images need, they say so."""

import io

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import SequentialSampler

from tiny import FAMILIES, picture, tiny_backbone
from two_processes import run_two
from unime_st import build_encoder
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss

ROWS = 8
TEXT = Value("string")


def png(number):
    buffer = io.BytesIO()
    picture((number * 20, 9, 99), (40 + number % 3 * 30, 30)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def rows(form):
    queries = [f"find number {number}" * (number % 3 + 1) for number in range(ROWS)]
    if form == "text":
        targets, kind = [f"number {number}" for number in range(ROWS)], TEXT
    elif form == "image":
        targets, kind = [png(number) for number in range(ROWS)], Image()
    else:
        targets, kind = (
            [{"image": png(number) if number % 4 else None, "text": f"number {number}"} for number in range(ROWS)],
            {"image": Image(), "text": TEXT},
        )
    features = Features({"anchor": TEXT, "positive": kind})
    return Dataset.from_dict({"anchor": queries, "positive": targets}, features=features)


def in_order(dataset, batch_size, drop_last, **_):
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def train(backbone, dataset, folder, per_device, make_loss=HardNegativeInfoNCELoss, **config):
    """The adapter's weights after two steps; the vision tower is frozen."""
    torch.manual_seed(0)
    model = build_encoder(backbone, device="cpu", peft_config=True)
    arguments = {"accelerator_config": config} if config else {}
    if isinstance(dataset, Dataset):
        arguments["batch_sampler"] = in_order
    args = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=per_device, max_steps=2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, optim="sgd", learning_rate=0.01, max_grad_norm=0.0,
        dataloader_drop_last=True, **arguments,
    )  # fmt: skip
    options = {"num_hard_negatives": None} if make_loss is HardNegativeInfoNCELoss else {"temperature": 0.1}
    loss = make_loss(model, gather_across_devices=True, **options)
    SentenceTransformerTrainer(model, args, train_dataset=dataset, loss=loss).train()
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_B" in name}


def assert_same(weights, others, tolerance):
    moved = [name for name, weight in weights.items() if weight.abs().max() > 1e-4]  # they start at zero
    assert len(moved) > 5
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=tolerance)


def job(_rank, backbone, form, folder, config):
    return train(backbone, rows(form).to_iterable_dataset(), folder, 2, **config)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    return {family: str(tiny_backbone(family, root / family) or root / family) for family in FAMILIES}


@pytest.mark.parametrize(
    ("family", "form"), [("qwen2_vl", "text"), ("qwen2_vl", "image"), ("qwen2_vl", "cell"), ("llava_next", "cell")]
)
def test_a_stream_trains_as_stored_rows_do(backbones, tmp_path, family, form):
    stored = train(backbones[family], rows(form), tmp_path, 4)
    stream = train(backbones[family], rows(form).to_iterable_dataset(), tmp_path, 4, dispatch_batches=False)
    assert_same(stored, stream, 1e-6)
    if form == "text":  # needs no argument
        assert_same(stored, train(backbones[family], rows(form).to_iterable_dataset(), tmp_path, 4), 1e-6)


def test_stage_one_trains_on_a_stream(backbones, tmp_path):
    def labelled():
        vectors = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0)).tolist()
        return rows("text").select_columns(["anchor"]).add_column("label", vectors)

    stored = train(backbones["qwen2_vl"], labelled(), tmp_path, 4, DistillKLLoss)
    streamed = labelled().to_iterable_dataset()
    assert_same(
        stored, train(backbones["qwen2_vl"], streamed, tmp_path, 4, DistillKLLoss, dispatch_batches=False), 1e-6
    )


@pytest.mark.parametrize("form", ["image", "cell"])
def test_two_processes_train_as_one(backbones, tmp_path, form):
    config = {"dispatch_batches": False}
    one = train(backbones["qwen2_vl"], rows(form).to_iterable_dataset(), tmp_path, 4, **config)
    for other in run_two(job, tmp_path, backbones["qwen2_vl"], form, str(tmp_path), config):
        assert_same(one, other, 1e-5)


@pytest.mark.parametrize("config", [{}, {"dispatch_batches": True}, {"split_batches": True}], ids=str)
@pytest.mark.parametrize("form", ["image", "cell"])
def test_what_would_cut_images_to_pieces_is_refused(backbones, tmp_path, form, config):
    with pytest.raises(ValueError, match=r"stream .* with images.*`accelerator_config=\{'dispatch_batches': False\}`"):
        train(backbones["qwen2_vl"], rows(form).to_iterable_dataset(), tmp_path, 4, **config)


def test_the_refusal_is_of_this_training_alone(backbones, tmp_path):
    """A model that was refused trains on stored rows."""
    model = build_encoder(backbones["qwen2_vl"], device="cpu", peft_config=True)
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=None)
    with pytest.raises(ValueError, match="dispatch_batches"):
        SentenceTransformerTrainer(model, args, train_dataset=rows("image").to_iterable_dataset(), loss=loss).train()
    result = SentenceTransformerTrainer(model, args, train_dataset=rows("image"), loss=loss).train()
    assert result.global_step == 1


def test_an_evaluation_stream_is_seen_too(backbones, tmp_path):
    model = build_encoder(backbones["qwen2_vl"], device="cpu", peft_config=True)
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    loss = HardNegativeInfoNCELoss(model, num_hard_negatives=None)
    trainer = SentenceTransformerTrainer(
        model, args, train_dataset=rows("image"), eval_dataset=rows("image").to_iterable_dataset(), loss=loss
    )
    with pytest.raises(ValueError, match="dispatch_batches"):
        trainer.train()
