from __future__ import annotations

import functools
import http.server
import io
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import gradio
import numpy as np
import pytest
from PIL import Image

from captioner import video
from captioner.video import Frame, VideoError

CLIPS = Path(gradio.__file__).parent / "media_assets" / "videos"
RED, GREEN, BLUE, WHITE = (250, 10, 20), (15, 200, 25), (20, 30, 240), (255, 255, 255)


def corners(width: int = 64, height: int = 48) -> np.ndarray:
    """Red at top left, green at top right, blue at bottom left, white at bottom right."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, WHITE
    return picture


def quarters(picture: np.ndarray) -> list[str]:
    """Name the colours in the middle of the four quarters, row by row."""
    names = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE}
    height, width = picture.shape[:2]
    found = [picture[height * y // 4, width * x // 4].astype(int) for y in (1, 3) for x in (1, 3)]
    return [min(names, key=lambda name: np.abs(names[name] - colour).sum()) for colour in found]


def numbered(count: int, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    """Pictures that tell their number apart: bit by bit in black and white columns."""
    pictures = []
    for number in range(count):
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        for bit in range(8):
            picture[:, size[0] * bit // 8 : size[0] * (bit + 1) // 8] = 255 * (number >> bit & 1)
        pictures.append(picture)
    return pictures


def number_of(picture: np.ndarray) -> int:
    height, width = picture.shape[:2]
    return sum(int(picture[height // 2, width * (2 * bit + 1) // 16].mean() > 127) << bit for bit in range(8))


def write(
    path: Path,
    pictures: list[np.ndarray],
    *,
    rate: int = 10,
    codec: str = "libx264",
    rotation: int | None = None,
    aspect: Fraction | None = None,
    times: list[float] | None = None,
    format: str | None = None,
    options: dict[str, str] | None = None,
    gop: int | None = None,
    sound: bool = False,
) -> Path:
    """Write a clip with FFmpeg; ``times`` in seconds."""
    with av.open(str(path), "w", format=format, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        if gop is not None:
            stream.codec_context.gop_size = gop
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        voice = output.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if voice is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            silence.sample_rate = 16000
            output.mux(voice.encode(silence))
            output.mux(voice.encode())
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        voice = output.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        output.mux(voice.encode(silence))
        output.mux(voice.encode())
    return path


def times_of(path: Path, *arguments: float, **options: float) -> list[float]:
    return [round(frame.time, 3) for frame in video.frames(path, *arguments, **options)]


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(VideoError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def drain(generator: Iterator[Frame]) -> tuple[list[Frame], str]:
    """Return the frames that come before an error, and what it says."""
    found: list[Frame] = []
    message = error_of(lambda: found.extend(generator))
    return found, message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """Twenty numbered frames, ten a second, the index at the front."""
    return write(folder / "plain.mp4", numbered(20), options={"movflags": "faststart"}, gop=5)


@pytest.fixture(scope="module")
def long(folder: Path) -> Path:
    """Forty seconds, five numbered frames a second."""
    return write(folder / "long.mp4", numbered(200), rate=5, gop=20)


# Which frames are taken.


class Recited:
    """A source that gives out given timestamps; pictures tell their position."""

    def __init__(self, times: list[float], step: float = 0.04) -> None:
        self.name, self.step, self.container = "recited.mp4", step, video._Container("mp4")
        self.rate, self.duration = 1 / step, None
        self.times, self.at, self.converted = times, -1, 0

    def advance(self) -> float | None:
        self.at += 1
        return self.times[self.at] if self.at < len(self.times) else None

    def image(self) -> np.ndarray:
        self.converted += 1
        return np.full((2, 2, 3), self.at, np.uint8)

    def seek(self, moment: float) -> float | None:
        return None

    def without_frames(self) -> VideoError:
        return VideoError("recited.mp4: empty")

    def close(self) -> None:
        pass


@pytest.fixture
def recite(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, float]]]:
    def run(times: list[float], *arguments: float, step: float = 0.04, **options: float) -> list:
        source = Recited(times, step)
        monkeypatch.setattr(video, "_open", lambda path: source)
        found = [
            (int(frame.image[0, 0, 0]), round(frame.time, 3))
            for frame in video.frames("recited.mp4", *arguments, **options)
        ]
        assert source.converted == len(found), "a frame was converted for nothing"
        assert all(before < after for (_, before), (_, after) in itertools.pairwise(found))
        return found

    return run


def test_the_first_frame_at_or_after_each_multiple_is_taken_once(recite: Callable) -> None:
    assert recite([0, 0.3, 0.6, 0.9, 1.2, 1.5], 0.5) == [(0, 0), (2, 0.6), (4, 1.2), (5, 1.5)]
    # further apart than the samples: every frame, once, and on with the next multiple after it
    assert recite([0, 0.1, 5.2, 5.3, 5.5], 0.5) == [(0, 0), (2, 5.2), (4, 5.5)]
    assert recite([0, 0.1, 5.2, 5.3, 5.5], 0) == [(0, 0), (1, 0.1), (2, 5.2), (3, 5.3), (4, 5.5)]
    assert recite([0, 0.25, 0.5, 0.75, 1], 0.5, start=0.25) == [(1, 0.25), (3, 0.75)]
    assert recite([0, 0.25, 0.5, 0.75, 1], 0.25, start=0.2, end=0.75) == [(1, 0.25), (2, 0.5)]
    assert recite([0.4, 0.9], 0.5) == [(0, 0.4), (1, 0.9)]
    assert recite([0, 5], 0.5, start=1, end=2) == []


@pytest.mark.parametrize("rate", [24, 25, 30, 30000 / 1001, 60, 120])
def test_times_that_a_container_rounds_to_milliseconds_lose_no_frame(recite: Callable, rate: float) -> None:
    for rounding in (np.floor, np.round, np.ceil):
        times = [float(rounding(1000 * number / rate)) / 1000 for number in range(240)]
        assert len(recite(times, 1 / rate)) == 240
        assert [number for number, _ in recite(times, 10 / rate)] == list(range(0, 240, 10))


def test_timestamps_that_are_missing_or_run_backwards_are_repaired(recite: Callable) -> None:
    assert [t for _, t in recite([0.0] * 5, 0, step=0.1)] == [0, 0.1, 0.2, 0.3, 0.4]
    assert [t for _, t in recite([float("nan")] * 3, 0, step=0.1)] == [0, 0.1, 0.2]
    assert [t for _, t in recite([-0.08, -0.04, 0, 0.04], 0)] == [0, 0.04, 0.08, 0.12]
    # one that is wrong does not move the rest
    assert [t for _, t in recite([9, 9.04, 0, 9.12, 9.16], 0)] == [9, 9.04, 9.08, 9.12, 9.16]
    # a recording joined from parts goes on
    joined = [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert [t for _, t in recite(joined, 0, step=1.0)] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    # frames in decoding order are out of place by little and do not drift
    assert recite([0, 0.1, 0.3, 0.2, 0.4000000000000001], 0, step=0.1)[-1][1] == 0.5  # not 4e-16 later
    mixed = [0.04 * (4 * group + place) for group in range(50) for place in (0, 3, 1, 2)]
    assert abs(recite(mixed, 0)[-1][1] - 0.04 * 199) < 0.2


def test_frames_are_what_the_clip_shows_at_these_times(plain: Path) -> None:
    found = list(video.frames(plain, 0.5))
    assert [(frame.index, round(frame.time, 3), number_of(frame.image)) for frame in found] == [
        (0, 0.0, 0),
        (1, 0.5, 5),
        (2, 1.0, 10),
        (3, 1.5, 15),
    ]
    frame = found[0]
    assert isinstance(frame, Frame)
    assert frame.image.dtype == np.uint8
    assert frame.image.shape == (48, 64, 3)
    assert frame.image.flags.c_contiguous
    assert [number_of(frame.image) for frame in video.frames(plain, 0)] == list(range(20))
    assert [number_of(f.image) for f in video.frames(plain, 0.3, start=0.45, end=1.4)] == [5, 8, 11]


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_a_variable_rate_keeps_its_times(tmp_path: Path, name: str) -> None:
    times = [0, 0.05, 0.06, 0.4, 1.0, 1.01, 1.5, 3.0, 3.1, 3.2, 7.0]
    clip = write(tmp_path / name, numbered(len(times)), times=times)
    assert times_of(clip, 0) == times
    assert [(round(f.time, 3), number_of(f.image)) for f in video.frames(clip, 1.0)] == [
        (0, 0),
        (1.0, 4),
        (3.0, 7),
        (7.0, 10),
    ]


def test_a_stream_without_timestamps_counts_by_its_rate(tmp_path: Path) -> None:
    clip = write(tmp_path / "bare.h264", numbered(30), format="h264")
    rate = video.probe(clip).rate or 25  # a guess of FFmpeg's, which changes with its version
    assert times_of(clip, 0) == [round(number / rate, 3) for number in range(30)]
    assert video.is_video(clip)
    assert video.duration(clip) == pytest.approx(30 / rate)


def test_a_recording_joined_from_parts_goes_on(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{n}.ts", numbered(20), format="mpegts").read_bytes() for n in (1, 2)]
    clip = tmp_path / "joined.ts"
    clip.write_bytes(b"".join(parts))
    assert times_of(clip, 0) == [round(number / 10, 3) for number in range(40)]
    assert video.duration(clip) == pytest.approx(4.0)


# Pictures as a person sees them.


@pytest.mark.parametrize("name", ["turned.mp4", "turned.mov", "turned.mkv"])
@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        (0, ["red", "green", "blue", "white"]),
        (90, ["green", "white", "red", "blue"]),  # counter-clockwise, as FFmpeg counts
        (180, ["white", "blue", "green", "red"]),
        (270, ["blue", "red", "white", "green"]),
    ],
)
def test_rotation_is_obeyed(tmp_path: Path, name: str, rotation: int, expected: list[str]) -> None:
    clip = write(tmp_path / name, [corners()] * 3, rotation=rotation)
    frame = next(video.frames(clip))
    assert quarters(frame.image) == expected
    assert frame.image.shape == ((64, 48, 3) if rotation % 180 else (48, 64, 3))
    facts = video.probe(clip)
    assert (facts.height, facts.width) == frame.image.shape[:2]


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    wide = write(tmp_path / "wide.mp4", [corners()] * 2, aspect=Fraction(2, 1))
    frame = next(video.frames(wide))
    assert frame.image.shape == (48, 128, 3)
    assert quarters(frame.image) == ["red", "green", "blue", "white"]
    turned = write(tmp_path / "turned.mp4", [corners()] * 2, aspect=Fraction(2, 1), rotation=90)
    assert next(video.frames(turned)).image.shape == (128, 48, 3)


@pytest.mark.parametrize("size", [(61, 47), (33, 1), (2, 2), (1, 77)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    pictures = [np.full((size[1], size[0], 3), (100 + 50 * n, 100, 10), np.uint8) for n in range(3)]
    found = list(video.frames(write(tmp_path / "odd.webm", pictures, codec="libvpx-vp9"), 0))
    assert [frame.image.shape for frame in found] == [(size[1], size[0], 3)] * 3
    for number, frame in enumerate(found):
        assert np.abs(frame.image.mean((0, 1)) - (100 + 50 * number, 100, 10)).max() < 6  # RGB, not BGR


def test_a_clip_of_one_frame(tmp_path: Path) -> None:
    clip = write(tmp_path / "one.mp4", numbered(1))
    assert times_of(clip) == [0.0]
    assert video.duration(clip) == pytest.approx(0.1)
    assert video.segments(clip, 5) == [(0.0, pytest.approx(0.1))]
    assert "ends at 0.10 s, before start=3" in error_of(lambda: list(video.frames(clip, start=3)))


def test_frames_that_change_size_midway_take_the_size_of_the_first(tmp_path: Path) -> None:
    parts = [
        write(tmp_path / f"{n}.ts", [corners(*size)] * 10, format="mpegts").read_bytes()
        for n, size in enumerate([(64, 48), (96, 80)])
    ]
    clip = tmp_path / "resized.ts"
    clip.write_bytes(b"".join(parts))
    found = list(video.frames(clip, 0))
    assert len(found) == 20
    assert {frame.image.shape for frame in found} == {(48, 64, 3)}
    assert quarters(found[-1].image) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.webm", "libvpx-vp9"),
        ("a.webm", "libvpx"),
        ("a.mkv", "mpeg4"),
        ("a.avi", "mjpeg"),
        ("a.mp4", "libx265"),
    ],
)
def test_containers_and_codecs(tmp_path: Path, name: str, codec: str) -> None:
    clip = write(tmp_path / name, numbered(12), codec=codec)
    assert video.is_video(clip)
    assert [(round(f.time, 2), number_of(f.image)) for f in video.frames(clip, 0.4)] == [
        (0, 0),
        (0.4, 4),
        (0.8, 8),
    ]
    facts = video.probe(clip)
    assert (facts.width, facts.height, facts.rate, facts.has_audio) == (64, 48, 10, False)
    assert facts.duration == pytest.approx(1.2, abs=0.01)
    assert facts.codec


def test_real_clips() -> None:
    facts = video.probe(CLIPS / "world.mp4")
    assert facts == video.Facts("mp4", 480, 270, 30.0, pytest.approx(30.03, abs=0.01), True, "avc1")
    assert not video.probe(CLIPS / "muted_b.mp4").has_audio
    assert video.probe(CLIPS / "b.avi").has_audio
    assert len(times_of(CLIPS / "b.mp4")) == 10
    # one of its first frames was dropped by the camera
    assert times_of(CLIPS / "b.avi", 0)[:3] == [0, 0.067, 0.1]


# Animations.


def animation(path: Path, durations: list[int], **options: object) -> Path:
    pictures = [Image.fromarray(picture) for picture in numbered(len(durations))]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, lossless=True, **options
    )
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_have_their_own_durations(tmp_path: Path, name: str) -> None:
    clip = animation(tmp_path / name, [100, 500, 40, 1000])
    assert video.is_video(clip)
    found = list(video.frames(clip, 0))
    assert [round(frame.time, 3) for frame in found] == [0, 0.1, 0.6, 0.64]
    assert [number_of(frame.image) for frame in found] == [0, 1, 2, 3]
    assert video.duration(clip) == pytest.approx(1.64)
    assert times_of(clip, 0.5) == [0, 0.6]
    assert video.probe(clip) == video.Facts(name[2:], 64, 48, None, None, False, None)
    assert video.segments(clip, 1.0) == [(0.0, 1.0), (1.0, pytest.approx(1.64))]


def test_an_animation_without_durations_runs_as_in_browsers(tmp_path: Path) -> None:
    assert times_of(animation(tmp_path / "a.gif", [0, 10, 20, 20]), 0) == [0, 0.1, 0.2, 0.22]


def test_frames_of_an_animation_are_laid_over_each_other_and_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    spots = []
    for x in (8, 40):
        spots.append(clear.copy())
        spots[-1].paste((*BLUE, 255), (x, 8, x + 16, 40))
        spots[-1].paste((*BLUE, 255), (0, 0, 2, 2))
    for name, options in (
        ("a.gif", {"disposal": 2}),
        ("a.webp", {"lossless": True}),
        ("a.png", {"disposal": 1}),
    ):
        spots[0].save(tmp_path / name, save_all=True, append_images=spots[1:], duration=100, **options)
        first, second = (frame.image for frame in video.frames(tmp_path / name, 0))
        assert np.abs(first[20, 16].astype(int) - BLUE).max() < 9, name
        assert first[4, 4].tolist() == [255, 255, 255], name
        assert np.abs(second[20, 48].astype(int) - BLUE).max() < 9, name
        assert second[20, 16].tolist() == [255, 255, 255], name


def test_a_photo_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(corners()).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    (frame,) = video.frames(tmp_path / "photo.jpg")
    assert frame.time == 0
    assert quarters(frame.image) == ["blue", "red", "white", "green"]


# Photos, videos and the rest are told apart by content.


def test_videos_are_told_from_photos_by_content(tmp_path: Path, plain: Path) -> None:
    photo = Image.fromarray(corners())
    for name in ("a.gif", "a.webp", "a.png", "a.jpg", "a.tiff", "a.bmp", "photo.mp4"):
        photo.save(tmp_path / name, "JPEG" if name == "photo.mp4" else None)
        assert not video.is_video(tmp_path / name), name
    for name, kind in (("still.jpg", "GIF"), ("still.mp4", "WEBP"), ("still", "PNG")):
        photo.save(
            tmp_path / name, kind, save_all=True, append_images=[Image.new("RGB", (64, 48))], duration=100
        )
        assert video.is_video(tmp_path / name), name
    (tmp_path / "clip.jpg").write_bytes(plain.read_bytes())
    assert video.is_video(tmp_path / "clip.jpg")
    assert len(list(video.frames(tmp_path / "clip.jpg"))) == 4
    # neither: the suffix decides who reports it
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.jpg").write_text("no photo")
    assert video.is_video(tmp_path / "text.mp4")
    assert not video.is_video(tmp_path / "text.jpg")
    assert video.is_video(tmp_path / "missing.mov")
    assert not video.is_video(tmp_path / "missing.png")
    assert not video.is_video(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_read_to_tell_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not video.is_video(tmp_path / "pipe")  # would wait for ever
    assert "save it to a file" in error_of(lambda: list(video.frames(tmp_path / "pipe")))


# Long clips.


def count_advances(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that grows with every frame OpenCV decodes."""
    decoded: list[float] = []
    plainly = video._Capture.advance

    def advance(self: video._Capture) -> float | None:
        moment = plainly(self)
        decoded.append(-1.0 if moment is None else moment)
        return moment

    monkeypatch.setattr(video._Capture, "advance", advance)
    return decoded


@pytest.mark.parametrize("name", ["seek.mp4", "seek.mkv", "frag.mp4"])
def test_a_late_start_seeks_and_gives_the_same_frames(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"movflags": "frag_keyframe+empty_moov"} if name == "frag.mp4" else None
    clip = write(tmp_path / name, numbered(200), rate=5, gop=10, options=options)
    everything = list(video.frames(clip, 0))
    assert [number_of(frame.image) for frame in everything] == list(range(200))
    decoded = count_advances(monkeypatch)
    for start in (10.1, 25.0, 33.33, 39.8):
        decoded.clear()
        found = list(video.frames(clip, 0, start=start))
        expected = [frame for frame in everything if frame.time >= start - 1e-3]
        assert [number_of(f.image) for f in found] == [number_of(f.image) for f in expected]
        assert np.allclose([f.time for f in found], [f.time for f in expected])
        assert [f.index for f in found] == list(range(len(expected)))
        if name != "frag.mp4":
            assert len(decoded) < len(expected) + 20
    decoded.clear()
    assert video.duration(clip) == pytest.approx(40.0)
    if name != "frag.mp4":
        assert len(decoded) < 70


def test_a_seek_that_leads_astray_is_not_trusted(tmp_path: Path) -> None:
    # the average rate puts the beginning, which is dense, far from where it lies
    times = [number * 0.02 for number in range(100)] + [2 + 0.5 * number for number in range(60)]
    clip = write(tmp_path / "uneven.mp4", numbered(160), times=times, gop=10)
    for start in (10.3, 14.0, 30.0):
        found = [(number_of(f.image), round(f.time, 3)) for f in video.frames(clip, 0, start=start)]
        assert found == [(n, round(t, 3)) for n, t in enumerate(times) if t >= start]


@pytest.mark.parametrize("seconds", [3.0, 4000.0, 0.0])
def test_a_header_that_lies_about_the_length_changes_nothing(tmp_path: Path, seconds: float) -> None:
    clip = write(tmp_path / "lie.mkv", numbered(100), rate=5)
    data = bytearray(clip.read_bytes())
    place = data.index(b"\x44\x89\x88") + 3  # Duration, eight bytes, in milliseconds
    data[place : place + 8] = np.array(seconds * 1000, ">f8").tobytes()
    clip.write_bytes(data)
    facts = video.probe(clip)
    assert facts.duration == (pytest.approx(seconds) if seconds else None)
    assert len(list(video.frames(clip, 0))) == 100
    assert video.duration(clip) == pytest.approx(20.0)
    assert [number_of(f.image) for f in video.frames(clip, 1.0, start=15)] == [75, 80, 85, 90, 95]
    assert video.segments(clip, 10) == [(0.0, 10.0), (10.0, pytest.approx(20.0))]


PEAK = """
import resource, sys
from captioner import video
count = 0
for frame in video.frames(sys.argv[1], 0.0):
    count += 1
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    counts, peaks = [], []
    for count in (20, 600):
        pictures = [numbered(2, (192, 144))[n % 2] for n in range(count)]
        clip = write(tmp_path / f"{count}.avi", pictures, codec="mpeg4")
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(clip)], capture_output=True, text=True, check=True
        )
        found, peak = map(int, run.stdout.split())
        counts.append(found)
        peaks.append(peak)
    assert counts == [20, 600]  # 50 MB as pictures
    assert peaks[1] < 1.1 * peaks[0]


def test_a_generator_given_up_lets_go_of_the_file(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(video._Capture, "close", lambda self: closed.append(self))
    generator = video.frames(plain)
    next(generator)
    generator.close()
    assert len(closed) == 1


# Bad input: one clear line.


def test_truncated_files_give_what_they_hold_and_then_say_so(tmp_path: Path) -> None:
    pictures = [np.random.default_rng(n).integers(0, 255, (48, 64, 3), np.uint8) for n in range(40)]
    for name, options in (("a.mp4", {"movflags": "faststart"}), ("a.mkv", None), ("a.avi", None)):
        whole = write(tmp_path / name, pictures, gop=5, options=options, codec="mpeg4")
        clip = tmp_path / f"cut_{name}"
        clip.write_bytes(whole.read_bytes()[: int(0.7 * whole.stat().st_size)])
        found, message = drain(video.frames(clip, 0))
        assert message.startswith(f"{clip}: the file is truncated; nothing could be read after ")
        assert 20 <= len(found) <= 35, name
        assert video.duration(clip) == pytest.approx(found[-1].time + 0.1)
        assert video.segments(clip, 1.0)[-1][1] == pytest.approx(found[-1].time + 0.1)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damage_in_the_middle_does_not_end_a_clip(tmp_path: Path, codec: str) -> None:
    pictures = [np.random.default_rng(n).integers(0, 255, (48, 64, 3), np.uint8) for n in range(60)]
    clip = write(tmp_path / "a.mp4", pictures, gop=5, codec=codec)
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 : len(data) * 6 // 10] = bytes(len(data) // 10)
    clip.write_bytes(data)
    found = times_of(clip, 0)
    assert 45 <= len(found) < 60
    assert found[:20] == [round(number / 10, 3) for number in range(20)]
    assert found[-1] == pytest.approx(5.9, abs=0.25)
    assert all(before < after for before, after in itertools.pairwise(found))


def test_a_truncated_file_without_its_index(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp4", numbered(20))
    clip = tmp_path / "cut.mp4"
    for share in (0.2, 0.6, 0.95):
        clip.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        message = error_of(lambda: list(video.frames(clip)))
        assert message.startswith(f"{clip}: the file is truncated")
        assert message.endswith("; copy or download it again")


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_truncated_animations(tmp_path: Path, name: str) -> None:
    pictures = [
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (48, 64, 3), np.uint8)) for n in range(10)
    ]
    whole, clip = tmp_path / name, tmp_path / f"cut_{name}"
    pictures[0].save(whole, save_all=True, append_images=pictures[1:], duration=100)
    data = whole.read_bytes()
    for share in (0.05, 0.33, 0.7, 0.9):
        clip.write_bytes(data[: int(share * len(data))])
        message = error_of(lambda: list(video.frames(clip, 0)))
        assert message.startswith(f"{clip}: ")
        assert "truncated" in message


def test_files_without_pictures(tmp_path: Path, plain: Path) -> None:
    def message(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        for action in (video.frames, video.probe, video.duration, video.segments):
            found = error_of(lambda action=action: list(action(path)))
            assert found.startswith(f"{path}: ")
        return found

    assert "empty; copy" in message("a.mp4", b"")
    assert "text, not a video" in message("a.mp4", b"hello, this is no video\n" * 300)
    assert "text, not a video" in message("a.mp4", "Grüße\n".encode() * 2000)
    assert "text, not a video" in message("a.mp4", "hello\n".encode("utf-16"))
    # playlists make FFmpeg open other files
    assert "text" in message("a.mp4", f"ffconcat version 1.0\nfile {plain.name}\n".encode())
    assert "text" in message("a.mp4", f"#EXTM3U\n#EXTINF:10,\n{plain.name}\n".encode())
    assert "web page" in message("a.mp4", b"\n<!DOCTYPE html><html>404</html>")
    assert "git lfs pull" in message("a.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "PDF" in message("a.mp4", b"%PDF-1.7\n\x00\x01")
    assert "not a video that can be read" in message("a.mp4", bytes(5000))
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    assert "not a video that can be read" in message("a.mp4", b"\x80\x01" + noise)
    assert "truncated" in message("a.mp4", plain.read_bytes()[:100])
    assert "damaged" in message("a.mkv", b"\x1aE\xdf\xa3" + noise)
    assert "damaged" in message("a.avi", b"RIFF\x00\x00\x00\x00AVI " + noise)


def test_sound_only(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    for path in (
        tmp_path / "a.wav",
        write_sound(tmp_path / "a.mp4"),
        write_sound(tmp_path / "a.mkv"),
        write_sound(tmp_path / "a.avi"),
        CLIPS.parent / "audio" / "heath_ledger.mp3",
    ):
        assert video.is_video(path)
        expected = f"{path}: there is sound, but no pictures in it; give a video"
        assert error_of(lambda path=path: list(video.frames(path))) == expected


def test_sound_beside_pictures_is_found(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mov", "a.mkv", "a.avi"):
        for sound in (False, True):
            facts = video.probe(write(tmp_path / name, numbered(5), sound=sound))
            assert facts.has_audio == sound, name
            assert facts.codec in ("avc1", "V_MPEG4/ISO/AVC", "H264"), name


def test_a_header_without_frames(tmp_path: Path, plain: Path) -> None:
    data = bytearray(plain.read_bytes())
    place = data.index(b"mdat") + 4
    data[place:] = bytes(len(data) - place)
    clip = tmp_path / "hollow.mp4"
    clip.write_bytes(data)
    for action in (video.frames, video.probe, video.duration, video.segments):
        assert "no frame that this OpenCV can decode (avc1)" in error_of(
            lambda action=action: list(action(clip))
        )


def test_a_codec_that_opencv_does_not_know_is_named(tmp_path: Path, plain: Path) -> None:
    data = plain.read_bytes()
    assert data.count(b"avc1") >= 1
    clip = tmp_path / "odd.mp4"
    clip.write_bytes(data.replace(b"avc1", b"zzzz"))
    message = error_of(lambda: list(video.frames(clip)))
    assert "codec (zzzz); convert it to an MP4 with H.264" in message


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "no such file" in error_of(lambda: list(video.frames(tmp_path / "missing.mp4")))
    assert "this is a folder" in error_of(lambda: list(video.frames(tmp_path)))
    assert "not a valid path" in error_of(lambda: list(video.frames("a\0.mp4")))
    if os.path.exists("/dev/null"):
        assert "device" in error_of(lambda: list(video.frames("/dev/null")))


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_a_name_that_is_not_utf_8(tmp_path: Path, plain: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\n.mp4"
    Path(os.fsdecode(path)).write_bytes(plain.read_bytes())
    assert "rename it" in error_of(lambda: list(video.frames(os.fsdecode(path))))  # OpenCV would crash


def test_names_that_ffmpeg_would_take_for_something_else(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "%03d.mp4", "-", "ä b.mp4", "http:x"):
        Path(name).write_bytes(plain.read_bytes())
        assert len(list(video.frames(name))) == 4, name


def test_impossible_numbers_are_told_at_once(plain: Path) -> None:
    for arguments in ((-1,), (float("nan"),), (0.5, -1), (0.5, 2, 2), (0.5, 3, 1), (0.5, float("inf"))):
        with pytest.raises(ValueError, match=r"every|start|end"):
            video.frames(plain, *arguments)
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="segments must be longer"):
            video.segments(plain, seconds)


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_nothing_is_written_to_stderr_by_others(tmp_path: Path, plain: Path) -> None:
    data = bytearray(plain.read_bytes())
    data[-900:-300] = bytes(600)
    (tmp_path / "damaged.mp4").write_bytes(data)
    (tmp_path / "cut.mp4").write_bytes(data[:2000])
    (tmp_path / "no_index.mp4").write_bytes(write(tmp_path / "a.mp4", numbered(9)).read_bytes()[:900])
    (tmp_path / "zeros.mp4").write_bytes(bytes(9000))
    names = [tmp_path / f"{name}.mp4" for name in ("damaged", "cut", "no_index", "zeros")]
    code = """
        import sys
        from captioner import video
        for path in sys.argv[1:]:
            try:
                print(len(list(video.frames(path, 0))))
            except video.VideoError as error:
                print("refused")
    """
    run = run_python(code, *names)
    assert run.returncode == 0
    assert run.stderr == ""
    assert len(run.stdout.split()) == 4


# OpenCV is optional.


def test_photos_and_animations_need_no_opencv(tmp_path: Path, plain: Path) -> None:
    Image.fromarray(corners()).save(tmp_path / "photo.png")
    clip = animation(tmp_path / "a.gif", [100, 100])
    code = """
        import sys
        sys.modules["cv2"] = None
        from captioner import video
        photo, gif, mp4 = sys.argv[1:]
        print(video.is_video(photo), video.is_video(gif), video.is_video(mp4))
        print(len(list(video.frames(gif))), video.segments(gif, 1))
        try:
            list(video.frames(mp4))
        except video.VideoError as error:
            print(error)
        loaded = [name for name in ("av", "scenedetect", "torch") if name in sys.modules]
        print(loaded)
    """
    run = run_python(code, tmp_path / "photo.png", clip, plain)
    assert run.stderr == ""
    told, found, message, loaded = run.stdout.splitlines()
    assert told == "False True True"
    assert found == "1 [(0.0, 0.2)]"
    assert message == f'{plain}: videos need OpenCV; pip install "captioner[video]"'
    assert "av" not in loaded
    assert "scenedetect" not in loaded


def test_an_opencv_that_does_not_load_names_the_package_that_will(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text(
        'raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")'
    )
    code = """
        import sys
        from captioner import video
        sys.path.insert(0, sys.argv[1])
        try:
            list(video.frames(sys.argv[2]))
        except video.VideoError as error:
            print(error)
    """
    run = run_python(code, tmp_path, plain)
    assert run.stderr == ""
    (message,) = run.stdout.splitlines()
    assert "libGL.so.1" in message
    assert "opencv-python-headless" in message


# Segments.


def test_fixed_windows_cover_the_clip(long: Path) -> None:
    assert video.segments(long) == [(0.0, pytest.approx(40.0))]
    cuts = video.segments(long, 15)
    assert cuts == [(0, 15), (15, 30), (30, pytest.approx(40.0))]
    # a rest below a quarter is no segment of its own
    assert video.segments(long, 13) == [(0, 13), (13, 26), (26, pytest.approx(40.0))]
    assert len(video.segments(long, 0.2)) == 200
    assert video.segments(long, 100) == [(0.0, pytest.approx(40.0))]
    assert video.segments(long, 5, start=12, end=25) == [(12, 17), (17, 22), (22, 25)]
    assert video.segments(long, 15, start=5, end=99)[1:] == [(20, 35), (35, pytest.approx(40.0))]
    assert "before start=50" in error_of(lambda: video.segments(long, 5, start=50))
    for seconds in (0.3, 1.7, 7.0):
        cuts = video.segments(long, seconds)
        assert cuts[0][0] == 0
        assert cuts[-1][1] == pytest.approx(40.0)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(cuts))
        assert all(0.25 * seconds - 1e-6 <= right - left <= 1.25 * seconds for left, right in cuts)


@pytest.fixture(scope="module")
def shots(folder: Path) -> Path:
    """Three shots that begin at 0, 2.3 and 6 seconds, each with something that moves, and 9 seconds."""
    pictures = []
    for number in range(90):
        colour = RED if number < 23 else GREEN if number < 60 else BLUE
        picture = np.full((120, 160, 3), colour, np.uint8)
        picture[50:70, number : number + 20] = 255
        pictures.append(picture)
    return write(folder / "shots.mp4", pictures)


def test_shots(shots: Path) -> None:
    pytest.importorskip("scenedetect")
    cuts = video.segments(shots, shots=True)
    assert cuts == [pytest.approx(pair) for pair in ((0, 2.3), (2.3, 6.0), (6.0, 9.0))]
    parts = video.segments(shots, 2.0, shots=True)
    assert [round(left, 3) for left, _ in parts] == [0, 1.15, 2.3, 4.15, 6.0, 7.5]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
    assert video.segments(shots, shots=True, start=1, end=5) == [
        pytest.approx((1, 2.3)),
        pytest.approx((2.3, 5)),
    ]
    assert video.segments(shots, shots=True, threshold=255) == [(0, pytest.approx(9.0))]


def test_shots_in_the_same_pass_as_the_sampling(shots: Path) -> None:
    pytest.importorskip("scenedetect")
    finder, sampled = video.Shots(), []
    for frame in video.frames(shots, 0.5, watch=finder):
        sampled.append((round(frame.time, 3), len(finder.starts)))
    assert [round(start, 3) for start in finder.starts] == [0, 2.3, 6.0]
    # known by the time the frame is given out
    assert [shot for _, shot in sampled] == [1 + (moment >= 2.3) + (moment >= 6) for moment, _ in sampled]
    assert [moment for moment, _ in sampled] == times_of(shots, 0.5)


def test_a_flash_is_no_shot(tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    pictures = [np.full((48, 64, 3), RED if n != 10 else WHITE, np.uint8) for n in range(30)]
    cuts = video.segments(write(tmp_path / "flash.mp4", pictures), shots=True)
    assert len(cuts) <= 2
    assert all(right - left >= 0.6 for left, right in cuts)
    # nor is a last frame of another colour
    assert len(video.segments(write(tmp_path / "end.mp4", [*pictures[11:], pictures[10]]), shots=True)) == 1


def test_shots_of_short_and_bad_clips(tmp_path: Path, plain: Path) -> None:
    pytest.importorskip("scenedetect")
    one = write(tmp_path / "one.mp4", numbered(1))
    assert video.segments(one, shots=True) == [(0, pytest.approx(0.1))]
    gif = animation(tmp_path / "a.gif", [1000, 1000, 1000])
    assert video.segments(gif, shots=True)[-1][1] == pytest.approx(3.0)
    whole = write(
        tmp_path / "whole.mp4", numbered(40), options={"movflags": "faststart"}, codec="mpeg4", gop=5
    ).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: int(0.8 * len(whole))])
    cuts = video.segments(tmp_path / "cut.mp4", shots=True)
    assert 2 < cuts[-1][1] < 4
    assert "no such file" in error_of(lambda: video.segments(tmp_path / "missing.mp4", shots=True))


def test_shots_without_scenedetect(shots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    expected = 'shot boundaries need PySceneDetect; pip install "captioner[shots]"'
    assert error_of(lambda: video.segments(shots, shots=True)) == expected


# Live.


@functools.cache
def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(numbered(256)[number]).save(file, "JPEG", quality=95)
    return file.getvalue()


class Camera(http.server.ThreadingHTTPServer):
    """An IP camera on this machine: numbered pictures over HTTP, then an end or silence."""

    daemon_threads = True

    def __init__(self, count: int, pause: float, stall: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.count, self.pause, self.stall = count, pause, stall
        self.sent = 0
        self.over = threading.Event()
        self.address = f"http://user:secret@127.0.0.1:{self.server_port}/stream"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Camera

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace;boundary=next")
        self.end_headers()
        try:
            for number in range(self.server.count):
                data = jpeg(number)
                head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")
                self.wfile.flush()
                self.server.sent += 1
                self.server.over.wait(self.server.pause)
            if self.server.stall:
                self.server.over.wait(20)
        except OSError:  # the viewer has left
            pass

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def camera() -> Iterator[Callable[..., Camera]]:
    cameras = []

    def start(count: int, pause: float = 0.05, stall: bool = False) -> Camera:
        cameras.append(Camera(count, pause, stall))
        return cameras[-1]

    yield start
    for running in cameras:
        running.over.set()
        running.shutdown()
        running.server_close()


def test_a_live_stream_ends_cleanly(camera: Callable[..., Camera]) -> None:
    found = list(video.live(camera(40, pause=0.02).address, every=0, stall_seconds=5))
    numbers = [number_of(frame.image) for frame in found]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] >= 38
    assert [frame.index for frame in found] == list(range(len(found)))
    assert all(before.time < after.time for before, after in itertools.pairwise(found))
    assert found[0].image.shape == (48, 64, 3)


def test_live_frames_are_the_latest_and_not_a_backlog(camera: Callable[..., Camera]) -> None:
    running = camera(80, pause=0.02)
    late = []
    for frame in video.live(running.address, every=0.1, stall_seconds=5):
        late.append(running.sent - 1 - number_of(frame.image))
        if len(late) == 6:
            break
        time.sleep(0.2)  # the captioning; ten frames pass
    assert len(late) >= 3
    # right after each wait, the picture is one of the newest (FFmpeg itself holds one or two back)
    assert np.median(late[1:]) <= 6


def test_live_samples_are_apart(camera: Callable[..., Camera]) -> None:
    found = list(video.live(camera(80, pause=0.02).address, every=0.4, stall_seconds=5))
    assert len(found) >= 2
    assert all(after.time - before.time >= 0.399 for before, after in itertools.pairwise(found))


def test_a_live_stream_that_stalls(camera: Callable[..., Camera]) -> None:
    address = camera(60, pause=0.02, stall=True).address
    begun = time.monotonic()
    found, message = drain(video.live(address, every=0, stall_seconds=1.0))
    assert found
    assert time.monotonic() - begun < 15
    assert "stalled: no frame for 1 s" in message
    assert "secret" not in message


def test_live_sources_that_do_not_open(
    camera: Callable[..., Camera], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_PROBING", 0.5)
    silent = camera(0, stall=True)
    message = error_of(lambda: list(video.live(silent.address, stall_seconds=0.5)))
    assert "does not answer" in message
    message = error_of(lambda: list(video.live("http://127.0.0.1:9/x", stall_seconds=9)))
    assert "http://127.0.0.1:9/x: no video stream could be opened" in message
    assert "camera 97: it cannot be opened" in error_of(lambda: list(video.live("97")))
    assert "no such file" in error_of(lambda: list(video.live(str(tmp_path / "missing.mp4"))))
    for options in ({"every": -1}, {"stall_seconds": 0}):
        with pytest.raises(ValueError, match=r"every|stall"):
            video.live(0, **options)


def test_a_file_is_played_live_at_its_own_pace(plain: Path) -> None:
    begun = time.monotonic()
    found = [(round(f.time, 2), number_of(f.image)) for f in video.live(str(plain), every=0.5)]
    assert 1.8 <= time.monotonic() - begun < 10
    assert found[0] == (0, 0)
    assert all(number == round(moment * 10) for moment, number in found)
    assert all(after[0] - before[0] >= 0.5 for before, after in itertools.pairwise(found))


def test_closing_a_live_generator_stops_its_thread(camera: Callable[..., Camera]) -> None:
    generator = video.live(camera(250).address, every=0)
    next(generator)
    generator.close()
    for _ in range(50):
        if not any(thread.name == "captioner-live" for thread in threading.enumerate()):
            return
        time.sleep(0.05)
    raise AssertionError("the thread goes on")
