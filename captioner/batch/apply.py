"""An edited table of captions, written to sidecars or to the pictures' alt text.

What a person changed in the table replaces what captioner wrote; what a person wrote in a sidecar or a
picture itself is kept. Captioner's own is known by what the journal noted, and by the words that stand in the
table beside the caption.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from captioner.batch.beside import Mark, is_remote, one_line, read_marks, sha256
from captioner.batch.rows import beside, find_column, folded, path_column, read_table, table_columns
from captioner.batch.sidecars import Sidecars, clashes
from captioner.batch.tables import unguard
from captioner.caption import join_words
from captioner.inputs import VIDEO_SUFFIXES

Ours = Callable[[str, str], "str | None"]
"""Path as recorded, and output -> the digest that was noted last."""

Note = Callable[[str, str, Path, str], object]
"""Notes path, output, target and digest."""

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}

SHOWN = 20
"""So many files are named of those that something was wrong with."""

_MAY_MOVE = (".gif", ".webp", ".png", ".apng", ".avif")
"""Suffixes of pictures that may be animations."""

_GAP = 0.1
"""Seconds by which a spreadsheet may have rounded the times of segments that follow each other."""

_THEIRS = "captioner did not write it, or it was edited since"
_UNKNOWN = "nothing tells that captioner wrote it"
_DESCRIBED = "it has an alt text that is kept"


class ApplyError(ValueError):
    """A table that cannot be applied, or impossible options; one line."""


@dataclass(frozen=True)
class Applied:
    """What became of one file of a table.

    Attributes:
        path: as the table has it.
        target: what was written or would have been.
        what: ``written``; ``same`` if it was there already; ``kept`` if somebody's own stands there, or
            nothing can; ``missing`` if there is no such file; ``error`` if it could not be written.
        reason: one line; None if it was written or there.
    """

    path: str
    target: Path
    what: Literal["written", "same", "kept", "missing", "error"]
    reason: str | None = None


def apply_table(
    table: str | os.PathLike[str],
    *,
    to: str = "sidecars",
    column: str = "caption",
    existing: str = "keep",
    before: str = "",
    after: str = "",
    root: str | os.PathLike[str] | None = None,
    ours: Ours | None = None,
    note: Note | None = None,
    dry_run: bool = False,
) -> Iterator[Applied]:
    """Write the captions of a table beside its files, or into them.

    Args:
        table: CSV, TSV, JSON Lines or Parquet, as captioner wrote it and a person edited it; case and spaces
            around columns' names do not count. The segments of a video are joined in order of time; rows may
            be sorted anyhow. A video some of whose segments are missing, or have no time, is left alone.
        to: ``sidecars`` or ``alt-text``.
        column: of the captions.
        existing, before, after: as for `captioner.batch.sidecars.Sidecars`; of no use to alt text.
        root: the folder that relative paths count from; None for the table's if they exist there, else the
            current one.
        ours: tells what was noted of a file. It is asked for ``sidecar`` or ``alt-text``, which is what
            captioner wrote, and for ``sidecar applied`` or ``alt-text applied``, which is what was applied
            before: by that, a table can be edited and applied again, while captioner does not take a person's
            words for its own.
        note: called before a file is written with what is to be noted.
        dry_run: write nothing, and note nothing.

    Returns:
        what becomes of each file, as it happens.

    Raises:
        ApplyError: for impossible options, a table without such columns, or files that want the same sidecar.
            Like a table that is damaged anywhere, that is told before anything is written.
        SidecarError, MetadataError, TableError: as where they come from.
        OSError: the disk is full.
    """
    table = os.fsdecode(table)
    output: Any
    if to == "sidecars":
        output = Sidecars(existing, before, after)
    elif to == "alt-text":
        from captioner.batch.metadata import AltText

        if existing != "keep":
            raise ApplyError("an alt text that a person wrote is never replaced: leave existing out")
        if before or after:
            raise ApplyError("before and after are for sidecars, not for alt text")
        output = AltText()
    else:
        raise ApplyError(f"captions are applied to sidecars or alt-text, not to {to!r}")
    names = table_columns(table)
    paths, captions = path_column(names), find_column(names, column)
    for name, there in ((column, captions), ("path", paths)):
        if there is None:
            raise ApplyError(f"{table}: no column {name}; there are {', '.join(map(one_line, names))}")
    assert paths is not None
    assert captions is not None
    for known in (paths, captions):
        alike = [repr(name) for name in names if folded(name) == folded(known)]
        if len(alike) > 1:
            both = " and ".join(alike[:2])
            raise ApplyError(f"{table}: the columns {both} differ in case or spaces only; rename one")
    where = _Where(table, root)
    several: set[int] = set()
    found = map(where.find, _paths(table, paths, several))
    if to == "sidecars":
        line = next(clashes(found), None)
        if line is not None:
            raise ApplyError(f"{table}: {line}; nothing was written: give each a row in a table of its own")
    else:
        for _ in found:  # to its end
            pass
    entries = _entries(table, folded(paths), folded(captions), several, where)
    return _apply(output, entries, where, ours, note, dry_run)


def _apply(
    output: Any, entries: Iterable[_Entry], where: _Where, ours: Ours | None, note: Note | None, dry_run: bool
) -> Iterator[Applied]:
    applied = f"{output.name} applied"
    for entry in entries:
        path = where.find(entry.path)
        if entry.problem is not None:
            yield Applied(entry.path, Path(path), "error", f"{entry.path}: {entry.problem}")
            continue
        if not is_remote(path) and not os.path.exists(path) and not _inside(path):
            yield Applied(entry.path, Path(path), "missing", f"{entry.path}: there is no such file")
            continue
        if not entry.caption:
            reason = f"{entry.path}: it has no caption in the table, so nothing was changed"
            yield Applied(entry.path, Path(path), "kept", reason)
            continue
        marks = [_mark(output, entry.said)] if entry.said else []
        if ours is not None:
            marks += [ours(where.recorded(entry.path), name) or "" for name in (output.name, applied)]
        record: dict[str, Any] = {"caption": entry.caption, **({"segments": []} if entry.video else {})}
        plan = output.plan(path, record, " ".join(filter(None, marks)) or None)
        if plan.kept is not None:
            reason = plan.kept if ours is not None else plan.kept.replace(_THEIRS, _UNKNOWN)
            yield Applied(entry.path, plan.target, "kept", reason)
            continue
        if plan.data is not None and _shortens(output, entry, plan.target, marks):
            reason = (
                f"{entry.path}: {plan.target} has more segments than the table, so nothing was changed: "
                "give each segment one row, with an empty caption to leave it out"
            )
            yield Applied(entry.path, plan.target, "error", reason)
            continue
        if note is not None and not dry_run:
            note(where.recorded(entry.path), applied, plan.target, plan.digest)
        if plan.data is None:
            yield Applied(entry.path, plan.target, "same")
            continue
        try:
            if not dry_run:
                plan.write()
        except OSError as error:
            if error.errno in _FULL:
                raise
            reason = f"{plan.target}: {error.strerror or error}"
            yield Applied(entry.path, plan.target, "error", reason)
            continue
        yield Applied(entry.path, plan.target, "written")


def _mark(output: Any, said: str) -> str:
    """Return by what captioner's own words would be known."""
    text = f"{output.text({'caption': said})}\n" if isinstance(output, Sidecars) else said
    return str(Mark(sha256(text.encode("utf-8", "replace"))))  # JSON can hold half a surrogate


def _shortens(output: Any, entry: _Entry, target: Path, marks: list[str]) -> bool:
    """Tell whether a sidecar holds captioner's own segments of a video that have no row in the table."""
    if not isinstance(output, Sidecars) or not entry.video or not (entry.said or entry.rows):
        return False
    if not entry.said:
        marks = marks[:1]  # not what a person wrote, who may have put full stops anywhere
    try:
        data = target.read_bytes()
    except OSError:
        return False
    for mark in read_marks(" ".join(filter(None, marks))):
        if mark.sha256 == sha256(data):
            own = data if mark.length < 0 else data[mark.start : mark.start + mark.length]
            text = own.decode("utf-8", "replace").removesuffix("\n")
            text = text.removeprefix(output.before).removesuffix(output.after)
            if not entry.said:
                return len(text.split(". ")) > entry.rows
            return f". {entry.said}. " in f". {text}. " and entry.said != text
    return False


def _inside(path: str) -> bool:
    """Tell whether a path leads into a file, such as an archive."""
    return any(map(os.path.isfile, Path(path).parents))  # which says no where a name is impossible


class _Where:
    """Where the files of a table are."""

    def __init__(self, table: str, root: str | os.PathLike[str] | None) -> None:
        self.table = table
        self.root = None if root is None else os.fsdecode(root)
        self.plain = table.lower().endswith((".csv", ".tsv"))

    def find(self, entry: str) -> str:
        """Return the path of a file."""
        if self.root is not None and not is_remote(entry):
            return os.path.join(self.root, self.recorded(entry))
        return beside(self.table, entry)

    def recorded(self, entry: str) -> str:
        """Return the path as it was recorded, before it was made fit for a table."""
        text = unguard(entry) if self.plain else entry
        return re.sub(r"\\(udc[89a-f][0-9a-f])", lambda match: chr(int(match[1][1:], 16)), text)


@dataclass
class _Entry:
    """A file of a table: its caption, what captioner had said, and what is wrong with its rows.

    ``rows`` counts those of a video that tell where their segment starts.
    """

    path: str
    caption: str
    said: str = ""
    video: bool = False
    rows: int = 0
    problem: str | None = None


def _paths(table: str, paths: str, several: set[int]) -> Iterator[str]:
    """Yield the paths of all rows; put the hashes of those that stand in more than one into ``several``."""
    seen: set[int] = set()
    for row in read_table(table, [paths]):
        path = row[paths]
        if isinstance(path, str) and path:
            (several if hash(path) in seen else seen).add(hash(path))
            yield path


def _entries(table: str, paths: str, column: str, several: Set[int], where: _Where) -> Iterator[_Entry]:
    """Yield the files of a table: photos as they come, then videos, whose segments may stand anywhere.

    Args:
        table: see `apply_table`.
        paths, column: the columns of paths and captions, `folded`.
        several: hashes of paths that stand in more than one row.
        where: the files are.
    """
    plain = table.lower().endswith((".csv", ".tsv"))
    seen: set[int] = set()
    videos: dict[str, list[_Segment]] = {}
    for number, raw in enumerate(read_table(table), 1):
        row = {folded(name): value for name, value in raw.items()}
        path, caption = row.get(paths), row.get(column)
        if not isinstance(path, str) or not path.strip():
            if any(row.values()):  # spreadsheets leave empty rows behind
                yield _Entry(f"{table}: row {number}", "", problem="it has no path")
            continue
        text = "" if caption is None else str(caption)
        text = one_line(unguard(text) if plain else text)
        start, segments = _number(row.get("start")), row.get("segments")
        if not text and row.get("error"):
            videos.setdefault(path, [])  # a video may have a row of its error alone, or before others
            continue
        alone = hash(path) not in several or isinstance(segments, list)
        if start is not None or videos.get(path) or (not alone and _moves(where.find(path))):
            segment = _Segment(start, _number(row.get("end")), text, _said(row))
            videos.setdefault(path, []).append(segment)
            continue
        if hash(path) in seen:
            yield _Entry(path, "", problem="it stands in the table twice; its first row was taken")
            continue
        seen.add(hash(path))
        if isinstance(segments, list):
            yield _whole_video(path, text, segments, column)
        else:
            yield _Entry(path, text, _said(row))
    for path, parts in videos.items():
        if hash(path) in seen:
            if parts:
                yield _Entry(path, "", problem="it stands in the table twice; its first row was taken")
            continue
        yield _joined(path, parts)


def _moves(path: str) -> bool:
    """Tell a video or an animation from a photo."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in VIDEO_SUFFIXES or suffix not in _MAY_MOVE:
        return suffix in VIDEO_SUFFIXES
    from captioner.video import is_video

    return is_video(path)


@dataclass
class _Segment:
    """A row of a video; start and end in seconds, None if the row does not tell."""

    start: float | None
    end: float | None
    caption: str
    said: str


def _joined(path: str, parts: list[_Segment]) -> _Entry:
    """Join the segments of a video in order of time, if it is all of them as far as that can be told."""
    if len(parts) > 1 and any(part.start is None for part in parts):
        reason = (
            f"it has {len(parts)} rows, not all of them with a start, so nothing was changed: "
            "keep the columns start and end, or give it one row with the whole caption"
        )
        return _Entry(path, "", problem=reason)
    parts.sort(key=lambda part: part.start or 0.0)
    for one, other in pairwise(parts):
        if one.end is not None and other.start is not None and abs(other.start - one.end) > _GAP:
            reason = (
                f"one row ends at {one.end:g} s and the next starts at {other.start:g} s, so nothing was "
                "changed: give each segment one row, with an empty caption to leave it out"
            )
            return _Entry(path, "", problem=reason)
    said = [part.said for part in parts]
    return _Entry(
        path,
        ". ".join(part.caption for part in parts if part.caption),
        ". ".join(said) if all(said) else "",
        video=bool(parts),
        rows=sum(part.start is not None for part in parts),
    )


def _whole_video(path: str, text: str, segments: list[Any], column: str) -> _Entry:
    """Take a video of JSON Lines, of which either the whole caption or those of segments were edited."""
    parts = [
        {folded(name): value for name, value in segment.items()}
        for segment in segments
        if isinstance(segment, Mapping)
    ]
    said = [_said(part) for part in parts]
    whole = ". ".join(said) if said and all(said) else ""
    joined = ". ".join(filter(None, (one_line(str(part.get(column) or "")) for part in parts)))
    return _Entry(path, joined if text == whole and joined else text, whole, video=True)


def _number(value: Any) -> float | None:
    """Return seconds, with a decimal comma if a spreadsheet put one there; None for a photo's empty cell."""
    if isinstance(value, str):
        value = value.strip().replace(",", ".")
    try:
        return float(value) if isinstance(value, (str, int, float)) else None
    except (ValueError, OverflowError):  # JSON can hold whole numbers of any size
        return None


def _said(row: Mapping[str, Any]) -> str:
    """Return what captioner had said, which the words still tell when the caption was edited."""
    words = row.get("words")
    if isinstance(words, str):
        try:
            words = json.loads(words)
        except (ValueError, RecursionError):  # spreadsheets cut long cells
            return ""
    if not isinstance(words, list) or not all(
        isinstance(word, Mapping) and isinstance(word.get("word"), str) for word in words
    ):
        return ""
    return join_words([word["word"] for word in words])


# --- the command ----------------------------------------------------------------------------------------


def run_apply(
    table: str | os.PathLike[str],
    *,
    sidecars: bool = False,
    alt_text: bool = False,
    existing: str = "keep",
    before: str = "",
    after: str = "",
    dry_run: bool = False,
    ours: Ours | None = None,
    note: Note | None = None,
) -> int:
    """Do what ``captioner apply`` does, and say on stderr what became of the files.

    Args:
        table, existing, before, after, ours, note, dry_run: see `apply_table`.
        sidecars, alt_text: where captions go; sidecars if neither is given.

    Returns:
        the exit code: 0, or 1 if some file is missing or could not be written.

    Raises:
        ValueError: nothing could be done, with one line.
        OSError: the disk is full.
    """
    from captioner.console import FAILED, say

    if alt_text and (existing != "keep" or before or after) and not sidecars:
        raise ApplyError("--existing, --before and --after are for --sidecars")
    outputs = (["sidecars"] if sidecars or not alt_text else []) + (["alt-text"] if alt_text else [])
    words = {"existing": existing, "before": before, "after": after}
    running = [
        (
            to,
            apply_table(
                table, to=to, ours=ours, note=note, dry_run=dry_run, **(words if to == "sidecars" else {})
            ),
        )
        for to in outputs
    ]  # all are checked before the first writes anything
    failed = untold = False
    for to, found in running:
        counts = dict.fromkeys(("written", "same", "kept", "missing", "error"), 0)
        for applied in found:
            counts[applied.what] += 1
            if applied.reason is not None and counts[applied.what] <= SHOWN:
                say(applied.reason)
            if applied.what == "kept" and ours is None:
                untold |= (applied.reason or "").endswith((_UNKNOWN, _DESCRIBED))
        for what in ("kept", "missing", "error"):
            if counts[what] > SHOWN:
                say(f"and {counts[what] - SHOWN:,} more {_PHRASES[what]}")
        done = "to be written" if dry_run else "written"
        parts = [f"{counts['written']:,} {done}"]
        parts += [f"{counts[what]:,} {_PHRASES[what]}" for what in _PHRASES if counts[what]]
        say(f"{to}: {', '.join(parts)}")
        failed |= bool(counts["missing"] or counts["error"])
    if untold:
        say("what was kept may be captioner's own: the journal of the run tells; name it with --journal FILE")
    return FAILED if failed else 0


_PHRASES = {"same": "as they were", "kept": "kept", "missing": "not found", "error": "in error"}
