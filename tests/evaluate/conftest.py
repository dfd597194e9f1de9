import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manipi.data.dataset import Feature
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.evaluate.compare import Side, compare_results
from manipi.evaluate.report import DemoReport, Film
from manipi.evaluate.statistics import success_rate
from manipi.model.config import GemmaSize, Pi0Config, VisionSize
from manipi.recipes.registry import load_recipe
from manipi.records import to_json
from manipi.robots import Gripper, Joints, Robot, State
from manipi.train.config import ComputeConfig, DataConfig, TrainConfig
from manipi.train.loop import train


def make_film(index: int, *, success: bool, failure: str | None = None, prompt: str = "reach the red block") -> Film:
    """A red square that moves to the right, one pixel per frame."""
    frames = np.full((12 + index, 160, 160, 3), 235, np.uint8)
    for t, frame in enumerate(frames):
        frame[60:100, 20 + t : 60 + t] = (200, 40, 40)
    trial = {"index": index, "seed": 700 + index, "prompt": prompt, "success": success, "failure": failure}
    return Film({**trial, "steps": len(frames) - 1}, frames)


@pytest.fixture
def report(tmp_path) -> DemoReport:
    """A made-up report whose numbers are all different."""
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (8, 4), "white").save(run / "loss.png")
    config = load_recipe("tabletop")
    return DemoReport(
        success={
            "trained": success_rate(187, 200),
            "untrained": success_rate(1, 200),
            "blind": success_rate(23, 200),
            "wrong_words": success_rate(9, 200),
        },
        seconds={"record": 61.2, "check": 4.5, "train": 333.4, "drive trained": 80.1},
        latency_ms={"p50": 5.31, "p95": 8.87},
        settings={
            "demo": {"episodes": 8000, "trials": 200},
            "train": to_json(config),
            "dataset": {"episodes": 7991, "frames": 234_567},
            "final_loss": 0.02345,
            "weights_mb": 1.37,
            "versions": {"manipi": "0.1.0", "torch": "2.13.0"},
        },
        films=(
            make_film(0, success=True, prompt="push the <green> block to the tray"),
            make_film(1, success=True),
            make_film(2, success=False, failure="wrong_block"),
            make_film(3, success=False, failure="max_steps"),
        ),
        loss_png=run / "loss.png",
        comparison=compare_results(
            Side(name="trained", success=success_rate(187, 200), outcomes=(True,) * 187 + (False,) * 13),
            Side(name="untrained", success=success_rate(1, 200), outcomes=(True,) + (False,) * 199),
            margin=0.05,
            alpha=0.05,
        ),
    )


# A dataset whose every number is known, and a real policy trained on it for two steps --------------------------------

LENGTH, EPISODES = 12, 5
ROBOT = Robot(
    name="planted",
    cameras={"base": "image"},
    state=(State("state", 2),),
    actions=(Joints(1, relative=True), Gripper(open=0.0, closed=2.0)),
    control_hz=10.0,
)


def planted_episode(number: int) -> dict[str, np.ndarray]:
    """A joint that moves 0.1 per step, commanded one step ahead; a gripper that closes at step 6. The second state
    dimension tells the step, so that the nearest state of another episode is that of the same step."""
    t = np.arange(LENGTH)
    position = 0.1 * t + 0.01 * number
    return {
        "image": np.full((LENGTH, 16, 24, 3), 20 * number + 40, np.uint8),
        "state": np.stack([position, t], axis=1).astype(np.float32),
        "actions": np.stack([position + 0.1, 2.0 * (t >= 6)], axis=1).astype(np.float32),
    }


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("planted") / "dataset"
    features = {
        "image": Feature(kind="image", shape=(16, 24, 3), dtype="video"),
        "state": Feature(kind="vector", shape=(2,), dtype="float32"),
        "actions": Feature(kind="vector", shape=(2,), dtype="float32", names=("joint", "gripper")),
    }
    with LeRobotWriter(root, fps=10, features=features, robot_type="planted") as writer:
        for number in range(EPISODES):
            writer.add_episode(planted_episode(number), task="go")
    return root


@pytest.fixture(scope="session")
def checkpoint(planted, tmp_path_factory) -> Path:
    """runs/tiny/checkpoints/2."""
    size = GemmaSize(width=16, depth=1, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=8)
    model = Pi0Config(
        vision=VisionSize(width=16, depth=1, mlp_dim=16, num_heads=1, patch_size=8, image_size=16),
        vlm=size,
        action_expert=size,
        vocab_size=1024,
        action_dim=2,
        action_horizon=4,
        max_token_len=8,
        cameras=("base",),
    )
    data = DataConfig(path=str(planted), holdout=0.4, num_workers=0)
    settings = {"compute": ComputeConfig(precision="fp32"), "steps": 2, "batch_size": 4, "num_threads": 1}
    config = TrainConfig(robot=ROBOT, data=data, model=model, async_save=False, **settings)
    return train(config, tmp_path_factory.mktemp("runs") / "tiny", show=False)


@pytest.fixture(scope="session")
def shared_g1() -> Path:
    shared = Path(os.environ.get("MANIPI_SHARED", Path(__file__).parents[2] / "../shared")) / "datasets"
    if not shared.is_dir():
        pytest.skip(f"the sample datasets are not at {shared}; set MANIPI_SHARED")
    return shared.resolve() / "g1_bottle_lerobot_v30"
