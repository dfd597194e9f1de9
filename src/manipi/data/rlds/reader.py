"""RLDS datasets (tensorflow_datasets' record files) without TensorFlow."""

import hashlib
import io
import math
import os
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from manipi.data.dataset import Dataset, Feature, PromptSource
from manipi.data.rlds.fields import RldsFields, find_fields, find_version, is_depth, read_info, read_split
from manipi.data.rlds.index import RldsIndex
from manipi.data.rlds.tfrecord import broken
from manipi.errors import DatasetNotFoundError
from manipi.records import fingerprint

_OPEN_FILES, _OPEN_CACHED = 64, 1
"""Record files kept open per process, local ones and those of a store, of which no others may be needed meanwhile."""


class RldsDataset(Dataset):
    """One split of an RLDS dataset in its version's folder; an episode's number is that of its record in the split.

    Where the map gives a camera several picture features, or several instructions, a row shows one of them: a hash of
    seed and row decides, equal on every machine, and instructions that are empty do not count. The reference (openpi's
    droid_rlds_dataset.py) instead draws one for all the rows of an episode whenever the episode comes up, from a
    generator that it does not seed, and draws empty instructions too. So here neighbouring rows may show different
    cameras, and a row shows the same one in every epoch; over the dataset each has the same share.

    Pickles as its arguments: a worker process opens the same index by memory map, for which it reads index.json and
    the time stamps of the record files, and shares its pages with the others. Columns are such maps, and no picture
    stays in memory.

    Raises:
        DatasetNotFoundError: no episode.
        DatasetFormatError: metadata or a record that are missing, damaged or disagree.
        MissingFeatureError: the map names a feature that the dataset lacks.
        UnknownNameError: no such split.
    """

    def __init__(self, root: Path, fields: RldsFields, split: str = "train", seed: int = 0, *, show: bool = True):
        self.fields, self.split, self.seed = fields, split, seed
        self._split = chosen = read_split(root, fields, split)
        self._index = RldsIndex(chosen, show=show)
        self._spans = {name: self._index.array(f"picture:{name}", np.int64, 2) for name in chosen.pictures}
        open_files = _OPEN_CACHED if chosen.origin else _OPEN_FILES
        self._file = lru_cache(maxsize=open_files)(partial(_File, self._index))
        features = {key: chosen.vector(key) for key in chosen.fields.vectors}
        features |= {name: chosen.steps[name] for name in chosen.fields.prompts}
        depth = {n: f for n, f in chosen.steps.items() if is_depth(n, f) and n not in features}
        features |= {n: Feature(kind="depth", shape=(*f.shape, 1), dtype=f.dtype) for n, f in depth.items()}
        super().__init__(root=root, name=chosen.name, fps=fields.fps, features=features, episodes=self._index.episodes)
        self.features = {camera: chosen.steps[names[0]] for camera, names in chosen.fields.images.items()} | features
        for camera, names in chosen.fields.images.items():
            if min(self.features[camera].shape) < 1:  # left open by features.json
                shape = self._read_picture(names[0], 0).shape
                self.features[camera] = Feature(kind="image", shape=shape, dtype="image")

    def __reduce__(self) -> tuple:
        return RldsDataset, (self.root, self.fields, self.split, self.seed)

    def prompt(self, row: int) -> str:
        """One of the instructions that are not empty; empty where all are."""
        texts = [self._index.texts[number] for number in self._index.prompts[row].tolist()]
        texts = [text for text in texts if text]
        return texts[self._draw("prompt", row, len(texts))] if texts else ""

    def instructions(self, source: PromptSource) -> tuple[list[str], np.ndarray]:
        numbers = self._index.prompts
        if source == "subtask" or not numbers.shape[1]:
            return super().instructions(source)
        return list(self._index.texts), numbers

    def _fingerprint(self) -> str:
        """Over the metadata, the map, split and seed, and the length and checksum of every record."""
        return fingerprint([self._split.metadata, self.fields, self.split, self.seed, self._index.digest])

    def _read_column(self, key: str) -> np.ndarray:
        feature = self._split.vector(key)
        return self._index.array(f"vector:{key}", feature.dtype, math.prod(feature.shape))

    def _read_images(self, camera: str, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.features[camera].shape), np.uint8)
        names = self._split.fields.images[camera]
        for i, row in enumerate(rows.tolist()):
            image = self._read_picture(names[self._draw(camera, row, len(names))], row)
            if image.shape != images.shape[1:]:
                expected = f"a picture of shape {images.shape[1:]} for {camera!r}"
                broken(expected, f"{image.shape}", f"{self._path(row)}, {self.locate(row)}")
            images[i] = image
        return images

    def _read_picture(self, feature: str, row: int) -> np.ndarray:
        offset, size = self._spans[feature][row].tolist()
        try:
            return decode(self._file(self._number(row)).read(offset, size))
        except (OSError, ValueError) as error:
            where = f"{self._path(row)}, {self.locate(row)}, byte {offset}"
            broken(f"a JPEG or PNG picture in {feature!r}", f"{error}, in {size} bytes", where)

    def _path(self, row: int) -> Path:
        return self._split.files[self._number(row)]

    def _number(self, row: int) -> int:
        """Of the row's record file."""
        return self._index.files[int(self.episode_of(np.asarray(row)))]

    def _draw(self, what: str, row: int, count: int) -> int:
        if count == 1:
            return 0
        digest = hashlib.sha256(f"{self.seed}/{what}/{row}".encode()).digest()
        return int.from_bytes(digest[:8]) % count


class _File:
    """An open file that closes with its last reference: in a cache, when it has not been read for longest."""

    def __init__(self, index: RldsIndex, number: int):
        self._file = index.record_file(number)
        self._handle = os.open(self._file.path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._handle, size, offset)


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """A JPEG or PNG picture, JPEG to the bit as TensorFlow decodes it, whose default is the fast integer transform."""
    if data.startswith(b"\xff\xd8"):
        return simplejpeg.decode_jpeg(data, fastdct=True)
    if data.startswith(b"\x89PNG"):
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    raise ValueError(f"neither, it begins with {data[:8]!r}")


def open_rlds(
    folder: str | Path, *, fields: RldsFields | None = None, split: str = "train", seed: int = 0, show: bool = True
) -> RldsDataset:
    """Open an RLDS dataset; the first time, its record files are read once from front to back.

    Args:
        folder: of a version, or its parent where it has only one.
        fields: which features become which keys; None: as `find_fields` finds.
        seed: decides between alternative pictures and instructions.
        show: whether to draw a progress bar.

    Raises:
        DatasetNotFoundError: no such folder, or no RLDS dataset or no episode in it.
        ConfigError: several versions or no map of fields.
        DataError: as `RldsDataset`.
    """
    folder = Path(folder).expanduser().resolve()
    root = find_version(folder) if folder.is_dir() else None
    if root is None:
        raise DatasetNotFoundError(
            expected="the folder of an RLDS version, with features.json, dataset_info.json and *.tfrecord* files in it",
            found="another folder" if folder.is_dir() else "nothing",
            where=str(folder),
            next="name the folder of the version, such as droid/1.0.1",
        )
    return RldsDataset(root, fields or find_fields(root, read_info(root)["name"]), split, seed, show=show)
