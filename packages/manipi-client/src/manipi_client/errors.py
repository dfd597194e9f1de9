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
import reprlib
from typing import Any

_ERROR_TEXT = re.compile(
    r"(?P<code>\w+)\nexpected (?P<expected>.*)\n   found (?P<found>.*)\n   where (?P<where>.*)\n    next (?P<next>.*)",
    re.DOTALL,
)


class _Bounded(reprlib.Repr):
    """`repr` whose time, memory and length do not grow with the value: long texts and bytes are cut before they are written."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = limit
        self.maxlevel = 3

    def repr_bytes(self, value: bytes, level: int) -> str:
        head = repr(bytes(value[: self.maxstring // 4]))
        return head if len(value) <= self.maxstring // 4 else f"{head}... ({len(value)} bytes)"

    repr_bytearray = repr_memoryview = repr_bytes_ = repr_bytes

    def repr_str_(self, value: str, level: int) -> str:
        return self.repr_str(str(value[: self.maxstring + 1]), level)

    def repr_ndarray(self, value: Any, level: int) -> str:
        return f"an array of {str(value.dtype)[: self.maxstring]} of shape {self.repr_tuple(value.shape, level)}"


def shown(value: object, limit: int = 80) -> str:
    """`repr(value)` for an error's text: of at most `limit` characters, on one line, whatever the value is and however large.

    Texts, bytes and containers that are longer are cut and end in "...". Control characters, also escape codes and the
    line breaks of Unicode, are written as escapes, so that what a stranger sent cannot forge a line of a log.
    """
    text = _Bounded(limit).repr(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class ManipiClientError(Exception):
    """Base of the tree. Its text always has the same four parts, in this order.

    Args:
        expected: what should have been there.
        found: what was there instead.
        where: the key, the address or the call concerned.
        next: what the user can do or change now.
    """

    def __init__(self, *, expected: str, found: str, where: str, next: str) -> None:
        self.expected, self.found, self.where, self.next = expected, found, where, next
        super().__init__(expected, found, where, next)

    def __str__(self) -> str:
        return f"expected {self.expected}\n   found {self.found}\n   where {self.where}\n    next {self.next}"

    def __reduce__(self) -> tuple:
        # Keyword-only arguments do not survive the default pickling, and worker processes pickle errors.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


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


def error_to_text(error: Exception) -> str:
    """The text frame for an error of four parts, behind its `code` or else the name of its type."""
    return f"{getattr(error, 'code', '') or type(error).__name__}\n{error}"


def error_from_text(text: str, uri: str) -> RemoteInferenceError:
    """What a text frame from the server at `uri` means. openpi's server sends a traceback instead of four parts."""
    parts = _ERROR_TEXT.fullmatch(text)
    if parts is None:
        last_line = (text.strip().splitlines() or ["(an empty message)"])[-1]
        return RemoteInferenceError(
            expected="actions",
            found=last_line,
            where=f"the policy at {uri}",
            next="read the whole message of the server in this error's `text`",
            text=text,
        )
    fields = parts.groupdict()
    return RemoteInferenceError(**{**fields, "where": f"{fields['where']} (told by {uri})"}, text=text)
