"""Observations of concurrent clients become batches for the one thread that computes.

    clients' coroutines       at most `max_waiting`           one thread
      infer(observation) ───▶ ▢ ▢ ▢ ▢ ▢ ▢ ── `max_batch` ───▶ compute([…])
      actions, or an error ◀──────────────── one by one ───── […]

What waits when the thread becomes free is one batch. It is held back for at most `batch_wait_ms` after its first
observation, and only while fewer wait than there are clients: a client alone never waits for others.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from manipi.errors import BusyError
from manipi.types import Observation

Result: TypeAlias = Mapping[str, Any] | Exception


@dataclass(frozen=True)
class Query:
    """One observation and the noise [H, A] that its actions are sampled from; None: the policy draws or uses none."""

    observation: Observation
    noise: np.ndarray | None


@dataclass(frozen=True)
class Answer:
    """What a policy answered, and where the time went."""

    value: Mapping[str, Any]
    wait_s: float
    """In the queue."""
    infer_s: float
    """Of the whole batch."""
    batch_size: int


@dataclass(eq=False)
class _Waiting:
    query: Query
    answer: "asyncio.Future[Answer]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    since: float = field(default_factory=time.monotonic)

    def settle(self, result: Result, began: float, infer_s: float, batch_size: int) -> None:
        if self.answer.done():  # its client left, or its deadline passed
            return
        if isinstance(result, Exception):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(Answer(result, began - self.since, infer_s, batch_size))


class Batcher:
    """The queue and its thread.

    Args:
        compute: answers a batch, in its order; an exception in its list is the answer to that observation alone.
        num_clients: how many there are now.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Query]], Sequence[Result]],
        num_clients: Callable[[], int],
        *,
        max_batch: int,
        max_waiting: int,
        batch_wait_ms: float,
    ):
        self._compute, self._num_clients = compute, num_clients
        self._max_batch, self._max_waiting, self._wait_s = max_batch, max_waiting, batch_wait_ms / 1000
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    async def infer(self, query: Query) -> Answer:
        """The answer to one observation. A caller that is cancelled gives its place in the queue back.

        Raises:
            BusyError: the queue is full.
            Exception: what the policy raised for this observation.
        """
        if len(self._queue) >= self._max_waiting:
            raise BusyError(
                expected=f"fewer than {self._max_waiting} observations that wait",
                found=f"{len(self._queue)}",
                where="the server's queue",
                next="ask again later, with fewer clients, or raise --limits.max-waiting",
            )
        waiting = _Waiting(query)
        self._queue.append(waiting)
        self._arrived.set()
        try:
            return await waiting.answer
        finally:
            if waiting in self._queue:  # what `remove` raises would spell out every picture
                self._queue.remove(waiting)

    async def run(self) -> None:
        """Compute until cancelled. A batch that is being computed is computed to its end."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference") as worker:
            while True:
                batch = await self._gather()
                began = time.monotonic()
                results = await loop.run_in_executor(worker, self._compute, [waiting.query for waiting in batch])
                infer_s = time.monotonic() - began
                for waiting, result in zip(batch, results, strict=True):
                    waiting.settle(result, began, infer_s, len(batch))

    async def _gather(self) -> list[_Waiting]:
        await self._until_waiting(1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                await self._until_waiting(min(self._max_batch, self._num_clients()))
        return [self._queue.popleft() for _ in range(min(self._max_batch, len(self._queue)))]

    async def _until_waiting(self, count: int) -> None:
        while len(self._queue) < count:
            self._arrived.clear()
            await self._arrived.wait()
