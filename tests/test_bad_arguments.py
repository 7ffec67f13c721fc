"""What an argument cannot be is refused with its name, before any work is done."""

import inspect
import math

import numpy as np
import pytest
from datasets import Dataset

from tiny import tiny_backbone, tiny_encoder
from unime_st import build_encoder, load_encoder
from unime_st.data import encode_corpus, encode_stream, mine_hard_negatives, teacher_embeddings, with_teacher_labels
from unime_st.evaluation import EmbeddingCache, compare
from unime_st.losses import LossMetricsCallback
from unime_st.samplers import FalseNegativeAwareBatchSampler


class Lengths:
    """Stands for a model."""

    def encode(self, items, **_):
        return np.array([[len(item), 1.0] for item in items], np.float32)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments") / "backbone"
    tiny_backbone("qwen2_vl", folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_encoder("qwen2_vl", tmp_path_factory.mktemp("arguments") / "model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_template", 5),
        ("prompt_template", ["llava_next"]),
        ("peft_config", "lora"),
        ("peft_config", 5),
        ("peft_config", {"r": 8}),
        ("torch_dtype", "float3"),
        ("torch_dtype", "Tensor"),
        ("torch_dtype", 16),
        ("prompts", "a"),
        ("prompts", 5),
        ("prompts", ["a"]),
        ("device", "gpu"),
    ],
)
def test_of_build_encoder(name, value, backbone):
    with pytest.raises((TypeError, ValueError), match=f"`{name}"):
        build_encoder(backbone, **{name: value})


@pytest.mark.parametrize("path", ["", None, 5])
def test_of_load_encoder(path):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=r"`path`|Path|path"):
        load_encoder(path)


@pytest.mark.parametrize("name", ["batch_size", "truncate_dim", "batch_num_tokens"])
@pytest.mark.parametrize("value", ["x", 1.5, 0, -1, True, math.nan])
def test_of_encode(name, value, model):
    with pytest.raises((TypeError, ValueError), match=name):
        model.encode(["a text"], **{name: value})


def test_numbers_of_numpy_are_taken_by_encode(model):
    found = model.encode(["a text"], batch_size=np.int64(2), truncate_dim=np.int32(4), batch_num_tokens=np.int64(9))
    assert found.shape == (1, 4)
    assert "batch_size" in inspect.signature(model.encode).parameters


@pytest.mark.parametrize("loss", [None, 5, {"a": "loss"}])
def test_of_the_metrics_callback(loss):
    with pytest.raises(TypeError, match="`loss`"):
        LossMetricsCallback(loss)


@pytest.mark.parametrize("texts", [5, None, (text for text in ["a"])], ids=["number", "none", "generator"])
def test_texts_of_a_teacher(texts, tmp_path):
    with pytest.raises(TypeError, match="`texts`"):
        teacher_embeddings(Lengths(), texts, tmp_path, teacher_name="lengths")


@pytest.mark.parametrize("folder", [None, 5, ["a"], b"bytes"])
def test_paths(folder, tmp_path):
    calls = {
        "cache_dir": lambda: teacher_embeddings(Lengths(), ["a"], folder, teacher_name="lengths"),
        "output_dir": lambda: encode_corpus(Lengths(), ["a"], folder, model_name="lengths"),
        "folder": lambda: EmbeddingCache(folder),
        "before": lambda: compare(folder, tmp_path),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"`{name}="):
            call()
    with pytest.raises((TypeError, ValueError), match="cache_dir"):
        with_teacher_labels(["a"], Lengths(), folder, teacher_name="lengths")


@pytest.mark.parametrize("inputs", [None, 5, 1.5, "a text"])
def test_inputs_of_corpora(inputs, tmp_path):
    with pytest.raises(TypeError, match="`inputs`"):
        encode_corpus(Lengths(), inputs, tmp_path / "a", model_name="lengths")
    with pytest.raises(TypeError, match="`inputs`"):
        list(encode_stream(Lengths(), inputs))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [None, 5, "a name"])
def test_models_of_corpora(model, tmp_path):
    with pytest.raises(TypeError, match="`model`"):
        encode_corpus(model, ["a"], tmp_path / "a", model_name="none")
    with pytest.raises(TypeError, match="`model`"):
        encode_stream(model, ["a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [None, [{"anchor": "a", "positive": "b"}], "rows"])
def test_of_mining(rows, tmp_path):
    with pytest.raises(TypeError, match="`dataset`"):
        mine_hard_negatives(rows, Lengths(), tmp_path)


@pytest.mark.parametrize("value", ["x", 0, math.nan, True])
def test_room_of_a_cache(value, tmp_path):
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        EmbeddingCache(tmp_path, max_bytes=value)


def test_several_rows_may_have_one_id(tmp_path):
    corpus = encode_corpus(Lengths(), [("doc", "one"), ("doc", "three")], tmp_path, with_ids=True, model_name="lengths")
    assert list(corpus.ids()) == ["doc", "doc"]


def test_rows_of_one_column_have_batches_too():
    rows = Dataset.from_dict({"text": ["a", "b", "a", "c"]})
    batches = list(FalseNegativeAwareBatchSampler(rows, batch_size=2, drop_last=True))
    assert all(len(set(rows[batch]["text"])) == 2 for batch in batches)
    assert len(batches) == 2
