from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from captioner import video, video_overlay
from captioner.caption import Caption, Segment, VideoCaption, Word, clock
from captioner.images import Fit
from captioner.video_overlay import VideoOverlayError, WrittenClip, frame_sheet, spoken, write_overlay_clip

GRID = (3, 4)
GREY = (120, 120, 120)


def cell(frames: int, frame: int, row: int, column: int, weight: float = 0.9) -> np.ndarray:
    """``(F, R)`` attention with most of its weight in one cell."""
    cells = np.full((frames, *GRID), (1 - weight) / (frames * GRID[0] * GRID[1] - 1), np.float32)
    cells[frame, row, column] = weight
    return cells.reshape(frames, -1)


def segment(
    text: str,
    start: float,
    end: float,
    size: tuple[int, int],
    maps: Sequence[np.ndarray | None],
    frames: int = 4,
    confidence: float = 0.6,
) -> Segment:
    words = tuple(Word(t, 0.5, 0.5, (), maps[i]) for i, t in enumerate(text.split()))
    fit = Fit("squash", *size, (0, 0, *size))
    times = (start + (np.arange(frames) + 0.5) * (end - start) / frames).astype(np.float32)
    return Segment(start, end, Caption(text, words, -1.0, -3.0, confidence, True, GRID, fit, times))


def plain(size: tuple[int, int], seconds: float = 1.0, start: float = 0.0, **more: Any) -> VideoCaption:
    """Two words: the left of the picture all the time, then the right."""
    left, right = np.full((2, 4, 12), 0.1 / 40, np.float32)
    left.reshape(4, *GRID)[:, 1, 0] = right.reshape(4, *GRID)[:, 1, 3] = 0.225
    return VideoCaption(
        (segment("left right", start, start + seconds, size, [left, right], **more),), seconds
    )


def make_clip(
    path: Path,
    size: tuple[int, int] = (320, 180),
    times: Sequence[float] = tuple(i / 10 for i in range(10)),
    *,
    picture: Callable[[int], np.ndarray] | None = None,
    base: Fraction = Fraction(1, 1000),
    sound: str | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    ratio: Fraction = Fraction(1),
    tags: tuple[int, int, int] = (1, 1, 1),
    sound_from: float = 0.0,
) -> Path:
    """Write a grey clip with pictures at the times; a tone of 440 Hz sounds from 0.5 s on."""
    with av.open(str(path), "w") as output:
        options = {"crf": "8"} if codec == "libx264" else {"qscale": "2"}
        step = times[1] - times[0] if len(times) > 1 else 0.1
        stream: Any = output.add_stream(codec, rate=round(1 / step), options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        context = stream.codec_context
        context.time_base = base
        context.sample_aspect_ratio = ratio
        context.colorspace, context.color_trc, context.color_primaries = tags
        tone: Any = None
        if sound:
            tone = output.add_stream(sound, rate=44100, layout="stereo")
        for i, moment in enumerate(times):
            pixels = np.full((size[1], size[0], 3), 120, np.uint8) if picture is None else picture(i)
            frame = av.VideoFrame.from_ndarray(
                pixels, format="rgb24" if pixels.dtype == np.uint8 else "rgb48le"
            )
            frame = frame.reformat(format=pix_fmt, dst_colorspace=tags[0], dst_color_range=1)
            frame.pts, frame.time_base = round(moment / base), base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if tone is not None:
            at = np.arange(int(44100 * (times[-1] + step - sound_from))) / 44100 + sound_from
            wave = np.where(at >= 0.5, np.sin(2 * np.pi * 440 * at) * 12000, 0).astype(np.int16)
            resampler = av.AudioResampler(tone.codec_context.format, "stereo", 44100)
            for first in range(0, len(wave), 1024):
                part = np.repeat(wave[first : first + 1024], 2)[None]
                piece = av.AudioFrame.from_ndarray(part, format="s16", layout="stereo")
                piece.sample_rate = 44100
                piece.pts, piece.time_base = first + round(44100 * sound_from), Fraction(1, 44100)
                for ready in resampler.resample(piece):
                    output.mux(tone.encode(ready))
            output.mux(tone.encode(None))
    return path


def read(path: Path) -> tuple[list[Fraction], list[np.ndarray]]:
    """Return the times, in seconds, and the RGB pictures of a clip."""
    with av.open(str(path)) as container:
        shots = list(container.decode(video=0))
        return [f.pts * Fraction(f.time_base) for f in shots], [f.to_ndarray(format="rgb24") for f in shots]


def heard(path: Path) -> tuple[float, float]:
    """Return when sound begins, in seconds, and its frequency in Hz."""
    with av.open(str(path)) as container:
        parts, begin, rate = [], 0.0, 0
        for frame in container.decode(audio=0):
            if not parts:
                begin, rate = float(frame.pts * frame.time_base), frame.sample_rate
            wave = frame.to_ndarray()
            parts.append((wave if wave.shape[0] > 1 else wave.reshape(-1, frame.layout.nb_channels).T)[0])
    wave = np.concatenate(parts).astype(float)
    onset = int(np.argmax(np.abs(wave) > 0.2 * np.abs(wave).max()))
    tone = wave[onset : onset + 8192]
    return begin + onset / rate, float(np.argmax(np.abs(np.fft.rfft(tone, 65536))) * rate / 65536)


def heat(picture: np.ndarray, x: float, y: float, of: tuple[int, int]) -> int:
    """Return how coloured the picture is around a place, 0 to 255; grey is 0."""
    px, py = int(x * of[0]), int(y * of[1])
    patch = picture[py - 3 : py + 4, px - 3 : px + 4].astype(int).reshape(-1, 3).mean(0)
    return int(patch.max() - patch.min())


def marked(strip: np.ndarray) -> float:
    """Return the middle of the mark behind a word, as a share of the width."""
    pill = np.abs(strip.astype(int) - np.array([0xFF, 0xD9, 0xA0])).max(-1) < 14
    return float(np.flatnonzero(pill.any(0)).mean() / strip.shape[1]) if pill.any() else -1.0


def only(folder: Path, *names: str) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


# --- the sheet ------------------------------------------------------------------------------------------


def sheet_parts(sheet: Image.Image, frames: int, rows: int) -> list[list[np.ndarray]]:
    """Cut a sheet of white frames into its pictures, found by the gaps between them."""
    pixels = np.asarray(sheet).astype(int)
    ground = (np.abs(pixels - 255).max(-1) > 20)[:, 170:]
    column = ground[:, 20:40].all(1)
    edges = np.flatnonzero(np.diff(np.r_[False, column, False].astype(int)))
    spans = [(a, b) for a, b in edges.reshape(-1, 2).tolist() if b - a > 20]
    assert len(spans) == rows
    parts = []
    for top, bottom in spans:
        row = ground[top + 2 : bottom - 2].all(0)
        sides = np.flatnonzero(np.diff(np.r_[False, row, False].astype(int))).reshape(-1, 2).tolist()
        assert len(sides) == frames
        parts.append([pixels[top:bottom, 170 + a : 170 + b] for a, b in sides])
    return parts


def test_sheet_shows_each_word_in_each_frame() -> None:
    maps = [cell(3, 0, 0, 0), cell(3, 2, 2, 3)]
    part = segment("dog runs", 0, 3, (320, 240), maps, frames=3)
    frames = [Image.new("RGB", (320, 240), GREY)] * 3
    rows = sheet_parts(part.overlay(frames), 3, 3)
    for row, word in enumerate((None, (0, 0, 0), (2, 2, 3))):
        for frame in range(3):
            tile = rows[row][frame]
            size = (tile.shape[1], tile.shape[0])
            coloured = {
                (r, c)
                for r in range(3)
                for c in range(4)
                if heat(tile, (c + 0.5) / 4, (r + 0.5) / 3, size) > 60
            }
            assert coloured == ({word[1:]} if word and word[0] == frame else set())
            # bare frames as they are, those under the heat dimmed
            assert abs(int(tile[size[1] // 2, size[0] // 2, 0]) - (120 if row == 0 else 79)) <= 2


def test_bars_are_as_long_as_the_frames_shares() -> None:
    cells = np.repeat(np.array([[0.6], [0.3], [0.1]], np.float32) / 12, 12, 1)
    part = segment("dog", 0, 3, (320, 240), [cells], frames=3)
    pixels = np.asarray(frame_sheet(part, [Image.new("RGB", (320, 240), GREY)] * 3)).astype(int)
    bar = np.abs(pixels - np.array([0x59, 0x63, 0x6E])).max(-1) < 3
    row = bar[:, 174:].sum(1).argmax()
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, bar[row, 170:].astype(int), 0])))[::2]
    track = 240
    # full length is 75 %; the tick of the even share cuts through longer bars
    assert runs.sum() == pytest.approx(track * (0.6 + 0.3 + 0.1) / 0.75, abs=5)


def test_sheet_takes_frames_and_names_its_times() -> None:
    part = segment("dog", 61, 65, (320, 240), [cell(2, 0, 1, 1)], frames=2)
    pixels = np.full((240, 320, 3), 120, np.uint8)
    frames = [video.Frame(i, t, pixels) for i, t in enumerate(part.times)]
    same = frame_sheet(part, [pixels, pixels])
    assert np.array_equal(np.asarray(frame_sheet(part, frames)), np.asarray(same))
    assert frame_sheet(part, frames, width=700).width == 700
    assert clock(61) == "1:01"
    assert clock(3723.46) == "1:02:03.5"
    assert clock(59.97) == "1:00"


def test_sheet_of_a_model_without_attention_says_so() -> None:
    part = segment("dog", 0, 2, (320, 240), [None], frames=2)
    frames = [Image.new("RGB", (320, 240), GREY)] * 2
    silent = np.asarray(frame_sheet(part, frames)).astype(int)
    assert (silent.max(-1) - silent.min(-1))[:, 200:].max() < 60  # no heat anywhere
    long = frame_sheet(segment("dog " * 30, 0, 2, (320, 240), [cell(40, 0, 0, 0)] * 30, 40), [frames[0]] * 40)
    assert long.width > 40 * 96


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ([(320, 240)], {}, "1 pictures for a caption of 2 frames"),
        ([(320, 240), (200, 400)], {}, "another picture"),
        ([(320, 240)] * 2, {"width": 160}, "at least"),
    ],
)
def test_sheet_refuses(frames: list[tuple[int, int]], options: dict[str, int], message: str) -> None:
    part = segment("dog", 0, 2, (320, 240), [cell(2, 0, 0, 0)], frames=2)
    with pytest.raises(ValueError, match=message):
        frame_sheet(part, [Image.new("RGB", size) for size in frames], **options)


# --- words in time --------------------------------------------------------------------------------------


def test_words_share_the_segment() -> None:
    part = segment("a motorcycle", 2, 12, (4, 3), [None, None])
    edges = spoken(part)
    assert edges[0] == 2
    assert edges[-1] == 12
    assert edges[2] - edges[1] == pytest.approx(4 * (edges[1] - edges[0]))
    assert spoken(segment("", 2, 12, (4, 3), [])).tolist() == [2.0]


# --- the clip -------------------------------------------------------------------------------------------


def test_heat_follows_the_word_and_the_frame(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", times=[i / 10 for i in range(12)])
    maps = [cell(4, 0, 0, 0), cell(4, 3, 2, 3)]  # "left" in the first quarter, "right" in the last
    caption = VideoCaption((segment("left right", 0.1, 0.9, (320, 180), maps),), 1.2)
    done: list[float] = []
    written = caption.overlay(source, tmp_path / "out.mp4", progress=done.append)
    assert written == WrittenClip(tmp_path / "out.mp4", written.size, (320, 180), 12, 1.2, None)
    times, pictures = read(written.path)
    assert [round(float(t), 3) for t in times] == [i / 10 for i in range(12)]
    assert done == pytest.approx([(i + 1) / 10 for i in range(12)])
    assert written.size[0] == 320
    assert written.size[1] % 2 == 0
    edges = spoken(caption.segments[0])
    nearest = np.abs(caption.segments[0].times[None] - np.arange(12)[:, None] / 10).argmin(1)
    for i, picture in enumerate(pictures):
        assert picture.shape == (written.size[1], 320, 3)
        moment = i / 10
        said = 0 if edges[0] <= moment < edges[1] else 1 if edges[1] <= moment < edges[2] else None
        corners = [heat(picture, x, y, (320, 180)) > 60 for x, y in ((1 / 8, 1 / 6), (7 / 8, 5 / 6))]
        shown = (said == 0 and nearest[i] == 0, said == 1 and nearest[i] == 3)
        assert tuple(corners) == shown
        # dimmed while something is said, else untouched
        assert abs(int(picture[90, 160, 0]) - (120 if said is None else 79)) <= 3
    assert sum(heat(p, 1 / 8, 1 / 6, (320, 180)) > 60 for p in pictures) >= 2
    only(tmp_path, "in.mp4", "out.mp4")


def test_strip_marks_the_word_and_the_present(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", times=[i / 10 for i in range(13)])
    written = write_overlay_clip(source, plain((320, 180)), tmp_path / "out.mp4")
    strips = [p[180:] for p in read(written.path)[1]]
    marks = [marked(s) for s in strips]
    assert all(0 < m < 0.15 for m in marks[:4])
    assert all(0.1 < m < 0.4 for m in marks[6:10])
    assert max(marks[:4]) < min(marks[6:10])
    assert marks[10:] == [-1.0] * 3  # the segment is over
    assert strips[12].min() > 240
    heads = []
    for strip in strips[:10]:
        line = strip[40:48].astype(int)  # brown, on the line of time
        heads.append(int((line[..., 0] - line[..., 2]).sum(0).argmax()))
    steps = np.diff(heads)
    assert steps.min() > 8
    assert steps.max() - steps.min() <= 4


def test_variable_rate_keeps_its_times(tmp_path: Path) -> None:
    times = [0, 0.04, 0.05, 0.3, 0.345, 0.9, 1.001, 1.5]
    for name in ("in.mp4", "in.mkv"):
        source = make_clip(tmp_path / name, times=times)
        for kind in ("out.mp4", "out.webm"):
            written = write_overlay_clip(source, plain((320, 180), 1.5), tmp_path / kind)
            assert [float(t) for t in read(written.path)[0]] == pytest.approx(times, abs=0.0011)
            assert written.frames == 8


def test_rate_and_duration_are_exact(tmp_path: Path) -> None:
    base = Fraction(1001, 30000)
    source = make_clip(tmp_path / "in.mp4", times=[float(i * base) for i in range(20)], base=base)
    written = write_overlay_clip(source, plain((320, 180)), tmp_path / "out.mp4")
    assert read(written.path)[0] == [i * base for i in range(20)]
    assert written.duration == pytest.approx(float(20 * base))
    with av.open(str(written.path)) as container:
        assert container.duration / 1e6 == pytest.approx(float(20 * base), abs=0.002)
        assert container.streams.video[0].average_rate == 1 / base


def test_clip_that_does_not_begin_at_zero(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.ts", times=[5 + i / 10 for i in range(10)], sound="mp2", sound_from=5.0)
    written = write_overlay_clip(source, plain((320, 180)), tmp_path / "out.mp4")
    assert [float(t) for t in read(written.path)[0]] == pytest.approx([i / 10 for i in range(10)], abs=0.001)
    times = [f.time for f in video.frames(source, every=0)]
    assert times == pytest.approx([float(t) for t in read(written.path)[0]], abs=0.002)  # one clock for both
    assert marked(read(written.path)[1][0][180:]) > 0


def test_one_frame(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", times=[0])
    written = write_overlay_clip(source, plain((320, 180), 0.1), tmp_path / "out.mp4")
    with av.open(str(written.path)) as container:
        assert container.duration > 30_000
    assert written.frames == 1


def test_times_that_run_backwards_are_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_clip(tmp_path / "in.mp4")
    original = video_overlay._Video._shot
    wrong = {2: None, 4: 0, 5: 0}

    def damaged(self: Any, frame: Any) -> Any:
        shot = original(self, frame)
        index = round(shot.time * float(self.time_base) * 10)
        shot.time = wrong.get(index, shot.time)
        return shot

    monkeypatch.setattr(video_overlay._Video, "_shot", damaged)
    written = write_overlay_clip(source, plain((320, 180)), tmp_path / "out.mp4")
    assert [float(t) for t in read(written.path)[0]] == pytest.approx([i / 10 for i in range(10)], abs=0.002)


def test_rotation_is_applied(tmp_path: Path) -> None:
    corner = np.full((180, 320, 3), 120, np.uint8)
    corner[:90, :160] = (220, 30, 30)
    source = make_clip(tmp_path / "in.mp4", picture=lambda i: corner, times=[0, 0.1, 0.2])
    data = source.read_bytes()
    at = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 16
    for degrees, matrix, place in (
        (90, (0, 1, -1, 0), (3 / 4, 1 / 4)),
        (180, (-1, 0, 0, -1), (3 / 4, 3 / 4)),
        (270, (0, -1, 1, 0), (1 / 4, 3 / 4)),
    ):
        a, b, c, d = (65536 * m for m in matrix)
        turned = tmp_path / f"in{degrees}.mp4"
        turned.write_bytes(data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :])
        size = (180, 320) if degrees != 180 else (320, 180)
        written = write_overlay_clip(turned, VideoCaption((), 0.3), tmp_path / "out.mp4")
        assert written.picture == size
        with av.open(str(written.path)) as container:
            assert next(container.decode(video=0)).rotation == 0
        picture = read(written.path)[1][0]
        left = (written.size[0] - size[0]) // 2
        inside = picture[: size[1], left : left + size[0]]
        red = [(x, y) for x in (1 / 4, 3 / 4) for y in (1 / 4, 3 / 4) if heat(inside, x, y, size) > 100]
        assert red == [place]
        seen = next(iter(video.frames(turned))).image  # what is captioned has the same side up
        assert seen.shape == (size[1], size[0], 3)
        assert heat(seen, *place, size) > 100


def test_odd_and_small_sizes(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(40, 200, 321, dtype=np.uint8)[None, :, None], (181, 321, 3))
    source = make_clip(
        tmp_path / "in.mkv",
        (321, 181),
        [0, 0.1],
        picture=lambda i: np.ascontiguousarray(ramp),
        codec="ffv1",
        pix_fmt="bgr0",
    )
    written = write_overlay_clip(source, VideoCaption((), 0.2), tmp_path / "out.mp4")
    assert written.picture == (321, 181)
    assert written.size[0] == 322
    assert written.size[1] % 2 == 0
    assert written.notes == ("width 321 became 322: it must be even",)
    picture = read(written.path)[1][0][:180]
    assert np.abs(picture[:, :321].astype(int) - ramp[:180]).max() < 12
    assert abs(int(picture[50, 321, 0]) - 200) < 12
    tiny = make_clip(tmp_path / "tiny.mp4", (64, 48), [0, 0.1])
    written = write_overlay_clip(tiny, plain((64, 48), 0.2), tmp_path / "out.mp4")
    assert written.size[0] == 240
    assert written.notes == ("width 64 became 240, to give the caption room",)
    first = read(written.path)[1][0]
    assert first[5, 5].min() > 240
    assert first[10, 90:150].max() < 200


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", ratio=Fraction(4, 3), times=[0, 0.1])
    size = next(iter(video.frames(source))).image.shape[1::-1]
    assert size == (427, 180)
    written = write_overlay_clip(source, plain(size, 0.2), tmp_path / "out.mp4")
    assert written.picture == (320, 180)
    with av.open(str(written.path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


def test_high_dynamic_range_becomes_standard(tmp_path: Path) -> None:
    white = np.full((180, 320, 3), round(0.58 * 65535), np.uint16)  # the white of paper, in PQ
    source = make_clip(
        tmp_path / "in.mkv",
        picture=lambda i: white,
        codec="ffv1",
        pix_fmt="yuv420p10le",
        tags=(9, 16, 9),
        times=[0, 0.1],
    )
    written = write_overlay_clip(source, VideoCaption((), 0.2), tmp_path / "out.mp4")
    assert read(written.path)[1][0][90, 160].min() > 225  # 147 if the numbers were taken as they are


def test_colours_stay(tmp_path: Path) -> None:
    colour = np.full((180, 320, 3), (200, 60, 30), np.uint8)
    for tags in ((1, 1, 1), (5, 6, 6)):
        source = make_clip(tmp_path / "in.mp4", picture=lambda i: colour, tags=tags, times=[0, 0.1])
        written = write_overlay_clip(source, VideoCaption((), 0.2), tmp_path / "out.mp4")
        np.testing.assert_allclose(read(written.path)[1][0][90, 160], (200, 60, 30), atol=4)


def test_frames_that_change_size(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.ts", (320, 180), [0, 0.1, 0.2])
    make_clip(tmp_path / "b.ts", (400, 226), [3, 3.1, 3.2])
    source = tmp_path / "in.ts"
    source.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    written = write_overlay_clip(source, plain((320, 180), 4), tmp_path / "out.mp4")
    assert written.frames == 6
    assert written.picture == (320, 180)
    assert any("change size" in note for note in written.notes)


# --- sound ----------------------------------------------------------------------------------------------


def test_aac_is_copied(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", sound="aac")
    written = write_overlay_clip(source, plain((320, 180)), tmp_path / "out.mp4")
    assert written.sound == "copied"

    def packets(path: Path) -> list[tuple[int | None, bytes]]:
        with av.open(str(path)) as container:
            return [(p.pts, bytes(p)) for p in container.demux(audio=0) if p.size]

    assert packets(source) == packets(written.path)
    onset, frequency = heard(written.path)
    assert onset == pytest.approx(0.5, abs=0.03)
    assert frequency == pytest.approx(440, abs=2)


@pytest.mark.parametrize(
    ("name", "codec", "result"),
    [
        ("in.mkv", "pcm_s16le", "out.mp4"),
        ("in.avi", "libmp3lame", "out.mp4"),
        ("in.mkv", "flac", "out.mp4"),
        ("in.mp4", "aac", "out.webm"),
    ],
)
def test_other_sound_is_converted(tmp_path: Path, name: str, codec: str, result: str) -> None:
    source = make_clip(
        tmp_path / name,
        sound=codec,
        codec="mpeg4" if name.endswith("avi") else "libx264",
        base=Fraction(1, 10),
    )
    written = write_overlay_clip(source, plain((320, 180)), tmp_path / result)
    assert written.sound == "converted"
    assert written.notes == ()
    onset, frequency = heard(written.path)
    assert onset == pytest.approx(0.5, abs=0.06)
    assert frequency == pytest.approx(440, abs=2)
    with av.open(str(written.path)) as container:
        assert container.streams.audio[0].codec_context.name == ("aac" if result.endswith("mp4") else "opus")


# --- animations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations(tmp_path: Path, kind: str) -> None:
    colours = [(200, 30, 30), (30, 160, 30), (30, 30, 200)]
    frames = [Image.new("RGB", (320, 180), colour) for colour in colours]
    source = tmp_path / f"in.{kind}"
    frames[0].save(
        source, save_all=True, append_images=frames[1:], duration=[200, 500, 300], loop=0, lossless=True
    )
    written = write_overlay_clip(source, VideoCaption((), 1.0), tmp_path / "out.mp4")
    times, pictures = read(written.path)
    assert [float(t) for t in times] == pytest.approx([0, 0.2, 0.7])
    assert written.duration == pytest.approx(1.0)
    with av.open(str(written.path)) as container:
        assert container.duration / 1e6 == pytest.approx(1.0, abs=0.01)
    for picture, colour in zip(pictures, colours, strict=True):
        np.testing.assert_allclose(picture[90, 160], colour, atol=12)


# --- what goes wrong ------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_inputs_that_are_no_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "playlist.mp4").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:1/x.ts\n"
    )
    whole = make_clip(tmp_path / "whole.mp4", times=[0, 0.1], sound="aac")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:1000])
    with av.open(str(tmp_path / "sound.mp4"), "w") as output:
        stream: Any = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    before = sorted(p.name for p in tmp_path.iterdir())
    for name in ("text.mp4", "empty.mp4", "playlist.mp4", "cut.mp4", "sound.mp4", "missing.mp4"):
        with pytest.raises(VideoOverlayError) as error:
            write_overlay_clip(tmp_path / name, plain((320, 180)), tmp_path / "out.mp4")
        one_line(error, name)
    only(tmp_path, *before)


def test_other_mistakes(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", times=[0, 0.1])
    data = source.read_bytes()
    with pytest.raises(VideoOverlayError, match="another clip") as error:
        write_overlay_clip(source, plain((180, 320)), tmp_path / "out.mp4")
    one_line(error, "in.mp4", "320×180", "180×320")
    with pytest.raises(VideoOverlayError, match=r"\.mp4 or \.webm"):
        write_overlay_clip(source, plain((320, 180)), tmp_path / "out.avi")
    with pytest.raises(VideoOverlayError, match="replace the clip itself"):
        write_overlay_clip(source, plain((320, 180)), tmp_path / "." / "in.mp4")
    with pytest.raises(OSError, match=r"^cannot write .*out\.mp4: No such file") as failed:
        write_overlay_clip(source, plain((320, 180)), tmp_path / "no" / "out.mp4")
    one_line(failed)
    assert source.read_bytes() == data
    only(tmp_path, "in.mp4")


def test_names_are_not_read_as_anything_else(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", times=[0, 0.1])
    odd = tmp_path / "a:b %03d é?#.mp4"
    shutil.copy(source, odd)
    written = write_overlay_clip(odd, plain((320, 180), 0.2), tmp_path / "c:%d ü.mp4")
    assert written.path.is_file()
    only(tmp_path, "in.mp4", odd.name, "c:%d ü.mp4")


def test_truncated_clip(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 180, 320, 3), np.uint8)
    source = make_clip(tmp_path / "in.mkv", times=[i / 10 for i in range(30)], picture=lambda i: noise[i])
    data = source.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: len(data) // 2])
    written = write_overlay_clip(cut, plain((320, 180), 3), tmp_path / "out.mp4")
    assert 5 < written.frames < 25
    assert len(read(written.path)[0]) == written.frames


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "captioner\[video\]"'):
        write_overlay_clip(tmp_path / "in.mp4", plain((320, 180)), tmp_path / "out.mp4")


def test_pyav_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys, captioner.video_overlay\n"
        "print([name for name in ('av', 'cv2', 'scenedetect') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.skipif(sys.platform == "win32", reason="limits a process's files in the POSIX way")
def test_full_disk(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (10, 180, 320, 3), np.uint8)
    source = make_clip(tmp_path / "in.mp4", picture=lambda i: noise[i])
    target = tmp_path / "out.mp4"
    target.write_text("old")
    code = (
        "import resource, signal, sys\n"
        "from captioner.caption import VideoCaption\n"
        "from captioner.video_overlay import write_overlay_clip\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))\n"
        "try:\n    write_overlay_clip(sys.argv[1], VideoCaption((), 1.0), sys.argv[2])\n"
        "except OSError as error:\n    print(error)\n"
    )
    for limit in (1000, 100_000):
        run = subprocess.run(
            [sys.executable, "-c", code, str(source), str(target), str(limit)], capture_output=True, text=True
        )
        assert run.stdout == f"cannot write {target}: File too large\n"
        assert run.stderr == ""
        assert target.read_text() == "old"
        only(tmp_path, "in.mp4", "out.mp4")


def test_interrupted(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4")

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_overlay_clip(source, plain((320, 180)), tmp_path / "out.mp4", progress=stop)
    only(tmp_path, "in.mp4")


def peak(source: Path, target: Path) -> int:
    """Return the memory, in MiB, that writing takes in a process of its own."""
    code = (
        "import resource, sys\n"
        "from captioner.caption import VideoCaption\n"
        "from captioner.video_overlay import write_overlay_clip\n"
        "write_overlay_clip(sys.argv[1], VideoCaption((), 1.0), sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(source), str(target)], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    # 250 more pictures, which are 41 MiB as RGB
    short = make_clip(tmp_path / "short.mp4", times=[i / 25 for i in range(100)], sound="aac")
    long = make_clip(tmp_path / "long.mp4", times=[i / 25 for i in range(350)], sound="aac")
    assert peak(long, tmp_path / "out.mp4") - peak(short, tmp_path / "out.mp4") < 12


@pytest.mark.slow
def test_memory_of_a_long_clip(tmp_path: Path) -> None:
    short = make_clip(tmp_path / "short.mp4", times=[i / 25 for i in range(25 * 60)], sound="aac")
    long = make_clip(tmp_path / "long.mp4", times=[i / 25 for i in range(25 * 600)], sound="aac")
    assert peak(long, tmp_path / "out.mp4") < 1.1 * peak(short, tmp_path / "out.mp4")


# --- browsers -------------------------------------------------------------------------------------------

PAGE = """<!doctype html><meta charset=utf-8><video id=v muted playsinline src=clip></video><script>
"use strict";
const video = document.getElementById("v");
const tell = (what) => fetch("report", {method: "POST", body: JSON.stringify(what)});
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
video.onerror = () => tell({error: (video.error || {}).message || "error"});
video.onloadeddata = async () => {
  try {
    const began = performance.now();
    await video.play();
    while (video.currentTime < 0.2 && performance.now() - began < 20000) await pause(20);
    const played = video.currentTime;
    video.pause();
    const pixels = [];
    for (const moment of @MOMENTS@) {
      await new Promise((done) => { video.onseeked = done; video.currentTime = moment; });
      const canvas = document.createElement("canvas");
      canvas.width = video.videoWidth;
      canvas.height = video.videoHeight;
      const context = canvas.getContext("2d");
      context.drawImage(video, 0, 0);
      pixels.push(Array.from(context.getImageData(@X@, @Y@, 1, 1).data).slice(0, 3));
    }
    await tell({duration: video.duration, size: [video.videoWidth, video.videoHeight], played, pixels,
      frames: video.getVideoPlaybackQuality().totalVideoFrames,
      sound: video.mozHasAudio ?? video.webkitAudioDecodedByteCount > 0});
  } catch (error) {
    await tell({error: String(error)});
  }
};
</script>"""


def ask_browser(
    program: str, clip: Path, folder: Path, moments: list[float], place: tuple[int, int]
) -> dict[str, Any]:
    """Play a clip in a headless browser; return what its page reports of it."""
    page = PAGE.replace("@MOMENTS@", str(moments)).replace("@X@", str(place[0])).replace("@Y@", str(place[1]))
    files = {
        "/": ("text/html; charset=utf-8", page.encode()),
        "/clip": (f"video/{clip.suffix[1:]}", clip.read_bytes()),
    }
    reports: list[dict[str, Any]] = []
    reported = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path not in files:
                self.send_error(404)
                return
            kind, data = files[self.path]
            first, last = 0, len(data) - 1
            wanted = self.headers.get("Range")
            if wanted:
                low, high = wanted.removeprefix("bytes=").split("-")
                first, last = int(low), int(high) if high else last
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            self.wfile.write(data[first : last + 1])

        def do_POST(self) -> None:
            reports.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            reported.set()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:  # browsers hang up when they have seen enough
            pass

    folder.mkdir()
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    if "firefox" in program:
        settings = {
            "media.autoplay.default": 0,
            "browser.shell.checkDefaultBrowser": False,
            "datareporting.policy.dataSubmissionEnabled": False,
            "app.update.enabled": False,
        }
        lines = [f"user_pref({json.dumps(k)}, {json.dumps(v)});" for k, v in settings.items()]
        (folder / "user.js").write_text("\n".join(lines))
        command = [program, "--headless", "--no-remote", "--profile", str(folder), address]
    else:
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", f"--user-data-dir={folder}", address]
        command.insert(-1, "--autoplay-policy=no-user-gesture-required")
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "HOME": str(folder)},
    )
    try:
        reported.wait(90)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        server.shutdown()
        server.server_close()
    return reports[0] if reports else {"error": "the browser reported nothing"}


def browser(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    return found


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WrittenClip]:
    folder = tmp_path_factory.mktemp("clips")
    source = make_clip(folder / "in.mp4", times=[i / 25 for i in range(50)], sound="aac")
    return {
        kind: write_overlay_clip(source, plain((320, 180), 1.6), folder / f"out.{kind}")
        for kind in ("mp4", "webm")
    }


@pytest.mark.skipif(sys.platform == "win32", reason="starts and ends browsers in the POSIX way")
@pytest.mark.parametrize("kind", ["mp4", "webm"])
@pytest.mark.parametrize(
    "names",
    [("chromium", "chromium-browser", "google-chrome"), ("firefox-esr", "firefox")],
    ids=lambda n: n[0],
)
def test_browsers_play_it(
    clips: dict[str, WrittenClip], tmp_path: Path, names: tuple[str, ...], kind: str
) -> None:
    program = browser(*names)
    written = clips[kind]
    # the middle of the left cell: hot while "left" is said, then dim, then bare
    report = ask_browser(program, written.path, tmp_path / "profile", [0.4, 1.4, 1.8], (40, 90))
    assert "error" not in report, report
    assert report["duration"] == pytest.approx(2.0, abs=0.06)
    assert tuple(report["size"]) == written.size
    assert report["played"] >= 0.2
    assert report["frames"] >= 3
    assert report["sound"]
    hot, dim, bare = report["pixels"]
    assert max(hot) - min(hot) > 60
    assert max(dim) - min(dim) < 15
    assert abs(dim[0] - 79) < 10
    assert abs(bare[0] - 120) < 10
