"""A check as one HTML page: what is wrong with its pictures, and every episode at a glance."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np

from manipi.data.dataset import Dataset
from manipi.data.open import open_dataset
from manipi.data.review.episodes import evenness
from manipi.data.review.report import CheckReport, EpisodeFacts, Finding
from manipi.errors import DataError
from manipi.page import fact_rows, percent, polyline, render, thumbnail
from manipi.storage import atomic_write

PICTURED, LISTED, PLACES = 40, 1_000, 12
"""Findings that get pictures, episodes in the table, and places that a finding names before it says how many more."""
CAMERAS, WIDTH = 3, 256
"""Pictures of a frame, and their width in pixels."""


def write_check_page(path: Path, report: CheckReport) -> None:
    """Raises StorageError where the file cannot be written."""
    atomic_write(path, render("manipi.data.review", "page_template.html", _fields(report)))


def _fields(report: CheckReport) -> dict[str, str]:
    errors, warnings = report.count("error"), report.count("warning")
    chosen = _worth_listing(report)
    return {
        "title": escape(Path(report.root).name),
        "summary": _summary(report),
        "rate": str(errors or warnings or "0"),
        "severity": "error" if errors else "warning" if warnings else "good",
        "counts": _verdict(errors, warnings),
        "findings": _findings(report) or "<p>Nothing.</p>",
        "facts": fact_rows(_facts(report)),
        "listed": f"{len(chosen):,} of {len(report.episodes):,}, those with findings first"
        if len(chosen) < len(report.episodes)
        else f"{len(chosen):,}",
        "episodes": "\n".join(_row(report, e) for e in chosen),
        "root": escape(report.root),
    }


def _verdict(errors: int, warnings: int) -> str:
    """What the number before it counts, and the rest."""
    if errors:
        return f"{_counted(errors, 'error').split()[1]}, {_counted(warnings, 'warning') if warnings else 'no warnings'}"
    return f"{_counted(warnings, 'warning').split()[1]}, no errors"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _summary(report: CheckReport) -> str:
    if not report.num_frames:
        return "The dataset cannot be opened."
    minutes = report.num_frames / report.fps / 60
    return (
        f"{_counted(report.num_episodes, 'episode')}, {report.num_frames:,} frames at {report.fps:g} per second "
        f"({minutes:,.1f} minutes), {_counted(len(report.cameras), 'camera')}: {escape(', '.join(report.cameras))}."
    ) + (f" Left out, because they record depth: {escape(', '.join(report.depth))}." if report.depth else "")


def _facts(report: CheckReport) -> list[tuple[str, str]]:
    tasks = report.tasks or {}
    facts = [("frames in pauses", percent(report.idle)), ("different instructions", f"{len(tasks):,}")]
    if len(tasks) > 1:
        facts.append(("as many as, used evenly", f"{evenness(tasks):.1f}"))
    facts += [(text or "(none)", _counted(count, "episode")) for text, count in list(tasks.items())[:PLACES]]
    return facts


# Findings -----------------------------------------------------------------------------------------------------------


def _findings(report: CheckReport) -> str:
    """Errors first; what is the same in several places is said once."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in report.sorted():
        groups.setdefault((finding.severity, finding.check, finding.what), []).append(finding)
    return "\n".join(_finding(report, group, pictured=i < PICTURED) for i, group in enumerate(groups.values()))


def _finding(report: CheckReport, group: Sequence[Finding], *, pictured: bool) -> str:
    first = group[0]
    places = [escape(f.where) for f in group[:PLACES]]
    places += [f"and {len(group) - PLACES} more"] if len(group) > PLACES else []
    thumbs = "".join(_thumbs(Path(report.root), first)) if pictured else ""
    return f"""<article class="finding"><div>
<p><span class="tag {first.severity}">{first.severity}</span> <span class="note">{first.check}</span></p>
<p><b>{"<br>".join(places)}</b></p><p>{escape(first.what)}</p><p class="note next">{escape(first.next)}</p>
</div><div class="thumbs">{thumbs}</div></article>"""


def _thumbs(root: Path, finding: Finding) -> Iterator[str]:
    """The frame of a finding; of two episodes that are alike, the middle of both."""
    if finding.frame is None and finding.check != "movement":
        return
    for number in finding.episodes[:2]:
        dataset = _open(root, number)
        if dataset is None or not dataset.episodes[0].length:
            continue
        frame = dataset.episodes[0].length // 2 if finding.frame is None else finding.frame
        for camera in dataset.cameras[:CAMERAS]:
            caption = f"episode {number}, frame {frame}"
            yield f"<figure>{_picture(dataset, camera, frame)}<figcaption>{caption}</figcaption></figure>"


@lru_cache(maxsize=8)
def _open(root: Path, number: int) -> Dataset | None:
    try:
        return open_dataset(root, episodes=(number,))
    except DataError:
        return None  # the finding itself says so


def _picture(dataset: Dataset, camera: str, frame: int) -> str:
    try:
        image = dataset.images(camera, np.array([frame]))[0]
    except DataError:
        return '<span class="none">no picture</span>'
    return f'<img alt="{escape(camera)}" src="{thumbnail(image, WIDTH)}">'


# Episodes -----------------------------------------------------------------------------------------------------------


def _worth_listing(report: CheckReport) -> list[EpisodeFacts]:
    """All, or as many as a page can bear, those with findings first; in the order of their numbers."""
    concerned = {number for f in report.findings for number in f.episodes}
    chosen = sorted(report.episodes, key=lambda e: (e.index not in concerned, e.index))[:LISTED]
    return sorted(chosen, key=lambda e: e.index)


def _row(report: CheckReport, e: EpisodeFacts) -> str:
    found = [f for f in report.findings if e.index in f.episodes]
    marks = " ".join(sorted({f'<span class="{f.severity}">{f.check}</span>' for f in found}))
    curve = np.array([0.0, *e.motion, 0.0])
    area = polyline(curve, 0, 1, "area")
    return f"""<tr><th scope="row">{e.index}</th><td>{e.length:,}</td><td>{e.length / report.fps:.1f} s</td>
<td>{percent(e.idle)} <span class="meter"><i style="width:{100 * e.idle:.0f}%"></i></span></td><td>{e.jerk:.2%}</td>
<td><svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label="speed">{area}</svg></td>
<td class="text">{escape(e.task)}</td><td class="text">{marks}</td></tr>"""
