import errno
import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader

from unime_st.data import teacher_embeddings, with_teacher_labels
from unime_st.embedding.store import EmbeddingStore, key_array


class Counting:
    """A teacher that remembers what it was asked."""

    def __init__(self, dimension=3):
        self.dimension, self.asked, self.prompts = dimension, [], set()

    def encode(self, sentences, **options):
        self.asked += sentences
        self.prompts.add(options.get("prompt"))
        offset = len(options.get("prompt") or "")
        return np.array(
            [[float(text[1:]) + offset, 1.0, -1.0][: self.dimension] for text in sentences], dtype=np.float16
        )


def texts_of(*numbers):
    return [f"t{number}" for number in numbers]


def embed(teacher, texts, folder, **options):
    return teacher_embeddings(teacher, texts, folder, **{"teacher_name": "counting", "shard_size": 4, **options})


def test_each_distinct_text_is_embedded_once_ever(tmp_path):
    teacher = Counting()
    numbers = np.random.default_rng(0).integers(0, 30, 200)
    found = embed(teacher, texts_of(*numbers), tmp_path)
    assert found.dtype == np.float32
    assert np.array_equal(found[:, 0], numbers)
    assert len(teacher.asked) == len(set(teacher.asked)) == len(set(numbers.tolist()))

    teacher = Counting()
    again = embed(teacher, texts_of(3, 99, 3, 98, 0), tmp_path, shard_size=1)
    assert again[:, 0].tolist() == [3, 99, 3, 98, 0]
    assert set(teacher.asked) <= {"t99", "t98", "t3", "t0"} - set(texts_of(*numbers))


def test_prompt_and_teacher_have_their_own_embeddings(tmp_path):
    teacher = Counting()
    plain = embed(teacher, texts_of(1, 2), tmp_path)
    prompted = embed(teacher, texts_of(1, 2), tmp_path, prompt="abc")
    assert (prompted - plain)[:, 0].tolist() == [3, 3]
    embed(teacher, texts_of(1, 2), tmp_path, teacher_name="another")
    assert teacher.asked == texts_of(1, 2) * 3
    assert teacher.prompts == {None, "abc"}


def static_teacher(seed):
    torch.manual_seed(seed)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")


def test_a_sentence_transformer_is_known_by_its_weights(tmp_path, monkeypatch):
    teacher = static_teacher(0)
    found = teacher_embeddings(teacher, ["a", "b", "a b"], tmp_path)
    assert np.allclose(found, teacher.encode(["a", "b", "a b"]))
    other = static_teacher(1)
    assert np.allclose(teacher_embeddings(other, ["a"], tmp_path), other.encode(["a"]))
    copy = static_teacher(0)
    monkeypatch.setattr(copy, "encode", None)  # not needed any more
    assert np.array_equal(teacher_embeddings(copy, ["b", "a"], tmp_path), found[[1, 0]])
    with pytest.raises(TypeError, match=r"A Counting has no weights to know it by. Give `teacher_name`"):
        teacher_embeddings(Counting(), ["t1"], tmp_path)


def test_a_teacher_is_known_by_its_settings_too(tmp_path):
    """The same weights pooled otherwise, or under another prompt of their own, are another teacher."""
    words = static_teacher(0)[0]
    teachers = [
        SentenceTransformer(modules=[words, *more], device="cpu", **options)
        for more, options in (
            ([], {}),
            ([Dense(4, 4, bias=False, activation_function=torch.nn.Identity(), init_weight=torch.eye(4))], {}),
            ([Dense(4, 4, bias=False, activation_function=torch.nn.Tanh(), init_weight=torch.eye(4))], {}),
            ([], {"prompts": {"query": "b "}, "default_prompt_name": "query"}),
        )
    ]
    for teacher in teachers:
        np.testing.assert_allclose(teacher_embeddings(teacher, ["a"], tmp_path), teacher.encode(["a"]), atol=1e-6)


class Broken(Counting):
    def encode(self, sentences, **options):
        found = super().encode(sentences).astype(np.float32)
        found[[text == "t5" for text in sentences]] = np.nan
        return found


def test_an_embedding_that_is_not_finite_names_its_row_and_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match=r"embedding of row 3 \('t5'\) is not finite.*remove the row"):
        embed(Broken(), texts_of(0, 1, 1, 5, 2, 3, 7), tmp_path, shard_size=2)
    teacher = Counting()
    embed(teacher, texts_of(0, 1, 5, 2), tmp_path)
    assert teacher.asked == texts_of(5, 2)  # the shard before was kept, the broken one not
    assert not list(tmp_path.rglob("*.partial"))


def test_wrong_rows_are_refused(tmp_path):
    class Short(Counting):
        def encode(self, sentences, **options):
            return super().encode(sentences)[1:]

    with pytest.raises(ValueError, match=r"shape \(1, 3\) for 2 texts, expected \(2, D\)"):
        embed(Short(), texts_of(1, 2), tmp_path)
    with pytest.raises(TypeError, match="Row 1 is a NoneType"):
        embed(Counting(), ["t1", None], tmp_path)
    with pytest.raises(ValueError, match="no texts"):
        embed(Counting(), [], tmp_path)
    with pytest.raises(ValueError, match="at least one embedding"):
        embed(Counting(), ["t1"], tmp_path, shard_size=0)
    embed(Counting(), ["t1"], tmp_path)
    with pytest.raises(ValueError, match=r"expected \(1, 3\).*another `teacher_name`"):
        embed(Counting(dimension=2), ["t2"], tmp_path)
    shard = next(tmp_path.rglob("shard-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"shard-.*is damaged.*Delete it"):
        embed(Counting(), ["t1"], tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_of_one_column_reach_the_collator(tmp_path, workers):
    texts = texts_of(4, 7, 4, 1, 0)
    dataset = with_teacher_labels(texts, Counting(), tmp_path, teacher_name="counting", shard_size=2)
    collator = BaseDataCollator(lambda inputs, **_: {"input_ids": torch.tensor([int(text[1:]) for text in inputs])})
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=workers))
    assert [batch["label"].shape for batch in batches] == [(2, 3), (2, 3), (1, 3)]
    for batch in batches:
        assert torch.equal(batch["label"][:, 0], batch["text_input_ids"].float())
    assert pickle.loads(pickle.dumps(dataset))[1]["label"].tolist() == [7, 1, -1]


def test_labels_of_several_columns_keep_their_order(tmp_path):
    pairs = Dataset.from_dict({"a": texts_of(1, 2), "b": texts_of(3, 1)})
    dataset = with_teacher_labels(pairs, Counting(), tmp_path, teacher_name="counting")
    assert dataset.column_names == ["a", "b", "label"]
    assert [row["label"][:, 0].tolist() for row in dataset] == [[1, 3], [2, 1]]
    assert dataset[:2]["label"][0].shape == (2, 3)


def test_embeddings_may_be_given(tmp_path):
    texts = texts_of(5, 3, 5)
    dataset = with_teacher_labels(texts, embed(Counting(), texts, tmp_path))
    assert dataset[0]["label"].tolist() == [5, 1, -1]
    assert dataset[0]["label"].dtype == torch.float32
    assert dataset[0]["text"] == "t5"
    pairs = Dataset.from_dict({"a": ["x"], "b": ["y"]})
    assert with_teacher_labels(pairs, np.ones((1, 2, 4)))[0]["label"].shape == (2, 4)
    with pytest.raises(ValueError, match=r"shape \(1, 4\), but 1 rows of 2 text column\(s\) need \(1, 2, D\)"):
        with_teacher_labels(pairs, np.ones((1, 4)))
    with pytest.raises(ValueError, match="`cache_dir` is needed"):
        with_teacher_labels(texts, Counting())
    with pytest.raises(ValueError, match="column 'score'"):
        with_teacher_labels(Dataset.from_dict({"a": ["x"], "score": [1]}), np.ones((1, 4)))


def test_two_writers_share_a_folder(tmp_path):
    first, second = EmbeddingStore(tmp_path), EmbeddingStore(tmp_path)
    keys = key_array(bytes([number]) * 16 for number in range(4))  # one of them all zeros
    first.add(keys[:2], np.array([[1.0], [2.0]]))
    assert second.find(keys).tolist() == [-1] * 4
    second.add(keys[1:3], np.array([[2.0], [3.0]]))
    store = EmbeddingStore(tmp_path)
    assert store.rows(store.find(keys[:3])).tolist() == [[1], [2], [3]]
    assert store.find(keys[3:]).tolist() == [-1]
    assert first.refresh()
    assert not first.refresh()
    assert len(first) == len(store) == 4
    assert first.rows(first.find(keys[:3])).tolist() == [[1], [2], [3]]


def test_lookups_agree_with_a_dictionary_and_many_files_stay_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("unime_st.embedding.store._OPEN_FILES", 3)
    monkeypatch.setattr("unime_st.embedding.store._FILE_BYTES", 100)  # 4 rows a file
    generator = np.random.default_rng(0)
    every = [generator.bytes(15) + bytes([number % 2]) for number in range(200)]
    expected = {key: generator.normal(size=2).astype(np.float32) for key in every[:150]}
    store = EmbeddingStore(tmp_path)
    for start in range(0, 150, 30):
        chunk = every[start : start + 30]
        store.add(key_array(chunk), np.array([expected[key] for key in chunk]))
    assert len(list(tmp_path.glob("*.npy"))) == 5 * 8
    asked = [every[place] for place in generator.integers(0, 200, 500)]
    numbers = store.find(key_array(asked))
    assert ((numbers >= 0) == [key in expected for key in asked]).all()
    there = [key for key in asked if key in expected]
    assert len(there) > 100
    assert np.array_equal(store.rows(numbers[numbers >= 0]), [expected[key] for key in there])
    assert len(store._open) == 3
    assert store.rows(np.empty(0, dtype=np.int64)).shape == (0, 2)


def flipped(path, place, bit=0):
    """The file with one bit changed; returns what puts it right again."""
    good = path.read_bytes()
    path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
    return lambda: path.write_bytes(good)


def test_no_flipped_or_missing_byte_of_the_cache_is_served(tmp_path):
    texts = texts_of(*range(9))
    expected = embed(Counting(), texts, tmp_path, shard_size=9)
    (shard,) = tmp_path.rglob("shard-*.npy")
    size = shard.stat().st_size
    refused = 0
    for place in range(size):
        restore = flipped(shard, place, place % 8)
        try:
            found = embed(Counting(), texts, tmp_path)
        except ValueError as error:
            refused += f"{shard} is damaged" in str(error) and "Delete it; what it held is embedded" in str(error)
        else:
            assert np.array_equal(found, expected), place
        restore()
    assert refused >= size - 4  # but for what numpy's header says and nothing goes by
    for length in (0, 1, 100, size - 33, size - 1):
        good = shard.read_bytes()
        shard.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"shard-.* is damaged"):
            embed(Counting(), texts, tmp_path)
        shard.write_bytes(good)
    assert np.array_equal(embed(Counting(), texts, tmp_path), expected)


@pytest.mark.parametrize(
    "dtype",
    [
        [("name keys", "S16", (2,)), ("embeddings", "<f4", (2, 3)), ("checksum", "S32")],
        [("keys", "S16", (2,)), ("embeddings", "<f8", (2, 3)), ("checksum", "S32")],
        [("keys", "S16", (2,)), ("embeddings", "<f4", (3, 3)), ("checksum", "S32")],
        [("keys", "S16", (2,)), ("embeddings", "<f4", (2,)), ("checksum", "S32")],
        "<f4",
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, dtype):
    np.save(tmp_path / "shard-000000-0.npy", np.zeros(1, dtype=dtype))
    with pytest.raises(ValueError, match=r"shard-000000-0\.npy is damaged .*Delete it"):
        EmbeddingStore(tmp_path)


def test_files_of_before_there_were_checksums_are_read_and_told_of(tmp_path, caplog):
    keys = key_array([b"a" * 16, b"b" * 16])
    record = np.zeros(1, dtype=[("keys", "S16", (2,)), ("embeddings", "<f4", (2, 3))])
    record["keys"][0], record["embeddings"][0] = keys, np.arange(6).reshape(2, 3)
    np.save(tmp_path / "shard-000000-0.npy", record)
    store = EmbeddingStore(tmp_path)
    assert store.rows(store.find(keys)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert f"1 files of {tmp_path} are of an earlier version, without checksums" in caplog.text
    caplog.clear()
    store.add(key_array([b"c" * 16]), np.ones((1, 3)))
    store.refresh()
    assert not caplog.text


def test_workers_do_not_compare_again(tmp_path, monkeypatch):
    dataset = with_teacher_labels(texts_of(1, 2), Counting(), tmp_path, teacher_name="counting")
    copy = pickle.loads(pickle.dumps(dataset))
    monkeypatch.setattr("unime_st.embedding.store.checksum", None)
    assert [row["label"][0] for row in copy] == [1, 2]


def test_teachers_of_before_are_told_of_and_not_found(tmp_path, caplog):
    for name, teacher in (("old", "0" * 32), ("older", "0" * 64), ("named", "bge")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "identity.json").write_text(json.dumps({"teacher": teacher, "prompt": ""}))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "identity.json").write_text('["')
    teacher_embeddings(static_teacher(0), ["a"], tmp_path)
    assert "an earlier version knew by less of their tokenizers, in old, older: they are not used" in caplog.text
    caplog.clear()
    teacher_embeddings(static_teacher(0), ["a"], tmp_path)
    assert not caplog.text


def test_a_teacher_is_known_by_its_tokenizer(tmp_path):
    found = [teacher_embeddings(static_teacher(0), ["A"], tmp_path)]
    lowering = static_teacher(0)
    lowering[0].tokenizer.normalizer = Lowercase()
    found.append(teacher_embeddings(lowering, ["A"], tmp_path))
    np.testing.assert_allclose(found[1], lowering.encode(["A"]))
    assert abs(found[0] - found[1]).max() > 0.01


class Zero(Counting):
    def encode(self, sentences, **options):
        return super().encode(sentences) * np.array([[text != "t5"] for text in sentences])


def test_silent_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"embedding of row 2 \('t5'\) is zero.*Remove the row"):
        embed(Zero(), texts_of(1, 2, 5), tmp_path)
    for one in ("abc", b"abc"):
        with pytest.raises(TypeError, match=r"`texts` is one text .*Give a list"):
            embed(Counting(), one, tmp_path)
    with pytest.raises(TypeError, match="`dataset` is one text"):
        with_teacher_labels("abc", Counting(), tmp_path, teacher_name="t")
    with pytest.raises(ValueError, match="`batch_size=0`, but it must be at least 1"):
        embed(Counting(), ["t1"], tmp_path, batch_size=0)
    with pytest.raises(TypeError, match=r"`shard_size=2\.0`, but it must be a whole number"):
        embed(Counting(), ["t1"], tmp_path, shard_size=2.0)
    for patience in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"`patience={patience}`, but it must be a number above 0"):
            embed(Counting(), ["t1"], tmp_path, patience=patience)
    with pytest.raises(TypeError, match="teacher is a list, which has no `encode`"):
        with_teacher_labels(["a"], [[1.0]], tmp_path)


@pytest.mark.parametrize(
    ("row", "wrong"),
    [([np.nan, 1.0], "not finite"), ([np.inf, 1.0], "not finite"), ([1e300, 1.0], "not finite"), ([0.0, 0.0], "zero")],
)
def test_given_labels_that_teach_nothing_are_refused_by_row(row, wrong):
    with pytest.raises(ValueError, match=rf"embedding of row 1 is {wrong}.*or remove it"):
        with_teacher_labels(["a", "b", "c"], np.array([[1.0, 2.0], row, [3.0, 4.0]]))
    pairs = Dataset.from_dict({"a": ["x", "y"], "b": ["x", "y"]})
    with pytest.raises(ValueError, match=rf"embedding of row 1 is {wrong}"):
        with_teacher_labels(pairs, np.array([[[1.0, 2.0]] * 2, [[1.0, 2.0], row]]))


@pytest.mark.parametrize("labels", [np.array([["x"]]), np.array([[1j]]), np.zeros((1, 0)), np.array([[None]])])
def test_given_labels_that_are_no_numbers_are_refused(labels):
    with pytest.raises(ValueError, match="must be real numbers"):
        with_teacher_labels(["a"], labels)


def test_a_full_cache_on_a_disk_that_is_not_to_be_written_is_served(tmp_path, monkeypatch):
    texts = texts_of(1, 2, 3)
    expected = embed(Counting(), texts, tmp_path)
    (shard,) = tmp_path.rglob("shard-*.npy")

    def refuses(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("data.teacher.identity.write_atomically", "embedding.store.write_atomically"):
        monkeypatch.setattr(f"unime_st.{name}", refuses)
    monkeypatch.setattr("unime_st.embedding.store.remove_leftovers", refuses)
    assert np.array_equal(embed(Counting(), texts, tmp_path), expected)
    assert shard.exists()
