"""How long `manipi --help` takes: the median of ten fresh processes, in wall and in CPU time."""

import os
import statistics
import subprocess
import sys
import time

from harness import Measure, report


def once(arguments: list[str]) -> tuple[float, float]:
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "manipi", *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


measures = []
for arguments in (["--help"], ["recipes"], ["train", "tabletop", "--help"]):
    runs = [once(arguments) for _ in range(10)]
    name = " ".join(["manipi", *arguments])
    measures.append(Measure(name=name, value=statistics.median(w for w, _ in runs), unit="s", goal=0.7))
    measures.append(Measure(name=f"{name} (CPU)", value=statistics.median(c for _, c in runs), unit="s", goal=0.7))
report(measures)
