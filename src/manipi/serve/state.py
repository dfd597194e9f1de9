"""What a running server knows of itself, for its pages: clients, the last exchange, errors, timings."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection

from manipi.page import thumbnail
from manipi.robots.robot import Robot
from manipi.serve.batching import Waiting
from manipi.serve.metrics import Metrics
from manipi.transforms.observation import ReadRobot
from manipi.types import Observation

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
    waiting: Waiting | None = None
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


@dataclass(eq=False)
class ServerState:
    """One per server; only its event loop changes it."""

    metadata: Mapping[str, Any]
    robot: Robot | None
    """None: cameras and limits are not known, and not shown."""
    started: float = field(default_factory=time.time)
    ready: bool = False
    clients: set[Client] = field(default_factory=set)
    metrics: Metrics = field(default_factory=Metrics)
    last: Exchange | None = None
    errors: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_NUM_ERRORS))
    _seen: tuple[int, dict[str, Any]] = (0, {})

    def note_error(self, client: Client, code: str, text: str) -> None:
        client.errors += 1
        self.metrics.errors[code] += 1
        self.errors.appendleft({"at": time.time(), "code": code, "text": text, "client": client.address})

    def note_answer(self, client: Client, observation: Observation, actions: Any) -> None:
        self.metrics.answers += 1
        client.last = time.time()
        if isinstance(actions, np.ndarray) and actions.ndim == 2:
            # What else an observation holds is not kept until the next one: it may be as large as a message can be.
            seen = {} if self.robot is None else ReadRobot(self.robot).read_part(observation)
            self.last = Exchange(self.metrics.answers, seen, actions, client.address)

    async def to_json(self) -> dict[str, Any]:
        """What the dashboard polls."""
        last, metrics = self.last, self.metrics
        names = ("model", "step", "checkpoint", "control_hz", "action_horizon")
        return {
            "now": time.time(),
            "started": self.started,
            "ready": self.ready,
            "robot": None if self.robot is None else self.robot.name,
            **{name: self.metadata.get(name) for name in names},
            "observations": metrics.observations,
            "guarded": dict(metrics.guarded),
            "error_counts": dict(metrics.errors),
            "errors": list(self.errors),
            "latency_ms": {name: [1e3 * q for q in stage.quantiles_s()] for name, stage in metrics.stages.items()},
            "clients": [_describe(client) for client in sorted(self.clients, key=lambda client: client.since)],
            "last": None if last is None else await self._describe_last(last),
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


def _look(robot: Robot, observation: Observation) -> dict[str, Any]:
    """Prompt and small pictures of an observation; takes some milliseconds."""
    sample = ReadRobot(robot).encode(observation)
    slots = [slot for slot in robot.cameras if f"image/{slot}" in sample]
    cameras = {slot: thumbnail(sample[f"image/{slot}"], _PICTURE_WIDTH) for slot in slots}
    return {"prompt": sample["prompt"], "cameras": cameras}


def _describe(client: Client) -> dict[str, Any]:
    facts = {name: getattr(client, name) for name in ("address", "since", "last", "observations", "errors", "busy")}
    return {**facts, **client.timing}
