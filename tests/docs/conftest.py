"""The documentation's own text: what its pages say, and the code blocks in them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def page() -> Callable[[str], str]:
    """`page("docs/glossary.md")` is its text."""
    return lambda name: (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def blocks(page) -> Callable[[str, str], list[str]]:
    """`blocks("README.md", "python")` are its fenced blocks of that language; "" for those without one."""
    return lambda name, language: [text for kind, text in _BLOCK.findall(page(name)) if kind == language]
