"""What stops a run or makes it speak: real bad numbers, a real stopped worker, a real step that sleeps."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from manipi.checkpoints.native import verify
from manipi.errors import ConfigError, NonFiniteError
from manipi.model import ModelInput
from manipi.train.config import GuardConfig
from manipi.train.data import prepare
from manipi.train.loop import train
from manipi.train.run.folder import Run
from manipi.train.step.state import TrainState
from manipi.train.step.step import train_step
from manipi.train.watch.guards import EXIT_CODE, Guards, SpikeDetector, Watchdog
from manipi.transforms.normalize import load_norm_stats, save_norm_stats

ROW, EPISODE, FRAME = 20, 2, 1


@pytest.fixture
def outlier(tiny, toy_dataset, tmp_path):
    """`outlier(value, **changes)` is a run on a dataset with one command of that size, in the scale of the others."""

    def make(value: float, **changes):
        root = shutil.copytree(toy_dataset, tmp_path / "outlier")
        (path,) = (root / "data").rglob("*.parquet")
        table = pq.read_table(path)
        values = np.array(table["actions"].to_pylist(), np.float32)
        values[ROW, 2] = value
        array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        pq.write_table(table.set_column(table.column_names.index("actions"), "actions", array), path)
        config = tiny(**changes)
        prepare(config, tmp_path / "scale")
        (tmp_path / "assets").mkdir()
        save_norm_stats(load_norm_stats(tmp_path / "scale/norm_stats.json"), tmp_path / "assets/norm_stats.json")
        data = replace(config.data, path=str(root), holdout=0.0, norm_stats=str(tmp_path / "assets"))
        return replace(config, data=data)

    return make


# ---- numbers


def test_a_bad_sample_is_named_and_its_batch_kept(outlier, tmp_path):
    config = outlier(1e30, steps=20, save_every=20)
    with pytest.raises(NonFiniteError) as error:
        train(config, tmp_path / "run", show=False)
    step = int(re.match(r"step (\d+)", error.value.where)[1])
    batch = dict(np.load(tmp_path / f"run/bad_batch_{step}.npz"))
    bad = ~np.isfinite(batch.pop("sample_loss"))
    named = [f"dataset outlier, episode {e}, frame {f}" for e, f in zip(batch["episode"], batch["frame"])]
    assert 0 < bad.sum() < 4
    for k in np.flatnonzero(bad):
        # A chunk of four steps that holds the command.
        assert (batch["dataset"][k], batch["episode"][k]) == ("outlier", EPISODE)
        assert FRAME - 4 < batch["frame"][k] <= FRAME
    assert error.value.where == f"step {step}: {'; '.join(name for name, is_bad in zip(named, bad) if is_bad)}"
    assert error.value.next.startswith(f"manipi check {config.data.path}; the batch is in ")
    run = Run(tmp_path / "run", config)
    assert run.steps() == [0]
    verify(run.checkpoint(0))
    assert len(run.read_metrics()) == step

    # The same command repeats it, and so does the batch that was kept.
    with pytest.raises(NonFiniteError) as again:
        train(config, tmp_path / "run", show=False)
    assert (again.value.where, again.value.found) == (error.value.where, error.value.found)
    state = TrainState.initial(config)
    inputs = {name: value for name, value in batch.items() if name not in ("dataset", "episode", "frame")}
    with pytest.raises(NonFiniteError) as alone:
        train_step(state, ModelInput.from_numpy(inputs), config)
    np.testing.assert_array_equal(~np.isfinite(alone.value.sample_loss), bad)


def test_weights_that_diverged_are_not_blamed_on_the_data(tiny, tmp_path):
    config = tiny(steps=20, save_every=20)
    config = replace(config, optimizer=replace(config.optimizer, lr=1e30, warmup_steps=0))
    with pytest.raises(NonFiniteError, match="of 4 of 4 samples the loss is not finite") as error:
        train(config, tmp_path, show=False)
    assert error.value.next.startswith("lower --optimizer.lr: it is the weights, not a sample")


def test_a_full_disk_does_not_hide_why_a_run_ends(outlier, mount, tmp_path):
    config = outlier(1e30, steps=20, save_every=20, log_every=99, guards=GuardConfig(first_batch=False))
    disk = mount(64)
    train(config, disk / "run", stop_at=0, show=False)
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
    with pytest.raises(NonFiniteError, match=f"episode {EPISODE}") as error:
        train(config, disk / "run", show=False)
    assert re.search(r"the batch could not be kept: expected room for [\d.]+ MB, found 0\.0+ MB free", error.value.next)


def test_a_spike_warns_once_and_names_the_sample(outlier, tmp_path, capfd):
    config = outlier(20.0, steps=17, save_every=17, guards=GuardConfig(spike_window=12, spike=8.0))
    train(config, tmp_path / "run", show=False)
    run = Run(tmp_path / "run", config)
    spikes = [spike for line in run.read_metrics() for spike in line.get("spikes", [])]
    assert spikes
    assert f"loss spike at step {spikes[0]['step']}" in "".join(capfd.readouterr())
    for spike in spikes:
        worst = spike["samples"][0]
        assert (worst["dataset"], worst["episode"]) == ("outlier", EPISODE)
        assert FRAME - 4 < worst["frame"] <= FRAME
        assert worst["loss"] > spike["loss"] > 2 * spike["median"]
    assert len(run.read_metrics()) == 17


def test_what_a_spike_is():
    rng = np.random.default_rng(0)
    detector = SpikeDetector(GuardConfig())
    noise = np.exp(rng.normal(-2, 0.3, 2_000) - np.linspace(0, 1, 2_000))
    assert [step for step, loss in enumerate(noise) if detector.median_before(loss)] == []
    median = detector.median_before(5 * noise[-1])
    assert median == pytest.approx(np.median(noise[-200:]))
    # Nothing is compared with a handful, a flat loss has some room, and 0 switches it off.
    young, flat, off = (SpikeDetector(replace(GuardConfig(), spike=factor)) for factor in (10.0, 10.0, 0.0))
    assert [young.median_before(loss) for loss in [1.0] * 49 + [99.0]] == [None] * 50
    assert [flat.median_before(loss) for loss in [1.0] * 60 + [1.4]] == [None] * 61
    assert flat.median_before(1.6) == 1.0
    assert [off.median_before(loss) for loss in [1.0] * 60 + [99.0]] == [None] * 61


def test_settings_that_cannot_be(tiny):
    for guards in (GuardConfig(spike=-1), GuardConfig(spike_window=2), GuardConfig(stall_seconds=-1)):
        with pytest.raises(ConfigError, match="guards"):
            tiny(guards=guards)


# ---- time


@contextmanager
def watched(config, folder, num_workers=0):
    data = prepare(replace(config, data=replace(config.data, num_workers=num_workers)), folder)
    with data.loader(0) as loader, Guards(config.guards, folder, loader, data.mixture) as guards:
        yield loader, guards


def test_a_worker_that_is_stopped(tiny, tmp_path, capfd):
    config, said = tiny(guards=GuardConfig(stall_seconds=1.0)), []

    def listen(word: str, seconds: float = 60.0):
        end = time.monotonic() + seconds
        while word not in "".join(said) and time.monotonic() < end:
            said.extend(capfd.readouterr())
            time.sleep(0.1)

    def listen_and_go_on():
        listen("stalled: ")
        os.kill(late, signal.SIGCONT)

    with watched(config, tmp_path, num_workers=2) as (loader, guards):
        batches = guards.batches(0, 99)
        for _ in range(2):
            step, _, _ = next(batches)
        capfd.readouterr()  # on a busy machine the first batch may have been late itself
        late, other = loader.workers(step + 1)
        os.kill(late, signal.SIGSTOP)
        listener = threading.Thread(target=listen_and_go_on)
        listener.start()
        while listener.is_alive():  # first whatever it had made ahead
            next(batches)
        listen("in _work")
    text = "".join(said)
    assert text.count("stalled: ") == 1
    step = int(re.search(r"stalled: the data loader has been waiting for the batch of step (\d+) for ", text)[1])
    assert step % 2 == 0, "the turn of the first worker"
    assert f"data worker, process {late}: T (stopped), whose turn it is" in text
    assert f"process {other}: S (sleeping)\n" in text
    assert "test_a_worker_that_is_stopped" in text  # this process' stack
    assert "in _work" in text  # the workers': the other's at once, the stopped one's when it goes on


def test_a_step_that_sleeps(tiny, tmp_path, capfd):
    def forgets_to_end():
        time.sleep(1.5)

    config = tiny(guards=GuardConfig(stall_seconds=0.2))
    with watched(config, tmp_path) as (_, guards):
        for step in range(2):
            with guards.step(step, {}):
                time.sleep(0.5)  # the first two may take six times as long
        with guards.step(2, {}):
            time.sleep(0.5)  # and less than five times the median is no stall
        with guards.phase("the run", "the checkpoint of step 2"):
            time.sleep(0.5)
        assert "stalled" not in "".join(capfd.readouterr())
        for step in range(3, 60):
            with guards.step(step, {}):
                pass
        with guards.step(60, {}):
            forgets_to_end()
    said = "".join(capfd.readouterr())
    assert said.count("stalled: ") == 1
    assert "stalled: the training step has been waiting for forward, backward and update of step 60 for " in said
    assert "forgets_to_end" in said


EXITS = """
import time
from manipi.train.config import GuardConfig
from manipi.train.watch.guards import Watchdog
with Watchdog(GuardConfig(stall_seconds=0.2, on_stall="exit")) as dog, dog.phase("the run", "nothing at all"):
    time.sleep(60)
"""


def test_a_stall_may_end_the_process():
    done = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_CODE
    assert "stalled: the run has been waiting for nothing at all for 1." in done.stderr
    assert 'File "<string>", line 6' in done.stderr


def test_no_watchdog():
    threads = threading.active_count()
    with Watchdog(GuardConfig(stall_seconds=0)) as dog, dog.phase("the run", "nothing"):
        assert threading.active_count() == threads


def test_the_numbers_of_a_step_come_in_one_copy(tiny, tmp_path):
    """Loss and norm are floats by then: nothing but the norm of the weights is left to be read off the device."""
    config = tiny()
    with prepare(config, tmp_path).loader(0) as loader:
        _, batch, _ = next(iter(loader))
    metrics, sample_loss = train_step(TrainState.initial(config), ModelInput.from_numpy(batch), config)
    assert [name for name, value in metrics.items() if isinstance(value, torch.Tensor)] == ["param_norm"]
    assert sample_loss.shape == (4,)
    assert not sample_loss.requires_grad
