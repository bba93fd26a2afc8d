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


class TableError(ValueError):
    """A table that cannot be read, or not to its end; one line that names it, the place, and what to do."""


def read_table(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV, TSV, JSON Lines or Parquet file, told by its suffix, one after the other.

    Text is UTF-8; a byte-order mark is left out. The first line of CSV and TSV holds the columns' names;
    values are text. CSV with semicolons, as some spreadsheets write it, is read, too.

    Args:
        path: a local file, or an address that fsspec knows.
        columns: leave out the others. In JSON Lines, what a row does not have is None.

    Raises:
        TableError: the file cannot be read, is damaged, or has no such column; on the first row asked for, or
            after the rows that it does hold.
    """
    path = os.fsdecode(path)
    name = name_of(path)
    with _open_table(path) as stream:
        yield from _reader(path)(stream, name, columns)


def table_columns(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of a table's columns; of JSON Lines those of the first row.

    Raises:
        TableError: as `read_table`.
    """
    path = os.fsdecode(path)
    name = name_of(path)
    with _open_table(path) as stream:
        read = _reader(path)
        if read is _read_jsonl:
            return list(next(read(stream, name, None), {}))
        if read is _read_parquet:
            return _parquet_names(_parquet_file(stream, name), name)
        return next(_csv_rows(stream, name, "\t" if suffix_of(path) == ".tsv" else ","))


def _reader(path: str) -> Callable[[IO[bytes], str, Sequence[str] | None], Iterator[dict[str, Any]]]:
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


def _csv_rows(stream: IO[bytes], name: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the names of the columns, then rows of as many fields."""
    lines = _read_lines(stream, name)
    first = next(lines, "")
    if delimiter == "," and "," not in first and ";" in first:
        delimiter = ";"
    # a setting of the whole process, but only ever raised: words as JSON are longer than its 128 KB
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_LINE))
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for row in rows:
            if not row:
                continue
            if names is None:
                names = row
                twice = next((column for i, column in enumerate(row) if column in row[:i]), None)
                if twice is not None:
                    raise TableError(f"{name}: two columns are called {name_of(twice)}; rename one")
            elif len(row) != len(names):
                raise TableError(
                    f"{name}: line {rows.line_num}: {len(row)} fields, but the first line has {len(names)};"
                    " correct it"
                )
            yield row
    except csv.Error as error:
        detail = str(error)
        if "field larger" in detail or "unexpected end" in detail:
            detail = "a quoted field does not end"
        raise TableError(f"{name}: line {rows.line_num}: {name_of(detail)}; correct it") from error
    if names is None:
        raise TableError(f"{name}: the table is empty; its first line must name the columns")


def _read_csv(
    stream: IO[bytes], name: str, columns: Sequence[str] | None, delimiter: str = ","
) -> Iterator[dict[str, Any]]:
    rows = _csv_rows(stream, name, delimiter)
    names = next(rows)
    if columns is None:
        for row in rows:
            yield dict(zip(names, row, strict=True))
        return
    _check_columns(columns, names, name)
    places = [names.index(column) for column in columns]
    for row in rows:
        yield {column: row[place] for column, place in zip(columns, places, strict=True)}


def _read_tsv(stream: IO[bytes], name: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    return _read_csv(stream, name, columns, "\t")


def _read_jsonl(stream: IO[bytes], name: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_lines(stream, name), 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise TableError(f"{name}: line {number} is nested too deeply; correct it") from None
        except ValueError as error:
            detail = str(error)
            if isinstance(error, json.JSONDecodeError):
                detail = f"{error.msg} at character {error.colno}"
            raise TableError(f"{name}: line {number} is not JSON ({detail}); correct it") from error
        if not isinstance(row, dict):
            kind = "list" if isinstance(row, list) else type(row).__name__
            raise TableError(f"{name}: line {number} holds a {kind}; each line must be an object, {{...}}")
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


def path_column(names: Sequence[str]) -> str | None:
    """Return the first of `PATH_COLUMNS` among the names, or None."""
    known = {name.strip().casefold(): name for name in reversed(names)}
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
