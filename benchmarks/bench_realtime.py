"""What real-time chunking costs: sampling with guidance and after a given prefix beside plain sampling, and what the
broker adds to a control step.

A slice of π0.5 (two layers of 512, one 112 px picture, H = 50) on one thread; rounds of all three in turn, medians of
CPU time, ratios within the run. Guidance is a pass back through the action expert per denoising step.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from harness import Measure, report

from manipi.model import VLA, ModelInput
from manipi.model.config import GemmaSize, Pi05Config, VisionSize
from manipi_client import RealTimeBroker

ROUNDS, STEPS = 15, 1_000
H, A = 50, 32


class Instant:
    """Answers at once."""

    @property
    def metadata(self) -> dict:
        return {"real_time": True}

    def infer(self, observation: Mapping[str, Any]) -> dict:
        return {"actions": np.zeros((H, A), np.float32)}

    def reset(self) -> None:
        pass


def main() -> None:
    torch.set_num_threads(1)
    size = GemmaSize(width=512, depth=2, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64)
    expert = replace(size, width=256, mlp_dim=1024)
    vision = VisionSize(width=256, depth=2, mlp_dim=1024, num_heads=4, patch_size=14, image_size=112)
    sizes = {"vocab_size": 512, "action_dim": A, "action_horizon": H, "max_token_len": 32, "cameras": ("base",)}
    model = VLA(Pi05Config(vision=vision, vlm=size, action_expert=expert, dtype="float32", **sizes)).eval()
    plain = ModelInput(
        images=torch.zeros(1, 1, 112, 112, 3, dtype=torch.uint8),
        image_valid=torch.ones(1, 1, dtype=torch.bool),
        tokens=torch.ones(1, 32, dtype=torch.long),
        token_valid=torch.ones(1, 32, dtype=torch.bool),
        state=torch.zeros(1, A),
    )
    left = {"actions": torch.zeros(1, H, A), "action_valid": torch.arange(H)[None] < 40, "delay": torch.tensor([4])}
    going_on, noise = replace(plain, **left), torch.randn(1, H, A)
    kinds = {"plain": (plain, 0), "guided": (going_on, 0), "prefix": (going_on, 4)}
    times = {kind: [] for kind in kinds}
    for round_number in range(ROUNDS + 2):
        for kind, (inputs, max_delay) in kinds.items():
            began = time.process_time()
            model.sample(inputs, noise, 10, max_delay)
            if round_number >= 2:
                times[kind].append(time.process_time() - began)
    median = {kind: statistics.median(values) for kind, values in times.items()}
    report(
        [
            Measure(name="guided sampling", value=median["guided"] / median["plain"], unit="x plain", goal=3.0),
            Measure(name="sampling after a prefix", value=median["prefix"] / median["plain"], unit="x plain", goal=1.1),
            Measure(name="broker, per control step", value=_broker_ms(), unit="ms", goal=0.5),
        ]
    )


def _broker_ms() -> float:
    observation, times = {"state": np.zeros(A, np.float32)}, []
    with RealTimeBroker(Instant(), 8) as broker:
        for _ in range(STEPS):
            began = time.thread_time()
            broker.infer(observation)
            times.append((time.thread_time() - began) * 1e3)
            time.sleep(0.002)
    return statistics.mean(times[STEPS // 10 :])


if __name__ == "__main__":
    main()
