"""Batches of encoded samples, made in worker processes in an order that does not depend on their number.

worker 0   step 0   step 2   step 4 …     each worker takes every W-th step,
worker 1   step 1   step 3   step 5 …     and hands its batches over in shared memory;
caller     0  1  2  3  4  5 …             so the caller only takes turns.
"""

import faulthandler
import itertools
import math
import mmap
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from types import TracebackType
from typing import TypeAlias

import numpy as np

from manipi.data.feed.sampler import Sampler
from manipi.errors import ManipiError, TrainingError
from manipi.processes import nameless_file, start_helper
from manipi.types import Sample

Batch: TypeAlias = dict[str, np.ndarray]
"""Samples stacked along a first axis."""

ASK_FOR_STACKS = getattr(signal, "SIGUSR2", None)
"""On this signal a worker prints the stacks of its threads."""

_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a worker needs to make the batch of any step. Everything in it pickles."""

    samples: Callable[[np.ndarray], Sequence[Sample]]
    sampler: Sampler
    rank: int
    world_size: int

    def samples_at(self, step: int) -> Sequence[Sample]:
        return self.samples(self.sampler.rows(step, self.rank, self.world_size))

    def batch(self, step: int) -> Batch:
        samples = self.samples_at(step)
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


class Loader(AbstractContextManager):
    """Endless `(step, batch, wait_seconds)` from `start_step` on.

        with Loader(source.samples, sampler, num_workers=2) as loader:
            for step, batch, wait in loader: ...

    Args:
        samples: the encoded samples at some rows, in their order (`EncodedDataset.samples`); picklable.
        num_workers: 0 makes batches in the caller's process; any number gives the same batches.
        prefetch: batches that each worker makes ahead, at least 1.

    Raises:
        ManipiError: whatever a worker raised, as the same type.
        TrainingError: a worker died.
    """

    def __init__(
        self,
        samples: Callable[[np.ndarray], Sequence[Sample]],
        sampler: Sampler,
        *,
        num_workers: int = 0,
        start_step: int = 0,
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._task = _Task(samples=samples, sampler=sampler, rank=rank, world_size=world_size)
        self.rank, self.world_size = rank, world_size
        self._num_workers, self._start_step, self._prefetch = num_workers, start_step, prefetch
        self._workers: list[_Worker] = []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[int, Batch, float]]:
        make = self._from_workers if self._num_workers else self._task.batch
        try:
            for step in itertools.count(self._start_step):
                began = time.perf_counter()
                batch = make(step)
                yield step, batch, time.perf_counter() - began
        finally:
            self.close()

    def rows(self, step: int) -> np.ndarray:
        """The sampler's rows that this loader's batch of a step is made of."""
        return self._task.sampler.rows(step, self.rank, self.world_size)

    def workers(self, step: int) -> list[int]:
        """Process ids of the workers, first that of the one whose turn it is at a step."""
        first = (step - self._start_step) % self._num_workers if self._num_workers else 0
        return [worker.process_id for worker in (*self._workers[first:], *self._workers[:first])]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def _from_workers(self, step: int) -> Batch:
        if not self._workers:
            for first in range(step, step + self._num_workers):  # one by one: what ends this shall end them
                self._workers.append(_Worker(self._task, first, self._num_workers, self._prefetch))
        return self._workers[(step - self._start_step) % self._num_workers].receive()


class _Worker:
    """A worker process, seen from the caller."""

    def __init__(self, task: _Task, first: int, stride: int, prefetch: int):
        self._process, self._worker = start_helper(_work, task, first, stride, prefetch)
        self._buffers, self._left = dict[int, mmap.mmap](), list[int]()

    def receive(self) -> Batch:
        try:
            result = self._worker.recv()
            if isinstance(result, ManipiError):
                raise result
            number, layout, is_new = result
            if is_new:
                descriptor = recv_handle(self._worker)
                with open(descriptor, "r+b") as file:  # its map keeps it alive by itself
                    self._buffers[number] = mmap.mmap(file.fileno(), 0)
            # Arrays may end in any thread, and this while.
            self._worker.send([self._left.pop() for _ in range(len(self._left))])
        except (EOFError, OSError):  # before or in the middle of a batch
            self._process.join()
            raise TrainingError(
                expected="a batch from a data worker",
                found=f"its end, with exit code {self._process.exitcode} (-9: killed, often for want of memory)",
                where=f"data worker, process {self._process.pid}",
                next="see its traceback above, or run with --data.num-workers 0 to have it in the main process",
            ) from None
        # The arrays keep the whole alive, and its end says that the room behind it may be used again.
        whole = np.frombuffer(self._buffers[number], np.uint8)
        weakref.finalize(whole, self._left.append, number).atexit = False
        return _arrays(whole, layout)

    @property
    def process_id(self) -> int:
        assert self._process.pid is not None, "started in __init__"
        return self._process.pid

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._worker.close()


def _work(task: _Task, first: int, stride: int, prefetch: int, caller: Connection) -> None:
    """What a worker process runs: every `stride`-th step, until it is ended, raises, or finds its parent gone."""
    buffers = _Buffers(caller)
    if ASK_FOR_STACKS:
        faulthandler.register(ASK_FOR_STACKS, file=2)
    try:
        for made, step in enumerate(itertools.count(first, stride)):
            samples = task.samples_at(step)
            if made >= prefetch:
                buffers.free += caller.recv()  # a batch has been taken, and these buffers are free again
            buffers.send(samples)
    except ManipiError as error:
        caller.send(error)
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass  # The parent is gone, and with it the reason for this process.


# Batches in shared memory -------------------------------------------------------------------------------------------

_Layout: TypeAlias = dict[str, tuple[np.dtype, tuple[int, ...], int]]
"""Per array its dtype, shape and place."""


class _Buffers:
    """The worker's side: each batch is in a file that its arrays keep, and that is used again once they are gone.

    Fresh memory costs more time than the copy of a batch into memory that is there.
    """

    def __init__(self, caller: Connection):
        self._caller, self._buffers = caller, list[mmap.mmap]()
        self.free = list[int]()

    def send(self, samples: Sequence[Sample]) -> None:
        layout, size = _Layout(), 0
        for key, value in samples[0].items():
            layout[key] = (value.dtype, (len(samples), *value.shape), size)
            size += -(-value.nbytes * len(samples) // _ALIGNMENT) * _ALIGNMENT
        number, descriptor = next((i for i in self.free if len(self._buffers[i]) >= size), None), None
        if number is not None:
            self.free.remove(number)
        else:
            number, descriptor = len(self._buffers), nameless_file(size)
            self._buffers.append(mmap.mmap(descriptor, 0))
        for key, array in _arrays(np.frombuffer(self._buffers[number], np.uint8), layout).items():
            np.stack([sample[key] for sample in samples], out=array)
        self._caller.send((number, layout, descriptor is not None))
        if descriptor is not None:
            send_handle(self._caller, descriptor, 0)
            os.close(descriptor)


def _arrays(whole: np.ndarray, layout: _Layout) -> Batch:
    return {
        key: whole[place : place + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        for key, (dtype, shape, place) in layout.items()
    }
