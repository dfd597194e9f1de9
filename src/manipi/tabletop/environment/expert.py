"""A scripted expert for every task: the demonstrations' teacher, without memory.

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

import numpy as np
from jaxtyping import Float32

from manipi.tabletop.environment import scene
from manipi.tabletop.environment.tabletop import MAX_STEP, WORKSPACE_HIGH, WORKSPACE_LOW, Tabletop

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
        tip = self._env.tip
        goal = tip + _limit(self._direction(tip), MAX_STEP)
        label = np.append(np.clip(goal, WORKSPACE_LOW, WORKSPACE_HIGH), min(1.0, tip[2] / OPEN_HEIGHT))
        executed = label.copy()
        executed[:3] += self._noise * MAX_STEP * self._rng.standard_normal(3)
        return label.astype(np.float32), executed.astype(np.float32)

    def _direction(self, tip: np.ndarray) -> np.ndarray:
        block = self._env.block(self._env.goal.target)
        if self._env.goal.task == "reach":
            return _approach(tip, block[:2], REACH_HEIGHT)
        return _push(tip, block[:2], np.array(scene.TRAY_CENTER))


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
    if tip[2] < scene.BLOCK_HALF * 2 and along < 0 and abs(across) < SLIP:
        return np.append(PUSH_SPEED * ahead - 0.5 * across * aside, PUSH_HEIGHT - tip[2])
    return _approach(tip, block - STANDOFF * ahead, PUSH_HEIGHT)


def _limit(vector: np.ndarray, length: float) -> np.ndarray:
    """The vector, shortened to this length when it is longer."""
    return vector * min(1.0, length / max(float(np.linalg.norm(vector)), 1e-9))
