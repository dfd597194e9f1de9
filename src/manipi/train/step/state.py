"""What one training step changes, and how it goes to disk and back."""

import errno
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from manipi.checkpoints.initial import load_initial_weights
from manipi.errors import CheckpointError
from manipi.model import VLA
from manipi.model.device import whole
from manipi.model.layers import plain_weights
from manipi.train.config import TrainConfig
from manipi.train.parallel import ALONE, World, shard_model
from manipi.train.step.compute import apply_compute
from manipi.train.step.embedding_rows import NAME, TouchedRows, room_for_rows, rows_are_enough, spread_rows
from manipi.train.step.optimizer import make_optimizer, set_rate
from manipi.train.step.trained import by_rate, compress, keep, trainable_parameters


@dataclass
class TrainState:
    """Weights, their average, the optimizer, and the number of steps done."""

    model: VLA
    parameters: dict[str, nn.Parameter]
    """What is trained, by name."""
    average: dict[str, Tensor]
    """The averages of `optimized`, by name; empty without averaging."""
    optimizer: torch.optim.Optimizer
    rows: TouchedRows | None = None
    """The part of the token embedding that has been read, where the rest need not be optimized."""
    step: int = 0
    world: World = ALONE
    """The processes that hold the state, each a part of every tensor."""

    @staticmethod
    def initial(config: TrainConfig, init: str = "", world: World = ALONE) -> "TrainState":
        """Weights from the seed, then those that `init` names, kept as `manipi.train.step.trained.keep` says.

        No process ever has memory for more than its part of them.
        """
        return TrainState.of(unallocated_model(config, world), config, init, world)

    @staticmethod
    def of(model: VLA, config: TrainConfig, init: str = "", world: World = ALONE) -> "TrainState":
        """The same, given what `unallocated_model` returned."""
        model.to_empty(device=world.device)
        model.init_weights(config.seed)
        if init:
            load_initial_weights(model, init)
        compress(model, config)
        parameters = trainable_parameters(model, config.trained)
        rows = TouchedRows(parameters[NAME]) if NAME in parameters and rows_are_enough(config, world) else None
        model.gemma.sparse_embedding_gradient = rows is not None
        optimized = parameters if rows is None else parameters | {NAME: rows.weight}
        averaged = optimized if config.ema_decay else {}
        average = {name: p.detach().to(torch.float32, copy=True) for name, p in averaged.items()}
        optimizer = make_optimizer(by_rate(optimized, config.optimizer), config.optimizer, config.seed)
        _make_moments(optimizer)
        return TrainState(model, parameters, average, optimizer, rows, world=world)

    @property
    def optimized(self) -> dict[str, nn.Parameter]:
        """What the optimizer sees: the parameters, or of the token embedding the rows that have been read."""
        return self.parameters if self.rows is None else self.parameters | {NAME: self.rows.weight}

    def gather_rows(self) -> None:
        """Before an update: give the optimizer the gradients of single rows."""
        if self.rows is not None:
            if (gradient := self.rows.table.grad) is not None:
                self.rows.grow(gradient.indices()[0], self.optimizer, self.average)
            self.rows.take_gradient()

    def scatter_rows(self) -> None:
        """After an update: give the model its rows."""
        if self.rows is not None:
            self.rows.write_back()

    def inference_weights(self) -> dict[str, Tensor]:
        """What is served: the averaged weights, or the raw ones where there is no average. Empty but on rank 0.

        All processes have to call it. Whole tensors come one by one, so that no process but rank 0 ever has them all.
        """
        return gather({**plain_weights(self.model), **_average(self._tensors())}, self.world)

    def save(self, folder: Path) -> None:
        """Write raw weights, average, optimizer moments and step as a torch DCP folder. Raises OSError.

        Every process writes what it holds, and calls this with the same folder; any number of them can load it.
        """
        save_tensors(self._tensors(), folder, no_dist=self.world.size == 1)

    def load(self, folder: Path) -> None:
        """Restore in place what `save` wrote. Raises CheckpointError where that does not fit this state."""
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata.get("rows")
        count = stored.size[0] if isinstance(stored, TensorStorageMetadata) else None
        if self.rows is not None:
            everything = torch.arange(len(self.rows.table), device=self.rows.table.device)
            self.rows.grow(everything[:count], self.optimizer, self.average)
        tensors = self._tensors()
        rows = room_for_rows(tensors, count) if self.rows is None and count is not None else {}
        if count is None:
            tensors.pop("rows", None)
        try:
            with _one_process():
                load(tensors | rows, checkpoint_id=folder, no_dist=self.world.size == 1)
        except CheckpointException as error:
            raise CheckpointError(
                expected="the training state of this model and optimizer",
                found=_first_failure(error),
                where=str(folder),
                next="go on with the manipi version that wrote it, or start a new run folder",
            ) from error
        self.step = int(tensors["step"])
        if self.rows is not None:
            self.rows.read_again()
        if rows:
            spread_rows(rows, tensors)

    def _tensors(self) -> dict[str, Tensor]:
        """One flat name -> tensor map, sharing memory with the state."""
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        tensors |= {f"weights.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {} if self.rows is None else {"rows": self.rows.index}
        for name, parameter in self.optimized.items():
            for kind, value in self.optimizer.state[parameter].items():
                tensors |= {f"{kind}{part}.{name}": one for part, one in _plain(value).items()}
        return tensors | {f"average.{name}": value for name, value in self.average.items()}


def unallocated_model(config: TrainConfig, world: World = ALONE) -> VLA:
    """The model as it is trained, each parameter with its dtype and shard, but with no memory yet."""
    with torch.device("meta"):
        model = VLA(config.policy_model)
    keep(model, config)
    apply_compute(model, config.compute)
    shard_model(model, world)
    return model


def _plain(moment: Tensor) -> dict[str, Tensor]:
    """A moment as plain tensors: torchao's of 8 bits consists of codes and their scales."""
    return {f".{k}": getattr(moment, k) for k in ("codes", "scale")} if hasattr(moment, "codes") else {"": moment}


def inference_weights(tensors: Mapping[str, Tensor], world: World = ALONE) -> dict[str, Tensor]:
    """Those of a training state's `tensors` that are served, by the model's names; not of one with 4-bit matrices."""
    return gather({**_part(tensors, "weights."), **_average(tensors)}, world)


def gather(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors, one by one, so that no process but rank 0 ever has them all; there alone any are returned."""
    wholes = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in wholes if world.leads}


def _average(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    average = _part(tensors, "average.")
    if "rows" in tensors and average:  # the others are their own average
        average[NAME] = tensors[f"weights.{NAME}"].float().index_copy(0, tensors["rows"], average[NAME])
    return average


def growing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that have a row for each one of the token embedding that has been read."""
    apart = {n: t for n, t in tensors.items() if n.endswith(f".{NAME}") and not n.startswith("weights.") and t.ndim}
    return {"rows": tensors["rows"], **apart} if "rows" in tensors else {}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, *, no_dist: bool = True) -> None:
    """Write a training state's tensors as a torch DCP folder, equal ones to equal bytes. Raises OSError."""
    try:
        with _one_process():
            save(dict(sorted(tensors.items())), checkpoint_id=folder, no_dist=no_dist)
    except CheckpointException as error:  # no Exception for Python, and on a full disk no OSError within either
        raise OSError(errno.EIO, _first_failure(error), str(folder)) from error


@contextmanager
def _one_process() -> Iterator[None]:
    """torch warns that it saves and loads in a single process, although `no_dist` says that this is the intent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _first_failure(error: CheckpointException) -> str:
    failure, _ = next(iter(error.failures.values()))
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its moments before the first step, so that every checkpoint holds the same tensors.

    It makes them itself in a step; here that is a step of rate 0 on zero gradients, which is then forgotten.
    """
    set_rate(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for moments in optimizer.state.values():
        if "step" in moments:  # AdamW counts, SGD does not
            moments["step"].zero_()
