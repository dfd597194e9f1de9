"""What a check says."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from manipi.errors import DataError

CHECKS = ("metadata", "tables", "numbering", "timestamps", "values", "movement", "language", "pictures", "robot")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    severity: Literal["error", "warning"]
    check: str
    where: str
    """File, episode and frame."""
    what: str
    next: str
    episodes: tuple[int, ...] = ()
    """Numbers of the episodes concerned; none: the whole dataset."""
    frame: int | None = None
    """Of the first of them."""
    features: tuple[str, ...] = ()
    """What it is about, where that is some features alone; robots that name none of them are not concerned."""


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


def error(
    check: str,
    what: str,
    next: str,
    episodes: Sequence[int] = (),
    frame: int | None = None,
    where: str = "",
    features: Sequence[str] = (),
) -> Finding:
    return Finding(
        severity="error",
        check=check,
        where=where or place(episodes, frame),
        what=what,
        next=next,
        episodes=tuple(episodes),
        frame=frame,
        features=tuple(features),
    )


def warning(check: str, what: str, next: str, episodes: Sequence[int] = (), frame: int | None = None) -> Finding:
    return replace(error(check, what, next, episodes, frame), severity="warning")


def from_error(
    e: DataError, check: str, episodes: Sequence[int] = (), frame: int | None = None, features: Sequence[str] = ()
) -> Finding:
    return error(check, f"expected {e.expected}; found {e.found}", e.next, episodes, frame, e.where, features)


def place(episodes: Sequence[int], frame: int | None = None) -> str:
    """`episode 3, frame 17`; `episodes 1, 2, 5`; `all episodes`."""
    if not episodes:
        return "all episodes"
    shown = ", ".join(map(str, episodes[:8])) + (f" and {len(episodes) - 8} more" if len(episodes) > 8 else "")
    return f"episode{'s' if len(episodes) > 1 else ''} {shown}" + ("" if frame is None else f", frame {frame}")


def frames(count: int) -> str:
    return f"{count} frame{'s' if count > 1 else ''}"
