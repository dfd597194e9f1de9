"""How many processes, and the torchrun line that starts `manipi train` again in each of them. No torch here.

manipi train RECIPE --gpus 8 --nodes 2 --node-rank 0 --rendezvous HOST:PORT        on every host, with its rank
  └─ torchrun                                 one agent per host; they meet at the first one's address
       └─ manipi train RECIPE × 8             one process per GPU
"""

import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from manipi.errors import ConfigError
from manipi.train.config import TrainConfig

ENVIRONMENT = {
    # torchrun would choose one thread as well, but warns of it.
    "OMP_NUM_THREADS": "1",
    # An agent that comes anew, on a host that had died, would never hear where the others' old store is.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
"""For torchrun, where the user has not set them."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Processes to start. With none of these flags, training is one process."""

    gpus: int = 0
    """GPUs of this host to train on, a process for each."""
    processes: int = 0
    """Processes of this host to train on its processor instead."""
    nodes: int = 1
    """Hosts. Each runs the same command, with the same run folder on a file system that all of them see."""
    node_rank: int = 0
    """Number of this host, from 0. The first is where the others meet."""
    rendezvous: str = ""
    """HOST:PORT of the first host, as all hosts reach it."""
    max_restarts: int = 0
    """How often to start anew from the last checkpoint after a process or a host died."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to start, and this is not one of the processes that were started."""
        return self != Launch() and "TORCHELASTIC_RUN_ID" not in os.environ

    def command(self, config: TrainConfig, arguments: Sequence[str]) -> list[str]:
        """The torchrun line for `manipi train ARGUMENTS`.

        Raises:
            ConfigError: flags are missing or contradict each other; the mesh or the batch does not fit the processes.
        """
        self._check()
        mesh_shape(config, self.nodes * (self.gpus or self.processes))
        agent = ["--nproc-per-node", str(self.gpus or self.processes), "--max-restarts", str(self.max_restarts)]
        if self.nodes == 1:
            agent += ["--standalone"]
        else:
            # torchrun would guess who is first and where from host names, which containers and aliases get wrong.
            agent += ["--nnodes", str(self.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", self.rendezvous]
            agent += ["--rdzv-conf", f"is_host={int(self.node_rank == 0)}", "--local-addr", self._address()]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *agent]
        device = f"--parallel.device={'cuda' if self.gpus else 'cpu'}"
        return [*torchrun, "-m", "manipi", "train", *without_flags(arguments, Launch), device]

    def _address(self) -> str:
        """Where the other hosts reach this one: at the end of its route to the first."""
        host, _, port = self.rendezvous.rpartition(":")
        if self.node_rank == 0:
            return host
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as route:
                route.connect(address)  # of datagrams, which sends nothing
                return route.getsockname()[0]
        except OSError as error:
            raise _wrong("a first host that this one can reach", f"{self.rendezvous}: {error}") from error

    def _check(self) -> None:
        if (self.gpus > 0) == (self.processes > 0):
            raise _wrong("--gpus N or --processes N, one of the two", f"{self.gpus} and {self.processes}")
        if min(self.gpus, self.processes, self.max_restarts) < 0 or not 0 <= self.node_rank < self.nodes:
            raise _wrong("numbers from 0, and a --node-rank below --nodes", f"{self}")
        if self.nodes > 1 and not re.fullmatch(r".+:\d+", self.rendezvous):
            raise _wrong("--rendezvous HOST:PORT where there is more than one host", repr(self.rendezvous))


def mesh_shape(config: TrainConfig, size: int) -> tuple[int, int]:
    """Rows and columns of the mesh. Raises ConfigError where mesh or batch do not fit `size` processes.

    Each process takes its rows of the batch in `accumulate` parts.
    """
    replicate, shard = config.parallel.replicate, config.parallel.shard
    shard = shard or max(1, size // replicate)
    if replicate * shard != size:
        raise ConfigError(
            expected=f"a mesh of as many processes as there are ({size})",
            found=f"replicate {replicate} × shard {shard} = {replicate * shard}",
            where="--parallel.replicate, --parallel.shard",
            next=f"start {replicate * shard} processes (manipi train … --gpus N), or change the mesh",
        )
    if config.batch_size % (parts := size * config.accumulate):
        in_parts = f", in {config.accumulate} parts each" if config.accumulate > 1 else ""
        raise ConfigError(
            expected=f"a batch size that {size} processes share evenly{in_parts}",
            found=str(config.batch_size),
            where="--batch-size",
            next=f"--batch-size {-(-config.batch_size // parts) * parts}",
        )
    return replicate, shard


def without_flags(arguments: Sequence[str], kind: type) -> list[str]:
    """The arguments that are not flags of this dataclass's own fields, each of which takes a value."""
    flags = {f"--{field.name}".replace("_", "-") for field in fields(kind)}
    rest, kept = iter(arguments), list[str]()
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name.replace("_", "-") not in flags:
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept


def _wrong(expected: str, found: str) -> ConfigError:
    return ConfigError(expected=expected, found=found, where="manipi train", next="see docs/multi_node.md")
