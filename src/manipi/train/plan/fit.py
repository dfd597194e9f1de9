"""Which settings let a run fit a GPU, cheapest first."""

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from manipi.errors import ConfigError, TrainingError, shown, unknown_name
from manipi.train.config import TrainConfig
from manipi.train.plan.memory import GIB, StepMemory, forecast

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
        ConfigError: a size that cannot be read, or the name of an unknown GPU.
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


class Saving(NamedTuple):
    """A setting that needs less memory."""

    flags: str
    cost: str
    """What is paid for it."""
    where: Callable[[TrainConfig], object] = lambda config: True
    """Whether there is anything to save, and it can be trained so."""

    def change(self, config: TrainConfig) -> TrainConfig:
        """The config with the flags; as it is where there is nothing to save."""
        flag, value = self.flags.split()
        return with_setting(config, flag.lstrip("-").replace("-", "_"), value) if self.where(config) else config


def with_setting(settings: Any, name: str, value: str) -> Any:
    """The settings with another value of NAME.NAME…, of the kind that it has there now."""
    first, _, rest = name.partition(".")
    now = getattr(settings, first)
    return replace(settings, **{first: with_setting(now, rest, value) if rest else type(now)(value)})


def _has_adapters(config: TrainConfig) -> bool:
    return bool(config.model.vlm_adapters or getattr(config.model, "action_adapters", None))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


SAVINGS = (
    Saving("--compute.recompute elementwise", "norms, GELU and casts are computed twice; no number changes"),
    Saving("--compute.recompute full", "every layer is computed twice, a third more work; no number changes"),
    Saving(
        "--optimizer.state-bits 8",
        "moments in 8 bits, as in Dettmers et al. 2022",
        lambda c: c.optimizer.kind != "sgd" and _installed("torchao"),
    ),
    Saving(
        "--compute.precision bf16",
        "activations with 8 bits of mantissa, as the released weights were trained",
        lambda c: c.compute.precision == "fp32",
    ),
    Saving(
        "--frozen-dtype bfloat16",
        "frozen weights are rounded once, as in the reference",
        lambda c: c.trained != "full",
    ),
    Saving("--noise-draws 1", "a noisier loss per observation"),
    Saving("--ema-decay 0", "what is served is the last step's weights, not their average"),
    Saving(
        "--compute.precision pure_bf16",
        "weights and moments with 8 bits of mantissa, rounded at random",
        lambda c: c.optimizer.kind == "adamw",  # SGD does not round so
    ),
    Saving("--trained vision_frozen", "the image encoder keeps its weights", lambda c: c.trained == "full"),
    Saving(
        "--trained lora",
        "of experts with adapters, only those are trained",
        lambda c: _has_adapters(c) and c.trained != "qlora",
    ),
    Saving(
        "--trained qlora",
        "frozen matrices in 4 bits, expanded whenever they are used",
        lambda c: c.trained == "lora" and _installed("bitsandbytes"),
    ),
)
"""In the order in which they are tried, after parts of the batch; each goes on from the ones before it.

Of packages that are not installed nothing can be forecast, and so nothing is proposed.
"""


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
    """The first settings that fit: a batch in parts, then more and more of `SAVINGS`, then more GPUs.

    Savings that turn out not to be needed are taken back.

    Args:
        memory: the forecast of `config`.
        capacity: bytes of each GPU.
        show: draw a progress bar, where stderr is a terminal.
    """
    with tqdm(
        desc="looking for settings that fit", unit=" forecasts", disable=None if show else True, leave=False
    ) as bar:
        search = _Search(capacity, gpus, bar)
        search.known[search.key(config)] = memory
        chosen: list[Saving] = []
        for saving in (None, *SAVINGS):
            if saving is not None:
                before, after = _apply(config, chosen), _apply(config, [*chosen, saving])
                # 8-bit moments are dense, and may take more than those of the rows that are read.
                if before == after or search.most_left(after) < search.most_left(before):
                    continue
                chosen.append(saving)
            if found := search.with_savings(config, chosen):
                return search.without_needless(config, found)
        grows = not config.parallel.shard  # with the number of GPUs
        for more in (gpus * 2, gpus * 4, gpus * 8) if grows else ():
            search.gpus = more
            if config.batch_size % more == 0 and (found := search.with_savings(config, [])):
                return found
    return None


def out_of_memory(
    error: BaseException, config: TrainConfig, device: torch.device, *, gpus: int = 1, show: bool = False
) -> TrainingError:
    """What to raise where a run ran out of memory: with the forecast of its step, and the first settings that fit.

    Args:
        device: what this process computes on.
        gpus: as for `forecast`.
    """
    memory, available = forecast(config, gpus=gpus), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    needed = memory.peak + memory.reserve
    # Where the forecast fits, it was too low, or not of a step: look for settings that need less than it says.
    found = find_fit(config, memory, min(available, int(0.9 * needed)), gpus=gpus, show=show)
    what_next = "no settings that are known fit: a GPU with more memory, or more of them (--gpus N)"
    if found is not None:
        flags = [saving.flags for saving in found.savings] + ([f"--gpus {found.gpus}"] if found.gpus > gpus else [])
        what_next = f"{' '.join(flags)} needs {_gib(found.memory.peak + found.memory.reserve)}"
        what_next += ", in another folder (--run-dir) where steps were taken in this one"
    if needed <= available:
        what_next += "; a step should have fitted: see what else has memory there (nvidia-smi)"
    return TrainingError(
        expected=f"a run that does with the {_gib(available)} that this process can have of {device}",
        found=f"{shown(str(error).splitlines()[0], 200)}; forecast of a step: {_gib(memory.peak)}, and "
        f"{_gib(memory.reserve)} for what is not counted",
        where=f"batch size {config.batch_size}, {gpus} process{'es'[: 2 * (gpus > 1)]}",
        next=f"{what_next}; manipi plan RECIPE --gpu {available / GIB:.0f}GB says what each setting costs",
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


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
        """The largest part of a batch that fits with these settings."""
        changed = _apply(config, savings)
        part = self._largest_part(changed)
        if part is None:
            return None
        count = config.batch_size // part
        cut = [] if count == config.accumulate else [in_parts(count)]
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

    def _largest_part(self, config: TrainConfig) -> int | None:
        """Of the equal parts in which a batch can be taken and shared, in observations."""
        wanted = config.batch_size
        sizes = [b for b in range(self.gpus, wanted + 1) if wanted % b == 0 and b % self.gpus == 0]
        if (least := self.most_left(config)) < 0:
            return None
        if (most := self._left(config, wanted)) >= 0:
            return wanted
        # About linear; several parts keep gradients from one to the next, which a single one does not.
        guess = sizes[0] + least * (wanted - sizes[0]) / (least - most)
        best = max(size for size in sizes if size <= guess)
        while self._left(config, best) < 0:
            best = sizes[sizes.index(best) - 1]
        while (larger := sizes[sizes.index(best) + 1]) < wanted and self._left(config, larger) >= 0:
            best = larger
        return best

    def most_left(self, config: TrainConfig) -> int:
        """Bytes to spare, or below zero that lack, with one observation per GPU at a time."""
        return self._left(config, self.gpus)

    def _left(self, config: TrainConfig, part: int) -> int:
        memory = self._forecast(replace(config, accumulate=config.batch_size // part))
        return self.capacity - memory.peak - memory.reserve

    def _forecast(self, config: TrainConfig) -> StepMemory:
        key = self.key(config)
        if key not in self.known:
            self.known[key] = forecast(config, gpus=self.gpus)
            self.bar.update()
        return self.known[key]

    def key(self, config: TrainConfig) -> str:
        return f"{self.gpus} {config}"


def in_parts(count: int) -> Saving:
    """A batch that is computed in so many parts."""
    return Saving(
        f"--accumulate {count}",
        f"a step takes {count} passes of smaller matrices; the update is the same up to rounding",
    )
