"""Publishing through the real client to a stand-in of the Hub's HTTP API, killed in the middle too."""

import os
import subprocess
import sys

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from hub_server import Hub, serve
from unime_st import build_encoder, export_encoder

PUSH = """
import sys
from unime_st import load_encoder, push_encoder_to_hub

model = load_encoder(sys.argv[1], device="cpu")
print(push_encoder_to_hub(model, "me/encoder", token="hf_secret", revision="next"))
"""


@pytest.fixture(scope="module")
def encoder(backbone, tmp_path_factory):
    return export_encoder(
        build_encoder(backbone("fast_vlm"), device="cpu"), tmp_path_factory.mktemp("push") / "encoder"
    )


def start(folder, address):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PUSH, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_upload_arrives_whole_and_loads_as_stock(encoder, tmp_path):
    hub = Hub(tmp_path)
    with serve(hub) as address:
        output, errors = start(encoder, address).communicate(timeout=240)
    assert output.splitlines()[-1] == f"{address}/me/encoder/commit/abc", errors  # DeepSpeed greets before, where it is
    arrived = tmp_path / "me/encoder/next"
    names = {path.relative_to(encoder).as_posix() for path in encoder.rglob("*") if path.is_file()}
    assert {path.relative_to(arrived).as_posix() for path in arrived.rglob("*") if path.is_file()} == names
    assert {token for path, token in hub.requests if path.startswith("/api/")} == {"Bearer hf_secret"}
    expected = SentenceTransformer(str(encoder), device="cpu").encode(["a cat"])
    np.testing.assert_array_equal(SentenceTransformer(str(arrived), device="cpu").encode(["a cat"]), expected)


def test_an_upload_that_was_killed_leaves_nothing_half_and_is_done_again(encoder, tmp_path):
    hub = Hub(tmp_path, stall=True)
    with serve(hub) as address:
        process = start(encoder, address)
        try:
            assert hub.stalled.wait(240), "no object was ever sent"
        finally:
            process.kill()
            process.communicate()
        assert not (tmp_path / "me").exists()
        hub.release.set()
        hub.stall = False
        first, errors = start(encoder, address).communicate(timeout=240)
        assert "commit/abc" in first, errors
        sent = list(hub.sent)
        assert len(sent) == len(set(sent)) >= 1
        again, errors = start(encoder, address).communicate(timeout=240)
        assert "commit/abc" in again, errors
    assert hub.sent == sent  # what is there is not sent again
    assert (tmp_path / "me/encoder/next/model.safetensors").read_bytes() == (encoder / "model.safetensors").read_bytes()


def test_a_refusal_says_why(encoder, tmp_path):
    hub = Hub(tmp_path, forbidden=True)
    with serve(hub) as address:
        process = start(encoder, address)
        _, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "write access" in errors
    assert not (tmp_path / "me").exists()
