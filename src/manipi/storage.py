"""Folders and files that appear whole or not at all, and locks.

    folder/                      takes its name when all is in it
    .folder.writing.partial/     until then
    .folder.writing.lock         locked by the process that writes; where it is free, that process was killed
    .file.writing.partial        a file until then, which is locked itself

A lock is free once no process has it open, whatever they died of: what a killed process left is told from what another
one is writing, and the next writer of the same name removes it.
"""

import errno
import fcntl
import glob
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from manipi.errors import StorageError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_STORAGE_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *_NO_LOCKS,
)
"""No room, no right, a file in the way, and a file system without locks."""


_FULL = 1 << 16
"""Bytes that are as good as none: file systems keep some, and a failed write may have given some back."""


def home() -> Path:
    """The folder for what is made or fetched once and then used by every run: MANIPI_HOME, or ~/.cache/manipi."""
    return Path(os.environ.get("MANIPI_HOME") or "~/.cache/manipi").expanduser().absolute()


_NEXT = "free some space or choose another folder"
_NEXT_WHOLE = f"{_NEXT}; nothing half-written was left"
"""Where all that was written is taken back; what appends to a file cannot say so."""


class Lock:
    """A locked file, which is made where it is absent; free once no process has it open, whatever they died of.

    A process that is started with it holds it too, from its first instruction on.

    Args:
        wait: whether to wait for another process that holds it.
        shared: hold it together with others that want it shared.

    Raises:
        BlockingIOError: `wait` is false, and another process holds it.
        OSError: no right, no room, or a file system without locks.
    """

    def __init__(self, path: Path, *, wait: bool = True, shared: bool = False):
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            self._hold(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
            try:
                fcntl.flock(self.descriptor, how)
                # Whoever had it may have renamed or deleted it since it was opened here.
                if os.path.samestat(os.fstat(self.descriptor), path.stat()):
                    return
            except FileNotFoundError:
                pass
            except BaseException:
                self.close()
                raise
            self.close()

    def _hold(self, descriptor: int) -> None:
        self.descriptor, self.close = descriptor, weakref.finalize(self, os.close, descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        from multiprocessing.reduction import DupFd

        return _attach, (DupFd(self.descriptor),)


def _attach(descriptor: Any) -> Lock:
    lock = Lock.__new__(Lock)
    lock._hold(descriptor.detach())
    return lock


@contextmanager
def atomic_directory(target: Path, next: str = _NEXT_WHOLE, *, resume: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its name when the block ends well, and vanishes when it does not.

    What a process that was killed inside the block left is removed by the next call with this target.

    Args:
        resume: whether a block that does not end well leaves the sibling for the next call, which finds it as it was;
            the caller sees to it that there is one call at a time.

    Raises:
        StorageError: `target` exists already or another process is writing it, the disk is full, or the folder cannot
            be written.
    """
    target = Path(target)
    require_absent(target)
    with storage_errors(target, next):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial") if resume else _partial(target)
        with nullcontext() if resume else _only_writer(target):
            if partial.exists() and not resume:
                shutil.rmtree(partial)
            partial.mkdir(exist_ok=resume)
            partial.chmod(0o755)  # whatever the umask: it is handed to other users and machines
            try:
                with storage_errors(target, next, written=partial):
                    yield partial
                    _sync(partial)
                    require_absent(target)  # something else may have made it meanwhile
                    partial.rename(target)
                    _sync_entry(target.parent)
            except BaseException:
                if not resume:
                    shutil.rmtree(partial, ignore_errors=True)
                raise


def remove_dead(folder: Path) -> None:
    """Delete the folders that killed processes left half-written in `folder`; those of living ones stay.

    Raises:
        StorageError: they cannot be deleted.
    """
    with storage_errors(folder, next="delete what begins with a dot and ends in .partial there, or choose another one"):
        for lock in folder.glob(".*.writing.lock"):
            # Another user's lock may not be opened, and is theirs to delete.
            _remove_unless_held(lock.with_suffix(".partial"), lock, (BlockingIOError, PermissionError))


def remove_partial(folder: Path, name: str | None = None) -> None:
    """As `remove_dead`, and what writers without a lock left: of every name in `folder`, or of one.

    Of those no other may be writing; raises OSError where something cannot be deleted.
    """
    for partial in folder.glob(".*.partial" if name is None else f".{glob.escape(name)}.*.partial"):
        if partial.is_symlink():
            partial.unlink()
        else:
            _remove_unless_held(partial, partial.with_suffix(".lock") if partial.is_dir() else partial)
    if name is None:
        remove_dead(folder)  # the lock of a folder that has its name already


def _remove_unless_held(partial: Path, lock: Path, held: tuple[type[OSError], ...] = (BlockingIOError,)) -> None:
    """Delete both, unless a process is writing there: locking raises one of `held`."""
    try:
        ours = Lock(lock, wait=False)
    except held:
        return
    with ours:
        if partial.is_dir():
            shutil.rmtree(partial)
        lock.unlink()


def atomic_write(path: Path, data: bytes) -> None:
    """The file holds `data` in full, or what it held before. Raises StorageError."""
    with storage_errors(path, _NEXT_WHOLE, size=len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        with Lock(partial) as lock:
            try:
                os.ftruncate(lock.descriptor, 0)  # a killed process may have left it
                with os.fdopen(lock.descriptor, "wb", closefd=False) as file:
                    file.write(data)
                os.fsync(lock.descriptor)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


@contextmanager
def storage_errors(where: Path, next: str = _NEXT, *, size: int = 0, written: Path | None = None) -> Iterator[None]:
    """A full disk, a forbidden folder or a file where a folder is needed as a StorageError that names the place.

    Args:
        size: bytes that the block needs, where that is known.
        written: what it has written so far, for the message of a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        expected, found = "room and the right to write", f"{error.strerror}"
        if error.errno in _NO_LOCKS:
            expected = "a file system with locks (flock)"
            next = "choose a folder on another file system, or mount this one with locks"
        if error.errno == errno.ENOSPC:
            if size > _free(where):
                raise _no_room(where, size, next) from error
            expected, found = "room on the disk", f"{found}: {_megabytes(_free(where))} free"
            if written is not None:
                so_far = sum(path.lstat().st_size for path in written.rglob("*"))
                found += f" when {_megabytes(so_far)} of it were written"
        raise StorageError(expected=expected, found=found, where=str(where), next=next) from error


def write_failed(error: Exception, path: Path) -> OSError:
    """What a library that hides the number of a failed write says of it, as an error of the operating system."""
    text = next(iter(str(error).splitlines()), type(error).__name__)
    full = "No space left" in str(error) or _free(path) < _FULL
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(errno.EIO, text)


def require_room(where: Path, size: int, next: str = _NEXT, *, what: str = "") -> None:
    """StorageError where the disk of `where` has less than `size` bytes left for `what`."""
    if _free(where) < size:
        raise _no_room(where, size, next, what)


def _no_room(where: Path, size: int, next: str, what: str = "") -> StorageError:
    free = _free(where)
    # As many digits as it takes to see the difference; the sixth is that of a byte.
    digits = min(n for n in range(7) if n == 6 or _megabytes(size, n) != _megabytes(free, n))
    return StorageError(
        expected=f"room for {_megabytes(size, digits)}{what and f' of {what}'}",
        found=f"{_megabytes(free, digits)} free",
        where=str(where),
        next=next,
    )


def _megabytes(size: int, digits: int = 1) -> str:
    return f"{size / 1e6:,.{digits}f} MB"


def _free(where: Path) -> int:
    existing = next(p for p in (where, *where.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def require_absent(target: Path) -> None:
    """StorageError where something of that name exists."""
    if os.path.exists(target):
        raise StorageError(
            expected="a folder that does not exist yet",
            found="something of that name",
            where=str(target),
            next="choose another name, or move the old folder away",
        )


def require_new_file(target: Path) -> None:
    """StorageError where no file of that name can be made, or where something else than a file has the name."""
    if os.path.exists(target) and not target.is_file():  # Path.exists raises for a name that is too long
        raise StorageError(
            expected="a name for a file, which is made or replaced",
            found="a folder" if target.is_dir() else "a device or a pipe",
            where=str(target),
            next="name a file in that folder" if target.is_dir() else "name a file",
        )
    _require_writable(target)


def require_new_folder(target: Path) -> None:
    """StorageError where there is something of that name, or where no folder of that name can be made."""
    require_absent(target)
    _require_writable(target)


def require_folder(target: Path) -> None:
    """StorageError where nothing can be written into a folder of that name, whether it is there or has to be made."""
    _require_writable(target / "file")


def _require_writable(target: Path) -> None:
    """By making a folder, which vanishes again, where the first part of the path is missing; only trying tells."""
    path = target.absolute()
    missing = next((p for p in (*reversed(path.parents), path) if not os.path.exists(p)), path)
    # Of its own name: processes of several hosts may look at the same folder at once, and have the same number.
    probe = missing.with_name(f".{missing.name}.{uuid4().hex[:8]}.partial")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise StorageError(
            expected="a place where something can be written",
            found=f"{error.strerror}",
            where=f"{missing.parent}, for {target}",
            next="choose another folder",
        ) from error


def name_for_good(folder: Path, name: Path) -> None:
    """Rename a folder that is whole and on the disk; the new name, too, outlasts a crash of the machine."""
    folder.rename(name)
    _sync_entry(name.parent)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing.partial")


@contextmanager
def _only_writer(target: Path) -> Iterator[None]:
    path = _partial(target).with_suffix(".lock")
    try:
        lock = Lock(path, wait=False)
    except BlockingIOError:
        raise StorageError(
            expected="one process at a time that writes a folder",
            found="another one that is writing it now",
            where=str(target),
            next="wait for it or end it, or choose another name",
        ) from None
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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
