"""Closed loop: a served policy acts in the embedded environment, on scenes that it has never seen.

Every observation and action goes through the websocket client, as it would on a robot. Several processes run the
environment side by side; the policy server answers them all.
"""

import io
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from tqdm import tqdm

from manipi.storage import atomic_write
from manipi.tabletop.environment.tabletop import Tabletop
from manipi_client import ActionChunkBroker, WebsocketPolicy

MAX_STEPS = 30
"""Longest trial. The expert needs about 8 steps; a policy that wanders for long touches everything in the end."""

Variant: TypeAlias = Literal["plain", "blind", "wrong_prompt"]
"""plain: as it is. blind: every picture is black. wrong_prompt: the instruction names another object."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One episode of an evaluation."""

    seed: int
    prompt: str
    target: str
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
    image_size: int,
    execute_steps: int,
    variant: Variant = "plain",
    films: int = 0,
    workers: int = 2,
    label: str = "drive",
) -> list[Trial]:
    """One trial per seed against the server on loopback; `films` of them get a film, half of each outcome."""
    job = partial(_run_one, port, image_size=image_size, execute_steps=execute_steps, variant=variant)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        trials = list(tqdm(pool.map(job, seeds, chunksize=4), total=len(seeds), desc=label, unit="episode"))
        chosen = _to_film(trials, films)
        frames = dict(zip(chosen, pool.map(partial(film, variant=variant), [trials[i] for i in chosen])))
    return [replace(trial, frames=frames.get(i)) for i, trial in enumerate(trials)]


def _to_film(trials: Sequence[Trial], count: int) -> list[int]:
    """Half of each outcome, or more of one where there are too few of the other."""
    failures = [i for i, trial in enumerate(trials) if not trial.success]
    successes = [i for i, trial in enumerate(trials) if trial.success]
    wins = successes[: count - min(len(failures), count // 2)]
    return sorted([*wins, *failures[: count - len(wins)]])


def film(trial: Trial, *, variant: Variant) -> np.ndarray:
    """uint8 [T, 160, 160, 3]: the trial's commands on the trial's scene, which give the same motion again."""
    env, _ = start_scene(trial.seed, variant, cameras=())
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
    tuples = {"infer_ms": tuple, "actions": lambda actions: tuple(map(tuple, actions))}
    rows = [row | {key: make(row[key]) for key, make in tuples.items()} for row in rows]
    return [Trial(**row, frames=frames) for row, frames in zip(rows, films)]


def _run_one(port: int, seed: int, *, image_size: int, execute_steps: int, variant: Variant) -> Trial:
    env, observation = start_scene(seed, variant, image_size=image_size)
    times, actions, info, done = [], [], {}, False
    with WebsocketPolicy(port=port) as policy:
        broker = ActionChunkBroker(policy, execute_steps)
        while not done:
            started = time.perf_counter()
            action = broker.infer(_what_it_sees(observation, variant))["actions"]
            if env.steps % execute_steps == 0:  # the steps in between come out of the chunk at hand
                times.append((time.perf_counter() - started) * 1e3)
            actions.append(tuple(action.tolist()))
            observation, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
    return Trial(
        seed=seed,
        prompt=observation["prompt"],
        target=info["target"],
        success=info["success"],
        failure=info["failure"],
        touched=info["touched"],
        steps=env.steps,
        infer_ms=tuple(times),
        actions=tuple(actions),
    )


def start_scene(seed: int, variant: Variant = "plain", **options: Any) -> tuple[Tabletop, dict[str, Any]]:
    """The scene of a seed, and its first observation."""
    env = Tabletop(max_steps=MAX_STEPS, **options)
    observation, _ = env.reset(seed=seed)
    if variant == "wrong_prompt":
        observation, _ = env.reset(seed=seed, options=_another_instruction(env, seed))
    return env, observation


def _what_it_sees(observation: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    if variant != "blind":
        return dict(observation)
    return {k: np.zeros_like(v) if getattr(v, "ndim", 0) == 3 else v for k, v in observation.items()}


def _another_instruction(env: Tabletop, seed: int) -> dict[str, str]:
    """The same scene with an instruction that names one of the other objects."""
    others = [color for color in env.colors if color != env.goal.target]
    return {"task": env.goal.task, "target": env.goal.target, "instruct": others[seed % len(others)]}
