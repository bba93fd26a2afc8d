"""A few frames of a clip, evenly spread over it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from captioner.checkpoint import Header
from captioner.video import frames, probe

View = TypeVar("View")

FRAMES = 16
"""How many frames of a clip are looked at, if nobody says."""


def trained_frames(header: Header) -> int:
    """Return how many frames of a clip a captioner was trained with, or the usual number."""
    frames = header.summary.get("frames")
    return frames if type(frames) is int and frames > 0 else FRAMES


def take_frames(
    path: Path,
    count: int,
    look: Callable[[np.ndarray], View],
    start: float = 0.0,
    end: float | None = None,
) -> list[tuple[float, View]]:
    """Return at most ``count`` frames of a clip, evenly spread, with their times in seconds of the file.

    They are those of ``captioner.video.frames(path, (end - start) / count, start, end)``. A clip of fewer
    frames gives all of them. It is decoded once, and again only if it ends long before its header says.

    Args:
        path: of the video or animation.
        count: at least 1.
        look: makes of each frame ``(H, W, 3)`` uint8 what is kept of it.
        start, end: seconds; None is the end of the file.

    Raises:
        VideoError: if the file cannot be read, or not to its end, or ends before ``start``.
    """
    promised = [moment for moment in (probe(path).duration, end) if moment is not None]
    every = max(0.0, min(promised) - start) / count if promised else 0.0
    taken, span = _pass(path, count, look, start, end, every)
    if len(taken) < count and span < every * (count - 1):
        taken, _ = _pass(path, count, look, start, end, span / count)
    return taken


def _pass(
    path: Path,
    count: int,
    look: Callable[[np.ndarray], View],
    start: float,
    end: float | None,
    every: float,
) -> tuple[list[tuple[float, View]], float]:
    """Read a clip once; return what was taken, and how many seconds there really were.

    Frames are thinned out as they pass by, so that a clip of unknown length needs little memory.
    """
    finish = start
    kept: list[tuple[float, View]] = []

    def passed(moment: float) -> None:
        nonlocal finish
        finish = moment

    for frame in frames(path, every, start, end, passed=passed):
        if kept and _slot(frame.time - start, every) <= _slot(kept[-1][0] - start, every):
            continue
        kept.append((frame.time, look(frame.image)))
        if len(kept) > 4 * count:
            every = 2 * every or (frame.time - start) / (2 * count)
            kept = _thin(kept, start, every)
    span = finish - start
    if len(kept) > count + 1:
        kept = _thin(kept, start, span / count)
    return kept[:count], span


def _thin(kept: list[tuple[float, View]], start: float, every: float) -> list[tuple[float, View]]:
    """Return the first frame of each slot of time."""
    first: dict[float, tuple[float, View]] = {}
    for time, view in kept:
        first.setdefault(_slot(time - start, every), (time, view))
    return list(first.values())


def _slot(time: float, every: float) -> float:
    return math.floor((time + _TOLERANCE) / every) if every else time


_TOLERANCE = 1e-3
"""Seconds, as in `captioner.video`."""
