"""Which settings let a run fit a GPU, cheapest first."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

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


def _keep_frozen_in_bfloat16(config: TrainConfig) -> TrainConfig:
    adapted = config.model.vlm_adapters or (
        not isinstance(config.model, Pi0FastConfig) and config.model.action_adapters
    )
    return replace(config, frozen_dtype="bfloat16") if adapted and config.frozen == "adapted" else config


SAVINGS = (
    Saving(
        flags="--model.dtype bfloat16",
        change=lambda c: replace(c, model=replace(c.model, dtype="bfloat16")),
        cost="activations with 8 bits of mantissa, as the released weights were trained",
    ),
    Saving(
        flags="--frozen-dtype bfloat16",
        change=_keep_frozen_in_bfloat16,
        cost="frozen weights are rounded once, as in the reference",
    ),
    Saving(
        flags="--noise-draws 1",
        change=lambda c: replace(c, noise_draws=1),
        cost="a noisier loss per observation",
    ),
    Saving(
        flags="--ema-decay 0",
        change=lambda c: replace(c, ema_decay=0.0),
        cost="what is served is the last step's weights, not their average",
    ),
)
"""In the order in which they are tried, after the batch; each goes on from the ones before it."""


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
    """The first settings that fit: a smaller batch, then more and more of `SAVINGS`, then more GPUs.

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
        """The largest batch that fits with these settings."""
        changed = _apply(config, savings)
        if state_bytes(changed, gpus=self.gpus) + GIB > self.capacity:
            return None
        batch = self._largest_batch(changed)
        if batch is None:
            return None
        cut = [] if batch == config.batch_size else [smaller_batch(batch, config.batch_size)]
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

    def _largest_batch(self, config: TrainConfig) -> int | None:
        """Of the batches that divide the wanted one and can be shared."""
        wanted = config.batch_size
        sizes = [b for b in range(self.gpus, wanted + 1) if wanted % b == 0 and b % self.gpus == 0]
        least, most = self._left(config, sizes[0]), self._left(config, wanted)
        if least < 0 or most >= 0:
            return None if least < 0 else wanted
        # The peak is the largest of sums that are linear in the batch, and so it is below the straight line.
        sure = sizes[0] + least * (wanted - sizes[0]) / (least - most)
        best = max(size for size in sizes if size <= sure)
        while (larger := sizes[sizes.index(best) + 1]) < wanted:
            left = self._left(config, best)
            # By the same rule it is above the line through two smaller ones.
            at_best = left - (least - left) / max(1, best - sizes[0]) * (larger - best)
            if at_best < 0 or self._left(config, larger) < 0:
                break
            best = larger
        return best

    def _left(self, config: TrainConfig, batch_size: int) -> int:
        memory = self._forecast(replace(config, batch_size=batch_size))
        return self.capacity - memory.peak - memory.reserve

    def _forecast(self, config: TrainConfig) -> StepMemory:
        key = self.key(config)
        if key not in self.known:
            self.known[key] = forecast(config, gpus=self.gpus)
            self.bar.update()
        return self.known[key]

    def key(self, config: TrainConfig) -> str:
        return f"{self.gpus} {config}"


def smaller_batch(size: int, wanted: int) -> Saving:
    """Fewer observations per step."""
    return Saving(
        flags=f"--batch-size {size}",
        change=lambda c: replace(c, batch_size=size),
        cost=f"{wanted // size} times fewer observations per step: noisier gradients, and more steps for the same data",
    )
