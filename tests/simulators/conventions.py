"""What a simulator has to hold, looked at in its own Python: python conventions.py NAME.

The conventions are those of the published datasets and evaluations.
"""

import sys
from pathlib import Path

import numpy as np

from manipi_client.trials import load_factory, try_task

SIMULATORS = Path(__file__).parents[2] / "simulators"


def metaworld():
    make = load_factory(f"{SIMULATORS}/metaworld/simulator.py:MetaWorld")
    simulator = make(image_size=64, render="light")
    assert try_task(simulator, "reach-v3").rpartition("expert: ")[2].startswith("success after ")
    seen = simulator.reset(3, "drawer-open-v3")
    assert (seen["image"].shape, seen["image"].dtype, seen["state"].shape) == ((64, 64, 3), np.uint8, (4,))
    env, renderer = simulator._env, simulator._renderer
    np.testing.assert_array_equal(seen["state"], env._get_obs()[:4].astype(np.float32))
    camera = env.model.camera("corner2").id
    np.testing.assert_allclose(env.model.cam_pos[camera], (0.75, 0.075, 0.7))
    assert env.data.cam_xmat[camera].reshape(3, 3)[2, 1] < 0, "the camera hangs upside down"
    renderer.update_scene(env.data, camera="corner2")
    np.testing.assert_array_equal(seen["image"], np.rot90(renderer.render(), 2))
    light, dark = seen["image"], make(image_size=64, render="published").reset(3, "drawer-open-v3")["image"]
    assert 1 < np.abs(light.astype(int) - dark).mean() < 60, "the same scene, with shadows and without"
    moved = []
    for command in (2.0, 1.0):  # a command beyond the range is the one at its end
        simulator.reset(3, "drawer-open-v3")
        simulator.step(np.full(4, command))
        moved.append(simulator.observe()["state"])
    np.testing.assert_array_equal(*moved)
    assert simulator.wrong_prompt != simulator.prompt


def libero():
    path = SIMULATORS / "libero/simulator.py"
    simulator = load_factory(f"{path}:Libero")(image_size=64, render="light")
    module = sys.modules[type(simulator).__module__]
    from robosuite.utils.transform_utils import quat2axisangle

    half = np.sqrt(0.5)
    for quaternion, turned in (
        ((0, 0, 0, 1), (0, 0, 0)),
        ((half, 0, 0, half), (np.pi / 2, 0, 0)),
        ((0, 1, 0, 0), (0, np.pi, 0)),
        ((0, 0, half, -half), (0, 0, 1.5 * np.pi)),  # not the short way round: so the dataset has it
        ((0, 0, -1e-4, 1), (0, 0, -2e-4)),
    ):
        np.testing.assert_allclose(module.axis_angle(np.array(quaternion, float)), turned, atol=1e-6)
    for quaternion in np.random.default_rng(0).normal(size=(20, 4)):
        quaternion /= np.linalg.norm(quaternion)
        np.testing.assert_allclose(module.axis_angle(quaternion), quat2axisangle(quaternion.copy()), atol=1e-6)

    try_task(simulator, "libero_spatial:0")
    first = simulator.reset(7, "libero_spatial:0")
    assert simulator._robosuite.timestep == 10
    assert (simulator.max_steps, simulator.control_hz) == (220, 20)
    assert simulator.prompt.startswith("pick up the black bowl between the plate and the ramekin")
    raw = simulator._see()
    for key, name in (("image", "agentview_image"), ("wrist_image", "robot0_eye_in_hand_image")):
        assert first[f"observation/{key}"].shape == (64, 64, 3)
        np.testing.assert_array_equal(first[f"observation/{key}"], np.rot90(raw[name], 2))
    state = first["observation/state"]
    assert (state.shape, state.dtype) == ((8,), np.float32)
    np.testing.assert_allclose(state[:3], raw["robot0_eef_pos"], atol=1e-6)
    np.testing.assert_allclose(state[3:6], quat2axisangle(raw["robot0_eef_quat"].copy()), atol=1e-5)
    np.testing.assert_allclose(state[6:], raw["robot0_gripper_qpos"], atol=1e-6)
    again = simulator.reset(57, "libero_spatial:0")  # 50 published states
    np.testing.assert_array_equal(again["observation/state"], state)
    simulator.close()


def aloha():
    make = load_factory(f"{SIMULATORS}/aloha/simulator.py:Aloha")
    simulator = make(image_size=96, render="light")
    try_task(simulator, "transfer_cube")
    seen = simulator.reset(5, "insertion")
    assert (seen["images"]["cam_high"].shape, seen["images"]["cam_high"].dtype) == ((3, 96, 128), np.uint8)
    assert (seen["state"].shape, seen["state"].dtype) == ((14,), np.float32)
    simulator.step(simulator.still)
    np.testing.assert_allclose(simulator.observe()["state"], seen["state"], atol=0.05)  # commands are places to be at
    rng = np.random.default_rng(0)
    while simulator.failure is None:
        simulator.step(rng.uniform(-100, 100, 14))
    assert simulator.failure == "the simulation became unstable"
    np.testing.assert_array_equal(simulator.reset(5, "insertion")["state"], seen["state"])
    simulator.close()


if __name__ == "__main__":
    {"metaworld": metaworld, "libero": libero, "aloha": aloha}[sys.argv[1]]()
