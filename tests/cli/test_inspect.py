import contextlib
import json
import re
import shutil

import numpy as np
import pytest
from tests.data.addressed import CAMERA, write_set

from manipi.cli import main as run_command
from manipi.cli.inspect import _draw
from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.data.open import open_dataset
from manipi.data.review.describe import describe_dataset, sketch_robot
from manipi.model.config import Pi0Config, Pi0FastConfig, Pi05Config
from manipi.recipes.registry import load_robot
from manipi.train.config import DataConfig
from manipi.transforms.pipeline import token_layout


def run_source(source):
    names = {}
    exec(source, names)
    return names["ROBOT"]


@pytest.mark.parametrize("name", ["synthetic_lerobot_v21", "g1_bottle_lerobot_v30", "open50_lerobot_v3"])
def test_sketched_robot_is_one_that_the_dataset_has(shared_datasets, name):
    dataset = open_dataset(shared_datasets / name)
    robot = run_source(describe_dataset(dataset).robot)
    for key in robot.cameras.values():
        dataset.require(key, "image")
    for key, size in [*((s.key, s.size) for s in robot.state), (robot.action_key, robot.action_size)]:
        dataset.require(key, "vector", size)
    assert robot.control_hz == dataset.fps


def test_sketch_knows_wrists_and_grippers(tmp_path):
    names = ("shoulder", "elbow", "left_gripper", "wrist_roll", "right_gripper")
    picture = Feature(kind="image", shape=(16, 16, 3), dtype="video")
    vector = Feature(kind="vector", shape=(5,), dtype="float32", names=names)
    keys = ["cam_right_wrist", "cam_high", "cam_low", "cam_left_wrist"]
    features = {**dict.fromkeys(keys, picture), "qpos": vector, "action": vector}
    with LeRobotWriter(tmp_path / "set", fps=20, features=features, robot_type="toy") as writer:
        values = {key: np.zeros((2, *feature.shape), feature.dtype if feature.kind == "vector" else np.uint8)
                  for key, feature in features.items()}  # fmt: skip
        writer.add_episode(values, task="wait")
    robot = run_source(sketch_robot(open_dataset(tmp_path / "set"), "toy"))
    assert robot.cameras == {
        "right_wrist": "cam_right_wrist", "base": "cam_high", "base_2": "cam_low", "left_wrist": "cam_left_wrist",
    }  # fmt: skip
    assert [(type(g).__name__, g.size) for g in robot.actions] == [
        ("Joints", 2), ("Gripper", 1), ("Joints", 1), ("Gripper", 1),
    ]  # fmt: skip
    assert [s.key for s in robot.state] == ["qpos"]


POSES = {
    "x y z roll pitch yaw gripper": ["euler_xyz", "Gripper"],
    "X Y Z Roll Pitch Yaw": ["euler_xyz"],
    "x y z yaw gripper": ["none", "Joints(1)", "Gripper"],
    "ee_x ee_y ee_z ee_qx ee_qy ee_qz ee_qw": ["quat_xyzw"],
    "eef_pos_x eef_pos_y eef_pos_z eef_quat_x eef_quat_y eef_quat_z eef_quat_w": ["quat_xyzw"],
    "pos.x pos.y pos.z rot.x rot.y rot.z": ["rotvec"],
    "x y z rot6d_0 rot6d_1 rot6d_2 rot6d_3 rot6d_4 rot6d_5": ["rot6d"],
    "left.x left.y left.z left.rx left.ry left.rz left.grip right.x right.y right.z": ["rotvec", "Gripper", "none"],
    "j0 j1 x y z euler_x euler_y euler_z j8": ["Joints(2)", "euler_xyz", "Joints(1)"],
    "x y z qw qx qy qz": ["none", "Joints(4)"],  # a quaternion that begins with w is written in no form of ours
    "delta_x delta_y delta_z delta_roll delta_pitch delta_yaw": ["Joints(6)"],  # offsets are no pose
    "shoulder wrist_roll wrist_yaw": ["Joints(3)"],
    "x y": ["Joints(2)"],
}


@pytest.mark.parametrize("names", POSES)
def test_sketch_knows_tool_poses(tmp_path, names):
    labels = tuple(names.split())
    features = {
        "cam": Feature(kind="image", shape=(16, 16, 3), dtype="video"),
        "action": Feature(kind="vector", shape=(len(labels),), dtype="float32", names=labels),
    }
    with LeRobotWriter(tmp_path / "set", fps=20, features=features, robot_type="toy") as writer:
        values = {"cam": np.zeros((2, 16, 16, 3), np.uint8), "action": np.zeros((2, len(labels)), np.float32)}
        writer.add_episode(values, task="wait")
    robot = run_source(sketch_robot(open_dataset(tmp_path / "set"), "toy"))
    said = {
        "EndEffector": lambda g: g.rotation,
        "Joints": lambda g: f"Joints({g.size})",
        "Gripper": lambda g: "Gripper",
    }
    assert [said[type(group).__name__](group) for group in robot.actions] == POSES[names]
    assert robot.action_size == len(labels)


def test_dataset(manipi, shared_datasets, tmp_path):
    done = manipi("inspect", shared_datasets / "synthetic_lerobot_v21", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    for line in ("LeRobot v2.1", "6 of 40 to 75 frames", "480×640×3  video", "3  open the drawer"):
        assert line in done.stdout
    summary = json.loads((tmp_path / "out.json").read_text())
    assert (summary["num_frames"], summary["fps"]) == (345, 50)
    assert summary["features"]["action"]["shape"] == [14]
    assert summary["tasks"] == {"pick up the cube": 3, "open the drawer": 3}


def test_recipe(manipi, recipe_file, tmp_path):
    done = manipi("inspect", f"{recipe_file}:my_recipe", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "│ base 64 │ left_wrist 64 │ right_wrist 64 │ prompt 60 │ actions 10 │" in done.stdout
    assert re.search(r"'Task: (pick up the cube|open the drawer), State: [\d ]+;\\nAction: '", done.stdout)
    trace = json.loads((tmp_path / "out.json").read_text())
    assert re.search(r"longest prompt  \d+ of 60 tokens \(max_token_len\): synthetic_lerobot_v30, ep", done.stdout)
    assert trace["longest_prompt"]["tokens"] >= len(trace["token_ids"])
    stages = {stage["step"]: stage for stage in trace["stages"]}
    expected = ["observation", "ReadRobot", "ActionSpace", "Normalize", "ResizeImages", "TokenizePrompt", "ModelLayout"]
    assert list(stages) == expected
    assert stages["ActionSpace"]["changed"] == ["actions"]
    assert stages["ReadRobot"]["values"]["image/base"]["shape"] == [480, 640, 3]
    assert stages["ResizeImages"]["values"]["image/base"]["shape"] == [64, 64, 3]
    assert stages["ModelLayout"]["values"]["images"]["shape"] == [3, 64, 64, 3]
    assert stages["ModelLayout"]["values"]["actions"]["shape"] == [10, 16]
    assert "prompt" in stages["ModelLayout"]["removed"]


def test_recipe_without_its_dataset_still_shows_config_and_tokens(manipi):
    done = manipi("inspect", "tabletop")
    assert done.returncode == 1
    assert "│ base 49 │ prompt" in done.stdout
    assert "batch_size=64" in done.stdout
    assert "DatasetNotFoundError" in done.stderr


@pytest.mark.parametrize("recipe", ["pi0_droid", "pi05_libero", "pi0_droid_jointpos_polaris"])
def test_recipe_whose_data_is_elsewhere(manipi, tmp_path, recipe):
    done = manipi("inspect", recipe, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "│ base 256 │ left_wrist 256 │ right_wrist 256 │ prompt" in done.stdout
    assert re.search("no frame to show: (not on this disk: |the recipe has no dataset of its own)", done.stdout)
    assert json.loads((tmp_path / "out.json").read_text())["config"]["robot"]["name"] in ("droid", "libero")


def test_checkpoint(manipi, checkpoint, tmp_path):
    done = manipi("inspect", checkpoint, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "Pi05Config, 7 steps of training" in done.stdout
    assert "every SHA-256 verified" in done.stdout
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["parameters"] == {"vision": 12, "vlm expert": 6, "action expert": 5, "token embedding": 20}
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "robot.json").write_text("{}")
    altered = manipi("inspect", copy)
    assert altered.returncode == 1
    assert "IntegrityError" in altered.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import torch

    from manipi.checkpoints.native import Checkpoint, PolicyConfig, SelfTest, write_checkpoint
    from manipi.data.norm_stats import field_stats
    from manipi.robots.tabletop import TABLETOP
    from manipi.tokenizers import ByteTokenizer, Tokenizers
    from manipi.types import NormStats

    four = field_stats(np.random.default_rng(0).normal(size=(50, 4)))
    names = {
        "vision.patch_embedding.weight": (3, 4),
        "gemma.blocks.0.experts.vlm.q_proj.weight": (2, 3),
        "gemma.blocks.0.experts.action.q_proj.weight": (1, 3),
        "gemma.final_norms.action.scale": (2,),
        "gemma.token_embedding": (5, 4),
    }
    folder = tmp_path_factory.mktemp("run") / "7"
    write_checkpoint(
        folder,
        Checkpoint(
            weights={name: torch.zeros(shape) for name, shape in names.items()},
            config=PolicyConfig(model=Pi05Config(), norm_mode="quantile", step=7),
            robot=TABLETOP,
            norm_stats=NormStats(state=four, actions=four, num_frames=50, contract="c", data="d"),
            tokenizers=Tokenizers(ByteTokenizer()),
            self_test=SelfTest({"x": np.zeros(1)}, np.zeros((2, 2)), np.zeros((2, 2))),
        ),
    )
    return folder


@pytest.mark.parametrize(
    ("model", "prefix", "suffix"),
    [
        (Pi0Config(), 3 * 256 + 48, 1 + 50),
        (Pi05Config(), 3 * 256 + 200, 50),
        (Pi0FastConfig(), 3 * 256 + 250, 0),
    ],
)
def test_token_layout(model, prefix, suffix):
    spans = token_layout(model)
    assert sum(s.tokens for s in spans if s.part == "prefix") == prefix
    assert sum(s.tokens for s in spans if s.part == "suffix") == suffix
    boxes, brackets, _ = _draw(model).splitlines()
    assert len(boxes) == len(brackets)
    assert f"prefix {prefix}" in brackets


def test_target_that_is_nothing(manipi):
    done = manipi("inspect", "no_such_recipe")
    assert done.returncode == 1
    assert "expected a recipe, one of: debug, " in done.stderr


def test_settings_are_numbers_of_the_recipe():
    from manipi.cli.inspect import _settings

    assert next(_settings(DataConfig(path="there"), "data")).split()[:3] == ["data", "DataConfig", "path=there"]


def test_robot_of_a_file(recipe_file):
    assert load_robot(f"{recipe_file}:ROBOT").name == load_robot(f"{recipe_file}:my_recipe").name == "aloha"


@pytest.mark.parametrize("hostile", ['"); exit(3) #', "'); exit(3) #", "\nexit(3)\n", "\\", "\x1b[2J\u2028exit(3)"])
def test_names_of_a_dataset_are_not_run_in_the_sketch(hostile, tmp_path):
    """It is saved as a Python file, and imported by `--robot`."""
    root = write_set(tmp_path / "set")
    info = json.loads((root / "meta/info.json").read_text())
    info["robot_type"] = hostile
    info["features"]["observation.state"]["shape"] = [1, 2]
    for key, new in {"observation.state": f"observation.state{hostile}", "action": f"action{hostile}"}.items():
        info["features"][new] = {**info["features"].pop(key), "names": [f"{hostile}gripper", hostile]}
    info["features"][f"front{hostile}"] = info["features"][CAMERA]
    (root / "meta/info.json").write_text(json.dumps(info))
    summary = describe_dataset(open_dataset(root))
    robot = run_source(summary.robot)
    assert (robot.name, robot.action_key) == (hostile, f"action{hostile}")
    assert [(state.key, state.size) for state in robot.state] == [(f"observation.state{hostile}", 2)]
    assert all(line.isprintable() for line in summary.robot.split("\n"))


def test_nothing_of_a_dataset_reaches_the_screen_raw(manipi, tmp_path):
    root = write_set(tmp_path / "a set")
    info = json.loads((root / "meta/info.json").read_text())
    info["robot_type"] = "\x1b[2J"
    info["features"]["a\x1b[31m\nerror $(touch x)"] = {"dtype": "float32", "shape": [1], "names": ["\x07"]}
    (root / "meta/info.json").write_text(json.dumps(info))
    for command in ("inspect", "check", "view"):
        done = manipi(command, root)
        assert done.returncode == (0 if command == "inspect" else 1)
        text = done.stdout + done.stderr.replace("\r", "")
        assert all(line.isprintable() for line in text.split("\n"))
        assert not any(line.startswith("error $") for line in text.split("\n"))
        assert command != "inspect" or f"next  manipi check '{root}'" in text
        assert command != "check" or f"manipi convert '{root}' TARGET --exclude 'a\\x1b[31m\\nerror $(touch x)'" in text


@pytest.mark.parametrize("command", ["inspect", "check", "view"])
@pytest.mark.parametrize("name", ["episode_0.hdf5", "a/trajectory.h5", ".zgroup", "pusht.zarr/zarr.json"])
def test_recordings_that_are_no_dataset_yet_are_to_be_converted(command, name, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with contextlib.suppress(SystemExit):
        run_command([command, str(tmp_path)])
    said = capsys.readouterr()
    assert f"manipi convert {tmp_path} TARGET" in " ".join((said.out + said.err).split())
