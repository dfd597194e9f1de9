"""Serves a policy over websocket, in openpi's protocol (see `manipi_client.client` for a picture of it).

    event loop (one thread)                              inference (one thread)
      accepts clients, reads and sends frames              policy, one batch after another
      answers pings and pages                              action guard
      ───── observation ──▶ queue (`batching.py`) ─────▶

Inference has a thread of its own, so that a long one leaves the server reachable. It has only one, because a policy is
not thread-safe and a GPU gains nothing from two.

Beyond openpi's protocol an observation may hold two keys, which the policy does not see:

    manipi/reset        true: a new episode; the client's noise starts again. Alone it is answered without actions
    manipi/deadline_ms  how long after its arrival an answer is of use; a later one is an error with code `deadline`

One that brings its own `manipi/seed` is the policy's to draw noise for.
"""

import asyncio
import contextlib
import ctypes
import functools
import gc
import itertools
import logging
import math
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.protocol import State

from manipi.errors import DeadlineError, ManipiError, ServeError, one_line, shown
from manipi.robots.robot import Robot
from manipi.serve.access import Access, bind, join_host
from manipi.serve.batching import Batcher, Limits, Query, Result
from manipi.serve.guard import ActionGuard, GuardMode, require_prompt, unknown_keys
from manipi.serve.pages import Client, Connection, Pages, ServerState
from manipi.transforms.observation import ReadRobot, check_content
from manipi.types import Observation
from manipi_client import wire
from manipi_client.errors import FourPartError, ProtocolError, error_to_text
from manipi_client.keys import DEADLINE, PAST, RESET, SEED, STEP, SUBTASK, WRITE_SUBTASK

logger = logging.getLogger(__name__)

_MAX_ITEMS = 2_048
"""List and map items in an observation, and characters in a text of it. Arrays count as one."""

LARGE_BYTES = 2**20
"""A message beyond this leaves gaps in the heap that are worth giving back."""

_CLOSE_SECONDS = 2.0

_SEND_SECONDS = 5.0
"""How long a client that lets its answers lie may fill every buffer on their way; the library waits for ever."""

_silent = logging.getLogger(f"{__name__}.websockets")
"""The library repeats what does not speak websocket as it came, behind a traceback."""
_silent.setLevel(logging.CRITICAL)


class ServablePolicy(Protocol):
    """What the server needs of a policy."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def infer(self, observation: Observation, noise: np.ndarray | None = None) -> Mapping[str, Any]:
        """`actions` float32 [H, A], `policy_timing`, ...; raises ObservationError for what does not match the robot."""
        ...


@runtime_checkable
class BatchPolicy(Protocol):
    """What a policy has that computes several observations in one call."""

    def infer_batch(
        self, observations: Sequence[Observation], noises: Sequence[np.ndarray | None]
    ) -> Sequence[Mapping[str, Any]]: ...


@runtime_checkable
class NoisyPolicy(Protocol):
    """What a policy has that samples: noise for one client's episode, without end."""

    def noise_stream(self) -> Iterator[np.ndarray]: ...


class PolicyFailure(ManipiError):
    """The policy raised something that no user can act on. The traceback is in the server's log, under the id."""


class PolicyServer:
    """Serves one policy to many clients. Each has its own noise, from the policy's seed on.

    Args:
        policy: computes the actions; also a `BatchPolicy` and a `NoisyPolicy` where it can be.
        host: address to listen on; other than this computer's own only with a token in `access`.
        port: port to listen on; 0 picks a free one.
        metadata: sent to every client first; the policy's own when None.
        robot: whose limits `guard` keeps, and whose cameras the dashboard shows; None: neither.
        guard: what happens to commands beyond the robot's limits.
        empty_prompts: take observations without an instruction, of which the policy was trained on some.
        subtask_every: of each client at every so many answers the policy writes its subtask, and acts on the last one
            in between; 0: only where a client asks.

    Raises:
        ServeError: a public address without a token.
    """

    def __init__(
        self,
        policy: ServablePolicy,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        metadata: Mapping[str, Any] | None = None,
        robot: Robot | None = None,
        guard: GuardMode = "clamp",
        empty_prompts: bool = False,
        subtask_every: int = 0,
        access: Access | None = None,
        limits: Limits | None = None,
    ):
        self._policy, self._access, self._limits = policy, access or Access(), limits or Limits()
        if not isinstance(policy, BatchPolicy):
            self._limits = replace(self._limits, max_batch=1)
        self._state = ServerState(dict(policy.metadata if metadata is None else metadata), robot)
        self._guard = None if robot is None else ActionGuard(robot, guard)
        self._robot, self._empty_prompts, self._subtask_every = robot, empty_prompts, subtask_every
        if subtask_every and not self._state.metadata.get("writes_text"):
            raise ServeError(
                expected="a policy that was trained to write text (JointConfig)",
                found="one that was not",
                where="PolicyServer.subtask_every",
                next="leave --subtask-every out",
            )
        self._past: Sequence[int] = self._state.metadata.get("past_steps", ())
        self._metadata_frame = wire.pack(self._state.metadata)
        self._host, (self._family, self._address) = host, self._access.resolve(host, port)

    def serve_forever(self, on_ready: Callable[[str, int], None] | None = None) -> None:
        """Serves until SIGTERM or SIGINT, which let every observation that arrived be answered. A second signal kills.

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
                    signal.signal(number, signal.SIG_DFL)  # KeyboardInterrupt would wait for the thread that computes

            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop_once)
            # What exists now, such as modules and weights, is never looked at again by the garbage collector. A full
            # collection takes some twenty milliseconds in the middle of a call, and more with torch.
            gc.collect()
            gc.freeze()
            await self._serve(stop, on_ready or (lambda host, port: None))

        before = signal.getsignal(signal.SIGINT)
        try:
            asyncio.run(run())
        finally:
            signal.signal(signal.SIGINT, before)

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
            try:
                await self._serve(stop, lambda host, port: ready.set_result((port, stop_soon)))
            except Exception as error:  # noqa: BLE001 - the caller raises it.
                ready.set_exception(error)

        thread = threading.Thread(target=lambda: asyncio.run(run()), name="policy-server")
        with contextlib.ExitStack() as stack:
            thread.start()
            stack.callback(thread.join)
            port, stop_soon = ready.result()
            stack.callback(stop_soon)
            yield port

    async def _serve(self, stop: asyncio.Event, on_ready: Callable[[str, int], None]) -> None:
        reuse_freed_memory()
        listener, limits, state = bind(self._family, self._address), self._limits, self._state
        batcher = Batcher(self._compute, lambda: len(state.clients), limits)
        connections: WeakSet[ServerConnection] = WeakSet()
        pages = Pages(state, self._access, self._host, self._address, limits.max_clients, lambda: batcher.num_waiting)
        async with serve(
            lambda connection: self._talk(connection, batcher),
            sock=listener,
            ssl=self._access.tls,
            compression=None,
            max_size=int(limits.max_message_mb * 2**20),
            max_queue=1,  # of frames that a client sends ahead
            close_timeout=_CLOSE_SECONDS,
            origins=[None],  # no page of another site may drive a robot through its visitor's browser
            process_request=pages.answer,
            create_connection=functools.partial(Connection, connections),  # type: ignore[arg-type] - it is only called
            logger=_silent,
        ):
            host, port = listener.getsockname()[:2]
            logger.info("serving on %s", join_host(host, port))
            state.ready = True
            on_ready(host, port)
            try:
                await stop.wait()
                state.ready = False
                await self._drain()
            finally:
                batcher.close()
                asyncio.get_running_loop().call_later(_CLOSE_SECONDS, _hang_up_on_silent, connections)
        logger.info("stopped")

    async def _drain(self) -> None:
        """Answers what has arrived, until every client is gone."""
        await asyncio.sleep(0)  # what the loop has read is taken up by its client's task, which is busy then
        clients = list(self._state.clients)
        logger.info("stopping: %d clients, %d to be answered", len(clients), sum(client.busy for client in clients))
        # Those who are busy are closed after their answer, by `_answer_all`.
        idle = [client.connection.close(CloseCode.GOING_AWAY) for client in clients if not client.busy]
        await asyncio.gather(*idle, *(client.connection.wait_closed() for client in clients))

    async def _talk(self, connection: ServerConnection, batcher: Batcher) -> None:
        """One client, from its metadata frame to its end."""
        host, port = (connection.remote_address or ("an address that is gone", 0))[:2]
        client = Client(connection, join_host(host, port), self._new_noise())
        self._state.clients.add(client)
        logger.info("client %s connected", client.address)

        def leave(_: "asyncio.Future[None]") -> None:
            if client.query is not None:
                batcher.settle(client.query, ConnectionClosed(None, None))

        closed = asyncio.ensure_future(connection.wait_closed())
        closed.add_done_callback(leave)
        try:
            await _send(connection, self._metadata_frame)
            await self._answer_all(client, batcher)
        except ConnectionClosed as reason:
            logger.info("client %s left: %s", client.address, one_line(str(reason), 300))
        finally:
            closed.cancel()
            self._state.clients.discard(client)
            if client.largest > LARGE_BYTES:
                give_memory_back()

    async def _answer_all(self, client: Client, batcher: Batcher) -> None:
        """Answers observations until one of them fails: openpi's protocol ends a connection with its first error."""
        connection = client.connection
        while self._state.ready:
            frame = await connection.recv()
            received, client.busy, client.largest = time.monotonic(), True, max(client.largest, len(frame))
            try:
                answer = await self._answer(client, batcher, frame, received)
            except ConnectionClosed:
                raise
            except Exception as error:  # noqa: BLE001 - the server outlives whatever a policy raises.
                answer = self._describe(client, error)
            del frame  # which is large, as the error was that knew it, and the next one may be long in coming
            await _send(connection, answer)
            if isinstance(answer, str):
                await connection.close(CloseCode.INTERNAL_ERROR, "the previous frame says what went wrong")
                return
            self._state.note_times(total=time.monotonic() - received)
            client.timing["prev_total_ms"], client.busy = (time.monotonic() - received) * 1000, False
        await connection.close(CloseCode.GOING_AWAY)

    async def _answer(self, client: Client, batcher: Batcher, frame: str | bytes, received: float) -> bytes:
        self._state.observations += 1
        client.observations += 1
        observation = None if isinstance(frame, str) else wire.unpack(frame, max_items=_MAX_ITEMS)
        if not isinstance(observation, dict):
            raise ProtocolError(
                expected="an observation: a binary frame with a map",
                found="a text frame" if isinstance(frame, str) else f"a {type(observation).__name__}",
                where="the frame that the client sent",
                next="send observations with manipi_client.WebsocketPolicy or openpi's client",
            )
        del frame
        check_content(observation)
        if _pop(observation, RESET, "true or false", lambda value: isinstance(value, bool), False):
            client.noise, client.subtask, client.acted, client.seen = self._new_noise(), "", 0, {}
            if not observation:
                return wire.pack({"server_timing": client.timing})
        limit_ms = _pop(observation, DEADLINE, "milliseconds from 0", _is_duration, self._limits.deadline_ms)
        unknown: list[str] = []
        if self._robot is not None:
            if not self._empty_prompts:
                require_prompt(observation, self._robot)
            unknown = unknown_keys(observation, self._robot, client.unknown_keys)
            for text in unknown:
                logger.warning("client %s sends %s", client.address, text)
        self._state.note_times(read=time.monotonic() - received)
        if self._subtask_every:
            observation.setdefault(
                WRITE_SUBTASK, client.acted % self._subtask_every == 0 and SUBTASK not in observation
            )
            if client.subtask:
                observation.setdefault(SUBTASK, client.subtask)
        if self._past and self._robot is not None:
            remember(client, observation, self._robot, self._past)
        noise = None if SEED in observation else next(client.noise)
        left_s = math.inf if limit_ms is None else limit_ms / 1000 - (time.monotonic() - received)
        answer, query = await _in_time(client, batcher, Query(observation, noise), left_s)
        client.timing["infer_ms"] = query.infer_s * 1000
        client.subtask, client.acted = str(answer.get("subtask", "")), client.acted + 1
        if why := answer.get("subtask_error"):
            logger.warning(
                "client %s keeps its subtask %s: %s", client.address, shown(client.subtask), one_line(why, 300)
            )
        began = time.monotonic()
        slips: dict[str, Any] = {"unknown_keys": unknown} if unknown else {}
        if query.batch > 1:  # alone, as nearly always, an answer is what openpi's server sends
            slips["batch"] = query.batch
        answer_frame = wire.pack({**answer, **slips, "server_timing": client.timing})
        self._state.note_times(wait=query.wait_s, infer=query.infer_s, write=time.monotonic() - began)
        self._state.note_answer(client, observation, answer.get("actions"))
        return answer_frame

    def _new_noise(self) -> Iterator[np.ndarray | None]:
        return self._policy.noise_stream() if isinstance(self._policy, NoisyPolicy) else itertools.repeat(None)

    def _compute(self, observations: Sequence[Observation], noises: Sequence[np.ndarray | None]) -> list[Result]:
        """In the thread of inference. An error in a batch is found again one by one, to be told to its client alone."""
        self._state.batches += 1
        answers: list[Mapping[str, Any] | None] = [None] * len(observations)
        if len(observations) > 1 and isinstance(self._policy, BatchPolicy):
            try:
                found = self._policy.infer_batch(observations, noises)
                answers = [answer for _, answer in zip(observations, found, strict=True)]
            except Exception as error:  # noqa: BLE001 - each is tried again below.
                said = f"{type(error).__name__}: {shown(str(error), 200)}"
                logger.info("a batch of %d failed, each of it is computed alone: %s", len(observations), said)

        def result(observation: Observation, noise: np.ndarray | None, answer: Mapping[str, Any] | None) -> Result:
            try:
                if answer is None:
                    answer = self._policy.infer(observation, **({} if noise is None else {"noise": noise}))
                if self._guard is not None:
                    actions, moved = self._guard(observation, answer["actions"])
                    if moved:
                        self._state.guarded.update(moved)
                        answer = {**answer, "actions": actions, "guarded": moved}
                return answer
            except Exception as error:  # noqa: BLE001 - it is one client's answer.
                return error

        return list(map(result, observations, noises, answers))

    def _describe(self, client: Client, error: Exception) -> str:
        """The text frame for an error. Tracebacks stay in the log: paths and code are no client's business."""
        if not isinstance(error, FourPartError):
            incident = secrets.token_hex(4)
            text = "".join(traceback.format_exception(error))
            if len(text) > 20_000:
                text = f"{text[:10_000]}\n...\n{text[-10_000:]}"
            lines = text.splitlines()
            if len(lines) > 200:
                lines = [*lines[:100], "...", *lines[-100:]]
            # Every line is marked: the error's message may hold lines that a client sent.
            marked = "\n".join(f"    | {one_line(line, 500)}" for line in lines)
            logger.error("inference failed (id %s)\n%s", incident, marked)
            error = PolicyFailure(
                expected="an action chunk",
                found=f"{type(error).__name__} (id {incident})",
                where="policy.infer on the server",
                next=f"find id {incident} in the server's log: the traceback is there",
            )
        code, _, text = error_to_text(error).partition("\n")
        logger.warning("client %s was told %s: %s", client.address, code, " ".join(text.split()))
        self._state.note_error(client, code, text)
        return f"{code}\n{text}"


def remember(client: Client, observation: dict[str, Any], robot: Robot, past: Sequence[int]) -> None:
    """Adds what the client was seen to show so many steps ago, where it does not bring its past along.

    Only what was shown at those very steps counts, by `manipi/step`: a client that asks at every 8th step has a past of
    8, 16 and 24 steps ago, and none of 5. Nothing else is known to the policy, which has learned that too from the
    episodes' first steps.
    """
    step = observation.get(STEP)
    if PAST in observation or not isinstance(step, int | np.integer) or isinstance(step, bool):
        if PAST not in observation and not client.forgetful:
            logger.warning(
                "client %s sends neither %s nor %s: the policy remembers nothing", client.address, PAST, STEP
            )
            client.forgetful = True
        return
    step = int(step)
    client.seen = {at: shown for at, shown in client.seen.items() if 0 < step - at <= max(past)}
    observation[PAST] = [client.seen.get(step - ago) for ago in past]
    client.seen[step] = {k: v for k, v in ReadRobot(robot).read_part(observation).items() if k != "prompt"}


async def _send(connection: ServerConnection, frame: str | bytes) -> None:
    """Raises ConnectionClosed also where the client takes nothing for `_SEND_SECONDS`; it is hung up on then."""
    try:
        async with asyncio.timeout(_SEND_SECONDS):
            await connection.send(frame)
    except TimeoutError:
        connection.transport.abort()
        raise ConnectionClosed(None, None) from None


def _hang_up_on_silent(connections: Iterable[ServerConnection]) -> None:
    """A server that stops would wait for those who connected and asked for nothing yet."""
    for connection in list(connections):
        if connection.state is State.CONNECTING:
            connection.transport.abort()


async def _in_time(client: Client, batcher: Batcher, query: Query, left_s: float) -> tuple[Mapping[str, Any], Query]:
    """The answer to a query, unless the client leaves (ConnectionClosed) or `left_s` pass (DeadlineError) before."""
    if client.connection.state is State.CLOSED:  # the observation came first
        raise ConnectionClosed(None, None)
    if left_s <= 0:
        raise _late()
    batcher.submit(query)
    loop, client.query, answer = asyncio.get_running_loop(), query, None
    timer = None if left_s == math.inf else loop.call_later(left_s, batcher.settle, query, _late())
    try:
        answer = await query.answer
        if isinstance(answer, BaseException):
            raise answer
        return answer, query
    finally:
        client.query = None
        if timer is not None:
            timer.cancel()
        # The error's traceback refers to this frame: its variables would keep both until a collection.
        del answer, query


def _late() -> DeadlineError:
    return DeadlineError(
        expected="actions before the observation's deadline",
        found="none in time",
        where=f"{DEADLINE} of the observation, or --limits.deadline-ms",
        next="send a newer observation; look at /metrics for where the time goes",
    )


def _pop(observation: dict[str, Any], key: str, expected: str, allowed: Callable[[Any], bool], default: Any) -> Any:
    """Takes a key for the server itself out of an observation."""
    value = observation.pop(key, default)
    if isinstance(value, np.generic | np.ndarray) and value.size == 1:
        value = value.item()
    if value is not default and not allowed(value):
        found = f"{type(value).__name__} {shown(value)}"
        raise ProtocolError(expected=expected, found=found, where=f"observation key {key!r}", next="leave it out")
    return value


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


# Memory of a process that serves for months; all of it concerns the whole process ------------------------------------

_C_LIBRARY: Any = ctypes.CDLL(None) if sys.platform == "linux" else None  # glibc


def reuse_freed_memory() -> None:
    """Blocks that a message and its copies have filled are filled again by the next one.

    The library otherwise gives each back to the system as soon as it is free, and every call begins with some hundred
    page faults. These are the thresholds that it comes to itself once a block of 32 MiB has been freed.
    """
    largest, trim_threshold, mmap_threshold = 32 * 2**20, -1, -3  # of mallopt(3)
    if hasattr(_C_LIBRARY, "mallopt"):
        _C_LIBRARY.mallopt(mmap_threshold, largest)
        _C_LIBRARY.mallopt(trim_threshold, 2 * largest)


def give_memory_back() -> None:
    """Returns what is free to the system, as after a message that was far larger than the others.

    The free end of another thread's heap stays, which has at most 64 MiB.
    """
    if hasattr(_C_LIBRARY, "malloc_trim"):
        _C_LIBRARY.malloc_trim(0)
