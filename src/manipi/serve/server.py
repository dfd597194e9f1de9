"""Serves a policy over websocket, in openpi's protocol (see `manipi_client.client` for a picture of it).

    event loop (one thread)                     worker (one thread)
      accepts clients, reads and sends frames     policy.infer, one observation after another
      answers pings and GET /healthz

Inference has a thread of its own, so that a long one (a first compilation) leaves the server reachable. It has only
one, because a policy is not thread-safe and a GPU gains nothing from two.
"""

import asyncio
import contextlib
import errno
import functools
import http
import ipaddress
import logging
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from manipi.errors import ManipiError, ServeError
from manipi.types import Observation
from manipi_client import wire
from manipi_client.errors import ManipiClientError, ProtocolError, error_to_text

logger = logging.getLogger(__name__)


class ServablePolicy(Protocol):
    """What the server needs of a policy."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def infer(self, observation: Observation, noise: np.ndarray | None = None) -> Mapping[str, Any]:
        """`actions` float32 [H, A], `policy_timing`, ...; raises ObservationError for what does not match the robot."""
        ...


class PolicyFailure(ManipiError):
    """The policy raised something that no user can act on. The traceback is in the server's log, under the id."""


class PolicyServer:
    """Serves one policy to any number of clients.

    Args:
        policy: computes the actions.
        host: address to listen on; other than this computer's own only with `allow_public`.
        port: port to listen on; 0 picks a free one.
        metadata: sent to every client first; the policy's own when None.
        max_message_bytes: a client that sends a larger observation is disconnected (close code 1009).
        allow_public: listen where other computers can connect. There is no authentication and no encryption.

    Raises:
        ServeError: a public address without `allow_public`.
    """

    def __init__(
        self,
        policy: ServablePolicy,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        metadata: Mapping[str, Any] | None = None,
        max_message_bytes: int = 64 * 2**20,
        allow_public: bool = False,
    ):
        self._policy, self._max_message_bytes = policy, max_message_bytes
        self._metadata_frame = wire.pack(dict(policy.metadata if metadata is None else metadata))
        self._family, self._address = _resolve(host, port, allow_public)

    def serve_forever(self, on_ready: Callable[[str, int], None] | None = None) -> None:
        """Serves until SIGTERM or SIGINT, which let a running inference finish. A second signal kills.

        Args:
            on_ready: called with host and port once clients can connect.

        Raises:
            ServeError: the address cannot be bound.
        """

        async def run() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()

            def stop_once() -> None:
                stop.set()
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)

            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop_once)
            await self._serve(stop, on_ready or (lambda host, port: None))

        asyncio.run(run())

    @contextlib.contextmanager
    def serve_in_thread(self) -> Iterator[int]:
        """Serves in a thread of its own until the end of the `with`; yields the port.

        Raises:
            ServeError: the address cannot be bound.
        """
        ready: Future[tuple[int, Callable[[], object]]] = Future()

        async def run() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()
            stop_soon = functools.partial(loop.call_soon_threadsafe, stop.set)
            await self._serve(stop, lambda host, port: ready.set_result((port, stop_soon)))

        def run_or_tell() -> None:
            try:
                asyncio.run(run())
            except Exception as error:  # noqa: BLE001 - the caller raises it.
                ready.set_exception(error)

        thread = threading.Thread(target=run_or_tell, name="policy-server")
        thread.start()
        try:
            port, stop_soon = ready.result()
            try:
                yield port
            finally:
                stop_soon()
        finally:
            thread.join()

    async def _serve(self, stop: asyncio.Event, on_ready: Callable[[str, int], None]) -> None:
        listener = _bind(self._family, self._address)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference") as worker:
            async with serve(
                lambda connection: self._talk(connection, worker),
                sock=listener,
                compression=None,
                max_size=self._max_message_bytes,
                process_request=_answer_health_check,
            ):
                host, port = listener.getsockname()[:2]
                logger.info("serving on ws://%s:%d", host, port)
                on_ready(host, port)
                await stop.wait()
        logger.info("stopped")

    async def _talk(self, connection: ServerConnection, worker: ThreadPoolExecutor) -> None:
        """One client, from its metadata frame to its end."""
        logger.info("client %s connected", connection.remote_address)
        try:
            await connection.send(self._metadata_frame)
            await self._answer_all(connection, worker)
        except ConnectionClosed as closed:
            logger.info("client %s left: %s", connection.remote_address, closed)

    async def _answer_all(self, connection: ServerConnection, worker: ThreadPoolExecutor) -> None:
        """Answers observations until one of them fails: openpi's protocol ends a connection with its first error."""
        loop = asyncio.get_running_loop()
        timing: dict[str, float] = {}
        while True:
            frame = await connection.recv()
            received = time.monotonic()
            try:
                answer, timing["infer_ms"] = await loop.run_in_executor(worker, self._infer, _read_observation(frame))
                answer_frame = wire.pack({**answer, "server_timing": timing})
            except Exception as error:  # noqa: BLE001 - the server outlives whatever a policy raises.
                await connection.send(_describe(error))
                await connection.close(CloseCode.INTERNAL_ERROR, "the previous frame says what went wrong")
                return
            await connection.send(answer_frame)
            timing["prev_total_ms"] = (time.monotonic() - received) * 1000

    def _infer(self, observation: Observation) -> tuple[Mapping[str, Any], float]:
        started = time.monotonic()
        answer = self._policy.infer(observation)
        return answer, (time.monotonic() - started) * 1000


def _read_observation(frame: str | bytes) -> Observation:
    observation = None if isinstance(frame, str) else wire.unpack(frame)
    if not isinstance(observation, dict):
        raise ProtocolError(
            expected="an observation: a binary frame with a map",
            found="a text frame" if isinstance(frame, str) else f"a {type(observation).__name__}",
            where="the frame that the client sent",
            next="send observations with manipi_client.WebsocketPolicy or openpi's client",
        )
    return observation


def _describe(error: Exception) -> str:
    """The text frame for an error. Tracebacks stay in the log: paths and code are no client's business."""
    if isinstance(error, ManipiError | ManipiClientError):
        logger.warning("answered with an error\n%s", error)
        return error_to_text(error)
    incident = secrets.token_hex(4)
    logger.error("inference failed (id %s)", incident, exc_info=error)
    return error_to_text(
        PolicyFailure(
            expected="an action chunk",
            found=f"{type(error).__name__} (id {incident})",
            where="policy.infer on the server",
            next=f"find id {incident} in the server's log: the traceback is there",
        )
    )


def _answer_health_check(connection: ServerConnection, request: Request) -> Response | None:
    return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None


def _resolve(host: str, port: int, allow_public: bool) -> tuple[socket.AddressFamily, tuple]:
    """The family and address of a host, which must be this computer's own unless `allow_public`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise _bind_error("a host name or address of this computer", str(error), host, port, "check --host") from error
    if not allow_public and not ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback:
        raise _bind_error(
            "an address that only this computer reaches, such as 127.0.0.1",
            "one that other computers reach, with no authentication and no encryption",
            host,
            port,
            "leave the host out and connect through `ssh -L`, or allow it with --allow-public",
        )
    return family, address


def _bind(family: socket.AddressFamily, address: tuple) -> socket.socket:
    host, port = address[:2]
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = f"stop what listens there, or choose another port: --port {port + 1} (0 picks a free one)"
            raise _bind_error("a free port", "a port that is in use", host, port, hint) from error
        raise _bind_error(
            "an address to listen on", str(error), host, port, "choose another --host or --port"
        ) from error


def _bind_error(expected: str, found: str, host: str, port: int, next: str) -> ServeError:
    return ServeError(expected=expected, found=found, where=f"{host}:{port}", next=next)
