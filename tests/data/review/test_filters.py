"""Masks: what each rule leaves out, the file, and that training sees only what it keeps."""

import json
from dataclasses import replace

import numpy as np
import pytest

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.data.review.filters import Rules, filter_dataset, guess_keys, mask_of, preview, read_mask
from manipi.errors import ConfigError, DatasetFormatError, MissingFeatureError
from manipi.train.data import prepare

FPS, LENGTHS, REST = 10, (30, 20, 25), slice(8, 18)


@pytest.fixture(scope="module")
def paused(tmp_path_factory):
    """Three episodes of steady movement; the first rests in steps 8 to 17, and the second never succeeds.

    The rest begins and ends with a step, and what stands on both sides of a step is no pause.
    """
    vector = Feature(kind="vector", shape=(1,), dtype="float32")
    root = tmp_path_factory.mktemp("paused") / "dataset"
    features = {"observation.state": vector, "action": vector, "next.success": vector}
    with LeRobotWriter(root, fps=FPS, features=features, robot_type="arm") as writer:
        for number, length in enumerate(LENGTHS):
            step = np.arange(length, dtype=np.float32)[:, None]
            position = step + 0.01 * step**2  # ever faster: the smallest step could be that of the encoder
            if number == 0:
                position[REST] = position[REST.start]
            success = (np.arange(length)[:, None] == length - 1) & (number != 1)
            episode = {"observation.state": position, "action": position, "next.success": success.astype(np.float32)}
            writer.add_episode(episode, task="move")
    return open_dataset(root)


def apply(dataset, **rules):
    return filter_dataset(dataset, Rules(**rules), state_keys=("observation.state",), action_key="action")


@pytest.mark.parametrize(
    ("rules", "left_out"),
    [
        ({"idle": 0.5}, range(9, 17)),
        ({"idle": 2.0}, ()),
        ({"trim_start": 0.2}, (0, 1, 30, 31, 50, 51)),
        ({"trim_end": 0.3}, (27, 28, 29, 47, 48, 49, 72, 73, 74)),
        ({"success": "next.success"}, range(30, 50)),
        ({"without": (2,)}, range(50, 75)),
        ({"without": (2,), "idle": 0.5}, (*range(9, 17), *range(50, 75))),
    ],
)
def test_rules(paused, rules, left_out):
    mask, keep, effects = apply(paused, **rules)
    assert np.flatnonzero(~keep).tolist() == list(left_out)
    assert len(effects) == len(mask.rules) == len(rules)
    assert sum(e.frames for e in effects) == len(left_out)


def test_droids_rule_reads_the_feature_that_it_is_given(paused):
    # Positions that change at every step but in the pause of ten: two ranges, each cut by ten steps.
    _, keep, _ = apply(paused, droid_idle="action")
    assert np.flatnonzero(~keep)[:2].tolist() == [0, 1]  # a movement of 9 steps is too short to be kept
    assert keep.sum() < paused.num_frames
    with pytest.raises(MissingFeatureError, match="joint_velocity"):
        apply(paused, droid_idle="joint_velocity")


@pytest.mark.parametrize("rules", [{}, {"trim_start": 99.0}])
def test_rules_that_leave_nothing(paused, rules):
    with pytest.raises(ConfigError, match="rules that keep some frames"):
        apply(paused, **rules)


def test_unknown_episode(paused):
    with pytest.raises(ConfigError, match=r"(?s)episodes from 0 to 2.*\[7\]"):
        apply(paused, without=(7,))


def test_preview_shows_what_is_left_out(paused):
    _, keep, _ = apply(paused, idle=0.5)
    lines = preview(paused, keep, width=30).splitlines()
    assert lines[1].split()[1] == "█" * 9 + "░" * 8 + "█" * 13
    assert lines[1].endswith("73% of 30")
    assert lines[2].split()[1] == "█" * 20


def test_keys_by_their_names(paused, shared_datasets):
    assert guess_keys(paused) == (("observation.state",), "action")
    assert guess_keys(open_dataset(shared_datasets / "open50_lerobot_v3")) == (("state",), "actions")


def test_a_constant_velocity_is_no_pause(tmp_path):
    """Commands that are rates move the robot while they stay the same, whatever is observed."""
    features = {"action.velocity": Feature(kind="vector", shape=(1,), dtype="float32")}
    speed = np.repeat([0.0, 1.0, 0.5], 20).astype(np.float32)[:, None]
    with LeRobotWriter(tmp_path / "set", fps=FPS, features=features, robot_type="arm") as writer:
        writer.add_episode({"action.velocity": speed}, task="go")
    dataset = open_dataset(tmp_path / "set")
    _, keep, _ = filter_dataset(dataset, Rules(idle=0.5), state_keys=(), action_key="action.velocity")
    assert keep.sum() == 41  # all but the standstill, whose last frame stays because a step follows


def test_a_file_that_is_no_object(paused, tmp_path):
    (tmp_path / "keep.json").write_text("[1, 2]")
    with pytest.raises(DatasetFormatError, match="a JSON list"):
        read_mask(tmp_path / "keep.json", paused)


# ---- the file


def test_the_file_gives_back_the_rows(paused, tmp_path):
    mask, keep, _ = apply(paused, idle=0.5, without=(1,))
    mask.save(tmp_path / "keep.json")
    np.testing.assert_array_equal(read_mask(tmp_path / "keep.json", paused), keep)
    assert json.loads((tmp_path / "keep.json").read_text())["keep"]["0"] == [[0, 9], [17, 30]]


def test_openpis_file(paused, tmp_path):
    """Ranges by episode key; what lies beyond an episode keeps nothing, and episodes not listed are left out."""
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps({"0": [[2, 5], [28, 40]], "not here": [[0, 9]]}))
    assert np.flatnonzero(read_mask(path, paused)).tolist() == [2, 3, 4, 28, 29]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "0" * 64}, "(?s)a mask of this dataset.*000000000000.*manipi filter"),
        ({"keep": {"0": [[0, 31]]}}, "(?s)within the 30 frames.*0 to 31.*episode 0"),
        ({"keep": {"9": [[0, 3]]}}, "(?s)ranges of episodes such as '0'.*'9'"),
        ({"kept": {}}, "unexpected"),
    ],
)
def test_a_file_that_does_not_fit(paused, tmp_path, change, message):
    mask, _, _ = apply(paused, idle=0.5)
    mask.save(tmp_path / "keep.json")
    data = json.loads((tmp_path / "keep.json").read_text()) | change
    (tmp_path / "keep.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        read_mask(tmp_path / "keep.json", paused)


def test_training_sees_only_what_is_kept(tiny, toy_dataset, tmp_path):
    dataset = open_dataset(toy_dataset)
    keep = np.arange(dataset.num_frames) % 3 > 0
    mask_of(dataset, keep, ("a test",)).save(tmp_path / "keep.json")
    config = tiny()
    config = replace(config, data=replace(config.data, keep=str(tmp_path / "keep.json")))
    data = prepare(config, tmp_path / "run")
    whole = prepare(tiny(), tmp_path / "whole").main
    np.testing.assert_array_equal(data.main.rows, whole.rows[keep[whole.rows]])
    np.testing.assert_array_equal(data.main.held_out, whole.held_out[keep[whole.held_out]])
    [share] = data.report()
    assert (share.frames, share.held_out) == (len(data.main.rows), len(data.main.held_out))
    assert share.left_out == int((~keep).sum())
    assert data.stats["tabletop"].num_frames == len(data.main.rows)
