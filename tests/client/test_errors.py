"""What an error shows of what came from outside: little, on one line, in no time, whatever it is."""

import time

import numpy as np
import pytest

from manipi_client.errors import ProtocolError, error_from_text, error_to_text, one_line, shown


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def wide(depth):
    value = "a" * 50
    for _ in range(depth):
        value = [value] * 1000
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("it's", '"it\'s"'),
        ("\x1b[2J\n\u2028\u202e", r"'\x1b[2J\n\u2028\u202e'"),
        ("\ud800", r"'\ud800'"),
        ("öffne 🤖", "'öffne 🤖'"),
        ("a" * 100, "'" + "a" * 76 + "..."),
        (b"\xff\n", r"b'\xff\n'"),
        (bytearray(b"a" * 21), "b'" + "a" * 20 + "'... (21 bytes)"),
        (None, "None"),
        (True, "True"),
        (-7, "-7"),
        (2**64, "18446744073709551616"),
        (10**5_000, "a whole number of 16610 bits"),
        (0.5, "0.5"),
        (np.float32(0.5), "0.5"),
        (np.longdouble(2), "2.0"),
        (np.str_("go\n"), r"'go\n'"),
        (np.bytes_(b"go"), "b'go'"),
        (np.zeros((2, 3), ">f4"), "an array of >f4 of shape [2, 3]"),
        (np.array("\n"), "an array of <U1 of shape []"),
        (np.zeros(1, [("\x1b" * 90, "f4")]), "an array of records of 1 fields of shape [1]"),
        (np.zeros(1, "V3")[0], "a scalar of |V3"),
        (np.dtype("<f4"), "float32"),
        ([], "[]"),
        ((1,), "(1,)"),
        ({"a": [1, (2, 3)], b"b": {"c"}}, "{'a': [1, (2, 3)], b'b': {'c'}}"),
        (nested(50), "[[[[...]]]]"),
        (frozenset([2]), "{2}"),
        (object(), "an object of type object"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isprintable() else "",
)
def test_what_is_shown(value, expected):
    assert shown(value) == expected


class Loud:
    """Its `repr` is longer than the memory."""

    def __repr__(self):
        raise MemoryError


LARGE = {
    "text": "\x1b" * 10**7,
    "text of a kind": type("Text", (str,), {"__repr__": Loud.__repr__})("a" * 10**7),
    "bytes": b"\n" * 10**7,
    "whole number": 1 << 10**7,
    "list": [b"\n" * 10**6] * 10**6,
    "dict": dict.fromkeys(range(10**6), "x"),
    "dict with a large key": {b"\n" * 10**7: 1},
    "set": set(range(10**6)),
    "deep": nested(10**5),
    "wide and deep": wide(4),
    "array of text": np.zeros(10, "U1000000"),
    "text scalar": np.zeros(1, "S10000000")[0],
    "object": Loud(),
    "list of objects": [Loud()] * 1000,
}


@pytest.mark.parametrize("limit", [20, 80, 500])
@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_is_shown_in_no_time(name, limit):
    began = time.process_time()
    text = shown(LARGE[name], limit)
    assert time.process_time() - began < 0.05
    assert len(text) <= limit
    assert text.isprintable()


def test_any_text_becomes_one_line_that_says_as_much_as_fits():
    rng = np.random.default_rng(0)
    for _ in range(300):
        points = [*rng.integers(0, 0x110000, 40).tolist(), *rng.integers(0, 128, 40).tolist()]
        text, limit = "".join(map(chr, points)), int(rng.integers(10, 400))
        for line in (one_line(text, limit), shown(text, limit)):
            assert len(line) <= limit
            assert line.isprintable()
            assert len(line.splitlines()) == 1


@pytest.mark.parametrize("part", ["a" * 10**6, "🤖" * 10**6, "\x1b\n" * 10**6, "\ud800" * 5_000, "short"], ids=range(5))
def test_a_text_frame_is_short_and_has_five_lines(part):
    error = ProtocolError(expected=part, found=part, where=part, next=part)
    text = error_to_text(error)
    assert len(text.encode()) <= 4_000
    assert [line.split()[0] for line in text.split("\n")] == ["ProtocolError", "expected", "found", "where", "next"]
    assert error_from_text(text, "ws://x").code == "ProtocolError"
    assert (part == "short") == (error_from_text(text, "ws://x").found == part)


@pytest.mark.parametrize("number", [1, 100_000])
def test_marks_that_come_often_take_no_time(number):
    began = time.process_time()
    error = error_from_text("X\nexpected a" + "\n   found b" * number + "\n   where c" * number, "ws://x")
    assert error.code == ""
    assert time.process_time() - began < 0.5
    text = "X\nexpected a\n   found b" + "\n   found b" * number + "\n   where c\n    next d"
    assert error_from_text(text, "ws://x").code == "X"
