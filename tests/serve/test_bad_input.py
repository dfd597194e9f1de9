"""Bad input in bulk: the short form of `make fuzz`. A client that vanishes: `make soak`, for a moment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name, *flags):
    command = [sys.executable, str(BENCHMARKS / name), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    measured = json.loads(done.stdout.splitlines()[-1])
    assert all(measure["holds"] for measure in measured.values())
    return done.stdout


@pytest.mark.slow
def test_two_thousand_bad_frames_harm_nobody():
    said = run("fuzz_serve.py", "--frames", "2000", "--seed", "7")
    for outcome in ("told ProtocolError", "told ObservationError", "answered", "raw bytes"):
        assert outcome in said


@pytest.mark.slow
def test_clients_that_come_and_go_harm_nobody():
    assert "answers" in run("soak.py", "--minutes", "0.1", "--clients", "8", "--hz", "20")
