"""Models that capture inner hidden states, as LLaVA's vision tower does, in another process.

transformers captures by hooks that are local functions, which do not pickle, and knows what can be captured from a
table that is filled when a model is made, not when it is unpickled.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

_INSTALLED = "_output_capturing_hooks_installed"


def remove_capture_hooks(model: nn.Module) -> int:
    """Remove the capturing hooks of a model, in place, and count them; transformers installs them when needed."""
    removed = 0
    for module in model.modules():
        hooks = module._forward_hooks
        found = [key for key, hook in hooks.items() if getattr(hook, "__module__", "") == output_capturing.__name__]
        for key in found:
            del hooks[key]
        removed += len(found)
        if module.__dict__.get(_INSTALLED):
            setattr(module, _INSTALLED, False)
    return removed


def enable_capture(model: nn.Module) -> None:
    """Tell transformers of this process what a model that was unpickled can capture, as making one would."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            output_capturing._CAN_RECORD_REGISTRY[module] = module._can_record_outputs
