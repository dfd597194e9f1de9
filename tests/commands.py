"""`manipi` as its users run it, without the seconds that importing torch takes each time.

What runs is a process of its own: own group, folder, environment, streams, signals and exit code. Whether a command
starts from nothing at all, and without torch, is for tests/cli/test_command_line.py.
"""

import importlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from io import IOBase
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

from tests.forks import FORKS, enter_network


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


class Interpreter:
    """In place of `subprocess.Popen` for `[sys.executable, "-m", MODULE, …]`, as a fork.

    Where that replaces itself by another such command, as `manipi train --nodes 2` does by torchrun, or starts one, as
    torchrun starts its workers, these are forks too.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: IO | None = None,
        stderr: IO | int | None = None,
        start_new_session: bool = False,
        network: str = "",
    ):
        self.args = [str(word) for word in args if word != "-u"]
        assert self.args[:2] == [sys.executable, "-m"], args
        out = _Stream(1 if stdout is None else stdout.fileno())
        error = out if stderr == subprocess.STDOUT else _Stream(stderr.fileno() if isinstance(stderr, IOBase) else 2)
        variables, place = dict(os.environ if env is None else env), (cwd or Path.cwd(), network)
        settings = (self.args, variables, *place, (out, error), start_new_session)
        self._process = FORKS.Process(target=_be_interpreter, args=settings)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def terminate(self) -> None:
        self._process.terminate()


class _Stream:
    """An open file for a process that is being started."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple:
        return _opened, (DupFd(self.number),)


def _opened(duplicate: Any) -> _Stream:
    return _Stream(duplicate.detach())


def _be_interpreter(
    command: list[str],
    environment: dict[str, str],
    folder: Path,
    network: str,
    streams: tuple[_Stream, _Stream],
    session: bool,
) -> None:
    if session:
        os.setsid()
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream.number, number)
    if network:
        enter_network(network)
    os.chdir(folder)
    _run(command, environment)


def _run(command: list[str], environment: dict[str, str]) -> None:
    from torch._inductor import config
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    os.environ.clear()
    os.environ.update(environment)
    if "CXX" in environment:  # which torch looks at when it is imported
        config.cpp.cxx = (None, environment["CXX"])
    os.execve = lambda program, words, variables: sys.exit(_run(words, variables))
    subprocess_handler.Popen = Interpreter
    sys.argv = command[2:]
    runpy.run_module(command[2], run_name="__main__", alter_sys=True)
