"""Who may write into a run's folder: one trainer, and after its death the writer that it leaves behind.

A lock belongs to an open file, and is free once no process has that open any more, whatever they died of.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from tqdm import tqdm

from manipi.errors import TrainingError
from manipi.storage import storage_errors


class Lock:
    """A locked file. A process that is started with it holds it too, from its first instruction on.

    Raises:
        BlockingIOError: `wait` is false, and another process holds it.
    """

    def __init__(self, path: Path, *, wait: bool):
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def __reduce__(self) -> tuple:
        return _attach, (DupFd(self._descriptor),)


def _attach(descriptor: Any) -> Lock:
    lock = Lock.__new__(Lock)
    lock._descriptor = descriptor.detach()
    return lock


@contextmanager
def alone(folder: Path) -> Iterator[Lock]:
    """Keep other trainers out of the folder. Gives the lock for the process that writes checkpoints there.

    Raises:
        TrainingError: another process trains here.
        StorageError: the folder cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            trainer = Lock(folder / ".trainer.lock", wait=False)
        except BlockingIOError as error:
            raise TrainingError(
                expected="a run folder in which no other process trains",
                found="one that does",
                where=str(folder),
                next="wait for it or end it, or give the new run another folder (--run-dir)",
            ) from error
        try:
            writer = _lock_of_writer(folder / ".writer.lock")
        except OSError:
            trainer.close()
            raise
    try:
        yield writer
    finally:
        writer.close()
        trainer.close()


def _lock_of_writer(path: Path) -> Lock:
    try:
        return Lock(path, wait=False)
    except BlockingIOError:
        tqdm.write("the trainer before this one was killed during a save; waiting for its checkpoint")
        return Lock(path, wait=True)
