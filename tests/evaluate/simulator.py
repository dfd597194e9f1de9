"""A simulator of numbers: a point that shall reach the right end of a line. No package but NumPy."""

import os
import time
from pathlib import Path

import numpy as np


class Line:
    """Starts where the scene says; a command moves it. `break_at` scene of `folder`'s file does what that says."""

    control_hz, max_steps = 10.0, 12

    def __init__(
        self, *, folder: str = "", black: bool = False, expert: bool = True, start: float = 0.0, unseen: bool = False
    ):
        self._folder, self._black, self._start = Path(folder), black, start
        self.description = {"renderer": "numbers"}
        if not unseen:
            self.picture = self._picture
        if not expert:
            self.expert = None

    def reset(self, seed, task):
        self.task, self.failure, self._steps = task, None, 0
        self._x = np.random.default_rng(seed).uniform(-0.5, 0.5) + self._start
        self._trouble("reset")
        return self.observe()

    def step(self, action):
        self._x, self._steps = self._x + float(np.clip(action[0], -0.2, 0.2)), self._steps + 1
        self._trouble("step")
        self.failure = "fell off" if self._x < -1 else None

    def _trouble(self, moment):
        for name in ("die", "hang", "raise"):
            path = self._folder / f"{name}_at_{moment}"
            if self._folder.name and path.exists():
                path.unlink()
                os.write(1, b"a word before\n")
                if name == "die":
                    os.kill(os.getpid(), 9)
                elif name == "hang":
                    time.sleep(1000)
                else:
                    raise RuntimeError("the motor burnt")

    def observe(self):
        picture = np.zeros((4, 4, 3), np.uint8)
        if not self._black:
            picture[:2] = 200
        return {"image": picture, "state": np.array([self._x], np.float32), "prompt": self.prompt}

    def expert(self):
        return np.array([0.2, 1.0 if self._x > 0 else 0.0], np.float32)

    def _picture(self):
        return np.full((8, 8, 3), int(100 + 50 * self._x), np.uint8)

    @property
    def prompt(self):
        return f"go {self.task}"

    @property
    def wrong_prompt(self):
        return "go away"

    @property
    def success(self):
        return bool(self._x >= 1)

    @property
    def position(self):
        return np.array([self._x, 0, 0])
