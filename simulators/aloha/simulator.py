"""gym-aloha's two arms as a simulator of suites (`manipi_client.trials.Simulator`).

Scenes are gym-aloha's own random object poses, a function of the seed. A trial may take 300 steps at 50 Hz, as in
LeRobot's evaluation. Observation keys are openpi's: `images/cam_high` [3, h, w] from above, and 14 joints.
"""

import os

os.environ.setdefault("MUJOCO_GL", "osmesa")

import mujoco
import numpy as np
from dm_control.rl.control import PhysicsError
from gym_aloha.env import AlohaEnv

PROMPTS = {"transfer_cube": "Transfer cube", "insertion": "Insert the peg"}
"""What openpi's examples say to the policy; the published datasets have no words."""


class Aloha:
    """One environment per task, made when it is first asked for.

    Args:
        image_size: height of the picture in pixels; its width is a third more. 480 is that of the published datasets.
        render: `published`: MuJoCo's defaults, for released weights; `light`: without shadows and multisampling.
    """

    control_hz, max_steps = 50.0, 300

    def __init__(self, *, image_size: int = 480, render: str = "published"):
        self._size, self._light, self._worlds = image_size, {"light": True, "published": False}[render], {}
        self.description = {
            "gym-aloha": "0.1.5",
            "mujoco": mujoco.__version__,
            "gl": os.environ["MUJOCO_GL"],
            "render": render,
            "image_size": image_size,
        }

    def reset(self, seed, task):
        if task not in self._worlds:
            self._worlds[task] = self._make(task)
        self._env = self._worlds[task]
        np.random.seed(seed % 2**32)
        self._env.reset(seed=seed % 2**32)
        self.prompt, self.success, self.failure = PROMPTS[task], False, None
        self.wrong_prompt = next(prompt for name, prompt in PROMPTS.items() if name != task)
        return self.observe()

    def _make(self, task):
        env = AlohaEnv(task, obs_type="pixels_agent_pos", observation_width=8, observation_height=8)
        world = env._env
        if self._light:
            quality = world.physics.model.vis.quality
            quality.offsamples = quality.shadowsize = 0
        # Its tasks render all cameras at every step; pictures are rendered where a policy asks for one.
        world.task.get_observation = lambda physics: {
            "qpos": world.task.get_qpos(physics),
            "images": {"top": np.zeros(1)},
        }
        return env

    def step(self, action):
        try:
            *_, info = self._env.step(np.asarray(action, np.float64))
        except PhysicsError:  # commands that no arm could follow
            self.failure = "the simulation became unstable"
        else:
            self.success = bool(info["is_success"])

    def observe(self):
        state = self._env._env.task.get_qpos(self._env._env.physics).astype(np.float32)
        return {"images": {"cam_high": self.picture().transpose(2, 0, 1)}, "state": state, "prompt": self.prompt}

    def picture(self):
        height, width = self._size, self._size * 4 // 3
        flags = {"shadow": not self._light, "reflection": not self._light}
        physics = self._env._env.physics
        return physics.render(height=height, width=width, camera_id="top", render_flag_overrides=flags).copy()

    @property
    def still(self):
        return self._env._env.task.get_qpos(self._env._env.physics)

    def close(self):
        for env in self._worlds.values():
            env._env.physics.free()  # its own end comes too late, and complains
