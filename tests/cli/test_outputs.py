"""Where nothing can be written, a command says so before it does its work."""

import subprocess
import sys

import pytest

from manipi.cli import commands, main

OUTPUTS = {
    "bench": ["infer somewhere --json {}"],
    "check": ["somewhere --json {}", "somewhere --html {}"],
    "compare": ["a b --json {}"],
    "convert": ["somewhere target --json {}", "somewhere {folder}"],
    "demo": ["--json {}", "--dir {folder}"],
    "demonstrate": ["tabletop/reach {folder}"],
    "doctor": ["--json {}"],
    "eval": ["somewhere --json {}", "somewhere --plot {}", "somewhere --suite tabletop/reach --dir {folder}"],
    "export": ["somewhere target --to openpi-torch --json {}", "somewhere {folder} --to openpi-torch"],
    "filter": ["somewhere --json {}", "somewhere --out {}"],
    "import": ["somewhere target --json {}", "somewhere {folder}"],
    "init": ["tabletop {folder}"],
    "inspect": ["somewhere --json {}"],
    "plan": ["tabletop --json {}", "tabletop --plot {}"],
    "recipes": ["--json {}"],
    "record": ["--finish somewhere --json {}"],
    "replay": ["somewhere somewhere --json {}"],
    "serve": ["somewhere --ready-file {}"],
    "stats": [
        *(f"tabletop --{flag} {{}}" for flag in ("json", "out", "plot", "sketch")),
        "tabletop --fit-fast {folder}",
    ],
    "train": ["tabletop --json {}", "tabletop --run-dir {folder}"],
    "view": ["somewhere --out {}"],
}
CASES = [f"{command} {line}" for command, lines in OUTPUTS.items() for line in lines]


@pytest.fixture
def places(tmp_path):
    """Each kind of place where nothing can be written: (for a file, for a folder)."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    long = "x" * 300
    inside = {name: tmp_path / name / "new" for name in ("file",)} | {"proc": "/proc/new", "below proc": "/proc/a/new"}
    places = {name: (path, path) for name, path in inside.items()}
    places |= {"other kind": (tmp_path / "folder", tmp_path / "file"), "long": (tmp_path / long, tmp_path / long)}
    return places


def test_every_command_is_here():
    assert set(OUTPUTS) == set(commands())


@pytest.mark.parametrize("case", CASES)
def test_it_says_so_at_once(case, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind, (file, folder) in places.items():
        with pytest.raises(SystemExit) as exit:
            main(case.format(file, folder=folder).split())
        printed = capsys.readouterr().err
        assert (exit.value.code, "StorageError" in printed) == (1, True), f"{kind}: {printed}"
        assert str(folder if "{folder}" in case else file) in printed
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_system_that_is_mounted_to_be_read(mount, capsys):
    disk = mount(1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(SystemExit):
        main(["doctor", "--json", f"{disk}/new/out.json"])
    assert "Read-only file system" in capsys.readouterr().err


@pytest.mark.parametrize(("interval", "lines"), [(None, range(1, 3)), ("0", range(7, 99))])
def test_progress_in_a_log_is_a_line_now_and_then(tmp_path, monkeypatch, interval, lines):
    if interval:
        monkeypatch.setenv("TQDM_MININTERVAL", interval)
    made = ("demonstrate", "tabletop/reach", str(tmp_path / "data"), "--episodes", "6", "--workers", "1")
    done = subprocess.run([sys.executable, "-m", "manipi", *made], check=True, capture_output=True, text=True)
    assert done.stderr.count("demonstrate:") in lines
