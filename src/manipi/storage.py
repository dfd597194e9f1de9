"""Folders and files that appear whole or not at all."""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manipi.errors import StorageError

_STORAGE_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST),
)
"""No room, no right, and a file in the way."""


def home() -> Path:
    """The folder for what is made or fetched once and then used by every run: MANIPI_HOME, or ~/.cache/manipi."""
    return Path(os.environ.get("MANIPI_HOME") or "~/.cache/manipi").expanduser().absolute()


_NEXT = "free some space or choose another folder"
_NEXT_WHOLE = f"{_NEXT}; nothing half-written was left"
"""Where all that was written is taken back; what appends to a file cannot say so."""


@contextmanager
def atomic_directory(target: Path, next: str = _NEXT_WHOLE, *, resume: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its name when the block ends well, and vanishes when it does not.

    A process that is killed inside the block leaves the sibling behind, for `remove_partial`.

    Args:
        resume: whether a block that does not end well leaves the sibling for the next call, which finds it as it was;
            the caller sees to it that there is one call at a time.

    Raises:
        StorageError: `target` exists already, the disk is full, or the folder cannot be written.
    """
    target = Path(target)
    require_absent(target)
    with storage_errors(target, next):
        target.parent.mkdir(parents=True, exist_ok=True)
        if resume:
            (partial := target.with_name(f".{target.name}.partial")).mkdir(exist_ok=True)
        else:
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        partial.chmod(0o755)  # mkdtemp makes private folders; ours is handed to other users and machines
        try:
            yield partial
            _sync(partial)
            require_absent(target)  # another process may have made it meanwhile
            partial.rename(target)
            _sync_entry(target.parent)
        except BaseException:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_partial(folder: Path, name: str | None = None) -> None:
    """Delete what killed processes left half-written in `folder`, or of one `name` there; no other may be writing."""
    for partial in folder.glob(".*.partial" if name is None else f".{glob.escape(name)}.*.partial"):
        shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink()


def atomic_write(path: Path, data: bytes) -> None:
    """The file holds `data` in full, or what it held before."""
    with storage_errors(path, _NEXT_WHOLE):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            _sync_entry(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def storage_errors(where: Path, next: str = _NEXT) -> Iterator[None]:
    """A full disk, a forbidden folder or a file where a folder is needed as a StorageError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        free = shutil.disk_usage(_existing(where)).free / 1e6
        raise StorageError(
            expected="room and the right to write",
            found=f"{error.strerror} ({free:,.0f} MB free)",
            where=str(where),
            next=next,
        ) from error


def require_room(where: Path, size: int, next: str) -> None:
    """StorageError where the disk of `where` has less than `size` bytes left."""
    free = shutil.disk_usage(_existing(where)).free
    if free < size:
        raise StorageError(
            expected=f"room for {size / 1e6:,.0f} MB", found=f"{free / 1e6:,.0f} MB free", where=str(where), next=next
        )


def require_absent(target: Path) -> None:
    """StorageError where something of that name exists."""
    if target.exists():
        raise StorageError(
            expected="a folder that does not exist yet",
            found="something of that name",
            where=str(target),
            next="choose another name, or move the old folder away",
        )


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
