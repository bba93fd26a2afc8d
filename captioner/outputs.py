"""What the command line writes: captions in several formats, subtitles, overlays, and how far it has come."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.batch.tables import COLUMNS, csv_line
from captioner.console import dumps, fail, say, show
from captioner.files import save as save_file
from captioner.inputs import printable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from captioner.batch.media import ClipResult, FileResult
    from captioner.caption import Caption, Segment, VideoCaption
    from captioner.captioner import Captioner
    from captioner.video import Frame


class OverlayFormat(str, Enum):
    """What `captioner.overlay.save` writes of photos, and `captioner.video_overlay` of videos."""

    png = "png"
    jpg = "jpg"
    webp = "webp"
    gif = "gif"
    svg = "svg"
    pdf = "pdf"
    html = "html"
    npz = "npz"
    mp4 = "mp4"
    webm = "webm"


CLIP_FORMATS = (OverlayFormat.mp4, OverlayFormat.webm)


class Names:
    """Names for what is written of each file: those of one name get numbers, and no input is replaced."""

    def __init__(self, inputs: Iterable[str]) -> None:
        self.taken: set[str] = set()
        self.inputs: set[tuple[int, int]] = set()
        for path in inputs:
            with suppress(OSError):
                self.inputs.add(_identity(path))

    def choose(self, path: str, targets: Callable[[str], list[Path]]) -> list[Path]:
        """Return the targets for the first of ``stem``, ``stem-2``, … under which all are free."""
        # a name that is short enough for numbers and the longest suffix, and can be written everywhere
        stem = os.fsencode(Path(path).stem)[:225].decode(errors="ignore") or "photo"
        name, number = stem, 1
        while not all(map(self._free, targets(name))):
            number += 1
            name = f"{stem}-{number}"
        chosen = targets(name)
        self.taken.update(str(target).lower() for target in chosen)
        return chosen

    def _free(self, target: Path) -> bool:
        return str(target).lower() not in self.taken and not self.is_input(target)

    def is_input(self, target: Path) -> bool:
        """Tell whether a file is one of those to be captioned."""
        try:
            return _identity(target) in self.inputs
        except OSError:  # there is no such file
            return False


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _make_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        fail(f"{option} {folder}: this is a file; give a folder")
    except OSError as error:
        fail(f"{option} {folder}: the folder cannot be made: {error.strerror or error}")
    if not os.access(folder, os.W_OK):
        fail(f"{option} {folder}: cannot be written to; choose another folder")


class Subtitles:
    """Writes the subtitles of videos: to one file, into a folder, or beside each video."""

    def __init__(self, option: str, place: str, files: list[str], names: Names) -> None:
        from captioner.video import is_video

        self.suffix = f".{option.removeprefix('--')}"
        self.names = names
        self.file: Path | None = None
        self.folder: Path | None = None
        if place == "beside":
            return
        path = Path(place)
        if path.is_dir() or place.endswith(("/", os.sep)) or not (path.suffix or path.exists()):
            self.folder = path
            _make_folder(option, path)
            return
        if path.suffix.lower() != self.suffix:
            fail(
                f"{option} {place}: expected a name that ends in {self.suffix}, a folder, or the word beside"
            )
        if len(list(islice(filter(is_video, files), 2))) > 1:
            fail(
                f"{option} {place}: this is one file, and there are several videos: give a folder, "
                "or the word beside for a file next to each video"
            )
        if not os.access(path.parent, os.W_OK):
            fail(f"{option} {place}: its folder does not exist, or cannot be written to")
        if not _replaceable(path):
            fail(f"{option} {place}: this file exists and holds no subtitles; choose another name")
        self.file = path

    def save(self, path: str, caption: VideoCaption) -> str | None:
        """Return the reason if the subtitles could not be written; a person's own beside a video are kept."""
        from captioner.subtitles import save, to_srt, to_webvtt

        folder = Path(path).parent if self.folder is None else self.folder
        target = self.file or self.names.choose(path, lambda name: [folder / f"{name}{self.suffix}"])[0]
        if not _replaceable(target):
            return f"{path}: there are no subtitles: {target} exists and holds something else"
        if self.file is None and self.folder is None:
            text = (to_srt if self.suffix == ".srt" else to_webvtt)(caption)
            with suppress(OSError):
                found = target.read_bytes()
                if found and found != text.encode():
                    return (
                        f"{path}: there are no subtitles: {target} exists and is kept; delete it, or give "
                        "a folder for new ones"
                    )
        try:
            save(caption, target)
        except (ValueError, OSError) as error:
            return f"{path}: there are no subtitles: {error}"
        return None


def _replaceable(path: Path) -> bool:
    """Tell whether subtitles may be written there: nothing, an empty file, or subtitles."""
    try:
        if not path.is_file():
            return not os.path.lexists(path)
        with open(path, "rb") as file:
            head = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError:
        return False
    cue = rb"(\d+\s*\n\s*)?\d+:\d\d:\d\d[,.]\d+\s*-->"
    return not head or head.startswith(b"WEBVTT") or re.match(cue, head) is not None


class Overlays:
    """Writes what shows where the model looked, for each photo and video; no input is replaced."""

    def __init__(
        self, folder: Path, format: OverlayFormat | None, names: Names, clips: dict[str, Any]
    ) -> None:
        _make_folder("--overlay", folder)
        self.folder, self.names = folder, names
        self.photos = "png" if format is None or format in CLIP_FORMATS else format.value
        self.sheets = self.photos if self.photos in ("png", "jpg") else "png"
        self.clips = format.value if format is not None and format in CLIP_FORMATS else "mp4"
        self.reading = {"every": 0.5, **{k: v for k, v in clips.items() if k in ("every", "start", "end")}}

    def save(
        self, path: str, caption: Caption | VideoCaption, progress: Callable[[str, float], object]
    ) -> tuple[list[str], list[str]]:
        """Write what belongs to a file; return errors, and notes on what differs from the original."""
        from captioner.caption import VideoCaption
        from captioner.overlay import save

        if isinstance(caption, VideoCaption):
            return self._save_clip(path, caption, progress)
        (target,) = self.names.choose(path, lambda name: [self.folder / f"{name}.{self.photos}"])
        try:
            save(caption, path, target)
        except (ValueError, OSError) as error:
            return [f"{path}: there is no overlay: {error}"], []
        return [], []

    def _save_clip(
        self, path: str, caption: VideoCaption, progress: Callable[[str, float], object]
    ) -> tuple[list[str], list[str]]:
        count = len(caption.segments)

        def targets(name: str) -> list[Path]:
            numbers = [""] if count == 1 else [f"-{n:0{len(str(count))}}" for n in range(1, count + 1)]
            sheets = [self.folder / f"{name}{number}.{self.sheets}" for number in numbers]
            return [self.folder / f"{name}.{self.clips}", *sheets]

        clip, *sheets = self.names.choose(path, targets)
        errors, notes = [], []
        try:
            self._draw_sheets(path, caption, sheets)
        except (ValueError, OSError) as error:
            errors.append(f"{path}: there is no sheet: {error}")
        try:
            written = caption.overlay(path, clip, progress=lambda seconds: progress(path, seconds))
            notes = [f"{path}: {note}" for note in written.notes]
        except (ValueError, OSError, ImportError) as error:
            errors.append(f"{path}: there is no overlay: {error}")
        return errors, notes

    def _draw_sheets(self, path: str, caption: VideoCaption, targets: list[Path]) -> None:
        """Draw each segment's sheet, on frames that are read once more, in small."""
        from captioner.overlay import encode
        from captioner.video import frames

        read = frames(path, **self.reading)
        for segment, target in zip(caption.segments, targets, strict=True):
            segment = thinned(segment)
            pictures = [_small(frame.image) for t in segment.times if (frame := _at(read, t)) is not None]
            sheet = segment.overlay(pictures)
            options = {"quality": 92, "subsampling": 0} if self.sheets == "jpg" else {}
            save_file(target, encode(sheet, "JPEG" if self.sheets == "jpg" else "PNG", **options))


_COLUMNS = 24
"""The most frames that a sheet shows; more would be too small to see."""


def thinned(segment: Segment) -> Segment:
    """Draw neighbouring frames as one where there are too many: their attention summed, on the middle one."""
    import numpy as np

    count = len(segment.times)
    if count <= _COLUMNS:
        return segment
    edges = np.linspace(0, count, _COLUMNS + 1).round().astype(int)
    words = tuple(
        word
        if word.attention is None
        else replace(word, attention=np.add.reduceat(word.attention.reshape(count, -1), edges[:-1]))
        for word in segment.caption.words
    )
    times = segment.times[(edges[:-1] + edges[1:]) // 2]
    return replace(segment, caption=replace(segment.caption, words=words, times=times, n_best=()))


def _at(read: Iterator[Frame], time: float) -> Frame | None:
    """Read on to the frame of a time, which may have been rounded; None if the clip ends before it."""
    return next((frame for frame in read if frame.time > time - 0.002), None)


def _small(picture: np.ndarray) -> Image.Image:
    """Shrink a frame to what a sheet can show."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((480, 960))
    return image


class Writer:
    """Prints results: plain text unless a subclass says otherwise."""

    def __init__(self, attention: bool) -> None:
        self.attention = attention
        self.heads = True
        self.model = ""
        self.model_sha256: str | None = None
        self.begun = False

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the output, whatever has happened to the rest."""
        try:
            self.close()
        except OSError:
            if kind is None:
                raise

    def of(self, captioner: Captioner) -> None:
        """Note which model writes the captions, for the records."""
        self.model, self.model_sha256 = captioner.header.name, captioner.fingerprint

    def record(self, result: FileResult | ClipResult) -> dict[str, Any]:
        """Return the record of a result."""
        from captioner.batch.media import to_record

        return to_record(result, self.model, self.model_sha256, attention=self.attention)

    def write(self, result: FileResult | ClipResult) -> None:
        """Print a file's result; of a video, what `write_segment` has left."""
        from captioner.batch.media import FileResult

        if isinstance(result, FileResult) and result.caption is not None:
            self._lines(f"{result.path}: " if self.heads else "", result.caption)

    def write_segment(self, path: str, segment: Segment) -> None:
        """Print a segment as soon as it is captioned, where the format allows that."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            self._segment(path, segment)

    def write_live(self, source: str, segment: Segment) -> None:
        """Print what a camera or stream shows."""
        from captioner.caption import clock

        self._lines(f"{clock(segment.end)}: ", segment.caption)

    def close(self) -> None:
        """Print what ends the output."""

    def _segment(self, path: str, segment: Segment) -> None:
        from captioner.caption import clock

        head = f"{path}: " if self.heads else ""
        self._lines(f"{head}{clock(segment.start)} to {clock(segment.end)}: ", segment.caption)

    def _lines(self, head: str, caption: Caption) -> None:
        from captioner.caption import plain_text

        show(printable(f"{head}{plain_text(caption)}"))
        for rank, other in enumerate(caption.n_best[1:], 2):
            show(printable(f"  {rank}. {other.text}"))


class RecordWriter(Writer):
    """JSON: a record for each file, and one for each caption of a live source."""

    def write(self, result: FileResult | ClipResult) -> None:
        """Print the record of a file."""
        self._record(self.record(result))

    def write_live(self, source: str, segment: Segment) -> None:
        """Print a record of what is seen."""
        from captioner.caption import SCHEMA_VERSION

        record = segment.to_dict(attention=self.attention)
        model = {"model": self.model, "model_sha256": self.model_sha256}
        self._record({"path": source, "schema": SCHEMA_VERSION, **record, **model, "error": None})

    def _segment(self, path: str, segment: Segment) -> None:
        """Wait for the record of the whole video."""

    def _record(self, record: dict[str, Any]) -> None:
        raise NotImplementedError


class JsonWriter(RecordWriter):
    """One array; records are printed as they come, so that memory stays flat."""

    def _record(self, record: dict[str, Any]) -> None:
        # the comma belongs to the next record: what has been printed always lacks no more than a bracket
        show((",\n" if self.begun else "[\n") + dumps(record), end="")
        self.begun = True

    def close(self) -> None:
        """Close the array."""
        show("\n]" if self.begun else "[]")


class JsonlWriter(RecordWriter):
    """A JSON record a line."""

    def _record(self, record: dict[str, Any]) -> None:
        show(dumps(record))


class CsvWriter(Writer):
    """A row for each photo and for each segment of a video, and one for each error of a video."""

    def write(self, result: FileResult | ClipResult) -> None:
        """Print the row of a photo, or of what is wrong with a video."""
        from captioner.batch.media import ClipResult

        if isinstance(result, ClipResult):
            if result.error is None:
                return
            result = replace(result, caption=None)  # its rows are there already
        self._cells(self.record(result))

    def write_live(self, source: str, segment: Segment) -> None:
        """Print a row of what is seen."""
        self._segment(source, segment)

    def close(self) -> None:
        """Print the header if there was no row."""
        self._header()

    def _segment(self, path: str, segment: Segment) -> None:
        from captioner.caption import SCHEMA_VERSION

        model = {"model": self.model, "model_sha256": self.model_sha256}
        self._cells({"path": path, "schema": SCHEMA_VERSION, **model, **segment.to_dict()})

    def _cells(self, record: dict[str, Any]) -> None:
        self._header()
        show(csv_line(record.get(column) for column in COLUMNS))

    def _header(self) -> None:
        if not self.begun:
            self.begun = True
            show(csv_line(COLUMNS))


class Rolling:
    """Shows the live captions: on a terminal in one line that is written over, else a line or record each."""

    def __init__(self, writer: Writer, source: str) -> None:
        self.writer = writer
        self.source = re.sub(r"(?<=://)[^/@\s]*@", "", source)  # without user and password
        self.rewrites = type(writer) is Writer and sys.stdout.isatty()
        self.last = 0

    def __enter__(self) -> Rolling:
        return self

    def __exit__(self, *_: object) -> None:
        if self.last:
            show("")

    def show(self, segment: Segment) -> None:
        """Show what is seen now."""
        from captioner.caption import clock, plain_text

        if not self.rewrites:
            self.writer.write_live(self.source, segment)
            return
        room = shutil.get_terminal_size().columns - 1  # in the last column some terminals begin a new line
        line = printable(f"{clock(int(segment.end))}: {plain_text(segment.caption)}")[:room]
        show("\r" + line.ljust(min(self.last, room)), end="")
        self.last = len(line)


class Progress:
    """Bars on a terminal: of the files, and of the seconds of the video at hand."""

    def __init__(self, count: int | None, clips: dict[str, Any]) -> None:
        from tqdm import tqdm

        self.shown = sys.stderr is not None and sys.stderr.isatty()
        self.span = clips.get("start", 0.0), clips.get("end", math.inf)
        self.files = tqdm(
            total=count, unit="file", disable=not (self.shown and count != 1), file=sys.stderr, leave=True
        )
        self.clip: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self.files.close()

    def reading(self, path: str, seconds: float) -> None:
        """Show that so many seconds of a video have been read."""
        self._show(path, seconds)

    def drawing(self, path: str, seconds: float) -> None:
        """Show that so many seconds of a video have been drawn."""
        self._show(path, seconds, "drawing ")

    def expect(self, count: int) -> None:
        """Tell how many files there are."""
        self.files.total = count
        self.files.refresh()

    def reach(self, count: int) -> None:
        """Tell how many files are done."""
        self._close()
        self.files.update(count - self.files.n)

    def say(self, line: str) -> None:
        """Print a line on stderr; a bar makes room for it."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            say(line)

    def done(self) -> None:
        """Count a file."""
        self._close()
        self.files.update()

    def _show(self, path: str, seconds: float, what: str = "") -> None:
        if not self.shown:
            return
        name = printable(f"{what}{os.path.basename(path)}")
        if self.clip is None or self.clip.desc != name:
            self._close()
            self.clip = self._bar(path, name, bool(what))
        done = round(seconds if what else seconds - self.span[0], 1)
        if done > self.clip.n:
            self.clip.update(round(done - self.clip.n, 1))

    def _bar(self, path: str, name: str, drawing: bool) -> Any:
        from tqdm import tqdm

        from captioner.video import VideoError, probe

        total = None
        with suppress(VideoError):
            total = probe(path).duration  # what the header says is good enough for a bar
        if total is not None:
            start, end = (0.0, math.inf) if drawing else self.span
            total = max(0.1, round(min(total, end) - start, 1))
        return tqdm(
            total=total,
            unit="s",
            desc=name,
            file=sys.stderr,
            leave=False,
            bar_format=_SECONDS_BAR[total is None],
        )

    def _close(self) -> None:
        if self.clip is not None:
            self.clip.close()
            self.clip = None


_SECONDS_BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of video [{elapsed}<{remaining}]",
    "{desc}: {n:.0f} s of video [{elapsed}]",
)
