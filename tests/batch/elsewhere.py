"""What is captioned in other processes: files, odd sources, and what comes of them in this one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import make_header
from lively import make_lively_model, pictures
from PIL import Image

from captioner import Captioner, checkpoint
from captioner.batch import caption_media, to_record
from captioner.batch.sources import Source


def write_model(path: Path) -> Path:
    """Write a tiny checkpoint."""
    network = make_lively_model()
    checkpoint.save(path, network, make_header(network))
    return path


def write_files(folder: Path) -> Path:
    """Write forty photos, a clip, and files that cannot be read."""
    made = [Image.fromarray(picture) for picture in pictures(40)]
    for i, picture in enumerate(made):
        picture.save(folder / f"{i:02}.png")
    moving = [picture.resize((64, 48)) for picture in made[:3]]
    moving[0].save(folder / "05-moves.gif", save_all=True, append_images=moving[1:], duration=400)
    whole = (folder / "07.png").read_bytes()
    (folder / "07-cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "11-text.jpg").write_text("not a picture")
    (folder / "23-empty.mp4").touch()
    return folder


@dataclass(frozen=True)
class Packed(Source):
    """Reads a photo out of another file, slowly, as if it came over a network."""

    holder: str = ""

    def read(self) -> bytes:
        time.sleep(0.05)
        return Path(self.holder).read_bytes()


@dataclass(frozen=True)
class Deadly(Source):
    """Ends the process that reads it, as a decoder with a bug does."""

    def read(self) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def sources_of(folder: Path) -> list[Source]:
    paths = [*sorted(folder.iterdir()), folder / "missing.jpg"]
    return [Source(str(path), str(path)) for path in paths]


def packed(folder: Path) -> list[Source]:
    return [
        Packed(f"archive/{path.name}", holder=str(path)) for path in sorted(folder.glob("[0-9][0-9].png"))
    ]


def plain(model: Path, sources: list[Source], **options: Any) -> dict[str, dict[str, Any]]:
    captioner = Captioner.load(model, device="cpu")
    results = caption_media(captioner, sources, **options)
    records = [to_record(result, captioner.header.name, captioner.fingerprint) for result in results]
    return {record["path"]: record for record in records}


def same(found: Any, expected: Any, key: str = "") -> None:
    """All the same, except for how long it took, and numbers only nearly."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected.keys() - {"seconds", "alternatives"}:  # equally likely ones may change places
            same(found[name], expected[name], name)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other, key)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), key
    else:
        assert found == expected, key


def processes(word: str, of: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the processes below one, or below the tests, whose command has a word in it."""
    found = []
    for process in (of or psutil.Process()).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_one(
    caption: Callable[[Iterator[Source]], Iterator[dict[str, Any]]],
    sources: list[Source],
    workers: Callable[[], list[psutil.Process]],
    most: int,
) -> list[dict[str, Any]]:
    """Caption with two workers, kill one on the way, and see that at most so many sources are taken ahead."""
    records: list[dict[str, Any]] = []
    given = 0

    def counted() -> Iterator[Source]:
        nonlocal given
        for source in sources:
            given += 1
            yield source

    for record in caption(counted()):
        records.append(record)
        assert given <= len(records) + most
        if len(records) == 9:
            assert len(workers()) == 2
            workers()[0].kill()
    return records


def check_records(records: list[dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    """Each once, and as expected, whose captions differ and of which some failed."""
    assert sorted(record["path"] for record in records) == sorted(expected)
    assert any(record["error"] is not None for record in expected.values())
    assert len({record["caption"] for record in expected.values()}) > 10
    for record in records:
        same(record, expected[record["path"]])


@dataclass(frozen=True)
class Broken(Source):
    """Meets a mistake in whoever reads it."""

    def read(self) -> bytes:
        raise RuntimeError("no such\nthing")


def len_of_caption(pixels: Any, fit: Any, caption: Any) -> int:
    return len(caption.text)
