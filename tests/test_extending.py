"""docs/extending.md is true: the package that it shows adds a command, a robot, a recipe, a reader, a suite."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from manipi import extensions
from manipi.cli import main
from manipi.data.open import open_dataset
from manipi.errors import ConfigError, DatasetFormatError, ManipiError, UnknownNameError
from manipi.evaluate.suites import find_suite, suite_names
from manipi.recipes.registry import load_recipe, load_robot, recipe_names
from manipi_client.trials import load_factory, try_task

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")


def install(folder: Path, name: str, groups: dict[str, dict[str, str]]) -> None:
    """The metadata of an installed package, as pip leaves them."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    sections = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in table.items())
        for group, table in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(sections))


def places(package: Path) -> str:
    """PYTHONPATH with the package in it."""
    return os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The page's files as an installed package, in a folder of its own on the path; forgotten afterwards."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    site = tmp_path / "site"
    for kind, text in blocks:
        if kind == "toml":
            project = tomllib.loads(text)["project"]
            install(site, project["name"], project["entry-points"])
        elif kind == "python":
            file = site / re.match(r"# (\S+)", text)[1]
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield site
    for module in set(sys.modules) - before:
        if module.startswith("manipi_line"):
            del sys.modules[module]


def test_each_is_used_on_the_command_line(package, monkeypatch, capsys):
    main(["--help"])
    assert re.search(r"^  line-demo +Record demonstrations of the line$", capsys.readouterr().out, re.MULTILINE)
    assert not [module for module in sys.modules if module.startswith("manipi_line")]
    main(["line-demo", "recordings"])
    assert capsys.readouterr().out == "8 episodes in recordings\n"
    main(["recipes"])
    assert re.search(r"^pi05_line +Pi05 +line +recordings ", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit) as end:
        main(["check", "recordings", "--robot", "line"])
    assert end.value.code == 0
    assert "8 episodes · 96 frames · cameras: 1" in capsys.readouterr().out
    main(["inspect", "recordings"])
    assert re.search(r"format +manipi_line.recordings.LineDataset\n", capsys.readouterr().out)
    main(["inspect", "pi05_line"])
    assert "the first frame, episode 0" in capsys.readouterr().out
    main(
        [
            "train",
            "pi05_line",
            "--run-dir",
            "run",
            "--steps",
            "2",
            "--data.episodes",
            "1",
            "3",
            "5",
            "--num-threads",
            "1",
        ]
    )
    assert "checkpoint  run/checkpoints/2" in capsys.readouterr().out
    monkeypatch.setenv("PYTHONPATH", places(package))  # the policy server is a process of its own
    settings = ["--trials", "1", "--delay", "1", "--films", "0", "--json", "eval.json"]
    main(["eval", "run/checkpoints/2", "--suite", "line/middle", *settings])
    result = json.loads(Path("eval.json").read_text())
    assert (result["suite"], result["options"], result["success"]["n"]) == ("line/middle", {"image_size": 16}, 1)


def test_the_suite_is_found_by_name_and_its_simulator_holds_what_trials_rely_on(package):
    suite = find_suite("line/middle")
    assert {"line/middle", "tabletop/reach"} <= set(suite_names())
    assert "expert: success after" in try_task(load_factory(suite.factory)(image_size=16), "")
    install(package, "broken-package", {"manipi.suites": {"broken": "broken:SUITES"}})
    with pytest.raises(UnknownNameError, match="did you mean line/middle"):
        find_suite("line/midle")
    with pytest.raises(ConfigError, match="the package broken-package"):
        find_suite("broken/one")


def test_our_own_are_entry_points_like_any_other():
    assert {"demo", "convert"} <= set(extensions.entries("manipi.commands"))
    assert {"tabletop", "tabletop_pi0", "tabletop_pi0_fast"} <= set(recipe_names())
    assert load_robot("tabletop") == load_recipe("tabletop").robot
    assert load_robot("ur5").name == "ur5"


def test_an_unknown_name_has_the_closest_of_all_packages(package):
    with pytest.raises(UnknownNameError, match="did you mean pi05_line"):
        load_recipe("pi05_lin")
    with pytest.raises(UnknownNameError, match="did you mean line"):
        load_robot("lines")
    with pytest.raises(UnknownNameError, match="did you mean line-demo"):
        extensions.find("manipi.commands", "lin-demo")


@pytest.mark.parametrize(
    ("name", "group", "value", "packages"),
    [
        ("pi05_line", "recipes", "other:recipe", "manipi-line and other"),
        ("tabletop", "recipes", "other:recipe", "manipi and other"),
        ("pi0_droid", "recipes", "other:recipe", "other and manipi"),
        ("train", "commands", "other:main", "other and manipi"),
    ],
)
def test_two_packages_with_one_name(name, group, value, packages, package, capsys):
    install(package, "other", {f"manipi.{group}": {name: value}})
    with pytest.raises(SystemExit):
        main([name, "tabletop"] if group == "commands" else ["inspect", name])
    printed = capsys.readouterr().err
    assert f"found 2: {packages}\n" in printed
    assert f"next pip uninstall {packages.replace('manipi and ', '').split()[0]}  #" in printed


@pytest.mark.parametrize(
    ("source", "error", "found"),
    [
        (None, ConfigError, "ModuleNotFoundError: No module named 'broken'"),
        ("import no_such_library", ConfigError, "ModuleNotFoundError: No module named 'no_such_library'"),
        ("x = 1 / 0", ConfigError, "ZeroDivisionError: division by zero"),
        ("", ConfigError, "AttributeError: module 'broken' has no attribute 'main'"),
        ("raise SystemExit(3)", ConfigError, "SystemExit: 3"),
        (
            "from manipi import Joints, Robot\nRobot(name='', cameras={}, state=(), actions=(Joints(0),))",
            ManipiError,
            "0",
        ),
    ],
)
def test_what_cannot_be_imported_names_its_package(source, error, found, package):
    install(package, "broken-package", {"manipi.commands": {"broken": "broken:main"}})
    if source is not None:
        (package / "broken.py").write_text(source)
    with pytest.raises(error) as caught:
        extensions.find("manipi.commands", "broken")
    sys.modules.pop("broken", None)
    assert caught.value.found == found
    assert "the package broken-package, entry point broken = broken:main of manipi.commands" in caught.value.where


@pytest.mark.parametrize(
    ("source", "listed"),
    [
        (None, "cannot be used: the package broken-package has no module broken"),
        ("def", "cannot be used: broken of the package broken-package: invalid syntax"),
        ('"""`manipi broken`: does\x07 it.\n\nMore."""\nraise SystemExit', r"does\x07 it"),
        ("", ""),
    ],
)
def test_the_help_reads_what_it_does_not_import(source, listed, package, capsys):
    install(package, "broken-package", {"manipi.commands": {"broken": "broken:main"}})
    if source is not None:
        (package / "broken.py").write_text(source)
    main(["--help"])
    assert re.search(rf"^  broken +{re.escape(listed)}", capsys.readouterr().out, re.MULTILINE)
    assert "broken" not in sys.modules


@pytest.mark.parametrize("value", ["no module!", "", "broken:", "::"])
def test_the_help_has_the_other_commands_where_an_entry_is_none(value, package, capsys):
    install(package, "broken-package", {"manipi.commands": {"broken": value}})
    main(["--help"])
    printed = capsys.readouterr().out
    assert f"cannot be used: {value!r} of the package broken-package is no module:function" in printed
    assert re.search(r"^  line-demo +Record", printed, re.MULTILINE)


def test_the_list_of_recipes_has_the_others_where_one_cannot_be_used(package, capsys):
    install(package, "broken-package", {"manipi.recipes": {"broken": "broken:recipe"}})
    with pytest.raises(SystemExit) as end:
        main(["recipes"])
    printed = capsys.readouterr()
    assert end.value.code == 1
    assert "ModuleNotFoundError: No module named 'broken'" in printed.err
    assert re.search(r"^broken +cannot be used", printed.out, re.MULTILINE)
    assert re.search(r"^pi05_line +Pi05 ", printed.out, re.MULTILINE)


def test_what_is_installed_meanwhile_is_found(package):
    with pytest.raises(UnknownNameError):
        extensions.find("manipi.commands", "later")
    install(package, "later", {"manipi.commands": {"later": "manipi_line.demo:main"}})
    assert callable(extensions.find("manipi.commands", "later"))
    shutil.rmtree(package / "later-1.0.dist-info")
    with pytest.raises(UnknownNameError):
        extensions.find("manipi.commands", "later")


@pytest.mark.parametrize("group", ["recipes", "suites", "commands", "datasets"])
def test_an_object_of_another_kind_names_its_package(group, package):
    install(package, "odd", {f"manipi.{group}": {"odd": "manipi_line.recordings:TASK"}})
    with pytest.raises(ConfigError, match=r"which has .*\n *found 'go to the middle'\n *where the package odd, entry"):
        extensions.find(f"manipi.{group}", "odd")


@pytest.mark.parametrize("function", ["recognises", "open"])
def test_a_reader_that_fails_names_its_package(function, package):
    source = "def recognises(root): return True\ndef open(root, episodes): raise KeyError('x')\n"
    (package / "odd.py").write_text(source + f"def {function}(*given): raise KeyError('x')\n")
    install(package, "odd", {"manipi.datasets": {"odd": "odd"}})
    (package / "empty").mkdir()
    with pytest.raises(DatasetFormatError, match=r"reader odd of the package odd can read\n *found KeyError: 'x'"):
        open_dataset(package / "empty")
    sys.modules.pop("odd")


def test_values_of_other_kinds(package):
    entries = {"manipi.recipes": {"odd": "manipi_line.recordings:TASK"}, "manipi.robots": {"odd": "json:dumps"}}
    install(package, "odd", {**entries, "manipi.datasets": {"twice": "manipi_line.recordings"}})
    with pytest.raises(ConfigError, match="found 'go to the middle'"):
        load_recipe("odd")
    with pytest.raises(ConfigError, match="TypeError"):
        load_robot("odd")
    main(["line-demo", "recordings"])
    with pytest.raises(ConfigError, match="dataset readers recognise: npz, twice"):
        open_dataset("recordings")


def test_a_fresh_process_finds_it(package):
    command = [sys.executable, "-m", "manipi", "line-demo"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": places(package)})
    assert (done.returncode, done.stderr) == (1, "usage: manipi line-demo FOLDER\n")
