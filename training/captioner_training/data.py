"""Pictures or clips and captions: COCO-format annotations over tar files and folders of them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from captioner.inputs import VIDEO_SUFFIXES, one_line
from captioner_training.config import SourceConfig
from captioner_training.metrics import load_references

T = TypeVar("T")


class DataError(ValueError):
    """Data that cannot be used; the message, one line, names the file and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class PictureStore:
    """Reads pictures by name out of folders and uncompressed tar files, from any thread.

    Where several hold a name the first tar counts, then the first folder.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Index the folders and tars.

        Raises:
            DataError: if a path is missing or is neither a folder nor a tar.
        """
        self._folders: list[Path] = []
        self._members: dict[str, tuple[Path, int, int]] = {}  # name -> tar, offset, size
        self._more: dict[str, list[tuple[Path, int, int]]] = {}  # where further tars hold the name, too
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        for path in paths:
            if path.is_dir():
                self._folders.append(path)
                continue
            try:
                with tarfile.open(path, "r:") as tar:
                    members = {_plain(m.name): (path, m.offset_data, m.size) for m in tar if m.isfile()}
            except FileNotFoundError:
                raise DataError(f"{path}: no such folder or tar file; check the path") from None
            except (tarfile.TarError, OSError) as error:
                raise DataError(
                    f"{path}: neither a folder nor an uncompressed tar file ({error}); unpack it first"
                ) from None
            for name, member in members.items():
                if self._members.setdefault(name, member) is not member:
                    self._more.setdefault(name, []).append(member)

    def __contains__(self, name: str) -> bool:
        return _plain(name) in self._members or self._folder(name) is not None

    def _folder(self, name: str) -> Path | None:
        for folder in self._folders:
            with contextlib.suppress(ValueError):  # a name with a zero byte
                if (folder / name).is_file():
                    return folder
        return None

    def places(self, name: str) -> list[Path]:
        """Return the folders and tars that hold a picture of this name; the first is the one that is read."""
        found = (
            [self._members[_plain(name)], *self._more.get(_plain(name), [])]
            if _plain(name) in self._members
            else []
        )
        return [path for path, _, _ in found] + [f for f in self._folders if (f / name).is_file()]

    def names(self) -> Iterator[str]:
        """Yield the names of all files, those in sub-folders with their path."""
        yield from self._members
        for folder in self._folders:
            for here, files in walk(folder):
                prefix = here.relative_to(folder)
                yield from ((prefix / file).as_posix() for file in files)

    def size(self, name: str) -> int:
        """Return the number of bytes of a picture.

        Raises:
            DataError: if it is not there.
        """
        return self.stamp(name)[0]

    def stamp(self, name: str) -> tuple[int, int]:
        """Return a picture's number of bytes, and when its file (or its tar) was last written, in ns.

        Raises:
            DataError: if it is not there.
        """
        if _plain(name) in self._members:
            path, _, size = self._members[_plain(name)]
            return size, path.stat().st_mtime_ns
        status = (self._holder(name) / name).stat()
        return status.st_size, status.st_mtime_ns

    def read(self, name: str, limit: int | None = None, *, place: Path | None = None) -> bytes:
        """Return the bytes of a picture, at most the first ``limit``.

        Args:
            name: as in the annotations.
            limit: None for all.
            place: one of `places`; the first if None.

        Raises:
            DataError: if it is not there.
        """
        members = [self._members[_plain(name)]] if _plain(name) in self._members else []
        for path, offset, size in members + self._more.get(_plain(name), []):
            if place is None or place == path:
                with self._lock:
                    if path not in self._files:
                        self._files[path] = os.open(path, os.O_RDONLY)
                return os.pread(self._files[path], size if limit is None else min(size, limit), offset)
        with open((place or self._holder(name)) / name, "rb") as file:
            return file.read(-1 if limit is None else limit)

    @contextlib.contextmanager
    def as_file(self, name: str) -> Iterator[Path]:
        """Give the path of a file, for readers that want one; what lies in a tar is copied out meanwhile.

        Raises:
            DataError: if it is not there.
        """
        if _plain(name) not in self._members:
            yield self._holder(name) / name
            return
        with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
            path = Path(folder) / f"clip{Path(name).suffix}"
            path.write_bytes(self.read(name))
            yield path

    def _holder(self, name: str) -> Path:
        folder = self._folder(name)
        if folder is None:
            raise DataError(f"{name}: no such picture among the images of its data set")
        return folder

    def close(self) -> None:
        """Close the tar files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and those below it, each once, with their files; hidden folders are left out."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # links that lead in a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(here), sorted(files)


def _plain(name: str) -> str:
    """Return a name as tars are searched for it: ``tar cf x.tar .`` writes ``./`` before each."""
    return name.removeprefix("./")


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture or clip of a data set with its captions.

    A clip is the part of its file from ``start`` to ``end`` in seconds; None is the file's own end.
    """

    id: int | str
    file: str
    captions: tuple[str, ...]
    start: float = 0.0
    end: float | None = None

    @property
    def part(self) -> str:
        """The part of the file that it is, for keys of caches; empty for whole files."""
        return "" if self.start == 0 and self.end is None else f" {self.start!r} {self.end!r}"


@dataclass(frozen=True, eq=False)
class DataSet:
    """The pictures (or clips) of one source, in id order, and where their bytes are.

    ``info`` is what the annotation file says of itself; ``partial`` that pictures of the original set are
    missing, so that no score is comparable with those of others. ``media`` is ``image`` or ``video``.
    """

    name: str
    pictures: tuple[Picture, ...]
    store: PictureStore
    info: dict[str, Any] = field(default_factory=dict)
    media: str = "image"

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def partial(self) -> bool:
        """Whether ``captioner prepare --allow-missing`` left pictures out."""
        return self.info.get("partial") is True

    @property
    def is_video(self) -> bool:
        """Whether its items are clips."""
        return self.media == "video"

    @property
    def thing(self) -> str:
        """What people call an item."""
        return "clip" if self.is_video else "picture"

    def references(self) -> dict[int | str, list[str]]:
        """Return the captions by picture id, as the metrics want them."""
        return {p.id: list(p.captions) for p in self.pictures}


def load_data_set(name: str, config: SourceConfig, root: Path) -> DataSet:
    """Read the annotations, pick the pictures that the config asks for, and find their files.

    They are clips if the annotations say so, as those that ``captioner prepare`` writes do, or if they say
    nothing and all files have the suffix of a video.

    Raises:
        DataError: for missing files or pictures, a file that stands there twice, a clip of impossible times,
            or when nothing is left.
        ScoreError: for annotations that are not in COCO's format.
    """
    annotations = root / config.annotations
    references, images = load_references(annotations)
    info = load_info(annotations)
    media = _media(info, images)
    places = [root / path for path in config.images] or info_images(annotations, info)
    store = PictureStore(places)
    files: dict[Any, Any] = {}
    for image in images:
        file = image.get("file_name")
        if not isinstance(file, str):
            continue
        part = (file, *(_times(annotations, image) if media == "video" else ()))
        if part in files:
            raise DataError(
                f"{annotations}: {file} stands there twice, with the ids {files[part]} and {image['id']}: "
                "give several annotations to one image; captioner prepare does that"
            )
        files[part] = image["id"]
    images = sorted(images, key=lambda image: (isinstance(image["id"], str), image["id"]))
    if config.skip_highest:
        images = images[: -config.skip_highest]
    if config.only_highest:
        images = images[-config.only_highest :]
    images = [image for image in images if image.get("set") not in config.exclude_sets]
    pictures = []
    for image in images:
        captions = tuple(c for c in references.get(image["id"], []) if c.strip())
        if not captions:
            continue
        if not isinstance(image.get("file_name"), str):
            raise DataError(f"{annotations}: image {image['id']} has no file_name")
        if image["file_name"] not in store:
            raise DataError(
                f"{annotations}: {image['file_name']} is not among {', '.join(config.images) or places[0]}"
            )
        start, end = _times(annotations, image) if media == "video" else (0.0, None)
        pictures.append(Picture(image["id"], image["file_name"], captions, start, end))
    if not pictures:
        raise DataError(f"{annotations}: no picture with a caption is left for data set {name!r}")
    return DataSet(name, tuple(pictures), store, info, media)


def _media(info: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> str:
    """Return what the annotations are of: ``image`` or ``video``."""
    if "media" in info:
        return "video" if info["media"] == "video" else "image"
    names = [image["file_name"] for image in images if isinstance(image.get("file_name"), str)]
    videos = [Path(name).suffix.lower() in VIDEO_SUFFIXES for name in names]
    return "video" if videos and all(videos) else "image"


def _times(annotations: Path, image: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return which part of its file a clip is, in seconds."""
    start, end = image.get("start"), image.get("end")
    if image.get("cut") is True:  # the times are those in the video that it was cut out of
        return 0.0, None
    begin = 0.0 if start is None else start
    if not all(t is None or (type(t) in (int, float) and math.isfinite(t)) for t in (begin, end)):
        found = f"{start!r} and {end!r}"
    elif begin >= 0 and (end is None or end > begin):
        return float(begin), None if end is None else float(end)
    else:
        found = f"{start} to {end}"
    raise DataError(
        f"{annotations}: {image.get('file_name')} (id {image['id']}): start and end must be seconds, one "
        f"after the other, and not {found}"
    )


def load_info(annotations: Path) -> dict[str, Any]:
    """Return the ``info`` of an annotation file in COCO's format; empty if there is none."""
    data = json.loads(annotations.read_text(encoding="utf-8-sig"))
    info = data.get("info") if isinstance(data, dict) else None
    return info if isinstance(info, dict) else {}


def info_images(annotations: Path, info: Mapping[str, Any]) -> list[Path]:
    """Return the folders and tars of pictures that `captioner prepare` noted in the annotations.

    Raises:
        DataError: if it noted none.
    """
    images = info.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(path, str) for path in images):
        raise DataError(
            f"{annotations}: it does not say where its pictures are: name folders or tars under images: in "
            "the config, or make the data set with captioner prepare"
        )
    return [annotations.parent / path for path in images]


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield consecutive pieces of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
