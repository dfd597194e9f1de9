"""`manipi record` and `replay`: a robot's recordings, finished and repeated."""

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import tyro

from manipi.cli.arguments import NewFile, OnDevice, parse, table, write_result

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[\w.-]+):\d+")


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


def run_record(arguments: Sequence[str]) -> None:
    """Finish the recording; prints how many episodes it has."""
    args = parse(_Record, arguments, "record")

    from manipi.data.recorder import finish_recording

    report = finish_recording(args.finish)
    write_result(report, args.json)
    print(f"{args.finish}: {report['num_episodes']} episodes, {report['num_frames']} frames")


@dataclass(frozen=True, kw_only=True)
class _Replay(OnDevice):
    """Put the questions of a recorded run to a checkpoint or a server; exits with 1 where the answers differ."""

    dataset: tyro.conf.Positional[Path]
    """A recording, as manipi.data.recorder.Recorder writes it."""
    target: tyro.conf.Positional[str]
    """A checkpoint folder, or HOST:PORT, wss://HOST:PORT with TLS; its token may be in MANIPI_TOKEN."""
    tolerance: float = 0.02
    """Largest difference allowed, as a share of what the dimension travels in the recording."""
    max_questions: int = 256
    """Questions that are asked, evenly spaced."""
    ca: Path | None = None
    """Certificate (PEM) of a server whose own is self-signed."""
    token_file: Path | None = None
    """File with the server's token."""
    json: NewFile | None = None
    """Write the differences to this file."""


def run_replay(arguments: Sequence[str]) -> None:
    """Replay; prints a table by dimension."""
    args = parse(_Replay, arguments, "replay")

    from manipi.data.open import open_dataset
    from manipi.evaluate.replay import recorded_robot, replay

    dataset = open_dataset(args.dataset)
    recorded_robot(dataset)  # refuse another dataset before a model is loaded
    with ExitStack() as connection:
        if "://" in args.target or _HOST_AND_PORT.fullmatch(args.target):
            from manipi.serve.access import read_token
            from manipi_client import WebsocketPolicy

            # Another checkpoint in the middle would be compared as if it were the same: the client refuses it.
            client = WebsocketPolicy(args.target, None, read_token(args.token_file), ca=args.ca)
            target = connection.enter_context(client)
        else:
            device = args.start()

            from manipi.policy import Policy

            target = Policy.load(Path(args.target), device=device)
        result = replay(dataset, target, max_questions=args.max_questions)
    write_result(result, args.json)
    columns = (result.dimensions, result.travel, result.mean, result.largest, 100 * result.share)
    rows = [(name, *map(float, numbers)) for name, *numbers in zip(*columns, strict=True)]
    took = f"a median answer took {result.recorded_ms:.1f} ms"
    print(f"{result.questions} questions, {result.steps} steps each; {took}")
    print(table(rows, ("dimension", "travel", "mean", "largest", "% of travel")), *result.said, sep="\n")
    within = result.worst <= args.tolerance
    verdict = "within" if within else "ABOVE"
    print(f"largest difference {result.worst:.3%} of the travel: {verdict} {args.tolerance:.3%}")
    sys.exit(0 if within else 1)
