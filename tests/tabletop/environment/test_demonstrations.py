import numpy as np
import pytest

from manipi.tabletop.environment import Expert, Tabletop, demonstrations, tabletop


@pytest.mark.parametrize(("task", "noise", "needed"), [("reach", 0.0, 25), ("reach", 0.7, 24), ("push", 0.0, 23)])
def test_the_expert_succeeds(run_expert, task, noise, needed):
    env = Tabletop(cameras=(), tasks=(task,), start_noise=1.0)
    assert sum(run_expert(env, seed, noise=noise)["success"] for seed in range(25)) >= needed


def test_the_expert_crosses_over_other_blocks(run_expert):
    env = Tabletop(cameras=())
    blocks = {"red": (0.44, 0.0), "green": (0.34, 0.0), "blue": (0.24, 0.0)}
    info = run_expert(env, 0, options={"target": "red", "blocks": blocks, "tip": (0.18, 0.0, 0.1)})
    assert info["touched"] == "red"


def test_noise_perturbs_what_is_executed_but_not_the_label():
    env = Tabletop(cameras=())
    env.reset(seed=0)
    (clean, same), (label, executed) = (Expert(env, np.random.default_rng(0), noise=n).act() for n in (0.0, 0.7))
    np.testing.assert_array_equal(clean, same)
    np.testing.assert_array_equal(clean, label)
    assert 0 < np.abs(executed - label).max() < 5 * 0.7 * tabletop.MAX_STEP


def test_demonstrations_are_complete_and_repeatable():
    first, again = (list(demonstrations(range(4), image_size=24, cameras=("image", "wrist_image"))) for _ in range(2))
    np.testing.assert_equal(first, again)
    for episode in first:
        steps = len(episode["actions"])
        assert episode["observation/state"].shape == episode["actions"].shape == (steps, 4)
        assert episode["observation/image"].shape == episode["observation/wrist_image"].shape == (steps, 24, 24, 3)
        assert {episode[k].dtype for k in ("actions", "observation/state")} == {np.dtype("float32")}
        # The frames are rendered when they happen: no two consecutive ones of a moving arm are the same picture.
        assert (episode["observation/image"][1:] != episode["observation/image"][:-1]).any(axis=(1, 2, 3)).all()
        np.testing.assert_array_equal(episode["frame_index"], np.arange(steps))
        assert episode["success"]
        assert episode["task"].startswith("reach the ")


def test_kept_frames_keep_their_place():
    [whole] = demonstrations([7], image_size=24, noise_levels=(0.0,))
    [sparse] = demonstrations([7], image_size=24, noise_levels=(0.0,), keep=0.3)
    assert 1 <= len(sparse["frame_index"]) < len(whole["frame_index"])
    np.testing.assert_equal(sparse["observation/image"], whole["observation/image"][sparse["frame_index"]])
    np.testing.assert_equal(sparse["actions"], whole["actions"])
