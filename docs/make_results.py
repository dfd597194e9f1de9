"""Write docs/results.md from the result files in docs/results: a table each, with the command that makes it.

python docs/make_results.py            writes it
python docs/make_results.py --check    exits with 1 where the page is not what the files say

A file is a JSON object: `title`, `command`, `columns` (names), `rows` (lists of texts), and `text`, which says under
which conditions it was measured. benchmarks/learn.py writes such a file.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "results.md"
HEAD = """# Results

Success in closed loop, with 95 % intervals in parentheses. Every table is made by the command above it and written from
its file in `docs/results` by `python docs/make_results.py`; nothing here is typed by hand.
"""


def page(folder: Path) -> str:
    """The whole page, tables in the order of their files' names."""
    parts = [HEAD]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [found["columns"], ["---"] * len(found["columns"]), *found["rows"]]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"## {found['title']}\n\n```sh\n{found['command']}\n```\n\n{lines}\n\n{found['text']}\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> None:
    wanted = page(FOLDER / "results")
    if arguments != ["--check"]:
        PAGE.write_text(wanted, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        sys.exit(f"{PAGE.name} is not what docs/results says: python docs/make_results.py")


if __name__ == "__main__":
    main(sys.argv[1:])
