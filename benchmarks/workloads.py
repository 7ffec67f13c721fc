"""What the speed benchmarks encode: texts of 5 to 300 tokens, images of several sizes, both, with duplicates or not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

SHORTEST, LONGEST = 5, 300  # tokens of a text
SIDES = (64, 96, 128, 192, 256, 384)  # pixels
COLOURS = ("red", "green", "blue", "orange", "purple", "black", "teal", "brown")
SYLLABLES = ("ba", "ko", "ri", "ta", "mu", "ne", "so", "li", "da", "vo", "pe", "xi")
QUESTIONS = (
    "What is drawn here?", "Which colour has the largest shape?", "How many corners can be seen?",
    "Is the shape on the left of the picture or on its right?", "Where would somebody hang this picture?",
    "What is behind it?", "Name the thing that comes closest to this shape.",
    "Which of the four quarters of the picture is empty?",
)  # fmt: skip

Item = str | dict[str, str]


def words(generator: random.Random) -> str:
    """A sentence of made-up words, of no certain length."""
    count = generator.randint(3, 12)
    return " ".join("".join(generator.choices(SYLLABLES, k=generator.randint(1, 3))) for _ in range(count))


def texts(count: int, tokens: Callable[[str], int]) -> list[Item]:
    """Texts whose lengths, which `tokens` counts, are spread evenly over the logarithm between 5 and 300 tokens."""
    generator = random.Random(0)
    found: list[Item] = []
    for number in range(count):
        wanted = round(SHORTEST * (LONGEST / SHORTEST) ** (number / max(1, count - 1)))
        text = words(generator)
        while tokens(text) < wanted:
            text = f"{text}. {words(generator)}"
        while tokens(text) > wanted and " " in text:
            text = text.rpartition(" ")[0]
        found.append(text)
    generator.shuffle(found)
    return found


def images(count: int, folder: Path) -> list[Item]:
    """Drawings of several sizes and shapes, as files."""
    generator = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Item] = []
    for number in range(count):
        size = generator.choice(SIDES), generator.choice(SIDES)
        image = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(image)
        for _ in range(6):
            left, top = generator.randrange(size[0] // 2), generator.randrange(size[1] // 2)
            box = (left, top, left + generator.randrange(8, size[0] // 2), top + generator.randrange(8, size[1] // 2))
            draw = pen.rectangle if generator.random() < 0.5 else pen.ellipse
            draw(box, fill=generator.choice(COLOURS))
        path = folder / f"{number}-{size[0]}x{size[1]}.png"
        image.save(path)
        found.append({"image": str(path)})
    return found


def mixed(texts_of: Sequence[Item], images_of: Sequence[Item]) -> list[Item]:
    """In turn a text, an image, and an image with a question: the sides of multimodal pairs."""
    found: list[Item] = []
    for number, (text, image) in enumerate(zip(texts_of, images_of, strict=True)):
        assert isinstance(image, dict)
        both: Item = {**image, "text": QUESTIONS[number % len(QUESTIONS)]}
        found.append((text, image, both)[number % 3])
    return found


def questions(images_of: Sequence[Item]) -> list[Item]:
    """Eight questions about each image, as in question answering."""
    return [{**image, "text": question} for image in images_of for question in QUESTIONS]  # type: ignore[dict-item]


def with_duplicates(items: Sequence[Item], count: int, share: float) -> list[Item]:
    """So many inputs in random order, of which a share repeats others; the distinct ones are the first of ``items``."""
    distinct = list(items[: round(count * (1 - share))])
    generator = random.Random(2)
    found = distinct + [distinct[generator.randrange(len(distinct))] for _ in range(count - len(distinct))]
    generator.shuffle(found)
    return found
