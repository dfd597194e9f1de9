"""Code lines per package folder against their budgets.

A code line holds code: no blank line, comment, docstring or import. Exits with 1 where a folder, a file, a function
or the number of files is over its budget. Who needs more raises the budget in a commit of its own, with the reason.
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "src/manipi", ROOT / "packages/manipi-client/src/manipi_client")
MAX_FILES, MAX_FILE, MAX_FUNCTION = 178, 600, 60
BUDGETS = {
    "manipi": 1240,
    "manipi/checkpoints": 340,
    "manipi/cli": 1430,
    "manipi/convert": 910,
    "manipi/data": 1160,
    "manipi/data/feed": 590,
    "manipi/data/lerobot": 1530,
    "manipi/data/review": 1260,
    "manipi/data/rlds": 670,
    "manipi/evaluate": 1630,
    "manipi/exchange": 940,
    "manipi/model": 1530,
    "manipi/model/inference": 400,
    "manipi/recipes": 290,
    "manipi/remote": 380,
    "manipi/robots": 320,
    "manipi/serve": 820,
    "manipi/tabletop": 330,
    "manipi/tabletop/environment": 670,
    "manipi/tokenizers": 1010,
    "manipi/train": 1490,
    "manipi/train/run": 460,
    "manipi/train/step": 550,
    "manipi/train/watch": 890,
    "manipi/transforms": 910,
    "manipi/weights": 850,
    "manipi_client": 1670,
}
"""Code lines: what each folder had when they were set, and 10 %."""

_LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def code_lines(text: str) -> set[int]:
    """The numbers of a module's lines that hold code."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        # A string on its own is a docstring, also behind the field that it explains.
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
        ):
            left_out |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    held = {line for t in tokens if t.type not in _LAYOUT for line in range(t.start[0], t.end[0] + 1)}
    return held - left_out


def main() -> None:
    files = {path: path.read_text(encoding="utf-8") for source in SOURCES for path in sorted(source.rglob("*.py"))}
    folders: Counter[str] = Counter()
    broken = []
    for path, text in files.items():
        name = str(path.relative_to(ROOT))
        source = next(s for s in SOURCES if path.is_relative_to(s))
        code = code_lines(text)
        folders["/".join((source.name, *path.relative_to(source).parts[:-1]))] += len(code)
        if text.count("\n") > MAX_FILE:
            broken.append(f"{name} has {text.count(chr(10))} lines, at most {MAX_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
                if lines > MAX_FUNCTION:
                    broken.append(f"{name}:{node.lineno} {node.name} has {lines} code lines, at most {MAX_FUNCTION}")
    for folder, lines in sorted(folders.items()):
        budget = BUDGETS.get(folder, 0)
        print(f"{lines:6} of {budget:5}  {folder}")
        if lines > budget:
            broken.append(f"{folder} has {lines} code lines, at most {budget}")
    broken += [f"{folder} has a budget and no files" for folder in BUDGETS.keys() - folders.keys()]
    print(f"{folders.total():6} of {sum(BUDGETS.values()):5}  in {len(files)} files of {MAX_FILES}")
    if len(files) > MAX_FILES:
        broken.append(f"{len(files)} files, at most {MAX_FILES}")
    for line in broken:
        print(f"over budget: {line}", file=sys.stderr)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
