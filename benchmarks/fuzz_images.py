"""Images in every format that Pillow writes here, and ways to damage them: what `fuzz.py` opens."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, features

_MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F", "YCbCr")
_OPTIONS: dict[str, list[dict]] = {
    "TIFF": [{}, *({"compression": kind} for kind in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"))],
    "JPEG": [{}, {"progressive": True}], "GIF": [{}, {"save_all": True, "append_images": "same"}],
    "WEBP": [{}, {"lossless": True}], "PNG": [{}, {"save_all": True, "append_images": "same"}],
}  # fmt: skip
_SKIPPED = {"PDF", "PALM"}  # written, never read
_MODES_OF = {"group4": ("1",), "jpeg": ("RGB", "L", "RGBA", "LA", "CMYK", "YCbCr")}  # older Pillows crash on others


def seeds(generator: np.random.Generator) -> dict[str, bytes]:
    """Format and mode -> a good file; what a format cannot hold, or Pillow was built without, is left out."""
    Image.init()
    noise = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    found = {}
    for kind in sorted(set(Image.SAVE) - _SKIPPED):
        for mode in _MODES:
            for number, given in enumerate(_OPTIONS.get(kind, [{}])):
                if mode not in _MODES_OF.get(given.get("compression", ""), _MODES):
                    continue
                image = _in_mode(noise, mode)
                options = {name: [image] if value == "same" else value for name, value in given.items()}
                buffer = io.BytesIO()
                try:
                    image.save(buffer, kind, **options)
                    Image.open(io.BytesIO(buffer.getvalue())).load()
                except Exception:  # noqa: BLE001 (a format that does not do this says so in its own way)
                    if kind != "EPS" or not buffer.getvalue():  # written, but opened by a program: to be refused
                        continue
                found[f"{kind}/{mode}/{number}"] = buffer.getvalue()
    return found


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    return image.convert(mode)


def _flip(content: bytes, generator: np.random.Generator, count: int) -> bytes:
    damaged = bytearray(content)
    for place in generator.integers(0, len(damaged), count):
        damaged[place] ^= 1 << int(generator.integers(8))
    return bytes(damaged)


def flip_few(content: bytes, generator: np.random.Generator) -> bytes:
    """One to four flipped bits."""
    return _flip(content, generator, int(generator.integers(1, 5)))


def flip_many(content: bytes, generator: np.random.Generator) -> bytes:
    """A bit in every fiftieth byte."""
    return _flip(content, generator, max(8, len(content) // 50))


def flip_header(content: bytes, generator: np.random.Generator) -> bytes:
    """Some bytes of the first hundred are random."""
    damaged = bytearray(content)
    for place in generator.integers(0, min(100, len(damaged)), int(generator.integers(1, 7))):
        damaged[place] = int(generator.integers(256))
    return bytes(damaged)


def truncate(content: bytes, generator: np.random.Generator) -> bytes:
    """Cut off anywhere, at nothing too."""
    return content[: int(generator.integers(len(content)))]


def insert(content: bytes, generator: np.random.Generator) -> bytes:
    """Random bytes in between."""
    place = int(generator.integers(len(content)))
    return content[:place] + generator.bytes(int(generator.integers(1, 200))) + content[place:]


def remove(content: bytes, generator: np.random.Generator) -> bytes:
    """A part is missing."""
    start = int(generator.integers(len(content)))
    return content[:start] + content[start + int(generator.integers(1, 64)) :]


def repeat(content: bytes, generator: np.random.Generator) -> bytes:
    """A part comes twice."""
    start = int(generator.integers(len(content)))
    return content[: start + 64] + content[start:]


def lengths(content: bytes, generator: np.random.Generator) -> bytes:
    """Four or two bytes somewhere, most often in the header, hold a number far too large, or zero."""
    damaged = bytearray(content)
    number = int(generator.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 10**5]))
    end = len(damaged) if generator.random() < 0.3 else min(64, len(damaged))
    place = int(generator.integers(max(1, end - 4)))
    packed = struct.pack(">I" if generator.random() < 0.5 else "<I", number)
    damaged[place : place + 4] = packed
    return bytes(damaged)


def _png(chunks: list[tuple[bytes, bytes]], size: tuple[int, int] = (8, 8)) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    data = (b"IDAT", zlib.compress(bytes(min((size[0] * 3 + 1) * size[1], 10**6))))
    parts = [header, *chunks, data, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in parts
    )


def bomb(_: bytes, generator: np.random.Generator) -> bytes:
    """Little that unpacks to a lot, by pixels or by text, or a side no image has."""
    large = zlib.compress(bytes(int(generator.integers(2, 70)) * 10**6))
    kind = int(generator.integers(6))
    texts = ([(b"zTXt", b"k\0\0" + large)], [(b"iTXt", b"k\0\1\0\0\0" + large)], [(b"iCCP", b"k\0\0" + large)],
             [], [(b"tEXt", b"k\0" + bytes(1000))] * 80)  # fmt: skip
    if kind == 3:
        return _png([], (int(generator.integers(20_000, 2**31)), int(generator.integers(20_000, 2**31))))
    if kind < 5:
        return _png(texts[kind])
    return _png([], (int(generator.integers(1, 4)), 0) if generator.random() < 0.5 else (2**20, 1))


def wrong_kind(_: bytes, generator: np.random.Generator) -> bytes:
    """Something else under an image's name."""
    others = [b"", b"\0", b"a text", b"<html></html>", b"PK\3\4" + bytes(60), b"%PDF-1.4\n", b"%!PS\n"]
    others += [
        b"\x89PNG\r\n\x1a\n",
        b"BM",
        b"GIF89a",
        b"II*\0",
        b"MM\0*",
        b"RIFF\0\0\0\0WEBP",
        b"\xff\xd8\xff",
        generator.bytes(500),
    ]
    others += [b"P6 99999999 99999999 255\n", b"P1 5 5\n2 2 2", b'<svg xmlns="http://www.w3.org/2000/svg"/>']
    return others[int(generator.integers(len(others)))]


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "a few bits flipped": flip_few, "many bits flipped": flip_many, "random bytes in the header": flip_header,
    "truncated": truncate, "bytes inserted": insert, "bytes removed": remove, "a part repeated": repeat,
    "lengths and sizes changed": lengths, "bombs (pixels, texts, profiles)": bomb, "another kind of file": wrong_kind,
}  # fmt: skip


def formats() -> list[str]:
    """What this Pillow was built with, beyond its own code."""
    return [*features.get_supported_codecs(), *features.get_supported_modules()]
