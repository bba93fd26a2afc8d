"""What is to be captioned: files, folders, patterns, lists, tables, archives and remote paths, one by one.

`find_sources` yields a `Source` for each photo or video and a `Missing` for what stands for none. Nothing
here decodes pictures. Tables are read by ``rows``, archives by ``archives``, addresses by ``remote``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import PurePath
from typing import BinaryIO

from captioner.batch import remote
from captioner.batch.archives import ARCHIVE_SUFFIXES, read_archive
from captioner.batch.remote import MAX_BYTES, exists, from_file_url, is_url, open_remote, suffix_of, too_large
from captioner.batch.rows import (
    TABLE_SUFFIXES,
    RowError,
    TableError,
    beside,
    find_column,
    path_column,
    read_rows,
    read_table,
    table_columns,
)
from captioner.inputs import (
    PHOTO_SUFFIXES,
    VIDEO_SUFFIXES,
    ImageError,
    iter_images,
    kind_of,
    name_of,
    open_file,
    unreadable,
)

__all__ = [
    "LISTED",
    "Held",
    "Member",
    "Missing",
    "NamedBytes",
    "Remote",
    "Source",
    "TableError",
    "checksum",
    "find_sources",
    "local",
    "read_table",
    "table_columns",
]

LISTED = PHOTO_SUFFIXES | VIDEO_SUFFIXES - {".ts"}
"""Lower-case suffixes of what is taken from folders and archives; a .ts there is TypeScript more often."""

_LONGEST_PATH = 2**16
_CHUNK = 2**20


class NamedBytes(io.BytesIO):
    """Bytes in memory that readers can call by the name of where they come from."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


@dataclass(frozen=True)
class Missing:
    """An argument, or an entry of a list, table or archive, that stands for nothing.

    Attributes:
        path: what was given; ``table.csv:3`` for the third row if that holds no path.
        reason: one line that names it and says what to do.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Source:
    """A photo or video to be captioned; small, and can be sent to other processes.

    Attributes:
        path: what records call it, as it was given or found.
        file: the local file, or None if it is inside an archive or on another machine.
        size: in bytes; -1 if unknown.
        modified: in nanoseconds since 1970; 0 if unknown.
    """

    path: str
    file: str | None = None
    size: int = -1
    modified: int = 0

    def read(self) -> bytes:
        """Return the encoded picture or video.

        Raises:
            ImageError: it cannot be read, or is not a local file and larger than `MAX_BYTES`; the message
                names it.
        """
        chunks, size = [], 0
        for chunk in self.chunks():
            size += len(chunk)
            if size > MAX_BYTES and self.file is None:
                raise too_large(self.path)
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def chunks(self) -> Iterator[bytes]:
        """Yield the content, a mebibyte at most at a time.

        Raises:
            ImageError: it cannot be read; the message names it.
        """
        if self.file is None:
            raise ImageError(f"{name_of(self.path)}: this source has no content")
        with _told(self.path), open_file(self.file, name_of(self.path)) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    def open(self) -> str | NamedBytes:
        """Return what `captioner.images.load` takes: the local file's path, or what was read."""
        return self.file if self.file is not None else NamedBytes(self.read(), self.path)


@dataclass(frozen=True)
class Member(Source):
    """A file in an uncompressed local tar archive, read at its place there.

    Attributes:
        archive: the local archive.
        offset: where in the archive its content begins, in bytes.
    """

    archive: str = ""
    offset: int = 0

    def chunks(self) -> Iterator[bytes]:
        """Yield the content, a mebibyte at most at a time.

        Raises:
            ImageError: the archive cannot be read, or is shorter than it was; the message names it.
        """
        name, left = name_of(self.path), self.size
        with _told(self.path), open_file(self.archive, name) as stream:
            stream.seek(self.offset)
            while left:
                chunk = stream.read(min(left, _CHUNK))
                if not chunk:
                    raise ImageError(f"{name}: the archive is shorter than it was; start again")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Held(Source):
    """What could be read only once, out of a compressed or remote archive or a pipe, and is held in memory.

    Attributes:
        data: the encoded picture or video.
    """

    data: bytes = field(default=b"", repr=False)

    def chunks(self) -> Iterator[bytes]:
        """Yield the content."""
        yield self.data


@dataclass(frozen=True)
class Remote(Source):
    """A file that fsspec reads; its path is the address."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the content, a mebibyte at most at a time.

        Raises:
            ImageError: it cannot be read; the message names it.
        """
        with open_remote(self.path) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk


def checksum(source: Source) -> str:
    """Return the SHA-256 of a source's content in hexadecimal digits.

    Raises:
        ImageError: it cannot be read.
    """
    digest = hashlib.sha256()
    for chunk in source.chunks():
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def local(source: Source) -> Iterator[str]:
    """Give a path where a source's content is a local file: its own, or a temporary one with the same suffix.

    Temporary files are removed afterwards. Memory does not grow with the size.

    Raises:
        ImageError: the source cannot be read, or there is no room for a copy.
    """
    if source.file is not None:
        yield source.file
        return
    suffix = suffix_of(source.path)
    if not re.fullmatch(r"\.[a-z0-9]{1,8}", suffix):
        suffix = ""
    try:
        handle, copy = tempfile.mkstemp(suffix, "captioner-")
    except OSError as error:
        raise _no_room(source.path, error) from error
    try:
        try:
            with open(handle, "wb") as stream:
                for chunk in source.chunks():
                    stream.write(chunk)
        except OSError as error:
            raise _no_room(source.path, error) from error
        yield copy
    finally:
        with contextlib.suppress(OSError):
            os.unlink(copy)


def find_sources(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    recursive: bool = False,
    column: str | None = None,
    stdin: BinaryIO | None = None,
    suffixes: Set[str] = LISTED,
) -> Iterator[Source | Missing]:
    """Yield what is to be captioned, as it is found, each path once.

    An input is

    - a file, a folder or a pattern, as for `captioner.inputs.find_images`;
    - ``-``: a list of paths on standard input, one a line or each ended by a NUL character;
    - a table (``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson``, ``.parquet``) with a column of paths. Relative
      ones count from the table's folder if they exist there, else from the current one;
    - a tar archive (``.tar``, ``.tar.gz``, ``.tgz``, ``.tar.bz2``, ``.tar.xz``), of which every visible file
      with one of ``suffixes`` counts, called ``shard.tar/folder/name.jpg``. Of several files with the same
      name in it the first counts, and a `Missing` says so. Uncompressed local archives are read at random,
      others once from beginning to end. Links in it are never followed, gaps (sparse files) not filled;
    - an address that fsspec knows (``s3://…``, ``https://…``) of a file, a folder, a pattern, a table or an
      archive. ``file://`` is local;
    - any of these with braces, where no such file exists: ``shards-{000..099}.tar``, ``{a,b}.jpg``.

    What lists and tables name are files, archives and addresses of these; it is taken literally. Nothing is
    asked about remote files that they name, so that size and time are unknown.

    The modified time of a file in an archive is its own, or the archive's if it has none.

    Args:
        inputs: any number of them; a single one counts as one.
        recursive: also look into sub-folders.
        column: the column of paths in tables; None takes the first of `PATH_COLUMNS` that there is.
        stdin: what ``-`` reads; None for standard input.
        suffixes: of what counts in folders and archives; in lower case, with the dot.

    Yields:
        a `Source` for each file, in order (of folders and patterns: sorted by path), and a `Missing` for each
        input or entry that stands for none. Memory holds a number for each path, unless a folder is the only
        input, the names in the folder that is being listed, and of archives that are read only once the file
        that was yielded last.
    """
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    finder = _Finder(recursive, column, stdin, suffixes)
    finder.alone = isinstance(inputs, (list, tuple)) and len(inputs) == 1
    for given in inputs:
        yield from finder.find(os.fsdecode(given))


class _Finder:
    def __init__(
        self, recursive: bool, column: str | None, stdin: BinaryIO | None, suffixes: Set[str]
    ) -> None:
        self.recursive = recursive
        self.column = column
        self.stdin = stdin
        self.suffixes = suffixes
        self.alone = False  # a single input
        self.here = ""
        with contextlib.suppress(OSError):  # it has been removed
            self.here = os.path.join(os.getcwd(), "")
        self.seen: set[int] = set()  # hashes: ten million paths share one by chance once in 400,000 runs

    def find(self, given: str) -> Iterator[Source | Missing]:
        """Yield what an input stands for."""
        if given == "-":
            yield from self._list()
            return
        for path in [given] if exists(given) else _braces(given):
            self.alone = self.alone and path == given
            path = from_file_url(path)
            try:
                if is_url(path):
                    yield from self._find_remote(path)
                else:
                    yield from self._find_local(path)
            except ImageError as error:
                yield Missing(path, str(error))

    def _find_local(self, path: str) -> Iterator[Source | Missing]:
        if os.path.isdir(path):
            folder = str(PurePath(path))
            before = "" if os.path.isabs(folder) else self.here
            for found in iter_images(folder, self.recursive, self.suffixes):
                if not self.alone:  # paths under one folder differ
                    key = hash(before + found)
                    if key in self.seen:
                        continue
                    self.seen.add(key)
                yield _at(found)
        elif not os.path.lexists(path) and has_magic(path):
            for found in iter_images(path, self.recursive, self.suffixes):
                yield from self._file(str(PurePath(found)))
        elif suffix_of(path) in TABLE_SUFFIXES:
            yield from self._table(path)
        else:
            yield from self._file(path, tables=False, pipes=True)

    def _file(self, path: str, tables: bool = True, pipes: bool = False) -> Iterator[Source | Missing]:
        """Yield what is at a local path, taken literally; ``tables``: those are read, too."""
        if suffix_of(path) in ARCHIVE_SUFFIXES:
            yield from self._archive(path)
        elif tables and suffix_of(path) in TABLE_SUFFIXES:
            yield from self._table(path)
        elif self._is_new(path):
            yield _at(path, pipes)

    def _is_new(self, path: str) -> bool:
        """Tell whether a path has not been met before, by whatever spelling."""
        if "//" in path or "/./" in path or path.startswith("./"):
            path = str(PurePath(path))
        key = hash(path if os.path.isabs(path) else self.here + path)
        if key in self.seen:
            return False
        self.seen.add(key)
        return True

    # Lists and tables

    def _entry(self, path: str) -> Iterator[Source | Missing]:
        """Yield what a path in a list or table stands for."""
        path = from_file_url(path)
        if not is_url(path):
            yield from self._file(path, tables=False)
        elif suffix_of(path) in ARCHIVE_SUFFIXES:
            yield from self._archive(path)
        elif self._is_new_url(path):
            yield Remote(path)

    def _list(self) -> Iterator[Source | Missing]:
        stream = self.stdin
        if stream is None:
            stream = getattr(sys.stdin, "buffer", None)
        if stream is None:
            yield Missing("-", "-: standard input is closed; give a list of paths there")
            return
        path = None
        try:
            for path in _read_list(stream):
                yield from self._entry(path)
            if path is None:
                yield Missing("-", "standard input: the list is empty; give paths there")
        except (ImageError, OSError) as error:
            reason = (
                str(error) if isinstance(error, ImageError) else f"standard input: {error.strerror or error}"
            )
            yield Missing("-", reason)

    def _table(self, path: str) -> Iterator[Source | Missing]:
        name = name_of(path)
        if not self._is_new(path):
            return
        try:
            columns = table_columns(path)
            column = path_column(columns) if self.column is None else find_column(columns, self.column)
            if column is None:
                there = ", ".join(map(name_of, columns[:20])) + (", ..." if len(columns) > 20 else "")
                wanted = "column of paths" if self.column is None else f"column {name_of(self.column)}"
                raise TableError(f"{name}: no {wanted}; give --column with one of {there}")
            row = 0
            for row, record in enumerate(read_rows(path, [column]), 1):
                if isinstance(record, RowError):
                    yield Missing(f"{path}:{row}", str(record))
                    continue
                entry = record[column]
                if isinstance(entry, bytes):
                    entry = os.fsdecode(entry)
                if not isinstance(entry, str) or not entry.strip():
                    what = "is empty" if entry is None or entry == "" else "holds no path"
                    reason = f"{name}: row {row}: {name_of(column)} {what}"
                    yield Missing(f"{path}:{row}", reason)
                else:
                    yield from self._entry(beside(path, entry))
            if not row:
                raise TableError(f"{name}: the table has no rows; check it")
        except TableError as error:
            yield Missing(path, str(error))

    # Archives

    def _archive(self, path: str) -> Iterator[Source | Missing]:
        if not (self._is_new_url(path) if is_url(path) else self._is_new(path)):
            return
        if not is_url(path) and isinstance(at := _at(path), Missing):
            yield at
            return
        seen: set[int] = set()
        clashes = 0
        empty = True
        try:
            for entry in read_archive(path, self.suffixes):
                empty = False
                name = f"{path}/{entry.name}"
                if hash(name) in seen:
                    clashes += 1
                    continue
                seen.add(hash(name))
                if entry.problem is not None:
                    yield Missing(name, entry.problem)
                elif entry.offset is not None:
                    yield Member(name, None, entry.size, entry.modified, path, entry.offset)
                elif entry.data is not None:
                    yield Held(name, None, entry.size, entry.modified, entry.data)
        except ImageError as error:
            yield Missing(path, str(error))
        else:
            if empty:
                yield Missing(path, f"{name_of(path)}: no pictures or videos in this archive; check it")
        if clashes:
            files = "1 file has" if clashes == 1 else f"{clashes} files have"
            reason = f"{files} the name of another one in it; the first counts, give them names of their own"
            yield Missing(path, f"{name_of(path)}: {reason}")

    # Other machines

    def _is_new_url(self, url: str) -> bool:
        key = hash(url)
        if key in self.seen:
            return False
        self.seen.add(key)
        return True

    def _find_remote(self, url: str) -> Iterator[Source | Missing]:
        if suffix_of(url) in TABLE_SUFFIXES and not remote.has_magic(url):
            yield from self._table(url)
            return
        if suffix_of(url) in ARCHIVE_SUFFIXES and not remote.has_magic(url):
            yield from self._archive(url)
            return
        found = False
        for address, info in remote.list_remote(url, self.recursive, self.suffixes):
            found = True
            if isinstance(info, str):
                yield Missing(address, info)
            elif suffix_of(address) in ARCHIVE_SUFFIXES:
                yield from self._archive(address)
            elif suffix_of(address) in TABLE_SUFFIXES:
                yield from self._table(address)
            elif self._is_new_url(address):
                yield Remote(address, None, remote.size_of(info), remote.modified_of(info))
        if not found:
            reason = (
                "no picture or video matches this pattern"
                if remote.has_magic(url)
                else "no pictures or videos"
            )
            hint = "check it" if self.recursive else "check it, or use --recursive to look into sub-folders"
            yield Missing(url, f"{name_of(url)}: {reason}; {hint}")


# Local files.


def _at(path: str, pipes: bool = False) -> Source | Missing:
    """Return what is at a local path; ``pipes``: what comes out of one is read."""
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            return Source(path, path, status.st_size, status.st_mtime_ns)
        if stat.S_ISFIFO(status.st_mode) and not pipes:
            name = name_of(path)
            return Missing(path, f"{name}: this is a pipe, not a file; give a picture or video")
    except (OSError, ValueError):
        pass
    try:
        with open_file(path, name_of(path)) as stream:
            data = stream.read(MAX_BYTES + 1)
    except ImageError as error:
        return Missing(path, str(error))
    if len(data) > MAX_BYTES:
        return Missing(path, str(too_large(path)))
    return Held(path, None, len(data), 0, data)


_BRACES = re.compile(r"\{(?:(-?[0-9]{1,9})\.\.(-?[0-9]{1,9})|([^{}]*,[^{}]*))\}")


def _braces(pattern: str) -> Iterator[str]:
    """Yield what ``{000..099}`` and ``{a,b}`` stand for, in order, as in a shell."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    choices: Iterable[str]
    if match[3] is not None:
        choices = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        padded = any(len(digits) > 1 and digits.lstrip("-")[0] == "0" for digits in (match[1], match[2]))
        width = max(len(match[1]), len(match[2])) if padded else 0
        step = 1 if last >= first else -1
        choices = (f"{number:0{width}}" for number in range(first, last + step, step))
    for choice in choices:
        for rest in _braces(pattern[match.end() :]):
            yield pattern[: match.start()] + choice + rest


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Turn what goes wrong while reading into the line for the user."""
    try:
        yield
    except OSError as error:
        raise unreadable(error, name_of(path)) from error


def _no_room(path: str, error: OSError) -> ImageError:
    reason = f"no temporary copy can be written ({error.strerror or error}); make room, or set TMPDIR"
    return ImageError(f"{name_of(path)}: {reason}")


# Lists.


def _read_list(stream: BinaryIO) -> Iterator[str]:
    """Yield the paths of a list as soon as they have arrived.

    Raises:
        ImageError: this is no list of paths.
    """
    read = getattr(stream, "read1", stream.read)  # what is there, without waiting for more
    kept, begun, separator = b"", False, b"\n"
    while True:
        data = read(2**16)
        kept += data
        if not begun:
            if data and b"\n" not in kept and b"\0" not in kept and len(kept) <= _LONGEST_PATH:
                continue  # not one whole path yet
            if kept.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ImageError("standard input: this list is UTF-16; give it in UTF-8")
            if kind_of(kept[:1024]) not in (None, "bmp", "ppm"):  # a path may begin as these do
                raise ImageError("standard input: this is a picture, not a list of paths; give its path")
            kept = kept.removeprefix(b"\xef\xbb\xbf")
            separator = b"\0" if b"\0" in kept else b"\n"
            begun = True
        *paths, kept = kept.split(separator)
        if not data:
            paths.append(kept)
        elif len(kept) > _LONGEST_PATH:
            raise ImageError("standard input: this is no list of paths, one a line; check what writes it")
        for path in paths:
            if separator == b"\n" and path.endswith(b"\r") and not exists(_decode(path)):
                path = path[:-1]
            if path:
                yield _decode(path)
        if not data:
            return


def _decode(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
