import numpy as np
import pytest

from manipi.transforms.model_input import ResizeImages, resize_with_pad


def test_a_wide_picture_keeps_its_aspect_between_black_bars():
    picture = np.full((10, 20, 3), 200, np.uint8)
    resized = resize_with_pad(picture, 8, 8)
    assert resized.dtype == np.uint8
    assert (resized[2:6] == 200).all()
    assert not resized[:2].any()
    assert not resized[6:].any()


def test_a_picture_of_the_right_size_passes_untouched():
    picture = np.zeros((8, 8, 3), np.uint8)
    assert resize_with_pad(picture, 8, 8) is picture


@pytest.mark.parametrize("shape", [(1, 1000, 3), (1000, 1, 3), (1, 1, 3)])
def test_extreme_shapes(shape):
    resized = resize_with_pad(np.full(shape, 255, np.uint8), 16, 16)
    assert resized.shape == (16, 16, 3)
    assert resized.max() == 255


def test_only_pictures_are_resized():
    sample = {"image/base": np.zeros((4, 6, 3), np.uint8), "state": np.zeros(2), "actions": np.ones((3, 2))}
    step = ResizeImages(8)
    out = step.encode(sample)
    assert out["image/base"].shape == (8, 8, 3)
    assert out["state"] is sample["state"]
    assert step.decode(sample["actions"], sample) is sample["actions"]
