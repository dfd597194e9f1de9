"""Where foreign weights lie: arrays by name, read one layer at a time, so that no checkpoint has to fit in memory.

Store
├─ OrbaxStore         openpi's `params` folder (manipi.weights.orbax)
├─ SafetensorsStore   one `.safetensors` file, or several with an index
└─ NpzStore           big_vision's `.npz`
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manipi.errors import CheckpointError, IntegrityError, shown
from manipi.weights.foreign_json import Fields, file_beside
from manipi.weights.names import to_torch


class ArrayInfo(NamedTuple):
    """What is known of an array before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def bytes_of(arrays: Mapping[str, ArrayInfo]) -> int:
    """What they take on disk."""
    return sum(torch.Size(array.shape).numel() * array.dtype.itemsize for array in arrays.values())


class Store(Protocol):
    """Read-only arrays by name."""

    where: str
    """For messages."""

    @property
    def arrays(self) -> Mapping[str, ArrayInfo]: ...

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """The whole array, or `array[layer]`. Raises IntegrityError where the file is damaged."""
        ...


class SafetensorsStore:
    """One file, or the files that an index names. Only what is read is loaded."""

    def __init__(self, path: Path):
        self.where, self._files = str(path), {}
        self.arrays: dict[str, ArrayInfo] = {}
        strange: dict[str, str] = {}
        for file in _shards(path):
            with _damage(file):
                opened = safe_open(file, framework="pt")
                for name in opened.keys():  # noqa: SIM118 (the file is no mapping)
                    part = opened.get_slice(name)
                    if name in self._files:
                        raise ValueError(f"a second {name}, which another file of the index has already")
                    if part.get_dtype() in _DTYPES:
                        self.arrays[name] = ArrayInfo(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
                    else:
                        strange[name] = part.get_dtype()
                    self._files[name] = opened
        require_plain(strange, self.where)

    def read(self, name: str, layer: int | None = None) -> Tensor:
        with _damage(Path(self.where)):
            return self._files[name].get_tensor(name) if layer is None else self._files[name].get_slice(name)[layer]


class NpzStore:
    """A NumPy archive. Arrays are decoded whole, and the last one is kept."""

    def __init__(self, path: Path):
        self.where = str(path)
        with _damage(path):
            self._file = np.load(path, allow_pickle=False)
            self.arrays = dict(_npz_headers(path))
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, name: str, layer: int | None = None) -> Tensor:
        if self._last is None or self._last[0] != name:
            with _damage(Path(self.where)):
                self._last = (name, self._file[name])
        values = to_torch(self._last[1])
        return values if layer is None else values[layer]


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = tuple(_DTYPES.values())
"""What weights come in; quantized ones are of other types, and mean nothing without their scales."""
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def require_plain(strange: Mapping[str, object], where: str) -> None:
    """Raises CheckpointError where there are tensors of other types, by name."""
    if strange:
        types = sorted({str(dtype).removeprefix("torch.") for dtype in strange.values()})
        raise CheckpointError(
            expected="weights in float32, bfloat16, float16 or float64",
            found=f"{', '.join(types)} in {len(strange)} tensors, such as {shown(min(strange))}",
            where=where,
            next="import the checkpoint that was quantized; --quantize makes 8 bits of it when it is served",
        )


def _shards(path: Path) -> list[Path]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if not path.is_dir():
        return [path]
    if not index.is_file():
        return [single]
    if single.is_file():
        raise CheckpointError(
            expected="one file of weights, or several with an index",
            found=f"{single.name} and {index.name}",
            where=str(path),
            next="remove the one that is not meant",
        )
    named = Fields.read(index).inner("weight_map")
    return [file_beside(path, name, named.where) for name in sorted({named.get(key, str) for key in named.keys()})]  # noqa: SIM118


def _npz_headers(path: Path) -> Iterator[tuple[str, ArrayInfo]]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            yield entry.removesuffix(".npy"), ArrayInfo(shape, to_torch(np.empty(0, dtype)).dtype)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What a library says of a broken file, as an IntegrityError that names the file."""
    if not path.exists():
        raise CheckpointError(
            expected="a file of weights", found="no such file", where=str(path), next="check the path"
        )
    try:
        yield
    except (SafetensorError, zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException) -> IntegrityError:
    """What a library says of a broken file."""
    return IntegrityError(
        expected="a complete file of weights",
        found=next(iter(str(error).splitlines()), type(error).__name__),
        where=str(path),
        next="copy or fetch it again; it is cut off or damaged",
    )
