"""A run over many files that can be killed at any moment and goes on where it was.

For each file the order is: its record and what is going to be written beside it are noted in the journal;
that is written; the tables are appended to; all of it is noted as done. Whatever happens between two of these
steps, the next run with the same command does the rest, and nothing twice.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from captioner.batch.journal import Done, Entry, Journal, JournalFull
from captioner.batch.ledger import Ledger
from captioner.batch.sources import Missing, Source, checksum
from captioner.batch.tables import TableFormatError
from captioner.files import open_atomically, remove_leftovers
from captioner.inputs import ImageError
from captioner.parallel import ahead

if TYPE_CHECKING:
    from captioner.batch.beside import Plan

CHUNK = 400
"""How many files are looked up together."""
COMMIT_SECONDS = 1.0
"""How much work a kill may cost, at most, beside what is being captioned."""
COMMIT_FILES = 256
_LISTED = "errors listed"
_LONGEST = 2**20
LOOK = "look"
"""What the journal calls that an engine has looked closely."""


class Beside(Protocol):
    """What is written beside each file; see `captioner.batch.beside`."""

    def plan(self, path: str, record: Mapping[str, Any], ours: str | None = None) -> Plan:
        """Say what would be written."""
        ...


@dataclass(frozen=True)
class Finished:
    """What an engine gives back for a source.

    Attributes:
        record: see ``docs/records.md``.
        preview, likeness: see `captioner.batch.journal.Entry`.
    """

    record: dict[str, Any]
    preview: bytes | None = None
    likeness: bytes | None = None


Engine = Callable[[Iterator[Source]], Iterator[Finished]]
"""Captions sources, each once, in any order. It is made when there is something to caption."""


class Stopped(Exception):
    """The run cannot go on; one line that says why. What was captioned is kept."""


@dataclass
class Counts:
    """How many files a run has seen, and what became of them.

    ``captioned`` now, of which ``doubtful``; ``skipped`` because the journal has them; ``failed``, and the
    arguments that were ``missing`` something, with the reason; ``written`` beside files, by output; and what
    is ``kept`` there as it was, with path and reason. ``looked`` are those among the skipped that were
    captioned once more only to see where the model looks.
    """

    captioned: int = 0
    skipped: int = 0
    failed: int = 0
    doubtful: int = 0
    looked: int = 0
    written: Counter[str] = field(default_factory=Counter)
    kept: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """All of them."""
        return self.captioned + self.skipped + self.failed + len(self.missing)


@dataclass(frozen=True)
class _Begun:
    """A source in work, its checksum, and the place of its record if it has one that may stay.

    ``captioned``: it is done, and only to be looked at; otherwise it has failed before.
    """

    source: Source
    checksum: str
    place: int | None = None
    captioned: bool = False


class Run:
    """Captions sources and keeps journal, tables and what is written beside files in step."""

    def __init__(
        self,
        journal: Journal,
        identity: str,
        *,
        output: Path | None = None,
        errors: Path | None = None,
        min_confidence: float = 0.0,
        use_checksum: bool = False,
        beside: Mapping[str, Beside] | None = None,
        looks: bool = False,
        tick: Callable[[int], object] = lambda files: None,
        complain: Callable[[str], object] = lambda reason: None,
    ) -> None:
        """Begin a run.

        Args:
            journal: an open journal; the run closes its tables, not the journal.
            identity: the model and all options that change its captions; files that were captioned by
                another are captioned anew.
            output: the table; its suffix tells the format. None if only what is beside files is wanted.
            errors: where the paths and errors go, as JSON Lines; no such file without errors.
            min_confidence: captions below it are doubtful: they go to a table of their own beside
                ``output``, called ``….review…``, and nothing is written beside their files.
            use_checksum: tell changed files by their content.
            beside: what is written beside files, by a short name without a comma.
            looks: whether the engine gives a preview of each file; those that were captioned without are
                captioned once more for that, and their records stay.
            tick: called with how many files are done, as often as that changes.
            complain: called with the reason why a file cannot be captioned, or an input stands for none.

        Raises:
            TableFormatError: a table's place is taken.
        """
        self.journal = journal
        self.min_confidence, self.use_checksum = min_confidence, use_checksum
        self.beside = dict(beside or {})
        self.errors, self.tick, self.complain = errors, tick, complain
        self.counts = Counts()
        self.stop = threading.Event()
        """Set it to let what is in work end, and nothing new begin."""
        self._identity = journal.identity(identity)
        self._look = f"{LOOK}:1" if looks else ""
        tags = [tag(name, output) for name, output in self.beside.items()]
        self._tags = ",".join([self._look, *tags] if looks else tags)
        self._rule = f"min_confidence {min_confidence}"
        self.ledgers: list[Ledger] = []
        if output is not None:
            self.ledgers.append(Ledger(journal, output, lambda r: not self.is_doubtful(r), self._rule))
            review = output.with_name(f"{output.stem}.review{output.suffix}")
            self.ledgers.append(Ledger(journal, review, self.is_doubtful, self._rule, optional=True))
        if errors is not None:
            remove_leftovers(errors)
            if not is_list_of(("path", "error"), errors):
                raise TableFormatError(
                    f"{errors}: this is where errors are listed, and it holds something else; move it away, "
                    "or choose another name"
                )
        journal.commit()
        self._waiting: list[tuple[Entry, Source]] = []
        self._in_work: dict[str, _Begun] = {}
        self._late: list[tuple[str, Source, dict[str, Any]]] = []
        self._committed = time.monotonic()

    @property
    def has_results(self) -> bool:
        """Whether there is anything new to be kept."""
        return bool(self._waiting or self.counts.captioned or self.counts.failed)

    @property
    def stopping(self) -> bool:
        """Whether nothing new begins."""
        return self.stop.is_set()

    def is_doubtful(self, record: Mapping[str, Any]) -> bool:
        """Tell whether a record belongs into the review table."""
        return bool(record["caption"]) and record["confidence"] < self.min_confidence

    # ----------------------------------------------------------------------------------------------

    def run(
        self, found: Iterable[Source | Missing], make_engine: Callable[[], Engine]
    ) -> Iterator[dict[str, Any]]:
        """Caption what is found and not done yet, and yield the records that are new.

        Whoever stops early, or is interrupted, loses what is in work. `finish` has to be called at the end.

        Raises:
            Stopped: the disk is full, or cannot be written.
        """
        todo = self._todo(iter(found))
        try:
            first = next(todo, None)
            if first is not None:
                for finished in make_engine()(chain([first], todo)):
                    self._take(finished)
                    yield finished.record
            self.flush()
        except (JournalFull, sqlite3.OperationalError, OSError) as error:
            raise self._stop(error) from None

    def _stop(self, error: Exception) -> Stopped:
        with suppress(sqlite3.Error):
            self.journal.roll_back()
        if isinstance(error, sqlite3.OperationalError):
            return Stopped(f"{self.journal.path}: {error}")
        assert isinstance(error, OSError)
        reason = error.strerror or str(error)
        return Stopped(f"{error.filename}: {reason}" if error.filename else reason)

    def _todo(self, found: Iterator[Source | Missing]) -> Iterator[Source]:
        while not self.stopping and (chunk := list(islice(found, CHUNK))):
            sources = [item for item in chunk if isinstance(item, Source)]
            for item in chunk:
                if isinstance(item, Missing):
                    self.counts.missing.append((item.path, item.reason))
                    self.complain(item.reason)
            sums = self._checksums(sources)
            asked = [(s.path, s.size, s.modified, sum_) for s, sum_ in zip(sources, sums, strict=True)]
            differing = self.journal.differing(asked, self._identity, self._tags)
            self.counts.skipped += len(sources) - len(differing)
            rest = [(s, sum_) for s, sum_ in zip(sources, sums, strict=True) if s.path in differing]
            known = self.journal.done([source.path for source, _ in rest])
            for (source, sum_), done in zip(rest, known, strict=True):
                if self.stopping:
                    return
                begun = _Begun(source, sum_)
                if done is not None and self._is_done(source, sum_, done):
                    self.counts.skipped += 1
                    if not self._look or self._look in done.written.split(","):
                        continue
                    begun = _Begun(source, sum_, done.id, captioned=True)
                elif done is not None and self._is_as_it_failed(source, sum_, done):
                    begun = _Begun(source, sum_, done.id)
                self._in_work[source.path] = begun
                yield source
            self._beside_later()
            self.tick(self.counts.seen)

    def knows(self, path: str) -> bool:
        """Tell whether a local file is done, as far as its size and time say."""
        (done,) = self.journal.done([path])
        with suppress(OSError):
            found = os.stat(path)
            return done is not None and (found.st_size, found.st_mtime_ns) == (done.size, done.modified)
        return False

    def _checksums(self, sources: list[Source]) -> list[str]:
        if not self.use_checksum:
            return [""] * len(sources)

        def sum_of(source: Source) -> str:
            try:
                return checksum(source)
            except ImageError:  # whoever captions it says so
                return ""

        return list(ahead(sum_of, sources, os.cpu_count() or 1))

    def _is_done(self, source: Source, sum_: str, done: Done) -> bool:
        """Tell whether a file needs no captioning; what is missing beside it is noted to be written."""
        if done.failed or done.identity != self._identity:
            return False
        as_it_was = (source.size, source.modified) == (done.size, done.modified)
        same = done.checksum == sum_ if sum_ and done.checksum else as_it_was
        if same and not (as_it_was and (done.checksum or not sum_)):
            self.journal.touch(source.path, source.size, source.modified, sum_ or done.checksum)
        if not same and not self._changed_by_us(source, done):
            return False
        written = done.written.split(",")
        if any(tag(name, output) not in written for name, output in self.beside.items()):
            record = self.journal.record(done.id)
            if not self.is_doubtful(record):
                self._late.append((source.path, source, record))
        return True

    def _is_as_it_failed(self, source: Source, sum_: str, done: Done) -> bool:
        """Tell whether a file could not be captioned before, and is as it was then."""
        as_it_was = (source.size, source.modified, sum_) == (done.size, done.modified, done.checksum)
        return bool(done.failed) and done.identity == self._identity and as_it_was

    def _changed_by_us(self, source: Source, done: Done) -> bool:
        """Tell whether only our writing into the file changed it, and a kill kept us from noting that."""
        for name, output in self.beside.items():
            ours = self.journal.planned(source.path, name)
            if ours is None or tag(name, output) in done.written.split(","):
                continue
            plan = output.plan(source.path, self.journal.record(done.id), ours)
            if plan.target == Path(source.path) and plan.data is None and plan.kept is None:
                self.journal.touch(source.path, source.size, source.modified, "")
                return True
        return False

    def _beside_later(self) -> None:
        """Write what is missing beside files that were captioned before."""
        late, self._late = self._late, []
        if late:
            self._write_beside(late)
        self.journal.commit()

    # ----------------------------------------------------------------------------------------------

    def _take(self, finished: Finished) -> None:
        record = finished.record
        begun = self._in_work.pop(record["path"])
        if begun.place is not None and self._is_nothing_new(begun, begun.place, finished):
            return
        source = begun.source
        entry = Entry(
            *(record["path"], source.size, source.modified, begun.checksum, record),
            *(finished.preview, finished.likeness),
        )
        self._waiting.append((entry, source))
        if record["error"] is not None:
            self.complain(record["error"])
        self.tick(self.counts.seen + len(self._waiting))
        if len(self._waiting) >= COMMIT_FILES or time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.flush()

    def _is_nothing_new(self, begun: _Begun, place: int, finished: Finished) -> bool:
        """Tell whether the record that the journal has of a file can stay, and note what else was found."""
        record, old = finished.record, self.journal.record(place)
        same = (record["caption"], record["error"]) == (old["caption"], old["error"])
        if not begun.captioned:
            if not same or (record["caption"] and self.beside):
                return False
            # as before, so that tables and what people made of them stay
            self.counts.failed += 1
            self.complain(record["error"])
            self.tick(self.counts.seen + len(self._waiting))
            if finished.preview is not None:  # a video that breaks off
                self.journal.look(place, finished.preview, finished.likeness)
            return True
        if record["error"] is not None:  # which takes nothing away from what was captioned
            self.complain(record["error"])
            return True
        if not same:
            self.counts.skipped -= 1
            return False
        self.counts.looked += 1
        self.journal.look(place, finished.preview, finished.likeness)
        self.journal.mark(record["path"], LOOK, self._look)
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.flush()
        return True

    def flush(self) -> None:
        """Bring everything that is captioned to the disk.

        Raises:
            OSError: it could not be written; the journal has what fitted.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            self.journal.commit()
            self._committed = time.monotonic()
            return
        try:
            self.journal.begin()
            places = [self.journal.add(entry, self._identity) for entry, _ in waiting]
            for entry, _ in waiting if self._look else ():
                self.journal.mark(entry.path, LOOK, self._look)
            replaces = any(old for _, old in places)
            for ledger in self.ledgers:
                ledger.prepare(replaces)
            self.journal.commit()
        except BaseException:  # a second Ctrl-C, too: nothing must be noted by halves
            self.journal.roll_back()
            self._waiting = waiting + self._waiting
            raise
        for entry, _ in waiting:
            failed = entry.record["error"] is not None
            self.counts.failed += failed
            self.counts.captioned += not failed
            self.counts.doubtful += self.is_doubtful(entry.record)
        self._write_beside(
            [
                (entry.path, source, entry.record)
                for entry, source in waiting
                if entry.record["caption"] and not self.is_doubtful(entry.record)
            ]
        )
        new = [
            (place, entry.record) for (place, old), (entry, _) in zip(places, waiting, strict=True) if not old
        ]
        for ledger in self.ledgers:
            ledger.append(new)
        self.journal.commit()
        self._committed = time.monotonic()

    def _write_beside(self, items: list[tuple[str, Source, dict[str, Any]]]) -> None:
        """Plan, note, write, and note again; what a person wrote is kept."""
        if not self.beside:
            return
        for name, output in self.beside.items():
            # one output after the other: two of them may change the same file
            plans: list[tuple[str, Source, Plan]] = []
            begun: list[Path] = []
            self.journal.begin()
            for path, source, record in items:
                ours = self.journal.planned(path, name)
                plan = output.plan(path, record, ours)
                if ours is not None:
                    begun.append(plan.target)
                if plan.kept is not None:
                    self.counts.kept.append((path, plan.kept))
                    continue
                self.journal.plan(path, name, plan.target, plan.digest)
                plans.append((path, source, plan))
            self.journal.commit()
            remove_leftovers(*begun)
            for path, source, plan in plans:
                if self._write_plan(path, source, plan):
                    self.counts.written[name] += plan.data is not None
                    self.journal.mark(path, name, tag(name, output))

    def _write_plan(self, path: str, source: Source, plan: Plan) -> bool:
        """Write what was planned; return whether it is there."""
        try:
            plan.write()
        except OSError as error:
            if is_full(error):
                raise
            self.counts.kept.append((path, f"{plan.target}: {error.strerror or error}"))
            return False
        if plan.data is not None and source.file is not None and plan.target == Path(source.file):
            now = os.stat(source.file)
            sum_ = checksum(source) if self.use_checksum else ""
            self.journal.touch(path, now.st_size, now.st_mtime_ns, sum_)
        return True

    def finish(self) -> None:
        """Flush, bring all tables up to date, and write the file of errors.

        Raises:
            Stopped: the disk is full, or cannot be written.
            TableFormatError: the format cannot hold these records.
        """
        try:
            self.flush()
            for ledger in self.ledgers if self.journal.last() else ():  # an empty table is of no use
                if not ledger.complete:
                    ledger.finish()
            self.journal.commit()
            self._write_errors()
        except (JournalFull, sqlite3.OperationalError, OSError) as error:
            raise self._stop(error) from None
        finally:
            for ledger in self.ledgers:
                ledger.close()

    def settle(self) -> None:
        """Write tables anew that are appended to and hold what has been replaced, while the run goes on.

        Raises:
            Stopped: the disk is full, or cannot be written.
        """
        try:
            for ledger in self.ledgers:
                ledger.settle()
            self.journal.commit()
        except (JournalFull, sqlite3.OperationalError, OSError) as error:
            raise self._stop(error) from None

    def failures(self) -> Iterator[tuple[str, str]]:
        """Yield path and reason of all in the journal that has no caption, and of what was missing."""
        yield from ((record["path"], record["error"]) for record in self.journal.failures())
        yield from self.counts.missing

    def _write_errors(self) -> None:
        from captioner.batch.tables import to_json

        if self.errors is None:
            return
        failures = self.failures()
        first = next(failures, None)
        if first is None:
            if self.journal.get(_LISTED) and is_list_of(("path", "error"), self.errors):
                self.errors.unlink()
            return
        self.journal.put(_LISTED, True)
        self.journal.commit()
        with open_atomically(self.errors) as file:
            for path, error in chain([first], failures):
                file.write(f"{to_json({'path': path, 'error': error})}\n".encode())


def is_list_of(keys: Sequence[str], path: Path) -> bool:
    """Tell whether a file is none, empty, or JSON Lines of objects with these keys, by its first line."""
    try:
        with open(path, "rb") as file:
            line = file.readline(_LONGEST)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    if len(line) == _LONGEST:
        return line.startswith(f'{{"{keys[0]}": '.encode())
    try:
        return not line or [*json.loads(line)] == [*keys]
    except (ValueError, TypeError):
        return False


def journal_of(place: Path) -> Path:
    """Return where the journal of a table is."""
    return place.with_name(f"{place.name}.journal")


def errors_of(place: Path) -> Path:
    """Return where the errors of a table are listed."""
    return place.with_name(f"{place.stem.lstrip('.')}.errors.jsonl")


def tag(name: str, output: Beside) -> str:
    """Return what the journal calls an output, its options included."""
    return f"{name}:{zlib.crc32(repr(sorted(vars(output).items())).encode()):08x}"


def is_full(error: OSError) -> bool:
    """Tell whether a disk, or somebody's share of it, is full."""
    import errno

    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
