"""Every recipe and accelerate configuration is valid, and an invalid one says what is wrong where."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from datasets import Dataset

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
CONFIGS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}
GOOD = """\
backbone: model
output: out
data: {root: data}
loss: {temperature: 0.05}
training: {learning_rate: 5e-4}
"""


def kind_of(recipe, path):
    if path.stem.startswith("soft_labels"):
        return recipe.SoftLabelsRecipe
    return recipe.Stage1Recipe if "stage1" in path.stem else recipe.Stage2Recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_makes_its_loss_and_arguments(path, script, tmp_path):
    module, stage = script("recipe"), script("stage")
    recipe = module.read_recipe(kind_of(module, path), path, [f"output={tmp_path}", "training.use_cpu=true"])
    arguments = stage.training_arguments(recipe)
    assert arguments.learning_rate == recipe.training["learning_rate"]
    assert isinstance(recipe.training["learning_rate"], float)
    assert recipe.sections["loss"](None, **recipe.loss).temperature == recipe.loss["temperature"]
    assert recipe.sections["lora"](**recipe.lora).r == recipe.lora["rank"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_section_suits_its_function(path, script, tmp_path):
    """All sections but the miniature's data, which are made by `make demo`."""
    module = script("recipe")
    recipe = module.read_recipe(kind_of(module, path), path)
    if hasattr(recipe, "sampler"):
        stored = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["x", "y"], "subset": ["A", "A"]})
        sampler = recipe.sections["sampler"].configured(**recipe.sampler)(
            stored.with_transform(lambda rows: rows), 2, False
        )
        assert sampler.homogeneous == recipe.sampler.get("homogeneous", False)
    if path.stem.startswith("miniature"):
        return
    if path.stem.startswith("soft_labels"):
        assert recipe.output == f"outputs/{path.stem}"
        assert recipe.data["bad_images_log"] == f"{recipe.output}/bad_images.jsonl"
        return
    assert recipe.output == f"outputs/{path.stem.removeprefix('stage1_').removeprefix('stage2_')}_{path.stem[:6]}"
    if "stage1" in path.stem:
        assert recipe.encoder["text_only"]
    else:
        assert not recipe.encoder
        assert recipe.backbone == f"{recipe.output.removesuffix('2')}1/encoder"
        assert recipe.data["bad_images_log"] == f"{recipe.output}/bad_images.jsonl"
        assert (recipe.data["max_rows"], recipe.data["max_bad_images"]) == (50_000, 1000)
        assert recipe.data["subset_column"] == recipe.sampler["homogeneous"] is True


@pytest.mark.parametrize(
    ("family", "rate"), [("llava_next", 2e-5), ("phi3_v", 1e-4), ("llava_onevision", 2e-5), ("qwen2_vl", 1e-4)]
)
def test_the_paper_s_numbers(family, rate, script):
    """Table 6 and section 3.3 of the paper, with 8 processes; rates of families it does not print are UniME-V2's."""
    module = script("recipe")
    one = module.read_recipe(module.Stage1Recipe, EXAMPLES / f"recipes/stage1_{family}.yaml")
    two = module.read_recipe(module.Stage2Recipe, EXAMPLES / f"recipes/stage2_{family}.yaml")
    assert (one.training["per_device_train_batch_size"] * 8, one.training["num_train_epochs"]) == (768, 2)
    assert (one.training["learning_rate"], one.lora["rank"]) == (5e-4, 32)
    assert (two.training["per_device_train_batch_size"] * 8, two.training["max_steps"]) == (1024, 1000)
    assert (two.training["learning_rate"], two.lora["rank"], two.data["image_size"]) == (rate, 16, 336)
    loss = two.sections["loss"](None, **two.loss)
    assert (loss.temperature, loss.margin, loss.num_hard_negatives) == (0.02, 0.1, 8)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_vl_7b", "qwen3_vl"])
def test_unime_v2_s_numbers(name, script, tmp_path):
    """Its authors' script for Qwen2-VL, with 8 processes."""
    module = script("recipe")
    recipe = module.read_recipe(module.SoftLabelsRecipe, EXAMPLES / f"recipes/soft_labels_{name}.yaml")
    training = recipe.training
    assert (training["per_device_train_batch_size"] * 8, training["max_steps"]) == (512, 2000)
    assert (training["learning_rate"], training["warmup_steps"]) == (1e-4, 200)
    assert (recipe.data["num_negatives"], recipe.data["image_size"]) == (8, 672)
    lora = recipe.sections["lora"](**recipe.lora)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 64, 0.1)
    loss = recipe.sections["loss"](None, **recipe.loss)
    assert (loss.temperature, loss.direction, loss.mini_batch_size) == (0.02, "symmetric", 2)


def test_the_backbones(script):
    module = script("recipe")
    paths = [path for path in RECIPES if path.stem.startswith("stage1_")]
    found = {path.stem[7:]: module.read_recipe(module.Stage1Recipe, path).backbone for path in paths}
    assert found == {
        "llava_next": "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "phi3_v": "microsoft/Phi-3.5-vision-instruct",
        "qwen2_vl": "Qwen/Qwen2-VL-2B-Instruct",
        "qwen3_vl": "Qwen/Qwen3-VL-2B-Instruct",
    }
    assert {path.stem[7:] for path in RECIPES if path.stem.startswith("stage2_")} == set(found)


def test_overrides_are_yaml(script, tmp_path):
    module = script("recipe")
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    given = ["training.learning_rate=1e-3", "sampler.margin=null", "output=there", "data.subsets=[A, B]"]
    recipe = module.read_recipe(module.Stage2Recipe, path, given)
    assert recipe.training == {"learning_rate": 1e-3}
    assert recipe.sampler == {"margin": None}
    assert recipe.output == "there"
    assert recipe.data["subsets"] == ["A", "B"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("backbone", "backbon"), "the key `backbon` is unknown. Did you mean `backbone`?"),
        (lambda text: text.replace("output: out\n", ""), "`output` missing"),
        (
            lambda text: text.replace("temperature", "temprature"),
            "`loss.temprature` is unknown. Did you mean `loss.temp",
        ),
        (lambda text: text.replace("root: data", "split: original"), "`data.root` missing"),
        (lambda text: text.replace("{learning_rate: 5e-4}", "5e-4"), "`training` is 0.0005, but it must be a section"),
        (lambda text: text.replace("model", "[a]"), "`backbone` is ['a'], but it must be a text"),
        (lambda text: text + "sampler: {seed: 1}\n", "`sampler.seed` is unknown"),
        (lambda _: "", "holds no keys"),
        (lambda _: "loss: [", "while parsing"),
    ],
)
def test_a_bad_recipe_is_refused_on_the_command_line(change, message, script, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(change(GOOD))
    with pytest.raises(SystemExit) as stopped:
        script("train_stage2").main(["--recipe", str(path)])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "mine.yaml" in printed or "while parsing" in printed


@pytest.mark.parametrize("override", ["training.warmup", "backbone.name=x", "nonsense=1", "loss.k=3"])
def test_a_bad_override_is_refused(override, script, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    with pytest.raises(SystemExit):
        script("train_stage2").main(["--recipe", str(path), override])
    assert override.split("=")[0] in capsys.readouterr().err


def test_a_missing_recipe_is_named(script, capsys):
    with pytest.raises(SystemExit):
        script("train_stage1").main(["--recipe", "nowhere.yaml"])
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_its_configuration(name):
    config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == CONFIGS[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_there_are_no_other_configurations():
    assert {path.stem for path in (EXAMPLES / "accelerate").iterdir()} == set(CONFIGS)
