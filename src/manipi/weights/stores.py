"""Arrays in files, read and written one at a time, and the JSON of other projects.

No checkpoint has to fit in memory.

ArrayStore
├─ OrbaxStore         openpi's `params` folder, read and written with tensorstore alone: no JAX, no Orbax
├─ SafetensorsStore   one `.safetensors` file, or several with an index
└─ NpzStore           big_vision's `.npz`

    params/
    ├─ _METADATA        JSON: the tree's paths
    ├─ manifest.ocdbt   an OCDBT key-value store …
    └─ d/ …             … of zarr arrays: `params.PaliGemma.img.embedding.kernel[.value]/.zarray`, `…/0.0.0.0`

Released checkpoints have leaves without a suffix; those of openpi's training end in `value`. Both read alike.
"""

import importlib
import json
import os
import tempfile
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manipi.errors import CheckpointError, ConfigError, IntegrityError, shown
from manipi.records import read_json, write_json
from manipi.storage import write_failed

_METADATA = "_METADATA"
_WRITTEN = {torch.float32: "<f4", torch.bfloat16: "bfloat16"}
"""What openpi's checkpoints come in."""
_PIECE = 16 << 20
"""Compressed bytes in memory at a time."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = tuple(_DTYPES.values())
"""What weights come in; quantized ones are of other types, and mean nothing without their scales."""
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ArrayInfo(NamedTuple):
    """What is known of an array before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def bytes_of(arrays: Mapping[str, ArrayInfo]) -> int:
    """What they take on disk."""
    return sum(torch.Size(array.shape).numel() * array.dtype.itemsize for array in arrays.values())


class OrbaxStore:
    """The arrays of a `params` folder, by tree path joined with "/", without `params` and `value`.

    Raises:
        CheckpointError: no such folder. IntegrityError: a damaged one.
    """

    def __init__(self, folder: Path):
        self.where, self._folder = str(folder), Path(folder)
        if not (self._folder / _METADATA).is_file():
            raise CheckpointError(
                expected=f"an Orbax folder (with {_METADATA} and manifest.ocdbt)",
                found="a folder without them" if self._folder.is_dir() else "no such folder",
                where=self.where,
                next="name the checkpoint's folder, or its params folder",
            )
        self._arrays: dict[str, Any] = {}
        self.arrays: dict[str, ArrayInfo] = {}
        strange: dict[str, str] = {}
        leaves = Fields.read(self._folder / _METADATA).inner("tree_metadata")
        for leaf in leaves:
            keys = [entry.get("key", str) for entry in leaves.inner(leaf).objects("key_metadata")]
            parts = keys[1:] if keys[:1] == ["params"] else keys
            path = "/".join(parts[:-1] if parts[-1:] == ["value"] else parts)
            if not path:
                raise unexpected("the keys of an array", keys, leaves.where)
            spec = {"driver": "zarr", "kvstore": _kvstore(self._folder, ".".join(keys))}
            with _damage(self._folder):
                array = self._arrays[path] = _package("tensorstore").open(spec, open=True, read=True).result()
            dtype = getattr(torch, array.dtype.name, None)
            if isinstance(dtype, torch.dtype):
                self.arrays[path] = ArrayInfo(tuple(array.shape), dtype)
            else:
                strange[path] = array.dtype.name
        require_plain(strange, self.where)
        self._spilled: dict[str, IO[bytes]] = {}

    def read(self, name: str, layer: int | None = None) -> Tensor:
        array = self._arrays[name]
        if layer is not None and array.chunk_layout.read_chunk.shape[0] > 1:
            # Each slice would decode the whole chunk anew; on disk it can wait for the next layer.
            return to_torch(self._read_spilled(name, layer))
        return to_torch(self._read(array if layer is None else array[layer]))

    def tree(self) -> dict[str, np.ndarray]:
        """All arrays; bfloat16 in the type of `ml_dtypes`."""
        return {path: self._read(array) for path, array in self._arrays.items()}

    def _read(self, array: Any) -> np.ndarray:
        with _damage(self._folder):
            return array.read().result()

    def _read_spilled(self, name: str, layer: int) -> np.ndarray:
        """One layer out of a nameless file. Read, not mapped: pages of a map would count as memory of this process."""
        array = self._arrays[name]
        if name not in self._spilled:
            self._spilled[name] = file = tempfile.TemporaryFile()  # noqa: SIM115 (it stays open as long as the store)
            weakref.finalize(self, file.close)
            for block in self._blocks(array):
                file.write(block)
            file.flush()
        values = np.empty(array.shape[1:], array.dtype.numpy_dtype)
        place, memory = layer * values.nbytes, values.reshape(-1).view(np.uint8).data
        if os.preadv(self._spilled[name].fileno(), [memory], place) < values.nbytes:
            raise damaged(self._folder, EOFError(f"{name} ends before its layer {layer}"))
        return values

    def _blocks(self, array: Any) -> Iterator[memoryview | bytes]:
        """The array's bytes in order; of a single zstd chunk, as Orbax writes them, a piece at a time."""
        spec = array.spec().to_json()["metadata"]
        plain = spec["chunks"] == spec["shape"] and spec["order"] == "C" and not spec["filters"]
        if not plain or (spec["compressor"] or {}).get("id") != "zstd":
            yield np.ascontiguousarray(self._read(array)).reshape(-1).view(np.uint8).data
            return
        zstandard = _package("zstandard")
        unpack = zstandard.ZstdDecompressor().decompressobj()
        key, start = spec.get("dimension_separator", ".").join("0" * len(spec["shape"])), 0
        try:
            while not unpack.eof:
                try:
                    piece = array.kvstore.read(key, byte_range=slice(start, start + _PIECE)).result().value
                except ValueError as error:
                    if "OUT_OF_RANGE" not in str(error):
                        raise
                    piece = array.kvstore.read(key, byte_range=slice(start, None)).result().value  # the last is shorter
                start += len(piece)
                yield unpack.decompress(piece)
        except (zstandard.ZstdError, ValueError) as error:
            raise damaged(self._folder, error) from error


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
            names = sorted({named.get(key, str) for key in named})
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
            for entry in self._file.zip.namelist():
                with self._file.zip.open(entry) as file:
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


ArrayStore: TypeAlias = OrbaxStore | SafetensorsStore | NpzStore
"""Read-only `arrays` by name; `where` they are, for messages.

`read(name)` is the whole array, `read(name, layer)` a layer of it; it raises IntegrityError where the file is damaged.
"""


def to_torch(values: np.ndarray) -> Tensor:
    """The same memory as a tensor, bfloat16 included."""
    if values.dtype.name == "bfloat16":  # numpy has none of its own; extensions register it under this name
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


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


def write_tree(folder: Path, arrays: Mapping[str, ArrayInfo], layers: Iterable[tuple[str, int | None, Tensor]]) -> None:
    """Write a `params` folder that openpi restores.

    Args:
        folder: an existing, empty one.
        arrays: by tree path joined with "/".
        layers: their values, whole (None) or layer by layer, in any order.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    ts = _package("tensorstore")
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    opened: dict[str, Any] = {}
    for path, layer, values in layers:
        half = values.dtype == torch.bfloat16
        numbers = values.view(torch.uint16).numpy().view(ts.bfloat16.numpy_dtype) if half else values.numpy()
        try:
            if path not in opened:
                shape = list(arrays[path].shape)
                metadata = {
                    "shape": shape,
                    "chunks": shape if layer is None else [1, *shape[1:]],
                    "dtype": _WRITTEN[arrays[path].dtype],
                    "compressor": {"id": "zstd", "level": 1},
                    "fill_value": None,
                    "order": "C",
                    "filters": None,
                    "zarr_format": 2,
                }
                store = _kvstore(folder, ".".join(("params", *path.split("/"))))
                spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
                opened[path] = ts.open(spec, create=True, context=context).result()
            target = opened[path] if layer is None else opened[path][layer]
            target.write(numbers).result()
        except ValueError as error:
            raise write_failed(error, folder) from error
    leaves = {}
    for path in arrays:
        keys = ("params", *path.split("/"))
        value = {"value_type": "jax.Array", "skip_deserialize": False}
        leaves[str(keys)] = {"key_metadata": [{"key": k, "key_type": 2} for k in keys], "value_metadata": value}
    write_json(folder / _METADATA, {"tree_metadata": leaves, "use_zarr3": False})


def _kvstore(folder: Path, key: str) -> dict[str, str]:
    return {"driver": "ocdbt", "base": f"file://{folder.resolve()}/", "path": f"{key}/"}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            expected=f"the package {name}, which reads and writes Orbax checkpoints",
            found="no such package",
            where="this Python environment",
            next="pip install 'manipi[openpi]'",
        ) from error


_T = TypeVar("_T")
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
_KINDS |= {int: "a whole number", float: "a number"}
LARGEST = 1_000_000
"""No size in a file of others is larger."""


class Fields:
    """An object of another project's JSON, of which nothing is certain: not that a field is there, nor of which type.

    Raises:
        CheckpointError: here and in its methods, where what is asked for is missing or of another type.
    """

    def __init__(self, value: Any, where: str):
        self.where = where
        self._fields: dict[str, Any] = _of_type(value, dict, where)

    @staticmethod
    def read(path: Path) -> "Fields":
        return Fields(read_json(path), str(path))

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def has(self, name: str) -> bool:
        """Whether it says anything of `name`; null says nothing."""
        return self._fields.get(name) is not None

    def get(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        """The value of that type; `default`, if there is one, where it is absent or null."""
        value = self._fields.get(name)
        if value is None and default is not None:
            return default
        return _of_type(value, kind, f"{self.where}, {name}")

    def size(self, name: str) -> int:
        """A whole number from 1 to LARGEST."""
        value = self.get(name, int)
        if not 1 <= value <= LARGEST:
            raise unexpected(f"a whole number from 1 to {LARGEST:,}", value, f"{self.where}, {name}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty where it is absent."""
        where = f"{self.where}, {name}"
        return [_of_type(value, str, where) for value in self.get(name, list, [])]

    def inner(self, name: str) -> "Fields":
        """The object of that name."""
        return Fields(self._fields.get(name), f"{self.where}, {name}")

    def objects(self, name: str) -> list["Fields"]:
        """A list of objects."""
        where = f"{self.where}, {name}"
        return [Fields(value, f"{where}[{number}]") for number, value in enumerate(self.get(name, list))]


def file_beside(folder: Path, name: str, where: str) -> Path:
    """The file of that name in `folder`, as a file of the folder names it.

    Raises:
        CheckpointError: there is none, or the name leads out of the folder.
    """
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts or not name:
        raise unexpected("the name of a file in the same folder", name, where)
    if not (folder / name).is_file():
        raise unexpected(f"the file {shown(name)} beside it", "no such file", where)
    return folder / name


def unexpected(expected: str, found: object, where: str) -> CheckpointError:
    text = found if isinstance(found, str) and found.startswith("no ") else shown(found)
    return CheckpointError(
        expected=expected, found=text, where=where, next="copy or fetch the file again, or ask whoever wrote it"
    )


def _of_type(value: Any, kind: type[_T], where: str) -> _T:
    # Not `isinstance`: in JSON's types true is no number, though it is one in Python's.
    if type(value) not in ((int, float) if kind is float else (kind,)):
        raise unexpected(_KINDS[kind], "no value" if value is None else value, where)
    return value
