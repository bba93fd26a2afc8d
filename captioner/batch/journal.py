"""What a run has done, in one SQLite file that survives a kill, a power cut and a full disk.

The journal is the truth; tables are written from it, and a table that is appended to while the run goes on
is put right from it. Each file has a row with what it was like when it was captioned (size, modified time,
perhaps a checksum), by what (`Journal.identity`), and its record. Rows keep their place when a file is
captioned anew.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from captioner.inputs import name_of

VERSION = 1

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE identities (id INTEGER PRIMARY KEY, text TEXT UNIQUE NOT NULL);
CREATE TABLE files (
    path BLOB PRIMARY KEY, id INTEGER UNIQUE NOT NULL, size INTEGER NOT NULL, modified INTEGER NOT NULL,
    checksum TEXT NOT NULL, identity INTEGER NOT NULL, failed INTEGER NOT NULL, written TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE records (id INTEGER PRIMARY KEY, record BLOB NOT NULL, preview BLOB, likeness BLOB);
CREATE TABLE beside (
    path BLOB, output TEXT, target BLOB NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (path, output)
) WITHOUT ROWID;
"""


_OUTER = ("disk I/O", "disk is full", "locked", "readonly", "unable to open")
"""What SQLite says where not the journal is at fault, but the disk, or another process."""


class JournalError(ValueError):
    """A journal that cannot be used; one line that says what to do."""


class JournalFull(OSError):
    """The journal could not be written; what was noted before is kept."""


class Done(NamedTuple):
    """What the journal knows of a file.

    Attributes:
        id: its place in the tables.
        size, modified, checksum: of the file when it was captioned; the checksum may be empty.
        identity: number of what captioned it, see `Journal.identity`.
        failed: whether its record has an error.
        written: tags of what is written beside the file, with commas between, see `Journal.mark`.
    """

    id: int
    size: int
    modified: int
    checksum: str
    identity: int
    failed: bool
    written: str


@dataclass(frozen=True)
class Entry:
    """What is to be noted of a file that has been captioned.

    Attributes:
        path: as its record says.
        size, modified, checksum: as in `Done`.
        record: see ``docs/records.md``.
        preview: what the contact sheet shows, or None.
        likeness: a perceptual hash, or None.
    """

    path: str
    size: int
    modified: int
    checksum: str
    record: dict[str, Any]
    preview: bytes | None = None
    likeness: bytes | None = None


class Journal:
    """An open journal; one process at a time may have it.

    Raises:
        JournalError: it is in use, of another version, or no journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = self._connect()
        try:
            self._execute("PRAGMA locking_mode = EXCLUSIVE")
            self._execute("PRAGMA synchronous = FULL")
            self._execute("BEGIN EXCLUSIVE")
            if not self._execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _TABLES.split(";"):
                    self._execute(statement)
                self.put("version", VERSION)
            self.commit()
            row = self._execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
            version = None if row is None else row[0]
        except sqlite3.OperationalError as error:
            self._connection.close()
            if "locked" in str(error):
                raise JournalError(
                    f"{path}: another run is at work here; wait for it, or give another --output"
                ) from None
            raise self._foreign(error) from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the second: of SQLite's own message
            self._connection.close()
            raise self._foreign(error) from None
        except BaseException:
            self._connection.close()
            raise
        if version != str(VERSION):
            self._connection.close()
            raise JournalError(
                f"{path}: a journal of version {version!r:.20}, expected {VERSION}; update captioner, "
                "or give another --output"
            )

    def _connect(self) -> sqlite3.Connection:
        try:
            # autocommit: transactions begin and end where this module says so
            connection = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise JournalError(f"{self.path}: the journal cannot be opened: {error}") from None
        return connection

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close; what was not committed is forgotten, and a journal of nothing is removed."""
        empty = False
        with suppress(sqlite3.Error, JournalError):
            self.roll_back()
            empty = not self.last()
        self._connection.close()
        if empty:
            with suppress(OSError):
                self.path.unlink()

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Turn what damage leads to while rows are read into the line for the user."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if any(reason in str(error) for reason in _OUTER):
                raise
            raise self._damaged(error) from error
        except (sqlite3.Error, zlib.error, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise self._damaged(error) from error

    def _foreign(self, error: Exception) -> JournalError:
        detail = name_of(str(error)[:200])
        return JournalError(f"{self.path}: this is no journal of captioner ({detail}); move it away")

    def _damaged(self, error: Exception) -> JournalError:
        if isinstance(error, JournalError):
            return error
        detail = name_of(str(error)[:200])
        return JournalError(
            f"{self.path}: the journal is damaged ({detail}); move it away, and its table, too"
        )

    def begin(self) -> None:
        """Begin a transaction, if none is open."""
        if not self._connection.in_transaction:
            self._execute("BEGIN")

    def commit(self) -> None:
        """Bring what was noted to the disk, for good.

        Raises:
            JournalFull: it does not fit, or cannot be written; everything before is kept.
        """
        if not self._connection.in_transaction:
            return
        try:
            with self._sound():
                self._execute("COMMIT")
        except sqlite3.OperationalError as error:
            self.roll_back()
            raise JournalFull(None, str(error), str(self.path)) from None

    def roll_back(self) -> None:
        """Forget what was noted since the last commit."""
        if self._connection.in_transaction:
            self._connection.rollback()

    def get(self, key: str, default: Any = None) -> Any:
        """Return what was set under a key."""
        with self._sound():
            row = self._execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            return default if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Keep a small value of plain types."""
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def _write(self, statement: str, values: Sequence[Any]) -> None:
        try:
            with self._sound():
                self.begin()
                self._execute(statement, values)
        except sqlite3.OperationalError as error:  # pages are spilled to the disk before the commit, too
            self.roll_back()
            raise JournalFull(None, str(error), str(self.path)) from None

    def identity(self, text: str) -> int:
        """Return the number of what captions: the model and all options that change its captions."""
        with self._sound():
            row = self._execute("SELECT id FROM identities WHERE text = ?", (text,)).fetchone()
            if row is None:
                self._write("INSERT INTO identities (text) VALUES (?)", (text,))
                row = self._execute("SELECT id FROM identities WHERE text = ?", (text,)).fetchone()
            return int(row[0])

    def identities(self) -> list[str]:
        """Return all that files here were captioned by, first first."""
        with self._sound():
            return [text for (text,) in self._execute("SELECT text FROM identities ORDER BY id")]

    def differing(self, files: Sequence[tuple[str, int, int, str]], identity: int, written: str) -> set[str]:
        """Return the paths of those files that are not done, or not quite as they were.

        What is as it was is so without a look at the row in Python: there may be very many.

        Args:
            files: path, size, modified time and checksum of each.
            identity, written: as they have to be, see `Done`.
        """
        if not files:
            return set()
        values: list[Any] = []
        for path, size, modified, checksum in files:
            values += path.encode("utf-8", "surrogateescape"), size, modified, checksum
        with self._sound():
            rows = self._execute(
                "WITH found (path, size, modified, checksum) AS "
                f"(VALUES {','.join(['(?,?,?,?)'] * len(files))}) "
                "SELECT found.path FROM found LEFT JOIN files USING (path) WHERE files.id IS NULL "
                "OR files.size <> found.size OR files.modified <> found.modified "
                "OR files.checksum <> found.checksum OR identity <> ? OR failed OR written <> ?",
                [*values, identity, written],
            )
            return {path.decode("utf-8", "surrogateescape") for (path,) in rows}

    def done(self, paths: Sequence[str]) -> list[Done | None]:
        """Return what is known of files, None of those that are new."""
        keys = [path.encode("utf-8", "surrogateescape") for path in paths]
        marks = ",".join("?" * len(keys))
        with self._sound():
            rows = self._execute(
                "SELECT path, id, size, modified, checksum, identity, failed, written FROM files "
                f"WHERE path IN ({marks})",
                keys,
            )
            found = {row[0]: row for row in rows}
            known = [None if (row := found.get(key)) is None else Done._make(row[1:]) for key in keys]
            if not all(isinstance(d.id, int) and isinstance(d.written, str) for d in known if d):
                raise TypeError("a row holds something else")
            return known

    def add(self, entry: Entry, identity: int) -> tuple[int, bool]:
        """Note a file and its record; return its place, and whether it had one already."""
        key = os.fsencode(entry.path)
        with self._sound():
            row = self._execute("SELECT id FROM files WHERE path = ?", (key,)).fetchone()
            place = self.last() + 1 if row is None else int(row[0])
        text = json.dumps(entry.record, ensure_ascii=True, separators=(",", ":"))
        self._write(
            "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)",
            (place, zlib.compress(text.encode(), 1), entry.preview, entry.likeness),
        )
        failed = entry.record.get("error") is not None
        self._write(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, '')",
            (key, place, entry.size, entry.modified, entry.checksum, identity, failed),
        )
        return place, row is not None

    def look(self, place: int, preview: bytes | None, likeness: bytes | None) -> None:
        """Add to a record what was seen when its file was captioned once more, see `Entry`."""
        self._write("UPDATE records SET preview = ?, likeness = ? WHERE id = ?", (preview, likeness, place))

    def touch(self, path: str, size: int, modified: int, checksum: str) -> None:
        """Note that a file looks otherwise and is the same."""
        self._write(
            "UPDATE files SET size = ?, modified = ?, checksum = ? WHERE path = ?",
            (size, modified, checksum, os.fsencode(path)),
        )

    def plan(self, path: str, output: str, target: Path, digest: str) -> None:
        """Note what is going to be written beside a file."""
        self._write(
            "INSERT OR REPLACE INTO beside VALUES (?, ?, ?, ?)",
            (os.fsencode(path), output, os.fsencode(target), digest),
        )

    def planned(self, path: str, output: str) -> str | None:
        """Return the digest of what was written beside a file, or was going to be."""
        with self._sound():
            row = self._execute(
                "SELECT digest FROM beside WHERE path = ? AND output = ?", (os.fsencode(path), output)
            ).fetchone()
        return None if row is None else str(row[0])

    def mark(self, path: str, output: str, tag: str) -> None:
        """Note that an output beside a file is written, by a tag that begins with its name and a colon."""
        key = os.fsencode(path)
        with self._sound():
            row = self._execute("SELECT written FROM files WHERE path = ?", (key,)).fetchone()
            others = [t for t in row[0].split(",") if t and not t.startswith(f"{output}:")]
        self._write("UPDATE files SET written = ? WHERE path = ?", (",".join([*others, tag]), key))

    def record(self, place: int) -> dict[str, Any]:
        """Return the record at a place."""
        with self._sound():
            row = self._execute("SELECT record FROM records WHERE id = ?", (place,)).fetchone()
            return _record(row[0])

    def records(self, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield all places after one, in order, with their records."""
        query = "SELECT id, record FROM records WHERE id > ? ORDER BY id"
        for place, blob in self._rows(query, (after,)):
            with self._sound():
                record = _record(blob)
            yield place, record

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the records that have an error, in order."""
        query = "SELECT record FROM files JOIN records USING (id) WHERE failed ORDER BY id"
        for (blob,) in self._rows(query):
            with self._sound():
                record = _record(blob)
            yield record

    def previews(self) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """Yield all records in order, with what the contact sheet shows of them."""
        for blob, preview in self._rows("SELECT record, preview FROM records ORDER BY id"):
            with self._sound():
                record = _record(blob)
                if not isinstance(preview, (bytes, type(None))):
                    raise TypeError("a row holds something else")
            yield record, preview

    def likenesses(self) -> Iterator[tuple[str, bytes | None]]:
        """Yield path and perceptual hash of all pictures that have one, in order."""
        query = (
            "SELECT files.path, records.likeness FROM files JOIN records USING (id) "
            "WHERE records.likeness IS NOT NULL ORDER BY id"
        )
        for path, likeness in self._rows(query):
            with self._sound():
                name = os.fsdecode(path)
                if not isinstance(likeness, bytes):
                    raise TypeError("a row holds something else")
            yield name, likeness

    def last(self) -> int:
        """Return the last place; 0 if there is none."""
        with self._sound():
            return int(self._execute("SELECT max(id) FROM records").fetchone()[0] or 0)

    def _rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[Any]:
        """Yield the rows of a query, one at a time."""
        with self._sound():
            rows = iter(self._execute(query, values))
        while True:
            with self._sound():
                row = next(rows, None)
            if row is None:
                return
            yield row


def _record(blob: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(zlib.decompress(blob))
    if not isinstance(found, dict) or not found.keys() >= {"path", "caption", "error"}:
        raise ValueError("a record holds something else")
    return found
