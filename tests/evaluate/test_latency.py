from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from manipi.evaluate.latency import profile, stage_flops
from manipi.model import VLA
from manipi.model.autoregressive import next_tokens
from manipi.model.config import GemmaSize, Pi0Config, Pi0FastConfig, Pi05Config, VisionSize
from manipi.model.flow import velocity_field
from manipi.model.inference.engine import Engine
from manipi.model.inputs import blank_input

VLM = GemmaSize(width=32, depth=3, mlp_dim=48, num_heads=4, num_kv_heads=1, head_dim=8)
SIZES = {
    "vision": VisionSize(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4, image_size=8),
    "vlm": VLM,
    "vocab_size": 61,
    "action_dim": 6,
    "action_horizon": 5,
    "max_token_len": 7,
    "cameras": ("base", "left_wrist"),
    "dtype": "float32",
}
EXPERT = {"action_expert": replace(VLM, width=24, mlp_dim=40)}
CONFIGS = {
    "pi0": Pi0Config(**SIZES, **EXPERT),
    "pi05": Pi05Config(**SIZES, **EXPERT),
    "pi0_fast": Pi0FastConfig(**SIZES),
}


@pytest.fixture(params=CONFIGS)
def engine(request) -> Engine:
    torch.manual_seed(0)
    return Engine(VLA(CONFIGS[request.param]), num_steps=2)


def counted(call) -> tuple[float, object]:
    """FLOPs that torch sees; attention as matrix products, which it does not see otherwise."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        answer = call()
    return float(counter.get_total_flops()), answer


@pytest.mark.parametrize("cameras", [(True, False), (True, True)])
def test_the_flops_are_those_that_torch_counts(engine, cameras):
    inputs = blank_input(engine.config, cameras, 6)
    pictures, tokens = len(inputs.kept.pictures), len(inputs.kept.cameras) * 4 + 6
    expected = stage_flops(engine.config, pictures, tokens)
    found = {}
    found["images"], images = counted(lambda: engine.embed_images(inputs.images, inputs.kept))
    prefix = engine.embed_prefix(inputs, inputs.kept, images)
    if "token" in expected:
        cache = engine.decoding_cache(prefix, 1)
        found["prefix"], _ = counted(lambda: engine.gemma({"vlm": prefix}, cache, commit=True, last=1))
        ids_B1, position_B1 = torch.zeros(1, 1, dtype=torch.long), prefix.valid_BT.sum(1, keepdim=True)
        token = next_tokens(engine.gemma, ids_B1, position_B1, engine.dtype)
        found["token"], _ = counted(lambda: engine.gemma({"vlm": token}, cache, commit=True))
    else:
        found["prefix"], cache = counted(lambda: engine.prefill(inputs, prefix))
        x, dims = torch.zeros(1, 1, 5, 6), torch.ones(1, 6, dtype=torch.bool)
        velocity = velocity_field(engine.gemma, engine.head, cache, inputs, x, dims, engine.dtype)
        found["step"], _ = counted(lambda: velocity(x, 1.0, None))
    assert found == expected


def test_the_parts_make_the_whole(engine):
    latency = profile(engine, blank_input(engine.config, (True, True), 6), rounds=3)
    assert latency.total.gflop == pytest.approx(sum(stage.gflop for stage in latency.stages))
    assert min(stage.p50 for stage in latency.stages) < latency.total.p50
    assert latency.memory_mb > 1
