"""Fixtures of the demo's tests: made-up packages for the fast ones, the real ones (fetched if absent) for the slow."""

import json
import os
from pathlib import Path

import pytest
from fake_packages import make_fake_packages
from filelock import FileLock

from emoji.benchmark import build_benchmark
from emoji.packages import fetch
from tiny import tiny_backbone


@pytest.fixture(scope="session")
def fetched():
    cache = Path(os.environ.get("UNIME_DEMO_CACHE", Path(__file__).parents[2] / ".demo_cache"))
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "fetching.lock"):  # tests run in several processes
        return fetch(cache)


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    return make_fake_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def benchmark_folder(fake, tmp_path_factory):
    return build_benchmark(fake, tmp_path_factory.mktemp("emoji") / "bench", eval_rows=20, report=lambda line: None)


@pytest.fixture(scope="session")
def linear_backbone(tmp_path_factory):
    """A tiny FastVLM whose projector is linear, as the miniature's is."""
    folder = tiny_backbone("fast_vlm", tmp_path_factory.mktemp("linear") / "backbone")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projector_hidden_act": "linear"}))
    return folder
