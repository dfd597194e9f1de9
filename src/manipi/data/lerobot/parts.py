"""Encoded episodes that wait beside a dataset until all of them are there, and are then put together.

    .TARGET.parts/
    ├─ lock                  one process at a time
    ├─ recording.json        what was begun; of a conversion `conversion.json`
    ├─ episode-000042/       as `EpisodeEncoder` wrote it; it has its name when it is complete and on the disk
    ├─ dataset/              all of them, one behind the other
    └─ finished.json         says that `dataset` is whole; it then takes the name TARGET, and the parts vanish

A process that is killed loses the episode that it was encoding. At whatever moment that is, the next process finds
either the episodes or the whole dataset, and goes on.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from manipi.data.lerobot.episode import EpisodeEncoder
from manipi.data.lerobot.writer import LeRobotWriter
from manipi.errors import ConfigError, quoted
from manipi.records import json_bytes, read_json
from manipi.storage import atomic_write, name_for_good, remove_partial, require_absent, storage_errors

_BEGUN = {
    "recording": ("recording.json", "manipi record --finish {}"),
    "conversion": ("conversion.json", "repeat the manipi convert command that was begun to {}"),
}
"""By what makes the episodes: the file that says what was begun, and how to finish it."""


def how_to_finish(target: Path) -> str | None:
    """What to run where the episodes of a dataset wait beside it; None where none do."""
    target = target.expanduser().absolute()
    for activity, (_, command) in _BEGUN.items():
        parts = Parts(target, activity)
        if parts.begun.exists() and (parts.finished or parts.episodes()):
            return command.format(quoted(target))
    return None


class Parts:
    """The episodes of a dataset in the making.

    Args:
        target: the folder of the dataset, which does not exist yet.
        activity: what makes them: "conversion", "recording".
    """

    def __init__(self, target: Path, activity: str):
        self.target, self._activity = target.expanduser().absolute(), activity
        self.folder = self.target.with_name(f".{self.target.name}.parts")
        self._dataset, self._finished = self.folder / "dataset", self.folder / "finished.json"
        self.begun = self.folder / _BEGUN[activity][0]

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The parts, for this process alone; what a killed one left half-written is gone.

        Raises:
            ConfigError: another process is at work there.
            StorageError: the folder cannot be written.
        """
        lock = FileLock(self.folder / "lock", timeout=0)
        try:
            with storage_errors(self.target):
                self.folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                remove_partial(self.folder)
                remove_partial(self.target.parent, self.target.name)
        except Timeout:
            raise ConfigError(
                expected=f"one {self._activity} at a time to a folder",
                found="another one that is going on",
                where=str(self.target),
                next="wait for it, or choose another folder",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def episode(self, number: int) -> Path:
        """The folder of an episode, there or not."""
        return self.folder / f"episode-{number:06d}"

    def episodes(self) -> list[Path]:
        """The folders of those that are there, in order."""
        return sorted(self.folder.glob("episode-*"))

    def require_own(self) -> None:
        """Raises ConfigError where the episodes that are there were not begun by this activity."""
        if (self.finished or self.episodes()) and not self.begun.exists():
            first = how_to_finish(self.target)
            raise ConfigError(
                expected=f"no episodes there but those of a {self._activity}",
                found=f"others, without {self.begun.name}",
                where=str(self.folder),
                next="choose another folder" + (f", or first: {first}" if first else ""),
            )

    @property
    def finished(self) -> bool:
        """Whether all that is left to do is `settle`."""
        return self._finished.exists()

    def finish(
        self,
        folders: Sequence[Path],
        encoder: EpisodeEncoder,
        robot_type: str,
        report: Mapping[str, Any],
        *,
        files: Mapping[str, bytes] | None = None,
        show: bool,
    ) -> dict[str, Any]:
        """Put the dataset together and give it its name; the parts vanish.

        Args:
            report: what `settle` is to return, beside `num_episodes` and `num_frames`.
            files: content of further files by their path in the dataset.

        Raises:
            StorageError: the disk is full, or something has the target's name; the episodes stay.
            DatasetFormatError: an episode's files are damaged.
        """
        shutil.rmtree(self._dataset, ignore_errors=True)  # one of which it is not known whether it is whole
        settings = {"features": encoder.features, "fps": encoder.fps, "pix_fmt": encoder.pix_fmt, "crf": encoder.crf}
        with LeRobotWriter(self._dataset, robot_type=robot_type, **settings) as writer:
            for folder in tqdm(folders, desc="assemble", unit="episode", disable=not show):
                writer.add_encoded(folder)
            for path, content in (files or {}).items():
                writer.add_file(path, content)
        counts = {"num_episodes": writer.num_episodes, "num_frames": writer.num_frames}
        atomic_write(self._finished, json_bytes({**report, **counts}))
        return self.settle()

    def settle(self) -> dict[str, Any]:
        """Do what is left after `finished`; returns the report of `finish`, whichever process called it."""
        report = read_json(self._finished)
        if self._dataset.exists():
            require_absent(self.target)
            with storage_errors(self.target):
                name_for_good(self._dataset, self.target)
        self.remove()
        return report

    def remove(self) -> None:
        """Delete the parts: last what says whose they are, so that a kill leaves nothing to be taken for others'."""
        for path in self.episodes():
            shutil.rmtree(path)
        self._finished.unlink(missing_ok=True)
        shutil.rmtree(self.folder)
