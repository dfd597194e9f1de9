"""What is trained of a model and how its layers compute it; the state of training, to disk and back.

vision          the image encoder
vlm             the language model, its token embedding included
action_expert   the transformer that reads noisy actions (flow policies)
heads           the projections around the action expert (flow policies)

                full    lora, qlora                        expert_only   vision_frozen
vision          yes     yes                                no            no
vlm             yes     adapters alone, where it has any   no            yes
action_expert   yes     adapters alone, where it has any   yes           yes
heads           yes     yes                                yes           yes

What backward recomputes, and what is compiled, is applied from outside to the same model:

                        forward keeps for backward          backward computes once more
    none                everything                          nothing
    elementwise         results of matrices and attention   norms, GELU and gating, rotations, casts
    full                the input of each layer             each layer

The unit is one Gemma block with all its experts, or one SigLIP layer. Names and values of parameters stay, and so does
every number (Chen et al. 2016; which results to keep, Korthikanti et al. 2022).

Of a flow policy's token embedding, moments, gradient and average are kept for the rows that were ever read: training
reads a few hundred of its 257 152 rows, and no loss writes with it. Of a row without a gradient since the beginning the
moments are zero, its step is zero, and the average is the row itself; what is left is the decay, which in float32 is
nothing while `1 - lr · weight_decay` rounds to 1. Under that condition this is the dense update, exactly:

    table   [V, D]   the parameter; its gradient is sparse
    index   [n]      the rows that had a gradient, in the order in which they came
    weight  [n, D]   those rows, which is what the optimizer sees; written back into the table after every step
"""

import errno
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from manipi.errors import CheckpointError, ConfigError
from manipi.model import VLA
from manipi.model.config import NO_ADAPTERS, ModelConfig
from manipi.model.device import fill, many_variants, whole
from manipi.model.layers import AdaptedLinear, NF4Matrix, plain_weights
from manipi.train.config import ComputeConfig, OptimizerConfig, TrainConfig, Trained
from manipi.train.parallel import ALONE, World, shard_model
from manipi.train.step.optimizer import make_optimizer, set_rate

# What is trained, and how a step computes it --------------------------------------------------------------------------


def group_of(name: str) -> str:
    """The group of a parameter, by its name."""
    if name.startswith("vision."):
        return "vision"
    if name.startswith(("head.", "past_state.")):
        return "heads"
    return "action_expert" if ".action." in name else "vlm"


def is_trained(name: str, model: ModelConfig, trained: Trained) -> bool:
    """Whether the mode trains this parameter, if a loss reaches it.

    With `lora`, as in openpi, an expert with adapters keeps everything else, and vision and heads are trained. `qlora`
    trains the same, with the adapted matrices in 4 bits.
    """
    group = group_of(name)
    if trained == "expert_only":
        return group in ("action_expert", "heads")
    if trained == "vision_frozen":
        return group != "vision"
    if trained == "full":
        return True
    adapters = {"vlm": model.vlm_adapters, "action_expert": getattr(model, "action_adapters", NO_ADAPTERS)}
    return not adapters.get(group) or name.rpartition(".")[2].startswith("lora_")


def trainable_parameters(model: VLA, trained: Trained) -> dict[str, nn.Parameter]:
    """The parameters that the mode trains and the loss can reach, by name.

    A flow loss reads the language model's last layer through its keys and values alone, so that layer's queries, output
    projection and MLP, and the norm behind it, never get a gradient unless the model writes.
    """
    dead: tuple[str, ...] = ()
    if not model.config.writes:
        last = f"gemma.blocks.{len(model.gemma.blocks) - 1}.experts.vlm."
        dead = (f"{last}q_proj.", f"{last}out_proj.", f"{last}mlp_norm.", f"{last}mlp.", "gemma.final_norms.vlm.")
    reached = {name: p for name, p in model.named_parameters() if not (dead and name.startswith(dead))}
    return {name: p for name, p in reached.items() if is_trained(name, model.config, trained)}


def keep(model: VLA, config: TrainConfig) -> None:
    """Keep what is not trained as `frozen_dtype` and the rest as the precision says; ask gradients of what is."""
    frozen, kept = getattr(torch, config.frozen_dtype), getattr(torch, config.compute.master_dtype)
    parameters = trainable_parameters(model, config.trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
        parameter.data = parameter.data.to(kept if is_trained(name, model.config, config.trained) else frozen)


def compress(model: VLA, config: TrainConfig) -> None:
    """With `qlora`, what adapters adapt goes to 4 bits."""
    for module in model.modules() if config.trained == "qlora" else ():
        if isinstance(module, AdaptedLinear):
            module.compress(getattr(torch, config.frozen_dtype))


def by_rate(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters as an optimizer's groups, one for each multiplier of the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(asdict(config.lr_scale)[group_of(name)], []).append(parameter)
    return [{"params": members, "lr_scale": scale} for scale, members in groups.items()]


class ParameterRow(NamedTuple):
    """One line of the table: the parameters of a group that are kept alike."""

    group: str
    parameters: int
    """How many numbers."""
    trained: bool
    dtype: str
    peak_lr: float
    """0 where nothing is trained."""


def parameter_table(model: VLA, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[ParameterRow]:
    """Every parameter of the model, summed by group, dtype, and whether it is trained."""
    counts: dict[tuple[str, bool, str], int] = {}
    for name, parameter in model.named_parameters():
        key = group_of(name), name in parameters, str(parameter.dtype).removeprefix("torch.")
        counts[key] = counts.get(key, 0) + parameter.numel()
    for name, module in model.named_modules():
        if isinstance(module, NF4Matrix):
            key = group_of(name), False, "nf4"
            counts[key] = counts.get(key, 0) + module.shape.numel()
    rates = {group: config.lr * scale for group, scale in asdict(config.lr_scale).items()}
    return [
        ParameterRow(group, count, trained, dtype, rates[group] * trained)
        for (group, trained, dtype), count in sorted(counts.items(), key=lambda row: (row[0][0], not row[0][1]))
    ]


def format_table(rows: Iterable[ParameterRow]) -> str:
    """The table as text, one line per row, and the sum of what is trained."""
    rows = list(rows)
    lines = [f"{'group':<14} {'parameters':>14}  {'trained':<7}  {'kept as':<8}  peak lr"]
    for row in rows:
        rate = f"{row.peak_lr:.3g}" if row.trained else "–"
        said = "yes" if row.trained else "no"
        lines.append(f"{row.group:<14} {row.parameters:>14,}  {said:<7}  {row.dtype:<8}  {rate}")
    trained, whole = sum(row.parameters for row in rows if row.trained), sum(row.parameters for row in rows)
    return "\n".join([*lines, f"{'trained':<14} {trained:>14,}  of {whole:,}"])


def require_packages(config: TrainConfig) -> None:
    """Raises ConfigError where a setting needs a package that is not installed."""
    needed = {"optimizer.state_bits": "torchao"} if config.optimizer.state_bits == 8 else {}
    needed |= {"trained": "bitsandbytes"} if config.trained == "qlora" else {}
    for setting, package in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                expected=f"the package {package}, which this setting needs",
                found="no such package",
                where=f"TrainConfig.{setting}",
                next=f"pip install 'manipi[low-bit]', or choose another --{setting.replace('_', '-')}",
            )


_KEPT_OPS = (
    *("mm", "addmm", "bmm", "baddbmm"),
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def apply_compute(model: VLA, config: ComputeConfig) -> None:
    """Give the layers of `model` another `forward`; once, before training."""
    for layer in [*model.vision.blocks, *model.gemma.blocks]:
        if config.recompute != "none":
            layer.forward = _recomputing(layer.forward, config.recompute)
        if config.compile:
            layer.forward = torch.compile(layer.forward, **many_variants())


def _recomputing(forward: Callable[..., Any], recompute: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # the layers draw nothing
    if recompute == "elementwise":
        kept: list[Any] = [getattr(torch.ops.aten, name).default for name in _KEPT_OPS if hasattr(torch.ops.aten, name)]
        kept += [torch.ops.higher_order.flex_attention]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed


# The rows of the token embedding --------------------------------------------------------------------------------------


NAME = "gemma.token_embedding"


def rows_are_enough(config: TrainConfig, world: World = ALONE) -> bool:
    """Whether rows without a gradient stay as they are.

    Not where the table writes tokens, nor where blocks of 256 moments share a scale, nor where the gradient is reduced
    over processes, which needs it dense.
    """
    rate = config.optimizer.lr * config.optimizer.lr_scale.vlm
    decays = config.optimizer.kind == "adamw" and rate * config.optimizer.weight_decay >= 2**-25
    dense = config.model.writes or config.optimizer.state_bits == 8
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
    apart = {n: torch.empty(count, t.shape[1], dtype=t.dtype, device=t.device) for n, t in _per_row(tensors).items()}
    return {"rows": torch.empty(count, dtype=torch.long), **apart}


def _per_row(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moments and averages of the token embedding, which have a row for each of its rows that they are of."""
    return {n: t for n, t in tensors.items() if n.endswith(f".{NAME}") and not n.startswith("weights.") and t.ndim}


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
        """Weights from the seed, then those that `init` names, kept as `keep` says.

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
                # torchao's of 8 bits consist of codes and their scales.
                parts = ("codes", "scale") if hasattr(value, "codes") else ()
                tensors |= {f"{kind}.{part}.{name}": getattr(value, part) for part in parts} or {
                    f"{kind}.{name}": value
                }
        return tensors | {f"average.{name}": value for name, value in self.average.items()}


def unallocated_model(config: TrainConfig, world: World = ALONE) -> VLA:
    """The model as it is trained, each parameter with its dtype and shard, but with no memory yet."""
    with torch.device("meta"):
        model = VLA(config.policy_model)
    keep(model, config)
    apply_compute(model, config.compute)
    shard_model(model, world)
    return model


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
    return {"rows": tensors["rows"], **_per_row(tensors)} if "rows" in tensors else {}


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
