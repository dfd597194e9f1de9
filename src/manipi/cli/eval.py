"""`manipi eval`: open-loop error of a checkpoint on held-out episodes, beside simple baselines; or closed loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from manipi.cli.arguments import NewFile, parse, said_device, table, write_result
from manipi.errors import ConfigError

if TYPE_CHECKING:
    from manipi.evaluate.open_loop import OpenLoop
    from manipi_client import Motion


@dataclass(frozen=True, kw_only=True)
class _Eval:
    """Compare predicted with recorded action chunks, on held-out and on training episodes, beside baselines.

    With --scenes, drive the demo's simulated arm instead: does it keep its success rate when it does not wait?
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, such as runs/NAME/checkpoints/STEP or runs/NAME/best."""
    data: str | None = None
    """Folder of the dataset. Default: where it was in training."""
    holdout: float | None = None
    """Split the data anew, for data that the policy was not trained on. Default: the split of its run."""
    seed: int = 0
    """Of the new split."""
    holdout_only: bool = False
    """Leave the training episodes out."""
    max_frames: int = 256
    """Frames per side of the split, evenly spaced."""
    scenes: int = 0
    """Closed loop: scenes of the tabletop environment for each way to join chunks."""
    execute_steps: int = 4
    """Closed loop: executed steps after an observation until the next one is sent."""
    delay: int = 2
    """Closed loop: executed steps until the answer to an observation is there."""
    device: str = "auto"
    """Where the model runs, such as cpu or cuda:1; auto: a GPU where there is one."""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    plot: NewFile | None = None
    """Draw predicted over recorded commands into this PNG. Default: open_loop_STEP.png in the run's folder."""
    json: NewFile | None = None
    """Write the errors to this file."""


def main(arguments: Sequence[str]) -> None:
    """Evaluate; prints tables and one sentence per baseline."""
    args = parse(_Eval, arguments, "eval")
    _check(args)
    if args.scenes:
        _drive(args)
        return

    import torch

    from manipi.data.action_error import evenly_spaced
    from manipi.data.dimensions import command_units
    from manipi.evaluate.open_loop import new_split, open_split, plot_chunks, predict, run_folder, score
    from manipi.policy import Policy

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    policy = Policy.load(args.checkpoint, device=said_device(args.device))
    if args.data is not None and args.holdout is not None:
        split = new_split(policy, args.data, holdout=args.holdout, seed=args.seed)
    else:
        split = open_split(args.checkpoint, policy, args.data)
    run, results = run_folder(args.checkpoint), {}
    plot = args.plot or (run and run / f"open_loop_{policy.config.step}.png")
    sides = {"held-out": split.held_out_rows} | ({} if args.holdout_only else {"training": split.train_rows})
    print(f"{split.dataset.name}, split: {split.origin}")
    for side, rows in sides.items():
        predictions = predict(policy, split.dataset, evenly_spaced(rows, args.max_frames), split.train_rows)
        results[side] = score(predictions, split.dataset, policy.robot, split.train_rows)
        _show(side, results[side])
        if side == "held-out" and plot:
            plot_chunks(predictions, split.dataset, policy.robot, results[side], plot)
    _show_dimensions(results["held-out"], command_units(policy.robot))
    print(f"\n{results['held-out'].verdict()}")
    print(f"plot  {plot}" if plot else "no plot: the checkpoint stands apart from its run, and there is no --plot")
    write_result({"split": split.origin, **results}, args.json)


def _drive(args: _Eval) -> None:
    from manipi.evaluate.rollout import compare, policy_server
    from manipi_client import WebsocketPolicy

    flags = ("--device", args.device)
    with policy_server(args.checkpoint, threads=args.num_threads, flags=flags) as port, WebsocketPolicy(port=port) as p:
        results = compare(p, range(args.scenes), execute_steps=args.execute_steps, delay=args.delay)
    print(f"an answer takes {args.delay} steps; asked {args.execute_steps} steps after the last observation")
    rows = [(r.join, r.seconds, *map(float, vars(r.success).values()), *_motion(r.motion)) for r in results]
    print(table(rows, ("join", "s", "n", "k", "rate", "low", "high", "starved", "seams", "jump", "change", "jerk")))
    print(
        "\ns: an episode on the arm's clock; low, high: 95 % interval; jump: the largest change at a seam; change: the"
        "\nmean one within a chunk, jerk: the mean third difference; in m, of the worst of x, y and z"
    )
    write_result({"closed_loop": results}, args.json)


def _motion(motion: "Motion") -> tuple[float, ...]:
    """Of the tip alone; the gripper has another unit."""
    largest = (float(v[:3].max()) for v in (motion.seam_jump, motion.step_change, motion.jerk))
    return motion.starved_steps, motion.seams, *largest


def _check(args: _Eval) -> None:
    if args.max_frames < 1:
        raise ConfigError(
            expected="at least one frame", found=str(args.max_frames), where="--max-frames", next="--max-frames 256"
        )
    if args.scenes < 0:
        raise ConfigError(expected="scenes, or 0", found=str(args.scenes), where="--scenes", next="--scenes 100")
    if args.holdout is not None and args.data is None:
        raise ConfigError(expected="the data to split", found="no --data", where="--holdout", next="add --data PATH")


def _show(side: str, result: "OpenLoop") -> None:
    print(f"\n{side}: {result.frames} frames of {result.episodes} episodes; mean absolute error as % of the travel")
    errors = result.errors
    summary = [
        (name, 100 * e.share_of_travel, 100 * float(e.per_step[0]), 100 * float(e.per_step[-1]))
        for name, e in errors.items()
    ]
    print(table(summary, ("", "all steps", "first step", f"step {len(errors['policy'].per_step)}")))


def _show_dimensions(result: "OpenLoop", units: Sequence[str]) -> None:
    from manipi.data.dimensions import label

    moving = [d for d, travel in enumerate(result.travel) if travel > 0]
    print(f"\nheld-out, in the robot's own units; {len(moving)} of {len(result.travel)} dimensions travel at all")
    rows = [
        (
            label(result.dimensions[d], units[d]),
            float(result.travel[d]),
            *(float(e.per_dimension[d]) for e in result.errors.values()),
        )
        for d in moving
    ]
    print(table(rows, ("dimension", "travel", *result.errors)))
