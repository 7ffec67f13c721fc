"""The example scripts as modules, a tiny encoder, and tiny data in the layouts they read."""

import importlib
import sys
from pathlib import Path

import pytest

from tiny_data import tiny_teacher, tiny_world
from unime_st import build_encoder, export_encoder

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(monkeypatch):
    """Import a script as Python does when it is run: with its own folder first on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    ours = {path.stem for path in EXAMPLES.glob("*.py")}
    shadowed = {name: sys.modules.pop(name) for name in ours & set(sys.modules)}
    yield importlib.import_module
    for name in ours:
        sys.modules.pop(name, None)
    sys.modules.update(shadowed)


@pytest.fixture(autouse=True)
def _no_cache_outside(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="session")
def encoder(backbone, tmp_path_factory) -> Path:
    """A saved encoder with random weights."""
    return export_encoder(
        build_encoder(backbone("qwen2_vl"), device="cpu"), tmp_path_factory.mktemp("saved") / "encoder"
    )


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "static")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("world"))
