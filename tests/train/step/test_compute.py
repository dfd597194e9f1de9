"""Recomputation and compilation change memory and time, and neither names nor numbers."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from manipi.model import VLA, ModelInput
from manipi.model.config import GemmaSize, ModelConfig, Pi0Config, Pi0FastConfig, Pi05Config, VisionSize
from manipi.train.config import ComputeConfig
from manipi.train.step.state import apply_compute

SIZES = {
    "vision": VisionSize(width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=4, image_size=16),
    "vlm": GemmaSize(width=64, depth=2, mlp_dim=256, num_heads=2, num_kv_heads=1, head_dim=16),
    "vocab_size": 61,
    "action_dim": 6,
    "action_horizon": 5,
    "max_token_len": 16,
    "dtype": "float32",
}
EXPERT = {"action_expert": GemmaSize(width=32, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)}
CONFIGS = {
    "pi0": Pi0Config(**SIZES, **EXPERT),
    "pi05": Pi05Config(**SIZES, **EXPERT),
    "pi0_fast": Pi0FastConfig(**SIZES),
}
B = 2


def batch() -> ModelInput:
    torch.manual_seed(1)
    valid = torch.arange(16) < torch.tensor([16, 9])[:, None]
    causal = (torch.arange(16) >= 6).expand(B, 16)
    return ModelInput(
        images=torch.randint(0, 256, (B, 3, 16, 16, 3), dtype=torch.uint8),
        image_valid=torch.tensor([[True, False, True], [True, False, False]]),
        tokens=torch.randint(2, 61, (B, 16)),
        token_valid=valid,
        state=torch.randn(B, 6),
        actions=torch.randn(B, 5, 6),
        token_causal=causal,
        token_loss=causal & valid,
    )


def model_of(config: ModelConfig, compute: ComputeConfig) -> VLA:
    torch.manual_seed(0)
    model = VLA(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    apply_compute(model, compute)
    return model


def loss_of(model: VLA) -> torch.Tensor:
    torch.manual_seed(2)
    draws = () if isinstance(model.config, Pi0FastConfig) else (torch.randn(B, 2, 5, 6), torch.rand(B, 2))
    return model(batch(), *draws).loss


def gradients(model: VLA) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def held_for_backward(run: Callable[[], torch.Tensor]) -> int:
    """Bytes that are still allocated when the forward pass is over."""
    run()  # what is allocated once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = run()
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


@pytest.mark.parametrize("recompute", ["elementwise", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_gradients_are_the_same_to_the_bit(name, dtype, recompute):
    config = replace(CONFIGS[name], dtype=dtype)
    plain, recomputed = (model_of(config, ComputeConfig(recompute=r)) for r in ("none", recompute))
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    wanted, found = gradients(plain), gradients(recomputed)
    assert wanted.keys() == found.keys()
    assert [n for n in wanted if not torch.equal(wanted[n], found[n])] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_each_step_keeps_less_for_backward(name):
    config = replace(CONFIGS[name], dtype="bfloat16")
    models = [model_of(config, ComputeConfig(recompute=r)) for r in ("none", "elementwise", "full")]
    none, elementwise, full = (held_for_backward(lambda m=model: loss_of(m)) for model in models)
    assert full < 0.6 * elementwise
    assert elementwise < 0.7 * none


IGNORED = (
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
ignore_warnings_of_torch = pytest.mark.filterwarnings(*IGNORED)


@pytest.mark.slow
@ignore_warnings_of_torch
def test_compiled_layers_compute_the_same_from_one_graph_per_kind(monkeypatch):
    """Traced and differentiated, without generated code: that takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch.compiler.reset()
    counters.clear()
    plain = model_of(CONFIGS["pi05"], ComputeConfig())
    compiled = model_of(CONFIGS["pi05"], ComputeConfig(recompute="elementwise", compile=True))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    wanted, found = gradients(plain), gradients(compiled)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    # SigLIP's, Gemma's, and Gemma's last: layers share them, or torch would give up on the ninth.
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@ignore_warnings_of_torch
@torch.no_grad()
def test_a_compiled_layer_runs():
    plain, compiled = (model_of(CONFIGS["pi05"], ComputeConfig(compile=c)).vision for c in (False, True))
    images = torch.rand(2, 16, 16, 3)
    torch.testing.assert_close(compiled(images, torch.float32), plain(images, torch.float32), atol=1e-5, rtol=1e-3)
