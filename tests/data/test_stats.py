import json
from dataclasses import replace

import numpy as np
import pytest

from manipi.data.dataset import open_dataset
from manipi.data.split import split_episodes
from manipi.data.stats import compute_norm_stats, field_stats, read_state, suspicious_dimensions
from manipi.errors import NormStatsError
from manipi.robots import Gripper, Joints, State
from manipi.robots.tabletop import TABLETOP
from manipi.train.data import prepare
from manipi.transforms.normalize import load_norm_stats
from manipi.transforms.pipeline import contract
from manipi.types import FieldStats, NormStats

HORIZON = 4


@pytest.fixture(scope="module")
def toy(toy_dataset):
    return open_dataset(toy_dataset)


def planted(episodes: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """State rows and relative action rows, written out loop by loop: no step beyond the end of an episode counts."""
    states, actions = [], []
    for episode in episodes:
        length = len(episode["actions"])
        for t in range(length):
            state = episode["observation/state"][t]
            states.append(state)
            for step in range(t, min(t + HORIZON, length)):
                position, gripper = episode["actions"][step, :3] - state[:3], 1 - episode["actions"][step, 3:]
                actions.append(np.concatenate([position, gripper]))
    return np.array(states, np.float64), np.array(actions, np.float64)


def compare(found: FieldStats, values: np.ndarray) -> None:
    expected = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
    expected |= {"q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0)}
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6, atol=1e-8, err_msg=name)


def test_exact_on_the_planted_dataset(toy, toy_episodes):
    stats = compute_norm_stats(toy, TABLETOP, HORIZON, np.arange(toy.num_frames))
    states, actions = planted(toy_episodes)
    compare(stats.state, states)
    compare(stats.actions, actions)
    assert len(actions) < HORIZON * len(states)
    assert stats.num_frames == toy.num_frames == 65
    assert stats.contract == contract(TABLETOP, HORIZON)
    assert stats.data == toy.fingerprint


def test_only_the_rows_asked_for_count(toy, toy_episodes):
    train, held_out = split_episodes(toy, holdout=0.25, seed=0)
    kept = [e for i, e in enumerate(toy_episodes) if toy.starts[i] in set(train.tolist())]
    assert len(kept) == 6
    stats = compute_norm_stats(toy, TABLETOP, HORIZON, train)
    compare(stats.actions, planted(kept)[1])
    assert stats.num_frames == len(train) == toy.num_frames - len(held_out)


def test_statistics_are_of_the_converted_state(toy, toy_episodes):
    """A joint that the model counts the other way: the mean changes its sign, and the quantiles change places."""
    arm = replace(TABLETOP, actions=(Joints(3, relative=True, signs=(1, -1, 1)), Gripper(open=1.0, closed=0.0)))
    stats = compute_norm_stats(toy, arm, HORIZON, np.arange(toy.num_frames))
    states, actions = planted(toy_episodes)
    compare(stats.state, states * [1, -1, 1, 1])
    compare(stats.actions, actions * [1, -1, 1, 1])


def test_blocks_do_not_show(toy, monkeypatch):
    whole = compute_norm_stats(toy, TABLETOP, HORIZON, np.arange(toy.num_frames))
    monkeypatch.setattr("manipi.data.stats.BLOCK", 7)
    blocks = compute_norm_stats(toy, TABLETOP, HORIZON, np.arange(toy.num_frames))
    for name in ("mean", "std", "q01", "q99", "min", "max"):
        np.testing.assert_array_equal(getattr(blocks.actions, name), getattr(whole.actions, name))


def test_a_robot_without_state(toy):
    blind = replace(TABLETOP, state=(), actions=(Gripper(), Gripper(), Gripper(), Gripper()))
    assert read_state(toy, blind).shape == (65, 0)
    stats = compute_norm_stats(toy, blind, 1, np.arange(65))
    assert stats.state.mean.shape == (0,)


def test_suspicious_dimensions():
    values = np.stack([np.full(200, 2.0), np.linspace(0, 1e-5, 200), np.linspace(-1, 1, 200)], axis=1)
    values[0, 1] = 3.0  # an outlier moves, but not the quantiles
    field = field_stats(values)
    notes = suspicious_dimensions(NormStats(state=field, actions=field, num_frames=200, contract="", data=""))
    assert notes[0] == "state[0] never moves: q01 2, q99 2"
    assert notes[1].startswith("state[1] hardly moves: q01 ")
    assert [note.split()[0] for note in notes] == ["state[0]", "state[1]", "actions[0]", "actions[1]"]


# ---- the file in a run's folder


def test_the_file_is_reused_and_has_openpis_layout(tiny, tmp_path):
    first = prepare(tiny(), tmp_path).stats["tabletop"]
    path = tmp_path / "norm_stats.json"
    assert json.loads(path.read_text())["norm_stats"]["state"].keys() == {"mean", "std", "q01", "q99"}
    before = path.stat().st_mtime_ns
    again = prepare(tiny(), tmp_path).stats["tabletop"]
    assert path.stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.actions.mean, first.actions.mean)
    assert load_norm_stats(path).num_frames == first.num_frames


def spoil(path, **changes):
    data = json.loads(path.read_text())
    data["manipi"] |= changes
    path.write_text(json.dumps(data))


def test_statistics_of_another_dataset(tiny, tmp_path):
    prepare(tiny(), tmp_path)
    path = tmp_path / "norm_stats.json"
    spoil(path, data="0123456789abcdef")
    with pytest.raises(NormStatsError, match=r"an older state of them \(0123456789ab\)") as error:
        prepare(tiny(), tmp_path)
    assert error.value.where == str(path)
    assert error.value.next.startswith(f"delete {path}")


def test_statistics_of_another_robot_or_horizon(tiny, tmp_path):
    prepare(tiny(), tmp_path)
    config = tiny()
    longer = replace(config, model=replace(config.model, action_horizon=5))
    with pytest.raises(NormStatsError, match="4 state and 4 action dimensions, horizon 5"):
        prepare(longer, tmp_path)
    other = replace(config, robot=replace(TABLETOP, state=(State("observation/state", 4, unit="mm"),)))
    with pytest.raises(NormStatsError, match="robot 'tabletop'"):
        prepare(other, tmp_path)
