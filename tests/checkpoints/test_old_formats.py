"""Checkpoints of earlier formats still load and answer as they did; of later ones, one clear error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.checkpoints.test_native import sign_again

import manipi
from manipi.checkpoints.native import FORMAT, describe_checkpoint, read_checkpoint, write_checkpoint
from manipi.errors import CheckpointError
from manipi.policy import Policy

RECORDED = Path(__file__).parents[1] / "fixtures/checkpoints_0_1_0"
"""By policy: a checkpoint that manipi 0.1.0 wrote, and what 0.1.0 answered to another observation."""


@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_fast"])
def test_a_checkpoint_of_0_1_0_answers_as_it_did(kind, tmp_path):
    folder = RECORDED / kind / "checkpoint"
    assert "format" not in json.loads((folder / "config.json").read_text())
    policy = Policy.load(folder)  # replays its self-test
    with np.load(RECORDED / kind / "recorded.npz", allow_pickle=False) as recorded:
        observation = {k.partition("|")[2]: recorded[k] for k in recorded.files if k.startswith("observation|")}
        actions = policy.infer(observation, recorded["noise"])["actions"]
        np.testing.assert_allclose(actions, recorded["actions"], rtol=0, atol=1e-5)
        # Other processors and other versions of torch add in another order.
        if str(recorded["computed_by"]) == f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}":
            assert np.array_equal(actions, recorded["actions"])
    write_checkpoint(tmp_path / "again", read_checkpoint(folder))
    assert json.loads((tmp_path / "again/config.json").read_text())["format"] == FORMAT
    assert describe_checkpoint(tmp_path / "again").config == policy.config == read_checkpoint(tmp_path / "again").config


@pytest.mark.parametrize("number", [FORMAT + 1, 0, "new", None])
def test_another_format_is_one_clear_error(number, tmp_path):
    folder = shutil.copytree(RECORDED / "pi0/checkpoint", tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"format": number, **config, "surplus": 1}))
    sign_again(folder)
    with pytest.raises(CheckpointError) as error:
        Policy.load(folder)
    assert f"format 1 to {FORMAT}, which manipi {manipi.__version__} reads" in error.value.expected
    assert error.value.found == f"format {number!r}"
    assert "upgrade" in error.value.next
