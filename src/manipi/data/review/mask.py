"""Which frames are worth training on, as a file beside the dataset: nothing is ever deleted from it.

    {"type": "Mask", "dataset": "9f2c…", "rules": ["idle 1.0 s", "without episodes 7"],
     "keep": {"0": [[12, 180], [233, 410]], "1": [[0, 398]], "7": []}}

`keep` has the kept frames of each episode as half-open ranges; an episode that is not listed is left out whole.
openpi's files of DROID ("sample ranges") have such ranges with the episode's recording as key, and are read as well.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from manipi.data.dataset import Dataset
from manipi.data.review.idle import true_ranges
from manipi.errors import ConfigError, DatasetFormatError, quoted
from manipi.records import from_json, read_json, to_json
from manipi.storage import atomic_write


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The frames of one dataset to keep, and by which rules they were chosen."""

    dataset: str
    """Fingerprint of the dataset."""
    rules: tuple[str, ...]
    keep: Mapping[str, Any]
    """Per episode number its kept ranges [[start, end], …]."""

    def save(self, path: Path) -> None:
        # On one line: the ranges of a large dataset are not for reading.
        atomic_write(path, json.dumps(to_json(self)).encode())


def mask_of(dataset: Dataset, keep_N: Bool[np.ndarray, " N"], rules: tuple[str, ...]) -> Mask:
    """The mask that keeps the frames where `keep_N` holds."""
    parts = ((str(e.index), true_ranges(keep_N[e.start : e.start + e.length])) for e in dataset.episodes)
    return Mask(dataset=dataset.fingerprint, rules=rules, keep=dict(parts))


def read_mask(path: str | Path, dataset: Dataset) -> Bool[np.ndarray, " N"]:
    """Which rows of `dataset` the file keeps.

    Raises:
        ConfigError: the file belongs to another dataset, or keeps frames that an episode does not have.
        DatasetFormatError: it is absent, or no JSON object.
    """
    path = Path(path)
    data = read_json(path, DatasetFormatError)
    if not isinstance(data, dict):
        raise DatasetFormatError(
            expected="an object of ranges by episode",
            found=f"a JSON {type(data).__name__}",
            where=str(path),
            next="name a file of `manipi filter`, or openpi's of DROID",
        )
    if "type" not in data:  # openpi's
        keys = [episode.key or str(episode.index) for episode in dataset.episodes]
        lengths = {key: episode.length for key, episode in zip(keys, dataset.episodes, strict=True)}
        # Its users look steps up in it one by one, so that what lies beyond an episode is never asked for.
        data = {
            k: [(max(s, 0), max(min(e, lengths[k]), 0)) for s, e in ranges]
            for k, ranges in data.items()
            if k in lengths
        }
        return _rows(dataset, keys, data, path)
    mask: Mask = from_json(data, (Mask,), str(path))
    if mask.dataset != dataset.fingerprint:
        raise ConfigError(
            expected=f"a mask of this dataset ({dataset.fingerprint[:12]}), {dataset.root}",
            found=f"one of another dataset, or of an older state of it ({mask.dataset[:12]})",
            where=str(path),
            next=f"manipi filter {quoted(dataset.root)} --out {quoted(path)}  # with the rules {', '.join(mask.rules)}",
        )
    return _rows(dataset, [str(episode.index) for episode in dataset.episodes], mask.keep, path)


def _rows(dataset: Dataset, keys: list[str], keep: Mapping[str, Any], path: Path) -> np.ndarray:
    if not keep.keys() & set(keys):
        raise ConfigError(
            expected=f"ranges of episodes such as {keys[0]!r}",
            found=f"ranges of {len(keep)} episodes such as {next(iter(keep), 'none')!r}, and of none of the dataset's",
            where=str(path),
            next="name the mask that was made for this dataset",
        )
    rows = np.zeros(dataset.num_frames, dtype=bool)
    for episode, key in zip(dataset.episodes, keys, strict=True):
        for start, end in _checked(keep.get(key, ()), episode.length, key, path):
            rows[episode.start + start : episode.start + end] = True
    return rows


def _checked(ranges: Any, length: int, key: str, path: Path) -> Iterator[tuple[int, int]]:
    for start, end in ranges:
        if not 0 <= start <= end <= length:
            raise ConfigError(
                expected=f"ranges within the {length} frames of the episode",
                found=f"{start} to {end}",
                where=f"{path}, episode {key}",
                next="make the mask again for the dataset as it is now: manipi filter DATASET --out FILE",
            )
        yield start, end
