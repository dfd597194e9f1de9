"""A policy asked on the clock of control steps, for simulators; the seed of every answer is a function of numbers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from manipi_client.broker import Chunk, ChunkQueue, Memory, Policy, read_chunk
from manipi_client.errors import InputError, shown
from manipi_client.keys import DELAY, PREVIOUS, SEED, STEP, SUBTASK, WRITE_SUBTASK
from manipi_client.realtime import JOINS, Motion, MotionMeter


def derive(*numbers: object) -> int:
    """A seed below 2^31 from texts and numbers: the first bits of their SHA-256, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class LockStep:
    """Asks a policy as `RealTimeBroker` does, on the clock of control steps and in the caller's thread.

        step of the robot   0    1    2    3    4    5    6    7    delay = 2: the answer to the observation of step n
        asked               ●─────── A          ●─────── C          is there at step n + 2
        executed                      a2   a3   a4   a5   c2   c3   execute_steps = 4

    The first answer of an episode is there at once, and so is every one of `synchronous`: the robot stands still for
    it, which `waited` counts.

    Args:
        noise: what the seed of each answer is derived from.
        extra: keys for every observation, such as `manipi/num_steps`.
        subtask_every: the policy writes a subtask at every so many answers, and acts on the last one; 0: none.

    Raises:
        InputError: an unknown join, or numbers that leave the robot without an action before each answer.
    """

    def __init__(
        self,
        policy: Policy,
        execute_steps: int,
        join: str = "synchronous",
        *,
        delay: int = 0,
        noise: int = 0,
        extra: Optional[Mapping[str, Any]] = None,
        subtask_every: int = 0,
    ) -> None:
        if join not in JOINS or execute_steps < 1 or delay < 0:
            raise InputError(
                expected=f"a join among {', '.join(JOINS)}, a step to execute or more, and a delay from 0",
                found=f"{shown(join)}, {execute_steps}, {delay}",
                where="LockStep(execute_steps, join, delay)",
                next="give numbers between 1 and the policy's action horizon",
            )
        self._policy, self._execute_steps, self._join, self._delay = policy, execute_steps, join, delay
        self._noise, self._extra, self._subtask_every = noise, dict(extra or {}), subtask_every
        self.subtasks: List[str] = []
        """Those that the policy acted on, one after the other."""
        self._queue = ChunkQueue(0.01 if join == "ensemble" else None)
        self._meter = MotionMeter()
        self._step = self._executed = self.starved = 0
        self._asked: Optional[Tuple[int, Chunk]] = None
        """When the answer is there, and the answer."""
        self._last_action: Optional[np.ndarray] = None
        self._actions: Optional[np.ndarray] = None
        self._memory: Optional[Memory] = None
        self.infer_ms: List[float] = []
        self.batched = self.drawn = 0

    @property
    def answers(self) -> int:
        return len(self.infer_ms)

    @property
    def waited(self) -> int:
        """Control steps for which the robot stood still."""
        return self._delay * (self.answers if self._join == "synchronous" else min(self.answers, 1))

    @property
    def motion(self) -> Motion:
        return self._meter.read()

    @property
    def needs_observation(self) -> bool:
        """Whether `infer` reads the observation of this step: no other one needs to be rendered."""
        return self._asks or self._remembers.wants(self._step)

    @property
    def _remembers(self) -> Memory:
        if self._memory is None:
            # Answers that take longer than the steps between them shift the questions.
            period = None if self._delay > self._execute_steps else self._execute_steps
            self._memory = Memory(self._policy.metadata.get("past_steps", ()), period)
        return self._memory

    @property
    def _asks(self) -> bool:
        self._take_answer()
        newest = self._queue.newest
        return self._asked is None and (newest is None or self._step - newest.step >= self._execute_steps)

    def infer(self, observation: Optional[Mapping[str, Any]]) -> np.ndarray:
        """The command [A] of this step; the observation is read where `needs_observation` says so.

        Raises:
            ActionChunkError, PolicyServerError: what the policy answers cannot be used, or is an error.
        """
        past: Dict[str, Any] = {}
        if self.needs_observation:
            assert observation is not None, "needs_observation said so"
            past = self._remembers.add(self._step, observation)
        if self._asks:
            assert observation is not None, "needs_observation said so"
            self._ask({**observation, **past})
            if self._join == "synchronous" or self._last_action is None:
                self._take_answer(now=True)
        action, newest = self._queue.action(self._executed), self._queue.newest
        if action is None or newest is None:
            assert self._last_action is not None, "the first answer is there at once"
            action = self._last_action
            self.starved += 1
            self._meter.add(action, None)
        else:
            self._executed += 1
            self._meter.add(action, newest.step)
        self._step, self._last_action = self._step + 1, action
        return action

    def _ask(self, observation: Mapping[str, Any]) -> None:
        question = {**observation, **self._extra, STEP: self._step, SEED: derive(self._noise, self.answers)}
        if self._subtask_every:
            question.update({SUBTASK: self.subtasks[-1]} if self.subtasks else {})
            question[WRITE_SUBTASK] = self.answers % self._subtask_every == 0
        left = self._queue.left(self._executed)
        if self._join == "real_time" and len(left):
            question.update({PREVIOUS: left, DELAY: min(self._delay, len(left))})
        began = time.perf_counter()
        answer = self._policy.infer(question)
        self.infer_ms.append((time.perf_counter() - began) * 1e3)
        self.batched += answer.get("batch", 1) > 1
        subtask = str(answer.get("subtask", ""))
        self.subtasks += [subtask] if subtask and subtask not in self.subtasks[-1:] else []
        self.drawn += int(answer.get("candidates", {}).get("n", 1))
        self._actions = read_chunk(answer, self._execute_steps, self._actions)
        chunk = Chunk(self._actions, self._executed, self._step, 0.0)
        self._asked = self._step + self._delay, chunk

    def _take_answer(self, now: bool = False) -> None:
        if self._asked is not None and (now or self._step >= self._asked[0]):
            self._queue.chunks.append(self._asked[1])
            self._asked = None
