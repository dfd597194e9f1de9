"""Processes that help another one and end with it, and memory that processes share.

The memory is in files without a name, gone with the last process that holds them.

Named shared memory outlives killed processes, and in containers is often limited to 64 MB.
"""

import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd, ForkingPickler
from multiprocessing.util import Finalize
from typing import Any

import numpy as np


def nameless_file(size: int) -> int:
    """The descriptor of a file of `size` bytes in RAM, all of them allocated."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("manipi")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    allocate(descriptor, size)
    return descriptor


def allocate(descriptor: int, size: int) -> None:
    """Make the file at least so large, and take the room now; later, a store into its map would be fatal."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


class SharedArray:
    """A read-only array that processes spawned later use in place, where pickling would give each a copy."""

    def __init__(self, values: np.ndarray):
        self._open(nameless_file(max(1, values.nbytes)), values.dtype, values.shape)
        self.array[...] = values
        self.array.setflags(write=False)

    def _open(self, descriptor: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.array = np.ndarray(shape, dtype, mmap.mmap(descriptor, 0))

    def __reduce__(self) -> tuple:
        return _attach, (DupFd(self._descriptor), self.array.dtype, self.array.shape)


def _attach(descriptor: Any, dtype: np.dtype, shape: tuple[int, ...]) -> SharedArray:
    shared = SharedArray.__new__(SharedArray)
    shared._open(descriptor.detach(), dtype, shape)
    shared.array.setflags(write=False)
    return shared


_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a terminal or a scheduler sends to a whole process group: only the process that is helped shall act on it."""

_running: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def start_helper(target: Callable[..., None], *args: Any) -> tuple[BaseProcess, Connection]:
    """Run `target(*args, connection)` in a fresh interpreter. Returns the process, and our end of its connection.

    The end of either process reads as EOFError at the other end. `kill` ends the helper, which is deaf to `terminate`.
    This returns at once, whatever becomes of the helper, and however much the arguments are.
    """
    # A forked process would inherit the locks of torch's and Arrow's threads, perhaps held.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_begin, args=(_Parcel((target, *args)), theirs), daemon=True)
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


def _begin(parcel: "_Parcel", caller: Connection) -> None:
    target, *args = parcel.contents
    target(*args, caller)


class _Parcel:
    """What a helper is started with, in memory that it gets the descriptor of.

    Python writes arguments into a pipe whose reading end it keeps open meanwhile. Where they are more than the pipe
    holds (64 kB) and the helper dies before it has read them, that never ends, and no signal is heard.
    """

    def __init__(self, contents: tuple[Any, ...]):
        self.contents = contents

    def __reduce__(self) -> tuple:
        # While the process is being started, which is when descriptors within may be handed on.
        self._pickled = SharedArray(np.frombuffer(ForkingPickler.dumps(self.contents), np.uint8))
        return _unpack, (self._pickled,)


def _unpack(pickled: SharedArray) -> _Parcel:
    # What this imports stays. To look for garbage among it takes as long as to import half of this package.
    gc.disable()
    try:
        return _Parcel(pickle.loads(pickled.array.data))
    finally:
        gc.freeze()
        gc.enable()


def _end_all() -> None:
    for process in list(_running):
        process.kill()


# Python ends what still runs by a signal to which helpers are deaf, and then waits for it; this comes before.
Finalize(None, _end_all, exitpriority=0)
