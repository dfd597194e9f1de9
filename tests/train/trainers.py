"""Trainers that are killed, or kill themselves and their writer at a chosen moment: what test_killed has forks do."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from record_run import end_at

from manipi.processes import start_helper
from manipi.train.config import TrainConfig
from manipi.train.loop import train
from manipi.train.run import saving

Moment = tuple[str, str, int]
"""As `end_at` takes it: which call that changes files, the file's name, and the how manieth."""


def train_in_group(config: TrainConfig, run: Path, who: str = "", moment: Moment | None = None) -> None:
    """In a process group of its own, all of which is killed at that moment of its "trainer" or its "writer"."""
    os.setpgid(0, 0)
    if moment and who == "trainer":
        end_at(*moment, end=_kill_all)
    elif moment:
        saving.start_helper = lambda *given: start_helper(_kill_all_at, moment, *given)
    train(config, run, show=False)


def _kill_all_at(moment: Moment, target: Callable[..., None], *given: object) -> None:
    end_at(*moment, end=_kill_all)
    target(*given)


def _kill_all() -> None:
    os.killpg(0, signal.SIGKILL)
