"""Where the time of an inference call goes, stage by stage, beside what this device could do.

    stage      arithmetic and weights of                        floor = max(FLOPs / peak, bytes / bandwidth)
    images     SigLIP, for the pictures that are there
    prefix     the language model, pictures and prompt
    step i     the action expert, one denoising step            peak and bandwidth are measured between the rounds:
    token      π0-FAST: the language model, one token           a large matrix product, and a large copy
    encode     host: the observation to the model's input
    decode     host: the model's output to commands

Shape suffixes: T query tokens, S key tokens.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
import torch

from manipi.model import ModelInput
from manipi.model.autoregressive import next_tokens
from manipi.model.config import GemmaSize, ModelConfig, Pi0Config, Pi0FastConfig
from manipi.model.flow import velocity_field
from manipi.model.gemma import Block
from manipi.model.inference.engine import Engine
from manipi.model.inference.fused import maker
from manipi.policy import Policy
from manipi.train.watch.progress import peak_memory
from manipi.types import Observation

WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage over all rounds."""

    name: str
    p50: float
    """Milliseconds, like the others."""
    p95: float
    p99: float
    gflop: float
    megabytes: float
    """Weights that it reads."""
    share: float | None
    """Of what the device could do: its floor's time over p50. None for work on the host."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A profile of inference."""

    stages: tuple[Stage, ...]
    total: Stage
    """Rounds as a whole; its floor is the sum of the stages'."""
    peak_gflops: float
    """GFLOP/s of a product with a matrix of the engine's kind."""
    bandwidth_gbs: float
    """GB/s of the copy, read and written bytes together."""
    memory_mb: float
    """Highest use: of a GPU by torch, otherwise of the process."""
    rounds: int


class Host(NamedTuple):
    """Whose transforms around the model are timed, and with what observation in the robot's keys."""

    policy: Policy
    observation: Observation


@dataclass
class _Clock:
    device: torch.device
    ms: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.ms.setdefault(name, []).append((time.perf_counter() - began) * 1e3)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def profile(engine: Engine, inputs: ModelInput, *, rounds: int, host: Host | None = None) -> Latency:
    """Run all stages `rounds` times, each beside a measurement of the device.

    Args:
        host: its transforms are stages too, and the model's input is what they make of the observation.
    """
    clock, device = _Clock(inputs.tokens.device), inputs.tokens.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    floors: list[tuple[float, float]] = []
    square = torch.randn((8192 if device.type == "cuda" else 512,) * 2, device=device, dtype=engine.dtype)
    for number in range(WARM_UP + rounds):
        if number == WARM_UP:
            clock.ms.clear()
        floors.append(_speeds(engine, square))
        _one_round(engine, inputs, clock, host)
    peak, bandwidth = (statistics.median(column) for column in zip(*floors[WARM_UP:], strict=True))
    kept, config = inputs.kept, engine.config
    prefix_len = len(kept.cameras) * config.vision.num_tokens + kept.prompt_len
    flops = stage_flops(config, len(kept.pictures), prefix_len)
    blocks = [cast(Block, block) for block in engine.gemma.blocks]
    vlm, action = ([b.experts[name] for b in blocks if name in b.experts] for name in ("vlm", "action"))
    parts = {"images": engine.vision.blocks, "prefix": vlm, "token": vlm, "step": action}
    stages = []
    for name, ms in clock.ms.items():
        kind = name.partition(" ")[0]
        weights = [b for layer in parts.get(kind, ()) for b in layer.buffers()]
        work, size = flops.get(kind, 0.0), sum(b.nbytes for b in weights)
        floor = max(work / peak, size / bandwidth) * 1e3 if kind in flops else None
        stages.append(_stage(name, ms, work / 1e9, size / 1e6, floor))
    floor = sum(one.share * one.p50 for one in stages if one.share is not None)
    gflop, megabytes = sum(one.gflop for one in stages), sum(one.megabytes for one in stages)
    return Latency(
        stages=tuple(stages),
        total=_stage("total", np.sum(list(clock.ms.values()), axis=0), gflop, megabytes, floor),
        peak_gflops=peak / 1e9,
        bandwidth_gbs=bandwidth / 1e9,
        memory_mb=peak_memory(device) / 1e6,
        rounds=rounds,
    )


def _stage(name: str, ms: Sequence[float] | np.ndarray, gflop: float, megabytes: float, floor: float | None) -> Stage:
    p50, p95, p99 = np.percentile(ms, (50, 95, 99)).tolist()
    share = None if floor is None else floor / p50
    return Stage(name=name, p50=p50, p95=p95, p99=p99, gflop=gflop, megabytes=megabytes, share=share)


@torch.no_grad()
def _one_round(engine: Engine, inputs: ModelInput, clock: _Clock, host: Host | None) -> None:
    config, device, encoded = engine.config, inputs.tokens.device, None
    if host is not None:
        with clock.stage("encode"):
            encoded = host.policy.encode(host.observation)
            inputs = host.policy.model_input([encoded])
    with clock.stage("images"):
        images = engine.embed_images(inputs.images, inputs.kept)
    if isinstance(config, Pi0FastConfig):
        with clock.stage("prefix"):
            prefix = engine.embed_prefix(inputs, inputs.kept, images)
            cache = engine.decoding_cache(prefix, 1)
            engine.gemma({"vlm": prefix}, cache, commit=True, last=1)
        with clock.stage("token"):
            position_B1, ids_B1 = prefix.valid_BT.sum(1, keepdim=True), torch.zeros_like(inputs.tokens[:, :1])
            token = next_tokens(engine.gemma, ids_B1, position_B1, engine.dtype)
            engine.gemma({"vlm": token}, cache, commit=True)
        return
    with clock.stage("prefix"):
        cache = engine.prefill(inputs, engine.embed_prefix(inputs, inputs.kept, images))
    x = torch.zeros(inputs.batch_size, 1, config.action_horizon, config.action_dim, device=device)
    dims = torch.ones_like(x[:, 0, 0], dtype=torch.bool)
    velocity = velocity_field(engine.gemma, engine.head, cache, inputs, x, dims, engine.dtype)
    for step in range(engine.num_steps):
        with clock.stage(f"step {step}"):
            x = x - velocity(x, 1 - step / engine.num_steps, None) / engine.num_steps
    if host is not None and encoded is not None:
        with clock.stage("decode"):
            host.policy.pipeline.decode(x[0, 0].float().cpu().numpy(), encoded.seen)


# Arithmetic ----------------------------------------------------------------------------------------------------------


def stage_flops(config: ModelConfig, num_pictures: int, prefix_len: int) -> dict[str, float]:
    """FLOPs of one observation by stage: two for each multiply-add of a matrix product, attention included."""
    vision, vlm = config.vision, config.vlm
    p, w = vision.num_tokens, vision.width
    rows = 3 * vision.patch_size**2 * w + vision.depth * (4 * w * w + 2 * w * vision.mlp_dim) + w * vlm.width
    images = num_pictures * (2 * p * rows + vision.depth * 4 * p * p * w)
    layer = _layer_flops(vlm, prefix_len, prefix_len)
    if isinstance(config, Pi0FastConfig):
        token = vlm.depth * _layer_flops(vlm, 1, prefix_len + 1)
        last = _layer_flops(vlm, 1, prefix_len) + 2 * (prefix_len - 1) * _qkv(vlm)
        return {"images": images, "prefix": (vlm.depth - 1) * layer + last, "token": token}
    expert, h, a = config.action_expert, config.action_horizon, config.action_dim
    has_state, d = isinstance(config, Pi0Config), expert.width
    prefix = (vlm.depth - 1) * layer + 2 * prefix_len * vlm.width * 2 * vlm.num_kv_heads * vlm.head_dim
    prefix += has_state * ((vlm.depth - 1) * _layer_flops(expert, 1, prefix_len + 1) + 2 * _qkv(expert) + 2 * a * d)
    head = 2 * h * (2 * a * d + has_state * 2 * d * d)
    step = vlm.depth * _layer_flops(expert, h, prefix_len + has_state + h) + head
    return {"images": images, "prefix": prefix, "step": step}


def _layer_flops(size: GemmaSize, t: int, s: int) -> float:
    heads = size.num_heads * size.head_dim
    return 2 * t * (_qkv(size) + heads * size.width + 3 * size.width * size.mlp_dim) + 4 * t * s * heads


def _qkv(size: GemmaSize) -> int:
    return size.width * (size.num_heads + 2 * size.num_kv_heads) * size.head_dim


# The device ----------------------------------------------------------------------------------------------------------


def _speeds(engine: Engine, square: torch.Tensor) -> tuple[float, float]:
    """FLOP/s of a large product with a matrix of the engine's kind on an input of its dtype, and bytes/s of a copy."""
    device, matrix = square.device, maker(engine.quantization, square.device, engine.dtype)(square, None)
    flops = 2 * len(square) ** 3 / _seconds(lambda: matrix(square), device)
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return flops, 2 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    clock = _Clock(device)
    for _ in range(3):
        with clock.stage("call"):
            call()
    return min(clock.ms["call"]) / 1e3
