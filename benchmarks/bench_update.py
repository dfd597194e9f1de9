"""The update of a layer's weights: clip, AdamW and average, fused, beside one after the other; and memory saved.

The layer is the language model's at full width: 110 million float32 numbers in 7 matrices. Both ways run in turns on
the same gradients, in one thread; times are medians of the processor's.

    python benchmarks/bench_update.py
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from harness import Measure, report

from manipi.model.config import GEMMA_2B, Pi05Config
from manipi.train.config import OptimizerConfig
from manipi.train.step.optimizer import gradient_norm, learning_rate, make_optimizer, update, update_average

REPEATS, DECAY, CONFIG = 9, 0.99, OptimizerConfig()
GOALS = {"unfolded": 1.0, "naive": 1.5}


def layer() -> list[torch.nn.Parameter]:
    d, m, h = GEMMA_2B.width, GEMMA_2B.mlp_dim, GEMMA_2B.head_dim
    shapes = ((d, d), (h, d), (h, d), (d, d), (m, d), (m, d), (d, m))
    return [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]


def fused(parameters: list[torch.nn.Parameter], average: list[torch.Tensor]) -> Callable[[int], None]:
    optimizer = make_optimizer(parameters, CONFIG)

    def step(number: int) -> None:
        update(optimizer, number, CONFIG, gradient_norm(parameters))
        update_average(average, parameters, DECAY)

    return step


def naive(parameters: list[torch.nn.Parameter], average: list[torch.Tensor]) -> Callable[[int], None]:
    betas = (CONFIG.beta1, CONFIG.beta2)
    settings = {"betas": betas, "eps": CONFIG.eps, "weight_decay": CONFIG.weight_decay, "foreach": False}
    optimizer = torch.optim.AdamW(parameters, CONFIG.lr, **settings)

    def step(number: int) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, CONFIG.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, CONFIG)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.mul_(DECAY).add_(parameter, alpha=1 - DECAY)

    return step


def unfolded(parameters: list[torch.nn.Parameter], average: list[torch.Tensor]) -> Callable[[int], None]:
    """The fused AdamW after a clip of its own."""
    optimizer = make_optimizer(parameters, replace(CONFIG, clip_norm=0.0))

    def step(number: int) -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, CONFIG.clip_norm)
        update(optimizer, number, replace(CONFIG, clip_norm=0.0), norm)
        update_average(average, parameters, DECAY)

    return step


def main() -> None:
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"fused": [], "unfolded": [], "naive": []}
    steps = {}
    for name, make in (("fused", fused), ("unfolded", unfolded), ("naive", naive)):
        parameters = layer()
        steps[name] = parameters, make(parameters, [p.detach().clone() for p in parameters])
    for number in range(REPEATS):
        for name, (parameters, step) in steps.items():
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 1e-3)
            began = time.process_time()
            step(number)
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    for name, seconds in medians.items():
        print(f"{name}  {1e3 * seconds:.0f} ms of processor time")
    table = Pi05Config().vocab_size * GEMMA_2B.width * 4
    print(f"token embedding: gradient, two moments and average take {4 * table / 1e9:.2f} GB; of 500 rows, 16 MB")
    report(
        [Measure(name="naive / fused", value=medians["naive"] / medians["fused"], unit="×", goal=1.5, at_most=False)]
    )


if __name__ == "__main__":
    main()
