"""Simulators with a Python of their own: their conventions, a trial in each, and docs/simulators.md's own one."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from manipi.cli import main
from manipi.evaluate.suites import Suite, suite_names

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/simulators.md").read_text(encoding="utf-8")
TRIED = {
    "metaworld": ("metaworld/recipe.py:pi05_metaworld", "metaworld/reach"),
    "libero": ("small.py:pi05_libero", "libero/light"),
    "aloha": ("small.py:pi0_aloha_sim", "aloha/light"),
}


@pytest.fixture(params=TRIED)
def simulator(request, monkeypatch) -> str:
    """A simulator whose environment is built."""
    if not (REPOSITORY / "simulators" / request.param / ".venv/bin/python").exists():
        pytest.skip(f"make sim-{request.param}")
    monkeypatch.setenv("MANIPI_SIMULATORS", str(REPOSITORY / "simulators"))
    return request.param


@pytest.mark.slow
def test_scenes_and_conventions(simulator):
    python = REPOSITORY / "simulators" / simulator / ".venv/bin/python"
    command = [python, Path(__file__).with_name("conventions.py"), simulator]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_trial_through_a_real_server(simulator, tmp_path):
    recipe, suite = TRIED[simulator]
    main(["init", f"{REPOSITORY / 'simulators' / recipe}", str(tmp_path / "small")])

    def evaluate(name, trials, *flags):
        settings = ["--trials", str(trials), "--films", "0", "--dir", str(tmp_path / name), *flags]
        main(["eval", str(tmp_path / "small"), "--suite", suite, *settings])
        return json.loads((tmp_path / name / "result.json").read_text())

    result = evaluate("one", 1)
    assert (result["suite"], result["success"]["n"], result["simulator"]["render"]) == (suite, 1, "light")
    assert {"mujoco", "gl", "image_size", "python"} <= result["simulator"].keys()
    (trial,) = result["trials"]
    assert trial["answers"] > 0
    assert trial["failure"] in ("max_steps", "the simulation became unstable", None)
    if simulator == "metaworld":  # the quickest
        assert evaluate("again", 2, "--workers", "2")["trials"][0] == trial


def test_adding_your_own(tmp_path, monkeypatch, capsys):
    """The page's files and commands, but that its environment is this one."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "simulators/dot"
    folder.mkdir(parents=True)
    (folder / ".venv").symlink_to(sys.prefix)
    for kind, text in blocks:
        name = "suite.json" if kind == "json" else Path(re.match(r"# (\S+)", text)[1]).name
        (folder / name).write_text(text, encoding="utf-8")
    assert len([line for line in (folder / "simulator.py").read_text().splitlines() if line.strip()]) <= 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MANIPI_SIMULATORS", raising=False)
    assert [name for name in suite_names() if name.startswith("dot")] == ["dot/both", "dot/coarse"]
    commands = [line.split() for line in re.findall(r"^    ((?:manipi|simulators/dot\S+) .*)$", PAGE, re.MULTILINE)]
    _, tried, init, evaluate = [command for command in commands if "dot" in str(command)]
    done = subprocess.run(tried, capture_output=True, text=True, timeout=120)
    said = [line.rpartition("; ")[2] for line in done.stdout.splitlines()]
    assert said == ["expert: success after 10", "expert: success after 7"], done.stderr
    main(init[1:])
    main([*evaluate[1:], "--films", "0", "--json", "result.json"])
    assert "dot/both: " in capsys.readouterr().out
    result = json.loads(Path("result.json").read_text())
    assert [trial["task"] for trial in result["trials"]] == ["left", "right"]


def test_the_page_has_every_field_of_a_suite():
    table = PAGE.partition("| field |")[2].partition("\n\n")[0]
    written = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert written == {field.name for field in fields(Suite)} - {"name", "python"}


def test_the_targets_are_those_of_the_makefile():
    targets = re.findall(r"^sim-(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    folders = [path.parent.name for path in (REPOSITORY / "simulators").glob("*/suite.json")]
    assert sorted(targets) == sorted(folders) == sorted(TRIED)
