"""Closed loop: a served policy acts in a simulated robot's environment, on scenes that it has never seen.

Every observation and action goes through the websocket client, as it would on a robot. `run_trials` counts successes:
several processes run the environment side by side, and the policy server answers them all. `compare` asks whether a
policy keeps its success rate when the arm does not wait for it, with every way to join chunks on the same scenes:

    step of the arm   0    1    2    3    4    5    6    7        delay = 2: the answer to the observation of step n
    asked             ●─────── A          ●─────── C              is there at step n + 2, however fast this computer is
    executed                   a2   a3   a4   a5   c2   c3        (real-time chunking, execute_steps = 4)

Synchronous execution waits instead: the arm stands still for `delay` steps per chunk, which cost time but no scene.
"""

import contextlib
import functools
import io
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from manipi.errors import ConfigError, ServeError
from manipi.extensions import entries, find
from manipi.storage import atomic_write
from manipi_client import ActionChunkBroker, Motion, RealTimeBroker, WebsocketPolicy
from manipi_client.broker import Policy
from manipi_client.realtime import JOINS

MAX_STEPS = 30
"""Longest trial. The tabletop's expert needs about 8 steps; a policy that wanders for long touches everything."""
START_SECONDS = 120.0
"""How long a policy server may take to start."""
Z_95 = 1.959963984540054

Variant: TypeAlias = Literal["plain", "blind", "wrong_prompt"]
"""plain: as it is. blind: every picture is black. wrong_prompt: the instruction names another object."""


class Environment(Protocol):
    """What a rollout asks of a simulated robot; the rest is gymnasium's. `manipi.tabletop.environment.Tabletop` is one.

    What makes it is an entry point of the group `manipi.environments` under its robot's name, called with keywords:
    `max_steps`, `image_size` (pixels of a side) and `cameras` (which to render; () for a film, which asks no policy).
    """

    control_hz: float
    """Steps per second on the robot's own clock."""
    steps: int
    """Since the last reset."""

    def reset(self, *, seed: int, options: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first observation of the scene of a seed, in the robot's keys and with `prompt`; and `info`."""
        ...

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Moves for one control step with a command [A]: observation, reward, terminated, truncated, `info`.

        `info` holds `success` and `failure`, a word or None; and where the scene has them `target`, the object that is
        asked for, and `touched`, the one that was touched first.
        """
        ...

    def another_instruction(self, seed: int) -> Mapping[str, Any]:
        """Options with which `reset` gives the present scene an instruction that names another object."""
        ...

    def render(self, *, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """A picture for people."""
        ...


@functools.cache
def _factory(environment: str) -> Callable[..., Environment]:
    return find("manipi.environments", environment)


def start_scene(
    environment: str, seed: int, variant: Variant = "plain", **options: Any
) -> tuple[Environment, dict[str, Any]]:
    """The scene of a seed, and its first observation. Raises UnknownNameError where no environment is called so."""
    env = _factory(environment)(max_steps=MAX_STEPS, **options)
    observation, _ = env.reset(seed=seed)
    if variant == "wrong_prompt":
        observation, _ = env.reset(seed=seed, options=env.another_instruction(seed))
    return env, observation


@contextlib.contextmanager
def policy_server(checkpoint: Path, *, threads: int = 1, flags: Sequence[str] = ()) -> Iterator[int]:
    """`manipi serve CHECKPOINT` on a free port of loopback; yields the port, and ends the process on the way out.

    Args:
        flags: more of them.

    Raises:
        ServeError: it ended or did not start within two minutes; the message holds what it said.
    """
    with tempfile.TemporaryDirectory(prefix="manipi-serve-") as folder:
        ready, log = Path(folder) / "port", Path(folder) / "log"
        flags = ["--port", "0", "--ready-file", str(ready), "--num-threads", str(threads), *flags]
        command = [sys.executable, "-m", "manipi", "serve", str(checkpoint), *flags]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServeError(
                        expected=f"a policy server within {START_SECONDS:.0f} s",
                        found=log.read_text(errors="replace")[-2000:] or "no sign of life",
                        where=" ".join(command),
                        next="run that command by itself and read what it says",
                    )
                time.sleep(0.05)
            yield int(ready.read_text())
        finally:
            process.terminate()
            process.wait()


# Success rates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SuccessRate:
    """k successes of n trials with Wilson's 95 % interval (Wilson, 1927)."""

    n: int
    k: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.k}/{self.n} = {self.rate:.1%} (95 % interval {self.low:.1%} to {self.high:.1%})"


def success_rate(k: int, n: int) -> SuccessRate:
    """Wilson's score interval: right also at 0 and n, where the normal approximation has no width."""
    assert 0 <= k <= n > 0
    p, z2 = k / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends rounding could pass 0 or 1 by an ulp.
    return SuccessRate(n=n, k=k, rate=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


# Trials -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One episode of an evaluation."""

    seed: int
    prompt: str
    target: str | None
    """The object that success is judged by: the scene's own, also where the prompt names another."""
    success: bool
    failure: str | None
    touched: str | None
    steps: int
    infer_ms: tuple[float, ...]
    """Round trips of the client, one per chunk."""
    actions: tuple[tuple[float, ...], ...]
    """Every command that the arm executed, from which the film is made."""
    frames: np.ndarray | None = None
    """uint8 [T, size, size, 3] for the report, where asked for."""


def run_trials(
    port: int,
    seeds: Sequence[int],
    *,
    environment: str,
    image_size: int,
    execute_steps: int,
    variant: Variant = "plain",
    films: int = 0,
    workers: int = 2,
    label: str = "drive",
) -> list[Trial]:
    """One trial per seed against the server on loopback; `films` of them get a film, half of each outcome.

    Args:
        environment: name of an entry point of `manipi.environments`; worker processes look it up themselves.

    Raises:
        UnknownNameError: no environment is called so.
    """
    _factory(environment)  # an unknown name ends here, not in a worker process
    settings = {"environment": environment, "variant": variant}
    job = functools.partial(_run_one, port, image_size=image_size, execute_steps=execute_steps, **settings)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        trials = list(tqdm(pool.map(job, seeds, chunksize=4), total=len(seeds), desc=label, unit="episode"))
        # Half of each outcome, or more of one where there are too few of the other.
        failures = [i for i, trial in enumerate(trials) if not trial.success]
        successes = [i for i, trial in enumerate(trials) if trial.success]
        wins = successes[: films - min(len(failures), films // 2)]
        chosen = sorted([*wins, *failures[: films - len(wins)]])
        filmed = pool.map(functools.partial(film, **settings), [trials[i] for i in chosen])
        frames = dict(zip(chosen, filmed, strict=True))
    return [replace(trial, frames=frames.get(i)) for i, trial in enumerate(trials)]


def _run_one(port: int, seed: int, *, environment: str, image_size: int, execute_steps: int, variant: Variant) -> Trial:
    env, observation = start_scene(environment, seed, variant, image_size=image_size)
    times, actions, info, done = [], [], {}, False
    with WebsocketPolicy(port=port) as policy:
        broker = ActionChunkBroker(policy, execute_steps)
        while not done:
            seen = dict(observation)
            if variant == "blind":
                seen = {k: np.zeros_like(v) if getattr(v, "ndim", 0) == 3 else v for k, v in seen.items()}
            started = time.perf_counter()
            action = broker.infer(seen)["actions"]
            if env.steps % execute_steps == 0:  # the steps in between come out of the chunk at hand
                times.append((time.perf_counter() - started) * 1e3)
            actions.append(tuple(action.tolist()))
            observation, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
    return Trial(
        seed=seed,
        prompt=observation["prompt"],
        target=info.get("target"),
        success=info["success"],
        failure=info["failure"],
        touched=info.get("touched"),
        steps=env.steps,
        infer_ms=tuple(times),
        actions=tuple(actions),
    )


def film(trial: Trial, *, environment: str, variant: Variant) -> UInt8[np.ndarray, "T 160 160 3"]:
    """The trial's commands on the trial's scene, which give the same motion again."""
    env, _ = start_scene(environment, trial.seed, variant, cameras=())
    frames = [env.render(size=160)]
    for action in trial.actions:
        env.step(np.array(action, np.float32))
        frames.append(env.render(size=160))
    return np.stack(frames)


def save_trials(path: Path, trials: Sequence[Trial]) -> None:
    """One file with every trial and its film."""
    films = {f"frames_{i}": t.frames for i, t in enumerate(trials) if t.frames is not None}
    plain = json.dumps([{k: v for k, v in asdict(replace(t, frames=None)).items() if k != "frames"} for t in trials])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, trials=np.array(plain), **films)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def load_trials(path: Path) -> list[Trial]:
    """What `save_trials` wrote."""
    with np.load(path, allow_pickle=False) as data:
        rows = json.loads(str(data["trials"]))
        films = [data[f"frames_{i}"] if f"frames_{i}" in data.files else None for i in range(len(rows))]
    for row in rows:
        row["infer_ms"], row["actions"] = tuple(row["infer_ms"]), tuple(map(tuple, row["actions"]))
    return [Trial(**row, frames=frames) for row, frames in zip(rows, films, strict=True)]


# Joining chunks while the arm moves -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """One way to join chunks, over all scenes."""

    join: str
    success: SuccessRate
    motion: Motion
    seconds: float
    """What an episode takes on the arm's own clock, standing still included; the mean."""


def compare(policy: Policy, seeds: Sequence[int], *, execute_steps: int, delay: int) -> list[ClosedLoop]:
    """Every join that the policy knows, on the same scenes of its robot's environment.

    Args:
        policy: of `manipi serve`, whose metadata say for which robot, and how large its pictures are.
        delay: executed steps between an observation and its answer.

    Raises:
        ConfigError: the policy's robot has no environment, or the policy would have no action left before each answer.
    """
    metadata, expected, found = policy.metadata, "", ""
    robot, horizon = metadata["robot"]["name"], metadata["action_horizon"]
    if robot not in (names := entries("manipi.environments")):
        expected, found = f"a policy for a robot that has an environment: {', '.join(names)}", f"one for {robot!r}"
    elif min(execute_steps, delay) < 1 or execute_steps + delay > horizon:
        expected = f"steps to execute and a delay, each from 1 and within {horizon} together"
        found = f"{execute_steps} and {delay}"
    if expected:
        next = "manipi eval CHECKPOINT --scenes 100 --execute-steps 4 --delay 2"
        raise ConfigError(expected=expected, found=found, where="the closed loop", next=next)
    joins = [join for join in JOINS if join != "real_time" or metadata["real_time"]]
    return [_drive(policy, seeds, execute_steps=execute_steps, delay=delay, join=join) for join in joins]


def _drive(policy: Policy, seeds: Sequence[int], *, execute_steps: int, delay: int, join: str) -> ClosedLoop:
    waits, held, metadata = join == "synchronous", _Held(policy), policy.metadata
    successes, seconds = 0, 0.0
    with RealTimeBroker(held, execute_steps, join, expected_delay=delay) as broker:
        for seed in tqdm(seeds, desc=join, unit="episode"):
            env, observation = start_scene(metadata["robot"]["name"], seed, image_size=metadata["image_size"])
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
            held.gate.set()  # an answer under way is of no use, and must not keep the next episode waiting
            successes += info["success"]
            seconds += (env.steps + delay * (math.ceil(env.steps / execute_steps) if waits else 1)) / env.control_hz
    success = success_rate(successes, len(seeds))
    return ClosedLoop(join=join, success=success, motion=broker.motion, seconds=seconds / len(seeds))


class _Held:
    """A policy whose answers leave only while `gate` is set."""

    def __init__(self, policy: Policy):
        self._policy, self.gate = policy, threading.Event()
        self.metadata, self.reset, self.interrupt = policy.metadata, policy.reset, self.gate.set

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._policy.infer(observation)
        self.gate.wait()
        return answer
