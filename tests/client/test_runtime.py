import threading
import time

import pytest

from manipi_client import Environment, PolicyAgent, Runtime, Subscriber


class CountingEnvironment(Environment):
    """Counts its steps; an episode is complete after `length`."""

    def __init__(self, log, length=10**9):
        self.log, self.length, self.steps = log, length, 0

    def reset(self):
        self.log.append("reset")
        self.steps = 0

    def is_episode_complete(self):
        return self.steps >= self.length

    def get_observation(self):
        return {"step": self.steps}

    def apply_action(self, action):
        self.log.append(f"apply {action['move']}")
        self.steps += 1


class Recorder(Subscriber):
    def __init__(self, log):
        self.log = log

    def on_episode_start(self):
        self.log.append("start")

    def on_step(self, observation, action):
        self.log.append(f"saw {observation['step']}")

    def on_episode_end(self):
        self.log.append("end")


class Echo:
    """A policy that moves by the number of the step."""

    def __init__(self, log):
        self.log, self.metadata = log, {}

    def infer(self, observation):
        return {"move": observation["step"]}

    def reset(self):
        self.log.append("agent reset")


def make(length=10**9, **options):
    log = []
    environment = CountingEnvironment(log, length)
    return Runtime(environment, PolicyAgent(Echo(log)), [Recorder(log)], **options), environment, log


def test_the_order_of_everything_in_two_episodes():
    runtime, _, log = make(length=2, num_episodes=2)
    runtime.run()
    episode = ["reset", "agent reset", "start", "apply 0", "saw 0", "apply 1", "saw 1", "end"]
    assert log == [*episode, *episode, "reset"]


@pytest.mark.parametrize("limit", [1, 5])
def test_an_episode_has_exactly_the_steps_of_its_limit(limit):
    runtime, _, log = make(max_episode_steps=limit)
    runtime.run()
    assert sum(entry.startswith("apply") for entry in log) == limit


def test_the_environment_ends_an_episode_before_its_limit():
    runtime, _, log = make(length=3, max_episode_steps=5)
    runtime.run()
    assert sum(entry.startswith("apply") for entry in log) == 3


def test_keeps_the_rate():
    runtime, _, _ = make(max_hz=100, max_episode_steps=20)
    started = time.monotonic()
    runtime.run()
    assert 0.2 <= time.monotonic() - started < 0.6


def test_a_slow_step_is_not_caught_up():
    times = []

    class SlowOnce(CountingEnvironment):
        def apply_action(self, action):
            times.append(time.monotonic())
            if self.steps == 1:
                time.sleep(0.1)
            super().apply_action(action)

    Runtime(SlowOnce([]), PolicyAgent(Echo([])), max_hz=50, max_episode_steps=6).run()
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    assert all(gap > 0.01 for gap in gaps)


def test_runs_in_a_thread_until_marked_complete():
    runtime, environment, log = make(max_hz=200)
    thread = runtime.run_in_new_thread()
    assert thread is not threading.current_thread()
    while environment.steps < 3:
        time.sleep(0.005)
    runtime.mark_episode_complete()
    thread.join(5)
    assert not thread.is_alive()
    assert log[-2:] == ["end", "reset"]
