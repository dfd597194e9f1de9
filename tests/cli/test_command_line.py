"""`manipi` as its users run it: real processes, their exit codes and what they print."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.commands import run_manipi

import manipi
from manipi.cli import COMMANDS, commands, main
from manipi.cli.train import parse_train
from manipi.errors import ConfigError
from manipi.model import VLA
from manipi.recipes.registry import load_recipe, recipe_names
from manipi.records import write_json

RECIPE = """
from pathlib import Path
from manipi.train.run.folder import read_config
from manipi.train.config import TrainConfig

def recipe() -> TrainConfig:
    return read_config(Path(__file__).parent)
"""

KINDS = (
    "tabletop",
    "debug",
    "pi05_aloha",
    "pi05_droid",
    "pi0_fast_libero",
    "pi0_libero_low_mem_finetune",
    "paligemma_vq_droid",
)
"""Recipes that differ in the kinds of their settings: policy, adapters, tokenizer, where data are, whether they mix."""


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    done = run_manipi(*arguments)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory) -> str:
    """A recipe in a file of the user's own."""
    folder = tmp_path_factory.mktemp("user")
    write_json(folder / "config.json", tiny(steps=2))
    (folder / "types.py").write_text(RECIPE)  # a name that Python's library has too
    return f"{folder}/types.py:recipe"


# ---- the front page


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_command(arguments):
    printed = run(*arguments).stdout
    for name, text in commands().items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", printed, re.MULTILINE), name


def test_the_version():
    assert run("--version").stdout == f"manipi {manipi.__version__}\n"


def test_every_command_has_a_module_and_every_module_a_command():
    modules = {path.stem for path in Path(manipi.cli.__file__).parent.glob("*.py")}
    used = {target.removeprefix("manipi.cli.").partition(":")[0] for target, _ in COMMANDS.values()}
    assert modules - {"__init__", "arguments"} == used


WITHOUT_TORCH = """
import contextlib, io, sys
from manipi.cli import commands, main

helps = ([command, "--help"] for command in commands())
for arguments in ([], ["--help"], ["--version"], ["recipes"], ["train", "tabletop", "--help"], *helps):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main(arguments)
    assert said.getvalue().strip(), arguments
    assert "torch" not in sys.modules, arguments
"""


def test_what_answers_without_torch():
    """One process for all, so that the first of them that imports torch is named."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("recipes",)])
def test_a_reader_that_has_enough_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "manipi", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [(), ("recipes",)])
def test_printing_to_a_full_disk_is_one_error(arguments):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "manipi", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"\nmanipi {' '.join(arguments) or '--help'}: StorageError\nexpected room on the disk\n"
    )
    assert done.stderr.count("\n") == 6


@pytest.mark.parametrize("command", ["check {}", "inspect {}", "train {recipe} --run-dir run --data.path {}"])
def test_a_name_that_no_file_can_have(command, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(command.format("a" * 300, recipe=recipe).split())
    assert end.value.code == 1
    assert "expected a name that a file can have\n   found File name too long: " in capsys.readouterr().err


def test_a_name_in_another_encoding(recipe, toy_dataset, tmp_path, monkeypatch, capsys):
    """It is shown with its bytes; where it has to be written into a file of ours, one error says why it cannot be."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"n\xff")
    os.mkdir(name)
    with pytest.raises(SystemExit) as end:
        main(["check", name])
    assert end.value.code == 1
    assert r"n\udcff" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["train", recipe, "--run-dir", "run", "--data.path", name])
    assert end.value.code == 1
    printed = capsys.readouterr().err
    assert "ConfigError\nexpected names of files in UTF-8\n" in printed
    assert r"n\udcff" in printed


# ---- mistyped


def test_an_unknown_command():
    stderr = run("trian", code=1).stderr
    assert stderr.startswith(
        "\nmanipi trian: UnknownNameError\nexpected a command, one of: bench, check, compare, convert, "
    )
    assert stderr.endswith("    next did you mean train?\n")


def test_an_unknown_recipe():
    stderr = run("train", "tabeltop", code=1).stderr
    assert "expected a recipe, one of: debug, debug_pi05," in stderr
    assert "tabletop_memory, tabletop_pi0, tabletop_pi0_fast, tabletop_subtask\n   found 'tabeltop'" in stderr
    assert "next did you mean tabletop or" in stderr


def test_no_recipe():
    assert "expected a recipe first: tabletop" in run("train", code=1).stderr
    assert "found '--steps'" in run("train", "--steps", "3", code=1).stderr


def test_an_unknown_flag():
    stderr = run("train", "tabletop", "--stepz", "3", code=2).stderr
    assert "--stepz" in stderr
    assert "--steps INT" in stderr
    assert "--optimizer.lr FLOAT" in run("train", "tabletop", "--optimizer.lrr", "1", code=2).stderr


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.long) for name in recipe_names()]
)
def test_every_recipe_has_its_numbers_as_flags(name, capsys):
    config = load_recipe(name)
    with pytest.raises(SystemExit) as exit:
        parse_train(name, config, ["--help"])
    assert exit.value.code == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"--batch-size INT Observations per step, over all processes. (default: {config.batch_size})" in printed
    changed = parse_train(name, config, ["--data.path", "mine", "--optimizer.kind", "sgd", "--init", ""]).config
    expected = replace(config, data=replace(config.data, path="mine"), init="")
    assert changed == replace(expected, optimizer=replace(config.optimizer, kind="sgd"))


def test_a_recipe_that_has_no_dataset(tmp_path):
    for command in (["train", "pi0_droid", "--run-dir", str(tmp_path)], ["stats", "pi0_droid"]):
        stderr = run(*command, code=1).stderr
        assert "ConfigError\nexpected demonstrations of the recipe's robot to train on" in stderr
        assert "next --data.path FOLDER|URL, a dataset with what the recipe's robot names" in stderr


def test_the_table_of_recipes():
    lines = run("recipes").stdout.splitlines()
    assert lines[0].split() == ["recipe", "model", "robot", "dataset", "init", "steps", "batch"]
    assert len(lines) == 1 + len(recipe_names())
    rows = {line.split()[0]: line for line in lines}
    assert "0.9 droid/1.0.1 + 0.1 polaris_droid_cotrain_dataset/1.0.0" in rows["pi0_droid_jointpos_polaris"]
    assert rows["pi0_aloha"].split()[1:] == ["Pi0", "aloha", "–", "pi0_base", "30000", "32"]


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 4.00 GiB.", "CUDA error: misaligned address"])
def test_a_gpu_without_memory_in_any_command(said, monkeypatch, capsys):
    """What torch would raise there; other errors of torch stay what they are."""

    def fails(*_, **__):
        raise (torch.OutOfMemoryError if "memory" in said else RuntimeError)(said)

    monkeypatch.setattr(VLA, "to_empty", fails)
    arguments = ["bench", "infer", "tabletop", "--device", "cpu"]
    if "memory" not in said:
        with pytest.raises(RuntimeError, match="misaligned"):
            main(arguments)
        return
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 1
    assert "found 'CUDA out of memory. Tried to allocate 4.00 GiB.'" in capsys.readouterr().err


def test_a_value_that_cannot_be():
    stderr = run("train", "tabletop", "--batch-size", "0", code=1).stderr
    assert "expected at least 1\n   found 0\n   where TrainConfig.batch_size" in stderr
    assert "invalid" in run("train", "tabletop", "--steps", "many", code=2).stderr.lower()


def test_a_missing_dataset(tmp_path):
    absent = tmp_path / "absent"
    stderr = run("train", "tabletop", "--data.path", str(absent), "--run-dir", str(tmp_path / "run"), code=1).stderr
    assert stderr == (
        "\nmanipi train: DatasetNotFoundError\n"
        "expected the folder of a LeRobot dataset, with meta/info.json in it, or of an RLDS dataset's version\n"
        "   found nothing\n"
        f"   where {absent}\n"
        f"    next ls {tmp_path}  # then give the right path (--data.path, or --data.root for mixtures)\n"
    )


def test_a_run_folder_that_is_a_file(recipe, tmp_path):
    (tmp_path / "file").touch()
    stderr = run("train", recipe, "--run-dir", str(tmp_path / "file"), code=1).stderr
    assert "StorageError" in stderr
    assert "Traceback" not in stderr


def test_serving_what_is_no_checkpoint(tmp_path):
    stderr = run("serve", str(tmp_path), code=1).stderr
    assert "CheckpointError\nexpected a checkpoint folder (with a manifest.json)" in stderr


# ---- training


def test_train_a_recipe_of_ones_own(recipe, tmp_path):
    folder, result = tmp_path / "run", tmp_path / "result.json"
    done = run("train", recipe, "--run-dir", str(folder), "--json", str(result), "--seed", "7")
    checkpoint = folder / "checkpoints/2"
    said = r"memory  forecast (?!0\.0 )\d+\.\d MiB of tensors in a step; .* peaked at \d+\.\d\d GiB"
    assert re.search(said, done.stdout)
    assert f"checkpoint  {checkpoint}\n" in done.stdout
    assert f"next        manipi eval {checkpoint}" in done.stdout
    written = json.loads(result.read_text())
    assert written["checkpoint"] == str(checkpoint)
    assert written["step"] == 2
    assert written["loss"] > 0
    assert json.loads((folder / "config.json").read_text())["seed"] == 7
    refused = run("train", recipe, "--run-dir", str(folder), "--seed", "8", code=1).stderr
    assert "found seed was 7, now 8" in refused


def test_flags_change_numbers_and_nothing_else(tiny):
    config = tiny()
    flags = ["--run-dir", "x", "--steps", "9", "--optimizer.lr", "0.5", "--model.action-horizon", "3"]
    args = parse_train("tabletop", config, flags)
    expected = replace(config, steps=9, optimizer=replace(config.optimizer, lr=0.5))
    assert args.config == replace(expected, model=replace(config.model, action_horizon=3))
    assert args.run_dir == Path("x")
    assert parse_train("tabletop", config, []).config == config
    with pytest.raises(ConfigError, match=r"data\.holdout"):
        parse_train("tabletop", config, ["--data.holdout", "1.5"])
