"""The training loop: demonstrations in, checkpoints out.

Everything random is a pure function of (seed, step): the sampler's rows, the noise, the timesteps. A resumed run
therefore needs weights, average and optimizer alone, and equals an undisturbed one.

At the top of this module is what every step needs: torch, the model, the update. What prepares data, writes checkpoints
or looks at pictures is imported by the function that does so; tests/train/test_imports.py names what may not be here.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from manipi.model import ModelInput
from manipi.model.device import ran_out_of_memory
from manipi.storage import Lock, atomic_write
from manipi.train.config import TrainConfig
from manipi.train.parallel import World, open_world, require_shared
from manipi.train.run.folder import Run, StopSignals, alone
from manipi.train.step.state import TrainState, format_table, parameter_table, require_packages
from manipi.train.step.step import augment, train_step
from manipi.train.watch.guards import Guards
from manipi.train.watch.progress import ProgressLog, RunLog, plot_loss, require_loggers, show_mixture

if TYPE_CHECKING:
    from manipi.train.data import TrainingData
    from manipi.train.run.saving import CheckpointWriter
    from manipi.train.watch.validation import Rollouts


def train(
    config: TrainConfig,
    folder: Path,
    *,
    stop_at: int | None = None,
    resume_from: int | None = None,
    show: bool = True,
    rollouts: Rollouts | None = None,
) -> Path:
    """Train to `config.steps` from where the folder stands. Returns the newest checkpoint's folder.

    SIGTERM and SIGUSR1 end it after the step in hand, with a checkpoint.

    Args:
        folder: the run's folder; made when absent, resumed when it holds the same run.
        stop_at: end earlier, at this step.
        resume_from: go on from the checkpoint of this step; those after it are damaged, and are deleted.
        show: draw a progress bar.
        rollouts: what drives a simulated robot in `config.validation.suite`.

    Raises:
        TrainingError: the folder belongs to another run or trainer, the loss is not finite (NonFiniteError), a GPU has
            too little memory, or a process of the run died.
        CheckpointError: the checkpoint to go on from is damaged.
        DataError, ConfigError: see `manipi.train.data.prepare`; ConfigError also where a package is missing, or
            `rollouts` for a suite.
        SimulatorError: a simulated robot died or hung; the checkpoints so far stay.
        StorageError: a checkpoint could not be written; the ones before it are untouched.
    """
    from manipi.train.data import prepare

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    require_packages(config)
    require_loggers(config.log)
    end = config.steps if stop_at is None else min(stop_at, config.steps)
    with open_world(config) as world, ExitStack() as stack:
        locks, show = list[Lock](), show and world.leads
        world.once(lambda: locks.append(stack.enter_context(alone(Path(folder)))))
        run = world.once(lambda: _open_run(folder, config, resume_from))
        require_shared(run.folder, world)
        data = world.in_turn(lambda: prepare(config, run.folder))
        try:
            state, window = _open_state(run, world, show=show)
            if show:
                tqdm.write(str(data.longest))
            if show and len(data.sets) > 1:
                show_mixture(data.report())
            _train(run, data, state, window, locks[0] if locks else None, end, rollouts, show=show)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            from manipi.train.plan import out_of_memory  # fake tensors take as long to import as torch

            raise out_of_memory(error, config, world.device, gpus=world.size, show=show) from error
        return run.checkpoint(state.step)


def _open_run(folder: Path, config: TrainConfig, resume_from: int | None) -> Run:
    run = Run(folder, config)
    run.tidy()
    if resume_from is not None:
        run.rewind(resume_from)
    return run


def _open_state(run: Run, world: World, *, show: bool) -> tuple[TrainState, list[dict[str, float]] | None]:
    """The run's newest checkpoint, or else the weights that `init` names, or else the seed's.

    With it the steps since the checkpoint's last log line; None where there is no checkpoint yet.
    """
    from manipi.train.run.saving import read_window

    config, newest = run.config, world.once(run.newest)
    state = TrainState.initial(config, config.init if newest is None else "", world)
    if newest is not None:
        state.load(run.checkpoint(newest) / "train_state")
    world.once(lambda: run.forget_after(state.step))
    table = format_table(parameter_table(state.model, state.parameters, config.optimizer))
    if newest is None:
        world.once(lambda: atomic_write(run.folder / "parameters.txt", f"{table}\n".encode()))
    if show:
        tqdm.write(table)
        if newest is not None:
            tqdm.write(f"resumed at step {newest} of {config.steps}, from {run.checkpoint(newest)}")
    return state, None if newest is None else read_window(run.checkpoint(newest))


def _train(
    run: Run,
    data: TrainingData,
    state: TrainState,
    window: list[dict[str, float]] | None,
    lock: Lock | None,
    end: int,
    rollouts: Rollouts | None,
    *,
    show: bool,
) -> None:
    from manipi.train.run.saving import make_saver
    from manipi.train.watch.validation import Validation

    config, world = run.config, state.world
    writer, validation = checkpoint_writer(run, data), Validation(run, data, rollouts=rollouts, show=show)
    lines = {"batch_size": config.batch_size, "every": config.log_every, "show": show, "window": window or ()}
    with (
        StopSignals() as stop,
        RunLog(run, state.step, lead=world.leads) as out,
        ProgressLog(out, state.step, end, **lines) as progress,
        data.loader(state.step, world.rank, world.size) as loader,
        Guards(config.guards, run.folder, loader, data.mixture) as guards,
        ExitStack() as stack,
    ):
        with guards.phase("the start", "the process that writes checkpoints"):
            saver = stack.enter_context(make_saver(writer, state, lock))
        progress.measure(state, config.noise_draws)
        if window is None:
            with guards.phase("the start", "the first checkpoint"):
                saver.save(progress.window)
        for step, batch, wait in guards.batches(state.step, end):
            if step == 0 and out.lead and config.guards.first_batch:
                from manipi.train.watch.first_batch import save_first_batch

                pictures = save_first_batch(run.folder / "first_batch", batch, loader.rows(0), data)
                out.show(0, {}, {"camera_views": pictures})
            with guards.step(step, batch):
                inputs = ModelInput.from_numpy(batch, world.device)
                inputs = augment(inputs, config, step, first_row=world.rank * inputs.batch_size)
                with ExitStack() as last_step:
                    if show and state.step + 1 == end:
                        from manipi.train.plan import memory_report

                        last_step.enter_context(memory_report(config, inputs, world.size))
                    metrics, sample_loss = train_step(state, inputs, config)
                spike = guards.spike(step, float(metrics["loss"]), sample_loss)
                progress.record(state.step, metrics, wait, batch, spike)
            saver.check()
            if validation.due(state.step):
                # Before the checkpoint of the step: a run that is killed between the two does both again.
                with guards.phase("validation", f"the validation of step {state.step}"):
                    weights = state.inference_weights()  # whole ones on rank 0, for which the others wait
                    policy = writer.policy(weights, state.step, str(world.device)) if world.leads else None
                    results = [] if policy is None else validation.measure(policy, state.model)
                if policy is not None:  # rollouts take as long as they take; simulators that hang are noticed
                    numbers = validation.conclude(state.step, policy, results)
                    out.show(state.step, {f"val/{name}": value for name, value in numbers.items()})
            stopped_by = world.first(stop.received)  # once: another may come any time
            if state.step % config.save_every == 0 or state.step == end or stopped_by:
                with guards.phase("the run", f"the checkpoint of step {state.step}"):
                    saver.save(progress.window)
            if stopped_by:
                break
        with guards.phase("the end", "the last checkpoint"):
            saver.wait()
        if world.leads and (logged := run.read_metrics()):
            plot_loss(logged, run.folder / "loss.png")
    if world.leads and (signal := stop.received) and (step := state.step) < end:
        tqdm.write(f"{signal}: stopped at step {step} of {end}, with a checkpoint; the same command goes on")


def checkpoint_writer(run: Run, data: TrainingData) -> CheckpointWriter:
    """Writes the checkpoints of a run, as all of them have it but for weights, self-test and step."""
    from manipi.checkpoints.native import Checkpoint, PolicyConfig
    from manipi.train.run.saving import CheckpointWriter

    bare = Checkpoint(
        weights={},
        config=PolicyConfig(
            model=run.config.policy_model, norm_mode=run.config.norm_mode, step=0, max_delay=run.config.max_delay
        ),
        robot=run.config.robot,
        norm_stats=data.stats[run.config.robot.name],
        tokenizers=data.tokenizers,
        self_test=None,
        other_robots=data.other_robots,
    )
    return CheckpointWriter(run, bare, data.example())
