"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_UMASK = os.umask(0o077)
os.umask(_UMASK)

_RANDOM = re.compile(r"[a-z0-9_]{8}\.tmp")
"""What `tempfile.mkstemp` puts between our prefix and suffix, and the suffix."""


def write_atomically(path: Path, data: bytes, *, like: Path | None = None, keep_time: bool = False) -> None:
    """Write a file so that a crash or a full disk leaves the old one or the new one, never a part.

    A kill leaves a hidden file beside it at the worst, which `remove_leftovers` finds.

    Args:
        path: of the file.
        data: its complete new content.
        like: a file whose permissions and extended attributes the new one gets, and its owner where that is
            allowed; None for the permissions of any new file.
        keep_time: also give it that file's modified time.

    Raises:
        OSError: if it cannot be written, with the name of the file meant; nothing is left behind then.
    """
    with open_atomically(path, like=like, keep_time=keep_time) as file:
        file.write(data)


def save(path: Path, data: bytes) -> Path:
    """Write a file as `write_atomically` does, and return its path.

    Raises:
        OSError: if it cannot be written; its text is the line for the user.
    """
    try:
        write_atomically(path, data)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    return path


@contextmanager
def open_atomically(path: Path, *, like: Path | None = None, keep_time: bool = False) -> Iterator[IO[bytes]]:
    """Give a file to write that takes its place at the end, whole; see `write_atomically`.

    Raises:
        OSError: if it cannot be written, with the name of the file meant; nothing is left behind then, as
            when the body raises.
    """
    path = _followed(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=".tmp")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if like is None:
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes private files
        else:
            found = os.stat(like)
            with suppress(OSError, AttributeError):  # only the administrator gives files away; not on Windows
                os.chown(temporary, found.st_uid, found.st_gid)
            shutil.copystat(like, temporary)
            if not keep_time:
                os.utime(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):  # a Ctrl-C just after the rename
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def remove_leftovers(*paths: Path) -> None:
    """Remove what `write_atomically` left beside files when it was killed; nobody may be writing them now.

    Each folder is listed once, so give many files at a time.
    """
    folders: dict[Path, set[str]] = {}
    for path in map(_followed, paths):
        folders.setdefault(path.parent, set()).add(_prefix(path))
    for folder, prefixes in folders.items():
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[:-12] in prefixes and _RANDOM.fullmatch(entry.name[-12:]):
                    with suppress(OSError):
                        os.unlink(entry.path)


def _followed(path: Path) -> Path:
    """Return what a link leads to: that is written, and the link stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _prefix(path: Path) -> str:
    # short enough for the random part and the suffix: names may have 255 bytes
    return f".{os.fsencode(path.name)[:200].decode(errors='ignore')}."
