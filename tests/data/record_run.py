"""A recording that may be killed, to be run by a process of its own.

Of the calls that change files, which Python's audit events name, the one given ends the process by a signal, before it
is done.
"""

import os
import signal
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import ClassVar

import numpy as np

from manipi.data.recorder import Recorder
from manipi.robots.tabletop import TABLETOP

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "step")
LENGTHS = (3, 5, 2, 4, 3)


def picture(number: int, step: int) -> np.ndarray:
    """Its colour says which it is; with LARGE in the environment it is noise, which takes room."""
    if "LARGE" in os.environ:
        return np.random.default_rng(step).integers(0, 256, (256, 256, 3), np.uint8)
    return np.full((16, 16, 3), (20 + 40 * number, 20 + 40 * step, 128), np.uint8)


class Plan:
    """A policy that plans to stay."""

    metadata: ClassVar = {"checkpoint": "the first"}

    def infer(self, observation):
        return {"actions": np.zeros((4, 4), np.float32)}


def record(root: Path, first: int, episodes: int, said: Path | None = None, *, asked: bool = False) -> None:
    """`said` gets a line when an episode has ended. `asked`: a policy is, at every step."""
    with Recorder(root, TABLETOP, seed=40) as recorder:
        policy = recorder.watch(Plan()) if asked else None
        for number in range(first, first + episodes):
            sys.audit("step", f"before {number}")
            recorder.on_episode_start()
            for step in range(LENGTHS[number]):
                sys.audit("step", f"{number}.{step}")
                state = np.array([number, step, 0, 1], np.float32)
                observation = {"observation/image": picture(number, step), "observation/state": state, "prompt": "go"}
                if policy:
                    policy.infer(observation)
                recorder.on_step(observation, {"actions": state / 10})
            recorder.on_episode_end()
            if said:
                with said.open("a") as file:
                    file.write("ended\n")


def end_at(event: str, name: str, number: int, end: Callable[[], object]) -> None:
    """Call `end`, in this thread, before the so-manieth call of that kind for a file of that name (a pattern) is done.

    EVENT "any": whatever changes a file below a folder whose path has NAME in it.
    """
    seen = 0

    def hook(called, arguments):
        nonlocal seen
        if called not in EVENTS or (event not in ("any", called)):
            return
        path = arguments[1 if called == "os.rename" else 0]
        if not isinstance(path, str | os.PathLike) or (called == "open" and not set("wxa+") & set(arguments[1] or "")):
            return
        if (name in str(path)) if event == "any" else fnmatch(Path(path).name, name):
            seen += 1
            if seen == number:
                end()

    sys.addaudithook(hook)


def record_until(root: Path, first: int, episodes: int, said: Path, kill: tuple, asked: bool) -> None:
    """`record`; with `kill`, to its `end_at`."""
    if kill:
        event, name, number, sent = kill
        end_at(event, name, number, lambda: signal.raise_signal(signal.Signals[sent]))
    record(root, first, episodes, said, asked=asked)
