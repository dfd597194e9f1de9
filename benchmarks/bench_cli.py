"""How long `--help` of every command takes: the median of ten fresh processes each, in wall and in CPU time."""

import os
import statistics
import subprocess
import sys
import time

from harness import Measure, report

from manipi.cli import commands

ROUNDS = 10


def once(arguments: list[str]) -> tuple[float, float]:
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "manipi", *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


lines = [["--help"], ["recipes"], ["train", "tabletop", "--help"], *([name, "--help"] for name in commands())]
rounds = [[once(line) for line in lines] for _ in range(ROUNDS)]  # interleaved: a slow minute slows them all
measures = []
for line, runs in zip(lines, zip(*rounds, strict=True), strict=True):
    name = " ".join(["manipi", *line])
    measures.append(Measure(name=name, value=statistics.median(w for w, _ in runs), unit="s", goal=0.7))
    measures.append(Measure(name=f"{name} (CPU)", value=statistics.median(c for _, c in runs), unit="s", goal=0.7))
report(measures)
