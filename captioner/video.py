"""Frames by timestamp out of a video file, an animation, a camera or a stream; cutting a clip into segments.

OpenCV decodes videos, Pillow decodes GIF, WebP, PNG and AVIF animations; both are imported when the first
file needs them. What a file holds is told by its content, never by its name, and what its header says about
its length is never trusted. The first use of OpenCV turns off its log lines and FFmpeg's, process-wide,
unless ``OPENCV_LOG_LEVEL`` or ``OPENCV_FFMPEG_LOGLEVEL`` is set.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import IO, Any, Protocol, Union

import numpy as np

from captioner import images
from captioner.inputs import VIDEO_SUFFIXES, ImageError, brands_of, kind_of, name_of, open_file

VideoPath = Union[str, "os.PathLike[str]"]
Watcher = Callable[[float, np.ndarray], None]
"""Called with the time in seconds and the picture ``(H, W, 3)`` uint8 RGB of a frame."""

MAX_FRAME = 2**26
"""Videos and animations whose frames have more pixels (67 million, twice 8K) are refused: a decoder holds
several of them."""


class VideoError(ValueError):
    """A video that cannot be used, or not to its end; one line that names it, the reason, and what to do."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a clip.

    Attributes:
        index: 0, 1, 2, … over the frames that were given out.
        time: when the frame appears, in seconds since the clip's first frame; strictly increasing.
        image: ``(H, W, 3)`` uint8 RGB, 0 to 255, upright, with square pixels. All frames of a clip have the
            size of the first.
    """

    index: int
    time: float
    image: np.ndarray


@dataclass(frozen=True)
class Facts:
    """What the header of a video says; only size and kind have been checked.

    Attributes:
        kind: the container, like ``mp4``, ``matroska``, ``avi``, ``gif``.
        width, height: of a frame in pixels, upright, with square pixels.
        rate: frames per second on average, or None if unknown.
        duration: in seconds, or None if unknown; the header's word, see `duration` for a checked one.
        has_audio: whether there is sound, or None if unknown.
        codec: what the container calls the codec, like ``avc1``, or None if unknown.
    """

    kind: str
    width: int
    height: int
    rate: float | None
    duration: float | None
    has_audio: bool | None
    codec: str | None


def is_video(path: VideoPath) -> bool:
    """Tell a video from a photo by content.

    True for video and sound files and for GIF, WebP, PNG and AVIF files of more than one frame; False for
    other pictures. Where the content is neither, or cannot be read, the suffix decides, so that the reader
    that fits reports the error. Nothing is decoded and OpenCV is not needed.
    """
    name = os.fsdecode(path)
    suffix = os.path.splitext(name)[1].lower()
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):  # what is read from a pipe would be missing later
            return suffix in VIDEO_SUFFIXES
        with open(name, "rb") as stream:
            head = stream.read(_HEAD)
            kind = _sniff(head)
            if kind_of(head) is not None:
                if kind not in _ANIMATED or (kind == "webp" and not _webp_may_move(head)):
                    return False
                stream.seek(0)
                return bool(getattr(images.identify(stream, suffix, name), "is_animated", False))
    except Exception:  # missing, or damaged in whatever way: the reader says so
        return suffix in VIDEO_SUFFIXES
    return suffix in VIDEO_SUFFIXES if kind is None or kind in _NO_VIDEO else True


def frames(
    path: VideoPath,
    every: float = 0.5,
    start: float = 0.0,
    end: float | None = None,
    *,
    watch: Watcher | None = None,
    passed: Callable[[float], None] | None = None,
) -> Generator[Frame, None, None]:
    """Give out frames of a video file, an animation or a picture, one at a time, by their timestamps.

    The rule: for ``k`` = 0, 1, 2, … the first frame at or after ``start + k * every`` is taken (to a
    millisecond, which is as exact as some containers are), and none twice. So a clip whose frames lie further
    apart than ``every`` gives each of them once, and of a variable rate the times stay true. A video counts
    from its first frame; timestamps that are missing or run backwards are replaced by ones that go on at the
    clip's rate. A still picture is a clip of one frame. Of an animation one round is given out, with its own
    durations (as in browsers, 10 ms and less mean 100). Frames too damaged to decode are left out.

    Memory does not grow with the length. Frames between those taken are decoded, but not converted. A
    ``start`` beyond a few seconds is reached by seeking where the container allows and the place reached
    proves to lie before it; otherwise by decoding. Frames that change size midway are scaled to the size of
    the first.

    Args:
        path: the file.
        every: seconds between samples, 0 for every frame.
        start: seconds; frames before it are left out.
        end: seconds; frames at or after it are left out. None means to the end.
        watch: called for every frame from ``start`` to ``end``, in order, whether it is taken or not, before
            it is given out. Costs the conversion of all frames.
        passed: called with the time in seconds at which each frame ends, before it is given out; the last of
            these is where the clip ends. Costs nothing.

    Raises:
        ValueError: a number is impossible.
        VideoError: on the first frame asked for, if the file cannot be read; after the frames that it does
            hold, if it is truncated; or if it ends before ``start``.
    """
    if not (math.isfinite(every) and every >= 0):
        raise ValueError(f"every must be 0 or more seconds, found {every}")
    _check_span(start, end)
    return _frames(path, every, start, end, watch, passed)


def probe(path: VideoPath) -> Facts:
    """Return size, rate, length and sound of a video from its header and its first frame.

    Raises:
        VideoError: it cannot be read, or has no frame.
    """
    with contextlib.closing(_open(path)) as source:
        if source.advance() is None:
            raise source.without_frames()
        height, width = source.image().shape[:2]
        container = source.container
        return Facts(
            container.kind,
            width,
            height,
            source.rate,
            source.duration,
            container.audio,
            container.codec,
        )


def duration(path: VideoPath) -> float:
    """Return when the last frame of a clip stops being shown, in seconds, found by decoding.

    Only the last seconds are decoded where the container can be trusted to seek, otherwise everything. Of a
    truncated file, the part that is there counts. The last frame of a video is taken to last as long as a
    frame does on average.

    Raises:
        VideoError: it cannot be read, or has no frame.
    """
    with contextlib.closing(_open(path)) as source:
        if source.duration is not None and source.container.seekable and source.duration > _TAIL:
            begun = source.seek(source.duration - _TAIL)
            if begun is not None:
                last = begun
                while (moment := source.advance()) is not None:
                    last = max(last, moment)
                if last > begun:  # a single frame may mean that the seek led somewhere else
                    return last + source.step
    with contextlib.closing(_open(path)) as source:
        clock, finish = _Clock(source.step), None
        with contextlib.suppress(_Truncated):
            while (moment := source.advance()) is not None:
                finish = clock.true(moment) + source.step
        if finish is None:
            raise source.without_frames()
        return finish


_TAIL = 10.0
"""Seconds at the end of a video in which its true end is looked for, and the least that is worth a seek."""


# Segments.


def segments(
    path: VideoPath,
    seconds: float | None = None,
    *,
    shots: bool = False,
    start: float = 0.0,
    end: float | None = None,
    threshold: float = 27.0,
) -> list[tuple[float, float]]:
    """Return where a clip is cut, as ``(start, end)`` in seconds; they cover it without gaps.

    Args:
        path: the file.
        seconds: the length of a segment, or, with ``shots``, the most that one may have: longer shots are cut
            into equal parts. None leaves the clip, or the shots, whole. Without ``shots``, a rest below a
            quarter of a segment is joined to the last one.
        shots: cut where the picture changes at once, as PySceneDetect's content detector finds it. This
            decodes the whole clip; to cut while frames are read for another purpose, see `Shots`.
        start, end: the part of the clip to cut; the clip's own end, found by `duration`, if that is earlier.
        threshold: with ``shots``, how much the picture must change, 0 to 255.

    Raises:
        ValueError: a number is impossible.
        VideoError: the clip cannot be read, ends before ``start``, or PySceneDetect is not installed. A
            truncated clip is cut as far as it goes; `frames` reports it.
    """
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"segments must be longer than 0 seconds, found {seconds}")
    _check_span(start, end)
    if not shots:
        finish = duration(path)
        if start >= finish:
            raise _ends_before(name_of(path), finish, start)
        return _windows(start, finish if end is None else min(end, finish), seconds)

    finder = Shots(threshold)
    try:
        for _ in _frames(path, _NEVER, start, end, finder):
            pass
    except _Truncated:
        if not finder.starts:
            raise
    finish = duration(path) if end is None or finder.last + finder.step < end else end
    last = finish - SHORTEST_SHOT
    edges = [start, *(cut for cut in finder.starts[1:] if start < cut <= last), finish]
    cuts: list[tuple[float, float]] = []
    for left, right in itertools.pairwise(edges):
        parts = 1 if seconds is None else max(1, math.ceil((right - left) / seconds - 1e-6))
        inner = [left + (right - left) * part / parts for part in range(parts)]
        cuts += zip(inner, [*inner[1:], right], strict=True)
    return cuts


def _windows(start: float, finish: float, seconds: float | None) -> list[tuple[float, float]]:
    """Cut ``start`` to ``finish`` into windows of ``seconds``; a rest below a quarter joins the last."""
    if seconds is None:
        return [(start, finish)]
    count = max(1, math.ceil((finish - start) / seconds - 0.25))
    edges = [start + seconds * number for number in range(count)]
    return list(zip(edges, [*edges[1:], finish], strict=True))


class Shots:
    """Finds shot boundaries in frames that pass by; to be given to `frames` as ``watch``.

    PySceneDetect's content detector compares every frame with the one before it, at 256 pixels of width; a
    shot lasts at least 0.6 seconds.

    Attributes:
        starts: when the shots begin, in seconds; the first at the first frame seen. Complete up to the frame
            seen last, so the last may lie right before the end of the clip; `segments` leaves such a one out.

    Raises:
        VideoError: PySceneDetect is not installed.
    """

    def __init__(self, threshold: float = 27.0) -> None:
        if not (math.isfinite(threshold) and threshold > 0):
            raise ValueError(f"the threshold of shots must be above 0, found {threshold}")
        self._cv2 = _opencv("shot boundaries")
        try:
            from scenedetect import ContentDetector, FrameTimecode
        except ImportError as error:
            raise VideoError('shot boundaries need PySceneDetect; pip install "captioner[shots]"') from error
        # no filter of short shots: it holds back cuts, counts in frames, and is two lines below
        self._detector: Any = ContentDetector(threshold=threshold, min_scene_len=0)
        self._timecode: Any = FrameTimecode
        self._count = 0
        self.starts: list[float] = []
        self.last = 0.0
        self.step = 0.0
        """Seconds between the last two frames seen."""

    def __call__(self, time: float, image: np.ndarray) -> None:
        """Look at the next frame."""
        cv2 = self._cv2
        height, width = image.shape[:2]
        scale = max(1.0, width / 256)
        size = max(1, round(width / scale)), max(1, round(height / scale))
        small = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), cv2.COLOR_RGB2BGR)
        cut = self._detector.process_frame(self._timecode(self._count, 25.0), small)
        if not self.starts or (cut and time - self.starts[-1] >= SHORTEST_SHOT):
            self.starts.append(time)
        if self._count:
            self.step = time - self.last
        self.last = time
        self._count += 1


SHORTEST_SHOT = 0.6
"""Seconds; a cut that comes sooner after another, or before the end, is none."""
_NEVER = 1e9
"""A sampling interval after which no second frame comes."""


# The sampling of frames.


def _frames(
    path: VideoPath,
    every: float,
    start: float,
    end: float | None,
    watch: Watcher | None,
    passed: Callable[[float], None] | None = None,
) -> Generator[Frame, None, None]:
    with contextlib.closing(_open_at(path, start)) as source:
        clock = _Clock(source.step)
        index, due, now = 0, start, None
        while (moment := source.advance()) is not None:
            now = clock.true(moment)
            if end is not None and now >= end - _TOLERANCE:
                return
            if passed is not None:
                passed(now + source.step)
            taken = now >= due - _TOLERANCE
            if not taken and (watch is None or now < start - _TOLERANCE):
                continue
            image = source.image()
            if watch is not None:
                watch(now, image)
            if taken:
                yield Frame(index, now, image)
                index += 1
                due = start + (math.floor((now + _TOLERANCE - start) / every) + 1) * every if every else now
        if now is None:
            raise source.without_frames()
        if not index and now < start:
            raise _ends_before(source.name, now + source.step, start)


_TOLERANCE = 1e-3
"""Seconds. Matroska and FLV round times to milliseconds, up or down."""


def _check_span(start: float, end: float | None) -> None:
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start must be 0 or more seconds, found {start}")
    if end is not None and not end > start:  # NaN, too
        raise ValueError(f"end must be after start={start:g}, found {end}")


def _ends_before(name: str, finish: float, start: float) -> VideoError:
    return VideoError(f"{name}: the clip ends at {finish:.2f} s, before start={start:g}; begin earlier")


class _Clock:
    """Makes timestamps strictly increase, and leaves those alone that do.

    A frame whose time does not lie after the one before comes one step after it. Times that go on from a
    point far back (a recording that was joined from parts) are shifted as a whole.
    """

    def __init__(self, step: float) -> None:
        self._step = step
        self._last = -math.inf
        self._shift = 0.0
        self._fallen: float | None = None

    def true(self, moment: float) -> float:
        """Return the repaired time in seconds, at least 0."""
        if not math.isfinite(moment):
            moment = -math.inf
        shifted = max(0.0, moment + self._shift)
        if shifted > self._last + 1e-6:  # nearer, it is the same time in other arithmetic
            self._fallen = None
        else:
            fell_far = self._last - shifted > 1.0
            shifted = self._last + self._step
            if fell_far and self._fallen is not None and moment > self._fallen:
                self._shift = shifted - moment
            self._fallen = moment
        self._last = shifted
        return shifted


# Sources: one frame after another, with raw timestamps.


class _Source(Protocol):
    name: str
    container: _Container
    rate: float | None
    duration: float | None

    @property
    def step(self) -> float:
        """Seconds that a frame lasts; of an animation, the one that is shown."""

    def advance(self) -> float | None:
        """Go to the next frame and return its raw time in seconds, or None after the last."""

    def image(self) -> np.ndarray:
        """Return the frame as ``(H, W, 3)`` uint8 RGB."""

    def seek(self, moment: float) -> float | None:
        """Try to go near a time; return the time of the frame that `advance` gives next.

        After None, the source must be opened anew.
        """

    def without_frames(self) -> VideoError:
        """Say why there is no frame."""

    def close(self) -> None:
        """Let go of the file."""


class _Truncated(VideoError):
    """The end of the file is missing; raised after the frames that are there."""


def _open(path: VideoPath) -> _Source:
    """Open a file by its content."""
    name = name_of(path)
    try:
        stream = _open_file(os.fsdecode(path), name)
    except ImageError as error:
        raise VideoError(str(error)) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream)
        head = stream.read(_HEAD)
        if not head:
            raise VideoError(f"{name}: the file is empty; copy or download it again")
        picture, kind = kind_of(head), _sniff(head)
        if picture is not None:
            stream.seek(0)
            source = _Animation(stream, picture, name)
            stack.pop_all()
            return source
        if kind in _NO_VIDEO:
            raise VideoError(f"{name}: this is {_NO_VIDEO[kind]}")
        if _hollow(stream):
            raise _Truncated(f"{name}: nearly all of the file is zeros; copy or download it again")
        container = _inspect(stream, kind)
    if container.video is False:
        what = "there is sound, but no pictures in it" if container.audio else "there are no pictures in it"
        raise VideoError(f"{name}: {what}; give a video")
    return _Capture(os.path.abspath(os.fsdecode(path)), container, name)


def _open_at(path: VideoPath, start: float) -> _Source:
    """Open a file, at a frame not after ``start`` and close to it if that can be had without decoding."""
    if start > _TAIL:
        source = _open(path)
        try:
            if source.container.seekable:
                reached = source.seek(start - 2.0)
                if reached is not None and start - _TAIL < reached <= start:
                    return source
        except BaseException:
            source.close()
            raise
        source.close()
    return _open(path)


def _open_file(path: str, name: str) -> IO[bytes]:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        mode = 0
    if stat.S_ISDIR(mode):
        raise VideoError(f"{name}: this is a folder; give the videos in it")
    if stat.S_ISFIFO(mode):
        raise VideoError(f"{name}: this is a pipe, and videos are not read in order; save it to a file first")
    if stat.S_ISCHR(mode):
        raise VideoError(f"{name}: this is a device, not a file; a camera can be captioned live")
    return open_file(path, name)


class _Capture:
    """A video file through OpenCV."""

    def __init__(self, path: str, container: _Container, name: str) -> None:
        cv2 = _opencv(name)
        self.name, self.container, self._cv2 = name, container, cv2
        self._last: float | None = None
        try:
            path.encode()
        except UnicodeEncodeError as error:  # OpenCV would crash
            raise VideoError(
                f"{name}: OpenCV cannot open this name, which is not UTF-8; rename it"
            ) from error
        backend, begun = _backend(cv2), time.monotonic()
        limit = _SILENCE * 1000
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
        self._capture = cv2.VideoCapture(path, backend, limits if backend == cv2.CAP_FFMPEG else [])
        if not self._capture.isOpened():
            if time.monotonic() - begun > 0.9 * _SILENCE:
                raise self._silent()
            raise self._refused()
        width, height = (
            int(self._capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        if width * height > MAX_FRAME:
            self._capture.release()
            raise VideoError(
                f"{name}: its frames have {width} x {height} pixels, more than the"
                f" {MAX_FRAME / 1e6:.0f} million allowed; make them smaller"
            )
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = float(rate) if 0 < rate <= 1000 else None
        # a guess of the header's, as is the rate; a day is longer than any clip that it is right about
        length = count / self.rate if self.rate is not None else 0.0
        self.duration = length if 0 < length < 1e6 else None
        self._shape: tuple[int, ...] | None = None
        self._reached: float | None = None

    @property
    def step(self) -> float:
        return 1 / self.rate if self.rate is not None else 0.04

    def advance(self) -> float | None:
        if self._reached is not None:
            reached, self._reached = self._reached, None
            return reached
        begun = time.monotonic()
        if not _grab(self._capture):
            if time.monotonic() - begun > 0.9 * _SILENCE:
                raise self._silent()
            if self.container.cut and self._last is not None:
                raise _Truncated(
                    f"{self.name}: the file is truncated; nothing could be read after {self._last:.2f} s;"
                    " copy or download it again"
                )
            return None
        self._last = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1000
        return self._last

    def image(self) -> np.ndarray:
        grabbed, image = self._capture.retrieve()
        if not grabbed or image is None:
            raise VideoError(
                f"{self.name}: the frame at {self._last or 0:.2f} s is damaged;"
                " copy or download the file again"
            )
        image = _upright(self._cv2, self._capture, image)
        if self._shape is None:
            self._shape = image.shape
        elif image.shape != self._shape:  # OpenCV's FFmpeg has scaled them already, other backends may not
            image = self._cv2.resize(image, self._shape[1::-1], interpolation=self._cv2.INTER_AREA)
        return image

    def seek(self, moment: float) -> float | None:
        if not self._capture.set(self._cv2.CAP_PROP_POS_MSEC, max(0.0, moment) * 1000):
            return None
        self._reached = self.advance()
        return self._reached

    def without_frames(self) -> VideoError:
        if self.container.cut:
            return _Truncated(
                f"{self.name}: the file is truncated before its first frame; copy or download it again"
            )
        codec = f" ({self.container.codec})" if self.container.codec else ""
        return VideoError(
            f"{self.name}: it has the header of a video, but no frame that this OpenCV can decode{codec};"
            " if it plays elsewhere, convert it to an MP4 with H.264, or else download it again"
        )

    def close(self) -> None:
        self._capture.release()

    def _silent(self) -> VideoError:
        where = "" if self._last is None else f" after {self._last:.2f} s"
        return _Truncated(
            f"{self.name}: no frame was found{where} in {_SILENCE} s of looking; copy or download it again"
        )

    def _refused(self) -> VideoError:
        container = self.container
        if container.cut:
            return _Truncated(f"{self.name}: the file is truncated; copy or download it again")
        if container.video and container.codec is not None:
            return VideoError(
                f"{self.name}: it holds no frames, or this OpenCV cannot decode its codec"
                f" ({container.codec}); convert it to an MP4 with H.264 first"
            )
        if container.kind == "unknown":
            return VideoError(
                f"{self.name}: this is not a video that can be read; give an MP4, MOV, MKV or WebM file"
            )
        return VideoError(
            f"{self.name}: the {container.kind} file is damaged or holds no frames; copy or download it again"
        )


class _Animation:
    """A picture file of one or more frames through Pillow."""

    def __init__(self, stream: IO[bytes], kind: str, name: str) -> None:
        self.name, self._stream = name, stream
        self.rate: float | None = None
        self.duration: float | None = None
        try:
            self._image: Any = images.identify(stream, "", name)
            images._check_size(*self._image.size, name)
            self._count = getattr(self._image, "n_frames", 1) if kind in _ANIMATED else 1
            frame = self._image.width * self._image.height
            if self._count > 1 and frame > MAX_FRAME:
                raise images._too_large(name, *self._image.size, MAX_FRAME)
            # a few bytes can stand for a whole frame, countless times
            self._work = _MOST_WORK + 1024 * stream.seek(0, os.SEEK_END)
            self._frame_work = frame + 2**14
            # a PNG may hold a picture for programs that show no animations
            self._next = int(self._count > 1 and bool(getattr(self._image, "default_image", False)))
            self._count += self._next
        except Exception as error:
            raise self._explain(error) from error
        self.container = _Container(kind, video=True, audio=False)
        self._time = 0.0
        self._shown = 0.0

    @property
    def step(self) -> float:
        return self._shown or 0.1

    def advance(self) -> float | None:
        if self._next >= self._count:
            return None
        self._time += self._shown
        self._work -= self._frame_work
        if self._work < 0:
            raise _Truncated(
                f"{self.name}: {self._count} frames of {self._image.width} x {self._image.height} pixels"
                f" are far more than its bytes can fill; nothing was read after {self._time:.2f} s"
            )
        try:
            if self._count > 1:
                self._image.seek(self._next)
                self._image.load()
                milliseconds = float(self._image.info.get("duration", 0) or 0)
                self._shown = (milliseconds if milliseconds > 10 else 100.0) / 1000
        except Exception as error:
            if self._time:
                raise _Truncated(
                    f"{self.name}: the file is truncated or damaged after {self._time:.2f} s;"
                    " copy or download it again"
                ) from error
            raise self._explain(error) from error
        self._next += 1
        return self._time

    def image(self) -> np.ndarray:
        try:
            if self._count > 1:
                picture = images._to_rgb(self._image)
            else:  # a photo: EXIF rotation and all
                self._stream.seek(0)
                picture = images.open_image(self._stream)
            return np.array(picture, np.uint8)
        except Exception as error:
            raise self._explain(error) from error

    def seek(self, moment: float) -> float | None:
        return None

    def without_frames(self) -> VideoError:
        return VideoError(f"{self.name}: there are no frames in it; give another file")

    def close(self) -> None:
        self._stream.close()

    def _explain(self, error: Exception) -> VideoError:
        return VideoError(str(error if isinstance(error, ImageError) else images.explain(error, self.name)))


_MOST_WORK = 2**30
"""Pixels of an animation's frames that are decoded, beside 1024 for each byte of the file: some seconds."""


def _opencv(name: str) -> Any:
    """Import OpenCV, silenced; ``name`` is what needs it."""
    # FFmpeg's level is read once, when the first file is opened
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise VideoError(f'{name}: videos need OpenCV; pip install "captioner[video]"') from error
    except Exception as error:  # a library of the system's that is not there, or NumPy of another generation
        reason = " ".join(str(error).split())
        hint = "pip uninstall opencv-python, then pip install --force-reinstall opencv-python-headless"
        raise VideoError(f"{name}: OpenCV does not load ({reason}); {hint}") from error
    if "OPENCV_LOG_LEVEL" not in os.environ:
        place: Any = getattr(cv2.utils, "logging", cv2)  # in OpenCV 5, and before
        place.setLogLevel(0)
    return cv2


def _grab(capture: Any) -> bool:
    """Decode the next frame; False at the end.

    OpenCV says False for every packet that is damaged, too; the frames go on behind them. An attempt that
    takes its time has waited for a stream.
    """
    for _ in range(_ATTEMPTS):
        begun = time.monotonic()
        if capture.grab():
            return True
        if time.monotonic() - begun > 0.2:
            return False
    return False


_SILENCE = 20
"""Seconds without a frame after which a file is given up: what is damaged would be searched to its end."""
_ATTEMPTS = 300
"""Damaged packets in a row that do not end a video. At its end this many take milliseconds."""


def _backend(cv2: Any) -> int:
    """Return OpenCV's FFmpeg backend, or its own choice in a build without."""
    known = getattr(cv2, "videoio_registry", None)
    if known is None or cv2.CAP_FFMPEG in known.getStreamBackends():
        return int(cv2.CAP_FFMPEG)
    return int(cv2.CAP_ANY)


def _upright(cv2: Any, capture: Any, image: np.ndarray) -> np.ndarray:
    """Turn OpenCV's picture, which it has rotated as the file says, into RGB with square pixels."""
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    above, below = capture.get(cv2.CAP_PROP_SAR_NUM), capture.get(cv2.CAP_PROP_SAR_DEN)
    if above > 0 and below > 0 and above != below and 0.1 < above / below < 10:
        height, width = image.shape[:2]
        lying = round(capture.get(cv2.CAP_PROP_ORIENTATION_META)) % 180 == 90
        if lying:
            height = max(1, round(height * above / below))
        else:
            width = max(1, round(width * above / below))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(image)


# What a file is, told by its bytes.

_HEAD = 4096
"""Bytes at the beginning by which a kind is recognised."""

_ANIMATED = frozenset(("gif", "webp", "png", "avif"))
_NO_VIDEO = {
    "text": "text, not a video; give a video",
    "list": "text that lists other files, not a video; give those",
    "web page": "a web page, not a video; download the video itself",
    "lfs": "a Git LFS pointer, not a video; run git lfs pull",
    "pdf": "a PDF document, not a video; give a video",
    "raw": "a camera's raw photo, not a video; export it as JPEG first",
    "zip": "an archive, not a video; unpack it first",
}


@dataclass(frozen=True)
class _Container:
    """What the structure of a file says; None where it was not looked for or not found."""

    kind: str
    video: bool | None = None
    audio: bool | None = None
    codec: str | None = None
    cut: bool = False
    """Whether the file is shorter than its own structure says."""

    @property
    def seekable(self) -> bool:
        """Whether times cannot run backwards, so that a seek leads where decoding would."""
        return self.kind in ("mp4", "matroska") and not self.cut


def _sniff(head: bytes) -> str | None:
    """Name the kind of file that begins with ``head``, or None."""
    picture = kind_of(head)
    if picture is not None:
        return picture
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof"):
        return "raw" if b"crx " in brands_of(head) else "mp4"
    if head.startswith(b"RIFF"):
        return {b"AVI ": "avi", b"WAVE": "sound"}.get(head[8:12])
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xf1", b"\xff\xf9"):
        return "sound"
    for offset, size in ((0, 188), (4, 192)):
        if head[offset : offset + 4 * size + 1 : size] == b"\x47" * 5:
            return "mpeg-ts"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_LISTS):
        return "list"
    if text.startswith((b"<!doctype html", b"<html")):
        return "web page"
    if text.startswith(b"version https://git-lfs"):
        return "lfs"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (not _CONTROL.search(head) and _is_utf8(head)):
        return "text"
    return None


def _webp_may_move(head: bytes) -> bool:
    """Return whether a WebP file says that it is an animation; Pillow reads all of it to find out."""
    return head[12:16] == b"VP8X" and bool(head[20:21] and head[20] & 2)


_MAGIC = {
    b"\x1aE\xdf\xa3": "matroska",
    b"OggS": "ogg",
    b"FLV\x01": "flv",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "asf",
    b"\0\0\x01\xba": "mpeg",
    b"\0\0\x01\xb3": "mpeg",
    b"\0\0\0\x01": "bare stream",  # H.264 or H.265 without a container
    b"\x06\x0e\x2b\x34": "mxf",
    b"DKIF": "ivf",
    b"YUV4MPEG2 ": "y4m",
    b".RMF": "realmedia",
    b"ID3": "sound",
    b"fLaC": "sound",
    b"FORM": "sound",
    b"RF64": "sound",
    b"MThd": "sound",
    b"#!AMR": "sound",
    b"%PDF": "pdf",
    b"PK\x03\x04": "zip",
}
_LISTS = (b"ffconcat", b"#extm3u", b"[playlist]", b"rtsptext", b"v=0", b"<?xml", b"<mpd", b"[reference]")
"""How playlists begin: FFmpeg would open what they name. Most are text, and one odd byte makes them none."""
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 and len(head) == _HEAD  # a character cut at the end
    return True


def _hollow(stream: IO[bytes]) -> bool:
    """Tell whether a large file was never filled; FFmpeg would search gigabytes of zeros for frames."""
    size = stream.seek(0, os.SEEK_END)
    if size < 2**26:
        return False
    for number in range(4, 20):
        stream.seek(size * number // 20)
        if any(stream.read(4096)):
            return False
    return True


def _inspect(stream: IO[bytes], kind: str | None) -> _Container:
    """Read the structure of a file: what tracks there are, and whether its end is missing."""
    size = stream.seek(0, os.SEEK_END)
    if kind == "sound":
        return _Container("sound", video=False, audio=True)
    reader = {"mp4": _inspect_mp4, "matroska": _inspect_matroska, "avi": _inspect_avi}.get(kind or "")
    if reader is not None:
        try:
            return reader(_Limited(stream), size)
        except (IndexError, ValueError, OSError, OverflowError):  # damage; OpenCV may make more of it
            pass
    elif kind in ("ogg", "flv"):
        stream.seek(0)
        head = stream.read(_HEAD)
        if kind == "flv":
            return _Container(kind, video=None, audio=bool(head[4] & 4) if len(head) > 4 else None)
        audio = any(mark in head for mark in (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex  "))
        video = any(mark in head for mark in (b"\x80theora", b"BBCD", b"OVP80", b"\x01video"))
        return _Container(kind, video=video or (False if audio else None), audio=audio)
    return _Container(kind or "unknown")


class _Limited:
    """A stream in which one may go to 100,000 places: files can be made of countless tiny parts."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._left = stream, 100_000
        self.read = stream.read

    def seek(self, at: int) -> int:
        self._left -= 1
        if self._left < 0:
            raise ValueError("it has too many parts")
        return self._stream.seek(at)


def _inspect_mp4(stream: _Limited, size: int) -> _Container:
    """Walk the boxes of an ISO base media file (MP4, MOV, 3GP)."""
    tracks: list[tuple[bytes, bytes]] = []
    found, cut = set(), False

    def walk(begin: int, end: int, depth: int) -> None:
        nonlocal cut
        while begin + 8 <= end:
            stream.seek(begin)
            header = stream.read(16)
            length, kind, inner = int.from_bytes(header[:4], "big"), header[4:8], begin + 8
            if length == 1:
                length, inner = int.from_bytes(header[8:16], "big"), begin + 16
            elif length == 0:
                length = end - begin
            if length < inner - begin:  # padding or damage
                return
            if depth == 0:
                found.add(kind)
                cut = cut or begin + length > size
            finish = min(begin + length, end)
            if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl") and depth < 6:
                walk(inner, finish, depth + 1)
            elif kind == b"hdlr" and depth == 3:  # MOV has another, of the data, deeper
                stream.seek(inner + 8)
                tracks.append((stream.read(4), b""))
            elif kind == b"stsd" and tracks:
                stream.seek(inner + 12)
                tracks[-1] = (tracks[-1][0], stream.read(4))
            begin += length

    walk(0, size, 0)
    kinds = [handler for handler, _ in tracks]
    codec = next((codec for handler, codec in tracks if handler == b"vide"), b"")
    if b"moov" not in found and b"moof" not in found:
        return _Container("mp4", cut=True)  # the index is written last
    return _Container(
        "mp4",
        video=b"vide" in kinds if kinds else None,
        audio=b"soun" in kinds if kinds else None,
        codec=_printable(codec),
        cut=cut,
    )


def _inspect_matroska(stream: _Limited, size: int) -> _Container:
    """Read the tracks of a Matroska or WebM file."""

    def number(at: int, keep_marker: bool) -> tuple[int, int, bool]:
        """Return a variable-length number, where it ends, and whether it means "unknown"."""
        stream.seek(at)
        data = stream.read(8)
        width = 9 - data[0].bit_length()
        value = int.from_bytes(data[:width], "big")
        if len(data) < width or width > 8:
            raise ValueError("a number is cut")
        plain = value & ((1 << 7 * width) - 1)
        return (value if keep_marker else plain), at + width, plain == (1 << 7 * width) - 1

    video = audio = False
    codec, cut, seen = b"", False, False

    def walk(begin: int, end: int, depth: int = 0) -> bool:
        """Return whether to go on."""
        nonlocal video, audio, codec, cut, seen
        if depth > 3:  # a segment, its tracks, one of them
            raise ValueError("parts within parts")
        track, name = 0, b""
        while begin + 2 <= end:
            kind, inner, _ = number(begin, True)
            length, inner, endless = number(inner, False)
            if kind == 0x18538067:  # Segment
                cut = not endless and inner + length > size
                return walk(inner, size if endless else min(inner + length, size), depth + 1)
            if kind == 0x1F43B675:  # Cluster: the frames begin
                return False
            if kind in (0x1654AE6B, 0xAE):  # Tracks, TrackEntry
                seen = True
                walk(inner, min(inner + length, end), depth + 1)
            elif kind == 0x83:  # TrackType
                stream.seek(inner)
                track = int.from_bytes(stream.read(min(length, 8)), "big")
            elif kind == 0x86:  # CodecID
                stream.seek(inner)
                name = stream.read(min(length, 64))
            begin = inner + length
        video, audio = video or track == 1, audio or track == 2
        if track == 1:
            codec = codec or name
        return True

    walk(0, size)
    return _Container(
        "matroska",
        video=video if seen else None,
        audio=audio if seen else None,
        codec=_printable(codec),
        cut=cut,
    )


def _inspect_avi(stream: _Limited, size: int) -> _Container:
    """Read the stream headers of an AVI file."""
    stream.seek(0)
    head = stream.read(65536)
    end = head.find(b"movi")
    head = head[: end if end >= 0 else len(head)]
    marks = [match.end() for match in re.finditer(rb"strh....", head, re.DOTALL)]
    kinds = {head[mark : mark + 4]: head[mark + 4 : mark + 8] for mark in reversed(marks)}
    promised = int.from_bytes(head[4:8], "little") + 8
    return _Container(
        "avi",
        video=b"vids" in kinds if kinds else None,
        audio=b"auds" in kinds if kinds else None,
        codec=_printable(kinds.get(b"vids", b"")),
        cut=size < promised < 2**32 - 8,  # recorders that were switched off leave 0 or the most there is
    )


def _printable(name: bytes) -> str | None:
    text = name.decode("ascii", "replace").strip("\0 ")
    return text if text and text.isprintable() else None


# Live.


def live(source: int | str, every: float = 0.5, stall_seconds: float = 10.0) -> Generator[Frame, None, None]:
    """Give out frames of a camera or a stream while it runs; the latest one, never a backlog.

    A thread of its own keeps reading. Whoever asks for the next frame gets the newest one if it is at least
    ``every`` seconds later than the one before, and otherwise waits for it; what came in between is dropped.
    Times are seconds since the first frame arrived. A recording (a file, or an address of known length) is
    played at its own pace, with its own times.

    The generator ends when the stream does. Close it to stop early.

    Args:
        source: a camera's number (0 is the first; text of digits counts), an address that FFmpeg reads
            (``rtsp://``, ``http://``, …), a device such as ``/dev/video0``, or a file.
        every: least seconds between two frames, 0 for all that can be kept up with.
        stall_seconds: how long the stream may be silent; opening it may take 5 seconds more.

    Raises:
        ValueError: a number is impossible.
        VideoError: the source cannot be opened, has no frames, stalls, or is a camera that stops.
    """
    if not (math.isfinite(every) and every >= 0):
        raise ValueError(f"every must be 0 or more seconds, found {every}")
    if not (math.isfinite(stall_seconds) and stall_seconds > 0):
        raise ValueError(f"stall_seconds must be above 0, found {stall_seconds}")
    return _live(source, every, stall_seconds)


def _live(source: int | str, every: float, stall_seconds: float) -> Generator[Frame, None, None]:
    if isinstance(source, str) and source.isascii() and source.isdigit():
        source = int(source)
    reader = _Reader(source, stall_seconds)
    thread = threading.Thread(target=reader.run, name="captioner-live", daemon=True)
    thread.start()
    try:
        index, due = 0, 0.0
        while (found := reader.take(due)) is not None:
            moment, image = found
            yield Frame(index, moment, image)
            index, due = index + 1, moment + every
    finally:
        reader.stop()
        thread.join(0.5)  # a read that hangs ends with its own time limit; nobody waits for it


class _Reader:
    """Reads a stream in a thread and keeps the latest frame."""

    def __init__(self, source: int | str, stall_seconds: float) -> None:
        self._source, self._stall = source, stall_seconds
        if isinstance(source, int):
            self._name = f"camera {source}"
        else:  # without user and password
            self._name = name_of(re.sub(r"(?<=://)[^/@\s]*@", "", source))
        self._changed = threading.Condition()
        self._latest: tuple[float, Any] | None = None
        self._heard = time.monotonic()
        self._opened = self._ended = self._stopped = False
        self._error: VideoError | None = None
        self._cv2 = _opencv(self._name)

    def take(self, due: float) -> tuple[float, np.ndarray] | None:
        """Wait for a frame at ``due`` seconds or later; return None when the stream has ended."""
        with self._changed:
            while True:
                if self._latest is not None and self._latest[0] >= due - _TOLERANCE:
                    moment, image = self._latest
                    self._latest = None
                    return moment, image
                if self._error is not None:
                    raise self._error
                if self._ended:
                    return None
                patience = self._heard + self._limit() - time.monotonic()
                if patience <= 0:
                    raise self._silent()
                self._changed.wait(patience)

    def stop(self) -> None:
        """Make the thread end as soon as it can."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def run(self) -> None:
        """Read until the stream ends or `stop` is called; runs in the thread."""
        capture = None
        error: VideoError | None = None
        try:
            capture = self._open()
            self._read(capture)
        except VideoError as problem:
            error = problem
        except Exception as problem:  # OpenCV's own
            error = VideoError(f"{self._name}: it cannot be read ({' '.join(str(problem).split())})")
        finally:
            if capture is not None:
                capture.release()
            with self._changed:
                self._error, self._ended = error, True
                self._changed.notify_all()

    def _open(self) -> Any:
        cv2 = self._cv2
        if isinstance(self._source, int):
            capture = cv2.VideoCapture(self._source)
            if not capture.isOpened():
                raise VideoError(
                    f"{self._name}: it cannot be opened; see that it is connected,"
                    " and that no other program uses it"
                )
        elif "://" in self._source:
            # longer than `take` waits, so that a stall is told from an end
            limit = round((self._limit() + 2) * 1000)
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
            capture = cv2.VideoCapture(self._source, _backend(cv2), limits)
            if not capture.isOpened():
                raise VideoError(f"{self._name}: no video stream could be opened there; check the address")
        elif _is_device(self._source):
            capture = cv2.VideoCapture(self._source)
            if not capture.isOpened():
                raise VideoError(f"{self._name}: no camera could be opened there; check the device")
        else:
            opened = _open(self._source)
            if not isinstance(opened, _Capture):
                opened.close()
                raise VideoError(f"{self._name}: an animation cannot be played live; caption it as a file")
            capture = opened._capture
        with self._changed:
            self._opened, self._heard = True, time.monotonic()
        return capture

    def _read(self, capture: Any) -> None:
        cv2 = self._cv2
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        step = 1 / rate if 0 < rate <= 1000 else 0.04
        recorded = not isinstance(self._source, int) and 0 < count < 1e9
        clock, begun = _Clock(step if recorded else 1e-5), None
        while not self._stopped:
            asked = time.monotonic()
            if not _grab(capture):
                if begun is None:
                    raise VideoError(f"{self._name}: there are no frames in it; check the source")
                if time.monotonic() - asked >= 0.9 * self._stall:
                    raise self._silent()
                if isinstance(self._source, int):
                    raise VideoError(f"{self._name}: it stopped giving frames; see that it is connected")
                return
            now = time.monotonic()
            begun = now if begun is None else begun
            moment = clock.true(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 if recorded else now - begun)
            with self._changed:
                self._heard = max(now, begun + moment) if recorded else now
                while recorded and not self._stopped and (wait := begun + moment - time.monotonic()) > 0:
                    self._changed.wait(wait)
            decoded, image = capture.retrieve()
            if decoded and image is not None:
                image = _upright(cv2, capture, image)
                with self._changed:
                    self._latest = moment, image
                    self._changed.notify_all()

    def _limit(self) -> float:
        return self._stall if self._opened else self._stall + _PROBING

    def _silent(self) -> VideoError:
        what = "the stream has stalled" if self._opened else "it does not answer"
        return VideoError(f"{self._name}: {what}: no frame for {self._limit():g} s; check the source")


_PROBING = 5.0
"""Seconds more that opening a stream may take: FFmpeg looks at as many before it gives the first frame."""


def _is_device(path: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return stat.S_ISCHR(os.stat(path).st_mode)
    return False
