"""Model FLOPs against torch's own count, and what is known of devices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from manipi.model import VLA, ModelInput
from manipi.model.config import (
    Adapters,
    FixedCodes,
    GemmaSize,
    LoRA,
    ModelConfig,
    Pi0Config,
    Pi0FastConfig,
    Pi05Config,
    VisionSize,
)
from manipi.train.step.state import is_trained
from manipi.train.watch.progress import ModelFlops, listed_peak, peak_flops

SIZE = GemmaSize(width=32, depth=8, mlp_dim=128, num_heads=2, num_kv_heads=1, head_dim=16)
VISION = VisionSize(width=16, depth=2, mlp_dim=32, num_heads=2, patch_size=8, image_size=16)
LORA = Adapters(attention=LoRA(rank=2, alpha=2.0), feed_forward=LoRA(rank=2, alpha=2.0))
SHARED = {"vision": VISION, "vlm": SIZE, "action_dim": 4, "action_horizon": 4, "max_token_len": 40, "vocab_size": 300}
SHARED |= {"cameras": ("base", "wrist"), "dtype": "float32"}
FLOW = SHARED | {"action_expert": replace(SIZE, width=16)}
B, K = 3, 2


def full_batch(config: ModelConfig) -> dict[str, np.ndarray]:
    """Every token is real."""
    batch = {
        "images": np.zeros((B, 2, 16, 16, 3), np.uint8),
        "image_valid": np.ones((B, 2), bool),
        "tokens": np.ones((B, 40), np.int64),
        "token_valid": np.ones((B, 40), bool),
        "state": np.zeros((B, 4), np.float32),
    }
    if isinstance(config, Pi0FastConfig):
        learned = np.broadcast_to(np.arange(40) > 20, (B, 40))
        tokens = np.where(np.arange(40) > 30, 200, batch["tokens"])
        return batch | {"token_loss": learned, "token_causal": learned, "tokens": tokens}
    return batch | {"actions": np.zeros((B, 4, 4), np.float32)}


def counted(model: VLA, batch: dict[str, np.ndarray]) -> int:
    """What torch counts in forward and backward. The plain form of attention, of which it knows every product."""
    noise = () if isinstance(model.config, Pi0FastConfig) else (torch.zeros(B, K, 4, 4), torch.ones(B, K))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ModelInput.from_numpy(batch), *noise).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        (Pi0Config(**FLOW), ()),
        (Pi05Config(**FLOW), ()),
        (Pi0FastConfig(**SHARED), ()),
        (Pi0Config(**FLOW, vlm_adapters=LORA, action_adapters=LORA), ()),
        (Pi05Config(**FLOW, vlm_adapters=LORA), ("vision.",)),
        (Pi0FastConfig(**SHARED, vlm_adapters=LORA), ()),
        (Pi0FastConfig(**SHARED, codes=FixedCodes(first_id=150, places=5, per_place=30)), ()),
        (Pi05Config(**FLOW), ("vision.",)),
    ],
    ids=[
        "pi0",
        "pi05",
        "pi0_fast",
        "pi0 lora",
        "pi05 lora, vision frozen",
        "pi0_fast lora",
        "pi0_fast codes",
        "vision frozen",
    ],
)
def test_within_one_percent_of_torch(config, frozen):
    model = VLA(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, config, "lora") and not name.startswith(frozen or "\0"))
    batch = full_batch(config)
    assert ModelFlops(model, K).of_batch(batch) == pytest.approx(counted(model, batch), rel=0.01)


def test_an_expert_alone_needs_no_backward_through_the_rest():
    model = VLA(Pi0Config(**FLOW))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".action." in name or name.startswith("head."))
    batch = full_batch(model.config)
    # The last layer computes queries of the language model that nobody reads: of so small a forward pass a share.
    dead = 2 * B * (8 + 40) * SIZE.width * SIZE.num_heads * SIZE.head_dim
    assert ModelFlops(model, K).of_batch(batch) + dead == pytest.approx(counted(model, batch), rel=0.01)


def test_padding_and_absent_cameras_are_no_work():
    config = Pi0Config(**FLOW)
    flops, batch = ModelFlops(VLA(config), K), full_batch(config)
    half = batch | {"token_valid": batch["token_valid"] & (np.arange(40) < 20)}
    blind = batch | {"image_valid": batch["image_valid"] & np.array([True, False])}
    shorter = ModelFlops(VLA(replace(config, max_token_len=20)), K).of_batch(
        batch | {"tokens": batch["tokens"][:, :20], "token_valid": batch["token_valid"][:, :20]}
    )
    assert flops.of_batch(half) == shorter
    assert shorter < flops.of_batch(batch)
    assert flops.of_batch(blind) < flops.of_batch(batch)


def test_peaks_are_known_or_they_are_not():
    assert listed_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert listed_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert listed_peak("NVIDIA H100 PCIe") == 756e12
    assert listed_peak("NVIDIA L40S") == 362e12
    for unknown in ("NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100-SXM2-32GB", ""):
        assert listed_peak(unknown) is None
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("mps"), torch.bfloat16) is None
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
