"""A broken episode stops a run, which leaves it out only when told to, and says so."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manipi.errors import BadValueError, ConfigError
from manipi.train.data import prepare


@pytest.fixture
def broken(toy_dataset, tmp_path):
    """The toy dataset with a NaN in the state of episode 3, frame 1."""
    root = shutil.copytree(toy_dataset, tmp_path / "broken")
    [path] = root.glob("data/**/*.parquet")
    table = pq.read_table(path)
    row = int(np.flatnonzero(table["episode_index"].to_numpy() == 3)[1])
    state = np.stack(table["observation/state"].to_pylist()).astype(np.float32)
    state[row, 2] = np.nan
    place = table.schema.get_field_index("observation/state")
    column = pa.FixedSizeListArray.from_arrays(pa.array(state.ravel()), 4)
    pq.write_table(table.set_column(place, table.schema.field(place), column), path)
    return root


@pytest.fixture
def on(tiny):
    def on(root, **settings):
        config = tiny()
        return replace(config, data=replace(config.data, path=str(root), **settings))

    return on


def test_it_stops_the_run(on, broken, tmp_path):
    with pytest.raises(BadValueError, match=r"episode 3, frame 1"):
        prepare(on(broken), tmp_path / "run")


def test_it_is_left_out_when_told_to(on, broken, tmp_path, capsys):
    data = prepare(on(broken, skip_bad_episodes=True), tmp_path / "run")
    assert [e.index for e in data.main.source.dataset.episodes] == [0, 1, 2, 4, 5, 6, 7]
    said = capsys.readouterr()
    assert "left out  broken, episode 3: " in said.out + said.err
    assert "frame 1" in said.out + said.err
    assert np.isfinite(data.stats["tabletop"].state.mean).all()


def test_sound_data_are_the_same_with_and_without(on, toy_dataset, tmp_path):
    with_check = prepare(on(toy_dataset, skip_bad_episodes=True), tmp_path / "a").main
    without = prepare(on(toy_dataset), tmp_path / "b").main
    assert with_check.source.dataset.fingerprint == without.source.dataset.fingerprint
    np.testing.assert_array_equal(with_check.rows, without.rows)


def test_nothing_sound_is_left(on, broken, tmp_path):
    with pytest.raises(ConfigError, match="no sound episode"):
        prepare(on(broken, skip_bad_episodes=True, episodes=(3,)), tmp_path / "run")


def test_dimensions_that_never_move_are_named(on, toy_dataset, tmp_path, capsys):
    root = shutil.copytree(toy_dataset, tmp_path / "still")
    [path] = root.glob("data/**/*.parquet")
    table = pq.read_table(path)
    actions = np.stack(table["actions"].to_pylist()).astype(np.float32)
    actions[:, 3] = 1.0
    place = table.schema.get_field_index("actions")
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), 4)
    pq.write_table(table.set_column(place, table.schema.field(place), column), path)
    prepare(on(root), tmp_path / "run")
    said = capsys.readouterr()
    assert "norm stats of tabletop: actions[3] never moves" in said.out + said.err
