"""A run that is killed, in real processes: whatever the moment, it goes on as if nothing had happened."""

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.commands import Command
from tests.forks import FORKS
from tests.train.sizes import with_layers
from tests.train.trainers import train_in_group

from manipi.checkpoints.native import verify
from manipi.records import write_json
from manipi.train.config import TrainConfig
from manipi.train.loop import train
from manipi.train.run.folder import Lock
from manipi.train.watch.progress import OF_THE_MACHINE

RECIPE = """
from pathlib import Path
from manipi.train.run.folder import read_config
from manipi.train.config import TrainConfig

def recipe() -> TrainConfig:
    return read_config(Path({folder!r}))
"""


@pytest.fixture
def config(tiny) -> TrainConfig:
    """Checkpoints and log lines at different steps."""
    return tiny(steps=16, save_every=4, log_every=3, keep_checkpoints=9)


@pytest.fixture
def start(config, tmp_path) -> Iterator[Callable[..., Command]]:
    """`start(folder)` runs `manipi train` there in a process of its own, with its group and a writer process."""
    started = list[Command]()

    def start(run: Path, **changes) -> Command:
        write_json(tmp_path / "config.json", replace(config, async_save=True, **changes))
        (tmp_path / "recipe.py").write_text(RECIPE.format(folder=str(tmp_path)))
        started.append(Command("train", f"{tmp_path}/recipe.py:recipe", "--run-dir", run))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:  # a test has failed, and what hangs is deaf to all else
            os.killpg(process.pid, signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def stop_when(process: Command, moment: Callable[[], bool]) -> None:
    """SIGSTOP the group at a moment; it goes on if the moment had passed by then."""
    while process.poll() is None:
        if moment():
            os.killpg(process.pid, signal.SIGSTOP)
            while not is_stopped(process.pid):
                time.sleep(0.001)
            if moment():
                return
            os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.002)
    pytest.fail(f"the run ended before its moment came: {process.said()}")


def helpers(process: Command) -> list[int]:
    """Its writer and its data workers, in the order in which they were started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            group = int((path / "stat").read_text().rpartition(")")[2].split()[2])
        except OSError:  # it has ended meanwhile
            continue
        if group == process.pid != int(path.name):
            found.append(int(path.name))
    return sorted(found)


def strike_helper(process: Command, number: int, delay: float = 0.0, by: int = signal.SIGKILL) -> int:
    """So long after its birth. Returns its id."""
    while process.poll() is None and len(born := helpers(process)) <= number:
        time.sleep(0.001)
    assert process.poll() is None, process.said()
    time.sleep(delay)
    os.kill(born[number], by)
    return born[number]


def log_lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def without_clock(run: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in OF_THE_MACHINE} for line in log_lines(run)]


def same_run(one: Path, other: Path) -> None:
    """The last checkpoint's tensors and files, the log lines and the steps that have a checkpoint, bit for bit."""
    assert without_clock(one) == without_clock(other)
    steps = whole_checkpoints_alone(one)
    assert steps == whole_checkpoints_alone(other)
    folders = [run / f"checkpoints/{steps[-1]}" for run in (one, other)]
    files = [{str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert files[0].keys() == files[1].keys()
    for name in files[0].keys() - {"manifest.json", "train_state/.metadata"}:  # the latter holds an id of its own
        assert files[0][name] == files[1][name], name


def whole_checkpoints_alone(run: Path) -> list[int]:
    found = [p for p in (run / "checkpoints").iterdir() if not p.name.startswith(".")]
    for folder in found:
        verify(folder)
    return sorted(int(p.name) for p in found)


@pytest.mark.slow
def test_killed_between_and_during_saves(config, start, undisturbed, tmp_path):
    run = tmp_path / "killed"

    process = start(run)
    # Only a save has a partial folder; this one is of step 4.
    stop_when(process, lambda: any((run / "checkpoints").glob(".4.*.partial/train_state")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list((run / "checkpoints").glob(".*.partial"))) == 1
    assert whole_checkpoints_alone(run) == [0]

    # The trainer alone: its writer finishes what it has a copy of, and ends.
    process = start(run)
    stop_when(process, lambda: any((run / "checkpoints").glob(".8.*.partial/train_state")))
    os.kill(process.pid, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.communicate().returncode == -signal.SIGKILL
    Lock(run / ".writer.lock", wait=True).close()
    assert whole_checkpoints_alone(run) == [0, 4, 8]

    train(config, run, show=False)
    same_run(undisturbed(config), run)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(config, start, undisturbed, tmp_path):
    """Sent to the whole group, as Slurm does: data workers and writer leave it to the trainer. Two count as one."""
    run = tmp_path / "stopped"
    process = start(run, data=replace(config.data, num_workers=1))
    stop_when(process, lambda: len(log_lines(run)) == 2)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.killpg(process.pid, number)
    os.killpg(process.pid, signal.SIGCONT)
    done = process.communicate()
    assert done.returncode == 0, done.stderr
    (step,) = [int(n) for n in re.findall(r"stopped at step (\d+) of 16, with a checkpoint", done.stdout)]
    assert step in (6, 7)
    assert whole_checkpoints_alone(run) == [0, 4, step]
    train(config, run, show=False)
    same_run(undisturbed(config), run)


def require_a_clean_end(process: Command, config: TrainConfig, undisturbed: Callable, run: Path) -> None:
    """After the death of a helper: an error that says so, soon, and a run that goes on as if nothing had happened."""
    done = process.communicate(timeout=60)
    assert done.returncode == 1, done.stderr
    assert "with exit code -9 (-9: killed, often for want of memory)" in done.stderr
    assert "Traceback" not in done.stderr
    train(config, run, show=False)
    same_run(undisturbed(config), run)


@pytest.fixture
def deep(config) -> dict:
    """Changes after which the writer is told of more tensors than fit into a pipe."""
    return {"model": with_layers(config, 6).model}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "delay"), [(0, 0.0), (1, 0.2)], ids=["writer", "worker"])
def test_a_helper_is_killed_while_it_starts(number, delay, deep, config, start, undisturbed, tmp_path):
    run, steps = tmp_path / "run", 12  # of fewer the worker might have made all batches by then
    process = start(run, **deep, steps=steps, data=replace(config.data, num_workers=1))
    strike_helper(process, number, delay)
    require_a_clean_end(process, replace(config, **deep, steps=steps), undisturbed, run)


@pytest.mark.slow
def test_a_writer_that_stops_while_it_starts(deep, config, start, tmp_path):
    """It is reported, and a signal that comes meanwhile is heard."""
    process = start(tmp_path / "run", **deep, guards=replace(config.guards, stall_seconds=0.5))
    writer = strike_helper(process, 0, by=signal.SIGSTOP)
    while "stalled: the run has been waiting for the checkpoint of step 4" not in process.said():
        assert process.poll() is None, process.said()
        time.sleep(0.05)
    assert "in _receive" in process.said()  # the trainer's stack
    os.kill(process.pid, signal.SIGTERM)
    os.kill(writer, signal.SIGCONT)
    done = process.communicate()
    assert done.returncode == 0, done.stderr
    assert "SIGTERM: stopped at step 5 of 16, with a checkpoint" in done.stdout
    assert whole_checkpoints_alone(tmp_path / "run")[:2] == [0, 4]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_twenty_helpers_are_killed_at_random_moments_of_their_start(deep, config, start, undisturbed, tmp_path):
    rng = random.Random(22)
    for kill in range(20):
        run, number, delay = tmp_path / f"run{kill}", rng.randint(0, 1), rng.uniform(0, 2)
        sys.stdout.write(f"kill {kill}: {('writer', 'worker')[number]}, {delay:.3f} s after its birth\n")
        process = start(run, **deep, steps=40, data=replace(config.data, num_workers=1))
        strike_helper(process, number, delay)
        require_a_clean_end(process, replace(config, **deep, steps=40), undisturbed, run)


MOMENTS = [
    ("trainer", ("os.rename", "config.json", 1)),  # the run's, before its first checkpoint
    ("writer", ("open", "robot.json", 1)),
    ("writer", ("open", "self_test.npz", 1)),
    ("writer", ("os.rename", "0", 1)),  # the whole checkpoint gets its name
    ("writer", ("os.remove", ".0.writing.lock", 1)),
    ("trainer", ("open", "metrics.jsonl", 1)),
    ("writer", ("os.mkdir", "train_state", 1)),
    ("writer", ("os.rename", ".metadata", 2)),
    ("writer", ("open", "log_window.json", 1)),
    ("writer", ("open", "manifest.json", 2)),
    ("writer", ("os.remove", ".*.writing.lock", 2)),
    ("writer", ("shutil.rmtree", ".*.old.partial", 1)),  # the oldest goes, once there is a newer one
    ("writer", ("os.rmdir", ".*.old.partial", 1)),
    ("trainer", ("os.rename", "loss.png", 1)),
]
"""Of a run and its saves: whose call it is, and before which one all processes are killed."""


@pytest.mark.slow
def test_kills_at_chosen_moments_lose_nothing(config, undisturbed, tmp_path):
    """The run begins again after each, and goes on to the next."""
    config = replace(config, steps=12, save_every=1, keep_checkpoints=2, async_save=True)
    run = tmp_path / "killed"
    for who, moment in MOMENTS:
        process = FORKS.Process(target=train_in_group, args=(config, run, who, moment))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"killed by the {who} before {moment}: {process.exitcode}"
        Lock(run / ".writer.lock", wait=True).close()
    train(config, run, show=False)
    same_run(undisturbed(replace(config, save_every=11, async_save=False)), run)  # how often a run saves does not show
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_twenty_kills_at_random_moments_lose_nothing(config, undisturbed, tmp_path):
    config = replace(config, steps=44, save_every=1, keep_checkpoints=2, async_save=True)
    run, rng = tmp_path / "killed", random.Random(20)
    for _ in range(20):
        before, until = newest(run), None
        saves, delay, both = rng.randint(0, 1), rng.uniform(0, 0.2), rng.random() < 0.5
        process = FORKS.Process(target=train_in_group, args=(config, run))
        process.start()
        while (until is None or time.monotonic() < until) and newest(run) < before + 2:
            if until is None and newest(run) >= before + saves:
                until = time.monotonic() + delay
            assert process.exitcode is None, "the run ended before it was killed often enough"
            time.sleep(0.001)
        while both and os.getpgid(process.pid) != process.pid:  # it is not the leader of its group yet
            time.sleep(0.001)
        (os.killpg if both else os.kill)(process.pid, signal.SIGKILL)
        process.join()
        who = "trainer and writer" if both else "trainer"
        sys.stdout.write(f"{who}, {saves} saves and {delay:.3f} s after its start, at step {newest(run)}\n")
    train(config, run, show=False)
    same_run(undisturbed(replace(config, save_every=43, async_save=False)), run)
    assert not list((run / "checkpoints").glob(".*"))


def newest(run: Path) -> int:
    folder = run / "checkpoints"
    return max((int(name) for name in (os.listdir(folder) if folder.exists() else ()) if name.isdigit()), default=-1)
