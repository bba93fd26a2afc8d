"""What the encoder's frozen blocks give: cached in 16-bit, memory-mapped shards, or computed live.

An item is a picture or a clip. A clip is F frames, a picture is one: features of an item are ``(F * R, D)``,
frame after frame. Clips that have fewer frames are padded with zeros, and so are their masks.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from captioner.encoder import Encoder, GridFeatures, compute, encode, fuse, photo_mask
from captioner.files import write_atomically
from captioner.images import Fit, Preprocess, load, open_image
from captioner.inputs import ImageError
from captioner.parallel import ahead
from captioner.video import VideoError
from captioner_training.clips import FRAMES, take_frames
from captioner_training.data import DataError, DataSet, Picture, chunks

FORMAT = 2
"""Of the cache's files; another one makes another cache. Crops and masks belong to it."""

_BATCH = 16
_GPU_BATCH = 64
_SHARD_VIEWS = 128
"""Views in a shard: what an interruption loses at most, seconds of a core's work for the small encoders."""
_SHARD_BYTES = 2**28
_LARGEST = 65504.0  # of 16 bits
_SERIAL = 2**15 - 1
_POLL = 0.25


def load_pixels(data: DataSet, indices: Sequence[int], encoder: Encoder) -> tuple[Tensor, list[Fit]]:
    """Return uint8 pixels ``(N, 3, S, S)`` of the given pictures, and how each was fitted.

    Raises:
        DataError: if a picture cannot be read, naming it, or the data set is of clips.
    """
    if data.is_video:
        raise DataError(f"{data.name}: this needs pictures, and they are videos: give another data set")
    read = [_read(data, index, encoder.preprocess, [0]) for index in indices]
    return torch.from_numpy(np.concatenate([r.views[0] for r in read])), [r.fit for r in read if r.fit]


@torch.inference_mode()
def look_at(data: DataSet, indices: Sequence[int], encoder: Encoder, frames: int = FRAMES) -> GridFeatures:
    """Decode and encode pictures, or clips of at most so many frames: ``(N, F, R, D)``.

    Raises:
        DataError: if one cannot be read, naming it.
    """
    read = [_read(data, index, encoder.preprocess, [0], frames) for index in indices]
    fits = [r.fit for r in read if r.fit]
    pixels = torch.from_numpy(np.concatenate([r.views[0] for r in read]))
    if not data.is_video:
        return encode(encoder, pixels, fits)
    counts = [len(r.times) for r in read]
    given = encode(encoder, pixels, [fit for r, fit in zip(read, fits, strict=True) for _ in r.times])
    return GridFeatures(
        data=pad_sequence(list(given.data[:, 0].split(counts)), batch_first=True),
        mask=pad_sequence(list(given.mask[:, 0].split(counts)), batch_first=True),
        grid=given.grid,
        times=_padded_times([r.times for r in read], max(counts)).to(given.data.device),
        fits=tuple(fits),
    )


def _padded_times(times: Sequence[Sequence[float]], frames: int) -> Tensor:
    """Return ``(N, F)`` seconds; of padding the last frame's."""
    return torch.tensor([[*t, *[t[-1]] * (frames - len(t))] for t in times])


class Features(Protocol):
    """What training reads: features of pictures or clips and their variants, out of a cache or computed anew.

    Variant 0 is the whole picture, and with flips variant 1 is the same mirrored. Crops follow, each with
    its mirror image where there are flips. All frames of a clip are mirrored, and cropped, alike.
    """

    data: DataSet
    frames: int
    """F, of each item; 1 for pictures."""
    variants: int
    shape: tuple[int, int, int, int]
    map_shape: tuple[int, int, int]

    def read(self, indices: Sequence[int], variants: Sequence[int], *, seed: str | None = None) -> Tensor:
        """Return ``(N, F * R, D)`` as float32, one variant for each item."""
        ...

    def mask(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Tensor:
        """Return ``(N, F * R)``: the share of each of the grid's cells that lies on the photo."""
        ...

    def grid_features(self, indices: Sequence[int]) -> GridFeatures:
        """Return the grid features of whole, unmirrored pictures, as ``encode`` would, or of clips."""
        ...


# --------------------------------------------------------------------------------------------------
# Pictures and their variants


class _Picture(NamedTuple):
    views: list[np.ndarray]
    """``(f, 3, S, S)`` uint8 each, unmirrored: the whole picture and crops of it, those asked for. f is 1 for
    a picture, for a clip the number of its frames."""
    fit: Fit | None
    """Of the whole picture, if it was asked for."""
    content: str
    size: int
    times: tuple[float, ...] = (0.0,)
    """Of the frames, in seconds."""


def _read(
    data: DataSet,
    index: int,
    preprocess: Preprocess,
    views: Iterable[int],
    frames: int = 1,
    seed: str | None = None,
) -> _Picture:
    """Decode views of a picture, or of at most so many frames of a clip: 0 is the whole, k its k-th crop.

    Raises:
        DataError: if it cannot be read, naming it.
    """
    if data.is_video:
        return _read_clip(data, index, preprocess, list(views), frames, seed)
    picture = data.pictures[index]
    found: list[np.ndarray] = []
    fit, image = None, None
    try:
        raw = _bytes(data, index)
        for view in views:
            if view == 0:
                pixels, fit = load(raw, preprocess)
            else:
                image = image or open_image(raw, draft_size=preprocess.resize or preprocess.size)
                pixels = _cut(image, _window(picture, view, image.size, preprocess, seed), preprocess)
            found.append(pixels[None])
    except ImageError as error:
        raise DataError(f"{data.name}: {picture.file}: {error}") from None
    return _Picture(found, fit, _content(raw), len(raw))


def _read_clip(
    data: DataSet, index: int, preprocess: Preprocess, views: Sequence[int], frames: int, seed: str | None
) -> _Picture:
    clip = data.pictures[index]
    fits: list[Fit] = []

    def look(image: np.ndarray) -> list[np.ndarray]:
        found = []
        for view in views:
            if view == 0:
                pixels, fit = load(image, preprocess)
                fits.append(fit)
            else:  # all frames are of one size, and so have the same window
                photo = Image.fromarray(image)
                pixels = _cut(photo, _window(clip, view, photo.size, preprocess, seed), preprocess)
            found.append(pixels)
        return found

    path = Path(clip.file)
    try:
        with data.store.as_file(clip.file) as path:
            taken = take_frames(path, frames, look, clip.start, clip.end)
            content, size = _file_content(path, clip.part), path.stat().st_size
    except (VideoError, ImageError) as error:
        message = str(error).removeprefix(f"{path}: ").removeprefix(f"{path.name}: ")
        raise DataError(f"{data.name}: {clip.file}: {message}") from None
    except OSError as error:
        raise DataError(f"{data.name}: {clip.file}: {error.strerror or error}") from None
    times, seen = zip(*taken, strict=True)
    stacked = [np.stack([frame[k] for frame in seen]) for k in range(len(views))]
    return _Picture(stacked, fits[0] if fits else None, content, size, times)


def _window(
    picture: Picture, view: int, size: tuple[int, int], preprocess: Preprocess, seed: str | None
) -> tuple[float, float, float, float]:
    name = f"{picture.id} {view}"
    return crop_window(*size, preprocess.fit, random.Random(name if seed is None else f"{seed} {name}"))


def crop_window(
    width: int, height: int, fit: str, chance: random.Random
) -> tuple[float, float, float, float]:
    """Draw a window ``(left, top, right, bottom)`` of 0.6 to 1 times the photo's area.

    It has about the photo's proportions where the encoder squashes whole photos. Where the encoder keeps
    proportions it is about square, and the largest square in the photo counts as the area.
    """
    share, stretch = chance.uniform(0.6, 1.0), math.exp(chance.uniform(-0.1, 0.1))
    short = min(width, height)
    base = (width, height) if fit == "squash" else (short, short)
    across = min(float(width), base[0] * math.sqrt(share * stretch))
    down = min(float(height), base[1] * math.sqrt(share / stretch))
    left, top = chance.uniform(0, width - across), chance.uniform(0, height - down)
    return left, top, min(float(width), left + across), min(float(height), top + down)


def _cut(image: Image.Image, window: tuple[float, float, float, float], preprocess: Preprocess) -> np.ndarray:
    resample = Image.Resampling[preprocess.interpolation.upper()]
    square = image.resize((preprocess.size, preprocess.size), resample, window, reducing_gap=3.0)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _bytes(data: DataSet, index: int) -> bytes:
    file = data.pictures[index].file
    try:
        return data.store.read(file)
    except OSError as error:
        raise DataError(f"{data.name}: {file}: {error.strerror or error}") from None


def _content(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def _file_content(path: Path, part: str) -> str:
    """Return what `_content` would of a file, and of which part of it is meant."""
    status = path.stat()
    whole = _hash_file(path, status.st_size, status.st_mtime_ns)
    return whole if not part else _content(f"{whole}{part}".encode())


@lru_cache(maxsize=64)
def _hash_file(path: Path, size: int, modified: int) -> str:
    """Hash a file, once for the clips of a long video that are read one after the other."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(network: nn.Module, preprocess: Preprocess) -> str:
    """Return a hash of weights and preprocessing; a change makes a cache stale."""
    digest = hashlib.sha256(json.dumps(preprocess.to_dict(), sort_keys=True).encode())
    for tensor in network.state_dict().values():
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


class _Frozen:
    """The frozen blocks of an encoder over a data set, and the masks: what cached and live features share."""

    def __init__(
        self, data: DataSet, encoder: Encoder, flips: bool, blocks: int | None, crops: int, frames: int
    ) -> None:
        if blocks is not None and not 1 <= blocks <= len(encoder.network):
            raise ValueError(f"blocks must be 1 to {len(encoder.network)}, not {blocks}")
        self.data = data
        self.encoder = encoder
        self.flips = flips
        self.blocks = blocks
        self.crops = crops
        self.frames = frames if data.is_video else 1
        self.variants = (1 + crops) * (2 if flips else 1)
        frozen = encoder.network[:blocks]
        self.network = fuse(copy.deepcopy(frozen)).eval().to(memory_format=torch.channels_last)
        self.device = next(self.network.parameters()).device
        self._on_cpu = self.device.type == "cpu"
        size = encoder.preprocess.size
        with torch.inference_mode():
            blank = torch.zeros(1, 3, size, size, device=self.device)
            width, rows, columns = (int(n) for n in self.network(blank).shape[1:])
        self.shape = (self.variants, len(data), self.frames * rows * columns, width)
        self.map_shape = (width, rows, columns)
        # only letterboxes have bars; a row that is not known yet is NaN
        self._masks: Tensor | None = None
        if encoder.preprocess.fit == "letterbox":
            self._masks = torch.full((len(data), encoder.grid[0] * encoder.grid[1]), math.nan)
        self._times: dict[int, tuple[float, ...]] = {}  # of clips

    def _view(self, variant: int) -> tuple[int, bool]:
        """Return which view a variant is of, and whether it is mirrored."""
        return (variant // 2, variant % 2 == 1) if self.flips else (variant, False)

    def _set_mask(self, index: int, fit: Fit) -> None:
        if self._masks is not None:
            self._masks[index] = torch.tensor(photo_mask(self.encoder.grid, fit))

    def mask(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Tensor:
        """Return ``(N, F * R)``: the share of each of the grid's cells that lies on the photo; 0 for padding.

        Args:
            indices: of the items.
            variants: one for each item; None for whole, unmirrored ones. Crops have no bars.
        """
        masks = self._frame_mask(indices, variants)
        if not self.data.is_video:
            return masks
        there = torch.zeros(len(indices), self.frames, 1)
        for row, index in enumerate(indices):
            there[row, : len(self._times[index])] = 1
        return (there * masks[:, None]).flatten(1)

    def _frame_mask(self, indices: Sequence[int], variants: Sequence[int] | None) -> Tensor:
        """Return ``(N, R)``, the same for all frames."""
        rows, columns = self.encoder.grid
        if self._masks is None:
            return torch.ones(len(indices), rows * columns)
        masks = self._masks[list(indices)]
        for row, variant in enumerate(variants or ()):
            view, mirrored = self._view(variant)
            if view:
                masks[row] = 1
            elif mirrored:
                masks[row] = masks[row].view(rows, columns).flip(-1).flatten()
        return masks

    def _grid_features(self, data: Tensor, indices: Sequence[int], fits: Sequence[Fit]) -> GridFeatures:
        data, mask = (x.unflatten(1, (self.frames, -1)) for x in (data, self.mask(indices)))
        times = torch.zeros(len(indices), 1)
        if self.data.is_video:
            known = [self._times[index] for index in indices]
            most = max(map(len, known))
            data, mask, times = data[:, :most], mask[:, :most], _padded_times(known, most)
        return GridFeatures(
            data=data,
            mask=mask.to(data.device),
            grid=self.encoder.grid,
            times=times.to(data.device),
            fits=tuple(fits),
        )


# --------------------------------------------------------------------------------------------------
# Cached


@dataclass(frozen=True)
class _Record:
    """What is kept beside a shard, for each of its pictures."""

    content: list[str]
    modified: list[int]
    fits: list[Fit]
    times: list[tuple[float, ...]] | None = None
    """Of the frames of clips, in seconds; None for pictures."""

    def to_bytes(self) -> bytes:
        fits = [[f.mode, f.width, f.height, f.box] for f in self.fits]
        record: dict[str, Any] = {"content": self.content, "modified": self.modified, "fits": fits}
        if self.times is not None:
            record["times"] = [[round(time, 6) for time in times] for times in self.times]
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    def load(cls, path: Path, count: int, frames: int | None) -> _Record | None:
        """Read it; None if it is missing or damaged.

        ``count`` is how many items there are, ``frames`` how many each of them may have; None for pictures.
        """
        try:
            record = json.loads(path.read_bytes())
            fits = [Fit(f[0], f[1], f[2], tuple(f[3])) for f in record["fits"]]
            times = None if frames is None else [tuple(float(t) for t in item) for item in record["times"]]
            found = cls(record["content"], record["modified"], fits, times)
        except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
            return None
        complete = len(found.content) == len(found.modified) == len(fits) == count
        if times is not None and frames is not None:
            complete = complete and len(times) == count and all(0 < len(t) <= frames for t in times)
        return found if complete else None


class FeatureCache(_Frozen):
    """What an encoder's frozen blocks give for a data set: 16-bit, memory-mapped, in shards.

    The folder holds ``cache.json`` (what it is a cache of) and, for each shard of a few hundred views,
    ``00000.f16`` (``(pictures, variants, F * R, D)``, bare little-endian halves) and ``00000.json`` (content
    hash, time of change and fit of each picture, and the times of a clip's frames). A shard appears by a
    rename when it is complete, so that any number of processes build one cache together: each takes the
    shards that no other has locked. The locks of a process that dies are free again.

    The folder's name holds a hash of weights, preprocessing, variants, and of the id, file name and size of
    each picture; of clips also of the number of frames and of their times. Pictures whose file was written
    since then are compared by content when the cache is opened, and computed anew where it changed.

    Attributes:
        folder: of this cache.
        fits: how each whole picture was fitted.
        content: a hash of each picture's bytes, 16 hex digits.
        shape: ``(variants, N, F * R, D)``.
        map_shape: ``(D, H, W)`` of the last cached block.
    """

    def __init__(
        self,
        folder: Path,
        data: DataSet,
        encoder: Encoder,
        flips: bool,
        blocks: int | None = None,
        *,
        crops: int = 0,
        frames: int = FRAMES,
    ) -> None:
        """Prepare a cache; `build` fills it.

        Args:
            folder: that holds this cache and others.
            data: the pictures.
            encoder: a hash of its weights and preprocessing names the cache, so that no stale one is used.
            flips: keep the mirrored pictures too.
            blocks: keep what the first blocks of the network give; None for all: the grid features.
            crops: keep so many random crops of each picture beside the whole; they depend on its id alone.
            frames: of a clip, at most; of no meaning for pictures.

        Raises:
            DataError: if a picture is missing.
        """
        super().__init__(data, encoder, flips, blocks, crops, frames)
        weights = fingerprint(encoder.network[:blocks], encoder.preprocess)
        stamps = [data.store.stamp(picture.file) for picture in data.pictures]
        self._modified = [modified for _, modified in stamps]
        self._bytes = [size for size, _ in stamps]
        # a picture's key is what it was before there were clips
        of_clips = f" {self.frames} frames" if data.is_video else ""
        key = hashlib.sha256(f"{FORMAT} {weights} {blocks} {flips} {crops}{of_clips}\n".encode())
        for picture, size in zip(data.pictures, self._bytes, strict=True):
            key.update(f"{picture.id!r} {picture.file} {size}{picture.part}\n".encode())
        self._picture_bytes = self.variants * self.shape[2] * self.shape[3] * 2
        views = self.variants * self.frames
        self._shard = max(1, min(_SHARD_VIEWS // views, _SHARD_BYTES // self._picture_bytes))
        self._count = -(-len(data) // self._shard)
        self.folder = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', data.name)}-{key.hexdigest()[:16]}"
        self._manifest = {
            "format": FORMAT,
            "key": key.hexdigest(),
            "data_set": data.name,
            "pictures": len(data),
            "encoder": encoder.name,
            "preprocess": encoder.preprocess.to_dict(),
            "weights": weights,
            "blocks": blocks,
            "flips": flips,
            "crops": crops,
            "variants": self.variants,
            **({"frames": self.frames} if data.is_video else {}),
            "cells": self.shape[2] // self.frames,
            "width": self.shape[3],
            "dtype": "float16",
            "shard_pictures": self._shard,
            "shards": self._count,
        }
        self._maps: dict[int, Tensor] = {}
        self._records: dict[int, _Record] = {}
        self._said: set[str] = set()
        self.fits: list[Fit] = []
        self.content: list[str] = []

    @property
    def size(self) -> int:
        """Bytes of the features on disk; hashes and fits add about 100 a picture."""
        return len(self.data) * self._picture_bytes

    def build(self, progress: bool = True) -> FeatureCache:
        """Compute what is not there yet, together with whoever else does, and open the whole.

        Args:
            progress: say how much is to be computed, and show a bar.

        Raises:
            DataError: a picture cannot be read; the disk is full; the folder holds something else.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_manifest()
            missing = [shard for shard in range(self._count) if not self._usable(shard)]
            if missing:
                self._fill(missing, progress)
        except OSError as error:
            raise self._explain(error) from error
        records = [self._records[shard] for shard in range(self._count)]
        self.fits = [fit for record in records for fit in record.fits]
        self.content = [content for record in records for content in record.content]
        self._times = dict(enumerate(t for record in records for t in record.times or ()))
        if self._masks is not None:
            for index, fit in enumerate(self.fits):
                self._set_mask(index, fit)
        return self

    def read(self, indices: Sequence[int], variants: Sequence[int], *, seed: str | None = None) -> Tensor:
        """Return ``(N, F * R, D)`` as float32, one variant for each item; R cells of the last cached block.

        The seed is of no use here: the crops are those that were cached.
        """
        if not self.content:
            raise ValueError("build() comes before read()")
        result = torch.empty(len(indices), *self.shape[2:])
        rows = result.flatten(1)
        for row, index, variant in zip(rows, indices, variants, strict=True):
            shard, place = divmod(index, self._shard)
            kept = self._maps[shard][place, variant].flatten()
            # one copy, widened on the way: a few times as fast as NumPy's astype; in pieces for which torch
            # wakes no other thread, because on a busy machine waiting for those takes far longer
            for to, part in zip(row.split(_SERIAL), kept.split(_SERIAL), strict=True):
                to.copy_(part)
        return result

    def grid_features(self, indices: Sequence[int]) -> GridFeatures:
        """Return the grid features of whole, unmirrored pictures, as ``encode`` would, or of clips."""
        data = self.read(indices, [0] * len(indices))
        return self._grid_features(data, indices, [self.fits[i] for i in indices])

    # Shards on disk

    def _path(self, shard: int, suffix: str) -> Path:
        return self.folder / f"{shard:05d}{suffix}"

    def _rows(self, shard: int) -> range:
        return range(shard * self._shard, min((shard + 1) * self._shard, len(self.data)))

    def _check_manifest(self) -> None:
        path = self.folder / "cache.json"
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            write_atomically(path, (json.dumps(self._manifest, indent=2) + "\n").encode())
            return
        except ValueError:
            raise DataError(f"{path} is damaged: delete the folder {self.folder}") from None
        if found == self._manifest:
            return
        keys = [k for k, v in self._manifest.items() if not isinstance(found, dict) or found.get(k) != v]
        raise DataError(
            f"{path} belongs to other features ({', '.join(keys) or 'unknown keys'}): delete the folder "
            f"{self.folder}, or name another with --cache"
        )

    def _usable(self, shard: int) -> bool:
        """Open a shard if it is complete and its pictures are still the same."""
        if shard in self._maps:
            return True
        path, rows = self._path(shard, ".f16"), self._rows(shard)
        expected = len(rows) * self._picture_bytes
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            return False
        frames = self.frames if self.data.is_video else None
        record = _Record.load(self._path(shard, ".json"), len(rows), frames)
        if found != expected or record is None:
            self._say(f"{path} is damaged: its {len(rows)} {self.data.thing}s are computed anew")
            return False
        if not self._same(shard, record):
            return False
        try:
            flat = torch.from_file(str(path), shared=False, size=expected // 2, dtype=torch.float16)
        except (OSError, RuntimeError):  # another process found it damaged and took it away
            return False
        self._maps[shard] = flat.view(len(rows), self.variants, *self.shape[2:])
        self._records[shard] = record
        return True

    def _same(self, shard: int, record: _Record) -> bool:
        """Return whether the pictures are those that the shard was computed from."""
        rows = self._rows(shard)
        modified = self._modified[rows.start : rows.stop]
        touched = [i for i, (a, b) in enumerate(zip(record.modified, modified, strict=True)) if a != b]
        if not touched:
            return True
        for place in touched:
            if self._content_now(rows[place]) != record.content[place]:
                file = self.data.pictures[rows[place]].file
                self._say(f"{self.data.name}: {file} has changed: its features are computed anew")
                return False
        record = replace(record, modified=modified)
        with contextlib.suppress(OSError):  # a cache may be shared for reading alone
            write_atomically(self._path(shard, ".json"), record.to_bytes())
        return True

    def _content_now(self, index: int) -> str:
        if not self.data.is_video:
            return _content(_bytes(self.data, index))
        clip = self.data.pictures[index]
        with self.data.store.as_file(clip.file) as path:
            return _file_content(path, clip.part)

    # Building

    def _fill(self, missing: Sequence[int], progress: bool) -> None:
        left = sum(len(self._rows(shard)) for shard in missing)
        needed, free = left * self._picture_bytes, shutil.disk_usage(self.folder).free
        if progress:
            thing = f"{self.data.thing}s"
            times = f" of {self.frames} frames" if self.data.is_video else ""
            times += f" in {self.variants} variants" if self.variants > 1 else ""
            part = "" if left == len(self.data) else f", {left:,} {thing} are left to compute"
            tqdm.write(
                f"features of {self.data.name}: {len(self.data):,} {thing}{times}, "
                f"{_readable(self.size)} in {self.folder} ({_readable(free)} free){part}",
                file=sys.stderr,
            )
        if needed > free:
            raise DataError(
                f"the features of {self.data.name} need {_readable(needed)} more, and {_readable(free)} are "
                f"free at {self.folder}: make room, name another folder with --cache, or set cache: false"
            )
        bar = tqdm(
            total=len(self.data),
            initial=len(self.data) - left,
            desc=f"features of {self.data.name}",
            unit=self.data.thing,
            disable=not progress,
        )
        threads = torch.get_num_threads()
        waited = False
        with bar:
            while missing:
                try:
                    computed = self._compute(missing, threads, bar)
                finally:
                    torch.set_num_threads(threads)
                missing = [shard for shard in missing if not self._usable(shard)]
                if missing and not computed:
                    if progress and not waited:
                        bar.write("waiting for other processes, which compute the rest", file=sys.stderr)
                    waited = True
                    time.sleep(_POLL)
                    bar.n = len(self.data) - sum(len(self._rows(shard)) for shard in missing)
                    bar.refresh()

    def _compute(self, missing: Sequence[int], threads: int, bar: tqdm) -> int:
        """Compute the shards that nobody else computes; return how many."""
        on_cpu = self._on_cpu
        locks: dict[int, FileLock] = {}
        computed, writer = 0, None

        def batches() -> Iterator[tuple[int, Sequence[int]]]:
            for shard in missing:
                lock = self._claim(shard)
                if lock is None:
                    continue
                locks[shard] = lock
                together = max(1, (_BATCH if on_cpu else _GPU_BATCH) // self.frames)
                for rows in chunks(self._rows(shard), together):
                    waiting.append((shard, rows))
                    yield shard, rows

        def work(item: tuple[int, Sequence[int]]) -> tuple[list[_Picture], Tensor]:
            pictures, pixels = self._decode(item[1])
            # a GPU computes in one thread, where the results are taken
            return pictures, self._features(pixels) if on_cpu else pixels

        waiting: deque[tuple[int, Sequence[int]]] = deque()
        begun, since = time.monotonic(), bar.n
        # a thread for each core and one core for each thread: small convolutions scale better so than
        # with all cores on one convolution, above all on a busy machine
        single = partial(torch.set_num_threads, 1) if on_cpu else None
        try:
            for number, (pictures, given) in enumerate(ahead(work, batches(), threads, single), 1):
                shard, rows = waiting.popleft()
                writer = writer or _ShardWriter(self._path(shard, ".f16"), self.data.is_video)
                halves = self._halves(given if on_cpu else self._features(given), rows, pictures)
                writer.add(halves, pictures)
                bar.update(len(rows))
                if rows[-1] == self._rows(shard)[-1]:
                    writer.finish(self._path(shard, ".json"), [self._modified[i] for i in self._rows(shard)])
                    writer = None
                    self._release(shard, locks.pop(shard))
                    computed += 1
                if number == 2 * threads:
                    _estimate(bar, len(self.data) - bar.n, time.monotonic() - begun, bar.n - since)
        finally:
            if writer is not None:
                writer.discard()
            for lock in locks.values():
                lock.release()
        return computed

    def _claim(self, shard: int) -> FileLock | None:
        """Lock a shard that is to be computed; None if another process has it, or has finished it."""
        lock = FileLock(self._path(shard, ".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        if self._usable(shard):
            self._release(shard, lock)
            return None
        for left_over in self.folder.glob(f".{shard:05d}.f16.*"):  # by a process that was killed
            left_over.unlink(missing_ok=True)
        self._path(shard, ".f16").unlink(missing_ok=True)
        return lock

    def _release(self, shard: int, lock: FileLock) -> None:
        with contextlib.suppress(OSError):  # some systems do not delete open files
            self._path(shard, ".lock").unlink()
        lock.release()

    def _decode(self, rows: Sequence[int]) -> tuple[list[_Picture], Tensor]:
        """Return the items and ``(1 + crops, M, 3, S, S)``, one after the other, of their M frames."""
        views = range(1 + self.crops)
        read = partial(_read, self.data, preprocess=self.encoder.preprocess, views=views, frames=self.frames)
        pictures = [read(index) for index in rows]
        for index, picture in zip(rows, pictures, strict=True):
            if picture.size != self._bytes[index]:
                file = self.data.pictures[index].file
                raise DataError(f"{self.data.name}: {file} changes while it is read; start again")
        pixels = np.stack([np.concatenate([picture.views[view] for picture in pictures]) for view in views])
        return pictures, torch.from_numpy(pixels)

    def _features(self, pixels: Tensor) -> Tensor:
        """Return ``(M, variants, R, D)`` of ``(1 + crops, M, 3, S, S)`` pixels."""
        pixels = pixels.to(self.device)
        if self.flips:
            pixels = torch.stack((pixels, pixels.flip(-1)), 1)
        with torch.inference_mode():
            given = compute(self.network, pixels.reshape(-1, *pixels.shape[-3:]), self.encoder.preprocess)
            return given.unflatten(0, (self.variants, -1)).transpose(0, 1)

    def _halves(self, features: Tensor, rows: Sequence[int], pictures: Sequence[_Picture]) -> np.ndarray:
        """Return ``(N, variants, F * R, D)`` of the features of all frames ``(M, variants, R, D)``."""
        largest = float(features.abs().amax())
        if not math.isfinite(largest):
            finite = features.flatten(1).isfinite().all(1).tolist()
            whose = [index for index, picture in zip(rows, pictures, strict=True) for _ in picture.times]
            file = self.data.pictures[whose[finite.index(False)]].file
            raise DataError(f"{self.data.name}: {self.encoder.name} gives no finite features for {file}")
        if largest > _LARGEST:
            message = f"a feature of {largest:g} is kept as {_LARGEST:g}, the most that 16 bits hold"
            self._say(f"{self.data.name}: {message}")
            features = features.clamp(-_LARGEST, _LARGEST)
        halves = features.half().cpu()
        if self.data.is_video:
            halves = _in_clips(halves.transpose(0, 1), [len(p.times) for p in pictures], self.frames)
            halves = halves.flatten(2, 3).transpose(0, 1)
        return np.ascontiguousarray(halves.numpy())

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            tqdm.write(message, file=sys.stderr)

    def _explain(self, error: OSError) -> DataError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = sum(path.stat().st_size for path in self.folder.glob("[0-9]*.f16"))
            return DataError(
                f"the disk is full at {self.folder}: {_readable(kept)} of {_readable(self.size)} are kept; "
                "make room and start again, name another folder with --cache, or set cache: false"
            )
        return DataError(f"{self.folder}: {error.strerror or error}; name another folder with --cache")


class _ShardWriter:
    """A shard on its way: written from front to back under another name, renamed when it is complete."""

    def __init__(self, path: Path, of_clips: bool) -> None:
        self._path = path
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        self._temporary = Path(name)
        self._file: BinaryIO = os.fdopen(handle, "wb")
        self._content: list[str] = []
        self._fits: list[Fit] = []
        self._times: list[tuple[float, ...]] | None = [] if of_clips else None

    def add(self, features: np.ndarray, pictures: Sequence[_Picture]) -> None:
        """Write ``(N, variants, F * R, D)`` halves."""
        self._file.write(features.data)
        if self._times is not None:
            self._times += [picture.times for picture in pictures]
        self._content += [picture.content for picture in pictures]
        self._fits += [picture.fit for picture in pictures if picture.fit]

    def finish(self, record: Path, modified: list[int]) -> None:
        """Make the shard appear, what is kept beside it first."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        kept = _Record(self._content, modified, self._fits, self._times)
        write_atomically(record, kept.to_bytes())
        os.chmod(self._temporary, 0o644)
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # a full disk may refuse what is still in the buffer
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _in_clips(frames: Tensor, counts: Sequence[int], most: int) -> Tensor:
    """Return ``(…, N, F, R, D)`` of all frames ``(…, M, R, D)``, so many of each clip; the rest is zeros."""
    clips = frames.new_zeros(*frames.shape[:-3], len(counts), most, *frames.shape[-2:])
    for place, part in enumerate(frames.split(list(counts), -3)):
        clips[..., place, : part.shape[-3], :, :] = part
    return clips


def _estimate(bar: tqdm, left: float, seconds: float, done: float) -> None:
    """Say how long it will take, where that is a minute or more."""
    rate = done / seconds
    if left > 60 * rate and not bar.disable:
        message = f"{bar.desc}: about {left / rate / 60:.0f} minutes at {rate:.3g} {bar.unit}s a second"
        bar.write(message, file=sys.stderr)


def _readable(size: float) -> str:
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5 or unit == "GB":
            break
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:,.0f} {unit}"


def same_pictures(a: FeatureCache, b: FeatureCache) -> list[tuple[int, int]]:
    """Return the pairs of indices of pictures with the same bytes: in training and in validation, say."""
    places: dict[str, list[int]] = {}
    for index, content in enumerate(b.content):
        places.setdefault(content, []).append(index)
    return [(i, j) for i, content in enumerate(a.content) for j in places.get(content, ())]


# --------------------------------------------------------------------------------------------------
# Live


class LivePictures(_Frozen):
    """What an encoder's frozen blocks give, computed at every reading; the same calls as `FeatureCache`.

    A pool of threads decodes. Of several threads that read at once each waits for its own pictures only.
    """

    def __init__(
        self,
        data: DataSet,
        encoder: Encoder,
        flips: bool,
        blocks: int | None = None,
        *,
        crops: int = 0,
        frames: int = FRAMES,
        threads: int | None = None,
        half: bool = False,
    ) -> None:
        """Copy the frozen blocks, as they are now.

        Args:
            data: the pictures.
            encoder: features are computed, and returned, on its device.
            flips: whether every other variant is mirrored.
            blocks: give what the first blocks of the network give; None for all: the grid features.
            crops: how many of the views beside the whole picture are crops, drawn anew for every seed.
            frames: of a clip, at most; of no meaning for pictures.
            threads: that decode; None for torch's on a CPU, else this process's share of the cores.
            half: compute in bfloat16, for a GPU.
        """
        super().__init__(data, encoder, flips, blocks, crops, frames)
        self._half = half
        self._threads = threads or (torch.get_num_threads() if self._on_cpu else _cores())
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        self._fits: dict[int, Fit] = {}

    def pixels(self, indices: Sequence[int], variants: Sequence[int], *, seed: str | None = None) -> Tensor:
        """Return uint8 pixels ``(M, 3, S, S)`` on the CPU: of one variant of each item all frames.

        Args:
            indices: of the items.
            variants: one for each item.
            seed: of the crops, together with the item's id; None gives those that a cache holds.

        Raises:
            DataError: if an item cannot be read, naming it.
        """
        preprocess = self.encoder.preprocess
        chosen = [self._view(variant) for variant in variants]

        def one(index: int, view: int) -> _Picture:
            return _read(self.data, index, preprocess, [view], self.frames, seed)

        # on one thread it is the caller's own: there is nothing to gain from a second one
        run: Callable[..., Iterable[_Picture]] = map if self._threads == 1 else self._pool.map
        pictures = list(run(one, indices, [view for view, _ in chosen]))
        size, count = preprocess.size, sum(len(picture.times) for picture in pictures)
        result = torch.empty(count, 3, size, size, dtype=torch.uint8)
        row = 0
        for index, picture, (_, mirrored) in zip(indices, pictures, chosen, strict=True):
            pixels = torch.from_numpy(picture.views[0])
            result[row : row + len(pixels)] = pixels.flip(-1) if mirrored else pixels
            row += len(pixels)
            if self.data.is_video:
                self._times[index] = picture.times
            if picture.fit is not None:
                self._remember(index, picture.fit)
        return result

    def features(self, pixels: Tensor) -> Tensor:
        """Return ``(M, R, D)`` as float32 of uint8 pixels; no gradient flows back."""
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            return compute(self.network, pixels, self.encoder.preprocess).float()

    def read(self, indices: Sequence[int], variants: Sequence[int], *, seed: str | None = None) -> Tensor:
        """Return ``(N, F * R, D)`` as float32 on the encoder's device; see `pixels`."""
        given = self.features(self.pixels(indices, variants, seed=seed))
        if not self.data.is_video:
            return given
        return _in_clips(given, [len(self._times[i]) for i in indices], self.frames).flatten(1, 2)

    def mask(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> Tensor:
        """Return ``(N, F * R)``: the share of each cell that lies on the photo; see `FeatureCache.mask`."""
        if self._masks is not None or self.data.is_video:
            self._know(indices)
        return super().mask(indices, variants)

    def grid_features(self, indices: Sequence[int]) -> GridFeatures:
        """Return the grid features of whole, unmirrored pictures, as ``encode`` would, or of clips."""
        data = self.read(indices, [0] * len(indices))
        return self._grid_features(data, indices, [self._fits[i] for i in indices])

    def _remember(self, index: int, fit: Fit) -> None:
        self._fits[index] = fit
        self._set_mask(index, fit)

    def _know(self, indices: Sequence[int]) -> None:
        """Read the items of which too little is known, because only crops of them were read, or nothing."""
        for index in indices:
            if index not in (self._times if self._masks is None else self._fits):
                read = _read(self.data, index, self.encoder.preprocess, [0], self.frames)
                assert read.fit is not None
                self._remember(index, read.fit)
                self._times[index] = read.times


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
