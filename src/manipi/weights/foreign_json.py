"""JSON files of other projects, of which nothing is certain: not that a field is there, nor of which type it is."""

from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, overload

from manipi.errors import CheckpointError, shown
from manipi.records import read_json

_T = TypeVar("_T")
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}
LARGEST = 1_000_000
"""No size in such a file is larger."""


class Fields:
    """An object of such a file.

    Raises:
        CheckpointError: here and in its methods, where what is asked for is missing or of another type.
    """

    def __init__(self, value: Any, where: str):
        self.where = where
        self._fields: dict[str, Any] = _of_type(value, dict, where)

    @staticmethod
    def read(path: Path) -> "Fields":
        return Fields(read_json(path), str(path))

    def keys(self) -> list[str]:
        return list(self._fields)

    def has(self, name: str) -> bool:
        """Whether it says anything of `name`; null says nothing."""
        return self._fields.get(name) is not None

    @overload
    def get(self, name: str, kind: type[_T]) -> _T: ...
    @overload
    def get(self, name: str, kind: type[_T], default: _T) -> _T: ...
    def get(self, name: str, kind: type[_T], default: _T | None = None) -> _T:
        """The value of that type; `default`, if there is one, where it is absent or null."""
        value = self._fields.get(name)
        if value is None and default is not None:
            return default
        return _of_type(value, kind, f"{self.where}, {name}")

    def size(self, name: str) -> int:
        """A whole number from 1 to LARGEST."""
        value = self.get(name, int)
        if not 1 <= value <= LARGEST:
            raise unexpected(f"a whole number from 1 to {LARGEST:,}", value, f"{self.where}, {name}")
        return value

    def number(self, name: str) -> float:
        """A whole number or one with a fraction."""
        value = self._fields.get(name)
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else self.get(name, float)

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty where it is absent."""
        where = f"{self.where}, {name}"
        return [_of_type(value, str, where) for value in self.get(name, list, [])]

    def inner(self, name: str) -> "Fields":
        """The object of that name."""
        return Fields(self._fields.get(name), f"{self.where}, {name}")

    def objects(self, name: str) -> list["Fields"]:
        """A list of objects."""
        where = f"{self.where}, {name}"
        return [Fields(value, f"{where}[{number}]") for number, value in enumerate(self.get(name, list))]


def file_beside(folder: Path, name: str, where: str) -> Path:
    """The file of that name in `folder`, as a file of the folder names it.

    Raises:
        CheckpointError: there is none, or the name leads out of the folder.
    """
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts or not name:
        raise unexpected("the name of a file in the same folder", name, where)
    if not (folder / name).is_file():
        raise unexpected(f"the file {shown(name)} beside it", "no such file", where)
    return folder / name


def unexpected(expected: str, found: object, where: str) -> CheckpointError:
    text = found if isinstance(found, str) and found.startswith("no ") else shown(found)
    return CheckpointError(
        expected=expected, found=text, where=where, next="copy or fetch the file again, or ask whoever wrote it"
    )


def _of_type(value: Any, kind: type[_T], where: str) -> _T:
    # In JSON's types true is no number, though it is one in Python's.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise unexpected(_NAMES[kind], "no value" if value is None else value, where)
    return value
