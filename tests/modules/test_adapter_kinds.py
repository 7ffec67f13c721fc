"""Adapters that `build_encoder` takes are what was trained, saved, loaded, resumed or merged; others are refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoHaConfig, LoraConfig
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import AutoModelForImageTextToText

from tiny import picture
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.modules.adapters import attach_adapter

LAYERS = r".*(language_model|text_model)\.layers\.\d+\.\w+\.(q_proj|v_proj)"
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "norm": {"modules_to_save": ["language_model.norm"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 4, 98]},
}
INPUTS = ["a cat", picture("green"), {"image": picture("green"), "text": "what?"}]


def lora(family="qwen2_vl", **options):
    if family == "smolvlm" and "modules_to_save" in options:
        options["modules_to_save"] = [name.replace("language_", "text_") for name in options["modules_to_save"]]
    return LoraConfig(r=4, target_modules=LAYERS, **options)


def trained(folder, kind, family):
    model = build_encoder(folder, device="cpu", peft_config=lora(family, **KINDS[kind]))
    before = model.encode(INPUTS)
    generator = torch.Generator().manual_seed(1)
    changed = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
                changed += 1
    assert changed > 0
    assert np.abs(model.encode(INPUTS) - before).max() > 1e-2
    return model


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "smolvlm"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_merged_they_are_the_same(kind, family, backbone, tmp_path):
    model = trained(backbone(family), kind, family)
    want = model.encode(INPUTS)
    model.save_pretrained(str(tmp_path / "adapters"))
    np.testing.assert_allclose(load_encoder(tmp_path / "adapters", device="cpu").encode(INPUTS), want, atol=1e-5)
    export_encoder(model, tmp_path / "merged")
    for load in (load_encoder, lambda path, device: SentenceTransformer(str(path), device=device)):
        np.testing.assert_allclose(load(tmp_path / "merged", device="cpu").encode(INPUTS), want, atol=1e-4)
    np.testing.assert_array_equal(model.encode(INPUTS), want)  # the model in memory stayed as it is


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]), "IA3Config.*LoRA alone"),
        (LoHaConfig(r=4, target_modules=["q_proj"]), "LoHaConfig.*LoRA alone"),
        (lora(bias="all"), "`bias='all'`"),
        (lora(bias="lora_only"), "`bias='lora_only'`"),
        (lora(init_lora_weights="pissa"), "`init_lora_weights='pissa'` changes the backbone"),
        (lora(init_lora_weights="olora"), "`init_lora_weights='olora'` changes the backbone"),
        (LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), "embedding 'embed_tokens'.*modules_to_save"),
        (LoraConfig(r=4, target_modules=LAYERS, layer_replication=[[0, 1]]), "`layer_replication`"),
    ],
)
def test_what_would_be_lost_is_refused_before_training(config, words, backbone):
    with pytest.raises((ValueError, TypeError), match=words):
        build_encoder(backbone("qwen2_vl"), device="cpu", peft_config=config)


@pytest.mark.parametrize("kind", ["norm", "tokens", "dora"])
def test_the_best_model_is_loaded_and_training_resumes(kind, backbone, tmp_path):
    folder = backbone("qwen2_vl")
    rows = Dataset.from_dict({"a": [f"q {i}" for i in range(16)], "p": [f"t {i}" for i in range(16)]})

    def trainer(steps):
        torch.manual_seed(0)
        model = build_encoder(folder, device="cpu", peft_config=lora(**KINDS[kind]))
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=steps, eval_strategy="steps", eval_steps=1,
            save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
            greater_is_better=False, learning_rate=0.05, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        loss = HardNegativeInfoNCELoss(model, num_hard_negatives=None)
        return SentenceTransformerTrainer(
            model, arguments, train_dataset=rows, eval_dataset=rows.select(range(4)), loss=loss
        )

    run = trainer(4)
    run.train()
    best = load_encoder(run.state.best_model_checkpoint, device="cpu")
    np.testing.assert_allclose(run.model.encode(INPUTS), best.encode(INPUTS), atol=1e-6)
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 6


def test_settings_by_name_and_heads_of_foreign_adapters(backbone, tmp_path):
    """An adapter trained on the model with its head, under other names: peft on that model is the oracle."""
    folder = backbone("qwen2_vl")
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    from peft import get_peft_model

    config = LoraConfig(
        r=4, target_modules=LAYERS, rank_pattern={r"model\.language_model\.layers\.0\.self_attn\.q_proj": 2},
        alpha_pattern={r"model\.language_model\.layers\.1\.self_attn\.v_proj": 64}, modules_to_save=["lm_head"],
    )  # fmt: skip
    adapted = get_peft_model(whole, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    assert any("lm_head" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    model = build_encoder(folder, device="cpu")
    features = model.preprocess(INPUTS)
    plain = model(dict(features))["sentence_embedding"]
    assert attach_adapter(model[0].model, tmp_path / "adapter") > 0
    inputs = {key: features[key] for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
    if "mm_token_type_ids" in features:
        inputs["mm_token_type_ids"] = features["mm_token_type_ids"]
    with torch.no_grad():
        states = adapted(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
        found = model(dict(features))["sentence_embedding"]
    torch.testing.assert_close(found, torch.nn.functional.normalize(states, dim=-1), atol=1e-5, rtol=0)
    assert (found - plain).abs().max() > 1e-2
