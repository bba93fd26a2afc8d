"""A table kept in step with the journal, whatever happens in between."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from captioner.batch.journal import Journal
from captioner.batch.tables import APPENDED, TableFormatError, head, lines, write_table
from captioner.files import open_atomically, remove_leftovers
from captioner.inputs import printable

Record = Mapping[str, Any]
_PART = 1 << 20


class Ledger:
    """A table of some of the journal's records, in the journal's order.

    JSON Lines and CSV are appended to as records come. How far is noted in the journal, so that what a kill
    tore off or left out is put right by the next run. A record that takes the place of an older one, and the
    other formats, are written when the run ends. A table that a person has edited is moved aside before it is
    replaced.
    """

    def __init__(
        self,
        journal: Journal,
        path: Path,
        wanted: Callable[[Record], bool],
        rule: str = "",
        *,
        optional: bool = False,
    ) -> None:
        """Begin to keep a table; nothing is written yet.

        Args:
            journal: what it is written from.
            path: of the table; its suffix tells the format.
            wanted: which records it holds.
            rule: names ``wanted``: a table that was written by another rule is written anew.
            optional: without a wanted record there is no file.

        Raises:
            TableFormatError: there is such a file, and the journal does not know it.
        """
        self.journal, self.path, self.wanted, self.rule, self.optional = journal, path, wanted, rule, optional
        self.suffix = path.suffix.lower()
        self.moved: Path | None = None
        """Where an edited table has gone."""
        self.sorted_anew = False
        """Whether another rule than that of the run before tells which records it holds."""
        self._key = f"table {printable(path.name)}"
        empty = {"size": 0, "sha256": "", "upto": 0, "there": False, "open": False, "stale": False}
        noted = journal.get(self._key) or {}
        if not isinstance(noted, dict) or any(type(noted.get(k, v)) is not type(v) for k, v in empty.items()):
            raise TableFormatError(f"{journal.path}: the journal is damaged; move it away, and {path}, too")
        self._state: dict[str, Any] = {**empty, "rule": rule, **noted}
        remove_leftovers(path)
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._stamp: tuple[int, ...] | None = None
        known = self._state["there"] or self._state["open"]
        if not known and path.exists() and path.stat().st_size:
            raise TableFormatError(
                f"{path}: this file exists, and {journal.path.name} does not know it; move it away, "
                "or choose another name"
            )

    @property
    def complete(self) -> bool:
        """Whether the table is what the journal says; costs nothing, so edits are not seen."""
        if self._state["open"] or self._must_rewrite or self._state["upto"] != self.journal.last():
            return False
        return self.path.exists() if self._state["there"] else self.optional

    @property
    def _must_rewrite(self) -> bool:
        return bool(self._state["stale"]) or self._state["rule"] != self.rule

    def prepare(self, replaces: bool) -> None:
        """Note in the open transaction that records come, and whether one takes the place of an older one."""
        if replaces and not self._state["stale"]:
            self._note(stale=True)
        if self.suffix in APPENDED and self._file is None and not self._must_rewrite:
            # once it is open, what the file has too much is ours, and is cut off after a kill
            self._note(**({"open": True} if self._is_as_noted() else {"stale": True}))

    def append(self, records: Sequence[tuple[int, Record]]) -> None:
        """Write records that have new places, and note that in the open transaction.

        Raises:
            OSError: they could not be written; what was there before is.
        """
        if self.suffix not in APPENDED or self._must_rewrite or not records:
            return
        if self._state["upto"] < records[0][0] - 1:  # captioned by a run that was killed then
            missed = self.journal.records(self._state["upto"])
            records = [item for item in missed if item[0] < records[0][0]] + list(records)
        if self._file is not None and not self._is_untouched():
            # somebody has changed, replaced or deleted it since: `finish` moves it aside, and writes it anew
            self.close()
            self._note(stale=True, open=False)
            return
        self._write(b"".join(lines(record, self.suffix) for _, record in records if self.wanted(record)))
        self._note(upto=records[-1][0])

    def finish(self) -> None:
        """Write what is missing, or the whole table anew if that is needed, and note it.

        Raises:
            OSError: it could not be written; what was there before is.
            TableFormatError: the format cannot hold these records.
        """
        if self.suffix in APPENDED and not self._must_rewrite:
            if self._state["upto"] < self.journal.last():
                self.prepare(replaces=False)
            if not self._must_rewrite and (not self._state["there"] or self.path.exists()):
                self.append(list(self.journal.records(self._state["upto"])))
                if not self._state["there"] and not self.optional:
                    self._write(b"")
                self._note(open=False)
        if not self.complete:
            self._rewrite()
        self.close()

    def settle(self) -> None:
        """Write a table anew that grows and in which something has been replaced; others wait for the end."""
        if self.suffix in APPENDED and self._must_rewrite:
            self.finish()

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _note(self, **changes: Any) -> None:
        self._state.update(changes)
        self.journal.put(self._key, self._state)

    def _is_as_noted(self) -> bool:
        """Tell whether the file is what was noted, but for what a kill has left behind its end."""
        if not self._state["there"]:
            return True
        left, digest = self._state["size"], hashlib.sha256()
        try:
            with open(self.path, "rb") as file:
                while left and (part := file.read(min(left, _PART))):
                    digest.update(part)
                    left -= len(part)
                more = file.read(1)
        except OSError:
            return False
        torn = bool(more) and not self._state["open"]
        return not left and not torn and digest.hexdigest() == self._state["sha256"]

    def _is_untouched(self) -> bool:
        """Tell whether nobody else has written the open file since it was last written."""
        now = _stamp_of(self.path)
        if now == self._stamp:
            return True
        # some systems set the time of an open file late
        if now is None or self._stamp is None or now[:3] != self._stamp[:3] or not self._is_as_noted():
            return False
        self._stamp = now
        return True

    def _write(self, data: bytes) -> None:
        if not data and not (self._file is None and not self._state["there"] and not self.optional):
            return
        if self._file is None:
            self._open()
        assert self._file is not None
        data = data if self._state["there"] else head(self.suffix) + data
        place = self._state["size"]
        self._file.seek(place)
        self._file.truncate()  # what an interruption kept from being noted
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), place)
            self._file.seek(place)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        digest = self._digest.copy()
        digest.update(data)
        self._note(size=place + len(data), sha256=digest.hexdigest(), there=True)
        self._digest = digest
        self._stamp = _stamp_of(self.path)

    def _open(self) -> None:
        """Open the file at the place to which it was noted, and cut off what a kill left behind that."""
        size = self._state["size"]
        self._file = open(self.path, "r+b" if self._state["there"] else "wb", buffering=0)  # noqa: SIM115
        self._digest = hashlib.sha256()
        left = size
        while left:
            part = self._file.read(min(left, _PART))
            self._digest.update(part)
            left -= len(part)
        self._file.truncate(size)
        self._file.seek(size)
        self._stamp = _stamp_of(self.path)

    def _rewrite(self) -> None:
        self.close()
        if self._state["there"] and self.path.exists() and not self._is_as_noted():
            self._move_aside()
        self.sorted_anew = self._state["rule"] != self.rule
        wanted: Iterator[Record] = (r for _, r in self.journal.records() if self.wanted(r))
        first = next(wanted, None)
        upto = self.journal.last()
        done = {"stale": False, "open": False, "rule": self.rule, "upto": upto}
        if first is None and self.optional:
            self.path.unlink(missing_ok=True)
            self._note(**done, there=False, size=0, sha256="")
            return
        if not self._state["there"]:  # so that a kill leaves no file that the journal does not know
            self._note(open=True)
            self.journal.commit()
        with open_atomically(self.path) as file:
            hashed = _Hashed(file)
            write_table(self.path, chain([first], wanted) if first is not None else [], hashed)  # type: ignore[arg-type]
        self._note(**done, there=True, size=hashed.size, sha256=hashed.digest.hexdigest())

    def _move_aside(self) -> None:
        """Keep a table that somebody has edited."""
        number = 1
        while (target := self.path.with_name(f"{self.path.stem}.edited-{number}{self.path.suffix}")).exists():
            number += 1
        os.replace(self.path, target)
        self.moved = target


def _stamp_of(path: Path) -> tuple[int, ...] | None:
    """Return what changes when somebody writes a file; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _Hashed(io.RawIOBase):
    """Writes through to a file and hashes what goes by."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.file.write(data)
        self.size += len(data)
        return len(data)
