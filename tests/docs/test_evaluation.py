"""docs/evaluation.md is true: its tables are computed, and the command lines of all pages are ones that parse."""

import re
import shlex
from dataclasses import fields

import pytest
from benchmarks.power import power, widths
from tests.docs.test_docs import ALL_TEXT, PAGES

from manipi.cli import compare, demonstrate, eval, serve
from manipi.cli.arguments import parse

KINDS = {
    "eval": eval._Eval,
    "compare": compare._Compare,
    "demonstrate": demonstrate._Demonstrate,
    "serve": serve._Serve,
}
LINES = re.findall(rf"^    (manipi (?:{'|'.join(KINDS)}) [^\[…\n]+)$", ALL_TEXT, re.MULTILINE)


def test_its_tables_are_those_of_the_program(page):
    lines = page("docs/evaluation.md").splitlines()
    assert [line for line in (*widths(), *power()) if line not in lines] == []


@pytest.mark.parametrize("line", sorted(set(LINES)))
def test_command_lines_parse(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, command, *words = shlex.split(line, comments=True)
    parse(KINDS[command], words, command)


def test_flags_of_its_tables_exist(page):
    written = re.findall(r"^\| (`--[^|]+) \|", page("docs/evaluation.md"), re.MULTILINE)
    flags = {flag for cell in written for flag in re.findall(r"`--([\w-]+)", cell)}
    assert len(flags) > 12
    assert flags <= {field.name.replace("_", "-") for field in fields(eval._Eval)}


@pytest.mark.parametrize("name", [name for name in PAGES if name not in ("CHANGELOG.md", "docs/log.md")])
def test_no_page_advises_the_flag_of_0_1_0(name, page):
    assert "--scenes" not in page(name)
