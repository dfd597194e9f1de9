"""One episode of LeRobot v3.0, encoded into a folder of its own: what processes make side by side, and
`LeRobotWriter` then puts together without encoding anything again.

    FOLDER/
    ├─ columns.npz       vectors [T, d], and the position of each frame's task in `tasks`
    ├─ CAMERA.mp4        one file per camera; every one begins with a keyframe
    └─ episode.json      length, tasks, statistics
"""

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from manipi.data.dataset import Feature
from manipi.data.lerobot.stats import EpisodeStats, chosen_pictures, image_stats, vector_stats
from manipi.data.lerobot.video import VideoWriter
from manipi.errors import BadValueError, ConfigError, DatasetFormatError, MissingFeatureError, quoted, shown

Pictures: TypeAlias = UInt8[np.ndarray, "T h w 3"] | Iterable[UInt8[np.ndarray, "n h w 3"]]
"""The pictures of an episode at once, or block by block."""


@dataclass(frozen=True, kw_only=True)
class EpisodeEncoder:
    """How the episodes of one dataset are encoded.

    Args:
        features: pictures (uint8 [h, w, 3], stored as video) and vectors (float32 or int64 [d]) by key.
        pix_fmt, crf: how pictures are encoded, see `VideoWriter`.

    Raises:
        ConfigError: features of another shape, or no vector among them.
    """

    features: Mapping[str, Feature]
    fps: int
    pix_fmt: str = "yuv420p"
    crf: int = 23

    def __post_init__(self) -> None:
        kinds = {key: (feature.kind, len(feature.shape)) for key, feature in self.features.items()}
        bad = [key for key, kind in kinds.items() if kind not in (("image", 3), ("vector", 1))]
        bad += [key for key in self.cameras if key not in bad and self.features[key].shape[2] != 3]
        if bad or len(self.cameras) == len(self.features):
            feature = self.features[bad[0]] if bad else None
            raise ConfigError(
                expected="pictures of shape (h, w, 3) and vectors of shape (d,), one vector at least",
                found=f"{feature.kind} of shape {feature.shape}" if feature else "no vector",
                where=f"feature {bad[0]!r}" if bad else "features",
                next="reshape the feature, or leave it out",
            )

    @property
    def cameras(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature.kind == "image"]

    def encode(
        self, folder: Path, data: Mapping[str, np.ndarray | Pictures], task: str | Sequence[str], where: str
    ) -> None:
        """Write one episode into an existing folder.

        Args:
            data: per vector the values of all T frames, [T, d]; per camera its pictures, which are read in order.
            task: the instruction, or one per frame.
            where: names the episode in errors.

        Raises:
            MissingFeatureError: a feature without values, or values without a feature.
            ConfigError: no frames, or a shape, type or number of frames that differs from the others'.
            BadValueError: NaN or infinity.
        """
        columns, length = self._check_columns(data, where)
        tasks = [task] * length if isinstance(task, str) else list(task)
        if len(tasks) != length:
            raise _differs(f"one task, or one per frame: {length}", f"{len(tasks)} tasks", where)
        texts = list(dict.fromkeys(tasks))
        stats = {}
        for key in self.cameras:
            pictures = data[key]
            blocks = [pictures] if isinstance(pictures, np.ndarray) else pictures
            stats[key] = self._encode_video(video_file(folder, key), key, blocks, length, where)
        stats |= vector_stats(columns)
        np.savez(
            _columns_file(folder), allow_pickle=False, task_index=np.array([texts.index(t) for t in tasks]), **columns
        )
        plain = {key: {name: values.tolist() for name, values in part.items()} for key, part in stats.items()}
        (folder / "episode.json").write_text(json.dumps({"length": length, "tasks": texts, "stats": plain}))

    def _check_columns(self, data: Mapping[str, object], where: str) -> tuple[dict[str, np.ndarray], int]:
        if data.keys() != self.features.keys():
            raise MissingFeatureError(
                expected=f"values for {', '.join(sorted(self.features))}",
                found=", ".join(sorted(data)),
                where=where,
                next="give one array per feature of the dataset; all its episodes have the same",
            )
        columns = {key: np.asarray(data[key]) for key, feature in self.features.items() if feature.kind == "vector"}
        length = max(len(values) for values in columns.values())
        for key, values in columns.items():
            feature = self.features[key]
            castable = np.can_cast(values.dtype, np.dtype(feature.dtype), "same_kind")
            if values.shape != (length, *feature.shape) or not length or not castable:
                raise self._wrong(key, f"{values.dtype} of shape {values.shape}", length, where)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                frame = int(np.argwhere(~np.isfinite(values))[0, 0])
                raise BadValueError(
                    expected=f"finite numbers in {key!r}",
                    found="NaN or infinity",
                    where=f"{where}, frame {frame}",
                    next="repair the recording, or leave this episode out",
                )
        return {key: values.astype(self.features[key].dtype) for key, values in columns.items()}, length

    def _encode_video(
        self, path: Path, key: str, blocks: Iterable[np.ndarray], length: int, where: str
    ) -> EpisodeStats:
        height, width, _ = shape = self.features[key].shape
        wanted, chosen = set(chosen_pictures(length)), []
        video = VideoWriter(path, fps=self.fps, height=height, width=width, pix_fmt=self.pix_fmt, crf=self.crf)
        try:
            for block in blocks:
                if block.dtype != np.uint8 or block.shape[1:] != shape:
                    raise self._wrong(key, f"{block.dtype} of shape {block.shape}", length, where)
                first = video.num_frames
                chosen += [image.copy() for i, image in enumerate(block, start=first) if i in wanted]
                video.add(block)
        finally:
            video.close()
        if video.num_frames != length:
            raise self._wrong(key, f"{video.num_frames} pictures", length, where)
        return image_stats(np.stack(chosen))

    def _wrong(self, key: str, found: str, length: int, where: str) -> ConfigError:
        feature = self.features[key]
        return _differs(f"{key!r} as {feature.dtype} of shape {(length or 'T', *feature.shape)}", found, where)


def _differs(expected: str, found: str, where: str) -> ConfigError:
    next = "give every feature the same number of frames, at least one, in its own shape and type"
    return ConfigError(expected=expected, found=found, where=where, next=next)


@dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """What `EpisodeEncoder.encode` wrote."""

    folder: Path
    length: int
    tasks: list[str]
    columns: dict[str, np.ndarray]
    task_index_T: np.ndarray
    """Positions in `tasks`."""
    stats: dict[str, EpisodeStats]


def read_episode(folder: Path) -> EncodedEpisode:
    """The episode in `folder`; its videos stay where they are. Raises DatasetFormatError where a file is damaged."""
    with encoded_errors(folder):
        record = json.loads((folder / "episode.json").read_text())
        stats = {key: {n: np.array(v) for n, v in part.items()} for key, part in record.pop("stats").items()}
        with _columns_file(folder).open("rb") as content, np.load(content) as file:
            columns = {key: file[key] for key in file.files}
        task_index_T = columns.pop("task_index")
        return EncodedEpisode(folder=folder, columns=columns, task_index_T=task_index_T, stats=stats, **record)


@contextmanager
def encoded_errors(folder: Path) -> Iterator[None]:
    """What cannot be read of an encoded episode, as a DatasetFormatError that names its folder."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, FFmpegError) as error:
        raise DatasetFormatError(
            expected="an encoded episode, as it was written",
            found=shown(str(error), 200),
            where=str(folder),
            next=f"rm -r {quoted(folder)}  # then the same command: convert encodes it anew, record leaves it out",
        ) from error


def video_file(folder: Path, camera: str) -> Path:
    """Where the pictures of a camera are; a key may have slashes."""
    return folder / f"{quote(camera, safe='')}.mp4"


def _columns_file(folder: Path) -> Path:
    return folder / "columns.npz"
