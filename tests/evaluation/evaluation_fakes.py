"""A model small enough to know everything about."""

import hashlib

import numpy as np
import torch
from PIL import Image
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


class TableModel(HashModel):
    """Embeds what names the number N, as a text "... #N" or an image of the colour (N, 0, 0), as row N of a table."""

    def __init__(self, table):
        super().__init__(dim=table.shape[1])
        self.table = np.asarray(table, dtype=np.float32)

    def number(self, item):
        if isinstance(item, dict) and item.get("image") is not None:
            item = item["image"]
            if not isinstance(item, Image.Image):
                with Image.open(item) as opened:
                    item = opened.convert("RGB")
        if isinstance(item, Image.Image):
            return item.getpixel((0, 0))[0]
        text = item["text"] if isinstance(item, dict) else item
        return int(text.rsplit("#", 1)[1])

    def vector(self, item, prompt=""):
        return self.table[self.number(item)]

    def encode(self, items, **kwargs):
        self.encoded.extend(items)
        return np.stack([self.vector(item) for item in items])


def numbered_picture(number, path=None):
    """An image that [`TableModel`] knows as `number`; saved, if a path is given."""
    picture = Image.new("RGB", (6, 6), (number, 0, 0))
    if path is None:
        return picture
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def cosines(table):
    """Cosine of every pair of rows, in plain Python; equal rows have equal cosines with any third."""
    rows = [[float(value) for value in row] for row in table]
    norms = [sum(value * value for value in row) ** 0.5 for row in rows]
    return [
        [sum(x * y for x, y in zip(a, b, strict=True)) / (norms[i] * norms[j]) for j, b in enumerate(rows)]
        for i, a in enumerate(rows)
    ]
