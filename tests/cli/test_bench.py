"""`manipi bench infer`, and the report without which `manipi serve` serves nothing in 8 bits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.commands import Interpreter, run_manipi

from manipi.checkpoints.native import report_path, require_report
from manipi.cli.bench import main
from manipi.errors import CheckpointError, ConfigError
from manipi.evaluate.policies import policy_server
from manipi.policy import Policy
from manipi_client import WebsocketPolicy

OBSERVATION = {
    "observation/image": np.full((30, 40, 3), 90, np.uint8),
    "observation/state": np.array([0.01, -0.02, 0.03, 1.0]),
    "prompt": "reach it",
}


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained("pi05"), tmp_path / "2"))


@pytest.fixture
def measured(checkpoint, toy_dataset) -> Path:
    """A checkpoint with a report."""
    arguments = ["infer", f"{checkpoint}", "--rounds", "1", "--quantize", "int8", "--data", f"{toy_dataset}"]
    main([*arguments, "--frames", "4"])
    return checkpoint


@pytest.mark.parametrize(("recipe", "stages"), [("tabletop", 12), ("tabletop_pi0", 12), ("tabletop_pi0_fast", 3)])
def test_stages_of_a_recipe(capsys, tmp_path, recipe, stages):
    main(["infer", recipe, "--rounds", "3", "--json", f"{tmp_path}/a.json"])
    found = json.loads((tmp_path / "a.json").read_text())["latency"]
    assert len(found["stages"]) == stages
    names = [stage["name"] for stage in found["stages"]]
    assert names[:2] == ["images", "prefix"]
    assert all(0 < stage["p50"] <= stage["p95"] <= stage["p99"] for stage in found["stages"])
    assert all(stage["gflop"] > 0 and stage["megabytes"] > 0 and stage["share"] > 0 for stage in found["stages"])
    assert found["peak_gflops"] > 0
    assert found["bandwidth_gbs"] > 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in (*names, "total"))


def test_a_checkpoint_has_its_transforms_timed_and_its_error_measured(capsys, measured):
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ("encode", "images", "step 9", "decode", "total"))
    assert "it may be served" in printed
    report = require_report(measured, "int8")
    assert (report.frames, report.dataset) == (4, "dataset")
    assert 0 < report.difference < 0.02
    assert len(report.per_dimension) == 4
    assert abs(report.error - report.plain_error) <= report.difference


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["infer", "tabletop", "--data", "d"], ["infer", "tabletop", "--rounds=0"]]
)
def test_what_cannot_be_asked(arguments):
    with pytest.raises(ConfigError):
        main(arguments)


def test_a_report_is_of_one_checkpoint_and_one_quantization(measured, trained, tmp_path):
    other = Path(shutil.copytree(trained("pi0"), tmp_path / "other/2"))
    with pytest.raises(CheckpointError, match="no such file"):
        require_report(other, "int8")
    shutil.copy(report_path(measured, "int8"), report_path(other, "int8"))
    with pytest.raises(CheckpointError, match="one of int8 for"):
        require_report(other, "int8")
    shutil.copy(report_path(measured, "int8"), report_path(measured, "fp8"))
    with pytest.raises(CheckpointError, match="one of int8"):
        require_report(measured, "fp8")


def test_a_large_difference_is_not_served(measured):
    path = report_path(measured, "int8")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"difference": 0.03}))
    with pytest.raises(CheckpointError, match=r"3\.00% of the travel"):
        require_report(measured, "int8")


@pytest.mark.slow
def test_the_server_refuses_8_bits_without_a_report_and_serves_them_with_one(checkpoint, toy_dataset):
    refused = run_manipi("serve", checkpoint, "--port", "0", "--quantize", "int8")
    assert refused.returncode == 1
    assert f"manipi bench infer {checkpoint} --quantize int8 --data DATASET" in refused.stderr
    main(["infer", f"{checkpoint}", "--rounds", "1", "--quantize", "int8", "--data", f"{toy_dataset}", "--frames", "4"])
    policy = Policy.load(checkpoint)
    plain = np.clip(policy.infer(OBSERVATION)["actions"], *policy.robot.limits)  # as the server's guard does
    with policy_server(checkpoint, flags=("--quantize", "int8")) as port, WebsocketPolicy(port=port) as client:
        actions = client.infer(OBSERVATION)["actions"]
    assert 0 < np.abs(actions - plain).max() < 0.02


@pytest.mark.slow
def test_where_nothing_compiles_the_port_stays_shut(trained, tmp_path):
    ready = tmp_path / "ready"
    flags = ("--port", "0", "--compile", "--num-threads", "1", "--ready-file", ready)
    command = [sys.executable, "-m", "manipi", "serve", trained("pi05"), *flags]
    home = {"MANIPI_HOME": str(tmp_path), "CXX": str(tmp_path / "no-compiler")}
    with (tmp_path / "said").open("w") as output:
        server = Interpreter(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | home)
    assert server.wait(120) == 1
    said = (tmp_path / "said").read_text()
    assert "ConfigError" in said
    assert "leave --compile out" in said
    assert not ready.exists()
