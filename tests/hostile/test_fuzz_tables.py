"""Tables, lists, archives and journals that are damaged, or hold anything: read, or told in one line."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import sqlite3
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_worker import EXAMPLES, check_message, only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz_texts import altered, anything, dump, odd_text, picks, quick

from captioner.batch.apply import ApplyError, apply_table
from captioner.batch.journal import Journal, JournalError
from captioner.batch.metadata import MetadataError
from captioner.batch.rows import TableError, read_table, table_columns
from captioner.batch.run import Finished, Run, Stopped
from captioner.batch.sidecars import SidecarError
from captioner.batch.sources import Held, Missing, Source, find_sources, local
from captioner.batch.tables import TableFormatError
from captioner.console import printable
from captioner.images import ImageError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import hostile

seeds = st.lists(st.integers(0, 2**32), min_size=1, max_size=3)
slower = settings(
    max_examples=max(20, EXAMPLES // 4),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
"""For what writes to a disk at every input."""

WORDS = [{"word": word, "probability": 0.5} for word in ("a", "dog", "runs")]
RECORDS: list[dict[str, Any]] = [
    {"path": "a.jpg", "caption": "a dog runs", "words": WORDS, "error": None, "start": None},
    {"path": "b.png", "caption": "", "words": [], "error": "b.png: truncated", "start": None},
    {"path": "c/d.jpg", "caption": 'a "red", car', "words": WORDS, "error": None, "start": None},
    {
        "path": "e.mp4",
        "caption": "a dog runs",
        "error": None,
        "segments": [{"start": 0.0, "end": 5.0, "caption": "a dog runs", "words": WORDS}],
    },
]
COLUMNS = ("path", "caption", "error", "words", "start")


def csv_of(records: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    rows = csv.writer(text, delimiter=delimiter)
    rows.writerow(COLUMNS)
    for record in records:
        cells = (record.get(column) for column in COLUMNS)
        rows.writerow(["" if c is None else c if isinstance(c, str) else json.dumps(c) for c in cells])
    return text.getvalue().encode()


def parquet_of(records: list[dict[str, Any]]) -> bytes:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stream = io.BytesIO()
    rows = [{column: dump(record.get(column)).decode() for column in COLUMNS[1:]} for record in records]
    rows = [{"path": record["path"], **row} for record, row in zip(records, rows, strict=True)]
    parquet.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def lines_of(records: list[Any]) -> bytes:
    return b"".join(dump(record) + b"\n" for record in records)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of its own, which is the current one, with some of the files that the tables name."""
    place = tmp_path_factory.mktemp("tables")
    (place / "c").mkdir()
    for name in ("a.jpg", "c/d.jpg", "e.mp4"):
        (place / name).write_bytes(b"a picture")
    here = os.getcwd()
    os.chdir(place)
    yield place
    os.chdir(here)


def tables() -> dict[str, bytes]:
    found = {".csv": csv_of(RECORDS), ".tsv": csv_of(RECORDS, "\t"), ".jsonl": lines_of(RECORDS)}
    return {**found, ".parquet": parquet_of(RECORDS)}


def check_line(message: str) -> None:
    """It is said in one line, as long as the names in it."""
    assert len(message) < 2**20
    assert len(printable(message).splitlines()) <= 1


def look_at(found: Iterator[Source | Missing]) -> None:
    """Take all that an input stands for, and read what is in archives."""
    for number, item in enumerate(found):
        assert number < 10_000
        if isinstance(item, Missing):
            check_line(item.reason)
        elif item.file is None and "://" not in item.path:
            with_content(item)


def with_content(source: Source) -> None:
    try:
        assert len(source.read()) == source.size
        with local(source) as file:
            assert os.path.getsize(file) == source.size
    except ImageError as error:
        check_line(str(error))


def use(path: Path, column: str | None = None) -> None:
    """Do with a table all that is done with one."""
    only(TableError, lambda: list(read_table(path)), path)
    only(TableError, lambda: table_columns(path), path)
    look_at(find_sources([str(path)]))
    look_at(find_sources([str(path)], column=column or "caption"))
    for to in ("sidecars", "alt-text"):
        try:
            for applied in apply_table(path, to=to, dry_run=True, ours=lambda path, output: None):
                check_line(applied.reason or "")
        except (ApplyError, TableError, SidecarError, MetadataError) as error:
            check_line(str(error))


def test_the_good_ones_are_read(place: Path) -> None:
    for suffix, data in tables().items():
        path = place / f"good{suffix}"
        path.write_bytes(data)
        assert [row["path"] for row in read_table(path)] == [record["path"] for record in RECORDS]
        applied = list(apply_table(path, dry_run=True))
        assert [a.what for a in applied if a.path == "a.jpg"] == ["written"], suffix


@quick
@given(suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]), seeds=seeds)
def test_fuzz_damaged_tables(suffix: str, seeds: list[int], place: Path) -> None:
    data = tables()[suffix]
    for seed in seeds:
        data = hostile.mutate(data, random.Random(seed))
    path = place / f"damaged{suffix}"
    path.write_bytes(data)
    use(path)


@quick
@given(picks=picks, whole=st.none() | anything, suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]))
def test_fuzz_tables_with_anything_in_them(
    picks: list[tuple[int, Any]], whole: Any, suffix: str, place: Path
) -> None:
    path = place / f"odd{suffix}"
    try:
        records = altered(RECORDS, picks)
        if suffix == ".jsonl":
            data = lines_of(records + ([] if whole is None else [whole]))
        else:
            data = csv_of([r for r in records if isinstance(r, dict)], "," if suffix == ".csv" else "\t")
    except (ValueError, csv.Error):  # more digits than Python writes; half a surrogate
        return
    path.write_bytes(data)
    use(path, "words")


@quick
@given(
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]),
    pieces=st.lists(st.tuples(st.integers(0, 2000), odd_text), max_size=4),
)
def test_fuzz_odd_characters(suffix: str, pieces: list[tuple[int, str]], place: Path) -> None:
    data = tables()[suffix]
    for at, piece in pieces:
        data = data[: at % len(data)] + piece.encode("utf-8", "surrogatepass") + data[at % len(data) :]
    path = place / f"characters{suffix}"
    path.write_bytes(data)
    use(path)


@quick
@given(data=st.binary(max_size=60) | odd_text.map(lambda t: t.encode("utf-8", "surrogatepass")), seeds=seeds)
def test_fuzz_lists_of_paths(data: bytes, seeds: list[int], place: Path) -> None:
    chance = random.Random(seeds[0])
    names = [b"a.jpg", b"c/d.jpg", b"none.png", b"\xff.jpg", b"c", data]
    chance.shuffle(names)
    text = chance.choice((b"\n", b"\0", b"\r\n")).join(names)
    for seed in seeds[1:]:
        text = hostile.mutate(text, random.Random(seed))
    look_at(find_sources(["-"], stdin=io.BytesIO(text)))


# archives


def archive(packing: str = "", kind: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{packing}", format=kind) as tar:
        for number, name in enumerate(("a.jpg", "b/c.png", "ü" * 60 + ".jpg", "n" * 120 + ".jpg", "d.txt")):
            info = tarfile.TarInfo(name)
            info.size = 100 * number
            info.mtime = 1_600_000_000.5 if kind == tarfile.PAX_FORMAT else 1_600_000_000
            info.pax_headers = {"comment": "x"} if kind == tarfile.PAX_FORMAT else {}
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return stream.getvalue()


ARCHIVES = {
    ".tar": [archive(), archive(kind=tarfile.GNU_FORMAT)],
    ".tar.gz": [archive("gz")],
    ".tar.bz2": [archive("bz2")],
    ".tar.xz": [archive("xz")],
}


def right_checksums(data: bytes) -> bytes:
    """Make the checksums of an archive's headers right, so that what they say is believed."""
    changed = bytearray(data)
    for at in range(0, len(changed) - 511, 512):
        if changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def test_good_archives_are_read(place: Path) -> None:
    for suffix, kinds in ARCHIVES.items():
        for data in kinds:
            path = place / f"good{suffix}"
            path.write_bytes(data)
            found = [item for item in find_sources([str(path)]) if isinstance(item, Source)]
            assert [len(source.read()) for source in found] == [0, 100, 200, 300], suffix


@quick
@given(suffix=st.sampled_from(sorted(ARCHIVES)), which=st.integers(0, 1), seeds=seeds, believed=st.booleans())
def test_fuzz_damaged_archives(
    suffix: str, which: int, seeds: list[int], believed: bool, place: Path
) -> None:
    data = ARCHIVES[suffix][which % len(ARCHIVES[suffix])]
    for seed in seeds:
        data = hostile.mutate(data, random.Random(seed))
    if believed:
        data = right_checksums(data)
    path = place / f"damaged{suffix}"
    path.write_bytes(data)
    begun = time.process_time()
    look_at(find_sources([str(path)]))
    assert time.process_time() - begun < 5


FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
"""Where a header has name, mode, size, time, kind, target, magic and prefix, and how long they are."""


@quick
@given(
    which=st.integers(0, 1),
    fields=st.lists(
        st.tuples(
            st.integers(0, 30),
            st.sampled_from(FIELDS),
            st.binary(max_size=12)
            | st.sampled_from(
                [
                    b"77777777777",
                    b"-1",
                    b"\x80" + b"\xff" * 11,
                    b"\xff" * 12,
                    b"../../x.jpg",
                    b"\0",
                    b"SLKxgKVD",
                ]
            ),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_fuzz_headers_of_archives(
    which: int, fields: list[tuple[int, tuple[int, int], bytes]], place: Path
) -> None:
    changed = bytearray(ARCHIVES[".tar"][which])
    for block, (at, length), value in fields:
        begin = block * 512 % len(changed) + at
        changed[begin : begin + min(length, len(value))] = value[:length]
    path = place / "headers.tar"
    path.write_bytes(right_checksums(bytes(changed)))
    begun = time.process_time()
    look_at(find_sources([str(path)]))
    assert time.process_time() - begun < 5


# journals


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A folder with a run that is done: out.jsonl, and its journal."""
    folder = place / "finished"
    folder.mkdir()
    go_on(folder, 12)
    return folder


def sources(count: int) -> Iterator[Source]:
    for number in range(count):
        yield Held(f"{number}.jpg", None, 6, number, b"pic %d" % number)


def captioned(found: Iterator[Source]) -> Iterator[Finished]:
    for source in found:
        caption = f"a {source.read().decode()}"
        record = {"path": source.path, "caption": caption, "confidence": 0.5, "error": None}
        yield Finished(record, b"preview", b"likeness")


def go_on(folder: Path, count: int) -> None:
    with Journal(folder / "out.jsonl.journal") as journal:
        run = Run(journal, "tiny", output=folder / "out.jsonl", errors=folder / "errors.jsonl")
        for _ in run.run(sources(count), lambda: captioned):
            pass
        run.finish()
        for read in (journal.records, journal.failures, journal.previews, journal.likenesses):
            for _ in read():
                pass
        journal.planned("1.jpg", "sidecar")


@slower
@given(seeds=seeds, text=st.booleans())
def test_fuzz_damaged_journals(seeds: list[int], text: bool, finished: Path) -> None:
    folder = finished.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    path = folder / "out.jsonl.journal"
    data = path.read_bytes()
    for seed in seeds:
        if text:  # most of it are empty pages
            chance = random.Random(seed)
            filled = [at for at in range(0, len(data), 64) if any(data[at : at + 64])]
            at = chance.choice(filled)
            data = (
                data[:at] + hostile.mutate(data[at : at + 64], chance).ljust(64, b"\0")[:64] + data[at + 64 :]
            )
        else:
            data = hostile.mutate(data, random.Random(seed))
    path.write_bytes(data)
    for _ in range(2):
        try:
            go_on(folder, 13)
        except (JournalError, TableFormatError, Stopped) as error:
            check_message(error, path if "journal" in str(error) else folder / "out.jsonl")


@slower
@given(
    table=st.sampled_from(["meta", "files", "records", "identities", "beside"]),
    row=st.integers(0, 20),
    column=st.integers(0, 8),
    value=st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.binary(max_size=10)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
    | st.sampled_from(
        [zlib.compress(b"[]"), zlib.compress(b'{"path": 1}'), b"{}", "{}", '"a"', "1e999", 1.5]
    ),
)
def test_fuzz_journals_with_anything_in_them(
    table: str, row: int, column: int, value: Any, finished: Path
) -> None:
    folder = finished.with_name("odd")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    path = folder / "out.jsonl.journal"
    connection = sqlite3.connect(path)
    names = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
    name, key = names[column % len(names)], names[0]
    keys = [key for (key,) in connection.execute(f"SELECT {key} FROM {table}")]
    if not keys:
        connection.close()
        return
    try:
        connection.execute(f"UPDATE {table} SET {name} = ? WHERE {key} = ?", (value, keys[row % len(keys)]))
        connection.commit()
    except sqlite3.Error:  # what SQLite itself refuses
        return
    finally:
        connection.close()
    for _ in range(2):
        try:
            go_on(folder, 13)
        except (JournalError, TableFormatError, Stopped) as error:
            check_message(error, path if "journal" in str(error) else folder / "out.jsonl")


# found, and what it takes to find them again


def test_a_reason_of_csv_with_a_tab_in_it_can_be_printed(place: Path) -> None:
    path = place / "found.tsv"
    path.write_bytes(b'path\tcaption\n"a.jpg"x\ty\n')
    with pytest.raises(TableError) as error:
        list(read_table(path))
    check_message(error.value, path)


def test_half_a_surrogate_among_the_words(place: Path) -> None:
    path = place / "found.jsonl"
    path.write_bytes(b'{"path": "a.jpg", "caption": "x", "words": [{"word": "\\ud800"}]}\n')
    assert [applied.what for applied in apply_table(path, dry_run=True)] == ["written"]


def test_a_start_that_no_float_can_hold(place: Path) -> None:
    path = place / "found.jsonl"
    path.write_text(f'{{"path": "a.jpg", "caption": "x", "start": {10**400}}}\n', "utf-8")
    assert [applied.what for applied in apply_table(path, dry_run=True)] == ["written"]


def test_an_impossible_path_does_not_end_the_others(place: Path) -> None:
    path = place / "found.csv"
    path.write_text(f"path,caption\n{'x' * 5000}/y.jpg,x\na.jpg,y\n", "utf-8")
    assert [applied.what for applied in apply_table(path, dry_run=True)] == ["missing", "written"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE records SET record = 'x'",
        "UPDATE records SET record = x'789c0300' WHERE id = 3",
        "UPDATE records SET likeness = 1.5",
        "UPDATE meta SET value = '[1]' WHERE key = 'table out.jsonl'",
        "UPDATE meta SET value = '{' WHERE key = 'table out.jsonl'",
        "UPDATE files SET written = x'00', modified = 99 WHERE id = 3",
        "DROP TABLE files",
    ],
)
def test_a_damaged_journal_is_told(statement: str, finished: Path) -> None:
    folder = finished.with_name("told")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    path = folder / "out.jsonl.journal"
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    before = (folder / "out.jsonl").read_bytes()
    with pytest.raises((JournalError, TableFormatError), match="the journal is damaged") as error:
        go_on(folder, 12)
    check_message(error.value, path)
    assert (folder / "out.jsonl").read_bytes() == before


def test_a_journal_whose_pages_are_damaged_is_told(finished: Path) -> None:
    folder = finished.with_name("told")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    path = folder / "out.jsonl.journal"
    data = bytearray(path.read_bytes())
    data[4096 * 3 :] = b"\xff" * len(data[4096 * 3 :])
    path.write_bytes(data)
    with pytest.raises(JournalError) as error:
        go_on(folder, 12)
    check_message(error.value, path)
