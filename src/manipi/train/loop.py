"""The training loop: demonstrations in, checkpoints out.

Everything random is a pure function of (seed, step): the sampler's rows, the noise, the timesteps. A resumed run
therefore needs weights, average and optimizer alone, and equals an undisturbed one.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from manipi.checkpoints.native import Checkpoint, PolicyConfig, write_checkpoint
from manipi.errors import ManipiError, TrainingError
from manipi.model import ModelInput
from manipi.model.config import Pi0FastConfig
from manipi.policy import Policy, self_test_for
from manipi.storage import atomic_write, storage_errors
from manipi.train.accumulate import accumulate_gradients
from manipi.train.config import TrainConfig
from manipi.train.data import TrainingData, prepare
from manipi.train.noise import draw_noise
from manipi.train.optimizer import gradient_norm, learning_rate, parameter_norm, update, update_average
from manipi.train.parallel import World, open_world, require_shared
from manipi.train.progress import ProgressLog, plot_loss, show_mixture
from manipi.train.run import Run
from manipi.train.state import TrainState
from manipi.train.trained import format_table, parameter_table, require_packages


def train(config: TrainConfig, folder: Path, *, stop_at: int | None = None, show: bool = True) -> Path:
    """Train to `config.steps` from where the folder stands. Returns the newest checkpoint's folder.

    Args:
        folder: the run's folder; made when absent, resumed when it holds the same run.
        stop_at: end earlier, at this step.
        show: draw a progress bar.

    Raises:
        TrainingError: the folder belongs to another run, or the loss is not finite.
        DataError, ConfigError: see `manipi.train.data.prepare`; ConfigError also where a package is missing.
        StorageError: a checkpoint could not be written; the ones before it are untouched.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    require_packages(config)
    with open_world(config) as world:
        return _train(config, folder, world, stop_at, show and world.leads)


def _train(config: TrainConfig, folder: Path, world: World, stop_at: int | None, show: bool) -> Path:
    run = world.once(lambda: _open_run(folder, config))
    require_shared(run.folder, world)
    data = world.in_turn(lambda: prepare(config, run.folder))
    if show and len(data.sets) > 1:
        show_mixture(data.report())
    end = config.steps if stop_at is None else min(stop_at, config.steps)

    # ---- weights: 1. the run's newest checkpoint, 2. those that `init` names, 3. the seed's
    newest = world.once(run.newest)
    if newest is not None:
        state = TrainState.initial(config, world=world)
        state.load(run.checkpoint(newest) / "train_state")
    else:
        state = TrainState.initial(config, config.init, world)
        save(run, state, data)
    world.once(lambda: run.forget_after(state.step))
    table = format_table(parameter_table(state.model, state.parameters, config.optimizer))
    world.once(lambda: atomic_write(run.folder / "parameters.txt", f"{table}\n".encode()))
    if show:
        tqdm.write(table)

    # ---- loop
    log = ProgressLog(run, state.step, end, batch_size=config.batch_size, every=config.log_every, show=show)
    with data.loader(state.step, world.rank, world.size) as loader, log:
        for step, batch, wait in loader:
            if step >= end:
                break
            metrics = train_step(state, ModelInput.from_numpy(batch, world.device), config)
            if world.leads:
                log.record(state.step, metrics, wait)
            if state.step % config.save_every == 0 or state.step == end:
                save(run, state, data)
    if world.leads and (metrics_so_far := run.read_metrics()):
        plot_loss(metrics_so_far, run.folder / "loss.png")
    return run.checkpoint(state.step)


def _open_run(folder: Path, config: TrainConfig) -> Run:
    run = Run(folder, config)
    run.tidy()
    return run


def train_step(state: TrainState, inputs: ModelInput, config: TrainConfig) -> dict[str, Tensor | float]:
    """One update of the state in place. Returns what the log wants, as tensors on the device.

    Raises:
        TrainingError: the loss or the gradient is not finite; the weights are those before the step.
    """
    loss = add_gradients(state, inputs, config)
    parameters = list(state.parameters.values())
    norm = gradient_norm(parameters)
    _require_finite(loss, norm, state.step)
    state.gather_rows()
    update(state.optimizer, state.step, config.optimizer, norm)
    if state.average:
        update_average(list(state.average.values()), list(state.optimized.values()), config.ema_decay)
    state.scatter_rows()
    rate = learning_rate(state.step, config.optimizer)
    state.step += 1
    norms = {"grad_norm": norm, "param_norm": parameter_norm(parameters)}
    return {"loss": loss, **norms, "learning_rate": rate}


def add_gradients(state: TrainState, inputs: ModelInput, config: TrainConfig) -> Tensor:
    """Add the gradients of this step's loss to those of the parameters. Returns the loss of the whole batch."""
    draws = _draws(state, inputs, config)
    return accumulate_gradients(state.model, inputs, draws, config.accumulate, state.world)


def _draws(state: TrainState, inputs: ModelInput, config: TrainConfig) -> list[Tensor]:
    """This process's noise and timesteps of the step, where the policy has any."""
    if isinstance(config.model, Pi0FastConfig):
        return []
    world, size = state.world, (config.model.action_horizon, config.model.action_dim)
    drawn = draw_noise(config.seed, state.step, inputs.batch_size * world.size, config.noise_draws, *size)
    return [world.slice(whole) for whole in drawn]


def _require_finite(loss: Tensor, norm: Tensor, step: int) -> None:
    if not torch.isfinite(loss + norm):
        raise TrainingError(
            expected="a finite loss and gradient",
            found=f"loss {float(loss)}, gradient norm {float(norm)}",
            where=f"step {step}",
            next="lower --optimizer.lr or look at the data with `manipi check`; the last checkpoint is intact",
        )


def save(run: Run, state: TrainState, data: TrainingData) -> None:
    """Write the state's checkpoint with a self-test, then delete what is too old. All processes have to call it."""
    weights, world = state.inference_weights(), state.world
    if world.size == 1:
        _write(run, state, data, weights, state.save)
        return
    # Of many processes each writes its part of the training state before rank 0 puts the checkpoint together.
    parts = run.checkpoints / f".{state.step}.parts.partial"
    try:
        with storage_errors(run.checkpoint(state.step)):
            state.save(parts)
        world.once(lambda: _write(run, state, data, weights, lambda folder: parts.rename(folder) and None))
    except ManipiError:
        if world.leads:
            shutil.rmtree(parts, ignore_errors=True)
        raise


def _write(
    run: Run,
    state: TrainState,
    data: TrainingData,
    weights: dict[str, Tensor],
    write_train_state: Callable[[Path], None],
) -> None:
    bare = Checkpoint(
        weights=weights,
        config=PolicyConfig(model=run.config.policy_model, norm_mode=run.config.norm_mode, step=state.step),
        robot=run.config.robot,
        norm_stats=data.stats[run.config.robot.name],
        tokenizers=data.tokenizers,
        self_test=None,
        other_robots=data.other_robots,
    )
    test = self_test_for(Policy.from_checkpoint(bare), data.example())
    write_checkpoint(run.checkpoint(state.step), replace(bare, self_test=test), write_train_state)
    run.prune()
