"""Pictures to the size that the model takes: keep the aspect, pad to the middle with black."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from manipi.types import Sample


@dataclass(frozen=True)
class ResizeImages:
    """Every `image/<slot>` to uint8 [size, size, 3]; a picture of that size passes untouched."""

    size: int

    def encode(self, sample: Sample) -> Sample:
        resized = {k: resize_with_pad(v, self.size, self.size) for k, v in sample.items() if k.startswith("image/")}
        return {**sample, **resized}

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        return actions_HA


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [height, width, 3], bilinear by Pillow, as openpi's clients and policies do it."""
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    ratio = max(w / width, h / height)
    new_h, new_w = max(1, int(h / ratio)), max(1, int(w / ratio))
    resized = Image.fromarray(image).resize((new_w, new_h), resample=Image.Resampling.BILINEAR)
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - new_h) // 2, (width - new_w) // 2
    canvas[top : top + new_h, left : left + new_w] = np.asarray(resized)
    return canvas
