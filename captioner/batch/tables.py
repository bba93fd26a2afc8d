"""The tables that records are written to: JSON Lines, CSV, Parquet, COCO results.

JSON Lines and CSV are appended to while a run goes on; all four can be written anew from the journal.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from captioner.inputs import printable

COLUMNS = (
    *("path", "caption", "confidence", "score", "log_probability", "finished"),
    *("error", "model", "schema", "words", "n_best", "guesses", "start", "end"),
    *("model_sha256", "seconds"),
)
"""Of CSV and Parquet, in order."""

SUFFIXES = (".jsonl", ".csv", ".parquet", ".json")
"""Of what can be written; ``.json`` is COCO's results format."""

APPENDED = (".jsonl", ".csv")
"""Of what grows while a run goes on."""


class TableFormatError(ValueError):
    """A table that cannot be written as asked; one line that says what to do."""


def check_output(path: Path) -> None:
    """See that a table can be written there.

    Raises:
        TableFormatError: for an unknown suffix, a folder that is not there, or a package that is missing.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TableFormatError(
            f"--output {path}: expected a name that ends in .jsonl, .csv, .parquet, or .json for COCO results"
        )
    if path.is_dir():
        raise TableFormatError(f"--output {path}: this is a folder; give a file name")
    if not path.parent.is_dir():
        raise TableFormatError(f"--output {path}: there is no folder {path.parent}; make it first")
    if suffix == ".parquet":
        from importlib.util import find_spec

        if find_spec("pyarrow") is None:
            raise TableFormatError(
                f'--output {path}: Parquet needs one more package; pip install "captioner[parquet]"'
            )


def rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record: one of a photo; of a video one for each segment, and one for its error."""
    if "segments" not in record:
        yield dict(record)
        return
    common = {key: record[key] for key in ("path", "schema", "model", "model_sha256")}
    for segment in record["segments"]:
        yield {**common, **segment}
    if record["error"] is not None:
        yield {**common, "caption": "", "error": record["error"], "seconds": record["seconds"]}


_FORMULA = re.compile(r"'*[=+\-@\t\r＝＋－＠]")


def guard(text: str) -> str:
    """Return text as a spreadsheet shows it and does not run it: what looks like a formula gets a ``'``."""
    return f"'{text}" if _FORMULA.match(text) else text


def unguard(text: str) -> str:
    """Undo `guard`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def csv_line(cells: Iterable[Any]) -> str:
    """Return a line of CSV without its end; what is no plain text or number is JSON.

    A name with a line end in it is quoted.
    """
    out = []
    for cell in cells:
        if cell is None:
            out.append("")
        elif isinstance(cell, str):
            out.append(guard(cell))
        else:
            plain = isinstance(cell, (int, float)) and not isinstance(cell, bool)
            out.append(str(cell) if plain else to_json(cell))
    text = io.StringIO()
    csv.writer(text).writerow(out)  # with any other line end it would not quote a name with \r in it
    return text.getvalue().removesuffix("\r\n")


def to_json(value: Any) -> str:
    """Return JSON on one line; what is no Unicode in a file's name becomes an escape."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text


def head(suffix: str) -> bytes:
    """Return what a table begins with that is appended to."""
    return f"{csv_line(COLUMNS)}\n".encode() if suffix == ".csv" else b""


def lines(record: Mapping[str, Any], suffix: str) -> bytes:
    """Return what is appended for a record."""
    if suffix == ".jsonl":
        return f"{to_json(record)}\n".encode()
    cells = ([row.get(column) for column in COLUMNS] for row in rows(record))
    return "".join(f"{csv_line(row)}\n" for row in cells).encode("utf-8", "backslashreplace")


def write_table(path: Path, records: Iterable[Mapping[str, Any]], file: IO[bytes]) -> None:
    """Write a whole table of that suffix; memory does not grow with the number of records, but for COCO's.

    Raises:
        TableFormatError: two pictures have the same COCO id.
        OSError: it cannot be written.
    """
    suffix = path.suffix.lower()
    writers: dict[str, Callable[[Path, Iterable[Mapping[str, Any]], IO[bytes]], None]] = {
        ".parquet": _write_parquet,
        ".json": _write_coco,
    }
    if suffix in writers:
        writers[suffix](path, records, file)
        return
    file.write(head(suffix))
    for record in records:
        file.write(lines(record, suffix))


def _write_parquet(path: Path, records: Iterable[Mapping[str, Any]], file: IO[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        **dict.fromkeys(COLUMNS, pa.string()),
        **dict.fromkeys(("confidence", "score", "log_probability", "start", "end", "seconds"), pa.float64()),
        "finished": pa.bool_(),
        "schema": pa.int32(),
    }
    schema = pa.schema([(column, kinds[column]) for column in COLUMNS])

    def cell(value: Any) -> Any:
        if isinstance(value, str):
            return value.encode("utf-8", "backslashreplace").decode()
        return to_json(value) if isinstance(value, (list, dict)) else value

    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        group: list[dict[str, Any]] = []

        def flush() -> None:
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group.clear()

        for record in records:
            group += ({column: cell(row.get(column)) for column in COLUMNS} for row in rows(record))
            if len(group) >= 1000:
                flush()
        flush()


def image_id(path: str) -> int | str:
    """Return COCO's id of a picture: the number that ends its name (``COCO_val2014_000000000042.jpg``: 42).

    A name without a number stands for itself, without its suffix.
    """
    stem = re.split(r"[/\\]", path)[-1].rsplit(".", 1)[0]
    number = re.fullmatch(r"(?:.*[_-])?0*(\d{1,15})", stem, re.ASCII)
    return int(number[1]) if number else stem


def _write_coco(path: Path, records: Iterable[Mapping[str, Any]], file: IO[bytes]) -> None:
    found: dict[int | str, tuple[str, str]] = {}
    for record in records:
        if not record["caption"]:
            continue
        id_, here = image_id(record["path"]), record["path"]
        other = found.get(id_, (here, ""))[0]
        if other != here and not is_gone(other):
            if is_gone(here):
                continue
            raise TableFormatError(
                f"{path}: {printable(other)} and {printable(here)} have the same COCO id {id_}; rename one, "
                f"give another format, such as .jsonl, or delete {path} and its journal to begin anew"
            )
        found[id_] = here, record["caption"]
    file.write(b"[")
    for number, (id_, (_, caption)) in enumerate(found.items()):
        file.write(b"," * (number > 0))
        file.write(f"\n{to_json({'image_id': id_, 'caption': caption})}".encode())
    file.write(b"\n]\n" if found else b"]\n")


def is_gone(path: str) -> bool:
    """Tell whether a local file that was captioned is there no longer; members of archives do not count."""
    return (
        "://" not in path and not os.path.lexists(path) and not any(map(os.path.isfile, Path(path).parents))
    )
