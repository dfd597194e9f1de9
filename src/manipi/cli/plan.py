"""`manipi plan`: the memory of a recipe's training step, beside that of a GPU, before anything is loaded."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from manipi.cli.arguments import NewFile, parse, recipe_name, table, write_result
from manipi.recipes.registry import load_recipe, recipe_names
from manipi.train.config import STRUCTURE, TrainConfig

if TYPE_CHECKING:
    from manipi.train.data import LongestPrompt
    from manipi.train.plan import Fit, StepMemory

HELP = f"""usage: manipi plan RECIPE|FILE.py:FUNCTION [--gpu 24GB|rtx4090|h100|…] [--gpus N] [--flags of manipi train]

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


def main(arguments: Sequence[str]) -> None:
    """Print the table; exits with 1 where the step does not fit."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    target = recipe_name(arguments, "plan")
    args = parse(_Plan, arguments[1:], f"plan {target}", default=_Plan(config=load_recipe(target)), structure=STRUCTURE)

    from manipi.train.plan import find_fit, fits, forecast, gpu_bytes, plot_memory

    capacity = gpu_bytes(args.gpu) if args.gpu else None
    memory = forecast(args.config, gpus=args.gpus)
    result: dict[str, Any] = {"gpus": args.gpus, "batch_size": args.config.batch_size, **_numbers(memory, capacity)}
    print(
        f"{target}, batch {args.config.batch_size} on {args.gpus} GPU{'s'[: args.gpus > 1]}: peak of a step, per GPU\n"
    )
    print(memory_table(memory, capacity))
    longest = _longest_prompt(args.config)
    result["longest_prompt"] = longest
    print(f"\n{longest or 'longest prompt  not measured: the data are not on this disk'}")
    if args.plot is not None:
        plot_memory(memory, args.plot, capacity)
        print(f"\npicture  {args.plot}")
    if capacity is None or fits(memory, capacity):
        write_result(result, args.json)
        return
    found = find_fit(args.config, memory, capacity, gpus=args.gpus, show=True)
    if found is None:
        print("\nnothing that this command can change makes it fit: take a recipe with adapters or a larger GPU")
    result["found"] = found and _show(target, arguments[1:], found, capacity)
    write_result(result, args.json)
    sys.exit(1)


def _longest_prompt(config: TrainConfig) -> "LongestPrompt | None":
    """Of the recipe's data, where they are on this disk."""
    from manipi.train.data import at_hand, prepare_to_look

    return prepare_to_look(config).longest if at_hand(config) else None


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


def _numbers(memory: "StepMemory", capacity: int | None) -> dict[str, Any]:
    numbers = {"parts": memory.at_peak(), "peak": memory.peak, "reserve": memory.reserve}
    return {**numbers, "gpu": capacity, "fits": None if capacity is None else memory.peak + memory.reserve <= capacity}


def _show(target: str, arguments: Sequence[str], found: "Fit", capacity: int) -> dict[str, Any]:
    """Print the settings that fit, and what they cost. Returns the same for a file."""
    flags = [flag for saving in found.savings for flag in saving.flags.split()]
    flags += ["--gpus", str(found.gpus)] if found.gpus > 1 else []
    command = shlex.join(["manipi", "train", target, *_train_flags(arguments), *flags])
    print(f"\nthis fits{f' on {found.gpus} GPUs' if found.gpus > 1 else ''}\n\n  {command}\n")
    for saving in found.savings:
        print(f"  {saving.flags:<28} {saving.cost}")
    print(f"\n{memory_table(found.memory, capacity)}")
    return {"command": command, "gpus": found.gpus, **_numbers(found.memory, capacity)}


def _train_flags(arguments: Sequence[str]) -> list[str]:
    """The flags that are the recipe's, and not this command's own."""
    text = "\0".join(arguments)
    return [part for part in re.sub(r"(^|\0)--(gpu|gpus|plot|json)[=\0][^\0]*", "", text).split("\0") if part]
