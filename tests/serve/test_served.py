"""A real server over real sockets: many clients, slow ones, broken ones, and its end."""

import itertools
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from live import port_of, running, send

from unime_st.serve import Limits
from unime_st.serve.server import listen


def post(address, path, body, timeout=60):
    asked = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=timeout) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def address(make_app):
    with running(make_app(limits=Limits(body_seconds=1.0, max_bytes=2**20))) as found:
        yield found


POST = "POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def head(length, more=""):
    return f"{POST}Content-Length: {length}\r\n{more}\r\n".encode()


def test_many_clients_at_once_get_what_encode_gives(address, world):
    said = [f"client {number}" for number in range(64)]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda text: post(address, "/v1/embeddings", {"input": text}), said))
    found = np.array([answer["data"][0]["embedding"] for answer in answers])
    assert np.abs(found - world.model.encode(said)).max() < 1e-5


def test_a_slow_body_is_given_up(address):
    started = time.monotonic()
    answer = send(address, head(1000), b'{"text": ')
    assert b"408" in answer.split(b"\r\n")[0]
    assert b"within 1 seconds" in answer
    assert 0.9 < time.monotonic() - started < 10


def test_a_body_that_is_too_large_is_answered(address):
    for length in (2**20 + 1, 20_000_000):
        body = b" " * length
        assert b"413" in send(address, head(length, "Connection: close\r\n"), body).split(b"\r\n")[0]
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    chunked = head(0).replace(b"Content-Length: 0", b"Connection: close\r\nTransfer-Encoding: chunked")
    assert b"413" in send(address, chunked, *[chunk] * 40, b"0\r\n\r\n").split(b"\r\n")[0]


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # without a host
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        head(5, "Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n",
        head(-5),
        b"GET http://evil.example/about HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
    ],
    ids=["nonsense", "no host", "two hosts", "two lengths", "negative length", "elsewhere", "bad chunk"],
)
def test_broken_requests_are_refused(address, raw):
    status = int(send(address, raw).split(b" ", 2)[1])
    assert 400 <= status < 500
    assert post(address, "/search", {"text": "alive"})["rows"] == 30


def test_a_header_without_end_is_given_up(address):
    pieces = itertools.chain([b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "], itertools.repeat(b"a" * 10_000))
    with pytest.raises(ConnectionError):
        send(address, *itertools.islice(pieces, 10_000))


def test_clients_that_leave_hold_nothing_up(address):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port_of(address))) as one:
            one.sendall(head(1000) + b"{")
    assert post(address, "/search", {"text": "alive"})["rows"] == 30


def test_a_client_that_leaves_while_it_waits_is_not_encoded_for(address, world, monkeypatch):
    calls, go_on, encode = [], threading.Event(), world.model.encode

    def slow(items, **options):
        calls.append([item["text"] for item in items])
        go_on.wait(30)
        return encode(items, **options)

    monkeypatch.setattr(world.model, "encode", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, address, "/v1/embeddings", {"input": "first"})
        wait_for(lambda: calls)
        body = b'{"input": "gone"}'
        with socket.create_connection(("127.0.0.1", port_of(address))) as one:
            one.sendall(head(len(body)).replace(b"/search", b"/v1/embeddings") + body)
            time.sleep(0.3)
        time.sleep(0.3)
        stays = pool.submit(post, address, "/v1/embeddings", {"input": "stays"})
        time.sleep(0.3)
        go_on.set()
        assert first.result(30)["data"]
        assert stays.result(30)["data"]
    assert calls == [["first"], ["stays"]]


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_connections_are_bounded(make_app):
    limits = Limits(max_connections=8)
    with running(make_app(limits=limits), limits) as address:
        idle = [socket.create_connection(("127.0.0.1", port_of(address))) for _ in range(12)]
        time.sleep(0.3)
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, "/search", {"text": "a"})
        assert refused.value.code == 503
        for one in idle:
            one.close()
        time.sleep(0.3)
        assert post(address, "/search", {"text": "a"})["rows"] == 30


def test_a_port_that_is_taken_is_named(address):
    port = port_of(address)
    with pytest.raises(OSError, match=f"Cannot listen at 127.0.0.1, port {port}: .*--port"):
        listen("127.0.0.1", port)
