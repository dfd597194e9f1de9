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
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from manipi.checkpoints.importing import load_initial_weights
from manipi.errors import CheckpointError
from manipi.model import VLA
from manipi.model.config import NO_ADAPTERS, ModelConfig, Pi0FastConfig
from manipi.train.config import TrainConfig
from manipi.train.optimizer import make_optimizer


def trainable_parameters(model: VLA, *, freeze: bool = True) -> dict[str, nn.Parameter]:
    """The parameters that the loss can reach, by name, without the frozen ones where `freeze`.

    A flow loss reads the language model's last layer through its keys and values alone, so that layer's queries, output
    projection and MLP, and the norm behind it, never get a gradient.
    """
    dead: tuple[str, ...] = ()
    if not isinstance(model.config, Pi0FastConfig):
        last = f"gemma.blocks.{len(model.gemma.blocks) - 1}.experts.vlm."
        dead = (f"{last}q_proj.", f"{last}out_proj.", f"{last}mlp_norm.", f"{last}mlp.", "gemma.final_norms.vlm.")
    reached = {name: p for name, p in model.named_parameters() if not name.startswith(dead or ("\0",))}
    return {name: p for name, p in reached.items() if not (freeze and is_frozen(name, model.config))}


def is_frozen(name: str, model: ModelConfig) -> bool:
    """Whether a parameter belongs to an expert with adapters and to none of these: it keeps its value, as in openpi.

    The token embedding is the language model's. Vision, projections and action MLPs are nobody's, and always trained.
    """
    adapters = {"vlm": model.vlm_adapters, "action": getattr(model, "action_adapters", NO_ADAPTERS)}
    *path, leaf = name.split(".")
    expert = "vlm" if leaf == "token_embedding" else next((part for part in path if part in adapters), "")
    return bool(adapters.get(expert)) and not leaf.startswith("lora_")


@dataclass
class TrainState:
    """Weights, their average, the optimizer, and the number of steps done."""

    model: VLA
    parameters: dict[str, nn.Parameter]
    """What is trained, by name."""
    average: dict[str, Tensor]
    """The averaged parameters by name; empty without averaging."""
    optimizer: torch.optim.Optimizer
    step: int = 0

    @staticmethod
    def initial(config: TrainConfig, init: str = "") -> "TrainState":
        """Weights from the seed, then those that `init` names, in float32: the master copy of what is trained.

        The model computes in `config.model.dtype`, whatever its parameters are kept in.
        """
        model = VLA(config.model)
        model.init_weights(config.seed)
        if init:
            load_initial_weights(model, init)
        parameters = trainable_parameters(model, freeze=config.frozen == "adapted")
        if config.frozen == "adapted":
            _freeze(model, getattr(torch, config.frozen_dtype))
        average = {n: p.detach().clone() for n, p in parameters.items()} if config.ema_decay else {}
        optimizer = make_optimizer(parameters.values(), config.optimizer)
        _make_moments(optimizer)
        return TrainState(model, parameters, average, optimizer)

    def inference_weights(self) -> dict[str, Tensor]:
        """What is served: the averaged weights, or the raw ones where there is no average."""
        return inference_weights(self._tensors())

    def save(self, folder: Path) -> None:
        """Write raw weights, average, optimizer moments and step as a torch DCP folder. Raises OSError."""
        save_tensors(self._tensors(), folder)

    def load(self, folder: Path) -> None:
        """Restore in place what `save` wrote. Raises CheckpointError where that does not fit this state."""
        tensors = self._tensors()
        try:
            with _one_process():
                load(tensors, checkpoint_id=folder, no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(
                expected="the training state of this model and optimizer",
                found=_first_failure(error),
                where=str(folder),
                next="go on with the manipi version that wrote it, or start a new run folder",
            ) from error
        self.step = int(tensors["step"])

    def _tensors(self) -> dict[str, Tensor]:
        """One flat name -> tensor map, sharing memory with the state."""
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        tensors |= {f"weights.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"{kind}.{name}"] = value
        return tensors | {f"average.{name}": value for name, value in self.average.items()}


def inference_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a training state's `tensors` that are served, by the model's names."""
    parts = {part: _part(tensors, part) for part in ("weights.", "average.")}
    return {**parts["weights."], **parts["average."]}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a training state's tensors as a torch DCP folder. Raises OSError."""
    try:
        with _one_process():
            save(dict(tensors), checkpoint_id=folder, no_dist=True)
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


def _freeze(model: VLA, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if is_frozen(name, model.config):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its moments before the first step, so that every checkpoint holds the same tensors.

    It makes them itself in a step; here that is a step of rate 0 on zero gradients, which is then forgotten.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for moments in optimizer.state.values():
        if "step" in moments:  # AdamW counts, SGD does not
            moments["step"].zero_()
