"""`unime mine`: what it writes is read by `load_pairs` and trains, with negatives by the rule; a judge chooses."""

import json

import numpy as np
import pytest
from datasets import Dataset, Image
from pictures import TRAIN, draw

from tiny import tiny_backbone
from unime_st import build_reranker, export_reranker, load_encoder, load_reranker
from unime_st.cli import main
from unime_st.data import check_pairs, load_judged_negatives, load_mined_negatives, load_pairs, mine_hard_negatives
from unime_st.rerank_prompts import PairPrompt


@pytest.fixture(scope="module")
def mined(trained, pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("mined") / "mined"
    command = ["mine", str(pairs), str(trained / "encoder"), "--output", str(output), "--device", "cpu"]
    assert main([*command, "--num-negatives", "3", "--margin", "0.05"]) == 0
    return output


def test_negatives_are_those_of_the_library_and_of_the_rule(mined, trained, pairs, tmp_path):
    model = load_encoder(trained / "encoder", device="cpu")
    rows = load_pairs(mined)
    names = ["negative_1", "negative_2", "negative_3"]
    assert rows.column_names == ["anchor", "positive", *names]
    own = load_mined_negatives(mine_hard_negatives(load_pairs(pairs), model, tmp_path, num_negatives=3, margin=0.05))
    assert rows.with_format(None)[:] == own.with_format(None)[:]
    images = [{"image": str(pairs.parent / f"{number}.png")} for number in range(24)]
    candidates = model.encode(images)
    stored = rows.with_format(None)
    queries = model.encode(stored["anchor"][:])
    for row, query in zip(stored, queries, strict=True):
        scores = candidates @ query
        positive = int(row["positive"]["image"].removesuffix(".png"))
        allowed = [n for n in np.argsort(-scores) if n != positive and scores[n] <= scores[positive] + 0.05 + 1e-5]
        chosen = [int(row[name]["image"].removesuffix(".png")) for name in names]
        assert positive not in chosen
        wanted = [scores[allowed[place % len(allowed)]] for place in range(3)]  # of rows with fewer, those they have
        assert scores[chosen] == pytest.approx(wanted, abs=1e-4)


def test_images_are_opened_and_checked(mined):
    rows = load_pairs(mined)
    assert rows[0]["negative_1"]["image"].size[1] == 30
    report = check_pairs(rows)
    assert not report.problems
    assert report.kinds["negative_1"] == {"image": len(rows)}


def test_training_reads_it(mined, backbone, tmp_path):
    command = ["train", str(mined), "--backbone", str(backbone("qwen2_vl")), "--output", str(tmp_path / "run"), *TRAIN]
    assert main(command) == 0
    log = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert {"loss", "negatives_kept"} & set(log["log_history"][0])


def test_the_same_command_again_mines_nothing_and_another_is_refused(mined, trained, pairs, capsys):
    before = {path: path.stat().st_mtime_ns for path in mined.rglob("*.parquet")}
    assert before
    command = ["mine", str(pairs), str(trained / "encoder"), "--output", str(mined), "--device", "cpu"]
    assert main([*command, "--num-negatives", "3", "--margin", "0.05"]) == 0
    rows = len(load_pairs(mined))
    told = f"{rows} of 24 rows have negatives: unime train {mined} ...\nwrote {mined}\n"
    assert capsys.readouterr().out == told
    assert {path: path.stat().st_mtime_ns for path in mined.rglob("*.parquet")} == before
    assert main([*command, "--num-negatives", "4", "--margin", "0.05"]) == 1
    assert "holds negatives mined otherwise: num_negatives" in capsys.readouterr().err


def test_columns_of_mined_negatives_are_known(mined, tmp_path):
    with pytest.raises(ValueError, match=r"holds mined negatives, whose columns are known\. Leave query, label out"):
        load_pairs(mined, query="anchor", label="")
    (mined.parent / "moved").mkdir()
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        load_pairs(mined, image_root=mined.parent / "moved")[0]


def test_images_that_went_bad_since_can_be_left_out(trained, tmp_path):
    path = draw(tmp_path / "photos")
    command = ["mine", str(path), str(trained / "encoder"), "--output", str(tmp_path / "mined"), "--device", "cpu"]
    assert main([*command, "--num-negatives", "1"]) == 0
    (path.parent / "7.png").write_bytes(b"no image")
    shown = [
        [row[name]["image"] for name in ("positive", "negative_1")]
        for row in load_pairs(tmp_path / "mined").with_format(None)
    ]
    left = load_pairs(tmp_path / "mined", bad_images="drop")
    assert len(left) == sum("7.png" not in row for row in shown) < len(shown)


@pytest.mark.parametrize("kind", ["texts", "joined", "stored"])
def test_other_kinds_of_pairs(kind, pairs, trained, tmp_path):
    draw(tmp_path / "photos")
    lines = {
        "texts": ["query,target", *(f"red {n} bus,{n} answers" for n in range(12))],
        "joined": ["query,image,text", *(f"which {n},{n}.png,the number {n}" for n in range(12))],
        "stored": ["query,target", *(f"which {n},{n}.png" for n in range(12))],
    }[kind]
    source = tmp_path / "photos" / "rows.csv"
    source.write_text("\n".join(lines) + "\n")
    if kind == "stored":
        stored = Dataset.from_dict(
            {"query": [f"which {n}" for n in range(12)], "image": [str(source.parent / f"{n}.png") for n in range(12)]}
        ).cast_column("image", Image())
        source = tmp_path / "rows.parquet"
        stored.to_parquet(source)
    command = ["mine", str(source), str(trained / "encoder"), "--output", str(tmp_path / "mined"), "--device", "cpu"]
    command += ["--num-negatives", "2", "--target", "image,text"] if kind == "joined" else ["--num-negatives", "2"]
    assert main(command) == 0
    rows = load_pairs(tmp_path / "mined")
    report = check_pairs(rows)
    assert not report.problems
    wanted = {"texts": "text", "joined": "image+text", "stored": "image"}[kind]
    assert report.kinds["negative_2"] == {wanted: len(rows)}


def test_labels_stay(trained, tmp_path):
    path = draw(tmp_path / "photos")
    lines = [f"number {n},{n}.png,{n // 2}" for n in range(24)]
    path.write_text("caption,image,label\n" + "\n".join(lines) + "\n")
    command = ["mine", str(path), str(trained / "encoder"), "--output", str(tmp_path / "mined"), "--device", "cpu"]
    assert main([*command, "--num-negatives", "2"]) == 0
    for row in load_pairs(tmp_path / "mined").with_format(None):
        numbers = [int(row[name]["image"].removesuffix(".png")) for name in ("positive", "negative_1", "negative_2")]
        assert row["label"] == numbers[0] // 2
        assert row["label"] not in [number // 2 for number in numbers[1:]]


def test_a_judge_chooses(trained, pairs, backbone, tmp_path, capsys):
    asked = tiny_backbone("qwen2_vl", tmp_path / "judge", words=("Yes", "No"))
    output = tmp_path / "judged"
    command = ["mine", str(pairs), str(trained / "encoder"), "--output", str(output), "--device", "cpu"]
    judged = [*command, "--judge", str(asked)]
    assert main([*judged, "--num-negatives", "51"]) == 2
    assert "the judge chooses among 50" in capsys.readouterr().err
    assert main([*judged, "--num-negatives", "2"]) == 0
    rows = load_pairs(output)
    assert rows.column_names == ["anchor", "positive", "negative_1", "negative_2"]  # without the scores
    assert 0 < len(rows) <= 24
    assert not check_pairs(rows).problems
    assert len(load_pairs(output / "pool").with_format(None)[0]) == 52
    train = ["train", str(output), "--backbone", str(backbone("qwen2_vl")), "--output", str(tmp_path / "run"), *TRAIN]
    assert main([*train, "--max-steps", "1"]) == 0
    assert main([*command, "--judge", "no/such", "--num-negatives", "2"]) == 1
    told = capsys.readouterr().err
    assert "mine: error: The judge 'no/such' cannot be loaded" in told
    assert "Traceback" not in told


def test_a_saved_reranker_judges_by_its_own_prompt(trained, pairs, tmp_path):
    backbone = tiny_backbone("qwen2_vl", tmp_path / "backbone", words=("Yes", "No"))
    words = PairPrompt("Q: ", "\nA: ", yes="No", no="Yes")
    export_reranker(build_reranker(backbone, prompt=words, device="cpu"), tmp_path / "reranker")
    output = tmp_path / "judged"
    command = ["mine", str(pairs), str(trained / "encoder"), "--output", str(output), "--device", "cpu"]
    assert main([*command, "--judge", str(tmp_path / "reranker"), "--num-negatives", "2"]) == 0
    row = load_judged_negatives(output)[0]
    judge = load_reranker(tmp_path / "reranker", device="cpu")
    told = judge.predict([(row["anchor"], row[name]) for name in ("positive", "negative_1")])
    np.testing.assert_allclose(row["label"][:2], told, atol=1e-5)


def test_the_data_are_not_written_into(mined, trained, capsys):
    assert main(["mine", str(mined), str(trained / "encoder"), "--output", str(mined), "--device", "cpu"]) == 2
    assert f"--output {mined} is the data themselves" in capsys.readouterr().err
