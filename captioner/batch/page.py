"""A contact sheet of a run: one HTML file for looking over thousands of captions.

It shows every picture small with its caption, sorts and filters them, and shows attention over a picture
that is pointed at. Nothing is fetched, and a content security policy forbids it. A row's picture and
attention are made when the file is captioned (`preview`) and kept as a few kilobytes; the page is written at
the end, row by row.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from captioner.batch.alike import photo
from captioner.caption import SURE, Caption, VideoCaption
from captioner.files import open_atomically, remove_leftovers
from captioner.images import Fit

SIDE = 128
"""Pixels of a preview's longer side."""

_QUALITY = 60
_ROWS = 20  # in a script element: few enough to be taken apart quickly when one of them comes into sight
_VERSION = 1

# version, grid's rows and columns, picture's width and height, 0 | number of the first word with attention,
# maps, multiple of the even share at which the colour scale of the words ends, and that of their mean |
# left, top, right and bottom of the grid as shares of the picture. 30 bytes, which base64 does not pad
_HEAD = struct.Struct("<6B4H4f")


class Middle(NamedTuple):
    """What is to be shown of a clip; the arguments of `preview`."""

    pixels: np.ndarray
    fit: Fit
    caption: Caption | None
    frame: int
    first_word: int


def preview(
    pixels: np.ndarray, fit: Fit, caption: Caption | None = None, frame: int = 0, first_word: int = 0
) -> bytes:
    """Return what the contact sheet shows of a file: a small picture and the attention, packed.

    Args:
        pixels: ``(3, S, S)`` uint8 RGB, the network's square as `captioner.images.load` gives it: nothing is
            decoded a second time.
        fit: how the picture was fitted into it. What was cut off is not shown, nor are bars.
        caption: whose attention is packed, in one byte a cell and word; None for none.
        frame: which frame of the attention ``pixels`` are.
        first_word: how many words the file's record has before this caption's.
    """
    from PIL import Image

    picture = photo(pixels, fit)
    left, top, right, bottom = fit.box
    shown = (max(0.0, left), max(0.0, top), min(fit.width, right), min(fit.height, bottom))
    width, height = shown[2] - shown[0], shown[3] - shown[1]
    shrunk = SIDE / max(width, height)
    size = max(1, round(width * shrunk)), max(1, round(height * shrunk))
    file = io.BytesIO()
    resample = Image.Resampling.BOX if 2 * min(size) <= min(picture.size) else Image.Resampling.BICUBIC
    picture.resize(size, resample).save(file, "WEBP", quality=_QUALITY, method=2)
    maps, tops = _maps(caption, frame)
    box = (
        (left - shown[0]) / width,
        (top - shown[1]) / height,
        (right - shown[0]) / width,
        (bottom - shown[1]) / height,
    )
    head = _HEAD.pack(_VERSION, *maps.shape[1:], *size, 0, min(first_word, 65535), len(maps), *tops, *box)
    return head + maps.tobytes() + bytes(-maps.size % 3) + file.getvalue()


def _maps(caption: Caption | None, frame: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Return ``(1 + words, H, W)`` uint8 heat, the mean's first, and where their two colour scales end."""
    from captioner.overlay import scale

    attention = None if caption is None or not caption.words else caption.attention
    if caption is None or attention is None or max(caption.grid) > 255:
        return np.zeros((0, 0, 0), np.uint8), (0, 0)
    even = 1 / attention[0].size
    attention = attention[:, frame]
    mean = attention.mean(0)
    # words differ more from one another than their mean from an even spread: it gets a scale of its own
    tops = min(round(scale(caption)), 65535), 2
    while tops[1] < mean.max() / even and tops[1] < 65535:
        tops = tops[0], tops[1] * 2
    # as in `captioner.overlay.heat_map`, for all maps at once
    ratios = np.concatenate([mean[None], attention]).astype(np.float64) / even
    ratios[np.abs(ratios - 1) < 1e-4] = 1.0
    ends = np.full(len(ratios), tops[0])
    ends[0] = tops[1]
    heat = np.clip(np.log(np.maximum(ratios, 1.0)) / np.log(ends)[:, None], 0.0, 1.0)
    return np.rint(heat * 255).astype(np.uint8).reshape(-1, *caption.grid), tops


class Frames:
    """Some of a clip's frames, kept while it is captioned, so that one can be shown afterwards."""

    def __init__(self, most: int = 32) -> None:
        self._most, self._stride, self._count = most, 1, 0
        self._kept: list[tuple[float, int, np.ndarray, Fit]] = []
        self._lock = threading.Lock()

    def add(self, time: float, pixels: np.ndarray, fit: Fit) -> None:
        """Take a frame, ``(3, S, S)`` uint8, or leave it; from any thread, in any order."""
        with self._lock:
            if self._count % self._stride == 0:
                self._kept.append((time, self._count, pixels, fit))
            self._count += 1
            if len(self._kept) > self._most:
                self._kept.sort(key=lambda frame: frame[0])
                self._kept = self._kept[::2]
                self._stride *= 2

    def middle(self, clip: VideoCaption | None) -> Middle | None:
        """Return the frame nearest to the middle of a clip and the segment that it belongs to.

        None if there is no frame; without attention if the segment was not read from any frame kept.
        """
        if not self._kept:
            return None
        frames = sorted(self._kept, key=lambda frame: frame[0])
        if clip is None or not clip.segments:
            _, _, pixels, fit = frames[len(frames) // 2]
            return Middle(pixels, fit, None, 0, 0)
        half = (clip.segments[0].start + clip.segments[-1].end) / 2
        chosen = min(frames, key=lambda frame: abs(frame[0] - half))
        words = 0
        for segment in clip.segments:
            if len(segment.times) and segment.start - 1e-3 <= chosen[0] < segment.end + 1e-3:
                index = int(np.argmin(np.abs(segment.times - chosen[0])))
                if abs(float(segment.times[index]) - chosen[0]) < 5e-3:  # they are float32
                    return Middle(chosen[2], chosen[3], segment.caption, index, words)
            words += len(segment.caption.words)
        return Middle(chosen[2], chosen[3], None, 0, 0)


def write_page(
    path: str | os.PathLike[str],
    title: str,
    rows: Iterable[tuple[Mapping[str, Any], bytes | None]],
    groups: Iterable[Sequence[str]] = (),
    *,
    doubtful: float = SURE,
) -> int:
    """Write the contact sheet; it is there whole or, after a kill, as it was before.

    Args:
        path: of the HTML file. Pictures are linked to relative to it, those that are there.
        title: what the page is about.
        rows: records (``docs/records.md``), each with what `preview` returned, or None; read once, one at a
            time.
        groups: paths of pictures that look alike, see `captioner.batch.alike.near_duplicates`.
        doubtful: confidence below which a caption is called doubtful.

    Returns:
        The number of rows.

    Raises:
        OSError: it cannot be written; nothing is left behind then.
    """
    path = Path(path)
    group_of = {member: number for number, group in enumerate(groups, 1) for member in group}
    folder, count = os.path.abspath(path.parent), 0
    models: dict[str, int] = {}
    before, after = _frame(path, title, doubtful)
    remove_leftovers(path)
    with open_atomically(path) as file:

        def write(text: str) -> None:
            file.write(text.encode("utf-8", "backslashreplace"))

        write(before)
        rows = iter(rows)
        while part := list(islice(rows, _ROWS)):
            lines = [_json([_row(record, folder, group_of, models) for record, _ in part])]
            lines += [_line(blob) for _, blob in part]
            write('<script type="text/plain" class="rows">' + "\n".join(lines) + "\n</script>\n")
            count += len(part)
        write(f'<script type="text/plain" id="end">{_json(list(models))}</script>\n{after}')
    return count


def is_page(path: Path) -> bool:
    """Tell whether a file is none, empty, or a contact sheet of captioner."""
    try:
        with open(path, "rb") as file:
            head = file.read(2000)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return not head or b'<meta name="generator" content="captioner">' in head


def _line(blob: bytes | None) -> str:
    return "" if not blob or blob[0] != _VERSION else base64.b64encode(blob).decode()


def _row(
    record: Mapping[str, Any], folder: str, group_of: Mapping[str, int], models: dict[str, int]
) -> list[Any]:
    """Return path, caption, confidence, error, parts, link, group, duration and model of a record.

    A part is a photo's caption or a segment's: ``[start or null, word, its probability in percent or -1 if it
    was given, word, …]``.
    """
    path = str(record.get("path", ""))
    parts = []
    for part in record.get("segments") or [record]:
        words: list[Any] = [part.get("start")]
        for word in part.get("words") or ():
            words += [word["word"], -1 if word.get("given") else round(100 * word["probability"])]
        if len(words) > 1:
            parts.append(words)
    confidence = record.get("confidence")
    model = record.get("model") or ""
    return [
        path,
        record.get("caption") or "",
        None if confidence is None or not record.get("caption") else round(float(confidence), 4),
        record.get("error"),
        parts,
        _link(path, folder),
        group_of.get(path, 0),
        record.get("duration"),
        models.setdefault(model, len(models)),
    ]


def _link(path: str, folder: str) -> str:
    """Return where the page finds the file, or "" if it is on no disk here."""
    try:
        if not os.path.isfile(path):
            return ""
        relative = os.path.relpath(path, folder).replace(os.sep, "/")
    except ValueError:  # a name with a zero byte; on Windows, a file on another drive
        return ""
    # a colon would begin with the name of a scheme
    return quote(os.fsencode(relative))


def _json(value: object) -> str:
    """Return JSON that no reader of HTML takes for anything else."""
    encoded = json.dumps(value, separators=(",", ":"))
    for letter in "<>&":
        encoded = encoded.replace(letter, f"\\u{ord(letter):04x}")
    return encoded


def _frame(path: Path, title: str, doubtful: float) -> tuple[str, str]:
    """Return what stands before the rows and after them."""
    from captioner.overlay import colour

    folder = Path(__file__).parent
    page, style, script = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    about = {
        # under this, edits are kept in the browser
        "key": hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16],
        "doubtful": doubtful,
        "colours": colour(np.linspace(0, 1, 128)).reshape(-1).tolist(),
    }
    values = {
        "TITLE": html.escape(title),
        "ABOUT": _json(about),
        "STYLE": style,
        "SCRIPT": script,
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
    }
    # one pass, so that nothing in the title is taken for a place to fill
    filled = re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], page)
    before, _, after = filled.rpartition("<!-- rows -->\n")
    return before, after


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
