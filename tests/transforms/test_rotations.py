import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manipi.robots.robot import ROTATION_SIZE
from manipi.transforms.actions import from_matrix, to_matrix

FORMS = [form for form in ROTATION_SIZE if form != "none"]
every_form = pytest.mark.parametrize("form", FORMS)


def random_rotations(seed: int, *shape: int) -> np.ndarray:
    """Uniform rotation matrices, from normalised Gaussian quaternions."""
    return to_matrix(np.random.default_rng(seed).normal(size=(*shape, 4)), "quat_xyzw")


@every_form
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(), (5,), (2, 3), (0,), (2, 1, 4)]))
def test_every_form_round_trips_and_is_a_rotation(form, seed, shape):
    matrix = random_rotations(seed, *shape)
    written = from_matrix(matrix, form)
    assert written.shape == (*shape, ROTATION_SIZE[form])
    back = to_matrix(written, form)
    assert back.shape == (*shape, 3, 3)
    np.testing.assert_allclose(back, matrix, atol=1e-9)
    np.testing.assert_allclose(back @ np.swapaxes(back, -1, -2), np.broadcast_to(np.eye(3), back.shape), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(back), np.ones(shape), atol=1e-9)


def about(axis: int, angle: float) -> np.ndarray:
    """The textbook matrix of a turn about x, y or z."""
    c, s = np.cos(angle), np.sin(angle)
    x = [[1, 0, 0], [0, c, -s], [0, s, c]]
    y = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    z = [[c, -s, 0], [s, c, 0], [0, 0, 1]]
    return np.array([x, y, z][axis])


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("angle", [0.0, 1e-13, 0.3, np.pi / 2, np.pi - 1e-7, np.pi, -2.0])
def test_turns_about_one_axis(axis, angle):
    unit, matrix = np.eye(3)[axis], about(axis, angle)
    half = angle / 2
    np.testing.assert_allclose(to_matrix(unit * angle, "rotvec"), matrix, atol=1e-12)
    np.testing.assert_allclose(to_matrix(unit * angle, "euler_xyz"), matrix, atol=1e-12)
    np.testing.assert_allclose(to_matrix(np.r_[unit * np.sin(half), np.cos(half)], "quat_xyzw"), matrix, atol=1e-12)
    np.testing.assert_allclose(to_matrix(np.r_[matrix[:, 0], matrix[:, 1]], "rot6d"), matrix, atol=1e-12)
    for form in FORMS:
        np.testing.assert_allclose(to_matrix(from_matrix(matrix, form), form), matrix, atol=1e-7)


def test_euler_angles_turn_about_the_fixed_axes_in_the_order_x_y_z():
    np.testing.assert_allclose(
        to_matrix(np.array([0.3, -0.4, 2.0]), "euler_xyz"), about(2, 2.0) @ about(1, -0.4) @ about(0, 0.3)
    )


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2, np.pi / 2 - 1e-9, 1.5707])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_euler_angles_survive_gimbal_lock(pitch, dtype):
    """A tool that points straight down: x and z turn about the same line, and any split between them will do."""
    matrix = (about(2, 0.7) @ about(1, pitch) @ about(0, -0.4)).astype(dtype)
    back = to_matrix(from_matrix(matrix, "euler_xyz"), "euler_xyz")
    np.testing.assert_allclose(back, matrix, atol=1e-6 if dtype == np.float32 else 1e-9)


def test_vectors_within_half_a_turn_come_back_as_they_were():
    rng = np.random.default_rng(0)
    axis = rng.normal(size=(50, 3))
    vector = axis / np.linalg.norm(axis, axis=-1, keepdims=True) * rng.uniform(0, 3.14, (50, 1))
    np.testing.assert_allclose(from_matrix(to_matrix(vector, "rotvec"), "rotvec"), vector, atol=1e-9)


def test_quaternions_need_not_be_normalised_and_come_back_with_w_positive():
    quaternion = np.array([0.1, -0.2, 0.3, -0.9])
    back = from_matrix(to_matrix(quaternion * 5, "quat_xyzw"), "quat_xyzw")
    np.testing.assert_allclose(back, -quaternion / np.linalg.norm(quaternion), atol=1e-12)


def test_any_prediction_in_6d_becomes_a_rotation():
    predicted = np.random.default_rng(1).normal(size=(100, 6)).astype(np.float32)
    matrix = to_matrix(predicted, "rot6d")
    np.testing.assert_allclose(matrix @ np.swapaxes(matrix, -1, -2), np.broadcast_to(np.eye(3), (100, 3, 3)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(matrix), 1, atol=1e-5)
    # Gram-Schmidt keeps the direction of the first column.
    np.testing.assert_allclose(np.cross(matrix[..., 0], predicted[:, :3]), 0, atol=1e-5)
