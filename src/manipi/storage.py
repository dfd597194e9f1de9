"""Folders and files that appear whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manipi.errors import StorageError


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its name when the block ends well, and vanishes when it does not.

    Raises:
        StorageError: `target` exists already (unless `replace`), the disk is full, or the folder cannot be written.
    """
    target = Path(target)
    if target.exists() and not replace:
        raise StorageError(
            expected="a folder that does not exist yet",
            found="something of that name",
            where=str(target),
            next="choose another name, or move the old folder away",
        )
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        partial.chmod(0o755)  # mkdtemp makes private folders; ours is handed to other users and machines
        try:
            yield partial
            _sync(partial)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            _sync_entry(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def atomic_write(path: Path, data: bytes) -> None:
    """The file holds `data` in full, or what it held before."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """A full disk or a forbidden folder as a StorageError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
            raise
        free = shutil.disk_usage(_existing(where)).free / 1e6
        raise StorageError(
            expected="room and the right to write",
            found=f"{error.strerror} ({free:,.0f} MB free)",
            where=str(where),
            next="free some space or choose another folder; nothing half-written was left",
        ) from error


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
