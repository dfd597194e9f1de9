"""Where numbers go: read back from TensorBoard's event files and from the folders of Weights & Biases."""

import importlib.util
import json
import re
import struct
import sys
import time
from dataclasses import replace

import pytest

from manipi.errors import ConfigError
from manipi.train.config import LogConfig
from manipi.train.loop import train
from manipi.train.run.folder import Run, read_config
from manipi.train.watch.progress import OF_THE_MACHINE, RunLog

OPENPI = {"loss", "grad_norm", "param_norm", "learning_rate", "time_per_step"}


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs manipi[{package}]")


def test_every_line_says_it_all(tiny, tmp_path):
    config = tiny(steps=4, log_every=2, save_every=4)
    train(config, tmp_path, show=False)
    lines = Run(tmp_path, config).read_metrics()
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line.keys() == OPENPI | OF_THE_MACHINE | {"step"}
        assert line["samples_per_s"] * line["time_per_step"] == pytest.approx(config.batch_size)
        assert 0 < line["mfu"] < 1
        assert 0.05 < line["peak_memory_gb"] < 50
        assert 0 <= line["data_wait"] < 1
    assert read_config(tmp_path) == config


def test_logging_and_guards_may_change_on_resume(tiny, tmp_path):
    config = tiny(steps=2)
    train(config, tmp_path, stop_at=1, show=False)
    first_batch = (tmp_path / "first_batch/batch.txt").stat().st_mtime_ns
    other = replace(config, guards=replace(config.guards, spike=5.0), log=LogConfig(wandb_project="another"))
    assert train(other, tmp_path, show=False).name == "2"
    assert (tmp_path / "first_batch/batch.txt").stat().st_mtime_ns == first_batch  # written once


def test_other_ranks_write_nothing(tiny, tmp_path):
    run = Run(tmp_path / "run", tiny())
    with RunLog(run, 0, lead=False) as log:
        log.log(1, {"loss": 1.0})
    assert run.read_metrics() == []


@pytest.mark.parametrize("log", [LogConfig(tensorboard=True), LogConfig(wandb="offline")], ids=["tensorboard", "wandb"])
def test_an_absent_package_is_missed_at_the_start(tiny, tmp_path, monkeypatch, log):
    package = "tensorboard" if log.tensorboard else "wandb"
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say that there is none
    with pytest.raises(ConfigError, match=rf"pip install 'manipi\[{package}\]'") as error:
        train(replace(tiny(), log=log), tmp_path / "run", show=False)
    assert error.value.where == f"TrainConfig.log.{package}"
    assert not (tmp_path / "run").exists()


@needs("tensorboard")
def test_tensorboard_of_a_run_that_was_killed(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(steps=4, save_every=2, log=LogConfig(tensorboard=True))
    train(config, tmp_path, stop_at=2, show=False)
    run = Run(tmp_path, config)
    with RunLog(run, 2) as log:
        log.log(3, {"loss": 99.0})  # and then it was killed, before the checkpoint of step 4
    train(config, tmp_path, show=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert OPENPI | {"samples_per_s", "mfu", "peak_memory_gb", "data_wait"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["camera_views"]
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [(line["step"], pytest.approx(line["loss"])) for line in run.read_metrics()]
    assert [step for step, _ in logged] == [1, 2, 3, 4]


@needs("wandb")
def test_wandb_without_a_key(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="No API key") as error:
        RunLog(Run(tmp_path / "run", tiny(log=LogConfig(wandb="online"))), 0)
    assert error.value.next == "wandb login, or --log.wandb offline"


@needs("wandb")
@pytest.mark.slow
def test_wandb_offline_goes_on_with_its_id(tiny, tmp_path):
    config = tiny(steps=4, save_every=2, log=LogConfig(wandb="offline", wandb_project="arms"))
    train(config, tmp_path / "run", stop_at=2, show=False)
    name = (tmp_path / "run/wandb_id.txt").read_text()
    time.sleep(1)  # runs of one id that begin in the same second have the same folder, and the later file stays
    train(config, tmp_path / "run", show=False)
    assert (tmp_path / "run/wandb_id.txt").read_text() == name
    folders = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    steps = []
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        assert re.fullmatch(rf"run-{name}\.wandb", file.name)
        deadline = time.monotonic() + 30
        while not (found := list(history(file))) or not found[-1].keys() >= OPENPI:
            assert time.monotonic() < deadline, "wandb's own process writes the file, and ends after `finish`"
            time.sleep(0.1)
        steps += [int(record["_step"]) for record in found if "loss" in record]
    assert steps == [1, 2, 3, 4]


def history(file):
    """The logged rows in the file of an offline run, which is a LevelDB log of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}


def leveldb_records(data: bytes, block: int = 32_768):
    """Per fragment checksum, length, type (1 whole, 2 first, 3 middle, 4 last); after a heading of seven bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := block - place % block) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""
