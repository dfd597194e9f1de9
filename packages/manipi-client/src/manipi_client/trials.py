"""Trials of a policy in a simulator, each a pure function of its numbers; and the worker process that runs them.

    manipi eval                         worker: a simulator's own Python        policy server
      │ {"trial": {index, scene, …}} ──▶ │  reset(scene, task)                    │
      │                                  │  observation, manipi/seed ───────────▶ │
      │                                  │  ◀──────────────────── action chunk ── │
      │ ◀── {"result": {success, …}} ─── │  step, step, step …                    │

A trial runs in lock-step: an answer is there `delay` control steps after its observation, however fast the computer
is, and the noise of answer n comes from the trial's number and n alone. So neither order, nor worker, nor speed changes
what happens, and two policies can be compared on the same scenes with the same noise.

    python -m manipi_client.trials FILE.py:FACTORY --url ws://HOST:PORT [--options JSON] [--threads N]

reads requests from standard input and writes events to standard output, a line of JSON each. Without a server,

    python -m manipi_client.trials FILE.py:FACTORY --try TASK…

looks whether a simulator does what trials rely on. Shape letter: A action dimensions.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Protocol, Tuple

import numpy as np

from manipi_client.broker import Policy
from manipi_client.client import WebsocketPolicy
from manipi_client.errors import InputError, ManipiClientError, PolicyServerError, shown
from manipi_client.keys import CANDIDATES, EXECUTE_STEPS, GATE, MODE, NUM_STEPS, SELECTOR, TEMPERATURE
from manipi_client.lockstep import LockStep
from manipi_client.realtime import Motion

CONTROLS = ("untrained", "blind", "wrong_words", "held", "replay")
"""What a trial is compared with. The first is a matter of the server, which then has a policy before its training."""

HELD_STEPS = 5
"""How long a disturbance of a demonstration lasts. One of a single step would average out."""

HEARTBEAT_S = 1.0
"""A worker says at least as often that it still makes steps."""


class Simulator(Protocol):
    """What a trial asks of a simulated robot. It may also have, each noticed where it is there:

    failure          str or None: why the episode is over without success
    wrong_prompt     str: an instruction that names another object or task
    collisions       int: contacts since the reset that should not be
    position         [3] metres: where the tool is, for the length of its path
    subtask          str or None: what is to be done at present, where the instruction has several steps
    expert()         the command [A] of a scripted demonstrator for the present moment
    still            [A]: a command that moves nothing, for `--try` of a simulator without an expert
    picture()        uint8 [h, w, 3] for people
    description      dict of what the result should say: how it renders, which versions
    close()          at the end
    """

    control_hz: float
    max_steps: int
    prompt: str
    """The instruction of the episode."""
    success: bool

    def reset(self, seed: int, task: str) -> Mapping[str, Any]:
        """Begins the episode of a scene, which is a function of both alone; its first observation, in the robot's keys,
        `prompt` included."""
        ...

    def step(self, action: np.ndarray) -> None:
        """Moves for one control step with a command [A]."""
        ...

    def observe(self) -> Mapping[str, Any]:
        """The observation of the present moment. It is asked for where a policy is asked, so rendering belongs here."""
        ...


@dataclass(frozen=True)
class TrialSpec:
    """Everything that decides a trial, but for policy and simulator."""

    index: int
    scene: int
    """What the simulator draws its scene from."""
    task: str
    noise: int
    """What the seeds of the policy's noise are derived from."""
    execute_steps: int
    join: str = "synchronous"
    delay: int = 0
    """Control steps from an observation to its answer."""
    control: Optional[str] = None
    """One of `CONTROLS`; None: the policy as it is."""
    replayed_scene: Optional[int] = None
    """Of the expert's episode whose commands `replay` repeats here."""
    num_steps: Optional[int] = None
    """Integration steps of the policy; None: its own."""
    temperature: Optional[float] = None
    """Of a policy that writes tokens; None: it takes the likeliest."""
    mode: Optional[str] = None
    """`flow` or `tokens`, of a policy that has both; None: its own."""
    subtask_every: int = 0
    """Answers from one subtask that the policy writes to the next; 0: none."""
    candidates: Optional[int] = None
    """Chunks that the policy draws for each answer, of which one is chosen; None: the server's own number."""
    selector: Optional[str] = None
    """What chooses."""
    gate: Optional[float] = None
    """How uncertain the first of them has to be for the others to be drawn."""

    @property
    def lock_step(self) -> Dict[str, Any]:
        """Arguments of `LockStep`."""
        extra: Dict[str, Any] = {NUM_STEPS: self.num_steps, TEMPERATURE: self.temperature, MODE: self.mode}
        extra.update({CANDIDATES: self.candidates, SELECTOR: self.selector, GATE: self.gate})
        if self.candidates is not None:
            extra[EXECUTE_STEPS] = self.execute_steps
        extra = {key: value for key, value in extra.items() if value is not None}
        return {"delay": self.delay, "noise": self.noise, "extra": extra, "subtask_every": self.subtask_every}


@dataclass(frozen=True)
class TrialResult:
    """What came of it."""

    index: int
    scene: int
    task: str
    prompt: str
    success: bool
    failure: Optional[str]
    steps: int
    seconds: float
    """On the robot's clock, standing still while it waits included."""
    answers: int
    """How often the policy was asked."""
    batched: int
    """How many of the answers were computed together with those of other trials, which rounds differently."""
    starved: int
    """Steps without an action in time."""
    collisions: Optional[int]
    path_m: Optional[float]
    infer_ms: Tuple[float, ...]
    """Round trips, of which nothing else here depends."""
    motion: Motion
    actions: np.ndarray
    """Every command that was executed, float32 [T, A]: on the same scene they give the same motion again."""
    subtasks: Tuple[str, ...] = ()
    """What the policy wrote that it does, one after the other."""
    drawn: int = 0
    """Chunks that all answers were chosen from."""

    def to_json(self) -> Dict[str, Any]:
        """Plain values; what is not finite is null."""
        return _plain(asdict(self))


def run_trial(
    simulator: Simulator, policy: Policy, spec: TrialSpec, on_step: Callable[[int], None] = lambda step: None
) -> TrialResult:
    """One episode, until success, failure or the simulator's last step.

    Args:
        on_step: is told the number of every step.

    Raises:
        InputError: the simulator lacks what the control needs, renders black, or moves to no number.
        ActionChunkError, PolicyServerError: the policy's.
    """
    replayed = _expert_actions(simulator, spec, on_step) if spec.control == "replay" else []
    observation: Optional[Mapping[str, Any]] = simulator.reset(spec.scene, spec.task)
    _require_pictures(observation, simulator)
    prompt = _needed(simulator, "wrong_prompt", spec.control) if spec.control == "wrong_words" else simulator.prompt
    broker = LockStep(policy, spec.execute_steps, spec.join, **spec.lock_step)
    actions: List[np.ndarray] = []
    places = [getattr(simulator, "position", None)]
    while not simulator.success and getattr(simulator, "failure", None) is None and len(actions) < simulator.max_steps:
        if spec.control == "replay":
            action = replayed[min(len(actions), len(replayed) - 1)]
        elif spec.control == "held" and actions:
            action = actions[0]
        else:
            if broker.needs_observation:
                observation = simulator.observe() if observation is None else observation
                observation = {**observation, "prompt": prompt}
                if spec.control == "blind":
                    observation = _blinded(observation)
            action = np.asarray(broker.infer(observation), np.float32)
        if not np.isfinite(action).all():
            raise InputError(
                expected="a command of finite numbers",
                found=shown(action.tolist()),
                where=f"step {len(actions)} of scene {spec.scene}, from the {spec.control or 'policy'}",
                next="check the policy's outputs: manipi eval CHECKPOINT, without --suite",
            )
        simulator.step(action)
        observation = None
        actions.append(action)
        places.append(getattr(simulator, "position", None))
        on_step(len(actions))
    path = None
    if places[0] is not None:
        path = float(np.linalg.norm(np.diff(np.array(places, float), axis=0), axis=-1).sum())
    return TrialResult(
        index=spec.index,
        scene=spec.scene,
        task=spec.task,
        prompt=prompt,
        success=bool(simulator.success),
        failure=None if simulator.success else getattr(simulator, "failure", None) or "max_steps",
        steps=len(actions),
        seconds=(len(actions) + broker.waited) / simulator.control_hz,
        answers=broker.answers,
        batched=broker.batched,
        starved=broker.starved,
        collisions=getattr(simulator, "collisions", None),
        path_m=path,
        infer_ms=tuple(broker.infer_ms),
        motion=broker.motion,
        subtasks=tuple(broker.subtasks),
        actions=np.array(actions, np.float32),
        drawn=broker.drawn,
    )


def film(simulator: Simulator, spec: TrialSpec, actions: np.ndarray) -> np.ndarray:
    """The commands of a trial on its scene, which give the same motion again: uint8 [T + 1, h, w, 3]."""
    picture = _needed(simulator, "picture", "a film")
    simulator.reset(spec.scene, spec.task)
    frames = [picture()]
    for action in actions:
        simulator.step(np.asarray(action, np.float32))
        frames.append(picture())
    return np.stack(frames)


def demonstrate(
    simulator: Simulator,
    scene: int,
    task: str,
    *,
    noise: float = 0.0,
    on_step: Callable[[int], None] = lambda step: None,
) -> Dict[str, Any]:
    """An episode of the expert, whose commands are disturbed before they are executed, so that it shows how to recover.

    Args:
        noise: standard deviation of the disturbance in units of a command's range of -1 to 1, held for `HELD_STEPS`;
            a simulator with other ranges has `disturb(action, rng, noise)` for it.

    Returns:
        `observations`, a list of T; `actions` float32 [T, A], what the expert wanted, without the disturbance;
        `success`; `prompt`; `subtasks`, the words of each of the T steps, where the simulator has them.
    """
    expert, rng = _needed(simulator, "expert", "a demonstration"), np.random.default_rng((scene, 1))
    observation: Optional[Mapping[str, Any]] = simulator.reset(scene, task)
    _require_pictures(observation, simulator)
    observations, actions, subtasks = [], [], []
    offset: Any = 0.0
    while not simulator.success and getattr(simulator, "failure", None) is None and len(actions) < simulator.max_steps:
        observations.append(simulator.observe() if observation is None else observation)
        observation = None
        action = np.asarray(expert(), np.float32)
        if len(actions) % HELD_STEPS == 0:
            offset = noise * rng.standard_normal(action.shape)
        actions.append(action)
        subtasks.append(getattr(simulator, "subtask", None))
        disturb = getattr(simulator, "disturb", None)
        simulator.step(disturb(action, rng, noise) if disturb else np.clip(action + offset, -1, 1).astype(np.float32))
        on_step(len(actions))
    success = bool(simulator.success)
    made = {"observations": observations, "actions": np.array(actions), "success": success, "prompt": simulator.prompt}
    return made if None in subtasks else {**made, "subtasks": subtasks}


def _expert_actions(simulator: Simulator, spec: TrialSpec, on_step: Callable[[int], None]) -> List[np.ndarray]:
    assert spec.replayed_scene is not None, "the scene of the demonstration"
    expert = _needed(simulator, "expert", spec.control)
    simulator.reset(spec.replayed_scene, spec.task)
    actions: List[np.ndarray] = []
    while not actions or (not simulator.success and len(actions) < simulator.max_steps):
        actions.append(np.asarray(expert(), np.float32))
        simulator.step(actions[-1])
        on_step(len(actions))
    return actions


def _needed(simulator: Simulator, name: str, control: Optional[str]) -> Any:
    value = getattr(simulator, name, None)
    if value is None:
        raise InputError(
            expected=f"a simulator with `{name}`, for {control}",
            found=f"a {type(simulator).__name__} without it",
            where="manipi_client.trials",
            next=f"add `{name}` to the simulator (manipi_client.trials.Simulator), or choose another control",
        )
    return value


def _blinded(value: Any) -> Any:
    """The same with black pictures, in maps of maps too."""
    if isinstance(value, Mapping):
        return {key: _blinded(one) for key, one in value.items()}
    return np.zeros_like(value) if isinstance(value, np.ndarray) and value.ndim == 3 else value


def _leaves(observation: Mapping[str, Any], path: str = "") -> Iterator[Tuple[str, Any]]:
    """Keys and values, those of maps in it with their whole path."""
    for key, value in observation.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def _require_pictures(observation: Mapping[str, Any], simulator: Simulator) -> None:
    """A renderer without a working driver draws black and says nothing."""
    for key, value in _leaves(observation):
        if isinstance(value, np.ndarray) and value.ndim == 3 and np.ptp(value) <= 2:
            raise InputError(
                expected="a picture of the scene",
                found=f"{list(value.shape)} pixels that are all alike, from {value.min()} to {value.max()}",
                where=f"observation key {key!r} of {type(simulator).__name__}, MUJOCO_GL={os.environ.get('MUJOCO_GL')}",
                next="set MUJOCO_GL to osmesa or egl, and install that library (libosmesa6, libegl1)",
            )


def try_task(simulator: Simulator, task: str) -> str:
    """What trials rely on, tried without a policy: pictures, and episodes that are functions of scene and commands.

    The expert, or nothing, moves scene 0 for 20 steps; then scene 1 is begun, and scene 0 once more, with the same
    commands. From there the expert goes on to its end.

    Returns:
        What was found, a line for people.

    Raises:
        InputError: pictures are all alike, scenes are, or an episode is not the same the second time.
    """
    first = _numbers(simulator.reset(0, task))
    _require_pictures(first, simulator)
    expert = getattr(simulator, "expert", None)
    act = expert or (lambda: _needed(simulator, "still", "steps without an expert"))
    actions: List[np.ndarray] = []

    def go_on(limit: int) -> None:
        while len(actions) < limit and not simulator.success and getattr(simulator, "failure", None) is None:
            actions.append(np.array(act(), np.float32))
            simulator.step(actions[-1])

    began = time.perf_counter()
    go_on(_TRIED_STEPS)
    stepped = time.perf_counter()
    last = [_numbers(simulator.observe()) for _ in range(_TRIED_PICTURES)][-1]
    rendered = time.perf_counter()
    other = _numbers(simulator.reset(1, task))
    if not _differences(first, other):
        raise InputError(
            expected="scenes that differ",
            found="the same first observation in scenes 0 and 1",
            where=f"{type(simulator).__name__}.reset(seed, {shown(task)})",
            next="draw the scene from the seed; with a simulator of one scene, more trials tell nothing",
        )
    _require_same(first, simulator.reset(0, task), "at its start", simulator, task)
    for action in actions:
        simulator.step(action)
    _require_same(last, simulator.observe(), f"after the same {len(actions)} commands", simulator, task)
    rates = len(actions) / (stepped - began), _TRIED_PICTURES / (rendered - stepped)
    if expert:
        go_on(simulator.max_steps)
    reached = f"; expert: {'success' if simulator.success else 'no success'} after {len(actions)}" if expert else ""
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in first.items())
    return (
        f"{task}: {shown(simulator.prompt)}; {shapes}; command {list(actions[0].shape)}, {simulator.control_hz:g} Hz, "
        f"{simulator.max_steps} steps; here {rates[0]:.1f} steps/s, {rates[1]:.1f} observations/s{reached}"
    )


_TRIED_STEPS, _TRIED_PICTURES = 20, 3


def _numbers(observation: Mapping[str, Any]) -> Dict[str, np.ndarray]:
    """The arrays of an observation, copied."""
    return {key: np.array(value) for key, value in _leaves(observation) if not isinstance(value, str)}


def _differences(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> List[str]:
    """What is not equal to the last bit."""
    said = [f"{key} only once" for key in sorted(one.keys() ^ other.keys())]
    for key in [key for key in one if key in other and not np.array_equal(one[key], other[key])]:
        a, b = one[key], other[key]
        same_shape = a.shape == b.shape
        most = np.abs(a.astype(float) - b.astype(float)).max() if same_shape else None
        said.append(f"{key} by up to {most:.2g}" if same_shape else f"{key} of {a.shape} and {b.shape}")
    return said


def _require_same(
    before: Mapping[str, np.ndarray], now: Mapping[str, Any], moment: str, simulator: Simulator, task: str
) -> None:
    differences = _differences(before, _numbers(now))
    if differences:
        raise InputError(
            expected=f"scene 0 as it was {moment}, whatever was done in between",
            found=f"another observation: {'; '.join(differences)}",
            where=f"{type(simulator).__name__}, task {shown(task)}",
            next="reset everything that steps change, controllers and random numbers too",
        )


def _plain(value: Any) -> Any:
    """As JSON has it; what is not finite is null."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The worker process ---------------------------------------------------------------------------------------------------


def load_factory(name: str) -> Callable[..., Simulator]:
    """What `path/to/file.py:FACTORY` or `module:FACTORY` stands for.

    Raises:
        InputError: there is no such file, module or factory.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location("manipi_simulator", place)
            assert spec is not None, place
            assert spec.loader is not None, place
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where dataclasses look for it
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, attribute)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        draws = re.search("glGetError|EGL|OpenGL|OSMesa", str(error))  # how a renderer without its library is imported
        raise InputError(
            expected="a simulator as FILE.py:FACTORY or MODULE:FACTORY, with its packages",
            found=f"{type(error).__name__}: {error}",
            where=shown(name, 200),
            next="apt-get install libosmesa6, with which it draws, or libegl1, and set MUJOCO_GL to osmesa or egl"
            if draws
            else "build its environment: make sim-NAME (docs/simulators.md)",
        ) from error


def main() -> None:
    """What a worker process does, until its standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m manipi_client.trials", description="Run trials of a simulator.")
    parser.add_argument("factory", help="FILE.py:FACTORY or MODULE:FACTORY")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--url", help="address of the policy server")
    wanted.add_argument("--try", dest="tried", nargs="*", metavar="TASK", help="tasks to try without a server")
    parser.add_argument("--options", default="{}", help="what the factory is called with, as JSON")
    args = parser.parse_args()
    # Simulators print as they like: lines of ours alone may reach the process that reads them.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        simulator = load_factory(args.factory)(**json.loads(args.options))
        if args.tried is not None:
            for task in args.tried or [""]:
                print(try_task(simulator, task), file=events, flush=True)
            getattr(simulator, "close", lambda: None)()
            return
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        tell(ready={**versions, **getattr(simulator, "description", {})})
        _answer_requests(simulator, WebsocketPolicy(args.url, None, os.environ.get("MANIPI_TOKEN"), lazy=True), tell)
        getattr(simulator, "close", lambda: None)()
    except ManipiClientError as error:
        if args.tried is not None:
            sys.exit(f"{type(error).__name__}\n{error}")
        server = isinstance(error, PolicyServerError)
        tell(error={"kind": type(error).__name__, "text": str(error), "server": server})
        sys.exit(1)
    except Exception:  # whatever a simulator raises is told, and the process ends
        if args.tried is not None:
            raise
        tell(error={"kind": "SimulatorError", "text": traceback.format_exc()[-4000:]})
        sys.exit(1)


def _end_with_parent(parent: int) -> None:
    """Where that is killed, a trial may still wait for a policy server which ended with it."""
    while os.getppid() == parent:
        time.sleep(HEARTBEAT_S)
    os._exit(1)


def _answer_requests(simulator: Simulator, policy: WebsocketPolicy, tell: Callable[..., None]) -> None:
    spoke = 0.0

    def on_step(step: int) -> None:
        nonlocal spoke
        if time.monotonic() - spoke > HEARTBEAT_S:
            spoke = time.monotonic()
            tell(step=step)

    for line in sys.stdin:
        request = json.loads(line)
        if "demonstration" in request:
            path = Path(request["demonstration"])
            made = demonstrate(simulator, request["scene"], request["task"], noise=request["noise"], on_step=on_step)
            _save_episode(path, made)
            tell(demonstration={"steps": len(made["actions"]), "success": made["success"]})
        elif "film" in request:
            spec, seen = TrialSpec(**request["trial"]), hasattr(simulator, "picture")
            if seen:
                np.save(Path(request["film"]), film(simulator, spec, np.array(request["actions"], np.float32)))
            tell(film=request["film"] if seen else None)
        else:
            tell(result=run_trial(simulator, policy, TrialSpec(**request["trial"]), on_step).to_json())


def _save_episode(path: Path, made: Mapping[str, Any]) -> None:
    """An .npz with a row per step under every key of the observation; `a/b` for a map in a map."""
    rows = [dict(_leaves(observation)) for observation in made["observations"]]
    columns = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "prompt"}
    partial = path.with_suffix(".partial.npz")
    rest = {key: np.asarray(value) for key, value in made.items() if key != "observations"}
    np.savez(partial, **columns, **rest)  # type: ignore[arg-type]
    partial.replace(path)


if __name__ == "__main__":
    main()
