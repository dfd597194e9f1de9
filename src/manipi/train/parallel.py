"""Many processes train one model: who they are, which part each holds, and what they agree on.

    mesh of `replicate` × `shard` processes, ranks row by row:

                    shard 0   shard 1   shard 2   shard 3
    replicate 0        0         1         2         3        a row holds one copy of the model, a part each (FSDP2)
    replicate 1        4         5         6         7        a column holds the same part; its gradients are averaged

    replicate 1, shard N    FSDP: one copy over all               replicate N, shard 1    a copy per process, as DDP
    replicate R, shard S    HSDP: shards within a host, say, where gathering is quick, and a copy per host

Torch's engine (Zhao et al. 2023, "PyTorch FSDP") acts on the model from outside: no module knows of it. Every process
reads its slice of the same batch and of the same noise, and losses are weighted by what is real in each slice, so that
the run does not depend on the number of processes beyond the rounding of sums.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it, unseen by pyright

from manipi.errors import ConfigError, ManipiError, TrainingError
from manipi.model import VLA
from manipi.train.config import TrainConfig
from manipi.train.launch import mesh_shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh  # to import it takes as long as to import torch

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. With one process every method is a plain call."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    """None: one process, plain tensors."""

    @property
    def leads(self) -> bool:
        """Whether this process is the one that logs, prints and writes."""
        return self.rank == 0

    def slice(self, batch: Tensor) -> Tensor:
        """This process's rows of something drawn for the whole batch, on its device."""
        share = len(batch) // self.size
        return batch[self.rank * share : (self.rank + 1) * share].to(self.device)

    def total(self, number: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return number
        number = number.detach().clone()
        dist.all_reduce(number)
        return number

    def first(self, word: str) -> str:
        """What the process of the lowest rank says that says something; all have to ask."""
        if self.size == 1:
            return word
        if not self.total(torch.tensor(float(bool(word)))):  # on the processor, so that no GPU is waited for
            return ""
        words = [""] * self.size
        dist.all_gather_object(words, word)
        return next(filter(None, words))

    def once(self, work: Callable[[], _T]) -> _T:
        """Rank 0 does it. All get what it returns, which has to pickle, or raise what it raises."""
        if self.size == 1:
            return work()
        outcome: list[object] = [None]
        if not self.leads:
            dist.broadcast_object_list(outcome)
            if isinstance(outcome[0], ManipiError):
                raise outcome[0]
            return outcome[0]  # type: ignore[return-value]
        outcome = [_peer_failed("rank 0 ended with an error of its own")]
        try:
            result = work()
            outcome = [result]
        except ManipiError as error:
            outcome = [error]
            raise
        finally:
            dist.broadcast_object_list(outcome)
        return result

    def in_turn(self, work: Callable[[], _T]) -> _T:
        """Rank 0 does it, and then the others, who find what it left on disk."""
        results: list[_T] = []
        self.once(lambda: results.append(work()))
        return results[0] if results else work()


ALONE = World()


@contextmanager
def open_world(config: TrainConfig) -> Iterator[World]:
    """Join the processes that torchrun started; without it, a world of one.

    Raises:
        ConfigError: the mesh or the batch does not fit their number, or a process has no device.
        TrainingError: inside the block, when another process died or did not answer in time.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    replicate, shard = mesh_shape(config, size)
    device = _device(config.parallel.device)
    if size == 1:
        yield World(device=device)
        return
    with peer_errors():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=config.parallel.timeout_minutes))
        yield World(dist.get_rank(), size, device, _mesh(device.type, replicate, shard))
    # Not after an error: what is left of a broken group may wait for ever.
    dist.destroy_process_group()


@dataclass(frozen=True)
class Companions:
    """A process beside each trainer, with a group of their own on the processor, in which they know the same shards.

    trainers      0 ───── 1 ───── 2       gloo or NCCL
                  │       │       │       a pipe each
    companions    0 ───── 1 ───── 2       gloo, on a store that companion 0 opens
    """

    rank: int
    size: int
    shape: tuple[int, int]
    timeout: timedelta

    @staticmethod
    def of(world: World, config: TrainConfig) -> Companions:
        timeout = timedelta(minutes=config.parallel.timeout_minutes)
        return Companions(world.rank, world.size, mesh_shape(config, world.size), timeout)

    def introduce(self, world: World, companion: Connection) -> None:
        """In every trainer, at the same time: tell its companion where they meet."""
        if self.size > 1:
            companion.send(world.once(lambda: (os.environ["MASTER_ADDR"], companion.recv())))

    @contextmanager
    def meet(self, trainer: Connection) -> Iterator[World]:
        """In every companion. Raises TrainingError where another one is gone; EOFError where its trainer is."""
        if self.size == 1:
            yield ALONE
            return
        own = None if self.rank else TCPStore("localhost", 0, self.size, is_master=True, wait_for_workers=False)
        if own:
            trainer.send(own.port)
        host, port = trainer.recv()
        with peer_errors():
            store = own or TCPStore(host, port, self.size, is_master=False, timeout=self.timeout)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=self.timeout)
            yield World(self.rank, self.size, mesh=_mesh("cpu", *self.shape))


def _mesh(device: str, replicate: int, shard: int) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    return mesh if replicate > 1 else mesh["shard"]


def shard_model(model: VLA, world: World) -> None:
    """Let each process hold its part of every parameter; best done under `meta`, before there is any memory.

    Units, gathered as a whole when they run: a Gemma block with all its experts; a SigLIP block; all the rest.
    Weights are gathered in `param_dtype` (None: their own), which is the place for a smaller one.
    """
    if world.mesh is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Of a single expert, a block's keys and values are views; nothing here works in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=None)
    for unit in (*model.vision.blocks, *model.gemma.blocks, model):
        fully_shard(unit, mesh=world.mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "sample")


def require_shared(folder: Path, world: World) -> None:
    """That every process sees the same folder. Raises TrainingError where it is another one on another host."""
    if world.size == 1:
        return
    mark = folder / f".{uuid4().hex}.partial"
    world.once(mark.touch)
    mark = world.once(lambda: mark)
    seen = int(world.total(torch.tensor(int(mark.exists()), device=world.device)))
    world.once(mark.unlink)
    if seen < world.size:
        raise TrainingError(
            expected="a run folder that all processes share",
            found=f"only {seen} of {world.size} processes see what rank 0 wrote",
            where=str(folder),
            next="--run-dir on a file system that all hosts have mounted, under the same path",
        )


def require_gpus(count: int) -> None:
    """Raises ConfigError where this host has fewer."""
    if count > (available := _gpus()):
        raise ConfigError(
            expected=f"{count} GPUs on this host",
            found=f"{available or 'none'} that torch can use",
            where="--gpus",
            next=(f"--gpus {available}, " if available else "")
            + "--processes N to train on the processor; manipi doctor says what there is",
        )


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _device(kind: str) -> torch.device:
    available = _gpus()
    if kind == "cpu" or (kind == "auto" and not available):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= available:
        raise ConfigError(
            expected=f"a GPU for process {index} of this host",
            found=f"{available} GPUs",
            where="manipi train",
            next="lower --gpus, or train on the processor with --processes N",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def peer_errors() -> Iterator[None]:
    """What gloo, NCCL and the store say when another process is gone, as a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not isinstance(error, dist.DistError) and not any(word in said for word in ("gloo", "NCCL")):
            raise
        raise _peer_failed(said.splitlines()[0]) from error


def _peer_failed(found: str) -> TrainingError:
    rank, host = os.environ.get("RANK", "0"), os.uname().nodename
    return TrainingError(
        expected="every process of the run to go on",
        found=found,
        where=f"rank {rank} on {host}, waiting for the others",
        next="see the error of the process that ended first; the same command goes on from the last checkpoint",
    )
