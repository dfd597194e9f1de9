import json
import os
from pathlib import Path

import numpy as np
import pytest
from tests.interrupt import interruptible

__all__ = ["interruptible"]

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def golden():
    """The folder of golden fixtures."""
    folder = Path(os.environ.get("MANIPI_SHARED", REPOSITORY.parent / "shared")) / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden fixtures at {folder} (set MANIPI_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden_wire(golden):
    """`golden_wire(name)` is a file of golden/wire: parsed when JSON, bytes otherwise."""

    def read(name):
        path = golden / "wire" / name
        return json.loads(path.read_text()) if name.endswith(".json") else path.read_bytes()

    return read


@pytest.fixture
def observation():
    return {"image": np.zeros((4, 4, 3), np.uint8), "state": np.arange(3, dtype=np.float32), "prompt": "go"}
