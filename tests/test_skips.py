"""A skip that nobody knows of fails where continuous integration runs, and nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.commands import Interpreter
from tests.skips import Skips, complaints

TABLE = (Skips("needs a GPU", 2), Skips("no browser", needs="chromium"))


@pytest.mark.parametrize(
    ("found", "without", "fine"),
    [
        ({"needs a GPU": 2}, "", True),
        ({}, "", True),
        ({"needs a GPU": 1}, "", False),
        ({"needs a GPU": 3}, "", False),
        ({"needs a GPU": 1, "needs a GPU of 80 GB": 1}, "", True),
        ({"no browser: none is installed": 4}, "", False),
        ({"no browser: none is installed": 4}, "optional chromium", True),
        ({}, "chromium", True),
        ({"needs a moon": 1}, "", False),
    ],
)
def test_the_table(found, without, fine):
    assert (not complaints(found, without, TABLE)) == fine


SKIPPING = """
import pytest

def test_one():
    pytest.skip("needs a moon")

def test_two():
    pass
"""


@pytest.mark.parametrize(
    ("ci", "arguments", "code"),
    [("true", [], 1), ("true", ["-n", "1"], 1), ("", [], 0), ("true", ["test_it.py"], 0), ("true", ["-k", "one"], 0)],
)
def test_a_run_with_a_new_skip(tmp_path, ci, arguments, code):
    (tmp_path / "test_it.py").write_text(SKIPPING)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = .\n")
    plugins = ["-p", "xdist.plugin", "-p", "tests.skips", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "--assert=plain", *plugins, *arguments]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "CI": ci, "PYTHONPATH": path, "MANIPI_CI_WITHOUT": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with (tmp_path / "said").open("w") as output:
        done = Interpreter(command, cwd=tmp_path, env=env, stdout=output, stderr=subprocess.STDOUT).wait(60)
    said = (tmp_path / "said").read_text()
    assert done == code, said
    assert ("1 skipped for a reason that is not in the table: needs a moon" in said) == bool(code)
    assert "1 skipped" in said.splitlines()[-1]  # the line that tells how many passed stays the last
