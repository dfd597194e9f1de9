import numpy as np
import pytest

from manipi_client import ActionChunkError
from manipi_client.broker import Chunk, ChunkQueue, read_chunk
from manipi_client.realtime import MotionMeter


def chunk(first, *values):
    return Chunk(np.array(values, float)[:, None], first, step=first, observed_at=0.0)


def test_the_newest_chunk_is_executed_by_its_own_clock():
    queue = ChunkQueue()
    queue.chunks.append(chunk(10, 0, 1, 2, 3))
    assert queue.action(11) == 1
    queue.chunks.append(chunk(12, 20, 21, 22, 23))
    assert [queue.action(step) for step in (13, 14, 15)] == [21, 22, 23]
    assert queue.action(16) is None
    assert queue.newest is None


def test_a_chunk_that_comes_too_late_is_never_executed():
    queue = ChunkQueue()
    queue.chunks.append(chunk(0, 1, 2))
    assert queue.action(5) is None


def test_what_is_left_of_the_newest_chunk():
    queue = ChunkQueue()
    assert queue.left(0).shape == (0, 0)
    queue.chunks.append(chunk(4, 0, 1, 2))
    assert queue.left(5).tolist() == [[1], [2]]
    assert queue.left(9).shape == (0, 1)


def test_an_ensemble_weighs_the_oldest_most():
    """Chunks of steps 0, 1, 2 that say 0, 1, 2 throughout; at step 2 the weights are 1, e^-1, e^-2."""
    queue = ChunkQueue(ensemble=1.0)
    for first in range(3):
        queue.chunks.append(chunk(first, *[first] * 4))
    weights = np.exp([0.0, -1.0, -2.0])
    np.testing.assert_allclose(queue.action(2), [weights @ [0, 1, 2] / weights.sum()])
    np.testing.assert_allclose(queue.action(5), [2.0])


@pytest.mark.parametrize("answer", [{}, {"actions": 3.0}, {"actions": np.zeros((2, 7))}])
def test_a_chunk_that_is_too_short(answer):
    with pytest.raises(ActionChunkError, match="at least 3 steps"):
        read_chunk(answer, 3)


def test_motion_by_hand():
    """Commands 0 1 2 | 6 7 of two chunks, then a held 7 and another chunk's 9: seams of 4 and 2."""
    meter = MotionMeter()
    for value, source, age in ((0, 1, 0.1), (1, 1, 0.2), (2, 1, 0.3), (6, 2, 0.2), (7, 2, 0.3)):
        meter.add(np.array([value]), source, age)
    meter.add(np.array([7]), None)
    meter.add(np.array([9]), 3)
    motion = meter.read()
    assert (motion.steps, motion.starved_steps, motion.seams) == (7, 1, 2)
    assert motion.seam_jump == 4
    assert motion.seam_change == 3
    assert motion.step_change == 1
    # Third differences of 0 1 2 6, 1 2 6 7, 2 6 7 7 and 6 7 7 9.
    assert motion.jerk == pytest.approx((3 + 6 + 2 + 3) / 4)
    assert motion.reaction_s == pytest.approx(0.22)
    assert motion.reaction_max_s == 0.3


def test_motion_does_not_join_episodes():
    meter = MotionMeter()
    meter.add(np.array([0.0]), 1)
    meter.begin_episode()
    meter.add(np.array([100.0]), 1)
    motion = meter.read()
    assert motion.seams == 0
    assert np.isnan(motion.step_change)
    assert np.isnan(motion.reaction_s)
