"""The exported program, loaded in a process that knows torch alone."""

import json
import subprocess
import sys

import numpy as np
import pytest

from manipi.checkpoints.native import read_checkpoint
from manipi.cli.exchange import run_export as main
from manipi.errors import ConfigError
from manipi.policy import Policy

RUN = """
import sys, json, numpy, torch
folder = sys.argv[1]
contract = json.load(open(folder + "/contract.json"))
stored = numpy.load(sys.argv[2])
inputs = {one["name"]: torch.from_numpy(stored[one["name"]]) for one in contract["inputs"]}
for one in contract["inputs"]:
    assert list(inputs[one["name"]].shape) == one["shape"], one
    assert str(inputs[one["name"]].dtype) == "torch." + one["dtype"], one
actions = torch.export.load(folder + "/program.pt2").module()(**inputs)
assert list(actions.shape) == contract["outputs"][0]["shape"]
assert not any(name.split(".")[0] == "manipi" for name in sys.modules)
numpy.save(sys.argv[3], actions.numpy())
"""


@pytest.mark.slow
def test_it_acts_like_the_policy_for_any_prompt_and_noise(two_steps, tmp_path, capsys):
    target = tmp_path / "program"
    main([str(two_steps), str(target), "--to", "program"])
    assert "largest difference" in capsys.readouterr().out
    contract = json.loads((target / "contract.json").read_text())
    assert (contract["contract"], contract["num_steps"], contract["cameras"]) == (1, 2, ["base"])
    policy, test = Policy.load(two_steps, seed=9), read_checkpoint(two_steps).self_test
    assert test is not None
    observation = {**test.observation, "prompt": "another one"}
    inputs = policy.model_input([policy.encode(observation)])
    noise = policy.draw_noise()[None]
    arrays = {name: getattr(inputs, name).numpy() for name in ("images", "tokens", "token_valid", "state")}
    np.savez(tmp_path / "in.npz", noise=noise, **arrays)
    paths = [str(target), str(tmp_path / "in.npz"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN, *paths], check=True)
    expected = policy.run_model(inputs, noise)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_a_policy_that_writes_tokens_is_no_program(trained, tmp_path):
    with pytest.raises(ConfigError, match="flow head"):
        main([str(trained("pi0_fast")), str(tmp_path / "program"), "--to", "program"])
