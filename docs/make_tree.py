"""Write the file tree of docs/architecture.md anew, from the first lines of the modules' docstrings.

python docs/make_tree.py            writes it
python docs/make_tree.py --check    exits with 1 where it is not what the modules say
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- file tree: make docs -->\n```\n", "```\n<!-- end of the file tree -->\n"
SOURCES = ("src/manipi", "packages/manipi-client/src/manipi_client")
ONE_LINE = ("manipi/cli", "manipi/recipes", "manipi/robots", "manipi/remote", "train/plan", "tabletop/environment")
"""Packages whose modules are of one kind each: their names say enough."""


def first_line(path: Path) -> str:
    """What a module says it is, without the full stop. Exits where it says nothing."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        sys.exit(f"{path.relative_to(ROOT)} has no docstring: its first line says what the module is")
    return text.splitlines()[0].removesuffix(".")


def tree(folder: Path, drawing: str = "") -> list[str]:
    """The lines of a folder's modules and packages, modules first."""
    modules = sorted(p for p in folder.glob("*.py") if p.name != "__init__.py")
    packages = sorted(p.parent for p in folder.glob("*/__init__.py"))
    lines = []
    for i, path in enumerate([*modules, *packages]):
        last = i == len(modules) + len(packages) - 1
        stem = f"{drawing}{'└─' if last else '├─'} "
        if path in modules:
            lines.append(f"{stem + path.name:<27} {first_line(path)}")
            continue
        lines.append(f"{stem + path.name + '/':<27} {first_line(path / '__init__.py')}")
        below = drawing + ("   " if last else "│  ")
        if str(path).endswith(ONE_LINE):
            names = ", ".join(p.stem for p in sorted(path.glob("*.py")) if p.name != "__init__.py")
            lines.append(f"{below}└─ {names}")
        else:
            lines += tree(path, below)
    return lines


def page() -> str:
    """The page with the tree as it is now."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    client = ", ".join(p.stem for p in sorted((ROOT / SOURCES[1]).glob("*.py")) if p.name != "__init__.py")
    lines = [f"{SOURCES[0]}/", *tree(ROOT / SOURCES[0]), f"{SOURCES[1]}/", f"└─ {client}"]
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif page() != PAGE.read_text(encoding="utf-8"):
        sys.exit("the file tree of docs/architecture.md is not what the modules say: make docs")


if __name__ == "__main__":
    main()
