"""What installed packages add by entry points: recipes, robots, readers, commands.

    [project.entry-points."manipi.recipes"]        in the pyproject.toml of any package, ours included
    acme_reach = "acme.recipes:acme_reach"

Names are looked up when they are asked for; nothing is imported before that. docs/extending.md has an example of each.
"""

import ast
import functools
import os
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from manipi.errors import ConfigError, ManipiError, one_line, quoted, shown, unknown_name

KINDS = {
    "manipi.recipes": "recipe",
    "manipi.robots": "robot",
    "manipi.suites": "family of suites",
    "manipi.datasets": "dataset reader",
    "manipi.commands": "command",
}
"""The groups of entry points, and what one of each is called."""
_FUNCTIONS = {
    "manipi.recipes": ["__call__"],
    "manipi.commands": ["__call__"],
    "manipi.suites": ["keys", "__getitem__"],
    "manipi.datasets": ["recognises", "open"],
}
"""What an entry's object must have to be one."""


def entries(group: str, own: Mapping[str, str] | None = None) -> dict[str, list[EntryPoint]]:
    """Every name of a group with all of its entry points: more than one is a conflict, which `find` refuses.

    Args:
        own: names that manipi has without an entry point, and what they stand for, as `module:object`.
    """
    found: dict[str, list[EntryPoint]] = {}
    for entry in (
        *_installed(group, tuple((place, _changed(place)) for place in sys.path)),
        *(EntryPoint(name, value, group) for name, value in (own or {}).items()),
    ):
        found.setdefault(entry.name, []).append(entry)
    return found


def _changed(place: str) -> int:
    """When something was last installed there, or removed; 0: there is no such place."""
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(len(KINDS))
def _installed(group: str, places: tuple[tuple[str, int], ...]) -> list[EntryPoint]:
    """Those of packages on the path, ours first. All of their metadata are read, which takes milliseconds."""
    return sorted(entry_points(group=group), key=lambda entry: (package_of(entry) != "manipi", entry.name))


def find(group: str, name: str, own: Mapping[str, str] | None = None, *, next: str = "") -> Any:
    """The object of that name, imported now.

    Args:
        own: as `entries` takes it.
        next: what to do about an unknown name that is like no other.

    Raises:
        UnknownNameError: there is none; with the closest of all names.
        ConfigError: two packages add this name, or what it stands for cannot be imported, or is nothing of that kind;
            names package and cause.
        ManipiError: one that the module itself raises; it keeps its type and names the package.
    """
    kind, found = KINDS[group], entries(group, own)
    if name not in found:
        raise unknown_name(kind, name, found, next=next or f"install a package that adds it as {group}")
    entry, *others = found[name]
    if others:
        packages = [package_of(one) for one in found[name]]
        other = sorted(packages, key=lambda package: package == "manipi")[0]
        raise ConfigError(
            expected=f"one package that adds the {kind} {shown(name)}",
            found=f"{len(packages)}: {' and '.join(packages)}",
            where=f"the entry points {group} of these packages",
            next=f"pip uninstall {quoted(other)}  # or ask its makers for another name",
        )
    package = package_of(entry)
    if package == "manipi":
        return entry.load()
    where = f"the package {package}, entry point {name} = {entry.value} of {group}"
    try:
        found = entry.load()
    except ManipiError as error:
        raise error.moved(f"{error.where}, from {where}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            expected=f"a {kind} that can be imported",
            found=f"{type(error).__name__}: {one_line(str(error), 400)}",
            where=where,
            next=f"pip install --force-reinstall {quoted(package)}, or pip uninstall {quoted(package)}",
        ) from error
    needed = _FUNCTIONS.get(group, [])
    if not all(callable(getattr(found, function, None)) for function in needed):
        raise ConfigError(
            expected=f"a {kind}, which has {' and '.join(needed)}",
            found=shown(found),
            where=where,
            next="correct the entry point of that package (docs/extending.md)",
        )
    return found


def package_of(entry: EntryPoint) -> str:
    """Name of the package that adds it."""
    return entry.dist.name if entry.dist else "manipi"


def summary(entry: EntryPoint) -> str:
    """What an entry's module says of itself: the first line of its docstring. The module is not imported."""
    path, spec, name = None, None, ""
    try:
        parts = entry.module.split(".")
    except (AttributeError, ValueError):  # as versions of Python say that the value is of another form
        return f"cannot be used: {shown(entry.value)} of the package {package_of(entry)} is no module:function"
    for part in parts:
        name = f"{name}.{part}".strip(".")
        spec = next((spec for finder in sys.meta_path if (spec := finder.find_spec(name, path))), None)
        if spec is None:
            return f"cannot be used: the package {package_of(entry)} has no module {name}"
        path = spec.submodule_search_locations
    try:
        source = spec and spec.loader and getattr(spec.loader, "get_source", lambda _: "")(name)
        text = ast.get_docstring(ast.parse(source or "")) or ""
    except (ImportError, SyntaxError, ValueError) as error:
        return one_line(f"cannot be used: {entry.module} of the package {package_of(entry)}: {error}", 200)
    return one_line(text.partition("\n")[0].removeprefix(f"`manipi {entry.name}`: ").removesuffix("."), 200)
