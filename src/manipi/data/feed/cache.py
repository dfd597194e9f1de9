"""Pictures at the size that the model takes, kept on disk from their first decoding on.

folder/FINGERPRINT/SIZE-FORMAT/CAMERA/frames    one slot of equal size per row
                                      present   per row, the length and checksum of what is in its slot; 0: nothing
                                      videos.json   the files that they were decoded from: size and digest

Any number of processes may fill it at once: for the same row they write the same bytes to the same place. A slot counts
only where its checksum fits, so that neither a killed process nor a crashed machine leaves a picture that is not one.
"""

import errno
import math
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, TypeAlias

import google_crc32c
import numpy as np
import simplejpeg
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from manipi.data.dataset import Dataset, PromptSource, replaced
from manipi.errors import ConfigError
from manipi.processes import allocate
from manipi.records import json_bytes, read_object
from manipi.storage import atomic_write, require_room, storage_errors
from manipi.transforms.model_input import resize_with_pad
from manipi.types import Said

CacheFormat: TypeAlias = Literal["raw", "jpeg"]
_BLOCK = 4096
_QUALITY = 95
_ROWS = 256
"""Rows of one camera decoded at a time while the cache is filled ahead."""


class CachedDataset(Dataset):
    """A dataset whose pictures are decoded once, when they are first asked for, and then served from `folder`.

    Args:
        cameras: those to cache; the others are served by `dataset`.
        folder: holds one folder per dataset fingerprint, size and format, so that changed data are decoded anew;
            pictures of files that were replaced since are forgotten.
        size: pictures are kept at [size, size], resized as the pipeline does it, which then lets them pass untouched;
            None keeps them as they are.
        format: "raw" gives the decoder's own bytes; "jpeg" (quality 95) takes about a seventh of the room and more
            time, and gives slightly other pixels, the same ones whether they come from the cache or not.
        max_gb: bound on the size of all the cameras together. Raw pictures need to fit; JPEG ones that do not are not
            kept.

    Raises:
        ConfigError: raw pictures of all the cameras need more than `max_gb`.
        StorageError: they need more than the disk has free; or, later, the disk is full.
        DataError: a picture cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        cameras: Sequence[str],
        folder: str | Path,
        size: int | None = None,
        *,
        format: CacheFormat = "raw",
        max_gb: float = 50.0,
        _in_worker: bool = False,
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
        self._dataset = dataset
        self._again = partial(
            CachedDataset, dataset, tuple(cameras), Path(folder), size, format=format, max_gb=max_gb, _in_worker=True
        )
        name = f"{size}x{size}-{format}" if size else f"full-{format}"
        place = Path(folder) / dataset.fingerprint[:16] / name
        folders = {camera: place / re.sub(r"[^\w.-]", "_", camera) for camera in cameras}
        if not _in_worker:  # the process that it comes from has looked
            for camera, path in folders.items():
                _forget_replaced(path, dataset.picture_files([camera]))
        if format == "raw":
            new = [camera for camera, path in folders.items() if not (path / "present").exists()]
            self._check_size(new, place, max_gb)
        limit = int(max_gb * 1e9 / max(1, len(cameras)))
        self._pictures = {
            camera: _Pictures(path, self.num_frames, self.features[camera].shape, format, limit)
            for camera, path in folders.items()
        }

    def __reduce__(self) -> tuple:
        return self._again, ()

    def column(self, key: str) -> np.ndarray:
        return self._dataset.column(key)

    def prompt(self, row: int) -> str:
        return self._dataset.prompt(row)

    def subtask(self, row: int) -> str:
        return self._dataset.subtask(row)

    def instructions(self, source: PromptSource) -> tuple[list[str], np.ndarray]:
        return self._dataset.instructions(source)

    def said(self, position: int) -> tuple[Sequence[Said], Mapping[int, Sequence[Said]]]:
        return self._dataset.said(position)

    def texts(self, style: str) -> tuple[list[str], np.ndarray]:
        return self._dataset.texts(style)

    def _fingerprint(self) -> str:
        return self._dataset.fingerprint

    def _read_column(self, key: str) -> np.ndarray:
        return self._dataset.column(key)

    def images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        if camera not in self._pictures:
            return self._dataset.images(camera, rows)
        self._check_rows(rows)
        return self._read_images(camera, rows)  # in any order: none is nearer than another

    def fill(self, *, show: bool = True) -> None:
        """Decode all that is not there yet, in file order: less work in all than in the sampler's, but done now."""
        missing = {camera: kept.missing() for camera, kept in self._pictures.items()}
        total = sum(map(len, missing.values()))
        with tqdm(total=total, desc="decode", unit="picture", disable=not show) as progress:
            # All cameras of some rows, and then of the next: a record file has all of them.
            for start, (camera, left) in product(range(0, self.num_frames, _ROWS), missing.items()):
                rows = left[slice(*np.searchsorted(left, (start, start + _ROWS)))]
                self.images(camera, rows)
                progress.update(len(rows))

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        kept, shape = self._pictures[camera], self.features[camera].shape
        images = np.empty((len(rows), *shape), np.uint8)
        missing = [i for i, row in enumerate(rows.tolist()) if not kept.read(row, images[i])]
        if missing:
            decoded = self._dataset.images(camera, rows[missing])
            for i, image in zip(missing, decoded, strict=True):
                images[i] = kept.write(int(rows[i]), resize_with_pad(image, *shape[:2]))
        return images

    def _check_size(self, cameras: Sequence[str], place: Path, max_gb: float) -> None:
        needed = sum(self.num_frames * math.prod(self.features[camera].shape) for camera in cameras)
        found = f"{needed / 1e9:.2f} GB for {', '.join(cameras)}"
        if needed > max_gb * 1e9:
            raise ConfigError(
                expected=f"decoded pictures of at most {max_gb:g} GB",
                found=found,
                where=str(place),
                next="--data.cache jpeg  # takes about a seventh of the room; or none, or allow more with max_gb",
            )
        with storage_errors(place):
            place.mkdir(parents=True, exist_ok=True)
        next = "--data.cache jpeg  # takes about a seventh of the room; or none, or free some space"
        require_room(place, needed, next, what=f"decoded pictures of {', '.join(cameras)}")


def _forget_replaced(folder: Path, now: Mapping[str, str]) -> None:
    """Of earlier releases, which did not say what they were decoded from, pictures are taken as they are."""
    said = folder / "videos.json"
    before = read_object(said) if said.exists() else {}
    with storage_errors(folder):
        if replaced(before, now):
            (folder / "present").unlink(missing_ok=True)  # first: without it, nothing counts as there
        if now and (known := {**before, **now}) != before:
            atomic_write(said, json_bytes(known))


class _Pictures:
    """The pictures of one camera, all of one shape."""

    def __init__(self, folder: Path, num_frames: int, shape: tuple[int, ...], format: CacheFormat, limit: int):
        self._shape, self._format, self._limit, self._folder = shape, format, limit, folder
        size = math.prod(shape)
        # JPEG slots are mostly holes, which take no room on disk.
        self._slot = size if format == "raw" else -(-2 * size // _BLOCK) * _BLOCK
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._frames = self._open("frames", num_frames * self._slot, holes=format == "jpeg")
            self._present = self._open("present", num_frames * 8, holes=False)
        self._entries = np.memmap(folder / "present", "<u8", "r", shape=(num_frames,))

    def _open(self, name: str, size: int, *, holes: bool) -> int:
        file = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, file)
        # Room that is taken now cannot be missing in the middle of a run.
        os.truncate(file, size) if holes else allocate(file, size)
        return file

    def missing(self) -> Int64[np.ndarray, " n"]:
        """The rows without a picture."""
        return np.flatnonzero(self._entries == 0)

    def read(self, row: int, image: UInt8[np.ndarray, "h w 3"]) -> bool:
        """Fill in the picture of a row, if it is there."""
        entry = int(self._entries[row])
        if not entry:
            return False
        data = image.reshape(-1) if self._format == "raw" else np.empty(entry >> 32, np.uint8)
        length = os.preadv(self._frames, [data.data], row * self._slot)
        if length != entry >> 32 or _entry(data) != entry:
            return False
        if self._format == "jpeg":
            image[...] = self._decode(data)
        return True

    def write(self, row: int, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Keep a picture. Returns it as `read` will."""
        image = np.ascontiguousarray(image)
        data = image.tobytes() if self._format == "raw" else simplejpeg.encode_jpeg(image, quality=_QUALITY)
        if self._format == "raw" or os.fstat(self._frames).st_blocks * 512 + len(data) <= self._limit:
            with storage_errors(self._folder, next="--data.cache none  # decode every time; or free some space"):
                _write(self._frames, data, row * self._slot)
                _write(self._present, _entry(data).to_bytes(8, "little"), row * 8)
        return self._decode(data)

    def _decode(self, data: bytes | np.ndarray) -> np.ndarray:
        if self._format == "raw":
            return np.frombuffer(data, np.uint8).reshape(self._shape)
        return simplejpeg.decode_jpeg(data)


def _entry(data: bytes | np.ndarray) -> int:
    """Length and checksum in one number, so that they are written as one."""
    return len(data) << 32 | google_crc32c.value(data)


def _write(file: int, data: bytes, place: int) -> None:
    # A write that finds room for a part only says so by a smaller number.
    if os.pwrite(file, data, place) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
