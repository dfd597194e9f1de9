"""Two arms and two ten-joint hands: 34 dimensions, more than the released models have, and a π0 of its own size.

    manipi train examples/open50.py:pi0_open50 --run-dir runs/open50
    manipi eval runs/open50/checkpoints/1000

The demonstrations are looked for in $MANIPI_SHARED/datasets; name another place with --data.path.
"""

import os
from pathlib import Path

from manipi import (
    ComputeConfig,
    DataConfig,
    GemmaSize,
    Joints,
    OptimizerConfig,
    Pi0Config,
    Robot,
    State,
    TrainConfig,
    VisionSize,
)

DATASETS = Path(os.environ.get("MANIPI_SHARED", "../shared")) / "datasets"

TWO_ARMS = Robot(
    name="open50_two_arms",
    cameras={"base": "image"},
    # Two arms of 7 joints in degrees, then two hands of 10 joints as motor positions of 0 to 255.
    state=(State("state", 34),),
    actions=(Joints(14, relative=True, unit="deg"), Joints(20, relative=True, unit="motor position")),
    control_hz=30.0,
)


def pi0_open50() -> TrainConfig:
    """A π0, whose state is one continuous token: 34 dimensions do not lengthen the prompt."""
    model = Pi0Config(
        vision=VisionSize(width=64, depth=2, mlp_dim=128, num_heads=2, patch_size=8, image_size=64),
        vlm=GemmaSize(width=64, depth=3, mlp_dim=128, num_heads=2, num_kv_heads=1, head_dim=32),
        action_expert=GemmaSize(width=64, depth=3, mlp_dim=128, num_heads=2, num_kv_heads=1, head_dim=32),
        vocab_size=1024,
        action_dim=34,
        action_horizon=16,
        max_token_len=32,
        cameras=("base",),
    )
    # The sample of this dataset comes with the pictures of these six of its fifty episodes.
    data = DataConfig(
        path=str(DATASETS / "open50_lerobot_v3"), episodes=(3, 4, 5, 6, 10, 11), holdout=0.17, cache="raw"
    )
    return TrainConfig(
        robot=TWO_ARMS,
        data=data,
        model=model,
        optimizer=OptimizerConfig(lr=2e-3, final_lr=1e-4, warmup_steps=30, decay_steps=1_000, weight_decay=1e-4),
        compute=ComputeConfig(precision="fp32"),
        norm_mode="zscore",
        steps=1_000,
        batch_size=32,
        noise_draws=4,
        ema_decay=0.99,
        log_every=50,
        save_every=500,
    )
