"""Which rows form step s: a pure function of the seed, the step and the datasets. There is no state to save.

step        0        1        2        3       4 …          batches of 4 from 6 rows
rows     3 0 5 2  4 1|2 5  0 4 3 1|  5 1 …                  | a new epoch: another permutation of all rows
rank 0   3 0      4 1      0 4                              each rank takes its slice of the same batch
rank 1       5 2      2 5      3 1

A mixture first deals the places of the stream out to its parts, by their weights, then draws from each part's own
endless stream. Places are dealt in rounds, so that how often a part had its turn before a place is known without
going there:

place    0 1 2 3 4 5 6 7 | 8 9 …       a round of 8, weights 3 : 1
part     a a b a a a b a | a b …       each round deals every part its share, in an order of its own
draw     0 1 0 2 3 4 1 5 | 6 2 …       the part's own stream goes on through all rounds

A language plan deals the places of its dataset's stream out to its choices in the same way; a row then says by its
number which choice it is under (`EncodedDataset.plan`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from manipi.errors import ConfigError, DatasetNotFoundError

if TYPE_CHECKING:
    from manipi.data.dataset import Dataset

ROUND = 1 << 14
"""Places per round of a mixture; shares of the parts are exact to one of them."""


class Stream:
    """The endless stream of one dataset's rows: every epoch visits each of them once.

    Args:
        rows: the rows to draw from, or their number.
        fingerprint: of the dataset; another dataset gives another order.
        shuffle: False gives the rows as they stand.
    """

    def __init__(self, rows: Int64[np.ndarray, " N"] | int, *, seed: int, fingerprint: str = "", shuffle: bool = True):
        self._all = np.asarray(rows, dtype=np.int64) if isinstance(rows, np.ndarray) else np.arange(rows)
        if not len(self._all):
            raise DatasetNotFoundError(
                expected="rows to draw from",
                found="none",
                where="sampler",
                next="lower --data.holdout, keep more frames, or add episodes",
            )
        self.seed, self.fingerprint, self.shuffle = seed, fingerprint, shuffle
        # A batch may touch two epochs.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __len__(self) -> int:
        return len(self._all)

    def __reduce__(self) -> tuple:
        return partial(Stream, seed=self.seed, fingerprint=self.fingerprint, shuffle=self.shuffle), (self._all,)

    def at(self, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The rows at some places of the stream."""
        epochs, within = np.divmod(places, len(self._all))
        rows = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            rows[epochs == epoch] = self._epoch(epoch)[within[epochs == epoch]]
        return rows

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        key = f"{self.seed}/{epoch}/{self.fingerprint}"
        return self._all[permutation(len(self._all), key)] if self.shuffle else self._all


class PlannedStream:
    """A stream in which each place has one of several choices. A row comes out with `num_rows` added choice times.

    Args:
        weights: share of the places of each choice, relative to the others'.

    Raises:
        ConfigError: as `MixedStream`.
    """

    def __init__(self, stream: Stream, weights: Sequence[float], num_rows: int, *, key: str):
        self.stream, self.key, self._num_rows = stream, key, num_rows
        self._weights, self._counts = tuple(weights), deal(weights, "weights of the language plan")
        self._round = lru_cache(maxsize=2)(lambda number: _dealt(self._counts, f"{self.key}/{number}"))

    def __reduce__(self) -> tuple:
        return partial(PlannedStream, key=self.key), (self.stream, self._weights, self._num_rows)

    def at(self, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The rows at some places of the stream."""
        rounds, within = np.divmod(places, ROUND)
        choices = np.empty(len(places), np.int64)
        for number in np.unique(rounds).tolist():
            choices[rounds == number] = self._round(number)[within[rounds == number]]
        return self.stream.at(places) + choices * self._num_rows


class MixedStream:
    """Several streams as one. The rows of part k come out with `offsets[k]` added, so that they stay apart.

    Args:
        weights: share of the places of each part, relative to the others'.

    Raises:
        ConfigError: a weight is not positive, or so small that a round has no place for it.
    """

    def __init__(
        self, parts: Sequence[Stream | PlannedStream], weights: Sequence[float], offsets: Sequence[int], *, seed: int
    ):
        self.parts, self.seed, self._offsets = parts, seed, offsets
        self._weights, self._counts = tuple(weights), deal(weights)
        self._round = lru_cache(maxsize=2)(self._deal_round)

    def __reduce__(self) -> tuple:
        return partial(MixedStream, seed=self.seed), (self.parts, self._weights, self._offsets)

    def at(self, places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The rows at some places of the stream."""
        rounds, within = np.divmod(places, ROUND)
        owner, draw = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        for number in np.unique(rounds).tolist():
            here = rounds == number
            owners, turns = self._round(number)
            owner[here] = owners[within[here]]
            draw[here] = turns[within[here]] + number * self._counts[owner[here]]
        rows = np.empty(len(places), np.int64)
        for k in np.unique(owner).tolist():
            rows[owner == k] = self.parts[k].at(draw[owner == k]) + self._offsets[k]
        return rows

    def _deal_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn each place of a round is, and how many turns that part had in the round before."""
        owners = _dealt(self._counts, f"mixture/{self.seed}/{number}")
        order = np.argsort(owners, kind="stable")
        turns = np.empty(ROUND, np.int64)
        turns[order] = np.arange(ROUND) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        return owners, turns


def _dealt(counts: Int64[np.ndarray, " parts"], key: str) -> Int64[np.ndarray, " round"]:
    """Whose turn each place of a round is."""
    return np.repeat(np.arange(len(counts)), counts)[permutation(ROUND, key)]


def deal(weights: Sequence[float], where: str = "weights of the mixture") -> Int64[np.ndarray, " parts"]:
    """Places of a round per part, proportional to the weights (largest remainders). Raises ConfigError: see above."""
    shares = np.array(weights, dtype=np.float64)
    valid = np.isfinite(shares).all() and (shares > 0).all()
    exact = shares / shares.sum() * ROUND if valid else shares
    if not valid or exact.min() < 1:
        raise ConfigError(
            expected=f"weights above 0, none below 1/{ROUND} of their sum",
            found=", ".join(f"{weight:g}" for weight in weights),
            where=where,
            next="give each of them a larger weight, or leave it out",
        )
    counts = np.floor(exact).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")
    counts[rest[: ROUND - counts.sum()]] += 1
    return counts


class Sampler:
    """Batches of rows; they run on across the ends of epochs.

    Args:
        stream: what to draw from.
        batch_size: over all ranks.
    """

    def __init__(self, stream: Stream | PlannedStream | MixedStream, batch_size: int):
        self.stream, self.batch_size = stream, batch_size

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
        return self.stream.at(np.arange(share) + step * self.batch_size + rank * share)


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


def permutation(n: int, key: str) -> Int64[np.ndarray, " n"]:
    """A permutation of 0…n-1 that depends on the key alone.

    NumPy keeps the raw numbers of a bit generator the same in all versions, but not what its `Generator` makes of
    them, so the raw numbers are sorted here.
    """
    return np.argsort(random_bits(key).random_raw(n), kind="stable")


def random_bits(key: str) -> np.random.PCG64:
    """A source of raw 64-bit numbers that depends on the key alone."""
    return np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
