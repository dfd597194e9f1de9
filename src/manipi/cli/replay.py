"""`manipi replay`: a recorded run against a checkpoint or a server, number by number."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from manipi.cli.arguments import NewFile, parse
from manipi.cli.result import said_device, table, write_result

if TYPE_CHECKING:
    from manipi.evaluate.replay import Answering, Replay


_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[\w.-]+):\d+")


@dataclass(frozen=True, kw_only=True)
class _Replay:
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
    device: str = "auto"
    """Where a checkpoint's model runs, such as cpu or cuda:1; auto: a GPU where there is one."""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    json: NewFile | None = None
    """Write the differences to this file."""


def main(arguments: Sequence[str]) -> None:
    """Replay; prints a table by dimension."""
    args = parse(_Replay, arguments, "replay")

    from manipi.data.open import open_dataset
    from manipi.evaluate.replay import recorded_robot, replay

    dataset = open_dataset(args.dataset)
    recorded_robot(dataset)  # refuse another dataset before a model is loaded
    with _open(args) as target:
        result = replay(dataset, target, max_questions=args.max_questions)
    write_result(result, args.json)
    print(_render(result, args.tolerance))
    sys.exit(1 if not result.worst <= args.tolerance else 0)


@contextmanager
def _open(args: _Replay) -> "Iterator[Answering]":
    if "://" in args.target or _HOST_AND_PORT.fullmatch(args.target):
        from manipi.serve.access import read_token
        from manipi_client import WebsocketPolicy

        # Another checkpoint in the middle would be compared as if it were the same: the client refuses it.
        with WebsocketPolicy(args.target, None, read_token(args.token_file), ca=args.ca) as policy:
            yield policy
        return

    import torch

    from manipi.policy import Policy

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    yield Policy.load(Path(args.target), device=said_device(args.device))


def _render(result: "Replay", tolerance: float) -> str:
    names = (result.dimensions, result.travel, result.mean, result.largest, 100 * result.share)
    rows = [(name, *map(float, numbers)) for name, *numbers in zip(*names, strict=True)]
    asked = f"{result.questions} questions, {result.steps} steps each; a median answer took {result.recorded_ms:.1f} ms"
    lines = [asked]
    lines += [table(rows, ("dimension", "travel", "mean", "largest", "% of travel")), *result.said]
    verdict = "within" if result.worst <= tolerance else "ABOVE"
    return "\n".join([*lines, f"largest difference {result.worst:.3%} of the travel: {verdict} {tolerance:.3%}"])
