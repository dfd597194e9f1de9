"""openpi's Orbax checkpoints, read and written with tensorstore alone: no JAX, no Orbax.

    params/
    ├─ _METADATA        JSON: the tree's paths
    ├─ manifest.ocdbt   an OCDBT key-value store …
    └─ d/ …             … of zarr arrays: `params.PaliGemma.img.embedding.kernel[.value]/.zarray`, `…/0.0.0.0`

Released checkpoints have leaves without a suffix; those of openpi's training end in `value`. Both read alike.
"""

import importlib
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from manipi.errors import CheckpointError, ConfigError
from manipi.records import write_json
from manipi.storage import write_failed
from manipi.weights.foreign_json import Fields, unexpected
from manipi.weights.names import to_torch
from manipi.weights.stores import ArrayInfo, damaged, require_plain

_METADATA = "_METADATA"
_WRITTEN = {torch.float32: "<f4", torch.bfloat16: "bfloat16"}
"""What openpi's checkpoints come in."""
_PIECE = 16 << 20
"""Compressed bytes in memory at a time."""


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
        for leaf in leaves.keys():  # noqa: SIM118 (they are no mapping)
            keys = [entry.get("key", str) for entry in leaves.inner(leaf).objects("key_metadata")]
            parts = keys[1:] if keys[:1] == ["params"] else keys
            path = "/".join(parts[:-1] if parts[-1:] == ["value"] else parts)
            if not path:
                raise unexpected("the keys of an array", keys, leaves.where)
            spec = {"driver": "zarr", "kvstore": _kvstore(self._folder, ".".join(keys))}
            with self._damage():
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
        with self._damage():
            return array.read().result()

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """What tensorstore says of a broken folder, as an IntegrityError that names it."""
        try:
            yield
        except ValueError as error:
            raise damaged(self._folder, error) from error

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
        if values.dtype == torch.bfloat16:
            numbers = values.view(torch.uint16).numpy().view(ts.bfloat16.numpy_dtype)
        else:
            numbers = values.numpy()
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
