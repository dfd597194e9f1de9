"""Processes that help another one, and end with it."""

import multiprocessing
import signal
import weakref
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a terminal or a scheduler sends to a whole process group: only the process that is helped shall act on it."""

_running: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def start_helper(target: Callable[..., None], *args: Any) -> tuple[BaseProcess, Connection]:
    """Run `target(*args, connection)` in a fresh interpreter. Returns the process, and our end of its connection.

    The end of either process reads as EOFError at the other end. `kill` ends the helper, which is deaf to `terminate`.
    """
    # A forked process would inherit the locks of torch's and Arrow's threads, perhaps held.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*args, theirs), daemon=True)
    resource_tracker.ensure_running()  # starting it would unblock signals
    # Blocked rather than ignored: the helper inherits that from its first instruction, and we get the signal after all.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # with our copy of it open, the death of the helper would go unseen
    _running.add(process)
    return process, ours


def _end_all() -> None:
    for process in list(_running):
        process.kill()


# Python ends what still runs by a signal to which helpers are deaf, and then waits for it; this comes before.
Finalize(None, _end_all, exitpriority=0)
