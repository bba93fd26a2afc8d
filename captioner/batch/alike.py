"""What is there twice: pictures that look alike, by perceptual hashes, and captions said more than once.

A hash is two of ImageHash's: pHash says which of a picture's 64 coarsest waves are stronger than their
median, dHash which of 8 × 8 places are brighter than their neighbours to the left. Resizing, compressing and
brightening leave nearly all of these bits, and so does cutting off a few pixels; other pictures differ in
about half of them. pHash finds, dHash throws out what agrees by chance. Neither sees colour: a copy in black
and white is found. Copies that are mirrored or turned are not, and of those cropped by 5 % half are missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from captioner.images import Fit

DISTANCE = 10
"""Pictures look alike whose pHashes differ in at most so many of 64 bits, and their dHashes in two more."""

MOST_DISTANCE = 15

_PLAIN = 2.0  # standard deviation of 32 × 32 grey levels, 0 to 255: below it there is nothing but noise
_BANDS = 4  # of 16 bits
_TOGETHER = 1 << 20  # pairs that are compared at once


def perceptual_hash(pixels: np.ndarray, fit: Fit | None = None) -> bytes | None:
    """Return the picture's perceptual hash, or None for one of a single plain colour.

    Plain pictures have nothing but noise to tell them apart, and would all look alike.

    Args:
        pixels: ``(3, H, W)`` uint8 RGB, as `captioner.images.load` gives it: decoded once for the network and
            for this.
        fit: how the picture was fitted into ``pixels``; bars are left out.

    Returns:
        16 bytes: the 64 bits of pHash, then those of dHash.

    Raises:
        ImportError: ImageHash is not installed; the message says what to do.
    """
    try:
        import imagehash
    except ImportError as error:
        raise ImportError(
            'finding pictures that look alike needs ImageHash: pip install "captioner[report]"'
        ) from error

    grey = photo(pixels, fit).convert("L")
    grey = grey.reduce(max(1, min(grey.size) // 64))  # four times as fast, and finds as much
    if np.asarray(grey.resize((32, 32), Image.Resampling.BOX)).std() < _PLAIN:
        return None
    return b"".join(
        np.packbits(made.hash).tobytes() for made in (imagehash.phash(grey), imagehash.dhash(grey))
    )


def photo(pixels: np.ndarray, fit: Fit | None) -> Image.Image:
    """Return the network's ``(3, H, W)`` square as a picture, without the bars of a letterbox."""
    square = Image.merge("RGB", [Image.fromarray(np.ascontiguousarray(band)) for band in pixels])
    if fit is None:
        return square
    left, top, right, bottom = fit.box
    x, y = square.width / (right - left), square.height / (bottom - top)
    inner = (
        max(0, round(-left * x)),
        max(0, round(-top * y)),
        min(square.width, round((fit.width - left) * x)),
        min(square.height, round((fit.height - top) * y)),
    )
    return square if inner == (0, 0, *square.size) else square.crop(inner)


def near_duplicates(hashes: Iterable[tuple[str, bytes | None]], distance: int = DISTANCE) -> list[list[str]]:
    """Return the groups of pictures that look alike, largest first; in a group, in the order given.

    A picture belongs to a group if it looks like any one of it. Time grows with the number of pictures and of
    pairs of them that look alike, hardly with the number of all pairs.

    Args:
        hashes: paths, each with its `perceptual_hash`; those without one are left out.
        distance: bits in which the pHashes of two that look alike may differ, 0 to 15; dHashes in two more.

    Raises:
        ValueError: the distance is out of range.
    """
    if not 0 <= distance <= MOST_DISTANCE:
        raise ValueError(f"distance must be from 0 to {MOST_DISTANCE} bits, not {distance}")
    paths: list[str] = []
    values = bytearray()
    for path, value in hashes:
        if value is not None:
            paths.append(path)
            values += value
    both = np.frombuffer(bytes(values), ">u8").astype(np.uint64).reshape(-1, 2)
    unique, which = np.unique(both, axis=0, return_inverse=True)
    labels = _components(unique, distance)[which.reshape(-1)]
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    groups = [[paths[i] for i in members] for members in np.split(order, starts[1:]) if len(members) > 1]
    return sorted(groups, key=len, reverse=True)


def _components(values: np.ndarray, distance: int) -> np.ndarray:
    """Return a number for each of ``(N, 2)`` distinct hashes; those that are linked have the same."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    labels = np.arange(len(values))
    for first, second in _near(values, distance):
        first, second = labels[first], labels[second]
        new = first != second
        if new.any():
            links = coo_array((np.ones(new.sum(), bool), (first[new], second[new])), (len(values),) * 2)
            labels = connected_components(links, directed=False)[1][labels]
    return labels


def _near(values: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of ``(N, 2)`` hashes that look alike, some more than once.

    Of four bands of 16 bits, one at least differs in a quarter of the bits or fewer. So it is enough to
    compare those that agree in a band up to a few flipped bits (multi-index hashing).
    """
    waves, places = np.ascontiguousarray(values.T)
    bits = np.unpackbits(waves.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
    left = distance
    for band in range(_BANDS):
        # every fourth bit: neighbours depend on each other, and would fill few of the buckets
        keys = np.packbits(bits[:, band::_BANDS], axis=1).astype(np.int64) @ np.array([256, 1])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.searchsorted(keys, np.arange((1 << 16) + 1))
        flips = left // (_BANDS - band)
        for mask in _masks(flips):
            other = keys ^ mask
            if mask:  # each pair from one side only
                low = starts[other]
                count = np.where(other > keys, starts[other + 1] - low, 0)
            else:
                low = np.arange(1, len(keys) + 1)
                count = starts[keys + 1] - low
            for first, second in _ranges(low, count):
                first, second = order[first], order[second]
                near = _ones(waves[first] ^ waves[second]) <= distance
                first, second = first[near], second[near]
                near = _ones(places[first] ^ places[second]) <= distance + 2
                if near.any():
                    yield first[near], second[near]
        left -= flips + 1  # if this band differs in more bits, so many fewer are left for the others
        if left < 0:
            return


def _masks(flips: int) -> Iterator[int]:
    for count in range(flips + 1):
        for places in combinations(range(16), count):
            yield sum(1 << place for place in places)


def _ranges(low: np.ndarray, count: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs ``(i, low[i]), (i, low[i] + 1), …``, ``count[i]`` of them, some at a time."""
    ends = np.cumsum(count)
    done, start = 0, 0
    while start < len(count) and done < ends[-1]:
        stop = max(int(np.searchsorted(ends, done + _TOGETHER, "right")), start + 1)
        counts = count[start:stop]
        first = np.repeat(np.arange(start, stop), counts)
        within = np.arange(len(first)) - np.repeat(ends[start:stop] - counts - done, counts)
        yield first, low[first] + within
        done, start = int(ends[stop - 1]), stop


def _ones(values: np.ndarray) -> np.ndarray:
    """Return how many bits are set in each of ``(N,)`` uint64."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.asarray(np.bitwise_count(values))
    return _COUNTS[values.view(np.uint16).reshape(-1, 4)].sum(1)


_COUNTS = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)


def repeated(captions: Iterable[str]) -> list[tuple[str, int]]:
    """Return the captions that are said more than once and how often, most often first; "" does not count."""
    counts = Counter(caption for caption in captions if caption)
    return [(caption, count) for caption, count in counts.most_common() if count > 1]


def summary_lines(groups: Sequence[Sequence[Any]], repeats: Sequence[tuple[str, int]]) -> list[str]:
    """Return what `near_duplicates` and `repeated` found, a line for each that found something."""
    lines = []
    if groups:
        pictures = sum(map(len, groups))
        count = "a group" if len(groups) == 1 else f"{len(groups):,} groups"
        lines.append(f"{pictures:,} pictures in {count} look alike.")
    if len(repeats) == 1:
        ((caption, times),) = repeats
        lines.append(f"One caption is said of {times:,} files: “{caption}”.")
    elif repeats:
        caption, times = repeats[0]
        files = sum(count for _, count in repeats)
        lines.append(
            f"{len(repeats):,} captions are said more than once, of {files:,} files; "
            f"most often, {times:,} times, “{caption}”."
        )
    return lines
