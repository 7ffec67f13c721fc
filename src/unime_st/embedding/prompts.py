"""Which prompt a model is to encode with: the one place that resolves names and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def prompt_options(
    model: Any, prompt: str | None = None, prompt_name: str | None = None, *, what: str = "model"
) -> dict[str, str]:
    """The prompt as options of ``encode``: by its text where that can be known, so that one prompt has one identity.

    Without text and name, the model's default counts. ``what`` is what errors call the model.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(prompts={"query": "Find: "}, default_prompt_name=None)
    >>> prompt_options(model, prompt_name="query"), prompt_options(model)
    ({'prompt': 'Find: '}, {})
    """
    if prompt is not None:
        if prompt_name is not None:
            raise ValueError(f"Give `prompt={prompt!r}` or `prompt_name={prompt_name!r}`, not both.")
        return {"prompt": prompt}
    prompts = getattr(model, "prompts", None)
    if not isinstance(prompts, Mapping):
        return {} if prompt_name is None else {"prompt_name": prompt_name}
    text = prompts.get(_default(model)) if prompt_name is None else _named(prompts, prompt_name, what)
    return {} if text is None else {"prompt": text}


def effective_prompt(model: Any, prompt: str | None = None, prompt_name: str | None = None) -> str | None:
    """The text that ``encode`` puts before inputs; here ``prompt`` wins over ``prompt_name``."""
    if prompt is not None:
        return prompt
    name = _default(model) if prompt_name is None else prompt_name
    return None if name is None else _named(getattr(model, "prompts", None) or {}, name, "model")


def _default(model: Any) -> Any:
    return getattr(model, "default_prompt_name", None)


def _named(prompts: Mapping[str, str], name: str, what: str) -> str:
    if name not in prompts:
        raise ValueError(
            f"`prompt_name={name!r}`, but the {what} has no prompt named {name!r}; it has {sorted(prompts) or 'none'}. "
            "Give its text as `prompt`."
        )
    return prompts[name]
