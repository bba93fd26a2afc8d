"""Pictures of every format, damaged in every way: read, or refused in one line; no crash, no hang."""

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

PICTURES = sorted(
    name
    for name in hostile.good_files()
    if not name.endswith((".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".m2ts", ".flv"))
)
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
damage = st.lists(st.integers(0, 2**32), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    yield from worker(tmp_path_factory.mktemp("pictures"))


@quick
@given(name=st.sampled_from(PICTURES), seeds=damage)
def test_fuzz_damaged_pictures(name: str, seeds: list[int], reader: Worker) -> None:
    data = hostile.good_files()[name]
    for seed in seeds:
        data = hostile.mutate(data, random.Random(seed))
    reader.give(Path(name).suffix, data)


@quick
@given(
    name=st.sampled_from(PICTURES),
    changes=st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=8)), max_size=4),
    end=st.binary(max_size=40),
)
def test_fuzz_written_over_headers(
    name: str, changes: list[tuple[int, bytes]], end: bytes, reader: Worker
) -> None:
    data = bytearray(hostile.good_files()[name])
    for at, piece in changes:
        data[at : at + len(piece)] = piece
    reader.give(Path(name).suffix, bytes(data) + end)


@quick
@given(magic=st.sampled_from(PICTURES), length=st.integers(0, 64), rest=st.binary(max_size=300))
def test_fuzz_beginnings_with_anything_behind(magic: str, length: int, rest: bytes, reader: Worker) -> None:
    reader.give(".jpg", hostile.good_files()[magic][:length] + rest)
