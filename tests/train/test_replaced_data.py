"""Data that change between two calls of `manipi train`: noticed, or trained on anew; never half and half."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.errors import NormStatsError, TrainingError
from manipi.train.data import prepare
from manipi.train.loop import train

CAMERA = "observation/image"


@pytest.fixture(scope="module")
def negatives(toy_dataset, toy_episodes, tmp_path_factory):
    """The toy dataset's videos with every colour turned round, by their path in it: as long, with the same tables."""
    root = tmp_path_factory.mktemp("negatives") / "dataset"
    features = {CAMERA: Feature(kind="image", shape=toy_episodes[0][CAMERA].shape[1:], dtype="video")}
    features["actions"] = Feature(kind="vector", shape=(4,), dtype="float32")
    with LeRobotWriter(root, fps=10, features=features, robot_type="x", pix_fmt="yuv444p") as writer:
        for episode in toy_episodes:
            writer.add_episode({CAMERA: 255 - episode[CAMERA], "actions": episode["actions"]}, task="reach it")
    videos = {str(path.relative_to(root)): path for path in root.rglob("*.mp4")}
    assert videos.keys() == {str(path.relative_to(toy_dataset)) for path in toy_dataset.rglob("*.mp4")}
    return videos


def exchange(root, videos):
    for name, path in videos.items():
        shutil.copyfile(path, root / name)


@pytest.fixture
def config(toy_dataset, tiny, tmp_path):
    """Of a run on a copy of the toy dataset, which may be changed."""
    root = shutil.copytree(toy_dataset, tmp_path / "dataset")
    config = tiny(steps=4)
    return replace(config, data=replace(config.data, path=str(root), cache="raw"))


def weights(checkpoint):
    return {name: value.numpy() for name, value in load_file(checkpoint / "model.safetensors").items()}


def require_same(checkpoint, other):
    mine, theirs = weights(checkpoint), weights(other)
    assert [name for name in mine if not np.array_equal(mine[name], theirs[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    return train(tiny(steps=4), tmp_path_factory.mktemp("undisturbed") / "run", show=False)


def test_a_run_does_not_go_on_with_other_videos(config, toy_dataset, negatives, undisturbed, tmp_path):
    root, run = Path(config.data.path), tmp_path / "run"
    train(config, run, stop_at=2, show=False)
    exchange(root, negatives)
    assert open_dataset(root).fingerprint == open_dataset(toy_dataset).fingerprint  # which orders the rows
    with pytest.raises(TrainingError, match=r"(?s)1 others of the same names: videos/observation/image/.*--run-dir"):
        train(config, run, show=False)
    for path in toy_dataset.rglob("*.mp4"):  # put back, with another time stamp
        shutil.copyfile(path, root / path.relative_to(toy_dataset))
    require_same(train(config, run, show=False), undisturbed)


def test_a_run_of_before_is_told_once(config, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    train(config, run, stop_at=2, show=False)
    (run / "videos.json").unlink()
    for path in (run / "cache").rglob("videos.json"):
        path.unlink()
    capsys.readouterr()
    train(config, run, stop_at=3, show=False)
    assert "did not say yet which videos" in "".join(capsys.readouterr())
    require_same(train(config, run, show=False), undisturbed)
    assert "did not say yet" not in "".join(capsys.readouterr())


def test_before_the_first_checkpoint_other_videos_are_taken(config, negatives, tmp_path):
    """And of those that the cache had of the first ones, none is seen again."""
    rows = np.arange(40)
    first = prepare(config, tmp_path / "run").mixture.samples(rows)
    exchange(Path(config.data.path), negatives)
    seen = prepare(config, tmp_path / "run").mixture.samples(rows)
    plain = replace(config, data=replace(config.data, cache="none"))
    expected = prepare(plain, tmp_path / "other").mixture.samples(rows)
    for old, one, other in zip(first, seen, expected, strict=True):
        np.testing.assert_array_equal(one["images"], other["images"])
        assert not np.array_equal(one["images"], old["images"])


def change_an_action(root):
    path = next(root.glob("data/**/*.parquet"))
    table = pq.read_table(path)
    state = table["observation/state"].combine_chunks()
    doubled = pa.FixedSizeListArray.from_arrays(pc.multiply(state.flatten(), pa.scalar(2, pa.float32())), 4)
    place = table.schema.get_field_index("observation/state")
    pq.write_table(table.set_column(place, table.schema.field(place), doubled), path)


@pytest.mark.parametrize("trained", [False, True])
def test_the_advice_where_the_numbers_are_others(config, tmp_path, trained):
    """To compute statistics anew is advice where nothing was trained with the old ones."""
    run = tmp_path / "run"
    train(config, run, stop_at=2, show=False) if trained else prepare(config, run)
    change_an_action(Path(config.data.path))
    with pytest.raises(NormStatsError, match="statistics of others") as error:
        train(config, run, show=False)
    assert ("delete" in error.value.next) == (not trained)
    (run / "norm_stats.json").unlink()
    if not trained:
        train(config, run, stop_at=2, show=False)
        return
    with pytest.raises(NormStatsError, match=r"a checkpoint of step 2") as error:
        train(config, run, show=False)
    source, target = error.value.next.removeprefix("cp ").split()
    shutil.copyfile(source, target)
    with pytest.raises(NormStatsError, match="statistics of others"):
        train(config, run, show=False)


def test_statistics_that_were_lost_come_from_the_checkpoint(config, undisturbed, tmp_path):
    run = tmp_path / "run"
    train(config, run, stop_at=2, show=False)
    (run / "norm_stats.json").unlink()
    with pytest.raises(NormStatsError) as error:
        train(config, run, show=False)
    shutil.copyfile(*error.value.next.removeprefix("cp ").split())
    require_same(train(config, run, show=False), undisturbed)
