"""Which rows form step s: a pure function of the seed, the step and the dataset. There is no state to save.

step        0        1        2        3       4 …          batches of 4 from 6 rows
rows     3 0 5 2  4 1|2 5  0 4 3 1|  5 1 …                  | a new epoch: another permutation of all rows
rank 0   3 0      4 1      0 4                              each rank takes its slice of the same batch
rank 1       5 2      2 5      3 1
"""

import hashlib
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from manipi.errors import ConfigError, DatasetNotFoundError


class Sampler:
    """Endless batches of rows; every epoch visits each row once, and batches run on across its end.

    Args:
        rows: the rows to draw from, or their number.
        batch_size: over all ranks.
        fingerprint: of the dataset; another dataset gives another order.
        shuffle: False gives the rows as they stand.
    """

    def __init__(
        self,
        rows: Int64[np.ndarray, " N"] | int,
        batch_size: int,
        *,
        seed: int,
        fingerprint: str = "",
        shuffle: bool = True,
    ):
        self._all = np.asarray(rows, dtype=np.int64) if isinstance(rows, np.ndarray) else np.arange(rows)
        if not len(self._all):
            raise DatasetNotFoundError(
                expected="rows to draw from",
                found="none",
                where="sampler",
                next="lower --data.holdout, or add episodes",
            )
        self.batch_size, self.seed, self.fingerprint, self.shuffle = batch_size, seed, fingerprint, shuffle
        # A batch may touch two epochs.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __reduce__(self) -> tuple:
        return _sampler, (self._all, self.batch_size, self.seed, self.fingerprint, self.shuffle)

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> Int64[np.ndarray, " n"]:
        """The rows of one rank at one step, [batch_size / world_size].

        Raises:
            ConfigError: `batch_size` is not a multiple of `world_size`.
        """
        if self.batch_size % world_size:
            raise ConfigError(
                expected=f"a batch size that {world_size} ranks share evenly",
                found=str(self.batch_size),
                where="--batch-size",
                next=f"--batch-size {self.batch_size // world_size * world_size or world_size}",
            )
        share = self.batch_size // world_size
        drawn = np.arange(share) + step * self.batch_size + rank * share
        epochs, places = np.divmod(drawn, len(self._all))
        rows = np.empty(share, np.int64)
        for epoch in np.unique(epochs).tolist():
            rows[epochs == epoch] = self._epoch(epoch)[places[epochs == epoch]]
        return rows

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return self._all
        return self._all[permutation(len(self._all), f"{self.seed}/{epoch}/{self.fingerprint}")]


def _sampler(rows: np.ndarray, batch_size: int, seed: int, fingerprint: str, shuffle: bool) -> Sampler:
    return Sampler(rows, batch_size, seed=seed, fingerprint=fingerprint, shuffle=shuffle)


def permutation(n: int, key: str) -> Int64[np.ndarray, " n"]:
    """A permutation of 0…n-1 that depends on the key alone.

    NumPy keeps the raw numbers of a bit generator the same in all versions, but not what its `Generator` makes of
    them, so the raw numbers are sorted here.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
