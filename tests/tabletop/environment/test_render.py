import itertools

import mujoco
import numpy as np
import pytest

from manipi.tabletop.environment import Tabletop
from manipi.tabletop.environment.render import Look, Renderer

SPHERE = """
<mujoco><worldbody>
  <geom type="sphere" size="0.5" rgba="0.8 0.2 0.1 1"/>
  <camera name="front" pos="0 0 2" fovy="60"/>
</worldbody></mujoco>"""


@pytest.fixture
def sphere():
    model = mujoco.MjModel.from_xml_string(SPHERE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return Renderer(model, height=41, width=61), data


def test_a_sphere_covers_its_disc_and_nothing_else(sphere):
    renderer, data = sphere
    flat = Look(ambient=1.0, horizon=(0, 0, 1), zenith=(0, 0, 1))
    picture = renderer.render(data, "front", look=flat)
    row, column = np.mgrid[:41, :61]
    # A ray at angle a from the axis meets the sphere when sin(a) < radius / distance = 1/4.
    scale = np.tan(np.pi / 6) / 20.5
    angle = np.arctan(scale * np.hypot(row - 20, column - 30))
    inside = np.sin(angle) < 0.25
    assert (picture[inside] == np.round(255 * np.array([0.8, 0.2, 0.1]))).all()
    assert (picture[~inside] == [0, 0, 255]).all()


def test_brightness_follows_lamberts_law(sphere):
    renderer, data = sphere
    look = Look(lamp=(3.0, 0.0, 0.5), ambient=0.25)
    picture = renderer.render(data, "front", look=look)
    # The centre of the picture sees the pole (0, 0, 0.5); the lamp lies in its tangent plane and gives it nothing.
    np.testing.assert_array_equal(picture[20, 30], np.round(255 * 0.25 * np.array([0.8, 0.2, 0.1])))
    overhead = renderer.render(data, "front", look=Look(lamp=(0.0, 0.0, 5.0), ambient=0.25))
    np.testing.assert_array_equal(overhead[20, 30], np.round(255 * np.array([0.8, 0.2, 0.1])))
    assert picture[20, 34, 0] > picture[20, 30, 0], "image x must be the camera's right"


def test_a_block_throws_a_shadow_on_the_side_away_from_the_lamp():
    env = Tabletop(cameras=(), colors=("red",))
    env.reset(seed=0, options={"blocks": {"red": (0.44, -0.14)}, "tip": (0.2, 0.18, 0.2)})
    lit, shaded = (env._cast("image", 128, shadows).astype(int) for shadows in (False, True))
    darker = (shaded < lit - 20).any(axis=-1)
    assert (shaded <= lit).all()
    beside = env.block("red")[:2] + np.array([0.008, -0.034])  # Away from the lamp, not hidden behind the block.
    row, column = project(env, "image", np.append(beside, 0.0), 128)
    assert darker[row, column]


def project(env: Tabletop, camera: str, point: np.ndarray, size: int) -> tuple[int, int]:
    """The pixel at which a pinhole camera of the scene sees a point."""
    pose, fovy = env.data.camera(camera), env.model.camera(camera).fovy[0]
    x, y, z = pose.xmat.reshape(3, 3).T @ (point - pose.xpos)
    scale = size / 2 / np.tan(np.deg2rad(fovy) / 2)
    return int(size / 2 + scale * y / z), int(size / 2 - scale * x / z)


@pytest.mark.parametrize("seed", range(3))
def test_every_block_shows_its_colour_where_the_camera_projects_it(seed):
    env = Tabletop()
    env.reset(seed=seed, options={"tip": (0.16, 0.20, 0.20)})
    picture = env.render_camera("image").astype(int)
    for channel, color in enumerate(("red", "green", "blue")):
        pixel = picture[project(env, "image", env.block(color), 64)]
        assert pixel[channel] > 1.7 * np.delete(pixel, channel).max(), (color, pixel)


CORNERS = list(itertools.product((0.22, 0.44), (-0.14, 0.14)))
"""Of the area in which blocks start."""


@pytest.mark.parametrize("corner", CORNERS)
def test_the_outside_camera_sees_blocks_and_tip_wherever_blocks_may_lie(corner):
    env = Tabletop(colors=("red",))
    env.reset(seed=0, options={"blocks": {"red": corner}, "tip": (*corner, 0.08)})
    row, column = project(env, "image", env.tip + np.array([0, 0, 0.01]), 64)
    assert 2 <= row < 62
    assert 2 <= column < 62
    picture = env.render_camera("image").astype(int)
    fingers = picture[row - 4 : row + 5, column - 4 : column + 5].max(axis=-1) < 60
    assert fingers.sum() >= 3, (row, column)
    env.reset(seed=0, options={"blocks": {"red": corner}, "tip": (0.33, 0.0, 0.2)})
    row, column = project(env, "image", env.block("red"), 64)
    block = env.render_camera("image").astype(int)
    red = block[..., 0] > 2 * block[..., 1]
    assert red[row - 2 : row + 3, column - 2 : column + 3].mean() > 0.8
    assert not red[[0, -1]].any()
    assert not red[:, [0, -1]].any()
