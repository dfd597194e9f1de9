import numpy as np

from manipi.robots.franka import libero
from manipi.transforms.actions import ActionSpace


def test_the_gripper_and_by_default_everything_passes_as_it_is():
    actions, state = np.linspace(-1, 1, 14).reshape(2, 7), np.full(8, 0.25)
    np.testing.assert_array_equal(ActionSpace(libero()).to_model(actions, state), actions)
    seen = ActionSpace(libero(relative=True)).to_model(actions, state)
    np.testing.assert_array_equal(seen, actions - np.array([0.25] * 6 + [0]))


def test_feature_names():
    assert {libero().dataset_key(f"observation/{key}") for key in ("image", "state")} == {"image", "state"}
