"""`manipi train` and `plan`: a recipe, flags over its numbers; a run, or its memory."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from manipi.cli.arguments import Folder, NewFile, parse, recipe_name, table, write_result
from manipi.errors import quoted
from manipi.recipes.registry import load_recipe, recipe_names
from manipi.train.config import STRUCTURE, TrainConfig
from manipi.train.launch import ENVIRONMENT, Launch, without_flags

if TYPE_CHECKING:
    from manipi.policy import Policy
    from manipi.train.plan import StepMemory
    from manipi.train.watch.validation import Rollouts

VALIDATION_SEED = -1
"""Of the rollouts of a run: scenes and noise of their own, since the best checkpoint is chosen by them."""

HELP = f"""usage: manipi train RECIPE|FILE.py:FUNCTION [--flags]

Train a policy. Structure is Python (a recipe), numbers are flags; the run folder keeps everything, and the same
command goes on where it stopped. SIGTERM and SIGUSR1 (Slurm, spot machines) save and end it, with exit code 0.

  manipi train tabletop --run-dir runs/first --steps 2000 --optimizer.lr 1e-3
  manipi train ./my_robot.py:my_recipe                    a recipe in a file of your own
  manipi train tabletop --gpus 8                          on eight GPUs; several hosts: docs/multi_node.md
  manipi train tabletop --help                            the recipe's numbers, each of them a flag

recipes: {", ".join(recipe_names())}
"""


@dataclass(frozen=True, kw_only=True)
class _Train:
    """Train this recipe, with other numbers where a flag says so. The same command goes on where it stopped.

    manipi train tabletop --run-dir runs/first --steps 2000 --optimizer.lr 1e-3
    """

    run_dir: Folder | None = None
    """The run's folder; runs/RECIPE unless named."""
    resume_from: int | None = None
    """Go on from the checkpoint of this step, where those after it are damaged: they are deleted."""
    json: NewFile | None = None
    """Write the last metrics to this file."""
    launch: Annotated[Launch, tyro.conf.arg(name="")] = field(default_factory=Launch)
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(arguments: Sequence[str]) -> None:
    """Train; prints the checkpoint's folder."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    target = recipe_name(arguments, "train")
    args = parse_train(target, load_recipe(target), arguments[1:])
    run_dir = args.run_dir or Path("runs") / target.rpartition(":")[2]
    if args.launch.wanted:
        torchrun = args.launch.command(args.config, arguments)

        from manipi.train.parallel import require_gpus

        require_gpus(args.launch.gpus)  # by name, and not from every process that torchrun starts and ends
        added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
        print(*(f"{name}={value}" for name, value in added.items()), shlex.join(torchrun), flush=True)
        os.execve(torchrun[0], torchrun, os.environ | added)

    from manipi.train.loop import train
    from manipi.train.run.folder import Run

    checkpoint = train(args.config, run_dir, resume_from=args.resume_from, rollouts=rollouts_of(args.config))
    if os.environ.get("RANK", "0") != "0":
        return  # one of many processes, of which the first speaks
    run = Run(run_dir, args.config)
    metrics, best = run.read_metrics(), run.best()
    write_result({"checkpoint": str(checkpoint), "best": best, **(metrics[-1] if metrics else {})}, args.json)
    print(f"checkpoint  {checkpoint}\nloss curve  {run_dir / 'loss.png'}")
    if best:
        print(f"best        {run_dir / 'best'}, of step {best['step']}: validation/curves.png")
    print(f"next        manipi eval {quoted(run_dir / 'best' if best else checkpoint)}")


def rollouts_of(config: TrainConfig) -> "Rollouts | None":
    """What drives a simulated robot as `config.validation` asks: this process serves the policy to the simulators.

    Returns:
        None where it names no suite.

    Raises:
        UnknownNameError: there is no such suite.
        SimulatorError: it is not installed, or for another robot.
        ConfigError: it executes more steps than the policy predicts.
    """
    asked = config.validation
    if not asked.suite:
        return None
    from manipi.evaluate.evaluation import Evaluation, Settings, require_fit
    from manipi.evaluate.suites import find_suite
    from manipi.serve.batching import Limits
    from manipi.serve.server import PolicyServer

    suite = find_suite(asked.suite)
    settings = Settings(trials=asked.trials, seed=VALIDATION_SEED, execute_steps=suite.execute_steps)
    known = {"robot": {"name": config.robot.name}, "action_horizon": config.model.action_horizon}
    require_fit(known, suite, settings)

    def drive(policy: "Policy", folder: Path, show: bool) -> dict[str, float]:
        # One observation in each call of the model: an answer is then the same whoever else asks.
        limits = Limits(max_batch=1)
        server = PolicyServer(policy, port=0, robot=policy.robot, empty_prompts=True, limits=limits)
        with server.serve_in_thread() as port:
            named = {"policy": f"step {policy.config.step}", "workers": asked.workers}
            with Evaluation(folder, suite, settings, f"ws://127.0.0.1:{port}", **named) as evaluation:
                evaluation.run(show=show)
                evaluation.finish()
        found = evaluation.success()
        return {"success": found.rate, "success_low": found.low, "success_high": found.high, "trials": found.n}

    return drive


def parse_train(target: str, recipe: TrainConfig, arguments: Sequence[str]) -> _Train:
    """The command's own flags, and the recipe with the other flags applied to its numbers."""
    return parse(_Train, arguments, f"train {target}", default=_Train(config=recipe), structure=STRUCTURE)


PLAN_HELP = f"""\
usage: manipi plan RECIPE|FILE.py:FUNCTION [--gpu 24GB|rtx4090|h100|…] [--gpus N] [--flags of manipi train]

Forecast the peak memory of a training step by part. No weights are loaded: the trainer's own step runs once on tensors
without contents, which takes seconds. Where the GPU has less, settings that fit are searched, those that cost least
first. docs/memory.md says what the parts are. Of data on this disk the longest prompt is shown, too.

  manipi plan pi0_libero --gpu 80GB
  manipi plan pi0_libero --gpu rtx4090 --batch-size 8
  manipi plan ./my_robot.py:my_recipe --gpu h100 --gpus 8
  manipi plan tabletop --help                            all flags

exits with 0 if the step fits (or no GPU is named), with 1 if it does not

recipes: {", ".join(recipe_names())}
"""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Forecast the peak memory of a training step of this recipe, with other numbers where a flag says so.

    manipi plan pi0_libero --gpu 80GB --batch-size 8
    """

    gpu: str = ""
    """A size such as 24GB, or a name such as rtx4090 or h100; empty: only forecast."""
    gpus: int = 1
    """So many share the batch and the training state (FSDP)."""
    plot: NewFile | None = None
    """Draw the parts over the step into this PNG."""
    json: NewFile | None = None
    """Write the forecast in bytes, and the settings that fit, to this file."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def run_plan(arguments: Sequence[str]) -> None:
    """Print the table; exits with 1 where the step does not fit."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(PLAN_HELP)
        return
    target = recipe_name(arguments, "plan")
    args = parse(_Plan, arguments[1:], f"plan {target}", default=_Plan(config=load_recipe(target)), structure=STRUCTURE)

    from manipi.train.data import at_hand, prepare_to_look
    from manipi.train.plan import find_fit, forecast, gpu_bytes, plot_memory

    def numbers(memory: "StepMemory") -> dict[str, Any]:
        """What a file has of it."""
        sizes = {"parts": memory.at_peak(), "peak": memory.peak, "reserve": memory.reserve}
        fits = None if capacity is None else memory.peak + memory.reserve <= capacity
        return {**sizes, "gpu": capacity, "fits": fits}

    capacity, size = gpu_bytes(args.gpu) if args.gpu else None, args.config.batch_size
    memory = forecast(args.config, gpus=args.gpus)
    result = {"gpus": args.gpus, "batch_size": size, **numbers(memory)}
    print(f"{target}, batch {size} on {args.gpus} GPU{'s'[: args.gpus > 1]}: peak of a step, per GPU\n")
    print(memory_table(memory, capacity))
    longest = result["longest_prompt"] = prepare_to_look(args.config).longest if at_hand(args.config) else None
    print(f"\n{longest or 'longest prompt  not measured: the data are not on this disk'}")
    if args.plot is not None:
        plot_memory(memory, args.plot, capacity)
        print(f"\npicture  {args.plot}")
    if capacity is None or result["fits"]:
        write_result(result, args.json)
        return
    found = result["found"] = find_fit(args.config, memory, capacity, gpus=args.gpus, show=True)
    if found is None:
        print("\nnothing that this command can change makes it fit: take a recipe with adapters or a larger GPU")
    else:
        flags = [flag for saving in found.savings for flag in saving.flags.split()]
        flags += ["--gpus", str(found.gpus)] if found.gpus > 1 else []
        command = shlex.join(["manipi", "train", target, *without_flags(arguments[1:], _Plan), *flags])
        result["found"] = {"command": command, "gpus": found.gpus, **numbers(found.memory)}
        print(f"\nthis fits{f' on {found.gpus} GPUs' if found.gpus > 1 else ''}\n\n  {command}\n")
        for saving in found.savings:
            print(f"  {saving.flags:<28} {saving.cost}")
        print(f"\n{memory_table(found.memory, capacity)}")
    write_result(result, args.json)
    sys.exit(1)


def memory_table(memory: "StepMemory", capacity: int | None) -> str:
    """The parts at the peak, their sum, the reserve, and what the GPU has."""
    parts, decimals = memory.at_peak(), 2 if memory.peak >= 2**30 / 10 else 4

    def gib(size: int) -> str:
        return f"{size / 2**30:.{decimals}f}"

    rows = [(part, gib(size), f"{size / memory.peak:.0%}") for part, size in parts.items()]
    rows += [("peak", gib(memory.peak), ""), ("reserve", gib(memory.reserve), "")]
    if capacity is not None:
        left = capacity - memory.peak - memory.reserve
        rows.append(("GPU", gib(capacity), f"fits, {gib(left)} to spare" if left >= 0 else f"lacks {gib(-left)}"))
    width = max(len(row[1]) for row in rows)
    return table([(part, size.rjust(width), note) for part, size, note in rows], ("part", "GiB".rjust(width), "share"))
