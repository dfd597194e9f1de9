"""The bytes on the wire: MessagePack with NumPy arrays, the same bytes as openpi's.

An array and a NumPy scalar become maps whose keys are binary strings, in this order:

    array    {b"__ndarray__": true, b"data": C-order bytes, b"dtype": "<f4", b"shape": [10, 7]}
    scalar   {b"__npgeneric__": true, b"data": 0.5, b"dtype": "<f4"}

Byte order is kept. Tuples come back as lists, arrays come back read-only. Objects, complex numbers and structured
arrays do not travel: the wire carries no code and no pickles.
"""

from __future__ import annotations

import math
import re
from typing import Any, Dict

import msgpack
import numpy as np

from manipi_client.errors import InputError, ProtocolError, one_line, shown

# Booleans, integers, floats, text, bytes, dates. Anything else, such as "O" or "f4,i4", never reaches np.dtype.
_MAX_DIMENSIONS = 64
"""Of NumPy 2. The product of more sizes is a number that takes long to compute and to write."""

_DTYPE = re.compile(r"[<>|]?([biufSU]\d{1,9}|[mM]8\[\w+\])")


class Packer:
    """Packs one value after another into the same memory: fresh memory for three pictures takes longer than they do."""

    def __init__(self) -> None:
        self._packer = msgpack.Packer(default=_to_map, autoreset=False)

    def pack(self, value: Any) -> memoryview:
        """As the function `pack`. What it returns has to be let go before the next call, which overwrites it."""
        self._packer.reset()
        try:
            self._packer.pack(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                expected="arrays of numbers, booleans or text; plain dicts, lists, strings, bytes, numbers and None",
                found=one_line(str(error), 300),
                where="the message to send",
                next="convert that value, for example with np.asarray(value, np.float32)",
            ) from error
        return memoryview(self._packer.getbuffer())


def pack(value: Any) -> bytes:
    """Bytes of a value made of dicts, lists, tuples, strings, bytes, numbers, None, arrays and NumPy scalars.

    Raises:
        InputError: something else is in it.
    """
    return bytes(Packer().pack(value))


def unpack(frame: bytes, *, max_items: int | None = None) -> Any:
    """The value in a binary frame.

    Args:
        max_items: of all lists and maps together, and characters of a text (four times as many bytes as UTF-8); None
            for any number. Arrays do not count. A short frame can hold a million lists, which are slow to make and
            large in memory. Keys then have to be texts, since bytes have no limit but the frame's.

    Raises:
        ProtocolError: not MessagePack, too many items, or an array whose dtype, shape and data do not fit together.
            It repeats little of what the frame holds, however large that is.
    """
    left = most = 0 if max_items is None else max_items

    def count(value: Any) -> Any:
        nonlocal left
        left -= len(value)
        if left < 0:
            raise _too_many(most, "more items")
        if isinstance(value, dict):
            value = _from_map(value)
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            strange = next(key for key in value if not isinstance(key, str))
            raise _protocol_error("a map whose keys are texts", f"the key {shown(strange)}")
        return value

    limits: Dict[str, Any] = {"object_hook": _from_map}
    if max_items is not None:
        limits = {f"max_{kind}_len": max_items for kind in ("array", "map", "ext")}
        limits.update(object_hook=count, list_hook=count, max_str_len=4 * max_items)
    try:
        return msgpack.unpackb(frame, **limits)
    except ProtocolError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        found = one_line(str(error), 200) or type(error).__name__
        # The library tells its limits apart by their names alone.
        if max_items is not None and " exceeds max_" in found:
            raise _too_many(max_items, found) from error
        raise _protocol_error("one MessagePack value, whose maps have texts as keys", found) from error


def _to_map(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        return value  # msgpack then says which type it cannot pack.
    if value.dtype.kind in "OVc":
        raise ValueError(f"an array or scalar of dtype {value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": _bytes_of(value), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _bytes_of(array: np.ndarray) -> Any:
    """In C order. Not `tobytes`: another copy of three pictures takes half a millisecond, mostly for fresh memory."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""


def _from_map(fields: dict) -> Any:
    if b"__ndarray__" in fields:
        return _read_array(fields.get(b"data"), _read_dtype(fields), fields.get(b"shape"))
    if b"__npgeneric__" in fields:
        return _read_scalar(fields.get(b"data"), _read_dtype(fields))
    return fields


def _read_dtype(fields: dict) -> np.dtype:
    name = fields.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise _protocol_error("a dtype of numbers, booleans, text or dates, such as '<f4'", shown(name))
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError) as error:
        raise _protocol_error("a dtype that NumPy knows", shown(name)) from error
    if dtype.itemsize == 0:
        raise _protocol_error("a dtype of at least one byte", shown(name))
    return dtype


def _read_array(data: Any, dtype: np.dtype, shape: Any) -> np.ndarray:
    if not isinstance(data, bytes):
        raise _protocol_error("an array's data as bytes", type(data).__name__)
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise _protocol_error("an array's shape as a list of sizes", shown(shape))
    if len(shape) > _MAX_DIMENSIONS:
        raise _protocol_error("a shape that NumPy can hold", f"{len(shape)} dimensions")
    needed = math.prod(shape) * dtype.itemsize
    if needed != len(data):
        raise _protocol_error(f"{shown(needed)} bytes for shape {shown(shape)} of {dtype.str}", f"{len(data)} bytes")
    try:
        return np.ndarray(shape, dtype, buffer=data)
    except ValueError as error:
        raise _protocol_error("a shape that NumPy can hold", f"{shown(shape)}: {error}") from error


def _read_scalar(data: Any, dtype: np.dtype) -> np.generic:
    # Text for a number would be parsed, and a parser's error repeats all of it.
    kinds: Any = bytes if dtype.kind == "S" else str if dtype.kind == "U" else (bool, int, float)
    if not isinstance(data, kinds):
        raise _protocol_error(f"a scalar's data as a plain value that {dtype.str} holds", type(data).__name__)
    try:
        # NumPy before 2 would wrap numbers around that are out of bounds, and any cuts fractions off.
        if dtype.kind in "iu" and not (np.iinfo(dtype).min <= int(data) <= np.iinfo(dtype).max and data == int(data)):
            raise OverflowError
        return dtype.type(data)
    except (TypeError, ValueError, OverflowError) as error:
        raise _protocol_error(f"a value of {dtype.str}", shown(data)) from error


def _too_many(max_items: int, found: str) -> ProtocolError:
    expected = f"at most {max_items:,} items in lists and maps together, and {4 * max_items:,} bytes in a text"
    return _protocol_error(expected, found, "send less: numbers as one NumPy array, which counts as one; shorter texts")


def _protocol_error(
    expected: str,
    found: str,
    next: str = "check that both ends speak openpi's protocol (manipi_client.wire or openpi_client.msgpack_numpy)",
) -> ProtocolError:
    return ProtocolError(expected=expected, found=found, where="a binary frame", next=next)
