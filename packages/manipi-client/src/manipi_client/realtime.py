"""One action per control step from a policy that is asked while the robot moves, and how smooth that is.

    control loop   0    1    2    3    4    5    6    7    8        one `infer` per step, which does not wait
                   │              │         │
    worker thread  └─ asks ─ A    └─ asks ──┤ B arrives            delay of B: 2 executed steps
                                            │
    executed       a0   a1   a2   a3   a4   b2   b3   b4   b5       execute_steps = 3

How the chunks are joined:

    synchronous    the robot waits for each chunk and executes it from its first step
    asynchronous   the new chunk takes over when it arrives
    ensemble       the mean of all chunks that reach the action (temporal ensembling)
    real_time      as asynchronous, and the policy is told what is left of the old chunk and how much of that will be
                   executed before the answer comes, so that the new chunk goes on from there (real-time chunking,
                   arXiv 2506.07339)

A chunk that arrives skips as many rows as actions were executed since its observation. Steps in which the robot held
still are not among them: its plan goes on where it stopped, however long that was.

    step           0    1    2    3    4    5    6    7    8
    executed       a0   a1   a2   a3   ──   ──   ──   b2   b3      asked at step 2, answered at step 7, H = 4

What `MotionMeter` measures, in memory that does not grow:

    action      ─ ─ ─ ─┐         seam: the executed action comes from another chunk than the one before
                       └─ ─ ─    jump: how far the command moves there
    observation  ●─────────►     reaction: how old the observation behind an executed action is

Shape letter: A action dimensions.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Callable, Deque, Mapping

import numpy as np

from manipi_client.broker import Chunk, ChunkQueue, Policy, read_chunk
from manipi_client.client import backoff
from manipi_client.errors import AccessDenied, InputError, PolicyChanged, PolicyServerError, shown
from manipi_client.keys import DELAY, PREVIOUS, STEP

logger = logging.getLogger(__name__)

JOINS = ("synchronous", "asynchronous", "ensemble", "real_time")

_DELAYS_KEPT = 10

OnStarvation = Callable[[Mapping[str, Any], np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Motion:
    """What was measured, [A] in the robot's units for what depends on the dimension."""

    steps: int
    starved_steps: int
    """Steps for which there was no action in time."""
    seams: int
    seam_jump: np.ndarray
    """The largest change of the command at a seam."""
    seam_change: np.ndarray
    """The mean change at seams."""
    step_change: np.ndarray
    """The mean change from a step to the next of the same chunk, to compare with."""
    jerk: np.ndarray
    """The mean third difference of the commands, per step³."""
    reaction_s: float
    """The mean age of the observation behind an executed action, when it was handed out."""
    reaction_max_s: float


class _Mean:
    """Of numbers or arrays [A] that come one by one; NaN where none came."""

    def __init__(self) -> None:
        self.count, self._total = 0, np.zeros(())

    def add(self, value: Any) -> None:
        self.count, self._total = self.count + 1, self._total + value

    def read(self) -> np.ndarray:
        return self._total / self.count if self.count else np.full((), np.nan)


class MotionMeter:
    """Takes every executed action in turn."""

    def __init__(self) -> None:
        self._last: list[np.ndarray] = []
        self._chunk: int | None = None
        self._steps = self._starved = 0
        self._at_seams, self._within, self._jerk, self._reaction = _Mean(), _Mean(), _Mean(), _Mean()
        self._jump, self._reaction_max = np.zeros(()), math.nan

    def add(self, action: np.ndarray, chunk: int | None, age_s: float = math.nan) -> None:
        """An executed action [A].

        Args:
            chunk: tells chunks apart; None: the robot had none, and starved. Its jump counts when it has one again.
            age_s: of the observation behind the action.
        """
        action = np.asarray(action, np.float64)
        if self._last and chunk is not None:
            change = np.abs(action - self._last[-1])
            if chunk == self._chunk:
                self._within.add(change)
            else:
                self._at_seams.add(change)
                self._jump = np.maximum(self._jump, change)
        if len(self._last) == 3:
            first, second, third = self._last
            self._jerk.add(np.abs(action - 3 * third + 3 * second - first))
        self._last, self._chunk = [*self._last[-2:], action], self._chunk if chunk is None else chunk
        self._steps += 1
        self._starved += chunk is None
        if not math.isnan(age_s):
            self._reaction.add(age_s)
            self._reaction_max = float(np.fmax(self._reaction_max, age_s))  # which leaves out the NaN before the first

    def begin_episode(self) -> None:
        """The next action does not continue the last one."""
        self._last, self._chunk = [], None

    def read(self) -> Motion:
        """What was measured so far; NaN where there was nothing to measure."""
        return Motion(
            steps=self._steps,
            starved_steps=self._starved,
            seams=self._at_seams.count,
            seam_jump=self._jump,
            seam_change=self._at_seams.read(),
            step_change=self._within.read(),
            jerk=self._jerk.read(),
            reaction_s=float(self._reaction.read()),
            reaction_max_s=self._reaction_max,
        )


class RealTimeBroker:
    """Asks a policy in a thread of its own and hands out one action per step; behind it stands a `ChunkQueue`.

    The first action of an episode waits for the policy, and raises what it raises. Later a policy that fails or is late
    leaves the robot what is left of its chunk, and then `on_starvation`; the policy is asked again until it answers.

    Args:
        policy: returns `actions` [H, A]; used in the worker thread alone.
        execute_steps: steps after an observation until the next one is sent; at most H. The policy is asked later where
            it has not answered yet.
        join: one of `JOINS`.
        expected_delay: actions that are executed until an answer comes, as long as none was timed; afterwards the
            longest of the last ten.
        ensemble_decay: of the weights of `ensemble`; 0 weighs all chunks alike.
        on_starvation: the action for an observation when there is none, given the last one. None holds the last one,
            which is right for positions; for velocities return zeros. It may raise to end the run.

    Attributes:
        state: `waiting` for the first chunk, `running`, or `starved`.
        error: what the policy failed with last; None since it answered.
        delays: in executed actions, of the last answers; without the first answer, and the first after a failure.

    Raises:
        InputError: an unknown `join`, or `execute_steps` below 1.
    """

    def __init__(
        self,
        policy: Policy,
        execute_steps: int,
        join: str = "real_time",
        *,
        expected_delay: int = 1,
        ensemble_decay: float = 0.01,
        on_starvation: OnStarvation | None = None,
    ) -> None:
        if join not in JOINS or execute_steps < 1:
            raise InputError(
                expected=f"a join among {', '.join(JOINS)}, and at least one step to execute",
                found=f"{shown(join)}, {execute_steps}",
                where="RealTimeBroker(execute_steps, join)",
                next="give a number between 1 and the policy's action horizon",
            )
        self._policy, self._execute_steps, self._join = policy, execute_steps, join
        self._expected_delay, self._on_starvation = expected_delay, on_starvation
        self._queue = ChunkQueue(ensemble_decay if join == "ensemble" else None)
        self._meter = MotionMeter()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self.delays: Deque[int] = deque(maxlen=_DELAYS_KEPT)
        self.error: PolicyServerError | None = None
        self._resetting: Future | None = None
        self._actions: np.ndarray | None = None
        self._begin()

    def _begin(self) -> None:
        self._queue.chunks.clear()
        self._asked: tuple[Chunk, Future] | None = None  # the chunk under way, whose actions are to come
        self._step = self._executed = self._failures = 0
        self._ask_after, self._timed = 0.0, False
        self._last_action: np.ndarray | None = None
        self._reads: bool | None = None
        self.state = "waiting"

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._policy.metadata

    @property
    def motion(self) -> Motion:
        """How smooth and prompt it has been, over all episodes."""
        return self._meter.read()

    @property
    def age(self) -> int | None:
        """Control steps since the observation that is being answered, also those that held; None: none is."""
        return None if self._asked is None else self._step - self._asked[0].step

    @property
    def needs_observation(self) -> bool:
        """Whether the next `infer` reads its observation; where it does not, `{}` will do, and no camera is read.

        What it says holds for that call, whatever arrives until then: an answer that comes between the two is executed,
        and the policy is asked again a step later. It raises what `infer` raises.
        """
        if self._reads is None:
            self._take_answer()
            starves = self._on_starvation is not None and self._queue.action(self._executed) is None
            self._reads = self._is_due() or starves
        return self._reads

    def _is_due(self) -> bool:
        newest = self._queue.newest
        due = newest is None or self._step - newest.step >= self._execute_steps
        return due and self._asked is None and time.monotonic() >= self._ask_after

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The action for this step: `actions` [A], and `starved`, whether it is not the policy's.

        Args:
            observation: of this step; `{}` where `needs_observation` is false.

        Raises:
            ActionChunkError: a chunk has fewer steps than `execute_steps`, or its actions another shape than before.
            InputError: the policy cannot go on from a previous chunk, and `join` is `real_time`.
            PolicyServerError: the policy fails for the first observation of an episode.
            AccessDenied, PolicyChanged: the server does not let this client in, or is another robot's. Every other
                failure to connect is a server that is not up yet.
        """
        reads = self.needs_observation
        self._take_answer()
        if reads and self._is_due():
            self._ask(observation)
        if self._last_action is None or self._join == "synchronous":
            self.wait()
        action, newest = self._queue.action(self._executed), self._queue.newest
        starved = action is None or newest is None
        if action is None or newest is None:
            assert self._last_action is not None, "the first action waits for the policy"
            action = self._last_action
            if self._on_starvation is not None:
                action = np.asarray(self._on_starvation(observation, action))
            if self.state != "starved":
                logger.warning("no action in time at step %d: %s", self._step, self.error or "the policy is late")
            self._meter.add(action, None)
        else:
            self._meter.add(action, newest.step, time.monotonic() - newest.observed_at)
        self.state, self._last_action, self._reads = "starved" if starved else "running", action, None
        self._step, self._executed = self._step + 1, self._executed + (not starved)
        return {"actions": action, "starved": starved}

    def wait(self) -> None:
        """Waits for the answer under way, if there is one: for simulators, whose steps are the clock."""
        if self._resetting is not None:
            self._resetting.result()
            self._resetting = None
        if self._asked is not None:
            self._asked[1].exception()  # waits for it; who takes it looks at it
            self._take_answer()

    def reset(self) -> None:
        """A new episode: an answer to the last one is never read."""
        self._begin()
        self._meter.begin_episode()
        self._resetting = self._worker.submit(self._policy.reset)

    def close(self) -> None:
        """Ends the worker; a policy that can be interrupted is."""
        getattr(self._policy, "interrupt", lambda: None)()
        self._worker.shutdown()

    def __enter__(self) -> RealTimeBroker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, observation: Mapping[str, Any]) -> None:
        left, observation = self._queue.left(self._executed), {**observation, STEP: self._step}
        if self._join == "real_time" and len(left):
            delay = min(max(self.delays, default=self._expected_delay), len(left))
            observation = {**observation, PREVIOUS: left, DELAY: delay}
        answer = self._worker.submit(self._policy.infer, observation)
        self._asked = Chunk(np.zeros((0, 0)), self._executed, self._step, time.monotonic()), answer

    def _take_answer(self) -> None:
        if self._asked is None or not self._asked[1].done():
            return
        (chunk, future), self._asked = self._asked, None
        try:
            answer = future.result()
        except PolicyServerError as error:
            if self._last_action is None or isinstance(error, (AccessDenied, PolicyChanged)):
                raise
            logger.warning("the policy failed; it will be asked again\n%s", error)
            self._timed, self.error = False, error
            self._ask_after = time.monotonic() + backoff(self._failures)
            self._failures += 1
            return
        if self._join == "real_time" and not self._policy.metadata.get("real_time"):
            raise InputError(
                expected="a policy that goes on from a previous chunk: `real_time` in the server's metadata",
                found=f"metadata with {shown(sorted(map(str, self._policy.metadata)), 300)}",
                where="RealTimeBroker(join='real_time')",
                next="serve a flow policy (π0, π0.5) with `manipi serve`, or use join='asynchronous' or 'ensemble'",
            )
        self._actions = read_chunk(answer, self._execute_steps, self._actions)
        self._queue.chunks.append(replace(chunk, actions=self._actions))
        if self._timed:
            self.delays.append(self._executed - chunk.first)
        self._timed, self._failures, self.error = True, 0, None
