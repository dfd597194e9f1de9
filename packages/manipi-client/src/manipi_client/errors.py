"""Every error that the client raises on purpose.

    ManipiClientError               what was expected, what was found, where, what to do next
    ├─ InputError                   the caller gave a value that cannot be used (also a ValueError and a TypeError)
    ├─ ActionChunkError             the chunk has fewer steps than are to be executed (also a ValueError)
    └─ PolicyServerError            the server, or what came from it
        ├─ ConnectError             there is no policy server at the address
        │   ├─ ConnectTimeout       no server answered in time
        │   ├─ AccessDenied         the server does not let this client in
        │   └─ PolicyChanged        the server that was connected again has another robot, or another checkpoint
        ├─ ConnectionLost           the server went away, or closed the connection
        ├─ InferenceTimeout         no actions in time; the connection is closed
        ├─ ProtocolError            bytes that are not this protocol (also a ValueError)
        └─ RemoteInferenceError     the server answered with an error instead of actions

An error travels as a text frame: the name of its type, a line break, and the four-part message.
"""

from __future__ import annotations

import copyreg
import re
import sys
from datetime import date, timedelta
from pathlib import PurePath
from typing import Any, List

_TEXT = "expected {}\n   found {}\n   where {}\n    next {}"
_MARKS = (("code", "\nexpected "), ("expected", "\n   found "), ("found", "\n   where "), ("where", "\n    next "))
"""The parts of an error's text frame, and what ends each. The last one is `next`."""

_LONGEST = len("\\U0010ffff")
"""Of the escapes that `one_line` writes."""


def shown(value: object, limit: int = 80) -> str:
    """`repr(value)` for an error's text: at most `limit` characters, on one line, whatever the value is.

    Time and memory do not grow with the value. Texts, bytes and containers that are longer are cut and end in "...".
    Arrays are shown by type and shape, objects of other kinds by their type. Control characters, also escape codes and
    the line breaks of Unicode, are written as escapes, so that what another program sent cannot forge a line of a log.
    """
    return one_line(_head(value, limit, depth=3), limit)


def one_line(text: str, limit: int) -> str:
    """The text in at most `limit` characters, with escapes for what is not printable; a longer one ends in "..."."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _head(value: Any, limit: int, depth: int) -> str:
    """The beginning of `repr(value)`, of a length that `limit` bounds."""
    np = sys.modules.get("numpy")  # whose import takes long; where it has not happened, there are none of its values
    if isinstance(value, str):
        return repr(str.__getitem__(value, slice(limit + 1)))
    if isinstance(value, (bytes, bytearray)):
        head = repr(bytes(value[: limit // 4]))
        return head if len(value) <= limit // 4 else f"{head}... ({len(value)} bytes)"
    if np is not None and isinstance(value, np.ndarray):
        return f"an array of {_name(value.dtype)} of shape {_head(list(value.shape), limit, depth)}"
    if np is not None and isinstance(value, np.dtype):
        return _name(value)
    if np is not None and isinstance(value, np.generic):
        return str(value) if value.dtype.kind in "biufcmM" else f"a scalar of {_name(value.dtype)}"
    if isinstance(value, int) and value.bit_length() > 4 * limit:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, (int, float, complex, date, timedelta, range, type, PurePath)):
        return repr(value)
    for kind, brackets in ((dict, "{}"), (list, "[]"), (tuple, "()"), (set, "{}"), (frozenset, "{}")):
        if isinstance(value, kind):
            return f"{brackets[0]}{_items(value, limit, depth - 1)}{brackets[1]}"
    return f"an object of type {type(value).__name__}"


def _items(container: Any, limit: int, depth: int) -> str:
    """As many items of a container as `limit` has place for."""
    parts: List[str] = []
    length = 0
    for item in container:
        if depth < 0 or length > limit:
            return ", ".join([*parts, "..."])
        entry = (item, container[item]) if isinstance(container, dict) else (item,)
        parts.append(": ".join(_head(part, limit, depth) for part in entry))
        length += len(parts[-1]) + 2
    return ", ".join(parts) + ("," if isinstance(container, tuple) and len(parts) == 1 else "")


def _name(dtype: Any) -> str:
    return str(dtype) if dtype.names is None else f"records of {len(dtype.names)} fields"


class FourPartError(Exception):
    """What ManipiClientError and manipi's own errors are: a text of the same four parts, always in this order.

    Args:
        expected: what should have been there.
        found: what was there instead.
        where: the key, the file, the address or the call concerned.
        next: what the user can do, run or change now.
    """

    def __init__(self, *, expected: str, found: str, where: str, next: str) -> None:
        self.expected, self.found, self.where, self.next = expected, found, where, next
        super().__init__(expected, found, where, next)

    def __str__(self) -> str:
        """Line breaks stay, as in what another program said; other characters that are not printable are escaped."""
        lines = _TEXT.format(self.expected, self.found, self.where, self.next).split("\n")
        return "\n".join(one_line(line, _LONGEST * len(line)) for line in lines)

    def __reduce__(self) -> tuple:
        # Keyword-only arguments do not survive the default pickling, and worker processes pickle errors.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ManipiClientError(FourPartError):
    """Base of the client's errors."""


class InputError(ManipiClientError, ValueError, TypeError):
    """The caller gave a value that cannot be used."""


class ActionChunkError(ManipiClientError, ValueError):
    """The chunk has fewer steps than are to be executed."""


class PolicyServerError(ManipiClientError):
    """The server, or what came from it."""


class ConnectError(PolicyServerError):
    """There is no policy server at the address, or none for this client."""


class ConnectTimeout(ConnectError):
    """No server answered in time."""


class AccessDenied(ConnectError):
    """The server does not let this client in: HTTP 401 or 403. Trying again does not help."""


class PolicyChanged(ConnectError):
    """The server that was connected again has another robot, or another checkpoint. Trying again does not help."""


class ConnectionLost(PolicyServerError):
    """The server went away, or closed the connection."""


class InferenceTimeout(PolicyServerError):
    """No actions in time. The connection is closed: a late answer must never be read as a fresh one."""


class ProtocolError(PolicyServerError, ValueError):
    """Bytes that are not this protocol."""


class RemoteInferenceError(PolicyServerError):
    """The server answered with an error instead of actions.

    `code` is the name of the error on the server ("" when the server does not say), `text` the whole frame.
    """

    def __init__(self, *, expected: str, found: str, where: str, next: str, code: str = "", text: str = "") -> None:
        super().__init__(expected=expected, found=found, where=where, next=next)
        self.code, self.text = code, text


def error_to_text(error: FourPartError) -> str:
    """The text frame for an error of four parts, behind its `code` or else the name of its type.

    It has at most 4,000 bytes, whatever the error says, and no line breaks but its own.
    """
    code = _at_most(getattr(error, "code", "") or type(error).__name__, 100)
    parts = (_at_most(part, 900) for part in (error.expected, error.found, error.where, error.next))
    return f"{code}\n{_TEXT.format(*parts)}"


def _at_most(text: object, num_bytes: int) -> str:
    """`one_line` of at most so many bytes of UTF-8."""
    line = one_line(str(text), num_bytes)
    if len(line.encode()) <= num_bytes:
        return line
    return line.encode()[: num_bytes - 3].decode(errors="ignore") + "..."


def error_from_text(text: str, uri: str) -> RemoteInferenceError:
    """What a text frame from the server at `uri` means. openpi's server sends a traceback instead of four parts."""
    parts, rest, found = {}, text, ""  # not by one regular expression: it takes minutes where the marks come often
    for name, mark in _MARKS:
        parts[name], found, rest = rest.partition(mark)  # where one is missing, nothing is left for those behind it
    if not found or not re.fullmatch(r"\w+", parts["code"]):
        last_line = (text.strip().splitlines() or ["(an empty message)"])[-1]
        return RemoteInferenceError(
            expected="actions",
            found=one_line(last_line, 500),
            where=f"the policy at {uri}",
            next="read the whole message of the server in this error's `text`",
            text=text,
        )
    fields = {name: one_line(part, 1_000) for name, part in {**parts, "next": rest}.items()}
    return RemoteInferenceError(**{**fields, "where": f"{fields['where']} (told by {uri})"}, text=text)
