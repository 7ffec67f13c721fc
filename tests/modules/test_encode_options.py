"""Options of `encode` that users of sentence-transformers know, on images and texts."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import build_encoder
from unime_st.modules.speed.prefixes import shares_prefixes

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


@pytest.mark.parametrize("family", ["fast_vlm", "llava_onevision", "qwen2_vl", "idefics3", "gemma3", "phi3_v"])
def test_a_budget_of_tokens_bounds_each_pass_and_changes_nothing(family, backbone):
    model = build_encoder(backbone(family), device="cpu")
    items = [*ITEMS, "long " * 60, {"image": [picture("red"), picture("green")], "text": "both"}, "a bird", picture()]
    expected = model.encode(items, batch_size=len(items))
    lengths = [int(model.preprocess([item])["attention_mask"].sum()) for item in items]
    budget = 2 * sorted(lengths)[-3]
    seen = []
    model[0].register_forward_pre_hook(
        lambda _, args: seen.append((args[0]["attention_mask"], args[0].get("prefix_key")))
    )
    model[0].vision_cache.clear()
    found = model.encode(items, batch_size=len(items), batch_num_tokens=budget, show_progress_bar=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    used = [mask.numel() if keys is None else distinct_beginnings(mask, keys) for mask, keys in seen]
    rows = [len(mask) for mask, _ in seen]
    assert shares_prefixes(model[0].model) == (seen[0][1] is not None)
    assert all(tokens <= budget or count == 1 for tokens, count in zip(used, rows, strict=True))
    assert min(rows) == 1 < max(rows)
    assert sum(rows) == len(items) - 1  # one image is there twice


def distinct_beginnings(mask, keys):
    rows = [row[bool_row].tolist() for row, bool_row in zip(keys, mask.bool(), strict=True)]
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


def test_what_is_shared_counts_once(backbone):
    model = build_encoder(backbone("llava_onevision"), device="cpu")
    image = picture("green", (60, 60))
    items = [{"image": image, "text": text} for text in ("a?", "b?", "c?", "d?")]
    with model[0].prefixes.encoding():
        features = model.preprocess(items)
    budget = distinct_beginnings(features["attention_mask"], features["prefix_key"])
    assert budget < int(features["attention_mask"].sum())
    seen = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0]["input_ids"])))
    expected = model.encode(items, batch_num_tokens=budget)  # four rows, but one image
    np.testing.assert_allclose(model.encode(items, batch_num_tokens=budget - 1), expected, atol=2e-6)
    assert seen == [4, 3, 1]
    model[0].share_prefixes = False
    np.testing.assert_allclose(model.encode(items, batch_num_tokens=budget), expected, atol=2e-6)
    assert seen[3] < 4


def test_a_budget_below_every_input_takes_them_one_by_one(encoder):
    seen = []
    hook = encoder[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0]["input_ids"])))
    np.testing.assert_allclose(encoder.encode(ITEMS, batch_num_tokens=1), encoder.encode(ITEMS), atol=2e-6)
    hook.remove()
    assert seen[:-1] == [1] * len(ITEMS)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "smolvlm"])
def test_texts_and_videos_in_one_batch(family, backbone):
    model = build_encoder(backbone(family), device="cpu")
    generator = np.random.default_rng(0)
    videos = [generator.integers(0, 255, (4, 28, 28, 3), dtype=np.uint8) for _ in range(3)]
    items = ["a", {"video": videos[0], "text": "x" * 30}, "b" * 50, {"video": videos[1], "text": "y"}]
    items.append({"video": videos[2]})
    expected = np.concatenate([model.encode([item]) for item in items])
    np.testing.assert_allclose(model.encode(items, batch_num_tokens=40), expected, atol=2e-6)
    alone = [model.encode([{"video": video}]) for video in videos[:2]]
    assert np.abs(alone[0] - alone[1]).max() > 1e-4


def test_an_image_in_a_system_message_tells_rows_apart(backbone):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    rows = [
        [
            {"role": "system", "content": [{"type": "image", "image": picture(color)}]},
            {"role": "user", "content": "a cat"},
        ]
        for color in ("red", "green")
    ]
    expected = np.concatenate([model.encode([row]) for row in rows])
    np.testing.assert_allclose(model.encode(rows), expected, atol=2e-6)
    assert np.abs(expected[0] - expected[1]).max() > 1e-4
    ids = model.preprocess(rows)["content_id"]
    assert ids[0] != ids[1]


def test_threads_take_turns(backbone):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    lists = [
        [f"the cat sat on {word}" for word in "abcd"],
        [f"dogs {word} in the hall" for word in ("run", "s", "nap")],
    ]
    expected = [model.encode(items) for items in lists]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda number: model.encode(lists[number % 2]), range(60)))
    finally:
        sys.setswitchinterval(before)
    for number, embeddings in enumerate(found):
        np.testing.assert_allclose(embeddings, expected[number % 2], atol=2e-6)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # a lock can be neither copied nor sent
    for other in copies:
        np.testing.assert_allclose(other.encode(lists[0]), expected[0], atol=2e-6)


def test_budgets_that_cannot_be(encoder):
    assert len(encoder.encode([], batch_num_tokens=100)) == 0
    with pytest.raises(ValueError, match="`batch_num_tokens=0`, but it must be at least 1"):
        encoder.encode(ITEMS, batch_num_tokens=0)
    with pytest.raises(ValueError, match="Leave it out"):
        encoder.encode(ITEMS, batch_num_tokens=64, output_value="token_embeddings")
    with pytest.raises(ValueError, match="does not use"):
        encoder.encode(ITEMS, max_tokens=64)


@pytest.mark.parametrize("family", [*FAMILIES, *PLUGIN_FAMILIES])
@pytest.mark.parametrize("options", [{}, {"normalize_embeddings": True, "truncate_dim": 4}])
def test_nan_is_refused_by_name_in_every_family(backbone, family, options):
    model = build_encoder(backbone(family), device="cpu")
    table = model[0].model.get_input_embeddings().weight
    (number,) = model.tokenizer("~", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        table[number] = torch.nan
    texts = ["a", "b", "c ~", "d", "c ~"]
    with pytest.raises(
        ValueError, match=r"NaN or infinity for row 2 \('c ~'\) and [12] more of 5.*float32 or bfloat16"
    ):
        model.encode(texts, batch_size=2, **options)
    assert np.isfinite(np.asarray(model.encode(texts[:2], **options))).all()
    with torch.no_grad():
        table.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"row 0 \('a'\) and 4 more of 5"):
        model.encode(texts, **options)
    tokens = model.encode(texts[:1], output_value="token_embeddings")  # what is there may be looked at
    assert not np.isfinite(np.asarray(tokens[0].float())).all()


@pytest.mark.parametrize("family", [*FAMILIES, *PLUGIN_FAMILIES])
def test_prepared_in_processes(family, backbone):
    """The same bytes, in whatever order the processes end."""
    model = build_encoder(backbone(family), device="cpu")
    items = [*ITEMS, {"image": picture("teal", (50, 20))}, "one more text", "and another, longer one"]
    expected = model.encode(items, batch_size=2)
    for workers in (1, 3):
        np.testing.assert_array_equal(model.encode(items, batch_size=2, num_workers=workers), expected)
    assert len(model.encode([], num_workers=2)) == 0
    np.testing.assert_array_equal(model.encode(items[:1], num_workers=2), model.encode(items[:1]))


def test_errors_of_processes_name_the_row(encoder, tmp_path):
    items = ["a text"] * 3 + [f"text {number}" for number in range(9)] + [{"image": str(tmp_path / "none.png")}]
    with pytest.raises(FileNotFoundError, match=r"Row 12.*none\.png"):
        encoder.encode(items, batch_size=2, num_workers=2)
    assert len(encoder.encode(items[:-1], batch_size=2, num_workers=2)) == 12  # and it goes on


def test_processes_are_for_embeddings_alone(encoder, monkeypatch):
    tokens = encoder.encode(["a text", "b"], output_value="token_embeddings", num_workers=2)
    assert len(tokens) == 2  # as stock: it prepares for itself
    for bad in (-1, 1.5, "x", None):
        with pytest.raises((TypeError, ValueError), match="num_workers"):
            encoder.encode(["a text"], num_workers=bad)
    monkeypatch.setattr(torch.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ValueError, match="cannot be forked"):
        encoder.encode(["a text"], num_workers=1)
