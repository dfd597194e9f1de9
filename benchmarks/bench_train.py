"""How much faster a training step is than the plain one: padded, with loops over parameters instead of fused updates.

A slice of π0.5 at full width: the first two layers of Gemma 2B, of its 300M expert and of SigLIP, three cameras at
224 px, float32 on one thread. Its vocabulary has 8,192 rows, since the optimizer's pass over the other 249,000 is the
same memory traffic either way and would not fit beside the rest. The prompt takes 62 of 200 tokens: what PaliGemma's
tokenizer makes of a long instruction (17 words) with 8 state dimensions.

Steps of all variants alternate, and the median of their CPU time counts. Each works on weights of its own.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from harness import Measure, report

from manipi.model import VLA, ModelInput
from manipi.model.config import GEMMA_2B, GEMMA_300M, SO400M_14, Pi05Config
from manipi.robots.tabletop import TABLETOP
from manipi.train.config import ComputeConfig, DataConfig, OptimizerConfig, TrainConfig
from manipi.train.step.optimizer import learning_rate
from manipi.train.step.state import TrainState, trainable_parameters
from manipi.train.step.step import draw_noise, train_step

DEPTH, BATCH, ROUNDS = 2, 1, 3
PROMPT = 62
MODEL = Pi05Config(
    vlm=replace(GEMMA_2B, depth=DEPTH),
    action_expert=replace(GEMMA_300M, depth=DEPTH),
    vision=replace(SO400M_14, depth=DEPTH),
    vocab_size=8192,
)
FLOAT32 = ComputeConfig(precision="fp32")
CONFIG = TrainConfig(robot=TABLETOP, data=DataConfig(path="unused"), model=MODEL, batch_size=BATCH, compute=FLOAT32)

Step = Callable[[ModelInput], object]


def main() -> None:
    torch.set_num_threads(1)
    measures = list(step_time())
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {ROUNDS} rounds")
    report(measures)


def step_time() -> Iterator[Measure]:
    """Ours against the plain step, with all cameras and with one of the three masked in every row."""
    state = TrainState.initial(CONFIG)
    steps: dict[str, Step] = {"ours": lambda inputs: train_step(state, inputs, CONFIG), "plain": PlainStep()}
    for name, cameras, goal in (("three cameras", 3, 1.1), ("one of three masked", 2, 1.4)):
        seconds = interleaved(steps, batch(cameras))
        print(f"{name}: " + ", ".join(f"{step} {s:.2f} CPU-s" for step, s in seconds.items()))
        ratio = seconds["plain"] / seconds["ours"]
        yield Measure(name=f"plain / ours, {name}", value=ratio, unit="times", goal=goal, at_most=False)


def interleaved(steps: dict[str, Step], inputs: ModelInput) -> dict[str, float]:
    """Median CPU seconds of each step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            began = time.process_time()
            step(inputs)
            times[name].append(time.process_time() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def batch(num_cameras: int) -> ModelInput:
    torch.manual_seed(0)
    length, size = MODEL.max_token_len, MODEL.vision.image_size
    return ModelInput(
        images=torch.randint(0, 256, (BATCH, 3, size, size, 3), dtype=torch.uint8),
        image_valid=(torch.arange(3) < num_cameras).expand(BATCH, 3),
        tokens=torch.randint(0, MODEL.vocab_size, (BATCH, length)),
        token_valid=(torch.arange(length) < PROMPT).expand(BATCH, length),
        state=torch.randn(BATCH, MODEL.action_dim),
        actions=torch.randn(BATCH, MODEL.action_horizon, MODEL.action_dim),
    )


class PlainStep:
    """The same update, as one writes it first: the whole padded batch, and one parameter after the other."""

    def __init__(self) -> None:
        self.model = VLA(CONFIG.policy_model, trim=False)
        self.parameters = list(trainable_parameters(self.model, "full").values())
        self.average = [p.detach().clone() for p in self.parameters]
        o = CONFIG.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, foreach=False
        )
        self.step = 0

    def __call__(self, inputs: ModelInput) -> None:
        noise, time = draw_noise(CONFIG.seed, self.step, BATCH, 1, MODEL.action_horizon, MODEL.action_dim)
        self.model(inputs, noise, time).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, OptimizerConfig().clip_norm, foreach=False)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, CONFIG.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.mul_(CONFIG.ema_decay).add_(parameter, alpha=1 - CONFIG.ema_decay)
        self.step += 1


if __name__ == "__main__":
    main()
