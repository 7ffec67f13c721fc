"""Who may import whom: prompts and columns nothing, the pure core only torch, siblings not each other.

Examples import what is public.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "unime_st"
LAYERS = {
    "prompts": 0,
    "rerank_prompts": 0.2,
    "columns": 0,
    "published": 0,
    "paths": 0,
    "arguments": 0,
    "ahead": 0,
    "functional": 1,
    "distributed": 1,
    "features": 1,
    "fingerprint": 1.6,
    "files": 0.5,
    "folders": 1,
    "stock": 0.5,
    "token_budget": 1,
    "placement": 0.5,
    "step_encoder": 0.5,  # what losses ask of modules, below both
    "videos": 0.6,  # opens frames as images
    "images": 0.5,  # below what knows images by their pixels
    "identity": 1.5,
    "embedding": 1.8,
    "checkpoints": 2,
    "modules": 2,
    "losses": 2,
    "samplers": 2,
    "data": 2,
    "models": 2,
    "serve": 2.5,
    "evaluation": 3,
    "search": 3,
    "hub": 3,
    "model_card": 3,
    "training": 3.5,
    "cli": 4,
    "published_card": 4,
}
ROOT = 5  # __init__ names the public things of every layer, lazily


def module_of(path):
    return path.relative_to(SRC).with_suffix("").parts


def imports(path):
    """Absolute names imported anywhere in a file, those under `if TYPE_CHECKING` left out."""
    tree = ast.parse(path.read_text())
    checking = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(path for path in SRC.rglob("*.py") if path != SRC / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(module_of(path)))
def test_imports_go_down(path):
    own = module_of(path)[0]
    assert own in LAYERS, f"{own} has no layer: add it to LAYERS"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "unime_st" and len(parts) > 1:
            other = parts[1]
            if other not in LAYERS:
                assert other == "__version__", f"{path} imports {name}: only examples use the root"
                continue
            assert other == own or LAYERS[other] < LAYERS[own], f"{path} (layer {LAYERS[own]}) imports {name}"
        elif LAYERS[own] == 0:
            assert parts[0] in sys.stdlib_module_names, f"{path} is data: it may not import {name}"


EXAMPLES = Path(__file__).parents[1] / "examples"
PUBLIC_PACKAGES = (
    "unime_st",
    *(f"unime_st.{name}" for name in ("data", "evaluation", "losses", "modules", "samplers", "search", "training")),
)
"""Each says in `__all__` what of it is public."""
PUBLIC_MODULES = {f"unime_st.{name}" for name in ("checkpoints", "columns", "files", "functional", "images", "prompts")}
INTERNALS = {
    "unime_st.distributed.from_rank_zero",
    "unime_st.data.mmeb.named_rows.NamedRow",
    "unime_st.data.mmeb.named_rows.task_of",
    "unime_st.evaluation.mmeb.tasks.MMEBTask",
    "unime_st.evaluation.mmeb.tasks.Metric",
    "unime_st.evaluation.mmeb.tasks.image_task",
    "unime_st.evaluation.mteb_models.eval_results",
    "unime_st.evaluation.mteb_models.mteb_model_meta",
    "unime_st.evaluation.mteb_models.mteb_reranker",
    "unime_st.evaluation.mteb_models.rerank_with_mteb",
    "unime_st.evaluation.report.summary.add_mmeb",
    "unime_st.evaluation.report.summary.add_retrieval",
    "unime_st.evaluation.report.summary.add_sugarcrepe",
    "unime_st.hub.encoder_card",
    "unime_st.modules.text_only.VISION_PARTS",
    "unime_st.videos.VideoSettings",
    *(f"unime_st.training.planning.{name}" for name in ("GIB", "memory", "parameters_by_part")),
}
"""What the examples use beyond that."""


def test_examples_import_what_is_public():
    used = {name for path in EXAMPLES.rglob("*.py") for name in imports(path) if name.split(".")[0] == "unime_st"}
    public = {f"{name}.{own}" for name in PUBLIC_PACKAGES for own in importlib.import_module(name).__all__}
    beyond = {name for name in used - public if name.rpartition(".")[0] not in PUBLIC_MODULES}
    assert beyond == INTERNALS


def test_the_package_imports_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "PIL"}
    code = f"import sys, unime_st, unime_st.columns; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
