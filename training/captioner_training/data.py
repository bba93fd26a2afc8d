"""Pictures and captions: COCO-format annotations over tar files and folders of pictures."""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from captioner_training.config import SourceConfig
from captioner_training.metrics import load_references


class DataError(ValueError):
    """Data that cannot be used; the message names the file and what to do."""


class PictureStore:
    """Reads pictures by name out of folders and uncompressed tar files, from any thread."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Index the folders and tars.

        Raises:
            DataError: if a path is missing or is neither a folder nor a tar.
        """
        self._folders: list[Path] = []
        self._members: dict[str, tuple[Path, int, int]] = {}
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        for path in paths:
            if path.is_dir():
                self._folders.append(path)
                continue
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        if member.isfile():
                            self._members[member.name] = (path, member.offset_data, member.size)
            except FileNotFoundError:
                raise DataError(f"{path}: no such folder or tar file; is --data right?") from None
            except (tarfile.TarError, OSError) as error:
                raise DataError(f"{path}: neither a folder nor an uncompressed tar file ({error})") from None

    def __contains__(self, name: str) -> bool:
        return name in self._members or any((folder / name).is_file() for folder in self._folders)

    def read(self, name: str) -> bytes:
        """Return the bytes of a picture.

        Raises:
            DataError: if it is not there.
        """
        if name in self._members:
            path, offset, size = self._members[name]
            with self._lock:
                if path not in self._files:
                    self._files[path] = os.open(path, os.O_RDONLY)
            return os.pread(self._files[path], size, offset)
        for folder in self._folders:
            if (folder / name).is_file():
                return (folder / name).read_bytes()
        raise DataError(f"{name}: no such picture among the images of its data set")

    def close(self) -> None:
        """Close the tar files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a data set with its captions."""

    id: int | str
    file: str
    captions: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class DataSet:
    """The pictures of one source, in id order, and where their bytes are."""

    name: str
    pictures: tuple[Picture, ...]
    store: PictureStore

    def __len__(self) -> int:
        return len(self.pictures)

    def references(self) -> dict[int | str, list[str]]:
        """Return the captions by picture id, as the metrics want them."""
        return {p.id: list(p.captions) for p in self.pictures}


def load_data_set(name: str, config: SourceConfig, root: Path) -> DataSet:
    """Read the annotations, pick the pictures that the config asks for, and find their files.

    Raises:
        DataError: for missing files or pictures, or when nothing is left to use.
    """
    annotations = root / config.annotations
    references, images = load_references(annotations)
    store = PictureStore([root / path for path in config.images])
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
            raise DataError(f"{annotations}: {image['file_name']} is not among {', '.join(config.images)}")
        pictures.append(Picture(image["id"], image["file_name"], captions))
    if not pictures:
        raise DataError(f"{annotations}: no picture with a caption is left for data set {name!r}")
    return DataSet(name, tuple(pictures), store)


def chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield consecutive pieces of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
