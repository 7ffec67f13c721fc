"""Pictures with captions, a backbone, and an encoder that one run of the command has trained."""

from pathlib import Path

import pytest
from pictures import TRAIN, draw

from unime_st.cli import main


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
