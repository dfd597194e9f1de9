"""Killed at any moment, or on a full disk: nothing under the target's name, and nothing that stays for ever."""

import re
import shutil
import time
from pathlib import Path

import pytest
from tests.commands import Command, run_manipi

from manipi.checkpoints.native import read_checkpoint
from manipi.errors import StorageError
from manipi.exchange.exporting import Target, export_checkpoint, export_program
from manipi.exchange.importing import import_checkpoint
from manipi.storage import atomic_directory

pytest.importorskip("tensorstore", reason="Orbax checkpoints need tensorstore: pip install 'manipi[openpi]'")
TARGETS: tuple[Target, ...] = ("openpi-jax", "openpi-torch", "lerobot", "manipi")


def killed(target: Path, *arguments: object) -> None:
    """Run the command, and kill it as soon as something of the target is on disk."""
    process = Command(*arguments)
    partial = target.with_name(f".{target.name}.writing.partial")
    while not (partial.is_dir() and any(partial.rglob("*"))):
        assert process.poll() is None, process.said()
        time.sleep(0.0005)
    process.process.kill()
    process.process.join()
    assert process.poll() == -9
    assert partial.is_dir(), "it was done before it was killed"
    assert not target.exists()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_killed_import_leaves_nothing_after_the_next(exported, tmp_path):
    source = exported("pi05", "openpi-torch")
    for name in ("a", "b"):  # the same name again, and another one beside it
        killed(tmp_path / "a", "import", source, tmp_path / "a")
        result = run_manipi("import", source, tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert names(tmp_path) == {"a"} if name == "a" else {"b"}
        read_checkpoint(tmp_path / name)
        if name == "a":
            (tmp_path / "a").rename(tmp_path.parent / "done")


def test_a_killed_export_leaves_nothing_after_the_next(two_steps, tmp_path):
    for to in ("openpi-jax", "program"):
        folder = tmp_path / to
        folder.mkdir()
        killed(folder / "out", "export", two_steps, folder / "out", "--to", to)
        with atomic_directory(folder / "alive"):  # what another process is writing stays
            result = run_manipi("export", two_steps, folder / "other", "--to", "openpi-torch")
            assert result.returncode == 0, result.stderr
            assert names(folder) == {"other", ".alive.writing.partial", ".alive.writing.lock"}


@pytest.mark.parametrize("to", TARGETS)
def test_a_full_disk_says_what_is_missing(trained, exported, mount, to):
    disk = mount(1)
    for write in (
        lambda: export_checkpoint(trained("pi05"), to, disk / "out"),
        lambda: import_checkpoint(exported("pi05", to if to != "manipi" else "openpi-jax"), disk / "out"),
    ):
        (disk / "ballast").write_bytes(bytes(900_000))
        with pytest.raises(StorageError) as error:
            write()
        assert not list(disk.glob("*out*")), "nothing half-written"
        text = f"{error.value.expected}, {error.value.found}"
        if needed := re.search(r"room for ([\d.,]+) MB", text):
            free = re.search(r"([\d.,]+) MB free", text)
            assert free is not None
            assert float(needed[1]) > float(free[1]), text
        else:
            assert "No space left on device" in text


def test_a_program_on_a_full_disk(two_steps, mount):
    disk = mount(1)
    size = sum(weight.nbytes for weight in read_checkpoint(two_steps).weights.values())
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - size - 8192))  # for the weights, and no more
    with pytest.raises(StorageError, match=r"No space left on device: 0\.\d MB free when 0\.\d MB of it were written"):
        export_program(two_steps, disk / "out")
    assert names(disk) == {"ballast"}
    (disk / "ballast").write_bytes(bytes(900_000))
    with pytest.raises(StorageError, match="room for"):
        export_program(two_steps, disk / "out")
