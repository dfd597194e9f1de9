"""The server that an evaluation starts ends with it."""

import os
import signal
from pathlib import Path

import pytest

from manipi.evaluate import policies


class Server:
    """Stands for `manipi serve`."""

    def __init__(self, command, **settings):
        Path(command[command.index("--ready-file") + 1]).write_text("8000")
        self.ended = False

    def terminate(self):
        self.ended = True

    def wait(self):
        assert self.ended


def test_a_scheduler_that_ends_us_ends_the_server(monkeypatch, tmp_path):
    before, servers = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(
        policies.subprocess, "Popen", lambda *args, **kw: servers.append(Server(*args, **kw)) or servers[-1]
    )
    with pytest.raises(SystemExit) as end, policies.policy_server(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == 143
    assert servers[0].ended
    assert signal.getsignal(signal.SIGTERM) is before
