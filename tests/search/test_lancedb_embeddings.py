"""The encoder in LanceDB's registry: texts, images and both, as `encode` gives them, also from a table opened again."""

import io

import lancedb
import numpy as np
import pytest
from lancedb.embeddings import get_registry
from lancedb.pydantic import LanceModel, Vector

from tiny import picture
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.search.lancedb_embeddings import UnimeEmbeddings

COLORS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def encoder(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    export_encoder(build_encoder(backbone("qwen2_vl"), device="cpu"), folder)
    return folder


def table_of(function, kind, cells, folder):
    class Row(LanceModel):
        source: kind = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    made = lancedb.connect(folder).create_table("rows", schema=Row)
    made.add([{"source": cell} for cell in cells])
    return lancedb.connect(folder).open_table("rows")  # which finds the function by its name


def vectors(table):
    return np.array([row["vector"] for row in table.to_arrow().to_pylist()])


def test_texts_are_found_by_texts_images_and_both(encoder, tmp_path):
    function = get_registry().get("unime_st").create(model=str(encoder), device="cpu")
    assert isinstance(function, UnimeEmbeddings)
    assert function.ndims() == 32
    texts = ["a red bus", "a boat", "bus.jpg"]  # the last one is a text too, whatever it looks like
    table = table_of(function, str, texts, tmp_path / "db")
    model = load_encoder(encoder, device="cpu")
    expected = model.encode([{"text": text} for text in texts])
    assert np.allclose(vectors(table), expected, atol=1e-5)
    image = picture("red")
    both = {"image": image, "text": "what is it?"}
    for query, item in (("a boat", {"text": "a boat"}), (image, {"image": image}), (both, both)):
        found = table.search(query).distance_type("cosine").limit(3).to_list()
        scores = expected @ model.encode([item])[0]
        assert [row["source"] for row in found] == [texts[place] for place in np.argsort(-scores)]
        assert np.allclose([1 - row["_distance"] for row in found], np.sort(scores)[::-1], atol=1e-5)


@pytest.mark.parametrize("kind", [str, bytes])
def test_images_as_paths_and_as_bytes(kind, encoder, tmp_path):
    cells = []
    for color in COLORS:
        picture(color).save(tmp_path / f"{color}.png")
        buffer = io.BytesIO()
        picture(color).save(buffer, "png")
        cells.append(str(tmp_path / f"{color}.png") if kind is str else buffer.getvalue())
    function = get_registry().get("unime_st").create(model=str(encoder), images=kind is str, device="cpu")
    table = table_of(function, kind, cells, tmp_path / "db")
    expected = load_encoder(encoder, device="cpu").encode([{"image": picture(color)} for color in COLORS])
    assert np.allclose(vectors(table), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1:]).max() > 1e-3
    found = table.search(picture("blue")).distance_type("cosine").limit(1).to_list()[0]
    assert found["source"] == cells[2]


def test_a_broken_image_is_an_error_at_once(encoder, tmp_path):
    function = get_registry().get("unime_st").create(model=str(encoder), images=True, device="cpu")
    with pytest.raises(Exception, match=r"missing\.png"):
        table_of(function, str, [str(tmp_path / "missing.png")], tmp_path / "db")
