"""One action per control step from a policy that is asked while the robot moves.

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
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable, Deque, Mapping

import numpy as np

from manipi_client.chunks import Chunk, ChunkQueue, read_chunk
from manipi_client.client import backoff
from manipi_client.errors import AccessDenied, InputError, PolicyChanged, PolicyServerError, shown
from manipi_client.keys import DELAY, PREVIOUS, STEP
from manipi_client.motion import Motion, MotionMeter
from manipi_client.policy import Policy

logger = logging.getLogger(__name__)

JOINS = ("synchronous", "asynchronous", "ensemble", "real_time")

_DELAYS_KEPT = 10

OnStarvation = Callable[[Mapping[str, Any], np.ndarray], np.ndarray]


@dataclass
class _Question:
    step: int
    executed: int
    """Actions of the policy before that step."""
    observed_at: float
    answer: Future


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
        self._queue.clear()
        self._question: _Question | None = None
        self._step = self._executed = self._failures = 0
        self._ask_after, self._timed = 0.0, False
        self._last_action: np.ndarray | None = None
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
        return None if self._question is None else self._step - self._question.step

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The action for this step: `actions` [A], and `starved`, whether it is not the policy's.

        Raises:
            ActionChunkError: a chunk has fewer steps than `execute_steps`, or its actions another shape than before.
            InputError: the policy cannot go on from a previous chunk, and `join` is `real_time`.
            PolicyServerError: the policy fails for the first observation of an episode.
            AccessDenied, PolicyChanged: the server does not let this client in, or is another robot's. Every other
                failure to connect is a server that is not up yet.
        """
        self._take_answer()
        if self._should_ask():
            self._ask(observation)
        if self._last_action is None or self._join == "synchronous":
            self.wait()
        action = self._queue.action(self._executed)
        starved = action is None
        if action is None:
            action = self._starve(observation)
        self._hand_out(action, starved=starved)
        return {"actions": action, "starved": starved}

    def wait(self) -> None:
        """Waits for the answer under way, if there is one: for simulators, whose steps are the clock."""
        if self._resetting is not None:
            self._resetting.result()
            self._resetting = None
        if self._question is not None:
            self._question.answer.exception()  # waits for it; who takes it looks at it
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

    # ---- asking

    def _should_ask(self) -> bool:
        if self._question is not None or time.monotonic() < self._ask_after:
            return False
        newest = self._queue.newest
        return newest is None or self._step - newest.step >= self._execute_steps

    def _ask(self, observation: Mapping[str, Any]) -> None:
        left, observation = self._queue.left(self._executed), {**observation, STEP: self._step}
        if self._join == "real_time" and len(left):
            delay = min(max(self.delays, default=self._expected_delay), len(left))
            observation = {**observation, PREVIOUS: left, DELAY: delay}
        answer = self._worker.submit(self._policy.infer, observation)
        self._question = _Question(self._step, self._executed, time.monotonic(), answer)

    def _take_answer(self) -> None:
        question = self._question
        if question is None or not question.answer.done():
            return
        self._question = None
        try:
            answer = question.answer.result()
        except PolicyServerError as error:
            self._fail(error)
            return
        self._check_real_time()
        self._actions = read_chunk(answer, self._execute_steps, self._actions)
        self._queue.add(Chunk(self._actions, question.executed, question.step, question.observed_at))
        if self._timed:
            self.delays.append(self._executed - question.executed)
        self._timed, self._failures, self.error = True, 0, None

    def _fail(self, error: PolicyServerError) -> None:
        if self._last_action is None or isinstance(error, (AccessDenied, PolicyChanged)):
            raise error
        logger.warning("the policy failed; it will be asked again\n%s", error)
        self._timed, self.error = False, error
        self._ask_after = time.monotonic() + backoff(self._failures)
        self._failures += 1

    def _check_real_time(self) -> None:
        if self._join == "real_time" and not self._policy.metadata.get("real_time"):
            raise InputError(
                expected="a policy that goes on from a previous chunk: `real_time` in the server's metadata",
                found=f"metadata with {shown(sorted(map(str, self._policy.metadata)), 300)}",
                where="RealTimeBroker(join='real_time')",
                next="serve a flow policy (π0, π0.5) with `manipi serve`, or use join='asynchronous' or 'ensemble'",
            )

    # ---- acting

    def _starve(self, observation: Mapping[str, Any]) -> np.ndarray:
        assert self._last_action is not None, "the first action waits for the policy"
        if self._on_starvation is None:
            return self._last_action
        return np.asarray(self._on_starvation(observation, self._last_action))

    def _hand_out(self, action: np.ndarray, *, starved: bool) -> None:
        state = "starved" if starved else "running"
        if starved and self.state != "starved":
            logger.warning("no action in time at step %d: %s", self._step, self.error or "the policy is late")
        self.state, self._last_action = state, action
        newest = self._queue.newest
        if starved or newest is None:
            self._meter.add(action, None)
        else:
            self._meter.add(action, newest.step, time.monotonic() - newest.observed_at)
        self._step, self._executed = self._step + 1, self._executed + (not starved)
