"""Helper processes that die, stop or are given much while they start, in real processes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from manipi.processes import SharedArray, start_helper

pytestmark = [pytest.mark.usefixtures("cold"), pytest.mark.timeout(60)]  # what fails here may hang

MORE_THAN_A_PIPE_HOLDS = 2**21


def children() -> set[int]:
    """Of this process, helpers alone."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"spawn_main" in (path / "cmdline").read_bytes():
                found.add(int(path.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@contextmanager
def struck(number: int, delay: float) -> Iterator[None]:
    """The helper that is started within gets a signal so long after its birth."""
    before = children()

    def strike() -> None:
        while not (born := children() - before):
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(born.pop(), number)

    thread = threading.Thread(target=strike)
    thread.start()
    yield
    thread.join()


def sleep(values: bytes, connection) -> None:
    connection.recv()


def answer(values: np.ndarray, shared: SharedArray, word: str, connection) -> None:
    connection.send((values.sum(), shared.array.sum(), word))
    connection.recv()


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_a_helper_that_dies_while_it_starts(delay):
    with struck(signal.SIGKILL, delay):
        process, connection = start_helper(sleep, bytes(MORE_THAN_A_PIPE_HOLDS))
    with pytest.raises((EOFError, ConnectionResetError)):
        connection.recv()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_helper_that_stops_while_it_starts():
    """Its caller goes on, and hears signals."""
    with struck(signal.SIGSTOP, 0.0):
        process, connection = start_helper(sleep, bytes(MORE_THAN_A_PIPE_HOLDS))
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(True))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not connection.poll(0.1)
    finally:
        signal.signal(signal.SIGUSR1, before)
        process.kill()
        process.join()
    assert heard


def test_what_a_helper_is_given():
    """Also descriptors, and nothing of it stays open here."""
    files = len(os.listdir("/proc/self/fd"))
    values, shared = np.arange(MORE_THAN_A_PIPE_HOLDS // 8), SharedArray(np.arange(1000))
    process, connection = start_helper(answer, values, shared, "word")
    assert connection.recv() == (values.sum(), 499_500, "word")
    process.kill()
    process.join()
    process.close()
    connection.close()
    del shared
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # the resource tracker's, where this was the first process
