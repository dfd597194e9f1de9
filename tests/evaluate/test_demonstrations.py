"""Demonstrations of a suite's expert: kept through a kill, of one suite, by one process at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.evaluate.test_evaluation import SUITE

from manipi.cli import main
from manipi.data.open import open_dataset
from manipi.errors import ConfigError, SimulatorError, StorageError
from manipi.evaluate.demonstrations import record_demonstrations
from manipi.robots import Gripper, Joints, Robot, State
from manipi.storage import Lock

ROBOT = Robot(
    name="line",
    cameras={"base": "image"},
    state=(State("state", 1),),
    actions=(Joints(1), Gripper(open=0.0, closed=1.0)),
    control_hz=10.0,
)


def record(target: Path, episodes: int = 3, **changes):
    return record_demonstrations(replace(SUITE, **changes), ROBOT, target, episodes=episodes)


def test_episodes_of_a_command_that_ended_are_gone_on_with(tmp_path):
    (tmp_path / "raise_at_step").touch()
    with pytest.raises(SimulatorError, match="the motor burnt"):
        record(tmp_path / "data", options={"folder": str(tmp_path)})
    with pytest.raises(ConfigError, match="an earlier command left"):
        record(tmp_path / "data", tasks=("other",))
    kept, made = record(tmp_path / "data", options={"folder": str(tmp_path)})
    assert (kept, made) == (3, 3)
    assert len(open_dataset(tmp_path / "data").episodes) == 3
    assert not (tmp_path / ".data.episodes").exists()


def test_one_command_at_a_time(tmp_path):
    (tmp_path / ".data.episodes").mkdir()
    with Lock(tmp_path / ".data.episodes" / ".lock"), pytest.raises(StorageError, match="one process at a time"):
        record(tmp_path / "data")


@pytest.mark.parametrize("flags", ["--episodes 0", "--workers 0", "--noise -1", "--noise nan"])
def test_numbers_that_cannot_be(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["demonstrate", "tabletop/reach", str(tmp_path / "data"), "--robot", "tabletop", *flags.split()])
    said = capsys.readouterr().err
    assert "ConfigError" in said
    assert flags.split()[0] in said
