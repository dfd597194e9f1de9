"""Frames whose content is meant to hurt: large where a message repeats it, deep, misspelt."""

from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np

from manipi_client import wire


def array(dtype: Any, shape: Any, data: Any) -> dict[bytes, Any]:
    """The map that an array becomes on the wire, whatever is in it."""
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


def scalar(dtype: Any, data: Any) -> dict[bytes, Any]:
    return {b"__npgeneric__": True, b"data": data, b"dtype": dtype}


def nested(depth: int, name: str = "a") -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {name: value}
    return value


def frames(observation: Mapping[str, Any], size: int) -> dict[str, Callable[[], bytes]]:
    """Frames of about `size` bytes, by what is wrong with them.

    Args:
        observation: what the policy would answer, of plain values and arrays as maps; small.
    """
    half = size // 2

    def sent(**changes: Any) -> Callable[[], bytes]:
        return lambda: wire.pack({**observation, **changes})

    def large(make: Callable[[bytes], Any], length: int = size) -> Callable[[], bytes]:
        return lambda: wire.pack({**observation, **make(b"\x1b[2J\n\xff" * (length // 6))})

    return {
        "a key of bytes": lambda: wire.pack({**observation, b"\n\xff" * half: 1}),
        "a key of bytes in a map": large(lambda data: {"images": {data: 1}}),
        "an array's unknown key": large(lambda data: {"state": {**array("<f4", [7], bytes(28)), data: 1}}),
        "a dtype of bytes": large(lambda data: {"state": array(data, [7], bytes(28))}),
        "a scalar's dtype of bytes": large(lambda data: {"state": scalar(data, 1.0)}),
        "a shape of bytes": large(lambda data: {"state": array("<f4", data, bytes(28))}),
        "bytes inside a shape": large(lambda data: {"state": array("<f4", [data], bytes(28))}),
        "a number of bytes": large(lambda data: {"state": scalar("<f4", data)}),
        "a whole number of bytes": large(lambda data: {"state": scalar("<i4", data)}),
        "a number of digits": lambda: wire.pack({**observation, "state": scalar("<f8", b"9" * size)}),
        "a date of bytes": large(lambda data: {"state": scalar("<M8[s]", data)}),
        "data that fits no shape": large(lambda data: {"state": array("<f4", [2**63] * 60, data)}),
        "a product without end": sent(state=array("<f4", [2**64 - 1] * 2_000, b"1")),
        "a state of bytes": large(lambda data: {"state": data}),
        "a state of text": large(lambda data: {"state": array(f"|S{len(data)}", [1], data)}),
        "a prompt of bytes": large(lambda data: {"prompt": data}),
        "a prompt of letters": sent(prompt=b"word " * (size // 5)),
        "a prompt in an array": large(lambda data: {"prompt": array(f"|S{len(data)}", [], data)}),
        "a prompt in an array of characters": sent(prompt=array(f"<U{size // 4}", [1], b"a\0\0\0" * (size // 4))),
        "a prompt as a scalar": large(lambda data: {"prompt": scalar("|S1", data)}),
        "a prompt of many": lambda: wire.pack({**observation, "prompt": array("|S1", [size], b"a" * size)}),
        "characters that are none": sent(prompt=array("<U1", [], b"\xff\xff\xff\x7f")),
        "half a surrogate pair": sent(prompt=array("<U2", [1], "\ud83dx".encode("utf-32-le", "surrogatepass"))),
        "characters that are none elsewhere": sent(**{"manipi/reset": array(">U1", [], b"\x00\x11\x00\x00")}),
        "a reset of bytes": large(lambda data: {"manipi/reset": data}),
        "a deadline of text": large(lambda data: {"manipi/deadline_ms": array(f"|S{len(data)}", [1], data)}),
        "a list with one long text": large(lambda data: {"state": [data, *[b""] * 1_000]}, size),
        "a list of texts and numbers": sent(
            state=[array(f"|S{half // 100}", [100], bytes(half // 100 * 100)), *[array("|u1", [100], bytes(100))] * 300]
        ),
        "a picture of one row": sent(images={"base": array("|u1", [1, size // 3, 3], bytes(size // 3 * 3))}),
        "a picture of floats": sent(
            images={"base": array("<f2", [size // 6_000, 1_000, 3], bytes(size // 6_000 * 6_000))}
        ),
        "a picture that is none": sent(images={"base": array("<i8", [size // 8], bytes(size // 8 * 8))}),
        "an unknown key": large(lambda data: {"unknown": data}),
        "long names": lambda: wire.pack({"a" * 2_000 + str(i): 0 for i in range(2_000)}),
        "names that are nearly right": lambda: wire.pack({f"{i:04}state" * 20: 0 for i in range(2_000)}),
        "names for a terminal": lambda: wire.pack({"\x1b]0;x\x07\n2026 manipi stopped": 0, "\u202e\u2028": 1}),
        "maps in maps": sent(images=nested(400)),
        "as many maps in maps as a message can hold": sent(images=nested(1_000)),
        "nameless maps in maps": sent(images=nested(400, "")),
        "lists in lists": lambda: wire.pack({**observation, "extra": 0})[:-1] + b"\x91" * 500 + b"\x00",
    }


def plain(observation: Mapping[str, Any]) -> dict[str, Any]:
    """An observation with its arrays as maps, which `frames` changes."""
    return msgpack.unpackb(wire.pack(dict(observation)))


GOOD: Mapping[str, Any] = {
    "images": {"base": np.zeros((8, 8, 3), np.uint8)},
    "state": np.zeros(7, np.float32),
    "prompt": "go",
}
