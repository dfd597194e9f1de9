"""Processes that train together, without torchrun: what it sets in the environment is set here."""

import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tests.forks import FORKS

from manipi.errors import ManipiError
from manipi.model import ModelInput
from manipi.model.device import whole
from manipi.train.config import TrainConfig
from manipi.train.data import prepare
from manipi.train.loop import train
from manipi.train.parallel import ALONE, World, open_world, require_shared
from manipi.train.step.state import TrainState
from manipi.train.step.step import add_gradients, train_step


class Ranks:
    """`size` processes that run `work(*arguments)`."""

    def __init__(self, size: int, work: Callable, *arguments: object):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = []
        self._answers: list[Connection] = []
        for rank in range(size):
            answer, theirs = FORKS.Pipe(duplex=False)
            process = FORKS.Process(target=_be, args=(rank, size, port, theirs, work, arguments))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._answers.append(answer)

    def results(self, timeout: float = 120) -> list:
        """What each returned or raised; None of those that were killed."""
        results = []
        for process, answer in zip(self.processes, self._answers, strict=True):
            try:
                results.append(answer.recv() if answer.poll(timeout) else TimeoutError())
            except EOFError:
                results.append(None)
            process.join(10)
            process.kill()
        return results

    def all_well(self) -> list:
        results = self.results()
        for result in results:
            if isinstance(result, Exception) or result is None:
                raise AssertionError(f"a rank ended with {result}")
        return results


def _be(rank: int, size: int, port: int, answer: Connection, work: Callable, arguments: tuple) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    try:
        answer.send(work(*arguments))
    except ManipiError as error:
        answer.send(error)
    except ValueError as error:  # not ours: what `fail_once` is given
        answer.send(error)


# ---- what they do


def run(config: TrainConfig, folder: Path, stop_at: int | None = None) -> Path:
    return train(config, folder, stop_at=stop_at, show=False)


def _steps(config: TrainConfig, folder: Path, world: World) -> tuple[float, dict, list[dict], dict]:
    """Loss weight of the first slice, its gradients, the metrics of three steps, and the weights after them."""
    state = TrainState.initial(config, world=world)
    with prepare(config, folder).loader(0, world.rank, world.size) as loader:
        batches = [batch for _, (_, batch, _) in zip(range(3), loader, strict=False)]
    # Adaptive modulation starts at zero, where no gradient flows through it yet.
    for name, parameter in state.parameters.items():
        if "modulation" in name:
            parameter.data.fill_(0.02)
    inputs = ModelInput.from_numpy(batches[0])
    add_gradients(state, inputs, config)
    weight = float(state.model.loss_weight(inputs, config.noise_draws).flatten()[0])
    gradients = {n: g.to_dense() if (g := whole(p.grad)).is_sparse else g for n, p in state.parameters.items()}
    state.model.zero_grad()
    metrics = [train_step(state, ModelInput.from_numpy(batch), config)[0] for batch in batches]
    numbers = [{name: float(value) for name, value in m.items()} for m in metrics]
    return weight, gradients, numbers, state.inference_weights()


def steps(config: TrainConfig, folder: Path) -> tuple[float, int, dict[str, float]]:
    """Of three steps here and on one process: the first slice's weight, and the largest difference of each kind."""
    with open_world(config) as world:
        world.in_turn(lambda: prepare(config, folder))
        weight, gradients, numbers, weights = _steps(config, folder, world)
        _, plain_gradients, plain_numbers, plain_weights = _steps(config, folder, ALONE)
        apart = {f"gradient {n}": _apart(g, plain_gradients[n]) for n, g in gradients.items()}
        apart |= {f"weight {name}": _apart(w, plain_weights[name]) for name, w in weights.items()}
        for one, plain in zip(numbers, plain_numbers, strict=True):
            apart |= {f"{name} {one['loss']}": abs(one[name] - plain[name]) / (abs(plain[name]) or 1) for name in one}
        return weight, len(weights), apart


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the tensor's norm per element and at least 1e-3 of scale."""
    assert one.shape == other.shape
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-3))


def fail_once(config: TrainConfig, error: Exception) -> None:
    def fail() -> None:
        raise error

    with open_world(config) as world:
        world.once(fail)


def need_shared(config: TrainConfig, root: Path, together: bool) -> None:
    folder = root / ("shared" if together else os.environ["RANK"])
    folder.mkdir(exist_ok=True)
    with open_world(config) as world:
        if not together:
            os.chdir(folder)
            folder = Path(".")
        require_shared(folder, world)
