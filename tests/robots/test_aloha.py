import numpy as np
import pytest

from manipi.errors import ConfigError, ObservationError, UnknownNameError
from manipi.robots.aloha import aloha, aloha_sim
from manipi.transforms.actions import ActionSpace
from manipi.transforms.observation import ReadRobot


def observation(*cameras: str, **changes) -> dict:
    pictures = {camera: np.full((3, 4, 6), number, np.uint8) for number, camera in enumerate(cameras)}
    return {"images": pictures, "state": np.zeros(14), "prompt": "fold the towel"} | changes


def test_absent_wrist_cameras_are_left_out():
    sample = ReadRobot(aloha()).encode(observation("cam_low", "cam_high", "cam_right_wrist"))
    assert sample.keys() == {"image/base", "image/right_wrist", "state", "prompt"}
    assert sample["image/base"].shape == (4, 6, 3)
    assert (sample["image/base"] == 1).all()
    assert (sample["image/right_wrist"] == 2).all()


def test_the_view_from_above_is_required():
    with pytest.raises(ObservationError, match="under 'images/cam_high'"):
        ReadRobot(aloha()).encode(observation("cam_left_wrist"))


def test_the_full_text_for_a_misspelt_camera():
    with pytest.raises(ObservationError) as error:
        ReadRobot(aloha()).encode(observation("cam_high", "cam_left_wist"))
    assert str(error.value).splitlines()[:3] == [
        "expected no key but images/cam_high, images/cam_left_wrist, images/cam_low, images/cam_right_wrist there",
        "   found 'images/cam_left_wist' (is it 'images/cam_left_wrist'?)",
        "   where observation key 'images/cam_left_wist' of robot 'aloha'",
    ]


def test_cameras_and_feature_names():
    robot = aloha(cameras=("cam_high", "cam_right_wrist"))
    assert dict(robot.cameras) == {"base": "images/cam_high", "right_wrist": "images/cam_right_wrist"}
    assert robot.dataset_key("images/cam_right_wrist") == "observation.images.cam_right_wrist"
    assert robot.dataset_key(robot.action_key) == "action"
    assert aloha_sim().dataset_key("images/cam_high") == "observation.images.top"
    with pytest.raises(UnknownNameError, match="did you mean cam_high"):
        aloha(cameras=("cam_hihg",))
    with pytest.raises(ConfigError, match="expected cam_high"):
        aloha(cameras=("cam_left_wrist",))


def test_the_pretraining_convention():
    """Joints 2 and 3 of each arm turn the other way; the grippers leave the scale of the state."""
    state = np.arange(1, 15) / 20
    found = ActionSpace(aloha()).state_to_model(state)
    signs = np.array([1, -1, -1, 1, 1, 1, 0] * 2)
    np.testing.assert_allclose(found * (signs != 0), state * signs)
    assert not np.isclose(found[[6, 13]], state[[6, 13]]).any()
    assert ActionSpace(aloha(pi_convention=False)).state_to_model(state) is state


def test_the_contract_tells_the_conventions_apart():
    options = [{}, {"pi_convention": False}, {"relative": False}, {"pi_convention": False, "relative": False}]
    contracts = [aloha(**option).contract() for option in options]
    assert len(set(contracts)) == len(contracts)
    assert aloha(cameras=("cam_high",), default_prompt="go").contract() == contracts[0]
