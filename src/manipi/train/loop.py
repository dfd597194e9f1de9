"""The training loop: demonstrations in, checkpoints out.

Everything random is a pure function of (seed, step): the sampler's rows, the noise, the timesteps. A resumed run
therefore needs weights, average and optimizer alone, and equals an undisturbed one.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from manipi.checkpoints.native import Checkpoint, PolicyConfig, write_checkpoint
from manipi.errors import TrainingError
from manipi.model import ModelInput
from manipi.model.config import Pi0FastConfig
from manipi.policy import Policy, self_test_for
from manipi.train.config import TrainConfig
from manipi.train.data import TrainingData, prepare
from manipi.train.noise import draw_noise
from manipi.train.optimizer import clip_gradients, learning_rate, parameter_norm, update, update_average
from manipi.train.progress import ProgressLog, plot_loss, show_mixture
from manipi.train.run import Run
from manipi.train.state import TrainState


def train(config: TrainConfig, folder: Path, *, stop_at: int | None = None, show: bool = True) -> Path:
    """Train to `config.steps` from where the folder stands. Returns the newest checkpoint's folder.

    Args:
        folder: the run's folder; made when absent, resumed when it holds the same run.
        stop_at: end earlier, at this step.
        show: draw a progress bar.

    Raises:
        TrainingError: the folder belongs to another run, or the loss is not finite.
        DataError, ConfigError: see `manipi.train.data.prepare`.
        StorageError: a checkpoint could not be written; the ones before it are untouched.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    run = Run(folder, config)
    run.tidy()
    data = prepare(config, run.folder)
    if show and len(data.sets) > 1:
        show_mixture(data.report())
    end = config.steps if stop_at is None else min(stop_at, config.steps)

    # ---- weights: 1. the run's newest checkpoint, 2. those that `init` names, 3. the seed's
    newest = run.newest()
    if newest is not None:
        state = TrainState.initial(config)
        state.load(run.checkpoint(newest) / "train_state")
    else:
        state = TrainState.initial(config, config.init)
        save(run, state, data)
    run.forget_after(state.step)

    # ---- loop
    log = ProgressLog(run, state.step, end, batch_size=config.batch_size, every=config.log_every, show=show)
    with data.loader(state.step) as loader, log:
        for step, batch, wait in loader:
            if step >= end:
                break
            inputs = ModelInput.from_numpy(batch, "cpu")
            with _memory_report(config, inputs) if show and state.step + 1 == end else nullcontext():
                metrics = train_step(state, inputs, config)
            log.record(state.step, metrics, wait)
            if state.step % config.save_every == 0 or state.step == end:
                save(run, state, data)
    if metrics_so_far := run.read_metrics():
        plot_loss(metrics_so_far, run.folder / "loss.png")
    return run.checkpoint(state.step)


def _memory_report(config: TrainConfig, inputs: ModelInput) -> AbstractContextManager[None]:
    from manipi.train.memory import memory_report  # it takes a step of this module's itself

    return memory_report(config, inputs)


def train_step(state: TrainState, inputs: ModelInput, config: TrainConfig) -> dict[str, Tensor | float]:
    """One update of the state in place. Returns what the log wants, as tensors on the device.

    Raises:
        TrainingError: the loss or the gradient is not finite; the weights are those before the step.
    """
    loss = _loss(state, inputs, config)
    loss.backward()
    parameters = list(state.parameters.values())
    norm = clip_gradients(parameters, config.optimizer)
    _require_finite(loss.detach(), norm, state.step)
    update(state.optimizer, state.step, config.optimizer)
    if state.average:
        update_average(list(state.average.values()), parameters, config.ema_decay)
    rate = learning_rate(state.step, config.optimizer)
    state.step += 1
    norms = {"grad_norm": norm, "param_norm": parameter_norm(parameters)}
    return {"loss": loss.detach(), **norms, "learning_rate": rate}


def _loss(state: TrainState, inputs: ModelInput, config: TrainConfig) -> Tensor:
    if isinstance(config.model, Pi0FastConfig):
        return state.model(inputs).loss
    size = (config.model.action_horizon, config.model.action_dim)
    noise, timestep = draw_noise(config.seed, state.step, inputs.batch_size, config.noise_draws, *size)
    return state.model(inputs, noise, timestep).loss


def _require_finite(loss: Tensor, norm: Tensor, step: int) -> None:
    if not torch.isfinite(loss + norm):
        raise TrainingError(
            expected="a finite loss and gradient",
            found=f"loss {float(loss)}, gradient norm {float(norm)}",
            where=f"step {step}",
            next="lower --optimizer.lr or look at the data with `manipi check`; the last checkpoint is intact",
        )


def save(run: Run, state: TrainState, data: TrainingData) -> None:
    """Write the state's checkpoint with a self-test, then delete what is too old."""
    bare = Checkpoint(
        weights=state.inference_weights(),
        config=PolicyConfig(model=run.config.model, norm_mode=run.config.norm_mode, step=state.step),
        robot=run.config.robot,
        norm_stats=data.stats[run.config.robot.name],
        tokenizers=data.tokenizers,
        self_test=None,
        other_robots=data.other_robots,
    )
    test = self_test_for(Policy.from_checkpoint(bare), data.example())
    write_checkpoint(run.checkpoint(state.step), replace(bare, self_test=test), state.save)
    run.prune()
