"""How fast `manipi convert` is with one process and with two, and what memory a long episode takes.

    python benchmarks/bench_convert.py SOURCE [--task TEXT] [--rounds 3]

Converts SOURCE (for example two episodes of ALOHA) by turns with 1 and 2 processes; medians, with the CPU time of all
processes. Then 2,000 frames of 480×640 in one process: 1.8 GB of pictures, of which few may be in RAM.
"""

import argparse
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from harness import Measure, report

from manipi.convert.convert import ConvertSettings, convert
from manipi.convert.formats import open_reader

FRAMES, SIZE = 2000, (480, 640, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--task", default="do it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        _convert(args.source, args.alone, args.task, 0)
        print(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        rates, cpu_ms = _rates(args.source, Path(folder), args.task, args.rounds)
        peak = _peak(Path(folder))
    print(f"{rates[1]:.0f} frames/s with 1 process, {rates[2]:.0f} with 2")
    report(
        [
            Measure(name="2 processes over 1", value=rates[2] / rates[1], unit="times", goal=1, at_most=False),
            Measure(name="CPU time per frame", value=cpu_ms, unit="ms", goal=15),
            Measure(name=f"peak memory, {FRAMES} frames", value=peak, unit="MB", goal=300),
        ]
    )


def _rates(source: Path, folder: Path, task: str, rounds: int) -> tuple[dict[int, float], float]:
    """Median frames per second by number of processes, and CPU milliseconds per frame."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    cpu = []
    for number in range(rounds):
        for workers, found in rates.items():
            used, began = _cpu_seconds(), time.perf_counter()
            frames = _convert(source, folder / f"set-{number}-{workers}", task, workers)
            found.append(frames / (time.perf_counter() - began))
            cpu.append(1000 * (_cpu_seconds() - used) / frames)
    return {workers: statistics.median(found) for workers, found in rates.items()}, statistics.median(cpu)


def _convert(source: Path, target: Path, task: str, workers: int) -> int:
    settings = ConvertSettings(task=task)
    return convert(open_reader(source), target, settings, num_workers=workers, show=False).num_frames


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _peak(folder: Path) -> float:
    """Megabytes that a process of its own held at most."""
    source = folder / "long"
    source.mkdir()
    with h5py.File(source / "episode_0.hdf5", "w") as file:
        file["action"] = file["observations/qpos"] = np.zeros((FRAMES, 14))
        shape = (FRAMES, *SIZE)
        pictures = file.create_dataset("observations/images/top", shape, np.uint8, chunks=(1, *SIZE), compression=1)
        for frame in range(FRAMES):
            pictures[frame] = frame % 256
    command = [sys.executable, __file__, str(source), "--alone", str(folder / "long-set")]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1000


if __name__ == "__main__":
    main()
