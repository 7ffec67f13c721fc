"""The GPU's benchmark runs, small and on a CPU, so that it does not rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["families", "encode", "steps", "loss", "fsdp", "kills"])
def test_a_part_runs_small_on_a_cpu(part, tmp_path):
    asked = {"DEVICE": "cpu", "TINY": "1", "PYTHON": sys.executable, "SECONDS_IN_ALL": "400"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu" / "run.sh"), str(tmp_path), part]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=420, check=True)
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert found["errors"] == {}, done.stdout
    assert found["measured"]
    assert found["machine"]["card"] == "none: CPU"
    page = (tmp_path / "gpu.md").read_text()
    assert f"## {part}" in page
    assert all(name in page for name in found["measured"])
    if part == "fsdp":
        assert found["measured"]["five steps"]["split"] > 20
        assert found["measured"]["going on from the third"]["largest difference of weights"] == 0
        assert min(found["measured"]["saved whole"].values()) > 1 - 1e-5
    if part == "kills":
        assert found["measured"]["killed"]["killed"]
        differences = found["measured"]["largest difference of weights"]
        assert differences.pop("largest weight that began at 0") > 1e-3
        assert set(differences.values()) == {0.0}
    if part == "families":
        for name, row in found["measured"].items():
            exact = [value for check, value in row.items() if check.startswith(("float32", "saved"))]
            steps = [value for value in row.values() if isinstance(value, list)]
            assert exact or steps, name
            assert all(value < 1e-4 for value in exact), name
            assert all(max(pair) < 1e-4 for pair in steps), name


def test_what_fails_is_kept_and_shown(tmp_path):
    asked = {"DEVICE": "no such device", "TINY": "1", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu" / "run.sh"), str(tmp_path), "loss"]
    subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads((tmp_path / "loss.json").read_text())
    assert len(found["errors"]) == 6
    assert not found["measured"]
    assert "**64, stock failed**" in (tmp_path / "gpu.md").read_text()
