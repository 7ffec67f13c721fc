"""Publishing, with the Hub replaced."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from unime_st import build_encoder, hub, push_encoder_to_hub


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What the Hub was asked to do; what was uploaded is copied to `tmp_path / "hub"`."""
    made = []

    class FakeApi:
        def __init__(self, token=None):
            made.append(("token", token))

        def create_repo(self, repo_id, **options):
            made.append(("create", repo_id, options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_branch(self, repo_id, **options):
            made.append(("branch", repo_id, options))

        def upload_folder(self, *, folder_path, **options):
            Path(folder_path).rename(tmp_path / "hub")
            made.append(("upload", options))
            return SimpleNamespace(commit_url="https://huggingface.co/me/encoder/commit/1")

    monkeypatch.setattr(hub, "HfApi", FakeApi)
    return made


def test_what_is_uploaded_loads_as_stock(calls, backbone, tmp_path):
    model = build_encoder(backbone("fast_vlm"), device="cpu", peft_config=True)
    address = push_encoder_to_hub(model, "encoder", private=True, token="t", revision="next")
    assert address == "https://huggingface.co/me/encoder/commit/1"
    assert [call[0] for call in calls] == ["token", "create", "branch", "upload"]
    assert calls[1][1:] == ("encoder", {"private": True, "exist_ok": True, "repo_type": "model"})
    assert calls[3][1]["repo_id"] == "me/encoder"
    assert calls[3][1]["revision"] == "next"
    assert (tmp_path / "hub" / "README.md").read_text().startswith("---")
    assert not (tmp_path / "hub" / "adapter_config.json").exists()
    stock = SentenceTransformer(str(tmp_path / "hub"), device="cpu")
    np.testing.assert_allclose(stock.encode(["a cat"]), model.encode(["a cat"]), atol=1e-5)


def test_a_card_of_ones_own_and_adapters_alone(calls, backbone, tmp_path):
    model = build_encoder(backbone("fast_vlm"), device="cpu", peft_config=True)
    push_encoder_to_hub(model, "encoder", model_card="# Mine\n", merge_adapters=False)
    assert [call[0] for call in calls] == ["token", "create", "upload"]
    assert (tmp_path / "hub" / "README.md").read_text() == "# Mine\n"
    assert (tmp_path / "hub" / "adapter_config.json").is_file()
