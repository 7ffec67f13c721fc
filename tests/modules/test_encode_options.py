"""Options of `encode` that users of sentence-transformers know, on images and texts."""

import pickle

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from tiny import picture
from unime_st import build_encoder

ITEMS = [
    "a red bus",
    picture("red"),
    {"image": picture("white"), "text": "what colour?"},
    "a dog",
    picture("black"),
    "b",
]


@pytest.fixture(scope="module")
def encoder(backbone):
    return build_encoder(backbone("fast_vlm"), device="cpu")


def test_truncated_embeddings_are_the_first_dimensions(encoder):
    whole = encoder.encode(ITEMS)
    short = encoder.encode(ITEMS, truncate_dim=8, normalize_embeddings=True)
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)


@pytest.mark.parametrize(("precision", "width", "kind"), [("int8", 32, np.int8), ("ubinary", 4, np.uint8)])
def test_quantised_embeddings(encoder, precision, width, kind):
    whole = encoder.encode(ITEMS)
    found = encoder.encode(ITEMS, precision=precision)
    assert found.shape == (len(ITEMS), width)
    assert found.dtype == kind
    np.testing.assert_array_equal(found, quantize_embeddings(whole, precision=precision))
    if precision == "ubinary":
        np.testing.assert_array_equal(np.unpackbits(found, axis=1), whole > 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_vl"])  # all: `benchmarks/families.py`
def test_several_processes_after_an_image(family, backbone):
    model = build_encoder(backbone(family), device="cpu")
    alone = model.encode(ITEMS)  # from here on stock LLaVA models could not be sent to another process
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        np.testing.assert_allclose(model.encode(ITEMS, pool=pool, chunk_size=3), alone, atol=1e-5)
    finally:
        model.stop_multi_process_pool(pool)


def test_captured_states_are_captured_again_after_pickling(backbone):
    model = build_encoder(backbone("llava_next"), device="cpu")
    before = model.encode(ITEMS)
    copy = pickle.loads(pickle.dumps(model))
    for encoder in (copy, model):
        encoder[0].vision_cache.clear()
        np.testing.assert_allclose(encoder.encode(ITEMS), before, atol=1e-6)


def test_another_backend_is_refused(backbone):
    from unime_st.modules import MultimodalEncoder

    with pytest.raises(ValueError, match="backend 'torch'"):
        MultimodalEncoder(str(backbone("fast_vlm")), backend="onnx")
