"""`unime push`: what the Hub is asked for, the card without it, and its refusals; nothing leaves the machine."""

import os
import shutil
import subprocess
import sys

import pytest
from sentence_transformers import SentenceTransformer

from hub_server import Hub, serve
from unime_st import hub
from unime_st.cli import main


@pytest.fixture
def pushed(monkeypatch):
    """What was pushed, with which options; the Hub is replaced."""
    calls = []

    def push(model, repo_id, **options):
        calls.append((model, repo_id, options))
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(hub, "push_encoder_to_hub", push)
    return calls


def test_options_reach_the_library(pushed, trained, capsys):
    command = ["push", str(trained / "encoder"), "me/photos"]
    assert main(command) == 0
    assert capsys.readouterr().out == "wrote https://huggingface.co/me/photos/commit/1\n"
    assert main([*command, "--private", "--revision", "next", "--commit-message", "Photos", "--create-pr", "--new",
                 "--keep-adapters"]) == 0  # fmt: skip
    (_, _, plain), (model, repo_id, options) = pushed
    default = {"private": None, "revision": None, "create_pr": False, "exist_ok": True, "merge_adapters": True,
               "model_card": None}  # fmt: skip
    assert plain == default
    assert repo_id == "me/photos"
    assert isinstance(model, SentenceTransformer)
    assert options == {
        "private": True,
        "revision": "next",
        "commit_message": "Photos",
        "create_pr": True,
        "exist_ok": False,
        "merge_adapters": False,
        "model_card": None,
    }


def test_a_dry_run_prints_the_card_and_uploads_nothing(pushed, trained, capsys):
    assert main(["push", str(trained / "encoder"), "me/photos", "--dry-run"]) == 0
    card = capsys.readouterr().out
    assert card.startswith("---\n")
    assert 'SentenceTransformer("me/photos")' in card
    assert not pushed


def test_a_card_of_ones_own(pushed, trained, tmp_path, capsys):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\nMy words\n", encoding="utf-8")
    command = ["push", str(trained / "encoder"), "me/photos", "--card", str(card)]
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out == card.read_text(encoding="utf-8") + "\n"
    assert main(command) == 0
    assert pushed[0][2]["model_card"] == card.read_text(encoding="utf-8")
    assert main([*command[:-1], str(tmp_path / "none.md"), "--dry-run"]) == 1
    assert "none.md" in capsys.readouterr().err


def test_half_an_encoder_is_named(pushed, trained, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(trained / "encoder", half)
    (half / "1_Pooling" / "config.json").unlink()
    assert main(["push", str(half), "me/photos"]) == 1
    assert f"The config.json in {half / '1_Pooling'} is missing" in capsys.readouterr().err
    assert not pushed


def test_a_wrong_name_is_exit_code_2_and_a_missing_encoder_1(pushed, trained, tmp_path, capsys):
    for name in ("a/b/c", "me/../photos", "me/ photos"):
        assert main(["push", str(trained / "encoder"), name]) == 2
        assert "Repo id must" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "none"), "me/photos"]) == 1
    told = capsys.readouterr().err
    assert str(tmp_path / "none") in told
    assert "Traceback" not in told
    assert not pushed


def start(trained, address, *options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "unime_st.cli", "push", str(trained / "encoder"), "me/photos", *options]
    return subprocess.run(
        command, env={**environment, "HF_TOKEN": "hf_secret"}, capture_output=True, text=True, timeout=240, check=False
    )


def test_it_arrives_at_a_stand_in_of_the_hub(trained, tmp_path):
    stand_in = Hub(tmp_path)
    with serve(stand_in) as address:
        done = start(trained, address, "--revision", "next")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"wrote {address}/me/photos/commit/abc"
    assert "hf_secret" not in done.stdout + done.stderr
    arrived = tmp_path / "me/photos/next"
    assert 'SentenceTransformer("me/photos")' in (arrived / "README.md").read_text()
    assert SentenceTransformer(str(arrived), device="cpu").encode(["a cat"]).shape == (1, 32)


def test_a_refusal_is_one_line(trained, tmp_path):
    stand_in = Hub(tmp_path, forbidden=True)
    with serve(stand_in) as address:
        done = start(trained, address)
    assert done.returncode == 1
    assert "unime push: error: " in done.stderr
    assert "403" in done.stderr
    assert "Traceback" not in done.stderr
    gone = start(trained, address)  # nobody listens there any more
    assert gone.returncode == 1
    assert "unime push: error: The Hub cannot be reached: " in gone.stderr
    assert "Traceback" not in gone.stderr
