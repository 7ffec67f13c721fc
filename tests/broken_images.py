"""Files that are no usable image, by name: what decoders raise on them is of many kinds."""

import io
import os
import struct
import zlib

from tiny import picture


def encoded(kind, size=(40, 30), **options):
    buffer = io.BytesIO()
    picture("red", size).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(kind, content):
    """A PNG with one more chunk after its header."""
    png = encoded("png")
    return png[:33] + chunk(kind, content) + png[33:]


def bomb_size():
    png = encoded("png")
    header = struct.pack(">II", 60_000, 60_000) + png[24:29]
    return png[:8] + chunk(b"IHDR", header) + png[33:]


def broken_files():
    """Name -> content."""
    large = zlib.compress(b"A" * 10_000_000)
    avif, dds, ppm, sgi = (encoded(kind) for kind in ("avif", "dds", "ppm", "sgi"))
    return {
        "text-bomb.png": with_chunk(b"zTXt", b"k\0\0" + large),
        "itxt-bomb.png": with_chunk(b"iTXt", b"k\0\1\0\0\0" + large),
        "icc-bomb.png": with_chunk(b"iCCP", b"k\0\0" + large),
        "pixel-bomb.png": bomb_size(),
        "torn.png": encoded("png")[:60],
        "torn.jpg": encoded("jpeg")[:200],
        "no-end.gif": encoded("gif")[:12],
        "broken.avif": avif[:120] + bytes(len(avif) - 120),
        "broken.ppm": ppm.replace(b"255", b"99999999", 1),
        "broken.dds": dds[:80] + struct.pack("<I", 4) + b"XYZ9" + dds[88:],
        "broken.sgi": sgi[:3] + b"\x07" + sgi[4:],
        "thin.png": encoded("png", (1093, 5)),
        "high.png": encoded("png", (3, 700)),
        "words.png": b"no image",
        "nothing.png": b"",
    }


def broken_paths(folder):
    """Names below a folder that are no files, or none that can be read; some are made."""
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    return ["pipe.png", "folder.png", "circle.png", "gone.png", "x" * 300 + ".png", "a\0b.png", "none.png"]
