"""The page's queries against numpy, thumbnails by row, and what a corpus's strangers may not do."""

from io import BytesIO

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serve_data import HOSTILE, drawing, file_of, message_of, uri
from starlette.exceptions import HTTPException

from unime_st.data import encode_corpus, load_inputs
from unime_st.search import CorpusSearch
from unime_st.serve import create_app
from unime_st.serve.rows import THUMBNAIL, Rows


def expected(world, kind, query, k):
    scores = np.asarray(world.search[kind].corpus) @ query
    best = np.argsort(-scores, kind="stable")[:k]
    return best.tolist(), scores[best].tolist()


def test_a_query_finds_what_is_nearest(client, world):
    picture = drawing(7)
    queries = [
        ({"text": "a red bus"}, {"text": "a red bus"}, None),
        ({"image": uri(file_of(picture))}, {"image": picture}, None),
        ({"image": uri(file_of(picture)), "text": "in blue"}, {"image": picture, "text": "in blue"}, None),
        ({"text": "a red bus", "instruction": "In a word:"}, {"text": "a red bus"}, "In a word:"),
    ]
    one = client()
    for asked, item, prompt in queries:
        told = one.post("/search", json={**asked, "k": 5}).json()
        rows, scores = expected(world, "images", world.model.encode([item], prompt=prompt)[0], 5)
        assert [hit["row"] for hit in told["results"]] == rows
        assert [hit["score"] for hit in told["results"]] == pytest.approx(scores, abs=2e-4)
        assert told["rows"] == 30
        assert told["milliseconds"]["embedding"] > 0
    assert one.post("/search", json=queries[1][0]).json()["results"][0]["id"] == "b_7.png"


def test_more_like_this_is_the_rows_own_embedding(client, world):
    told = client().post("/search", json={"like": 11, "k": 4}).json()["results"]
    rows, _ = expected(world, "images", np.asarray(world.search["images"].corpus)[11], 4)
    assert [hit["row"] for hit in told] == rows
    name = world.inputs["images"].ids[11]
    assert told[0] == {"row": 11, "id": name, "text": None, "image": True, "score": pytest.approx(1.0, abs=1e-3)}


def test_a_prefix_chooses_ids(client):
    one = client()
    told = one.post("/search", json={"text": "a bus", "prefix": "a_", "k": 100}).json()["results"]
    assert len(told) == 15
    assert all(hit["id"].startswith("a_") for hit in told)
    assert one.post("/search", json={"text": "a bus", "prefix": "zzz"}).json()["results"] == []


def test_what_is_wrong_inside_is_not_told(client, world, tmp_path):
    """A damaged part's error names folders of the machine; a prefix where there are no texts is the client's fault."""
    corpus = encode_corpus(world.model, ["a", "b"], tmp_path / "secret", show_progress_bar=False)
    with TestClient(
        create_app(world.model, CorpusSearch(corpus)), base_url="http://localhost", raise_server_exceptions=False
    ) as one:
        assert "no ids that are texts" in message_of(one.post("/search", json={"text": "a", "prefix": "a"}), 400)
        corpus.files[0].write_bytes(b"")
        answer = one.post("/search", json={"text": "a"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
    half = {"content": b'{"text": "a", "prefix": "\\ud800"}', "headers": {"Content-Type": "application/json"}}
    assert client().post("/search", **half).json()["results"] == []


def test_texts_are_shown_as_they_are(client, world):
    one = client("texts")
    told = one.post("/search", json={"text": "a sentence", "k": 100}).json()["results"]
    assert sorted(hit["row"] for hit in told) == list(range(30))
    for hit in told:
        assert hit["text"] == world.texts[hit["row"]]
        assert hit["image"] is False
    assert {hit["text"] for hit in told} >= set(HOSTILE)
    assert "no image" in message_of(one.get("/thumbnails/3"), 404)


def test_thumbnails_are_the_rows_pictures(client, world):
    one = client()
    for row, name in enumerate(world.inputs["images"].ids[:3]):
        answer = one.get(f"/thumbnails/{row}")
        assert answer.headers["content-type"] == "image/webp"
        shown = np.asarray(Image.open(BytesIO(answer.content)).convert("RGB"), dtype=float)
        original = np.asarray(Image.open(world.photos / name).convert("RGB"), dtype=float)
        assert np.abs(shown - original).mean() < 12
    rows = Rows(NoRows(1), Given(["0"], image=file_of(drawing(1, (2000, 500)))), max_pixels=10**7)
    assert Image.open(BytesIO(rows.thumbnail(0))).size == (THUMBNAIL, THUMBNAIL // 4)


@pytest.mark.parametrize("row", ["30", "-1", "1e3", "a_0.png", "..%2f..%2fetc%2fpasswd", "9" * 5000])
def test_thumbnails_are_known_by_row_alone(client, row):
    answer = client().get(f"/thumbnails/{row}")
    assert answer.status_code in (400, 404)
    assert "image" not in answer.headers["content-type"]
    assert message_of(client().post("/search", json={"like": 30}), 404).startswith("There is no row 30")


@pytest.mark.parametrize("path", ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd", ""])
def test_the_pages_folder_is_not_left(client, path):
    assert client().get(f"/page/{path}").status_code in (404, 405)


def test_nothing_outside_the_folder_is_shown(world, tmp_path):
    """Paths of a corpus's table that climb out, a link that was put there later, and an address of the web."""
    (tmp_path / "photos").mkdir()
    secret = tmp_path / "secret.png"
    drawing(1).save(secret)
    for number in range(3):
        drawing(number).save(tmp_path / "photos" / f"{number}.png")
    table = tmp_path / "photos" / "metadata.csv"
    table.write_text("file_name,text\n0.png,a\n1.png,b\n2.png,c\n")
    inputs = load_inputs(table, columns=["file_name"])
    corpus = encode_corpus(world.model, inputs, tmp_path / "corpus", with_ids=True)
    (tmp_path / "photos" / "1.png").unlink()
    (tmp_path / "photos" / "1.png").symlink_to(secret)
    (tmp_path / "photos" / "2.png").write_bytes(b"no image")
    with TestClient(create_app(world.model, CorpusSearch(corpus), inputs), base_url="http://localhost") as one:
        assert one.get("/thumbnails/0").status_code == 200
        assert "no image" in message_of(one.get("/thumbnails/1"), 404)
        assert "is not an image" in message_of(one.get("/thumbnails/2"), 404)
        shown = {hit["row"]: hit["image"] for hit in one.post("/search", json={"text": "a"}).json()["results"]}
        assert shown == {0: True, 1: False, 2: True}
    rows = Rows(NoRows(1), Given(["0"], image="http://localhost/a.png"), max_pixels=100)
    with pytest.raises(HTTPException, match="is not there"):
        rows.thumbnail(0)


class NoRows:
    """A corpus of so many rows without ids."""

    def __init__(self, size):
        self.size, self.manifest = size, {"with_ids": False}

    def __len__(self):
        return self.size


def test_inputs_are_found_by_id(world, caplog):
    ids = [str(name) for name in world.inputs["images"].ids]
    turned = world.inputs["images"]
    rows = Rows(world.search["images"].corpus, Given(list(reversed(ids))[:20]), max_pixels=100)
    assert [rows[row]["text"] for row in (29, 10, 9)] == ["the text of b_9.png", f"the text of {ids[10]}", None]
    assert "10 of the corpus's 30 rows are not among the inputs" in caplog.text
    with pytest.raises(ValueError, match="No id of the corpus"):
        Rows(world.search["images"].corpus, Given(["x"]), max_pixels=100)
    with pytest.raises(ValueError, match="The inputs are 30 and the corpus has 3 rows"):
        Rows(NoRows(3), turned, max_pixels=100)


class Given:
    """Inputs with these ids."""

    def __init__(self, ids, image=None):
        self.ids, self.image = ids, image

    def __getitem__(self, row):
        return self.ids[row], {"text": f"the text of {self.ids[row]}", "image": self.image}


def test_an_empty_corpus_and_one_without_inputs(world):
    class Empty:
        corpus = NoRows(0)

    with TestClient(create_app(world.model, Empty()), base_url="http://localhost") as one:
        assert one.get("/about").json()["sample"] == []
        assert one.post("/search", json={"text": "a"}).json()["results"] == []
        assert message_of(one.post("/search", json={"like": 0}), 404)
    with TestClient(create_app(world.model, world.search["images"]), base_url="http://localhost") as one:
        hit = one.post("/search", json={"text": "a", "k": 1}).json()["results"][0]
        assert hit["id"].endswith(".png")
        assert (hit["text"], hit["image"]) == (None, False)


@pytest.mark.parametrize(
    ("body", "advice"),
    [
        ({}, "There is nothing in the query"),
        ({"text": "  "}, "There is nothing in the query"),
        ({"like": 1, "text": "a"}, "is a query itself"),
        ({"like": 1.5}, "`like`"),
        ({"text": 3}, "`text`"),
        ({"text": "a", "path": "/etc/passwd"}, "`path`"),
        ({"text": "a", "prefix": ["a"]}, "`prefix`"),
    ],
)
def test_queries_that_are_none(client, body, advice):
    assert advice in message_of(client().post("/search", json=body), 400)
