"""All images of a pass in one call of attention: what the tower gives is what it gives image by image."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tiny import FAMILIES, picture
from unime_st import build_encoder
from unime_st.modules.speed import image_attention
from unime_st.modules.speed.image_attention import NAME, attend, attends_at_once, images_at_once
from unime_st.modules.speed.vision_cache import vision_tower

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def items():
    sizes = ((40, 30), (30, 60), (56, 56), (70, 20))
    return [
        {"image": picture(color, size)} for color, size in zip(("red", "green", "white", "teal"), sizes, strict=True)
    ]


@pytest.fixture
def kernel(monkeypatch):
    """The kernel's stand-in, and what it was called with; a CPU counts as a GPU."""
    calls = []

    def varlen(query, key, value, bounds, other_bounds, longest, other_longest, scale=None):
        assert query.dtype in (torch.float16, torch.bfloat16)
        assert bounds.dtype == torch.int32
        assert torch.equal(bounds, other_bounds)
        lengths = (bounds[1:] - bounds[:-1]).tolist()
        assert longest == other_longest == max(lengths)
        calls.append(lengths)
        found = []
        for q, k, v in zip(*(part.split(lengths) for part in (query, key, value)), strict=True):
            parts = (part.transpose(0, 1)[None] for part in (q, k, v))
            found.append(scaled_dot_product_attention(*parts, scale=scale)[0].transpose(0, 1))
        return torch.cat(found)

    monkeypatch.setattr(image_attention, "varlen_attn", varlen)
    monkeypatch.setattr(image_attention, "_is_on_gpu", lambda _: True)
    return calls


@pytest.mark.parametrize("family", QWEN)
def test_a_pass_is_that_of_each_image(family, backbone, kernel):
    model = build_encoder(backbone(family), device="cpu", torch_dtype="bfloat16").eval()
    tower = vision_tower(model[0].model)
    expected = model.encode(items()).astype(float)
    features = model.preprocess(items())
    with torch.inference_mode():
        plain = model(dict(features))["sentence_embedding"].float().numpy()
        assert not kernel
        before, tower.config._attn_implementation = tower.config._attn_implementation, NAME
        model[0].vision_cache.clear()
        found = model(dict(features))["sentence_embedding"].float().numpy()
        tower.config._attn_implementation = before
    assert kernel
    assert max(map(len, kernel)) >= 4
    np.testing.assert_allclose(found, plain, atol=2e-2)  # 16 bits
    np.testing.assert_allclose(found, expected, atol=6e-2)


def test_states_are_those_of_each_image(kernel):
    query, key, value = (torch.randn(1, 2, 20, 8).bfloat16() for _ in range(3))
    asked = {"cu_seq_lens_q": torch.tensor([0, 7, 8, 20]), "max_length_q": 12, "is_causal": False, "dropout": 0.0}
    found = attend(torch.nn.Module(), query, key, value, None, scaling=0.5, **asked)[0]
    assert kernel == [[7, 1, 12]]
    for start, end in ((0, 7), (7, 8), (8, 20)):
        parts = (part[:, :, start:end].float() for part in (query, key, value))
        alone = scaled_dot_product_attention(*parts, scale=0.5).transpose(1, 2)
        torch.testing.assert_close(found[:, start:end].float(), alone, atol=2e-2, rtol=0)
    over_all = scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=0.5).transpose(1, 2)
    assert (over_all - found).abs().max() > 0.1  # else agreement says nothing
    exact = attend(torch.nn.Module(), query.float(), key.float(), value.float(), None, scaling=0.5, **asked)[0]
    assert len(kernel) == 1  # 32 bits go image by image
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=0)


@pytest.mark.parametrize("family", QWEN)
def test_without_the_kernel_it_goes_image_by_image(family, backbone):
    """As in a backward pass's second forward, or in 32 bits."""
    model = build_encoder(backbone(family), device="cpu").eval()
    tower = vision_tower(model[0].model)
    expected = model.encode(items())
    tower.config._attn_implementation = NAME
    model[0].vision_cache.clear()
    np.testing.assert_allclose(model.encode(items()), expected, atol=2e-6)


def test_who_can(backbone):
    for family in FAMILIES:
        model = build_encoder(backbone(family), device="cpu", torch_dtype="bfloat16")
        tower = vision_tower(model[0].model)
        fits = family in QWEN and tower.blocks[0].attn.head_dim % 8 == 0
        assert attends_at_once(tower, CUDA) is fits, family
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    tower = vision_tower(model[0].model)
    assert not attends_at_once(tower, CUDA)  # 32 bits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attends_at_once(tower, CPU)
        tower.config._attn_implementation = "eager"
        assert not attends_at_once(tower, CPU)


def test_the_usual_attention_is_back(backbone, monkeypatch):
    model = build_encoder(backbone("qwen2_vl"), device="cpu", torch_dtype="bfloat16")
    tower = vision_tower(model[0].model)
    with images_at_once(model[0].model, CPU):
        assert tower.config._attn_implementation == "sdpa"

    def failing():
        with images_at_once(model[0].model, CUDA):
            assert tower.config._attn_implementation == NAME
            raise MemoryError

    with pytest.raises(MemoryError):
        failing()
    assert tower.config._attn_implementation == "sdpa"
    monkeypatch.setattr(image_attention, "varlen_attn", None)
    with images_at_once(model[0].model, CUDA):
        assert tower.config._attn_implementation == "sdpa"
