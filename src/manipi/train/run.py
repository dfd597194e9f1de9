"""The folder of a run: what it holds, whose it is, and where it goes on.

    runs/NAME/
    ├─ config.json       the complete TrainConfig; another one in the same folder is refused
    ├─ metrics.jsonl     one line per logged step
    ├─ loss.png
    └─ checkpoints/STEP/ see manipi.checkpoints.native
"""

import json
import shutil
from pathlib import Path
from typing import Any

from manipi.checkpoints.native import verify
from manipi.errors import CheckpointError, TrainingError
from manipi.records import read_json, to_json
from manipi.storage import atomic_write
from manipi.train.config import TrainConfig


class Run:
    """One run's folder.

    Raises:
        TrainingError: the folder belongs to a run with other settings; the message lists them.
    """

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder, self.config = Path(folder), config
        self.checkpoints = self.folder / "checkpoints"
        self.metrics = self.folder / "metrics.jsonl"
        stored = self.folder / "config.json"
        if stored.exists():
            _refuse_other(read_json(stored), to_json(config), stored)
        else:
            text = json.dumps(to_json(config), indent=2, ensure_ascii=False)
            atomic_write(stored, text.encode())

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return sorted(int(p.name) for p in found if p.name.isdigit())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / str(step)

    def newest(self) -> int | None:
        """The newest checkpoint's step, verified. Raises CheckpointError naming it and the one before it."""
        steps = self.steps()
        if not steps:
            return None
        try:
            verify(self.checkpoint(steps[-1]))
        except CheckpointError as error:
            before = f"the one before it is step {steps[-2]}" if len(steps) > 1 else "there is none before it"
            raise CheckpointError(
                expected=f"a sound newest checkpoint (step {steps[-1]})",
                found=error.found,
                where=error.where,
                next=f"delete {self.checkpoint(steps[-1])} and run again; {before}",
            ) from error
        return steps[-1]

    def prune(self) -> None:
        """Delete all but the newest `keep_checkpoints`."""
        for step in self.steps()[: -self.config.keep_checkpoints]:
            shutil.rmtree(self.checkpoint(step))

    def log(self, record: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        return [json.loads(line) for line in lines]

    def forget_after(self, step: int) -> None:
        """Drop log lines of steps that a resumed run will do again (a killed run may also leave half a line)."""
        text = self.metrics.read_text(encoding="utf-8") if self.metrics.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        atomic_write(self.metrics, "".join(f"{line}\n" for line in kept).encode())


def _refuse_other(stored: Any, wanted: Any, where: Path) -> None:
    changes = list(_differences(stored, wanted))
    if changes:
        raise TrainingError(
            expected="the settings that this run folder was started with",
            found="; ".join(changes[:8]) + (" …" if len(changes) > 8 else ""),
            where=str(where),
            next="give the new run another folder (--run-dir), or use the old settings to go on with this one",
        )


def _differences(stored: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = sorted(set(stored) | set(wanted))
        return [d for k in keys for d in _differences(stored.get(k), wanted.get(k), f"{path}.{k}".strip("."))]
    return [] if stored == wanted else [f"{path} was {stored!r}, now {wanted!r}"]
