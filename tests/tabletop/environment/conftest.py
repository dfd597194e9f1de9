import numpy as np
import pytest

from manipi.tabletop.environment import Expert, Tabletop


@pytest.fixture
def run_expert():
    """Runs the expert to the end of one episode; returns the last info."""

    def run(env: Tabletop, seed: int, *, noise: float = 0.0, options: dict | None = None) -> dict:
        _, info = env.reset(seed=seed, options=options)
        expert = Expert(env, np.random.default_rng(seed), noise=noise)
        done = False
        while not done:
            _, _, terminated, truncated, info = env.step(expert.act()[1])
            done = terminated or truncated
        return info

    return run
