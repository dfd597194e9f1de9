"""Tiny random policies and batches: ragged prompts, a missing camera, no shared files."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from manipi.model import VLA, ModelInput
from manipi.model.config import GemmaSize, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config, VisionSize

VLM = GemmaSize(width=32, depth=3, mlp_dim=48, num_heads=4, num_kv_heads=1, head_dim=8)
SIZES = {
    "vision": VisionSize(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=4, image_size=8),
    "vlm": VLM,
    "vocab_size": 61,
    "action_dim": 6,
    "action_horizon": 5,
    "max_token_len": 7,
    "cameras": ("base", "left_wrist"),
    "dtype": "float32",
}
EXPERT = {"action_expert": GemmaSize(width=24, depth=3, mlp_dim=40, num_heads=4, num_kv_heads=1, head_dim=8)}


@pytest.fixture
def sizes() -> dict:
    """Everything but the action expert."""
    return dict(SIZES)


@pytest.fixture
def configs() -> dict[str, ModelConfig]:
    return {
        "pi0": Pi0Config(**SIZES, **EXPERT),
        "pi05": Pi05Config(**SIZES, **EXPERT),
        "pi0_fast": Pi0FastConfig(**SIZES),
    }


@pytest.fixture
def build() -> Callable[[ModelConfig], VLA]:
    """Models with every parameter random, those that start at zero included, so that no path is dead."""

    def randomised(config: ModelConfig) -> VLA:
        torch.manual_seed(0)
        model = VLA(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model

    return randomised


@pytest.fixture
def batch() -> ModelInput:
    """Three rows with 7, 6 and 5 valid prompt tokens; the second row lacks its first camera."""
    torch.manual_seed(1)
    b, length, horizon, action_dim = 3, 7, 5, 6
    token_valid = torch.arange(length) < torch.tensor([7, 6, 5])[:, None]
    causal = torch.arange(length).expand(b, length) >= 3
    return ModelInput(
        images=torch.randint(0, 256, (b, 2, 8, 8, 3), dtype=torch.uint8),
        image_valid=torch.tensor([[True, True], [False, True], [True, True]]),
        tokens=torch.randint(2, 61, (b, length)),
        token_valid=token_valid,
        state=torch.randn(b, action_dim),
        actions=torch.randn(b, horizon, action_dim),
        token_causal=causal,
        token_loss=causal & token_valid,
    )
