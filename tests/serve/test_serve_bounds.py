"""What is too large, damaged or no image is refused with 4xx, nothing is written, and the server lives."""

import json
import struct
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from serve_data import drawing, file_of, message_of, uri

from unime_st.serve import Limits


def png_head(width, height):
    """A PNG of that size by its head, with next to no data."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def tiff_of_one_tile(width, height, side):
    """A TIFF of that size in a tile of `side` x `side`, all of which is decoded."""
    packed = zlib.compress(bytes(side * side))
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 134, 325: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
BAD = {
    "not an image": (b"plain words", "image/png", 415, "is not an image that can be read"),
    "nothing": (b"", "image/png", 415, "is not an image that can be read"),
    "svg": (SVG, "image/svg+xml", 415, "is an SVG"),
    "svg that says png": (SVG, "image/png", 415, "is an SVG"),
    "html": (b"<html><script>alert(1)</script></html>", "text/html", 415, "is not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/x-eps", 415, "is not an image"),
    "50,000 x 50,000": (png_head(50_000, 50_000), "image/png", 413, "pixels"),
    "9,000 x 9,000": (png_head(9_000, 9_000), "image/png", 413, "pixels"),
    "a tile of 36 million pixels": (tiff_of_one_tile(16, 16, 6_000), "image/tiff", 413, "pixels"),
    "truncated": (file_of(drawing(1, (300, 300)))[:700], "image/png", 400, "is damaged"),
    "truncated jpeg": (file_of(drawing(1, (300, 300)), "JPEG")[:900], "image/jpeg", 400, "is damaged"),
    "no pixels": (png_head(100, 100), "image/png", 400, "is damaged"),
    "a thin line": (file_of(Image.new("RGB", (3000, 1))), "image/png", 422, "does not take input 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_and_the_server_lives(client, name):
    content, kind, status, words = BAD[name]
    one = client()
    for path, body in (
        ("/v1/embeddings", {"input": {"image": uri(content, kind)}}),
        ("/search", {"image": uri(content, kind)}),
    ):
        assert words in message_of(one.post(path, json=body), status)
    good = {"input": {"image": uri(file_of(drawing(3)))}}
    assert one.post("/v1/embeddings", json=good).status_code == 200


def test_a_tiff_in_tiles_is_taken(client):
    good = {"input": {"image": uri(tiff_of_one_tile(60, 60, 256), "image/tiff")}}
    assert client().post("/v1/embeddings", json=good).status_code == 200


def test_a_hundred_megabytes_are_refused(client):
    one = client()
    body = b'{"input": "' + b"a" * 100_000_000 + b'"}'
    headers = {"Content-Type": "application/json"}
    assert "20,971,520 bytes" in message_of(one.post("/v1/embeddings", content=body, headers=headers), 413)
    in_pieces = (body[start : start + 1_000_000] for start in range(0, len(body), 1_000_000))
    assert "20,971,520 bytes" in message_of(one.post("/v1/embeddings", content=in_pieces, headers=headers), 413)
    assert one.post("/v1/embeddings", json={"input": "alive"}).status_code == 200


def test_the_last_byte_that_is_allowed_is_allowed(client):
    body = json.dumps({"input": "a" * 100}).encode()
    headers = {"Content-Type": "application/json"}
    for spare, status in ((0, 200), (-1, 413)):
        one = client(limits={"max_bytes": len(body) + spare})
        assert one.post("/v1/embeddings", content=body, headers=headers).status_code == status


def test_numbers_of_inputs_characters_and_pixels(client):
    one = client(limits={"max_inputs": 3, "max_characters": 20, "max_pixels": 2400, "max_results": 5})
    post = lambda body, path="/v1/embeddings": one.post(path, json=body)  # noqa: E731
    assert post({"input": ["a"] * 3}).status_code == 200
    assert "may have 1 to 3" in message_of(post({"input": ["a"] * 4}), 413)
    assert post({"input": ["a" * 10, "b" * 10]}).status_code == 200
    assert "20 characters" in message_of(post({"input": ["a" * 10, "b" * 11]}), 413)
    assert "20 characters" in message_of(post({"input": "a", "instruction": "i" * 21}), 413)
    assert "20 characters" in message_of(post({"text": "a" * 21, "k": 5}, "/search"), 413)
    picture = {"image": uri(file_of(drawing(1, (40, 30))))}
    assert post({"input": [picture, picture]}).status_code == 200
    assert "2,400 pixels" in message_of(post({"input": [picture] * 3}), 413)
    assert post({"input": [picture, picture]}).status_code == 200  # what was refused holds nothing
    assert "5 at most" in message_of(post({"text": "a", "k": 6}, "/search"), 400)
    assert "`k`" in message_of(post({"text": "a", "k": 0}, "/search"), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"input":' * 50_000,
        b"{",
        b"\xff\xfe",
        b"",
        b"null",
        b'{"input": 1e999}',
        b'{"k": ' + b"9" * 5000 + b"}",
    ],
    ids=["lists", "objects", "open", "bytes", "nothing", "null", "infinite", "digits"],
)
def test_strange_json_is_refused(client, body):
    one = client()
    for path in ("/v1/embeddings", "/search"):
        message_of(one.post(path, content=body, headers={"Content-Type": "application/json"}), 400)
    assert one.post("/search", json={"text": "alive"}).status_code == 200


def test_nothing_is_written(client):
    written = []
    watching = False

    def watch(event, arguments):
        if watching and event == "open":
            path, mode, flags = arguments
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & 3:
                written.append(path)
        elif watching and event in ("tempfile.mkstemp", "tempfile.mkdtemp", "os.mkdir"):
            written.append(event)

    sys.addaudithook(watch)  # stays, and does nothing when not watching
    one = client()
    one.post("/v1/embeddings", json={"input": "warm"})
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    large = uri(file_of(Image.fromarray(noise)))
    assert len(large) > 3_000_000  # Starlette's forms spool beyond 1 MB
    watching = True
    for body in ({"input": {"image": large}}, {"input": "x" * 150_000}):
        assert one.post("/v1/embeddings", json=body).status_code == 200
    assert one.post("/search", json={"image": large}).status_code == 200
    assert one.get("/thumbnails/3").status_code == 200
    multipart = one.post("/search", files={"image": b"x" * 3_000_000})
    watching = False
    assert "application/json" in message_of(multipart, 415)
    assert written == []


@pytest.mark.parametrize(
    ("name", "value"), [("max_bytes", 0), ("batch_size", 1.5), ("max_wait", -1), ("max_inputs", "8")]
)
def test_bounds_that_are_none_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        Limits(**{name: value})


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"input": [' + b"[]," * 3_000_000 + b"[]]}", 413),
        (b'{"input": [' + b"[]," * 60_000 + b"[]]}", 400),
        (b'{"messages": [' + b'{"role":7},' * 50_000 + b"{}]}", 400),
        (b'{"input": "a"' + b"".join(b',"x%d":1' % number for number in range(100_000)) + b"}", 400),
        (b'{"input": ["' + b'","'.join([b"a"] * 150_000) + b'"]}', 400),
    ],
    ids=["three million lists", "lists", "messages", "fields", "texts"],
)
def test_bodies_of_many_parts_take_neither_time_nor_memory(client, body, status):
    one = client()
    tracemalloc.start()
    started = time.perf_counter()
    answer = one.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    took, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(message_of(answer, status)) < 300
    assert took < 20  # tracing slows it by ten
    assert peak < 10 * len(body) + 60_000_000


def test_commas_of_texts_are_no_parts(client):
    assert client().post("/search", json={"text": "," * 1000, "instruction": "[{,"}).status_code == 200
