"""A run that is killed, in real processes: whatever the moment, it goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from manipi.checkpoints.native import verify
from manipi.records import write_json
from manipi.train.config import TrainConfig
from manipi.train.loop import train
from manipi.train.progress import OF_THE_MACHINE

RECIPE = """
from pathlib import Path
from manipi.train.run import read_config
from manipi.train.config import TrainConfig

def recipe() -> TrainConfig:
    return read_config(Path({folder!r}))
"""


@pytest.fixture
def config(tiny) -> TrainConfig:
    return tiny(steps=16, save_every=4, keep_checkpoints=9)


@pytest.fixture
def start(config, tmp_path) -> Callable[[Path], subprocess.Popen]:
    """`start(folder)` runs `manipi train` there in a process of its own."""
    write_json(tmp_path / "config.json", config)
    (tmp_path / "recipe.py").write_text(RECIPE.format(folder=str(tmp_path)))
    command = [sys.executable, "-m", "manipi", "train", f"{tmp_path}/recipe.py:recipe", "--run-dir"]

    def start(run: Path) -> subprocess.Popen:
        return subprocess.Popen([*command, str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def kill_when(process: subprocess.Popen, moment: Callable[[], bool]) -> None:
    """SIGKILL at a moment: the process is stopped first, and goes on if the moment had passed by then."""
    while process.poll() is None:
        if moment():
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            if moment():
                process.kill()
                process.communicate()
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)
    pytest.fail(f"the run ended before its moment came: {process.communicate()[1]}")


def log_lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def without_clock(run: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in OF_THE_MACHINE} for line in log_lines(run)]


@pytest.mark.slow
def test_killed_between_and_during_saves(config, start, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "killed"
    train(config, whole, show=False)
    checkpoints = run / "checkpoints"

    kill_when(start(run), lambda: (checkpoints / "4").exists() and len(log_lines(run)) >= 6)
    assert not (checkpoints / "8").exists()

    # Only a save has a partial folder; this one is of step 8.
    kill_when(start(run), lambda: any(checkpoints.glob(".8.*.partial/train_state")))
    assert len(list(checkpoints.glob(".*.partial"))) == 1
    assert not (checkpoints / "8").exists()
    for step in (0, 4):
        verify(checkpoints / str(step))

    process = start(run)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"checkpoint  {checkpoints / '16'}" in output
    assert sorted(p.name for p in checkpoints.iterdir()) == ["0", "12", "16", "4", "8"]
    for name in ("model.safetensors", "self_test.npz", "norm_stats.json", "config.json"):
        assert (checkpoints / "16" / name).read_bytes() == (whole / "checkpoints/16" / name).read_bytes(), name
    assert without_clock(run) == without_clock(whole)
