"""A run of two processes that nothing disturbs, for the tests that kill one of them."""

from pathlib import Path

import pytest

from manipi.train.config import TrainConfig


@pytest.fixture(scope="session")
def twelve_steps(tiny) -> TrainConfig:
    return tiny(steps=12, save_every=4, keep_checkpoints=9)


@pytest.fixture(scope="session")
def of_two_ranks(twelve_steps, once) -> Path:
    """The last checkpoint of that run."""
    from tests.train import ranks

    folder = once("two_ranks", lambda folder: ranks.Ranks(2, ranks.run, twelve_steps, folder / "run").all_well())
    return folder / "run/checkpoints/12"
