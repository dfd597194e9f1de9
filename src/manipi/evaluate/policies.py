"""Policies that answer at an address: a checkpoint that is served for an evaluation, or a server of somebody else's."""

import contextlib
import hashlib
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from manipi.errors import ConfigError, IntegrityError, ServeError, shown
from manipi.evaluate.evaluation import Settings
from manipi.evaluate.suites import Suite
from manipi.storage import Lock

START_SECONDS = 120.0
"""How long a policy server may take to start."""
STOP_SECONDS = 30.0
"""How long it may go on with what it computes once it was told to end."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def policy_server(checkpoint: Path, *, threads: int = 1, flags: Sequence[str] = ()) -> Iterator[int]:
    """`manipi serve CHECKPOINT` on a free port, of loopback unless `flags` say another --host; yields the port.

    The process ends on the way out, and with this process, whatever that dies of.

    Args:
        flags: more of them.

    Raises:
        ServeError: it ended or did not start within two minutes; the message holds what it said.
    """
    with contextlib.ExitStack() as until_ready:
        folder = until_ready.enter_context(tempfile.TemporaryDirectory(prefix="manipi-serve-"))
        ready, log, lock = Path(folder) / "port", Path(folder) / "log", Path(folder) / "lock"
        ours = Lock(lock)  # ends with this process, even where that is killed
        flags = ["--port", "0", "--ready-file", str(ready), "--num-threads", str(threads), *flags]
        flags += ["--while-locked", str(lock)]
        command = [sys.executable, "-m", "manipi", "serve", str(checkpoint), *flags]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServeError(
                        expected=f"a policy server within {START_SECONDS:.0f} s",
                        found=log.read_text(errors="replace")[-2000:] or "no sign of life",
                        where=" ".join(command),
                        next="run that command by itself and read what it says",
                    )
                time.sleep(0.05)
            port = int(ready.read_text())
            until_ready.close()
            yield port
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                logger.warning("the policy server did not end within %.0f s of SIGTERM, and is killed", STOP_SECONDS)
                process.kill()
                process.wait()
            ours.close()


@dataclass(frozen=True, kw_only=True)
class OpenPolicy:
    """A policy that answers at an address."""

    name: str
    """For people."""
    url: str
    server: Mapping[str, Any]
    """How it is served, as far as we know: it decides the rounding of what it answers."""
    checkpoint: Path | None
    """Where we serve it from; None: somebody else serves it."""
    digest: str | None = None
    """Of the checkpoint when it was opened."""

    def folder(self, suite: Suite, settings: Settings) -> Path:
        """Where results go unless told otherwise: one folder for all that may not change."""
        defaults = {f.name: f.default for f in fields(Settings)} | {"execute_steps": suite.execute_steps}
        changed = {k: v for k, v in asdict(settings).items() if k not in ("trials", "seed") and v != defaults[k]}
        run = None if self.checkpoint is None else run_folder(self.checkpoint)
        step = "" if self.checkpoint is None else f"step_{self.checkpoint.resolve().name}"  # not `best`, which moves
        batch = self.server.get("max_batch", 1)
        changed |= {"max_batch": batch} if batch > 1 else {}
        parts = [suite.name.replace("/", "_"), step, f"seed_{settings.seed}", *(f"{k}_{v}" for k, v in changed.items())]
        name = re.sub(r"[^\w.-]+", "_", "_".join(part for part in parts if part))  # a selector may be a file's
        if run is not None:
            return run / "evaluations" / name
        if self.checkpoint is not None:
            return Path("evaluations") / f"{name}_{(self.digest or '')[:8]}"  # others may have its last name, too
        return Path("evaluations") / re.sub(r"\W+", "_", self.url).strip("_") / name

    def require_unchanged(self) -> None:
        """Raises ConfigError where the checkpoint's files are others than when it was opened."""
        if self.checkpoint is not None and checkpoint_hash(self.checkpoint) != self.digest:
            raise ConfigError(
                expected="the checkpoint that the trials began with",
                found="another one of the same name",
                where=str(self.checkpoint),
                next="evaluate a checkpoint that no training writes to, and delete the folder of these trials",
            )


@contextlib.contextmanager
def open_policy(
    source: str,
    *,
    device: str = "auto",
    threads: int = 1,
    max_batch: int = 1,
    untrained: bool = False,
    host: str = "127.0.0.1",
    selector: str | None = None,
) -> Iterator[OpenPolicy]:
    """Serve a checkpoint, or find the server of a URL.

    Args:
        threads, max_batch: of the server; with one observation in each call of the model an answer is the same whoever
            else asks.
        untrained: serve random weights of the same network.
        selector: among candidates, which the server has to know: `FILE.py:NAME`.
        host: an address of this computer to serve at. Beyond loopback clients need the token MANIPI_TOKEN.

    Raises:
        ServeError: the server does not start.
        ConfigError: `untrained` of a server, which keeps its weights.
    """
    if "://" in source:
        if untrained:
            raise ConfigError(
                expected="a checkpoint, of which an untrained copy can be made",
                found=f"a server: {shown(source)}",
                where="--untrained",
                next="name the checkpoint's folder",
            )
        yield OpenPolicy(name=source, url=source, server={}, checkpoint=None)
        return
    checkpoint, server = Path(source), {"device": device, "threads": threads, "max_batch": max_batch}
    with contextlib.ExitStack() as stack:
        digest, served = checkpoint_hash(checkpoint), checkpoint
        until_served = stack.enter_context(contextlib.ExitStack())
        if untrained:
            # It imports torch, which a comparison of files does without.
            from manipi.train.untrained import write_untrained

            folder = until_served.enter_context(tempfile.TemporaryDirectory(prefix="manipi-untrained-"))
            served = Path(folder) / "checkpoint"
            write_untrained(served, checkpoint)
        flags = ("--device", device, "--limits.max-batch", str(max_batch), "--host", host)
        flags += ("--selector", selector) if selector else ()
        port = stack.enter_context(policy_server(served, threads=threads, flags=flags))
        until_served.close()
        address = f"ws://{f'[{host}]' if ':' in host else host}:{port}"
        yield OpenPolicy(name=source, url=address, server=server, checkpoint=checkpoint, digest=digest)


def run_folder(checkpoint: Path) -> Path | None:
    """runs/NAME of runs/NAME/checkpoints/STEP, when the checkpoint is still in its run."""
    folder = Path(checkpoint).resolve()
    run = folder.parent.parent
    return run if folder.parent.name == "checkpoints" and (run / "config.json").is_file() else None


def checkpoint_hash(checkpoint: Path) -> str:
    """Of its manifest, which holds the hash of every file. Raises IntegrityError where there is none."""
    try:
        return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    except OSError as error:
        raise IntegrityError(
            expected="a checkpoint folder, with a manifest.json",
            found=error.strerror or "none",
            where=str(checkpoint),
            next="name runs/NAME/checkpoints/STEP or runs/NAME/best, or a server's URL such as ws://robot:8000",
        ) from error
