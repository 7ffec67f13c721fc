"""The scripts that use an encoder: search a folder, evaluate on three benchmarks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from mmeb_v2_data import write_v2
from tiny import tiny_backbone
from tiny_data import COLOURS
from unime_st import build_reranker, export_reranker, load_encoder
from unime_st.evaluation import read_settings

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_search_finds_what_the_model_ranks_first(script, world, encoder, tmp_path, capsys):
    main = script("encode_and_search").main
    options = [str(encoder), str(world / "images"), "--cache", str(tmp_path / "cache")]
    (tmp_path / "found").mkdir()
    output = tmp_path / "found" / "result.json"
    found = main([*options, "--text", "a red picture", "--top", "3", "--output", str(output)])
    assert json.loads(output.read_text()) == {"query": {"text": "a red picture"}, "results": found}

    model = SentenceTransformer(str(encoder), device="cpu")
    paths = [world / "images" / f"{colour}.png" for colour in COLOURS]
    scores = model.encode([{"text": "a red picture"}])[0] @ model.encode([{"image": str(path)} for path in paths]).T
    best = np.argsort(-scores)[:3]
    assert [entry["image"] for entry in found] == [str(paths[place]) for place in best]
    np.testing.assert_allclose([entry["score"] for entry in found], scores[best], atol=1e-4)

    by_image = main([*options, "--image", str(paths[2]), "--top", "1"])
    assert by_image == [{"image": str(paths[2]), "score": pytest.approx(1, abs=1e-5)}]
    both = main([*options, "--image", str(paths[2]), "--text", "but <red>", "--output", str(tmp_path / "sheet.html")])
    assert len(both) == 5
    sheet = (tmp_path / "sheet.html").read_text()
    assert sheet.count("<img src=") == 5
    assert "but &lt;red&gt;" in sheet
    assert f"wrote {tmp_path / 'sheet.html'}" in capsys.readouterr().out


def test_a_second_search_encodes_no_image(script, world, encoder, tmp_path, monkeypatch):
    module = script("encode_and_search")
    options = [str(encoder), str(world / "images"), "--text", "red", "--cache", str(tmp_path / "cache")]
    first = module.main(options)
    seen = []

    def watched(path):
        model = load_encoder(path)
        encode = model.encode
        model.encode = lambda items, **rest: (seen.extend(items), encode(items, **rest))[1]
        return model

    monkeypatch.setattr(module, "load_encoder", watched)
    again = module.main(options)
    assert [entry["image"] for entry in again] == [entry["image"] for entry in first]
    assert seen == [{"text": "red"}]


def test_search_says_what_is_wrong(script, world, encoder, tmp_path, capsys):
    main = script("encode_and_search").main
    with pytest.raises(SystemExit):
        main([str(encoder), str(world / "images")])
    assert "give --text, --image or both" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(encoder), str(world / "images"), "--image", "nowhere.png"])
    assert "there is no image nowhere.png" in capsys.readouterr().err
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="holds no image that can be read"):
        main([str(encoder), str(tmp_path), "--text", "red"])
    assert f"left out {tmp_path / 'broken.png'}" in capsys.readouterr().out


def test_evaluate_writes_json_and_a_report(script, world, encoder, tmp_path, capsys):
    output = script("evaluate").main(
        [
            str(encoder), "--mmeb", str(world / "eval"), "--mmeb-images", str(world / "images"),
            "--retrieval", str(world / "captions"),
            "--sugarcrepe", str(world / "sugarcrepe"), "--sugarcrepe-images", str(world / "images"),
            "--output", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"),
        ]
    )  # fmt: skip
    mmeb = json.loads((output / "MMEB_results.json").read_text())
    assert mmeb["MMEB_MSCOCO_t2i_precision@1"] == mmeb["MMEB_mean_precision@1"]
    assert set(json.loads((output / "captions_results.json").read_text())) >= {"captions_text_to_image_recall@1"}
    assert 0 <= json.loads((output / "sugarcrepe_results.json").read_text())["sugarcrepe_Swap_accuracy"] <= 1
    report = json.loads((output / "report.json").read_text())
    titles = [section["title"] for section in report["sections"]]
    assert titles[:2] == ["MMEB: by task", "MMEB: by task, drawn"]
    assert {"Retrieval: captions", "SugarCrepe: accuracy (chance is 50)", "Settings and versions"} <= set(titles)
    averages = next(section for section in report["sections"] if section["title"] == "MMEB: averages")
    assert len(averages["rows"]) == 1  # of one task only: nothing published compares
    assert "MMEB: counted as wrong or left out" not in titles
    assert (output / "report.html").is_file()
    printed = capsys.readouterr().out
    assert f"wrote {output / 'report.html'}" in printed
    assert f"MMEB_mean_precision@1: {mmeb['MMEB_mean_precision@1']:.4f}" in printed


def test_evaluate_tells_scores_before_and_after_reranking(script, world, encoder, tmp_path, capsys):
    judge = build_reranker(tiny_backbone("qwen2_vl", tmp_path / "backbone", words=["Yes", "No"]), device="cpu")
    reranker = export_reranker(judge, tmp_path / "reranker")
    output = script("evaluate").main(
        [
            str(encoder), "--mmeb", str(world / "eval"), "--mmeb-images", str(world / "images"),
            "--retrieval", str(world / "captions"), "--reranker", str(reranker), "--rerank-depth", "3",
            "--output", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"),
        ]
    )  # fmt: skip
    mmeb = json.loads((output / "MMEB_results.json").read_text())
    assert "MMEB_reranked_meta_Retrieval_precision@1" in mmeb
    assert mmeb["MMEB_rerank_pairs"] > 0
    printed = capsys.readouterr().out
    assert f"reranked: {mmeb['MMEB_reranked_mean_precision@1']:.4f}, in {mmeb['MMEB_rerank_seconds']:.1f} s" in printed
    sections = json.loads((output / "report.json").read_text())["sections"]
    titles = [section["title"] for section in sections]
    assert {"MMEB, reranked", "Retrieval: captions, reranked"} <= set(titles)
    shown = next(section for section in sections if section["title"] == "MMEB, reranked")["rows"]
    row = next(row for row in shown if row[0] == "meta Retrieval precision@1")
    assert row[2] == mmeb["MMEB_reranked_meta_Retrieval_precision@1"]
    with pytest.raises(SystemExit):
        script("evaluate").main([str(encoder), "--mmeb", str(world / "eval"), "--listwise"])
    assert "--listwise needs --reranker" in capsys.readouterr().err
    output = script("evaluate").main(
        [
            str(encoder), "--retrieval", str(world / "captions"), "--reranker", str(reranker), "--rerank-depth", "3",
            "--listwise", "--output", str(tmp_path / "listwise"), "--cache", str(tmp_path / "cache"),
        ]
    )  # fmt: skip
    assert "(listwise, first place alone)" in (output / "report.json").read_text()


def test_evaluate_takes_all_of_mmeb_v2_in_one_command(script, encoder, tmp_path, capsys):
    """78 tasks, images, videos and documents, through a model, the averages, the report."""
    root = write_v2(tmp_path / "v2")
    output = script("evaluate").main(
        [
            str(encoder), "--mmeb-v2", str(root), "--num-frames", "4", "--max-pixels", "800",
            "--mmeb-v2-prompts", "qwen3_vl_embedding",
            "--output", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"),
        ]
    )  # fmt: skip
    metrics = json.loads((output / "MMEB-V2_results.json").read_text())
    assert read_settings(output / "MMEB-V2_results_rows.parquet")["task_prompts"] == "qwen3_vl_embedding"
    assert metrics["MMEB-V2_tasks"] == 78
    assert metrics["MMEB-V2_unreadable_rows"] == 0
    assert f"MMEB-V2_overall_mean: {metrics['MMEB-V2_overall_mean']:.4f}" in capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    sections = {section["title"]: section for section in report["sections"]}
    by_task = {row[0]: row for row in sections["MMEB: by task"]["rows"]}
    assert len(by_task) == 78
    assert [by_task[task][4:6] for task in ("VOC2007", "K700", "QVHighlight", "MomentSeeker", "ViDoRe_tatdqa")] == [
        ["–", "<= 800"], ["4", "<= 800"], ["4, clips 8", "<= 800"], ["all stored", "<= 800"], ["–", "<= 800"]
    ]  # fmt: skip
    averages = sections["MMEB: averages"]
    assert averages["note"].endswith("The tasks have qwen3_vl_embedding's prompts.")
    assert averages["columns"][:3] == ["model", "frames", "pixels"]
    assert averages["columns"][3:] == [
        "Classification", "VQA", "Retrieval", "Grounding", "V-CLS", "V-QA", "V-RET", "V-MRET", "ViDoRe V1", "ViDoRe V2",
        "VisRAG", "VisDoc OOD", "image", "video", "visdoc", "overall",
    ]  # fmt: skip
    assert averages["rows"][0][-1] == pytest.approx(100 * metrics["MMEB-V2_overall_mean"])
    told = {row[0]: row for row in averages["rows"]}
    assert told["Qwen3-VL-Embedding-8B"][1:3] == ["64", "–"]
    assert told["Qwen3-VL-Embedding-8B"][-1] == 77.8
    assert "MMEB: counted as wrong or left out" not in sections
    assert sum(entry["query"]["image"] is not None for entry in sections["MMEB: the worst mistakes"]["entries"]) >= 1


def test_evaluate_says_what_is_wrong(script, world, encoder, tmp_path, capsys):
    main = script("evaluate").main
    output = main([str(encoder), "--mmeb", str(world / "eval"), "--output", str(tmp_path), "--cache", str(tmp_path)])
    assert "WARNING: 8 rows or tasks counted as wrong or left out" in capsys.readouterr().out  # no images there
    assert "red.png" in (output / "report.json").read_text()
    with pytest.raises(SystemExit):
        main([str(encoder)])
    assert "give --mmeb, --mmeb-v2, --retrieval or --sugarcrepe" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(encoder), "--sugarcrepe", str(world)])
    assert "needs --sugarcrepe-images" in capsys.readouterr().err


def test_a_script_runs_as_a_command(world, encoder, tmp_path):
    command = [sys.executable, str(EXAMPLES / "encode_and_search.py"), str(encoder), str(world / "images")]
    done = subprocess.run(
        [*command, "--text", "red", "--top", "1", "--cache", str(tmp_path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(done.stdout.strip().splitlines()) == 1
    assert ".png" in done.stdout
