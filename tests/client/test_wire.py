"""Nothing but plain data gets through. That the bytes are openpi's is compared in tests/parity."""

import msgpack
import numpy as np
import pytest

from manipi_client import InputError, ProtocolError, wire


def test_packing_does_not_depend_on_memory_layout():
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert wire.pack(np.asfortranarray(array)) == wire.pack(array)
    assert wire.pack(array.T) == wire.pack(array.T.copy())
    assert wire.pack(np.arange(21)[::3]) == wire.pack(np.arange(0, 21, 3))


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, np.complex64),
        np.array([object()]),
        np.zeros(2, [("x", "f4")]),
        np.complex128(1),
        {1, 2},
        object(),
        2**70,
        np.datetime64("2024-01-01"),
    ],
    ids=["complex", "object", "structured", "complex scalar", "set", "python object", "large int", "date scalar"],
)
def test_what_does_not_travel_is_refused_when_packing(value):
    with pytest.raises(InputError, match="next convert that value") as refused:
        wire.pack({"state": value})
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, TypeError)


def array_map(changes):
    return {b"__ndarray__": True, b"data": bytes(12), b"dtype": "<f4", b"shape": [3], **changes}


def test_the_array_that_the_next_test_breaks_is_sound():
    np.testing.assert_array_equal(wire.unpack(msgpack.packb(array_map({}))), np.zeros(3, np.float32), strict=True)


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        (b"", "incomplete"),
        (b"\xc1", "FormatError"),
        (wire.pack({"a": 1})[:-1], "incomplete"),
        (wire.pack(1) + b"\x00", "extra data"),
        (b"\xa2\xff\xfe", "utf-8"),
        (b"\x91" * 100_000, "StackError"),
        (msgpack.packb({1: 2}), "int is not allowed for map key"),
    ],
    ids=["empty", "reserved byte", "truncated", "trailing", "not utf-8", "nested too deep", "int key"],
)
def test_malformed_messagepack_is_a_protocol_error(frame, found):
    with pytest.raises(ProtocolError, match=found):
        wire.unpack(frame)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({b"dtype": "O"}, "a dtype of numbers"),
        ({b"dtype": "<c8"}, "a dtype of numbers"),
        ({b"dtype": "f4,f8"}, "a dtype of numbers"),
        ({b"dtype": "(3,)f4"}, "a dtype of numbers"),
        ({b"dtype": "|V4"}, "a dtype of numbers"),
        ({b"dtype": 5}, "a dtype of numbers"),
        ({b"dtype": "<f3"}, "a dtype that NumPy knows"),
        ({b"dtype": "<U0", b"shape": [2**40], b"data": b""}, "a dtype of at least one byte"),
        ({b"shape": [4]}, "16 bytes for shape"),
        ({b"shape": [-1, -3]}, "shape as a list of sizes"),
        ({b"shape": [True, 3]}, "shape as a list of sizes"),
        ({b"shape": 3}, "shape as a list of sizes"),
        ({b"shape": [2**63, 0], b"data": b""}, "a shape that NumPy can hold"),
        ({b"shape": [1] * 70 + [3]}, "a shape that NumPy can hold"),
        ({b"data": "text"}, "data as bytes"),
        ({b"data": None}, "data as bytes"),
    ],
)
def test_an_array_that_does_not_fit_its_description_is_a_protocol_error(changes, expected):
    with pytest.raises(ProtocolError, match=expected):
        wire.unpack(msgpack.packb({"state": array_map(changes)}))


HUGE = b"\x1b[2J\n\xff" * 100_000


@pytest.mark.parametrize(
    "value",
    [
        array_map({b"dtype": HUGE}),
        array_map({b"shape": HUGE}),
        array_map({b"shape": [HUGE, 1]}),
        array_map({b"shape": [2**64 - 1] * 5_000}),
        array_map({b"shape": [2**63] * 60}),
        array_map({b"data": "x" * 10**6}),
        {b"__npgeneric__": True, b"data": HUGE, b"dtype": "<f4"},
        {b"__npgeneric__": True, b"data": HUGE, b"dtype": "<i8"},
        {b"__npgeneric__": True, b"data": "9" * 10**6, b"dtype": "<f8"},
        {b"__npgeneric__": True, b"data": "\n" * 10**6, b"dtype": "<M8[s]"},
        {b"__npgeneric__": True, b"data": 1, b"dtype": HUGE},
    ],
    ids=range(11),
)
def test_a_protocol_error_repeats_little_of_the_frame(value):
    with pytest.raises(ProtocolError) as error:
        wire.unpack(msgpack.packb(value))
    assert len(str(error.value)) < 700
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("value", [{b"a": 1}, {"a": {HUGE: 1}}, [{"a": 1}, {b"": 1}]], ids=range(3))
def test_where_items_are_limited_keys_are_texts(value):
    assert wire.unpack(msgpack.packb(value)) == value
    with pytest.raises(ProtocolError, match="a map whose keys are texts") as error:
        wire.unpack(msgpack.packb(value), max_items=100)
    assert len(str(error.value)) < 400
    assert wire.unpack(wire.pack({"a": np.float32(1)}), max_items=100) == {"a": 1}


@pytest.mark.parametrize(
    "value", ["x" * 401, "\u9999" * 134, {"x" * 401: 1}, list(range(101)), [[0] * 60] * 2], ids=range(5)
)
def test_a_message_of_too_much_says_what_to_send_less_of(value):
    wire.unpack(wire.pack(["\u9999" * 100, "x" * 400, list(range(90))]), max_items=100)
    with pytest.raises(
        ProtocolError, match="at most 100 items in lists and maps together, and 400 bytes in a text"
    ) as error:
        wire.unpack(wire.pack(value), max_items=100)
    assert error.value.next.startswith("send less")


@pytest.mark.parametrize(("dtype", "data"), [("|u1", 300), ("<f4", "x"), ("<f4", [1.0]), ("|O", 1), ("<i4", None)])
def test_a_scalar_that_does_not_fit_its_dtype_is_a_protocol_error(dtype, data):
    with pytest.raises(ProtocolError):
        wire.unpack(msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype}))
