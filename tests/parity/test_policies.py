"""Whole inference calls of the reference: an observation in a robot's keys to the commands that come out."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from manipi.checkpoints.native import Checkpoint, PolicyConfig
from manipi.checkpoints.openpi_names import from_openpi_tree
from manipi.model.config import CAMERA_SLOTS, Compat, GemmaSize, Pi0Config, Pi05Config, VisionSize
from manipi.policy import Policy
from manipi.robots import Joints, Robot, State
from manipi.tokenizers import SentencePieceTokenizer, Tokenizers
from manipi.transforms import pipeline
from manipi.types import FieldStats, NormStats

SHARED = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[2].parent / "shared"))
GOLDEN = SHARED / "golden"
INDEX = GOLDEN / "policy/cases.json"
CASES = json.loads(INDEX.read_text())["cases"] if INDEX.exists() else []
KINDS = {"pi0": Pi0Config, "pi05": Pi05Config}
SLOTS = dict(zip(CAMERA_SLOTS, ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), strict=True))

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden policies under {INDEX.parent}; set MANIPI_SHARED")


def libero(*, relative: bool, prompt: str | None) -> Robot:
    """The reference makes six of seven actions relative by plain subtraction, rotation included."""
    return Robot(
        name="libero",
        cameras={"base": "observation/image", "left_wrist": "observation/wrist_image"},
        state=(State("observation/state", 8),),
        actions=(Joints(6, relative=relative), Joints(1)),
        default_prompt=prompt,
    )


def droid(prompt: str) -> Robot:
    return Robot(
        name="droid",
        cameras={"base": "observation/exterior_image_1_left", "left_wrist": "observation/wrist_image_left"},
        state=(State("observation/joint_position", 7), State("observation/gripper_position", 1)),
        actions=(Joints(7, relative=True), Joints(1)),
        default_prompt=prompt,
    )


@dataclass(frozen=True)
class Case:
    policy: Policy
    observation: dict
    arrays: dict[str, np.ndarray]


def read_model(case: dict) -> tuple[Pi0Config | Pi05Config, dict]:
    folder = GOLDEN / "models" / case["model"]
    recorded = json.loads((folder / "config.json").read_text())
    fields = {key: recorded[key] for key in ("vocab_size", "action_dim", "action_horizon")}
    fields["vision"] = VisionSize(**{key: recorded["siglip"][key] for key in VisionSize.__dataclass_fields__})
    fields |= {"vlm": GemmaSize(**recorded["vlm"]), "action_expert": GemmaSize(**recorded["action_expert"])}
    if case["model"] == "pi05":
        fields["state_in_prompt"] = case["discrete_state_input"]
    limits = {"max_token_len": case["tokenizer_max_len"], "dtype": "float32", "compat": Compat(unmasked_loss=True)}
    config = KINDS[case["model"]](**fields, **limits)
    return config, from_openpi_tree(dict(np.load(folder / "params.npz")), config)


def read_stats(arrays: dict[str, np.ndarray], contract: str) -> NormStats:
    def field(key: str) -> FieldStats:
        read = [arrays[f"norm_stats/{key}/{name}"] for name in ("mean", "std", "q01", "q99")]
        return FieldStats(*read, *read[2:])

    return NormStats(state=field("state"), actions=field("actions"), num_frames=0, contract=contract, data="")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case["case"])
def case(request) -> Case:
    options = request.param
    arrays = dict(np.load(INDEX.parent / f"{options['case']}.npz"))
    model, weights = read_model(options)
    prompt = options["default_prompt"]
    robot = droid(prompt) if "droid" in options["case"] else libero(relative="delta" in options["case"], prompt=prompt)
    checkpoint = Checkpoint(
        weights=weights,
        config=PolicyConfig(
            model=model,
            norm_mode="quantile" if options["use_quantiles"] else "zscore",
            num_steps=options["num_steps"],
            step=0,
        ),
        robot=robot,
        norm_stats=read_stats(arrays, pipeline.contract(robot, model.action_horizon)),
        tokenizers=Tokenizers(SentencePieceTokenizer(GOLDEN / "tokenizer/small_sp.model")),
        self_test=None,
    )
    keys = [key.removeprefix("obs/") for key in arrays if key.startswith("obs/")]
    observation = {key.replace("|", "/"): arrays[f"obs/{key}"] for key in keys}
    return Case(Policy.from_checkpoint(checkpoint), observation, arrays)


def test_model_input(case):
    sample, _ = case.policy.pipeline.encode(case.observation)
    expected = {key.removeprefix("model_input/"): v for key, v in case.arrays.items() if key.startswith("model_input/")}
    np.testing.assert_array_equal(sample["tokens"], expected["tokenized_prompt"])
    np.testing.assert_array_equal(sample["token_valid"], expected["tokenized_prompt_mask"])
    np.testing.assert_allclose(sample["state"], expected["state"], atol=2e-6)
    for slot, image, valid in zip(CAMERA_SLOTS, sample["images"], sample["image_valid"], strict=True):
        np.testing.assert_array_equal(image, expected[f"image/{SLOTS[slot]}"])
        assert valid == expected[f"image_mask/{SLOTS[slot]}"]


def test_actions(case):
    found = case.policy.infer(case.observation, case.arrays["noise"])
    assert found["actions"].dtype == np.float32
    # Normalised actions agree to 3e-4 (golden/README.md); the scale is that of the commands.
    scale = max(1.0, float(np.abs(case.arrays["actions"]).max()))
    np.testing.assert_allclose(found["actions"], case.arrays["actions"], atol=3e-4 * scale)
