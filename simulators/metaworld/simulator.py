"""MetaWorld's Sawyer arm as a simulator of suites (`manipi_client.trials.Simulator`).

Scenes are MetaWorld's own random object and goal positions, a function of the seed. Pictures are of the camera
`corner2` where LeRobot has it, turned upright. Commands are MetaWorld's: the tool's motion and the gripper's force, in
[-1, 1].
"""

import os

os.environ.setdefault("MUJOCO_GL", "osmesa")

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as WORLDS
from metaworld.policies import ENV_POLICY_MAP

# The first four are the tasks of `metaworld/four`.
SENTENCES = {
    "window-open-v3": "push the window open",
    "plate-slide-v3": "slide the plate into the goal",
    "drawer-open-v3": "open the drawer",
    "door-open-v3": "open the door of the safe",
    "reach-v3": "move the hand to the red ball",
    "dial-turn-v3": "turn the dial",
    "lever-pull-v3": "pull the lever up",
    "handle-pull-v3": "pull the handle up",
    "push-v3": "push the block to the green ball",
    "window-close-v3": "push the window shut",
    "drawer-close-v3": "close the drawer",
    "button-press-v3": "press the button on the wall",
    "button-press-topdown-v3": "press the button from above",
}


class MetaWorld:
    """One environment per task, made when it is first asked for.

    Args:
        image_size: side of the pictures, pixels.
        render: `published`: MuJoCo's defaults, as in published datasets; `light`: no shadows, reflections or
            multisampling, 14 times faster, for policies that were trained on such pictures.
    """

    control_hz = 80.0

    def __init__(self, *, image_size: int = 64, render: str = "light", max_steps: int = 200):
        self._size, self._light, self.max_steps = image_size, {"light": True, "published": False}[render], max_steps
        self._worlds = {}
        self.description = {
            "metaworld": "3.1.1",
            "mujoco": mujoco.__version__,
            "gl": os.environ["MUJOCO_GL"],
            "render": render,
            "image_size": image_size,
        }

    def reset(self, seed, task):
        self._task = task
        if task not in self._worlds:
            self._worlds[task] = self._make(task)
        self._env, self._renderer = self._worlds[task]
        self._env.seed(seed % 2**32)
        self._state, _ = self._env.reset()
        self.success = False
        return self.observe()

    def _make(self, task):
        # The expert has to know the goal; a policy sees the first four numbers of the state alone.
        env = WORLDS[f"{task}-goal-observable"](seed=0)
        env._freeze_rand_vec, env.seeded_rand_vec = False, True  # scenes are drawn, from the seed
        env.max_path_length = self.max_steps + 1
        if self._light:
            env.model.vis.quality.offsamples = env.model.vis.quality.shadowsize = 0
        env.model.camera("corner2").pos[:] = (0.75, 0.075, 0.7)
        renderer = mujoco.Renderer(env.model, self._size, self._size)
        if self._light:
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                renderer.scene.flags[flag] = 0
        return env, renderer

    def step(self, action):
        self._state, _, _, _, info = self._env.step(np.clip(np.asarray(action, np.float32), -1, 1))
        self.success = bool(info["success"])

    def observe(self):
        return {"image": self.picture(), "state": self._state[:4].astype(np.float32), "prompt": self.prompt}

    def picture(self):
        self._renderer.update_scene(self._env.data, camera="corner2")
        return self._renderer.render()[::-1, ::-1].copy()

    def expert(self):
        return np.clip(ENV_POLICY_MAP[self._task]().get_action(self._state), -1, 1).astype(np.float32)

    @property
    def prompt(self):
        return SENTENCES[self._task]

    @property
    def wrong_prompt(self):
        """Another sentence that the policy of `metaworld/four` knows."""
        known = list(SENTENCES)[:4]
        return SENTENCES[known[(known.index(self._task) + 1) % 4 if self._task in known else 0]]

    @property
    def position(self):
        return self._env.tcp_center
