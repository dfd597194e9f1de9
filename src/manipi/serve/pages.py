"""What the server's port answers to a browser, a load balancer and Prometheus, and the state that it shows.

GET and HEAD, which change nothing:

/              the dashboard, which polls state.json
/state.json    what it shows
/metrics       for Prometheus
/healthz       OK while the process runs, as openpi's server says it; needs no token
/readyz        OK while observations are taken, 503 once the server stops; needs no token

Only plain requests are pages. Whoever asks for a websocket needs the token on every path, and there is one at / alone.
"""

import asyncio
import functools
import http
import json
import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.protocol import State

from manipi.page import render, thumbnail
from manipi.robots.robot import Robot
from manipi.serve.access import Access
from manipi.serve.batching import Query
from manipi.transforms.observation import ReadRobot
from manipi.types import Observation

STAGES = ("read", "wait", "infer", "write", "total")
"""From the last byte of an observation to its answer in the socket:

    read    bytes to arrays
    wait    for the thread that computes, and for others of the batch
    infer   policy and action guard, of the whole batch
    write   arrays to bytes
    total   all of these, until the answer is in the socket
"""
QUANTILES = (0.5, 0.95, 0.99)

_PICTURE_WIDTH = 320
_NUM_ERRORS = 20

_OPEN = ("/healthz", "/readyz")
_HEADERS = {
    "Cache-Control": "no-store",
    "Connection": "close",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="manipi: any name, the token as password"'}
"""For browsers, which send the token as a password then."""
_LATER = {"Retry-After": "1"}
"""Seconds. A 503 is no refusal: a client tries again, and a robot goes on with what is left of its chunk until then."""


_WITH_BODY = re.compile(
    rb"[A-Z]+ \S+ HTTP/1\.[01]\r\n(?:[^\r\n]+\r\n)*?(?:transfer-encoding:|content-length:(?! *0*\r))", re.IGNORECASE
)
"""The beginning of a request that has a body."""


@dataclass(eq=False)
class Client:
    """One connection, and what the policy remembers of its episode: where in its noise it is."""

    connection: ServerConnection
    address: str
    noise: Iterator[np.ndarray | None]
    subtask: str = ""
    """What the policy's last answer was about, where it writes text; a reset forgets it."""
    acted: int = 0
    """Answers since the reset."""
    seen: dict[int, Observation] = field(default_factory=dict)
    """What a policy that remembers was shown since the reset, by step of the episode, as far back as it looks."""
    since: float = field(default_factory=time.time)
    observations: int = 0
    errors: int = 0
    forgetful: bool = False
    """The log says that it sends nothing by which a policy could remember."""
    unknown_keys: set[str] = field(default_factory=set)
    """Keys of its observations that it was told are not read."""
    last: float | None = None
    busy: bool = False
    """An observation of its is being answered."""
    largest: int = 0
    """Of its messages, in bytes."""
    query: Query | None = None
    """The one that is with the policy, or queues for it."""
    timing: dict[str, float] = field(default_factory=dict)
    """`server_timing` in ms: `infer_ms` of this answer, `prev_total_ms` of the one before."""


@dataclass
class Exchange:
    """An observation and the action chunk that was sent for it."""

    observation: Observation
    actions: np.ndarray
    client: str
    subtask: str
    at: float = field(default_factory=time.time)
    look: dict[str, Any] = field(default_factory=dict)
    """Prompt and small pictures of the observation, once the dashboard has asked for them."""


@dataclass
class Latency:
    """Durations of one stage, in seconds: sum and count of all, quantiles of the last 1,000."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=1_000))
    total_s: float = 0.0
    count: int = 0

    def quantiles_s(self) -> list[float]:
        """p50, p95, p99 in seconds; empty before the first."""
        return np.quantile(self.recent, QUANTILES).tolist() if self.recent else []


@dataclass(eq=False)
class ServerState:
    """One per server. Its event loop changes it; the inference thread counts batches and what the guard moved."""

    metadata: Mapping[str, Any]
    robot: Robot | None
    """None: cameras and limits are not known, and not shown."""
    started: float = field(default_factory=time.time)
    ready: bool = False
    clients: set[Client] = field(default_factory=set)
    observations: int = 0
    """Since the server started, as the other counts."""
    answers: int = 0
    batches: int = 0
    error_counts: Counter[str] = field(default_factory=Counter)
    """By code."""
    guarded: Counter[str] = field(default_factory=Counter)
    """Numbers of action chunks that the guard moved, by reason."""
    stages: Mapping[str, Latency] = field(default_factory=lambda: {stage: Latency() for stage in STAGES})
    last: Exchange | None = None
    errors: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_NUM_ERRORS))

    def note_error(self, client: Client, code: str, text: str) -> None:
        """Counts an error that a client was told; the dashboard shows the last ones."""
        client.errors += 1
        self.error_counts[code] += 1
        self.errors.appendleft({"at": time.time(), "code": code, "text": text, "client": client.address})

    def note_answer(self, client: Client, observation: Observation, actions: Any) -> None:
        """Counts an answer and keeps it for the dashboard, with what the robot's spec reads of the observation.

        Args:
            actions: [H, A]; anything else is counted alone.
        """
        self.answers += 1
        client.last = time.time()
        if isinstance(actions, np.ndarray) and actions.ndim == 2:
            # What else an observation holds is not kept until the next one: it may be as large as a message can be.
            seen = {} if self.robot is None else ReadRobot(self.robot).read_part(observation)
            self.last = Exchange(seen, actions, client.address, client.subtask)

    def note_times(self, **seconds: float) -> None:
        """Adds durations of stages."""
        for stage, duration in seconds.items():
            latency = self.stages[stage]
            latency.recent.append(duration)
            latency.total_s += duration
            latency.count += 1

    async def to_json(self) -> dict[str, Any]:
        """What the dashboard polls."""
        of_policy = ("model", "step", "checkpoint", "control_hz", "action_horizon")
        of_client = ("address", "since", "last", "observations", "errors", "busy", "subtask")
        clients = sorted(self.clients, key=lambda client: client.since)
        return {
            "now": time.time(),
            "started": self.started,
            "ready": self.ready,
            "robot": None if self.robot is None else self.robot.name,
            **{name: self.metadata.get(name) for name in of_policy},
            "observations": self.observations,
            "guarded": dict(self.guarded),
            "error_counts": dict(self.error_counts),
            "errors": list(self.errors),
            "latency_ms": {name: [1e3 * q for q in stage.quantiles_s()] for name, stage in self.stages.items()},
            "clients": [{name: getattr(one, name) for name in of_client} | one.timing for one in clients],
            "last": None if self.last is None else await self._describe_last(self.last),
        }

    async def _describe_last(self, last: Exchange) -> dict[str, Any]:
        space = () if self.robot is None else self.robot.action_space
        fits = last.actions.shape[1] == len(space)
        if self.robot is not None and not last.look:
            last.look = await asyncio.to_thread(_look, self.robot, last.observation)
        actions_AH = np.asarray(last.actions, np.float64).T.tolist()
        return {
            "at": last.at,
            "client": last.client,
            "subtask": last.subtask,
            "actions": [[a if math.isfinite(a) else None for a in row] for row in actions_AH],  # JSON has no NaN
            "dimensions": [vars(dimension) for dimension in space] if fits else [],
            **last.look,
        }

    def to_prometheus(self, **gauges: float) -> str:
        """The text format, version 0.0.4. `gauges` are what the server has now."""
        times: dict[str, float] = {}
        for stage, latency in self.stages.items():
            quantiles = zip(QUANTILES, latency.quantiles_s())
            times |= {f'{{stage="{stage}",quantile="{quantile}"}}': seconds for quantile, seconds in quantiles}
            times |= {f'_sum{{stage="{stage}"}}': latency.total_s, f'_count{{stage="{stage}"}}': latency.count}
        errors = {f'{{code="{code}"}}': count for code, count in sorted(self.error_counts.items())}
        guarded = {f'{{reason="{reason}"}}': count for reason, count in sorted(self.guarded.items())}
        families: list[tuple[str, str, str, Mapping[str, float]]] = [
            ("observations_total", "counter", "Observations received.", {"": self.observations}),
            ("answers_total", "counter", "Action chunks sent.", {"": self.answers}),
            ("batches_total", "counter", "Batches computed.", {"": self.batches}),
            ("errors_total", "counter", "Errors sent, by code.", errors),
            ("guarded_total", "counter", "Commands that the guard moved.", guarded),
            *((name, "gauge", f"{name} now.".capitalize(), {"": number}) for name, number in gauges.items()),
            ("latency_seconds", "summary", "Time by stage; quantiles of the last 1,000.", times),
        ]
        lines = []
        for name, kind, help, samples in families:
            lines += [f"# HELP manipi_{name} {help}\n# TYPE manipi_{name} {kind}\n"]
            lines += [f"manipi_{name}{suffix} {value:.10g}\n" for suffix, value in samples.items()]
        return "".join(lines)


def _look(robot: Robot, observation: Observation) -> dict[str, Any]:
    """Prompt and small pictures of an observation; takes some milliseconds."""
    sample = ReadRobot(robot).encode(observation)
    slots = [slot for slot in robot.cameras if f"image/{slot}" in sample]
    cameras = {slot: thumbnail(sample[f"image/{slot}"], _PICTURE_WIDTH) for slot in slots}
    return {"prompt": sample["prompt"], "cameras": cameras}


class Connection(ServerConnection):
    """One that also answers a request with a body, where the library hangs up without a word.

    Args:
        known: gets the connection, also before its handshake.
    """

    def __init__(self, known: "WeakSet[ServerConnection]", *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        known.add(self)

    def data_received(self, data: bytes) -> None:
        if self.protocol.state is State.CONNECTING and _WITH_BODY.match(data):
            method = data.partition(b" ")[0].decode()
            refusal = _response(method, 400, "a request must have no body; nothing here can be changed")
            self.transport.write(refusal.serialize())
            self.transport.close()
        else:
            super().data_received(data)


@dataclass(eq=False)
class Pages:
    """Looks at every request first: pages are answered here, and so are handshakes that must not be.

    Args:
        host, address: where the server listens, as it was told and as it was resolved.
        num_waiting: how many observations wait for the policy.
    """

    state: ServerState
    access: Access
    host: str
    address: tuple
    max_clients: int
    num_waiting: Callable[[], int]

    def __post_init__(self) -> None:
        robot = self.state.robot
        title = "manipi serve" if robot is None else f"{robot.name} · manipi serve"
        self._dashboard = render("serve/dashboard.html", title=title).decode()

    async def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response, or None for a handshake that may go on."""
        path, headers, state = request.path.partition("?")[0], request.headers, self.state
        method = getattr(request, "method", "GET")  # older releases of websockets let nothing else through
        respond = functools.partial(_response, method)
        upgrade = any("websocket" in value.lower() for value in headers.get_all("Upgrade"))
        if not self.access.accepts_host(headers, self.host, self.address):
            return respond(403, "the Host header is no name of this computer; use localhost, or set a token")
        if method not in (("GET",) if upgrade else ("GET", "HEAD")):
            return respond(405, "GET only; nothing here can be changed", Allow="GET, HEAD")
        if (upgrade or path not in _OPEN) and not self.access.admits(headers):
            return respond(401, "the token is missing, or another one", **_CHALLENGE)
        if upgrade:
            if path != "/":
                return respond(404, "policies are at /, the path that clients use unless they are told another one")
            if not state.ready:
                return respond(503, "the server is stopping", **_LATER)
            if len(state.clients) >= self.max_clients:
                busy = f"busy: {self.max_clients} clients are connected (--limits.max-clients)"
                return respond(503, busy, **_LATER)
            return None
        if path == "/":
            return respond(200, self._dashboard, "text/html; charset=utf-8")
        if path == "/state.json":
            return respond(200, json.dumps(await state.to_json()), "application/json")
        if path == "/metrics":
            text = state.to_prometheus(clients=len(state.clients), waiting=self.num_waiting())
            return respond(200, text, "text/plain; version=0.0.4; charset=utf-8")
        if path == "/healthz":
            return respond(200, "OK")
        if path == "/readyz":
            return respond(200, "OK") if state.ready else respond(503, "stopping", **_LATER)
        return respond(404, "nothing here; the dashboard is at /")


def _response(method: str, code: int, text: str, kind: str = "text/plain; charset=utf-8", **headers: str) -> Response:
    status, body = http.HTTPStatus(code), (text if text.endswith("\n") else text + "\n").encode()
    fields = {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body)), **headers}
    return Response(status.value, status.phrase, Headers(fields), b"" if method == "HEAD" else body)
