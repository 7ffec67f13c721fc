"""An encoder, a corpus of pictures and one of texts, and applications over them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from serve_data import HOSTILE, drawing

from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.data import encode_corpus, load_inputs
from unime_st.search import CorpusSearch
from unime_st.serve import Limits, create_app


@pytest.fixture(scope="session")
def world(backbone, tmp_path_factory):
    """Model, corpora (`search`) and what they were encoded from (`inputs`), by the names images and texts."""
    root: Path = tmp_path_factory.mktemp("served")
    photos = root / "photos"
    photos.mkdir()
    for number in range(30):
        drawing(number).save(photos / f"{'ab'[number % 2]}_{number}.png")
    texts = [*HOSTILE, *(f"sentence {number}, in {'xyz'[number % 3] * 4}" for number in range(24))]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    export_encoder(build_encoder(backbone("qwen2_vl"), device="cpu"), root / "encoder")
    model = load_encoder(root / "encoder", device="cpu")
    found = SimpleNamespace(model=model, root=root, photos=photos, texts=texts, inputs={}, search={})
    for name, source in (("images", photos), ("texts", root / "texts.jsonl")):
        found.inputs[name] = load_inputs(source)
        corpus = encode_corpus(model, found.inputs[name], root / name, with_ids=True, batch_size=8, window_size=8)
        found.search[name] = CorpusSearch(corpus)
    return found


@pytest.fixture(scope="session")
def make_app(world):
    """Makes an application over one of the corpora."""

    def make(kind="images", **options):
        return create_app(world.model, world.search[kind], world.inputs[kind], name="tiny", **options)

    return make


@pytest.fixture
def client(make_app):
    """What asks an application; `client(limits=...)` one of its own."""
    entered = []

    def open_client(kind="images", *, headers=None, base_url="http://127.0.0.1", **options):
        if "limits" in options:
            options["limits"] = Limits(**options["limits"])
        one = TestClient(make_app(kind, **options), base_url=base_url, headers=headers, raise_server_exceptions=False)
        entered.append(one.__enter__())
        return one

    yield open_client
    for one in entered:
        one.__exit__(None, None, None)
