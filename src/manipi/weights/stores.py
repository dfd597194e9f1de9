"""Arrays in files, read and written one at a time: no checkpoint has to fit in memory.

Store
├─ OrbaxStore         openpi's `params` folder (manipi.weights.orbax)
├─ SafetensorsStore   one `.safetensors` file, or several with an index
└─ NpzStore           big_vision's `.npz`
"""

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
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

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
FLOATS = tuple(_DTYPES.values())
"""What weights come in; quantized ones are of other types, and mean nothing without their scales."""
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


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
        single, index = path / "model.safetensors", path / "model.safetensors.index.json"
        files = [single if path.is_dir() else path]
        if path.is_dir() and index.is_file():
            if single.is_file():
                raise CheckpointError(
                    expected="one file of weights, or several with an index",
                    found=f"{single.name} and {index.name}",
                    where=str(path),
                    next="remove the one that is not meant",
                )
            named = Fields.read(index).inner("weight_map")
            names = sorted({named.get(key, str) for key in named.keys()})  # noqa: SIM118 (it is no mapping)
            files = [file_beside(path, name, named.where) for name in names]
        for file in files:
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
            self.arrays: dict[str, ArrayInfo] = {}
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    with archive.open(entry) as file:
                        old = np.lib.format.read_magic(file) == (1, 0)
                        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                        shape, _, dtype = header(file)
                    self.arrays[entry.removesuffix(".npy")] = ArrayInfo(shape, to_torch(np.empty(0, dtype)).dtype)
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, name: str, layer: int | None = None) -> Tensor:
        if self._last is None or self._last[0] != name:
            with _damage(Path(self.where)):
                self._last = (name, self._file[name])
        values = to_torch(self._last[1])
        return values if layer is None else values[layer]


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


def write_safetensors(
    path: Path, infos: Mapping[str, ArrayInfo], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] = {}
) -> None:
    """Write the file tensor by tensor: the library's own writer needs all of them in memory at once.

    Args:
        infos: shape and dtype of every tensor, which fix its place.
        tensors: each of them once, in any order, in the dtype of `infos`.
        metadata: plain text for the header.
    """
    offsets, end = {}, 0
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide numbers first, so that every tensor is aligned.
    for name, (shape, dtype) in sorted(infos.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        size = torch.Size(shape).numel() * dtype.itemsize
        offsets[name], end = end, end + size
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = set(infos)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in tensors:
            assert (tuple(tensor.shape), tensor.dtype) == infos[name], f"{name} is not what was announced"
            missing.remove(name)
            file.seek(8 + len(text) + offsets[name])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert not missing, f"never written: {sorted(missing)}"
