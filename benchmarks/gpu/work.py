"""Inputs of the GPU benchmarks: images of 336 to 1,024 pixels, texts of 5 to 300 tokens, both, with repeats or not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

LETTERS = "abcdefghijklmnopqrstuvwxyz "
QUESTIONS = tuple(f"Question {number}: {words}?" for number, words in enumerate((
    "what is this", "which colour is the left half", "how many are there", "where would it hang", "who made it",
    "is it old", "what comes closest to it", "which quarter is empty",
)))  # fmt: skip


def text(generator: random.Random, least: int = 5, most: int = 300) -> str:
    """Letters: the tokenizer has one token a byte; lengths spread evenly over their logarithm."""
    length = round(least * (most / least) ** generator.random())
    return "".join(generator.choices(LETTERS, k=max(length - 1, 1))) + "x"


def image(number: int, sides: Sequence[int]) -> Image.Image:
    """A picture of smooth colours, other for each number."""
    generator = np.random.default_rng(number)
    width, height = (int(generator.choice(sides)) for _ in range(2))
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def mixed(count: int, sides: Sequence[int], most_images: int = 4) -> list[Any]:
    """In turn a text, one to four images, and one with a text."""
    generator = random.Random(0)
    items: list[Any] = []
    for number in range(count):
        images = [image(10 * number + place, sides) for place in range(1 + generator.randrange(most_images))]
        both = {"image": images[:1], "text": text(generator)}
        items.append((text(generator), {"image": images}, both)[number % 3])
    return items


def with_repeats(items: list[Any], share: float) -> list[Any]:
    """As many inputs, of which a share repeats others."""
    generator = random.Random(1)
    distinct = items[: round(len(items) * (1 - share))]
    found = distinct + [distinct[generator.randrange(len(distinct))] for _ in range(len(items) - len(distinct))]
    generator.shuffle(found)
    return found


def questions(images: int, sides: Sequence[int]) -> list[Any]:
    """Eight questions about each image."""
    return [{"image": shown, "text": asked} for shown in (image(7000 + number, sides) for number in range(images))
            for asked in QUESTIONS]  # fmt: skip


def count_images(items: Sequence[Any]) -> int:
    parts = (item.get("image") for item in items if isinstance(item, dict))
    return sum(len(part) if isinstance(part, list) else 1 for part in parts)
