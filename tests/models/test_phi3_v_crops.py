"""Phi-3-Vision: geometry and pixels of the crops, and how many embeddings an image gets."""

import numpy as np
import phi3_v_oracle as oracle
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from unime_st.models.phi3_v import Phi3VImageProcessor

SIZES = [(56, 56), (40, 30), (30, 40), (200, 20), (20, 200), (57, 56), (111, 113), (640, 480), (500, 3)]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "num_crops", "grid", "tokens"),
    [
        ((336, 336), 16, (4, 4), 2509),
        ((1344, 1344), 16, (4, 4), 2509),
        ((640, 480), 16, (4, 3), 1921),
        ((480, 640), 16, (3, 4), 1933),
        ((1344, 336), 16, (8, 2), 2485),
        ((336, 5376), 16, (1, 16), 2653),
        ((640, 480), 4, (2, 2), 757),
        ((336, 336), 4, (2, 2), 757),
        ((1000, 250), 4, (4, 1), 745),
        ((250, 1000), 4, (1, 4), 781),
        ((640, 480), 1, (1, 1), 313),
    ],
)
def test_grids_and_counts_of_the_published_size(size, num_crops, grid, tokens):
    processor = Phi3VImageProcessor(num_crops=num_crops)
    assert processor.grid(*size) == grid
    assert processor.count_tokens(*size) == tokens
    columns, rows = grid
    lines = rows * 12 * (columns * 12 + 1) + 1 + 12 * (12 + 1)  # each line of 12 places a crop has its end
    assert tokens == lines


@pytest.mark.parametrize("num_crops", [1, 2, 3, 4, 6, 9, 16])
def test_every_grid_keeps_to_its_bound_and_to_the_other_computation(num_crops):
    processor = Phi3VImageProcessor(num_crops=num_crops, size={"height": 8, "width": 8})
    for width in range(10, 800, 97):
        for height in range(10, 800, 83):
            columns, rows = processor.grid(width, height)
            assert 1 <= columns * rows <= num_crops
            full = oracle.canvas(Image.new("RGB", (width, height)), num_crops, 8)
            assert (rows * 8, columns * 8) == full.shape[:2]


@pytest.mark.parametrize("num_crops", [1, 4, 6])
@pytest.mark.parametrize("size", SIZES)
def test_pixels(size, num_crops):
    image = noise(*size)
    processor = Phi3VImageProcessor(num_crops=num_crops, num_img_tokens=4, size={"height": 56, "width": 56})
    found = processor(image, return_tensors="pt")
    expected, (rows, columns) = oracle.crops(image, num_crops, 56)
    assert found["image_sizes"].tolist() == [[rows * 56, columns * 56]]
    assert (columns, rows) == processor.grid(*size)
    assert found["pixel_values"].shape == (1, 1 + rows * columns, 3, 56, 56)
    torch.testing.assert_close(found["pixel_values"][0].double(), expected, atol=2e-5, rtol=0)


def test_missing_crops_of_a_batch_are_zero():
    processor = Phi3VImageProcessor(num_crops=4, num_img_tokens=4, size={"height": 56, "width": 56})
    images = [noise(200, 100), noise(100, 100), noise(100, 210)]
    together = processor(images, return_tensors="pt")
    assert together["image_sizes"].tolist() == [[56, 112], [112, 112], [112, 56]]
    for row, image in enumerate(images):
        alone = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(together["pixel_values"][row, : len(alone)], alone)
        assert not together["pixel_values"][row, len(alone) :].any()


def test_white_bars_lie_where_the_image_ends():
    processor = Phi3VImageProcessor(num_crops=1, size={"height": 56, "width": 56})
    crop = processor(Image.new("RGB", (56, 20), "black"))["pixel_values"][0, 1]
    white = (1 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    is_white = torch.isclose(crop, white.view(3, 1, 1)).all(dim=0)
    assert is_white.all(dim=1).tolist() == [True] * 18 + [False] * 20 + [True] * 18
    upright = processor(Image.new("RGB", (20, 56), "black"))["pixel_values"][0, 1]
    assert torch.equal(upright, crop.transpose(1, 2))


def test_num_crops_of_one_call():
    processor = Phi3VImageProcessor(num_crops=4, size={"height": 56, "width": 56})
    assert processor(noise(60, 60), num_crops=1)["image_sizes"].tolist() == [[56, 56]]
    assert processor(noise(60, 60))["image_sizes"].tolist() == [[112, 112]]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_modes_of_images(mode):
    processor = Phi3VImageProcessor(num_crops=1, size={"height": 56, "width": 56})
    image = noise(40, 40).convert(mode)
    expected = processor(image.convert("RGB"))["pixel_values"]
    assert torch.equal(processor(image)["pixel_values"], expected)


def test_arrays_are_images_too():
    processor = Phi3VImageProcessor(num_crops=1, size={"height": 56, "width": 56})
    image = noise(40, 30)
    expected = processor(image)["pixel_values"]
    assert torch.equal(processor(np.asarray(image))["pixel_values"], expected)
    assert torch.equal(processor(torch.tensor(np.asarray(image)).permute(2, 0, 1))["pixel_values"], expected)


def test_a_line_of_pixels():
    processor = Phi3VImageProcessor(num_crops=2, size={"height": 56, "width": 56})
    found = processor(noise(500, 1))
    assert found["image_sizes"].tolist() == [[56, 112]]
    assert torch.isfinite(found["pixel_values"]).all()


def test_saved_and_loaded(tmp_path):
    processor = Phi3VImageProcessor(num_crops=6, num_img_tokens=4, size={"height": 56, "width": 56})
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(again, Phi3VImageProcessor)
    image = noise(70, 50)
    assert torch.equal(again(image)["pixel_values"], processor(image)["pixel_values"])
    assert (again.num_crops, again.num_img_tokens, again.crop_size) == (6, 4, 56)


def test_refusals():
    with pytest.raises(ValueError, match=r"Crops are square.*one edge"):
        Phi3VImageProcessor(size={"height": 336, "width": 224})
    with pytest.raises(ValueError, match="needs one crop"):
        Phi3VImageProcessor(num_crops=0)
