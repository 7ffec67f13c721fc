"""From an image to crops: the high-definition transform of Phi-3-Vision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

from unime_st.images import as_rgb


class Phi3VImagesKwargs(ImagesKwargs, total=False):
    """The arguments that a call of the image processor may change."""

    num_crops: int  # bound on the crops of an image, without the whole image


class Phi3VImageProcessor(BaseImageProcessor):
    """Cuts an image into crops at its own aspect ratio, and adds the whole image, all of one size.

    The image is scaled until its grid of crops has as many columns (rows, when it is upright) as ``num_crops`` allows,
    padded with white, and cut. The whole image, reduced to one crop, comes first. Published are 4 crops for several
    images in a row and 16 for one.
    """

    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012 (the host's way)
    valid_kwargs = Phi3VImagesKwargs

    def __init__(
        self,
        num_crops: int = 16,
        num_img_tokens: int = 144,  # embeddings of one crop, without line ends
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        size = size or {"height": 336, "width": 336}
        if size["height"] != size["width"]:
            raise ValueError(f"Crops are square, but `size` is {size}. Give one edge for both.")
        if num_crops < 1:
            raise ValueError(f"`num_crops` is {num_crops}, but an image needs one crop at least.")
        self.num_crops = num_crops
        self.num_img_tokens = num_img_tokens
        self.size = dict(size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @property
    def crop_size(self) -> int:
        """The edge of a crop in pixels."""
        return int(self.size["height"])

    def grid(self, width: int, height: int, num_crops: int | None = None) -> tuple[int, int]:
        """The columns and rows of the crops of an image with this width and height in pixels."""
        columns, scaled = self._scaled(max(width, height), min(width, height), num_crops or self.num_crops)
        rows = math.ceil(scaled / self.crop_size)
        return (columns, rows) if width >= height else (rows, columns)

    def _scaled(self, longer: int, shorter: int, num_crops: int) -> tuple[int, int]:
        """The crops along the longer edge, and the pixels of the shorter one once the longer one fills them."""
        ratio = longer / shorter
        columns = max(n for n in range(1, num_crops + 1) if n * math.ceil(n / ratio) <= num_crops)
        return columns, max(1, int(columns * self.crop_size / ratio))

    def count_tokens(self, width: int, height: int, num_crops: int | None = None) -> int:
        """The number of embeddings of an image of this size: its crops, the whole, line ends and a separator."""
        return self.count_grid_tokens(*self.grid(width, height, num_crops))

    def count_grid_tokens(self, columns: int, rows: int) -> int:
        """The number of embeddings of an image with this grid of crops."""
        return (columns * rows + 1) * self.num_img_tokens + 1 + (rows + 1) * math.isqrt(self.num_img_tokens)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Cut images into ``pixel_values`` (images, 1 + most crops, 3, S, S), zero where an image has fewer crops.

        ``image_sizes`` (images, 2) are the height and width of each grid of crops. One call may have its ``num_crops``.
        """
        flat: Any = make_flat_list_of_images(self.fetch_images(images))
        pictures = [as_rgb(to_pil_image(image)) for image in flat]
        num_crops = kwargs.get("num_crops") or self.num_crops
        laid_out = [self._laid_out(picture, num_crops) for picture in pictures]
        crops = [self._cut(self._normalized(picture)) for picture in laid_out]
        most = max(len(own) for own in crops)
        padded = [torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]) for own in crops]
        sizes = torch.tensor([[picture.height, picture.width] for picture in laid_out])
        return BatchFeature(
            {"pixel_values": torch.stack(padded), "image_sizes": sizes}, tensor_type=return_tensors or "pt"
        )

    def _laid_out(self, image: Image.Image, num_crops: int) -> Image.Image:
        """Resize and pad an image to a grid of crops; an upright one is transposed meanwhile."""
        is_upright = image.width < image.height
        if is_upright:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        columns, height = self._scaled(image.width, image.height, num_crops)
        edge = self.crop_size
        image = image.resize((columns * edge, height), Image.Resampling.BILINEAR)
        full = math.ceil(height / edge) * edge
        canvas = Image.new("RGB", (image.width, full), "white")
        canvas.paste(image, (0, (full - height) // 2))
        return canvas.transpose(Image.Transpose.TRANSPOSE) if is_upright else canvas

    def _normalized(self, image: Image.Image) -> Tensor:
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(own).view(3, 1, 1) for own in (self.image_mean, self.image_std))
        return (values - mean) / std

    def _cut(self, picture: Tensor) -> Tensor:
        """The whole picture (3, H, W) at the size of one crop, then its crops in reading order: (crops, 3, S, S)."""
        edge = self.crop_size
        whole = interpolate(picture[None], size=(edge, edge), mode="bicubic", align_corners=False)
        rows, columns = picture.shape[1] // edge, picture.shape[2] // edge
        crops = picture.reshape(3, rows, edge, columns, edge).permute(1, 3, 0, 2, 4).reshape(-1, 3, edge, edge)
        return torch.cat([whole, crops])
