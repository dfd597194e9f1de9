"""`manipi export`: our checkpoint in another project's layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from manipi.cli.arguments import NewFile, NewFolder, parse
from manipi.cli.result import table, write_result


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


def main(arguments: Sequence[str]) -> None:
    """Export; prints the certificate."""
    args = parse(_Export, arguments, "export")

    import torch

    from manipi.exchange.exporting import export_checkpoint
    from manipi.storage import remove_dead

    remove_dead(args.target.parent)
    if args.to == "program":
        from manipi.exchange.program import export_program

        report = export_program(args.source, args.target)
        print(table(report.rows()))
        return write_result(report, args.json)
    dtype = None if args.dtype == "stored" else getattr(torch, args.dtype)
    certificate = export_checkpoint(args.source, args.to, args.target, dtype=dtype, merge=args.merge)
    print(table(certificate.rows()))
    return write_result(certificate, args.json)
