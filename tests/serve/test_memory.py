"""What a serving process does about its memory, seen from outside."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from manipi_client import WebsocketPolicy

PROGRAM = """
import gc, runpy, sys
from manipi.serve import PolicyServer
policy = runpy.run_path(sys.argv[1])["TinyPolicy"]()
PolicyServer(policy, port=0).serve_forever(lambda host, port: print(port, gc.get_freeze_count(), flush=True))
"""


def num_page_faults(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


@pytest.mark.skipif(sys.platform != "linux", reason="thresholds of glibc, page faults of /proc")
def test_a_call_takes_no_fresh_memory_and_a_collection_looks_at_little(observation):
    """Three pictures are 450 kB, or 110 pages, of which the websocket, the message and the arrays have a copy each."""
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).with_name("conftest.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        port, num_frozen = map(int, process.stdout.readline().split())
        pictures = {f"camera_{i}": np.zeros((224, 224, 3), np.uint8) for i in range(3)}
        with WebsocketPolicy(port=port) as client:
            for _ in range(20):
                client.infer({**observation, **pictures})
            before = num_page_faults(process.pid)
            for _ in range(100):
                client.infer({**observation, **pictures})
            faults = num_page_faults(process.pid) - before
        process.terminate()
    assert faults < 500
    assert num_frozen > 10_000
