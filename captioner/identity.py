"""Which model it is: where the built-in one lies, and a fingerprint of any checkpoint; no torch."""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path

BUILT_IN = Path(__file__).parent / "weights" / "captioner.safetensors"
"""The model that comes with the package."""


def fingerprint(path: str | PathLike[str]) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256: 64 bits, enough to tell models apart.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]
