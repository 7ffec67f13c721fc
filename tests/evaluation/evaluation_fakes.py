"""A model small enough to know everything about."""

import hashlib

import numpy as np
import torch
from torch import nn


class HashModel(nn.Module):
    """Embeds by content: a hash gives random numbers, a weight turns them. Counts what it is asked to encode."""

    def __init__(self, dim=6, levels=None, fail_after=None):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim) + 0.1)
        self.dim, self.levels, self.fail_after = dim, levels, fail_after
        self.encoded = []
        self.prompts, self.default_prompt_name = {"query": "Find: "}, None

    def vector(self, item, prompt=""):
        seed = int.from_bytes(hashlib.sha256(repr((prompt, item)).encode()).digest()[:8], "big")
        rng = np.random.default_rng(seed)
        if self.levels:  # few distinct directions, so that ties happen
            return np.eye(self.dim)[rng.integers(self.levels)]
        return rng.normal(size=self.dim)

    def encode(self, items, *, batch_size=32, prompt=None, prompt_name=None, **kwargs):
        if self.fail_after is not None and len(self.encoded) >= self.fail_after:
            raise KeyboardInterrupt
        self.encoded.extend(items)
        prompt = prompt or self.prompts.get(prompt_name, "")
        vectors = np.stack([self.vector(item, prompt) for item in items]) @ self.weight.detach().numpy()
        return vectors.astype(np.float32)
