"""The suite on a folder of other sizes than the public set's: everything that it knows comes from a case's files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from variants import write_variant


@pytest.mark.slow
def test_the_suite_takes_every_size_from_the_case(tmp_path):
    write_variant(tmp_path / "golden")
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(here.parent), f"--ignore={here}"]
    environment = os.environ | {"MANIPI_GOLDEN": str(tmp_path / "golden")}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=here.parents[2], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]
    # Of each module that reads models, trees, transforms or whole calls; the variant has no wire messages.
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 700
