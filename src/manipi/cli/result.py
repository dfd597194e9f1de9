"""What a command found, for people on the screen and for programs in a file."""

import json
from pathlib import Path
from typing import Any

from manipi.errors import one_line
from manipi.records import to_json
from manipi.storage import atomic_write

_CELL = 1000
"""Characters of a cell."""


def write_result(result: Any, path: Path | None) -> None:
    """Write `result` as JSON to `path`, when `--json` named one."""
    if path is not None:
        text = json.dumps(to_json(result), indent=2, ensure_ascii=False)
        atomic_write(path, f"{text}\n".encode())


def said_device(wanted: str) -> str:
    """The device that `--device` stands for, which is said where it was left to us."""
    from manipi.model.device import choose_device

    device = choose_device(wanted)
    if wanted == "auto":
        print(f"device  {device}", flush=True)
    return device


def table(rows: list[tuple[Any, ...]], header: tuple[str, ...] | None = None) -> str:
    """Columns aligned: text to the left, numbers to the right. A row is one line, whatever is not printable in it."""
    shown = [tuple(f"{v:.4g}" if isinstance(v, float) else one_line(str(v), _CELL) for v in row) for row in rows]
    everything = [header, *shown] if header else shown
    widths = [max(len(row[i]) for row in everything) for i in range(len(everything[0]))] if everything else []
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(widths))]
    return "\n".join(
        "  ".join(cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(row, widths, numeric)).rstrip()
        for row in everything
    )
