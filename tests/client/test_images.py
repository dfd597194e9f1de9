import json

import numpy as np
import pytest

from manipi_client import InputError
from manipi_client.images import convert_to_uint8, resize_with_pad


def test_every_golden_client_case_bit_for_bit(golden):
    cases = [c for c in json.loads((golden / "transforms/resize_with_pad.json").read_text()) if "client" in c["case"]]
    arrays = np.load(golden / "transforms/resize_with_pad.npz")
    assert len(cases) == 10
    for case in cases:
        image, expected = arrays[f"{case['case']}/in/image"], arrays[f"{case['case']}/out/image"]
        found = resize_with_pad(image, **case["args"]) if "resize" in case["op"] else convert_to_uint8(image)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected, err_msg=case["case"])


def test_random_sizes_equal_pillow():
    image_module = pytest.importorskip("PIL.Image")
    bilinear = image_module.Resampling.BILINEAR
    rng = np.random.default_rng(0)
    for _ in range(200):
        old_height, old_width, height, width = rng.integers(1, 90, 4).tolist()
        image = rng.integers(0, 256, (old_height, old_width, 3), np.uint8)
        ratio = max(old_width / width, old_height / height)
        new_width, new_height = max(1, int(old_width / ratio)), max(1, int(old_height / ratio))
        # One axis at a time, because Pillow 13 chooses which goes first.
        resized = image_module.fromarray(image).resize((new_width, old_height), bilinear)
        resized = np.asarray(resized.resize((new_width, new_height), bilinear))
        top, left = (height - new_height) // 2, (width - new_width) // 2
        padded = np.zeros((height, width, 3), np.uint8)
        padded[top : top + new_height, left : left + new_width] = resized
        np.testing.assert_array_equal(resize_with_pad(image, height, width), padded)


def test_float_pictures_outside_zero_to_one_are_refused():
    for bad in (np.full((2, 2, 3), 200.0), np.full((2, 2, 3), -0.1), np.full((2, 2, 3), np.nan)):
        with pytest.raises(InputError, match=r"values in \[0, 1\]"):
            convert_to_uint8(bad)


def test_resize_refuses_floats_and_flat_pictures():
    for bad in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)):
        with pytest.raises(InputError, match="uint8 pictures"):
            resize_with_pad(bad, 2, 2)
