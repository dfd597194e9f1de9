"""The tabletop as a simulator of suites, and its suites."""

from typing import Any

import numpy as np

from manipi.evaluate.suites import Suite
from manipi.tabletop.environment import Expert, Tabletop
from manipi.tabletop.environment.tabletop import Goal

MAX_STEPS = 30
"""Longest trial. The expert needs about 8 steps; a policy that wanders for long touches everything."""


class TabletopSimulator:
    """The gymnasium environment as `manipi_client.trials.Simulator`; pictures are rendered where a policy is asked.

    Args:
        options: of `Tabletop`.
    """

    def __init__(self, *, cameras: tuple[str, ...] = ("image",), max_steps: int = MAX_STEPS, **options: Any):
        self._cameras, self.max_steps = tuple(cameras), max_steps
        # The trial counts its steps itself: the environment never ends it for being late.
        self._env = Tabletop(cameras=(), max_steps=max_steps + 1, **options)
        self.control_hz = self._env.control_hz
        self.description = {"renderer": "ray casting of manipi.tabletop", "image_size": self._env.image_size}

    def reset(self, seed: int, task: str) -> dict[str, Any]:
        _, self._info = self._env.reset(seed=seed, options={"task": task} if task else None)
        self._expert, self._seed = Expert(self._env, np.random.default_rng(seed)), seed
        return self.observe()

    def step(self, action: np.ndarray) -> None:
        *_, self._info = self._env.step(action)

    def observe(self) -> dict[str, Any]:
        pictures = {f"observation/{camera}": self._env.render_camera(camera) for camera in self._cameras}
        return {**pictures, "observation/state": self._env.state, "prompt": self.prompt}

    def expert(self) -> np.ndarray:
        return self._expert.act()[0]

    def picture(self) -> np.ndarray:
        return self._env.render(size=160)

    @property
    def prompt(self) -> str:
        return self._env.goal.prompt

    @property
    def wrong_prompt(self) -> str:
        return Goal(**self._env.another_instruction(self._seed)).prompt  # type: ignore[arg-type]

    @property
    def success(self) -> bool:
        return self._info["success"]

    @property
    def failure(self) -> str | None:
        return self._info["failure"]

    @property
    def collisions(self) -> int:
        """1 once another block than the target was touched."""
        touched = self._info["touched"]
        return int(touched is not None and touched != self._info["target"])

    @property
    def position(self) -> np.ndarray:
        return self._env.tip


def _suite(name: str, about: str, **fields: Any) -> Suite:
    factory = "manipi.tabletop.suites:TabletopSimulator"
    return Suite(
        name=f"tabletop/{name}", about=about, robot="tabletop", factory=factory, policy_image_size=True, **fields
    )


SUITES = {
    "reach": _suite("reach", "touch the block of the named colour first, of three; the demo's task", tasks=("reach",)),
}
