"""A Unitree G1 with Inspire hands, in one file: the robot, its data, and a tiny policy that trains in minutes.

    manipi train examples/g1.py:pi05_g1 --run-dir runs/g1
    manipi eval runs/g1/checkpoints/300

The demonstrations are four episodes of "Pick up the yellow bottle on the table." in LeRobot format (v2.1 or v3.0).
They are looked for in $MANIPI_SHARED/datasets; name another place with --data.path.
"""

import os
from pathlib import Path

from manipi import (
    ComputeConfig,
    DataConfig,
    GemmaSize,
    Joints,
    OptimizerConfig,
    Pi05Config,
    Robot,
    State,
    TrainConfig,
    VisionSize,
)

DATASETS = Path(os.environ.get("MANIPI_SHARED", "../shared")) / "datasets"

G1 = Robot(
    name="unitree_g1_inspire",
    cameras={"base": "observation.images.cam_high"},
    # Two arms of 7 joints, then two hands of 6 fingers; the command has the same layout.
    state=(State("observation.state", 26, unit="rad"),),
    actions=(Joints(14, relative=True), Joints(12, unit="0 closed to 1 open")),
    action_key="action",
    control_hz=30.0,
    default_prompt="Pick up the yellow bottle on the table.",
)


def pi05_g1() -> TrainConfig:
    """A π0.5 of a fraction of a million parameters: chunks of half a second, from scratch."""
    model = Pi05Config(
        vision=VisionSize(width=64, depth=2, mlp_dim=128, num_heads=2, patch_size=8, image_size=64),
        vlm=GemmaSize(width=64, depth=3, mlp_dim=128, num_heads=2, num_kv_heads=1, head_dim=32),
        action_expert=GemmaSize(width=64, depth=3, mlp_dim=128, num_heads=2, num_kv_heads=1, head_dim=32),
        vocab_size=1024,
        action_dim=26,
        action_horizon=16,
        max_token_len=160,
        cameras=("base",),
    )
    return TrainConfig(
        robot=G1,
        data=DataConfig(path=str(DATASETS / "g1_bottle_lerobot_v30"), holdout=0.25, cache="raw"),
        model=model,
        optimizer=OptimizerConfig(lr=2e-3, final_lr=1e-4, warmup_steps=30, decay_steps=300, weight_decay=1e-4),
        compute=ComputeConfig(precision="fp32"),
        steps=300,
        batch_size=32,
        noise_draws=4,
        ema_decay=0.98,
        log_every=25,
        save_every=300,
    )
