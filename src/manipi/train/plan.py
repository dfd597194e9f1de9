"""Which settings let a run fit a GPU, cheapest first."""

import importlib.util
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from manipi.errors import ConfigError, unknown_name
from manipi.model.config import Pi0FastConfig
from manipi.train.config import TrainConfig
from manipi.train.memory import GIB, StepMemory, forecast, state_bytes

GPUS = {
    "a10": 23_028,
    "a40": 46_068,
    "a100": 81_920,
    "a6000": 49_140,
    "b200": 183_359,
    "h100": 81_559,
    "h200": 143_771,
    "l4": 23_034,
    "l40s": 46_068,
    "rtx3090": 24_576,
    "rtx4090": 24_564,
    "rtx5090": 32_607,
    "t4": 15_360,
    "v100": 32_768,
}
"""MiB of memory as `nvidia-smi` reports them, in the largest version of each."""


def gpu_bytes(name: str) -> int:
    """The memory that `24GB`, `rtx4090` or `H100` stands for. As makers of GPUs count, 1 GB is 2^30 bytes.

    Raises:
        ConfigError: a size that cannot be read, or a GPU that nobody knows.
    """
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)", name.strip(), re.IGNORECASE):
        return int(float(size[1]) * GIB)
    if name[:1].isdigit():
        raise ConfigError(
            expected="a size in GB, such as 24GB or 79.6GB", found=repr(name), where="--gpu", next="--gpu 24GB"
        )
    short = re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())
    if short not in GPUS:
        raise unknown_name("GPU", short, GPUS, next="give its memory instead: --gpu 24GB")
    return GPUS[short] * 2**20


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A setting that needs less memory."""

    flags: str
    change: Callable[[TrainConfig], TrainConfig]
    """Returns the config as it is where there is nothing to save."""
    cost: str
    """What is paid for it."""


def _with_compute(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    return lambda c: replace(c, compute=replace(c.compute, **changes))


def _in_bfloat16(config: TrainConfig) -> TrainConfig:
    if config.compute.precision != "fp32":
        return config
    model = replace(config.model, dtype="bfloat16")  # which otherwise speaks against it
    return replace(config, model=model, compute=replace(config.compute, precision="bf16"))


def _keep_frozen_in_bfloat16(config: TrainConfig) -> TrainConfig:
    return config if config.trained == "full" else replace(config, frozen_dtype="bfloat16")


def _eight_bits(config: TrainConfig) -> TrainConfig:
    """Without torchao there is no such optimizer to forecast."""
    if config.optimizer.kind != "adamw" or importlib.util.find_spec("torchao") is None:
        return config
    return replace(config, optimizer=replace(config.optimizer, state_bits=8))


def _experts_alone(config: TrainConfig) -> TrainConfig:
    if config.trained != "full" or isinstance(config.model, Pi0FastConfig):
        return config
    return replace(config, trained="expert_only", frozen_dtype="bfloat16")


SAVINGS = (
    Saving(
        flags="--compute.precision bf16",
        change=_in_bfloat16,
        cost="activations with 8 bits of mantissa, as the released weights were trained",
    ),
    Saving(
        flags="--frozen-dtype bfloat16",
        change=_keep_frozen_in_bfloat16,
        cost="frozen weights are rounded once, as in the reference",
    ),
    Saving(
        flags="--compute.recompute elementwise",
        change=lambda c: _with_compute(recompute="elementwise")(c) if c.compute.recompute == "none" else c,
        cost="norms and gates are computed twice",
    ),
    Saving(
        flags="--compute.recompute full",
        change=_with_compute(recompute="full"),
        cost="every layer's forward pass is computed twice: about a third more work",
    ),
    Saving(
        flags="--noise-draws 1",
        change=lambda c: replace(c, noise_draws=1),
        cost="a noisier loss per observation",
    ),
    Saving(
        flags="--optimizer.state-bits 8",
        change=_eight_bits,
        cost="moments of 8 bits (pip install 'manipi[low-bit]')",
    ),
    Saving(
        flags="--ema-decay 0",
        change=lambda c: replace(c, ema_decay=0.0),
        cost="what is served is the last step's weights, not their average",
    ),
    Saving(
        flags="--compute.precision pure_bf16",
        change=lambda c: _with_compute(precision="pure_bf16")(c) if c.optimizer.kind == "adamw" else c,
        cost="weights and moments of 16 bits, whose updates are rounded at random",
    ),
    Saving(
        flags="--trained expert_only --frozen-dtype bfloat16",
        change=_experts_alone,
        cost="vision and language model stay as they are",
    ),
)
"""In the order in which they are tried, after smaller parts of the batch; each goes on from the ones before it."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings that fit, and what they need."""

    config: TrainConfig
    gpus: int
    memory: StepMemory
    savings: tuple[Saving, ...]


def fits(memory: StepMemory, capacity: int) -> bool:
    return memory.peak + memory.reserve <= capacity


def find_fit(
    config: TrainConfig, memory: StepMemory, capacity: int, *, gpus: int = 1, show: bool = False
) -> Fit | None:
    """The first settings that fit: more parts of the batch, then more and more of `SAVINGS`, then more GPUs.

    Savings that turn out not to be needed are taken back.

    Args:
        memory: the forecast of `config`.
        capacity: bytes of each GPU.
        show: draw a progress bar.
    """
    with tqdm(desc="looking for settings that fit", unit=" forecasts", disable=not show, leave=False) as bar:
        search = _Search(capacity, gpus, bar)
        search.known[search.key(config)] = memory
        chosen: list[Saving] = []
        for saving in (None, *SAVINGS):
            if saving is not None:
                if _apply(config, [*chosen, saving]) == _apply(config, chosen):
                    continue
                chosen.append(saving)
            if found := search.with_savings(config, chosen):
                return search.without_needless(config, found)
        for more in (gpus * 2, gpus * 4, gpus * 8):
            search.gpus = more
            if config.batch_size % more == 0 and (found := search.with_savings(config, [])):
                return found
    return None


def _apply(config: TrainConfig, savings: list[Saving]) -> TrainConfig:
    for saving in savings:
        config = saving.change(config)
    return config


@dataclass
class _Search:
    capacity: int
    gpus: int
    bar: tqdm
    known: dict[str, StepMemory] = field(default_factory=dict)

    def with_savings(self, config: TrainConfig, savings: list[Saving]) -> Fit | None:
        """The fewest parts of the batch that fit with these settings."""
        changed = _apply(config, savings)
        if state_bytes(changed, gpus=self.gpus) + GIB > self.capacity:
            return None
        parts = self._fewest_parts(changed)
        if parts is None:
            return None
        cut = [] if parts == config.accumulate else [more_parts(parts)]
        changed = _apply(changed, cut)
        return Fit(config=changed, gpus=self.gpus, memory=self._forecast(changed), savings=(*cut, *savings))

    def without_needless(self, config: TrainConfig, found: Fit) -> Fit:
        """The same without each saving that it fits without as well, the batch aside."""
        savings = [saving for saving in found.savings if saving in SAVINGS]
        for saving in savings[:-1]:
            fewer = [one for one in savings if one is not saving]
            if better := self.with_savings(config, fewer):
                found, savings = better, fewer
        return found

    def _fewest_parts(self, config: TrainConfig) -> int | None:
        """Into how many parts of equal size the batch has to be split; more never need more memory."""
        rows = config.batch_size // self.gpus
        choices = [n for n in range(config.accumulate, rows + 1) if rows % n == 0]
        if not choices or self._left(config, choices[-1]) < 0:
            return None
        return choices[bisect_left(choices, True, key=lambda parts: self._left(config, parts) >= 0)]

    def _left(self, config: TrainConfig, parts: int) -> int:
        memory = self._forecast(replace(config, accumulate=parts))
        return self.capacity - memory.peak - memory.reserve

    def _forecast(self, config: TrainConfig) -> StepMemory:
        key = self.key(config)
        if key not in self.known:
            self.known[key] = forecast(config, gpus=self.gpus)
            self.bar.update()
        return self.known[key]

    def key(self, config: TrainConfig) -> str:
        return f"{self.gpus} {config}"


def more_parts(parts: int) -> Saving:
    """The same batch and update, in more parts."""
    return Saving(
        flags=f"--accumulate {parts}",
        change=lambda c: replace(c, accumulate=parts),
        cost=f"{parts} passes per step, each with less for the GPU to do at once; the update is the same",
    )
