"""Pictures with captions, and the shortest training run."""

import numpy as np
from PIL import Image

TRAIN = ["--device", "cpu", "--batch-size", "4", "--max-steps", "3", "--learning-rate", "1e-3", "--held-out", "0.3"]


def draw(folder, count=24):
    """Pictures in a folder, and a table of their captions."""
    folder.mkdir(parents=True)
    lines = ["caption,image"]
    for number in range(count):
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((30 + 28 * (number % 2), 30), Image.Resampling.NEAREST).save(
            folder / f"{number}.png"
        )
        lines.append(f"number {number} {'abcdefg'[number % 7] * 3},{number}.png")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"
