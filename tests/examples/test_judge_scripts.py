"""The scripts of UniME-V2: judge, train with soft labels, train a reranker, rerank."""

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from tiny import tiny_backbone
from unime_st import ListwiseReranker, load_reranker
from unime_st.data import load_judged_negatives, read_judged_json

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.fixture(scope="module")
def judge_backbone(tmp_path_factory):
    return tiny_backbone("qwen2_vl", tmp_path_factory.mktemp("judge"), words=["Yes", "No"])


def test_from_pairs_to_an_encoder_and_a_reranker(script, world, encoder, judge_backbone, tmp_path, capsys):
    judged = script("judge").main(
        [str(world / "train"), str(encoder), str(judge_backbone), "--images", str(world / "images"), "--pool", "6",
         "--num-negatives", "3", "--margin", "-0.5", "--output", str(tmp_path / "judged"),
         "--json", str(tmp_path / "judged.json")]
    )  # fmt: skip
    rows = load_judged_negatives(judged)
    assert len(rows) == len(list(read_judged_json(tmp_path / "judged.json"))) > 0

    small = ["training.per_device_train_batch_size=2", "training.use_cpu=true", "training.bf16=false", "lora.rank=4"]
    small += ["training.disable_tqdm=true", "training.dataloader_num_workers=0", "training.max_steps=2"]
    small += ["training.save_steps=2", "data.num_negatives=2", "data.image_size=28", f"data.folder={judged}"]
    small += [f"data.bad_images_log={tmp_path / 'bad.jsonl'}", f"backbone={judge_backbone}"]
    recipe = ["--recipe", str(RECIPES / "soft_labels_qwen2_vl.yaml"), *small, f"output={tmp_path / 'soft'}"]
    capsys.readouterr()
    assert script("train_soft_labels").main([*recipe, "--dry-run", "--processes", "8"]) is None
    printed = capsys.readouterr().out
    assert "each query is compared with 2 others" in printed
    assert f"rows: {len(rows)}" in printed
    assert "MISSING" not in printed
    trained = script("train_soft_labels").main(recipe)
    card = (trained / "README.md").read_text()
    name = json.loads((judged / "mined.json").read_text())["settings"]
    assert "## Negatives and their judge" in card
    assert "- margin: -0.5" in card
    assert "- stride: 5" in card
    assert f"- judge: {judge_backbone.name} (" in card
    assert name
    found = SentenceTransformer(str(trained), device="cpu").encode(["a red picture", "a green picture"])
    assert np.abs(found[0] - found[1]).max() > 1e-4

    reranker = script("train_reranker").main(
        [str(judge_backbone), str(judged), "--output", str(tmp_path / "reranker"), "--cpu", "--max-steps", "2",
         "--batch-size", "2", "--accumulate", "1", "--rank", "4"]
    )  # fmt: skip
    with pytest.raises(ValueError, match="`num_negatives=4`, but 3 were kept"):
        script("train_reranker").main(
            [str(judge_backbone), str(judged), "--output", str(tmp_path / "more"), "--cpu", "--num-negatives", "4"]
        )
    stock = CrossEncoder(str(reranker), device="cpu")
    capsys.readouterr()
    images = [str(world / "images" / f"{colour}.png") for colour in ("red", "green", "white")]
    ranked = script("rerank").main([str(reranker), *images, "--query-text", "a red picture", "--top", "2"])
    assert len(ranked) == 2
    scores = stock.predict([({"text": "a red picture"}, {"image": image}) for image in images])
    assert [entry["corpus_id"] for entry in ranked] == np.argsort(-scores, kind="stable")[:2].tolist()
    printed = capsys.readouterr().out.splitlines()
    both = script("train_reranker").main(
        [str(judge_backbone), str(judged), "--output", str(tmp_path / "both"), "--cpu", "--max-steps", "2",
         "--batch-size", "2", "--accumulate", "1", "--rank", "4", "--listwise", "--gradient-checkpointing"]
    )  # fmt: skip
    listed = script("rerank").main([str(both), *images, "--query-text", "a red picture", "--listwise"])
    wanted = ListwiseReranker(load_reranker(both, device="cpu")).rank({"text": "a red picture"}, images)
    assert [entry["corpus_id"] for entry in listed] == [entry["corpus_id"] for entry in wanted]
    capsys.readouterr()
    assert printed[0].split() == [f"{ranked[0]['score']:.4f}", images[ranked[0]["corpus_id"]]]
    with pytest.raises(SystemExit):
        script("rerank").main([str(reranker), "a"])
    assert "give --query-text, --query-image or both" in capsys.readouterr().err


def test_pairs_are_labelled_and_places_without_a_negative_left_out(script, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_dict(
        {"q": ["a", "b"], "p": ["x", "y"], "negative_1": ["n", "m"], "negative_2": ["o", "y"],
         "label": [[0.9, 0.1, 0.2], [0.8, 0.3, -1.0]]}
    )  # fmt: skip
    pairs = script("train_reranker").labelled_pairs(rows.add_column("subset", ["s", "t"]))
    assert sorted(zip(pairs["query"], pairs["candidate"], pairs["label"], strict=True)) == [
        ("a", "n", 0.0), ("a", "o", 0.0), ("a", "x", 1.0), ("b", "m", 0.0), ("b", "y", 1.0),
    ]  # fmt: skip
