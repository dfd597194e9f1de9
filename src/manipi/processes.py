"""Processes that help another one: on this computer, with memory that they share, or all over a Ray cluster.

The memory is in files without a name, gone with the last process that holds them.

Named shared memory outlives killed processes, and in containers is often limited to 64 MB.
"""

import gc
import importlib
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd, ForkingPickler
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import numpy as np

from manipi.errors import ConfigError, ManipiError

_Result = TypeVar("_Result")


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


# A Ray cluster --------------------------------------------------------------------------------------------------------


def cluster() -> Any:
    """The package ray, of the cluster that this process belongs to, or of one of this computer alone, started here.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            expected="the package ray", found="it is not installed", where="--ray", next="pip install 'manipi[ray]'"
        ) from error
    if not ray.is_initialized():
        ray.init()
    return ray


def cluster_size() -> tuple[int, int]:
    """Its processors, and its hosts."""
    ray = cluster()
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return int(ray.cluster_resources().get("CPU", 1)), len(hosts)


def on_cluster(function: Callable[..., _Result], tasks: Iterable[tuple[Any, ...]]) -> Generator[_Result, None, None]:
    """`function(*task)` for each, in their order, on whatever hosts have a processor free.

    Raises:
        ConfigError: Ray is not installed.
        whatever `function` raises; what has not begun by then is left, and the rest has ended.
    """
    ray = cluster()
    call, there = ray.remote(_call), ray.put(function)
    waiting = [call.remote(there, *task) for task in tasks]
    try:
        while waiting:
            yield _fetched(ray, waiting[0])
            waiting.pop(0)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), timeout=60)


def _call(function: Callable[..., _Result], *task: Any) -> _Result:
    return function(*task)


class Remote:
    """An object in a process of the cluster, which has a processor; its methods are called as if it were here.

    Args:
        make: called there, with the arguments.

    Raises:
        ConfigError: Ray is not installed.
        ManipiError: from a method: the process or its host ended.
        whatever the object's methods raise.
    """

    def __init__(self, make: Callable[..., Any], *args: Any):
        self._ray = cluster()
        self._object = self._ray.remote(num_cpus=1)(_Held).remote()
        self._made = self._object.make.remote(make, args)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self._call(name, args)

    def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        _fetched(self._ray, self._made)  # or what went wrong
        return _fetched(self._ray, self._object.call.remote(name, args))

    def close(self) -> None:
        """Close the object, where it is still there, and end its process."""
        with suppress(ManipiError):
            self._call("close", ())
        self._ray.kill(self._object)


class _Held:
    def make(self, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._object = make(*args)

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._object, name)(*args)


def _fetched(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ManipiError(
            expected="a Ray cluster whose hosts stay until all is done",
            found=f"{type(error).__name__}: {str(error)[:1000]}",
            where="--ray",
            next="see ray status; the same command then goes on where it can",
        ) from error
