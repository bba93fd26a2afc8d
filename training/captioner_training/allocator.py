"""Memory that is freed and taken again at every step, kept instead of given back to the system."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, and return whether the C library can.

    A training step takes some 300 MB and frees them. glibc gives such blocks back to the system, which then
    clears and maps each page anew: a fifth of a step on a CPU. What a process holds at most stays as it is.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    largest = 2**31 - 1
    return bool(mallopt(_TRIM_THRESHOLD, largest)) and bool(mallopt(_MMAP_THRESHOLD, largest))
