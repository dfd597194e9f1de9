"""Train and held-out episodes."""

import numpy as np
from jaxtyping import Int64

from manipi.data.dataset import Dataset
from manipi.data.feed.sampler import permutation
from manipi.errors import ConfigError


def split_episodes(
    dataset: Dataset, *, holdout: float, seed: int
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " held_out"]]:
    """The rows of train and of held-out episodes. Whole episodes are held out: neighbouring frames are near copies.

    Args:
        holdout: share of the episodes, rounded, and at least one unless it is 0. A larger share with the same seed
            holds out the same episodes and more.

    Raises:
        ConfigError: no episode would be left on one of the two sides.
    """
    total = len(dataset.episodes)
    count = max(1, round(total * holdout)) if holdout > 0 else 0
    if not 0 <= holdout < 1 or count >= total:
        raise ConfigError(
            expected="a share from 0 to below 1 that leaves at least one of the episodes to train on",
            found=f"{holdout} of {total} episodes",
            where="--data.holdout",
            next="--data.holdout 0  # or add episodes",
        )
    held_out = np.zeros(total, dtype=bool)
    held_out[permutation(total, f"split/{seed}")[:count]] = True
    by_row = held_out[dataset.episode_of(np.arange(dataset.num_frames))]
    return np.flatnonzero(~by_row), np.flatnonzero(by_row)
