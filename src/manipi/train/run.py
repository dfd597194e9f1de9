"""The folder of a run: what it holds, whose it is, and where it goes on.

runs/NAME/
├─ config.json       the complete TrainConfig; another one in the same folder is refused
├─ norm_stats.json   of the training episodes
├─ tokenizer/
├─ cache/            decoded pictures, where they are kept
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
from manipi.model.config import CONFIG_TYPES
from manipi.records import from_json, json_bytes, read_json, to_json
from manipi.robots.robot import ROBOT_TYPES
from manipi.storage import atomic_write, remove_partial, storage_errors
from manipi.train.config import (
    AugmentConfig,
    DataConfig,
    DatasetConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)

MAY_CHANGE = (
    "data.cache_fill",
    "data.cache_gb",
    "data.num_workers",
    "data.path",
    "data.root",
    "keep_checkpoints",
    "keep_every",
    "num_threads",
    "steps",
    "validation.batch_size",
    "validation.best_by",
    "validation.every",
    "validation.raw",
    "validation.samples",
)
"""Settings that a resumed run may bring anew: they change neither a batch nor an update. That another path holds the
same data, the norm stats' fingerprint says."""


class Run:
    """One run's folder.

    Raises:
        TrainingError: the folder belongs to a run with other settings; the message lists them.
    """

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder, self.config = Path(folder), config
        self.checkpoints = self.folder / "checkpoints"
        self.metrics = self.folder / "metrics.jsonl"
        self.norm_stats, self.tokenizer = self.folder / "norm_stats.json", self.folder / "tokenizer"
        self._claim(self.folder / "config.json")

    def _claim(self, stored: Path) -> None:
        """Refuse a folder of another run; one that never got as far as a checkpoint has nothing to protect."""
        wanted = to_json(self.config)
        changes = _differences(read_json(stored), wanted) if stored.exists() else []
        other = [change for setting, change in changes if setting not in MAY_CHANGE]
        if other and self.steps():
            raise _another_run(other, stored)
        if changes and not self.steps():
            self.norm_stats.unlink(missing_ok=True)
            shutil.rmtree(self.tokenizer, ignore_errors=True)
        if changes or not stored.exists():
            atomic_write(stored, json_bytes(wanted))

    def tidy(self) -> None:
        """Delete what a killed process left half-written. For the one process that trains here."""
        remove_partial(self.folder)
        remove_partial(self.checkpoints)

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
        """Delete all but the newest `keep_checkpoints` and those of every `keep_every`-th step."""
        every = self.config.keep_every
        for step in self.steps()[: -self.config.keep_checkpoints]:
            if step == 0 or not every or step % every:
                shutil.rmtree(self.checkpoint(step))

    def log(self, record: dict[str, Any]) -> None:
        with storage_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
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


def read_config(folder: Path) -> TrainConfig:
    """The config that a run's folder was started with."""
    path = folder / "config.json"
    settings = (TrainConfig, DataConfig, DatasetConfig, OptimizerConfig, ValidationConfig, AugmentConfig)
    return from_json(read_json(path), (*settings, *ROBOT_TYPES, *CONFIG_TYPES), str(path))


def _another_run(changes: list[str], where: Path) -> TrainingError:
    return TrainingError(
        expected="the settings that this run folder was started with",
        found="; ".join(changes[:8]) + (" …" if len(changes) > 8 else ""),
        where=str(where),
        next="give the new run another folder (--run-dir), or use the old settings to go on with this one",
    )


def _differences(stored: Any, wanted: Any, path: str = "") -> list[tuple[str, str]]:
    """Each setting that differs, and how."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = sorted(set(stored) | set(wanted))
        return [d for k in keys for d in _differences(stored.get(k), wanted.get(k), f"{path}.{k}".strip("."))]
    return [] if stored == wanted else [(path, f"{path} was {stored!r}, now {wanted!r}")]
