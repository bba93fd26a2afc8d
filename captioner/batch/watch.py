"""Tells when photos and videos have arrived in folders and are complete.

The operating system says where something happened (through ``watchfiles``), which costs nothing while nothing
happens. What counts is what is there: files are compared with what they were when they were given out, and
every so often the folders are listed again, for what the system does not tell: changes made by other machines
on a network drive, or more of them than its queue can hold.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from os.path import splitext
from threading import Event
from typing import BinaryIO

from captioner.batch.sources import LISTED
from captioner.inputs import ImageError, iter_images

SETTLE_SECONDS = 2.0
"""How long a file has to stay the same."""
RELIST_SECONDS = 300.0
"""How often folders are listed again although the system reports changes."""
POLL_SECONDS = 2.0
"""How often they are listed when it is not asked."""
PATIENCE_SECONDS = 60.0
"""How long a file without its end may stand still before it is given out all the same."""


class WatchError(ValueError):
    """Something cannot be watched, or not any longer; one line that names it and says what to do."""


def watch(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    recursive: bool = False,
    *,
    settle: float = SETTLE_SECONDS,
    ignore: Callable[[str], bool] | None = None,
    force_polling: bool = False,
    stop: Event | None = None,
    patience: float = PATIENCE_SECONDS,
    relist: float | None = None,
) -> Iterator[list[str]]:
    """Yield photos and videos in folders: first those that are there, then what arrives or changes, for ever.

    A file is given out when its size and modified time have stayed the same for ``settle`` seconds and, in
    formats that tell, its end is there. Only names that `captioner.batch.sources.find_sources` takes from a
    folder count: neither hidden ones (rsync's ``.a.jpg.Xy12z3``), nor ``a.jpg.part`` or ``a.jpg.crdownload``,
    nor text and tables. A file under a new name is a new one. What arrives while the caller is busy is given
    out afterwards.

    Args:
        paths: folders.
        recursive: watch their sub-folders too, also those that are made later.
        settle: seconds.
        ignore: called with a path before that is given out; True if it is not wanted, because it is done
            or because we have changed it ourselves. It is asked again when the file has changed again.
        force_polling: list the folders every few seconds, without asking the system: for network drives on
            which other machines write. Does without ``watchfiles``.
        stop: ends it when set, within half a second.
        patience: how long to wait for the end of a file that has stopped growing, in seconds.
        relist: seconds between listings; None for `RELIST_SECONDS`, or `POLL_SECONDS` with polling.

    Yields:
        paths, sorted; each begins with its folder as that was given.

    Raises:
        WatchError: something is not a folder, or is gone; the system refuses; ``watchfiles`` is missing.
        KeyboardInterrupt: after Ctrl-C, at once.
    """
    folders = [os.fsdecode(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    for folder in folders:
        if not os.path.isdir(folder):
            raise WatchError(f"{folder}: not a folder, and only folders can be watched")
    stop = stop or Event()
    tick = min(0.5, max(0.05, settle / 4))
    if force_polling:
        reports = _no_reports(tick, stop)
    else:
        reports = _reports(folders, recursive, tick, stop)
    if relist is None:
        relist = POLL_SECONDS if force_polling else RELIST_SECONDS
    return _watch(_Folders(folders, recursive, settle, patience, ignore), reports, relist)


def _watch(folders: _Folders, reports: Generator[set[str]], relist: float) -> Iterator[list[str]]:
    due = 0.0
    with contextlib.closing(reports):
        # the first report comes when the system has begun to watch: nothing falls between it and the listing
        for reported in reports:
            now = time.monotonic()
            if now >= due:
                folders.look_everywhere(now)
                due = time.monotonic() + relist
            else:
                folders.look_at(reported, now)
            if ready := folders.ready(now):
                yield ready


# --------------------------------------------------------------------------------------------------
# where something happened


def _no_reports(tick: float, stop: Event) -> Generator[set[str]]:
    while not stop.wait(tick):
        yield set()


def _reports(folders: list[str], recursive: bool, tick: float, stop: Event) -> Generator[set[str]]:
    """Yield the paths of what was made, changed, moved or deleted, at least once every tick.

    The first, of nothing, comes when the system has begun to watch.
    """
    try:
        import watchfiles
    except ImportError:
        raise WatchError('--watch needs watchfiles: pip install "captioner[watch]"') from None
    real = {os.path.realpath(folder): folder for folder in folders}

    def as_given(path: str) -> str:
        for actual, folder in real.items():
            if path == actual or path.startswith(os.path.join(actual, "")):
                return (
                    folder + path[len(actual) :]
                    if not folder.endswith(os.sep)
                    else folder + path[len(actual) + 1 :]
                )
        return path

    def run() -> Generator[set[str]]:
        try:
            for changes in watchfiles.watch(
                *real,
                watch_filter=None,
                debounce=int(1000 * tick),
                step=min(50, int(1000 * tick)),
                rust_timeout=int(1000 * tick),
                yield_on_timeout=True,
                stop_event=stop,
                recursive=recursive,
                force_polling=False,
                ignore_permission_denied=True,
            ):
                yield {as_given(path) for _, path in changes}
        except (OSError, RuntimeError) as error:  # gone, or out of watches
            raise WatchError(
                f"{', '.join(folders)}: cannot be watched: {' '.join(str(error).split())}; "
                "on Linux fs.inotify.max_user_watches limits it"
            ) from None

    return run()


# --------------------------------------------------------------------------------------------------
# what is there


@dataclass
class _Arriving:
    size: int
    modified: int
    since: float
    """When it was first seen like this."""


class _Folders:
    def __init__(
        self,
        folders: list[str],
        recursive: bool,
        settle: float,
        patience: float,
        ignore: Callable[[str], bool] | None,
    ) -> None:
        self.folders = {folder: _identity(folder) for folder in folders}
        self.recursive = recursive
        self.settle, self.patience = settle, patience
        self.ignore = ignore or (lambda path: False)
        self.known: dict[str, tuple[int, int]] = {}
        self.arriving: dict[str, _Arriving] = {}

    def look_everywhere(self, now: float) -> None:
        """List all folders."""
        seen: set[str] = set()
        for folder in self.folders:
            self._check(folder)
            for path in self._list(folder):
                seen.add(path)
                self._look(path, now)
        for path in [path for path in self.known if path not in seen]:
            del self.known[path]

    def look_at(self, paths: set[str], now: float) -> None:
        """Look at files and folders of which something was reported."""
        for folder in self.folders:
            self._check(folder)
        for path in paths:
            if any(part.startswith(".") for part in self._below(path)):
                continue
            if splitext(path)[1].lower() in LISTED and not os.path.isdir(path):
                self._look(path, now)
            elif self.recursive and path not in self.folders and os.path.isdir(path):
                # made or moved here; what is in it may not have been reported
                for file in self._list(path):
                    self._look(file, now)

    def ready(self, now: float) -> list[str]:
        """Return what has arrived."""
        found = []
        for path, arriving in list(self.arriving.items()):
            still = now - arriving.since
            if still < self.settle:
                continue
            self._look(path, now)  # nobody may have reported the last change
            if self.arriving.get(path) is not arriving:
                continue
            if still < self.patience and not has_end(path):
                continue
            del self.arriving[path]
            self.known[path] = arriving.size, arriving.modified
            if not self.ignore(path):
                found.append(path)
        return sorted(found)

    def _look(self, path: str, now: float) -> None:
        """Note what a file is like now."""
        try:
            status = os.stat(path)
        except OSError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            self.known.pop(path, None)
            self.arriving.pop(path, None)
            return
        size, modified = status.st_size, status.st_mtime_ns
        if self.known.get(path) == (size, modified):
            self.arriving.pop(path, None)
            return
        before = self.arriving.get(path)
        if before is None or (before.size, before.modified) != (size, modified):
            self.arriving[path] = _Arriving(size, modified, now)

    def _list(self, folder: str) -> Iterator[str]:
        with contextlib.suppress(ImageError):  # nothing there, or gone in the meantime
            yield from iter_images(folder, self.recursive, LISTED)

    def _below(self, path: str) -> list[str]:
        """Return the names that lead from a watched folder to a path."""
        for folder in self.folders:
            if path.startswith(os.path.join(folder, "")):
                return path[len(folder) :].strip(os.sep).split(os.sep)
        return []

    def _check(self, folder: str) -> None:
        if _identity(folder) != self.folders[folder]:
            raise WatchError(f"{folder}: the folder that was watched is gone; start again when it is back")


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


# --------------------------------------------------------------------------------------------------
# whether a file is complete


def is_settled(path: str, settle: float = SETTLE_SECONDS) -> bool:
    """Tell whether `watch` would give a file out at once if it had seen it all the time.

    Nobody has modified it for ``settle`` seconds and, in formats that tell, its end is there.
    """
    try:
        modified = os.stat(path).st_mtime
    except OSError:
        return False
    return time.time() - modified >= settle and has_end(path)


def has_end(path: str) -> bool:
    """Tell whether a file's end is there; True for formats of which that cannot be told quickly.

    It can of JPEG, PNG, GIF, BMP, WebP, AVI, and the family of MP4, MOV, HEIC and AVIF. Nothing ends an empty
    file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size > 0 and _has_end(file, size, file.read(12))
    except OSError:  # locked by whoever writes it
        return False


def _has_end(file: BinaryIO, size: int, head: bytes) -> bool:
    if head.startswith(b"\xff\xd8\xff"):
        return _contains(file, size, b"\xff\xd9")  # cameras put videos and more behind it
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _contains(file, size, b"IEND")
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _tail(file, size, 4096).rstrip(b"\0").endswith(b";")
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") <= size
    if head[4:8] == b"ftyp":
        return _boxes_end(file, size)
    return True


def _tail(file: BinaryIO, size: int, length: int) -> bytes:
    file.seek(max(0, size - length))
    return file.read(length)


def _contains(file: BinaryIO, size: int, end: bytes) -> bool:
    """Look for a marker from the end backwards; it is nearly always in the last bytes."""
    step, position = 1 << 16, size
    while position > 0:
        position = max(0, position - step)
        file.seek(position)
        if end in file.read(step + len(end)):
            return True
    return False


def _boxes_end(file: BinaryIO, size: int) -> bool:
    """Tell whether all boxes of an ISO media file are there, the one with its index among them."""
    position, indexed = 0, False
    while position < size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if len(head) < 8 or (length == 1 and len(head) < 16):
            return False
        indexed |= head[4:8] in (b"moov", b"meta", b"moof")
        if length == 0:  # to the end of the file, wherever that is
            return indexed
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8:  # damaged: whoever reads it says so
            return True
        position += length
    return indexed and position == size
