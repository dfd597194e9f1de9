"""How large the house is, room by room, and whether it keeps its budgets.

Exits 1 where a function, a file or the median is over its budget. The total is a target: it is said, not enforced, so
that nobody squeezes lines to pass.
"""

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "src/manipi", ROOT / "packages/manipi-client/src/manipi_client")
MAX_TOTAL, MAX_FILE, MAX_FUNCTION, MAX_MEDIAN = 10_000, 600, 60, 12


def main() -> None:
    files = {path: path.read_text(encoding="utf-8") for source in SOURCES for path in sorted(source.rglob("*.py"))}
    functions = {f"{path.relative_to(ROOT)}:{name}": n for path, text in files.items() for name, n in _functions(text)}
    rooms: dict[str, int] = {}
    for path, text in files.items():
        room = _room(path)
        rooms[room] = rooms.get(room, 0) + text.count("\n")
    for room, lines in sorted(rooms.items(), key=lambda item: -item[1]):
        print(f"{lines:6}  {room}")
    total, median = sum(rooms.values()), statistics.median(functions.values())
    print(f"{total:6}  in {len(files)} files, {len(functions)} functions with a median of {median:g} lines")
    if total > MAX_TOTAL:
        print(f"over target: {total - MAX_TOTAL} lines more than {MAX_TOTAL}", file=sys.stderr)
    broken = [f"median function {median:g} lines, at most {MAX_MEDIAN}"] if median > MAX_MEDIAN else []
    broken += [
        f"{path.relative_to(ROOT)} has over {MAX_FILE} lines" for path, t in files.items() if t.count("\n") > MAX_FILE
    ]
    broken += [
        f"{name} has {lines} lines, at most {MAX_FUNCTION}" for name, lines in functions.items() if lines > MAX_FUNCTION
    ]
    for line in broken:
        print(f"over budget: {line}", file=sys.stderr)
    sys.exit(bool(broken))


def _functions(text: str) -> list[tuple[str, int]]:
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(f"{n.lineno} {n.name}", (n.end_lineno or n.lineno) - n.lineno + 1) for n in nodes]


def _room(path: Path) -> str:
    source = next(s for s in SOURCES if path.is_relative_to(s))
    first = path.relative_to(source).parts[0]
    return f"{source.name}/{first}" if source.name == "manipi" else source.name


if __name__ == "__main__":
    main()
