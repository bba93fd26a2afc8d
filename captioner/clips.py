"""Clips in, segments out: frames are sampled, encoded, put together to segments and captioned, all at once.

Memory does not grow with the length of a clip: a segment is forgotten when it has been said.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from captioner.caption import Caption, Segment
from captioner.encoder import GridFeatures, join_frames
from captioner.images import Fit, load
from captioner.parallel import ahead
from captioner.subtitles import merge
from captioner.video import SHORTEST_SHOT, Frame, Shots, VideoError, VideoPath, frames, live

if TYPE_CHECKING:
    from captioner.captioner import Captioner

MOST_FRAMES = 64
"""A segment is captioned from at most so many frames; of longer ones every second is left out, repeatedly."""

_PART = 4
"""Frames that are encoded together: of 8, the network's activations take half as much memory again."""

_SEEN = 32
"""Frames at most that go on together; most of them the same as the ones before, which are not encoded."""

_REST = 0.25
"""A segment shorter than this share of the others is joined to the one before it."""

Say = Callable[[GridFeatures], Caption]
Keep = Callable[[float, np.ndarray, Fit], None]


def caption_segments(
    captioner: Captioner,
    path: VideoPath,
    *,
    every: float = 0.5,
    segment: float | None = 5.0,
    shots: bool = False,
    start: float = 0.0,
    end: float | None = None,
    progress: Callable[[float], None] | None = None,
    keep: Keep | None = None,
    **options: Any,
) -> Iterator[Segment]:
    """Caption a clip segment by segment, as they come; neighbours that say the same are one.

    Args:
        captioner: what captions them.
        path: of a video, an animation or a picture.
        every: seconds between the frames that are looked at.
        segment: seconds of a segment; a rest of less than a quarter belongs to the last. None for the whole
            clip, or whole shots.
        shots: cut where the picture changes at once, and longer shots into segments.
        start, end: the part of the clip that is captioned, in seconds.
        progress: called with the seconds of the clip that have been read.
        keep: called by several threads with every frame that is looked at, but for those that are the same as
            the one before: its time in seconds, its square ``(3, size, size)`` uint8 and how it was fitted.
        options: see `captioner.captioner.Captioner.caption`.

    Raises:
        ValueError: a number or an option is impossible.
        VideoError: the clip cannot be read, or PySceneDetect is missing; after the segments that could be
            captioned, if it breaks off.
    """
    if segment is not None and not (math.isfinite(segment) and segment > 0):
        raise ValueError(f"segment must be more than 0 seconds, found {segment}")
    if not (math.isfinite(every) and every > 0):
        raise ValueError(f"every must be more than 0 seconds, found {every}")
    say = partial(captioner.caption, **options)
    captioner.check(**{k: v for k, v in options.items() if k not in ("prefix", "region", "seed")})
    reader = _Reader(path, every, segment, shots, start, end, progress)
    return _joined(_segments(captioner, reader, segment, say, keep))


def _segments(
    captioner: Captioner, reader: _Reader, segment: float | None, say: Say, keep: Keep | None
) -> Iterator[Segment]:
    def encode(part: list[tuple[_Seen, np.ndarray | None]]) -> list[tuple[_Seen, GridFeatures | None]]:
        preprocess = captioner.model.encoder.preprocess
        new = [(seen, load(image, preprocess)) for seen, image in part if image is not None]
        if keep is not None:
            for seen, (pixels, fit) in new:
                keep(seen.time, pixels, fit)
        if not new:
            return [(seen, None) for seen, _ in part]
        features = captioner.encode_pixels([loaded for _, loaded in new])
        found = iter(range(len(new)))
        return [(seen, None if image is None else features[next(found)]) for seen, image in part]

    def tell(stretch: _Stretch) -> tuple[_Stretch, Caption | None]:
        return stretch, None if stretch.again else say(stretch.features())

    threads = max(1, torch.get_num_threads())
    on_cpu = captioner.device.type == "cpu"
    # a core a part, as for photos; the GPU does one thing at a time
    single = partial(torch.set_num_threads, 1) if on_cpu else None
    workers = threads if on_cpu else 1
    # one pool for both: more threads than cores would get into each other's way
    pool = ThreadPoolExecutor(workers, initializer=single)
    try:
        encoded = ahead(encode, reader, workers, pool=pool)
        stretches = _compared(_stretches(_filled(encoded), reader, segment))
        last: Caption | None = None
        for stretch, said in ahead(tell, stretches, workers, pool=pool):
            if said is None:
                assert last is not None
                said = stretch.timed(last)
            yield Segment(stretch.start, stretch.end, said)
            last = said
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(threads)
    if reader.error is not None:
        raise reader.error


@dataclass(frozen=True)
class _Seen:
    """A frame, the time at which the stretch that it belongs to begins, and whether a shot begins there."""

    time: float
    begins: float
    cut: bool


class _Reader:
    """Gives out frames in parts, each with the stretch that it belongs to.

    A frame that is the same as the one before comes without its picture: slides, still scenes and animations
    with long pauses need not be looked at again and again.

    Attributes:
        finish: where the clip ends, in seconds, when all has been read.
        error: why it breaks off, if it does.
    """

    def __init__(
        self,
        path: VideoPath,
        every: float,
        segment: float | None,
        shots: bool,
        start: float,
        end: float | None,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._segment, self._start, self._progress = segment, start, progress
        self._shots = Shots() if shots else None
        self._frames = frames(path, every, start, end, watch=self._shots, passed=self._pass)
        self.finish = start
        self.error: VideoError | None = None
        self._end = end

    def _pass(self, end: float) -> None:
        self.finish = end if self._end is None else min(end, self._end)
        if self._progress is not None:
            self._progress(self.finish)

    def __iter__(self) -> Iterator[list[tuple[_Seen, np.ndarray | None]]]:
        part: list[tuple[_Seen, np.ndarray | None]] = []
        last, new = None, 0
        try:
            for frame in self._frames:
                again = last is not None and _same(last, frame.image)
                part.append((self._place(frame.time), None if again else frame.image))
                last = frame.image
                new += not again
                if new == _PART or len(part) == _SEEN:
                    yield part
                    part, new = [], 0
        except VideoError as error:  # what came before it is captioned first
            self.error = error
        if part:
            yield part

    def _place(self, time: float) -> _Seen:
        first, cut = self._start, False
        if self._shots is not None and len(self._shots.starts) > 1:
            first, cut = self._shots.starts[-1], True
        if self._segment is None:
            return _Seen(time, first, cut)
        number = max(0, math.floor((time - first) / self._segment + 1e-9))
        return _Seen(time, first + number * self._segment, cut and number == 0)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two pictures are the same, quickly where they are not."""
    if one.shape != other.shape or not np.array_equal(one[::16, ::16], other[::16, ::16]):
        return False
    return np.array_equal(one, other)


@dataclass(eq=False)
class _Stretch:
    """The frames of a segment so far, thinned where they are too many.

    ``again`` says that they are those of the stretch before, so that the same is to be said.
    """

    start: float
    cut: bool
    end: float = 0.0
    again: bool = False
    _times: list[float] = field(default_factory=list)
    _frames: list[GridFeatures] = field(default_factory=list)
    _stride: int = 1
    _count: int = 0

    def add(self, time: float, frame: GridFeatures) -> None:
        if self._count % self._stride == 0:
            self._times.append(time)
            self._frames.append(frame)
        self._count += 1
        if len(self._times) > MOST_FRAMES:
            self._times, self._frames = self._times[::2], self._frames[::2]
            self._stride *= 2

    def join(self, other: _Stretch) -> None:
        for time, frame in zip(other._times, other._frames, strict=True):
            self.add(time, frame)
        self.end = other.end

    def features(self) -> GridFeatures:
        return join_frames(self._frames, self._times)

    def shows(self, other: _Stretch) -> bool:
        """Tell whether it has the very frames of another stretch."""
        return len(self._frames) == len(other._frames) and all(map(is_, self._frames, other._frames))

    def timed(self, caption: Caption) -> Caption:
        """Return the caption of a stretch with the same frames as that of this one."""
        times = np.array(self._times, np.float32)
        ranked = tuple(replace(hypothesis, times=times) for hypothesis in caption.n_best)
        return replace(caption, times=times, n_best=ranked)


def _filled(
    encoded: Iterable[list[tuple[_Seen, GridFeatures | None]]],
) -> Iterator[tuple[_Seen, GridFeatures]]:
    """Give each frame that is the same as the one before the features of that."""
    last: GridFeatures | None = None
    for part in encoded:
        for seen, features in part:
            last = last if features is None else features
            assert last is not None
            yield seen, last


def _compared(stretches: Iterable[_Stretch]) -> Iterator[_Stretch]:
    """Mark the stretches that show what the one before showed."""
    before: _Stretch | None = None
    for stretch in stretches:
        stretch.again = before is not None and stretch.shows(before)
        before = stretch
        yield stretch


def _stretches(
    encoded: Iterable[tuple[_Seen, GridFeatures]], reader: _Reader, segment: float | None
) -> Iterator[_Stretch]:
    """Yield the stretches, each when it is certain that no rest will be joined to it."""
    shortest = 0.0 if segment is None else _REST * segment
    held: _Stretch | None = None
    current: _Stretch | None = None

    def least() -> float:
        """Return what the current stretch must last to be a segment of its own."""
        assert current is not None
        return SHORTEST_SHOT if current.cut else shortest

    def closed(end: float) -> Iterator[_Stretch]:
        nonlocal held, current
        assert current is not None
        current.end = end
        if held is not None and end - current.start < least() - 1e-6:
            held.join(current)
        else:
            if held is not None:
                yield held
            held = current
        current = None

    for seen, features in encoded:
        if current is not None and seen.begins > current.start:
            yield from closed(seen.begins)
        if current is None:
            current = _Stretch(seen.begins, seen.cut)
        current.add(seen.time, features)
        if held is not None and seen.time - current.start >= least():
            yield held
            held = None
    if current is not None:
        yield from closed(max(reader.finish, current.start))
    if held is not None:
        yield held


def _joined(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Join neighbours that say the same, as they come."""
    last: list[Segment] = []
    try:
        for segment in segments:
            *done, newest = merge([*last, segment])
            yield from done
            last = [newest]
    except VideoError:
        yield from last
        raise
    yield from last


# --------------------------------------------------------------------------------------------------
# Live


class Rolling:
    """Captions what goes on, from a window of past frames.

    Each frame is encoded once. What is said at a time depends on the frames up to then alone.
    """

    def __init__(self, captioner: Captioner, window: float = 4.0, **options: Any) -> None:
        """Begin with no frames.

        Args:
            captioner: what captions them.
            window: seconds of the past that are looked at.
            options: see `captioner.captioner.Captioner.caption`.

        Raises:
            ValueError: the window or an option is impossible, or the model reads frames from the end.
        """
        if not (math.isfinite(window) and window > 0):
            raise ValueError(f"window must be more than 0 seconds, found {window}")
        if not captioner.model.live:
            raise ValueError(
                f"the model {captioner.header.name!r} reads frames in both directions, which takes the whole "
                "clip: for live captioning take one with a forward frame encoder, or with none"
            )
        captioner.check(**{k: v for k, v in options.items() if k not in ("prefix", "region", "seed")})
        self._captioner, self._window, self._options = captioner, window, options
        self._past: deque[tuple[float, GridFeatures]] = deque(maxlen=MOST_FRAMES)
        self._size: tuple[int, ...] = ()

    def add(self, time: float, image: Any) -> Segment:
        """Look at the next picture and caption the window that ends with it.

        A picture of another size than the one before begins a new window.

        Args:
            time: of the picture in seconds, later than the one before.
            image: see `captioner.images.open_image`.

        Raises:
            ImageError: if it cannot be read.
            ValueError: if its time is not later.
        """
        if self._past and time <= self._past[-1][0]:
            raise ValueError(f"a frame at {time:g} s came after one at {self._past[-1][0]:g} s")
        features = self._captioner.encode(image)
        fit = features.fits[0]
        if (fit.width, fit.height) != self._size:
            self._past.clear()
            self._size = (fit.width, fit.height)
        self._past.append((time, features))
        while self._past[0][0] < time - self._window:
            self._past.popleft()
        times = [moment for moment, _ in self._past]
        clip = join_frames([frame for _, frame in self._past], times)
        return Segment(times[0], time, self._captioner.caption(clip, **self._options))


def caption_live(
    captioner: Captioner,
    source: int | str,
    *,
    every: float = 0.5,
    window: float = 4.0,
    stall_seconds: float = 10.0,
    **options: Any,
) -> Generator[Segment, None, None]:
    """Caption a camera or a stream while it runs, over a window of past frames, until it ends.

    Frames that arrive while one is captioned are dropped: the captions never lag behind.

    Args:
        captioner: what captions it.
        source: see `captioner.video.live`.
        every: least seconds between two captions.
        window: seconds of the past that each caption is about.
        stall_seconds: how long the source may be silent.
        options: see `captioner.captioner.Captioner.caption`.

    Raises:
        ValueError: a number or an option is impossible, or the model reads frames from the end.
        VideoError: the source cannot be opened, has no frames, or stalls.
    """
    rolling = Rolling(captioner, window, **options)
    return _live(rolling, live(source, every, stall_seconds))


def _live(rolling: Rolling, seen: Generator[Frame, None, None]) -> Generator[Segment, None, None]:
    try:
        for frame in seen:
            yield rolling.add(frame.time, frame.image)
    finally:
        seen.close()
