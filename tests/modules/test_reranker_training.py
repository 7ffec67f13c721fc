"""A reranker trains in sentence-transformers' own Trainer, resumes its best checkpoint, and is exported as stock."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

from tiny import picture, tiny_backbone
from unime_st import build_reranker, export_reranker, load_reranker
from unime_st.modules.reranker.pair_encoder import PairEncoder

COLOURS = ("red", "white")


def pairs():
    """Pictures, and words of which one is right."""
    said = [colour for colour in COLOURS for _ in range(8)]
    pictures = [{"image": picture(COLOURS[number % 2]), "text": f"which, {number % 4}?"} for number in range(len(said))]
    labels = [float(colour == "red") for colour in said]
    return Dataset.from_list(
        [{"query": q, "candidate": c, "label": label} for q, c, label in zip(pictures, said, labels, strict=True)],
        features=Features(
            {
                "query": {"image": Image(), "text": Value("string")},
                "candidate": Value("string"),
                "label": Value("float32"),
            }
        ),
    )


@pytest.mark.slow
def test_it_trains_and_the_trained_one_is_stock(tmp_path):
    backbone = tiny_backbone("qwen2_vl", tmp_path / "backbone", words=["Yes", "No", *COLOURS])
    model = build_reranker(backbone, device="cpu", peft_config=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name and "language_model" in name for name in trained)
    rows = pairs()
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=8, num_train_epochs=20, learning_rate=0.003, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=10, eval_strategy="steps", eval_steps=20,
        save_steps=20, save_total_limit=1, load_best_model_at_end=True, seed=0,
    )  # fmt: skip
    trainer = CrossEncoderTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, loss=BinaryCrossEntropyLoss(model)
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.7 * losses[0]
    assert type(model[0]) is PairEncoder
    given = list(zip(rows["query"], rows["candidate"], strict=True))
    scores = model.predict(given)
    right = np.array(rows["label"]) == 1
    assert scores[right].mean() > scores[~right].mean() + 0.2

    folder = export_reranker(model, tmp_path / "reranker")
    card = (folder / "README.md").read_text()
    assert not (folder / "assets").exists()
    assert "which, 1?" not in card, "a row of the training set is in the card"
    assert not any("lora" in path.name or "adapter" in path.name for path in folder.rglob("*"))
    listing = json.loads((folder / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in listing)
    for reloaded in (CrossEncoder(str(folder), device="cpu"), load_reranker(folder, device="cpu")):
        np.testing.assert_allclose(reloaded.predict(given), scores, rtol=0, atol=1e-5)
    assert any("lora_" in name for name, _ in model.named_parameters()), "the model in memory stays as it is"


def test_gradients_are_those_of_stock_modules(tmp_path):
    backbone = tiny_backbone("qwen3_vl", tmp_path / "backbone", words=["Yes", "No"])
    ours = build_reranker(backbone, device="cpu")
    export_reranker(ours, tmp_path / "stock")
    stock = CrossEncoder(str(tmp_path / "stock"), device="cpu")
    given = [
        (picture("red"), "a bus"),
        (picture("green"), "a boat"),
        ("a cat", {"image": picture("white"), "text": "b"}),
    ]
    labels = torch.tensor([1.0, 0.0, 1.0])
    found = []
    for model in (ours, stock):
        queries, candidates = map(list, zip(*given, strict=True))
        value = BinaryCrossEntropyLoss(model)([queries, candidates], labels)
        value.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((value.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    assert max(float(gradient.abs().max()) for gradient in found[0][1].values()) > 1e-3
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=1e-5)


def test_export_refuses_what_it_would_overwrite(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    model = build_reranker(tiny_backbone("qwen2_vl", tmp_path / "b", words=["Yes", "No"]), device="cpu")
    with pytest.raises(FileExistsError, match="photos exists and holds something other"):
        export_reranker(model, tmp_path / "photos")
    with pytest.raises(TypeError, match="is a str"):
        export_reranker("model", tmp_path / "out")


def test_adapters_alone_load_in_both_classes_and_a_pool_gives_the_same(tmp_path):
    model = build_reranker(
        tiny_backbone("qwen2_vl", tmp_path / "b", words=["Yes", "No"]), device="cpu", peft_config=True
    )
    plain = model.predict([("a", "b"), ({"image": picture("red")}, "c")])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    given = [("a", "b"), ({"image": picture("red")}, "c"), ("a", picture("green")), ("a", "b")]
    scores = model.predict(given)
    assert np.abs(scores[:2] - plain).max() > 1e-3
    folder = export_reranker(model, tmp_path / "adapters", merge_adapters=False)
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    ours, stock = load_reranker(folder, device="cpu"), CrossEncoder(str(folder), device="cpu")
    for reloaded in (ours, stock):
        np.testing.assert_allclose(reloaded.predict(given), scores, rtol=0, atol=1e-5)
    merged = CrossEncoder(str(export_reranker(ours, tmp_path / "merged")), device="cpu")
    np.testing.assert_allclose(merged.predict(given), scores, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="was loaded with adapters by a stock class"):
        export_reranker(stock, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        np.testing.assert_allclose(model.predict(given, pool=pool, chunk_size=2), scores, rtol=0, atol=1e-5)
    finally:
        model.stop_multi_process_pool(pool)
