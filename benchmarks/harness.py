"""What every benchmark shares: a table for people, and as the last line one JSON object for programs."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure with its goal; `at_most` says on which side of the goal it has to be."""

    name: str
    value: float
    unit: str
    goal: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def report(measures: list[Measure]) -> None:
    """Print the table and the JSON line; exit 1 where a goal is missed."""
    width = max(len(m.name) for m in measures)
    for m in measures:
        goal = f"goal {'≤' if m.at_most else '≥'} {m.goal:g}"
        print(f"{m.name:<{width}}  {m.value:10.4g} {m.unit:<8} {goal}   {'holds' if m.holds else 'MISSED'}")
    row = {m.name: {"value": m.value, "unit": m.unit, "goal": m.goal, "holds": m.holds} for m in measures}
    print(json.dumps(row))
    sys.exit(not all(m.holds for m in measures))


def memory_mb(pid: int | None) -> float:
    """Resident memory of a process, in MiB (Linux)."""
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) / 1024
