"""Files in, captions out: in order, with decoding beside the network, and no bad file stops the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from os import PathLike, fsdecode
from os.path import splitext
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch

from captioner.batch.sources import LISTED, Source, local
from captioner.caption import SCHEMA_VERSION, Caption, Segment, VideoCaption, clock
from captioner.captioner import Captioner
from captioner.encoder import region_shares
from captioner.images import Fit, load
from captioner.inputs import VIDEO_SUFFIXES, ImageError, find_images
from captioner.parallel import ahead
from captioner.video import VideoError, is_video

DEFAULT_BATCH = 32

Given = Union[str, "PathLike[str]", Source]
"""What can be captioned: a file's path, or a source."""
Seed = int | Callable[[str], int]

Look = Callable[..., Any]
"""Called with a photo's square ``(3, size, size)`` uint8, its fit and its caption, in a worker's thread."""


@dataclass(frozen=True, eq=False)
class FileResult:
    """What became of one photo: a caption, or the reason why there is none.

    ``seconds`` is its share of the time that captioning its batch took; ``looked`` what ``look=`` returned.
    """

    path: str
    caption: Caption | None
    error: str | None = None
    seconds: float = 0.0
    looked: Any = None


@dataclass(frozen=True, eq=False)
class ClipResult:
    """What became of one video: captions, or the reason why there are none; both if it ends too early.

    ``seconds`` is how long captioning took; ``looked`` what ``look=`` returned for a frame of its middle.
    """

    path: str
    caption: VideoCaption | None
    error: str | None = None
    seconds: float = 0.0
    looked: Any = None


def to_record(
    result: FileResult | ClipResult, model: str, model_sha256: str | None = None, *, attention: bool = False
) -> dict[str, Any]:
    """Return the record of a file (schema in ``docs/records.md``); without a caption, that is ``""``.

    ``model`` is the model's name, ``model_sha256`` its `captioner.identity.fingerprint`.
    """
    if result.caption is None:
        record: dict[str, Any] = {"schema": SCHEMA_VERSION, "caption": ""}
    else:
        record = result.caption.to_dict(attention=attention)
    return {
        "path": result.path,
        **record,
        "model": model,
        "model_sha256": model_sha256,
        "seconds": float(f"{result.seconds:.3g}"),
        "error": result.error,
    }


def caption_files(
    captioner: Captioner,
    paths: Given | Iterable[Given],
    *,
    batch_size: int = DEFAULT_BATCH,
    prefix: str = "",
    region: Any = None,
    must: Sequence[str | Sequence[str]] = (),
    seed: Seed = 0,
    look: Look | None = None,
    **options: Any,
) -> Iterator[FileResult]:
    """Caption files, in order; memory does not grow with their number.

    On a CPU every core takes a batch of its own from the file to the words: a network for pictures this small
    is faster so than with all cores on one picture. On a GPU the cores decode and the GPU does the rest.

    Args:
        captioner: what captions them.
        paths: the files, or sources (`captioner.batch.sources`).
        batch_size: pictures that go through the network together.
        prefix, must: the same for all pictures, see `Captioner.caption`.
        region: the same box for all pictures, in pixels.
        seed: of sampling; the n-th file is drawn with ``seed + n``, whatever the batches are; or a function
            that returns the seed of a path.
        look: what else is to be made of every photo, see `Look`; results carry it.
        options: see `Captioner.caption`.

    Yields:
        one `FileResult` for each path; unreadable files have an error in the place of a caption.

    Raises:
        ValueError: for impossible options or required words, before any file is read; for a prefix and
            required words that are together too long, with the first batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    captioner.check(must=must, **options)
    if isinstance(paths, (str, PathLike, Source)):
        paths = [paths]
    todo = _numbered(paths, seed)
    return _run(captioner, todo, batch_size, region, look, {"prefix": prefix, "must": must, **options})


def _numbered(paths: Iterable[Given], seed: Seed) -> Iterator[tuple[Source, int]]:
    """Give each source its seed."""
    for number, given in enumerate(paths):
        source = given if isinstance(given, Source) else Source(fsdecode(given), fsdecode(given))
        yield source, seed(source.path) if callable(seed) else seed + number


def find_files(paths: Iterable[str | PathLike[str]], recursive: bool = False) -> list[Path]:
    """Expand files, folders and patterns into photos and videos, as `captioner.inputs.find_images` does.

    Raises:
        ImageError: a folder with neither, or a pattern that matches none; the message names it.
    """
    return find_images(paths, recursive, LISTED)


def caption_media(
    captioner: Captioner,
    paths: Iterable[Given],
    *,
    batch_size: int = DEFAULT_BATCH,
    seed: Seed = 0,
    look: Look | None = None,
    clips: Mapping[str, Any] | None = None,
    progress: Callable[[str, float], object] | None = None,
    said: Callable[[str, Segment], object] | None = None,
    **options: Any,
) -> Iterator[FileResult | ClipResult]:
    """Caption photos and videos, told apart by content, in order; memory does not grow with their number.

    Photos that follow each other go through `caption_files` together. Videos are captioned one after the
    other, because each keeps all cores busy.

    Args:
        captioner: what captions them.
        paths, batch_size, seed: as in `caption_files`.
        look: likewise; of a video it is called with a frame from the middle, the caption of that segment, the
            number of the frame in it, and how many words the segments before have.
        clips: for videos, see `Captioner.caption_video`: ``every``, ``segment``, ``shots``,
            ``start``, ``end``.
        progress: called with a video's path and the seconds of it that have been read.
        said: called with a video's path and a segment as soon as that is captioned.
        options: for both: ``prefix``, ``region``, ``must`` and search options, see `Captioner.caption`.

    Yields:
        a `FileResult` for each photo, a `ClipResult` for each video; with an error if it cannot be read, or
        not to its end.

    Raises:
        ValueError: as `caption_files`.
    """
    captioner.check(**{name: value for name, value in options.items() if name not in ("prefix", "region")})
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    todo = _numbered(paths, seed)
    return _media(captioner, todo, batch_size, look, clips or {}, options, progress, said)


def _media(
    captioner: Captioner,
    todo: Iterator[tuple[Source, int]],
    batch_size: int,
    look: Look | None,
    clips: Mapping[str, Any],
    options: dict[str, Any],
    progress: Callable[[str, float], object] | None,
    said: Callable[[str, Segment], object] | None,
) -> Iterator[FileResult | ClipResult]:
    region = options.get("region")
    for_photos = {name: value for name, value in options.items() if name != "region"}
    for moving, group in groupby(todo, lambda item: _moves(item[0])):
        if not moving:
            yield from _run(captioner, group, batch_size, region, look, for_photos)
            continue
        for source, seed in group:
            try:
                with local(source) as file:
                    clip, interrupted = _caption_clip(
                        captioner, source.path, file, {**clips, **options, "seed": seed}, look, progress, said
                    )
            except ImageError as error:  # in an archive or on another machine, and cannot be read
                clip, interrupted = ClipResult(source.path, None, str(error)), False
            yield clip
            if interrupted:
                raise KeyboardInterrupt


_MAY_MOVE = VIDEO_SUFFIXES | {".gif", ".webp", ".apng"}


def _moves(source: Source) -> bool:
    """Tell a video from a photo by content; what has to be fetched for that, only if its name suggests it."""
    if source.file is not None:
        return is_video(source.file)
    if splitext(source.path)[1].lower() not in _MAY_MOVE:
        return False
    try:
        with local(source) as file:
            return is_video(file)
    except ImageError:  # whoever captions it says so
        return False


def _caption_clip(
    captioner: Captioner,
    path: str,
    file: str,
    options: dict[str, Any],
    look: Look | None,
    progress: Callable[[str, float], object] | None,
    said: Callable[[str, Segment], object] | None,
) -> tuple[ClipResult, bool]:
    """Return what became of a video, and whether a person has stopped it; what was captioned is kept then."""

    def report(seconds: float) -> None:
        if progress is not None:
            progress(path, seconds)

    begun = time.monotonic()
    frames = None
    if look is not None:
        from captioner.batch.page import Frames

        frames = Frames()
        options = {**options, "keep": frames.add}
    segments: list[Segment] = []
    error, interrupted = None, False
    try:
        for segment in captioner.caption_segments(file, progress=report, **options):
            segments.append(segment)
            if said is not None:
                said(path, segment)
    except VideoError as problem:
        error = str(problem).replace(file, path)  # which may have been a copy
    except ValueError as problem:
        # a box that misses one clip must not stop the others
        if options.get("region") is None:
            raise
        error = f"{path}: {problem}"
    except KeyboardInterrupt:
        if not segments:
            raise
        error, interrupted = f"{path}: interrupted at {clock(segments[-1].end)}", True
    caption = VideoCaption(tuple(segments), segments[-1].end, error) if segments else None
    middle = None if frames is None else frames.middle(caption)
    looked = None if look is None or middle is None else look(*middle)
    return ClipResult(path, caption, error, time.monotonic() - begun, looked), interrupted


def _run(
    captioner: Captioner,
    todo: Iterator[tuple[Source, int]],
    batch_size: int,
    region: Any,
    look: Look | None,
    options: dict[str, Any],
) -> Iterator[FileResult]:
    threads = max(1, torch.get_num_threads())

    def read(batch: list[tuple[Source, int]]) -> _Read:
        return _read(captioner, batch)

    def finish(read: _Read) -> list[FileResult]:
        return _finish(captioner, read, region, look, options)

    batches = _batches(todo, batch_size, threads)
    if captioner.device.type == "cpu":
        # set_num_threads holds for the thread that calls it (and for matrix products as a whole)
        single = lambda: torch.set_num_threads(1)  # noqa: E731
        try:
            for results in ahead(lambda batch: finish(read(batch)), batches, threads, single):
                yield from results
        finally:
            torch.set_num_threads(threads)
    else:
        for decoded in ahead(read, batches, threads):
            yield from finish(decoded)


@dataclass(frozen=True, eq=False)
class _Read:
    paths: Sequence[str]
    seeds: Sequence[int]
    pictures: list[tuple[np.ndarray, Fit] | None]
    errors: list[str | None]
    seconds: float


def _read(captioner: Captioner, batch: list[tuple[Source, int]]) -> _Read:
    begun = time.monotonic()
    pictures: list[tuple[np.ndarray, Fit] | None] = []
    errors: list[str | None] = []
    for source, _ in batch:
        try:
            pictures.append(load(source.open(), captioner.model.encoder.preprocess))
            errors.append(None)
        except ImageError as error:
            pictures.append(None)
            errors.append(str(error))
    paths, seeds = [source.path for source, _ in batch], [seed for _, seed in batch]
    return _Read(paths, seeds, pictures, errors, time.monotonic() - begun)


def _finish(
    captioner: Captioner, read: _Read, region: Any, look: Look | None, options: dict[str, Any]
) -> list[FileResult]:
    begun = time.monotonic()
    errors = list(read.errors)
    regions: dict[int, Any] = {}
    good = [i for i, picture in enumerate(read.pictures) if picture is not None]
    if region is not None:
        # a box that misses one picture must not stop the others
        for i in list(good):
            _, fit = read.pictures[i]  # type: ignore[misc]
            try:
                region_shares(region, captioner.model.encoder.grid, fit)
                regions[i] = region
            except ValueError as error:
                errors[i] = f"{read.paths[i]}: {error}"
                good.remove(i)
    captions: dict[int, Caption] = {}
    if good:
        features = captioner.encode_pixels([p for i in good if (p := read.pictures[i]) is not None])
        found = captioner.caption_batch(
            features,
            regions=[regions[i] for i in good] if regions else None,
            seeds=[read.seeds[i] for i in good],
            **options,
        )
        captions = dict(zip(good, found, strict=True))
    looked: dict[int, Any] = {}
    for i, caption in captions.items() if look is not None else ():
        picture = read.pictures[i]
        assert look is not None
        assert picture is not None
        looked[i] = look(*picture, caption)
    seconds = (read.seconds + time.monotonic() - begun) / len(read.paths)
    return [
        FileResult(path, captions.get(i), errors[i] if i not in captions else None, seconds, looked.get(i))
        for i, path in enumerate(read.paths)
    ]


def _batches(
    todo: Iterator[tuple[Source, int]], size: int, threads: int
) -> Iterator[list[tuple[Source, int]]]:
    """Cut into batches; few files are spread over all threads."""
    first = list(islice(todo, size * threads))
    if len(first) < size * threads:
        size = max(1, -(-len(first) // threads))
    todo = chain(first, todo)
    while batch := list(islice(todo, size)):
        yield batch
