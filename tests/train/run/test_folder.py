"""What a run's folder says of its settings and of the version that wrote it."""

import json
import tarfile
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from manipi.errors import IntegrityError, TrainingError
from manipi.records import Change, may_change, to_json, write_json
from manipi.robots.robot import Robot
from manipi.train.data import claim_videos
from manipi.train.loop import train
from manipi.train.run.folder import FORMAT, Run, read_config

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4

RECORDED = Path(__file__).parent / "run_of_0.1.0.tar.xz"
"""A dataset, a run of manipi 0.1.0 on it that was stopped at step 2 of 4, and the weights that it reached at step 4."""


def settings_of(config: Any, where: str = "") -> list[str]:
    """The name of every setting, at any depth."""
    names = []
    for field in fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        is_group = is_dataclass(value) and not isinstance(value, Robot)
        names += settings_of(value, f"{name}.") if is_group else [name]
    return names


@pytest.mark.parametrize("kind", ["pi05", "pi0", "pi0_fast"])
def test_every_setting_says_whether_it_may_change(tiny, kind):
    config = tiny(kind)
    marks = {name: may_change(config, name) for name in settings_of(config)}
    assert [name for name, mark in marks.items() if mark is None] == []
    for name, change in {
        "steps": Change.ANYTIME,
        "guards.spike": Change.ANYTIME,
        "model.max_token_len": Change.BEFORE_STEP_1,
        "optimizer.state_bits": Change.BEFORE_STEP_1,
        "optimizer.lr": Change.STAYS,
        "robot": Change.STAYS,
    }.items():
        assert marks[name] == change, name


@pytest.mark.parametrize("group", ["guards", "log"])
def test_a_setting_that_another_version_had_in_a_group_for_any_time_is_no_other_run(tiny, group, tmp_path):
    config = tiny()
    run = Run(tmp_path, config)
    run.checkpoint(2).mkdir(parents=True)
    for settings in ({**to_json(getattr(config, group)), "surplus": 1}, None):
        write_json(tmp_path / "config.json", {**to_json(config), group: settings})
        Run(tmp_path, config)
        assert read_config(tmp_path) == config


@pytest.mark.parametrize("damaged", [None, [], "settings", 3])
def test_what_are_no_settings_are_not_written_over(tiny, damaged, tmp_path):
    stored = tmp_path / "config.json"
    write_json(stored, damaged)
    before = stored.read_bytes()
    for read in (lambda: Run(tmp_path, tiny()), lambda: read_config(tmp_path)):
        with pytest.raises(IntegrityError, match="expected a JSON object"):
            read()
    assert stored.read_bytes() == before


@pytest.mark.parametrize("damaged", ["null", "[]", '"video"'])
def test_a_list_of_videos_that_is_none_is_one_clear_error(tmp_path, damaged):
    (tmp_path / "videos.json").write_text(damaged)
    with pytest.raises(IntegrityError, match="expected a JSON object"):
        claim_videos(tmp_path, {"data": {"video.mp4": "3 ends 0123"}})


def test_a_setting_that_says_nothing_is_told_from_one_that_stays(tiny):
    assert may_change(tiny(), "nothing") is None
    assert may_change(tiny(), "model.nothing") == Change.STAYS


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    with tarfile.open(RECORDED) as archive:
        archive.extractall(tmp_path, **SAFELY)
    monkeypatch.chdir(tmp_path)  # its dataset is at a relative path
    return tmp_path / "run"


def test_a_run_of_0_1_0_goes_on_and_reaches_its_weights(old):
    config, recorded = read_config(old), load_file(old.parent / "reached.safetensors")
    assert "format" not in json.loads((old / "config.json").read_text())
    fresh = train(config, old.parent / "fresh", stop_at=2, show=False)
    same_machine = load_file(fresh / "model.safetensors"), load_file(old / "checkpoints/2/model.safetensors")
    reached = load_file(train(config, old, show=False) / "model.safetensors")
    assert reached.keys() == recorded.keys()
    # Another processor may round otherwise, and then does so from the first step on.
    as_recorded = all(np.array_equal(same_machine[0][name], value) for name, value in same_machine[1].items())
    for name, value in recorded.items():
        np.testing.assert_allclose(reached[name], value, atol=0 if as_recorded else 1e-4, rtol=0, err_msg=name)


def test_a_run_of_0_1_0_is_numbered_once_its_settings_are_written_again(old):
    Run(old, replace(read_config(old), steps=5))
    assert json.loads((old / "config.json").read_text())["format"] == FORMAT
    assert read_config(old).steps == 5


@pytest.mark.parametrize("number", [FORMAT + 1, "two"])
def test_a_folder_of_a_later_version_is_refused_by_its_number(tiny, tmp_path, number):
    run = Run(tmp_path / "run", tiny())
    stored = run.folder / "config.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "format": number, "warp": 9}))
    for open_again in (lambda: Run(run.folder, tiny()), lambda: read_config(run.folder)):
        with pytest.raises(TrainingError, match="of format 1 or before") as caught:
            open_again()
        assert str(number) in caught.value.found
        assert "upgrade manipi" in caught.value.next
