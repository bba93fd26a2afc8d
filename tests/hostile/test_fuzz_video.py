"""Clips of every container, damaged in every way: read, or refused in one line; no crash, no hang."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_worker import EXAMPLES, Worker, worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
