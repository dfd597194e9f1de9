"""`manipi convert`: recordings in other formats become a LeRobot dataset."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from manipi.cli.arguments import NewFile, NewFolder, parse, table, write_result
from manipi.errors import ConfigError, quoted


@dataclass(frozen=True, kw_only=True)
class _Convert:
    """Convert recordings to LeRobot v3.0. What was killed goes on with the same command; DST appears when all is done.

    ALOHA       manipi convert recordings/ datasets/cube --task "pick up the cube"

    DROID       manipi convert droid_raw/ datasets/droid --resize 180x320 --drop-skipped

    LIBERO      manipi convert libero_spatial/ datasets/libero --rotate 180

    robomimic   manipi convert lift/ph/image.hdf5 datasets/lift --task "lift the cube"

    Zarr        manipi convert pusht.zarr datasets/pusht --fps 10 --task "push the T" --pix-fmt yuv444p

    BGR JPEGs   manipi convert recordings/ datasets/cube --task "pick up the cube" --swap-channels

    UMI         manipi convert dataset.zarr.zip datasets/cups --fps 60 --task "put the cup on the saucer"

    RLDS        manipi convert bridge/1.0.0 datasets/bridge

    LeRobot v2  manipi convert old_dataset datasets/new
    """

    source: tyro.conf.Positional[Path]
    """Folder or file of the recordings."""
    target: tyro.conf.Positional[NewFolder]
    """Folder to write; it must not exist."""
    format: str | None = None
    """aloha, droid, libero, robomimic, zarr, lerobot or rlds; recognised by the files unless given."""
    task: str = ""
    """The instruction of episodes that have none."""
    fps: int | None = None
    """Frames per second, where the recordings do not say, or wrongly."""
    robot_type: str = ""
    """Name of the robot in the dataset's metadata, instead of the format's usual one."""
    join: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=PART,PART")] = ()
    """More vectors, made of others: observation.state=observation.eef_pos,observation.gripper."""
    exclude: tuple[str, ...] = ()
    """Vectors and cameras to leave out, by the names that they would have."""
    resize: str = ""
    """HEIGHTxWIDTH of the pictures; the aspect is kept, and the rest black."""
    rotate: Literal[0, 180] = 0
    """Turn the pictures; LIBERO's are upside down."""
    swap_channels: tuple[str, ...] | None = None
    """Exchange red and blue of these cameras, or of all where none is named: for recordings in OpenCV's order."""
    drop_skipped: bool = False
    """DROID: leave out frames in which the robot did not take commands."""
    crf: int = 23
    """Quality of the video, from 0 (best) to 51."""
    pix_fmt: Literal["yuv420p", "yuv444p"] = "yuv420p"
    """yuv444p keeps the colours of very small pictures, and odd sizes."""
    num_workers: int | None = None
    """Processes that encode, 0 for none beside this one; one per processor core unless given."""
    ray: bool = False
    """Encode on the Ray cluster that this process belongs to, or on one started here; its hosts share the folders."""
    skip_bad_episodes: bool = False
    """Leave out episodes that cannot be read, and say which; without it the first one ends the conversion."""
    json: NewFile | None = None
    """Write what was converted and skipped to this file."""


def main(arguments: Sequence[str]) -> None:
    """Convert; prints what was written, and what was left out."""
    args = parse(_Convert, arguments, "convert")
    joins = []
    for text in args.join:
        whole, _, parts = text.partition("=")
        if not whole or not parts:
            next = "--join observation.state=eef_pos,gripper"
            raise ConfigError(expected="NAME=PART,PART", found=repr(text), where="--join", next=next)
        joins.append((whole, tuple(parts.split(","))))
    height, _, width = args.resize.partition("x")
    if args.resize and not (height.isdigit() and width.isdigit()):
        raise ConfigError(expected="HEIGHTxWIDTH", found=repr(args.resize), where="--resize", next="--resize 224x224")

    from manipi.convert.convert import ConvertSettings, convert
    from manipi.convert.formats import open_reader

    same = ("task", "fps", "robot_type", "exclude", "rotate", "swap_channels", "pix_fmt", "crf")
    settings = ConvertSettings(
        joins=tuple(joins),
        resize=(int(height), int(width)) if args.resize else None,
        **{name: getattr(args, name) for name in same},
    )
    workers = (os.cpu_count() or 1) if args.num_workers is None else args.num_workers
    began = time.perf_counter()
    reader = open_reader(args.source, args.format, drop_skipped=args.drop_skipped)
    skip_bad = args.skip_bad_episodes
    report = convert(reader, args.target, settings, num_workers=workers, skip_bad=skip_bad, ray=args.ray)
    rows = [
        ("written", report.target),
        ("episodes", f"{report.num_episodes:,}" + (f" ({report.reused:,} from before)" if report.reused else "")),
        ("frames", f"{report.num_frames:,}"),
        ("seconds", f"{time.perf_counter() - began:.1f}"),
        *(("note", f"{name}: {text}") for name, text in report.remarks),
        *(("skipped", f"{name}: {why}") for name, why in report.skipped),
        ("next", f"manipi check {quoted(report.target)}"),
    ]
    print(table(rows))
    write_result(report, args.json)
