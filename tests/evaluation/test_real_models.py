"""The evaluators on a real architecture, and inside the Trainer."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from tiny_data import tiny_world
from unime_st import build_encoder
from unime_st.evaluation import (
    ImageTextRetrievalEvaluator,
    MMEBEvaluator,
    SugarCrepeEvaluator,
    encode_distinct,
    model_fingerprint,
)


@pytest.fixture(scope="module")
def encoder(backbone):
    return build_encoder(backbone("fast_vlm"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def test_distinct_equals_encode_and_the_cache_repeats_it(encoder, pictures, tmp_path, monkeypatch):
    items = [
        "a bus",
        {"image": str(pictures[0])},
        "a bus",
        {"image": str(pictures[1]), "text": "which?"},
        "a long text",
    ]
    expected = encoder.encode(items)
    found = encode_distinct(encoder, items, cache=tmp_path)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    monkeypatch.setattr(type(encoder), "encode", None)
    np.testing.assert_array_equal(encode_distinct(encoder, items, cache=tmp_path), found)


def test_fingerprint_sees_prompts_resolution_and_training_but_not_the_folder(backbone, tmp_path):
    first = build_encoder(backbone("fast_vlm"))
    before = model_fingerprint(first)
    first.encode(["a bus"])
    assert model_fingerprint(first) == before  # encoding leaves no trace
    assert model_fingerprint(build_encoder(backbone("fast_vlm"))) == before
    first.truncate_dim = 8
    assert model_fingerprint(first) != before
    first.truncate_dim = None
    first.save_pretrained(str(tmp_path / "here"))
    first.save_pretrained(str(tmp_path / "there"))
    stock = [SentenceTransformer(str(tmp_path / folder), device="cpu") for folder in ("here", "there")]
    assert model_fingerprint(stock[0]) == model_fingerprint(stock[1])
    processor = stock[0][0].processor
    processor.image_processor.size = {"shortest_edge": 56}
    assert model_fingerprint(stock[0]) != model_fingerprint(stock[1])
    stock[1][0].processor.chat_template = "{{ messages }}"
    assert model_fingerprint(stock[0]) != model_fingerprint(stock[1])


def test_lora_settings_are_part_of_the_model(backbone):
    model = build_encoder(backbone("fast_vlm"), peft_config=True)
    before = model_fingerprint(model)
    layer = next(module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict))
    layer.set_scale("default", 0.5)
    assert model_fingerprint(model) != before


def test_inside_the_trainer(backbone, pictures, tmp_path):
    model = build_encoder(backbone("fast_vlm"), peft_config=True)
    texts = [f"caption {number}" for number in range(5)]
    retrieval = ImageTextRetrievalEvaluator(pictures, [[text] for text in texts], name="dev", cache_dir=tmp_path / "c")
    swaps = SugarCrepeEvaluator({"swap_att": [(path, "one", "two") for path in pictures]})
    mmeb = MMEBEvaluator(tiny_world(tmp_path / "world") / "eval", image_root=tmp_path / "world" / "images", limit=3)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"anchor": texts[:4], "positive": texts[1:]}),
        loss=MultipleNegativesRankingLoss(model),
        evaluator=SequentialEvaluator([retrieval, swaps, mmeb]),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_dev_mean_recall@1" in log]
    assert len(logs) == 2
    assert all("eval_sugarcrepe_Swap_accuracy" in log and "eval_MMEB_mean_precision@1" in log for log in logs)
    assert mmeb.results["MSCOCO_t2i"].rows.tolist() == np.sort(np.random.default_rng(0).choice(8, 3, False)).tolist()
    files = {path.name for path in (tmp_path / "run").rglob("*_results.csv")}
    assert files == {"dev_results.csv", "sugarcrepe_results.csv", "MMEB_results.csv"}
    sections = [path.parent.name for path in (tmp_path / "c").rglob("section.json")]
    assert len(sections) == 2  # the weights had changed: nothing was taken from the first step
