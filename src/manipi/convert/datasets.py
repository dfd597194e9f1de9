"""Whatever `open_dataset` opens, read to be converted: LeRobot and RLDS."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from manipi.convert.formats import Blocks, EpisodeReader, RecordedEpisode, remark, vector
from manipi.data.dataset import Dataset
from manipi.data.open import open_dataset
from manipi.data.review.values import uneven_timestamps
from manipi.errors import shown

_NUMBERING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""What the writer numbers anew."""


class DatasetReader(EpisodeReader):
    """The episodes of a `Dataset`, with their vectors, pictures and, frame by frame, tasks. Texts are not kept."""

    def __init__(self, root: Path):
        super().__init__(root)
        self._dataset = dataset = open_dataset(root)
        self.fps = dataset.fps
        self._episodes = {str(episode.index): episode for episode in dataset.episodes}
        self.names = list(self._episodes)
        self._vectors = [k for k, f in dataset.features.items() if f.kind == "vector" and k not in _NUMBERING]
        self.dimension_names = {key: dataset.features[key].names for key in self._vectors}

    def remarks(self, fps: float) -> Mapping[str, str]:
        """That gaps and another rate are no longer seen afterwards."""
        if "timestamp" not in self._dataset.features:
            return {}
        seconds = self._dataset.column("timestamp")[:, 0]
        uneven = [
            e.index
            for e in self._dataset.episodes
            if any(uneven_timestamps(e.index, seconds[e.start : e.start + e.length], fps))
        ]
        found = f"not 1/{fps:g} s apart in episodes {shown(uneven, 80)}, and written as if they were: gaps close up"
        return {"timestamp": f"{found}; if their rate is another one, give it with --fps"} if uneven else {}

    @contextmanager
    def open(self, name: str) -> Iterator[RecordedEpisode]:
        dataset, episode = self._dataset, self._episodes[name]
        rows = range(episode.start, episode.start + episode.length)

        def read(camera: str, start: int, stop: int) -> np.ndarray:
            return dataset.images(camera, np.arange(start, stop))

        yield RecordedEpisode(
            columns=_Columns(dataset, self._vectors, rows),
            pictures={c: Blocks(partial(read, c), rows.start, rows.stop) for c in dataset.cameras},
            task=[dataset.prompt(row) for row in rows],
            remarks={k: remark(f.kind, (), np.dtype("u1")) for k, f in dataset.features.items() if f.kind == "depth"},
        )


class LeRobotReader(DatasetReader):
    """LeRobot v2.0, v2.1 and v3.0."""

    layout = "meta/info.json, tables and videos of LeRobot v2 or v3"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return (root / "meta/info.json").is_file()


class RldsReader(DatasetReader):
    """RLDS, with the map of fields beside its files or that of its name (`find_fields`)."""

    layout = "features.json and record files of TFDS"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return any(root.glob("features.json")) or any(root.glob("*/features.json"))


@dataclass(frozen=True)
class _Columns(Mapping[str, np.ndarray]):
    """The vectors of an episode, each read when it is asked for: one that is left out may be missing."""

    dataset: Dataset
    names: list[str]
    rows: range

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.names:
            raise KeyError(key)
        return vector(self.dataset.column(key)[self.rows.start : self.rows.stop])

    def __contains__(self, key: object) -> bool:
        return key in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
