"""Search a photo library by what its pictures show.

    python examples/photo_search.py LIBRARY.db add PHOTOS
    python examples/photo_search.py LIBRARY.db find "dog beach"

Keeps captions and the model's guesses in SQLite with full-text search. Adding a folder again takes only what
is new, and tries again what could not be captioned, of which there is a line each.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

from captioner import Captioner
from captioner.batch import caption_records
from captioner.batch.sources import read_table


def open_library(path: Path) -> sqlite3.Connection:
    """Open a library, or make one. Words are found by their stems: ``dogs`` finds ``dog``."""
    library = sqlite3.connect(path)
    library.execute(
        "CREATE VIRTUAL TABLE IF NOT EXISTS photos USING fts5"
        "(path UNINDEXED, caption, guesses, confidence UNINDEXED, tokenize = 'porter unicode61')"
    )
    return library


def add(library: sqlite3.Connection, table: Path, photos: Path, captioner: Captioner | None = None) -> int:
    """Caption what is new, and return how many that is; ``table`` remembers what was captioned."""
    new = 0
    for record in caption_records(photos, recursive=True, captioner=captioner, output=table):
        if record["error"] is None:
            new += 1
        else:
            print(record["error"], file=sys.stderr)
    # all of it anew, which is quick: so the index has what the table has, whatever happened before
    with library:
        library.execute("DELETE FROM photos")
        for record in read_table(table) if table.exists() else ():
            if record["error"] is None:
                guesses = [g["word"] for g in record.get("guesses", ()) if g["probability"] > 0.3]
                row = (record["path"], record["caption"], " ".join(guesses), record["confidence"])
                library.execute("INSERT INTO photos VALUES (?, ?, ?, ?)", row)
    return new


def find(library: sqlite3.Connection, words: str, most: int = 20) -> Iterator[tuple[str, str]]:
    """Yield path and caption of the photos that have all the words, best first."""
    query = " ".join('"' + word.replace('"', '""') + '"' for word in words.split())
    # a word in the caption counts more than one among the guesses
    yield from library.execute(
        "SELECT path, caption FROM photos WHERE photos MATCH ? ORDER BY bm25(photos, 0, 2, 1) LIMIT ?",
        (query, most),
    )


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[2] not in ("add", "find"):
        sys.exit(__doc__)
    place = Path(sys.argv[1])
    opened = open_library(place)
    if sys.argv[2] == "add":
        new = add(opened, place.with_suffix(".jsonl"), Path(sys.argv[3]))
        print("1 file is new" if new == 1 else f"{new} files are new")
    else:
        for path, caption in find(opened, sys.argv[3]):
            print(f"{path}: {caption}")
