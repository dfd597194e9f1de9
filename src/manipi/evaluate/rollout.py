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

from manipi.environments.tabletop import Tabletop
from manipi.storage import atomic_write
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
    """One trial per seed against the server on loopback; `films` stay on film, at most half of them failures."""
    sizes = {"image_size": image_size, "execute_steps": execute_steps}
    job = partial(_run_one, port, variant=variant, film=films > 0, **sizes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        trials = pool.map(job, seeds, chunksize=4)
        return _keep_films(list(tqdm(trials, total=len(seeds), desc=label, unit="episode")), films)


def _keep_films(trials: list[Trial], count: int) -> list[Trial]:
    """All are filmed, because nobody knows beforehand which will fail."""
    failures = [i for i, t in enumerate(trials) if not t.success][: count // 2]
    successes = [i for i, t in enumerate(trials) if t.success][: count - len(failures)]
    kept = {*failures, *successes}
    return [t if i in kept else replace(t, frames=None) for i, t in enumerate(trials)]


def save_trials(path: Path, trials: Sequence[Trial]) -> None:
    """One file with every trial and its film."""
    films = {f"frames_{i}": t.frames for i, t in enumerate(trials) if t.frames is not None}
    plain = json.dumps([asdict(replace(t, frames=None)) for t in trials])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, trials=np.array(plain), **films)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue())


def load_trials(path: Path) -> list[Trial]:
    """What `save_trials` wrote."""
    with np.load(path, allow_pickle=False) as data:
        rows = json.loads(str(data["trials"]))
        films = [data[f"frames_{i}"] if f"frames_{i}" in data.files else None for i in range(len(rows))]
    return [Trial(**{**row, "infer_ms": tuple(row["infer_ms"]), "frames": f}) for row, f in zip(rows, films)]


def _run_one(port: int, seed: int, *, film: bool, image_size: int, execute_steps: int, variant: Variant) -> Trial:
    env = Tabletop(image_size=image_size, max_steps=MAX_STEPS)
    observation, info = env.reset(seed=seed)
    if variant == "wrong_prompt":
        observation, info = env.reset(seed=seed, options=_another_instruction(env, seed))
    frames, times, done = [], [], False
    with WebsocketPolicy(port=port) as policy:
        broker = ActionChunkBroker(policy, execute_steps)
        while not done:
            if film:
                frames.append(env.render(size=160))
            started = time.perf_counter()
            action = broker.infer(_what_it_sees(observation, variant))["actions"]
            if env.steps % execute_steps == 0:  # the steps in between come out of the chunk at hand
                times.append((time.perf_counter() - started) * 1e3)
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
        frames=np.stack([*frames, env.render(size=160)]) if film else None,
    )


def _what_it_sees(observation: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    if variant != "blind":
        return dict(observation)
    return {k: np.zeros_like(v) if getattr(v, "ndim", 0) == 3 else v for k, v in observation.items()}


def _another_instruction(env: Tabletop, seed: int) -> dict[str, str]:
    """The same scene with an instruction that names one of the other objects."""
    others = [color for color in env.colors if color != env.goal.target]
    return {"task": env.goal.task, "target": env.goal.target, "instruct": others[seed % len(others)]}
