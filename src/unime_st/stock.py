"""What this package relies on in other libraries beyond their documented interface: each seam, in one place.

A seam that has moved is an error at import, with one sentence: a renamed method would else turn our own path off
without a word. Upper bounds in ``pyproject.toml`` follow from this list.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any


@dataclass(frozen=True)
class Seam:
    """Something undocumented of another library."""

    library: str  # its name on PyPI
    read_in: str  # the version whose source was read
    where: tuple[str, str]  # the module, and the path of the object in it
    why: str  # what of ours would break without it
    takes: tuple[str, ...] = ()  # names of parameters that we pass or receive


_ST, _TF = ("sentence-transformers", "6.2.0"), ("transformers", "5.23.0")
_MODEL = "sentence_transformers.sentence_transformer.model"
_CROSS = "sentence_transformers.cross_encoder.model"
_CARD = "sentence_transformers.sentence_transformer.model_card"
_MODULE = "sentence_transformers.base.modules"

SEAMS = (
    Seam(*_ST, (_MODEL, "SentenceTransformer._inference"), "`encode` computes each distinct input once", ("inputs",)),
    Seam(*_ST, (_MODEL, "SentenceTransformer._multi_process"), "pools name the caller's rows", ("inputs",)),
    Seam(*_ST, (_MODEL, "SentenceTransformer._resolve_inference_device"), "`encode(device=...)`", ("device",)),
    Seam(
        *_ST,
        (_MODEL, "SentenceTransformer._load_with_module_classes"),
        "the Trainer loads its best checkpoint with our module",
    ),
    Seam(*_ST, (_CROSS, "CrossEncoder._inference"), "`predict` computes each distinct pair once", ("inputs",)),
    Seam(*_ST, (_CROSS, "CrossEncoder._resolve_inference_device"), "`predict(device=...)`", ("device",)),
    Seam(*_ST, (_CROSS, "CrossEncoder._resolve_activation_fn"), "a saved activation"),
    Seam(
        *_ST, (_CROSS, "CrossEncoder._load_with_module_classes"), "the Trainer loads its best reranker with our module"
    ),
    Seam(*_ST, (_MODULE, "Transformer._load_model"), "text-only models, adapters, checked weights", ("config",)),
    Seam(*_ST, (_MODULE, "Transformer._should_flatten_inputs"), "rows stay rows under flash attention"),
    Seam(*_ST, (_MODULE, "Transformer.infer_modalities"), "which inputs a backbone takes"),
    Seam(
        *_ST,
        ("sentence_transformers.base.trainer", "BaseTrainer._load_from_checkpoint"),
        "going on from a checkpoint under FSDP",
        ("checkpoint_path",),
    ),
    Seam(*_ST, (_CARD, "SentenceTransformerModelCardData.set_widget_examples"), "no row is shown in a card"),
    Seam(*_ST, (_CARD, "SentenceTransformerModelCardData.extract_dataset_metadata"), "streams of images are seen"),
    Seam(*_ST, (_CARD, "SentenceTransformerModelCardData.run_usage_snippet"), "split weights are saved by the Trainer"),
    Seam(*_ST, (_CARD, "SentenceTransformerModelCardData.to_dict"), "no row is shown in a card"),
    Seam(*_TF, ("transformers.utils.output_capturing", "_CAN_RECORD_REGISTRY"), "pools of processes with LLaVA"),
    Seam(*_TF, ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"), "packed passes"),
    Seam(*_TF, ("transformers.modeling_utils", "PreTrainedModel._from_config"), "plans without weights", ("config",)),
    Seam(
        *_TF,
        ("transformers.trainer", "Trainer._load_from_checkpoint"),
        "going on from a checkpoint under FSDP",
        ("resume_from_checkpoint", "model"),
    ),
    Seam(*_TF, ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"), "packed passes"),
    Seam(*_TF, ("transformers.modeling_layers", "GradientCheckpointingLayer"), "packed passes, checkpointed"),
    Seam(*_TF, ("transformers.processing_utils", "ProcessorMixin._merge_kwargs"), "Phi-3-Vision's processor"),
)


def moved(seam: Seam) -> str:
    """What is wrong with a seam, in one sentence; "" for nothing."""
    module, path = seam.where
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        what = "is not there"
    else:
        called: Any = found
        known = inspect.signature(called).parameters if seam.takes else {}
        missing = [name for name in seam.takes if name not in known]
        if not missing:
            return ""
        what = f"takes no {', '.join(missing)}"
    return (
        f"unime_st relies on `{module}.{path}` of {seam.library} for this: {seam.why}; in version "
        f"{version(seam.library)} it {what} (it was read in {seam.read_in}). Install a version near that one."
    )


def require(library: str) -> None:
    """Refuse a library whose seams have moved, naming the first and what it is needed for."""
    for seam in SEAMS:
        if seam.library == library and (why := moved(seam)):
            raise ImportError(why)


for _library in sorted({seam.library for seam in SEAMS}):
    require(_library)
