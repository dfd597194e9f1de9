"""Processes that are forks of a server which has imported what each of them would import for seconds.

    tests ── fork server ── fork ── manipi ARGUMENTS ── the same fork server ── fork ── its writer, its data workers

A fork is a process of its own: it has the group, environment, folder, streams and blocked signals of the one that asked
for it, and an exit code. What `multiprocessing` would spawn is such a fork after `spawn_by_forking`, which
tests/conftest.py calls; the fixture `cold` has it spawned after all.
"""

import ctypes
import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any

PRELOAD = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.distributed.checkpoint",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "av.subtitles.stream",
    "pyarrow.parquet",
    "zstandard",
    "tests.train.ranks",
    "manipi.train.run.saving",
    "manipi.train.watch.first_batch",
    "manipi.train.watch.validation",
    "manipi.cli.train",
    "manipi.cli.eval",
    "manipi.cli.dataset",
    "manipi.cli.stats",
    "manipi.cli.inspect",
    "manipi.data.review.check",
    "manipi.data.rlds.reader",
    "manipi.data.lerobot.writer",
    "manipi.evaluate.open_loop",
    "tests.pictures",
    "tests.freeze",
]
"""The last one puts what was imported out of the garbage collector's sight."""

PYTHONS = multiprocessing.get_context
"""`get_context` as Python has it: its "spawn" starts from nothing."""


_NEW_NETWORK = 0x40000000
_network = ""


class _Fork(ForkServerProcess):
    def __reduce__(self) -> tuple:
        return _revive, (_Surroundings(), type(self), self.__dict__)


class _Forks(ForkServerContext):
    Process = _Fork  # type: ignore[assignment]


FORKS = _Forks()
"""In place of `multiprocessing.get_context("spawn")`."""


class _Surroundings:
    """Of the process that asks, taken on by the fork before it reads what it shall do."""

    def __reduce__(self) -> tuple:
        forkserver._forkserver.ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        streams = [DupFd(number) for number in (1, 2)]
        address = forkserver._forkserver._forkserver_address
        deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return _take_on, (blocked, deaf, os.getpgid(0), dict(os.environ), streams, address, _network)


def _take_on(
    blocked: set, deaf: bool, group: int, environment: dict[str, str], streams: list[Any], address: str, network: str
) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    signal.signal(signal.SIGINT, signal.SIG_IGN if deaf else signal.default_int_handler)
    with suppress(PermissionError, ProcessLookupError):  # the last process of the group has ended
        os.setpgid(0, group)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream.detach(), number)
    if network:
        enter_network(network)
    # Its own processes come from the same server, which is no child of it.
    forkserver._forkserver._forkserver_address = address
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    spawn_by_forking()


def _revive(_: None, kind: type, state: dict[str, Any]) -> ForkServerProcess:
    process = kind.__new__(kind)
    process.__dict__.update(state)
    return process


def enter_network(name: str) -> None:
    """This process, and those that it starts, are in the network namespace of that name, as with `ip netns exec`."""
    global _network
    with open(f"/run/netns/{name}") as space:
        _system_call("setns", space.fileno(), _NEW_NETWORK)
    _network = name


def _system_call(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}{arguments}")


def spawn_by_forking() -> None:
    """From now on, and in all that are started."""
    multiprocessing.get_context = lambda method=None: FORKS if method == "spawn" else PYTHONS(method)
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # a fork has none of its parent's threads
    forkserver._forkserver.set_forkserver_preload(PRELOAD)
