"""Encoding corpora of any size: as a stream and into files, killed, shared, and read back."""

import errno
import json
import logging
import threading
import time
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer

import unime_st.data.corpus.parts
from killing import note, notes, run_with_kills
from tiny import picture
from tiny_data import COLOURS, tiny_teacher
from two_processes import run_two
from unime_st import build_encoder
from unime_st.data import BrokenInputError, encode_corpus, encode_stream, load_corpus

TEXTS = [" ".join(COLOURS[(number * 7 >> shift) % 8] for shift in (0, 3, 6)[: 1 + number % 3]) for number in range(400)]
FORMATS = ("parquet", "npy")


class Lengths:
    """Stands for a model: counts what it encodes."""

    def __init__(self, dimension=3):
        self.calls, self.options, self.dimension = [], [], dimension

    def encode(self, items, *, show_progress_bar, **options):
        assert show_progress_bar is False
        self.calls.append(list(items))
        self.options.append(options)
        if any(item == "broken" for item in items):
            raise ValueError("Row 0 holds nothing.")
        return np.array([[len(item), sum(map(ord, item)), *[1] * (self.dimension - 2)] for item in items], np.float32)

    @property
    def encoded(self):
        return [item for call in self.calls for item in call]


def stored(folder):
    """Content of every file that counts."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.*") if path.is_file()}


@pytest.fixture
def static(tmp_path):
    return SentenceTransformer(str(tiny_teacher(tmp_path / "static")), device="cpu", prompts={"own": "thing "})


@pytest.fixture(scope="module")
def encoder(backbone):
    return build_encoder(backbone("qwen2_vl"), device="cpu")


# As a stream


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_stream_equals_encode_and_encodes_each_distinct_input_once(prefetch):
    model = Lengths()
    found = list(encode_stream(model, iter(TEXTS), window_size=50, prefetch=prefetch, prompt="p", batch_size=4))
    assert [len(part) for part in found] == [50] * 8
    assert np.array_equal(np.concatenate(found), Lengths().encode(TEXTS, show_progress_bar=False))
    assert np.concatenate(found).dtype == np.float32
    assert sorted(model.encoded) == sorted(set(TEXTS))
    assert len(model.encoded) < len(TEXTS) * 0.6  # else there is nothing to save
    assert {tuple(options.items()) for options in model.options} == {(("prompt", "p"), ("batch_size", 4))}


def test_a_stream_of_a_real_encoder_equals_encode(encoder, tmp_path):
    for colour in COLOURS[:3]:
        picture(colour).save(tmp_path / f"{colour}.png")
    path = str(tmp_path / "red.png")
    red, asked, green = {"image": path}, {"image": path, "text": "what is it?"}, {"image": str(tmp_path / "green.png")}
    inputs = [
        "a red bus",
        red,
        path,
        asked,
        picture("green"),
        "a red bus",
        {"text": "a red bus"},
        {"text": path},
        green,
    ]
    inputs.append("a longer text on a bus")
    expected = encoder.encode(inputs)
    found = np.concatenate(list(encode_stream(encoder, iter(inputs), window_size=3)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert abs(expected[2] - expected[7]).max() > 0.01  # a path is an image, its words are a text
    np.testing.assert_allclose(expected[1], expected[2], atol=1e-5)
    corpus = encode_corpus(
        encoder, inputs, tmp_path / "corpus", window_size=4, truncate_dim=8, normalize_embeddings=True
    )
    np.testing.assert_allclose(
        corpus.rows(range(10)), encoder.encode(inputs, truncate_dim=8, normalize_embeddings=True), atol=1e-5
    )


def test_images_of_a_data_set_need_not_be_decoded(encoder, tmp_path):
    pictures = [picture(colour) for colour in COLOURS[:3]]
    rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    expected = encoder.encode(pictures)
    for inputs in (
        rows["image"],
        undecoded["image"],
        rows,
        undecoded.to_iterable_dataset(),
        rows.to_iterable_dataset()["image"],
    ):
        np.testing.assert_allclose(
            np.concatenate(list(encode_stream(encoder, inputs, window_size=2))), expected, atol=1e-5
        )


def test_the_cache_is_bounded_and_can_be_none():
    texts = ["a", "b", "c", "a"] * 2
    without = Lengths()
    list(encode_stream(without, texts, window_size=2, cache_bytes=0))
    assert without.encoded == ["a", "b", "c", "a"] * 2
    list(encode_stream(bounded := Lengths(), texts, window_size=1, cache_bytes=2 * (256 + 12)))
    assert bounded.encoded == ["a", "b", "c", "a", "b", "c", "a"]  # only the "a" after "a" is still there
    list(encode_stream(roomy := Lengths(), texts, window_size=1))
    assert roomy.encoded == ["a", "b", "c"]


@pytest.mark.parametrize("prefetch", [True, False])
def test_at_most_two_windows_are_read_ahead(prefetch):
    read = []

    def inputs():
        for number in range(100):
            read.append(number)
            yield str(number)

    ahead = []
    for number, _ in enumerate(encode_stream(Lengths(), inputs(), window_size=10, prefetch=prefetch), start=1):
        ahead.append(len(read) - number * 10)
    assert max(ahead) <= (10 if prefetch else 0)  # besides the window that is encoded
    assert len(read) == 100


def test_memory_does_not_grow_with_the_rows(tmp_path):
    def peak(rows):
        class Constant:
            def encode(self, items, **options):
                return np.ones((len(items), 64), np.float32)

        inputs = (f"{number} " * 20 for number in range(rows))
        tracemalloc.start()
        corpus = encode_corpus(
            Constant(), inputs, tmp_path / str(rows), model_name="c", window_size=500, cache_bytes=10**6
        )
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(corpus) == rows
        return high

    peak(1000)  # what is imported and made once
    few, many = peak(5000), peak(50_000)
    # what is read ahead depends on the clock; one object kept for a row would be 48 bytes or more of it
    assert many - few < 16 * 45_000, (few, many)
    assert many < 50_000 * 64 * 4 / 2  # of the embeddings themselves


def test_the_reading_thread_ends_with_the_generator():
    read = []

    def inputs():
        while True:
            read.append(None)
            if len(read) > 1000:
                time.sleep(0.002)
            yield "text"

    def reading():
        return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]

    stream = encode_stream(Lengths(), inputs(), window_size=1000)
    next(stream)
    assert reading()
    stream.close()
    assert not reading()
    assert len(read) < 1900  # it did not read its window to the end


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_error_of_the_iterable_is_raised_at_its_place(prefetch):
    def inputs():
        yield from map(str, range(25))
        raise KeyError("the source broke")

    found = []
    with pytest.raises(KeyError, match=r"the source broke") as caught:
        found.extend(encode_stream(Lengths(), inputs(), window_size=10, prefetch=prefetch))
    assert [len(part) for part in found] == [10, 10]
    assert caught.value.__notes__ == ["Raised by the inputs at row 25."]


def test_a_broken_input_is_named_by_its_row_in_the_stream(encoder, tmp_path):
    texts = [f"text {number}" for number in range(23)]
    with pytest.raises(BrokenInputError, match=r"Input 'broken' \(row 23\).*Row 23 holds nothing") as caught:
        list(encode_stream(Lengths(), [*texts, "broken", "more"], window_size=10))
    assert caught.value.row == 23
    with pytest.raises(BrokenInputError, match=r"row 7\) cannot be encoded. ValueError: Row 7 holds neither"):
        list(encode_stream(encoder, [*texts[:7], {"image": None, "text": " "}, *texts[7:]], window_size=5))
    with pytest.raises(
        BrokenInputError, match=r"row 6\).*FileNotFoundError: Row 6: 'bus.jpg' looks like an image file"
    ):
        list(encode_stream(encoder, [*texts[:6], "bus.jpg"], window_size=5))
    with pytest.raises(BrokenInputError, match=r"row 2\).*There is no file 'none.png'"):
        list(encode_stream(encoder, [*texts[:2], {"image": "none.png"}]))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(BrokenInputError, match=r"row 3\).*Cannot read an image from .*bad.png"):
        list(encode_stream(encoder, [*texts[:3], {"image": str(tmp_path / "bad.png")}], window_size=2))
    with pytest.raises(BrokenInputError, match=r"row 4\).*Cannot tell the content of a object"):
        list(encode_stream(encoder, [*texts[:4], object()], window_size=2))


def test_an_error_that_is_no_inputs_fault_passes_through():
    class Failing(Lengths):
        def encode(self, items, **options):
            if len(items) > 1:
                raise ValueError("never two at a time")
            return super().encode(items, **options)

    with pytest.raises(ValueError, match=r"never two at a time") as caught:
        list(encode_stream(Failing(), ["a", "b"]))
    assert not isinstance(caught.value, BrokenInputError)


def test_what_a_model_must_not_give():
    class Giving(Lengths):
        def __init__(self, found):
            super().__init__()
            self.found = found

        def encode(self, items, **options):
            return self.found(items)

    def infinite(items):
        return np.array([[np.inf if item == "c" else 1e5] for item in items])

    with pytest.raises(ValueError, match=r"row 2 \('c'\) is not finite in float32.*load it in bfloat16"):
        list(encode_stream(Giving(infinite), ["a", "b", "c"], window_size=2))
    with pytest.raises(ValueError, match=r"shape \(2,\) for 3 inputs.*\(3, D\)"):
        list(encode_stream(Giving(lambda items: np.ones(2)), ["a", "b", "c"]))
    with pytest.raises(TypeError, match=r"`precision` is not for streams.*quantize_embeddings"):
        encode_stream(Lengths(), ["a"], precision="int8")
    with pytest.raises(TypeError, match=r"`inputs` is a str.*into a list"):
        encode_stream(Lengths(), "a cat")
    with pytest.raises(ValueError, match=r"`window_size=0`.*at least one"):
        encode_stream(Lengths(), ["a"], window_size=0)


# Into files


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_a_corpus_equals_encode_and_is_read_back(output_format, dtype, static, tmp_path):
    expected = static.encode(TEXTS, prompt_name="own").astype(dtype)
    pairs = ((f"doc-{number}", text) for number, text in enumerate(TEXTS))
    options = {
        "output_format": output_format,
        "dtype": dtype,
        "with_ids": True,
        "prompt_name": "own",
        "window_size": 64,
    }
    made = encode_corpus(static, pairs, tmp_path / "corpus", **options)
    corpus = load_corpus(tmp_path / "corpus")
    for read in (made, corpus):
        assert len(read) == 400
        assert read.complete
        np.testing.assert_allclose(
            np.concatenate(list(read.parts())), expected, atol=1e-3 if dtype == "float16" else 1e-6
        )
        assert all(part.dtype == dtype for part in read.parts())
    whole = np.concatenate(list(corpus.parts()))
    numbers = [399, 0, 64, 63, 0]
    assert np.array_equal(corpus.rows(numbers), whole[numbers])
    assert corpus.rows([]).shape == (0, 12)
    assert list(corpus.ids()) == [f"doc-{number}" for number in range(400)]
    assert repr(corpus).endswith(f"400 rows, 12 dimensions, {dtype})")
    with pytest.raises(IndexError, match=r"0 to 399"):
        corpus.rows([400])
    with pytest.raises(IndexError, match=r"0 to 399"):
        corpus.rows([-1])
    manifest = json.loads((tmp_path / "corpus" / ".manifest.json").read_text())
    assert manifest["prompt"] == "thing "
    assert (manifest["rows"], manifest["dimension"], manifest["complete"]) == (400, 12, True)
    assert [path.name for path in corpus.files] == [f"part-{number:06d}.{output_format}" for number in range(7)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_is_plain_to_others(dtype, static, tmp_path):
    corpus = encode_corpus(
        static, list(enumerate(TEXTS)), tmp_path / "corpus", with_ids=True, window_size=64, dtype=dtype
    )
    whole = np.concatenate(list(corpus.parts()))
    table = pyarrow.dataset.dataset(tmp_path / "corpus").to_table()
    assert table.column_names == ["row", "id", "embedding", "fingerprint"]
    assert table["row"].to_pylist() == table["id"].to_pylist() == list(range(400))
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), whole)
    assert pq.read_table(tmp_path / "corpus").num_rows == 400
    for source in ({"data_files": f"{tmp_path}/corpus/*.parquet"}, {"data_dir": f"{tmp_path}/corpus"}):
        rows = datasets.load_dataset("parquet", **source, split="train", cache_dir=str(tmp_path / "cache"))
        assert np.array_equal(rows.with_format("numpy")["embedding"][:], whole)
        assert rows["row"][:] == list(range(400))


def test_npy_is_plain_and_never_pickled(static, tmp_path):
    corpus = encode_corpus(static, list(enumerate(TEXTS)), tmp_path, with_ids=True, window_size=64, output_format="npy")
    files = list(tmp_path.rglob("*.npy"))
    assert len(files) == 3 * 7
    loaded = [np.load(path, mmap_mode="r", allow_pickle=False) for path in files]
    assert all(isinstance(array, np.memmap) for array in loaded)
    assert all(isinstance(part, np.memmap) for part in corpus.parts())  # nothing is read before it is used
    assert list(corpus.ids()) == list(range(400))
    np.save(tmp_path / "part-000000.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"damaged .*Python objects"):
        corpus.rows([0])


@pytest.mark.parametrize("output_format", FORMATS)
def test_what_is_there_is_not_encoded_again(output_format, tmp_path, caplog):
    options = {"model_name": "m", "window_size": 32, "output_format": output_format}
    first = Lengths()
    encode_corpus(first, TEXTS, tmp_path / "a", **options)
    assert sorted(first.encoded) == sorted(set(TEXTS))
    before = stored(tmp_path / "a")
    with caplog.at_level(logging.INFO, "unime_st"):
        encode_corpus(again := Lengths(), iter(TEXTS), tmp_path / "a", batch_size=2, show_progress_bar=False, **options)
    assert again.encoded == []
    assert stored(tmp_path / "a") == before
    assert "400 rows (13 parts) were in" in caplog.text
    (tmp_path / "a" / f"part-000005.{output_format}").unlink()
    encode_corpus(again := Lengths(), TEXTS, tmp_path / "a", **options)
    assert set(again.encoded) < set(TEXTS[5 * 32 : 6 * 32])  # what earlier parts hold is taken from them
    assert stored(tmp_path / "a") == before


def test_a_corpus_with_parts_deleted_is_not_complete_until_they_are_back(tmp_path):
    texts = [f"text {number}" for number in range(20)]
    options = {"model_name": "m", "window_size": 4}
    encode_corpus(Lengths(), texts, tmp_path, **options)
    for number in (1, 3):
        (tmp_path / f"part-{number:06d}.parquet").unlink()

    def stops():
        yield from texts[:9]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        encode_corpus(Lengths(), stops(), tmp_path, **options)
    with pytest.raises(ValueError, match=r"not complete: 4 parts of 4 rows"):
        load_corpus(tmp_path)
    assert encode_corpus(model := Lengths(), texts, tmp_path, **options).complete
    assert model.encoded == texts[12:16]
    assert len(load_corpus(tmp_path)) == 20


def test_memory_of_earlier_parts_is_as_if_never_stopped(tmp_path):
    """A cache too small for all: what is encoded after a stop is what would have been."""
    options = {"model_name": "m", "window_size": 16, "cache_bytes": 40 * (256 + 12)}
    encode_corpus(whole := Lengths(), TEXTS, tmp_path / "whole", **options)
    assert len(set(TEXTS)) < len(whole.encoded) < len(TEXTS)

    def stops(texts):
        yield from texts[:200]
        raise InterruptedError

    model = Lengths()
    with pytest.raises(InterruptedError):
        encode_corpus(model, stops(TEXTS), tmp_path / "stopped", **options)
    with pytest.raises(ValueError, match=r"not complete: 12 parts of 16 rows.*Call `encode_corpus` again"):
        load_corpus(tmp_path / "stopped")
    encode_corpus(model, TEXTS, tmp_path / "stopped", **options)
    assert model.calls == whole.calls
    assert stored(tmp_path / "stopped") == stored(tmp_path / "whole")


def test_other_settings_are_refused_by_name(static, tmp_path, backbone):
    folder = tmp_path / "corpus"

    def encode(model=static, inputs=TEXTS[:20], **changes):
        return encode_corpus(model, inputs, folder, **{"window_size": 8, "prompt_name": "own"} | changes)

    encode()
    before = stored(folder)
    encode(prompt_name=None, prompt="thing ")  # the same prompt
    advice = "Go on with the ones it has, or give another `output_dir`"
    for changes, named in [
        ({"window_size": 9}, "`window_size` was 8 and is 9 now"),
        ({"prompt_name": None}, "`prompt` was 'thing ' and is None now"),
        ({"prompt_name": None, "prompt": ""}, "`prompt` was 'thing ' and is '' now"),
        ({"truncate_dim": 4}, "`options` was {} and is {'truncate_dim': 4} now"),
        ({"normalize_embeddings": True}, "`options` was {} and is {'normalize_embeddings': True} now"),
        ({"output_format": "npy"}, "`output_format` was 'parquet' and is 'npy' now"),
        ({"dtype": "float16"}, "`dtype` was 'float32' and is 'float16' now"),
        ({"with_ids": True}, "`with_ids` was False and is True now"),
    ]:
        with pytest.raises(ValueError, match=r"begun with other settings") as caught:
            encode(**changes)
        assert named in str(caught.value)
        assert advice in str(caught.value)
    with torch.no_grad():
        next(static.parameters()).mul_(2)
    with pytest.raises(ValueError, match=r"`model` was '\w{64}' and is '\w{64}' now"):
        encode()
    assert stored(folder) == before


@pytest.mark.parametrize("output_format", FORMATS)
def test_other_inputs_are_refused_by_row(output_format, tmp_path):
    texts = [f"text {number}" for number in range(20)]
    folder = tmp_path / "corpus"

    def encode(inputs):
        model = Lengths()
        encode_corpus(model, inputs, folder, window_size=8, model_name="m", output_format=output_format)
        return model

    encode(texts)
    before = stored(folder)
    part = f"part-000001.{output_format}"
    with pytest.raises(ValueError, match=rf"Row 10 is 'other', but .*{part} was made with another.*delete {part}"):
        encode([*texts[:10], "other", *texts[11:]])
    with pytest.raises(ValueError, match=r"Row 18 is missing, but .* with another input there"):
        encode(texts[:18])
    with pytest.raises(
        ValueError, match=r"inputs end after 16 rows, but .*part-000002.* of more.*delete the parts from"
    ):
        encode(texts[:16])
    assert stored(folder) == before
    assert encode([*texts, "more"]).encoded == [*texts[16:], "more"]
    assert len(load_corpus(folder)) == 21


def test_other_ids_are_refused(tmp_path):
    options = {"model_name": "m", "window_size": 2, "with_ids": True}
    encode_corpus(Lengths(), [("a", "x"), ("b", "y"), ("c", "z")], tmp_path, **options)
    with pytest.raises(ValueError, match=r"Row 1 is \('d', 'y'\), but .*part-000000.parquet was made with another"):
        encode_corpus(Lengths(), [("a", "x"), ("d", "y"), ("c", "z")], tmp_path, **options)
    with pytest.raises(TypeError, match=r"Row 1 has the id 2, those before 'a'. Make all strings"):
        encode_corpus(Lengths(), [("a", "x"), (2, "y")], tmp_path / "mixed", **options)
    with pytest.raises(TypeError, match=r"Row 0 is 'text', but with `with_ids=True` each input is a pair"):
        encode_corpus(Lengths(), ["text"], tmp_path / "none", **options)
    with pytest.raises(ValueError, match=r"has no ids.*with_ids=True"):
        list(encode_corpus(Lengths(), ["x"], tmp_path / "without", model_name="m").ids())
    with pytest.raises(TypeError, match=r"Row 2 has the id 'c', those before 1"):  # over two windows
        encode_corpus(Lengths(), [(1, "x"), (2, "y"), ("c", "z")], tmp_path / "later", **options)


@pytest.mark.parametrize("output_format", FORMATS)
def test_ids_that_a_file_cannot_hold_are_refused_before_encoding(output_format, tmp_path):
    options = {"output_format": output_format, "with_ids": True, "model_name": "m"}
    for row, wrong in enumerate((2**63, -(2**63) - 1, "a\0", "\ud800")):
        first = "ok" if isinstance(wrong, str) else 2**63 - 1
        model = Lengths()
        with pytest.raises(ValueError, match=r"Row 1 has the id .* as strings"):
            encode_corpus(model, [(first, "a"), (wrong, "b")], tmp_path / str(row), **options)
        assert not model.calls
    corpus = encode_corpus(Lengths(), [(-(2**63), "a"), (2**63 - 1, "b")], tmp_path / "fits", **options)
    assert list(corpus.ids()) == [-(2**63), 2**63 - 1]


def test_a_corpus_without_parts_can_begin_with_other_settings(tmp_path):
    with pytest.raises(ValueError, match="nothing to encode"):
        encode_corpus(Lengths(), [], tmp_path / "a", model_name="m")
    assert len(encode_corpus(Lengths(), ["x"], tmp_path / "a", model_name="m", dtype="float16")) == 1


def test_a_source_that_ended_is_not_asked_again():
    def jumping(number):
        return next(iter([])) if number == 3 else "x" * number  # StopIteration at 3, then it would go on

    assert [len(part) for part in encode_stream(Lengths(), map(jumping, range(6)), window_size=2)] == [2, 1]


def test_a_damaged_page_is_a_damaged_file(tmp_path):
    options = {"model_name": "m", "window_size": 4000}
    texts = [f"text {number}" for number in range(4000)]
    encode_corpus(Lengths(), texts, tmp_path / "a", **options)
    path = tmp_path / "a" / "part-000000.parquet"
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content) // 3 + 40):
        content[place] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?s)is damaged .* Delete"):  # noticed by its checksum
        load_corpus(tmp_path / "a").rows([0])


def test_folders_and_files_that_will_not_do(tmp_path, static):
    options = {"model_name": "m", "window_size": 2}
    with pytest.raises(FileNotFoundError, match=r"holds no encoded corpus \(.manifest.json is missing\)"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"`inputs` is empty"):
        encode_corpus(Lengths(), iter([]), tmp_path / "empty", **options)
    with pytest.raises(TypeError, match=r"A Lengths has no weights to know it by. Give `model_name`"):
        encode_corpus(Lengths(), ["a"], tmp_path / "anonymous")
    with pytest.raises(ValueError, match=r"no prompt named 'p'; it has .*own.* Give its text as `prompt`"):
        encode_corpus(static, ["a"], tmp_path / "prompt", prompt_name="p")
    with pytest.raises(ValueError, match=r"not both"):
        encode_corpus(static, ["a"], tmp_path / "prompt", prompt_name="own", prompt="a")
    with pytest.raises(ValueError, match=r"`output_format='csv'`.*parquet and npy"):
        encode_corpus(Lengths(), ["a"], tmp_path / "csv", output_format="csv", **options)
    assert not list(tmp_path.glob("csv*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "part-000000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds part files but no .manifest.json.*Give another folder"):
        encode_corpus(Lengths(), ["a"], tmp_path / "other", **options)

    for output_format in FORMATS:
        folder = tmp_path / output_format
        encode_corpus(Lengths(), ["a", "b", "c"], folder, output_format=output_format, **options)
        part = folder / f"part-000000.{output_format}"
        whole = part.read_bytes()
        part.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"(?s){part.name} is damaged.*Delete .*{part.name} and call"):
            load_corpus(folder).rows([0])
        encode_corpus(Lengths(), ["a", "b", "c"], folder, output_format=output_format, **options)
        assert part.read_bytes() == whole
    (tmp_path / "npy" / "part-000001.npy").unlink()
    with pytest.raises(ValueError, match=r"have 5 dimensions, those before 3\. Two models have used one `model_name`"):
        encode_corpus(Lengths(5), ["a", "b", "c"], tmp_path / "npy", output_format="npy", **options)
    manifest = tmp_path / "npy" / ".manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(ValueError, match=r"format version 3.*reads 2.*Use the version that wrote it"):
        load_corpus(tmp_path / "npy")
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r".manifest.json is damaged .*delete .* encode the corpus anew"):
        load_corpus(tmp_path / "npy")


def test_a_broken_input_or_a_full_disk_loses_no_part(tmp_path, monkeypatch):
    texts = [f"text {number}" for number in range(20)]
    options = {"model_name": "m", "window_size": 4}
    with pytest.raises(BrokenInputError, match=r"row 13"):
        encode_corpus(Lengths(), [*texts[:13], "broken", *texts[13:]], tmp_path / "broken", **options)
    encode_corpus(mended := Lengths(), texts, tmp_path / "broken", **options)
    assert mended.encoded == texts[12:]

    write = unime_st.data.corpus.parts.write_atomically

    def full(path, content):
        if path.name == "part-000003.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(unime_st.data.corpus.parts, "write_atomically", full)
    with pytest.raises(OSError, match=r"is full at row 12; the parts before are whole. Free some space and call again"):
        encode_corpus(Lengths(), texts, tmp_path / "full", **options)
    monkeypatch.undo()
    encode_corpus(freed := Lengths(), texts, tmp_path / "full", **options)
    assert freed.encoded == texts[12:]


def test_overflow_of_float16_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 .* is not finite in float16.*keep float32"):
        encode_corpus(Lengths(), ["a", "a" * 1000], tmp_path, model_name="m", dtype="float16")


# Killed, and shared by processes


class Noting(SentenceTransformer):
    """Notes what it is about to embed."""

    folder = None

    def encode(self, texts, **options):
        note(self.folder, texts)
        return super().encode(texts, **options)


def fill(folder, log=None):
    torch.set_num_threads(1)
    model = Noting(str(folder.parent / "static"), device="cpu")
    model.folder = log or folder
    options = {"window_size": 8, "batch_size": 4, "output_format": folder.suffix[1:]}
    return encode_corpus(model, iter(TEXTS), folder / "corpus", **options)


def written(folder):
    """Numbers of the parts on disk, and whether something half-written has a part's name."""
    parts = sorted(Path(folder).glob("corpus/part-*"))
    for path in parts:
        assert len(np.load(path) if path.suffix == ".npy" else pq.read_table(path)) == 8
    return [int(path.stem[-6:]) for path in parts]


@pytest.mark.slow
@pytest.mark.parametrize("output_format", FORMATS)
def test_a_run_killed_anywhere_goes_on_and_encodes_no_part_twice(output_format, tmp_path):
    tiny_teacher(tmp_path / "static")
    whole, killed = tmp_path / f"whole.{output_format}", tmp_path / f"killed.{output_format}"
    whole.mkdir()
    fill(whole)
    order = notes(whole)
    assert sorted(order) == sorted(set(TEXTS))
    seen = run_with_kills(fill, written, killed, kills=6, seed=1, most=30)
    assert any(parts for _, parts in seen)
    log = notes(killed)
    for noted, parts in seen:
        assert parts == list(range(len(parts)))
        done = {text for part in parts for text in TEXTS[part * 8 : part * 8 + 8]}
        assert not done & set(log[noted:]), "what was on disk was encoded again"
    assert len(log) <= len(order) + 6 * 8  # a kill costs the window in hand, at most
    assert stored(killed / "corpus") == stored(whole / "corpus")  # to the last byte, no leftovers
    before = len(log)
    fill(killed)
    assert len(notes(killed)) == before


def share(rank, folder):
    log = folder.parent / f"rank{rank}"
    log.mkdir()
    corpus = fill(folder, log)
    return {"rows": torch.tensor(len(corpus)), "complete": torch.tensor(corpus.complete)}


@pytest.mark.slow
def test_two_processes_share_the_windows(tmp_path):
    model = SentenceTransformer(str(tiny_teacher(tmp_path / "static")), device="cpu")
    (tmp_path / "shared.npy").mkdir()
    results = run_two(share, tmp_path, tmp_path / "shared.npy")
    assert [int(result["rows"]) for result in results] == [400, 400]
    assert any(result["complete"] for result in results)
    corpus = load_corpus(tmp_path / "shared.npy" / "corpus")
    np.testing.assert_allclose(corpus.rows(range(400)), model.encode(TEXTS), atol=1e-6)
    for rank in range(2):
        own = {text for window in range(rank, 50, 2) for text in TEXTS[window * 8 : window * 8 + 8]}
        assert sorted(notes(tmp_path / f"rank{rank}")) == sorted(own)  # each once


@pytest.mark.parametrize("as_list", [True, False])
def test_torchruns_variables_say_which_windows(as_list, tmp_path, monkeypatch):
    texts = [f"text {number}" for number in range(11)]

    class Watched(list):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    def encode(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        model = Lengths()
        inputs = Watched(texts) if as_list else iter(texts)
        return model, encode_corpus(model, inputs, tmp_path, model_name="m", window_size=3)

    read = []
    first, part = encode(0)
    assert first.calls == [texts[0:3], texts[6:9]]
    assert read == ([0, 1, 2, 6, 7, 8] if as_list else [])  # of others' windows nothing is read
    assert not part.complete
    with pytest.raises(FileNotFoundError, match=r"part-000001.parquet: .*another process has yet to write it. Call"):
        part.rows([4])
    assert len(part) == 11
    assert part.rows([7]).tolist() == Lengths().encode(texts[7:8], show_progress_bar=False).tolist()
    with pytest.raises(ValueError, match=r"not complete: 2 parts of 3 rows"):
        load_corpus(tmp_path)
    second, corpus = encode(1)
    assert second.calls == [texts[3:6], texts[9:11]]
    assert corpus.complete
    assert load_corpus(tmp_path).rows(range(11)).tolist() == Lengths().encode(texts, show_progress_bar=False).tolist()
