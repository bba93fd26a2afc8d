"""Text files beside pictures and videos: ``x.txt`` holds the caption of ``x.jpg``, ``x.srt`` the subtitles.

Sidecars have the layout that tools for fine-tuning image generators read: the picture's name with another
suffix, UTF-8 without a byte-order mark, the caption on the first line.
"""

from __future__ import annotations

import os
import tempfile
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from captioner.batch.beside import (
    Mark,
    Plan,
    is_remote,
    one_line,
    read_marks,
    sha256,
    state,
    why_not,
    write_marks,
)

EXISTING = ("keep", "overwrite", "append", "prepend")
"""What becomes of a sidecar that captioner did not write, or that a person has edited."""

_LARGEST = 1 << 20
"""Bytes; what is larger is somebody's text, not a caption."""

_BOM = b"\xef\xbb\xbf"


class SidecarError(ValueError):
    """Options of sidecars that cannot be used; one line."""


class Sidecars:
    """Plans ``x.txt`` beside each picture and video ``x.…``.

    Args:
        existing: what becomes of a sidecar that captioner did not write, or that was edited since: ``keep``
            it, ``overwrite`` it, or ``append`` the caption to what it holds, or ``prepend`` it, with a space
            between unless there is white space already.
        before, after: put around the caption as they are, such as trigger words: ``before="mychar, "``.

    Raises:
        SidecarError: for another ``existing``, or words that are not one line of text.
    """

    name = "sidecar"

    def __init__(self, existing: str = "keep", before: str = "", after: str = "") -> None:
        if existing not in EXISTING:
            raise SidecarError(f"existing must be one of {', '.join(EXISTING)}, not {existing!r}")
        for name, words in (("before", before), ("after", after)):
            if one_line(words) != words.strip():
                raise SidecarError(f"{name} must be one line of plain text, not {words!r:.80}")
        self.existing, self.before, self.after = existing, before, after

    def text(self, record: Mapping[str, Any]) -> str:
        """Return the line that is written for a record; ``""`` if there is nothing to say."""
        caption = one_line(record.get("caption") or "")
        return f"{self.before}{caption}{self.after}" if caption else ""

    def plan(self, path: str, record: Mapping[str, Any], ours: str | None = None) -> Plan:
        """Plan the sidecar of a file.

        Args:
            path: of the picture or video.
            record: of it, see ``docs/records.md``; of a video, the text is that of all segments.
            ours: the digest of the last plan for this file, None if there was none.
        """
        target = sidecar(path)
        text = self.text(record)
        if not text:
            return _kept(target, ours, f"{path}: there is no sidecar: nothing was captioned")
        reason = f"{target} is the file itself" if os.fspath(target) == path else why_not(path, target)
        if reason is not None:
            return _kept(target, ours, f"{path}: there is no sidecar: {reason}")
        return _plan(path, target, text, self.existing, ours, "sidecar")


def sidecar(path: str, suffix: str = ".txt") -> Path:
    """Return where the sidecar of a file is, whether there is one or not."""
    return Path(os.path.splitext(path)[0] + suffix)


def _kept(target: Path, ours: str | None, reason: str) -> Plan:
    return Plan(target, None, ours or "", reason)


def _plan(path: str, target: Path, text: str, existing: str, ours: str | None, what: str) -> Plan:
    """Plan a file that holds a text, and perhaps a person's."""
    seen = state(target)
    own = text.encode()
    alone = own if own.endswith(b"\n") else own + b"\n"
    found = b""
    if seen is not None:
        try:
            # of a large file only as much as it takes to know that it is one
            with open(target, "rb") as file:
                found = file.read(_LARGEST + 1)
        except OSError as error:
            return _kept(target, ours, f"{path}: there is no {what}: {target}: {error.strerror or error}")
    if not found.removeprefix(_BOM).strip():
        return _written(target, found, Mark(sha256(alone)), alone, None, seen)
    digest = sha256(found)
    for mark in read_marks(ours):
        if mark.sha256 == digest and len(found) <= _LARGEST:  # what we wrote, as we wrote it
            if mark.length < 0 or existing == "overwrite":
                return _written(target, found, Mark(sha256(alone)), alone, mark, seen)
            head, tail = found[: mark.start], found[mark.start + mark.length :]
            data = head + own + tail
            return _written(target, found, Mark(sha256(data), mark.start, len(own)), data, mark, seen)
    if found == alone or existing == "overwrite":
        return _written(target, found, Mark(sha256(alone)), alone, None, seen)
    if existing == "keep":
        return _kept(
            target,
            ours,
            f"{path}: {target} exists and is kept: captioner did not write it, or it was edited since",
        )
    try:
        if len(found) > _LARGEST:
            raise UnicodeDecodeError("utf-8", b"", 0, 1, "too large")
        found.decode()
    except UnicodeDecodeError:
        return _kept(target, ours, f"{path}: {target} is kept: it is not a short text in UTF-8")
    if existing == "append":
        head = found.rstrip(b"\r\n")
        tail = found[len(head) :] or b"\n"
        if head.endswith(own):  # the journal was lost, say: nothing is said twice
            return Plan(target, None, str(Mark(digest, len(head) - len(own), len(own))))
        if not head[-1:].isspace() and not own[:1].isspace():
            head += b" "
    else:
        head = _BOM if found.startswith(_BOM) else b""
        tail = found[len(head) :]
        if tail.startswith(own):
            return Plan(target, None, str(Mark(digest, len(head), len(own))))
        if not tail[:1].isspace() and not own[-1:].isspace():
            tail = b" " + tail
    data = head + own + tail
    return _written(target, found, Mark(sha256(data), len(head), len(own)), data, None, seen)


def _written(
    target: Path, found: bytes, mark: Mark, data: bytes, before: Mark | None, seen: tuple[int, ...] | None
) -> Plan:
    """Plan content; what it replaces, if that is ours, stays known until it is replaced."""
    if found == data:
        return Plan(target, None, str(mark))
    return Plan(target, data, write_marks([mark, before] if before else [mark]), seen=seen)


# --- subtitles ------------------------------------------------------------------------------------------


class SubtitleFiles:
    """Plans ``x.srt`` or ``x.vtt`` beside each video; a person's own subtitles are kept.

    Args:
        kind: ``srt`` or ``vtt``.
        existing: ``overwrite`` subtitles that captioner did not write, or that were edited since; the others
            of `EXISTING` keep them, because nothing can be added to them.

    Raises:
        SidecarError: for another kind, or another ``existing``.
    """

    def __init__(self, kind: str, existing: str = "keep") -> None:
        if kind not in ("srt", "vtt"):
            raise SidecarError(f"subtitles are srt or vtt, not {kind!r}")
        if existing not in EXISTING:
            raise SidecarError(f"existing must be one of {', '.join(EXISTING)}, not {existing!r}")
        self.name, self.suffix = kind, f".{kind}"
        self.existing = "overwrite" if existing == "overwrite" else "keep"

    def plan(self, path: str, record: Mapping[str, Any], ours: str | None = None) -> Plan:
        """Plan the subtitles of a video; of a photo there are none, without a reason.

        Args:
            path: of the video.
            record: of it, see ``docs/records.md``.
            ours: the digest of the last plan for this file, None if there was none.
        """
        target = sidecar(path, self.suffix)
        if "segments" not in record:
            return Plan(target, None, ours or "")
        reason = why_not(path, target)
        if reason is not None:
            return _kept(target, ours, f"{path}: there are no subtitles: {reason}")
        text = self._render(record)
        if not text:
            return _kept(target, ours, f"{path}: there are no subtitles: nothing was captioned")
        return _plan(path, target, text, self.existing, ours, "subtitles file")

    def _render(self, record: Mapping[str, Any]) -> str:
        from captioner.subtitles import to_srt, to_webvtt

        return (to_srt if self.suffix == ".srt" else to_webvtt)(_segments(record))


def _segments(record: Mapping[str, Any]) -> list[Any]:
    """Return a record's segments with as much as subtitles need."""
    import numpy as np

    from captioner.caption import Caption, Segment
    from captioner.images import Fit

    nowhere = Fit("squash", 1, 1, (0.0, 0.0, 1.0, 1.0))
    return [
        Segment(
            found["start"],
            found["end"],
            Caption(
                text=found["caption"],
                words=(),
                score=0.0,
                log_probability=0.0,
                confidence=found["confidence"],
                finished=True,
                grid=(1, 1),
                fit=nowhere,
                times=np.zeros(0, np.float32),
            ),
        )
        for found in record["segments"]
    ]


# --- two files that want the same sidecar ---------------------------------------------------------------


def clashes(paths: Iterable[str], suffix: str = ".txt") -> Iterator[str]:
    """Yield a line for each sidecar that two files want, such as ``x.jpg`` and ``x.png``.

    Names that differ in case only clash too, because on many disks they are one. Memory is 16 bytes for each
    path; the paths themselves wait in a temporary file.

    Args:
        paths: of pictures and videos; those on other machines have no sidecars and are passed over.
        suffix: of the sidecars.
    """
    import numpy as np

    targets, files = array("q"), array("q")
    with tempfile.TemporaryFile() as names:
        paths = (path for path in paths if "://" not in path or not is_remote(path))
        while some := list(islice(paths, 1000)):
            targets.extend([hash(_folded(path)) for path in some])
            files.extend(map(hash, some))
            names.write(os.fsencode("\0".join([*some, ""])))
        wanted, who = np.frombuffer(targets, np.int64), np.frombuffer(files, np.int64)
        order = np.lexsort((who, wanted))
        wanted, who = wanted[order], who[order]
        again = (wanted[1:] == wanted[:-1]) & (who[1:] != who[:-1])  # the same file given twice is no clash
        doubled = set(wanted[1:][again].tolist())
        if not doubled:
            return
        names.seek(0)
        groups: dict[str, dict[str, None]] = {}
        for path in _split(names):
            folded = _folded(path)
            if hash(folded) in doubled:
                groups.setdefault(folded, {})[path] = None
        for group in groups.values():
            if len(group) > 1:
                first, *others = group
                yield f"{sidecar(first, suffix)} is wanted by {first} and by {', '.join(others)}"


_NO_STEM = ("", ".", os.sep, os.altsep)


def _folded(path: str) -> str:
    stem, _, suffix = path.rpartition(".")
    if os.sep in suffix or (os.altsep or os.sep) in suffix or stem[-1:] in _NO_STEM:  # the slow way
        stem = os.path.splitext(path)[0]
    return stem.lower() if stem.isascii() else unicodedata.normalize("NFC", stem).casefold()


def _split(names: Any) -> Iterator[str]:
    """Yield the names of a file, which end with NUL."""
    rest = b""
    while block := names.read(1 << 16):
        *whole, rest = (rest + block).split(b"\0")
        yield from map(os.fsdecode, whole)
