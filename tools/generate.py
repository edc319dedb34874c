"""Write every generated page and table anew: `make docs`. With --check only name those that are stale."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import kept
import ladder
import pages
import tables

ROOT = Path(__file__).resolve().parent.parent


def stale() -> dict[Path, str | None]:
    """What is not as generated: the right text by file, None for a page whose method is gone."""
    method_pages = pages.documents()
    rows = tables.read_rows()
    drawn = {**ladder.documents(rows), **kept.documents(rows)}
    wanted: dict[Path, str | None] = {**tables.documents(rows), **drawn, **method_pages}
    gone = dict.fromkeys(set(pages.FOLDER.glob("*.md")) - set(method_pages))
    now = {file: file.read_text() if file.exists() else None for file in wanted}
    return {file: content for file, content in wanted.items() if now[file] != content} | gone


def main() -> int:
    """Write what is stale, or name it and give 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 when something is stale"
    )
    check = parser.parse_args().check
    found = stale()
    for file, content in sorted(found.items()):
        print(("stale: " if check else "wrote ") + str(file.relative_to(ROOT)))
        if check:
            continue
        if content is None:
            file.unlink()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
