"""Frozen dataclasses to strict JSON and back; fingerprints.

Configs, robots and statistics are written to disk like this.

    Robot(name="ur5", state=(State(key="joints", size=6),))
    {"type": "Robot", "name": "ur5", "state": [{"type": "State", "key": "joints", "size": 6}]}

The reader is strict: an unknown type, a missing field or an unexpected one is an error, so that a file written by
another version is never half understood. A field that came later is `added`: where it has its default it is not
written, so that files and fingerprints are those of before, and is not missed.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from manipi.errors import ConfigError, IntegrityError, ManipiError, shown, unknown_name


class Change(enum.Enum):
    """When a run that goes on may bring another value of a setting. `Stays[int]` is an int that is marked so."""

    ANYTIME = "it changes neither a batch nor an update"
    BEFORE_STEP_1 = "it changes them, and is what errors at the start of a run advise"
    STAYS = "it changes them"


_T = TypeVar("_T")
Anytime: TypeAlias = Annotated[_T, Change.ANYTIME]
BeforeStep1: TypeAlias = Annotated[_T, Change.BEFORE_STEP_1]
Stays: TypeAlias = Annotated[_T, Change.STAYS]


def may_change(settings: Any, name: str) -> Change | None:
    """What the types of `settings` say of the setting NAME.NAME…: the innermost mark on its way; None: nothing."""
    mark = None
    for part in name.split("."):
        hints = typing.get_type_hints(type(settings), include_extras=True) if dataclasses.is_dataclass(settings) else {}
        marks = [one for one in getattr(hints.get(part), "__metadata__", ()) if isinstance(one, Change)]
        mark, settings = (marks or [mark])[-1], getattr(settings, part, None)
    return mark


def added(default: Any) -> Any:
    """A dataclass's field that files of earlier versions do not have, with the value that stands for them."""
    return dataclasses.field(default=default, metadata={"added": True})


def dataclasses_in(hint: Any) -> set[type]:
    """The dataclasses that a value annotated so may consist of, at any depth."""
    if not dataclasses.is_dataclass(hint):
        return set().union(*map(dataclasses_in, typing.get_args(hint)))
    return {hint}.union(*map(dataclasses_in, _hints(hint).values()))  # type: ignore[arg-type]


def to_json(value: Any) -> Any:
    """Plain dicts, lists, strings and numbers; a dataclass becomes a dict with its `type`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [
            f
            for f in dataclasses.fields(value)
            if not (f.metadata.get("added") and getattr(value, f.name) == f.default)
        ]
        fields = {f.name: to_json(getattr(value, f.name)) for f in kept}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if to_list := getattr(value, "tolist", None):  # NumPy's, which takes long to import and which no recipe needs
        return to_list()
    return str(value) if isinstance(value, Path) else value


def from_json(data: Any, kinds: Iterable[type], where: str) -> Any:
    """The inverse of `to_json` for the dataclasses in `kinds`, the first of which the whole is; lists become tuples.

    Raises:
        ConfigError: an unknown type, fields that do not match the dataclass, or values of other types than theirs;
            `where` names the file.
    """
    kinds = tuple(kinds)
    by_name = {kind.__name__: kind for kind in kinds}

    def build(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(build(v) for v in value)
        if not isinstance(value, dict):
            return value
        built = {k: build(v) for k, v in value.items() if k != "type"}
        if "type" not in value:
            return built
        if not isinstance(value["type"], str) or value["type"] not in by_name:
            next = "use the version that wrote the file"
            raise unknown_name(f"type in {where}", str(value["type"]), by_name, next=next)
        return _construct(by_name[value["type"]], built, where)

    built = build(data)
    if not isinstance(built, kinds[0]):
        next = "restore the file, or use the manipi version that wrote it"
        raise ConfigError(expected=f"a {kinds[0].__name__}", found=shown(data), where=where, next=next)
    return built


def _construct(kind: type, values: dict[str, Any], where: str) -> Any:
    values = {f.name: f.default for f in dataclasses.fields(kind) if f.metadata.get("added")} | values
    wanted, hints = {f.name for f in dataclasses.fields(kind)}, _hints(kind)
    misfits = [name for name, value in values.items() if name in wanted and not _fits(value, hints[name])]
    if wanted == set(values) and not misfits:
        return kind(**values)
    expected = f"the fields of {kind.__name__}: {', '.join(sorted(wanted))}"
    found = f"missing {sorted(wanted - set(values))}, unexpected {sorted(set(values) - wanted)}"
    if wanted == set(values):
        hint = hints[misfits[0]]
        expected = f"{getattr(hint, '__name__', hint)} for {kind.__name__}.{misfits[0]}"
        found = shown(values[misfits[0]])
    next = "use the manipi version that wrote the file, or write it again"
    raise ConfigError(expected=expected, found=found, where=where, next=next)


_hints = functools.cache(typing.get_type_hints)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a file is what a field is annotated with. Arrays are flat tuples of numbers here."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin is typing.Literal:
        return any(value == one and type(value) is type(one) for one in args)
    if origin is tuple:
        kinds = args[:1] * len(value) if args[-1:] == (...,) and isinstance(value, tuple) else args
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin in (Mapping, dict):
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if getattr(hint, "__name__", "") == "ndarray":
        return isinstance(value, tuple) and all(_fits(one, float) for one in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    # `Any` is a class since Python 3.11.
    return hint is Any or not isinstance(hint, type) or isinstance(value, str if hint is Path else hint)


def read_json(path: Path, error: type[ManipiError] = IntegrityError) -> Any:
    """The parsed file. Raises `error` where it is absent or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        next = "restore the file or write it again"
        raise error(expected="a JSON file", found=str(cause), where=str(path), next=next) from cause


def read_object(path: Path, error: type[ManipiError] = IntegrityError) -> dict[str, Any]:
    """As `read_json`, of a file that holds a JSON object. Raises `error` where it holds anything else, too."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        next = "restore the file or write it again"
        raise error(expected="a JSON object", found=shown(value), where=str(path), next=next)
    return value


def json_bytes(value: Any) -> bytes:
    """`value` as a file's content, for people to read too."""
    return (json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    path.write_bytes(json_bytes(value))


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: equal on every machine for equal content."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
