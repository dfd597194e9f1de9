"""Augmentation against formulas written again in NumPy, and what it may not touch.

The same numbers were compared once with augmax 0.4.1 itself, given its random draws: largest difference 8e-6 after
crop and rotation, 9e-7 after the colours.
"""

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from manipi.errors import ConfigError
from manipi.model import ModelInput
from manipi.train.config import AugmentConfig
from manipi.train.loop import train
from manipi.train.step.step import NUMBERS, adjust_brightness, adjust_contrast, augment, draw

SIZE, ROWS, CAMERAS = 40, 6, ("base", "left_wrist", "right_wrist")
STILL = AugmentConfig(crop=1, rotation=0, brightness=0, contrast=0, hue=0)


@pytest.fixture
def config(tiny):
    def make(**settings):
        config = tiny()
        return replace(
            config, model=replace(config.model, cameras=CAMERAS), augment=AugmentConfig(**settings), batch_size=ROWS
        )

    return make


def smooth_pictures(rows=ROWS, size=SIZE) -> np.ndarray:
    """Colourful waves, uint8 [rows, C, size, size, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    phase, turns = rng.uniform(0, 6, (2, rows, len(CAMERAS), 1, 1, 3))
    waves = np.sin(turns * x[..., None] + (6 - turns) * y[..., None] + phase)
    return (127.5 + 127.5 * waves).astype(np.uint8)


@pytest.fixture
def inputs() -> ModelInput:
    b = ROWS
    return ModelInput(
        images=torch.from_numpy(smooth_pictures()),
        image_valid=torch.ones(b, len(CAMERAS), dtype=torch.bool),
        tokens=torch.zeros(b, 4, dtype=torch.long),
        token_valid=torch.ones(b, 4, dtype=torch.bool),
        state=torch.zeros(b, 4),
    )


def as_the_model_reads(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255.0 * 2.0 - 1.0


# ---- against float64 in NumPy


def bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """The colour at a place between pixels; black outside."""
    colour, top, left = np.zeros(3), math.floor(y), math.floor(x)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < len(image) and 0 <= column < len(image):
            colour += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return colour


def moved(image: np.ndarray, numbers: np.ndarray, crop: float, degrees: float) -> np.ndarray:
    """Rotation, then enlargement, then the place of the crop, from the output's pixels back to the input's."""
    size, side = len(image), int(len(image) * crop)
    room, middle = (size - side) / 2, size / 2 - 0.5
    angle = math.radians(numbers[2] * degrees)
    out = np.empty((size, size, 3))
    for row in range(size):
        for column in range(size):
            v, u = row - middle, column - middle
            v, u = v * math.cos(angle) + u * math.sin(angle), u * math.cos(angle) - v * math.sin(angle)
            y, x = v * side / size + numbers[0] * room, u * side / size + numbers[1] * room
            out[row, column] = bilinear(image, y + middle, x + middle)
    return out


@pytest.mark.parametrize(("crop", "degrees"), [(0.95, 5.0), (0.5, 0.0), (1.0, 90.0), (0.8, 45.0)])
def test_crop_and_rotation(crop, degrees, config, inputs):
    out = augment(inputs, config(crop=crop, rotation=degrees, colour_probability=0), step=3).images
    numbers = draw(42, 3, 0, ROWS, len(CAMERAS)).double().numpy()
    for row in range(2):
        expected = moved(inputs.images[row, 0].double().numpy() / 255, numbers[row, 0], crop, degrees) * 2 - 1
        # float32 places a pixel to 1e-5 of its width; beside a black border that is as much of its brightness.
        np.testing.assert_allclose(out[row, 0].numpy(), expected, atol=1e-4)


def test_a_crop_is_a_cut_out_where_nothing_else_happens():
    """Moved fully to one corner, half the side: the output's corner pixel lies on the input's."""
    image = torch.rand(1, 8, 8, 3)
    from manipi.train.step.step import _move

    numbers = torch.tensor([[-1.0, 1.0, 0, 0, 0, 0, 0, 0]])  # y: up; x: to the right
    out = _move(image, numbers, AugmentConfig(crop=0.5, rotation=0))
    whole = torch.nn.functional.interpolate(image[:, :4, 4:].permute(0, 3, 1, 2), size=(8, 8), mode="bilinear")
    torch.testing.assert_close(out[:, 1:-1, 1:-1], whole.permute(0, 2, 3, 1)[:, 1:-1, 1:-1])


def recoloured(rgb: np.ndarray, numbers: np.ndarray, how: AugmentConfig) -> list[float]:
    """One pixel, with Python's own HSV."""
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    brightness, contrast = numbers[3] * how.brightness, numbers[4] * how.contrast
    value = value * (1 + brightness) if brightness < 0 else value + (1 - value) * brightness
    slope = math.tan(math.radians(45 * (1 + contrast)))
    knee = slope / 2 / (1 + slope)
    if value < knee:
        value = value / slope
    elif value > 1 - knee:
        value = 1 - (1 - value) / slope
    else:
        value = 0.5 + slope * (value - 0.5)
    saturation = min(1.0, saturation * (1 + numbers[6] * how.saturation))
    return list(colorsys.hsv_to_rgb((hue + numbers[5] * how.hue) % 1, saturation, value))


def test_colours(config, inputs):
    black_white_grey = torch.tensor([[0, 0, 0], [255, 255, 255], [99, 99, 99], [0, 0, 255]], dtype=torch.uint8)
    inputs.images[:, :, 0, :4] = black_white_grey
    settings = config(crop=1, rotation=0, colour_probability=1, saturation=0.5)
    out = augment(inputs, settings, step=3).images
    numbers = draw(42, 3, 0, ROWS, len(CAMERAS)).double().numpy()
    for row, camera in np.ndindex(ROWS, len(CAMERAS)):
        pixels = inputs.images[row, camera, ::7].reshape(-1, 3).double().numpy() / 255
        expected = [recoloured(p, numbers[row, camera], settings.augment) for p in pixels]
        np.testing.assert_allclose(out[row, camera, ::7].reshape(-1, 3).numpy(), np.array(expected) * 2 - 1, atol=2e-6)


def test_brightness_and_contrast_by_hand():
    values, by = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0]), torch.tensor
    torch.testing.assert_close(adjust_brightness(values, by(0.5)), by([0.5, 0.6, 0.75, 0.95, 1.0]))
    torch.testing.assert_close(adjust_brightness(values, by(-0.5)), by([0.0, 0.1, 0.25, 0.45, 0.5]))
    assert torch.equal(adjust_contrast(values, by(0.0)), values)
    # tan(60°) = √3; the knee is at √3 / (2 + 2√3) = 0.317
    torch.testing.assert_close(adjust_contrast(values, by(1 / 3)), by([0.0, 0.2 / 3**0.5, 0.5, 1 - 0.1 / 3**0.5, 1.0]))


# ---- what stays as it is


@pytest.mark.parametrize("how", [STILL, AugmentConfig(crop=1, rotation=0, colour_probability=0)], ids=["still", "rare"])
def test_without_strength_nothing_changes_by_a_bit(how, config, inputs):
    out = augment(inputs, replace(config(), augment=how), step=3)
    assert torch.equal(out.images, as_the_model_reads(inputs.images))
    off = augment(inputs, config(enabled=False), step=3)
    assert off is inputs


def test_absent_pictures_stay_as_they_are(config, inputs):
    inputs.image_valid[1, 0] = inputs.image_valid[2, 2] = False
    out = augment(inputs, config(colour_probability=1), step=0).images
    untouched = as_the_model_reads(inputs.images)
    same = (out == untouched).flatten(2).all(-1)
    assert torch.equal(same, ~inputs.image_valid)


def test_wrist_cameras_get_colours_alone(config, inputs):
    out = augment(inputs, config(colour_probability=0), step=0).images
    untouched = as_the_model_reads(inputs.images)
    assert torch.equal(out[:, 1:], untouched[:, 1:])
    assert (out[:, 0] != untouched[:, 0]).flatten(1).any(1).all()
    out = augment(inputs, config(crop=1, rotation=0, colour_probability=1), step=0).images
    assert (out != untouched).flatten(2).any(-1).all()


def test_pictures_that_are_scaled_already(config, inputs):
    scaled = replace(inputs, images=as_the_model_reads(inputs.images))
    one, other = (augment(x, config(), step=5).images for x in (inputs, scaled))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


# ---- where the random numbers come from


def test_a_slice_of_the_batch_gets_the_numbers_of_its_rows(config, inputs):
    """Ranks and accumulated parts see what one process sees in the whole batch, bit for bit."""
    whole = augment(inputs, config(), step=7).images
    for first, last in ((0, 3), (3, 6), (5, 6)):
        part = replace(inputs, **{k: v[first:last] for k, v in vars(inputs).items() if v is not None})
        assert torch.equal(augment(part, config(), step=7, first_row=first).images, whole[first:last])


def test_numbers_differ_by_seed_step_row_and_camera():
    numbers = torch.cat([draw(seed, step, 0, 5, 3).flatten() for seed in (0, 1) for step in (0, 1, 2)])
    assert len(numbers.unique()) == 2 * 3 * 5 * 3 * NUMBERS
    assert torch.equal(draw(1, 2, 3, 2, 3), draw(1, 2, 0, 5, 3)[3:])


def test_numbers_are_uniform():
    numbers = draw(0, 0, 0, 4_000, 2).flatten(0, 1).double()
    assert numbers.abs().max() <= 1
    # Kolmogorov and Smirnov: 1.95 / √n is exceeded by one sample in a thousand; these never change.
    for column in numbers.T:
        expected = torch.linspace(-1, 1, len(column), dtype=torch.double)
        assert (column.sort().values - expected).abs().max() / 2 < 1.95 / len(column) ** 0.5
    assert (torch.corrcoef(numbers.T) - torch.eye(NUMBERS)).abs().max() < 0.05


def test_colours_change_on_their_share_of_the_pictures(config, inputs):
    many = replace(inputs, **{k: v.repeat(50, *[1] * (v.ndim - 1)) for k, v in vars(inputs).items() if v is not None})
    out = augment(many, config(crop=1, rotation=0, colour_probability=0.3), step=0).images
    share = (out != as_the_model_reads(many.images)).flatten(2).any(-1).float().mean()
    assert abs(share - 0.3) < 3 * (0.3 * 0.7 / 900) ** 0.5


# ---- in a run


def test_a_run_with_other_pictures_resumes_exactly(tiny, tmp_path):
    config = tiny(steps=4, augment=AugmentConfig())
    whole = train(config, tmp_path / "whole", show=False)
    train(config, tmp_path / "parts", stop_at=2, show=False)
    resumed = train(config, tmp_path / "parts", show=False)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1]
    plain = train(tiny(steps=4), tmp_path / "plain", show=False)
    assert (plain / "model.safetensors").read_bytes() != weights[0]


@pytest.mark.parametrize(
    ("name", "value"), [("crop", 0), ("crop", 1.1), ("brightness", 1), ("hue", -0.1), ("colour_probability", 2)]
)
def test_settings_out_of_range(tiny, name, value):
    with pytest.raises(ConfigError, match=f"augment.{name}"):
        tiny(augment=AugmentConfig(**{name: value}))
