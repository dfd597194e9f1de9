"""The policy server that an evaluation starts: what it says of itself, and that it ends."""

import logging
import os
import signal
from pathlib import Path

import pytest

from manipi.evaluate import policies
from manipi.evaluate.policies import open_policy
from manipi_client import WebsocketPolicy


def serving(checkpoint: Path) -> list[int]:
    """The processes that do."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"serve\0{checkpoint}\0".encode() in line.read_bytes():
                found.append(int(line.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux")
def test_a_server_that_does_not_hear_is_killed(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(policies, "STOP_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING), open_policy(str(checkpoint), device="auto") as opened:
        with WebsocketPolicy(port=int(opened.url.rpartition(":")[2])) as client:
            assert client.metadata["device"] in ("cpu", "cuda")  # what `auto` came to
        (server,) = serving(checkpoint)
        os.kill(server, signal.SIGSTOP)  # SIGTERM waits, as behind a call that never ends
    assert not serving(checkpoint)
    assert "did not end within" in caplog.text
