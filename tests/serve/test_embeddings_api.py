"""`/v1/embeddings` against `encode`: OpenAI's form, images, chats, batches, and what is refused."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serve_data import drawing, file_of, message_of, uri

TOLERANCE = 1e-5


def vectors(answer):
    assert answer.status_code == 200, answer.text[:500]
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return np.array([one["embedding"] for one in data])


def test_all_kinds_of_inputs_are_those_of_encode(client, world):
    pictures = [drawing(40), drawing(41, (64, 90))]
    asked = [
        "a red bus",
        {"text": "a red bus, and more words"},
        {"image": uri(file_of(pictures[0]))},
        {"image": uri(file_of(pictures[1], "WEBP"), "image/webp"), "text": "what is it?"},
        str(world.photos / "a_0.png"),  # the name of a file is a text
    ]
    with_pixels = [{"image": pictures[0]}, {"image": pictures[1], "text": "what is it?"}]
    meant = [{"text": asked[0]}, asked[1], *with_pixels, {"text": asked[4]}]
    lossless = file_of(pictures[1])
    asked[3]["image"] = uri(lossless)
    found = vectors(client().post("/v1/embeddings", json={"input": asked, "model": "tiny"}))
    expected = world.model.encode(meant)
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(expected[:, None] - expected[None]).max(axis=2)[~np.eye(5, dtype=bool)].min() > 1e-3
    assert np.abs(expected[4] - world.model.encode([str(world.photos / "a_0.png")])[0]).max() > 1e-3


def test_one_text_in_base64_and_its_tokens(client, world):
    said = "twelve bytes"
    answer = client().post("/v1/embeddings", json={"input": said, "encoding_format": "base64", "user": "somebody"})
    told = answer.json()
    found = np.frombuffer(base64.b64decode(told["data"][0]["embedding"]), dtype="<f4")
    assert np.abs(found - world.model.encode([said])[0]).max() < TOLERANCE
    assert (told["object"], told["model"], told["data"][0]["object"]) == ("list", "tiny", "embedding")
    assert told["usage"] == {"prompt_tokens": 12, "total_tokens": 12}  # the tokenizer's tokens are bytes


def test_an_instruction_and_a_chat(client, world):
    picture = drawing(50)
    one = client()
    found = vectors(one.post("/v1/embeddings", json={"input": ["a bus"], "instruction": "In one word:"}))
    assert np.abs(found - world.model.encode(["a bus"], prompt="In one word:")).max() < TOLERANCE
    assert np.abs(found - world.model.encode(["a bus"])).max() > 1e-3
    parts = [
        {"type": "image_url", "image_url": {"url": uri(file_of(picture))}},
        {"type": "text", "text": "what is it?"},
    ]
    messages = [{"role": "system", "content": "In one word:"}, {"role": "user", "content": parts}]
    item = [{"image": picture, "text": "what is it?"}]
    for given, options in ((messages, {"prompt": "In one word:"}), (messages[1:], {})):
        found = vectors(one.post("/v1/embeddings", json={"messages": given}))
        assert np.abs(found - world.model.encode(item, **options)).max() < TOLERANCE
    plain = [{"role": "user", "content": [{"type": "image_url", "image_url": uri(file_of(picture))}]}]
    found = vectors(one.post("/v1/embeddings", json={"messages": plain}))
    assert np.abs(found - world.model.encode([{"image": picture}])).max() < TOLERANCE


def test_requests_at_once_share_calls_of_the_model(client, world, monkeypatch):
    calls = []
    encode = world.model.encode

    def counted(items, **options):
        calls.append(len(items))
        return encode(items, **options)

    monkeypatch.setattr(world.model, "encode", counted)
    one = client(limits={"batch_size": 16, "max_wait": 0.25})
    said = [f"text number {number}" for number in range(24)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda text: one.post("/v1/embeddings", json={"input": text}), said))
    assert sum(calls) == 24
    assert max(calls) <= 16
    assert len(calls) <= 6
    found = np.concatenate([vectors(answer) for answer in answers])
    assert np.abs(found - encode(said)).max() < TOLERANCE


def test_a_refused_input_spoils_no_other(client, world):
    one = client(limits={"max_wait": 0.3})
    said = ["a bus", "a <|image_pad|> in the text", "a boat"]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda text: one.post("/v1/embeddings", json={"input": text}), said))
    assert "<|image_pad|>" in message_of(answers[1], 422)
    for place in (0, 2):
        assert np.abs(vectors(answers[place]) - world.model.encode([said[place]])).max() < TOLERANCE
    told = message_of(one.post("/v1/embeddings", json={"input": said}), 422)
    assert told.startswith("The model does not take input 1:")


@pytest.mark.parametrize(
    ("body", "status", "advice"),
    [
        ({}, 400, "Give `input` or `messages`"),
        ({"input": []}, 400, "`input` has 0 inputs"),
        ({"input": ""}, 400, "There is nothing in input 0"),
        ({"input": ["a", " "]}, 400, "There is nothing in input 1"),
        ({"input": {}}, 400, "There is nothing in input 0"),
        ({"input": [[1, 2, 3]]}, 400, "`input` is a text"),
        ({"input": 7}, 400, "`input` is a text"),
        ({"input": {"image": "/etc/passwd"}}, 400, "must be a data URI"),
        ({"input": {"image": "http://169.254.169.254/a.png"}}, 400, "must be a data URI"),
        ({"input": {"image": "data:image/png;base64,!!!"}}, 400, "not valid base64"),
        ({"input": {"image": "data:image/png,abc"}}, 400, "must be a data URI"),
        ({"input": {"picture": "x"}}, 400, "`input` is a text"),
        ({"input": "a", "messages": []}, 400, "one of them"),
        ({"messages": []}, 400, "`messages` are one of the user"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "`messages` are one of the user"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]}, 400, "`messages`"),
        ({"messages": [{"role": "user", "content": []}]}, 422, "neither text nor an image"),
        ({"input": "a", "encoding_format": "int8"}, 400, "float or base64"),
        ({"input": "a", "dimensions": 7}, 400, "have 32"),
        ({"input": "a", "model": "gpt"}, 404, "There is no model 'gpt'"),
        ({"input": "a", "temperature": 1}, 400, "temperature"),
        ({"input": "a \ud800 b"}, 422, "is not valid UTF-8"),
        ({"input": "a", "\ud800": 1}, 400, "unicode"),
        ({"input": "a", "model": "\ud800"}, 404, "There is no model"),
    ],
)
def test_what_cannot_be_embedded_is_refused_in_words(client, body, status, advice):
    one = client()
    answer = one.post("/v1/embeddings", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert advice in message_of(answer, status)
    assert one.post("/v1/embeddings", json={"input": "alive"}).status_code == 200
