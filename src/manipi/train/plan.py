"""The memory of a training step by part, and which settings let it fit a GPU, cheapest first.

It is forecast before anything is loaded, or counted in a real step.

Nothing here knows how the model works. `forecast` makes the trainer's own state out of *fake tensors*, which have a
shape, a dtype and a storage but no contents, and takes one real `train_step` with it, while `MemoryLog` writes down
when each storage appears and disappears. What changes the step, such as recomputation, adapters or several noise draws,
therefore changes the forecast.

    bytes ▲                 ┌─┐ peak
          │              ┌──┘ └─┐    ┌──        temporary     whatever else is alive at a moment
          │         ┌────┘      └────┘          gradients     from their first sum to the update
          │    ┌────┘    activations └───       activations   alive when a backward pass begins
          │────┴────────────────────────        weights, optimizer, average, batch: the whole step
          └──── forward ─── backward ── update ─▶ event

Not counted: what kernels allocate within themselves, the CUDA context, and the allocator's rounding. `reserve` stands
for these. Kernels are those of the CPU, whose RMS norm saves one float32 tensor more than the fused one of CUDA.
"""

import importlib.util
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from manipi.errors import ConfigError, TrainingError, shown, unknown_name
from manipi.model.config import Pi0FastConfig
from manipi.model.inputs import ModelInput, blank_past
from manipi.train.config import TrainConfig
from manipi.train.launch import mesh_shape
from manipi.train.step.state import TrainState, unallocated_model
from manipi.train.step.step import train_step
from manipi.train.watch.progress import figure, peak_memory

PARTS = ("weights", "optimizer", "average", "gradients", "batch", "activations", "temporary")
"""In the order in which tables and pictures show them; those before `batch` are what sharding divides."""

SHARDED = PARTS[:4]

Bytes: TypeAlias = dict[str, int]
"""By part, in the order of `PARTS`."""

GIB = 2**30


@dataclass(frozen=True)
class StepMemory:
    """What is alive through one training step."""

    curves: Mapping[str, np.ndarray]
    """Bytes after each event, by part, each [events]; an event is a storage that appears or disappears."""

    @cached_property
    def total(self) -> np.ndarray:
        """Bytes after each event, [events]."""
        return np.sum(list(self.curves.values()), axis=0)

    @property
    def peak(self) -> int:
        return int(self.total.max())

    @property
    def saved(self) -> int:
        """The most bytes that wait for a backward pass at once."""
        return int(self.curves["activations"].max())

    def at_peak(self) -> Bytes:
        """The parts at the moment when their sum is largest."""
        moment = int(self.total.argmax())
        return {part: int(self.curves[part][moment]) for part in PARTS}

    @property
    def reserve(self) -> int:
        """Room for what is not counted: 1 GiB of CUDA context and workspaces, 5 % of what comes and goes for rounding.

        An assumption until a GPU measures it.
        """
        at_peak = self.at_peak()
        return GIB + (at_peak["activations"] + at_peak["temporary"] + at_peak["gradients"]) // 20

    def sharded(self, shards: int, gathered: int) -> "StepMemory":
        """On each of `shards` GPUs that share weights, gradients, moments and average, with `gathered` bytes whole."""
        curves = {part: curve // shards if part in SHARDED else curve for part, curve in self.curves.items()}
        return StepMemory({**curves, "temporary": curves["temporary"] + gathered})


def forecast(config: TrainConfig, batch: ModelInput | None = None, *, gpus: int = 1) -> StepMemory:
    """The memory of each GPU in a step of `config`, without any memory to speak of, in seconds.

    Args:
        batch: masks and shapes to expect. None: every camera that a robot of the recipe has, prompts of full length,
            and for π0-FAST a loss on every token of them, which is more than any data needs.
        gpus: so many share the batch and, by FSDP on the config's mesh, what `StepMemory.sharded` names.

    Raises:
        ConfigError: a batch that the GPUs cannot share evenly, or a mesh that they do not fill.
    """
    _, shards = mesh_shape(config, gpus)
    own, fake = replace(config, batch_size=config.batch_size // gpus), FakeTensorMode(allow_non_fake_inputs=True)
    # The third part of a batch needs what the second one needs, and takes as long.
    passes, part = min(own.accumulate, 2), own.batch_size // own.accumulate
    own, shrunk = replace(own, batch_size=part * passes, accumulate=passes), own.accumulate // passes
    batch = largest_batch(own) if batch is None else first_rows(batch, own.batch_size)
    with tqdm(desc="forecast of a step", unit=" operations", disable=None, leave=False, delay=1) as bar:
        state = fake_state(own, fake, bar)
        # Masks and ids stay real: what the model trims by them, it trims here too. Pictures would take time.
        pictures = {name: fake.from_tensor(v) for name, v in batch.tensors.items() if name.endswith("images")}
        memory = step_memory(state, replace(batch, **pictures), own, bar)
    memory = StepMemory({**memory.curves, "batch": memory.curves["batch"] * shrunk})
    return memory if shards == 1 else memory.sharded(shards, gathered_bytes(state))


def fake_state(config: TrainConfig, fake: FakeTensorMode, bar: tqdm | None = None) -> TrainState:
    """The trainer's state, of tensors without contents, which do without compiled layers."""
    config = replace(config, compute=replace(config.compute, compile=False))
    model = unallocated_model(config)  # outside of the mode, where a fake parameter cannot be swapped for another
    with fake, MemoryLog({}, bar):
        return TrainState.of(model, config)


def largest_batch(config: TrainConfig) -> ModelInput:
    """A batch whose masks say that everything that the config allows is there; its contents are zeros."""
    model, b = config.model, config.batch_size
    robots = [config.robot, *(one.robot for one in config.data.mixture if one.robot)]
    cameras = [any(slot in robot.cameras for robot in robots) for slot in model.cameras]
    prompt = torch.ones(b, model.max_token_len, dtype=torch.bool)
    is_fast, size = isinstance(model, Pi0FastConfig), model.vision.image_size
    text, joint = prompt if model.writes else None, getattr(model, "joint", None)
    codes = torch.ones(b, joint.max_code_len, dtype=torch.bool) if joint and joint.codes_weight else None
    token = model.fixed_codes.first_id if model.fixed_codes else 0  # one that is learned
    return ModelInput(
        images=torch.zeros(1, len(cameras), size, size, 3, dtype=torch.uint8).expand(b, -1, -1, -1, -1),
        image_valid=torch.tensor(cameras).repeat(b, 1),
        tokens=torch.full(prompt.shape, token),
        token_valid=prompt,
        state=torch.zeros(b, model.action_dim),
        actions=None if is_fast else torch.zeros(b, model.action_horizon, model.action_dim),
        action_valid=None if is_fast else torch.ones(b, model.action_horizon, dtype=torch.bool),
        action_dim_valid=torch.ones(b, model.action_dim, dtype=torch.bool),
        token_causal=text,
        token_loss=text,
        codes=None if codes is None else torch.full_like(codes, token, dtype=torch.long),
        code_valid=codes,
        **blank_past(model, b, len(cameras)),
    )


def first_rows(batch: ModelInput, count: int) -> ModelInput:
    """The first `count` observations of a batch."""
    rows = {name: v for name, v in batch.tensors.items() if name != "action_dim_valid" or v.ndim == 2}
    return batch if count == batch.batch_size else replace(batch, **{name: v[:count] for name, v in rows.items()})


def gathered_bytes(state: TrainState) -> int:
    """What FSDP holds whole on every GPU: the parameters outside of all blocks, two blocks, one block's gradients."""
    blocks = [*state.model.gemma.blocks, *state.model.vision.blocks]
    inside = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    return sum(p.nbytes for p in state.model.parameters()) - sum(inside) + 3 * max(inside)


def step_memory(state: TrainState, batch: ModelInput, config: TrainConfig, bar: tqdm | None = None) -> StepMemory:
    """Take one training step, with real tensors or with fake ones, and say what it had in memory."""
    parts = {
        "weights": [*state.model.parameters(), *state.model.buffers()],
        "average": state.average,
        "optimizer": list(state.optimizer.state.values()),
        "batch": list(vars(batch).values()),
    }
    known: dict[torch.UntypedStorage, str] = {}  # each storage that is there before the step, once
    for part, tensors in parts.items():
        for storage in storages(tensors):
            known.setdefault(storage, part)
    log = MemoryLog(known, bar)
    watched = [p.register_post_accumulate_grad_hook(log.mark_gradient) for p in state.parameters.values()]
    with log:
        train_step(state, batch, config)
    for hook in watched:
        hook.remove()
    return log.read()


@dataclass
class _Life:
    """Of one storage: its size, its part where that is known, and the events at which it appeared and disappeared."""

    size: int
    part: str
    born: int
    died: int | None = None


class MemoryLog(TorchDispatchMode):
    """Within it, every storage that an operation returns is written down, and when it disappears.

    Args:
        known: storages that are there before, with their parts.
        bar: counts operations.
    """

    def __init__(self, known: Mapping[torch.UntypedStorage, str], bar: tqdm | None = None):
        super().__init__()
        self._bar = bar
        self._lives: list[_Life] = []
        self._alive: dict[int, tuple[weakref.ref, _Life]] = {}
        self._backwards: list[int] = []
        self._in_backward, self._event = False, 0
        for storage, part in known.items():
            self._add(storage, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._in_backward:
            self._backwards.append(self._event)
        self._in_backward = in_backward
        if _asks_for_number(func, args):
            return True
        result = func(*_as_indices(func, args), **(kwargs or {}))
        if self._bar is not None:
            self._bar.update()
        for storage in storages(result):
            self._appear(storage)
        return result

    def mark_gradient(self, parameter: Tensor) -> None:
        """Called when a parameter has a new gradient."""
        for storage in storages(parameter.grad):
            self._appear(storage).part = "gradients"

    def read(self) -> StepMemory:
        """The curves so far."""
        curves = {part: np.zeros(self._event + 1, dtype=np.int64) for part in PARTS}
        for life in self._lives:
            died = self._event + 1 if life.died is None else life.died
            waits = any(life.born <= start < died for start in self._backwards)
            part = life.part or ("activations" if waits else "temporary")
            curves[part][life.born] += life.size
            if life.died is not None:
                curves[part][life.died] -= life.size
        return StepMemory({part: curve.cumsum() for part, curve in curves.items()})

    def _appear(self, storage: torch.UntypedStorage) -> _Life:
        """torch keeps a storage's Python object as long as the storage, so that its id and death are the storage's."""
        key = id(storage)
        if key not in self._alive:
            self._event += 1
            self._add(storage, "")
        return self._alive[key][1]

    def _add(self, storage: torch.UntypedStorage, part: str) -> None:
        key, life = id(storage), _Life(storage.nbytes(), part, self._event)
        self._lives.append(life)
        self._alive[key] = weakref.ref(storage, lambda _: self._disappear(key)), life

    def _disappear(self, key: int) -> None:
        self._event += 1
        self._alive.pop(key)[1].died = self._event


def storages(tensors: Any) -> Iterator[torch.UntypedStorage]:
    """Those below tensors in any containers, sparse tensors and tensors made of others."""
    for tensor in tree_leaves(tensors):
        if is_traceable_wrapper_subclass(tensor):
            yield from storages([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
        elif isinstance(tensor, Tensor) and tensor.layout == torch.sparse_coo:
            yield from storages([tensor._indices(), tensor._values()])
        elif isinstance(tensor, Tensor):
            yield tensor.untyped_storage()


def _asks_for_number(func: Any, args: Sequence[Any]) -> bool:
    """Whether the step asks what a fake truth value or fraction is, such as whether the loss is finite.

    It is true, or 1. A fake integer is a size or an index, of which there is no good guess; torch refuses it.
    """
    asks = func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor)
    return asks and (args[0].dtype == torch.bool or args[0].dtype.is_floating_point)


def _as_indices(func: Any, args: tuple) -> tuple:
    """`values[mask]`, told by the positions where the mask is true, because fake tensors have no count of these.

    A mask that is fake itself counts as true everywhere: more cannot be.
    """
    if func is not torch.ops.aten.index.Tensor or not isinstance(args[0], FakeTensor):
        return args
    is_mask = [isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]]
    positions = [_positions(i) if mask else [i] for i, mask in zip(args[1], is_mask, strict=True)]
    return args[0], [index for group in positions for index in group]


def _positions(mask: Tensor) -> tuple[Tensor, ...]:
    known = torch.ones(mask.shape, dtype=torch.bool) if isinstance(mask, FakeTensor) else mask
    return known.nonzero(as_tuple=True)


@contextmanager
def memory_report(config: TrainConfig, batch: ModelInput, gpus: int = 1) -> Iterator[None]:
    """Around a training step: afterwards, say how much memory it was forecast to need, and how much it had.

    Args:
        batch: the rows of one process.
        gpus: how many processes there are.
    """
    device, is_gpu = batch.tokens.device, batch.tokens.is_cuda
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    yield
    measured = peak_memory(device)
    what = "measured" if is_gpu else "of tensors in a step; the process, libraries and data included, peaked at"
    peak = _gib(forecast(config, batch.to("cpu"), gpus=gpus).peak)
    tqdm.write(f"memory  forecast {peak}{',' if is_gpu else ''} {what} {measured / GIB:.2f} GiB")


def plot_memory(memory: StepMemory, path: Path, capacity: int | None = None) -> None:
    """The parts over the events of the step, one upon the other, as a PNG."""
    # A picture is a thousand pixels wide; of the events in each, the one with the largest sum is drawn.
    groups = np.array_split(np.arange(len(memory.total)), min(1000, len(memory.total)))
    shown = np.array([group[memory.total[group].argmax()] for group in groups])
    colours = ("#0b6e99", "#4a9cc0", "#9cc9de", "#c46a1b", "#888888", "#7a9a3a", "#d9b44a")
    curves = [memory.curves[part][shown] / GIB for part in PARTS]
    with figure(path, figsize=(8, 4.5)) as drawing:
        axis = drawing.subplots()
        axis.stackplot(shown, *curves, labels=PARTS, colors=colours, linewidth=0)
        if capacity is not None:
            axis.axhline(capacity / GIB, color="#333333", linestyle=":", label="GPU")
        axis.set(xlabel="storages that appeared or disappeared", ylabel="GiB", xlim=(shown[0], shown[-1]))
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


# Settings that fit ----------------------------------------------------------------------------------------------------


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
        lambda c: c.trained != "qlora" and (c.model.vlm_adapters or getattr(c.model, "action_adapters", None)),
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
    hidden = None if show else True
    with tqdm(desc="looking for settings that fit", unit=" forecasts", disable=hidden, leave=False) as bar:
        search = _Search(capacity, gpus, bar, {f"{gpus} {config}": memory})
        chosen: list[Saving] = []
        for saving in (None, *SAVINGS):
            if saving is not None:
                before, after = _apply(config, chosen), _apply(config, [*chosen, saving])
                # 8-bit moments are dense, and may take more than those of the rows that are read.
                if before == after or search.left(after, gpus) < search.left(before, gpus):
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
    return reduce(lambda changed, saving: saving.change(changed), savings, config)


@dataclass
class _Search:
    capacity: int
    gpus: int
    bar: tqdm
    known: dict[str, StepMemory]

    def with_savings(self, config: TrainConfig, savings: list[Saving]) -> Fit | None:
        """The largest part of a batch that fits with these settings."""
        changed = _apply(config, savings)
        part = self._largest_part(changed)
        if part is None:
            return None
        count = config.batch_size // part
        cut = [] if count == config.accumulate else [in_parts(count)]
        changed = _apply(changed, cut)
        return Fit(config=changed, gpus=self.gpus, memory=self.forecast(changed), savings=(*cut, *savings))

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
        if (least := self.left(config, self.gpus)) < 0:
            return None
        if (most := self.left(config, wanted)) >= 0:
            return wanted
        # About linear; several parts keep gradients from one to the next, which a single one does not.
        guess = sizes[0] + least * (wanted - sizes[0]) / (least - most)
        best = max(size for size in sizes if size <= guess)
        while self.left(config, best) < 0:
            best = sizes[sizes.index(best) - 1]
        while (larger := sizes[sizes.index(best) + 1]) < wanted and self.left(config, larger) >= 0:
            best = larger
        return best

    def left(self, config: TrainConfig, part: int) -> int:
        """Bytes to spare, or below zero that lack, with so many observations at a time."""
        memory = self.forecast(replace(config, accumulate=config.batch_size // part))
        return self.capacity - memory.peak - memory.reserve

    def forecast(self, config: TrainConfig) -> StepMemory:
        key = f"{self.gpus} {config}"
        if key not in self.known:
            self.known[key] = forecast(config, gpus=self.gpus)
            self.bar.update()
        return self.known[key]


def in_parts(count: int) -> Saving:
    """A batch that is computed in so many parts."""
    price = f"a step takes {count} passes of smaller matrices; the update is the same up to rounding"
    return Saving(f"--accumulate {count}", price)
