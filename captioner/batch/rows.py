"""Rows of tables: CSV, TSV, JSON Lines and Parquet, one by one; pyarrow is imported for the last."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from captioner.batch.remote import (
    MAX_BYTES,
    exists,
    is_url,
    join,
    one_line,
    open_remote,
    suffix_of,
    too_large,
)
from captioner.batch.tables import unguard
from captioner.inputs import ImageError, name_of, open_file

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

PATH_COLUMNS = ("path", "file", "file_name", "filename", "image", "image_path", "filepath", "url")
"""Columns that are taken for paths, the first that exists, whatever their case."""

_LONGEST_LINE = 2**26
"""Bytes of a line and characters of a field; a missing quote must not make one field of a whole file."""

_DELIMITERS = ",;\t"


class TableError(ValueError):
    """A table that cannot be read, or not to its end; one line that names it, the place, and what to do."""


class RowError(TableError):
    """A row that cannot be read, while those after it can.

    Attributes:
        row: its number; the first below the names of the columns is 1.
    """

    def __init__(self, name: str, row: int, line: int, wrong: str) -> None:
        super().__init__(f"{name}: row {row} (line {line}){wrong}")
        self.row = row


def read_table(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV, TSV, JSON Lines or Parquet file, told by its suffix, one after the other.

    Text is UTF-8; a byte-order mark is left out. The first line of CSV and TSV holds the columns' names;
    values are text. CSV with semicolons or tabs, with ``sep=;`` above the names, or with the line ends of old
    Macs is read, too.

    Args:
        path: a local file, or an address that fsspec knows.
        columns: leave out the others. In JSON Lines, what a row does not have is None.

    Raises:
        TableError: the file cannot be read, is damaged, or has no such column; on the first row asked for, or
            after the rows that it does hold. A `RowError` if only that row is wrong.
    """
    for row in read_rows(path, columns):
        if isinstance(row, RowError):
            raise row
        yield row


def read_rows(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any] | RowError]:
    """Yield the rows of a table as `read_table` does, and in the place of a wrong one what is wrong with it.

    Raises:
        TableError: as `read_table`, where nothing after it can be read.
    """
    path = os.fsdecode(path)
    name = name_of(path)
    with _open_table(path) as stream:
        yield from _reader(path)(stream, name, columns)


def table_columns(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of a table's columns; of JSON Lines those of the first row that can be read.

    Raises:
        TableError: as `read_table`.
    """
    path = os.fsdecode(path)
    name = name_of(path)
    with _open_table(path) as stream:
        read = _reader(path)
        if read is _read_jsonl:
            wrong: RowError | None = None
            for row in read(stream, name, None):
                if not isinstance(row, RowError):
                    return list(row)
                wrong = wrong or row
            if wrong is not None:
                raise wrong
            return []
        if read is _read_parquet:
            return _parquet_names(_parquet_file(stream, name), name)
        return _csv_rows(stream, name, "\t" if suffix_of(path) == ".tsv" else ",")[0]


def _reader(
    path: str,
) -> Callable[[IO[bytes], str, Sequence[str] | None], Iterator[dict[str, Any] | RowError]]:
    suffix = suffix_of(path)
    if suffix == ".csv":
        return _read_csv
    if suffix == ".tsv":
        return _read_tsv
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl
    if suffix == ".parquet":
        return _read_parquet
    raise TableError(f"{name_of(path)}: not a table; its name must end in {', '.join(TABLE_SUFFIXES)}")


@contextlib.contextmanager
def _open_table(path: str) -> Iterator[IO[bytes]]:
    name = name_of(path)
    try:
        with contextlib.ExitStack() as stack:
            if is_url(path):
                stream: IO[bytes] = stack.enter_context(open_remote(path))
            else:
                stream = stack.enter_context(open_file(path, name))
            yield stream
    except ImageError as error:
        raise TableError(str(error)) from error
    except OSError as error:
        raise TableError(f"{name}: it cannot be read ({error.strerror or error})") from error


def _read_lines(stream: IO[bytes], name: str) -> Iterator[str]:
    """Yield the lines of a text with their ends."""
    for number in itertools.count(1):
        line = stream.readline(_LONGEST_LINE)
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise TableError(f"{name}: this is UTF-16; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
            if not line:
                return
        if not line:
            return
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            raise TableError(
                f"{name}: line {number} is longer than {_LONGEST_LINE >> 20} MiB; check the file"
            )
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            bad = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
            raise TableError(f"{name}: line {number} is not UTF-8 ({bad}); save it as UTF-8") from None


_BREAK = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_SEP = re.compile(r'"?sep=([^"\r\n])"?\1*[\r\n]*', re.IGNORECASE)


def _csv_lines(stream: IO[bytes], name: str) -> Iterator[str]:
    """Yield lines with their ends, which may be those of old Macs."""
    for line in _read_lines(stream, name):
        if "\r" in line.rstrip("\r\n"):
            yield from (match[0] for match in _BREAK.finditer(line))
        else:
            yield line


def _delimiter(first: str, usual: str) -> str:
    """Return what stands between the names of columns: what makes a column of paths of them, or the usual."""
    several = []
    for delimiter in dict.fromkeys((usual, *_DELIMITERS)):
        names = next(csv.reader([first], delimiter=delimiter), [])
        if len(names) > 1:
            if path_column(names) is not None:
                return delimiter
            several.append(delimiter)
    return several[0] if several and usual == "," else usual


def _csv_rows(
    stream: IO[bytes], name: str, delimiter: str
) -> tuple[list[str], Iterator[list[str] | RowError]]:
    """Return the names of the columns, and rows of as many fields."""
    # a setting of the whole process, but only ever raised: words as JSON are longer than its 128 KB
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_LINE))
    lines = _csv_lines(stream, name)
    first = next(lines, "")
    above = 0
    while first and not first.strip("\r\n"):
        first = next(lines, "")
        above += 1
    told = _SEP.fullmatch(first)  # Excel's, above the names
    if told is not None:
        first = next(lines, "")
        above += 1
    try:
        delimiter = told[1] if told is not None else _delimiter(first, delimiter)
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        names = next(filter(None, reader), None)
    except csv.Error as error:
        raise TableError(f"{name}: line {above + 1}: {_csv_wrong(error)}; correct it") from error
    if names is None:
        raise TableError(f"{name}: the table is empty; its first line must name the columns")
    twice = next((column for i, column in enumerate(names) if column in names[:i]), None)
    if twice is not None:
        raise TableError(f"{name}: two columns are called {name_of(twice)}; rename one")
    return names, _csv_body(reader, name, len(names), above)


def _csv_body(reader: Any, name: str, width: int, above: int) -> Iterator[list[str] | RowError]:
    """Yield the rows below the names; ``above`` lines were not given to the reader."""
    number = 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            number += 1
            line = above + reader.line_num
            wrong = _csv_wrong(error)
            if wrong == _UNENDING:
                raise TableError(f"{name}: line {line}: {wrong}; correct it") from error
            yield RowError(name, number, line, f": {wrong}; correct it")
            continue
        if row is None:
            return
        if not row:
            continue
        number += 1
        if len(row) == width:
            yield row
        else:
            wrong = f": {len(row)} fields, but the first line has {width}; correct it"
            yield RowError(name, number, above + reader.line_num, wrong)


_UNENDING = "a quoted field does not end"


def _csv_wrong(error: Exception) -> str:
    detail = str(error)
    return _UNENDING if "field larger" in detail or "unexpected end" in detail else name_of(detail)


def _read_csv(
    stream: IO[bytes], name: str, columns: Sequence[str] | None, delimiter: str = ","
) -> Iterator[dict[str, Any] | RowError]:
    names, rows = _csv_rows(stream, name, delimiter)
    if columns is None:
        columns = names
    _check_columns(columns, names, name)
    places = [names.index(column) for column in columns]
    for row in rows:
        if isinstance(row, RowError):
            yield row
        else:
            yield {column: row[place] for column, place in zip(columns, places, strict=True)}


def _read_tsv(
    stream: IO[bytes], name: str, columns: Sequence[str] | None
) -> Iterator[dict[str, Any] | RowError]:
    return _read_csv(stream, name, columns, "\t")


def _read_jsonl(
    stream: IO[bytes], name: str, columns: Sequence[str] | None
) -> Iterator[dict[str, Any] | RowError]:
    number = 0
    for place, line in enumerate(_read_lines(stream, name), 1):
        if line.isspace():
            continue
        number += 1
        try:
            row = json.loads(line.rstrip("\r\n"))
        except RecursionError:
            yield RowError(name, number, place, " is nested too deeply; correct it")
            continue
        except ValueError as error:
            detail = str(error)
            if isinstance(error, json.JSONDecodeError):
                detail = f"{error.msg} at character {error.colno}"
            yield RowError(name, number, place, f" is not JSON ({detail}); correct it")
            continue
        if not isinstance(row, dict):
            kind = "list" if isinstance(row, list) else type(row).__name__
            yield RowError(name, number, place, f" holds a {kind}; each line must be an object, {{...}}")
            continue
        yield row if columns is None else {column: row.get(column) for column in columns}


def _read_parquet(stream: IO[bytes], name: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    file = _parquet_file(stream, name)
    names = _parquet_names(file, name)
    if columns is not None:
        _check_columns(columns, names, name)
    with _arrow_errors(name):
        for batch in file.iter_batches(batch_size=1024, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _parquet_file(stream: IO[bytes], name: str) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        hint = 'pip install "captioner[parquet]"'
        raise TableError(f"{name}: Parquet files need one more package; {hint}") from error
    if not stream.seekable():
        data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise too_large(name)
        stream = io.BytesIO(data)
    with _arrow_errors(name):
        return ParquetFile(stream, pre_buffer=False)


def _parquet_names(file: Any, name: str) -> list[str]:
    with _arrow_errors(name):
        names: list[str] = file.schema_arrow.names
    twice = next((column for i, column in enumerate(names) if column in names[:i]), None)
    if twice is not None:
        raise TableError(f"{name}: two columns are called {name_of(twice)}; rename one")
    return names


@contextlib.contextmanager
def _arrow_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (TableError, ImageError):
        raise
    except Exception as error:
        raise TableError(
            f"{name}: the Parquet file is damaged ({one_line(error)}); write it again"
        ) from error


def _check_columns(columns: Sequence[str], names: Sequence[str], name: str) -> None:
    for column in columns:
        if column not in names:
            there = ", ".join(map(name_of, names))
            raise TableError(f"{name}: no column {name_of(column)}; there are {there}")


def folded(column: str) -> str:
    """Return by what the name of a column is told from others: case and spaces around it do not count."""
    return column.strip().casefold()


def find_column(names: Sequence[str], wanted: str) -> str | None:
    """Return the column of that name, or else the first whose name is the same but for case and spaces."""
    if wanted in names:
        return wanted
    return next((name for name in names if folded(name) == folded(wanted)), None)


def path_column(names: Sequence[str]) -> str | None:
    """Return the first of `PATH_COLUMNS` among the names, or None."""
    known = {folded(name): name for name in reversed(names)}
    return next((known[column] for column in PATH_COLUMNS if column in known), None)


def beside(table: str, entry: str) -> str:
    """Return where the path in a table leads: from its folder if it exists there, else from the current one.

    What captioner writes into CSV in the place of ``=a.jpg`` and of bytes that are not UTF-8 is undone.
    """
    if is_url(entry):
        return entry
    if is_url(table):
        return entry if entry.startswith("/") else join(table, entry)
    plain = re.sub(r"\\(udc[89a-f][0-9a-f])", lambda match: chr(int(match[1][1:], 16)), unguard(entry))
    for path in dict.fromkeys((entry, plain)):
        there = os.path.join(os.path.dirname(table), path)  # an absolute path stays as it is
        if exists(there):
            return there
        if exists(path):
            return path
    return entry
