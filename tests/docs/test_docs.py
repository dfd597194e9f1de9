"""The documentation is true to the code: links, file tree, layers, words, commands, paths."""

import ast
import re
import runpy
import tomllib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest

from manipi.cli import commands

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = {name: REPOSITORY / name for name in ("src/manipi", "packages/manipi-client/src/manipi_client")}
NOT_OURS = ("runs", "shared", "build", "dist", "node_modules")


def _ours(*patterns: str) -> list[Path]:
    """The repository's own files: nothing in hidden, build or run folders."""
    found = {path for pattern in patterns for path in REPOSITORY.rglob(pattern)}
    parts = {path: path.relative_to(REPOSITORY).parts for path in found}
    return sorted(p for p in found if not any(x.startswith(".") or x in NOT_OURS for x in parts[p]))


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


PAGES = [_name(path) for path in _ours("*.md")]
ALL_TEXT = "\n".join((REPOSITORY / name).read_text(encoding="utf-8") for name in PAGES)


# ---- links and paths


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_lead_somewhere(page, name):
    without_code = re.sub(r"^```.*?^```$", "", page(name), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        path = target.partition("#")[0]
        if path and "://" not in target:
            assert (REPOSITORY / name).parent.joinpath(path).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/maintaining.md", "CONTRIBUTING.md"])
def test_files_and_names_in_the_text_exist(page, name):
    """`train/data.py:prepare` is a file of a source tree, and holds that word."""
    mentioned = re.findall(r"`([\w/.-]+\.py)(?::(\w+))?`", page(name))
    assert mentioned or name == "CONTRIBUTING.md"
    for path, word in mentioned:
        places = [root / path for root in (REPOSITORY, *SOURCES.values(), *(s.parent for s in SOURCES.values()))]
        found = [place for place in places if place.is_file()]
        assert found, f"{name} mentions {path}"
        assert re.search(rf"\b{word}\b", found[0].read_text(encoding="utf-8")), f"no {word} in {path}"


@pytest.mark.parametrize("path", _ours("src/manipi/**/*.py"), ids=_name)
def test_modules_that_docstrings_name_exist(path):
    """`package.module` or `package.module.NAME`, and what has a row in a package's table."""
    root, text = SOURCES["src/manipi"], path.read_text(encoding="utf-8")
    packages = {module.parent.name for module in root.glob("*/__init__.py")}
    named = [name.split(".") for name in re.findall(r"`([a-z_]+\.[a-z_]+(?:\.\w+)*)`", text)]
    rows = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE) if path.name == "__init__.py" else []
    places = [root.joinpath(*parts[:3]) for parts in named if parts[0] in packages and parts[-1] != "json"]
    for place in [*places, *(path.parent / row for row in rows)]:
        around = (place, place.with_suffix(".py"), place.parent.with_suffix(".py"))
        assert any(one.exists() for one in around), f"{_name(path)} names {_name(place)}"


def test_nothing_names_a_machine_or_a_registry():
    """Read by strangers: no home folder of anyone's, no host that packages came from."""
    strange = re.compile(
        r"(?<![\w.])/(?:home|Users|root|work|mnt|tmp)/\w|(?:pypi|pythonhosted|npmjs|anaconda|artifactory)\.\w", re.I
    )
    files = [*_ours("*.md", "*.toml", "*.txt", "Makefile"), *(p for p in _ours("*.py") if "tests" not in p.parts)]
    hits = [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if strange.search(line)
    ]
    assert not hits, "\n".join(hits)


# ---- structure


def test_the_file_tree_is_what_the_modules_say(page):
    tree = runpy.run_path(str(REPOSITORY / "docs/make_tree.py"))
    text = page("docs/architecture.md")
    assert tree["page"]() == text, "make docs"
    drawn = text.partition(tree["BEGIN"])[2].partition(tree["END"])[0]
    modules = {path for source in SOURCES.values() for path in source.rglob("*.py") if path.name != "__init__.py"}
    missing = [_name(path) for path in modules if path.name not in drawn and path.stem not in drawn]
    assert sorted(missing) == []


def test_the_structure_fits_on_a_few_screens(page):
    assert len(page("docs/architecture.md").splitlines()) <= 250


def test_the_layers_are_the_contract(blocks):
    config = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = config["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert "\n".join(layers) + "\n" in blocks("docs/architecture.md", "")


# ---- words

BANNED = (
    *("chunk_size", "n_action_steps", "horizon_steps", "open_loop_horizon", "base_0_rgb", "language_instruction"),
    *("qpos", "proprio", "robot_state", "obs_dict", "trajectory", "transition", "dataset_stats", "pad_mask", "is_pad"),
)


PICTURES = re.compile(r"\b(?:house|rooms|loans?|lives|nobody|inhabit\w*|souls?)\b", re.IGNORECASE)
"""Figures of speech: a reader from the field would look for what is behind them."""


@pytest.mark.parametrize("path", _ours("src/**/*.py", "packages/**/*.py", "src/**/*.html", "*.md"), ids=_name)
def test_words_mean_what_they_say(path):
    if path.name in ("log.md", "CHANGELOG.md"):  # what was written then
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{number}: {line.strip()}" for number, line in enumerate(lines, start=1) if PICTURES.search(line)] == []


def _identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def _parts(identifier: str) -> set[str]:
    """`self.my_chunk_size` has the parts my, chunk, size, my_chunk, chunk_size and so on."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().strip("_").split("_")
    return {part for i in range(len(words)) for part in accumulate(words[i:], lambda a, b: f"{a}_{b}")}


@pytest.mark.parametrize("path", _ours("src/manipi/**/*.py"), ids=_name)
def test_no_second_word_for_an_idea(path):
    banned = set(BANNED)
    if "environment" in path.parts:
        banned -= {"qpos"}  # MuJoCo's own name
    used = {part for name in _identifiers(ast.parse(path.read_text(encoding="utf-8"))) for part in _parts(name)}
    assert sorted(used & banned) == []


def test_the_glossary_bans_what_this_test_bans(page):
    last_column = " ".join(
        line.split("|")[-2] for line in page("docs/glossary.md").splitlines() if line.startswith("|")
    )
    missing = [word for word in BANNED if not re.search(rf"\b{word}\b", last_column)]
    assert missing == []


def test_the_glossarys_names_are_in_the_code(page):
    code = "\n".join(path.read_text(encoding="utf-8") for source in SOURCES.values() for path in source.rglob("*.py"))
    rows = [line.split("|") for line in page("docs/glossary.md").splitlines() if line.startswith("| ")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row[2])]
    assert len(names) > 40
    for name in names:
        last = re.findall(r"[^\W_]\w*", name.rpartition(".")[2])[0]
        assert re.search(rf"(?:\b|_){last}\b", code), f"the glossary says {name}"


# ---- commands and code


@pytest.mark.parametrize("command", commands())
def test_every_command_is_documented(command):
    assert re.search(rf"\bmanipi {command}\b", ALL_TEXT), f"no page says how to use manipi {command}"


def test_every_documented_command_exists():
    """A line of code that begins with `manipi`, alone on its line or between backticks."""
    written = re.findall(r"(?:^(?: {4})?(?:\$ )?|`)manipi ([a-z][\w-]*)", ALL_TEXT, re.MULTILINE)
    assert len(written) > 10
    example = {"line-demo"}  # of the package that docs/extending.md builds
    assert sorted(set(written) - set(commands()) - example) == []


def test_every_documented_make_target_exists(page):
    targets = re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE)
    written = re.findall(r"(?:^(?: {4})?(?:\$ )?|`)make ([a-z-]+)", ALL_TEXT, re.MULTILINE)
    assert written
    assert sorted(set(written) - set(targets)) == []


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_are_python(blocks, name):
    for block in blocks(name, "python"):
        ast.parse(block)
