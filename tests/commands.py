"""`manipi` as its users run it, without the seconds that importing torch takes each time.

What runs is a process of its own: own group, folder, environment, streams, signals and exit code. Whether a command
starts from nothing at all, and without torch, is for tests/cli/test_command_line.py.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

from tests.forks import FORKS


class Command:
    """A `manipi` that runs, in a folder (default: this one) and with variables beside those of this process."""

    def __init__(self, *arguments: object, folder: Path | None = None, **environment: str):
        self.args = ["manipi", *map(str, arguments)]
        self._streams = tempfile.mkdtemp(prefix="manipi-streams-")
        weakref.finalize(self, shutil.rmtree, self._streams)
        settings = (self.args, folder or Path.cwd(), {**os.environ, **environment}, self._streams)
        self.process = FORKS.Process(target=_be_manipi, args=settings)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def said(self) -> str:
        """What it wrote to its error stream."""
        return Path(self._streams, "stderr").read_text()

    def communicate(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        self.process.join(timeout)
        code = self.poll()
        if code is None:
            self.process.kill()
        assert code is not None, f"{self.args} still runs after {timeout} s: {self.said()}"
        output = Path(self._streams, "stdout").read_text()
        return subprocess.CompletedProcess(self.args, code, output, self.said())


def run_manipi(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """The command, once it has ended."""
    return Command(*arguments, **options).communicate()


def _be_manipi(words: list[str], folder: Path, environment: dict[str, str], streams: str) -> None:
    os.setpgid(0, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(streams, name), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    # What the processes that it spawns look at, as with `python -m manipi`.
    sys.modules["__main__"] = importlib.import_module("manipi.__main__")
    sys.modules["manipi.cli"].main(words[1:])
