"""Write the emoji benchmark's images: drawings on white, and collages of them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

LARGEST = 160  # pixels; larger drawings are stored at this size, collages are made at it


def on_white(image: Image.Image) -> Image.Image:
    """Composite a picture on white: `convert("RGB")` alone would turn what is transparent black."""
    rgba = image.convert("RGBA")
    background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(background, rgba).convert("RGB")


def write_drawing(source: Path, target: Path) -> None:
    """Store a packaged drawing as PNG on white, at most `LARGEST` pixels wide."""
    with Image.open(source) as image:
        picture = on_white(image)
    if max(picture.size) > LARGEST:
        picture = picture.resize((LARGEST, LARGEST), Image.Resampling.BICUBIC)
    picture.save(target, compress_level=3)


def write_collage(drawings: list[Path], target: Path) -> None:
    """Put two drawings side by side, or four in the corners, each on a quarter of a white square."""
    half = LARGEST // 2
    canvas = Image.new("RGB", (LARGEST, LARGEST), "white")
    places = [(0, half // 2), (half, half // 2)] if len(drawings) == 2 else [(0, 0), (half, 0), (0, half), (half, half)]
    for path, place in zip(drawings, places, strict=True):
        with Image.open(path) as image:
            canvas.paste(image.resize((half, half), Image.Resampling.BICUBIC), place)
    canvas.save(target, compress_level=3)
