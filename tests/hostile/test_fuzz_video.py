"""Clips of every container, damaged in every way: read, or refused in one line; no crash, no hang."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_worker import EXAMPLES, Worker, worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioner import video
from captioner.video import VideoError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import hostile

CLIPS = sorted(
    name
    for name in hostile.good_files()
    if name.endswith((".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".m2ts", ".flv"))
    or name.startswith("moving")
)
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    yield from worker(tmp_path_factory.mktemp("clips"))


@quick
@given(name=st.sampled_from(CLIPS), seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=3))
def test_fuzz_damaged_clips(name: str, seeds: list[int], reader: Worker) -> None:
    data = hostile.good_files()[name]
    for seed in seeds:
        data = hostile.mutate(data, random.Random(seed))
    reader.give(Path(name).suffix, data)


@quick
@given(
    name=st.sampled_from(CLIPS),
    places=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
def test_fuzz_written_over_structure(name: str, places: list[tuple[float, bytes]], reader: Worker) -> None:
    data = bytearray(hostile.good_files()[name])
    for share, piece in places:
        # most of a small file's structure is at its two ends
        at = int(min(share, 1 - share) * 400)
        at = at if share < 0.5 else max(0, len(data) - 400 + at)
        data[at : at + len(piece)] = piece
    reader.give(Path(name).suffix, bytes(data))


@quick
@given(
    kinds=st.lists(
        st.sampled_from(
            [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"hdlr", b"stsd", b"mdat", b"free", b"moof"]
        ),
        max_size=12,
    ),
    lengths=st.lists(st.sampled_from([0, 1, 7, 8, 9, 16, 100, 2**31, 2**32 - 1]), min_size=12, max_size=12),
    rest=st.binary(max_size=60),
)
def test_fuzz_boxes_with_any_length(
    kinds: list[bytes], lengths: list[int], rest: bytes, reader: Worker
) -> None:
    boxes = b"".join(n.to_bytes(4, "big") + kind for kind, n in zip(kinds, lengths, strict=False))
    reader.give(".mp4", hostile.box(b"ftyp", b"isom\0\0\0\0isom") + boxes + rest)


@quick
@given(
    elements=st.lists(
        st.tuples(
            st.sampled_from([b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\x83", b"\x86", b"\xec"]),
            st.sampled_from(
                [b"\x80", b"\x81", b"\xff", b"\x40\x05", b"\x01" + b"\xff" * 7, b"\x08\x7f\xff\xff\xff"]
            ),
            st.binary(max_size=6),
        ),
        max_size=40,
    )
)
def test_fuzz_elements_with_any_length(elements: list[tuple[bytes, bytes, bytes]], reader: Worker) -> None:
    reader.give(".mkv", b"\x1aE\xdf\xa3\x84\x42\x82\x81w" + b"".join(b"".join(e) for e in elements))


# found, and what it takes to find them again


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    begun = time.process_time()
    with pytest.raises(VideoError) as error:
        for _ in video.frames(path, every=0.5):
            pass
    assert time.process_time() - begun < 5
    return str(error.value)


def test_segments_within_segments(tmp_path: Path) -> None:
    assert "damaged" in refused(tmp_path / "a.mkv", hostile._matroska_nested(20_000))


def test_countless_boxes(tmp_path: Path) -> None:
    start = hostile.box(b"ftyp", b"isom\0\0\0\0isom")
    assert "damaged" in refused(tmp_path / "a.mp4", start + hostile.box(b"free") * 300_000)


@pytest.mark.parametrize(
    "start", ["ffconcat version 1.0\nfile good.mp4\n", "#EXTM3U\n#EXTINF:1,\ngood.mp4\n"]
)
def test_lists_that_are_no_text_open_no_other_file(start: str, tmp_path: Path) -> None:
    (tmp_path / "good.mp4").write_bytes(hostile.good_files()["mpeg4.mp4"])
    assert "lists other files" in refused(tmp_path / "a.mp4", start.encode() + b"#\x01\n")


def test_frames_as_large_as_a_house(tmp_path: Path) -> None:
    large = hostile._jpeg_size(hostile.good_files()["plain.jpg"], 16_000, 16_000)
    message = refused(tmp_path / "a.avi", hostile._mjpeg_avi(large, 16_000, 16_000, 20))
    assert "16000 x 16000" in message
    assert "67 million" in message
    assert "67 million" in refused(tmp_path / "a.gif", hostile.gif(9_000, 9_000, 5))


def test_an_animation_whose_bytes_cannot_fill_its_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_MOST_WORK", 2**24)
    path = tmp_path / "a.gif"
    path.write_bytes(hostile.gif(1000, 1000, 400))
    times = []
    with pytest.raises(VideoError, match=r"nothing was read after \d"):  # noqa: PT012
        for frame in video.frames(path, every=0):
            times.append(frame.time)
    assert 5 < len(times) < 60
    path.write_bytes(hostile.gif(10, 10, 400))
    assert len(list(video.frames(path, every=0))) == 400


def test_a_file_that_was_never_filled_is_not_searched(tmp_path: Path) -> None:
    for name in ("mpeg1.mpg", "mpeg4.avi", "stream.m2ts", "vp9.webm"):
        path = tmp_path / name
        path.write_bytes(hostile.good_files()[name][:3000])
        os.truncate(path, 2**33)
        begun = time.process_time()
        with pytest.raises(VideoError, match="zeros"):
            next(video.frames(path))
        assert time.process_time() - begun < 1
