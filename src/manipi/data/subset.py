"""Some episodes of a dataset as a dataset of their own: to leave bad episodes out, or to begin with a few."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from manipi.data.dataset import Dataset, PromptSource
from manipi.errors import ConfigError, quoted
from manipi.records import fingerprint


class EpisodeSubset(Dataset):
    """The chosen episodes, in the order given, with rows numbered anew; nothing is read of the others' pictures.

        dataset   episode 0 1 1 1 2 2        EpisodeSubset(dataset, [2, 0])   episode 2 2 0
                  row     0 1 2 3 4 5                                         row     0 1 2

    Raises:
        ConfigError: the dataset has no episode of that number, or one is named twice.
    """

    def __init__(self, dataset: Dataset, numbers: Sequence[int]):
        self._dataset, self._numbers = dataset, tuple(numbers)
        by_number = {episode.index: episode for episode in dataset.episodes}
        require_episodes(by_number, numbers, dataset.root)
        chosen = [by_number[number] for number in numbers]
        self._rows = np.concatenate([np.arange(e.start, e.start + e.length) for e in chosen])
        starts = np.cumsum([0, *(e.length for e in chosen)]).tolist()
        episodes = [replace(e, start=start) for e, start in zip(chosen, starts, strict=False)]
        super().__init__(
            root=dataset.root, name=dataset.name, fps=dataset.fps, features=dataset.features, episodes=episodes
        )

    def __reduce__(self) -> tuple:
        return EpisodeSubset, (self._dataset, self._numbers)

    def prompt(self, row: int) -> str:
        return self._dataset.prompt(int(self._rows[row]))

    def subtask(self, row: int) -> str:
        return self._dataset.subtask(int(self._rows[row]))

    def instructions(self, source: PromptSource) -> tuple[list[str], np.ndarray]:
        texts, numbers = self._dataset.instructions(source)
        return texts, numbers[self._rows]

    def place(self, row: int) -> str:
        return self._dataset.place(int(self._rows[row]))

    def _fingerprint(self) -> str:
        return fingerprint([self._dataset.fingerprint, self._numbers])

    def picture_files(self, cameras: Sequence[str]) -> dict[str, str]:
        return self._dataset.picture_files(cameras)

    def _read_column(self, key: str) -> np.ndarray:
        return self._dataset.column(key)[self._rows]

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        return self._dataset.images(camera, self._rows[rows])


def require_episodes(known: Collection[int], numbers: Sequence[int], root: Path) -> None:
    """Raises ConfigError where a dataset has no episode of a number, or one is named twice."""
    unknown = [number for number in numbers if number not in known]
    if unknown or len(set(numbers)) < len(numbers):
        raise ConfigError(
            expected=f"each episode once, from {min(known)} to {max(known)}",
            found=f"unknown {unknown}" if unknown else f"{list(numbers)}",
            where=f"--data.episodes of {root}",
            next=f"manipi inspect {quoted(root)}  # lists the episodes",
        )
