"""`manipi check`, `filter`, `view`, `record`, `replay`: datasets and recordings."""

import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from manipi.cli.arguments import NewFile, OnDevice, parse, table, write_result
from manipi.errors import one_line, quoted
from manipi.recipes.registry import load_robot
from manipi.storage import require_new_file

if TYPE_CHECKING:
    from manipi.data.review.report import CheckReport

SHOWN = 5
"""Findings of one kind that the screen shows; `--json` has all of them."""
_LONGEST = 4000
"""Characters of a line of it."""
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[\w.-]+):\d+")


@dataclass(frozen=True, kw_only=True)
class _Check:
    """Read a dataset in full and report what is wrong with it; exits with 1 when there are errors.

    manipi check path/to/dataset --quick

    manipi check path/to/dataset --html report.html --strict

    manipi check path/to/dataset --robot my_robot.py:ROBOT --json findings.json
    """

    dataset: tyro.conf.Positional[str]
    """Folder or URL of a dataset; all of it is fetched."""
    robot: str | None = None
    """Also check what this robot names: a robot's or recipe's name, or path/to/file.py:NAME of either."""
    quick: bool = False
    """Decode only the first and the last picture of each episode."""
    num_workers: int | None = None
    """Threads that decode pictures; one per processor core unless given."""
    ray: bool = False
    """Decode on the Ray cluster that this process belongs to, or on one started here; its hosts share the folder."""
    strict: bool = False
    """Exit with 1 when there are warnings, too."""
    html: NewFile | None = None
    """Write the findings with pictures, and every episode at a glance, to this file, which stands alone."""
    json: NewFile | None = None
    """Write the findings to this file."""


def run_check(arguments: Sequence[str]) -> None:
    """Print the findings, errors first."""
    args = parse(_Check, arguments, "check")

    from manipi.data.open import fetch_tables
    from manipi.data.review.check import check_dataset
    from manipi.data.review.report import write_check_page
    from manipi.remote.fetch import fetch

    robot = load_robot(args.robot) if args.robot else None
    folder = fetch_tables(args.dataset) if "://" in args.dataset else Path(args.dataset)
    if "://" in args.dataset and (folder / "meta").is_dir():  # LeRobot's videos are all looked at
        folder = fetch(f"{args.dataset.rstrip('/')}/")
    report = check_dataset(folder, robot=robot, quick=args.quick, num_workers=args.num_workers, ray=args.ray)
    write_result(report, args.json)
    if args.html is not None:
        write_check_page(args.html, report)
    print(render(report, quick=args.quick))
    sys.exit(1 if report.count("error") or (args.strict and report.count("warning")) else 0)


def render(report: "CheckReport", *, quick: bool) -> str:
    """The findings as blocks of text, then how many there are of each kind."""
    from manipi.data.review.report import CHECKS

    size = f"{report.num_episodes} episodes · {report.num_frames:,} frames · cameras: {len(report.cameras)}"
    pictures = "first and last pictures" if quick else "every picture"
    parts = [f"{report.root}\n{size} · {pictures} decoded" if report.num_frames else report.root]
    if report.depth:
        parts.append(f"left out: {one_line(', '.join(report.depth), _LONGEST)}, which record depth, not colours")
    for severity, check in itertools.product(("error", "warning"), CHECKS):
        found = [f for f in report.findings if (f.severity, f.check) == (severity, check)]
        for finding in found[:SHOWN]:
            where, what, next = (one_line(text, _LONGEST) for text in (finding.where, finding.what, finding.next))
            lines = [f"{severity:<8} {check}  {where}", *textwrap.wrap(what, 108), f"→ {next}"]
            parts.append("\n         ".join(lines))
        if len(found) > SHOWN:
            parts.append(f"{severity:<8} {check}  … and {len(found) - SHOWN} more of this kind (--json has them all)")
    if report.num_frames:
        counts = [(check, report.count("error", check), report.count("warning", check)) for check in CHECKS]
        counts.append(("all", report.count("error"), report.count("warning")))
        parts.append(table(counts, ("check", "errors", "warnings")))
    return "\n\n".join(parts if report.findings else [*parts, "nothing is wrong with it"])


def run_filter(arguments: Sequence[str]) -> None:
    """Print what each rule leaves out and a preview."""
    # The rules are flags, and their module needs NumPy, which the other commands of this file do without.
    from manipi.data.open import open_dataset
    from manipi.data.review.filters import Rules, filter_dataset, guess_keys, preview

    @dataclass(frozen=True, kw_only=True)
    class Filter:
        """Write a mask of the frames to train on. The dataset stays as it is; `--data.keep MASK` trains on them.

        manipi filter path/to/dataset --idle 1.0

        manipi filter path/to/dataset --idle 0.5 --trim-end 0.4 --without 3 17 --out keep.json

        manipi filter path/to/droid/1.0.1 --droid-idle action_dict/joint_velocity --out keep.json
        """

        dataset: tyro.conf.Positional[str]
        """Folder or URL of a dataset."""
        rules: Annotated[Rules, tyro.conf.arg(name="")]
        robot: str | None = None
        """Names the state and the actions: a robot's or recipe's name, or path/to/file.py:NAME; guessed without it."""
        out: NewFile | None = None
        """Save the mask here; without it there is only the preview."""
        json: NewFile | None = None
        """Write what each rule leaves out to this file."""

    args = parse(Filter, arguments, "filter")
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


@dataclass(frozen=True, kw_only=True)
class _View:
    """Write cameras and curves of an episode as one HTML file, which needs nothing beside itself.

    manipi view path/to/dataset

    manipi view path/to/dataset 17 --out episode.html

    manipi view path/to/dataset 17 --rerun

    manipi view path/to/dataset 17 --without observation.images.wrist
    """

    dataset: tyro.conf.Positional[str]
    """Folder or URL of a dataset."""
    episode: tyro.conf.Positional[int | None] = None
    """Number of the episode; the first one unless given."""
    without: tuple[str, ...] = ()
    """Cameras and vectors to leave out, such as a camera whose files are not there."""
    out: NewFile | None = None
    """The file to write; view-<dataset>-<episode>.html, or .rrd with --rerun, unless given."""
    rerun: bool = False
    """Write a recording for the rerun viewer instead: pip install 'manipi[view]'."""


def run_view(arguments: Sequence[str]) -> None:
    """Write the page or the recording."""
    args = parse(_View, arguments, "view")

    from manipi.data.open import open_dataset
    from manipi.data.review.view import write_rerun, write_view

    number = args.episode if args.episode is not None else open_dataset(args.dataset).episodes[0].index
    dataset = open_dataset(args.dataset, episodes=(number,))
    kind, write = ("rrd", write_rerun) if args.rerun else ("html", write_view)
    path = args.out or Path(f"view-{dataset.name}-{number}.{kind}")
    require_new_file(path)
    write(path, dataset, without=args.without)
    opens = f"rerun {quoted(path)}" if args.rerun else "open it in a browser"
    if depth := [key for key, feature in dataset.features.items() if feature.kind == "depth"]:
        print(f"left out: {one_line(', '.join(depth), 1000)}, which record depth, not colours")
    print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB): {opens}")


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
