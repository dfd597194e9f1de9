"""The policy server that an evaluation starts: what it says of itself, and that it ends."""

import logging
import os
import signal
import subprocess

from manipi.evaluate import policies
from manipi.evaluate.policies import open_policy
from manipi_client import WebsocketPolicy


def test_a_server_that_does_not_hear_is_killed(checkpoint, monkeypatch, caplog):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(policies, "subprocess", subprocess)  # a process as its users have it
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **more: started.append(start(*a, **more)) or started[-1])
    monkeypatch.setattr(policies, "STOP_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING), open_policy(str(checkpoint), device="auto") as opened:
        with WebsocketPolicy(port=int(opened.url.rpartition(":")[2])) as client:
            assert client.metadata["device"] in ("cpu", "cuda")  # what `auto` came to
        (server,) = started
        os.kill(server.pid, signal.SIGSTOP)  # SIGTERM waits, as behind a call that never ends
    assert server.returncode == -signal.SIGKILL
    assert "did not end within" in caplog.text
