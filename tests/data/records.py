"""A writer of RLDS datasets, as small as can be: tf.Example messages in TFRecord files, and the two JSON files."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

KINDS = {bytes: 1, float: 2, int: 3}


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    octets = []
    while number > 127:
        octets.append(number & 127 | 128)
        number >>= 7
    return bytes([*octets, number])


def delimited(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def feature(values: Sequence[Any]) -> bytes:
    """A tf.train.Feature with lists as TensorFlow writes them: numbers packed, texts and pictures one by one."""
    if not values:
        return b""
    values = [v.encode() if isinstance(v, str) else v for v in values]
    kind = KINDS[type(values[0])]
    if kind == 1:
        content = b"".join(delimited(1, value) for value in values)
    elif kind == 2:
        content = delimited(1, np.array(values, "<f4").tobytes())
    else:
        content = delimited(1, b"".join(map(varint, values)))
    return delimited(kind, content)


def example(features: Mapping[str, Sequence[Any]]) -> bytes:
    entries = [delimited(1, delimited(1, k.encode()) + delimited(2, feature(v))) for k, v in features.items()]
    return delimited(1, b"".join(entries))


def checksum(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32))


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def leaf(kind: str, shape: Sequence[int] = (), dtype: str = "float32") -> dict[str, Any]:
    """`text`, `tensor` or `image` as features.json has them."""
    return {kind: {} if kind == "text" else {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": dtype}}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, node in leaves.items():
        *folders, last = name.split("/")
        inside = tree
        for folder in folders:
            inside = inside.setdefault(folder, {"featuresDict": {"features": {}}})["featuresDict"]["features"]
        inside[last] = node
    return {"featuresDict": {"features": tree}}


def write_rlds(
    root: Path,
    steps: Mapping[str, Any],
    episodes: Sequence[Mapping[str, Sequence[Any]]],
    *,
    name: str = "made",
    shards: Sequence[int] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A dataset of one split, `train`; of `shards` is said how many episodes each file holds."""
    shards = shards or [len(episodes)]
    root.mkdir(parents=True)
    features = nested({f"episode_metadata/{k}": v for k, v in (metadata or {}).items()})
    features["featuresDict"]["features"]["steps"] = {"sequence": {"feature": nested(steps), "length": "-1"}}
    (root / "features.json").write_text(json.dumps(features))
    split = {"name": "train", "shardLengths": [str(n) for n in shards]}
    (root / "dataset_info.json").write_text(json.dumps({"name": name, "version": "1.0.0", "splits": [split]}))
    left = iter(episodes)
    for i, length in enumerate(shards):
        data = b"".join(record(example(next(left))) for _ in range(length))
        (root / f"{name}-train.tfrecord-{i:05d}-of-{len(shards):05d}").write_bytes(data)
    return root
