"""`manipi import` and `export`: checkpoints of other projects, and ours for them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from manipi.cli.arguments import NewFile, NewFolder, parse, table, write_result
from manipi.errors import quoted
from manipi.recipes.registry import load_recipe, load_robot
from manipi.weights.released import RELEASED, resolve


@dataclass(frozen=True, kw_only=True)
class _Import:
    """Import a checkpoint: openpi (Orbax or PyTorch), LeRobot, or exported adapters. Prints a parity certificate.

    manipi import pi05_droid runs/pi05_droid

    manipi import path/to/openpi/checkpoints/9999 runs/mine --recipe pi0_libero

    manipi import hf://lerobot/pi0_base runs/pi0 --robot my_robot.py:ROBOT --action-horizon 50
    """

    source: tyro.conf.Positional[str]
    """A released name (pi05_base, pi05_droid …), a folder, a file, or gs://, s3://, hf://, https://."""
    target: tyro.conf.Positional[NewFolder]
    """Folder to write; it must not exist."""
    recipe: str = ""
    """What weights cannot tell, from this recipe. A released name knows its own."""
    robot: str = ""
    """The robot, where no recipe has it: FILE.py:NAME, or a recipe."""
    asset_id: str = ""
    """Which norm stats of the checkpoint's assets."""
    norm_stats: Path | None = None
    """Norm stats from this file instead."""
    normalization: Literal["zscore", "quantile"] | None = None
    """How states and actions were scaled, where no file beside the weights says so and the recipe has another."""
    action_horizon: int | None = None
    """Steps of an action chunk, where the recipe's are not the checkpoint's."""
    max_token_len: int | None = None
    """Prompt tokens, likewise."""
    tokenizer: str = ""
    """SentencePiece model: a file or URL, or `byte`. Default: the recipe's, or PaliGemma's."""
    action_tokenizer: str = ""
    """π0-FAST: `binning`, or folder or URL of a FAST or FSQ tokenizer. Default: the recipe's, or the published FAST."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights written."""
    base: Path | None = None
    """For adapters: the checkpoint that they belong to."""
    offline: bool = False
    """Use what is in the cache, and never the network."""
    json: NewFile | None = None
    """Write the certificate to this file."""


def run_import(arguments: Sequence[str]) -> None:
    """Import; prints the certificate."""
    args = parse(_Import, arguments, "import")
    released = RELEASED.get(args.source)
    recipe = args.recipe or (released and not args.robot and released.recipe)
    config = load_recipe(recipe) if recipe else None
    robot = load_robot(args.robot) if args.robot else None

    import torch

    from manipi.exchange.importing import import_adapters, import_checkpoint
    from manipi.remote.fetch import fetch
    from manipi.storage import remove_dead

    if args.offline:
        os.environ["MANIPI_OFFLINE"] = "1"  # the tokenizers may be fetched too
    remove_dead(args.target.parent)
    path = fetch(resolve(args.source))
    if args.base is not None:
        certificate = import_adapters(path, args.base, args.target)
    else:
        certificate = import_checkpoint(
            path,
            args.target,
            recipe=config,
            robot=robot,
            norm_stats=args.norm_stats,
            asset_id=args.asset_id or (released and released.asset_id) or "",
            normalization=args.normalization,
            action_horizon=args.action_horizon,
            max_token_len=args.max_token_len,
            tokenizer=args.tokenizer,
            action_tokenizer=args.action_tokenizer,
            dtype=None if args.dtype == "stored" else getattr(torch, args.dtype),
        )
    print(table(certificate.rows()))
    print(f"next           manipi serve {quoted(args.target)}")
    write_result(certificate, args.json)


@dataclass(frozen=True, kw_only=True)
class _Export:
    """Export a checkpoint to openpi or LeRobot; or its adapters alone, or merged. Prints a parity certificate.

    manipi export runs/first/checkpoints/30000 exported --to openpi-jax

    manipi export runs/lora/checkpoints/30000 adapters --to adapters

    manipi export runs/lora/checkpoints/30000 merged --to manipi --merge
    """

    source: tyro.conf.Positional[Path]
    """A checkpoint folder."""
    target: tyro.conf.Positional[NewFolder]
    """Folder to write; it must not exist."""
    to: Literal["openpi-jax", "openpi-torch", "lerobot", "adapters", "manipi", "program"]
    """The layout; program: one torch.export program, with its contract as JSON."""
    merge: bool = False
    """Put low-rank adapters into the matrices first."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the weights written."""
    json: NewFile | None = None
    """Write the certificate to this file."""


def run_export(arguments: Sequence[str]) -> None:
    """Export; prints the certificate."""
    args = parse(_Export, arguments, "export")

    import torch

    from manipi.exchange.exporting import export_checkpoint, export_program
    from manipi.storage import remove_dead

    remove_dead(args.target.parent)
    if args.to == "program":
        report = export_program(args.source, args.target)
    else:
        dtype = None if args.dtype == "stored" else getattr(torch, args.dtype)
        report = export_checkpoint(args.source, args.to, args.target, dtype=dtype, merge=args.merge)
    print(table(report.rows()))
    write_result(report, args.json)
