"""Unpacked packages in small: 96 made-up emoji by three vendors, with tones and genders, and made-up glosses."""

import json

import numpy as np
from PIL import Image

from emoji.packages import EMOJIBASE, FLUENT, NOTO, TWEMOJI, WORDNET, Fetched

TONE_CODES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
COLOURS = ("red", "blue", "green", "black")
SHAPES = ("heart", "square", "circle", "book", "kite", "boot", "boat", "tree", "lamp", "ring", "door", "drum")
JOBS = ("farmer", "pilot", "singer", "judge", "cook", "artist")


def make_fake_packages(root):
    rows, texts = [], []

    def add(code, label, group, subgroup, tones=False):
        image = code.lower() + ".png"
        variants = {}
        if tones:
            first, *rest = code.split("-")
            for tone in TONE_CODES:
                name = "-".join([first, tone, *rest]).lower() + ".png"
                variants[tone] = {"image": name}
        row = {"unified": code, "image": image, "category": group, "subcategory": subgroup}
        rows.append(row | ({"skin_variations": variants} if tones else {}))
        texts.append({"hexcode": code, "label": label, "tags": [f"{word}y" for word in label.split()] + ["k1", "k2"]})
        for number, name in enumerate([image, *(variant["image"] for variant in variants.values())]):
            _draw(root, name, len(rows), number)

    number = 0x2000
    for shape in SHAPES:
        for colour in COLOURS:
            number += 1
            add(f"{number:04X}", f"{colour} {shape}", "Symbols", "heart" if shape in SHAPES[:3] else "other-symbol")
    for job, code in zip(JOBS, range(0x3001, 0x3007), strict=True):
        for person, name in (("1F468", "man"), ("1F469", "woman"), ("1F9D1", "")):
            label = f"{name} {job}".strip()
            add(f"{person}-200D-{code:04X}", label, "People & Body", "person-role", tones=True)
    for index in range(30):
        add(f"{0x4000 + index:04X}", f"thing{index}", "Objects", f"tool-{index % 4}")
    add("1F1E6", "flag: nowhere", "Flags", "country-flag")
    add("1F468-200D-1F466", "family: man, boy", "People & Body", "family")
    _write(root / NOTO.folder / "package/emoji.json", json.dumps(rows))
    _write(root / EMOJIBASE.folder / "package/en/data.json", json.dumps(texts))
    dictionary = root / WORDNET.folder / "package/dict"
    licence = "  1 the licence  \n"
    nouns = [f'0000 03 n 01 term_{i} 0 000 | the meaning of number {i}; "an example {i}"  \n' for i in range(1200)]
    nouns += [f"0000 03 n 01 thing{i} 0 000 | what has nothing to do {i}  \n" for i in range(30)]
    nouns += [f"0000 03 n 01 thing{i} 0 000 | a thing with k1 upon it {i}  \n" for i in range(30)]
    nouns += [f"0000 03 n 01 twice 0 000 | one of several senses {i}  \n" for i in range(3)]
    _write(dictionary / "data.noun", licence + "".join(nouns) + "0000 03 n 01 short 0 000 | too short  \n")
    _write(dictionary / "data.verb", licence)
    _write(dictionary / "data.adj", licence + '0000 03 a 01 able(p) 0 000 | having what it needs: "so able"  \n')
    return Fetched(root)


def _draw(root, name, seed, tone):
    """A transparent picture, a little different with each vendor."""
    places = {
        "google": root / NOTO.folder / "package/img/google/64" / name,
        "twitter": root / TWEMOJI.folder / "package/img/twitter/64" / name,
        "fluent": root / FLUENT.folder / "package/assets" / name.replace(".png", ".webp"),
    }
    for index, (vendor, path) in enumerate(places.items()):
        size = 200 if vendor == "fluent" else 16
        pixels = np.zeros((size, size, 4), np.uint8)
        pixels[size // 4 :, size // 4 :] = (seed * 2 % 256, tone * 40, index * 90, 255)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **({"lossless": True} if vendor == "fluent" else {}))


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
