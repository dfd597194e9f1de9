import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from manipi.errors import StorageError
from manipi.storage import atomic_directory, atomic_write, remove_partial, storage_errors


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
    assert error.value.found == "No space left on device (1 MB free)"  # counted after the cleaning up
    assert error.value.where == str(disk / "folder")
    assert list(disk.iterdir()) == []


def test_a_full_disk_leaves_the_file_as_it_was(mount):
    disk = mount(1)
    atomic_write(disk / "file", b"old")
    with pytest.raises(StorageError, match="No space left"):
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


def test_what_a_killed_process_left_is_removed(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from manipi.storage import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'a').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "folder")])
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    (tmp_path / ".hidden").touch()
    (tmp_path / ".file.1.partial").touch()
    assert (left / "a").exists()
    remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".hidden"]
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
