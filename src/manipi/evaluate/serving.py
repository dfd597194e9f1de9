"""A policy server in a process of its own, as it would run beside a robot."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from manipi.errors import ServeError

START_SECONDS = 120.0


@contextlib.contextmanager
def policy_server(checkpoint: Path, *, threads: int = 1, flags: Sequence[str] = ()) -> Iterator[int]:
    """`manipi serve CHECKPOINT` on a free port of loopback; yields the port, and ends the process on the way out.

    Args:
        flags: more of them.

    Raises:
        ServeError: it ended or gave no sign within two minutes; the message holds what it said.
    """
    with tempfile.TemporaryDirectory(prefix="manipi-serve-") as folder:
        ready, log = Path(folder) / "port", Path(folder) / "log"
        flags = ["--port", "0", "--ready-file", str(ready), "--num-threads", str(threads), *flags]
        with log.open("wb") as output:
            command = [sys.executable, "-m", "manipi", "serve", str(checkpoint), *flags]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _wait(process, ready, log)
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen, ready: Path, log: Path) -> int:
    deadline = time.monotonic() + START_SECONDS
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServeError(
                expected=f"a policy server within {START_SECONDS:.0f} s",
                found=log.read_text(errors="replace")[-2000:] or "no sign of life",
                where=" ".join(map(str, process.args)),  # type: ignore[arg-type]
                next="run that command by itself and read what it says",
            )
        time.sleep(0.05)
    return int(ready.read_text())
