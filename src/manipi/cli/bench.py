"""`manipi bench infer`: the time of an inference call; what 8 bits cost in error."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from manipi.cli.arguments import NewFile, OnDevice, parse, table, write_result
from manipi.errors import ConfigError

if TYPE_CHECKING:
    from manipi.evaluate.latency import Host
    from manipi.model import ModelInput
    from manipi.model.inference.engine import Engine


@dataclass(frozen=True, kw_only=True)
class _Infer(OnDevice):
    """Time every stage of an inference call, beside what this device can do; the engine runs as in `serve --compile`.

    manipi bench infer pi05_libero

    manipi bench infer runs/first/checkpoints/30000 --quantize int8 --data path/to/dataset
    """

    target: tyro.conf.Positional[str]
    """A checkpoint folder, or a recipe, whose model gets random weights."""
    quantize: Literal["none", "int8_weights", "int8", "fp8"] = "none"
    """How the transformers' matrices are kept."""
    data: str | None = None
    """Folder of a dataset: with --quantize, measure the action error on it and write the report that serve wants."""
    frames: int = 32
    """Frames of that dataset, evenly spaced."""
    prompt_len: int = 0
    """Of a recipe: prompt tokens; 0: as many as the model takes."""
    rounds: int = 20
    """Timed calls, after two others."""
    compile: bool = False
    """Compile the layers first."""
    json: NewFile | None = None
    """Write the figures to this file."""


def main(arguments: Sequence[str]) -> None:
    """Print the table; with --data the action error as well."""
    if arguments and arguments[0] in ("-h", "--help"):
        arguments = ("infer", "--help")
    if not arguments or arguments[0] != "infer":
        found = repr(arguments[0]) if arguments else "nothing"
        raise ConfigError(expected="infer", found=found, where="manipi bench", next="manipi bench infer --help")
    args = parse(_Infer, arguments[1:], "bench infer")
    is_checkpoint = Path(args.target).is_dir()
    if args.rounds < 1 or args.frames < 1:
        raise ConfigError(
            expected="at least one round and one frame",
            found=f"{args.rounds} and {args.frames}",
            where="--rounds, --frames",
            next="--rounds 20 --frames 32",
        )
    if args.data is not None and (args.quantize == "none" or not is_checkpoint):
        raise ConfigError(
            expected="a checkpoint folder and a quantization whose action error is wanted",
            found=f"{args.target} with --quantize {args.quantize}",
            where="--data",
            next="manipi bench infer CHECKPOINT --quantize int8 --data DATASET",
        )
    device = args.start()

    from manipi.evaluate.latency import profile

    report = _quantization_report(args, device) if args.data is not None else None
    engine, inputs, host = (_from_checkpoint if is_checkpoint else _from_recipe)(args, device)
    if args.compile:
        engine.compile()
    latency = profile(engine, inputs, rounds=args.rounds, host=host)
    rows = []
    for one in (*latency.stages, latency.total):
        share = "" if one.share is None else f"{one.share:.0%}"
        rows.append((one.name, one.p50, one.p95, one.p99, one.gflop, one.megabytes, share))
    print(table(rows, ("stage", "p50 ms", "p95 ms", "p99 ms", "GFLOP", "MB read", "of floor")))
    print(
        f"\nfloor, measured between the {latency.rounds} rounds: {latency.peak_gflops:.4g} GFLOP/s in a large product, "
        f"{latency.bandwidth_gbs:.4g} GB/s in a copy\npeak memory {latency.memory_mb:,.0f} MB"
    )
    write_result({"latency": latency, "quantization": report}, args.json)


def _from_checkpoint(args: _Infer, device: str) -> "tuple[Engine, ModelInput, Host | None]":
    """The policy's own engine, on the observation of its self-test."""
    from manipi.checkpoints.native import read_description
    from manipi.evaluate.latency import Host
    from manipi.model.inference.engine import Engine
    from manipi.policy import Policy

    policy, test = Policy.load(Path(args.target), device=device), read_description(Path(args.target)).self_test
    assert test is not None, "loading has replayed it"
    policy.fuse(args.quantize)
    assert isinstance(policy.model, Engine)
    return policy.model, policy.model_input([policy.encode(test.observation)]), Host(policy, test.observation)


def _from_recipe(args: _Infer, device: str) -> "tuple[Engine, ModelInput, Host | None]":
    """Random weights in the compute dtype; the robot's cameras."""
    import torch

    from manipi.model import VLA
    from manipi.model.inference.engine import Engine
    from manipi.model.inputs import blank_input
    from manipi.recipes.registry import load_recipe

    recipe = load_recipe(args.target)
    with torch.device("meta"):
        model = VLA(recipe.policy_model)
    model = model.to(model.dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cameras = [slot in recipe.robot.cameras for slot in recipe.model.cameras]
    inputs = blank_input(recipe.model, cameras, args.prompt_len or recipe.model.max_token_len)
    return Engine(model.eval(), quantization=args.quantize), inputs.to(device), None


def _quantization_report(args: _Infer, device: str) -> object:
    from manipi.checkpoints.native import LARGEST_DIFFERENCE, write_report
    from manipi.evaluate.open_loop import measure_quantization

    assert args.data is not None
    checkpoint = Path(args.target)
    report = measure_quantization(checkpoint, args.quantize, args.data, frames=args.frames, device=device)
    path = write_report(checkpoint, report)
    print(
        f"{args.quantize} against the plain policy, {report.frames} frames of {report.dataset}: commands differ by "
        f"{report.difference:.2%} of the travel in the mean\nagainst the recorded ones: {report.error:.2%}, plain "
        f"{report.plain_error:.2%}\n"
    )
    print(table([*report.per_dimension.items()], ("dimension", "mean difference")))
    verdict = "it may be served" if report.holds else f"more than {LARGEST_DIFFERENCE:.0%}: it is not served"
    print(f"\n{verdict}; report {path}\n")
    return report
