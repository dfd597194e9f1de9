"""The bytes on the wire are openpi's, in both directions."""

import math
import zlib

import numpy as np
import pytest
from golden import ABSENT, find, name_of, read_json

from manipi_client import wire

FILES = find("wire/*.json")

pytestmark = pytest.mark.skipif(not FILES, reason=ABSENT)

SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def plain(value):
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value


def build(spec, unpacked):
    """The value that a spec describes. Large arrays have no values in the spec: theirs are taken from `unpacked`."""
    kind = spec["type"]
    if kind == "dict":
        return {plain(k["value"]): build(v, unpacked[plain(k["value"])]) for k, v in spec["items"]}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](build(s, u) for s, u in zip(spec["items"], unpacked, strict=True))
    if kind == "numpy_scalar":
        return np.dtype(spec["dtype"]).type(plain(spec["value"]))
    if kind != "ndarray":
        return plain(spec.get("value"))
    if "values_c_order" not in spec:
        return unpacked.copy()
    values = [SPECIAL.get(v, v) if "f" in spec["dtype"] else plain(v) for v in spec["values_c_order"]]
    return np.array(values, spec["dtype"]).reshape(spec["shape"])


def check(spec, value):
    """Asserts that `value` is, to the type and the byte, what the spec describes."""
    kind = spec["type"]
    if kind == "dict":
        assert type(value) is dict
        assert list(value) == [plain(key["value"]) for key, _ in spec["items"]]
        for (_, item), found in zip(spec["items"], value.values(), strict=True):
            check(item, found)
    elif kind == "list":
        assert type(value) is list
        for item, found in zip(spec["items"], value, strict=True):
            check(item, found)
    elif kind == "ndarray":
        assert (value.dtype.str, list(value.shape)) == (spec["dtype"], spec["shape"])
        assert zlib.crc32(value.tobytes()) == spec["crc32_of_c_order_bytes"]
        assert not value.flags.writeable
    elif kind == "numpy_scalar":
        assert isinstance(value, np.generic)
        assert (value.dtype.str, value.item()) == (spec["dtype"], plain(spec["value"]))
    else:
        expected = plain(spec.get("value"))
        assert type(value) is type(expected)
        assert value == expected


def packed(file):
    """`(bin file, what it unpacks to, what it was packed from)` of everything that an index lists."""
    index = read_json(file)
    entries = index.get("cases", []) + [frame for frame in index.get("frames", []) if frame["kind"] == "binary"]
    return [(file.parent / e["file"], e["unpacks_to"], e.get("packed_from", e["unpacks_to"])) for e in entries]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_wire(file, measure):
    for path, unpacks_to, packed_from in packed(file):
        frame = path.read_bytes()
        value = wire.unpack(frame)
        check(unpacks_to, value)
        measure("wire messages", wire.pack(build(packed_from, value)) != frame, 0)


def test_no_message_is_left_out():
    listed = {path for file in FILES for path, *_ in packed(file)}
    assert listed == set(find("wire/*.bin"))
