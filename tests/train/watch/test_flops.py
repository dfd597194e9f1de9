"""Model FLOPs against torch's own count, and what is known of devices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from manipi.model import VLA, ModelInput
from manipi.model.config import (
    Adapters,
    FixedCodes,
    GemmaSize,
    JointConfig,
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
    if config.joint is not None:
        learned = np.broadcast_to(np.arange(40) > 30, (B, 40))
        batch |= {"codes": np.full((B, 20), 200), "code_valid": np.ones((B, 20), bool)}
        batch |= {"token_loss": learned, "token_causal": learned}
    return batch | {"actions": np.zeros((B, 4, 4), np.float32)}


def counted(model: VLA, batch: dict[str, np.ndarray]) -> int:
    """What torch counts in forward and backward. The plain form of attention, of which it knows every product."""
    noise = () if isinstance(model.config, Pi0FastConfig) else (torch.zeros(B, K, 4, 4), torch.ones(B, K))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ModelInput.from_numpy(batch), *noise).loss.sum().backward()
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
        (Pi05Config(**FLOW, joint=JointConfig(max_code_len=20, insulate=False)), ()),
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
        "joint",
    ],
)
def test_within_one_percent_of_torch(config, frozen):
    model = VLA(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, config, "lora") and not name.startswith(frozen or "\0"))
    batch = full_batch(config)
    assert ModelFlops(model, K).of_batch(batch) == pytest.approx(counted(model, batch), rel=0.01)


class EveryRow(TorchDispatchMode):
    """Of tensors without contents, `values[mask]` takes every row."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = args[1][0] if func is torch.ops.aten.index.Tensor and args[0].is_meta else None
        if first is not None and first.dtype == torch.bool:
            rows = torch.ones(first.shape, dtype=torch.bool).nonzero(as_tuple=True)
            args = args[0], [row.to("meta") for row in rows]
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_an_insulated_joint_step_costs_a_quarter_more_at_most():
    """The released sizes, two cameras, a prompt of 64 tokens, codes of 100: a longer prompt makes the share smaller."""
    steps = []
    for joint in (None, JointConfig(text_weight=0)):
        config = Pi05Config(action_horizon=15, max_token_len=64, cameras=("base", "left_wrist"), joint=joint)
        with torch.device("meta"):
            real = {
                n: torch.ones(1, size, dtype=torch.bool) for n, size in (("image", 2), ("token", 64), ("code", 100))
            }
            batch = ModelInput(
                images=torch.zeros(1, 2, 224, 224, 3),
                image_valid=real["image"],
                tokens=real["token"].long(),
                token_valid=real["token"],
                state=torch.zeros(1, 32),
                actions=torch.zeros(1, 15, 32),
                codes=None if joint is None else real["code"].long(),
                code_valid=None if joint is None else real["code"],
            )
            model, draws = VLA(config, trim=False), (torch.zeros(1, 15, 32), torch.zeros(1))
            with sdpa_kernel(SDPBackend.MATH), EveryRow(), FlopCounterMode(display=False) as counter:
                model(batch, *draws).loss.sum().backward()
        steps.append(counter.get_total_flops())
    assert 1.1 < steps[1] / steps[0] < 1.25


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
