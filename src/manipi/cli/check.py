"""`manipi check`: a dataset read in full, and what is wrong with it."""

import itertools
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from manipi.cli.arguments import NewFile, parse
from manipi.cli.result import table, write_result
from manipi.errors import one_line
from manipi.recipes.registry import load_robot

if TYPE_CHECKING:
    from manipi.data.review.report import CheckReport, Finding

SHOWN = 5
"""Findings of one kind that the screen shows; `--json` has all of them."""
_LONGEST = 4000
"""Characters of a line of it."""


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
    """Also check what this robot names: a recipe, or path/to/file.py:NAME of a recipe or a Robot."""
    quick: bool = False
    """Decode only the first and the last picture of each episode."""
    num_workers: int | None = None
    """Threads that decode pictures; one per processor core unless given."""
    strict: bool = False
    """Exit with 1 when there are warnings, too."""
    html: NewFile | None = None
    """Write the findings with pictures, and every episode at a glance, to this file, which stands alone."""
    json: NewFile | None = None
    """Write the findings to this file."""


def main(arguments: Sequence[str]) -> None:
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
    report = check_dataset(folder, robot=robot, quick=args.quick, num_workers=args.num_workers)
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
        parts += [_block(finding) for finding in found[:SHOWN]]
        if len(found) > SHOWN:
            parts.append(f"{severity:<8} {check}  … and {len(found) - SHOWN} more of this kind (--json has them all)")
    if report.num_frames:
        counts = [(check, report.count("error", check), report.count("warning", check)) for check in CHECKS]
        counts.append(("all", report.count("error"), report.count("warning")))
        parts.append(table(counts, ("check", "errors", "warnings")))
    return "\n\n".join(parts if report.findings else [*parts, "nothing is wrong with it"])


def _block(finding: "Finding") -> str:
    where, what, next = (one_line(text, _LONGEST) for text in (finding.where, finding.what, finding.next))
    lines = [f"{finding.severity:<8} {finding.check}  {where}", *textwrap.wrap(what, 108)]
    return "\n         ".join([*lines, f"→ {next}"])
