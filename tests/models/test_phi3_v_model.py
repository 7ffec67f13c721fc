"""Phi-3-Vision, stage by stage, against the second computation; and the files it loads."""

import json

import phi3_v_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from tiny import phi3_v_config, picture, tokenizer_for
from unime_st.models.phi3_v import Phi3VConfig, Phi3VForCausalLM, Phi3VModel
from unime_st.modules.checks import check_loaded

IMAGES = [picture("red", (40, 30)), picture("green", (30, 90)), picture("white", (400, 90))]


@pytest.fixture(scope="module")
def folder(backbone):
    return backbone("phi3_v")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def state(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix("model."): value.double() for name, value in tensors.items()}


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def inputs(processor, rows, side="left"):
    """Features of rows of (text, images)."""
    return processor(
        text=[text for text, _ in rows],
        images=[images for _, images in rows] if any(images for _, images in rows) else None,
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )


def run(model, features):
    with torch.no_grad():
        return model(**features).last_hidden_state


ROWS = [
    ("<|user|>\n<|image_1|>\nwhat? <|end|>", IMAGES[:1]),
    ("<|user|>\nno image at all<|end|>", []),
    ("<|image_1|>\n<|image_2|>\nwhich? ", IMAGES[1:]),
    ("<|image_1|>", IMAGES[2:]),
]


def test_vision_features(model, state, processor):
    pixels = processor.image_processor(IMAGES)["pixel_values"][:, 0].double()
    with torch.no_grad():
        found = model.vision_embed_tokens.img_processor(pixels).last_hidden_state
    assert found.shape == (3, 16, 32)
    for row, own in enumerate(pixels):
        torch.testing.assert_close(found[row], oracle.patches(own, state, model.config), atol=1e-9, rtol=0)


def test_image_embeddings_and_the_order_of_lines_and_separators(model, state, processor):
    features = processor.image_processor(IMAGES)
    with torch.no_grad():
        found = model.get_image_features(features["pixel_values"].double(), features["image_sizes"])
    expected = [oracle.image_embeddings(image, state, model.config, 4) for image in IMAGES]
    counts = [processor.image_processor.count_tokens(*image.size) for image in IMAGES]
    assert [len(own) for own in expected] == counts
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=0)
    assert min((own[0] - own[1]).abs().max() for own in expected) > 0.01  # or their order would not show


def test_embeddings_stand_where_the_placeholders_are(model, state, processor):
    features = inputs(processor, ROWS)
    with torch.no_grad():
        merged = model._embed(features["input_ids"], features["pixel_values"].double(), features["image_sizes"])
    for row, (_, images) in enumerate(ROWS):
        queue = [line for image in images for line in oracle.image_embeddings(image, state, model.config, 4)]
        for place, token in enumerate(features["input_ids"][row].tolist()):
            is_image = token == model.config.image_token_id
            expected = queue.pop(0) if is_image else state["embed_tokens.weight"][token]
            torch.testing.assert_close(merged[row, place], expected, atol=1e-4, rtol=0)
        assert not queue


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states(model, processor, state, side):
    """Each row alone and without padding, from its merged embeddings on; the host computes angles in float32."""
    features = inputs(processor, ROWS, side)
    found = run(model, features)
    with torch.no_grad():
        merged = model._embed(features["input_ids"], features["pixel_values"].double(), features["image_sizes"])
    for row, mask in enumerate(features["attention_mask"].bool()):
        expected = oracle.hidden_states(merged[row][mask], state, model.config)
        torch.testing.assert_close(found[row][mask], expected, atol=1e-5, rtol=0)


def test_from_image_and_text_to_the_last_token(model, processor, state):
    """All stages of the second computation in a row, nothing taken from the first."""
    text, images = ROWS[2]
    sequence = []
    for index, part in enumerate(("", "\n", "\nwhich? ")):
        sequence += list(state["embed_tokens.weight"][processor.tokenizer(part)["input_ids"]])
        if index < len(images):
            sequence += list(oracle.image_embeddings(images[index], state, model.config, 4))
    expected = oracle.hidden_states(torch.stack(sequence), state, model.config)
    found = run(model, inputs(processor, [(text, images)]))
    assert found.shape == (1, *expected.shape)
    torch.testing.assert_close(found[0], expected, atol=1e-3, rtol=0)


def test_long_rows_take_the_long_factors_and_their_neighbours_do_not(model, processor, state):
    rows = [("short", []), ("long " * 30, []), ("x" * 127, []), ("x" * 128, [])]  # 128 tokens are short, 129 long
    features = inputs(processor, rows)
    found = run(model, features)
    for row, (text, _) in enumerate(rows):
        own = state["embed_tokens.weight"][processor.tokenizer(text)["input_ids"]]
        expected = oracle.hidden_states(own, state, model.config)
        torch.testing.assert_close(found[row, -len(own) :], expected, atol=1e-5, rtol=0)
    factors = dict(model.config.rope_parameters)
    config = phi3_v_config(tokenizer_for("phi3_v"), rope_scaling={**factors, "long_factor": factors["short_factor"]})
    own = state["embed_tokens.weight"][processor.tokenizer(rows[1][0])["input_ids"]]
    assert (oracle.hidden_states(own, state, config)[-1] - found[1, -1]).abs().max() > 1e-3  # the factors matter


def test_batch_of_rows_with_none_one_and_two_images_equals_its_rows(model, processor):
    together, mask = run(model, inputs(processor, ROWS)), inputs(processor, ROWS)["attention_mask"].bool()
    for row, own in enumerate(ROWS):
        torch.testing.assert_close(together[row][mask[row]], run(model, inputs(processor, [own]))[0], atol=1e-6, rtol=0)


def test_a_finished_image_does_not_depend_on_another_row_but_on_its_own_pixels(model, processor):
    before = run(model, inputs(processor, ROWS))[:, -1]
    changed = [(ROWS[0][0], [picture("yellow", (40, 30))]), *ROWS[1:]]
    after = run(model, inputs(processor, changed))[:, -1]
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1:], before[1:], atol=1e-9, rtol=0)


def test_the_second_of_two_images_and_their_order_count(model, processor):
    def last(images):
        return run(model, inputs(processor, [("<|image_1|><|image_2|>?", images)]))[0, -1]

    first, second, third = IMAGES
    assert (last([first, second]) - last([first, third])).abs().max() > 1e-3
    assert (last([first, second]) - last([second, first])).abs().max() > 1e-3


def test_placeholders_and_images_that_do_not_match(model, processor):
    features = inputs(processor, ROWS[:1])
    features["input_ids"][0, 3] = processor.tokenizer.eos_token_id
    features["input_ids"][0, 6] = processor.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=r"hold 2\d image placeholders.*have 27 embeddings.*without truncation"):
        run(model, features)
    del features["image_sizes"]
    with pytest.raises(ValueError, match="without `image_sizes`"):
        run(model, features)


def test_names_of_the_published_tensors(folder, tmp_path):
    """Exactly those, none missing and none unexpected, with the head and without it."""
    config = AutoConfig.from_pretrained(folder)
    names = oracle.tensor_names(config)
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == names
    assert set(Phi3VForCausalLM(config).state_dict()) == names
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded, report = auto.from_pretrained(folder, output_loading_info=True)
        assert isinstance(loaded, Phi3VForCausalLM)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, tensors[name]), name
    bare, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(bare, Phi3VModel)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) <= {"lm_head.weight"}
    for name, value in bare.state_dict().items():
        assert torch.equal(value, tensors[f"model.{name}"]), name


def test_the_published_size():
    """32 decoder layers, 24 of CLIP."""
    config = Phi3VConfig()
    names = oracle.tensor_names(config)
    assert len(names) == 3 + 32 * 6 + 2 + 4 + 3 + 4 + 24 * 16
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Phi3VForCausalLM(config).state_dict().items()}
    assert set(shapes) == names
    assert shapes["model.vision_embed_tokens.glb_GN"] == (1, 1, 4096)
    assert shapes["model.vision_embed_tokens.sub_GN"] == (1, 1, 1, 4096)
    assert shapes["model.vision_embed_tokens.img_projection.0.weight"] == (3072, 4096)
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (9216, 3072)
    assert shapes["lm_head.weight"] == (32064, 3072)


def copied(folder, target, tensors):
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_second_name_of_the_token_embeddings_is_no_news(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.vision_embed_tokens.wte.weight"] = tensors["model.embed_tokens.weight"].clone()
    path = copied(folder, tmp_path / "both", tensors)
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded, report = auto.from_pretrained(path, output_loading_info=True)
        check_loaded("both", report)
        assert torch.equal(loaded.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", sorted(["glb_GN", "sub_GN", "img_projection.2.bias"]))
def test_a_missing_tensor_is_told(folder, tmp_path, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.vision_embed_tokens.{name}"]
    _, report = AutoModel.from_pretrained(copied(folder, tmp_path / "less", tensors), output_loading_info=True)
    with pytest.raises(ValueError, match=rf"1 missing \(vision_embed_tokens.{name}\)"):
        check_loaded("less", report)


def test_the_published_configuration():
    """Keys and values of its file; the vision tower is known by name alone."""
    published = {
        "architectures": ["Phi3VForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi3_v.Phi3VConfig"},
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "img_processor": {
            "image_dim_out": 1024,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
        },
        "max_position_embeddings": 131072,
        "model_type": "phi3_v",
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.5] * 48, "type": "su"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    }
    config = Phi3VConfig.from_dict(json.loads(json.dumps(published)))
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["original_max_position_embeddings"] == 4096
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 336, 14)
    assert vision.hidden_act == "quick_gelu"
    assert config.image_feature_layer == -2
    again = Phi3VConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "hd_transform_order='glb_sub'.*'sub_glb' only"),
        ({"embd_layer": {"projection_cls": "linear"}}, "projection_cls='linear'"),
        ({"img_processor": {"name": "siglip"}}, "'clip_vision_model' only"),
        ({"img_processor": {"model_name": "my/clip"}, "vision_config": None}, "Give its `vision_config` too"),
        ({"rope_scaling": {"type": "yarn", "short_factor": [1.0], "long_factor": [1.0]}}, "Give 'su' or 'longrope'"),
    ],
)
def test_configurations_that_are_not_the_published_ones(changes, advice):
    with pytest.raises(ValueError, match=advice):
        phi3_v_config(tokenizer_for("phi3_v"), **changes)


@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 0, 2, 3])
def test_any_hidden_state_of_the_tower(folder, processor, layer):
    config = AutoConfig.from_pretrained(folder)
    config.img_processor = {**config.img_processor, "layer_idx": layer}
    tower = AutoModel.from_pretrained(folder, config=config).eval().vision_embed_tokens.img_processor
    pixels = processor.image_processor(IMAGES)["pixel_values"][:, 0]
    with torch.no_grad():
        found = tower(pixels).last_hidden_state
        expected = tower.vision_model(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_saved_and_loaded(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    features = inputs(processor, ROWS)
    assert torch.equal(run(model, features), run(again, features))


def test_generation_sees_the_image(folder, processor):
    generator = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    features = inputs(processor, ROWS[:1])
    found = generator.generate(**features, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = features["input_ids"]
    for _ in range(4):  # without a cache
        with torch.no_grad():
            mask = torch.ones_like(ids)
            images = {key: features[key] for key in ("pixel_values", "image_sizes")}
            logits = generator(input_ids=ids, attention_mask=mask, **images).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert found.tolist() == ids.tolist()


def test_low_precision(folder, processor):
    low = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    full = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = run(low, inputs(processor, ROWS))[:, -1]
    assert found.dtype == torch.bfloat16
    expected = run(full, inputs(processor, ROWS))[:, -1]
    assert torch.nn.functional.cosine_similarity(found.float(), expected).min() > 0.97
