"""What a check of a dataset found, and its page: the pictures concerned, and every episode at a glance."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from manipi.data.dataset import Dataset
from manipi.data.open import open_dataset
from manipi.errors import DataError
from manipi.page import counted, percent, polyline, render, thumbnail
from manipi.storage import atomic_write

PICTURED, LISTED, PLACES = 40, 1_000, 12
"""Findings that get pictures, episodes in the table, and places that a finding names before it says how many more."""
CAMERAS, WIDTH = 3, 256
"""Pictures of a frame, and their width in pixels."""

CHECKS = ("metadata", "tables", "numbering", "timestamps", "values", "movement", "language", "pictures", "robot")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    severity: Literal["error", "warning"]
    check: str
    where: str = field(default="", kw_only=True)
    """File, episode and frame; if it is not said, the last two."""
    what: str
    next: str
    episodes: Sequence[int] = ()
    """Numbers of the episodes concerned; none: the whole dataset."""
    frame: int | None = None
    """Of the first of them."""
    features: Sequence[str] = ()
    """What it is about, where that is some features alone; robots that name none of them are not concerned."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", self.where or place(self.episodes, self.frame))
        object.__setattr__(self, "episodes", tuple(self.episodes))
        object.__setattr__(self, "features", tuple(self.features))


error, warning = partial(Finding, "error"), partial(Finding, "warning")


@dataclass(frozen=True, kw_only=True)
class EpisodeFacts:
    """One episode at a glance."""

    index: int
    length: int
    task: str
    idle: float
    """Share of its frames that belong to a pause, as `idle_frames` has it."""
    jerk: float
    """Median third difference of state and actions, as a share of each dimension's range; mean over dimensions."""
    motion: tuple[float, ...]
    """Speed over the episode, from 0 to 1, the highest of the dataset."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was read, and what was found in it."""

    root: str
    num_episodes: int = 0
    num_frames: int = 0
    fps: float = 0.0
    cameras: tuple[str, ...] = ()
    depth: tuple[str, ...] = ()
    """Cameras that record depth, which are no pictures of colours and left out."""
    findings: tuple[Finding, ...] = ()
    episodes: tuple[EpisodeFacts, ...] = ()
    """Those whose tables can be read."""
    tasks: Mapping[str, int] | None = None
    """Episodes per instruction, the most used first."""

    def count(self, severity: str, check: str | None = None) -> int:
        return sum(f.severity == severity and check in (None, f.check) for f in self.findings)

    @property
    def idle(self) -> float:
        """Share of all frames that belong to a pause."""
        return sum(e.idle * e.length for e in self.episodes) / max(sum(e.length for e in self.episodes), 1)

    def sorted(self) -> Iterator[Finding]:
        """Errors first, then by kind."""
        return iter(sorted(self.findings, key=lambda f: (f.severity, CHECKS.index(f.check))))


def from_error(
    e: DataError, check: str, episodes: Sequence[int] = (), frame: int | None = None, features: Sequence[str] = ()
) -> Finding:
    return error(check, f"expected {e.expected}; found {e.found}", e.next, episodes, frame, features, where=e.where)


def place(episodes: Sequence[int], frame: int | None = None) -> str:
    """`episode 3, frame 17`; `episodes 1, 2, 5`; `all episodes`."""
    if not episodes:
        return "all episodes"
    shown = ", ".join(map(str, episodes[:8])) + (f" and {len(episodes) - 8} more" if len(episodes) > 8 else "")
    return f"episode{'s' if len(episodes) > 1 else ''} {shown}" + ("" if frame is None else f", frame {frame}")


def frames(count: int) -> str:
    return f"{count} frame{'s' if count > 1 else ''}"


# The page -----------------------------------------------------------------------------------------------------------


def write_check_page(path: Path, report: CheckReport) -> None:
    """One HTML file. Raises StorageError where it cannot be written."""
    concerned = {number for finding in report.findings for number in finding.episodes}
    listed = sorted(report.episodes, key=lambda e: (e.index not in concerned, e.index))[:LISTED]
    tasks = report.tasks or {}
    facts = [("frames in pauses", percent(report.idle)), ("different instructions", f"{len(tasks):,}")]
    if len(tasks) > 1:
        # How many instructions, all used equally, would be as hard to guess: exp of the entropy.
        shares = [count / sum(tasks.values()) for count in tasks.values()]
        facts.append(("as many as, used evenly", f"{math.exp(-sum(p * math.log(p) for p in shares)):.1f}"))
    facts += [(text or "(none)", counted(count, "episode")) for text, count in list(tasks.items())[:PLACES]]
    page = render(
        "data/review/check.html",
        title=Path(report.root).name,
        report=report,
        errors=report.count("error"),
        warnings=report.count("warning"),
        findings=_groups(report),
        facts=facts,
        episodes=[
            {
                "facts": e,
                "speed": polyline(np.array([0.0, *e.motion, 0.0]), 0, 1),
                "marks": sorted({(f.severity, f.check) for f in report.findings if e.index in f.episodes}),
            }
            for e in sorted(listed, key=lambda e: e.index)
        ],
    )
    atomic_write(path, page)


def _groups(report: CheckReport) -> Iterator[dict[str, Any]]:
    """Findings, errors first; what is the same in several places is one, with its places and pictures."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in report.sorted():
        groups.setdefault((finding.severity, finding.check, finding.what), []).append(finding)
    for i, group in enumerate(groups.values()):
        places = [finding.where for finding in group[:PLACES]]
        places += [f"and {len(group) - PLACES} more"] if len(group) > PLACES else []
        thumbs = list(_thumbs(Path(report.root), group[0])) if i < PICTURED else []
        yield {"first": group[0], "places": places, "thumbs": thumbs}


def _thumbs(root: Path, finding: Finding) -> Iterator[dict[str, Any]]:
    """Pictures of the frame of a finding; of two episodes that are alike, of the middle of both."""
    if finding.frame is None and finding.check != "movement":
        return
    for number in finding.episodes[:2]:
        dataset = _open(root, number)
        if dataset is None or not dataset.episodes[0].length:
            continue
        frame = dataset.episodes[0].length // 2 if finding.frame is None else finding.frame
        for camera in dataset.cameras[:CAMERAS]:
            try:
                image = thumbnail(dataset.images(camera, np.array([frame]))[0], WIDTH)
            except DataError:
                image = None  # shown as a picture that is missing
            yield {"camera": camera, "image": image, "episode": number, "frame": frame}


@lru_cache(maxsize=8)
def _open(root: Path, number: int) -> Dataset | None:
    try:
        return open_dataset(root, episodes=(number,))
    except DataError:
        return None  # the finding itself says so
