"""Give the pictures of a static site the alt text that they lack.

    python examples/site_alt_text.py SITE

Captions every picture in SITE that an ``<img>`` without ``alt`` shows, and writes the caption into the HTML
file. Text that is there is kept, also an empty one: that marks a decoration. Doubtful captions are left out
and listed, for a person to write. What was captioned is kept in SITE/../alt_text.jsonl, so a second run is
quick. A page that is not UTF-8, or cannot be read or written, gets a line, and the exit code is 1.
"""

from __future__ import annotations

import html
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from captioner import Captioner
from captioner.batch import caption_records
from captioner.batch.sources import read_table

IMG = re.compile(r"<img\b((?:[^>\"']|\"[^\"]*\"|'[^']*')*?)\s*(/?)>", re.IGNORECASE)
SRC = re.compile(r"\bsrc\s*=\s*(\"[^\"]*\"|'[^']*'|[^\s\"'>]+)", re.IGNORECASE)
ALT = re.compile(r"(?<![\w-])alt(?=[\s=/>]|$)", re.IGNORECASE)


def source(attributes: str, page: Path, site: Path) -> str | None:
    """Return the file that an ``<img>`` without alt text shows; None if it has one, or shows another's."""
    found = SRC.search(attributes)
    if found is None or ALT.search(attributes):
        return None
    address = urlsplit(html.unescape(found[1].strip("\"'")))
    if address.scheme or address.netloc:
        return None
    path = unquote(address.path)
    file = os.path.normpath(site / path.lstrip("/") if path.startswith("/") else page.parent / path)
    return file if os.path.isfile(file) else None


def read(page: Path) -> str:
    """Return a page's text, its line ends as they are."""
    return page.read_bytes().decode("utf-8")


def readable(site: Path) -> tuple[list[Path], list[str]]:
    """Return the pages that can be read, and a line about each of the others."""
    pages, problems = [], []
    for page in sorted(site.rglob("*.html")):
        try:
            read(page)
        except UnicodeDecodeError:
            problems.append(f"{page}: this page is not UTF-8 and was left as it is; save it as UTF-8")
        except OSError as error:
            problems.append(f"{page}: {error.strerror or error}")
        else:
            pages.append(page)
    return pages, problems


def lacking(pages: list[Path], site: Path) -> Iterator[str]:
    """Yield the pictures that lack alt text."""
    for page in pages:
        for match in IMG.finditer(read(page)):
            file = source(match[1], page, site)
            if file is not None:
                yield file


def describe(
    site: Path, captioner: Captioner | None = None, least: float = 0.3
) -> tuple[list[str], list[str]]:
    """Fill in what is lacking; return the pictures that a person should describe, and a line a bad page."""
    pages, problems = readable(site)
    kept = site.parent / "alt_text.jsonl"
    pictures = sorted(set(lacking(pages, site)))
    for _ in caption_records(pictures, captioner=captioner, output=kept, errors="skip") if pictures else ():
        pass
    records = {record["path"]: record for record in read_table(kept)} if kept.exists() else {}
    alt = {
        path: record["caption"]
        for path, record in records.items()
        if record["caption"] and record["confidence"] >= least
    }
    for page in pages:

        def fill(match: re.Match[str], page: Path = page) -> str:
            file = source(match[1], page, site)
            if file not in alt:
                return match[0]
            return f'<img{match[1]} alt="{html.escape(alt[file])}"{" /" if match[2] else ""}>'

        before = read(page)
        after = IMG.sub(fill, before)
        if after != before:
            try:
                page.write_bytes(after.encode("utf-8"))
            except OSError as error:
                problems.append(f"{page}: {error.strerror or error}")
    return [path for path in pictures if path not in alt], problems


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    if not folder.is_dir():
        sys.exit(f"{folder}: there is no such folder")
    doubtful, problems = describe(folder)
    for path in doubtful:
        print(f"{path}: please describe this one yourself")
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)
