"""A trial is a function of its numbers: lock-step, noise, controls, and what a simulator may get wrong."""

import subprocess
import sys

import numpy as np
import pytest
from tests.evaluate.simulator import Line
from tests.evaluate.simulator import __file__ as simulator_file

from manipi_client import RealTimeBroker
from manipi_client.errors import InputError
from manipi_client.lockstep import LockStep, derive
from manipi_client.realtime import JOINS
from manipi_client.trials import TrialSpec, film, load_factory, run_trial, try_task

SPEC = TrialSpec(index=3, scene=17, task="right", noise=5, execute_steps=2)


class Waves:
    """Chunks [4, 2] that differ from question to question; remembers the questions."""

    metadata = {"real_time": True}  # noqa: RUF012

    def __init__(self, **extra):
        self.questions, self._extra = [], extra

    def infer(self, observation):
        self.questions.append(dict(observation))
        first = np.cos(len(self.questions) + np.arange(4))
        return {"actions": np.stack([0.15 + 0.05 * first, first], 1).astype(np.float32), **self._extra}

    def reset(self): ...

    interrupt = reset


def real_time(policy, execute_steps, join, delay, steps):
    """The same by `RealTimeBroker`, whose answers are held back as long as `delay` says."""
    import threading

    gate = threading.Event()

    class Held(Waves):
        def infer(self, observation):
            answer = policy.infer(observation)
            gate.wait()
            return answer

    actions = []
    with RealTimeBroker(Held(), execute_steps, join, expected_delay=delay) as broker:
        for step in range(steps):
            if broker.age is not None and broker.age >= delay:
                gate.set()
                broker.wait()
            (gate.set if join == "synchronous" or not step else gate.clear)()
            actions.append(broker.infer({"state": np.array([step])})["actions"])
        gate.set()
        return np.array(actions), broker.motion


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize(("execute_steps", "delay"), [(2, 1), (2, 2), (1, 3), (3, 1), (2, 4)])
def test_lock_step_is_the_real_time_broker_on_the_clock_of_steps(join, execute_steps, delay):
    slow, quick = Waves(), Waves()
    expected, motion = real_time(slow, execute_steps, join, delay, 20)
    broker = LockStep(quick, execute_steps, join, delay=delay)
    actions = [broker.infer({"state": np.array([step])} if broker.needs_observation else None) for step in range(20)]
    np.testing.assert_array_equal(actions, expected)
    assert len(quick.questions) == len(slow.questions)
    for one, other in zip(quick.questions, slow.questions):
        one.pop("manipi/seed")
        np.testing.assert_equal(one, other)
    assert (broker.starved, broker.motion.seams) == (motion.starved_steps, motion.seams)
    np.testing.assert_array_equal(broker.motion.seam_jump, motion.seam_jump)


def test_the_noise_of_an_answer_is_a_function_of_trial_and_answer():
    one, other = Waves(), Waves()
    run_trial(Line(), one, SPEC)
    run_trial(Line(), other, SPEC)
    seeds = [question["manipi/seed"] for question in one.questions]
    assert (
        seeds == [question["manipi/seed"] for question in other.questions] == [derive(5, n) for n in range(len(seeds))]
    )
    assert len(set(seeds)) == len(seeds) > 1


def test_only_questions_are_rendered(monkeypatch):
    simulator, policy, rendered = Line(), Waves(), []
    observe = simulator.observe
    monkeypatch.setattr(simulator, "observe", lambda: rendered.append(1) or observe())
    result = run_trial(simulator, policy, SPEC)
    assert len(rendered) == len(policy.questions) == result.answers < result.steps


def test_what_a_trial_tells():
    result = run_trial(Line(), Waves(batch=2), SPEC)
    assert (result.index, result.scene, result.prompt) == (3, 17, "go right")
    assert (result.success, result.failure) == (True, None)
    assert result.batched == result.answers
    assert result.path_m == pytest.approx(result.actions[:, 0].sum(), rel=1e-5)
    assert result.seconds == result.steps / 10
    late = run_trial(Line(), Waves(), TrialSpec(**{**vars(SPEC), "delay": 2}))
    assert late.seconds == pytest.approx((late.steps + 2 * late.answers) / 10)  # the robot stands still meanwhile
    assert result.to_json()["motion"]["reaction_s"] is None


def test_controls():
    def run(control, **fields):
        policy = Waves()
        return run_trial(Line(), policy, TrialSpec(**{**vars(SPEC), "control": control, **fields})), policy

    (plain, asked), (blind, unseeing) = run(None), run("blind")
    assert asked.questions[0]["image"].any()
    assert not any(question["image"].any() for question in unseeing.questions)
    np.testing.assert_array_equal(blind.actions, plain.actions)
    wrong, told = run("wrong_words")
    assert {question["prompt"] for question in told.questions} == {"go away"}
    assert wrong.prompt == "go away"
    held, once = run("held")
    assert len(once.questions) == 1
    assert (held.actions == held.actions[0]).all()
    replay, never = run("replay", replayed_scene=18)
    assert not never.questions
    expert = Line()
    expert.reset(18, "right")
    np.testing.assert_array_equal(replay.actions[0], expert.expert())


def test_options_of_the_policy_travel_with_every_question():
    policy = Waves()
    run_trial(Line(), policy, TrialSpec(**{**vars(SPEC), "num_steps": 3, "temperature": 0.5}))
    assert {(q["manipi/num_steps"], q["manipi/temperature"]) for q in policy.questions} == {(3, 0.5)}


def test_a_film_shows_the_motion_of_the_trial():
    result = run_trial(Line(), Waves(), SPEC)
    frames = film(Line(), SPEC, result.actions)
    assert len(frames) == result.steps + 1
    assert frames[0, 0, 0, 0] < frames[-1, 0, 0, 0]


@pytest.mark.parametrize(
    ("simulator", "changes", "message"),
    [
        (Line(black=True), {}, "all alike"),
        (Line(expert=False), {"control": "replay", "replayed_scene": 1}, "`expert`"),
        (Line(), {"join": "magic"}, "a join among"),
    ],
)
def test_what_cannot_be_tried(simulator, changes, message):
    with pytest.raises(InputError, match=message):
        run_trial(simulator, Waves(), TrialSpec(**{**vars(SPEC), **changes}))


class Drifting(Line):
    """A reset forgets nothing: the point goes on from where it was."""

    def reset(self, seed, task):
        before = getattr(self, "_x", None)
        observation = super().reset(seed, task)
        if before is not None:
            self._x = before
        return observation if before is None else self.observe()


class Slipping(Line):
    """Its first observation is a function of the scene, and its steps are not."""

    steps_ever = 0

    def step(self, action):
        self.steps_ever += 1
        super().step(action)
        self._x += 1e-6 * self.steps_ever


class Alike(Line):
    def reset(self, seed, task):
        return super().reset(0, task)


def test_a_simulator_is_tried_without_a_policy():
    said = try_task(Line(), "right")
    assert said.startswith("right: 'go right'; image [4, 4, 3], state [1]; command [2], 10 Hz, 12 steps; here ")
    assert said.endswith("expert: success after 5")
    simulator = Line(expert=False)
    simulator.still = np.zeros(2)
    assert "command [2]" in try_task(simulator, "right")


@pytest.mark.parametrize(
    ("simulator", "message"),
    [
        (Drifting(), "as it was at its start"),
        (Slipping(), r"as it was after the same \d+ commands.*\n.*state by up to"),
        (Alike(), "scenes that differ"),
        (Line(black=True), "all alike"),
        (Line(expert=False), "with `still`"),
    ],
)
def test_what_trials_could_not_rely_on(simulator, message):
    with pytest.raises(InputError, match=message):
        try_task(simulator, "right")


def test_the_command_that_tries():
    def run(*arguments):
        command = [sys.executable, "-m", "manipi_client.trials", f"{simulator_file}:Line", *arguments]
        return subprocess.run(command, capture_output=True, timeout=60)

    done = run("--try", "right", "far")
    assert [line.split(b":")[0] for line in done.stdout.splitlines()] == [b"right", b"far"]
    done = run("--options", '{"black": true}', "--try", "right")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"InputError\nexpected a picture" in done.stderr


@pytest.mark.parametrize("name", ["nothing.py:Line", "manipi_client.trials:Nothing", "no_such_module:Line", "what"])
def test_a_simulator_that_is_not_there(name):
    with pytest.raises(InputError, match="make sim-NAME"):
        load_factory(name)


def test_a_simulator_that_cannot_draw(tmp_path):
    (tmp_path / "dark.py").write_text("None.glGetError")  # what PyOpenGL says without its library
    with pytest.raises(InputError, match="apt-get install libosmesa6"):
        load_factory(f"{tmp_path}/dark.py:Dark")
