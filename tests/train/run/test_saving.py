"""Checkpoints beside training: copies that are exact, a writer that fails or dies, disks without room or right."""

import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manipi.checkpoints.native import verify
from manipi.errors import NormStatsError, StorageError, TrainingError
from manipi.model import ModelInput
from manipi.records import read_json
from manipi.train import loop
from manipi.train.data import prepare
from manipi.train.loop import checkpoint_writer, train
from manipi.train.run.folder import Run, alone
from manipi.train.run.saving import AsyncSaver, Snapshot, read_window
from manipi.train.step.state import NAME, TrainState
from manipi.train.step.step import train_step
from manipi.train.watch.progress import OF_THE_MACHINE
from manipi.transforms.normalize import load_norm_stats, save_norm_stats


class Parts:
    """A run with its state, its data and what writes its checkpoints."""

    def __init__(self, config, folder):
        self.config, self.run = config, Run(folder, config)
        self.data, self.state = prepare(config, folder), TrainState.initial(config)
        self.writer = checkpoint_writer(self.run, self.data)

    def step(self) -> None:
        with self.data.loader(self.state.step) as loader:
            _, batch, _ = next(iter(loader))
        train_step(self.state, ModelInput.from_numpy(batch), self.config)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.state._tensors().items()}


def require_saved(parts: Parts, folder: Path, before: dict[str, torch.Tensor]) -> None:
    """The checkpoint is sound and holds these tensors, bit for bit, the averaged ones to be served."""
    verify(folder)
    other = Parts(parts.config, parts.run.folder)
    other.state.load(folder / "train_state")
    assert [name for name, value in other.tensors().items() if not torch.equal(value, before[name])] == []
    served = load_file(folder / "model.safetensors")
    served[NAME] = served[NAME][before["rows"]]  # the others are their own average
    assert all(torch.equal(served[name], before[f"average.{name}"]) for name in other.state.average)


def until(happens) -> None:
    while not happens():
        time.sleep(0.01)


@pytest.mark.slow
def test_a_copy_that_takes_long_a_full_disk_and_a_writer_that_dies(tiny, mount, monkeypatch):
    disk = mount(64)
    parts = Parts(tiny(keep_checkpoints=9), disk / "run")
    copy, copied = Snapshot.copy, threading.Event()

    def copy_late(self, source) -> None:
        copied.wait()
        copy(self, source)

    monkeypatch.setattr(Snapshot, "copy", copy_late)
    with alone(parts.run.folder) as lock, AsyncSaver(parts.writer, parts.state, lock) as saver:
        # ---- the update waits for the copy, of which nothing may be of the step that comes after
        before = parts.tensors()
        saver.save([{"loss": 0.1}])
        threading.Timer(1.0, copied.set).start()
        parts.step()
        assert copied.is_set()
        after = parts.tensors()
        assert len([name for name, value in before.items() if not torch.equal(value, after[name])]) > 50
        saver.wait()
        folder = parts.run.checkpoint(0)
        require_saved(parts, folder, before)
        assert read_window(folder) == [{"loss": 0.1}]

        # ---- the disk fills while the writer writes
        os.kill(saver._process.pid, signal.SIGSTOP)
        saver.save([])
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 200_000))
        os.kill(saver._process.pid, signal.SIGCONT)
        with pytest.raises(StorageError, match="No space left on device") as error:
            until(saver.check)
        assert error.value.where == str(parts.run.checkpoint(1))
        assert [p.name for p in parts.run.checkpoints.iterdir()] == ["0"]

        # ---- and before it writes
        with pytest.raises(StorageError, match=r"expected room for \d+ MB"):
            saver.save([])
        filler.unlink()
        saver.save([])
        saver.wait()
        assert parts.run.steps() == [0, 1]

        # ---- the writer dies
        os.kill(saver._process.pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match=r"(?s)with exit code -9.*run the same command again"):
            until(saver.check)
    assert parts.run.steps() == [0, 1]


def test_frozen_weights_in_their_own_dtype_are_copied_bit_for_bit():
    tensors = {"a": torch.randn(3, 5).bfloat16(), "step": torch.tensor(7), "b": torch.randn(2, 1, 3).transpose(0, 2)}
    snapshot = Snapshot(tensors)
    snapshot.copy(snapshot.source(tensors))
    assert snapshot.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert snapshot.tensors[name].dtype == value.dtype
        assert torch.equal(snapshot.tensors[name], value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_on_a_gpu_is_copied_as_it_was_when_it_was_saved():
    tensors = {name: torch.randn(1000, 1000, device="cuda") for name in "abcd"}
    before = {name: value.cpu() for name, value in tensors.items()}
    snapshot = Snapshot(tensors)
    source = snapshot.source(tensors)
    assert source.tensors is not tensors
    for value in tensors.values():
        value.zero_()
    snapshot.copy(source)
    assert all(torch.equal(snapshot.tensors[name], value) for name, value in before.items())


def test_a_disk_without_room_stops_the_run_before_anything_is_written(tiny, mount):
    disk = mount(8)
    config = tiny(steps=4)
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 400_000))
    with pytest.raises(StorageError, match=r"(?s)expected room for \d+ MB.*found 0 MB free.*free some space") as error:
        train(config, disk / "run", show=False)
    assert error.value.where == str(disk / "run/checkpoints/0")
    assert not (disk / "run/checkpoints").exists()


def test_the_forecast_of_a_checkpoints_size(tiny, tmp_path):
    for kind in ("pi05", "pi0_fast"):
        parts = Parts(tiny(kind), tmp_path / kind)
        parts.writer.write(parts.state.inference_weights(), parts.state.save, 0, [])
        size = sum(p.stat().st_size for p in parts.run.checkpoint(0).rglob("*"))
        assert size <= parts.writer.size(parts.state) <= 1.2 * size + 500_000


def test_a_folder_that_cannot_be_written(tiny, mount):
    disk = mount(64)
    config = tiny(steps=4)
    train(config, disk / "run", stop_at=2, show=False)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system") as error:
        train(config, disk / "run", show=False)
    assert error.value.where == str(disk / "run")
    verify(disk / "run/checkpoints/2")
    with pytest.raises(StorageError, match="Read-only file system"):
        train(config, disk / "another", show=False)


def test_statistics_of_another_robot(tiny, tmp_path):
    config = tiny(steps=4)
    train(config, tmp_path, stop_at=2, show=False)
    stats = load_norm_stats(tmp_path / "norm_stats.json")
    save_norm_stats(replace(stats, contract="another robot's"), tmp_path / "norm_stats.json")
    with pytest.raises(NormStatsError, match="tabletop"):
        train(config, tmp_path, show=False)
    assert Run(tmp_path, config).newest() == 2


def test_two_trainers_in_one_folder(tiny, tmp_path):
    with alone(tmp_path), pytest.raises(TrainingError, match="in which no other process trains"):
        train(tiny(), tmp_path, show=False)
    assert train(tiny(steps=1), tmp_path, show=False).name == "1"


def test_a_signal_between_two_saves(tiny, tmp_path, monkeypatch, capsys):
    """The run goes on to the same checkpoints and log lines, of which one spans the interruption."""
    config = tiny(steps=9, save_every=2, log_every=4, keep_checkpoints=3)
    train(config, tmp_path / "whole", show=False)

    def step_and_signal(state, *arguments):
        done = train_step(state, *arguments)
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return done

    monkeypatch.setattr(loop, "train_step", step_and_signal)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    assert train(config, tmp_path / "stopped", show=False).name == "5"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    assert "SIGUSR1: stopped at step 5 of 9, with a checkpoint" in capsys.readouterr().out
    runs = [Run(tmp_path / name, config) for name in ("whole", "stopped")]
    assert runs[1].steps() == [2, 4, 5]
    monkeypatch.undo()
    train(config, tmp_path / "stopped", show=False)
    assert runs[0].steps() == runs[1].steps() == [6, 8, 9]
    lines = [
        [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in run.read_metrics()] for run in runs
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [4, 8, 9]
    manifests = [read_json(run.checkpoint(9) / "manifest.json") for run in runs]
    assert {k: v for k, v in manifests[0].items() if not k.endswith(".metadata")} == {
        k: v for k, v in manifests[1].items() if not k.endswith(".metadata")
    }


def test_a_checkpoint_that_was_being_deleted_is_none(tiny, tmp_path):
    config = tiny(steps=4, keep_checkpoints=1)
    train(config, tmp_path, stop_at=2, show=False)
    (tmp_path / "checkpoints/.0.old.partial").mkdir()
    train(replace(config, async_save=False), tmp_path, show=False)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
