"""Normalisation, relative actions, padding, resizing and learning rates of the reference implementation."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from manipi.model.config import Pi0Config
from manipi.robots import Joints, Robot, State
from manipi.train.config import OptimizerConfig
from manipi.train.optimizer import learning_rate
from manipi.transforms.actions import ActionSpace
from manipi.transforms.images import resize_with_pad
from manipi.transforms.layout import ModelLayout
from manipi.transforms.normalize import normalize, unnormalize
from manipi.types import FieldStats

SHARED = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[2].parent / "shared"))
GOLDEN = SHARED / "golden/transforms"

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden transforms under {GOLDEN}; set MANIPI_SHARED")


def index(group: str) -> list[dict]:
    path = GOLDEN / f"{group}.json"
    return json.loads(path.read_text()) if path.exists() else []


@cache
def recorded(group: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{group}.npz"))


def arrays(group: str, case: str) -> dict[str, np.ndarray]:
    """The case's arrays, by what comes after its name: `in/state`, `out/state`, …"""
    return {key.removeprefix(f"{case}/"): v for key, v in recorded(group).items() if key.startswith(f"{case}/")}


def cases(group: str, *ops: str, only: str = ""):
    found = [case for case in index(group) if case["op"] in ops and only in case["case"]]
    return pytest.mark.parametrize("case", found, ids=[case["case"] for case in found])


# ---- normalisation


def fields(found: dict[str, np.ndarray], key: str, dims: int) -> FieldStats:
    """The reference cuts statistics to the data's width; the pipeline refuses another width, so the test cuts."""
    read = [found[f"in/stats/{key}/{name}"][:dims] for name in ("mean", "std", "q01", "q99")]
    return FieldStats(*read, *read[2:])


@cases("normalize", "normalize", "unnormalize")
def test_normalize(case):
    found, mode = arrays("normalize", case["case"]), "quantile" if case["args"]["use_quantiles"] else "zscore"
    change = normalize if case["op"] == "normalize" else unnormalize
    keys = [key for key in ("state", "actions") if f"in/data/{key}" in found]
    assert keys
    for key in keys:
        data, expected = found[f"in/data/{key}"], found[f"out/{key}"]
        # The reference passes on what the statistics do not cover; no sample of ours gets there.
        dims = min(data.shape[-1], len(found[f"in/stats/{key}/mean"]))
        got = change(data[..., :dims], fields(found, key, dims), mode)
        np.testing.assert_allclose(got, expected[..., :dims], rtol=2e-6, atol=2e-6)


# ---- relative actions


def robot_of(mask: list[bool] | None, dims: int) -> Robot:
    """One joint per dimension; those beyond the mask are absolute."""
    relative = [*(mask or ()), *[False] * dims][:dims]
    state = State("state", dims)
    return Robot(
        name="r", cameras={"base": "i"}, state=(state,), actions=tuple(Joints(1, relative=r) for r in relative)
    )


@cases("actions", "delta_actions", "absolute_actions")
def test_relative_actions(case):
    found = arrays("actions", case["case"])
    if "in/actions" not in found:
        pytest.skip("without actions there is nothing to decode here")
    space = ActionSpace(robot_of(case["args"]["mask"], found["in/actions"].shape[-1]))
    change = space.to_model if case["op"] == "delta_actions" else space.to_robot
    np.testing.assert_allclose(change(found["in/actions"], found["in/state"]), found["out/actions"], atol=1e-6)


@cases("actions", "pad_states_and_actions")
def test_padding(case):
    found, width = arrays("actions", case["case"]), case["args"]["model_action_dim"]
    if found["in/state"].shape[-1] > width:
        pytest.skip("wider than the model: check_fit refuses such a robot")
    layout = ModelLayout(Pi0Config(action_dim=width), found["in/state"].shape[-1])
    sample = {key: found[f"in/{key}"] for key in ("state", "actions") if f"in/{key}" in found}
    encoded = layout.encode(sample | {"prompt": ""})
    for key in sample:
        np.testing.assert_array_equal(encoded[key], found[f"out/{key}"])


# ---- pictures


@cases("resize_with_pad", "resize_with_pad (client/PIL)")
def test_resize_with_pad(case):
    found, size = arrays("resize_with_pad", case["case"]), (case["args"]["height"], case["args"]["width"])
    pictures = found["in/image"].reshape(-1, *found["in/image"].shape[-3:])
    resized = np.stack([resize_with_pad(picture, *size) for picture in pictures])
    np.testing.assert_array_equal(resized.reshape(found["out/image"].shape), found["out/image"])


@cases("resize_with_pad", "resize_with_pad (server/jax)", only="uint8")
def test_the_references_other_resize_differs_by_rounding_alone(case):
    """Its server resizes with JAX where pictures come in another size; ours is Pillow's everywhere."""
    found, size = arrays("resize_with_pad", case["case"]), (case["args"]["height"], case["args"]["width"])
    pictures = found["in/image"].reshape(-1, *found["in/image"].shape[-3:])
    resized = np.stack([resize_with_pad(picture, *size) for picture in pictures]).astype(int)
    assert np.abs(resized - found["out/image"].reshape(resized.shape)).max() <= 1


# ---- learning rates


COSINE = [case for case in index("schedules") if case["kind"] == "cosine"]


@pytest.mark.parametrize("case", COSINE, ids=lambda case: f"peak {case['args']['peak_lr']}")
def test_cosine_schedule(case):
    a = case["args"]
    config = OptimizerConfig(
        lr=a["peak_lr"], final_lr=a["decay_lr"], warmup_steps=a["warmup_steps"], decay_steps=a["decay_steps"]
    )
    for step, expected in case["values"]:
        # The reference computes in float32, which shows where the cosine is near its end.
        assert learning_rate(step, config) == pytest.approx(expected, rel=1e-6, abs=1e-7 * a["peak_lr"]), step
