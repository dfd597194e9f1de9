"""One episode of LeRobot v3.0, encoded into a folder of its own.

Processes make them side by side, and `LeRobotWriter` puts them together without encoding anything again.

    FOLDER/
    ├─ columns.npz       vectors [T, d], and the position of each frame's task in `tasks`
    ├─ CAMERA.mp4        one file per camera; every one begins with a keyframe
    └─ episode.json      length, tasks, statistics, and what the language columns say
"""

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast
from urllib.parse import quote

import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from manipi.data.dataset import Feature
from manipi.data.lerobot.language import LANGUAGE, packed
from manipi.data.lerobot.video import VideoWriter
from manipi.errors import BadValueError, ConfigError, DatasetFormatError, MissingFeatureError, quoted, shown
from manipi.types import Said

Pictures: TypeAlias = UInt8[np.ndarray, "T h w 3"] | Iterable[UInt8[np.ndarray, "n h w 3"]]
"""The pictures of an episode at once, or block by block."""


Texts: TypeAlias = Sequence[tuple[int, Said]]
"""Items of a language column, each with its frame; those of language_persistent belong to all frames."""

_COLUMNS = "columns.npz"
_PICTURES = 8
"""Pictures per episode that the image statistics look at."""
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

EpisodeStats: TypeAlias = dict[str, np.ndarray]
"""min, max, mean, std, count and five quantiles: [d] of a vector, [3, 1, 1] of pictures, in 0…1."""


@dataclass(frozen=True, kw_only=True)
class EpisodeEncoder:
    """How the episodes of one dataset are encoded.

    Args:
        features: pictures (uint8 [h, w, 3], stored as video) and vectors (float32 or int64 [d]) by key; and
            language_persistent or language_events, as `LANGUAGE`.
        pix_fmt, crf: how pictures are encoded, see `VideoWriter`.

    Raises:
        ConfigError: features of another shape, or no vector among them.
    """

    features: Mapping[str, Feature]
    fps: int
    pix_fmt: str = "yuv420p"
    crf: int = 23

    def __post_init__(self) -> None:
        kinds = {key: (one.kind, len(one.shape), *one.shape[2:]) for key, one in self.features.items()}
        known = (("image", 3, 3), ("vector", 1))
        bad = [key for key, kind in kinds.items() if kind not in known and self.features[key] != LANGUAGE]
        if bad or not any(kind[0] == "vector" for kind in kinds.values()):
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
        self, folder: Path, data: Mapping[str, np.ndarray | Pictures | Texts], task: str | Sequence[str], where: str
    ) -> None:
        """Write one episode into an existing folder.

        Args:
            data: per vector the values of all T frames, [T, d]; per camera its pictures, which are read in order; per
                language column its texts.
            task: the instruction, or one per frame.
            where: names the episode in errors.

        Raises:
            MissingFeatureError: a feature without values, or values without a feature.
            ConfigError: no frames, or a shape, type or number of frames that differs from the others'.
            BadValueError: NaN or infinity.
            DatasetFormatError: a text lacks what its style needs (`language.checked`).
        """
        if data.keys() != self.features.keys():
            raise MissingFeatureError(
                expected=f"values for {', '.join(sorted(self.features))}",
                found=", ".join(sorted(data)),
                where=where,
                next="give one array per feature of the dataset; all its episodes have the same",
            )
        columns = {key: np.asarray(data[key]) for key, feature in self.features.items() if feature.kind == "vector"}
        length = max(len(values) for values in columns.values())

        def wrong(found: str, key: str = "") -> ConfigError:
            expected = f"one task, or one per frame: {length}"
            if key:
                shape = (length or "T", *self.features[key].shape)
                expected = f"{key!r} as {self.features[key].dtype} of shape {shape}"
            next = "give every feature the same number of frames, at least one, in its own shape and type"
            return ConfigError(expected=expected, found=found, where=where, next=next)

        for key, values in columns.items():
            feature = self.features[key]
            castable = np.can_cast(values.dtype, np.dtype(feature.dtype), "same_kind")
            if values.shape != (length, *feature.shape) or not length or not castable:
                raise wrong(f"{values.dtype} of shape {values.shape}", key)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise BadValueError(
                    expected=f"finite numbers in {key!r}",
                    found="NaN or infinity",
                    where=f"{where}, frame {int(np.argwhere(~np.isfinite(values))[0, 0])}",
                    next="repair the recording, or leave this episode out",
                )
        columns = {key: values.astype(self.features[key].dtype) for key, values in columns.items()}
        tasks = [task] * length if isinstance(task, str) else list(task)
        if len(tasks) != length:
            raise wrong(f"{len(tasks)} tasks")
        texts, stats = list(dict.fromkeys(tasks)), {}
        wanted = set(np.linspace(0, length - 1, min(length, _PICTURES)).astype(int).tolist())
        for key in self.cameras:
            height, width, _ = shape = self.features[key].shape
            pictures, chosen = cast(Pictures, data[key]), []
            settings = {"fps": self.fps, "pix_fmt": self.pix_fmt, "crf": self.crf}
            with closing(VideoWriter(video_file(folder, key), height=height, width=width, **settings)) as video:
                for block in [pictures] if isinstance(pictures, np.ndarray) else pictures:
                    if block.dtype != np.uint8 or block.shape[1:] != shape:
                        raise wrong(f"{block.dtype} of shape {block.shape}", key)
                    chosen += [image.copy() for i, image in enumerate(block, start=video.num_frames) if i in wanted]
                    video.add(block)
            if video.num_frames != length:
                raise wrong(f"{video.num_frames} pictures", key)
            stats[key] = image_stats(np.stack(chosen))
        stats |= vector_stats(columns)
        said = [key for key, feature in self.features.items() if feature == LANGUAGE]
        language = {key: packed(key, data[key], length, self.cameras, where, folder) for key in said}
        task_index = np.array([texts.index(t) for t in tasks])
        np.savez(folder / _COLUMNS, allow_pickle=False, task_index=task_index, **columns)
        plain = {key: {name: values.tolist() for name, values in part.items()} for key, part in stats.items()}
        (folder / "episode.json").write_text(
            json.dumps({"length": length, "tasks": texts, "stats": plain, "language": language})
        )


@dataclass(frozen=True, kw_only=True)
class EncodedEpisode:
    """What `EpisodeEncoder.encode` wrote."""

    length: int
    tasks: list[str]
    columns: dict[str, np.ndarray]
    task_index_T: np.ndarray
    """Positions in `tasks`."""
    stats: dict[str, EpisodeStats]
    language: Mapping[str, Texts]


def read_episode(folder: Path) -> EncodedEpisode:
    """The episode in `folder`; its videos stay where they are. Raises DatasetFormatError where a file is damaged."""
    with encoded_errors(folder):
        record = json.loads((folder / "episode.json").read_text())
        stats = {key: {n: np.array(v) for n, v in part.items()} for key, part in record.pop("stats").items()}
        with (folder / _COLUMNS).open("rb") as content, np.load(content) as file:
            columns = {key: file[key] for key in file.files}
        task_index_T = columns.pop("task_index")
        written = record.pop("language", {})  # earlier releases wrote none
        language = {key: [(frame, Said(**one)) for frame, one in items] for key, items in written.items()}
        return EncodedEpisode(columns=columns, task_index_T=task_index_T, stats=stats, language=language, **record)


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


# Statistics ---------------------------------------------------------------------------------------------------------
#
# Those that LeRobot v3.0 keeps with every episode and with the dataset. Training does not use them.


def vector_stats(columns: Mapping[str, np.ndarray]) -> dict[str, EpisodeStats]:
    """Exact statistics of every column [T, d] of one episode."""
    # All columns at once: NumPy's fixed cost per call is what counts at the length of an episode.
    values = np.concatenate([values.astype(np.float64) for values in columns.values()], axis=1)
    parts = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    parts |= dict(zip(_QUANTILES, np.quantile(values, list(_QUANTILES.values()), axis=0), strict=True))
    stats, start = {}, 0
    for key, column in columns.items():
        end = start + column.shape[1]
        stats[key] = {name: part[start:end] for name, part in parts.items()} | {"count": np.array([len(values)])}
        if column.dtype.kind != "f":
            stats[key] |= {name: stats[key][name].astype(np.int64) for name in ("min", "max")}
        start = end
    return stats


def image_stats(chosen: UInt8[np.ndarray, "n h w 3"]) -> EpisodeStats:
    """From a histogram of a few pictures; exact for those."""
    levels = np.arange(256) / 255
    weights = np.stack([np.bincount(chosen[..., c].ravel(), minlength=256) for c in range(3)]) / chosen[..., 0].size
    mean = weights @ levels
    cumulative = weights.cumsum(axis=1)
    stats = {"min": levels[(weights > 0).argmax(1)], "max": levels[255 - (weights[:, ::-1] > 0).argmax(1)]}
    stats |= {"mean": mean, "std": np.sqrt(np.maximum(weights @ levels**2 - mean**2, 0))}
    stats |= {name: levels[(cumulative >= q).argmax(1)] for name, q in _QUANTILES.items()}
    return {name: value.reshape(3, 1, 1) for name, value in stats.items()} | {"count": np.array([len(chosen)])}


def merge(a: EpisodeStats, b: EpisodeStats) -> EpisodeStats:
    """Statistics of both together. Quantiles are averaged by count, as lerobot does, and so only indicative."""
    count = a["count"] + b["count"]
    share = b["count"] / count
    merged = {name: a[name] + (b[name] - a[name]) * share for name in ("mean", *_QUANTILES)}
    variance = a["std"] ** 2 * (1 - share) + b["std"] ** 2 * share + (b["mean"] - a["mean"]) ** 2 * share * (1 - share)
    merged |= {"min": np.minimum(a["min"], b["min"]), "max": np.maximum(a["max"], b["max"])}
    return merged | {"std": np.sqrt(variance), "count": count}
