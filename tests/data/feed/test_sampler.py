"""The order of rows: whole epochs, exact resume, ranks that share one batch."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manipi.data.feed.sampler import ROUND, MixedStream, Sampler, Stream, deal, permutation, split_episodes
from manipi.errors import ConfigError, DatasetNotFoundError

PINNED = [6, 4, 9, 7, 2, 8, 0, 5, 1, 3]
sizes = st.integers(1, 200)
seeds = st.integers(0, 2**32)


@given(sizes, sizes, seeds)
def test_every_epoch_visits_every_row_once(num_rows, batch_size, seed):
    sampler = Sampler(Stream(num_rows, seed=seed), batch_size)
    steps = -(-3 * num_rows // batch_size)
    drawn = np.concatenate([sampler.rows(step) for step in range(steps)])[: 3 * num_rows]
    epochs = np.sort(drawn.reshape(3, num_rows), axis=1)
    np.testing.assert_array_equal(epochs, np.tile(np.arange(num_rows), (3, 1)))


@given(sizes, st.integers(1, 16), st.sampled_from([1, 2, 4]), seeds, st.integers(0, 1000))
def test_ranks_share_the_batch(num_rows, share, world_size, seed, step):
    sampler = Sampler(Stream(num_rows, seed=seed), share * world_size)
    parts = [sampler.rows(step, rank, world_size) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(parts), sampler.rows(step))


@given(sizes, sizes, seeds, st.lists(st.integers(0, 10_000), max_size=5))
def test_a_step_does_not_depend_on_the_steps_before(num_rows, batch_size, seed, steps):
    used, fresh = (Sampler(Stream(num_rows, seed=seed), batch_size) for _ in range(2))
    for step in steps:
        used.rows(step)
    np.testing.assert_array_equal(used.rows(77), fresh.rows(77))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(used)).rows(77), fresh.rows(77))


def test_order_follows_seed_epoch_and_dataset():
    orders = {
        tuple(Sampler(Stream(50, seed=seed, fingerprint=fingerprint), 50).rows(step))
        for seed in (0, 1)
        for fingerprint in ("a", "b")
        for step in (0, 1)
    }
    assert len(orders) == 8


def test_order_is_the_same_for_ever():
    # A run that resumes under another NumPy or on another machine must go on with the same rows.
    assert permutation(10, "1/0/abc").tolist() == PINNED
    code = "from manipi.data.feed.sampler import permutation; print(permutation(10, '1/0/abc').tolist())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == str(PINNED)


def test_rows_to_draw_from():
    sampler = Sampler(Stream(np.array([7, 3, 9]), seed=0, shuffle=False), 2)
    assert [sampler.rows(step).tolist() for step in range(3)] == [[7, 3], [9, 7], [3, 9]]
    assert sorted(Sampler(Stream(np.array([7, 3, 9]), seed=5), 3).rows(2).tolist()) == [3, 7, 9]


def test_uneven_ranks():
    with pytest.raises(ConfigError, match=r"(?s)4 ranks share evenly.*found 10\n.*--batch-size 8"):
        Sampler(Stream(20, seed=0), 10).rows(0, rank=1, world_size=4)


def test_no_rows():
    with pytest.raises(DatasetNotFoundError, match="rows to draw from"):
        Stream(np.array([], dtype=np.int64), seed=0)


# Mixtures -------------------------------------------------------------------------------------------------


def mixture(seed=1, weights=(3, 1)):
    return MixedStream([Stream(50, seed=seed, fingerprint="a"), Stream(7, seed=seed)], weights, [0, 50], seed=seed)


@settings(max_examples=10)
@given(seeds, st.integers(0, 500))
def test_mixture_deals_by_weight_and_visits_every_row_equally(seed, first):
    rows = mixture(seed).at(np.arange(first * ROUND, (first + 1) * ROUND))
    counts = np.bincount(rows, minlength=57)
    assert counts[:50].sum() == ROUND * 3 // 4
    assert np.ptp(counts[:50]) <= 2  # a round begins and ends within an epoch
    assert np.ptp(counts[50:]) <= 2


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9))
def test_deal(weights):
    counts = deal(weights)
    assert counts.sum() == ROUND
    assert np.abs(counts - np.array(weights) / sum(weights) * ROUND).max() < 1


def test_mixture_of_one_is_its_part():
    alone = Stream(50, seed=1, fingerprint="a")
    places = np.arange(3 * ROUND)
    np.testing.assert_array_equal(MixedStream([alone], [0.3], [0], seed=1).at(places), alone.at(places))


def test_mixture_on_ranks_and_after_a_resume():
    whole = Sampler(mixture(), 16).rows(1000)
    for world_size in (2, 4):
        parts = [Sampler(mixture(), 16).rows(1000, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    used = Sampler(mixture(), 16)
    for step in range(990, 1000):
        used.rows(step)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(used)).rows(1000), whole)
    assert not np.array_equal(Sampler(mixture(seed=2), 16).rows(1000), whole)


@pytest.mark.parametrize("weights", [(1, 0), (1, -1), (1, float("nan")), (1, 1e-6)])
def test_bad_weights(weights):
    with pytest.raises(ConfigError, match="weights above 0"):
        mixture(weights=weights)


# Split ----------------------------------------------------------------------------------------------------


def test_split_holds_out_whole_episodes(dataset):
    train, held_out = split_episodes(dataset, holdout=0.4, seed=3)
    np.testing.assert_array_equal(np.sort(np.r_[train, held_out]), np.arange(50))
    parts = [set(dataset.episode_of(rows).tolist()) for rows in (train, held_out)]
    assert not parts[0] & parts[1]
    assert [len(part) for part in parts] == [3, 2]
    np.testing.assert_array_equal(split_episodes(dataset, holdout=0.4, seed=3)[0], train)
    assert any(not np.array_equal(split_episodes(dataset, holdout=0.4, seed=seed)[0], train) for seed in range(9))


def test_larger_split_contains_the_smaller(dataset):
    smaller, larger = (split_episodes(dataset, holdout=share, seed=0)[1] for share in (0.2, 0.6))
    assert set(smaller.tolist()) < set(larger.tolist())


def test_split_edges(dataset):
    train, held_out = split_episodes(dataset, holdout=0, seed=0)
    assert (len(train), len(held_out)) == (50, 0)
    assert len(split_episodes(dataset, holdout=0.01, seed=0)[1]) > 0
    for share in (0.95, 1.0, -0.1):
        with pytest.raises(ConfigError, match=rf"(?s){share} of 5 episodes.*--data.holdout"):
            split_episodes(dataset, holdout=share, seed=0)
