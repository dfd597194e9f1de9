"""A policy on another computer.

    client                              server
      │ ── websocket handshake ──────────▶ │     Authorization: Api-Key <token>, when there is a token
      │ ◀───────────────────── metadata ── │     binary frame, once
      │ ── observation ──────────────────▶ │     binary frame  ┐
      │ ◀───────────────── action chunk ── │     binary frame  ┘ again and again
      │ ◀──────────────────────── error ── │     text frame instead; the server then closes

This is openpi's protocol, so the server may be manipi's or openpi's. A large observation is one message in several
websocket frames, which any server puts together again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import socket
import ssl
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any, Callable, Dict, Mapping, TypeVar

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect
from websockets.version import version as websockets_version

from manipi_client import wire
from manipi_client.address import (
    certificate_advice,
    open_socket,
    other_scheme,
    policy_changed,
    read_address,
    require_same,
    tls_context,
    without_password,
)
from manipi_client.errors import (
    AccessDenied,
    ConnectError,
    ConnectionLost,
    ConnectTimeout,
    InferenceTimeout,
    InputError,
    PolicyServerError,
    ProtocolError,
    error_from_text,
    one_line,
    shown,
)
from manipi_client.keys import DEADLINE

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_E = TypeVar("_E", bound=PolicyServerError)

_LETS_IN = "a policy server that lets this client in"

_CLOSE_SECONDS = 0.2

_NUMBERS = (int, float, np.integer, np.floating)
_LONGEST_SECONDS = 1e6
"""Of a timeout: eleven days. Operating systems do not take every number."""

_FRAGMENT_BYTES = 2**17
"""A larger message travels in parts, so that neither end needs fresh memory for each of its copies of it."""

# websockets 15 brought both. Keepalive pings would end a connection to a server that computes for long without
# answering them, which openpi's does; `request_timeout` does their job. And a robot's network needs no proxy.
_NO_KEEPALIVE_NO_PROXY: dict[str, Any] = (
    {"ping_interval": None, "proxy": None} if int(websockets_version.split(".")[0]) >= 15 else {}
)

# Before Python 3.10 a socket's timeout is not a TimeoutError.
_TIMEOUTS = (TimeoutError, socket.timeout)

# A port that no program listens on, or a tunnel or container proxy in front of a server that has not started.
_HUNG_UP = (EOFError, ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_NOT_UP_YET = (ConnectionError, ConnectionClosed, *_HUNG_UP, *_TIMEOUTS)

# What an HTTP proxy says of a server that has not started, and a server that stops or is full of itself.
_NOT_UP_YET_STATUS = (502, 503, 504)

_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
"""Of a network that comes up later, such as a robot's."""

# Not a policy server, or not for this client. websockets before 15 asserts that what answers speaks HTTP.
_REFUSALS = (InvalidHandshake, InvalidURI, OSError, ValueError, AssertionError)

_GOING_AWAY = (1001, 1012)
"""The close codes of a server that stops, or starts again."""

_CLOSE_ADVICE = {
    **dict.fromkeys(
        _GOING_AWAY, "the server stops or starts again: ask again, and the client connects when it is back"
    ),
    1009: "the observation is over the server's size limit: send smaller pictures, or raise --limits.max-message-mb",
}


class _NotUpYet(ConnectionError):
    """There is no server yet. Its text says what there is."""


class WebsocketPolicy:
    """A policy server's policy. Connects at once, and again whenever the connection was lost.

    May be used by several threads, which then take turns.

    Args:
        host: name or address of the server, also with a port (`robot:8000`, `[::1]:8000`), or a whole `ws://` or
            `wss://` URI (`http` and `https` are the same).
        port: port of the server, unless `host` has one; None for the scheme's own.
        token: sent as `Authorization: Api-Key <token>`.
        ca: file with certificates (PEM) that are trusted instead of this computer's: a self-signed one of the server.
            An address without a scheme is then `wss`.
        allow_new_checkpoint: a server that is connected again may have another checkpoint of the same robot.
        connect_timeout: seconds to wait for a server that is still starting.
        request_timeout: seconds to wait for actions. The first answer may be slow where the server still compiles.
        deadline: seconds after which actions are of no use, told to the server; None: only an observation's own
            `manipi/deadline_ms` says.
        lazy: connect at the first `infer` instead of at once.

    Raises:
        ConnectTimeout: no server answered within `connect_timeout`, or it was not ready (HTTP 502, 503, 504).
        AccessDenied: the token is missing or wrong (HTTP 401, 403).
        PolicyChanged: the server that is connected again is for another robot, or has another checkpoint.
        ConnectError: the address is wrong, or what answers there is no policy server.
        ProtocolError: what answers is not a policy server.
        InputError: a token of other characters than printable ASCII, or a time that is none.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8000,
        token: str | None = None,
        *,
        ca: str | PathLike[str] | None = None,
        connect_timeout: float = 60.0,
        request_timeout: float = 60.0,
        deadline: float | None = None,
        allow_new_checkpoint: bool = False,
        lazy: bool = False,
    ) -> None:
        self._address = read_address(host, port, secure=ca is not None)
        self._uri = without_password(self._address)  # for texts and logs
        self._ca, self._tls = ca, tls_context(ca, self._uri)
        self._headers = _authorization(token)
        self._connect_timeout = _seconds("connect_timeout", connect_timeout)
        self._request_timeout = _seconds("request_timeout", request_timeout)
        self._told = {} if deadline is None else {DEADLINE: _seconds("deadline", deadline) * 1000}
        self._lock, self._interrupted = threading.Lock(), threading.Event()
        self._connection: ClientConnection | None = None
        self._opening: socket.socket | None = None
        self._packer = wire.Packer()
        self._metadata: dict[str, Any] | None = None
        self._allow_new_checkpoint = allow_new_checkpoint
        self._connected_again = False
        self._answered: tuple[dict[str, tuple[int, ...]], tuple[int, ...]] | None = None
        if not lazy:
            self.connect()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the server said about itself when the connection was made."""
        return {} if self._metadata is None else self._metadata

    def connect(self) -> None:
        """Connects, unless there is a connection. Raises as the constructor does."""
        with self._lock:
            self._interrupted.clear()
            self._open()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Sends an observation and returns the server's answer.

        Returns:
            `actions` [H, A], `server_timing` and `policy_timing` in milliseconds, and whatever the policy adds.

        Raises:
            InferenceTimeout: no answer within `request_timeout`, or by the deadline, which may pass while connecting.
            RemoteInferenceError: the policy refused the observation, or failed.
            ConnectionLost: the server went away.
            InputError: the observation holds something that does not travel, or a deadline that is none.
            ProtocolError: the answer is not one.
            ConnectTimeout, AccessDenied, PolicyChanged, ConnectError: as when connecting, after a connection was lost.
        """
        observation, allowed = {**self._told, **observation}, math.inf
        if DEADLINE in observation:
            told, expected, where = observation[DEADLINE], "milliseconds, more than 0", f"observation key {DEADLINE!r}"
            next = "leave it out where an answer is always of use"
            allowed = _number(told, lambda ms: 0 < ms < math.inf, expected, where, next) / 1000
        seconds, end = min(self._request_timeout, allowed), time.monotonic() + allowed
        with self._lock, self._packer.pack(observation) as frame:
            self._interrupted.clear()
            try:
                answer = self._ask(frame, seconds, end)
            except ConnectionLost as lost:
                # A server that stops has answered what it read; its close frame and this observation crossed.
                if _close_code(lost.__cause__) not in _GOING_AWAY or self._interrupted.is_set():
                    raise
                answer = self._ask(frame, seconds, end)
            self._require_action_shape(observation, answer)
        if isinstance(unknown := answer.get("unknown_keys"), list):  # manipi's server says it once
            logger.warning("%s was sent %s", self._uri, _text("; ".join(map(str, unknown))))
        return answer

    def reset(self) -> None:
        """Nothing: a policy server keeps no state between observations."""

    def interrupt(self) -> None:
        """Makes the call that another thread is in fail with ConnectionLost, as soon as it waits for the server."""
        self._interrupted.set()
        connection, opening = self._connection, self._opening
        for open_one in (opening, None if connection is None else connection.socket):
            if open_one is not None:
                with contextlib.suppress(OSError):  # It is closed already.
                    open_one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection. `infer` would open it again."""
        with self._lock:
            self._disconnect()

    def __enter__(self) -> WebsocketPolicy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, frame: memoryview, seconds: float, end: float) -> dict[str, Any]:
        """The answer, over a connection that is there or is made. Nothing is sent after `end`."""
        connection = self._open()
        if time.monotonic() >= end:
            raise self._inference_timeout(seconds, "a connection, made only after that; nothing was sent")
        deadline = time.monotonic() + seconds
        try:
            _limit_sends(connection.socket, max(seconds, 0.001))  # 0 would be no limit.
            if len(frame) <= _FRAGMENT_BYTES:
                connection.send(frame)
            else:
                starts = range(0, len(frame), _FRAGMENT_BYTES)
                connection.send(frame[start : start + _FRAGMENT_BYTES] for start in starts)
            return self._read_map(connection.recv(timeout=max(0.0, deadline - time.monotonic())))
        except BaseException as error:
            late = time.monotonic() >= deadline
            # Also after Ctrl-C: the answer that is under way must not be read as the next one's.
            self._disconnect()
            if isinstance(error, _TIMEOUTS):
                raise self._inference_timeout(seconds) from error
            if not isinstance(error, ConnectionClosed):
                raise
            # The send limit of `_limit_sends`, which websockets 13 hides behind its own for closing.
            if isinstance(error.__cause__, BlockingIOError) or (error.rcvd is None and late):
                raise self._inference_timeout(seconds) from error
            found = f"a closed connection: {_text(error.__cause__ or error)}"
            next = _CLOSE_ADVICE.get(_close_code(error), "look at the server's log, then ask again")
            raise self._error(ConnectionLost, "actions", found, next) from error

    def _open(self) -> ClientConnection:
        """The connection. If there is none: connects and reads the metadata, again while the server is not up yet."""
        if self._connection is not None and self._connection.protocol.state is State.OPEN:
            return self._connection
        self._disconnect()
        deadline = time.monotonic() + self._connect_timeout
        attempt = 0
        while True:
            if attempt == 1:
                logger.warning("waiting up to %g s for a policy server at %s", self._connect_timeout, self._uri)
            try:
                self._connection = self._handshake(deadline)
                metadata = self._read_map(self._connection.recv(max(0.0, deadline - time.monotonic())))
                if self._metadata is not None:
                    require_same(self._metadata, metadata, self._uri, allow_new_checkpoint=self._allow_new_checkpoint)
                self._metadata, self._connected_again = metadata, True
                return self._connection
            except BaseException as error:
                self._disconnect()
                if not isinstance(error, _NOT_UP_YET):
                    raise
                if attempt == 0 and isinstance(error, _HUNG_UP) and not self._interrupted.is_set():
                    self._require_scheme(error, deadline)
                if time.monotonic() + backoff(attempt) > deadline or self._interrupted.is_set():
                    expected = f"a policy server within {self._connect_timeout:g} s"
                    next = "start the server, or wait until it is ready; check host and port, or raise connect_timeout"
                    raise self._error(ConnectTimeout, expected, _text(error), next) from error
            self._interrupted.wait(backoff(attempt))
            attempt += 1

    def _handshake(self, deadline: float) -> ClientConnection:
        """A connection. Raises one of `_NOT_UP_YET` where another attempt may help, ConnectError where none does."""
        try:
            self._opening = open_socket(self._address, deadline - time.monotonic())
            if self._interrupted.is_set():
                self._opening.close()
                raise _NotUpYet("an interrupted call")
            return connect(
                self._address,
                sock=self._opening,
                ssl=self._tls,
                additional_headers=self._headers,
                compression=None,
                max_size=None,
                open_timeout=max(0.0, deadline - time.monotonic()),
                close_timeout=_CLOSE_SECONDS,
                **_NO_KEEPALIVE_NO_PROXY,
            ).__enter__()  # `_disconnect` leaves it; websockets deprecates a connection that was never entered.
        except _NOT_UP_YET:
            raise
        except InvalidStatus as error:
            raise self._status_error(error) from error
        except ssl.SSLCertVerificationError as error:
            next = certificate_advice(error, self._ca)
            expected = "a certificate that is trusted"
            raise self._error(ConnectError, expected, error.verify_message, next) from error
        except _REFUSALS as error:
            if isinstance(error.__cause__, EOFError):
                raise error.__cause__ from None
            if isinstance(error, OSError) and error.errno in _NO_ROUTE:
                raise _NotUpYet(str(error)) from error
            self._require_scheme(error, deadline)
            next = "check host and port; curl the server's /healthz"
            raise self._error(ConnectError, _LETS_IN, _text(error), next) from error

    def _status_error(self, error: InvalidStatus) -> Exception:
        """What it means that the server answers the handshake with a page."""
        status, body = error.response.status_code, bytes(error.response.body or b"")[:200].decode(errors="replace")
        found = f"HTTP {status} {_text(body.strip())}"
        if status in _NOT_UP_YET_STATUS:
            return _NotUpYet(found)
        if status == 400:  # so a web server answers who does not speak TLS to it
            self._require_scheme(error, math.inf)
        if status in (401, 403):
            next = "check token, which is the one of the server's --token-file" if status == 401 else "do what it says"
            return self._error(AccessDenied, _LETS_IN, found, next)
        next = "check host, port and path; curl the server's /healthz"
        if location := error.response.headers.get("Location"):
            found, next = f"{found}, and {shown(location)}", "connect to that address"
        return self._error(ConnectError, _LETS_IN, found, next)

    def _require_scheme(self, error: BaseException, deadline: float) -> None:
        """Raises ConnectError where what hung up speaks TLS and the address does not say so, or the other way round."""
        other = other_scheme(self._uri, deadline - time.monotonic())
        if other is not None:
            found = f"one that speaks {'TLS' if other.startswith('wss') else 'no TLS'} ({_text(error)})"
            raise self._error(ConnectError, _LETS_IN, found, f"connect to {other}") from error

    def _error(self, kind: Callable[..., _E], expected: str, found: str, next: str) -> _E:
        return kind(expected=expected, found=found, where=self._uri, next=next)

    def _require_action_shape(self, observation: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Of a connection's first answer, beside the last one before it: a server may say nothing about itself."""
        actions = answer.get("actions")
        if not isinstance(actions, np.ndarray):
            return
        asked = {k: v.shape for k, v in observation.items() if isinstance(v, np.ndarray) and v.ndim < 2}
        shape, before = actions.shape[1:], self._answered
        if self._connected_again and before is not None and before[0] == asked and before[1] != shape:
            self._disconnect()
            changes = [f"an action for the same kind of observation has shape {shape}, was {before[1]}"]
            raise policy_changed(changes, self._uri, robot=True)
        self._connected_again, self._answered = False, (asked, shape)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._packer = wire.Packer()  # an error's traceback may hold the memory of the last one
        if connection is not None:
            connection.close()

    def _read_map(self, answer: str | bytes) -> dict[str, Any]:
        if isinstance(answer, str):
            raise error_from_text(answer, self._uri)
        value = wire.unpack(answer)
        if not isinstance(value, dict):
            next = "check that a policy server listens there"
            raise self._error(ProtocolError, "a map of metadata or of actions", f"a {type(value).__name__}", next)
        return value

    def _inference_timeout(
        self, seconds: float, found: str = "no answer; the connection is now closed, and the next call opens another"
    ) -> InferenceTimeout:
        next = "look at the server's log; raise request_timeout (or deadline) if its first inference compiles"
        return self._error(InferenceTimeout, f"actions within {seconds:g} s", found, next)


class AsyncWebsocketPolicy:
    """`WebsocketPolicy` for asyncio: the very same client, in a thread of its own. Several tasks take turns.

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
        import asyncio  # whoever awaits has it; who does not is spared the import

        call = self._worker.submit(work, *arguments)
        try:
            return await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            if call.running():
                self._policy.interrupt()
            raise


def _close_code(error: BaseException | None) -> int:
    """What the server closed the connection with; 0 where it sent nothing."""
    return error.rcvd.code if isinstance(error, ConnectionClosed) and error.rcvd else 0


def _text(told: object) -> str:
    """What an error or a server says, on one line of bounded length."""
    return one_line(str(told) or type(told).__name__, 200)


def backoff(attempt: int) -> float:
    """Seconds to wait before the next attempt: 0.1, 0.2, 0.4 … and at most 2."""
    return min(0.1 * 2 ** min(attempt, 10), 2.0)


def _number(value: Any, allowed: Callable[[Any], bool], expected: str, where: str, next: str) -> float:
    """A number that the caller gave. Raises InputError, with the other parts, where it is none or not allowed."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS) or not allowed(value):
        raise InputError(expected=expected, found=shown(value), where=where, next=next)
    return float(value)


def _seconds(name: str, value: Any) -> float:
    """A time that the constructor was given."""
    next = "give a number" + (", or None where an answer is always of use" if name == "deadline" else "")
    expected = f"seconds, from 0 to {_LONGEST_SECONDS:g}"
    return _number(value, lambda s: 0 <= s <= _LONGEST_SECONDS, expected, f"{name} of the policy client", next)


def _authorization(token: Any) -> Dict[str, str]:
    """The header that shows a token, without the line break that a file ends in. No error repeats the token."""
    if not token:
        return {}
    if not isinstance(token, str) or not (token.strip().isascii() and token.strip().isprintable()):
        raise InputError(
            expected="a token: a text of printable ASCII characters on one line",
            found=f"a {type(token).__name__}" + (" with other characters" if isinstance(token, str) else ""),
            where="token of the policy client",
            next="give the text that is in the server's --token-file",
        )
    return {"Authorization": f"Api-Key {token.strip()}"}


def _limit_sends(connection: socket.socket, seconds: float) -> None:
    """Makes a send that makes no progress fail with BlockingIOError; websockets itself would wait for hours."""
    if sys.platform == "win32":
        limit: int | bytes = int(seconds * 1000)
    else:
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    except OSError as error:
        if error.errno != errno.EBADF:  # The server hung up already; reading from the connection says so.
            raise
