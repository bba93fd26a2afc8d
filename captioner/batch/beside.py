"""What is written beside a picture, or into it: planned, noted in the journal, then written.

A plan is made of what the disk holds and what the journal says of earlier runs, so that a kill at any moment
neither loses nor doubles anything, and what a person wrote is told from what captioner wrote.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from captioner.files import write_atomically

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Plan:
    """What is to be done for one file.

    Attributes:
        target: the file that will be written or changed.
        data: its complete new content; None if nothing is to be written.
        digest: by which this work is known again: a text for the journal, to be handed to the next ``plan()``
            as ``ours``. It begins with a SHA-256 in hex, see `Mark`.
        kept: why somebody's own is kept, or why nothing can be written; one line, and ``data`` is None. None
            if all is well.
        keep_time: whether the target keeps its modified time.
        seen: what `state` said of the target when the plan was made.
    """

    target: Path
    data: bytes | None
    digest: str
    kept: str | None = None
    keep_time: bool = False
    seen: tuple[int, ...] | None = None

    def write(self) -> None:
        """Write the target, at once or not at all; an existing one keeps its permissions.

        Raises:
            OSError: it cannot be written, or somebody changed it since the plan was made.
        """
        if self.data is None:
            return
        found = state(self.target)
        if found != self.seen:
            raise OSError(errno.EBUSY, "changed while it was being captioned; run again", str(self.target))
        write_atomically(
            self.target,
            self.data,
            like=None if found is None else self.target,
            keep_time=self.keep_time,
        )


class Mark(NamedTuple):
    """How work of ours is known again.

    Attributes:
        sha256: in hex, of a file's complete content, or of a text in it.
        start, length: bytes of the content that are ours; the length is -1 if all of it is.
    """

    sha256: str
    start: int = 0
    length: int = -1

    def __str__(self) -> str:
        return self.sha256 if self.length < 0 else f"{self.sha256}@{self.start}+{self.length}"


def read_marks(digest: str | None) -> list[Mark]:
    """Read the marks of a `Plan.digest`: what was to be written, then what stood there before, if ours."""
    marks = []
    for part in (digest or "").split():
        sha256, _, place = part.partition("@")
        start, _, length = place.partition("+")
        marks.append(Mark(sha256, int(start), int(length)) if length else Mark(sha256))
    return marks


def write_marks(marks: Sequence[Mark]) -> str:
    """Return the digest that `read_marks` reads."""
    return " ".join(map(str, dict.fromkeys(marks)))


def sha256(data: bytes) -> str:
    """Return the SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def state(path: Path) -> tuple[int, ...] | None:
    """Return what changes when somebody writes a file; None if there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns


def one_line(text: str) -> str:
    """Return text without line breaks, control characters and lone surrogates, ends trimmed."""
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    return text.strip()


def is_remote(path: str) -> bool:
    """Tell whether a path is an address, as of object storage."""
    return _REMOTE.match(path) is not None


def why_not(path: str, target: Path) -> str | None:
    """Return what keeps us from writing a target for a file, in words that follow "there is no …: "."""
    if is_remote(path):
        return "the file is on another machine"
    if not os.path.exists(path):
        return "the file is in an archive, or gone"
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        return f"{target}: {error.strerror or error}"
    if mode is not None:
        if stat.S_ISLNK(mode):
            return f"{target} is a link, and is kept"
        if stat.S_ISDIR(mode):
            return f"{target} is a folder"
        if not stat.S_ISREG(mode):
            return f"{target} is not a file"
    if not os.access(target.parent, os.W_OK):
        return f"the folder {target.parent} cannot be written to"
    return None
