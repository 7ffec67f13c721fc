"""Pictures with captions, a backbone, and an encoder that one run of the command has trained."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unime_st.cli import main

TRAIN = ["--device", "cpu", "--batch-size", "4", "--max-steps", "3", "--learning-rate", "1e-3", "--held-out", "0.3"]


def draw(folder, count=24):
    """Pictures in a folder, and a table of their captions."""
    folder.mkdir(parents=True)
    lines = ["caption,image"]
    for number in range(count):
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((30 + 28 * (number % 2), 30), Image.Resampling.NEAREST).save(
            folder / f"{number}.png"
        )
        lines.append(f"number {number} {'abcdefg'[number % 7] * 3},{number}.png")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


@pytest.fixture(autouse=True)
def _no_cache_outside(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("command") / "photos")


@pytest.fixture(scope="session")
def trained(pairs, backbone, tmp_path_factory) -> Path:
    """Output of a run that nothing has stopped."""
    output = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["train", str(pairs), "--backbone", str(backbone("qwen2_vl")), "--output", str(output), *TRAIN]
    assert main([*arguments, "--save-steps", "1"]) == 0
    return output
