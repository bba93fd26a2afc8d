"""What captions in other processes: sources travel in chunks, and records come back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from os.path import splitext
from typing import TYPE_CHECKING, Any

from captioner.batch.sources import Held, Source
from captioner.inputs import VIDEO_SUFFIXES

if TYPE_CHECKING:
    from captioner.batch.media import ClipResult, FileResult
    from captioner.captioner import Captioner

MAX_HELD = 2**24
"""Bytes of pictures that travel in a chunk, if they are held in memory; the last may be beyond."""
DEADLY = "whatever process reads it dies; look at it with another program"
"""The reason why a file is refused."""

Record = dict[str, Any]
Chunk = list[tuple[int, Source]]
"""Sources, each with its number in the whole run."""
Facts = tuple[str, str | None]
"""A model's name and `captioner.identity.fingerprint`."""


class WorkersError(ValueError):
    """Those who caption cannot be used, or not any longer; one line that says what to do."""


def cut(sources: Iterable[Source], size: int, workers: int) -> Iterator[Chunk]:
    """Cut into chunks of so many; a video is one of its own, and few files are spread over all workers."""
    numbered = enumerate(sources)
    first: Chunk = []
    held = 0
    for item in islice(numbered, size * workers):
        first.append(item)
        held += _held(item[1])
        if held > MAX_HELD:
            break
    else:
        if len(first) < size * workers:
            size = max(1, -(-len(first) // workers))
    waiting: Chunk = []
    held = 0
    for number, source in chain(first, numbered):
        if splitext(source.path)[1].lower() in VIDEO_SUFFIXES:
            yield [(number, source)]
            continue
        waiting.append((number, source))
        held += _held(source)
        if len(waiting) == size or held > MAX_HELD:
            yield waiting
            waiting, held = [], 0
    if waiting:
        yield waiting


def _held(source: Source) -> int:
    return len(source.data) if isinstance(source, Held) else 0


def caption_chunk(
    captioner: Captioner, chunk: Chunk, options: dict[str, Any], **more: Any
) -> Iterator[Record]:
    """Yield the records of a chunk's sources, in order, as soon as they are there.

    Args:
        captioner: what captions them.
        chunk: the sources.
        options: of `captioner.batch.caption_media`; a number as ``seed`` counts from the run's first source.
        more: ``batch_size``, ``clips``, ``look`` and ``progress`` of that function. With ``look`` records
            have what it returned under ``looked``.
    """
    from captioner.batch.media import caption_media

    seed = options.get("seed", 0)
    if not callable(seed):
        numbers = {source.path: number for number, source in chunk}
        options = {**options, "seed": lambda path: seed + numbers[path]}
    for result in caption_media(captioner, [source for _, source in chunk], **more, **options):
        yield _record(result, facts_of(captioner), more.get("look") is not None)


def facts_of(captioner: Captioner) -> Facts:
    """Return what records tell of the model."""
    return captioner.header.name, captioner.fingerprint


def refuse(source: Source, reason: str, facts: Facts, look: Any = None) -> Record:
    """Return the record of a source that cannot be captioned."""
    from captioner.batch.media import FileResult

    return _record(FileResult(source.path, None, f"{source.path}: {reason}"), facts, look is not None)


def last_line(error: BaseException) -> str:
    """Return the last line of a message: the others may be tracebacks of other processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _record(result: FileResult | ClipResult, facts: Facts, looked: bool) -> Record:
    from captioner.batch.media import to_record

    record = to_record(result, *facts)
    if looked:
        record["looked"] = result.looked
    return record
