"""A scripted expert for every task, without memory, and its demonstrations.

Both tasks use one path, drawn here from the side. The tip may be anywhere above the line; it moves straight towards
the point of the line ahead of it, so that it stays over the other blocks until it is near its goal:

     z
     ^   start
     │      ╲
     │        ╲______________  CRUISE
     │                       ╲
     │                        ╲     goal
     └─────────────────────────●──────────>  horizontal distance to the goal
                              FUNNEL
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from manipi.tabletop.environment.tabletop import (
    BLOCK_HALF,
    MAX_STEP,
    TRAY_CENTER,
    WORKSPACE_HIGH,
    WORKSPACE_LOW,
    Tabletop,
)

CRUISE = 0.11
"""Height of the tip while it is far from its goal, metres."""
FUNNEL = 0.06
"""Horizontal distance from the goal at which it starts to come down, metres."""
REACH_HEIGHT = 0.02
"""Below a block's top, so that the way down does not end just above the touch: a policy that imitates it a little too
high still arrives."""
PUSH_HEIGHT = 0.025
STANDOFF = 0.06
"""How far behind a block's centre a push starts, metres."""
SLIP = 0.02
"""A push goes on while the tip is this close to the line from block to tray, metres."""
PUSH_SPEED = 0.02
"""Metres per control step while pushing."""
OPEN_HEIGHT = 0.15
"""The gripper closes as it comes down: its opening is the tip's height over this, at most 1."""
NOISE_LEVELS = (0.0, 0.0, 0.3)
"""Perturbations of the executed actions, in units of the largest step; each episode draws one of them."""


class Expert:
    """Acts from what the simulation knows, one control step at a time.

    Args:
        env: the environment to act in.
        rng: draws the perturbation.
        noise: standard deviation of the perturbation of x, y and z, in units of `MAX_STEP`.
    """

    def __init__(self, env: Tabletop, rng: np.random.Generator, *, noise: float = 0.0):
        self._env, self._rng, self._noise = env, rng, noise

    def act(self) -> tuple[Float32[np.ndarray, "4"], Float32[np.ndarray, "4"]]:
        """The action to learn, and the perturbed one to execute, so that demonstrations show how to recover."""
        task, target = self._env.goal.steps[self._env.stage]
        tip, block = self._env.tip, self._env.block(target)[:2]
        way = _approach(tip, block, REACH_HEIGHT) if task == "reach" else _push(tip, block, np.array(TRAY_CENTER))
        goal = tip + way * min(1.0, MAX_STEP / max(float(np.linalg.norm(way)), 1e-9))
        label = np.append(np.clip(goal, WORKSPACE_LOW, WORKSPACE_HIGH), min(1.0, tip[2] / OPEN_HEIGHT))
        return label.astype(np.float32), disturbed(label, self._rng, self._noise)


def disturbed(action: np.ndarray, rng: np.random.Generator, noise: float) -> Float32[np.ndarray, "4"]:
    """An action that leads beside where it should, by `noise` of the largest step."""
    executed = np.array(action, np.float64)
    executed[:3] += noise * MAX_STEP * rng.standard_normal(3)
    return executed.astype(np.float32)


def _approach(tip: np.ndarray, goal: np.ndarray, height: float) -> np.ndarray:
    """The way to a point over the table along the path above."""
    offset = goal - tip[:2]
    distance = np.linalg.norm(offset)
    line = height + (CRUISE - height) * min(1.0, distance / FUNNEL)
    if tip[2] < line - MAX_STEP:  # Too low for where it is: up first.
        offset = 0 * offset
    return np.append(offset, line - tip[2])


def _push(tip: np.ndarray, block: np.ndarray, tray: np.ndarray) -> np.ndarray:
    """The way behind the block, seen from the tray, and then through it; starts again when the block slips aside."""
    ahead = (tray - block) / max(float(np.linalg.norm(tray - block)), 1e-9)
    aside = np.array([-ahead[1], ahead[0]])
    along, across = (tip[:2] - block) @ ahead, (tip[:2] - block) @ aside
    if tip[2] < BLOCK_HALF * 2 and along < 0 and abs(across) < SLIP:
        return np.append(PUSH_SPEED * ahead - 0.5 * across * aside, PUSH_HEIGHT - tip[2])
    return _approach(tip, block - STANDOFF * ahead, PUSH_HEIGHT)


def demonstrations(
    seeds: Iterable[int],
    *,
    cameras: Sequence[str] = ("image",),
    noise_levels: Sequence[float] = NOISE_LEVELS,
    keep: float = 1.0,
    start_noise: float = 1.0,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields one episode per seed, failures included; the same seed gives the same episode.

    The tip starts anywhere over the table, also low between the blocks: many short episodes teach more than few long
    ones.

    Args:
        seeds: one episode each.
        cameras: which pictures to render.
        noise_levels: see `NOISE_LEVELS`.
        keep: chance of each frame to be rendered. The first frame always is. States and actions stay complete, so that
            every rendered frame has its action chunk.
        start_noise: see `Tabletop`.
        options: other arguments of `Tabletop`: tasks, image_size, colors, randomize, ...

    Yields:
        `observation/<camera>` uint8 [K, h, w, 3], the K rendered frames; `frame_index` int64 [K], which of the T frames
        they are (0 .. T-1 when `keep` is 1); `observation/state` float32 [T, 4]; `actions` float32 [T, 4], what the
        expert wanted, without the perturbation; `task`, the instruction; `success`.
    """
    env = Tabletop(cameras=(), start_noise=start_noise, **options)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        observation, info = env.reset(seed=seed)
        expert = Expert(env, rng, noise=float(rng.choice(noise_levels)))
        pictures: dict[str, list[np.ndarray]] = {camera: [] for camera in cameras}
        states, actions, kept, done = [], [], [], False
        while not done:
            if not states or rng.random() < keep:
                kept.append(len(states))
                for camera in cameras:
                    pictures[camera].append(env.render_camera(camera))
            label, executed = expert.act()
            states.append(observation["observation/state"])
            actions.append(label)
            observation, _, terminated, truncated, info = env.step(executed)
            done = terminated or truncated
        yield {
            **{f"observation/{camera}": np.stack(frames) for camera, frames in pictures.items()},
            "frame_index": np.array(kept, np.int64),
            "observation/state": np.stack(states),
            "actions": np.stack(actions),
            "task": observation["prompt"],
            "success": info["success"],
        }
