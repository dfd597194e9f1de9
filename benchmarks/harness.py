"""What every benchmark shares: a table for people, and as the last line one JSON object for programs."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure with its goal; `at_most` says on which side of the goal it has to be."""

    name: str
    value: float
    unit: str
    goal: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def report(measures: list[Measure]) -> None:
    """Print the table and the JSON line; exit 1 where a goal is missed."""
    width = max(len(m.name) for m in measures)
    for m in measures:
        goal = f"goal {'≤' if m.at_most else '≥'} {m.goal:g}"
        print(f"{m.name:<{width}}  {m.value:10.4g} {m.unit:<8} {goal}   {'holds' if m.holds else 'MISSED'}")
    row = {m.name: {"value": m.value, "unit": m.unit, "goal": m.goal, "holds": m.holds} for m in measures}
    print(json.dumps(row))
    sys.exit(not all(m.holds for m in measures))


def manipi(*arguments: object) -> None:
    """Runs a command of manipi, which is printed first. Where it fails or a signal comes, this program ends, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no command goes on alone
    command = ["manipi", *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", *command])
    try:
        if process.wait():
            sys.exit(process.returncode)
    finally:
        process.terminate()
        process.wait()


def memory_mb(pid: int | None) -> float:
    """Resident memory of a process, in MiB (Linux)."""
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024


@contextmanager
def lerobot_dataset(task: Mapping[str, Any]) -> Iterator[tuple[Callable[[], float], int]]:
    """What measures samples per second of LeRobotDataset, as `lerobot_rate.py` does, and the group of its processes.

    MANIPI_LEROBOT_PYTHON names a Python that has lerobot (`make test-lerobot` makes one), and PyAV's copy of FFmpeg.
    """
    python, pipe = Path(os.environ["MANIPI_LEROBOT_PYTHON"]), subprocess.PIPE
    libraries = ":".join(map(str, python.parents[1].glob("lib/python*/site-packages/av.libs")))
    command = [str(python), str(Path(__file__).with_name("lerobot_rate.py"))]
    environment = os.environ | {"LD_LIBRARY_PATH": libraries, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, env=environment, start_new_session=True, text=True, stdin=pipe, stdout=pipe
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def rate() -> float:
            print(file=stdin, flush=True)
            return float(stdout.readline())

        try:
            print(json.dumps(task), file=stdin, flush=True)
            yield rate, process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)
