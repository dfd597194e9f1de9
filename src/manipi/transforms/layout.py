"""The last steps to the model: resize the pictures, stack the cameras, pad the vectors, say what is valid.

Pictures keep their aspect, padded to the middle with black.

robot has 7 of 32 action dimensions, 2 of 3 cameras

actions            [H, 32]   a a a a a a a 0 0 0 …
action_dim_valid   [32]      1 1 1 1 1 1 1 0 0 0 …
images             [3, h, w, 3]            image_valid  1 1 0
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from manipi.model.config import ModelConfig, Pi0Config, Pi0FastConfig
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


@dataclass(frozen=True)
class ModelLayout:
    """`image/<slot>`, `state`, `actions` -> the arrays of `manipi.model.ModelInput`, without the batch axis."""

    model: ModelConfig
    action_size: int
    """Action dimensions that the robot uses."""

    def encode(self, sample: Sample) -> Sample:
        images, image_valid = self._cameras(sample)
        rest = {k: v for k, v in sample.items() if not k.startswith("image/") and k != "prompt"}
        actions = {"actions": self._pad(sample["actions"])} if "actions" in sample else {}
        return {
            **rest,
            **actions,
            "images": images,
            "image_valid": image_valid,
            "state": self._pad(self._state(sample["state"])),
            "action_dim_valid": np.arange(self.model.action_dim) < self.action_size,
        }

    def decode(self, actions_HA: np.ndarray, sample: Sample) -> np.ndarray:
        # π0-FAST hands on token ids, which have no action dimensions yet.
        return actions_HA if actions_HA.ndim == 1 else actions_HA[..., : self.action_size]

    def _state(self, state_S: np.ndarray) -> np.ndarray:
        # Of the other two the network takes none; what they know of it stands in the prompt, however long.
        return state_S if isinstance(self.model, Pi0Config) else state_S[: self.model.action_dim]

    def _cameras(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        size = self.model.vision.image_size
        black = np.zeros((size, size, 3), np.uint8)
        images = [sample.get(f"image/{slot}", black) for slot in self.model.cameras]
        present = [f"image/{slot}" in sample for slot in self.model.cameras]
        # The released π0-FAST weights were trained with absent cameras as visible black pictures.
        valid = np.array(present) | isinstance(self.model, Pi0FastConfig)
        return np.stack(images), valid

    def _pad(self, x: np.ndarray) -> np.ndarray:
        # np.pad gives the same, ten times as slowly.
        zeros = np.zeros((*x.shape[:-1], self.model.action_dim - x.shape[-1]), np.float32)
        return np.concatenate([x, zeros], axis=-1).astype(np.float32, copy=False)
