"""What a caption is: plain frozen data classes with NumPy inside, no torch.

One record schema serves ``to_dict()``, ``--json``, ``--jsonl``, CSV and every later output;
``docs/records.md`` documents it and `SCHEMA_VERSION` names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from captioner.images import Fit

if TYPE_CHECKING:
    import os

    from PIL import Image

    from captioner.video_overlay import WrittenClip

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Alternative:
    """A word that the model might have said instead, with its probability at that step, 0 to 1."""

    text: str
    probability: float


@dataclass(frozen=True, eq=False)
class Word:
    """One word of a caption and where the model looked for it.

    Attributes:
        text: the word as it stands in the caption.
        probability: the model's probability of the word given what precedes it, 0 to 1; the product
            over its tokens.
        confidence: the calibrated probability that the word is right, 0 to 1; equal to
            ``probability`` for a model without a calibration.
        alternatives: the likeliest words at this place, best first, the chosen one included when it
            is among them.
        attention: ``(F, R)`` float32 weights over frames and cells that sum to 1; the mean over the
            word's tokens; ``None`` when the model has no attention.
        gate: the scalar gate on the context vector, 0 to 1 (Show, Attend and Tell, section 4.2.1);
            ``None`` when the model has none.
        given: whether the word was given by the caller (``prefix=``) and not chosen by the model.
        word_attention: ``(W,)`` float32 weights on the caption's ``guesses``; the rest was on none of them;
            ``None`` when the model has no word memory.
    """

    text: str
    probability: float
    confidence: float
    alternatives: tuple[Alternative, ...] = ()
    attention: np.ndarray | None = None
    gate: float | None = None
    given: bool = False
    word_attention: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Caption:
    """A caption, its words, and what it takes to draw their attention on the photo.

    Attributes:
        text: the sentence in lower case, without a full stop.
        words: its words, left to right.
        score: what the search ranked by: log-probability over the length to the power of the length
            penalty, in nats; given words do not count.
        log_probability: natural logarithm of the caption's probability, the end included and given
            words excluded.
        confidence: 0 to 1, the calibrated share of the caption's content words that people's
            captions of the picture would also contain; comparable across lengths.
        finished: whether the model ended the sentence itself; False when it was cut at the maximum
            length.
        grid: ``(H, W)``, the shape of the CNN's grid; ``R == H * W`` and cells run row by row.
        fit: how the photo was fitted into the network's square.
        times: ``(F,)`` seconds, one for each frame; a photo has one frame at 0.
        n_best: further hypotheses, best first, beginning with this one; empty unless asked for.
        guesses: the W words that the picture brought to mind before the first word was said, likeliest first,
            each with the probability that a caption holds it; empty when the model has no word memory.
    """

    text: str
    words: tuple[Word, ...]
    score: float
    log_probability: float
    confidence: float
    finished: bool
    grid: tuple[int, int]
    fit: Fit
    times: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))
    n_best: tuple[Caption, ...] = ()
    guesses: tuple[Alternative, ...] = ()

    def __str__(self) -> str:
        return self.text

    @property
    def sure(self) -> bool:
        """Whether the confidence reaches `SURE`; below it plain text output hedges."""
        return self.confidence >= SURE

    @property
    def attention(self) -> np.ndarray | None:
        """``(T, F, R)`` float32 attention of all words, or None when the model has no attention."""
        maps = [word.attention for word in self.words]
        if any(m is None for m in maps):
            return None
        if not maps:
            return np.zeros((0, len(self.times), self.grid[0] * self.grid[1]), np.float32)
        return np.stack([m for m in maps if m is not None])

    def to_dict(self, *, attention: bool = False) -> dict[str, Any]:
        """Return the record of this caption, ready for JSON (schema in ``docs/records.md``).

        Args:
            attention: also write every word's attention, as nested lists ``[frame][row][column]``,
                together with the grid and how the photo was fitted.
        """
        record: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "caption": self.text,
            "confidence": _rounded(self.confidence),
            "score": _rounded(self.score),
            "log_probability": _rounded(self.log_probability),
            "finished": self.finished,
            "words": [self._word_record(word, attention) for word in self.words],
            "guesses": [{"word": g.text, "probability": _rounded(g.probability)} for g in self.guesses],
        }
        if attention:
            record["grid"] = list(self.grid)
            record["fit"] = self.fit.to_dict()
            record["times"] = [round(float(t), 3) for t in self.times]
        if self.n_best:
            record["n_best"] = [
                {
                    "caption": other.text,
                    "confidence": _rounded(other.confidence),
                    "score": _rounded(other.score),
                    "log_probability": _rounded(other.log_probability),
                    "finished": other.finished,
                }
                for other in self.n_best
            ]
        return record

    def _word_record(self, word: Word, attention: bool) -> dict[str, Any]:
        record: dict[str, Any] = {
            "word": word.text,
            "probability": _rounded(word.probability),
            "confidence": _rounded(word.confidence),
            "gate": None if word.gate is None else _rounded(word.gate),
            "given": word.given,
            "alternatives": [
                {"word": a.text, "probability": _rounded(a.probability)} for a in word.alternatives
            ],
        }
        if attention:
            cells = word.attention
            record["attention"] = (
                None if cells is None else np.round(cells.astype(float).reshape(-1, *self.grid), 6).tolist()
            )
            named = word.word_attention
            record["word_attention"] = None if named is None else np.round(named.astype(float), 6).tolist()
        return record

    def overlay(self, image: Any, **options: Any) -> Image.Image:
        """Draw the whole caption on one sheet: the photo once for each word with its attention.

        ``image`` is the photo that was captioned (path, bytes, PIL image or array). Options are those
        of `captioner.overlay.sheet`; that module also draws single words, animations, vector figures
        and an HTML page.
        """
        from captioner.overlay import sheet

        return sheet(self, image, **options)


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of a video and its caption.

    Attributes:
        start, end: seconds from the video's first frame.
        caption: what is said of it. ``caption.times`` are seconds from the video's first frame too, and each
            word's attention is ``(F, R)`` over those frames.
    """

    start: float
    end: float
    caption: Caption

    def __str__(self) -> str:
        return f"{clock(self.start)} to {clock(self.end)}: {self.caption.text}"

    @property
    def times(self) -> np.ndarray:
        """``(F,)`` seconds of the frames that the caption was read from."""
        return self.caption.times

    def to_dict(self, *, attention: bool = False) -> dict[str, Any]:
        """Return the record of this segment: start, end, times and what `Caption.to_dict` gives.

        Args:
            attention: also write every word's attention, as nested lists ``[frame][row][column]``.
        """
        caption = self.caption.to_dict(attention=attention)
        del caption["schema"]  # the video's record has it
        return {
            "start": round(float(self.start), 3),
            "end": round(float(self.end), 3),
            "times": [round(float(t), 3) for t in self.times],
            **caption,
        }

    def overlay(self, frames: Sequence[Any], **options: Any) -> Image.Image:
        """Draw a sheet of words × frames: where, and in which frame, the model looked for each word.

        ``frames`` are the pictures at `times`, F of them. Options are those of
        `captioner.video_overlay.frame_sheet`.
        """
        from captioner.video_overlay import frame_sheet

        return frame_sheet(self, frames, **options)


@dataclass(frozen=True, eq=False)
class VideoCaption:
    """What a video shows, segment by segment.

    Attributes:
        segments: in order of time.
        duration: seconds from the clip's first frame to the end of the last that was read.
        error: why it was not read to its end; None if it was.
    """

    segments: tuple[Segment, ...]
    duration: float
    error: str | None = None

    def __str__(self) -> str:
        return "\n".join(map(str, self.segments))

    @property
    def text(self) -> str:
        """All segments' captions as running text, a full stop between them."""
        return ". ".join(segment.caption.text for segment in self.segments)

    @property
    def confidence(self) -> float:
        """The segments' confidence, 0 to 1: their mean, each counting by how long it lasts."""
        if not self.segments:
            return 0.0
        lengths = [max(segment.end - segment.start, 1e-3) for segment in self.segments]
        return float(np.average([segment.caption.confidence for segment in self.segments], weights=lengths))

    def to_dict(self, *, attention: bool = False) -> dict[str, Any]:
        """Return the record of this video, ready for JSON (schema in ``docs/records.md``).

        Args:
            attention: also write the attention of every segment's words.
        """
        return {
            "schema": SCHEMA_VERSION,
            "caption": self.text,
            "confidence": _rounded(self.confidence),
            "duration": round(float(self.duration), 3),
            "segments": [segment.to_dict(attention=attention) for segment in self.segments],
            "error": self.error,
        }

    def overlay(
        self, video: str | os.PathLike[str], path: str | os.PathLike[str], **options: Any
    ) -> WrittenClip:
        """Write the clip with the attention of the word being said on it and the caption below.

        ``video`` is the file that was captioned, ``path`` where the new one goes (``.mp4`` or ``.webm``).
        Options are those of `captioner.video_overlay.write_overlay_clip`.
        """
        from captioner.video_overlay import write_overlay_clip

        return write_overlay_clip(video, self, path, **options)


SURE = 0.3
"""Captions below this confidence are hedged in plain text output."""


def plain_text(caption: Caption) -> str:
    """Return the caption as a person should read it: hedged when the model is not sure."""
    if caption.sure:
        return caption.text
    return f"(not sure what this shows; a guess: {caption.text})"


def clock(seconds: float) -> str:
    """Return a time as people write it: ``0:04``, ``0:04.5``, ``1:02:03``; to a tenth of a second."""
    tenths = max(0, round(seconds * 10))
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{tenths % 10}" if tenths % 10 else ""
    whole = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{whole}:{tenths // 10:02d}{fraction}"


def join_words(words: Sequence[str]) -> str:
    """Join words into a sentence; a piece that begins with an apostrophe attaches to its left."""
    text = ""
    for word in words:
        text += word if word.startswith("'") or not text else f" {word}"
    return text


def _rounded(value: float) -> float:
    """Six significant figures: enough to compare runs, short enough to read."""
    return float(f"{value:.6g}")
