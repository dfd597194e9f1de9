"""The memory of a training step by part, forecast before anything is loaded, or counted in a real step.

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

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from manipi.model import ModelInput
from manipi.model.config import Pi0FastConfig
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
        memory = step_memory(state, replace(batch, images=fake.from_tensor(batch.images)), own, bar)
    memory = StepMemory({**memory.curves, "batch": memory.curves["batch"] * shrunk})
    return memory if shards == 1 else memory.sharded(shards, gathered_bytes(state))


def fake_state(config: TrainConfig, fake: FakeTensorMode, bar: tqdm | None = None) -> TrainState:
    """The trainer's state, of tensors without contents, which do without compiled layers."""
    config = replace(config, compute=replace(config.compute, compile=False))
    model = unallocated_model(config)  # outside of the mode, where a fake parameter cannot be swapped for another
    with fake, MemoryLog([], bar):
        return TrainState.of(model, config)


def largest_batch(config: TrainConfig) -> ModelInput:
    """A batch whose masks say that everything that the config allows is there; its contents are zeros."""
    model, b = config.model, config.batch_size
    robots = [config.robot, *(one.robot for one in config.data.mixture if one.robot)]
    cameras = [any(slot in robot.cameras for robot in robots) for slot in model.cameras]
    prompt = torch.ones(b, model.max_token_len, dtype=torch.bool)
    is_fast, size = isinstance(model, Pi0FastConfig), model.vision.image_size
    return ModelInput(
        images=torch.zeros(1, len(cameras), size, size, 3, dtype=torch.uint8).expand(b, -1, -1, -1, -1),
        image_valid=torch.tensor(cameras).repeat(b, 1),
        tokens=torch.zeros_like(prompt, dtype=torch.long),
        token_valid=prompt,
        state=torch.zeros(b, model.action_dim),
        actions=None if is_fast else torch.zeros(b, model.action_horizon, model.action_dim),
        action_valid=None if is_fast else torch.ones(b, model.action_horizon, dtype=torch.bool),
        action_dim_valid=torch.ones(b, model.action_dim, dtype=torch.bool),
        token_causal=prompt if is_fast else None,
        token_loss=prompt if is_fast else None,
    )


def first_rows(batch: ModelInput, count: int) -> ModelInput:
    """The first `count` observations of a batch."""
    whole = batch.batch_size
    tensors = {name: v for name, v in vars(batch).items() if isinstance(v, Tensor) and name != "action_dim_valid"}
    dims = batch.action_dim_valid
    cut = dims[:count] if dims is not None and dims.ndim == 2 else dims
    return (
        batch if count == whole else replace(batch, action_dim_valid=cut, **{n: v[:count] for n, v in tensors.items()})
    )


def gathered_bytes(state: TrainState) -> int:
    """What FSDP holds whole on every GPU: the parameters outside of all blocks, two blocks, one block's gradients."""
    blocks = [*state.model.gemma.blocks, *state.model.vision.blocks]
    inside = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    return sum(p.nbytes for p in state.model.parameters()) - sum(inside) + 3 * max(inside)


def step_memory(state: TrainState, batch: ModelInput, config: TrainConfig, bar: tqdm | None = None) -> StepMemory:
    """Take one training step, with real tensors or with fake ones, and say what it had in memory."""
    log = MemoryLog(known_storages(state, vars(batch).values()), bar)
    watched = [p.register_post_accumulate_grad_hook(log.mark_gradient) for p in state.parameters.values()]
    with log:
        train_step(state, batch, config)
    for hook in watched:
        hook.remove()
    return log.read()


Known: TypeAlias = list[tuple[torch.UntypedStorage, str]]


def known_storages(state: TrainState, batch: Iterable[Any]) -> Known:
    """Each storage that is there before the step, once, with its part."""
    parts = {
        "weights": [*state.model.parameters(), *state.model.buffers()],
        "average": state.average,
        "optimizer": list(state.optimizer.state.values()),
        "batch": list(batch),
    }
    found: dict[torch.UntypedStorage, str] = {}
    for part, tensors in parts.items():
        for storage in storages(tensors):
            found.setdefault(storage, part)
    return list(found.items())


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
        known: storages that are there before.
        bar: counts operations.
    """

    def __init__(self, known: Known, bar: tqdm | None = None):
        super().__init__()
        self._bar = bar
        self._lives: list[_Life] = []
        self._alive: dict[int, tuple[weakref.ref, _Life]] = {}
        self._backwards: list[int] = []
        self._in_backward, self._event = False, 0
        for storage, part in known:
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
    peak = forecast(config, batch.to("cpu"), gpus=gpus).peak
    small = f"{peak / 2**20:.1f} MiB" if peak < GIB / 10 else f"{peak / GIB:.2f} GiB"
    tqdm.write(f"memory  forecast {small}{',' if is_gpu else ''} {what} {measured / GIB:.2f} GiB")


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
