"""Show when and where the model looked in a video: a sheet of words × frames, and the clip itself.

The colours are those of `captioner.overlay`: a cell's colour says how many times its even share of the
attention it got, here of all cells of all frames. A frame from which a word took little stays uncoloured.

Clips are read and written by PyAV (``pip install "captioner[video]"``), which is imported only then. ``.mp4``
holds H.264 and AAC, ``.webm`` VP9 and Opus; browsers play both. The H.264 encoder, x264, is licensed under
the GPL and comes inside PyAV's wheels; the encoders of ``.webm`` have BSD licences.
"""

from __future__ import annotations

import errno
import math
import os
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from captioner import video
from captioner.caption import Caption, Segment, VideoCaption, Word, clock
from captioner.inputs import kind_of
from captioner.overlay import (
    _FAINT,
    _INK,
    _MUTED,
    _PAPER,
    _TRACK,
    _chance,
    _clean,
    _lines,
    _measure,
    _meter,
    _Page,
    _sentence,
    _shorten,
    _standing,
    _to_image,
    _View,
    _wrap,
    scale,
)

__all__ = ["VideoOverlayError", "WrittenClip", "frame_sheet", "spoken", "write_overlay_clip"]

_NARROW, _WIDE = 96, 240  # pixels: how wide a sheet draws its frames when it is free to choose
_LEAST = 24
_MOST_WORDS = 200  # rows of a sheet; no caption is that long


class VideoOverlayError(ValueError):
    """A clip that cannot be drawn or written; one line that names it, the reason, and what to do."""


# --- the sheet ------------------------------------------------------------------------------------------


def frame_sheet(
    segment: Segment,
    frames: Sequence[Any],
    *,
    width: int | None = None,
    smooth: bool = True,
    top: float | None = None,
) -> Image.Image:
    """Draw words × frames: a row for each word, a column for each frame, the word's heat in each.

    The first row holds the frames themselves under their times. The bar below a picture is as long as the
    share of the word's attention that this frame got, the tick on it an even share. All bars have one scale,
    which the sheet names, and so have all colours.

    Args:
        segment: what was captioned.
        frames: F pictures, those at ``segment.times``: RGB arrays, PIL images or paths, or objects that
            have such a picture as ``image``.
        width: of the sheet in pixels; by default as wide as the frames take.
        smooth: interpolate between the cells' centres; False draws the bare cells.
        top: the multiple of an even share that gets the strongest colour; by default
            `captioner.overlay.scale` of the caption.

    Returns:
        An RGB picture.

    Raises:
        ValueError: not one picture for each time, a picture of another shape than the captioned ones or that
            cannot be decoded, or a width that leaves less than 24 pixels for a frame.
    """
    caption, times = segment.caption, segment.times
    if len(frames) != len(times):
        raise VideoOverlayError(f"{len(frames)} pictures for a caption of {len(times)} frames")
    count = len(frames)
    unit = 1.0 if width is None else min(1.0, max(0.6, width / 900))
    margin, gap, head = 24 * unit, 8 * unit, 150 * unit
    if width is None:
        cell = max(_NARROW, min(_WIDE, 1300 // max(1, count)))
        width = max(480, math.ceil(2 * margin + head + count * (cell + gap)))
    else:
        cell = int((width - 2 * margin - head) / max(1, count) - gap)
        if cell < _LEAST:
            need = math.ceil(2 * margin + head + count * (_LEAST + gap))
            raise VideoOverlayError(f"width is {width}; {count} frames need at least {need} pixels")
    top = scale(caption) if top is None else float(top)
    pictures = [getattr(frame, "image", frame) for frame in frames]
    views = [_View(caption, p, max(160, 2 * cell), i, smooth, top) for i, p in enumerate(pictures)]
    room = width - 2 * margin
    page = _Page(width)

    y = margin * 0.6
    big, small = 24 * unit, 13 * unit
    for line in _lines(_clean(caption.text) if caption.words else "(no words)", big, room):
        y += big * 1.2
        page.text(margin, y, line, big)
    y += small * 1.7
    span = f"{clock(segment.start)} to {clock(segment.end)}, "
    for line in _lines(span + _standing(caption, None), small, room):
        page.text(margin, y, line, small, _MUTED)
        y += small * 1.3

    sizes = [view.within(cell, cell * 1.8) for view in views]
    high = max((size[1] for size in sizes), default=0)
    longest = _longest_bar(caption)
    rows: list[Word | None] = [None, *caption.words[:_MOST_WORDS]]
    for word in rows:
        y += small * 1.2 if word is None else 0
        middle = round(y) + high / 2
        if word is not None:
            _head(page, margin, middle, head - 14 * unit, word, unit)
        shares = None if word is None else _shares(word, count)
        for i, (view, size) in enumerate(zip(views, sizes, strict=True)):
            x = round(margin + head + i * (cell + gap))
            if word is None:
                time = _shorten(clock(times[i]), small, cell + gap)
                page.text(x + cell / 2, round(y) - 4 * unit, time, small, _INK, "m")
            view.draw(page, x + (cell - size[0]) // 2, round(y), size, word)
            if shares is not None:
                _bar(page, x, round(y) + high + 4 * unit, cell, shares[i], longest, 1 / count, unit)
        y += high + (12 if word is None else 20) * unit
    y += 4 * unit
    if views:
        if views[0].attends:
            label = (
                f"bar: share of the word's attention in this frame; full length {longest:.0%}, "
                f"tick {1 / count:.1%} = an even share"
            )
            y += page.note(margin, y, label, small, room) + 6 * unit
        y += views[0].legend(page, margin, y, room, unit)
    page.height = math.ceil(y + margin * 0.6)
    return _to_image(page)


def _head(page: _Page, x: float, middle: float, width: float, word: Word, unit: float) -> None:
    big, small = 17 * unit, 13 * unit
    page.text(x, middle, _shorten(_clean(word.text), big, width), big)
    page.text(x, middle + small * 1.4, _chance(word), small, _MUTED)
    _meter(page, x, middle + small * 1.9, width * 0.6, word, unit)


def _shares(word: Word, frames: int) -> np.ndarray | None:
    """Return ``(F,)`` shares of a word's attention, frame by frame, or None without attention."""
    if word.attention is None:
        return None
    return np.asarray(word.attention, np.float64).reshape(frames, -1).sum(1)


def _longest_bar(caption: Caption) -> float:
    """Return the share that a full bar means: the largest of any word, rounded up."""
    shares = [_shares(word, len(caption.times)) for word in caption.words]
    peak = max((float(s.max()) for s in shares if s is not None), default=1.0)
    return next((full for full in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75) if peak <= full), 1.0)


def _bar(
    page: _Page, x: float, y: float, width: float, share: float, full: float, even: float, unit: float
) -> None:
    thick = max(3, round(5 * unit))
    page.box(x, y, width, thick, _TRACK)
    long = width * min(share / full, 1.0)
    if long >= 0.5:
        page.box(x, y, long, thick, _MUTED)
    page.box(x + width * min(even / full, 1.0), y - 1, 1, thick + 2, _INK, 0.8)


# --- words in time --------------------------------------------------------------------------------------


def spoken(segment: Segment) -> np.ndarray:
    """Return when each word is said if the caption takes the whole segment: ``(T + 1,)`` seconds.

    Word ``i`` lasts from item ``i`` to item ``i + 1``; long words take longer than short ones.
    """
    weights = [len(word.text) + 2 for word in segment.caption.words]
    shares = np.cumsum([0, *weights]) / max(1, sum(weights))
    return segment.start + shares * (segment.end - segment.start)


class _Timeline:
    """Which segment and which word a moment belongs to."""

    def __init__(self, caption: VideoCaption):
        self.segments = sorted(caption.segments, key=lambda segment: segment.start)
        self._starts = [segment.start for segment in self.segments]
        self._words = [spoken(segment) for segment in self.segments]

    def at(self, time: float) -> tuple[int, int] | None:
        """Return the segment and the word being said (-1 if it has none), or None between segments."""
        index = bisect_right(self._starts, time) - 1
        if index < 0 or time >= self.segments[index].end:
            return None
        edges = self._words[index]
        return index, min(bisect_right(edges.tolist(), time), len(edges) - 1) - 1


# --- what lies on and below the picture -----------------------------------------------------------------


class _Drawing:
    """Draws a clip's frames: the heat of the word being said on them and the caption below."""

    def __init__(self, caption: VideoCaption, size: tuple[int, int], smooth: bool, top: float | None):
        self.size = size
        # even: yuv420p halves both sides
        self.width = max(_NARROWEST, size[0] + size[0] % 2)
        self._timeline = _Timeline(caption)
        self._unit = max(0.75, self.width / 800)
        if top is None:
            top = max((scale(segment.caption) for segment in caption.segments), default=4.0)
        # a blank picture: a view is used for its colours and its scale, frames come later
        self._views = [
            _View(
                segment.caption,
                Image.new("RGB", (segment.caption.fit.width, segment.caption.fit.height)),
                max(160, size[0]),
                0,
                smooth,
                top,
            )
            for segment in self._timeline.segments
        ]
        self._strips: tuple[tuple[int, int], Image.Image, tuple[float, float, float]] | None = None
        self._heat: tuple[tuple[int, int, int], Image.Image, Image.Image] | None = None
        self._lines = max(
            (len(self._wrapped(s.caption)) for s in self._timeline.segments if s.caption.words), default=1
        )
        pages = [self._strip(index, -1)[0] for index in range(len(self._views))]
        strip = max((page.height for page in pages), default=math.ceil(60 * self._unit))
        self.strip = strip + (size[1] + strip) % 2

    @property
    def height(self) -> int:
        """Of the whole picture, strip included; even."""
        return self.size[1] + self.strip

    def frame(self, picture: Image.Image, time: float) -> Image.Image:
        """Return the frame to be written: RGB, ``(width, height)``, for an RGB picture of ``size``."""
        canvas = Image.new("RGB", (self.width, self.height), _PAPER)
        now = self._timeline.at(time)
        below = None
        if now is not None:
            picture = self._heated(picture, *now, time)
            below = self._below(*now, time)
        left = (self.width - self.size[0]) // 2
        canvas.paste(picture, (left, 0))
        if self.width == self.size[0] + 1:
            edge = picture.crop((self.size[0] - 1, 0, *self.size))
            canvas.paste(edge, (self.size[0], 0))
        if below is not None:
            canvas.paste(below, (0, self.size[1]))
        return canvas

    def _heated(self, picture: Image.Image, index: int, word: int, time: float) -> Image.Image:
        view, segment = self._views[index], self._timeline.segments[index]
        attention = segment.caption.words[word].attention if word >= 0 else None
        if attention is None:
            return picture
        frame = int(np.abs(np.asarray(segment.times, np.float64) - time).argmin())
        if self._heat is None or self._heat[0] != (index, word, frame):
            view.frame = frame
            heat = view.heat(self.size, attention)
            self._heat = (index, word, frame), heat.convert("RGB"), heat.getchannel("A")
        picture = view.dimmed(picture)
        picture.paste(self._heat[1], (0, 0), self._heat[2])
        return picture

    def _below(self, index: int, word: int, time: float) -> Image.Image:
        if self._strips is None or self._strips[0] != (index, word):
            page, track = self._strip(index, word)
            page.height = self.strip
            self._strips = (index, word), _to_image(page), track
        _, strip, (x, y, width) = self._strips
        segment = self._timeline.segments[index]
        if not width or segment.end <= segment.start:
            return strip
        strip = strip.copy()
        at = x + width * (time - segment.start) / (segment.end - segment.start)
        high = _TRACK_HEIGHT * self._unit
        thick = max(2, round(2 * self._unit))
        ImageDraw.Draw(strip).rectangle(
            (round(at), round(y - 2 * self._unit), round(at) + thick - 1, round(y + high + 2 * self._unit)),
            fill="#b35a00",
        )
        return strip

    def _wrapped(self, caption: Caption) -> list[Any]:
        room = self.width - 2 * 14 * self._unit
        return _wrap([_clean(word.text) for word in caption.words], 21 * self._unit, room)

    def _strip(self, index: int, current: int) -> tuple[_Page, tuple[float, float, float]]:
        """Return the page below the picture, and left, top and width of the line of time on it."""
        segment, view, unit = self._timeline.segments[index], self._views[index], self._unit
        caption = segment.caption
        pad, big, small = 14 * unit, 21 * unit, 12 * unit
        page = _Page(self.width)
        y = 4 * unit
        _sentence(page, caption, current, pad, y, big, unit)
        y += self._lines * big * 1.4 + 16 * unit
        track = (0.0, 0.0, 0.0)
        room = self.width - 2 * pad
        if view.attends:
            track = self._line_of_time(page, segment, current, pad, y, room)
            y += (_TRACK_HEIGHT + 8) * unit
        else:
            page.text(pad, y + small, _shorten(_standing(caption, None), small, room), small, _MUTED)
            y += small * 1.6
        y += view.legend(page, pad, y, room, unit)
        page.height = math.ceil(y + 6 * unit)
        return page, track

    def _line_of_time(
        self, page: _Page, segment: Segment, current: int, pad: float, y: float, room: float
    ) -> tuple[float, float, float]:
        """Draw from which moments of the segment the word came, a bar for each frame."""
        unit = self._unit
        small, high = 12 * unit, _TRACK_HEIGHT * unit
        caption = segment.caption
        label, standing = "attention over time", _standing(caption, None)
        base = y + high / 2 + small * 0.36
        left = _measure(label, small) + 12 * unit
        right = _measure(standing, small) + 12 * unit
        if left + right + 140 * unit > room:
            right = 0.0
        if left + 100 * unit > room:
            label, left = "", 0.0
        if label:
            page.text(pad, base, label, small, _MUTED)
        if right:
            page.text(pad + room, base, standing, small, _MUTED, "r")
        x, width = pad + left, room - left - right
        page.box(x, y + high - 1, width, max(1, round(unit)), _FAINT)
        shares = _shares(caption.words[current], len(segment.times)) if current >= 0 else None
        length = segment.end - segment.start
        if shares is not None and length > 0:
            longest = _longest_bar(caption)
            wide = max(2.0, min(0.7 * width / len(shares), 10 * unit))
            for time, share in zip(segment.times, shares, strict=True):
                at = x + width * min(max((float(time) - segment.start) / length, 0.0), 1.0)
                at = min(max(at - wide / 2, x), x + width - wide)
                tall = high * min(float(share) / longest, 1.0)
                if tall >= 0.5:
                    page.box(at, y + high - tall, wide, tall, _MUTED)
        return x, y, width


_NARROWEST = 240  # pixels: narrower pictures get paper at their sides, or no caption could be read
_TRACK_HEIGHT = 18


# --- reading --------------------------------------------------------------------------------------------


def _pyav() -> ModuleType:
    try:
        import av
        import av.error
        import av.stream
        import av.video.reformatter
    except ImportError as error:
        raise ImportError('drawing on clips needs PyAV: pip install "captioner[video]"') from error
    return av


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


@dataclass
class _Shot:
    """A picture of a clip, upright, with its time in units of the clip's time base."""

    picture: Image.Image
    time: int | None
    duration: int | None


class _Animation:
    """A GIF, WebP, PNG or AVIF file, read by Pillow."""

    sound = None
    ratio = Fraction(1)
    time_base = Fraction(1, 1000)

    def __init__(self, path: Path):
        self.cut: str | None = None
        self._frames = video.frames(path, every=0)
        self._ahead = list(islice(self._frames, 2))
        self._path = path
        self.rate = Fraction(10)
        if len(self._ahead) > 1:
            self.rate = Fraction(1000, max(1, round(1000 * self._ahead[1].time)))

    def __iter__(self) -> Iterator[_Shot]:
        last = 0.0
        try:
            for frame in chain(self._ahead, self._frames):
                last = frame.time
                yield _Shot(Image.fromarray(frame.image), round(1000 * last), None)
        except video.VideoError as error:
            self.cut = str(error)

    def rest(self, last: float) -> float:
        """Return how long the last frame, shown from ``last``, stays: seconds."""
        return video.duration(self._path) - last

    def close(self) -> None:
        self._frames.close()


class _Video:
    """A video file, read by PyAV; iterates over `_Shot` and the sound's packets as they lie in the file."""

    def __init__(self, av: ModuleType, path: Path):
        self._av = av
        self.cut: str | None = None
        try:
            # "file:" and the list of protocols: no name or playlist may reach anything but local files
            self._container = av.open(f"file:{path}", options={"protocol_whitelist": "file"})
        except (av.error.FFmpegError, OSError) as error:
            raise VideoOverlayError(f"{path}: not a video that can be read ({_reason(error)})") from error
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        best = self._container.streams.best("video")
        if not streams or best is None:
            self.close()
            raise VideoOverlayError(f"{path}: there is no video in this file")
        self.stream = best if best in streams else streams[0]
        if self.stream.codec_context is None:
            self.close()
            raise VideoOverlayError(f"{path}: PyAV has no decoder for this video")
        self.stream.thread_type = "AUTO"
        self.sound = self._container.streams.best("audio", related=self.stream)
        if self.sound is not None and self.sound.codec_context is None:
            self.sound = None
        self.time_base = _fine(self.stream.time_base)
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.rate = rate if rate and 0 < rate <= 480 else Fraction(25)
        self.ratio = Fraction(self.stream.sample_aspect_ratio or 1)  # of a pixel, as stored
        if self.ratio <= 0:
            self.ratio = Fraction(1)
        self._turned = False
        # one for all frames: the tables for high dynamic range take seconds to make
        self._reformat = av.video.reformatter.VideoReformatter().reformat

    def __iter__(self) -> Iterator[Any]:
        streams = [self.stream] if self.sound is None else [self.stream, self.sound]
        error = self._av.error.FFmpegError
        packets = self._container.demux(streams)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except error as reason:
                self.cut = _reason(reason)
                return
            if packet.stream is not self.stream:
                yield packet
                continue
            try:
                frames = packet.decode()
            except error as reason:  # a damaged packet; those after it may be whole
                self.cut = _reason(reason)
                continue
            for frame in frames:
                yield self._shot(frame)

    def rest(self, last: float) -> float:
        """Return how long the last picture stays if it does not say so itself: seconds."""
        return float(1 / self.rate)

    def _shot(self, frame: Any) -> _Shot:
        options: dict[str, Any] = {"format": "rgb24", "threads": 1}
        if frame.color_trc in (16, 18):  # PQ and HLG: high dynamic range, to be mapped to what pictures hold
            options.update(dst_color_trc=1, dst_color_primaries=1)
        pixels = self._reformat(frame, **options).to_ndarray()
        turns = round(frame.rotation / 90) % 4
        if turns:
            pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        if turns % 2 and not self._turned:
            self._turned, self.ratio = True, 1 / self.ratio
        step = Fraction(frame.time_base or self.stream.time_base) / self.time_base
        time = None if frame.pts is None else round(frame.pts * step)
        return _Shot(Image.fromarray(pixels), time, round(frame.duration * step) or None)

    def close(self) -> None:
        self._container.close()


def _fine(base: Fraction | None) -> Fraction:
    """Return a time base that divides the given one and counts at least milliseconds."""
    if not base or base <= 0 or base.denominator > 1_000_000:
        return Fraction(1, 90_000)
    return base / math.ceil(base * 1000)


def _open(av: ModuleType, path: Path) -> _Video | _Animation:
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise VideoOverlayError(f"{path}: cannot be read ({_reason(error)})") from error
    return _Video(av, path) if kind_of(head) is None else _Animation(path)


# --- writing --------------------------------------------------------------------------------------------

# container: video encoders by preference with their options, the sound that is copied, the sound's encoder
_FORMATS: dict[str, tuple[str, dict[str, dict[str, str]], tuple[str, ...], str]] = {
    ".mp4": (
        "mp4",
        {"libx264": {"crf": "20", "preset": "veryfast"}, "libopenh264": {}},
        ("aac",),
        "aac",
    ),
    ".webm": (
        "webm",
        {"libvpx-vp9": {"crf": "31", "b": "0", "deadline": "realtime", "cpu-used": "7", "row-mt": "1"}},
        ("opus", "vorbis"),
        "libopus",
    ),
}
_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass(frozen=True)
class WrittenClip:
    """What `write_overlay_clip` wrote.

    Attributes:
        path: the file.
        size: ``(width, height)`` in pixels, both even, the caption's strip included.
        picture: ``(width, height)`` in pixels of the picture within it, upright, from the top.
        frames: how many.
        duration: in seconds, of the pictures.
        sound: ``"copied"``, ``"converted"`` or None for a silent clip.
        notes: lines for a person: what differs from the original, if anything.
    """

    path: Path
    size: tuple[int, int]
    picture: tuple[int, int]
    frames: int
    duration: float
    sound: str | None
    notes: tuple[str, ...] = ()


def write_overlay_clip(
    clip: str | os.PathLike[str],
    caption: VideoCaption,
    path: str | os.PathLike[str],
    *,
    smooth: bool = True,
    top: float | None = None,
    progress: Callable[[float], object] | None = None,
) -> WrittenClip:
    """Write the clip with the attention of the word being said on it and the caption in a strip below.

    A segment's words share its time (`spoken`). Each picture shows the word's attention in the sampled frame
    that is nearest in time; below the caption stands how much of the word's attention each sampled frame got,
    with a mark at the present. Pictures outside all segments are left as they are.

    Pictures keep their size, their times (a variable rate too) and their shape on the screen; rotation is
    applied, high dynamic range mapped to standard. Both sides of the result are even, as H.264 wants them: an
    odd width gets one more column, and the strip makes the height even. Clips less than 240 pixels wide get
    blank margins at their sides. Sound is copied where the new file can hold it, else converted. Metadata
    (such as where the clip was taken) is not carried over.

    Args:
        clip: the file that was captioned: what FFmpeg reads, or an animation.
        caption: what it shows; times are seconds from its first frame.
        path: ends in ``.mp4`` (H.264 and AAC) or ``.webm`` (VP9 and Opus); an existing file is replaced when
            the new one is complete.
        smooth: interpolate between the cells' centres; False draws the bare cells.
        top: the multiple of an even share that gets the strongest colour; by default the largest
            `captioner.overlay.scale` of the segments.
        progress: called after each picture with the seconds of video that are done.

    Returns:
        What was written.

    Raises:
        VideoOverlayError: the clip cannot be read or is not the captioned one, another suffix, or no
            encoder for it.
        ImportError: without PyAV; the message says what to install.
        OSError: the file cannot be written.
    """
    clip, path = Path(clip), Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise VideoOverlayError(f"cannot tell a format from {path.name!r}: the suffix must be .mp4 or .webm")
    with suppress(OSError):
        if path.samefile(clip):
            raise VideoOverlayError(f"{path}: this would replace the clip itself; choose another name")
    av = _pyav()
    source = _open(av, clip)
    try:
        return _Copy(av, source, clip, caption, path, smooth, top, progress).run()
    finally:
        source.close()


class _Copy:
    """One run of `write_overlay_clip`: reads, draws and writes a picture at a time."""

    def __init__(
        self,
        av: ModuleType,
        source: _Video | _Animation,
        clip: Path,
        caption: VideoCaption,
        path: Path,
        smooth: bool,
        top: float | None,
        progress: Callable[[float], object] | None,
    ):
        self._av, self._source, self._clip, self._path = av, source, clip, path
        self._caption, self._smooth, self._top, self._progress = caption, smooth, top, progress
        self._notes: list[str] = []
        self._held: _Shot | None = None  # the latest picture, until the next one tells how long it lasts
        self._first = 0  # when the first picture is shown, by the source's clock
        self._frames = 0
        self._end = 0
        self._durations: dict[int, int] = {}
        self._sound: _Sound | None = None

    def run(self) -> WrittenClip:
        events = iter(self._source)
        early: list[Any] = []  # sound before the first picture
        first = None
        for event in events:
            if isinstance(event, _Shot):
                first = event
                break
            early.append(event)
        if first is None:
            reason = f" ({self._source.cut})" if self._source.cut else ""
            raise VideoOverlayError(f"{self._clip}: no picture in it can be decoded{reason}")
        self._check(first.picture.size)
        self._drawing = _Drawing(self._caption, first.picture.size, self._smooth, self._top)

        temporary = self._path.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            self._begin(temporary, first)
            try:
                self._shot(first)
                for packet in early:
                    self._packet(packet)
                for event in events:
                    if isinstance(event, _Shot):
                        self._shot(event)
                    else:
                        self._packet(event)
                self._finish()
            except BaseException:
                with suppress(Exception):
                    self._output.close()
                raise
            self._output.close()
            os.replace(temporary, self._path)
        except VideoOverlayError:
            raise
        except (self._av.error.FFmpegError, OSError) as error:
            # PyAV's errors are of many classes; all that is read is guarded where it is read
            number = getattr(error, "errno", None) or errno.EIO
            raise OSError(f"cannot write {self._path}: {_reason(error)}") from OSError(number, _reason(error))
        finally:
            with suppress(OSError):  # gone after the rename
                temporary.unlink()
        return self._result()

    def _check(self, size: tuple[int, int]) -> None:
        for segment in self._caption.segments[:1]:
            fit = segment.caption.fit
            wide = size[0] * float(self._source.ratio)  # as seen: with square pixels
            if abs(wide * fit.height / fit.width - size[1]) > 1 + 0.02 * size[1]:
                raise VideoOverlayError(
                    f"{self._clip}: its pictures have {round(wide)}×{size[1]} pixels, the captioned ones "
                    f"{fit.width}×{fit.height}: another clip?"
                )

    def _begin(self, temporary: Path, first: _Shot) -> None:
        av, source, drawing = self._av, self._source, self._drawing
        container, encoders, copied, sound = _FORMATS[self._path.suffix.lower()]
        encoder = next((name for name in encoders if name in av.codecs_available), None)
        if encoder is None:
            other = next(suffix for suffix in _FORMATS if suffix != self._path.suffix.lower())
            raise VideoOverlayError(
                f"this PyAV cannot write {self._path.suffix} (it lacks {', '.join(encoders)}); "
                f"try {self._path.with_suffix(other).name}"
            )
        options = {"movflags": "+faststart"} if container == "mp4" else {}
        self._output = av.open(f"file:{temporary}", "w", format=container, options=options)
        stream = self._stream = self._output.add_stream(
            encoder, rate=source.rate, options=dict(encoders[encoder])
        )
        stream.width, stream.height, stream.pix_fmt = drawing.width, drawing.height, "yuv420p"
        context = stream.codec_context
        context.time_base = source.time_base
        context.gop_size = max(1, round(2 * source.rate))  # players seek to within two seconds
        context.sample_aspect_ratio = source.ratio
        context.colorspace, context.color_range = 1, 1  # BT.709, limited range
        context.color_primaries = context.color_trc = 1
        if not encoders[encoder]:
            context.bit_rate = round(0.12 * drawing.width * drawing.height * float(source.rate))
        if source.sound is not None:
            self._sound = _Sound(av, source.sound, self._output, copied, sound)
        self._reformat = av.video.reformatter.VideoReformatter().reformat
        self._first = first.time or 0
        # the clock of the captions
        self._clock = video._Clock(float(1 / source.rate))

    def _shot(self, shot: _Shot) -> None:
        """Write the picture before this one; its time ends where this one's begins."""
        base = self._source.time_base
        raw = math.nan if shot.time is None else float((shot.time - self._first) * base)
        time = round(self._clock.true(raw) / base)
        if self._held is not None:
            last = self._held.time or 0
            time = max(time, last + 1)
            self._write(self._held, time - last)
        shot.time = time
        self._held = shot

    def _write(self, shot: _Shot, duration: int) -> None:
        picture, base, time = shot.picture, self._source.time_base, shot.time or 0
        if picture.size != self._drawing.size:  # some clips change size midway
            picture = picture.resize(self._drawing.size, Image.Resampling.BILINEAR)
            self._note("its pictures change size midway; all were brought to the size of the first")
        picture = self._drawing.frame(picture, float(time * base))
        frame = self._av.VideoFrame.from_image(picture)
        frame = self._reformat(frame, format="yuv420p", dst_colorspace=1, dst_color_range=1, threads=1)
        frame.pts, frame.time_base, frame.duration = time, base, duration
        self._durations[time] = duration
        self._mux(self._stream.encode(frame))
        self._frames += 1
        self._end = time + duration
        if self._progress is not None:
            self._progress(float(self._end * base))

    def _mux(self, packets: Sequence[Any]) -> None:
        for packet in packets:
            duration = self._durations.pop(packet.pts, None)
            if duration is not None:
                packet.duration = duration
            self._output.mux(packet)

    def _packet(self, packet: Any) -> None:
        if self._sound is not None:
            self._sound.write(packet, self._first * self._source.time_base)

    def _finish(self) -> None:
        assert self._held is not None
        last, base = self._held.time or 0, self._source.time_base
        rest = self._held.duration or round(self._source.rest(float(last * base)) / base)
        self._write(self._held, max(1, rest))
        self._mux(self._stream.encode(None))
        if self._sound is not None:
            self._sound.finish()

    def _note(self, line: str) -> None:
        if line not in self._notes:
            self._notes.append(line)

    def _result(self) -> WrittenClip:
        drawing = self._drawing
        if self._source.cut:
            self._note(f"the clip is damaged ({self._source.cut}); what could be decoded was written")
        if drawing.width == drawing.size[0] + 1:
            self._note(f"width {drawing.size[0]} became {drawing.width}: it must be even")
        elif drawing.width != drawing.size[0]:
            self._note(f"width {drawing.size[0]} became {drawing.width}, to give the caption room")
        how = None
        if self._sound is not None:
            how = self._sound.how
            if self._sound.broken:
                self._note(f"part of the sound is missing: {self._sound.broken}")
        return WrittenClip(
            self._path,
            (drawing.width, drawing.height),
            drawing.size,
            self._frames,
            float(self._end * self._source.time_base),
            how,
            tuple(self._notes),
        )


class _Sound:
    """Brings one stream of sound into the new file, as it is or converted."""

    def __init__(self, av: ModuleType, stream: Any, output: Any, copied: Sequence[str], encoder: str):
        self._av, self._from, self._output = av, stream, output
        self.broken: str | None = None
        self._clock: int | None = None  # where the next sound goes: samples, or the packets' ticks
        context = stream.codec_context
        self.how = "copied" if context.name in copied and context.extradata else "converted"
        if self.how == "copied":
            self._to = output.add_stream_from_template(stream)
            return
        rate = 48_000 if encoder == "libopus" or context.sample_rate not in _RATES else context.sample_rate
        self._rate = rate
        layout = "mono" if context.channels == 1 else "stereo"
        self._to = output.add_stream(encoder, rate=rate, layout=layout)
        self._to.codec_context.bit_rate = 64_000 * (1 if layout == "mono" else 2)
        self._resampler = av.AudioResampler(self._to.codec_context.format, layout, rate)

    def write(self, packet: Any, first: Fraction) -> None:
        """Write what a packet holds; ``first``: when the pictures begin, seconds by the source's clock."""
        if self.how == "copied":
            if packet.dts is None or packet.pts is None:
                return
            shift = round(first / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            late = self._clock is not None and packet.dts <= self._clock  # no file may hold such a packet
            # a little sound from before the pictures stays: decoders of AAC start with it, and do not play it
            if packet.pts * packet.time_base > -0.1 and not late:
                self._clock = packet.dts
                packet.stream = self._to
                self._output.mux(packet)
            return
        try:
            frames = packet.decode()
        except self._av.error.FFmpegError as error:
            self.broken = _reason(error)
            return
        for frame in frames:
            now = self._clock or 0
            if frame.pts is not None and frame.time_base:
                now = round((frame.pts * frame.time_base - first) * self._rate)
            if now + frame.samples * self._rate // frame.sample_rate <= 0:
                continue  # before the first picture
            if self._clock is None:
                self._clock = now
            # sound has its own clock, the samples; only where much is missing does silence fill the gap
            gap = now - self._clock
            if 0.1 * self._rate < gap < 3600 * self._rate:
                self._silence(gap)
            self._encode(frame)

    def _silence(self, samples: int) -> None:
        context = self._to.codec_context
        while samples > 0:
            part = self._av.AudioFrame(context.format.name, context.layout.name, min(samples, self._rate))
            part.sample_rate = self._rate
            for plane in part.planes:
                plane.update(bytes(plane.buffer_size))
            samples -= part.samples
            self._put(part)

    def _encode(self, frame: Any) -> None:
        try:
            ready = self._resampler.resample(frame)
        except (self._av.error.FFmpegError, ValueError) as error:  # another layout or rate midway
            self.broken = _reason(error)
            return
        for part in ready:
            self._put(part)

    def _put(self, part: Any) -> None:
        part.pts, part.time_base = self._clock, Fraction(1, self._rate)
        self._clock = (self._clock or 0) + part.samples
        self._output.mux(self._to.encode(part))

    def finish(self) -> None:
        if self.how == "converted":
            self._encode(None)
            self._output.mux(self._to.encode(None))
