"""`manipi filter`: choose the frames of a dataset that are worth training on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from manipi.cli.arguments import NewFile, parse
from manipi.cli.result import table, write_result
from manipi.data.review.filters import Rules
from manipi.errors import quoted
from manipi.recipes.registry import load_robot


@dataclass(frozen=True, kw_only=True)
class _Filter:
    """Write a mask of the frames to train on. The dataset stays as it is; `--data.keep MASK` applies it in training.

    manipi filter path/to/dataset --idle 1.0

    manipi filter path/to/dataset --idle 0.5 --trim-end 0.4 --without 3 17 --out keep.json

    manipi filter path/to/droid/1.0.1 --droid-idle action_dict/joint_velocity --out keep.json
    """

    dataset: tyro.conf.Positional[str]
    """Folder or URL of a dataset."""
    rules: Annotated[Rules, tyro.conf.arg(name="")]
    robot: str | None = None
    """Names the state and the actions: a recipe, or path/to/file.py:NAME; guessed from the names without it."""
    out: NewFile | None = None
    """Save the mask here; without it there is only the preview."""
    json: NewFile | None = None
    """Write what each rule leaves out to this file."""


def main(arguments: Sequence[str]) -> None:
    """Print what each rule leaves out and a preview."""
    args = parse(_Filter, arguments, "filter")

    from manipi.data.open import open_dataset
    from manipi.data.review.filters import filter_dataset, guess_keys, preview

    dataset = open_dataset(args.dataset)
    if args.robot:
        robot = load_robot(args.robot)
        states, action = tuple(robot.dataset_key(s.key) for s in robot.state), robot.dataset_key(robot.action_key)
    else:
        states, action = guess_keys(dataset)
    mask, keep, effects = filter_dataset(dataset, args.rules, state_keys=states, action_key=action)
    total, lost_whole = len(keep), len(mask.keep) - sum(map(bool, mask.keep.values()))
    rows = [(e.rule, e.frames, f"{e.frames / total:.1%}", e.episodes) for e in effects]
    rows.append(("all together", total - int(keep.sum()), f"{1 - keep.mean():.1%}", lost_whole))
    print(f"{dataset.root}\n{total:,} frames; movement seen in {', '.join(states)} and {action}\n")
    print(table(rows, ("left out by", "frames", "share", "whole episodes")))
    print(f"\n{preview(dataset, keep)}")
    if args.out is not None:
        mask.save(args.out)
        flags = f"--data.path {quoted(args.dataset)} --data.keep {quoted(args.out)}"
        print(f"\nsaved  {args.out}\nnext   manipi train RECIPE {flags}")
    write_result({"frames": total, "kept": int(keep.sum()), "effects": effects}, args.json)
