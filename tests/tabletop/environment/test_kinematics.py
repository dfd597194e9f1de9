import itertools

import mujoco
import numpy as np
import pytest

from manipi.errors import ConfigError
from manipi.tabletop.environment import scene as tabletop
from manipi.tabletop.environment.tabletop import WORKSPACE_HIGH, WORKSPACE_LOW

CORNERS = list(itertools.product(*zip(WORKSPACE_LOW, WORKSPACE_HIGH)))
INSIDE = list(np.random.default_rng(0).uniform(WORKSPACE_LOW, WORKSPACE_HIGH, (20, 3)))


@pytest.mark.parametrize("tip", CORNERS + INSIDE)
def test_inverse_is_undone_by_forward_and_by_the_simulated_arm(tip):
    joints = tabletop.inverse(np.array(tip))
    np.testing.assert_allclose(tabletop.forward(joints), tip, atol=1e-12)
    assert joints[1:].sum() == pytest.approx(-np.pi / 2), "the tool must point down"
    model = tabletop.build_scene(("red",))
    data = mujoco.MjData(model)
    data.qpos[:4] = joints
    mujoco.mj_kinematics(model, data)
    np.testing.assert_allclose(data.site("tip").xpos, tip, atol=1e-9)


@pytest.mark.parametrize("tip", [(0.9, 0.0, 0.1), (0.0, 0.0, tabletop.SHOULDER_HEIGHT - tabletop.TOOL)])
def test_a_point_out_of_reach_is_an_error(tip):
    with pytest.raises(ConfigError, match="shoulder"):
        tabletop.inverse(np.array(tip))
