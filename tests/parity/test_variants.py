"""The suite on a folder of other sizes than the public set's: everything that it knows comes from a case's files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.commands import Interpreter
from variants import write_variant

LEFT_OUT = ("variants", "wire", "tokenizers", "dictionaries", "other_projects")
"""This module, those of which the variant has no cases, and the one that needs other projects' code."""


@pytest.mark.slow
def test_the_suite_takes_every_size_from_the_case(tmp_path):
    write_variant(tmp_path / "golden")
    here = Path(__file__)
    plugins = [word for plugin in ("pytest_timeout", "xdist.plugin", "no:cacheprovider") for word in ("-p", plugin)]
    command = [sys.executable, "-m", "pytest", "-q", "--assert=plain", *plugins, str(here.parent)]
    command += [f"--ignore={here.parent}/test_{name}.py" for name in LEFT_OUT]
    environment = os.environ | {"MANIPI_GOLDEN": str(tmp_path / "golden"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with (tmp_path / "said").open("w") as output:
        settings = {"cwd": here.parents[2], "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
        code = Interpreter(command, **settings).wait(250)
    said = (tmp_path / "said").read_text()
    assert code == 0, said[-6000:]
    # Of each module that reads models, trees, transforms or whole calls.
    passed = re.search(r"(\d+) passed", said)
    assert passed
    assert int(passed[1]) > 700
