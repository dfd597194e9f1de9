"""Files of a store that are too many to keep: each comes when it is first read, and goes when there is no more room.

    MANIPI_HOME/gs+bucket+droid+1.0.1/
    ├─ droid-train.tfrecord-00007-of-02048         fetched and verified as any other
    └─ .droid-train.tfrecord-00007-of-02048.use    locked by all who read that file; its time is that of the last loan

Whenever one came, those whose last loan is longest ago are deleted until all together take no more than `room`. One
that is on loan to any process of this machine stays; if it was in the way, the next loan looks again.
"""

import fcntl
import os
import weakref
from pathlib import Path

from manipi.errors import ConfigError
from manipi.remote.fetch import fetch, sha256_of, target_of
from manipi.storage import home, storage_errors

ROOM_GB = 50.0
"""Where MANIPI_RECORDS_GB does not say otherwise."""
_crowded = False
"""Whether files on loan alone took more than the room when this process looked last."""


class Loan:
    """A file that stays at `path` for as long as this object lives: of a store, or a local one as it is.

    Raises:
        FetchError, StorageError: as `fetch`.
        ConfigError: MANIPI_RECORDS_GB is no size.
    """

    def __init__(self, source: str):
        self.path, self.sha256 = Path(source), ""
        """`sha256` is that of a file of a store, as it was fetched."""
        if "://" not in source:
            return
        room()  # is a size, or nothing is fetched
        target = target_of(source)
        use = target.with_name(f".{target.name}.use")
        with storage_errors(use):
            use.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(use, os.O_RDWR | os.O_CREAT, 0o644)
            weakref.finalize(self, os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            os.utime(descriptor)
        here = target.exists()
        self.path = fetch(source, show=False)
        self.sha256 = sha256_of(self.path)
        if _crowded or (self.path == target and not here):
            make_room()


def room() -> float:
    """Bytes for all files that were on loan once and are still here. Raises ConfigError where it is no size."""
    text = os.environ.get("MANIPI_RECORDS_GB") or str(ROOM_GB)
    try:
        if (size := float(text)) > 0:
            return size * 1e9
    except ValueError:
        pass
    raise ConfigError(
        expected="a size in GB", found=repr(text), where="MANIPI_RECORDS_GB", next="export MANIPI_RECORDS_GB=50"
    )


def make_room() -> None:
    """Delete what is beyond the room and not on loan."""
    global _crowded
    from filelock import FileLock

    home().mkdir(parents=True, exist_ok=True)
    with FileLock(home() / ".room.lock"):
        uses = sorted(home().glob("*/.*.use"), key=lambda use: use.stat().st_mtime_ns)
        sizes = {use: file.stat().st_size for use in uses if (file := _file_of(use)).exists()}
        excess = sum(sizes.values()) - room()
        for use, size in sizes.items():
            if excess > 0 and _delete(use):
                excess -= size
        _crowded = excess > 0


def _delete(use: Path) -> bool:
    """Delete the file unless it is on loan."""
    descriptor = os.open(use, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        _file_of(use).unlink()
        return True
    finally:
        os.close(descriptor)


def _file_of(use: Path) -> Path:
    return use.with_name(use.name.removeprefix(".").removesuffix(".use"))
