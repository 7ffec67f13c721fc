"""Options that building and loading an encoder share: refused by name, and put as transformers takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def weight_options(
    torch_dtype: str | torch.dtype, attn_implementation: str | None, model_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for the weights; what ``model_kwargs`` says of the type goes first."""
    options: dict[str, Any] = {"dtype": torch_dtype, **(model_kwargs or {})}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    return options


def check_sizes(**sizes: int | None) -> None:
    """Refuse bounds that are no whole number of at least 1, nor None."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"`{name}={size!r}`, but it must be a whole number of at least 1, or None for no limit.")


def check_device(device: str | None) -> None:
    """Refuse a name by which torch knows no device."""
    try:
        torch.device(device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device={device!r}` is no device of torch, such as 'cpu' or 'cuda:0': {error}") from error


def check_dtype(dtype: Any) -> None:
    """Refuse what is no type of torch, nor the name of one."""
    known = dtype == "auto" if isinstance(dtype, str) else isinstance(dtype, torch.dtype)
    if not known and not (isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)):
        raise ValueError(
            f"`torch_dtype={dtype!r}`, but it must be 'auto', a type of torch such as 'bfloat16', or its name."
        )
