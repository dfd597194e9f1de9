"""Whole inference calls of the reference: an observation in a robot's keys to the commands that come out."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import ABSENT, Arrays, Case, find, name_of, read_arrays, read_json
from golden_robots import robot_of, slot_of
from openpi_trees import from_openpi_tree

from manipi.checkpoints.native import Checkpoint, PolicyConfig
from manipi.model.config import Pi05Config
from manipi.policy import Policy
from manipi.robots import Joints, Robot
from manipi.tokenizers import SentencePieceTokenizer, Tokenizers
from manipi.transforms import pipeline
from manipi.types import FieldStats, NormStats

CALLS = [(path, read_json(path), options) for path in find("policy/*.json") for options in read_json(path)["cases"]]

pytestmark = pytest.mark.skipif(not CALLS, reason=ABSENT)


@dataclass(frozen=True)
class Call:
    policy: Policy
    observation: Arrays
    cameras: list[str]
    """The model's, as the reference calls them."""
    arrays: Arrays


def part(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays under a prefix, with "/" in their keys as it was."""
    return {key.removeprefix(prefix).replace("|", "/"): x for key, x in arrays.items() if key.startswith(prefix)}


def read_robot(observation: Arrays, slots: tuple[str, ...], options: dict[str, Any]) -> Robot:
    order = options["transform_order"]
    robot = robot_of(
        observation,
        slots,
        relative=re.search(r"(?<!no )(?<!without )\bdelta", order) is not None,
        pi_convention=options.get("adapt_to_pi", re.search(r"aloha inputs \(?(raw|no)", order) is None),
        prompt=options["default_prompt"],
    )
    if counted := re.search(r"delta\((\d+) of (\d+)\)", order):
        relative, dims = map(int, counted.groups())
        assert dims == robot.action_size, order
        found = sum(group.size for group in robot.actions if group.relative)
        if found != relative:
            robot = replace(robot, actions=(Joints(relative, relative=True), Joints(dims - relative)))
    return robot


def read_stats(arrays: Arrays, robot: Robot, horizon: int) -> NormStats:
    """The reference's own may be padded to the model's width."""

    def field(key: str, size: int) -> FieldStats:
        read = [arrays[f"norm_stats/{key}/{name}"][:size] for name in ("mean", "std", "q01", "q99")]
        return FieldStats(*read, *read[2:])

    fields = {"state": field("state", robot.state_size), "actions": field("actions", robot.model_action_size)}
    return NormStats(**fields, num_frames=0, contract=pipeline.contract(robot, horizon), data="")


def read_call(path: Path, shared: dict[str, Any], options: dict[str, Any]) -> Call:
    arrays = read_arrays(path.parent / f"{options['case']}.npz")
    observation = part(arrays, "obs/")
    cameras = list(part(arrays, "model_input/image/"))
    slots = tuple(map(slot_of, cameras))
    weights = path.parent / shared["weights"].replace("<model>", options["model"])
    recorded = Case(weights.parent)
    limits = {"max_token_len": options["tokenizer_max_len"], "cameras": slots, "dtype": shared["compute_dtype"]}
    if isinstance(recorded.config, Pi05Config):
        limits["state_in_prompt"] = options["discrete_state_input"]
    model = replace(recorded.config, **limits)
    robot = read_robot(observation, slots, options)
    checkpoint = Checkpoint(
        weights=from_openpi_tree(read_arrays(weights), model),
        config=PolicyConfig(
            model=model,
            norm_mode="quantile" if options["use_quantiles"] else "zscore",
            num_steps=options["num_steps"],
            step=0,
        ),
        robot=robot,
        norm_stats=read_stats(arrays, robot, model.action_horizon),
        tokenizers=Tokenizers(SentencePieceTokenizer(path.parent / shared["tokenizer"])),
        self_test=None,
    )
    return Call(Policy.from_checkpoint(checkpoint), observation, cameras, arrays)


@pytest.fixture(scope="module", params=CALLS, ids=lambda call: f"{name_of(call[0])}-{call[2]['case']}")
def call(request) -> Call:
    return read_call(*request.param)


def test_model_input(call, measure):
    sample, _ = call.policy.pipeline.encode(call.observation)
    expected = part(call.arrays, "model_input/")
    np.testing.assert_array_equal(sample["tokens"], expected.pop("tokenized_prompt"))
    np.testing.assert_array_equal(sample["token_valid"], expected.pop("tokenized_prompt_mask"))
    # Of a state that is wider than the model, ours hands on no more than that; no network reads it.
    state = expected.pop("state")[: sample["state"].size]
    measure("policy: normalised state", np.abs(sample["state"] - state).max(), 2e-6)
    for camera, image, valid in zip(call.cameras, sample["images"], sample["image_valid"], strict=True):
        np.testing.assert_array_equal(image, expected.pop(f"image/{camera}"))
        assert valid == expected.pop(f"image_mask/{camera}")
    assert not expected, f"unread: {sorted(expected)}"


def test_actions(call, measure):
    found = call.policy.infer(call.observation, call.arrays["noise"])["actions"]
    assert found.dtype == np.float32
    assert found.shape == call.arrays["actions"].shape
    # Normalised actions agree to 3e-4 (golden/README.md); in commands that is so many units of the statistics.
    stats = call.policy.norm_stats.actions
    unit = stats.std if call.policy.config.norm_mode == "zscore" else (stats.q99 - stats.q01) / 2
    measure("policy: commands", np.abs((found - call.arrays["actions"]) / (unit + 1e-6)).max(), 3e-4)
