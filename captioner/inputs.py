"""What is given to be captioned: files, folders and patterns; what a file is, by its first bytes; why not.

Takes neither NumPy nor Pillow, so that to find out that nothing is left to do is quick.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import os
import select
import stat
import time
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import IO

MAX_BYTES = 2**30
"""Larger files are refused, unless they are TIFF, BMP or PPM, of which only the pixels are read."""

# fmt: off
PHOTO_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif",
    ".tiff", ".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm",
))
"""Lower-case suffixes that count as photos when a folder is listed."""

VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".qt", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".asf", ".flv", ".f4v",
    ".3gp", ".3g2", ".ts", ".mts", ".m2ts", ".vob", ".ogv", ".mxf",
))
"""Lower-case suffixes that count as videos. Animations have those of photos."""

RAW_SUFFIXES = frozenset((
    ".dng", ".nef", ".nrw", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw",
    ".3fr", ".iiq",
))
"""Those of cameras' raw files."""
# fmt: on


class ImageError(ValueError):
    """A picture that cannot be used; one line that names it, the reason, and what to do."""


def printable(text: str) -> str:
    """Escape what a terminal would not print: one line stays one line, whatever a file is called."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, most: int = 4000) -> str:
    """Return a message as one line that any terminal can print, cut in the middle if it is very long."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return printable(text)


def name_of(path: str | os.PathLike[str]) -> str:
    """Return what to call a path in a message: one line that any terminal can print."""
    return printable(os.fsdecode(path) or "''")


# What a file is.


def kind_of(head: bytes) -> str | None:
    """Name what begins with ``head``, or return None if it is no picture that can be read."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if head.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        return "jpeg 2000"
    if head.startswith(b"BM") and b"\0\0" in head[2:18]:  # prose may begin with BM, too
        return "bmp"
    if head[:1] == b"P" and head[1:2] in b"123456f" and head[2:3].isspace():
        return "ppm"
    brands = brands_of(head)
    if brands & {b"avif", b"avis"}:
        return "avif"
    if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}:
        return "heif"
    return None


def brands_of(head: bytes) -> set[bytes]:
    """Return the brands of an ISO base media file (HEIC, AVIF, MP4); none for other files."""
    if head[4:8] != b"ftyp":
        return set()
    brands = head[8 : int.from_bytes(head[:4], "big")]
    return {brands[i : i + 4] for i in range(0, len(brands), 4) if i != 4}  # the second is a version


def not_a_picture(head: bytes, suffix: str, name: str) -> ImageError:
    """Say what a file is that is no picture, by its first bytes and its lower-case suffix."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if (
        brands_of(head)
        or head.startswith((b"\x1aE\xdf\xa3", b"FLV\x01", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"OggS"))
        or (head.startswith(b"RIFF") and head[8:12] == b"AVI ")
        or suffix in VIDEO_SUFFIXES - {".ts"}
    ) and suffix not in RAW_SUFFIXES:
        reason = "a video, not a picture; caption it as a video, or save one of its frames as a picture"
    elif b"<svg" in text or suffix in (".svg", ".svgz"):
        reason = "an SVG drawing, not a picture of pixels; export it as PNG first"
    elif text.startswith(b"%pdf") or suffix == ".pdf":
        reason = "a PDF document, not a picture; export the page as PNG or JPEG first"
    elif suffix in RAW_SUFFIXES:
        reason = "a camera's raw file; export it as JPEG first"
    elif text.startswith((b"<!doctype html", b"<html")):
        reason = "a web page, not a picture; download the picture itself"
    elif text.startswith(b"version https://git-lfs"):
        reason = "a Git LFS pointer, not a picture; run git lfs pull"
    elif head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        reason = "a JPEG XL picture, which cannot be read yet; save it as JPEG or PNG first"
    else:
        reason = "not a picture that can be read; give a JPEG, PNG, WebP, AVIF, HEIC, GIF, TIFF or BMP file"
    return ImageError(f"{name}: this is {reason}")


# Reading it.


def open_file(path: str, name: str) -> IO[bytes]:
    """Open a file, or read a pipe to its end; ``name`` is what messages call it.

    Raises:
        ImageError: it cannot be opened, or is no file.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            os.scandir(path).close()  # a folder that cannot be listed is the likelier trouble
            raise ImageError(f"{name}: this is a folder; give the pictures in it")
        if stat.S_ISFIFO(mode):  # <(...) in a shell
            return io.BytesIO(_read_pipe(path, name))
        if not stat.S_ISREG(mode):
            raise ImageError(f"{name}: this is a device, not a file; give a picture")
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        if "://" in path:
            raise ImageError(f"{name}: only local files can be read; download it first") from error
        raise ImageError(f"{name}: there is no such file; check the path") from error
    except PermissionError as error:
        raise ImageError(f"{name}: no permission to read it; change its permissions") from error
    except OSError as error:
        raise unreadable(error, name) from error
    except ValueError as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: this is not a valid path ({error}); check it") from error


def _read_pipe(path: str, name: str) -> bytes:
    """Read a pipe to its end; one that nobody writes to is not waited for."""
    patience = time.monotonic() + _WAIT_FOR_WRITER
    data = bytearray()
    # opening it the usual way waits for a writer, for ever
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        while True:
            part = pipe.read(2**20)  # None: there is a writer, who says nothing yet
            if part:
                data += part
                if len(data) > MAX_BYTES:
                    raise ImageError(f"{name}: what comes out of this pipe does not end; give a picture")
            elif part is not None and (data or time.monotonic() > patience):
                return bytes(data)
            elif part is None:
                patience = 0.0  # what comes now is the end, even of nothing
                select.select([pipe], [], [])
            else:
                time.sleep(0.01)


_WAIT_FOR_WRITER = 3.0
"""Seconds."""


def unreadable(error: OSError, name: str) -> ImageError:
    """Turn what the system says of a file into the line for the user."""
    return ImageError(f"{name}: it cannot be read ({error.strerror or error}); check the path and the disk")


# Folders and patterns.


def find_images(
    paths: Iterable[str | os.PathLike[str]],
    recursive: bool = False,
    suffixes: Set[str] = PHOTO_SUFFIXES,
) -> list[Path]:
    """Expand files, folders and patterns into the pictures they stand for.

    - A file is taken as it is, whatever its suffix. So is a path that does not exist: whoever opens it
      reports the error in its place.
    - A folder stands for the files in it that end in one of ``suffixes``, sorted by path. Hidden files
      and folders are skipped. A sub-folder that cannot be listed is kept as a path, for the same reason.
    - A pattern (``*``, ``?``, ``[...]`` and, for any depth, ``**``) is expanded if no such file exists, and
      sorted. With a suffix it stands for all files that match; with an open end (``photos/*``) for the
      files with such a suffix. Folders that match are listed like folders given by name, except after ``**``.

    Args:
        paths: any number of them; a single path counts as one.
        recursive: also list the sub-folders of folders; every folder is visited once, through whichever
            symbolic links it is reached.
        suffixes: in lower case, with the dot; those of photos unless videos are wanted, too.

    Raises:
        ImageError: a folder without pictures, or a pattern that matches none; the message names it.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: list[Path] = []
    for given in paths:
        found.extend(map(Path, iter_images(os.fsdecode(given), recursive, suffixes)))
    return found


def iter_images(path: str, recursive: bool = False, suffixes: Set[str] = PHOTO_SUFFIXES) -> Iterator[str]:
    """Yield what one of the paths given to `find_images` stands for, one after the other.

    Memory holds the names in the folder that is being listed, or all that a pattern without ``**`` matches.

    Raises:
        ImageError: as `find_images`, when there is nothing to yield.
    """
    if not path:
        raise ImageError("'': the path is empty; give a file, a folder or a pattern")
    empty = True
    if os.path.isdir(path):
        for name in _list_photos(path, recursive, suffixes):
            yield name
            empty = False
        if empty:
            raise _no_pictures(path, recursive, suffixes)
    elif not os.path.lexists(path) and glob.has_magic(path):
        for name in _expand(path, recursive, suffixes):
            yield name
            empty = False
        if empty:
            kind = "picture or video" if suffixes - PHOTO_SUFFIXES else "picture"
            raise ImageError(f"{name_of(path)}: no {kind} matches this pattern; check it")
    else:
        yield path


def _expand(pattern: str, recursive: bool, suffixes: Set[str]) -> Iterator[str]:
    suffix = os.path.splitext(pattern)[1]
    anything = suffix not in ("", ".") and not glob.has_magic(suffix)
    parts = pattern.split(os.sep)
    if "**" in parts and not any(part.startswith(".") for part in parts[parts.index("**") :]):
        yield from _expand_deep(parts, {suffix.lower()} if anything else suffixes)
        return
    names: set[str] = set()
    for path in glob.iglob(pattern, recursive=True):
        if os.path.isdir(path):
            if "**" not in pattern:
                names.update(_list_photos(path, recursive, suffixes))
        elif anything or _ends_in(path, suffixes):
            names.add(path)
    yield from sorted(names)


def _expand_deep(parts: list[str], suffixes: Set[str]) -> Iterator[str]:
    """Yield what a pattern with ``**`` matches; `glob` would go round links that loop, many times over."""
    at = parts.index("**")
    start, rest = os.sep.join(parts[:at]) or (os.sep if at else os.curdir), parts[at:]
    for base in sorted(glob.glob(start)) if glob.has_magic(start) else [start]:
        if os.path.isdir(base):
            for path in _list_photos(base, True, suffixes):
                below = path if base == os.curdir else path[len(os.path.join(base, "")) :]
                if _matches(below.split(os.sep), rest) and not os.path.isdir(path):
                    yield path


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(parts)
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _list_photos(folder: str, recursive: bool, suffixes: Set[str]) -> Iterator[str]:
    """Yield the files of a folder with such a suffix, and what cannot be listed below it, sorted by path."""
    seen = set()
    pending = [
        ("", [folder + os.sep])
    ]  # names by folder, the first last; those of folders end in a separator
    while pending:
        before, names = pending[-1]
        if not names:
            pending.pop()
            continue
        name = names.pop()
        if not name.endswith(os.sep):
            yield before + name
            continue
        here = before + name[:-1]
        try:
            if recursive:
                status = os.stat(here)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            below = []
            with os.scandir(here) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    try:
                        if name[name.rfind(".") :].lower() in suffixes and (
                            entry.is_file() or _is_broken_link(entry)
                        ):
                            below.append(name)
                        elif recursive and entry.is_dir():
                            below.append(name + os.sep)
                    except OSError:  # a link to itself
                        if _ends_in(name, suffixes):
                            below.append(name)
        except OSError as error:
            if here == folder:
                raise unreadable(error, name_of(folder)) from error
            yield here
            continue
        below.sort(reverse=True)
        pending.append(("" if here == os.curdir else os.path.join(here, ""), below))


def _ends_in(path: str, suffixes: Set[str]) -> bool:
    return os.path.splitext(path)[1].lower() in suffixes


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _no_pictures(folder: str, recursive: bool, suffixes: Set[str]) -> ImageError:
    where = "this folder or its sub-folders" if recursive else "this folder"
    kinds, hint = "pictures", "pictures end in .jpg, .png, .webp, .heic, ..."
    if suffixes - PHOTO_SUFFIXES:
        kinds, hint = "pictures or videos", "they end in .jpg, .png, .heic, .mp4, .mov, .webm, ..."
    if not recursive and any(_ends_in(path, suffixes) for path in _list_photos(folder, True, suffixes)):
        hint = "use --recursive to look into its sub-folders"
    return ImageError(f"{name_of(folder)}: no {kinds} in {where}; {hint}")
