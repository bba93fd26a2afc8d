"""Files on other machines, through fsspec, which is imported when the first one is met."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
from collections.abc import Iterator, Set
from datetime import datetime, timezone
from glob import has_magic as _has_wildcard
from typing import Any
from urllib.parse import unquote

from captioner.inputs import ImageError, name_of

MAX_BYTES = 2**29
"""What is larger (512 MiB) is not taken out of an archive or a pipe, nor held in memory from elsewhere."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")


def is_url(path: str) -> bool:
    """Tell an address such as ``s3://bucket/a.jpg`` or ``zip://a.jpg::s3://bucket/b.zip`` from a path."""
    return "://" in path and _URL.match(path) is not None


def is_http(url: str) -> bool:
    """Tell whether this is an address of the web."""
    return url.startswith(("http://", "https://"))


def from_file_url(path: str) -> str:
    """Return the local path of a ``file://`` address, and what is none of these as it is."""
    if not path.startswith(("file://", "local://")):
        return path
    rest = path.partition("://")[2]
    if rest.startswith("localhost/"):
        rest = rest.removeprefix("localhost")
    decoded = unquote(rest, errors="surrogateescape")
    return decoded if not exists(rest) and exists(decoded) else rest


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and how the file is called there."""
    name = name_of(url)
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        hint = 'pip install "captioner[remote]"'
        raise ImageError(f"{name}: remote paths need one more package; {hint}") from error
    try:
        found: tuple[Any, str] = url_to_fs(url)
        return found
    except ImportError as error:
        hint = 'pip install "captioner[remote]"' if is_http(url) else one_line(error)
        raise ImageError(f"{name}: {scheme}:// needs one more package; {hint}") from error
    except Exception as error:
        raise ImageError(f"{name}: it cannot be reached ({one_line(error)}); check the address") from error


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    name = name_of(url)
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # whatever keeps fsspec from a page is a file that is not there
        if cause is not None and getattr(cause, "status", 0) not in (404, 410):
            detail = one_line(cause)
            raise ImageError(f"{name}: it cannot be read ({detail}); check the address") from error
        raise ImageError(f"{name}: there is no such file; check the address") from error
    except PermissionError as error:
        raise ImageError(f"{name}: no permission to read it; check your credentials") from error
    except Exception as error:  # each file system has its own
        raise ImageError(f"{name}: it cannot be read ({one_line(error)}); check the address") from error


@contextlib.contextmanager
def open_remote(url: str) -> Iterator[io.BufferedReader]:
    """Open a remote file for reading; what comes over HTTP is read from beginning to end.

    Raises:
        ImageError: it cannot be opened or, while it is being read, not be read; the message names it.
    """
    filesystem, inner = _filesystem(url)
    with _errors(url):
        if is_http(url):
            # one request for the whole; a size, whichever, saves another one that asks for it
            stream = filesystem.open(inner, "rb", block_size=0, size=1)
        else:
            stream = filesystem.open(inner, "rb")
    with contextlib.closing(stream):
        yield io.BufferedReader(Counted(stream, url), 2**18)


def has_magic(url: str) -> bool:
    """Tell whether an address is a pattern."""
    if is_http(url):  # ? begins the query
        return "*" in url.partition("?")[0]
    return _has_wildcard(url.partition("::")[0])


def list_remote(url: str, recursive: bool, suffixes: Set[str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the files that an address stands for, each with what its file system tells or why it cannot."""
    filesystem, inner = _filesystem(url)
    with _errors(url):
        if has_magic(url) and not (not is_http(url) and filesystem.exists(inner)):
            last = suffix_of(url)
            anything = last not in ("", ".") and not _has_wildcard(last)
            base, base_inner = _constant_part(url)
            found = filesystem.glob(inner, detail=True)
            for name in sorted(found):
                address = _address(base, base_inner, name)
                if "/." in address.removeprefix(base.partition("::")[0]) and "/." not in url:
                    continue
                if found[name].get("type") == "directory":
                    if "**" not in url:
                        yield from _walk_remote(filesystem, address, name, recursive, suffixes)
                elif anything or suffix_of(address) in suffixes:
                    yield address, found[name]
        elif is_http(url):
            if url.endswith("/"):  # a page of links
                yield from _walk_remote(filesystem, url, inner, recursive, suffixes)
            else:
                yield url, filesystem.info(inner)
        else:
            info = filesystem.info(inner)
            if info.get("type") == "directory":
                yield from _walk_remote(filesystem, url, inner, recursive, suffixes)
            else:
                yield url, info


def _walk_remote(
    filesystem: Any, url: str, inner: str, recursive: bool, suffixes: Set[str]
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the files of a remote folder, sorted by path, and sub-folders that cannot be listed."""
    seen = set()
    pending: list[tuple[str, dict[str, Any]]] = [(inner.rstrip("/") + "/", {})]
    while pending:
        name, info = pending.pop()
        if not name.endswith("/"):
            yield _address(url, inner, name), info
            continue
        folder = name.rstrip("/")
        if folder in seen or name.count("/") > inner.count("/") + 100:
            continue
        seen.add(folder)
        try:
            with _errors(_address(url, inner, folder)):
                entries = filesystem.ls(name if is_http(url) else folder, detail=True)
        except ImageError as error:
            if folder == inner.rstrip("/"):
                raise
            yield _address(url, inner, folder), str(error)
            continue
        below = []
        for entry in entries:
            path = entry["name"].rstrip("/")
            if not path.startswith(folder + "/") or path.rpartition("/")[2].startswith("."):
                continue
            if entry.get("type") == "directory":
                if recursive:
                    below.append((path + "/", entry))
            elif suffix_of(path) in suffixes:
                below.append((path, entry))
        pending.extend(sorted(below, key=lambda found: found[0], reverse=True))


def _constant_part(url: str) -> tuple[str, str]:
    """Return the part of a pattern before what varies, and how it is called in its file system."""
    first, chained, rest = url.partition("::")
    scheme, _, path = first.partition("://")
    parts = path.split("/")
    at = next((i for i, part in enumerate(parts) if _has_wildcard(part)), len(parts))
    base = f"{scheme}://{'/'.join(parts[:at])}"
    return base + chained + rest, _filesystem(base + chained + rest)[1]


def _address(url: str, inner: str, name: str) -> str:
    """Return the address of what a file system calls ``name``, below ``url``, which it calls ``inner``.

    It keeps what file systems leave out of names: the host of ``sftp://``, the archive behind ``zip://``.
    """
    first, chained, rest = url.partition("::")
    scheme, _, folder = first.partition("://")
    below = name[len(inner.rstrip("/")) :].strip("/")
    return f"{scheme}://" + "/".join(part for part in (folder.rstrip("/"), below) if part) + chained + rest


def join(url: str, relative: str) -> str:
    """Return the address of what lies beside ``url``."""
    first, chained, rest = (url.partition("?")[0], "", "") if is_http(url) else url.partition("::")
    scheme, _, path = first.partition("://")
    folder = path.rpartition("/")[0]
    return f"{scheme}://" + (folder + "/" if folder else "") + relative + chained + rest


def size_of(info: dict[str, Any]) -> int:
    """Return the bytes of a file by what a file system tells, -1 if it does not."""
    size = info.get("size")
    return size if isinstance(size, int) and size >= 0 else -1


def modified_of(info: dict[str, Any]) -> int:
    """Return nanoseconds since 1970 by what a file system tells; each has its own word for it."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        value = info.get(key)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
            except ValueError:
                continue
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return nanoseconds(value)
    return 0


def suffix_of(path: str) -> str:
    """Return the suffix of a path or address in lower case; both of ``.tar.gz``."""
    if is_http(path):
        path = path.partition("#")[0].partition("?")[0]
    elif is_url(path):
        path = path.partition("::")[0]
    base, suffix = os.path.splitext(path.lower())
    return ".tar" + suffix if suffix in (".gz", ".bz2", ".xz") and base.endswith(".tar") else suffix


def exists(path: str) -> bool:
    """Tell whether something local is called so."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL character
        return False


class Counted(io.RawIOBase):
    """A stream that knows how much was read from it, and turns trouble with an address into `ImageError`."""

    def __init__(self, stream: Any, url: str | None = None) -> None:
        self.count = 0
        self._stream = stream
        self._errors = functools.partial(_errors, url) if url else contextlib.nullcontext
        self._seekable = not (url and is_http(url)) and stream.seekable()
        self._ended = False

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return bool(self._seekable)

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        if self._ended:  # aiohttp takes those who ask again and again for lost, and logs their stacks
            return 0
        with self._errors():
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        self._ended = not data and len(buffer) > 0
        return len(data)

    def seek(self, position: int, whence: int = 0) -> int:  # noqa: D102
        if not self._seekable:
            raise io.UnsupportedOperation("seek")
        self._ended = False
        with self._errors():
            return int(self._stream.seek(position, whence))

    def tell(self) -> int:  # noqa: D102
        if not self._seekable:
            raise io.UnsupportedOperation("tell")
        return int(self._stream.tell())


def too_large(path: str) -> ImageError:
    """Return the error about more than `MAX_BYTES`."""
    limit = f"{MAX_BYTES / 2**20:.0f} MiB"
    return ImageError(f"{name_of(path)}: larger than the {limit} allowed; give it as a local file")


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return name_of(text if len(text) <= 200 else text[:200] + "...")


def nanoseconds(seconds: float) -> int:
    """Return nanoseconds since 1970, 0 for what is no time."""
    return int(seconds * 1e9) if math.isfinite(seconds) and 0 < seconds < 2**33 else 0
