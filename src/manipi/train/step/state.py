"""What one training step changes, and how it goes to disk and back.

Of a flow policy's token embedding, moments, gradient and average are kept for the rows that were ever read: training
reads a few hundred of its 257 152 rows, and no loss writes with it. Of a row without a gradient since the beginning the
moments are zero, its step is zero, and the average is the row itself; what is left is the decay, which in float32 is
nothing while `1 - lr · weight_decay` rounds to 1. Under that condition this is the dense update, exactly:

    table   [V, D]   the parameter; its gradient is sparse
    index   [n]      the rows that had a gradient, in the order in which they came
    weight  [n, D]   those rows, which is what the optimizer sees; written back into the table after every step
"""

import errno
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manipi.errors import CheckpointError
from manipi.model import VLA
from manipi.model.config import Pi0FastConfig
from manipi.model.device import fill, whole
from manipi.model.layers import plain_weights
from manipi.train.config import TrainConfig
from manipi.train.parallel import ALONE, World, shard_model
from manipi.train.step.optimizer import make_optimizer, set_rate
from manipi.train.step.trained import apply_compute, by_rate, compress, keep, trainable_parameters

# The rows of the token embedding --------------------------------------------------------------------------------------


NAME = "gemma.token_embedding"


def rows_are_enough(config: TrainConfig, world: World = ALONE) -> bool:
    """Whether rows without a gradient stay as they are.

    Not where the table writes tokens, nor where blocks of 256 moments share a scale, nor where the gradient is reduced
    over processes, which needs it dense.
    """
    rate = config.optimizer.lr * config.optimizer.lr_scale.vlm
    decays = config.optimizer.kind == "adamw" and rate * config.optimizer.weight_decay >= 2**-25
    dense = isinstance(config.model, Pi0FastConfig) or config.optimizer.state_bits == 8
    return not (decays or dense or world.size > 1)


class TouchedRows:
    """The rows of a table that were read so far; at the start none.

    Args:
        table: the parameter [V, D].
    """

    def __init__(self, table: nn.Parameter):
        self.table = table
        self.index = torch.empty(0, dtype=torch.long, device=table.device)
        self.weight = nn.Parameter(table.detach()[self.index])
        self._slots = torch.full((len(table),), -1, device=table.device)

    @torch.no_grad()
    def grow(self, ids: Tensor, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> None:
        """Take in the rows `ids` that are new, with moments of zero and their value as their average."""
        new = ids[self._slots[ids] < 0]
        if not len(new):
            return
        old, rows = self.weight, self.table.detach()[new]
        self._slots[new] = torch.arange(len(new), device=new.device) + len(self.index)
        self.index, self.weight = torch.cat([self.index, new]), nn.Parameter(torch.cat([old.detach(), rows]))
        for group in optimizer.param_groups:
            group["params"] = [self.weight if p is old else p for p in group["params"]]
        optimizer.state[self.weight] = {
            name: torch.cat([moment, torch.zeros_like(rows, dtype=moment.dtype)]) if moment.ndim else moment
            for name, moment in optimizer.state.pop(old).items()
        }
        if NAME in average:
            average[NAME] = torch.cat([average[NAME], rows.to(average[NAME].dtype)])

    def take_gradient(self) -> None:
        """Move the table's gradient, whose rows are all here, to `weight`."""
        gradient, self.table.grad = self.table.grad, None
        self.weight.grad = torch.zeros_like(self.weight)
        if gradient is not None:
            self.weight.grad.index_copy_(0, self._slots[gradient.indices()[0]], gradient.values())

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the updated rows into the table."""
        self.table.index_copy_(0, self.index, self.weight)

    @torch.no_grad()
    def read_again(self) -> None:
        """Follow a table and an index that were loaded in place."""
        self._slots.fill_(-1)
        self._slots[self.index] = torch.arange(len(self.index), device=self.index.device)
        self.weight.copy_(self.table[self.index])


def room_for_rows(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """What a state that kept `count` rows apart has in the place of the dense tensors, to load them into."""
    names = [name for name in tensors if name.endswith(f".{NAME}") and not name.startswith("weights.")]
    dense = {name: tensors[name] for name in names if tensors[name].ndim}
    apart = {name: torch.empty(count, t.shape[1], dtype=t.dtype, device=t.device) for name, t in dense.items()}
    return {"rows": torch.empty(count, dtype=torch.long), **apart}


@torch.no_grad()
def spread_rows(rows: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Fill the dense tensors: zero moments and the weights' own average where no row is."""
    for name, values in rows.items():
        if name != "rows":
            dense = tensors[name]
            dense.copy_(tensors[f"weights.{NAME}"]) if name.startswith("average.") else dense.zero_()
            complete = whole(dense)
            complete[rows["rows"].to(values.device)] = values
            fill(dense, complete)


# The state ------------------------------------------------------------------------------------------------------------


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
            from manipi.checkpoints.initial import load_initial_weights  # and all that reads others' weights

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
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        stored: Any = FileSystemReader(folder).read_metadata().state_dict_metadata.get("rows")
        count = None if stored is None else stored.size[0]
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
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

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


def _first_failure(error: Any) -> str:
    """Of a CheckpointException."""
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
