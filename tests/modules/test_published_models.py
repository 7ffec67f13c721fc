"""Published UniME models: plain repositories, in whatever layout, give the embeddings of a forward pass by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiny import picture
from unime_st import build_encoder, export_encoder, load_encoder
from unime_st.evaluation import published_results
from unime_st.published import PUBLISHED

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "published_prompts.json").read_text())
REPOSITORIES = {  # one a family
    "llava_next": "DeepGlint-AI/UniME-LLaVA-1.6-7B",
    "llava_onevision": "TianchengGu/UniME-V2-LLaVA-OneVision-8B",
    "qwen2_vl": "TianchengGu/UniME-V2-Qwen2VL-7B",
    "phi3_v": "DeepGlint-AI/UniME-Phi3.5-V-4.2B",
    "qwen3_vl": "Qwen/Qwen3-VL-Embedding-2B",
}
RENAMED = ("llava_next", "llava_onevision")
"""Those whose files transformers reads under the names of both its older and its newer versions."""
ITEMS = {"image": picture("red"), "text": "<sent>", "both": {"image": picture("red"), "text": "<sent>"}}


def by_hand(model, processor, family):
    """Embeddings from the published prompts, the model with its head, and nothing of this package."""
    rows = []
    if pixels := PUBLISHED[REPOSITORIES[family]].pixels:
        processor.image_processor.size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    for kind in ITEMS:
        prompt = GOLDEN[REPOSITORIES[family]][kind]["prompt"]
        images = {} if kind == "text" else {"images": [picture("red")]}
        inputs = processor(text=[prompt], return_tensors="pt", **images)
        with torch.no_grad():
            state = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
        rows.append(torch.nn.functional.normalize(state.float(), dim=-1))
    return torch.cat(rows).numpy()


@pytest.fixture(scope="module")
def expected(backbone):
    known = {}

    def get(family):
        if family not in known:
            folder = backbone(family)
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
            known[family] = by_hand(model, AutoProcessor.from_pretrained(folder), family)
        return known[family]

    return get


def merged(source, target):
    shutil.copytree(source, target)


def sharded(source, target):
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_pretrained(source).save_pretrained(target, max_shard_size="60KB")
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert (target / "model.safetensors.index.json").is_file()


def renamed(source, target, change):
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    changed = {new: value for name, value in tensors.items() if (new := change(name)) is not None}
    assert set(changed) != set(tensors)
    save_file(changed, file, metadata={"format": "pt"})


def without_head(source, target):
    renamed(source, target, lambda name: None if "lm_head" in name else name)


def names_in_memory(source, target):
    """As the model's modules are called today; the files have the older `language_model.model.*`."""
    model = AutoModelForImageTextToText.from_pretrained(source)
    shutil.copytree(source, target)
    before = set(load_file(target / "model.safetensors"))
    names = {name: value.contiguous() for name, value in model.state_dict().items()}
    assert set(names) != before
    save_file(names, target / "model.safetensors", metadata={"format": "pt"})


LAYOUTS = (merged, sharded, without_head, names_in_memory)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        (family, layout)
        for family in REPOSITORIES
        for layout in LAYOUTS
        if layout is not names_in_memory or family in RENAMED
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_layout_gives_the_embeddings_made_by_hand(family, layout, backbone, expected, tmp_path):
    layout(backbone(family), tmp_path / "repository")
    model = load_encoder(tmp_path / "repository", published=REPOSITORIES[family], device="cpu")
    found = np.concatenate([model.encode([item]) for item in ITEMS.values()])
    np.testing.assert_allclose(found, expected(family), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-2


@pytest.mark.parametrize(
    ("family", "old"),  # the tensors of phi3_v and qwen3_vl never had other names
    [
        (family, old)
        for family in REPOSITORIES
        for old in (False, True)
        if not old or family not in ("phi3_v", "qwen3_vl")
    ],
)
def test_an_adapter_alone_finds_its_base_and_its_modules(family, old, backbone, tmp_path):
    with_head = AutoModelForImageTextToText.from_pretrained(backbone(family), dtype=torch.float32)
    target = r".*layers\.\d+\.(self_attn\.(o_proj|q_proj|v_proj|qkv_proj))"
    if family != "phi3_v":
        target = f".*language_model{target}"
    config = LoraConfig(r=4, target_modules=target, init_lora_weights=False)
    tuned = get_peft_model(with_head, config).eval()
    folder = tmp_path / "adapter"
    tuned.save_pretrained(folder)
    if old:
        before, after = "model.language_model.", "model." if family == "qwen2_vl" else "language_model.model."
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        changed = {
            name.replace(f"base_model.model.{before}", f"base_model.model.{after}"): v for name, v in tensors.items()
        }
        assert not set(changed) & set(tensors)
        save_file(changed, file)
    expected = by_hand(tuned, AutoProcessor.from_pretrained(backbone(family)), family)
    model = load_encoder(folder, published=REPOSITORIES[family], device="cpu")
    found = np.concatenate([model.encode([item]) for item in ITEMS.values()])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - build_encoder(backbone(family), device="cpu").encode(list(ITEMS.values()))).max() > 1e-2
    exported = export_encoder(model, tmp_path / "encoder")
    with pytest.raises(ValueError, match="is a saved encoder"):
        load_encoder(exported, published=REPOSITORIES[family])
    again = load_encoder(exported, device="cpu")
    np.testing.assert_allclose(again.encode(list(ITEMS.values())), found, atol=1e-5)


@pytest.mark.parametrize("repository", PUBLISHED)
def test_prompts_and_token_ids_are_those_of_the_golden_file(repository, backbone):
    model = load_encoder(backbone(PUBLISHED[repository].family), published=repository, device="cpu")
    several = {"image": [picture("red"), picture("green")]}
    asked = [*((kind, item, None) for kind, item in ITEMS.items()), ("images", several, None)]
    asked.append(("told", ITEMS["both"], "Find its twin."))  # an instruction of the user's
    assert {kind for kind, _, _ in asked} == set(GOLDEN[repository])
    for kind, item, prompt in asked:
        ids = model[0].preprocess([item], prompt=prompt)["input_ids"][0].tolist()
        assert ids == GOLDEN[repository][kind]["ids"], kind
        parts = [{"type": "image"}] * (0 if kind == "text" else len(item["image"]) if kind == "images" else 1)
        parts += [{"type": "text", "text": "<sent>"}] if kind in ("text", "both", "told") else []
        told = [] if prompt is None else [{"role": "system", "content": [{"type": "text", "text": prompt}]}]
        turns = [*told, {"role": "user", "content": parts}]
        rendered = model[0].processor.apply_chat_template(turns, tokenize=False)
        assert rendered == GOLDEN[repository][kind]["prompt"], kind


def test_names_that_transformers_does_not_read_are_refused(backbone, tmp_path):
    names_in_memory(backbone("qwen2_vl"), tmp_path / "repository")  # it takes `model.visual` for the language model's
    if Version(transformers.__version__) < Version("5.10"):  # which read them
        loaded = load_encoder(tmp_path / "repository", published=REPOSITORIES["qwen2_vl"], device="cpu")
        right = build_encoder(backbone("qwen2_vl"), device="cpu")
        assert torch.equal(
            loaded[0].model.visual.patch_embed.proj.weight, right[0].model.visual.patch_embed.proj.weight
        )
        return
    with pytest.raises(ValueError, match=r"missing \(visual.blocks.0.attn.proj.bias"):
        load_encoder(tmp_path / "repository", published=REPOSITORIES["qwen2_vl"], device="cpu")


def test_a_partial_checkpoint_lists_what_is_missing(backbone, tmp_path):
    renamed(backbone("llava_next"), tmp_path / "part", lambda name: None if "model.layers.1.mlp" in name else name)
    with pytest.raises(ValueError, match=r"3 missing \(language_model.layers.1.mlp.down_proj.weight"):
        load_encoder(tmp_path / "part", published=REPOSITORIES["llava_next"], device="cpu")


def test_a_shard_that_is_not_there(backbone, tmp_path):
    sharded(backbone("qwen2_vl"), tmp_path / "part")
    min((tmp_path / "part").glob("model-*.safetensors")).unlink()
    with pytest.raises((OSError, ValueError), match="model-00001"):
        load_encoder(tmp_path / "part", published=REPOSITORIES["qwen2_vl"], device="cpu")


def test_an_adapter_of_another_base_is_refused(backbone, tmp_path):
    tuned = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(backbone("qwen2_vl")), LoraConfig(r=4, target_modules=["qkv"])
    )
    tuned.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(backbone("llava_next"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"does not fit LlavaNextModel: 4 tensors.*another backbone"):
        build_encoder(tmp_path, device="cpu")


def test_an_adapter_cut_short_is_refused(backbone, tmp_path):
    config = LoraConfig(r=4, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(AutoModelForImageTextToText.from_pretrained(backbone("llava_next")), config).save_pretrained(
        tmp_path
    )
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"1 tensors have no place.*lora_B"):
        build_encoder(tmp_path, device="cpu")


def test_a_processor_of_another_model_is_refused(backbone, tmp_path):
    shutil.copytree(backbone("llava_next"), tmp_path / "mixed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(backbone("qwen2_vl") / name, tmp_path / "mixed" / name)
    with pytest.raises(ValueError, match=r"The processor in .* is not the model's"):
        load_encoder(tmp_path / "mixed", published=REPOSITORIES["llava_next"], device="cpu")


def test_a_folder_of_another_family_and_a_name_that_is_not_published(backbone):
    with pytest.raises(ValueError, match=r"is a llava_next, but this folder holds a qwen2_vl"):
        load_encoder(backbone("qwen2_vl"), published=REPOSITORIES["llava_next"], device="cpu")
    with pytest.raises(ValueError, match=r"no published checkpoint 'UniME'. Known are DeepGlint-AI"):
        load_encoder(backbone("qwen2_vl"), published="UniME", device="cpu")


def test_their_results_are_in_the_published_table():
    for benchmark in ("mmeb", "mmeb_v2"):
        rows = {row["model"] for row in published_results(benchmark)}
        named = {known.results for known in PUBLISHED.values() if known.benchmark == benchmark}
        assert named
        assert named <= rows
