"""What is to be captioned: files, folders, patterns, lists, tables, archives and remote paths, one by one."""

from __future__ import annotations

import io
from dataclasses import dataclass


class NamedBytes(io.BytesIO):
    """Bytes in memory that readers can call by the name of where they come from."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


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
            ImageError: it cannot be read; the message names it.
        """
        raise NotImplementedError

    def open(self) -> str | NamedBytes:
        """Return what `captioner.images.load` takes: the local file's path, or what was read."""
        return self.file if self.file is not None else NamedBytes(self.read(), self.path)
