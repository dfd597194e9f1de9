"""The formats that can be converted, and which one a folder or file is in."""

import importlib
from pathlib import Path

from manipi.convert.source import EpisodeSource, find_files
from manipi.errors import ConfigError, DatasetFormatError, DatasetNotFoundError, quoted, unknown_name

FORMATS = {
    "aloha": ("hdf5:AlohaSource", "episode_N.hdf5 with observations/qpos, observations/images/CAMERA, action"),
    "droid": ("droid_raw:DroidSource", "folders with trajectory.h5 and recordings/MP4/SERIAL.mp4"),
    "libero": ("hdf5:RobomimicSource", "TASK_demo.hdf5 files with data/demo_N/obs and actions"),
    "robomimic": ("hdf5:RobomimicSource", "one .hdf5 file with data/demo_N/obs and actions"),
    "zarr": ("zarr_buffer:ReplayBufferSource", "a .zarr folder or .zarr.zip with data/NAME, meta/episode_ends"),
    "lerobot": ("from_dataset:DatasetSource", "meta/info.json, tables and videos of LeRobot v2 or v3"),
    "rlds": ("from_dataset:DatasetSource", "features.json and record files of TFDS"),
}
"""Per name the class that reads the format, and what its files look like."""


def open_source(root: Path, format: str | None = None, *, drop_skipped: bool = False) -> EpisodeSource:
    """The source at a folder or file, recognised by its files unless the format is named.

    Raises:
        UnknownNameError: no such format.
        ConfigError: the format does not mark skipped frames, and they are to be dropped.
        DatasetNotFoundError, DatasetFormatError: nothing there, or in no known format.
    """
    root = root.expanduser().absolute()
    if format is not None and format not in FORMATS:
        raise unknown_name("format", format, FORMATS, next="leave --format out; it is recognised by the files")
    if not root.exists():
        raise DatasetNotFoundError(
            expected="a recording",
            found="nothing",
            where=str(root),
            next=f"ls {quoted(root.parent)}  # then give the path",
        )
    format = format or _recognise(root)
    module, _, kind = FORMATS[format][0].partition(":")
    source: EpisodeSource = getattr(importlib.import_module(f"manipi.convert.{module}"), kind)(root)
    if not source.names:
        raise DatasetNotFoundError(
            expected=f"at least one episode: {FORMATS[format][1]}",
            found="none",
            where=str(root),
            next="give another folder, or another --format",
        )
    if drop_skipped and not source.marks_skipped:
        raise ConfigError(
            expected="a format that marks skipped frames: droid",
            found=format,
            where="--drop-skipped",
            next="leave the flag out",
        )
    source.drop_skipped = drop_skipped
    return source


def _recognise(root: Path) -> str:
    if root.name.endswith((".zarr", ".zarr.zip")) or (root / "meta/episode_ends").is_dir():
        return "zarr"
    if (root / "meta/info.json").is_file():
        return "lerobot"
    if any(root.glob("features.json")) or any(root.glob("*/features.json")):
        return "rlds"
    if any(root.rglob("trajectory.h5")):
        return "droid"
    if files := find_files(root, "*.hdf5", "*.h5"):
        from manipi.convert.hdf5 import recognise

        return recognise(files)
    known = "; ".join(f"{name}: {files}" for name, (_, files) in FORMATS.items())
    found = sorted(path.name for path in root.iterdir())[:5] if root.is_dir() else [root.name]
    raise DatasetFormatError(
        expected=f"one of the formats {known}",
        found=", ".join(found) or "an empty folder",
        where=str(root),
        next="give the folder that holds these files, or name the format with --format",
    )
