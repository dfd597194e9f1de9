"""Runs a robot, or a simulator, with an agent: episode after episode, at a fixed rate.

environment ──observation──▶ agent ──action──▶ environment
                    └────────┬─────────┘
                        subscribers
"""

from __future__ import annotations

import abc
import logging
import threading
import time
from typing import Any, Mapping, Sequence

from manipi_client.broker import Policy

logger = logging.getLogger(__name__)


class Environment(abc.ABC):
    """The robot and what is around it."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Go to the start of an episode. Called before every episode, and once after the last."""

    @abc.abstractmethod
    def is_episode_complete(self) -> bool:
        """Whether the episode is over, well or badly. Called after every step."""

    @abc.abstractmethod
    def get_observation(self) -> dict[str, Any]:
        """What the robot sees and feels now."""

    @abc.abstractmethod
    def apply_action(self, action: dict[str, Any]) -> None:
        """Move."""


class Agent(abc.ABC):
    """Decides what to do."""

    @abc.abstractmethod
    def get_action(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The action for an observation."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forget the episode so far."""


class PolicyAgent(Agent):
    """An agent that does what a policy says. The policy returns one action: put a broker around one that plans."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def get_action(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        return self._policy.infer(observation)

    def reset(self) -> None:
        self._policy.reset()


class Subscriber(abc.ABC):
    """Watches the episodes: writes videos, logs, plots."""

    @abc.abstractmethod
    def on_episode_start(self) -> None:
        """After the environment and the agent were reset."""

    @abc.abstractmethod
    def on_step(self, observation: dict[str, Any], action: dict[str, Any]) -> None:
        """After the action was applied."""

    @abc.abstractmethod
    def on_episode_end(self) -> None:
        """After the last step."""


class Runtime:
    """Runs `num_episodes` episodes.

    Args:
        environment: where the actions go.
        agent: where they come from.
        subscribers: who is told about every step.
        max_hz: steps per second at most; 0 runs as fast as possible.
        num_episodes: episodes that `run` runs.
        max_episode_steps: an episode never has more steps than this (openpi's runtime takes one more); 0: no limit.
    """

    def __init__(
        self,
        environment: Environment,
        agent: Agent,
        subscribers: Sequence[Subscriber] = (),
        max_hz: float = 0,
        num_episodes: int = 1,
        max_episode_steps: int = 0,
    ) -> None:
        self._environment, self._agent, self._subscribers = environment, agent, list(subscribers)
        self._step_seconds = 1 / max_hz if max_hz > 0 else 0.0
        self._num_episodes, self._max_episode_steps = num_episodes, max_episode_steps
        self._episode_complete = threading.Event()

    def run(self) -> None:
        """Runs all episodes in this thread, then resets the environment, which brings a robot home."""
        for _ in range(self._num_episodes):
            self._run_episode()
        self._environment.reset()

    def run_in_new_thread(self) -> threading.Thread:
        """Runs all episodes in a thread of their own, and returns the started thread."""
        thread = threading.Thread(target=self.run, name="runtime")
        thread.start()
        return thread

    def mark_episode_complete(self) -> None:
        """Ends the current episode after its current step. May be called from any thread."""
        self._episode_complete.set()

    def _run_episode(self) -> None:
        self._episode_complete.clear()
        self._environment.reset()
        self._agent.reset()
        for subscriber in self._subscribers:
            subscriber.on_episode_start()

        num_steps = 0
        next_step_time = time.monotonic()
        while not self._episode_complete.is_set():
            observation = self._environment.get_observation()
            action = self._agent.get_action(observation)
            self._environment.apply_action(action)
            for subscriber in self._subscribers:
                subscriber.on_step(observation, action)
            num_steps += 1
            if num_steps == self._max_episode_steps or self._environment.is_episode_complete():
                self.mark_episode_complete()
            # A late step moves the schedule: a robot must not hurry to catch up.
            next_step_time = max(next_step_time + self._step_seconds, time.monotonic())
            time.sleep(max(0.0, next_step_time - time.monotonic()))

        logger.info("episode complete after %d steps", num_steps)
        for subscriber in self._subscribers:
            subscriber.on_episode_end()
