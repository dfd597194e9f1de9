"""`WebsocketPolicy` for asyncio: the very same client, in a thread of its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Mapping, TypeVar

from manipi_client.client import WebsocketPolicy

_T = TypeVar("_T")


class AsyncWebsocketPolicy:
    """A policy server's policy, awaited. Several tasks take turns.

        async with AsyncWebsocketPolicy("192.168.1.20") as policy:
            chunk = await asyncio.wait_for(policy.infer(observation), 0.5)

    A task that is cancelled, as `wait_for` does, closes the connection: its answer is never read as the next one's.
    Takes the arguments of `WebsocketPolicy`, and raises as it does.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self._policy = WebsocketPolicy(*arguments, **settings, lazy=True)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="policy-client")

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the server said about itself when the connection was made."""
        return self._policy.metadata

    async def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """As `WebsocketPolicy.infer`."""
        return await self._run(self._policy.infer, observation)

    async def reset(self) -> None:
        """As `WebsocketPolicy.reset`."""
        await self._run(self._policy.reset)

    async def close(self) -> None:
        """Closes the connection, for good."""
        await self._run(self._policy.close)
        self._worker.shutdown(wait=False)

    async def __aenter__(self) -> AsyncWebsocketPolicy:
        try:
            await self._run(self._policy.connect)
        except BaseException:
            self._worker.shutdown(wait=False)
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _run(self, work: Callable[..., _T], *arguments: Any) -> _T:
        call = self._worker.submit(work, *arguments)
        try:
            return await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            if call.running():
                self._policy.interrupt()
            raise
