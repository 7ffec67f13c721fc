"""Architectures that transformers lacks, registered with its Auto classes.

After ``import unime_st``, ``AutoModel.from_pretrained`` and everything built on it, sentence-transformers' own modules
included, read these checkpoints. It costs nothing until transformers is imported.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

__all__ = ["register_families"]

_HOST = "transformers"


def register_families() -> None:
    """Register with the Auto classes: now if transformers is imported already, otherwise as soon as it is."""
    if _HOST in sys.modules:
        _register()
    elif not any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HostFinder())


def _register() -> None:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    from unime_st.models.phi3_v.configuration import Phi3VConfig
    from unime_st.models.phi3_v.image_processing import Phi3VImageProcessor
    from unime_st.models.phi3_v.modeling import Phi3VForCausalLM, Phi3VModel
    from unime_st.models.phi3_v.processing import Phi3VProcessor

    AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig, exist_ok=True)
    AutoModel.register(Phi3VConfig, Phi3VModel, exist_ok=True)
    AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
    AutoModelForImageTextToText.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
    AutoImageProcessor.register(Phi3VConfig, Phi3VImageProcessor, Phi3VImageProcessor, exist_ok=True)
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)


class _HostFinder(MetaPathFinder):
    """Finds transformers once, as Python would, and registers the families after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithSequel(spec.loader, _register)
        return spec


@dataclass
class _LoaderWithSequel(Loader):
    """A module's own loader, with a function to call after the import."""

    loader: Any
    sequel: Callable[[], None]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.sequel()
