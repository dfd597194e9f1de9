import numpy as np
import pytest

from manipi.errors import ConfigError
from manipi.robots.franka import droid
from manipi.transforms.actions import ActionSpace


def test_positions_are_relative_and_velocities_are_not():
    actions, state = np.ones((2, 8)), np.full(8, 0.25)
    seen = ActionSpace(droid(action_space="joint_position")).to_model(actions, state)
    np.testing.assert_array_equal(seen, [[0.75] * 7 + [1.0]] * 2)
    np.testing.assert_array_equal(ActionSpace(droid()).to_model(actions, state), actions)
    absolute = droid(action_space="joint_position", relative=False)
    np.testing.assert_array_equal(ActionSpace(absolute).to_model(actions, state), actions)


def test_the_wrist_camera_goes_where_the_model_has_it():
    assert droid().cameras["left_wrist"] == droid(wrist_slot="wrist").cameras["wrist"]
    assert droid().dataset_key("observation/wrist_image_left") == "wrist_image_left"


@pytest.mark.parametrize("options", [{"relative": True}, {"action_space": "cartesian"}])
def test_what_cannot_be(options):
    with pytest.raises(ConfigError, match="joint_position"):
        droid(**options)
