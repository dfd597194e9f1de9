"""Open-loop errors against numbers worked out by hand, and the command on a real checkpoint."""

import json
import shutil

import numpy as np
import pytest

from manipi.checkpoints.native import verify
from manipi.cli import main
from manipi.data.action_error import evenly_spaced
from manipi.data.open import open_dataset
from manipi.errors import ConfigError, MissingFeatureError
from manipi.evaluate.open_loop import Predictions, new_split, open_split, predict, score
from manipi.policy import Policy
from manipi.train.data import prepare
from manipi.train.run.folder import read_config

HOLD, MEAN, NEAREST = "holding position", "the mean action", "the nearest neighbour"
STEPS = 0.1 * np.arange(1, 5)


@pytest.fixture(scope="module")
def policy(checkpoint):
    return Policy.load(checkpoint)


@pytest.fixture(scope="module")
def split(checkpoint, policy):
    return open_split(checkpoint, policy, None)


@pytest.fixture(scope="module")
def predictions(policy, split):
    """At all frames of the two held-out episodes."""
    return predict(policy, split.dataset, split.held_out_rows, split.train_rows, show=False)


def test_split_is_that_of_the_training(checkpoint, split, tmp_path):
    trained = prepare(read_config(checkpoint.parents[1]), tmp_path)
    np.testing.assert_array_equal(split.held_out_rows, trained.main.held_out)
    np.testing.assert_array_equal(split.train_rows, trained.main.rows)
    assert len(split.held_out_rows) == 24


def test_holding_position(predictions):
    """The joint stays at the state; the gripper stays as commanded the frame before."""
    t = predictions.rows % 12
    error = np.abs(predictions.chunks[HOLD] - predictions.recorded)
    for i in np.flatnonzero(t > 0):
        valid = predictions.valid[i]
        np.testing.assert_allclose(error[i, valid, 0], STEPS[valid], atol=1e-6)
        np.testing.assert_array_equal(predictions.chunks[HOLD][i, :, 1], 2.0 * (t[i] > 6))


def test_before_the_first_command_the_gripper_holds_the_mean(predictions):
    first = predictions.chunks[HOLD][predictions.rows % 12 == 0]
    np.testing.assert_allclose(first[..., 1], 1.0)
    np.testing.assert_allclose(first[..., 0], [[0.01 * e] * 4 for e in predictions.rows[::12] // 12], atol=1e-6)


def test_mean_action(predictions, split):
    commands = split.dataset.column("actions")[split.train_rows]
    np.testing.assert_allclose(predictions.chunks[MEAN] - commands.mean(axis=0), 0, atol=1e-6)


def test_nearest_neighbour_is_exact_where_only_the_start_differs(predictions):
    error = np.abs(predictions.chunks[NEAREST] - predictions.recorded)[predictions.valid]
    np.testing.assert_allclose(error, 0, atol=1e-6)


def test_no_neighbour_among_themselves(policy, split):
    found = predict(policy, split.dataset, split.train_rows[:2], split.train_rows, show=False)
    assert set(found.chunks) == {"policy", HOLD, MEAN}


def test_policy_answers_as_it_is_served(policy, split, predictions):
    observation = {
        "image": split.dataset.images("image", predictions.rows[:1])[0],
        "state": split.dataset.column("state")[predictions.rows[0]],
        "prompt": "go",
    }
    policy.reset()
    np.testing.assert_array_equal(predictions.chunks["policy"][0], policy.infer(observation)["actions"])


def test_errors_by_hand(split, policy):
    """Two frames of four steps, the last of them invalid; the joint's error is 0.1, the gripper's 1 at one step."""
    recorded = np.zeros((2, 4, 2))
    guess = recorded.copy()
    guess[..., 0] = 0.1
    guess[0, 1, 1] = 1.0
    guess[1, 3] = 1e6
    valid = np.array([[True, True, True, True], [True, True, True, False]])
    rows = split.held_out_rows[[0, 12]]
    result = score(
        Predictions(rows=rows, recorded=recorded, valid=valid, chunks={"policy": guess, HOLD: recorded + 1}),
        split.dataset,
        policy.robot,
        split.train_rows,
    )
    low, high = np.quantile(split.dataset.column("actions")[split.train_rows, 0].astype(float), (0.01, 0.99))
    joint, gripper = 0.1 / (high - low), 1.0 / 2.0
    error = result.errors["policy"]
    np.testing.assert_allclose(result.travel, [high - low, 2.0])
    np.testing.assert_allclose(error.per_dimension, [0.1, 1 / 7])
    np.testing.assert_allclose(error.per_step, np.array([joint, joint + gripper / 2, joint, joint]) / 2)
    np.testing.assert_allclose(error.share_of_travel, (joint + gripper / 7) / 2)
    np.testing.assert_allclose(error.per_step_dimension, [[0.1, 0], [0.1, 0.5], [0.1, 0], [0.1, 0]])
    assert (result.frames, result.episodes, result.dimensions) == (2, 2, ("joint", "gripper"))
    # 1 - 0.0804 / 0.6966, where 1 is 0.8933 of the joint's travel and half of the gripper's.
    assert "beats holding position: its error is 88% lower in the mean, lower in 2 of 2" in result.verdict()


def test_verdict_admits_defeat(split, policy):
    recorded = np.zeros((1, 4, 2))
    valid = np.ones((1, 4), bool)
    chunks = {"policy": recorded + 1, NEAREST: recorded}
    found = Predictions(rows=split.held_out_rows[:1], recorded=recorded, valid=valid, chunks=chunks)
    result = score(found, split.dataset, policy.robot, split.train_rows)
    assert "does NOT beat the nearest neighbour" in result.verdict()
    assert "lower in 0 of 2 dimensions" in result.verdict()


def test_evenly_spaced():
    np.testing.assert_array_equal(evenly_spaced(np.arange(10, 20), 4), [10, 13, 16, 19])
    np.testing.assert_array_equal(evenly_spaced(np.arange(3), 100), [0, 1, 2])


def test_command(checkpoint, tmp_path, capsys):
    main(["eval", str(checkpoint), "--max-frames", "6", "--num-threads", "1", "--json", str(tmp_path / "out.json")])
    shown, data = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "held-out: 6 frames of 2 episodes" in shown
    assert "training: 6 frames of 3 episodes" in shown
    assert "does NOT beat the nearest neighbour" in shown
    assert data["held-out"]["errors"][NEAREST]["share_of_travel"] < 1e-6
    assert len(data["held-out"]["errors"]["policy"]["per_step"]) == 4
    assert (checkpoint.parents[1] / "open_loop_2.png").read_bytes().startswith(b"\x89PNG")
    verify(checkpoint)  # nothing was written into it


def test_apart_from_its_run(checkpoint, planted, tmp_path, capsys):
    apart = shutil.copytree(checkpoint, tmp_path / "policy")
    with pytest.raises(SystemExit):
        main(["eval", str(apart)])
    assert "--data PATH --holdout 0.2" in capsys.readouterr().err
    main(["eval", str(apart), "--data", str(planted), "--holdout", "0.4", "--max-frames", "2", "--holdout-only"])
    shown = capsys.readouterr().out
    assert "may have been trained on any of these" in shown
    assert "no plot" in shown
    assert "training:" not in shown


def test_other_data_are_not_taken_for_held_out(checkpoint, policy, shared_g1):
    with pytest.raises(ConfigError, match="the data that the policy was trained on"):
        open_split(checkpoint, policy, str(shared_g1))
    with pytest.raises(MissingFeatureError, match="image 'image'"):
        new_split(policy, str(shared_g1), holdout=0.5, seed=0)


def test_moved_data_are_the_same_data(checkpoint, policy, planted, tmp_path):
    moved = shutil.copytree(planted, tmp_path / "moved")
    assert open_split(checkpoint, policy, str(moved)).dataset.root == open_dataset(moved).root


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-frames", "0"], "at least one frame"),
        (["--holdout", "0.5"], "add --data"),
    ],
)
def test_flags_that_cannot_be(checkpoint, flags, message, capsys):
    with pytest.raises(SystemExit):
        main(["eval", str(checkpoint), *flags])
    assert message in capsys.readouterr().err
