"""One opener: whatever the form and kind of an image, the same pixels; the oracle is the picture built as plain RGB."""

import io
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageOps, features

from unime_st.data import with_images
from unime_st.images import UnreadableImageError, as_rgb, from_array, open_image, stands_for_image
from unime_st.modules.inputs import as_messages

HEIGHT, WIDTH = 6, 9
GENERATOR = np.random.default_rng(0)
GREY = GENERATOR.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
COLOUR = GENERATOR.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
ALPHA = np.where(np.arange(WIDTH) % 2, 255, 0).astype(np.uint8)[None].repeat(HEIGHT, 0)
DEEP = GENERATOR.integers(0, 65536, (HEIGHT, WIDTH), np.uint16)
TURNS = range(2, 9)


def on_white(pixels, alpha=ALPHA):
    """Pixels where alpha is full, white where there is none."""
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, None].repeat(3, 2)
    return np.where(alpha[:, :, None] > 0, pixels, np.uint8(255))


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def forms(content, tmp_path, suffix=".png"):
    """A file's bytes in every form in which it may be given."""
    path = tmp_path / f"image{suffix}"
    path.write_bytes(content)
    yield "path", str(path)
    yield "Path", path
    yield "bytes", content
    yield "PIL", Image.open(path)
    yield "cell of bytes", {"bytes": content, "path": None}
    yield "cell of a path", {"bytes": None, "path": str(path)}
    yield "in a row", {"image": str(path), "text": "x"}
    yield "in a list", {"image": [content], "text": "x"}
    yield "chat", {"role": "user", "content": [{"type": "image", "image": str(path)}]}


def pixels_of(item):
    message = as_messages(item, 0)
    images = [part["image"] for turn in message for part in turn["content"] if part["type"] == "image"]
    assert len(images) == 1
    assert images[0].mode == "RGB"
    return np.asarray(images[0])


def check(content, expected, tmp_path, suffix=".png", tolerance=0):
    for form, item in forms(content, tmp_path, suffix):
        found = pixels_of(item)
        assert found.shape == expected.shape, form
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= tolerance, form


def turned(orientation):
    """A picture as it is stored, and as it is meant to be seen, for an EXIF orientation."""
    way = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    stored = Image.fromarray(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored, np.asarray(stored.transpose(way)), exif


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpeg"])
@pytest.mark.parametrize("orientation", TURNS)
def test_turned_as_exif_says(orientation, kind, tmp_path):
    stored, seen, exif = turned(orientation)
    options = {"lossless": True} if kind == "webp" else {}
    content = saved(stored, kind, exif=exif, **options)
    if kind == "jpeg":  # lossy: the oracle is Pillow's own decoding, turned
        seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        assert not np.array_equal(seen, np.asarray(Image.open(io.BytesIO(content))))
    check(content, seen, tmp_path, f".{kind}")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "CMYK"])
def test_turned_in_every_mode(mode):
    image = Image.fromarray(DEEP) if mode == "I;16" else Image.fromarray(COLOUR).convert(mode)
    expected = np.asarray(as_rgb(image.copy()).transpose(Image.Transpose.ROTATE_270))
    image.getexif()[0x0112] = 6
    np.testing.assert_array_equal(np.asarray(as_rgb(image)), expected)


def with_alpha(mode):
    grey, colour = Image.fromarray(GREY), Image.fromarray(COLOUR)
    alpha = Image.fromarray(ALPHA)
    if mode in ("LA", "La"):
        made = Image.merge("LA", (grey, alpha))
        return (made.convert("La") if mode == "La" else made), on_white(GREY)
    made = colour.copy()
    made.putalpha(alpha)
    return (made.convert("RGBa") if mode == "RGBa" else made), on_white(COLOUR)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa"])
def test_transparency_is_white(mode):
    image, expected = with_alpha(mode)
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(as_rgb(image)), expected)


@pytest.mark.parametrize(("mode", "kind"), [("LA", "png"), ("RGBA", "png"), ("RGBA", "tiff"), ("RGBA", "webp")])
def test_transparent_files(mode, kind, tmp_path):
    image, expected = with_alpha(mode)
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    check(saved(image, kind, **options), expected, tmp_path, f".{kind}")


def test_half_transparent(tmp_path):
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 128))
    check(saved(image, "png"), np.full((3, 3, 3), 127, np.uint8), tmp_path, tolerance=1)


@pytest.mark.parametrize("key", ["one colour", "bytes"])
@pytest.mark.parametrize("kind", ["png", "gif"])
def test_transparent_palettes(kind, key, tmp_path):
    if kind == "gif" and key == "bytes":
        key = "one colour"  # gif knows no other
    numbers = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 4
    image = Image.fromarray(numbers).convert("P")
    colours = [(10, 200, 30), (200, 0, 0), (0, 0, 200), (90, 90, 90)]
    image.putpalette(np.array(colours, np.uint8).tobytes())
    image.putdata(numbers.ravel().tolist())
    content = saved(image, kind, transparency=2 if key == "one colour" else bytes([255, 255, 0, 255]))
    expected = np.where(numbers[:, :, None] == 2, 255, np.array(colours, np.uint8)[numbers]).astype(np.uint8)
    check(content, expected, tmp_path, f".{kind}")


def test_palette_with_alpha():
    image = Image.fromarray(COLOUR[:, :, 0]).convert("P")
    made = image.convert("PA")
    made.putalpha(Image.fromarray(ALPHA))
    np.testing.assert_array_equal(np.asarray(as_rgb(made)), on_white(np.asarray(image.convert("RGB"))))


def test_colour_keys(tmp_path):
    pixels = COLOUR.copy()
    pixels[::2] = (1, 2, 3)
    key = (pixels == (1, 2, 3)).all(-1)
    assert key.any()
    expected = np.where(key[:, :, None], np.uint8(255), pixels)
    check(saved(Image.fromarray(pixels), "png", transparency=(1, 2, 3)), expected, tmp_path)
    grey = GREY.copy()
    grey[::2] = 7
    expected = on_white(grey, (grey != 7).astype(np.uint8))
    check(saved(Image.fromarray(grey), "png", transparency=7), expected, tmp_path)
    deep = DEEP.copy()
    deep[::2] = 500
    expected = on_white((deep >> 8).astype(np.uint8), (deep != 500).astype(np.uint8))
    check(saved(Image.fromarray(deep), "png", transparency=500), expected, tmp_path)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits_in_either_order(mode):
    order = ">" if mode.endswith("B") else "<"
    image = Image.frombytes("I;16B" if order == ">" else "I;16", (WIDTH, HEIGHT), DEEP.astype(f"{order}u2").tobytes())
    expected = (DEEP >> 8).astype(np.uint8)[:, :, None].repeat(3, 2)
    np.testing.assert_array_equal(np.asarray(as_rgb(image)), expected)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_files(kind, tmp_path):
    expected = (DEEP >> 8).astype(np.uint8)[:, :, None].repeat(3, 2)
    check(saved(Image.fromarray(DEEP), kind), expected, tmp_path, f".{kind}")


def test_a_big_endian_tiff(tmp_path):
    entries = [(256, 3, 1, WIDTH), (257, 3, 1, HEIGHT), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, HEIGHT), (279, 4, 1, 2 * DEEP.size)]
    data = DEEP.astype(">u2").tobytes()
    table = b"".join(
        struct.pack(">HHI", tag, kind, count)
        + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, count, value in entries
    )
    content = b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + struct.pack(">H", len(entries)) + table + b"\0" * 4
    check(content, (DEEP >> 8).astype(np.uint8)[:, :, None].repeat(3, 2), tmp_path, ".tif")


def test_floats(tmp_path):
    values = GENERATOR.random((HEIGHT, WIDTH), np.float32)
    expected = (values * 255).round().astype(np.uint8)[:, :, None].repeat(3, 2)
    np.testing.assert_array_equal(np.asarray(as_rgb(Image.fromarray(values))), expected)
    check(saved(Image.fromarray(values), "tiff"), expected, tmp_path, ".tiff")
    for bad in (1.5, -0.1, float("nan"), float("inf")):
        spoilt = values.copy()
        spoilt[0, 0] = bad
        with pytest.raises(UnreadableImageError, match="must lie in"):
            as_rgb(Image.fromarray(spoilt), "it")


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_are_pillows(mode):
    image = Image.fromarray(COLOUR).convert(mode)
    np.testing.assert_array_equal(np.asarray(as_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "jpeg"), ("CMYK", "tiff"), ("1", "png"), ("YCbCr", "jpeg")])
def test_files_of_other_modes(mode, kind, tmp_path):
    content = saved(Image.fromarray(COLOUR).convert(mode), kind)
    check(content, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), tmp_path, f".{kind}")


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    content = saved(frames[0], "gif", save_all=True, append_images=frames[1:])
    check(content, np.asarray(frames[0]), tmp_path, ".gif")


KINDS = {
    "bytes": (COLOUR, COLOUR),
    "int64": (COLOUR.astype(np.int64), COLOUR),
    "int16": (COLOUR.astype(np.int16), COLOUR),
    "16 bits": ((COLOUR.astype(np.uint16) << 8) + 9, COLOUR),
    "16 bits, big-endian": (((COLOUR.astype(np.uint16) << 8) + 9).astype(">u2"), COLOUR),
    "float32": ((COLOUR / 255).astype(np.float32), COLOUR),
    "float64": (COLOUR / 255, COLOUR),
    "float16": ((COLOUR / 255).astype(np.float16), COLOUR),
    "truths": (COLOUR > 127, np.where(COLOUR > 127, 255, 0).astype(np.uint8)),
    "alpha": (np.concatenate([COLOUR, ALPHA[:, :, None]], 2), on_white(COLOUR)),
    "grey": (GREY, GREY[:, :, None].repeat(3, 2)),
    "one channel": (GREY[:, :, None], GREY[:, :, None].repeat(3, 2)),
}


@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays(kind, first):
    array, expected = KINDS[kind]
    array = array.transpose(2, 0, 1) if first and array.ndim == 3 else array
    tolerance = 1 if kind == "float16" else 0
    asked = [array, np.asfortranarray(array), array[::-1][::-1]]
    if array.dtype.byteorder != ">":
        asked += [torch.from_numpy(np.ascontiguousarray(array))]
        if kind == "float32":
            asked.append(torch.from_numpy(np.ascontiguousarray(array)).requires_grad_())
    for one in asked:
        found = np.asarray(from_array(one))
        assert np.abs(found.astype(int) - expected).max() <= tolerance
        assert np.abs(pixels_of(one).astype(int) - expected).max() <= tolerance


def test_bfloat16():
    values = torch.tensor([[[0.0, 0.5], [1.0, 0.25]]] * 3, dtype=torch.bfloat16)
    assert np.asarray(from_array(values))[:, :, 0].tolist() == [[0, 128], [255, 64]]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 5, 3)),
        np.zeros((5, 0, 3), np.uint8),
        np.zeros((5, 5, 2)),
        np.zeros((5, 5, 5)),
        np.zeros((1, 5, 5, 3)),
        np.zeros(7),
        np.zeros(()),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), 1.01),
        np.full((4, 4, 3), -0.01),
        np.full((4, 4, 3), 256),
        np.full((4, 4, 3), -1),
        np.zeros((4, 4, 3), complex),
        np.full((4, 4, 3), "x"),
        np.full((4, 4, 3), None),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}{array.ravel()[:1]}",
)
def test_arrays_that_are_no_images(array):
    with pytest.raises(ValueError, match=r"the image: .*"):
        from_array(array)


@pytest.mark.parametrize("name", ["a.jfif", "b.avif", "c", "d.tif", "e.dat", "f.txt", "G.JPG", "h i.ppm", "é.png"])
def test_names_of_images_without_a_usual_suffix(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = {".avif": "avif", ".tif": "tiff", ".jfif": "jpeg", ".ppm": "ppm"}.get(Path(name).suffix, "png")
    if kind == "avif" and not features.check("avif"):
        kind = "png"
    content = saved(Image.fromarray(COLOUR), kind)
    (tmp_path / name).write_bytes(content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    for text in (name, str(tmp_path / name)):
        assert stands_for_image(text)
        np.testing.assert_array_equal(pixels_of(text), expected)
    assert not stands_for_image(f"{name}.")
    (tmp_path / "words").write_text("These are words.")
    assert not stands_for_image("words")


def test_data_sets_show_the_same(tmp_path):
    image, expected = with_alpha("RGBA")
    image.save(tmp_path / "a.png")
    deep = Image.fromarray(DEEP)
    deep.save(tmp_path / "b.png")
    rows = Dataset.from_dict({"text": ["a", "b"], "image": ["a.png", "b.png"]})
    batch = with_images(rows, image_root=tmp_path, image_columns=["image"])[:]
    found = [cell["image"] if isinstance(cell, dict) else cell for cell in batch["image"]]
    np.testing.assert_array_equal(np.asarray(found[0]), expected)
    np.testing.assert_array_equal(np.asarray(found[1]), (DEEP >> 8).astype(np.uint8)[:, :, None].repeat(3, 2))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"words"])
def test_what_is_no_image_is_named(content, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    for open_it in (partial(open_image, path), partial(open_image, content, "bad.png")):
        with pytest.raises(UnreadableImageError, match=r"bad\.png"):
            open_it()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("times", [1.5, 3], ids=["warned of", "refused"])
def test_a_large_image_without_a_suffix_is_an_image(times, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(HEIGHT * WIDTH / times))
    path = tmp_path / "scan"
    path.write_bytes(saved(Image.fromarray(COLOUR), "png"))
    assert stands_for_image(str(path))


@pytest.mark.parametrize("scheme", ["http", "HTTP", "Https", "hTTPS"])
def test_addresses_however_they_are_spelled(scheme):
    address = f"{scheme}://a.org/x.png"
    assert stands_for_image(address)
    for item in (address, {"image": address}, {"role": "user", "content": [{"type": "image", "url": address}]}):
        with pytest.raises(ValueError, match="Row 4 names a remote image"):
            as_messages(item, 4)
