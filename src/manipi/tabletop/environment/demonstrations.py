"""Demonstrations of the scripted expert, made as they are asked for."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from manipi.tabletop.environment.expert import Expert
from manipi.tabletop.environment.tabletop import Tabletop

NOISE_LEVELS = (0.0, 0.0, 0.3)
"""Perturbations of the executed actions, in units of the largest step; each episode draws one of them."""


def demonstrations(
    seeds: Iterable[int],
    *,
    cameras: Sequence[str] = ("image",),
    noise_levels: Sequence[float] = NOISE_LEVELS,
    keep: float = 1.0,
    start_noise: float = 1.0,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields one episode per seed, failures included; the same seed gives the same episode.

    The tip starts anywhere over the table, also low between the blocks: many short episodes teach more than few long
    ones.

    Args:
        seeds: one episode each.
        cameras: which pictures to render.
        noise_levels: see `NOISE_LEVELS`.
        keep: chance of each frame to be rendered. The first frame always is. States and actions stay complete, so that
            every rendered frame has its action chunk.
        start_noise: see `Tabletop`.
        options: other arguments of `Tabletop`: tasks, image_size, colors, randomize, ...

    Yields:
        `observation/<camera>` uint8 [K, h, w, 3], the K rendered frames; `frame_index` int64 [K], which of the T frames
        they are (0 .. T-1 when `keep` is 1); `observation/state` float32 [T, 4]; `actions` float32 [T, 4], what the
        expert wanted, without the perturbation; `task`, the instruction; `success`.
    """
    env = Tabletop(cameras=(), start_noise=start_noise, **options)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        yield _episode(env, seed, rng, cameras, float(rng.choice(noise_levels)), keep)


def _episode(
    env: Tabletop, seed: int, rng: np.random.Generator, cameras: Sequence[str], noise: float, keep: float
) -> dict[str, Any]:
    observation, info = env.reset(seed=seed)
    expert = Expert(env, rng, noise=noise)
    pictures: dict[str, list[np.ndarray]] = {camera: [] for camera in cameras}
    states, actions, kept, done = [], [], [], False
    while not done:
        if not states or rng.random() < keep:
            kept.append(len(states))
            for camera in cameras:
                pictures[camera].append(env.render_camera(camera))
        label, executed = expert.act()
        states.append(observation["observation/state"])
        actions.append(label)
        observation, _, terminated, truncated, info = env.step(executed)
        done = terminated or truncated
    return {
        **{f"observation/{camera}": np.stack(frames) for camera, frames in pictures.items()},
        "frame_index": np.array(kept, np.int64),
        "observation/state": np.stack(states),
        "actions": np.stack(actions),
        "task": observation["prompt"],
        "success": info["success"],
    }
