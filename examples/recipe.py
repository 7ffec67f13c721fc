"""Recipes: a stage of training in YAML, read into a dataclass whose sections are functions' arguments."""

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from sentence_transformers import SentenceTransformerTrainingArguments
from stage import judged_rows, teacher_labels

from unime_st import build_encoder
from unime_st.data import load_mmeb_train, load_nli
from unime_st.losses import CandidateKLLoss, DistillKLLoss, HardNegativeInfoNCELoss
from unime_st.modules import default_lora_config
from unime_st.samplers import FalseNegativeAwareBatchSampler

GIVEN = {  # arguments that are no keys, since the scripts or the Trainer give them
    "training": {"output_dir"},
    "encoder": {"backbone", "peft_config", "device"},
    "teacher": {"texts"},
    "loss": {"model"},
    "sampler": {"dataset", "batch_size", "drop_last", "valid_label_columns", "generator", "seed"},
}


class RecipeError(ValueError):
    """A recipe that cannot be followed; says which file and key."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What both stages need: a start, an output folder, and sections of arguments."""

    backbone: str  # a Hub name or folder of a transformers checkpoint, or the folder of a saved encoder
    output: str  # gets checkpoints/ and encoder/
    data: dict[str, Any]
    loss: dict[str, Any]
    training: dict[str, Any]
    encoder: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    sections: ClassVar[dict[str, Callable[..., Any]]] = {
        "training": SentenceTransformerTrainingArguments,
        "encoder": build_encoder,
        "lora": default_lora_config,
    }


@dataclass(frozen=True, kw_only=True)
class Stage1Recipe(Recipe):
    """Texts against a teacher."""

    teacher: dict[str, Any]

    sections: ClassVar = {**Recipe.sections, "data": load_nli, "teacher": teacher_labels, "loss": DistillKLLoss}


@dataclass(frozen=True, kw_only=True)
class Stage2Recipe(Recipe):
    """Multimodal pairs in MMEB-train's layout."""

    sampler: dict[str, Any] = field(default_factory=dict)

    sections: ClassVar = {
        **Recipe.sections,
        "data": load_mmeb_train,
        "loss": HardNegativeInfoNCELoss,
        "sampler": FalseNegativeAwareBatchSampler,
    }


@dataclass(frozen=True, kw_only=True)
class SoftLabelsRecipe(Recipe):
    """Rows with a judge's scores of their candidates (UniME-V2)."""

    sections: ClassVar = {**Recipe.sections, "data": judged_rows, "loss": CandidateKLLoss}


Kind = TypeVar("Kind", bound=Recipe)


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's numbers: 1.1 takes 5e-4 for a text."""


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_recipe(kind: type[Kind], path: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """Read a recipe; overrides are `output=x` or `training.learning_rate=1e-4`, their values YAML too."""
    values = yaml.load(Path(path).read_text(encoding="utf-8"), _Yaml)
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no keys. Copy one of examples/recipes and edit it.")
    for override in overrides:
        key, equals, value = override.partition("=")
        section, _, name = key.rpartition(".")
        inner = values.setdefault(section, {}) if section else values
        if not equals or not isinstance(inner, dict):
            raise RecipeError(f"{override!r} overrides nothing in {path}: write `key=value` or `section.key=value`.")
        inner[name] = yaml.load(value, _Yaml)
    own = {key.name: key.default is MISSING and key.default_factory is MISSING for key in fields(kind)}
    _check(path, "", values, own)
    for name, value in values.items():
        wanted = dict if name in kind.sections else str
        if not isinstance(value, wanted):
            shape = "a section of `key: value` lines" if wanted is dict else "a text"
            raise RecipeError(f"{path}: `{name}` is {value!r}, but it must be {shape}.")
        if name in kind.sections:
            parameters = inspect.signature(kind.sections[name]).parameters.values()
            keys = {key.name: key.default is key.empty for key in parameters if key.name not in GIVEN.get(name, ())}
            _check(path, f"{name}.", value, keys)
    return kind(**values)


def _check(path: str | Path, prefix: str, values: dict[str, Any], keys: dict[str, bool]) -> None:
    """Compare with the keys there are, each with whether it is required."""
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            advice = f"Did you mean `{prefix}{near[0]}`?" if near else f"Known are: {', '.join(sorted(keys))}."
            raise RecipeError(f"{path}: the key `{prefix}{key}` is unknown. {advice}")
    missing = [f"`{prefix}{key}`" for key, required in keys.items() if required and key not in values]
    if missing:
        raise RecipeError(f"{path}: {', '.join(missing)} missing. Add it there or on the command line.")


def recipe_from_command_line(
    kind: type[Kind], description: str | None, arguments: Sequence[str] | None
) -> tuple[Kind, argparse.Namespace]:
    """Parse `--recipe recipes/X.yaml key=value ...`; the options of a dry run are `dry_run` and `processes`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="a YAML file, see examples/recipes")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, load no weights, and stop")
    parser.add_argument("--processes", type=int, help="of the run that a dry run plans; default: those running")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.learning_rate=1e-4")
    given = parser.parse_intermixed_args(arguments)
    try:
        return read_recipe(kind, given.recipe, given.overrides), given
    except (OSError, RecipeError, yaml.YAMLError) as error:
        parser.error(str(error))
