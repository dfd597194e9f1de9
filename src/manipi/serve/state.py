"""State of a running server, for its pages: clients, the last exchange, counts and timings."""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection

from manipi.page import thumbnail
from manipi.robots.robot import Robot
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


@dataclass(eq=False)
class Client:
    """One connection, and what the policy remembers of its episode: where in its noise it is."""

    connection: ServerConnection
    address: str
    noise: Iterator[np.ndarray | None]
    since: float = field(default_factory=time.time)
    observations: int = 0
    errors: int = 0
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


@dataclass(frozen=True)
class Exchange:
    """An observation and the action chunk that was sent for it."""

    number: int
    observation: Observation
    actions: np.ndarray
    client: str
    at: float = field(default_factory=time.time)


@dataclass
class Latency:
    """Durations of one stage, in seconds: sum and count of all, quantiles of the last 1,000."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=1_000))
    total_s: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self.recent.append(seconds)
        self.total_s += seconds
        self.count += 1

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
    _seen: tuple[int, dict[str, Any]] = (0, {})

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
            self.last = Exchange(self.answers, seen, actions, client.address)

    def note_times(self, **seconds: float) -> None:
        """Adds durations of stages."""
        for stage, duration in seconds.items():
            self.stages[stage].add(duration)

    async def to_json(self) -> dict[str, Any]:
        """What the dashboard polls."""
        of_policy = ("model", "step", "checkpoint", "control_hz", "action_horizon")
        of_client = ("address", "since", "last", "observations", "errors", "busy")
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
        if self.robot is not None and self._seen[0] != last.number:
            self._seen = last.number, await asyncio.to_thread(_look, self.robot, last.observation)
        actions_AH = np.asarray(last.actions, np.float64).T.tolist()
        return {
            "at": last.at,
            "client": last.client,
            "actions": [[a if math.isfinite(a) else None for a in row] for row in actions_AH],  # JSON has no NaN
            "dimensions": [vars(dimension) for dimension in space] if fits else [],
            **self._seen[1],
        }

    def to_prometheus(self, **gauges: float) -> str:
        """The text format, version 0.0.4. `gauges` are what the server has now."""
        times: list[tuple[str, str, float]] = []
        for stage, latency in self.stages.items():
            for quantile, seconds in zip(QUANTILES, latency.quantiles_s()):
                times.append(("", f'{{stage="{stage}",quantile="{quantile}"}}', seconds))
            label = f'{{stage="{stage}"}}'
            times += [("_sum", label, latency.total_s), ("_count", label, latency.count)]
        errors = [("", f'{{code="{code}"}}', count) for code, count in sorted(self.error_counts.items())]
        guarded = [("", f'{{reason="{reason}"}}', count) for reason, count in sorted(self.guarded.items())]
        families = [
            _family("observations_total", "counter", "Observations received.", [("", "", self.observations)]),
            _family("answers_total", "counter", "Action chunks sent.", [("", "", self.answers)]),
            _family("batches_total", "counter", "Batches computed.", [("", "", self.batches)]),
            _family("errors_total", "counter", "Errors sent, by code.", errors),
            _family("guarded_total", "counter", "Commands that the guard moved.", guarded),
            *(_family(name, "gauge", f"{name} now.".capitalize(), [("", "", n)]) for name, n in gauges.items()),
            _family("latency_seconds", "summary", "Time by stage; quantiles of the last 1,000.", times),
        ]
        return "".join(families)


def _look(robot: Robot, observation: Observation) -> dict[str, Any]:
    """Prompt and small pictures of an observation; takes some milliseconds."""
    sample = ReadRobot(robot).encode(observation)
    slots = [slot for slot in robot.cameras if f"image/{slot}" in sample]
    cameras = {slot: thumbnail(sample[f"image/{slot}"], _PICTURE_WIDTH) for slot in slots}
    return {"prompt": sample["prompt"], "cameras": cameras}


def _family(name: str, kind: str, help: str, samples: Iterable[tuple[str, str, float]]) -> str:
    """One metric; a sample is a suffix of its name, its labels and its value."""
    lines = [f"manipi_{name}{suffix}{labels} {value:.10g}\n" for suffix, labels, value in samples]
    return f"# HELP manipi_{name} {help}\n# TYPE manipi_{name} {kind}\n{''.join(lines)}"
