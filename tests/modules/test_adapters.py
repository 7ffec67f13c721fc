"""LoRA, DoRA and QLoRA: what they adapt, that they are kept, and that merging loses nothing."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import BitsAndBytesConfig

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.modules import build, default_lora_config
from unime_st.modules.adapters import tuner_layers

ITEMS = ["a red bus", picture("red"), {"image": picture("white"), "text": "what colour?"}]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", [*FAMILIES, *PLUGIN_FAMILIES])
def test_trained_adapters_are_kept_alone_and_merged(family, use_dora, backbone, tmp_path):
    plain = build_encoder(backbone(family), device="cpu").encode(ITEMS)
    model = build_encoder(backbone(family), device="cpu", peft_config=default_lora_config(rank=4, use_dora=use_dora))
    names = {name for _, name, _ in tuner_layers(model)}
    assert names == (FUSED if family == "phi3_v" else LINEAR)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in trained)
    assert use_dora == any("lora_magnitude_vector" in name for name in trained)
    np.testing.assert_allclose(model.encode(ITEMS), plain, atol=1e-5)  # nothing learned yet
    with torch.no_grad():
        for name, value in trained.items():
            value.mul_(1.3) if "magnitude" in name else value.normal_(std=0.1)
    expected = model.encode(ITEMS)
    assert np.abs(expected - plain).max() > 1e-3
    alone = export_encoder(model, tmp_path / "alone", merge_adapters=False)
    assert (alone / "adapter_model.safetensors").is_file()
    again = load_encoder(alone, device="cpu")
    assert len(tuner_layers(again)) == len(tuner_layers(model))
    np.testing.assert_allclose(again.encode(ITEMS), expected, atol=1e-5)
    merged = export_encoder(model, tmp_path / "merged")
    np.testing.assert_allclose(load_encoder(merged, device="cpu").encode(ITEMS), expected, atol=1e-5)
    np.testing.assert_allclose(SentenceTransformer(str(merged), device="cpu").encode(ITEMS), expected, atol=1e-5)
    np.testing.assert_allclose(model.encode(ITEMS), expected, atol=1e-6)  # as it was
    second = build_encoder(merged, device="cpu", peft_config=True)  # the next stage
    np.testing.assert_allclose(second.encode(ITEMS), expected, atol=1e-5)


def test_a_stock_model_loaded_with_adapters_is_not_exported_as_what_would_not_load(backbone, tmp_path):
    model = build_encoder(backbone("qwen2_vl"), device="cpu", peft_config=True)
    stock = SentenceTransformer(str(export_encoder(model, tmp_path / "alone", merge_adapters=False)), device="cpu")
    with pytest.raises(ValueError, match="was loaded with adapters by a stock class"):
        export_encoder(stock, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_trainer_resumes_adapters_of_every_kind(backbone, tmp_path):
    for use_dora in (False, True):
        config = default_lora_config(rank=4, use_dora=use_dora)
        trained, fresh = (build_encoder(backbone("fast_vlm"), device="cpu", peft_config=config) for _ in range(2))
        with torch.no_grad():
            for name, value in trained.named_parameters():
                if "lora_" in name:
                    value.mul_(1.3) if "magnitude" in name else value.normal_(std=0.1)
        trained.save_pretrained(str(tmp_path / str(use_dora)))
        trainer = SentenceTransformerTrainer(
            model=fresh,
            args=SentenceTransformerTrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True),
            train_dataset=Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}),
            loss=MultipleNegativesRankingLoss(fresh),
        )
        trainer._load_from_checkpoint(str(tmp_path / str(use_dora)))
        np.testing.assert_allclose(fresh.encode(ITEMS), trained.encode(ITEMS), atol=1e-6)


def test_quantised_weights_are_prepared_for_training(backbone, monkeypatch):
    calls = []
    monkeypatch.setattr(
        build, "prepare_model_for_kbit_training", lambda model, **options: calls.append((model, options))
    )
    model = build_encoder(backbone("llava_next"), device="cpu", peft_config=True)
    assert not calls
    monkeypatch.setattr(type(model[0].model), "is_quantized", True, raising=False)
    model = build_encoder(backbone("llava_next"), device="cpu", peft_config=True)
    assert calls == [(model[0].model, {"use_gradient_checkpointing": False})]
    build_encoder(backbone("llava_next"), device="cpu")
    assert len(calls) == 1


def test_quantisation_without_its_library_is_an_error(backbone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a machine with a GPU may well quantise
    kwargs = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    with pytest.raises((ImportError, RuntimeError), match=r"bitsandbytes|CUDA|GPU"):
        build_encoder(backbone("llava_next"), device="cpu", peft_config=True, model_kwargs=kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_loads_adapters_in_the_type_they_were_trained_in(dtype, backbone, tmp_path):
    """Which need not be that of the backbone's files."""
    narrow = build_encoder(backbone("qwen2_vl"), device="cpu", torch_dtype="bfloat16")
    narrow[0].model.save_pretrained(tmp_path / "backbone")
    narrow[0].processor.save_pretrained(tmp_path / "backbone")
    model = build_encoder(tmp_path / "backbone", device="cpu", torch_dtype=dtype, peft_config=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "saved"))
    found = type(model)._load_with_module_classes(str(tmp_path / "saved")).state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype, name
