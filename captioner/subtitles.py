"""Subtitles of a captioned video: SubRip (SRT) and WebVTT.

Cues are in order, never overlap and always last at least a millisecond; no cue shows more than two lines of
`LINE` characters. Both formats are UTF-8 with Unix line ends.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from captioner import files
from captioner.caption import Alternative, Caption, Segment, VideoCaption, Word

__all__ = ["merge", "save", "to_srt", "to_webvtt"]

LINE, LINES = 42, 2
"""Characters in a line (wide East Asian ones count twice) and lines in a cue."""

_TOUCH = 0.05  # seconds: neighbours this close follow each other
_FLASH = 1000  # milliseconds that a segment without a duration (one frame) is shown, if there is room


class SubtitleError(ValueError):
    """Segments that cannot be subtitles; one line."""


# --- neighbours that say the same -----------------------------------------------------------------------


def merge(segments: Iterable[Segment], *, gap: float = _TOUCH) -> list[Segment]:
    """Join neighbours that say the same into one segment.

    The joined caption has the frames of all parts, and each word's attention is shared among the parts by
    their number of frames, so that it sums to 1 and every cell keeps its weight relative to an even share.
    Probabilities, scores and gates are means, each part counting by how long it lasts; alternatives and
    guesses are those that all parts name, and further hypotheses are dropped.

    Args:
        segments: in order of time.
        gap: neighbours further apart than this, in seconds, stay apart.

    Returns:
        The segments, as few or fewer. Neighbours whose frames have another size or grid stay apart too.
    """
    joined: list[Segment] = []
    for segment in segments:
        if joined and abs(segment.start - joined[-1].end) <= gap and _alike(joined[-1], segment):
            joined[-1] = _join(joined[-1], segment)
        else:
            joined.append(segment)
    return joined


def _alike(a: Segment, b: Segment) -> bool:
    one, other = a.caption, b.caption
    return (
        one.text == other.text
        and [w.text for w in one.words] == [w.text for w in other.words]
        and [w.attention is None for w in one.words] == [w.attention is None for w in other.words]
        and one.grid == other.grid
        and one.fit == other.fit
    )


def _join(a: Segment, b: Segment) -> Segment:
    one, other = a.caption, b.caption
    lengths = [max(s.end - s.start, 1e-3) for s in (a, b)]
    share = lengths[1] / sum(lengths)
    frames = len(other.times) / max(1, len(one.times) + len(other.times))

    def mean(x: float, y: float) -> float:
        return (1 - share) * x + share * y

    places = {guess.text: place for place, guess in enumerate(other.guesses)}
    shared = [(i, places[guess.text]) for i, guess in enumerate(one.guesses) if guess.text in places]

    def read(x: Word, y: Word) -> np.ndarray | None:
        if x.word_attention is None or y.word_attention is None:
            return None
        weights = [mean(float(x.word_attention[i]), float(y.word_attention[j])) for i, j in shared]
        return np.array(weights, np.float32)

    def word(x: Word, y: Word) -> Word:
        both = None
        if x.attention is not None and y.attention is not None:
            both = np.concatenate([(1 - frames) * x.attention, frames * y.attention]).astype(np.float32)
        known = {alternative.text: alternative.probability for alternative in y.alternatives}
        named = [
            Alternative(alternative.text, mean(alternative.probability, known[alternative.text]))
            for alternative in x.alternatives
            if alternative.text in known
        ]
        return replace(
            x,
            probability=mean(x.probability, y.probability),
            confidence=mean(x.confidence, y.confidence),
            alternatives=tuple(sorted(named, key=lambda alternative: -alternative.probability)),
            attention=both,
            gate=None if x.gate is None or y.gate is None else mean(x.gate, y.gate),
            word_attention=read(x, y),
        )

    caption = replace(
        one,
        words=tuple(map(word, one.words, other.words)),
        score=mean(one.score, other.score),
        log_probability=mean(one.log_probability, other.log_probability),
        confidence=mean(one.confidence, other.confidence),
        finished=one.finished and other.finished,
        times=np.concatenate([one.times, other.times]),
        n_best=(),
        guesses=tuple(
            Alternative(one.guesses[i].text, mean(one.guesses[i].probability, other.guesses[j].probability))
            for i, j in shared
        ),
    )
    return Segment(a.start, b.end, caption)


# --- cues -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cue:
    start: int  # milliseconds
    end: int
    lines: tuple[str, ...]


def _text(caption: Caption) -> str:
    return caption.text if caption.sure else f"(a guess) {caption.text}"


def _cues(segments: Iterable[Segment] | VideoCaption, text: Callable[[Caption], str]) -> Iterator[_Cue]:
    spans: list[tuple[int, int, str]] = []
    if isinstance(segments, VideoCaption):
        segments = segments.segments
    for segment in segments:
        if not (math.isfinite(segment.start) and math.isfinite(segment.end)):
            raise SubtitleError(
                f"a segment from {segment.start} to {segment.end} seconds has no place in time"
            )
        if segment.end < segment.start:
            raise SubtitleError(
                f"a segment ends at {segment.end:g} s, before it starts at {segment.start:g} s"
            )
        said = _one_line(text(segment.caption)) if segment.caption.text else ""
        if said and segment.end >= 0:
            spans.append((max(0, round(segment.start * 1000)), max(0, round(segment.end * 1000)), said))
    spans.sort(key=lambda span: span[:2])  # what starts at the same time: the shorter first

    joined: list[tuple[int, int, str]] = []
    for start, end, said in spans:
        if joined and joined[-1][2] == said and start - joined[-1][1] <= _TOUCH * 1000:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end), said)
        else:
            joined.append((start, end, said))

    free = 0  # where the cue before ends
    for index, (start, end, said) in enumerate(joined):
        start = max(start, free)
        following = joined[index + 1][0] if index + 1 < len(joined) else start + _FLASH + max(0, end - start)
        if following > start:  # otherwise both begin at once, and the next waits for this one's end
            end = min(end if end > start else start + _FLASH, following)
        if end <= start:
            continue  # another cue stands in all of its time
        yield from _parts(start, end, _broken(said))
        free = end


def _parts(start: int, end: int, lines: Sequence[str]) -> Iterator[_Cue]:
    """Share a segment's time among as many cues as its lines need, by their length."""
    pairs = [tuple(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
    if end - start < len(pairs):  # milliseconds; no time to share
        pairs = [tuple(lines)]
    letters = np.cumsum([0] + [sum(map(len, pair)) for pair in pairs])
    edges = [start + int((end - start) * n / letters[-1]) for n in letters]
    for i in range(1, len(edges)):  # at least a millisecond each, from the left and from the right
        edges[i] = max(edges[i], edges[i - 1] + 1)
    edges[-1] = end
    for i in range(len(edges) - 2, 0, -1):
        edges[i] = min(edges[i], edges[i + 1] - 1)
    for i, pair in enumerate(pairs):
        yield _Cue(edges[i], edges[i + 1], pair)


def _one_line(text: str) -> str:
    """Drop line breaks, control characters and lone surrogates, none of which a cue may hold."""
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    return " ".join(kept.split())


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _broken(text: str) -> list[str]:
    """Break text into as few lines of at most `LINE` as it takes, about equally long."""
    words: list[str] = []
    for word in text.split():
        piece = ""
        for letter in word:  # a word wider than a line is cut; scripts without spaces are one such word
            if _width(piece + letter) > LINE:
                words.append(piece)
                piece = ""
            piece += letter
        words.append(piece)
    lines = _greedy(words, LINE)
    for width in range(max(map(_width, words)), LINE):
        narrower = _greedy(words, width)
        if len(narrower) == len(lines):
            return narrower
    return lines


def _greedy(words: Sequence[str], width: int) -> list[str]:
    lines = [words[0]]
    for word in words[1:]:
        longer = f"{lines[-1]} {word}"
        if _width(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


# --- formats --------------------------------------------------------------------------------------------


def to_srt(segments: Iterable[Segment] | VideoCaption, *, text: Callable[[Caption], str] = _text) -> str:
    """Write segments as SubRip.

    SubRip has no escapes, and players take ``<…>`` and ``{\\…}`` for markup: such brackets become ``‹``,
    ``›`` and ``(``. Cues that follow each other and say the same are one; a longer text is shown two lines at
    a time.

    Args:
        segments: in any order; where two overlap, the earlier ends when the later begins.
        text: what to show of a caption; by default its text, with "(a guess)" before it when the model is not
            sure.

    Returns:
        The file's text: ``""`` without segments.

    Raises:
        SubtitleError: a segment ends before it starts, or its times are not finite.
    """
    blocks = []
    for number, cue in enumerate(_cues(segments, text), 1):
        said = "\n".join(cue.lines).replace("<", "‹").replace(">", "›").replace("{\\", "(\\")
        blocks.append(f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n{said}\n")
    return "\n".join(blocks)


def to_webvtt(segments: Iterable[Segment] | VideoCaption, *, text: Callable[[Caption], str] = _text) -> str:
    """Write segments as WebVTT, for the ``<track>`` of an HTML ``<video>``.

    Arguments and errors are those of `to_srt`; ``&``, ``<`` and ``>`` are escaped.

    Returns:
        The file's text: only its header without segments.
    """
    blocks = ["WEBVTT\n"]
    for cue in _cues(segments, text):
        said = "\n".join(cue.lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        blocks.append(f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n{said}\n")
    return "\n".join(blocks)


def _time(milliseconds: int, mark: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{mark}{milliseconds:03d}"


_FORMATS = {".srt": to_srt, ".vtt": to_webvtt}


def save(
    segments: Iterable[Segment] | VideoCaption,
    path: str | os.PathLike[str],
    *,
    text: Callable[[Caption], str] = _text,
) -> Path:
    """Write subtitles in the format that the path's suffix names, all at once or not at all.

    Args:
        segments: see `to_srt`.
        path: ends in ``.srt`` or ``.vtt``; an existing file is replaced.
        text: see `to_srt`.

    Returns:
        The path.

    Raises:
        SubtitleError: another suffix, or as for `to_srt`.
        OSError: the file cannot be written.
    """
    path = Path(path)
    render = _FORMATS.get(path.suffix.lower())
    if render is None:
        raise SubtitleError(f"cannot tell a format from {path.name!r}: the suffix must be .srt or .vtt")
    return files.save(path, render(segments, text=text).encode())
