"""Batch captioning for scripts: an iterator of records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import identity
from captioner.batch.engines import Seeds, identity_of, local_engine
from captioner.batch.journal import Journal
from captioner.batch.run import Run, errors_of, journal_of
from captioner.batch.sources import Missing, Source, find_sources
from captioner.batch.tables import check_output
from captioner.inputs import printable

if TYPE_CHECKING:
    from captioner.captioner import Captioner

ERRORS = ("record", "skip", "raise")


class CaptionError(ValueError):
    """A file that could not be captioned; one line that names it."""


def caption_records(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    captioner: Captioner | None = None,
    output: str | os.PathLike[str] | None = None,
    errors: str = "record",
    recursive: bool = False,
    column: str | None = None,
    min_confidence: float = 0.0,
    checksum: bool = False,
    progress: bool = False,
    batch_size: int = 32,
    clips: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Caption photos and videos and yield a record for each, in order; memory stays flat.

    Only inputs that stand for nothing may come earlier or later than their turn.

    Args:
        inputs: what `captioner.batch.sources.find_sources` takes: files, folders, patterns, tables, archives,
            addresses.
        captioner: what captions them; None for the built-in model, loaded when it is needed.
        output: a table that is written as well, and makes the work resumable as on the command line: what
            it has already is neither captioned nor yielded again. Its suffix tells the format.
        errors: what becomes of files that cannot be captioned: ``record`` yields their record, whose
            ``error`` says why; ``skip`` leaves them out; ``raise`` ends with a `CaptionError`.
        recursive, column: see `captioner.batch.sources.find_sources`.
        min_confidence, checksum: with ``output``, see `captioner.batch.run.Run`.
        progress: show a bar on standard error.
        batch_size, clips, options: see `captioner.batch.caption_media`.

    Raises:
        CaptionError: with ``errors="raise"``, after what was captioned is written.
        ValueError: for impossible options or places.
        Stopped: with ``output``: the disk is full, or cannot be written.
    """
    if errors not in ERRORS:
        raise ValueError(f"errors must be one of {', '.join(ERRORS)}, not {errors!r}")
    found = find_sources(inputs, recursive=recursive, column=column)
    asked = {"batch_size": batch_size, "clips": clips or {}, **options}
    if options.get("sample"):
        asked["seed"] = Seeds(options.get("seed", 0))  # so that it does not matter where a run was stopped
    loaded = _Loaded(captioner)
    if output is None:
        records = _plain(found, loaded, asked)
    else:
        place = Path(output)
        check_output(place)
        sha = identity.fingerprint(identity.BUILT_IN) if captioner is None else captioner.fingerprint
        name = identity_of(sha, options, clips or {})
        records = _kept(place, name, found, loaded, asked, min_confidence, checksum)
    return _by_policy(records, errors, progress)


class _Loaded:
    """The captioner that was given, or the built-in one when it is needed."""

    def __init__(self, captioner: Captioner | None) -> None:
        self._captioner = captioner

    def __call__(self) -> Captioner:
        if self._captioner is None:
            from captioner.captioner import Captioner

            self._captioner = Captioner.load()
        return self._captioner


def _by_policy(records: Iterator[dict[str, Any]], errors: str, progress: bool) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    with tqdm(records, unit="file", disable=not progress) as shown:
        for record in shown:
            if record["error"] is not None and errors == "raise":
                records.close()  # type: ignore[attr-defined]
                raise CaptionError(record["error"])
            if record["error"] is None or errors == "record":
                yield record


def _plain(
    found: Iterator[Source | Missing], load: _Loaded, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    missing: list[Missing] = []

    def sources() -> Iterator[Source]:
        for item in found:
            if isinstance(item, Missing):
                missing.append(item)
            else:
                yield item

    for finished in local_engine(load(), **options)(sources()):
        yield finished.record
        yield from _missing_records(missing, load)
        missing.clear()
    yield from _missing_records(missing, load)


def _missing_records(missing: Iterable[Missing], load: _Loaded) -> Iterator[dict[str, Any]]:
    for item in missing:
        from captioner.batch.media import FileResult, to_record

        result = FileResult(item.path, None, printable(item.reason))
        yield to_record(result, load().header.name, load().fingerprint)


def _kept(
    place: Path,
    name: str,
    found: Iterator[Source | Missing],
    load: _Loaded,
    options: dict[str, Any],
    min_confidence: float,
    use_checksum: bool,
) -> Iterator[dict[str, Any]]:
    with Journal(journal_of(place)) as journal:
        run = Run(
            journal,
            name,
            output=place,
            errors=errors_of(place),
            min_confidence=min_confidence,
            use_checksum=use_checksum,
        )
        try:
            yield from run.run(found, lambda: local_engine(load(), **options))
        finally:
            run.finish()
        yield from _missing_records([Missing(*item) for item in run.counts.missing], load)
