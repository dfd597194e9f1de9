"""`manipi convert` on the command line."""

import json
import sys

import h5py
import numpy as np
import pytest

from manipi.cli import main
from manipi.convert.command import main as convert_main
from manipi.data.open import open_dataset
from manipi.errors import ConfigError


@pytest.fixture
def recording(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for e in range(2):
        with h5py.File(folder / f"episode_{e}.hdf5", "w") as file:
            file["action"] = file["observations/qpos"] = np.random.default_rng(e).standard_normal((6, 4))
            file["observations/images/top"] = np.full((6, 32, 48, 3), 100, np.uint8)
    return folder


def test_converts(recording, tmp_path, capsys):
    flags = ["--robot-type", "mine", "--resize", "16x24", "--crf", "15", "--fps", "25", "--num-workers", "1"]
    flags += ["--join", "both=action,observation.state", "--json", str(tmp_path / "report.json")]
    main(["convert", str(recording), str(tmp_path / "set"), "--task", "wave", *flags])
    out = capsys.readouterr().out
    assert "episodes  2\nframes    12\n" in out
    assert f"manipi check {tmp_path / 'set'}" in out
    dataset = open_dataset(tmp_path / "set")
    assert dataset.fps == 25
    assert dataset.features["observation.images.top"].shape == (16, 24, 3)
    assert dataset.column("both").shape == (12, 8)
    assert json.loads((tmp_path / "set/meta/info.json").read_text())["robot_type"] == "mine"
    assert json.loads((tmp_path / "report.json").read_text())["num_frames"] == 12


@pytest.mark.parametrize(
    ("flags", "red"),
    [([], True), (["--swap-channels"], False), (["--swap-channels", "observation.images.top"], False)],
)
def test_swaps_channels_of_all_cameras_or_of_those_named(recording, tmp_path, flags, red):
    for path in recording.iterdir():
        with h5py.File(path, "a") as file:
            file["observations/images/top"][..., 0] = 200
    command = ["convert", str(recording), str(tmp_path / "set"), "--task", "wave", "--num-workers", "0", *flags]
    main(command)
    shown = open_dataset(tmp_path / "set").images("observation.images.top", np.arange(2)).mean(axis=(0, 1, 2))
    assert (shown[0] > shown[2] + 50) == red
    assert (shown[2] > shown[0] + 50) != red


def test_says_what_was_left_out(recording, tmp_path, capsys):
    for path in recording.iterdir():
        with h5py.File(path, "a") as file:
            file["observations/images/top_depth"] = np.full((6, 32, 48), 900, np.uint16)
    main(["convert", str(recording), str(tmp_path / "set"), "--task", "wave", "--num-workers", "0"])
    assert "note      observation.images.top_depth: records depth, not colours: left out" in capsys.readouterr().out


def test_says_which_episodes_it_skipped(recording, tmp_path, capsys):
    (recording / "episode_1.hdf5").write_bytes(b"")
    command = ["convert", str(recording), str(tmp_path / "set"), "--task", "wave", "--num-workers", "1"]
    with pytest.raises(SystemExit) as exit:
        main(command)
    assert exit.value.code == 1
    assert "--skip-bad-episodes leaves such episodes out" in capsys.readouterr().err
    main([*command, "--skip-bad-episodes"])
    out = capsys.readouterr().out
    assert "episodes  1 (1 from before)" in out
    assert "skipped   episode_1.hdf5: " in out


@pytest.mark.parametrize("flags", [("--resize", "big"), ("--resize", "12x"), ("--join", "a"), ("--join", "=b")])
def test_flags_that_cannot_be(recording, tmp_path, flags):
    with pytest.raises(ConfigError, match=f"where {flags[0]}"):
        convert_main([str(recording), str(tmp_path / "set"), *flags])


def test_the_help_has_an_example_per_format(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["manipi"])
    with pytest.raises(SystemExit):
        convert_main(["--help"])
    out = capsys.readouterr().out
    for word in ("ALOHA", "DROID", "LIBERO", "robomimic", "Zarr", "UMI", "RLDS", "LeRobot v2", "--skip-bad-episodes"):
        assert word in out
