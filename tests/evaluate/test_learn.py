"""`benchmarks/learn.py`, which `make metaworld` runs: stages that are there are skipped; and the page of results."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def result(successes: list[bool]) -> dict:
    trials = [{"task": ("reach", "push")[i % 2], "success": won} for i, won in enumerate(successes)]
    return {"suite": "family/two", "seed": 0, "step": 5, "trials": trials}


class Manipi:
    """Stands for the commands: notes which ran, and writes what each leaves. Dies in the one that it is told."""

    def __init__(self, monkeypatch):
        self.ran: list[str] = []
        self.dies_in, self.stops_at, self.returncode = "", 5, 0
        monkeypatch.setattr(subprocess, "Popen", self)

    def wait(self):
        return self.returncode

    def terminate(self):
        pass

    def __call__(self, command):
        assert command[:3] == [sys.executable, "-m", "manipi"]
        name, flags = command[3], command[4:]
        control = next((flag for flag in flags if flag in ("--blind", "--wrong-words", "--untrained")), "")
        self.ran.append(name + control)
        self.returncode = 75 if self.ran[-1] == self.dies_in else 0
        if self.returncode:
            return self
        if name == "demonstrate":
            Path(flags[1]).mkdir()
        elif name == "eval":
            place = Path(flags[flags.index("--dir") + 1])
            place.mkdir(parents=True)
            (place / "result.json").write_text(json.dumps(result([not control] * 4)))
        elif name == "train":
            run = Path(flags[flags.index("--run-dir") + 1])
            (run / "checkpoints" / str(self.stops_at)).mkdir(parents=True)
            (run / "config.json").write_text(json.dumps({"steps": 5}))
        else:
            Path(flags[flags.index("--json") + 1]).write_text("{}")
        return self


@pytest.fixture
def learn(monkeypatch, tmp_path):
    def run(*flags):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr(
            sys, "argv", ["learn.py", "family/two", "--recipe", "r.py:r", "--dir", str(tmp_path), *flags]
        )
        runpy.run_path(str(ROOT / "benchmarks/learn.py"), run_name="__main__")
        return json.loads((tmp_path / "table.json").read_text())

    return run


def test_it_goes_on_where_it_was_stopped(learn, monkeypatch, tmp_path):
    manipi = Manipi(monkeypatch)
    manipi.dies_in = "train"
    with pytest.raises(SystemExit) as end:
        learn()
    assert end.value.code == 75
    assert manipi.ran == ["demonstrate", "check", "train"]
    first = json.loads((tmp_path / "seconds.json").read_text())
    manipi.ran, manipi.dies_in = [], "eval--blind"
    with pytest.raises(SystemExit):
        learn()
    assert manipi.ran == ["train", "eval", "eval--blind"]
    manipi.ran, manipi.dies_in = [], ""
    found = learn()
    assert manipi.ran == ["eval--blind", "eval--wrong-words", "eval--untrained"]
    assert json.loads((tmp_path / "seconds.json").read_text())["train"] > first["train"]
    assert found["columns"] == ["task", "trained", "blind", "wrong words", "untrained"]
    assert [row[:2] for row in found["rows"]] == [
        ["reach", "2/2 (34 to 100 %)"],
        ["push", "2/2 (34 to 100 %)"],
        ["all", "4/4 (51 to 100 %)"],
    ]
    manipi.ran = []
    assert learn() == found
    assert manipi.ran == []


def test_training_that_a_signal_ended_is_not_done(learn, monkeypatch):
    manipi = Manipi(monkeypatch)
    manipi.stops_at = 3
    with pytest.raises(SystemExit, match="before its last step"):
        learn()
    manipi.ran, manipi.stops_at = [], 5
    learn()
    assert manipi.ran[0] == "train"


def test_a_command_ends_with_the_benchmark_that_runs_it(tmp_path):
    made = (
        f"import harness; harness.manipi('demonstrate', 'tabletop/reach', {str(tmp_path / 'd')!r}, '--episodes', 9999)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen([sys.executable, "-c", made], env=environment, stderr=subprocess.DEVNULL) as benchmark:
        while not list(tmp_path.glob(".d.episodes/*")):
            assert benchmark.poll() is None
            time.sleep(0.1)
        (commands,) = Path(f"/proc/{benchmark.pid}/task").glob("*/children")
        (command,) = commands.read_text().split()
        benchmark.terminate()
    assert benchmark.returncode == 143
    assert not Path(f"/proc/{command}").exists()


def test_another_size_needs_another_folder(learn, monkeypatch):
    Manipi(monkeypatch)
    learn("--episodes", "8")
    with pytest.raises(SystemExit, match="name another --dir"):
        learn("--episodes", "9")


def test_trials_of_another_seed_are_others(learn, monkeypatch, tmp_path):
    manipi = Manipi(monkeypatch)
    learn("--seed", "1")
    manipi.ran = []
    learn()
    assert manipi.ran == ["eval", "eval--blind", "eval--wrong-words", "eval--untrained"]


def test_the_page_of_results_is_what_the_files_say(tmp_path):
    write = runpy.run_path(str(ROOT / "docs/make_results.py"))
    found = {
        "title": "T",
        "command": "make t",
        "columns": ["task", "won"],
        "rows": [["a", "1/2"]],
        "text": "As measured.",
    }
    (tmp_path / "t.json").write_text(json.dumps(found))
    assert write["page"](tmp_path).endswith(
        "## T\n\n```sh\nmake t\n```\n\n| task | won |\n| --- | --- |\n| a | 1/2 |\n\nAs measured.\n"
    )
    assert write["page"](ROOT / "docs/results") == (ROOT / "docs/results.md").read_text(encoding="utf-8")
