"""Does a policy keep its success rate when the arm does not wait for it? Every way to join chunks, on the same scenes.

    step of the arm   0    1    2    3    4    5    6    7        delay = 2: the answer to the observation of step n
    asked             ●─────── A          ●─────── C              is there at step n + 2, however fast this computer is
    executed                   a2   a3   a4   a5   c2   c3        (real-time chunking, execute_steps = 4)

Synchronous execution waits instead: the arm stands still for `delay` steps per chunk, which cost time but no scene.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from manipi.errors import ConfigError
from manipi.evaluate.rollout import start_scene
from manipi.evaluate.statistics import SuccessRate, success_rate
from manipi.robots.tabletop import TABLETOP
from manipi_client import Motion, RealTimeBroker
from manipi_client.policy import Policy
from manipi_client.realtime import JOINS


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """One way to join chunks, over all scenes."""

    join: str
    success: SuccessRate
    motion: Motion
    seconds: float
    """What an episode takes on the arm's own clock, standing still included; the mean."""


def compare(policy: Policy, seeds: Sequence[int], *, execute_steps: int, delay: int) -> list[ClosedLoop]:
    """Every join that the policy knows, on the same scenes of the tabletop environment.

    Args:
        policy: of `manipi serve`, whose metadata say for which robot, and how large its pictures are.
        delay: executed steps between an observation and its answer.

    Raises:
        ConfigError: the policy is another robot's, or would have no action left before each answer.
    """
    metadata = policy.metadata
    robot, horizon = metadata["robot"]["name"], metadata["action_horizon"]
    if robot != TABLETOP.name:
        raise _cannot("a policy for the robot 'tabletop', whose environment is in the package", f"one for {robot!r}")
    if min(execute_steps, delay) < 1 or execute_steps + delay > horizon:
        raise _cannot(
            f"steps to execute and a delay, each from 1 and within {horizon} together", f"{execute_steps} and {delay}"
        )
    joins = [join for join in JOINS if join != "real_time" or metadata["real_time"]]
    return [_drive(policy, seeds, execute_steps=execute_steps, delay=delay, join=join) for join in joins]


def _cannot(expected: str, found: str) -> ConfigError:
    next = "manipi eval CHECKPOINT --scenes 100 --execute-steps 4 --delay 2"
    return ConfigError(expected=expected, found=found, where="the closed loop", next=next)


def _drive(policy: Policy, seeds: Sequence[int], *, execute_steps: int, delay: int, join: str) -> ClosedLoop:
    waits, held = join == "synchronous", _Held(policy)
    successes = steps = chunks = 0
    with RealTimeBroker(held, execute_steps, join, expected_delay=delay) as broker:
        for seed in tqdm(seeds, desc=join, unit="episode"):
            env, observation = start_scene(seed, image_size=policy.metadata["image_size"])
            broker.reset()
            done, info = False, {}
            while not done:
                if broker.age is not None and broker.age >= delay:
                    held.gate.set()
                    broker.wait()
                (held.gate.set if waits or not env.steps else held.gate.clear)()
                action = broker.infer(observation)["actions"]
                observation, _, terminated, truncated, info = env.step(np.asarray(action, np.float32))
                done = terminated or truncated
            held.gate.set()  # what is under way is nobody's, and must not keep the next episode waiting
            successes, steps = successes + info["success"], steps + env.steps
            chunks += math.ceil(env.steps / execute_steps) if waits else 1
    seconds = (steps + delay * chunks) / TABLETOP.control_hz / len(seeds)
    return ClosedLoop(join=join, success=success_rate(successes, len(seeds)), motion=broker.motion, seconds=seconds)


class _Held:
    """A policy whose answers leave only while `gate` is set."""

    def __init__(self, policy: Policy):
        self._policy, self.gate = policy, threading.Event()
        self.metadata, self.reset, self.interrupt = policy.metadata, policy.reset, self.gate.set

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._policy.infer(observation)
        self.gate.wait()
        return answer
