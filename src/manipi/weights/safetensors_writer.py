"""A `.safetensors` file written tensor by tensor: the library's own writer needs all of them in memory at once."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from manipi.weights.stores import ArrayInfo

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def write_safetensors(
    path: Path, infos: Mapping[str, ArrayInfo], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] = {}
) -> None:
    """Write the file.

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
