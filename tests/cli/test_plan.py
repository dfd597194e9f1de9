"""`manipi plan`: tables, exit codes, mistyped GPUs, and the released sizes in seconds and little memory."""

import contextlib
import json
import re
import resource

import pytest
from tests.forks import FORKS

from manipi.cli.train import run_plan as main
from manipi.errors import ConfigError, UnknownNameError

SHALLOW = ["--model.vlm.depth", "1", "--model.action_expert.depth", "1", "--noise-draws=1"]
"""A step of few operations."""


def test_what_fits(capsys, tmp_path):
    flags = ["--json", f"{tmp_path}/a.json", "--plot", f"{tmp_path}/a.png", "--data.path", f"{tmp_path}/elsewhere"]
    main(["tabletop", "--gpu", "rtx4090", *SHALLOW, *flags])
    lines = capsys.readouterr().out.splitlines()
    assert "longest prompt  not measured: the data are not on this disk" in lines
    assert lines[0].startswith("tabletop, batch ")
    assert [line.split()[0] for line in lines[3:12]] == (
        ["weights", "optimizer", "average", "gradients", "batch", "activations", "temporary", "peak", "reserve"]
    )
    assert re.match(r"GPU +23\.98\d\d  fits, ", lines[12])
    assert re.match(r"peak +0\.0[0-9]*[1-9]", lines[10])  # a small model's is not rounded to nothing
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["fits"] is True
    assert sum(result["parts"].values()) == result["peak"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_exits_with_1_and_names_a_command_that_fits(capsys, tmp_path):
    own = ["--gpu=1.008GB", "--gpus", "1", "--json", f"{tmp_path}/a.json"]
    with pytest.raises(SystemExit) as exit:
        main(["tabletop", *own[:1], "--batch-size", "16", *own[1:], *SHALLOW])
    assert exit.value.code == 1
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert result["fits"] is False
    assert result["found"]["fits"] is True
    assert result["found"]["command"].startswith(f"manipi train tabletop --batch-size 16 {' '.join(SHALLOW)} --")
    assert f"\n  {result['found']['command']}\n" in printed
    assert "lacks" in printed


def test_the_longest_prompt_of_data_at_hand(capsys, recipe_file, tmp_path):
    main([f"{recipe_file}:my_recipe", *SHALLOW, "--json", f"{tmp_path}/a.json"])
    tokens = json.loads((tmp_path / "a.json").read_text())["longest_prompt"]["tokens"]
    assert f"longest prompt  {tokens} of 60 tokens (max_token_len): synthetic_lerobot_v30" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"--model.max-token-len {tokens}"):
        main([f"{recipe_file}:my_recipe", *SHALLOW, "--model.max-token-len", f"{tokens - 1}"])


def test_what_cannot_be_asked():
    with pytest.raises(UnknownNameError, match="did you mean rtx4090"):
        main(["tabletop", "--gpu", "rtx409"])
    with pytest.raises(ConfigError, match="24GB"):
        main(["tabletop", "--gpu", "24XB"])
    with pytest.raises(ConfigError, match="a recipe first"):
        main(["--gpu", "24GB"])


def plan_and_measure(recipe, said):
    with said.open("w") as output, contextlib.redirect_stdout(output):
        main([recipe, "--batch-size", "1"])
        print("resident", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # noqa: T201


@pytest.mark.slow
def test_a_released_size_needs_little_memory_here(tmp_path):
    said = tmp_path / "said"
    process = FORKS.Process(target=plan_and_measure, args=("pi0_fast_libero", said))
    process.start()
    process.join()
    rows = {line.split()[0]: line.split()[1] for line in said.read_text().splitlines() if line}
    assert float(rows["weights"]) == pytest.approx(4 * 2.923e9 / 2**30, rel=1e-3)
    assert 44 < float(rows["peak"]) < 60
    assert int(rows["resident"]) < 2e6
