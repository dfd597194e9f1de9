"""Starts the trainer of one run again and again, and kills it at random moments: a script of test_killed.

    python trainers.py CONFIG_FOLDER RUN_FOLDER KILLS SEED

Every trainer is a process of its own, and so is its writer; both are forked from processes that have imported torch, as
importing takes longer than the run. One line of output for each kill: moment, step, and who was killed.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

from manipi.train.loop import train
from manipi.train.run.folder import read_config, saving

PRELOADED = multiprocessing.get_context("forkserver")


def main(configs: Path, run: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    PRELOADED.set_forkserver_preload(["manipi.train.run.saving", "manipi.robots.tabletop"])
    forkserver.ensure_running()
    writer = run.with_suffix(".writer")
    (run / "checkpoints").mkdir(parents=True)
    for _ in range(kills):
        sys.stdout.flush()
        writer.unlink(missing_ok=True)
        pid = os.fork()
        if not pid:
            train_here(configs, run, writer)
        saves, delay, both = rng.randint(0, 1), rng.uniform(0, 0.2), rng.random() < 0.5
        wait(pid, run, saves, delay)
        os.kill(pid, signal.SIGKILL)
        if both and writer.exists():
            os.kill(int(writer.read_text()), signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        who = "trainer and writer" if both else "trainer"
        sys.stdout.write(f"killed {who} {saves} saves and {delay:.3f} s after its start, at step {newest(run)}\n")
    pid = os.fork()
    if not pid:
        train_here(configs, run, writer)
    assert os.waitpid(pid, 0)[1] == 0


def wait(pid: int, run: Path, saves: int, delay: float) -> None:
    """Until so many checkpoints more and a moment, or two checkpoints."""
    before, until = newest(run), None
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if until is None and newest(run) >= before + saves:
            until = time.monotonic() + delay
        if (until is not None and time.monotonic() >= until) or newest(run) >= before + 2:
            return
        time.sleep(0.001)
    raise SystemExit("the run ended before it was killed often enough")


def newest(run: Path) -> int:
    return max((int(name) for name in os.listdir(run / "checkpoints") if name.isdigit()), default=-1)


def train_here(configs: Path, run: Path, writer: Path) -> None:
    """In the forked process: train, and end."""
    start = helper.start_helper

    def start_and_tell(*args):
        process, connection = start(*args)
        writer.write_text(str(process.pid))
        return process, connection

    forkserver._forkserver.ensure_running = lambda: None  # it looks for a child of its own, and would start another
    multiprocessing.get_context = lambda _: PRELOADED
    saving.start_helper = start_and_tell
    code = 1
    try:
        train(read_config(configs), run, show=False)
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
