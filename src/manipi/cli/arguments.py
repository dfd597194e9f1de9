"""Flags from dataclasses, and results as tables and JSON, alike in all commands."""

import contextlib
import io
import json
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from manipi.errors import ConfigError, one_line
from manipi.recipes.registry import recipe_names
from manipi.records import to_json
from manipi.storage import atomic_write, require_folder, require_new_file, require_new_folder

_T = TypeVar("_T")

NewFile: TypeAlias = Annotated[Path, require_new_file]
NewFolder: TypeAlias = Annotated[Path, require_new_folder]
Folder: TypeAlias = Annotated[Path, require_folder]
"""What a command writes. `parse` sees that it can be written, so that no work is done in vain."""


_CELL = 1000
"""Characters of a cell."""


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """The flags of a command that runs a model."""

    device: str = "auto"
    """Where the model runs, such as cpu or cuda:1; auto: a GPU where there is one."""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        if self.num_threads < 0:
            raise ConfigError(
                expected="a number of threads, from 0",
                found=str(self.num_threads),
                where="--num-threads",
                next="--num-threads 1",
            )

    def start(self) -> str:
        """Set torch's threads; returns the device, which is printed where it was left to us."""
        import torch

        from manipi.model.device import choose_device

        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        device = choose_device(self.device)
        if self.device == "auto":
            print(f"device  {device}", flush=True)
        return device


def recipe_name(arguments: Sequence[str], command: str) -> str:
    """The first argument. Raises ConfigError where that is a flag, or nothing."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    raise ConfigError(
        expected=f"a recipe first: {', '.join(recipe_names())}, or path/to/file.py:function",
        found=repr(arguments[0]) if arguments else "nothing",
        where=f"manipi {command}",
        next=f"manipi {command} --help",
    )


def parse(
    kind: type[_T],
    arguments: Sequence[str],
    command: str,
    *,
    default: _T | None = None,
    structure: Sequence[Any] = (),
) -> _T:
    """The arguments as a `kind`; its docstring is the help. Exits with 2, and the closest flag, on a mistyped one.

    Args:
        default: what the flags change.
        structure: types of fields that have no flags, and stay as `default` has them.

    Raises:
        ConfigError: values that parse but contradict each other, as the config's own `__post_init__` says.
        StorageError: a `NewFile`, `NewFolder` or `Folder` that cannot be written.
    """

    def without_flags(info: StructTypeInfo) -> StructConstructorSpec | None:
        return StructConstructorSpec(lambda: info.default, fields=()) if info.type in structure else None

    rules = ConstructorRegistry()
    rules.struct_rule(without_flags)
    # A comment gives the reason for a field, which is no help with it.
    settings = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)
    settings = (*settings, tyro.conf.AvoidSubcommands)
    start = tyro.MISSING_NONPROP if default is None else default
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                kind, args=arguments, prog=f"manipi {command}", config=settings, default=start, registry=rules
            )
    except SystemExit as exit:
        # tyro takes the ValueErrors of nested configs for mistyped flags, and would show their first words only.
        cause: BaseException | None = exit
        while (cause := cause.__context__) is not None:
            if isinstance(cause, ConfigError):
                raise cause from None
        sys.stderr.write(said.getvalue())
        raise
    checks = (require_new_file, require_new_folder, require_folder)
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        hints = [hint]  # NewFile | None, Positional[NewFolder] …
        while hints and (path := getattr(parsed, name)) is not None:
            one = hints.pop()
            hints += typing.get_args(one)
            for check in getattr(one, "__metadata__", ()):
                if check in checks:
                    check(path)
    return parsed


def write_result(result: Any, path: Path | None) -> None:
    """Write `result` as JSON to `path`, when `--json` named one."""
    if path is not None:
        text = json.dumps(to_json(result), indent=2, ensure_ascii=False)
        atomic_write(path, f"{text}\n".encode())


def table(rows: list[tuple[Any, ...]], header: tuple[str, ...] | None = None) -> str:
    """Columns aligned: text to the left, numbers to the right. A row is one line, whatever is not printable in it."""
    shown = [tuple(f"{v:.4g}" if isinstance(v, float) else one_line(str(v), _CELL) for v in row) for row in rows]
    everything = [header, *shown] if header else shown
    widths = [max(len(row[i]) for row in everything) for i in range(len(everything[0]))] if everything else []
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(widths))]
    return "\n".join(
        "  ".join(cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(row, widths, numeric)).rstrip()
        for row in everything
    )
