"""An encoder without its vision parts: text-only training needs neither the tower nor the projector in memory.

The model is built without them, so their weights are never read, moved or sent to other processes. Saving a whole model
reads them from the backbone's own files and puts them back for that moment, so what is saved is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

VISION_PARTS = ("vision_tower", "visual", "vision_model", "multi_modal_projector", "connector", "vision_embed_tokens")
"""What families call the parts of a model that only images pass through, as children of the model without a head."""

NO_IMAGES = (
    "This encoder was loaded with `text_only=True`, without its vision tower, so it takes texts alone. Load it again "
    "with `text_only=False` for images and videos."
)


class AbsentPart(nn.Module):
    """Stands where a vision part was: no weights, and none are loaded into it."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refuse images, and say what to do."""
        raise ValueError(NO_IMAGES)

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        """Take no weights, where a checkpoint of the whole model has some."""


def absent_parts(model: nn.Module) -> list[str]:
    """Names of the vision parts a model was loaded without."""
    return [name for name, module in model.named_children() if isinstance(module, AbsentPart)]


def load_text_model(source: str, config: PretrainedConfig, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model whose vision parts are :class:`AbsentPart`, and its report, without the keys of those parts."""
    whole: Any = MODEL_MAPPING[type(config)]
    dropped: list[str] = []

    def build(self: Any, config: PretrainedConfig, *args: Any, **options: Any) -> None:
        whole.__init__(self, config, *args, **options)
        for name in [name for name, _ in self.named_children() if name in VISION_PARTS]:
            setattr(self, name, AbsentPart())
            dropped.append(name)

    # The same name and module: transformers looks up a class's conversions and attention by them.
    lean: Any = type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__})
    model, report = lean.from_pretrained(source, config=config, output_loading_info=True, **kwargs)
    if not dropped:
        raise ValueError(
            f"{whole.__name__} has no part named {', '.join(VISION_PARTS)}, so `text_only=True` would leave nothing "
            "out. Leave it False."
        )
    model.__class__ = whole
    left = set(report.get("unexpected_keys", ()))
    vision = {key for key in left if any(part in dropped for part in key.split("."))}
    return model, {**report, "unexpected_keys": left - vision}


@contextmanager
def whole_model(model: PreTrainedModel, source: str) -> Iterator[None]:
    """Within this context a text-only model has its vision parts, read from the backbone's files in ``source``."""
    names = absent_parts(model)
    if not names:
        yield
        return
    try:
        backbone = AutoModel.from_pretrained(source, dtype=model.dtype, device_map={"": "cpu"}, trust_remote_code=False)
    except OSError as error:
        raise OSError(
            f"The model was loaded with `text_only=True` from {source}, whose files are needed again to save the "
            "vision tower with it. Put them back there, or save adapters alone (`merge_adapters=False`)."
        ) from error
    absent = {name: getattr(model, name) for name in names}
    try:
        for name in names:
            setattr(model, name, getattr(backbone, name).requires_grad_(False))
        del backbone
        yield
    finally:
        for name, part in absent.items():
            setattr(model, name, part)
