"""Pictures, decoded by the reader that training uses: what passes here trains."""

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from manipi.data.dataset import Dataset
from manipi.data.review.report import Finding, from_error
from manipi.errors import DataError

_BLOCK = 32
"""Pictures decoded at a time."""


def picture_findings(dataset: Dataset, cameras: Sequence[str], *, quick: bool, num_workers: int) -> list[Finding]:
    """The first damaged picture of each camera and episode; `quick` looks at the first and the last alone."""
    jobs = [(camera, position) for camera in cameras for position in range(len(dataset.episodes))]
    local = threading.local()

    def begin() -> None:
        local.dataset = copy.copy(dataset)  # opens the files again: decoders are no thread's but one

    def decode(job: tuple[str, int]) -> Finding | None:
        return _decode(local.dataset, *job, quick=quick)

    with ThreadPoolExecutor(num_workers, initializer=begin) as pool:
        try:
            bar = tqdm(pool.map(decode, jobs), total=len(jobs), desc="pictures", unit="clip", leave=False)
            findings = [finding for finding in bar if finding is not None]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [finding for camera in cameras for finding in _once(dataset, camera, findings)]


def _once(dataset: Dataset, camera: str, findings: Sequence[Finding]) -> list[Finding]:
    """What is wrong with a camera; where that is the same in all of its episodes, it is one finding."""
    here = [finding for finding in findings if finding.features == (camera,)]
    if len(here) < len(dataset.episodes) or len({(finding.what, finding.next) for finding in here}) != 1:
        return here
    return [replace(here[0], episodes=tuple(number for finding in here for number in finding.episodes))]


def _decode(dataset: Dataset, camera: str, position: int, *, quick: bool) -> Finding | None:
    episode = dataset.episodes[position]
    start, stop = episode.start, episode.start + episode.length
    step = max(1, episode.length - 1) if quick else _BLOCK
    for first in range(start, stop, step):
        block = np.arange(first, min(first + (1 if quick else _BLOCK), stop))
        try:
            dataset.images(camera, block)
        except DataError as error:
            frame = _first_broken(dataset, camera, block)
            return from_error(error, "pictures", (episode.index,), frame - episode.start, (camera,))
    return None


def _first_broken(dataset: Dataset, camera: str, rows: np.ndarray) -> int:
    for row in rows.tolist():
        try:
            dataset.images(camera, np.array([row]))
        except DataError:
            return row
    return int(rows[0])
