"""The folder of a run: what it holds, whose it is, and where it goes on.

runs/NAME/
├─ config.json       number of this layout, and the complete TrainConfig; another one in the same folder is refused
├─ norm_stats.json   of the training episodes
├─ videos.json       size and digest of the files that hold the pictures, of each dataset
├─ tokenizer/
├─ longest_prompt.json  of all the data, and which data they were
├─ cache/            decoded pictures, where they are kept
├─ first_batch/      pictures, tokens, values and pipeline of the first batch
├─ metrics.jsonl     one line per logged step
├─ parameters.txt    what is trained, by group
├─ tensorboard/      and wandb/, where asked for
├─ bad_batch_STEP.npz  the batch of a step whose loss or gradient was not finite
├─ loss.png
├─ validation.jsonl  one line per validation
├─ validation/       its details: STEP.json, STEP.png, STEP.trials/ of a suite, and curves.png over all steps
├─ best.json         step, number and path of the best checkpoint that there is
├─ best              a link to that checkpoint
└─ checkpoints/STEP/ see manipi.checkpoints.native
"""

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

from manipi.errors import CheckpointError, TrainingError, shown
from manipi.records import Change, dataclasses_in, from_json, json_bytes, may_change, read_object, to_json
from manipi.storage import Lock, atomic_write, remove_partial, storage_errors
from manipi.train.config import TrainConfig, ValidationConfig

FORMAT = 1
"""Number of the layout below, in config.json as `format`; manipi 0.1.0 wrote the same layout without a number."""

ADDED = {
    "ValidationConfig": {name: getattr(ValidationConfig(), name) for name in ("suite", "trials", "workers")},
    "DataConfig": {"language": []},
    "DatasetConfig": {"kind": "robot", "language": []},
}
"""By the type of settings, what runs of 0.1.0 do not have of them, as those runs were."""


class Run:
    """One run's folder.

    Raises:
        TrainingError: the folder belongs to a run with other settings; the message lists them.
    """

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder, self.config = Path(folder), config
        self.checkpoints = self.folder / "checkpoints"
        self.metrics, self.validations = self.folder / "metrics.jsonl", self.folder / "validation.jsonl"
        self.norm_stats, self.tokenizer = self.folder / "norm_stats.json", self.folder / "tokenizer"
        self._claim(self.folder / "config.json")

    def _claim(self, stored: Path) -> None:
        """Refuse a folder of another run; one that never got as far as a checkpoint has nothing to protect."""
        wanted, before = to_json(self.config), _read_settings(stored) if stored.exists() else None
        changes = [] if before is None else differences(before, wanted)
        marks = {setting: may_change(self.config, setting) for setting, _ in changes}
        other = [change for setting, change in changes if marks[setting] != Change.ANYTIME]
        if other and self.steps() == [0] and not {Change.STAYS, None} & set(marks.values()):
            self._drop(0)
        if other and self.steps():
            raise TrainingError(
                expected="the settings that this run folder was started with",
                found="; ".join(other[:8]) + (" …" if len(other) > 8 else ""),
                where=str(stored),
                next="give the new run another folder (--run-dir), or use the old settings to go on with this one",
            )
        if changes and not self.steps():
            self.norm_stats.unlink(missing_ok=True)
            shutil.rmtree(self.tokenizer, ignore_errors=True)
        if changes or before is None:
            atomic_write(stored, json_bytes({"format": FORMAT, **wanted}))

    def tidy(self) -> None:
        """Delete what a killed process left half-written. For the one process that trains here."""
        remove_partial(self.folder)
        remove_partial(self.checkpoints)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return checkpoint_steps(self.folder)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / str(step)

    def newest(self) -> int | None:
        """The newest checkpoint's step, verified. Raises CheckpointError naming it and the one before it."""
        newest = max(self.steps(), default=None)
        if newest is not None:
            self._require_sound(newest)
        return newest

    def rewind(self, step: int) -> None:
        """Delete the damaged checkpoints after that of `step`. Raises CheckpointError where one of them is sound."""
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(
                expected=f"one of this run's checkpoints: {', '.join(map(str, steps)) or 'there is none'}",
                found=str(step),
                where=str(self.checkpoints),
                next="leave --resume-from out: the newest is verified, and of a damaged one is said where to go on",
            )
        self._require_sound(step)
        later = steps[steps.index(step) + 1 :]
        for one in later:
            if not self._damage(one):
                raise CheckpointError(
                    expected="damaged checkpoints alone after that to resume from",
                    found=f"a sound one (step {one})",
                    where=str(self.checkpoint(one)),
                    next="leave --resume-from out to go on from the newest, or delete what you do not want",
                )
        for one in later:
            self._drop(one)

    def _damage(self, step: int) -> CheckpointError | None:
        from manipi.checkpoints.native import verify  # and with it all that a policy consists of

        try:
            verify(self.checkpoint(step))
        except CheckpointError as error:
            return error
        return None

    def _require_sound(self, step: int) -> None:
        if error := self._damage(step):
            before = [one for one in self.steps() if one < step]
            sound = next((one for one in reversed(before) if not self._damage(one)), None)
            raise CheckpointError(
                expected=f"a sound checkpoint of step {step}",
                found=error.found,
                where=error.where,
                next=f"there is no sound one before it: delete {self.checkpoints} and start again"
                if sound is None
                else f"--resume-from {sound} goes on from the newest sound one before it, and deletes those after",
            ) from error

    @property
    def best_by(self) -> str:
        """The number of a validation by which a checkpoint is the best one."""
        return "success" if self.config.validation.suite else self.config.validation.best_by

    def best(self) -> dict[str, Any] | None:
        """Of the validations whose step has a checkpoint, the one with the lowest `validation.best_by`.

        With a suite, the one with the highest success, and of equals the one with the lowest action error.
        """
        number, steps = self.best_by, self.steps()
        known = [r for r in read_log(self.validations) if r["step"] in steps and math.isfinite(r.get(number, math.nan))]

        def rank(record: dict[str, Any]) -> tuple[float, ...]:
            if number != "success":
                return (record[number],)
            error = record.get("action_error", math.inf)
            return (-record["success"], error if math.isfinite(error) else math.inf)

        return min(known, key=rank, default=None)

    def prune(self) -> None:
        """Delete all but the newest `keep_checkpoints`, those of every `keep_every`-th step, and the best one.

        A checkpoint between two saves, as SIGTERM leaves it, goes with the next and takes no other's place.
        """
        every, steps, best, number = self.config.keep_every, self.steps(), self.best(), self.best_by
        if best:
            path = self.checkpoint(best["step"]).relative_to(self.folder)
            described = {"step": best["step"], "by": number, "value": best[number], "path": str(path)}
            atomic_write(self.folder / "best.json", json_bytes(described))
            partial = self.folder / f".best.{os.getpid()}.partial"
            with storage_errors(self.folder / "best"):
                partial.unlink(missing_ok=True)
                partial.symlink_to(path, target_is_directory=True)
                partial.replace(self.folder / "best")
        planned = [step for step in steps if step % self.config.save_every == 0 or step == steps[-1]]
        for step in set(steps) - set(planned[-self.config.keep_checkpoints :]):
            protected = (step and every and step % every == 0) or (best and step == best["step"])
            if not protected:
                self._drop(step)

    def _drop(self, step: int) -> None:
        """Delete a checkpoint, which loses its name first: what is left by a kill is no checkpoint."""
        hidden = self.checkpoints / f".{step}.old.partial"
        self.checkpoint(step).rename(hidden)
        shutil.rmtree(hidden)

    def log(self, record: dict[str, Any]) -> None:
        append_log(self.metrics, record)

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_log(self.metrics)

    def forget_after(self, step: int) -> None:
        """Drop log lines of steps that a resumed run will do again, and what is no line.

        A killed run may leave half a line, and a machine that lost its power bytes of zero.
        """
        for path in (self.metrics, self.validations):
            if path.exists():
                lines = [line.strip(b"\0") for line in path.read_bytes().split(b"\n")[:-1]]
                records = [_record(line) for line in lines]
                kept = [line for line, record in zip(lines, records) if record and record["step"] <= step]
                atomic_write(path, b"".join(line + b"\n" for line in kept))
                if lost := records.count(None):
                    tqdm.write(f"{path}: dropped {lost} of {len(lines)} lines, which cannot be read")


def _record(line: bytes) -> dict[str, Any] | None:
    """A log line's record; None where it is none."""
    with suppress(ValueError):
        if isinstance(record := json.loads(line), dict) and isinstance(record.get("step"), int):
            return record
    return None


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of a run that have a checkpoint, ascending."""
    path = folder / "checkpoints"
    return sorted(int(p.name) for p in (path.iterdir() if path.is_dir() else ()) if p.name.isdigit())


def append_log(path: Path, record: dict[str, Any]) -> None:
    """One more line. Raises StorageError where it cannot be written."""
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records so far; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_config(folder: Path) -> TrainConfig:
    """The config that a run's folder was started with."""
    path = folder / "config.json"
    kinds = dataclasses_in(TrainConfig) - {TrainConfig}
    return from_json(_read_settings(path), (TrainConfig, *kinds), str(path))


def _read_settings(path: Path) -> dict[str, Any]:
    """A run's settings as JSON. Raises TrainingError where a later version of manipi wrote them."""
    stored = read_object(path)
    number = stored.pop("format", 0)
    if not isinstance(number, int) or number > FORMAT:
        raise TrainingError(
            expected=f"a run folder of format {FORMAT} or before, as this version of manipi writes and reads",
            found=f"format {shown(number)}, of a later one",
            where=str(path),
            next="upgrade manipi, or start a new run folder (--run-dir)",
        )
    return _completed(stored)


def _completed(stored: Any) -> Any:
    """With the settings that were added since, at any depth."""
    if isinstance(stored, list):
        return [_completed(one) for one in stored]
    if not isinstance(stored, dict):
        return stored
    added = ADDED.get(stored.get("type", ""), {}) if isinstance(stored.get("type", ""), str) else {}
    return {**added, **{key: _completed(value) for key, value in stored.items()}}


def differences(stored: Any, wanted: Any, path: str = "") -> list[tuple[str, str]]:
    """Each setting that differs, and how."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = sorted(set(stored) | set(wanted))
        return [d for k in keys for d in differences(stored.get(k), wanted.get(k), f"{path}.{k}".strip("."))]
    return [] if stored == wanted else [(path, f"{path} was {stored!r}, now {wanted!r}")]


# Who may write into a folder ------------------------------------------------------------------------------------------


@contextmanager
def alone(folder: Path) -> Iterator[Lock]:
    """Keep other trainers out of the folder. Gives the lock for the process that writes checkpoints there.

    Raises:
        TrainingError: another process trains here.
        StorageError: the folder cannot be written.
    """
    with ExitStack() as stack:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(closing(Lock(folder / ".trainer.lock", wait=False)))
            except BlockingIOError as error:
                raise TrainingError(
                    expected="a run folder in which no other process trains",
                    found="one that does",
                    where=str(folder),
                    next="wait for it or end it, or give the new run another folder (--run-dir)",
                ) from error
            try:
                writer = Lock(folder / ".writer.lock", wait=False)
            except BlockingIOError:
                tqdm.write("the trainer before this one was killed during a save; waiting for its checkpoint")
                writer = Lock(folder / ".writer.lock", wait=True)
        yield stack.enter_context(closing(writer))


# Signals that end a run early -----------------------------------------------------------------------------------------


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Within it they are only noted, each as often as it comes; in a thread other than the main one they are not.

    with StopSignals() as stop:
        … if stop.received: …
    """

    received: str = ""
    """The name of the last one."""

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()  # Python lets no other set handlers
        self._before = {number: signal.signal(number, self._note) for number in (SIGNALS if main else ())}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
