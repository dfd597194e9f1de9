"""Flags from dataclasses, the same way in every command: no `--no-` twins, no `{None}|` in the help."""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

from manipi.errors import ConfigError
from manipi.recipes.registry import RECIPES

_T = TypeVar("_T")


def recipe_name(arguments: Sequence[str], command: str) -> str:
    """The first argument. Raises ConfigError where that is a flag, or nothing."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    raise ConfigError(
        expected=f"a recipe first: {', '.join(RECIPES)}, or path/to/file.py:function",
        found=repr(arguments[0]) if arguments else "nothing",
        where=f"manipi {command}",
        next=f"manipi {command} --help",
    )


def parse(kind: type[_T], arguments: Sequence[str], command: str, *, default: _T | None = None) -> _T:
    """The arguments as a `kind`; its docstring is the help. Exits with 2, and the closest flag, on a mistyped one.

    Raises:
        ConfigError: values that parse but contradict each other, as the config's own `__post_init__` says.
    """
    # A comment gives the reason for a field, which is no help with it.
    settings = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)
    start = tyro.MISSING_NONPROP if default is None else default
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=f"manipi {command}", config=settings, default=start)
    except SystemExit as exit:
        # tyro takes the ValueErrors of nested configs for mistyped flags, and would show their first words only.
        cause: BaseException | None = exit
        while (cause := cause.__context__) is not None:
            if isinstance(cause, ConfigError):
                raise cause from None
        sys.stderr.write(said.getvalue())
        raise
