import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from manipi.errors import ObservationError
from manipi.serve import PolicyServer

REPOSITORY = Path(__file__).resolve().parents[2]


class TinyPolicy:
    """The golden transcript's policy: actions are the state times 1, 2, 3, 4. The prompt can ask for trouble."""

    def __init__(self):
        self.metadata = {"home_pose": [0, -1.2, 1.1, 0.25, 0, 0], "robot": "tiny"}

    def infer(self, observation, noise=None):
        prompt = observation.get("prompt", "go")
        if "state" not in observation:
            raise ObservationError(
                expected="a state", found=f"only {sorted(observation)}", where="the observation", next="send `state`"
            )
        if prompt == "fail":
            raise RuntimeError("secret /home/user/weights")
        if prompt == "slow":
            time.sleep(0.8)
        if prompt == "unsendable":
            return {"actions": {1, 2}}
        actions = np.outer(np.arange(1, 5), observation["state"].astype(np.float64))
        return {"actions": actions, "policy_timing": {"infer_ms": 10.0}}


@pytest.fixture
def policy():
    return TinyPolicy()


@pytest.fixture
def port(policy):
    """The port of a server that runs during the test."""
    with PolicyServer(policy, port=0).serve_in_thread() as port:
        yield port


@pytest.fixture
def observation():
    return {"state": np.arange(3, dtype=np.float32), "prompt": "go"}


@pytest.fixture(scope="session")
def golden_wire():
    """`golden_wire(name)` is a file of golden/wire: parsed when JSON, bytes otherwise."""
    folder = Path(os.environ.get("MANIPI_SHARED", REPOSITORY.parent / "shared")) / "golden/wire"
    if not folder.is_dir():
        pytest.skip(f"no golden fixtures at {folder} (set MANIPI_SHARED)")

    def read(name):
        return json.loads((folder / name).read_text()) if name.endswith(".json") else (folder / name).read_bytes()

    return read
