"""`manipi eval`: a checkpoint on held-out episodes, beside baselines; closed loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from manipi.cli.arguments import NewFile, OnDevice, parse, table, write_result
from manipi.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Eval(OnDevice):
    """Compare predicted with recorded action chunks, on held-out and on training episodes, beside baselines.

    With --scenes, drive the simulated robot instead: does it keep its success rate when it does not wait?
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
    """Closed loop: scenes of the robot's environment (docs/extending.md) for each way to join chunks."""
    execute_steps: int = 4
    """Closed loop: executed steps after an observation until the next one is sent."""
    delay: int = 2
    """Closed loop: executed steps until the answer to an observation is there."""
    plot: NewFile | None = None
    """Draw predicted over recorded commands into this PNG. Default: open_loop_STEP.png in the run's folder."""
    json: NewFile | None = None
    """Write the errors to this file."""


def main(arguments: Sequence[str]) -> None:
    """Evaluate; prints tables and one sentence per baseline."""
    args = parse(_Eval, arguments, "eval")
    if args.max_frames < 1:
        raise ConfigError(
            expected="at least one frame", found=str(args.max_frames), where="--max-frames", next="--max-frames 256"
        )
    if args.scenes < 0:
        raise ConfigError(expected="scenes, or 0", found=str(args.scenes), where="--scenes", next="--scenes 100")
    if args.holdout is not None and args.data is None:
        raise ConfigError(expected="the data to split", found="no --data", where="--holdout", next="add --data PATH")
    if args.scenes:
        _closed_loop(args)
    else:
        _open_loop(args)


def _open_loop(args: _Eval) -> None:
    device = args.start()

    from manipi.data.action_error import evenly_spaced
    from manipi.data.dataset import command_units, label
    from manipi.evaluate.open_loop import new_split, open_split, plot_chunks, predict, run_folder, score
    from manipi.policy import Policy

    policy = Policy.load(args.checkpoint, device=device)
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
        result = results[side] = score(predictions, split.dataset, policy.robot, split.train_rows)
        print(f"\n{side}: {result.frames} frames of {result.episodes} episodes; mean absolute error as % of the travel")
        summary = [
            (name, 100 * e.share_of_travel, 100 * float(e.per_step[0]), 100 * float(e.per_step[-1]))
            for name, e in result.errors.items()
        ]
        print(table(summary, ("", "all steps", "first step", f"step {len(result.errors['policy'].per_step)}")))
        if side == "held-out" and plot:
            plot_chunks(predictions, split.dataset, policy.robot, result, plot)
    held_out, units = results["held-out"], command_units(policy.robot)
    moving = [d for d, travel in enumerate(held_out.travel) if travel > 0]
    print(f"\nheld-out, in the robot's own units; {len(moving)} of {len(held_out.travel)} dimensions travel at all")
    columns = [held_out.travel, *(e.per_dimension for e in held_out.errors.values())]
    rows = [(label(held_out.dimensions[d], units[d]), *(float(column[d]) for column in columns)) for d in moving]
    print(table(rows, ("dimension", "travel", *held_out.errors)))
    print(f"\n{held_out.verdict()}")
    print(f"plot  {plot}" if plot else "no plot: the checkpoint stands apart from its run, and there is no --plot")
    write_result({"split": split.origin, **results}, args.json)


def _closed_loop(args: _Eval) -> None:
    import numpy as np

    from manipi.evaluate.rollout import compare, policy_server
    from manipi_client import WebsocketPolicy

    flags = ("--device", args.device)
    with policy_server(args.checkpoint, threads=args.num_threads, flags=flags) as port, WebsocketPolicy(port=port) as p:
        results = compare(p, range(args.scenes), execute_steps=args.execute_steps, delay=args.delay)
    print(f"an answer takes {args.delay} steps; asked {args.execute_steps} steps after the last observation")
    rows = []
    for one in results:
        motion, rates = one.motion, map(float, vars(one.success).values())
        # Of the first three dimensions: a gripper behind them has another unit. Short episodes have no seam: a number.
        changes = [np.atleast_1d(value)[:3].max() for value in (motion.seam_jump, motion.step_change, motion.jerk)]
        rows.append((one.join, one.seconds, *rates, motion.starved_steps, motion.seams, *map(float, changes)))
    print(table(rows, ("join", "s", "n", "k", "rate", "low", "high", "starved", "seams", "jump", "change", "jerk")))
    print(
        "\ns: an episode on the arm's clock; low, high: 95 % interval; jump: the largest change at a seam; change: the"
        "\nmean one within a chunk, jerk: the mean third difference; of the worst of the first three dimensions"
    )
    write_result({"closed_loop": results}, args.json)
