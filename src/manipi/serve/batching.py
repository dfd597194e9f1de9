"""Observations of concurrent clients become batches for the one thread that computes.

    event loop                at most `max_waiting`           one thread
      submit(observation) ──▶ ▢ ▢ ▢ ▢ ▢ ▢ ── `max_batch` ───▶ compute([…])
      actions, or an error ◀──────────────── one by one ───── […]

What waits when the thread becomes free is one batch. It is held back for at most `batch_wait_ms` after its first
observation, and only while fewer wait than there are clients: a client alone never waits for others.

Between an observation and its answer lie two changes of thread and one of coroutine, and nothing else that could wait.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np

from manipi.errors import BusyError, ConfigError
from manipi.types import Observation

Result: TypeAlias = Mapping[str, Any] | BaseException
Compute: TypeAlias = Callable[[list[Observation], list[np.ndarray | None]], Sequence[Result]]


@dataclass(eq=False)
class Query:
    """One observation on its way through the queue, and its answer to come, or what it failed with."""

    observation: Observation
    noise: np.ndarray | None
    """[H, A], which its actions are sampled from; None: the policy draws or uses none."""
    answer: "asyncio.Future[Result]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    since: float = field(default_factory=time.monotonic)
    wait_s: float = 0.0
    """In the queue."""
    infer_s: float = 0.0
    """Of the whole batch."""
    batch: int = 1
    """Observations that were computed together; what others there are changes the rounding of each."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes on at once. Raises ConfigError for a limit that lets nothing through."""

    max_message_mb: float = 64.0
    """A client that sends a larger observation is disconnected (close code 1009)."""
    max_clients: int = 64
    """More are turned away with HTTP 503."""
    max_waiting: int = 32
    """Observations that wait for the policy; one more is answered with the error `busy`."""
    max_batch: int = 8
    """Observations of different clients in one call of the policy."""
    batch_wait_ms: float = 2.0
    """How long the first observation of a batch waits for others; never when one client is connected."""
    deadline_ms: float | None = None
    """How long after its arrival an observation is worth an answer, where the client does not say."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "batch_wait_ms" else 1e-6
            if value is not None and not least <= value < math.inf:
                expected = "a finite number above 0" + (", or 0" if least == 0 else "")
                raise ConfigError(expected=expected, found=f"{value}", where=f"limits.{name}", next="choose another")


class Batcher:
    """The queue and its thread. All but `compute` runs in the event loop, which has to be running already.

    Args:
        compute: answers a batch of observations and noises, in its order; an exception in its list is the answer to
            that observation alone.
        num_clients: how many there are now.
    """

    def __init__(self, compute: Compute, num_clients: Callable[[], int], limits: Limits):
        self._compute, self._num_clients, self._limits = compute, num_clients, limits
        self._queue: deque[Query] = deque()
        self._loop = asyncio.get_running_loop()
        # Not an executor, whose own future takes locks while the event loop waits to run: one future per observation.
        self._batches: SimpleQueue[list[Query] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()
        self._computing = False

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def submit(self, query: Query) -> None:
        """Puts an observation into the queue.

        Raises:
            BusyError: the queue is full.
        """
        if len(self._queue) >= self._limits.max_waiting:
            raise BusyError(
                expected=f"fewer than {self._limits.max_waiting} observations that wait",
                found=f"{len(self._queue)}",
                where="the server's queue",
                next="ask again later, with fewer clients, or raise --limits.max-waiting",
            )
        self._queue.append(query)
        self._start()

    def settle(self, query: Query, result: Result) -> None:
        """Answers a query, unless it has its answer: its client may have left, or its deadline passed.

        If it still waits, its place in the queue is free now.
        """
        if query in self._queue:  # what `remove` raises would spell out every picture
            self._queue.remove(query)
        if not query.answer.done():
            query.answer.set_result(result)

    def close(self) -> None:
        """A batch that is being computed is computed to its end."""
        self._batches.put(None)
        self._thread.join()

    def _start(self) -> None:
        """Compute what waits, if the thread is free, and as soon as the batch is full or has waited long enough."""
        if self._computing or not self._queue:
            return
        most, held_until = self._limits.max_batch, self._queue[0].since + self._limits.batch_wait_ms / 1000
        left_s = held_until - time.monotonic()
        if len(self._queue) < min(most, self._num_clients()) and left_s > 0:
            self._loop.call_later(left_s, self._start)
            return
        self._computing = True
        self._batches.put([self._queue.popleft() for _ in range(min(most, len(self._queue)))])

    def _work(self) -> None:
        """In the thread."""
        while (batch := self._batches.get()) is not None:
            began = time.monotonic()
            try:
                # Not of the queries: an error's traceback refers to what computes, and a query's future to the error.
                results = self._compute([query.observation for query in batch], [query.noise for query in batch])
            except BaseException as error:  # noqa: BLE001 - who waits for an answer raises it.
                results = [error] * len(batch)
            infer_s = time.monotonic() - began
            self._loop.call_soon_threadsafe(self._answer_all, batch, results, began, infer_s)
            # The wait for the next batch would keep both, and an error in the results refers to this frame.
            del batch, results

    def _answer_all(self, batch: list[Query], results: Sequence[Result], began: float, infer_s: float) -> None:
        self._computing = False
        for query, result in zip(batch, results, strict=True):
            query.wait_s, query.infer_s, query.batch = began - query.since, infer_s, len(batch)
            self.settle(query, result)
        # An error's traceback refers to the frames of the thread, and they to this list, which holds the observations.
        batch.clear()
        self._start()
