"""Tar archives, as in WebDataset's layout, read from beginning to end with `tarfile`."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Set
from typing import IO, Any, NamedTuple

from captioner.batch.remote import (
    MAX_BYTES,
    Counted,
    is_url,
    nanoseconds,
    one_line,
    open_remote,
    suffix_of,
)
from captioner.inputs import ImageError, name_of, open_file, unreadable

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_PACKINGS: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", lambda stream: gzip.GzipFile(fileobj=stream)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\0", lzma.LZMAFile),
)
_HEADER_BYTES = 2**20
"""What the headers of one file in an archive may take, its name and attributes among them."""
_MOST_PACKED = 100
"""Archives whose content is this many times larger than they are, are bombs; pictures do not shrink."""


class _Tape:
    """What `tarfile` reads an archive from: only forwards, and no more than a header at a time.

    A size in a crafted header can thus neither send it round in circles nor fill the memory.
    """

    def __init__(self, stream: Any) -> None:
        self._counted = Counted(stream)
        buffered = io.BufferedReader(self._counted, 2**18)
        head = buffered.peek(8)
        packing = next((unpack for magic, unpack in _PACKINGS if head.startswith(magic)), None)
        self.packed = packing is not None
        self._jump = stream.seek if packing is None and stream.seekable() else None
        if self._jump:
            stream.seek(0)
            self._stream = stream
        else:
            self._stream = buffered if packing is None else packing(buffered)
        self.position = 0
        self.last = b""
        self.mark()

    def mark(self) -> None:
        """Say that the headers of another file begin here."""
        self._left = _HEADER_BYTES
        self._marked = self.position, self._counted.count

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        if position < self.position:
            raise tarfile.ReadError("it points backwards")
        if self._jump:
            self._jump(position)
            self.position = position
        while self.position < position:
            if not self._take(min(position - self.position, 2**20)):
                return

    def read(self, size: int) -> bytes:
        """Return a part of a header."""
        if not 0 <= size <= self._left:
            raise tarfile.ReadError("a header is too large")
        self._left -= size
        self.last = self.take(size)
        return self.last

    def take(self, size: int) -> bytes:
        """Return this many bytes, or fewer at the end."""
        parts = []
        while size and (part := self._take(min(size, 2**20))):
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> None:
        """Read what is compressed to its end, where its checksum is."""
        while self.packed and self._take(2**20):
            pass

    def _take(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        self.position += len(data)
        if self.packed:
            for position, count in (self._marked, (0, 0)):
                unpacked = self.position - position
                if unpacked > 2**26 and unpacked > _MOST_PACKED * (self._counted.count - count):
                    raise tarfile.ReadError(f"it unpacks to more than {_MOST_PACKED} times its size")
        return data


class Entry(NamedTuple):
    """A file in an archive that counts.

    Attributes:
        name: in the archive.
        size: in bytes.
        modified: in nanoseconds since 1970; 0 if unknown.
        offset: where in an uncompressed local archive the content begins, else None.
        data: the content, if it cannot be read later.
        problem: why it is left out; the rest is None then.
    """

    name: str
    size: int
    modified: int
    offset: int | None = None
    data: bytes | None = None
    problem: str | None = None


def read_archive(path: str, suffixes: Set[str]) -> Iterator[Entry]:
    """Yield the visible files of a tar archive that have one of these suffixes.

    Args:
        path: a local file, or an address that fsspec knows.
        suffixes: in lower case, with the dot.

    Raises:
        ImageError: the archive cannot be read, or not to its end; after the files that are whole.
    """
    name = name_of(path)
    with contextlib.ExitStack() as stack:
        if is_url(path):
            stream: IO[bytes] = stack.enter_context(open_remote(path))
            end, changed = None, 0
        else:
            stream = stack.enter_context(open_file(path, name))
            status = os.stat(path)
            end, changed = status.st_size, status.st_mtime_ns
        try:
            yield from _read(path, name, stream, end, changed, suffixes)
        except OSError as error:
            raise unreadable(error, name) from error


def _read(
    path: str, name: str, stream: IO[bytes], end: int | None, changed: int, suffixes: Set[str]
) -> Iterator[Entry]:
    """Yield the files; ``end`` is the size of a local archive, ``changed`` when it was."""
    with _errors(name):
        tape = _Tape(stream)
        archive = tarfile.open(fileobj=tape, mode="r:", encoding="utf-8")  # type: ignore[call-overload]  # noqa: SIM115
    empty = len(tape.last) == tarfile.BLOCKSIZE and not any(tape.last)  # which Python 3.10 stumbles over
    while not empty:
        with _errors(name):
            found = archive.next()
        archive.members.clear()  # it would keep them all
        if found is None:
            break
        if found.size < 0:
            raise _damaged(name, "a size is wrong")
        inner = re.sub(r"^(\./+)+", "", found.name)
        if suffix_of(inner) in suffixes and not _is_hidden(inner):
            member = name_of(f"{path}/{inner[:_LONGEST_NAME]}")
            size, begin, modified = found.size, found.offset_data, nanoseconds(found.mtime) or changed
            problem = _unusable(found, inner)
            if problem is not None:
                yield Entry(inner[:_LONGEST_NAME], size, modified, problem=f"{member}: {problem}")
            elif end is not None and not tape.packed:
                if begin + size > end:
                    raise _truncated(member)
                yield Entry(inner, size, modified, offset=begin)
            else:
                with _errors(member):
                    tape.seek(begin)
                    data = tape.take(size)
                if len(data) < size:
                    raise _truncated(member)
                yield Entry(inner, size, modified, data=data)
                del data
        tape.mark()
    if len(tape.last) < tarfile.BLOCKSIZE:  # archives end with zeros
        raise _truncated(name)
    if any(tape.last):
        raise _damaged(name, "a header is wrong")
    with _errors(name):
        tape.finish()


_LONGEST_NAME = 1024


def _unusable(entry: tarfile.TarInfo, inner: str) -> str | None:
    """Say why a file in an archive is left out."""
    if entry.issym() or entry.islnk():
        return "a link in an archive is not followed; put the file itself there"
    if not entry.isreg():
        return "not a file"
    if inner.startswith("/") or ".." in inner.split("/") or "\0" in inner or len(inner) > _LONGEST_NAME:
        return "its name leads out of the archive or is too long; rename it"
    if entry.issparse():
        return "a file with gaps (sparse); pack it without --sparse"
    if entry.size > MAX_BYTES:
        return f"larger than the {MAX_BYTES / 2**20:.0f} MiB allowed in an archive; unpack it"
    return None


def _is_hidden(inner: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in inner.split("/"))


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # crafted headers make tarfile stumble in many ways
        detail = one_line(error)
        if isinstance(error, EOFError) or "end of data" in detail or "truncated" in detail:
            raise _truncated(name) from error
        raise _damaged(name, detail) from error


def _damaged(name: str, detail: str) -> ImageError:
    return ImageError(
        f"{name}: the archive is damaged, or no tar archive ({detail}); copy or download it again"
    )


def _truncated(name: str) -> ImageError:
    return ImageError(f"{name}: the archive is truncated; copy or download it again")
