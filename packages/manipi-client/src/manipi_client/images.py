"""Pictures for the wire: small, and in bytes. Pillow's numbers without Pillow."""

from __future__ import annotations

import numpy as np

from manipi_client.errors import InputError

# Pillow's resampling weights are integers with this many bits after the point: 32 less 8 for the pixel, less 2.
_WEIGHT_BITS = 22


def convert_to_uint8(image: np.ndarray) -> np.ndarray:
    """A float picture in [0, 1] as bytes in 0..255; an integer picture unchanged.

    Raises:
        InputError: a float outside [0, 1], which would wrap around.
    """
    if not np.issubdtype(image.dtype, np.floating):
        return image
    if image.size and not (image.min() >= 0 and image.max() <= 1):
        raise InputError(
            expected="a float picture with values in [0, 1]",
            found=f"values from {image.min()} to {image.max()}",
            where="convert_to_uint8",
            next="divide a picture in 0..255 by 255, or convert it with image.astype(np.uint8)",
        )
    return (255 * image).astype(np.uint8)


def resize_with_pad(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pictures scaled to fit, in the middle of black ones of the given size; nothing is stretched or cut.

    Bilinear with anti-aliasing, columns first: bit for bit what `Image.resize(…, BILINEAR)` of Pillow computes
    (Pillow 13 sometimes takes the rows first, which changes a few values by one).

    Args:
        images: uint8 [..., h, w, channel].
        height: height of the result in pixels.
        width: width of the result in pixels.

    Returns:
        uint8 [..., height, width, channel].

    Raises:
        InputError: not uint8, or without height, width and channel.
    """
    if images.dtype != np.uint8 or images.ndim < 3:
        raise InputError(
            expected="uint8 pictures of shape [..., height, width, channel]",
            found=f"{images.dtype} of shape {images.shape}",
            where="resize_with_pad",
            next="convert float pictures with convert_to_uint8",
        )
    old_height, old_width = images.shape[-3:-1]
    if (old_height, old_width) == (height, width):
        return images
    ratio = max(old_width / width, old_height / height)
    new_height, new_width = max(1, int(old_height / ratio)), max(1, int(old_width / ratio))
    resized = _resize_axis(_resize_axis(images, -2, new_width), -3, new_height)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    padded = np.zeros((*images.shape[:-3], height, width, images.shape[-1]), np.uint8)
    padded[..., top : top + new_height, left : left + new_width, :] = resized
    return padded


def _resize_axis(images: np.ndarray, axis: int, new_size: int) -> np.ndarray:
    """Bilinear along one axis: each new pixel is the weighted sum of a few neighbours (`taps`)."""
    old_size = images.shape[axis]
    if new_size == old_size:
        return images
    scale = old_size / new_size
    reach = max(scale, 1.0)  # Shrinking widens the triangle, so that every old pixel counts: the anti-aliasing.
    centers = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centers - reach + 0.5).astype(int), 0)
    last = np.minimum((centers + reach + 0.5).astype(int), old_size)
    taps = first[:, None] + np.arange((last - first).max())
    triangle = np.maximum(0.0, 1.0 - np.abs((taps - centers[:, None] + 0.5) / reach))
    triangle *= taps < last[:, None]
    weights = (0.5 + triangle / triangle.sum(1, keepdims=True) * (1 << _WEIGHT_BITS)).astype(np.int32)

    taps = np.minimum(taps, old_size - 1)
    lines = np.moveaxis(images, axis, -1)
    total = np.full((*lines.shape[:-1], new_size), 1 << (_WEIGHT_BITS - 1), np.int32)
    for tap, weight in zip(taps.T, weights.T):
        total += lines[..., tap] * weight
    return np.moveaxis((total >> _WEIGHT_BITS).astype(np.uint8), -1, axis)
