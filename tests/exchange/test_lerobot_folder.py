"""What LeRobot's files say of a policy: taken over, or refused where recipe, robot or flags say otherwise."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manipi.checkpoints.native import read_checkpoint
from manipi.errors import CheckpointError, ConfigError, ManipiError, NormStatsError
from manipi.exchange.exporting import export_checkpoint
from manipi.exchange.importing import import_checkpoint
from manipi.exchange.lerobot import read_stated, relative_dims
from manipi.model.config import Pi05Config
from manipi.robots.franka import droid
from manipi.robots.robot import EndEffector, Gripper, Joints, Robot, State
from manipi.train.config import TrainConfig
from manipi.weights.layouts import open_weights

RELATIVE = ("relative_actions_processor", "absolute_actions_processor")
PROMPT = "pi05_prepare_state_tokenizer_processor_step"
CONFIG, BEFORE, AFTER = "config.json", "policy_preprocessor.json", "policy_postprocessor.json"


@pytest.fixture(scope="session")
def base(exported, tmp_path_factory) -> Path:
    """A folder as LeRobot writes it: nothing of ours in it, and nothing relative."""
    folder = tmp_path_factory.mktemp("lerobot") / "pi05"
    shutil.copytree(exported("pi05", "lerobot"), folder, ignore=shutil.ignore_patterns("manipi", "assets"))
    for name in (BEFORE, AFTER):
        change(folder / name, lambda data: {"steps": [s for s in data["steps"] if s["registry_name"] not in RELATIVE]})
    plain = [
        name for name in json.loads((folder / CONFIG).read_text()) if "relative" not in name and "names" not in name
    ]
    change(folder / CONFIG, lambda data: {name: data[name] for name in plain})
    return folder


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "lerobot")


@pytest.fixture
def wanted(recipe) -> TrainConfig:
    """The sizes of heads are in no file."""
    pi05 = recipe("pi05")
    return replace(pi05, robot=replace(pi05.robot, actions=(Joints(4),)))


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(edit(data) or data))


def step(data: Any, name: str) -> Any:
    return next(one for one in data["steps"] if one["registry_name"] == name)


def config_of(**fields: Any) -> Callable[[Any], Any]:
    return lambda data: {**data, **fields}


def test_what_the_files_say_is_taken_over(folder, wanted, tmp_path):
    more = {"rtc_training_max_delay": 3, "optimizer_lr": 1e-5}
    change(folder / CONFIG, config_of(num_inference_steps=4, n_action_steps=2, **more))
    certificate = import_checkpoint(folder, tmp_path / "ours", recipe=wanted)
    config = read_checkpoint(tmp_path / "ours").config
    assert (config.num_steps, config.norm_mode) == (4, "quantile")
    said = "\n".join(certificate.said)
    assert "action_horizon 4 (config.json, chunk_size)" in said
    assert "4 flow steps" in said
    assert "executes 2 of its 4 steps" in said
    assert "observation.images.base" in said
    assert "also says ['rtc_training_max_delay'], which has no place here" in said
    assert any(text in said for _, text in certificate.rows())


def mean_std(data: Any) -> None:
    for one in data["steps"]:
        if "norm_map" in one.get("config", {}):
            one["config"]["norm_map"] = dict.fromkeys(("STATE", "ACTION"), "MEAN_STD")


def test_the_normalisation_is_what_the_files_say(folder, wanted, tmp_path):
    change(folder / CONFIG, config_of(normalization_mapping=dict.fromkeys(("STATE", "ACTION"), "MEAN_STD")))
    with pytest.raises(CheckpointError, match=r"(?s)agree on the normalisation.*config.json.*policy_preprocessor.json"):
        import_checkpoint(folder, tmp_path / "ours", recipe=wanted)
    change(folder / BEFORE, mean_std)
    change(folder / AFTER, mean_std)
    assert read_stated(open_weights(folder)).normalization(None, None, Pi05Config) == "zscore"  # its usual: quantiles
    import_checkpoint(folder, tmp_path / "ours", recipe=replace(wanted, norm_mode="zscore"))
    assert read_checkpoint(tmp_path / "ours").config.norm_mode == "zscore"
    with pytest.raises(ConfigError, match=r"(?s)zscore.*quantile of the recipe.*--normalization zscore"):
        import_checkpoint(folder, tmp_path / "a", recipe=wanted)
    import_checkpoint(folder, tmp_path / "b", recipe=wanted, normalization="zscore")
    assert read_checkpoint(tmp_path / "b").config.norm_mode == "zscore"
    with pytest.raises(ConfigError, match=r"(?s)zscore.*quantile of --normalization.*leave"):
        import_checkpoint(folder, tmp_path / "c", recipe=wanted, normalization="quantile")


def relative_steps(exclude: list[str], names: list[str] | None, enabled: bool = True) -> Callable[[Path], None]:
    config = {"enabled": enabled, "exclude_joints": exclude, "action_names": names}

    def edit(folder: Path) -> None:
        change(folder / BEFORE, lambda d: d["steps"].insert(2, _entry("relative_actions_processor", config)))
        change(
            folder / AFTER, lambda d: d["steps"].insert(1, _entry("absolute_actions_processor", {"enabled": enabled}))
        )

    return edit


def _entry(name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


NAMES = ["x", "y", "z", "Main_Gripper"]


def robot_of(*groups: Any) -> Callable[[Robot], Robot]:
    return lambda robot: replace(robot, actions=groups)


ABSOLUTE, ALL = robot_of(Joints(4)), robot_of(Joints(4, relative=True))
BUT_GRIPPER = robot_of(Joints(3, relative=True), Gripper())


@pytest.mark.parametrize(
    ("edit", "right", "wrong", "words"),
    [
        (lambda folder: None, ABSOLUTE, ALL, "expected absolute actions, as policy_preprocessor.json"),
        (relative_steps(["gripper"], NAMES), BUT_GRIPPER, ALL, "dimensions 0, 1, 2 alone"),
        # Without names LeRobot excludes nothing, whatever is excluded.
        (relative_steps(["gripper"], None), ALL, BUT_GRIPPER, "expected actions that are offsets from the state"),
        (relative_steps([], NAMES), ALL, ABSOLUTE, "found absolute actions of robot"),
        (relative_steps(["gripper"], NAMES, enabled=False), ABSOLUTE, BUT_GRIPPER, "disabled relative actions"),
        (relative_steps(["gripper"], ["x"]), ALL, BUT_GRIPPER, "expected actions that are offsets"),
    ],
)
def test_relative_actions_are_the_robots_or_refused(folder, wanted, tmp_path, edit, right, wrong, words):
    edit(folder)
    with pytest.raises(ConfigError) as error:
        import_checkpoint(folder, tmp_path / "wrong", recipe=wanted, robot=wrong(wanted.robot))
    assert words in str(error.value), str(error.value)
    assert "tabletop" in str(error.value)
    import_checkpoint(folder, tmp_path / "ours", recipe=wanted, robot=right(wanted.robot))


@pytest.mark.parametrize("robot", [ABSOLUTE, ALL, BUT_GRIPPER])
def test_what_is_relative_goes_out_and_comes_back(folder, wanted, tmp_path, robot):
    (tmp_path / "stats.json").write_text(json.dumps({"norm_stats": _stats(folder)}))
    (folder / BEFORE).unlink()  # first into ours without a word on relative actions, as openpi's folders are
    own = replace(wanted, robot=robot(wanted.robot))
    import_checkpoint(folder, tmp_path / "ours", recipe=own, norm_stats=tmp_path / "stats.json")
    export_checkpoint(tmp_path / "ours", "lerobot", tmp_path / "out")
    other = ABSOLUTE if robot is not ABSOLUTE else ALL
    with pytest.raises(ConfigError, match=r"(?s)(offsets|absolute).*leave --robot and --recipe out"):
        import_checkpoint(tmp_path / "out", tmp_path / "no", recipe=wanted, robot=other(wanted.robot))
    import_checkpoint(tmp_path / "out", tmp_path / "described")
    assert read_checkpoint(tmp_path / "described").robot == own.robot
    for name in ("manipi", "assets"):
        shutil.rmtree(tmp_path / "out" / name)
    import_checkpoint(tmp_path / "out", tmp_path / "back", recipe=own)
    before, after = read_checkpoint(tmp_path / "ours"), read_checkpoint(tmp_path / "back")
    assert (before.config, before.robot) == (after.config, after.robot)
    others = [one for one in (ABSOLUTE, ALL, BUT_GRIPPER) if one is not robot]
    for other in others:
        with pytest.raises(ConfigError, match=r"offsets|absolute"):
            import_checkpoint(tmp_path / "out", tmp_path / "no", recipe=wanted, robot=other(wanted.robot))
    # LeRobot before 0.5.1, which knows no such field or step, still opens an absolute robot's export.
    assert ("use_relative_actions" in (tmp_path / "out" / CONFIG).read_text()) is (robot is not ABSOLUTE)


def _stats(folder: Path) -> dict[str, dict[str, list[float]]]:
    from safetensors.torch import load_file

    (file,) = folder.glob("policy_preprocessor_*.safetensors")
    tensors = load_file(file)
    names = {"state": "observation.state", "actions": "action"}
    return {
        ours: {name: tensors[f"{theirs}.{name}"].tolist() for name in ("mean", "std", "q01", "q99")}
        for ours, theirs in names.items()
    }


def arm(*groups: Any, state: int = 14) -> Robot:
    return Robot(name="arm", cameras={"base": "image"}, state=(State("state", state),), actions=groups)


@pytest.mark.parametrize(
    ("robot", "dims"),
    [
        (arm(Joints(7)), (False,) * 7),
        (arm(Joints(6, relative=True, signs=(1, -1, -1, 1, 1, 1)), Gripper()), (True,) * 6 + (False,)),
        (arm(EndEffector(relative=True), Gripper(relative=True)), (True,) * 4),
        (droid(action_space="joint_position"), (True,) * 7 + (False,)),
        (arm(EndEffector(rotation="rotvec"), Joints(1)), (False,) * 10),
        # LeRobot has no such offsets.
        (arm(EndEffector(relative=True, rotation="rotvec")), None),
        (arm(Gripper(open=1.0, closed=0.0, relative=True)), None),
        (arm(Joints(6, relative=True, state_start=7)), None),
        (arm(EndEffector(rotation="rotvec"), Joints(1, relative=True)), None),
        (arm(Joints(6, relative=True), Joints(2), state=6), None),
    ],
)
def test_which_offsets_are_lerobots(robot, dims):
    if dims is not None:
        assert relative_dims(robot) == dims
        return
    with pytest.raises(ConfigError, match=r"(?s)at the same place of the state.*robot 'arm'"):
        relative_dims(robot)


def test_offsets_that_lerobot_cannot_say_are_not_exported(folder, wanted, tmp_path):
    (folder / BEFORE).rename(tmp_path / "before.json")
    (folder / "stats.json").write_text(json.dumps({"norm_stats": _stats(folder)}))
    odd = replace(wanted, robot=robot_of(Joints(3), Gripper(open=1.0, closed=0.0, relative=True))(wanted.robot))
    import_checkpoint(folder, tmp_path / "ours", recipe=odd, norm_stats=folder / "stats.json")
    with pytest.raises(ConfigError, match=r"(?s)Gripper.*openpi's layout"):
        export_checkpoint(tmp_path / "ours", "lerobot", tmp_path / "out")
    assert not (tmp_path / "out").exists()


CONTRADICTIONS: dict[str, tuple[str, Callable[[Any], Any], type[ManipiError], tuple[str, ...]]] = {
    "horizon": (CONFIG, config_of(chunk_size=50), ConfigError, ("action_horizon 50", "found 4", "--action-horizon 50")),
    "prompt": (CONFIG, config_of(tokenizer_max_length=48), CheckpointError, ("48 in config.json", "policy_preproc")),
    "width": (CONFIG, config_of(max_action_dim=32), ConfigError, ("action_dim 32", "found 4")),
    "pictures": (CONFIG, config_of(image_resolution=[224, 224]), ConfigError, ("image_size 224", "found 16")),
    "kind": (CONFIG, config_of(type="pi0"), CheckpointError, ("a Pi0Config", "a Pi05Config")),
    "other": (CONFIG, config_of(type="smolvla"), CheckpointError, ("pi0, pi05, pi0_fast", "'smolvla'")),
    "peft": (CONFIG, config_of(use_peft=True), CheckpointError, ("use_peft",)),
    "memory": (CONFIG, config_of(use_visual_memory=True), CheckpointError, ("use_visual_memory",)),
    "periods": (CONFIG, config_of(max_period=8.0), CheckpointError, ("max_period",)),
    "history": (CONFIG, config_of(n_obs_steps=2), CheckpointError, ("n_obs_steps",)),
    "state": (
        CONFIG,
        lambda d: d["input_features"]["observation.state"].update(shape=[3]),
        ConfigError,
        ("3 state dimensions", "4 of robot 'tabletop'"),
    ),
    "actions": (
        CONFIG,
        lambda d: d["output_features"]["action"].update(shape=[3]),
        ConfigError,
        ("3 action dimensions", "4 of robot 'tabletop'"),
    ),
    "scaled pictures": (
        BEFORE,
        lambda d: step(d, "normalizer_processor")["config"]["norm_map"].update(VISUAL="MEAN_STD"),
        CheckpointError,
        ("IDENTITY for pictures", "VISUAL 'MEAN_STD'"),
    ),
    "unknown mode": (
        BEFORE,
        lambda d: step(d, "normalizer_processor")["config"]["norm_map"].update(STATE="MIN_MAX", ACTION="MIN_MAX"),
        CheckpointError,
        ("MEAN_STD or QUANTILES", "'MIN_MAX'"),
    ),
    "one mode": (
        BEFORE,
        lambda d: step(d, "normalizer_processor")["config"]["norm_map"].update(STATE="MEAN_STD"),
        CheckpointError,
        ("alike", "STATE 'MEAN_STD'"),
    ),
    "no mode": (
        BEFORE,
        lambda d: step(d, "normalizer_processor")["config"].pop("norm_map") and None,
        CheckpointError,
        ("norm_map", "no value"),
    ),
    "another way back": (AFTER, mean_std, CheckpointError, ("the normalisation", "policy_postprocessor.json")),
    "unknown step": (
        BEFORE,
        lambda d: d["steps"].insert(0, _entry("clip_state_processor", {})),
        CheckpointError,
        ("'clip_state_processor'", "would be lost"),
    ),
    "own class": (
        BEFORE,
        lambda d: d["steps"].insert(0, {"class": "mine.Step", "config": {}}),
        CheckpointError,
        ("'mine.Step'",),
    ),
    "one way": (
        BEFORE,
        lambda d: d["steps"].insert(2, _entry("relative_actions_processor", {"enabled": True})),
        CheckpointError,
        ("in both processors or in neither",),
    ),
    "no state in the prompt": (
        BEFORE,
        lambda d: step(d, "pi05_prepare_state_tokenizer_processor_step")["config"].update(
            include_state_in_prompt=False
        ),
        CheckpointError,
        ("without the state",),
    ),
    "π0's prompt": (
        BEFORE,
        lambda d: step(d, PROMPT).update(registry_name="pi0_new_line_processor"),
        ConfigError,
        ("state_in_prompt False", "found True"),
    ),
    "relative by config.json": (
        CONFIG,
        config_of(use_relative_actions=True),
        CheckpointError,
        ("relative actions", "config.json", "policy_preprocessor.json"),
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused_and_names_both(folder, wanted, tmp_path, case):
    file, edit, kind, words = CONTRADICTIONS[case]
    change(folder / file, edit)
    with pytest.raises(kind) as error:
        import_checkpoint(folder, tmp_path / "ours", recipe=wanted)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not list(tmp_path.glob("*ours*"))


def test_a_longer_prompt_may_be_asked_for_and_another_horizon_not(folder, wanted, tmp_path):
    length = wanted.model.max_token_len
    import_checkpoint(folder, tmp_path / "ours", recipe=wanted, max_token_len=length + 20)
    assert read_checkpoint(tmp_path / "ours").config.model.max_token_len == length + 20
    with pytest.raises(ConfigError, match=r"(?s)action_horizon 4.*8 of the flag"):
        import_checkpoint(folder, tmp_path / "no", recipe=wanted, action_horizon=8)


def test_pictures_in_another_order(folder, wanted, tmp_path):
    def two(data: Any) -> None:
        picture = data["input_features"].pop("observation.images.base")
        data["input_features"] |= {f"observation.images.{name}": picture for name in ("wrist", "front")}

    change(folder / CONFIG, two)
    keys = {"base": "observation/image", "left_wrist": "hand"}
    named = {"observation/image": "observation.images.front", "hand": "observation.images.wrist"}
    robot = replace(wanted.robot, cameras=keys, dataset_keys={**wanted.robot.dataset_keys, **named})
    wanted = replace(wanted, model=replace(wanted.model, cameras=("base", "left_wrist", "right_wrist")))
    with pytest.raises(ConfigError, match=r"(?s)images\.wrist, observation\.images\.front.*front, observation"):
        import_checkpoint(folder, tmp_path / "no", recipe=wanted, robot=robot)
    turned = replace(robot, cameras={"base": "hand", "left_wrist": "observation/image"})
    import_checkpoint(folder, tmp_path / "ours", recipe=wanted, robot=turned)
    third = replace(turned, cameras={**turned.cameras, "right_wrist": "third"})
    with pytest.raises(ConfigError, match=r"(?s)at most the 2 pictures.*3 of robot"):
        import_checkpoint(folder, tmp_path / "no", recipe=wanted, robot=third)


@pytest.mark.parametrize("name", ["../stats.safetensors", "/etc/passwd", "a/../../stats.safetensors", "gone", ""])
def test_a_state_file_elsewhere_is_never_read(folder, wanted, tmp_path, name):
    (file,) = folder.glob("policy_preprocessor_*.safetensors")
    shutil.copy(file, tmp_path / "stats.safetensors")
    change(folder / BEFORE, lambda d: step(d, "normalizer_processor").update(state_file=name))
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(folder, tmp_path / "ours", recipe=wanted)
    assert "state_file" in str(error.value) or "normalizer" in str(error.value) or "steps[2]" in str(error.value)


def test_statistics_of_another_size_are_not_cut(folder, wanted, tmp_path):
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("policy_preprocessor_*.safetensors")
    longer = {name: np.concatenate([tensor.numpy(), tensor.numpy()[:1]]) for name, tensor in load_file(file).items()}
    import torch

    save_file({name: torch.from_numpy(values) for name, values in longer.items()}, file)
    with pytest.raises(NormStatsError, match=r"(?s)statistics of 4 state dimensions.*\[5\]"):
        import_checkpoint(folder, tmp_path / "ours", recipe=wanted)


def test_openpis_config_is_held_against_the_recipe_too(exported, wanted, tmp_path):
    folder = shutil.copytree(exported("pi05", "openpi-torch"), tmp_path / "openpi")
    shutil.rmtree(folder / "manipi")
    change(folder / CONFIG, config_of(action_horizon=10))
    with pytest.raises(ConfigError, match=r"(?s)action_horizon 10, as config.json, action_horizon says.*found 4"):
        import_checkpoint(folder, tmp_path / "ours", recipe=wanted)


def test_with_a_robot_alone_the_files_say_the_sizes(folder, wanted):
    change(folder / CONFIG, config_of(chunk_size=9, tokenizer_max_length=33, dtype="float32"))
    change(folder / BEFORE, lambda d: step(d, "tokenizer_processor")["config"].update(max_length=33))
    with pytest.raises(ConfigError, match="heads of 256 dimensions"):  # which nobody named, and no file does
        import_checkpoint(folder, folder.parent / "ours", robot=wanted.robot)
