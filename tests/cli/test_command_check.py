"""`unime check`: printed, as JSON, and told by the exit code."""

import json
import re

import pytest
from pictures import draw

from unime_st.cli import main


def test_data_that_are_fit(pairs, backbone, capsys):
    assert main(["check", str(pairs), "--quiet", "--backbone", str(backbone("qwen2_vl")), "--batch-size", "8"]) == 0
    printed = capsys.readouterr().out
    for line in ("pairs.csv: 24 pairs", "caption asks for image", "bad images: 0", "No problem found."):
        assert line in printed
    longest = [
        int(re.search(rf"tokens of {side}: p50 .*max (\d+); 0 over", printed)[1]) for side in ("anchor", "positive")
    ]
    assert min(longest) > 60  # the prompt counts, and an image's tokens
    assert "tokens of positive: p50 0" not in printed
    assert "batch size 8, epochs 1, steps 3" in printed


def test_data_that_are_not(tmp_path, capsys):
    path = draw(tmp_path / "photos", 40)
    for number in (3, 7, 11):
        (path.parent / f"{number}.png").write_bytes(b"no image")
    assert main(["check", str(path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [found["place"] for found in told["bad_images"]] == [
        f"pairs.csv, line {number + 2}" for number in (3, 7, 11)
    ]
    assert len(told["problems"]) == 1
    assert main(["check", str(path), "--json", "--bad-images", "drop"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 37


@pytest.mark.parametrize(
    ("options", "query", "target"),
    [
        (["--query", "c", "--target", "a,b"], "text", "image+text"),
        (["--query", "a", "--target", "b"], "image", "text"),
        (["--query", "a", "--target", "b", "--image-columns", ""], "text", "text"),
    ],
)
def test_options_reach_the_reader(options, query, target, tmp_path, capsys):
    draw(tmp_path / "photos")
    (tmp_path / "rows.txt.csv").write_text("a|b|c\n1.png|x|p\n2.png|y|q\n")
    base = ["check", str(tmp_path / "rows.txt.csv"), "--separator", "|", "--json"]
    assert main([*base, "--image-root", str(tmp_path / "photos"), *options]) == 0
    kinds = json.loads(capsys.readouterr().out)["kinds"]
    assert kinds == {"anchor": {query: 2}, "positive": {target: 2}}
