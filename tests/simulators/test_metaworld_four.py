"""The four tasks that `make metaworld` learns: what an expert does blind, and what the wrong words are."""

import json
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "simulators/metaworld"
ASKED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import blind, simulator
made = simulator.MetaWorld(image_size=64)
words = {}
for task in simulator.SENTENCES:
    made._task = task
    words[task] = made.prompt, made.wrong_prompt
print(json.dumps({"words": words, "reach": [int(n) for n in blind.survey("reach-v3", scenes=8)[:2]]}))
"""


@pytest.mark.slow
def test_blind_experts_and_wrong_words():
    python = FOLDER / ".venv/bin/python"
    if not python.exists():
        pytest.skip("make sim-metaworld")
    done = subprocess.run([python, "-c", ASKED, FOLDER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    four = json.loads((FOLDER / "suite.json").read_text())["suites"]["four"]["tasks"]
    known = [said["words"][task][0] for task in four]
    for task, (prompt, wrong) in said["words"].items():
        assert wrong != prompt, task
        assert wrong in known, task
    seeing, blind = said["reach"]
    assert seeing == 8
    assert blind <= 4
