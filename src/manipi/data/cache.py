"""Decoded pictures in a memory-mapped file: random access for the price of a memory copy."""

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from manipi.data.dataset import Dataset
from manipi.errors import ConfigError, StorageError
from manipi.storage import atomic_directory
from manipi.transforms.images import resize_with_pad

_BLOCK = 256
"""Pictures decoded and written at a time."""


class CachedDataset(Dataset):
    """A dataset whose pictures are decoded once, in file order, and then served from `folder`.

    Args:
        cameras: those to cache; the others are served by `dataset`.
        folder: holds one folder per dataset fingerprint and size, so that changed data are decoded anew.
        size: pictures are kept at [size, size], resized as the pipeline does it, which then lets them pass untouched;
            None keeps them as they are.
        max_gb: bound on the size of all the cameras together.
        show: draw a progress bar while decoding.

    Raises:
        ConfigError: the cameras need more than `max_gb`.
        StorageError: they need more than the disk has free.
        DataError: a picture cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        cameras: Sequence[str],
        folder: str | Path,
        size: int | None = None,
        *,
        max_gb: float = 50.0,
        show: bool = True,
    ):
        for camera in cameras:
            dataset.require(camera, "image")
        resized = {camera: replace(dataset.features[camera], shape=(size, size, 3)) for camera in cameras if size}
        super().__init__(
            root=dataset.root,
            name=dataset.name,
            fps=dataset.fps,
            features={**dataset.features, **resized},
            episodes=dataset.episodes,
        )
        self._dataset, self._folder, self._size, self._max_gb = dataset, Path(folder), size, max_gb
        self._files = {camera: self._file(camera) for camera in cameras}
        missing = [camera for camera, path in self._files.items() if not path.exists()]
        self._check_size(missing)
        for camera in missing:
            self._decode(camera, show)
        self._pictures = {camera: np.load(path, mmap_mode="r") for camera, path in self._files.items()}

    def __reduce__(self) -> tuple:
        # Workers map the same file again; a pickled memory map would be a copy of all its pictures.
        return CachedDataset, (self._dataset, tuple(self._files), self._folder, self._size)

    def prompt(self, row: int) -> str:
        return self._dataset.prompt(row)

    def subtask(self, row: int) -> str:
        return self._dataset.subtask(row)

    def _fingerprint(self) -> str:
        return self._dataset.fingerprint

    def _read_column(self, key: str) -> np.ndarray:
        return self._dataset.column(key)

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        return self._pictures[camera][rows] if camera in self._pictures else self._dataset.images(camera, rows)

    def _file(self, camera: str) -> Path:
        size = f"{self._size}x{self._size}" if self._size else "full"
        return self._folder / self._dataset.fingerprint[:16] / size / re.sub(r"[^\w.-]", "_", camera) / "frames.npy"

    def _check_size(self, cameras: Sequence[str]) -> None:
        needed = sum(self.num_frames * math.prod(self.features[camera].shape) for camera in cameras)
        found = f"{needed / 1e9:.2f} GB for {', '.join(cameras)}"
        if needed > self._max_gb * 1e9:
            raise ConfigError(
                expected=f"decoded pictures of at most {self._max_gb:g} GB",
                found=found,
                where=str(self._folder),
                next="--data.cache none  # decode on the fly; or cache fewer cameras, or allow more with max_gb",
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise StorageError(
                expected=f"{found} of free space",
                found=f"{free / 1e9:.2f} GB",
                where=str(self._folder),
                next="--data.cache none  # decode on the fly; or free some space",
            )

    def _decode(self, camera: str, show: bool) -> None:
        height, width, channels = self.features[camera].shape
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_frames, height, width, channels)}
        path = self._file(camera)
        # Plain writes report a full disk as an error; a store into a memory map would kill the process.
        with atomic_directory(path.parent) as partial, (partial / path.name).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            with tqdm(total=self.num_frames, desc=f"decode {camera}", unit="frame", disable=not show) as progress:
                for start in range(0, self.num_frames, _BLOCK):
                    rows = np.arange(start, min(start + _BLOCK, self.num_frames))
                    for image in self._dataset.images(camera, rows):
                        file.write(resize_with_pad(image, height, width).tobytes())
                    progress.update(len(rows))
