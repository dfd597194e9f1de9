"""The training loop: demonstrations in, checkpoints out.

Everything random is a pure function of (seed, step): the sampler's rows, the noise, the timesteps. A resumed run
therefore needs weights, average and optimizer alone, and equals an undisturbed one.
"""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from manipi.checkpoints.native import Checkpoint, PolicyConfig
from manipi.errors import TrainingError
from manipi.model import ModelInput
from manipi.model.config import Pi0FastConfig
from manipi.train.config import TrainConfig
from manipi.train.data import TrainingData, prepare
from manipi.train.lock import Lock, alone
from manipi.train.noise import draw_noise
from manipi.train.optimizer import clip_gradients, learning_rate, parameter_norm, update, update_average
from manipi.train.progress import ProgressLog, plot_loss, show_mixture
from manipi.train.run import Run
from manipi.train.saving import CheckpointWriter, make_saver, read_window
from manipi.train.state import TrainState
from manipi.train.stop_signals import StopSignals


def train(
    config: TrainConfig, folder: Path, *, stop_at: int | None = None, resume_from: int | None = None, show: bool = True
) -> Path:
    """Train to `config.steps` from where the folder stands. Returns the newest checkpoint's folder.

    SIGTERM and SIGUSR1 end it after the step in hand, with a checkpoint.

    Args:
        folder: the run's folder; made when absent, resumed when it holds the same run.
        stop_at: end earlier, at this step.
        resume_from: go on from the checkpoint of this step; those after it are damaged, and are deleted.
        show: draw a progress bar.

    Raises:
        TrainingError: the folder belongs to another run or trainer, or the loss is not finite.
        CheckpointError: the checkpoint to go on from is damaged.
        DataError, ConfigError: see `manipi.train.data.prepare`.
        StorageError: a checkpoint could not be written; the ones before it are untouched.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with alone(Path(folder)) as lock:
        run = Run(folder, config)
        run.tidy()
        if resume_from is not None:
            run.rewind(resume_from)
        end = config.steps if stop_at is None else min(stop_at, config.steps)
        return _train(run, lock, end, show)


def _train(run: Run, lock: Lock, end: int, show: bool) -> Path:
    config = run.config
    data = prepare(config, run.folder)
    if show and len(data.sets) > 1:
        show_mixture(data.report())

    # ---- weights: 1. the run's newest checkpoint, 2. those that `init` names, 3. the seed's
    newest = run.newest()
    state = TrainState.initial(config, config.init if newest is None else "")
    if newest is not None:
        state.load(run.checkpoint(newest) / "train_state")
    run.forget_after(state.step)

    # ---- loop
    window = [] if newest is None else read_window(run.checkpoint(newest))
    log = ProgressLog(
        run, state.step, end, batch_size=config.batch_size, every=config.log_every, show=show, window=window
    )
    saving = make_saver(checkpoint_writer(run, data), state, lock)
    with StopSignals() as stop, log, saving as saver, data.loader(state.step) as loader:
        if newest is None:
            saver.save(log.window)
        for step, batch, wait in loader:
            if step >= end:
                break
            metrics = train_step(state, ModelInput.from_numpy(batch, "cpu"), config)
            log.record(state.step, metrics, wait)
            saver.check()
            stopped_by = stop.received  # once: another may come any time
            if state.step % config.save_every == 0 or state.step == end or stopped_by:
                saver.save(log.window)
            if stopped_by:
                break
        saver.wait()
        if metrics_so_far := run.read_metrics():
            plot_loss(metrics_so_far, run.folder / "loss.png")
    if stop.received and state.step < end:
        tqdm.write(
            f"{stop.received}: stopped at step {state.step} of {end}, with a checkpoint; the same command goes on"
        )
    return run.checkpoint(state.step)


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


def checkpoint_writer(run: Run, data: TrainingData) -> CheckpointWriter:
    """Writes the checkpoints of a run, as all of them have it but for weights, self-test and step."""
    bare = Checkpoint(
        weights={},
        config=PolicyConfig(model=run.config.model, norm_mode=run.config.norm_mode, step=0),
        robot=run.config.robot,
        norm_stats=data.stats[run.config.robot.name],
        tokenizers=data.tokenizers,
        self_test=None,
        other_robots=data.other_robots,
    )
    return CheckpointWriter(run, bare, data.example())
