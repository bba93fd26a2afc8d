from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from cli_runs import launch, save_lively
from gradio.media import get_image, get_video
from PIL import Image

from captioner.batch.watch import WatchError, has_end, is_settled, watch

SETTLE = 0.2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("made") / "a.jpg"
    with Image.open(get_image("cheetah1.jpg")) as image:
        image.resize((300, 200)).save(path)
    return path.read_bytes()


class Watched:
    """Runs `watch` in a thread; keeps what it gives out, with when."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        self.stop = threading.Event()
        self.found: Queue[tuple[str, float]] = Queue()
        self.error: Exception | None = None
        options = {"settle": SETTLE, **options}
        self.watching = watch([folder], stop=self.stop, **options)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            for paths in self.watching:
                assert paths == sorted(paths)
                for path in paths:
                    self.found.put((os.path.relpath(path, self.folder), time.monotonic()))
        except WatchError as error:
            self.error = error

    def next(self, timeout: float = 20) -> tuple[str, float]:
        return self.found.get(timeout=timeout)

    def names(self, count: int) -> list[str]:
        return sorted(self.next()[0] for _ in range(count))

    def silent(self, seconds: float = 4 * SETTLE) -> bool:
        time.sleep(seconds)
        return self.found.empty()

    def end(self) -> None:
        begun = time.monotonic()
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert time.monotonic() - begun < 5


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Watched]]:
    running: list[Watched] = []

    def start(**options: object) -> Watched:
        running.append(Watched(folder, **options))
        return running[-1]

    yield start
    for watched in running:
        watched.end()


Start = Callable[..., Watched]


@pytest.mark.parametrize("polling", [False, True])
def test_what_is_there_then_what_arrives(folder: Path, start: Start, photo: bytes, polling: bool) -> None:
    (folder / "old.jpg").write_bytes(photo)
    watched = start(force_polling=polling, relist=0.1 if polling else None)
    (folder / "early.jpg").write_bytes(photo)  # perhaps before the system watches
    assert watched.names(2) == ["early.jpg", "old.jpg"]
    (folder / "new.JPG").write_bytes(photo)
    (folder / "new.txt").write_text("a sidecar")
    (folder / "results.jsonl").write_text("{}")
    assert watched.names(1) == ["new.JPG"]
    (folder / "below").mkdir()
    (folder / "below" / "x.jpg").write_bytes(photo)
    (folder / "old.jpg").write_bytes(photo[:-2] + b"\0\0\xff\xd9")
    assert watched.names(1) == ["old.jpg"]
    (folder / "new.JPG").unlink()
    assert watched.silent()
    (folder / "new.JPG").write_bytes(photo)
    assert watched.names(1) == ["new.JPG"]


def test_waits_for_a_file_that_is_still_being_copied(folder: Path, start: Start, photo: bytes) -> None:
    watched = start()
    step = len(photo) // 8
    with (folder / "slow.jpg").open("wb") as file:
        for at in range(0, len(photo), step):
            file.write(photo[at : at + step])
            file.flush()
            time.sleep(SETTLE / 4)
        written = time.monotonic()
    name, at_time = watched.next()
    assert name == "slow.jpg"
    assert at_time - written > SETTLE / 2

    # a copy that stands still for longer than it takes to settle: its end is not there yet
    with (folder / "stalled.jpg").open("wb") as file:
        file.write(photo[: len(photo) // 2])
        file.flush()
        assert watched.silent()
        file.write(photo[len(photo) // 2 :])
    assert watched.names(1) == ["stalled.jpg"]
    assert watched.silent()


def test_what_never_ends_is_given_out_after_a_while(folder: Path, start: Start, photo: bytes) -> None:
    watched = start(patience=6 * SETTLE)
    begun = time.monotonic()
    (folder / "cut.jpg").write_bytes(photo[:-100])
    (folder / "empty.png").touch()
    assert watched.names(2) == ["cut.jpg", "empty.png"]
    assert time.monotonic() - begun > 5 * SETTLE


def test_temporary_names_count_once_they_are_renamed(folder: Path, start: Start, photo: bytes) -> None:
    watched = start()
    for temporary, name in [(".a.jpg.Xy12z3", "a.jpg"), ("b.jpg.part", "b.jpg"), ("c.crdownload", "c.jpg")]:
        (folder / temporary).write_bytes(photo)
        assert watched.silent(2 * SETTLE)
        (folder / temporary).rename(folder / name)
        assert watched.names(1) == [name]
    (folder / "a.jpg").rename(folder / "d.jpg")
    assert watched.names(1) == ["d.jpg"]


def test_sub_folders_made_and_moved_here_later(
    folder: Path, start: Start, photo: bytes, tmp_path: Path
) -> None:
    watched = start(recursive=True)
    (folder / "one" / "two").mkdir(parents=True)
    (folder / "one" / "two" / "a.jpg").write_bytes(photo)
    assert watched.names(1) == [os.path.join("one", "two", "a.jpg")]
    full = tmp_path / "full"
    (full / "deep").mkdir(parents=True)
    (full / ".thumbnails").mkdir()
    for place in ("b.jpg", "deep/c.jpg", ".thumbnails/d.jpg"):
        (full / place).write_bytes(photo)
    shutil.move(full, folder / "moved")
    assert watched.names(2) == [os.path.join("moved", "b.jpg"), os.path.join("moved", "deep", "c.jpg")]
    (folder / "moved" / "deep" / "e.jpg").write_bytes(photo)
    assert watched.names(1) == [os.path.join("moved", "deep", "e.jpg")]
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "f.jpg").write_bytes(photo)
    assert watched.silent()


def test_what_is_ignored_is_asked_again_when_it_changes(folder: Path, start: Start, photo: bytes) -> None:
    asked: list[str] = []
    ours = True

    def ignore(path: str) -> bool:
        asked.append(os.path.basename(path))
        return ours

    (folder / "a.jpg").write_bytes(photo)
    watched = start(ignore=ignore, relist=0.1)
    assert watched.silent(6 * SETTLE)
    assert asked == ["a.jpg"]
    ours = False
    (folder / "a.jpg").write_bytes(photo[:-2] + b"\0\0\xff\xd9")
    assert watched.names(1) == ["a.jpg"]
    assert asked == ["a.jpg"] * 2


def test_what_arrives_while_the_caller_is_busy(folder: Path, photo: bytes) -> None:
    watching = watch(folder, settle=0.1)
    (folder / "a.jpg").write_bytes(photo)
    assert next(watching) == [str(folder / "a.jpg")]
    for number in range(50):
        (folder / f"b{number:02}.jpg").write_bytes(photo)
    time.sleep(0.3)
    found: list[str] = []
    while len(found) < 50:
        found += next(watching)
    assert sorted(found) == [str(folder / f"b{number:02}.jpg") for number in range(50)]
    watching.close()  # type: ignore[attr-defined]


def test_folder_that_goes_away(folder: Path, start: Start) -> None:
    watched = start()
    time.sleep(SETTLE)
    folder.rmdir()
    watched.thread.join(10)
    assert str(watched.error) == f"{folder}: the folder that was watched is gone; start again when it is back"


def test_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WatchError, match=r"missing: not a folder"):
        watch([folder, folder / "missing"])
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(WatchError, match=r'pip install "captioner\[watch\]"'):
        watch(folder)
    watch(folder, force_polling=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_ctrl_c_ends_it_at_once(folder: Path) -> None:
    program = (
        "import sys; from captioner.batch.watch import watch\n"
        "try:\n"
        "    print('begun', flush=True)\n"
        "    for paths in watch(sys.argv[1], settle=0.2): print(paths, flush=True)\n"
        "except KeyboardInterrupt:\n"
        "    print({'torch', 'cv2', 'ray'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "begun\n"
    time.sleep(0.5)
    begun = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=20)[0] == "set()\n"
    assert time.monotonic() - begun < 5


SAVED = {
    "jpg": {},
    "png": {},
    "gif": {},
    "bmp": {},
    "webp": {},
    "avif": {},
    "tif": {"known": False},
    "jp2": {"known": False},
}


@pytest.mark.parametrize("suffix", SAVED)
def test_ends_of_pictures(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with Image.open(get_image("cheetah1.jpg")) as image:
        image.resize((120, 90)).save(path)
    whole = path.read_bytes()
    assert has_end(str(path))
    for share in (0.05, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert has_end(str(path)) is not SAVED[suffix].get("known", True)
    path.write_bytes(b"")
    assert not has_end(str(path))
    assert not has_end(str(tmp_path / "missing.jpg"))


def test_ends_of_videos(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    shutil.copy(get_video("world.mp4"), path)
    assert has_end(str(path))
    whole = path.read_bytes()
    for length in (8, 40, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        assert not has_end(str(path))


def test_more_behind_the_end_of_a_jpeg(tmp_path: Path, photo: bytes) -> None:
    """Motion photos of phones."""
    path = tmp_path / "a.jpg"
    path.write_bytes(photo + bytes(200_000))
    assert has_end(str(path))


def test_what_has_settled(tmp_path: Path, photo: bytes) -> None:
    path = tmp_path / "a.jpg"
    assert not is_settled(str(path))
    path.write_bytes(photo)
    assert not is_settled(str(path))
    assert is_settled(str(path), 0)
    os.utime(path, (time.time() - 3, time.time() - 3))
    assert is_settled(str(path))
    path.write_bytes(photo[:-100])
    os.utime(path, (0, 0))
    assert not is_settled(str(path))


class Watching:
    """Runs ``captioner caption w -o o.jsonl --watch`` in a process of its own."""

    def __init__(self, place: Path, *options: object) -> None:
        model = save_lively(place / "lively.safetensors")
        command = ("caption", "w", "-o", "o.jsonl", "--watch", "--poll", "-m", model, *options)
        self.process = launch(*command, cwd=place)
        self.table = place / "o.jsonl"
        self.lines: list[str] = []
        assert self.process.stderr is not None
        self.said = iter(self.process.stderr.readline, b"")

    def wait_for(self, line: str) -> None:
        """Read what it says up to a line that begins so."""
        for said in self.said:
            self.lines.append(said.decode().removeprefix("captioner: "))
            if self.lines[-1].startswith(line):
                return
        pytest.fail(f"{line}: {self.lines}")

    def records(self, count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.table.exists() and len(lines := self.table.read_text().splitlines()) == count:
                return [json.loads(line) for line in lines]
            time.sleep(0.1)
        pytest.fail(f"{count} records did not come")

    def end(self) -> int:
        """Stop it; return its exit code."""
        self.process.send_signal(signal.SIGINT)
        self.lines += [said.decode().removeprefix("captioner: ") for said in self.said]
        return self.process.wait(60)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_half_a_copy_that_is_there_at_the_start(tmp_path: Path, photo: bytes) -> None:
    place = tmp_path / "w"
    place.mkdir()
    for name, data in (("old.jpg", photo), ("half.jpg", photo[:2000])):
        (place / name).write_bytes(data)
        os.utime(place / name, (1e9, 1e9))
    (place / "new.jpg").write_bytes(photo)
    for name in ("text.jpg", "never.jpg"):
        (place / name).write_text("no picture")
        os.utime(place / name, (1e9, 1e9))
    watching = Watching(tmp_path)
    try:
        watching.wait_for("watching w")
        found = {os.path.basename(record["path"]) for record in watching.records(3)}
        assert found == {"old.jpg", "text.jpg", "never.jpg"}
        (place / "half.jpg").write_bytes(photo)
        (place / "text.jpg").write_bytes(photo)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            failed = [record["path"] for record in watching.records(5) if record["error"]]
            if len(failed) == 1:
                break
            time.sleep(0.1)
        assert failed == [os.path.join("w", "never.jpg")]
        assert watching.end() == 0
    finally:
        watching.process.kill()
    assert [line for line in watching.lines if "half" in line or "truncated" in line] == []
    # what could be captioned in the end is told of as it comes, not as something that failed
    assert len([line for line in watching.lines if "text.jpg: " in line]) == 1
    assert "captioned 4 files; 1 file could not be: see o.errors.jsonl\n" in watching.lines
    assert len((tmp_path / "o.errors.jsonl").read_text().splitlines()) == 1

    # beside what is done, however new, the rest is written at the start
    (place / "never.jpg").unlink()
    watching = Watching(tmp_path, "--sidecars")
    try:
        watching.wait_for("watching w")
        names = sorted(path.name for path in place.glob("*.txt"))
        assert names == ["half.txt", "new.txt", "old.txt", "text.txt"]
        watching.end()
    finally:
        watching.process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_a_folder_that_is_empty_at_first(tmp_path: Path, photo: bytes) -> None:
    (tmp_path / "w").mkdir()
    watching = Watching(tmp_path, "--strict")
    try:
        watching.wait_for("watching w")
        (tmp_path / "w" / "a.jpg").write_bytes(photo)
        watching.records(1)
        assert watching.end() == 0
    finally:
        watching.process.kill()
    assert watching.lines[0] == "watching w; Ctrl-C ends it\n"
    assert watching.lines[-1] == "captioned 1 file\n"
