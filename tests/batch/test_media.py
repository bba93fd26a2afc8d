from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lively import lively_captioner, pictures
from PIL import Image

from captioner import Captioner
from captioner.batch import (
    ClipResult,
    FileResult,
    caption_files,
    caption_media,
    find_files,
    to_record,
)
from captioner.caption import SCHEMA_VERSION, Segment, clock
from captioner.inputs import ImageError, find_images
from captioner.parallel import ahead


@pytest.fixture
def captioner() -> Captioner:
    return lively_captioner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty photos 00.png to 19.png; not to be changed."""
    folder = tmp_path_factory.mktemp("photos")
    for i, picture in enumerate(pictures(20)):
        Image.fromarray(picture).save(folder / f"{i:02}.png")
    return folder


def paths_of(folder: Path, count: int = 20) -> list[Path]:
    return [folder / f"{i:02}.png" for i in range(count)]


def texts(results: Sequence[FileResult | ClipResult]) -> list[str | None]:
    return [result.caption.text if result.caption else None for result in results]


@pytest.mark.parametrize(("size", "threads"), [(1, 1), (3, 2), (32, 1), (32, 4)])
def test_words_depend_on_nothing_but_the_photo(
    size: int, threads: int, folder: Path, captioner: Captioner
) -> None:
    expected = [captioner.caption(picture).text for picture in pictures(20)]
    torch.set_num_threads(threads)
    try:
        results = list(caption_files(captioner, paths_of(folder), batch_size=size))
        assert torch.get_num_threads() == threads  # as it was
    finally:
        torch.set_num_threads(1)
    assert texts(results) == expected
    assert [result.path for result in results] == [str(path) for path in paths_of(folder)]
    assert all(result.error is None for result in results)


@pytest.mark.parametrize("size", [1, 2, 32])
def test_bad_files_stop_no_other(size: int, folder: Path, captioner: Captioner, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("I am no picture.")
    cut = tmp_path / "cut.png"
    data = (folder / "00.png").read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    empty = tmp_path / "empty.png"
    empty.touch()
    missing = tmp_path / "missing.png"
    good = paths_of(folder, 3)
    results = list(
        caption_files(
            captioner, [text, good[0], cut, empty, good[1], missing, tmp_path, good[2]], batch_size=size
        )
    )
    assert [result.caption is None for result in results] == [
        True,
        False,
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    for place, path, reason in (
        (0, text, "not a picture"),
        (2, cut, "truncated"),
        (3, empty, "empty"),
        (5, missing, "no such file"),
        (6, tmp_path, "folder"),
    ):
        error = results[place].error
        assert error is not None
        assert error.startswith(f"{path}: ")
        assert reason in error
        assert "\n" not in error
    assert texts(results)[1] == captioner.caption(good[0]).text


def test_nothing_good_at_all(captioner: Captioner, tmp_path: Path) -> None:
    results = list(caption_files(captioner, [tmp_path / "a.jpg", tmp_path / "b.jpg"]))
    assert [result.caption for result in results] == [None, None]
    assert list(caption_files(captioner, [])) == []


def test_seeds_count_files_not_batches(folder: Path, captioner: Captioner, tmp_path: Path) -> None:
    paths: list[Path] = paths_of(folder, 6)
    paths.insert(2, tmp_path / "missing.png")  # counts as well
    options = {"sample": True, "seed": 40}
    runs = [texts(list(caption_files(captioner, paths, batch_size=size, **options))) for size in (1, 2, 32)]
    assert runs[0] == runs[1] == runs[2]
    expected = [
        captioner.caption(path, sample=True, seed=40 + i).text if path.exists() else None
        for i, path in enumerate(paths)
    ]
    assert runs[0] == expected
    assert texts(list(caption_files(captioner, paths, sample=True, seed=41))) != expected


def test_a_region_that_misses_one_photo(captioner: Captioner, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("wide.png", "small.png", "tall.png")]
    for path, size in zip(paths, ((200, 90), (30, 30), (90, 200)), strict=True):
        Image.fromarray(pictures(1)[0]).resize(size).save(path)
    results = list(caption_files(captioner, paths, region=(40, 0, 80, 90)))
    assert [result.caption is None for result in results] == [False, True, False]
    assert results[1].error == f"{paths[1]}: region 40,0,80,90 lies outside the photo (30x30 pixels)"
    assert texts(results)[2] == captioner.caption(paths[2], region=(40, 0, 80, 90)).text


def test_prefix_and_must_reach_every_photo(folder: Path, captioner: Captioner) -> None:
    for result in caption_files(captioner, paths_of(folder, 4), prefix="a gnu", must=["water"], batch_size=2):
        assert result.caption is not None
        assert result.caption.text.startswith("a gnu ")
        assert "water" in result.caption.text


def test_kinds_of_paths(folder: Path, captioner: Captioner) -> None:
    path = folder / "00.png"
    for given in (path, str(path), [os.fsencode(path)], iter([path])):
        results = list(caption_files(captioner, given))  # type: ignore[arg-type]
        assert [result.path for result in results] == [str(path)]
        assert results[0].caption is not None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"beams": 3}, "unknown option 'beams'"),
        ({"must": ["zebra"]}, "'zebra' is not in"),
        ({"beam": 0}, "beam must be"),
        ({"sample": True, "top_p": 0}, "top_p must be"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_read(
    options: dict[str, object], reason: str, captioner: Captioner
) -> None:
    def paths() -> Iterator[str]:
        raise AssertionError("read")
        yield ""

    with pytest.raises(ValueError, match=reason):
        caption_files(captioner, paths(), **options)  # not even iterated over


def test_a_prefix_that_is_too_long(folder: Path, captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="more than max_length 12"):
        list(caption_files(captioner, paths_of(folder), prefix="a dog " * 9))


def test_paths_are_read_as_they_are_needed(folder: Path, captioner: Captioner) -> None:
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield folder / "00.png"

    results = caption_files(captioner, endless(), batch_size=2)
    for _ in range(10):
        next(results)
    assert taken <= 20
    results.close()  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------
# Photos and videos


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    """An animation of eight pictures, a second each; not to be changed."""
    frames = [Image.fromarray(picture).resize((96, 64)) for picture in pictures(8)]
    path = folder / "clip.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000, lossless=True)
    return path


@pytest.mark.parametrize("size", [1, 3, 32])
def test_photos_and_videos_in_order(size: int, folder: Path, clip: Path, captioner: Captioner) -> None:
    photos = paths_of(folder, 6)
    gone = folder / "gone.mp4"
    paths = [clip, *photos[:3], gone, clip, *photos[3:]]
    read: list[tuple[str, float]] = []
    said: list[tuple[str, Segment]] = []
    results = list(
        caption_media(
            captioner,
            paths,
            batch_size=size,
            clips={"segment": 2, "end": 6},
            progress=lambda path, seconds: read.append((path, seconds)),
            said=lambda path, segment: said.append((path, segment)),
        )
    )
    assert [result.path for result in results] == [str(path) for path in paths]
    assert [isinstance(result, ClipResult) for result in results] == [path in (clip, gone) for path in paths]
    expected = captioner.caption_video(clip, segment=2, end=6)
    assert len(expected.segments) >= 2
    for place in (0, 5):
        assert results[place].caption.text == expected.text
        assert results[place].caption.duration == expected.duration == 6
        assert results[place].error is None
        assert results[place].seconds > 0
    assert texts(results[1:4]) + texts(results[6:]) == [captioner.caption(photo).text for photo in photos]
    assert (results[4].caption, results[4].error) == (
        None,
        f"{gone}: there is no such file; check the path",
    )
    assert [path for path, _ in said] == [str(clip)] * len(said)
    assert [segment for _, segment in said] == [
        *results[0].caption.segments,
        *results[5].caption.segments,
    ]
    assert max(seconds for _, seconds in read) == 6
    json.dumps(to_record(results[0], "tiny", attention=True), allow_nan=False)


def test_seeds_count_photos_and_videos(folder: Path, clip: Path, captioner: Captioner) -> None:
    photo = folder / "00.png"
    paths = [photo, clip, photo, photo, clip]
    results = texts(list(caption_media(captioner, paths, sample=True, seed=9)))
    assert results == [
        captioner.caption_video(path, sample=True, seed=9 + i).text
        if path == clip
        else captioner.caption(path, sample=True, seed=9 + i).text
        for i, path in enumerate(paths)
    ]


def test_a_region_that_misses_a_video(folder: Path, clip: Path, captioner: Captioner) -> None:
    wide = folder.parent / "wide.png"
    Image.fromarray(pictures(1)[0]).resize((200, 90)).save(wide)
    box = (120, 0, 180, 60)
    results = list(caption_media(captioner, [clip, wide], region=box))
    assert results[0].error == f"{clip}: region 120,0,180,60 lies outside the photo (96x64 pixels)"
    assert texts(results) == [None, captioner.caption(wide, region=box).text]
    inside = (0, 0, 48, 32)
    (result,) = caption_media(captioner, [clip], region=inside)
    assert texts([result]) == [captioner.caption_video(clip, region=inside).text]


def test_a_person_who_stops_a_video_keeps_what_was_captioned(clip: Path, captioner: Captioner) -> None:
    def stop(path: str, segment: Segment) -> None:
        raise KeyboardInterrupt

    results = caption_media(captioner, [clip, clip], clips={"segment": 2}, said=stop)
    first = next(results)
    assert isinstance(first, ClipResult)
    assert first.caption is not None
    assert len(first.caption.segments) == 1
    assert first.error == f"{clip}: interrupted at {clock(first.caption.segments[0].end)}"
    with pytest.raises(KeyboardInterrupt):
        next(results)


def test_files_are_looked_at_as_they_are_needed(folder: Path, clip: Path, captioner: Captioner) -> None:
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield clip if taken % 4 == 0 else folder / "00.png"

    results = caption_media(captioner, endless(), batch_size=2, clips={"end": 1})
    for _ in range(12):
        next(results)
    assert taken <= 16
    results.close()  # type: ignore[attr-defined]


def test_impossible_wishes_are_refused_before_any_file(captioner: Captioner) -> None:
    def paths() -> Iterator[str]:
        raise AssertionError("read")
        yield ""

    with pytest.raises(ValueError, match="'zebra' is not in"):
        caption_media(captioner, paths(), must=["zebra"])


def test_finding_photos_and_videos(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.mp4", "c.MoV", "d.ts", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "e.webm").touch()

    def names(found: list[Path]) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in found]

    assert names(find_files([tmp_path])) == ["a.mp4", "b.JPG", "c.MoV"]
    assert names(find_files([tmp_path], recursive=True)) == ["a.mp4", "b.JPG", "c.MoV", "deep/e.webm"]
    assert names(find_files([tmp_path / "*"])) == ["a.mp4", "b.JPG", "c.MoV", "deep/e.webm"]
    assert names(find_files([tmp_path / "*.ts", tmp_path / "notes.txt"])) == ["d.ts", "notes.txt"]
    assert names(find_images([tmp_path])) == ["b.JPG"]
    (tmp_path / "none" / "below").mkdir(parents=True)
    with pytest.raises(ImageError, match="no pictures or videos in this folder; they end in"):
        find_files([tmp_path / "none"])
    (tmp_path / "none" / "below" / "f.mkv").touch()
    with pytest.raises(ImageError, match="use --recursive"):
        find_files([tmp_path / "none"])


# --------------------------------------------------------------------------------------------------


def test_ahead_keeps_the_order() -> None:
    def work(i: int) -> int:
        time.sleep(0.01 * (i % 3 == 0))
        return i * i

    assert list(ahead(work, range(20), threads=4)) == [i * i for i in range(20)]
    assert list(ahead(work, [], threads=4)) == []


def test_ahead_is_ahead_but_not_far() -> None:
    begun: list[int] = []
    results = ahead(lambda i: begun.append(i), iter(range(1000)), threads=2)
    next(results)
    time.sleep(0.05)
    assert 2 <= len(begun) <= 4
    results.close()  # type: ignore[attr-defined]


def test_ahead_passes_errors_on() -> None:
    def work(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    results = ahead(work, range(9), threads=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_who_stops_early_does_not_wait() -> None:
    gate = threading.Event()
    results = ahead(lambda i: gate.wait(20) if i else True, range(9), threads=2)
    next(results)
    start = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 10
    gate.set()


# --------------------------------------------------------------------------------------------------


def test_records(folder: Path, captioner: Captioner) -> None:
    result = next(iter(caption_files(captioner, folder / "00.png")))
    assert result.caption is not None
    record = to_record(result, "tiny", "0123456789abcdef")
    assert record == {
        "path": str(folder / "00.png"),
        **result.caption.to_dict(),
        "model": "tiny",
        "model_sha256": "0123456789abcdef",
        "seconds": float(f"{result.seconds:.3g}"),
        "error": None,
    }
    assert 0 < result.seconds < 60
    full = to_record(result, "tiny", attention=True)
    assert np.shape(full["words"][0]["attention"]) == (1, 2, 2)
    failed = to_record(FileResult("a.jpg", None, "a.jpg: gone"), "tiny")
    assert failed == {
        "path": "a.jpg",
        "schema": SCHEMA_VERSION,
        "caption": "",
        "model": "tiny",
        "model_sha256": None,
        "seconds": 0.0,
        "error": "a.jpg: gone",
    }
    assert list(record)[:3] == list(failed)[:3]
