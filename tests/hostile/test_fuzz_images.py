"""Pictures of every format, damaged in every way: read, or refused in one line; no crash, no hang."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzz_worker import EXAMPLES, ROOT, Worker, worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner import images, inputs
from captioner.inputs import ImageError

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


# found, and what it takes to find them again


def test_bombs_take_neither_time_nor_memory(reader: Worker) -> None:
    """Each in a process that may take 3 GiB; what is not refused is read."""
    for name, data in hostile.bombs(small=True):
        reader.give(Path(name).suffix, data)
    assert reader.slowest < 10  # of the processor's time


def refused(data: bytes) -> str:
    begun = time.process_time()
    with pytest.raises(ImageError) as error:
        images.open_image(data)
    assert time.process_time() - begun < 3
    return str(error.value)


def test_scans_of_a_progressive_jpeg_are_counted() -> None:
    assert "2001 scans" in refused(hostile._many_scans(4000, 4000, 2000))
    images.open_image(hostile.good_files()["progressive.jpg"])


def test_tags_of_a_tiff_that_overlap_are_not_read() -> None:
    many = [(1_000 + n, 7, 900_000, 8) for n in range(2_000)]
    assert "tags" in refused(hostile.tiff([*hostile._tiff_entries(8, 8), *many], bytes(1_000_000)))
    values = [(1_000, 3, 5_000_000, 8)]
    assert "numbers" in refused(hostile.tiff([*hostile._tiff_entries(8, 8), *values], bytes(11_000_000)))


def test_comments_of_a_gif_are_counted() -> None:
    assert "comment" in refused(hostile.gif(8, 8, 2, comment=5_000))
    assert images.open_image(hostile.gif(8, 8, 2, comment=100)).size == (8, 8)


def test_headers_of_countless_parts_are_given_up() -> None:
    assert "too many parts" in refused(b"\xff\xd8" + b"\xff" * 2_000_000)
    assert "too many parts" in refused(b"P6\n#" + b"x" * 2_000_000)


def test_sides_have_a_limit_of_their_own() -> None:
    assert "a side of more than 1048576" in refused(hostile.png(2**21, 1, colour=0))
    assert "a side of more than 1048576" in refused(hostile.png(1, 2**21, colour=0, rows=1))


def test_large_run_length_bitmaps_are_refused() -> None:
    with_lines = dict(hostile.bombs(small=True))["run-length-lines.bmp"]
    assert "run-length" in refused(with_lines)


def test_greys_in_bands_are_those_at_once() -> None:
    values = np.random.default_rng(0).normal(0, 1000, (3000, 700)).astype(np.float32)
    values[5, 5] = np.nan
    low, high = np.nanmin(values), np.nanmax(values)
    known = np.where(np.isnan(values), low, values).astype(np.float64)
    expected = np.rint((known - float(low)) * (255 / (float(high) - float(low)))).astype(np.uint8)
    np.testing.assert_array_equal(images._grey_to_8_bits(values), expected)
    deep = np.arange(3000 * 700, dtype=np.uint32).reshape(3000, 700).astype(np.uint16)
    np.testing.assert_array_equal(images._from_16_bits(deep), (deep.astype(np.int64) + 128) // 257)


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 16 * 100 * 100)
    stream = io.BytesIO()
    Image.new("RGB", (300, 300)).save(stream, "PNG")
    data, inside, most = stream.getvalue(), [], []
    fit = images._fit

    def watched(*arguments: object) -> object:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return fit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "_fit", watched)
    preprocess = images.Preprocess(32, "squash", (0.0,) * 3, (1.0,) * 3)
    threads = [threading.Thread(target=images.load, args=(data, preprocess)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    begun = time.monotonic()
    with pytest.raises(ImageError, match="is empty"):
        images.open_image(tmp_path / "pipe.jpg")
    assert time.monotonic() - begun < 9


def test_a_pipe_without_an_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES", 5_000_000)
    os.mkfifo(tmp_path / "pipe.jpg")
    with subprocess.Popen(["sh", "-c", f"exec cat /dev/zero > '{tmp_path}/pipe.jpg'"]) as writer:
        with pytest.raises(ImageError, match="does not end"):
            images.open_image(tmp_path / "pipe.jpg")
        writer.kill()


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    for name in ("plain.webp", "plain.png", "plain.jpg", "moving.gif"):
        path = tmp_path / name
        path.write_bytes(hostile.good_files()[name][:1000])
        os.truncate(path, 2**36)
        with pytest.raises(ImageError, match="million bytes allowed"):
            images.open_image(path)


def test_libtiff_writes_nothing_of_its_own(tmp_path: Path) -> None:
    for name in ("fax.tif", "deflate.tif"):
        data = bytearray(hostile.good_files()[name])
        data[20:300] = bytes(280) if name == "fax.tif" else b"\x55" * 280
        (tmp_path / name).write_bytes(data)
    code = (
        "import sys\nfrom captioner.images import open_image\nfrom captioner.inputs import ImageError\n"
        "for path in sys.argv[1:]:\n    try: open_image(path)\n    except ImageError: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "fax.tif"), str(tmp_path / "deflate.tif")],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stderr == b""


@pytest.mark.parametrize("change", [{"size": 10**5}, {"fit": "crop", "resize": 10**6}])
def test_sizes_that_no_network_has_are_refused(change: dict[str, object]) -> None:
    good = {"size": 64, "fit": "squash", "mean": [0.0] * 3, "std": [1.0] * 3}
    with pytest.raises(ValueError, match="expected at most"):
        images.Preprocess.from_dict({**good, **change})
