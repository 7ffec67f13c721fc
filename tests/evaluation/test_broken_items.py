"""One bad item never takes others with it, and is named by its row of the data."""

import json

import numpy as np
import pytest
import torch
from evaluation_fakes import HashModel, TableModel
from PIL import Image
from test_mmeb import write_task

from tiny import FAMILIES, PLUGIN_FAMILIES, picture, tiny_encoder
from unime_st.embedding.distinct import encode_distinct, encode_indexed
from unime_st.evaluation import (
    BrokenItemError,
    EmbeddingCache,
    ImageTextRetrievalEvaluator,
    MMEBEvaluator,
    SugarCrepeEvaluator,
)
from unime_st.evaluation.base import EmbeddingEvaluator

ERRORS = (ValueError, TypeError, OSError, RuntimeError, IndexError, KeyError, ZeroDivisionError, EOFError)


class Refusing(HashModel):
    """Encodes batches, and refuses any that holds one of some texts."""

    def __init__(self, refused, error=ValueError):
        super().__init__()
        self.refused, self.error = set(refused), error

    def encode(self, items, *, batch_size=32, **kwargs):
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            for place, item in enumerate(batch):
                if item in self.refused:
                    raise self.error(f"Row {place} of the batch is no good: {item}")
        return super().encode(items, **kwargs)


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_is_raised_for_an_item_the_rest_of_its_chunk_is_kept(tmp_path, error):
    items = [f"text {number}" for number in range(300)]
    refused = {items[number] for number in (0, 7, 8, 150, 299)}
    cache = EmbeddingCache(tmp_path)
    model = Refusing(refused, error)
    embeddings, index, errors = encode_indexed(model, items, cache=cache, batch_size=4, on_error="report")
    assert sorted(errors) == [0, 7, 8, 150, 299]
    assert all("the item is no good" in message and items[row] in message for row, message in errors.items())
    good = [row for row in range(300) if items[row] not in refused]
    np.testing.assert_array_equal(embeddings[index[good]], HashModel().encode([items[row] for row in good]))
    again = Refusing(refused, error)
    assert encode_indexed(again, items, cache=cache, batch_size=4, on_error="report")[1].tolist() == index.tolist()
    assert again.encoded == []  # all the others were kept
    with pytest.raises(BrokenItemError, match=r"Item 6 cannot be encoded: 'text 7': .*the item is no good") as raised:
        encode_distinct(model, items[1:8] * 2 + items[9:150], batch_size=4)
    assert raised.value.position == 6


def test_items_that_only_fail_together_are_encoded():
    class NoMixing(HashModel):
        def encode(self, items, **kwargs):
            if len({item[0] for item in items}) > 1:
                raise ValueError("one kind at a time")
            return super().encode(items, **kwargs)

    items = ["a1", "b1", "a2", "b2", "b3"]
    embeddings, index, errors = encode_indexed(NoMixing(), items, on_error="report")
    assert errors == {}
    np.testing.assert_array_equal(embeddings[index], HashModel().encode(items))


def test_a_fault_of_the_model_is_no_items():
    class OutOfMemory(HashModel):
        def encode(self, items, **kwargs):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        encode_indexed(OutOfMemory(), ["a", "b"], on_error="report")

    class FallsOver(HashModel):
        def encode(self, items, **kwargs):
            if len(self.encoded) >= 32:
                raise RuntimeError("CUDA error")
            return super().encode(items, **kwargs)

    with pytest.raises(RuntimeError, match=r"^CUDA error$"):
        encode_indexed(FallsOver(), [f"text {n}" for n in range(64)], batch_size=4, on_error="report")


def test_one_item_is_no_list_of_them():
    for item in ("a text", b"bytes", {"text": "a text"}):
        with pytest.raises(TypeError, match="is one item"):
            encode_distinct(HashModel(), item)


def test_rows_of_the_data_are_named(tmp_path):
    class No5(TableModel):
        def encode(self, items, **kwargs):
            if any(isinstance(item, dict) and item.get("text") == "find #5" for item in items):
                raise ValueError("Row 0: five is refused")
            return super().encode(items, **kwargs)

    write_task(tmp_path, "SUN397", [(1, [1, 3])])
    write_task(tmp_path, "VOC2007", [(1, [1, 3]), (3, [3, 1]), (7, [7, 5]), (3, [3, 7])])
    model = No5(np.eye(8))
    with pytest.raises(ValueError, match=r"^VOC2007, row 2: .*the item: five is refused"):
        MMEBEvaluator(tmp_path)(model)
    evaluator = MMEBEvaluator(tmp_path, on_error="report")
    metrics = evaluator(model)
    assert list(evaluator.results["VOC2007"].errors) == [2]
    assert metrics["MMEB_VOC2007_precision@1"] == 0.75
    assert metrics["MMEB_SUN397_precision@1"] == 1.0

    class NoB(HashModel):
        def vector(self, item, prompt=""):
            if isinstance(item, dict) and item.get("text") == "b":
                raise ValueError("Row 3 is refused")
            return super().vector(str(item))

    pictures = [np.full((2, 2, 3), number, dtype=np.uint8) for number in range(2)]
    with pytest.raises(ValueError, match=r"^Caption 2, of image 1: "):
        ImageTextRetrievalEvaluator(pictures, [["a", "c"], ["b"]])(NoB())
    with pytest.raises(ValueError, match=r"swap.*row 1"):
        SugarCrepeEvaluator(
            {"add": [(pictures[0], "a", "c")], "swap": [(pictures[0], "a", "c"), (pictures[1], "c", "b")]}
        )(NoB())


def test_an_embedding_that_is_not_finite_is_named_by_its_row(tmp_path):
    write_task(tmp_path, "VOC2007", [(1, [1, 3]), (3, [3, 5])])
    table = np.eye(6)
    table[5] = np.nan
    for on_error in ("raise", "report"):
        with pytest.raises(ValueError, match=r"VOC2007, row 1: The model gave NaN or infinity"):
            MMEBEvaluator(tmp_path, on_error=on_error)(TableModel(table))


@pytest.mark.parametrize("family", [*FAMILIES, *PLUGIN_FAMILIES])
def test_what_a_real_processor_or_opener_refuses(tmp_path, family):
    """An image too narrow, a torn one and a text that spells an image's token, among good ones."""
    model = tiny_encoder(family, tmp_path / "model")
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        picture((40 * number, 9, 9)).save(path)
    Image.new("RGB", (1093, 5)).save(paths[2])
    paths[4].write_bytes(paths[4].read_bytes()[:60])
    items = [{"image": str(path)} for path in paths]
    spelled = getattr(model[0].processor, "image_token", None)
    items += ["a text", f"a text with {spelled}", "another"]
    embeddings, index, errors = encode_indexed(model, items, batch_size=2, on_error="report")
    assert {4, 7} <= set(errors) <= {2, 4, 7}
    assert (2 in errors) == family.startswith("qwen")  # sides of more than 200 to 1
    assert "4.png" in errors[4]
    assert all("ow 0" not in message for message in errors.values())
    good = [row for row in range(len(items)) if row not in errors]
    expected = model.encode([items[row] for row in good], batch_size=2)
    np.testing.assert_allclose(embeddings[index[good]], expected, atol=1e-5)
    with pytest.raises(BrokenItemError) as raised:
        encode_distinct(model, items, batch_size=2)
    assert raised.value.position in errors


def test_an_evaluator_of_ones_own_may_extend_what_is_written(tmp_path):
    class Extended(EmbeddingEvaluator):
        def measure(self, model):
            return {"x": 1.0}

        def outcomes(self):
            return {}

        def finish(self, model, metrics, *arguments):
            return super().finish(model, {**metrics, "more": 2.0}, *arguments)

    found = Extended(name="own")(object(), str(tmp_path), 1, 5)
    assert found == {"own_x": 1.0, "own_more": 2.0}
    assert json.loads((tmp_path / "own_results.json").read_text()) == found
