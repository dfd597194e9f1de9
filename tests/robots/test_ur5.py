import numpy as np

from manipi.robots.ur5 import ur5
from manipi.transforms.actions import ActionSpace
from manipi.transforms.observation import ReadRobot


def test_an_observation_as_the_example_sends_it():
    pictures = {"base_rgb": np.zeros((3, 4, 6), np.float32), "wrist_rgb": np.ones((4, 6, 3), np.uint8)}
    sample = ReadRobot(ur5()).encode({**pictures, "joints": np.ones(6), "gripper": 0.5, "prompt": "pick"})
    assert sample["image/base"].shape == sample["image/left_wrist"].shape == (4, 6, 3)
    assert sample["state"].tolist() == [1] * 6 + [0.5]
    seen = ActionSpace(ur5()).to_model(np.ones((1, 7)), sample["state"])
    assert seen.tolist() == [[0] * 6 + [1]]
    assert ActionSpace(ur5(relative=False)).to_model(np.ones((1, 7)), sample["state"]).tolist() == [[1] * 7]
