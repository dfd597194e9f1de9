"""`manipi record`: the dataset of a recording that was killed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manipi.cli.arguments import NewFile, parse
from manipi.cli.result import write_result


@dataclass(frozen=True, kw_only=True)
class _Record:
    """Make a dataset of the episodes that a killed recording left. Robots are recorded from Python, with
    manipi.data.recorder.Recorder (docs/realtime.md), which keeps every episode when it ends.

    manipi record --finish runs/tuesday
    """

    finish: Path
    """The folder that was recorded to. Its episodes wait beside it, in .NAME.parts."""
    json: NewFile | None = None
    """Write the number of episodes and frames to this file."""


def main(arguments: Sequence[str]) -> None:
    """Finish the recording; prints how many episodes it has."""
    args = parse(_Record, arguments, "record")

    from manipi.data.recorder import finish_recording

    report = finish_recording(args.finish)
    write_result(report, args.json)
    print(f"{args.finish}: {report['num_episodes']} episodes, {report['num_frames']} frames")
