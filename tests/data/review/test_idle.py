"""Pauses: openpi's rule on sequences whose ranges are worked out by hand, and the rule for any robot."""

import numpy as np
import pytest

from manipi.data.review.filters import droid_keep_ranges, idle_frames


def velocities(*parts):
    """A joint velocity [T, 7] that changes (`("move", n)`) or is held (`("hold", n)`) for n steps."""
    rng, rows = np.random.default_rng(0), [np.zeros(7)]
    for kind, steps in parts:
        rows += [rng.uniform(1, 2, 7) if kind == "move" else rows[-1] for _ in range(steps)]
    return np.array(rows[1:])


@pytest.mark.parametrize(
    ("parts", "ranges"),
    [
        ([("move", 40)], [(0, 30)]),
        # A pause of six steps is kept, one of seven is not.
        ([("move", 20), ("hold", 6), ("move", 20)], [(0, 36)]),
        ([("move", 20), ("hold", 7), ("move", 20)], [(0, 10), (27, 37)]),
        # A movement of sixteen steps is kept but for its last ten, one of fifteen is not.
        ([("move", 16), ("hold", 7), ("move", 15)], [(0, 6)]),
        # The first step is never still, so that a pause from the start begins at step 1.
        ([("hold", 30), ("move", 16)], [(30, 36)]),
        ([("hold", 50)], []),
        ([("move", 15)], []),
        ([], []),
    ],
)
def test_droid(parts, ranges):
    assert droid_keep_ranges(velocities(*parts).reshape(-1, 7)) == ranges


def test_droid_asks_every_joint_for_a_change_of_a_thousandth():
    held = np.zeros((40, 7))
    held[10:, 6] = np.arange(1, 31) * 0.00099
    assert droid_keep_ranges(held) == []
    held[10:, 6] = np.arange(1, 31) * 0.00101
    assert droid_keep_ranges(held) == [(10, 30)]


def moving(length, seed=0):
    t = np.arange(length) / 10
    return np.stack([np.sin(2 * t + seed), np.cos(3 * t)], axis=1)


def test_a_held_position_of_half_a_second():
    """At 10 Hz a window is six frames; five are too few. Those beside the steps into and out of it do not count."""
    for held, expected in ((6, range(21, 25)), (5, ())):
        state = np.concatenate([moving(20), np.repeat([[5.0, 5.0]], held, axis=0), moving(20)])
        assert np.flatnonzero(idle_frames(state, state, fps=10)).tolist() == list(expected)


def test_state_and_action_must_both_rest():
    state, action = moving(60), moving(60)
    state[20:40], action[25:45] = 0, 0
    assert np.flatnonzero(idle_frames(state, action, fps=10)).tolist() == list(range(26, 39))


def test_slow_drift_moves_and_noise_below_the_share_does_not():
    state = np.concatenate([moving(40), np.repeat(moving(40)[-1:], 40, axis=0)])
    noisy, drifting = state.copy(), state.copy()
    noisy[40:, 0] += 0.015 * np.tile([1, -1], 20)  # two of a range of two, peak to peak, are 1.5 %
    drifting[40:, 0] += 0.01 * np.arange(40)  # 2.5 % in six frames
    assert idle_frames(noisy, noisy, fps=10)[41:].all()
    assert not idle_frames(drifting, drifting, fps=10)[45:].any()


def test_a_constant_rate_moves_where_it_is_said_to_be_one():
    state = np.zeros((60, 0))
    velocity = moving(60)
    velocity[20:30], velocity[40:50] = 0.7, 0.001
    rates = np.array([True, True])
    assert np.flatnonzero(idle_frames(state, velocity, fps=10)).tolist() == [*range(21, 29), *range(41, 49)]
    assert np.flatnonzero(idle_frames(state, velocity, fps=10, rates_A=rates)).tolist() == list(range(41, 49))


def test_one_step_of_an_encoder_is_no_movement_and_a_gripper_that_snaps_is():
    arm = np.round(moving(80) * 10) / 10  # steps of 0.1 on a range of 2
    arm[30:60, 0], arm[30:60, 1] = np.where(np.arange(30) % 2, 0.5, 0.6), 0.0
    assert idle_frames(arm, arm, fps=10)[31:59].all()
    gripper = np.concatenate([arm, (np.arange(80) >= 45)[:, None]], axis=1)
    assert not idle_frames(gripper, gripper, fps=10)[44:46].any()
    assert idle_frames(gripper, gripper, fps=10)[32:44].all()


def test_windows_stay_within_their_episode():
    state = np.concatenate([moving(30), moving(30)])
    state[26:34] = 0
    assert np.flatnonzero(idle_frames(state, state, fps=10)).tolist() == list(range(27, 33))
    assert not idle_frames(state, state, fps=10, starts=[0, 30]).any()


def test_what_never_moves_is_not_asked():
    state = np.concatenate(
        [moving(60), np.full((60, 1), 3.0) + 1e-6 * np.random.default_rng(0).random((60, 1))], axis=1
    )
    state[20:40, :2] = 0
    assert np.flatnonzero(idle_frames(state, state, fps=10)).tolist() == list(range(21, 39))
    assert idle_frames(np.zeros((0, 2)), np.zeros((0, 2)), fps=10).shape == (0,)
