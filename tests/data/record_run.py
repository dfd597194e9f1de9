"""A recording that may be killed: `python record_run.py ROOT EPISODES [EVENT NAME NUMBER SIGNAL]`.

Of the calls that change files, which Python's audit events name, the one given ends the process by a signal, before it
is done: EVENT on a path of that NAME, the NUMBER-th time. Every episode that ended is printed.
"""

import os
import signal
import sys
from pathlib import Path

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


def record(root: Path, first: int, episodes: int) -> None:
    with Recorder(root, TABLETOP) as recorder:
        for number in range(first, first + episodes):
            sys.audit("step", f"before {number}")
            recorder.on_episode_start()
            for step in range(LENGTHS[number]):
                sys.audit("step", f"{number}.{step}")
                state = np.array([number, step, 0, 1], np.float32)
                observation = {"observation/image": picture(number, step), "observation/state": state, "prompt": "go"}
                recorder.on_step(observation, {"actions": state / 10})
            recorder.on_episode_end()
            sys.stdout.write("ended\n")
            sys.stdout.flush()


def end_at(event: str, name: str, number: int, sent: int) -> None:
    """EVENT "any": whatever changes a file below a folder whose path has NAME in it."""
    seen = 0

    def hook(called, arguments):
        nonlocal seen
        if called not in EVENTS or (event not in ("any", called)):
            return
        path = arguments[1 if called == "os.rename" else 0]
        if not isinstance(path, str | os.PathLike) or (called == "open" and not set("wxa+") & set(arguments[1] or "")):
            return
        if (name in str(path)) if event == "any" else (Path(path).name == name):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), sent)

    sys.addaudithook(hook)


if __name__ == "__main__":
    root, first, episodes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4:]:
        event, name, number, sent = sys.argv[4:]
        end_at(event, name, int(number), signal.Signals[sent])
    record(root, first, episodes)
