"""`unime serve` as a process: it says where it is, answers, and ends when asked to; and what it refuses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from serve_data import TOKEN

from unime_st.cli import main


def command(world, *more):
    return ["serve", str(world.root / "images"), "--model", str(world.root / "encoder"), "--device", "cpu", *more]


def get(address, path, **headers):
    with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers), timeout=60) as answer:
        return answer.read()


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, TOKEN])
def test_it_serves_until_it_is_stopped(world, token):
    more = ["--inputs", str(world.photos), "--port", "0", *(["--host", "0.0.0.0"] if token else [])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **({"UNIME_TOKEN": token} if token else {})}
    process = subprocess.Popen(
        [sys.executable, "-m", "unime_st.cli", *command(world, *more)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        said = process.stdout.readline()
        assert re.match(r"30 rows at http://\S+ and http://\S+/v1/embeddings; Ctrl-C ends it", said)
        assert TOKEN not in said
        address = said.split()[3]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if token:
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(address, "/about")
        about = json.loads(get(address, "/about", **headers))
        assert about["rows"] == 30
        assert about["sample"][0]["image"]
        assert b"<!doctype html>" in get(address, "/", **headers)
        assert get(address, "/thumbnails/0", **headers)[8:12] == b"WEBP"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        (["--host", "0.0.0.0"], "so a token is needed. Set UNIME_TOKEN"),
        (["--token", "short"], "at least 16"),
        (["--batch-size", "0"], "`batch_size=0`"),
        (["--max-megabytes", "0"], "`max_bytes=0`"),
        (["--inputs", "no/such/table.csv"], "no/such/table.csv"),
    ],
)
def test_what_it_refuses(world, more, advice, monkeypatch, capsys):
    monkeypatch.delenv("UNIME_TOKEN", raising=False)
    assert main(command(world, *more)) == 1
    assert advice in capsys.readouterr().err


def test_inputs_of_another_corpus_are_refused(world, capsys):
    assert main(command(world, "--inputs", str(world.root / "texts.jsonl"), "--port", "0")) == 1
    assert "No id of the corpus" in capsys.readouterr().err


def test_without_its_packages_it_says_what_to_install(world, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("unime_st.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(command(world)) == 1
    assert "pip install 'unime_st[serve]'" in capsys.readouterr().err


def test_a_port_that_is_taken_shows_before_the_model_is_loaded(world, capsys, monkeypatch):
    monkeypatch.setattr("unime_st.modules.load_encoder", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(command(world, "--port", str(port))) == 1
    assert f"Cannot listen at 127.0.0.1, port {port}" in capsys.readouterr().err
