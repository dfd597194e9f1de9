"""TFRecord files and the tf.Example messages in them, without TensorFlow.

    file       record · record · record …                                                        little-endian
    record     length uint64 · its checksum uint32 · data, `length` bytes · their checksum uint32
    data       tf.Example: {"steps/action": floats, "steps/is_last": integers, "steps/language_instruction": bytes …}

A checksum is CRC-32C, rotated right by 15 bits, plus a constant (tensorflow/core/lib/hash/crc32c.h). The message is
protocol buffers' wire format (tensorflow/core/example/feature.proto). Lists of bytes are only located in it: pictures
are most of a record, and not needed while the rest is read.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import google_crc32c
import numpy as np
from jaxtyping import Int64

from manipi.errors import DatasetFormatError

_HEADER, _CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
_BYTES, _FLOATS, _INTEGERS = 1, 2, 3
"""Field numbers of the three kinds of list in a tf.train.Feature."""
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
"""Wire types."""

Part: TypeAlias = tuple[int, int, int, int]
"""Field number, wire type, start and end of a field's content."""


@dataclass(frozen=True)
class Record:
    """The data of one record, whole."""

    offset: int
    """Where `data` begins in the file."""
    data: bytes
    checksum: int


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, in order, one in memory at a time.

    Raises:
        DatasetFormatError: no such file, or a record that is truncated or does not match its checksum; names it.
    """
    if not path.is_file():
        broken("a record file", "nothing", path)
    with path.open("rb") as file:
        number, offset = 0, 0
        while header := file.read(_HEADER.size):
            where = f"{path}, record {number} at byte {offset}"
            if len(header) < _HEADER.size:
                broken(f"a record header of {_HEADER.size} bytes", f"the end of the file after {len(header)}", where)
            length, length_checksum = _HEADER.unpack(header)
            _check(header[:8], length_checksum, f"{where}, its length")
            data, tail = file.read(length), file.read(_CHECKSUM.size)
            if len(data) < length or len(tail) < _CHECKSUM.size:
                broken(f"a record of {length} bytes", f"the end of the file after {len(data)}", where)
            (checksum,) = _CHECKSUM.unpack(tail)
            _check(data, checksum, where)
            yield Record(offset + _HEADER.size, data, checksum)
            number, offset = number + 1, offset + _HEADER.size + length + _CHECKSUM.size


def masked_crc32c(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _check(data: bytes, checksum: int, where: str) -> None:
    if (found := masked_crc32c(data)) != checksum:
        broken(f"data with the checksum {checksum:08x}", f"{found:08x}: some bytes were changed", where)


def broken(expected: str, found: str, where: str | Path) -> NoReturn:
    """Raise the error for a dataset whose files are missing, damaged or disagree."""
    raise DatasetFormatError(
        expected=expected,
        found=found,
        where=str(where),
        next="copy this file again from where the dataset is published, and compare the sizes",
    )


def read_json(path: Path) -> Any:
    """A dataset's metadata. Raises DatasetFormatError where it is absent or no JSON."""
    if not path.is_file():
        broken("a metadata file", "nothing", path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        broken("JSON", str(error), path)


class Example:
    """The lists of a tf.Example by name. Any method raises ValueError where the bytes are no such message."""

    def __init__(self, data: bytes):
        self._data = data
        self._lists: dict[str, Part] = {}
        for _, _, start, end in _parts(data, 0, len(data)):
            for _, _, entry, entry_end in _parts(data, start, end):
                fields = {number: part for number, *part in _parts(data, entry, entry_end)}
                _, key, key_end = fields[1]
                _, value, value_end = fields.get(2, (0, 0, 0))
                self._lists[data[key:key_end].decode()] = next(_parts(data, value, value_end), (0, 0, 0, 0))

    def numbers(self, key: str) -> np.ndarray:
        """float32 or int64 [n], as stored."""
        kind, _, start, end = self._list(key)
        if kind == _BYTES:
            raise ValueError(f"bytes in {key!r}, not numbers")
        pieces = []
        for _, wire, at, stop in _parts(self._data, start, end):
            if kind == _FLOATS:
                if (stop - at) % 4 or wire not in (_DELIMITED, _FIXED32):
                    raise ValueError(f"floats in {stop - at} bytes of wire type {wire}")
                pieces.append(np.frombuffer(self._data, "<f4", (stop - at) // 4, at))
                continue
            # Varints: seven bits per byte, the lowest first, and a high bit on all bytes but a number's last.
            octets = np.frombuffer(self._data, np.uint8, stop - at, at)
            if not octets.size or octets[-1] > 127 or wire not in (_DELIMITED, _VARINT):
                raise ValueError(f"integers in {stop - at} bytes of wire type {wire}")
            first = np.concatenate([[0], np.flatnonzero(octets < 128)[:-1] + 1])
            place = np.arange(octets.size) - np.repeat(first, np.diff(first, append=octets.size))
            bits = (octets & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
            pieces.append(np.bitwise_or.reduceat(bits, first).astype(np.int64))
        empty = np.empty(0, "<f4" if kind == _FLOATS else np.int64)
        return pieces[0] if len(pieces) == 1 else np.concatenate([empty, *pieces])

    def spans(self, key: str) -> Int64[np.ndarray, "n 2"]:
        """Start and size within the record's data of every item of a list of bytes."""
        kind, _, start, end = self._list(key)
        if kind not in (_BYTES, 0):
            raise ValueError(f"numbers in {key!r}, not bytes")
        items = [(at, stop - at) for _, _, at, stop in _parts(self._data, start, end)]
        return np.array(items, dtype=np.int64).reshape(-1, 2)

    def texts(self, key: str) -> list[str]:
        """A list of bytes as UTF-8."""
        return [self._data[start : start + size].decode() for start, size in self.spans(key).tolist()]

    def _list(self, key: str) -> Part:
        if key not in self._lists:
            raise ValueError(f"no {key!r}, only {', '.join(sorted(self._lists))}")
        return self._lists[key]


def _parts(data: bytes, at: int, end: int) -> Iterator[Part]:
    """The fields of a message between two positions."""
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _DELIMITED:
            size, at = _varint(data, at)
            stop = at + size
        elif wire == _VARINT:
            stop = _varint(data, at)[1]
        elif wire in (_FIXED32, _FIXED64):
            stop = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if stop > end:
            raise ValueError(f"a field of {stop - at} bytes, {stop - end} beyond its message")
        yield tag >> 3, wire, at, stop
        at = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a position, and the position behind it."""
    value = shift = 0
    for octet in data[at : at + 10]:
        at += 1
        value |= (octet & 127) << shift
        if octet < 128:
            return value, at
        shift += 7
    raise ValueError(f"no end of a number at byte {at}")
