"""The tabletop as a simulator of suites, and its suites."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from manipi.evaluate.suites import Suite
from manipi.tabletop.environment import Expert, Tabletop
from manipi.tabletop.environment.expert import disturbed
from manipi.tabletop.environment.tabletop import COLORS, PERTURBATIONS

MAX_STEPS = 30
"""Longest trial. The expert needs about 8 steps; a policy that wanders for long touches everything."""


class TabletopSimulator:
    """The gymnasium environment as `manipi_client.trials.Simulator`; pictures are rendered where a policy is asked.

    Args:
        options: of `Tabletop`.

    `collisions` is 1 once another block than the present target was the first to be touched.
    """

    def __init__(self, *, cameras: tuple[str, ...] = ("image",), max_steps: int = MAX_STEPS, **options: Any):
        self._cameras, self.max_steps = tuple(cameras), max_steps
        # The trial counts its steps itself: the environment never ends it for being late.
        self._env = Tabletop(cameras=(), max_steps=max_steps + 1, **options)
        self.control_hz = self._env.control_hz
        self.description = {"renderer": "ray casting of manipi.tabletop", "image_size": self._env.image_size}

    def reset(self, seed: int, task: str) -> dict[str, Any]:
        _, self._info = self._env.reset(seed=seed, options={"task": task} if task else None)
        self._expert, self._seed, self.collisions = Expert(self._env, np.random.default_rng(seed)), seed, 0
        return self.observe()

    def step(self, action: np.ndarray) -> None:
        target = self._info["target"]
        *_, self._info = self._env.step(action)
        self.collisions |= self._info["touched"] not in (None, target)

    def observe(self) -> dict[str, Any]:
        pictures = {f"observation/{camera}": self._env.render_camera(camera) for camera in self._cameras}
        return {**pictures, "observation/state": self._env.state, "prompt": self.prompt}

    def expert(self) -> np.ndarray:
        return self._expert.act()[0]

    def disturb(self, action: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
        return disturbed(action, rng, noise)

    def picture(self) -> np.ndarray:
        return self._env.render(size=160)

    @property
    def prompt(self) -> str:
        return self._env.goal.prompt

    @property
    def wrong_prompt(self) -> str:
        return self._env.another_instruction(self._seed).prompt

    @property
    def subtask(self) -> str | None:
        """What is to be done at present, where the instruction has several steps."""
        return self._env.subtask if self._env.goal.then else None

    @property
    def success(self) -> bool:
        return self._info["success"]

    @property
    def failure(self) -> str | None:
        return self._info["failure"]

    @property
    def position(self) -> np.ndarray:
        return self._env.tip


def _suite(name: str, about: str, *, demonstrated: Mapping[str, Any] | None = None, **options: Any) -> Suite:
    return Suite(
        name=f"tabletop/{name}",
        about=about,
        robot="tabletop",
        factory="manipi.tabletop.suites:TabletopSimulator",
        options=options,
        demonstrated=DEMONSTRATED | dict(demonstrated or {}),
        policy_image_size=True,
    )


DEMONSTRATED = {"image_size": 56, "start_noise": 1.0, "max_steps": 100}
"""As the demo's: pictures of its recipes' size, and the tip starts anywhere over the table, between the blocks too."""

LIMITS: dict[str, dict[str, Any]] = {"start": {"max_steps": 24}}
"""Of the expert's starts outside the workspace none needs more than 18 steps."""

_SUITES = (
    replace(_suite("reach", "touch the block of the named colour first, of three; the demo's task"), tasks=("reach",)),
    _suite(
        "two-step",
        "push one of two blocks to the tray, then touch the other; each step has its words as a label",
        tasks=("two_step",),
        demonstrated={"near": None},
        colors=("red", "green"),
        near=0.11,
        max_steps=200,
    ),
    _suite(
        "memory",
        "reach; the arm starts within 1.5 seconds, and after the first the target is out of sight",
        hide_after=10,
        lock=15,
        max_steps=50,
    ),
    _suite(
        "pairs",
        "reach the named shape of the named colour, of two objects; no demonstration shows this pair of them",
        pairs="unseen",
        demonstrated={"pairs": "seen"},
        max_steps=80,
    ),
    _suite(
        "crowd",
        "reach, of six objects that lie close and everywhere; two are balls of a block's colour, never shown before",
        demonstrated={"colors": tuple(COLORS)[:5]},
        colors=("red", "green", "blue", "yellow", "red ball", "green ball"),
        named=3,
        tray=False,
    ),
    *(
        _suite(f"reach-{name}", f"as tabletop/reach, but {what}", perturb=name, **LIMITS.get(name, {}))
        for name, what in PERTURBATIONS.items()
    ),
)
SUITES = {suite.name.partition("/")[2]: suite for suite in _SUITES}
