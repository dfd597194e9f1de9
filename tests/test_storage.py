import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manipi.errors import StorageError
from manipi.storage import (
    atomic_directory,
    atomic_write,
    remove_dead,
    remove_partial,
    require_folder,
    require_room,
    storage_errors,
)


def test_the_folder_appears_whole(tmp_path):
    target = tmp_path / "new" / "folder"
    with atomic_directory(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [p.name for p in target.parent.iterdir()] == ["folder"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_when_the_block_fails(tmp_path, error):
    def fail(partial: Path) -> None:
        (partial / "a").write_text("1")
        raise error

    with pytest.raises(error), atomic_directory(tmp_path / "folder") as partial:
        fail(partial)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(StorageError, match="does not exist yet"), atomic_directory(tmp_path / "folder"):
        pytest.fail("the block must not run")
    assert (tmp_path / "folder" / "old").exists()


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    other = tmp_path / "folder" / "of another process"
    with pytest.raises(StorageError, match="something of that name"), atomic_directory(tmp_path / "folder"):
        other.mkdir(parents=True)
    assert list(tmp_path.rglob("*")) == [other.parent, other]


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"Not a directory|File exists"), atomic_directory(tmp_path / "file" / "x"):
        pytest.fail("the block must not run")
    with pytest.raises(StorageError, match=r"Not a directory|File exists"):
        atomic_write(tmp_path / "file" / "x", b"1")


def test_a_full_disk(mount):
    disk = mount(1)
    with pytest.raises(StorageError) as error, atomic_directory(disk / "folder") as partial:
        (partial / "large").write_bytes(bytes(2_000_000))
    # Counted where it failed, not after the cleaning up. Of the room, one page is the folder's.
    assert error.value.found == "No space left on device: 0.0 MB free when 1.0 MB of it were written"
    assert error.value.where == str(disk / "folder")
    assert list(disk.iterdir()) == []


def test_a_full_disk_leaves_the_file_as_it_was(mount):
    disk = mount(1)
    atomic_write(disk / "file", b"old")
    with pytest.raises(StorageError, match=r"room for 2 MB\n   found 1 MB free"):
        atomic_write(disk / "file", bytes(2_000_000))
    assert (disk / "file").read_bytes() == b"old"
    assert list(disk.iterdir()) == [disk / "file"]


def test_a_read_only_folder(mount):
    disk = mount(1)
    (disk / "file").write_bytes(b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"), atomic_directory(disk / "folder"):
        pytest.fail("the block must not run")
    with pytest.raises(StorageError, match="Read-only file system"):
        atomic_write(disk / "file", b"new")
    assert (disk / "file").read_bytes() == b"old"


def test_other_errors_of_the_operating_system_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(StorageError, match="Input/output error"), storage_errors(tmp_path / "not" / "yet"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_needed_and_free_never_look_equal(mount):
    disk = mount(1)
    free = shutil.disk_usage(disk).free
    for size in (free + 1, free + 1000, free + 100_000, 5 * free):
        with pytest.raises(StorageError) as error:
            require_room(disk, size, "less")
        needed, there = (re.findall(r"[\d.,]+", text)[0] for text in (error.value.expected, error.value.found))
        assert float(needed.replace(",", "")) > float(there), str(error.value)
    require_room(disk, free, "less")


def test_a_right_that_is_missing_says_nothing_of_room(tmp_path):
    with pytest.raises(StorageError) as error, storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert error.value.found == "Permission denied"


WRITING = """
import sys, time; from pathlib import Path; from manipi.storage import atomic_directory, atomic_write
with atomic_directory(Path(sys.argv[1])) as partial:
    (partial / 'a').touch(); print('begun', flush=True); time.sleep(60)
"""


@pytest.fixture
def writer():
    """`writer(target)` is a process that has begun to write that folder."""
    started = []

    def start(target: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", WRITING, str(target)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_process_left_goes_with_the_next_writer_of_that_name(tmp_path, writer):
    process = writer(tmp_path / "folder")
    with pytest.raises(StorageError, match="another one that is writing it now"), atomic_directory(tmp_path / "folder"):
        pytest.fail("the block must not run")
    process.kill()
    process.wait()
    assert names(tmp_path) == {".folder.writing.partial", ".folder.writing.lock"}
    with atomic_directory(tmp_path / "folder") as partial:
        assert list(partial.iterdir()) == []
    assert names(tmp_path) == {"folder"}


def test_what_killed_processes_left_is_told_from_what_is_being_written(tmp_path, writer):
    dead, _ = writer(tmp_path / "dead"), writer(tmp_path / "alive")
    dead.kill()
    dead.wait()
    for name in (".hidden", ".set.partial", ".set.lock", ".old.abcdefgh.partial"):  # a download's and others'
        (tmp_path / name).mkdir()
    kept = names(tmp_path) - {".dead.writing.partial", ".dead.writing.lock"}
    remove_dead(tmp_path)
    assert names(tmp_path) == kept
    assert (tmp_path / ".alive.writing.partial/a").exists()
    remove_dead(tmp_path / "absent")


def test_a_file_that_a_killed_process_left_is_taken_up(tmp_path):
    (tmp_path / ".file.writing.partial").write_bytes(bytes(1000))
    atomic_write(tmp_path / "file", b"new")
    assert names(tmp_path) == {"file"}
    assert (tmp_path / "file").read_bytes() == b"new"


def test_processes_that_write_one_file_wait_for_each_other(tmp_path):
    script = (
        "import sys; from pathlib import Path; from manipi.storage import atomic_write\n"
        "for i in range(200): atomic_write(Path(sys.argv[1]), sys.argv[2].encode() * 5000)"
    )
    path = tmp_path / "file"
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), word]) for word in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert path.read_bytes() in [word * 5000 for word in (b"a", b"b", b"c")]
    assert names(tmp_path) == {"file"}


def test_the_one_writer_of_a_folder_removes_all_that_is_partial(tmp_path, writer):
    process = writer(tmp_path / "folder")
    process.kill()
    process.wait()
    (tmp_path / ".hidden").touch()
    (tmp_path / ".file.1.partial").touch()
    remove_partial(tmp_path)
    assert names(tmp_path) == {".hidden"}
    remove_partial(tmp_path / "absent")


def test_only_what_is_taken_back_is_said_to_be(tmp_path):
    """Half a line of a log stays where the disk filled up, so that its error must not claim otherwise."""
    claim = "nothing half-written was left"
    with pytest.raises(StorageError) as error, storage_errors(tmp_path / "log"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert claim not in error.value.next
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=claim):
        atomic_write(tmp_path / "file" / "x", b"1")
    with pytest.raises(StorageError, match=claim), atomic_directory(tmp_path / "file" / "x"):
        pytest.fail("the block must not run")


def test_processes_of_the_same_number_may_look_at_once(tmp_path):
    """On several hosts, in containers, the ranks of a run have the same number and the same folder."""
    (tmp_path / f".run.{os.getpid()}.partial").mkdir()
    require_folder(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == [f".run.{os.getpid()}.partial"]


def test_what_another_process_is_writing_stays(tmp_path):
    """As of an export into the folder of a run that is started meanwhile."""
    (tmp_path / ".old.k3j2.partial").mkdir()
    (tmp_path / ".dead.txt.writing.partial").write_text("half")
    (tmp_path / ".file.txt.writing.partial").write_text("half")
    with (tmp_path / ".file.txt.writing.partial").open() as file, atomic_directory(tmp_path / "export") as folder:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "a").write_text("whole")
        remove_partial(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            ".export.writing.partial",
            ".export.writing.lock",
            ".file.txt.writing.partial",
        }
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export/a").read_text() == "whole"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOLCK, "on another file system"),
        (errno.EOPNOTSUPP, "on another file system"),
        (errno.EROFS, "choose another folder"),
        (errno.ENOSPC, "free some space"),
    ],
)
def test_the_advice_fits_the_cause(number, advice, tmp_path):
    with pytest.raises(StorageError) as error, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert advice in error.value.next
