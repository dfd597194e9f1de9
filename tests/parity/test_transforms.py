"""Everything between an observation and the model, against the reference: every case in every index of `transforms/`.

An operation that no function here knows fails, and so does a recorded array that belongs to no case. Where ours is
deliberately another operation, the nearest one that has the meaning is compared, and the reason stands beside it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import ABSENT, Arrays, find, name_of, read_arrays, read_json
from golden_robots import robot_of, slot_of

from manipi.data.dataset import Feature, action_chunks
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.norm_stats import field_stats, suspicious_dimensions
from manipi.data.open import open_dataset
from manipi.errors import NormStatsError, ObservationError
from manipi.model.attention import attention_mask, lay_out
from manipi.model.config import Pi0Config, Pi0FastConfig
from manipi.model.flow import timestep_embedding
from manipi.robots import Joints, Robot, State
from manipi.robots.aloha import GRIPPER, aloha
from manipi.robots.franka import droid, libero
from manipi.train.config import OptimizerConfig
from manipi.train.step.optimizer import learning_rate
from manipi.transforms.actions import ActionSpace
from manipi.transforms.model_input import ModelLayout, ResizeImages, resize_with_pad
from manipi.transforms.normalize import Normalize, normalize, read_openpi_stats, unnormalize
from manipi.transforms.observation import ReadRobot
from manipi.types import FieldStats, NormStats, Sample
from manipi_client.images import convert_to_uint8
from manipi_client.images import resize_with_pad as client_resize_with_pad

INDEXES = {name_of(path): read_json(path) for path in find("transforms/*.json")}
FILES = {name_of(path): path for path in find("transforms/*.json")}
LEVEL = 2 / 255
"""One step of a uint8 picture where pictures go from -1 to 1."""

pytestmark = pytest.mark.skipif(not INDEXES, reason=ABSENT)

Measure = Callable[[str, float, float], None]


@cache
def recorded(path: Path) -> Arrays:
    return read_arrays(path.with_suffix(".npz"))


@dataclass(frozen=True)
class Case:
    index: str
    name: str
    op: str
    args: Any

    def arrays(self, part: str) -> Arrays:
        """By what comes after the case and `in` or `out`, with "/" as it was."""
        prefix, found = f"{self.name}/{part}/", recorded(FILES[self.index])
        return {k.removeprefix(prefix).replace("|", "/"): v for k, v in found.items() if k.startswith(prefix)}

    @property
    def inputs(self) -> Arrays:
        return self.arrays("in")

    @property
    def outputs(self) -> Arrays:
        return self.arrays("out")


CASES = [
    Case(index, entry["case"], entry["op"], entry["args"])
    for index, entries in INDEXES.items()
    if isinstance(entries, list)
    for entry in entries
    if "op" in entry
]


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative where values are above 1; infinite where shapes differ."""
    if found.shape != expected.shape:
        return np.inf
    errors = np.abs(np.asarray(found, np.float64) - expected) / np.maximum(1.0, np.abs(expected))
    return float(errors.max(initial=0.0))


# ---- normalisation ------------------------------------------------------------------------------------------------


def read_field(case: Case, key: str, dims: int) -> FieldStats:
    """The reference cuts statistics to the data's width; ours are cut when they are read, so the test cuts."""
    read = [case.inputs[f"stats/{key}/{name}"][:dims] for name in ("mean", "std", "q01", "q99")]
    return FieldStats(*read, *read[2:])


def check_normalize(case: Case, measure: Measure) -> None:
    mode = "quantile" if case.args["use_quantiles"] else "zscore"
    changes = {"normalize": [normalize], "unnormalize": [unnormalize]}.get(case.op, [normalize, unnormalize])
    for key, expected in case.outputs.items():
        data = case.inputs[f"data/{key}"]
        if f"stats/{key}/mean" not in case.inputs:
            one = FieldStats(*np.ones((6, 1)))
            step = Normalize(NormStats(state=one, actions=one, num_frames=1, contract="", data=""), mode)
            assert step.encode({"state": np.ones(1), key: data})[key] is data
            continue
        # The reference passes on what the statistics do not cover; no sample of ours gets there.
        dims = min(data.shape[-1], case.inputs[f"stats/{key}/mean"].size)
        found = data[..., :dims]
        for change in changes:
            found = change(found, read_field(case, key, dims), mode)
        measure("normalisation", gap(found, expected[..., :dims]), 2e-6)


def check_behaviour_of_normalize(entry: dict[str, Any]) -> None:
    one = FieldStats(*np.ones((6, 1)))
    stats = NormStats(state=one, actions=one, num_frames=1, contract="", data="")
    text = entry["behaviour"]
    if "lacking q01/q99" in text:
        without = FieldStats(one.mean, one.std, np.full(1, np.nan), np.full(1, np.nan), one.min, one.max)
        with pytest.raises(NormStatsError, match="q01 and q99"):
            Normalize(replace(stats, actions=without), "quantile")
    elif "does not raise when a stats key is absent" in text:
        assert "actions" not in Normalize(stats, "zscore").encode({"state": np.ones(1)})
    elif "strict raises when a stats key is absent" in text or "unnormalize raises when a stats key is absent" in text:
        # Ours knows two keys: the actions are an argument on the way back, and there is no sample without a state.
        with pytest.raises(KeyError, match="state"):
            Normalize(stats, "zscore").encode({"actions": np.ones((1, 1))})
    else:
        # Ours has no identity: a policy without statistics cannot be built (tests/transforms/test_pipeline.py).
        assert "norm_stats None is the identity" in text, text


def check_running_stats(case: Case, measure: Measure) -> None:
    """The reference's mean and deviation are exact; its quantiles are the left edges of histogram bins.

    So a quantile is one of the order statistics, up to one bin (a 5000th of the range) below for its own bin and for
    every time that the range grew and bins were merged into new ones. The first time, the values of the first bin can
    drop out, which moves the quantile up by as many. Ours interpolates between order statistics. Both lie between the
    order statistics before and behind, moved by so many values and bins.
    """
    batches = [x.reshape(-1, x.shape[-1]) for x in (case.inputs[f"batch{i}"] for i in range(case.args["num_batches"]))]
    values = np.concatenate(batches)
    found, expected = field_stats(values), case.outputs
    rounding = 1e-6 if values.dtype == np.float32 else 1e-9
    for name in ("mean", "std"):
        measure(f"running stats: {name}", gap(getattr(found, name), expected[name]), rounding)
    lows = np.minimum.accumulate([batch.min(axis=0) for batch in batches])
    highs = np.maximum.accumulate([batch.max(axis=0) for batch in batches])
    grows = ((np.diff(lows, axis=0) != 0) | (np.diff(highs, axis=0) != 0)).any(axis=1)
    bins, ordered = (1 + grows.sum()) * np.ptp(values, axis=0) / 5000 + 2e-10, np.sort(values, axis=0)
    before = np.concatenate(batches[: 1 + int(np.argmax([*grows, True]))])
    first_bin = (before <= lows[0] + (highs[0] - lows[0]) / 5000 + 2e-10).sum(axis=0) if grows.any() else 1
    for name, quantile in (("q01", 0.01), ("q99", 0.99)):
        place = int(np.ceil(round(quantile * len(values), 6))) - 1
        above = np.minimum(place + np.broadcast_to(first_bin, values.shape[1:]), len(values) - 1)
        around = np.take_along_axis(ordered, above[None], axis=0)[0] - ordered[max(place - 1, 0)]
        error = np.abs(getattr(found, name) - expected[name]) / (around + bins)
        measure(f"running stats: {name}, in units of the histogram's uncertainty", error.max(), 1.0)


def check_behaviour_of_running_stats(entry: dict[str, Any]) -> None:
    # Ours has statistics of one vector, and says that nothing moves in it.
    assert "fewer than 2 vectors" in entry["behaviour"], entry
    one = field_stats(np.array([[1.0, 2.0]]))
    notes = suspicious_dimensions(NormStats(state=one, actions=one, num_frames=1, contract="", data=""))
    assert sum("never moves" in note for note in notes) == 4


# ---- actions ------------------------------------------------------------------------------------------------------


def joints_of(mask: list[bool] | None, dims: int) -> Robot:
    """One joint per dimension; those beyond the mask are absolute."""
    relative = [*(mask or ()), *[False] * dims][:dims]
    actions = tuple(Joints(1, relative=r) for r in relative)
    return Robot(name="r", cameras={"base": "i"}, state=(State("state", dims),), actions=actions)


def check_relative(case: Case, measure: Measure) -> None:
    state, actions = case.inputs["state"], case.inputs.get("actions")
    space = ActionSpace(joints_of(case.args["mask"], state.shape[-1] if actions is None else actions.shape[-1]))
    assert space.encode({"state": state})["state"] is state
    assert np.array_equal(state, case.outputs["state"])
    assert (actions is None) == ("actions" not in case.outputs)
    if actions is not None:
        change = space.to_model if case.op == "delta_actions" else space.to_robot
        measure("relative actions", gap(change(actions, state), case.outputs["actions"]), 1e-6)


def check_padding(case: Case, measure: Measure) -> None:
    width = case.args["model_action_dim"]
    layout = ModelLayout(Pi0Config(action_dim=width), width)
    for key, expected in case.outputs.items():
        data = case.inputs[key]
        if data.shape[-1] > width:  # the reference passes it; check_fit refuses such a robot before it comes to this
            with pytest.raises(ValueError, match="negative"):
                layout.encode({"state": np.zeros(1), key: data, "prompt": ""})
            continue
        found = layout.encode({"state": np.zeros(1), key: data, "prompt": ""})[key]
        measure("padding", gap(found, expected), 0)


def check_subsample(case: Case, measure: Measure, tmp_path: Path) -> None:
    """No recipe of the reference uses it, and ours has no such step: a chunk's steps are rows of the dataset."""
    actions = case.inputs["actions"]
    features = {"action": Feature(kind="vector", shape=actions.shape[1:], dtype="float32")}
    with LeRobotWriter(tmp_path / "data", fps=10, features=features, robot_type="r") as writer:
        writer.add_episode({"action": actions}, task="t")
    rows = np.arange(0, len(actions), case.args["stride"])
    chunks, _ = action_chunks(open_dataset(tmp_path / "data"), rows, action_key="action", horizon=1)
    measure("subsampling", gap(chunks[:, 0], case.outputs["actions"]), 0)


# ---- robots -------------------------------------------------------------------------------------------------------


def check_inputs(case: Case, measure: Measure) -> None:
    """The adapters of the reference are our ReadRobot and ActionSpace, without relative actions."""
    expected = case.outputs
    names = [key.removeprefix("image/") for key in expected if key.startswith("image/")]
    slots = tuple(map(slot_of, names))
    kind = case.args.get("model_type", "pi0")
    convention = case.args.get("adapt_to_pi", True)
    robot = robot_of(case.inputs, slots, relative=False, pi_convention=convention, prompt="none came")
    sample = ReadRobot(robot).encode(nested(case.inputs))
    assert sample["prompt"] == str(expected.get("prompt", "none came"))
    space = ActionSpace(robot)
    converted = space.encode(sample)
    measure("robots: state", gap(converted["state"], expected["state"]), 2e-6)
    # In float64 the conversion itself shows, without the rounding of the reading.
    exact = np.concatenate([np.atleast_1d(case.inputs[state.key]) for state in robot.state]).astype(np.float64)
    measure("robots: state in float64", gap(space.state_to_model(exact), expected["state"]), 1e-12)
    if "actions" in expected:
        rounding = 1e-12 if sample["actions"].dtype == np.float64 else 1e-6
        measure("robots: actions", gap(converted["actions"], expected["actions"]), rounding)
    for slot, name in zip(slots, names, strict=True):
        picture = sample.get(f"image/{slot}", np.zeros_like(expected[f"image/{name}"]))
        measure("robots: pictures", gap(picture, expected[f"image/{name}"]), 0)
    valid = camera_masks(converted, slots, Pi0FastConfig if kind == "pi0_fast" else Pi0Config)
    measure("robots: camera masks", gap(valid, np.array([expected[f"image_mask/{name}"] for name in names])), 0)


def camera_masks(
    sample: Sample, slots: tuple[str, ...], kind: type[Pi0Config] | type[Pi0FastConfig] = Pi0Config
) -> np.ndarray:
    model = kind(cameras=slots, action_dim=max(sample[key].shape[-1] for key in ("state", "actions") if key in sample))
    resize = ResizeImages(model.vision.image_size)
    return ModelLayout(model, 1).encode(resize.encode(sample))["image_valid"]


def nested(flat: Arrays) -> dict[str, Any]:
    """`images/cam` to a map `images`, as clients of ALOHA send it; keys with `observation/` are flat."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        folder, _, name = key.partition("/")
        if folder == "images":
            tree.setdefault(folder, {})[name] = value
        else:
            tree[key] = value
    return tree


def check_outputs(case: Case, measure: Measure) -> None:
    convention = case.args.get("adapt_to_pi", True)
    robots = {"aloha": aloha(pi_convention=convention, relative=False), "droid": droid(), "libero": libero()}
    robot = robots[case.op.removesuffix("_outputs")]
    actions = case.inputs["actions"][..., : robot.model_action_size]
    found = ActionSpace(robot).to_robot(actions, np.zeros(robot.state_size))
    measure("robots: commands", gap(found, case.outputs["actions"]), 1e-6 if actions.dtype == np.float32 else 1e-12)


def check_gripper_curves(case: Case, measure: Measure) -> None:
    robot = Robot(name="g", cameras={"base": "i"}, state=(State("g", 1),), actions=(GRIPPER,))
    space, x = ActionSpace(robot), case.inputs["x"][:, None]
    found = {
        "to_angular": space.state_to_model(x),
        "from_angular": space.to_robot(x, np.zeros(1)),
        "from_angular_inv": space.to_model(x, np.zeros(1)),
    }
    for key, expected in case.outputs.items():
        measure("robots: gripper curves", gap(found[key][:, 0], expected), 1e-12)


def check_behaviour_of_aloha(entry: dict[str, Any]) -> None:
    assert "unknown camera name" in entry["behaviour"], entry
    pictures = {"cam_high": np.zeros((3, 4, 5), np.uint8), "cam_unknown": np.zeros((3, 4, 5), np.uint8)}
    with pytest.raises(ObservationError, match="images/cam_unknown"):
        ReadRobot(aloha()).encode({"images": pictures, "state": np.zeros(14), "prompt": "p"})


def check_behaviour_of_droid(entry: dict[str, Any]) -> None:
    robot = replace(droid(), state=(), actions=(Joints(1),))
    pictures = {key: np.zeros((4, 5, 3), np.uint8) for key in robot.cameras.values()}
    found = ReadRobot(robot).encode(pictures | {"prompt": entry["prompt bytes"].encode()})["prompt"]
    assert (found, type(found).__name__) == (entry["out"], entry["out_type"])


BEHAVIOURS = {
    "normalize": check_behaviour_of_normalize,
    "running_stats": check_behaviour_of_running_stats,
    "aloha": check_behaviour_of_aloha,
    "droid": check_behaviour_of_droid,
}


def check_behaviour(case: Case, measure: Measure) -> None:
    for entry in case.args if isinstance(case.args, list) else [case.args]:
        BEHAVIOURS[FILES[case.index].stem](entry)


# ---- pictures -----------------------------------------------------------------------------------------------------


def resized(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    flat = pictures.reshape(-1, *pictures.shape[-3:])
    return np.stack([resize_with_pad(picture, height, width) for picture in flat])


def check_resize_uint8(case: Case, measure: Measure) -> None:
    """The client's resize is ours bit for bit; the server's differs from Pillow's by rounding alone."""
    pictures, size = case.inputs["image"], (case.args["height"], case.args["width"])
    expected = case.outputs["image"].astype(int)
    flat = expected.reshape(-1, *expected.shape[-3:])
    if "client" in case.op:
        measure("resizing, client", np.abs(resized(pictures, *size) - flat).max(), 0)
        measure("resizing, client's own", np.abs(client_resize_with_pad(pictures, *size) - expected).max(), 0)
    elif pictures.dtype == np.uint8:
        measure("resizing, server", np.abs(resized(pictures, *size) - flat).max(), 1)
    else:
        check_resize_float(pictures, flat_of(case.outputs["image"]), measure)


def flat_of(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(-1, *pictures.shape[-3:])


def check_resize_float(pictures: np.ndarray, expected: np.ndarray, measure: Measure) -> None:
    """Ours resizes uint8 only: half a step for rounding before, half for each of Pillow's two passes."""
    levels = np.rint((pictures.astype(np.float64) + 1) / LEVEL).astype(np.uint8)
    found = resized(levels, *expected.shape[-3:-1]) * LEVEL - 1
    measure("resizing, float", np.abs(found - expected).max(), 1.5 * LEVEL)


def check_resize_torch(case: Case, measure: Measure) -> None:
    """The reference's torch path forgets the anti-aliasing; ours does as its JAX path everywhere.

    So the values agree where a picture grows. Where it shrinks, the place of the picture on its black ground does, and
    the mean colour, which aliasing moves by the error of a random sample of the pixels.
    """
    pictures, expected = flat_of(case.inputs["image"]), flat_of(case.outputs["image"])
    height, width = expected.shape[1:3]
    if max(pictures.shape[1] / height, pictures.shape[2] / width) <= 1:
        check_resize_float(pictures, expected, measure)
        return
    levels = np.rint((pictures.astype(np.float64) + 1) / LEVEL).astype(np.uint8)
    ground = resized(np.full_like(levels, 255), height, width) == 0
    measure("resizing, torch: ground", np.abs(expected[ground] + 1).max(initial=0.0), 0)
    sampling = 4 * pictures.std() / np.sqrt((~ground[0, ..., 0]).sum())
    means = [
        (x * ~ground).sum(axis=(1, 2)) / (~ground).sum(axis=(1, 2))
        for x in (resized(levels, height, width) * LEVEL - 1, expected)
    ]
    measure("resizing, torch: mean colour", np.abs(means[0] - means[1]).max(), sampling)


def check_convert(case: Case, measure: Measure) -> None:
    measure("pictures to uint8", gap(convert_to_uint8(case.inputs["image"]), case.outputs["image"]), 0)
    if case.inputs["image"].shape[-1] == 3:
        robot = Robot(name="r", cameras={"base": "i"}, state=(), actions=(Joints(1),), default_prompt="")
        found = ReadRobot(robot).encode({"i": case.inputs["image"]})["image/base"]
        measure("pictures to uint8", gap(found, case.outputs["image"]), 0)


def check_preprocess(case: Case, measure: Measure) -> None:
    """The reference scales to [-1, 1] and resizes; ours resizes uint8, rounding up to three times by half a step."""
    given, names = case.inputs, [key.removeprefix("image/") for key in case.inputs if key.startswith("image/")]
    masks = {key.removeprefix("image_mask/"): v for key, v in case.outputs.items() if key.startswith("image_mask/")}
    for key, expected in case.outputs.items():
        if scaled := re.fullmatch("from_dict_image_(.+)", key):
            camera = next(name for name in names if name.startswith(scaled[1]))
            found = torch.from_numpy(given[f"image/{camera}"]).float() / 255.0 * 2.0 - 1.0
            measure("preprocessing: scaling", np.abs(found.numpy() - expected).max(), 1e-6)
        elif every := re.fullmatch(r"image_(.+)_every_(\d+)th_pixel", key):
            name, step = every[1], int(every[2])
            size = [int(number) for number in re.findall(r"resized to (\d+)x(\d+)", case.args["note"])[0]]
            found = resized(given[f"image/{name}"], *size)[:, ::step, ::step] * LEVEL - 1
            measure("preprocessing: pictures", np.abs(found - expected).max(), 1.5 * LEVEL)
        else:
            assert key.removeprefix("image_mask/") in masks, key
    for row in range(len(given["state"])):
        # Ours has no masks at the door: a picture is there, or it is not.
        shown = [name for name in names if given.get(f"image_mask/{name}", np.ones(row + 1))[row]]
        sample = {f"image/{slot_of(name)}": given[f"image/{name}"][row] for name in shown}
        valid = camera_masks(sample | {"state": given["state"][row]}, tuple(map(slot_of, names)))
        measure("preprocessing: camera masks", gap(valid, np.array([masks[name][row] for name in names])), 0)


# ---- the model's own ----------------------------------------------------------------------------------------------


def check_time_features(case: Case, measure: Measure) -> None:
    args = (case.args["embedding_dim"], case.args["min_period"], case.args["max_period"])
    found = timestep_embedding(torch.from_numpy(case.inputs["time"]), *args).numpy()
    for key, expected in case.outputs.items():
        # One float32 ulp of the timestep moves the fastest sine by 1e-4 (golden/README.md).
        measure(f"time features, {key.replace('_', ' ')}", gap(found, expected), 1.5e-4)


def check_attention_mask(case: Case, measure: Measure) -> None:
    valid = torch.from_numpy(case.inputs["input_mask"])
    starts = torch.from_numpy(case.inputs["mask_ar"]).bool().expand(valid.shape)
    layout = lay_out((), valid, starts, torch.zeros_like(valid, dtype=torch.long))
    measure("attention masks", gap(attention_mask(layout, layout).numpy(), case.outputs["attn_mask"]), 0)


CHECKS: dict[str, Callable[..., None]] = {
    "normalize": check_normalize,
    "unnormalize": check_normalize,
    "normalize then unnormalize": check_normalize,
    "running_stats": check_running_stats,
    "delta_actions": check_relative,
    "absolute_actions": check_relative,
    "pad_states_and_actions": check_padding,
    "subsample_actions": check_subsample,
    "aloha_inputs": check_inputs,
    "droid_inputs": check_inputs,
    "libero_inputs": check_inputs,
    "aloha_outputs": check_outputs,
    "droid_outputs": check_outputs,
    "libero_outputs": check_outputs,
    "aloha gripper maps on a grid": check_gripper_curves,
    "behaviour": check_behaviour,
    "resize_with_pad (client/PIL)": check_resize_uint8,
    "resize_with_pad (server/jax)": check_resize_uint8,
    "resize_with_pad (reference's separate torch path: no antialias)": check_resize_torch,
    "convert_to_uint8 (client)": check_convert,
    "Observation.from_dict then preprocess_observation(train=False)": check_preprocess,
    "posemb_sincos": check_time_features,
    "make_attn_mask": check_attention_mask,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.index}-{case.name}")
def test_case(case, measure, tmp_path):
    assert case.op in CHECKS, f"no check for the operation {case.op!r}"
    CHECKS[case.op](case, measure, *([tmp_path] if case.op == "subsample_actions" else []))


def test_every_recorded_array_belongs_to_a_case():
    names = {(case.index, case.name) for case in CASES}
    for path in find("transforms/*.npz"):
        for key in read_arrays(path):
            assert (name_of(path), key.split("/")[0]) in names, f"{path}: {key}"


# ---- learning rates -----------------------------------------------------------------------------------------------


def schedules() -> Iterator[Any]:
    for index, entries in INDEXES.items():
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            if "kind" in entry:
                yield pytest.param(entry, id=f"{index}-{number}-{entry['kind']}")


@pytest.mark.parametrize("entry", list(schedules()))
def test_schedules(entry, measure):
    names = {"peak_lr": "lr", "decay_lr": "final_lr"}
    settings = {names.get(key, key): value for key, value in entry["args"].items()} | {"schedule": entry["kind"]}
    known = {field.name for field in fields(OptimizerConfig)}
    if "schedule" not in known:
        if entry["kind"] != "cosine":
            pytest.skip("OptimizerConfig has the cosine alone so far")
        del settings["schedule"]
    config = OptimizerConfig(**settings)
    for step, expected in entry["values"]:
        # The reference computes in float32, which shows where the cosine is near its end.
        error = abs(learning_rate(step, config) - expected) / (abs(expected) + 0.1 * config.lr)
        measure(f"learning rate, {entry['kind']}", error, 1e-6)


# ---- the file of statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", find("transforms/*/norm_stats.json"), ids=name_of)
def test_norm_stats_file(path, measure):
    found = read_json(path)["norm_stats"]
    state, actions = (len(found[key]["mean"]) for key in ("state", "actions"))
    robot = Robot(name="r", cameras={"base": "i"}, state=(State("s", state),), actions=(Joints(actions),))
    stats = read_openpi_stats(path, robot, action_horizon=1)
    for key, field in (("state", stats.state), ("actions", stats.actions)):
        for name, values in found[key].items():
            expected = np.full(len(found[key]["mean"]), np.nan) if values is None else np.array(values)
            np.testing.assert_array_equal(getattr(field, name), expected)
        assert np.isfinite([field.min, field.max]).all()
