"""Files of generated captions, and whose captions they are.

Captions are read and written in COCO's results format, ``[{"image_id": …, "caption": …}]``. Those of other
systems come in other shapes too, and with ids that are numbers in one file and strings or paths in the
other; what can be told without guessing is accepted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.files import write_atomically
from captioner_training.metrics import (
    Annotations,
    ScoreError,
    field_of,
    first_of,
    identity_of,
    json_kind,
    read_json_text,
)

_IDENTITIES = ("image_id", "file_name", "path", "image", "id")
"""Keys that may name an image, the first of them that is there."""


def load_results(path: str | PathLike[str]) -> dict[Hashable, str]:
    """Read generated captions: a caption by image id (int or str).

    The file is a list of ``{"image_id": …, "caption": …}`` (COCO's results format), an object that gives a
    caption for each id, or JSON lines. Instead of ``image_id`` there may be ``file_name``, ``path`` (what
    ``captioner caption --json`` and ``--jsonl`` write), ``image`` or ``id``; records of these with an error
    and no caption are left out.

    Raises:
        ScoreError: the file cannot be read, is none of these, is empty, or an image occurs twice.
    """
    results: dict[Hashable, str] = {}
    for where, key, caption in _entries(path):
        if isinstance(caption, list) and len(caption) == 1:  # pycocoevalcap's own way to hold captions
            caption = caption[0]
        if isinstance(caption, dict):
            caption = caption.get("caption")
        if not isinstance(caption, str):
            raise ScoreError(f'{where}: "caption" must be a string, not {json_kind(caption)}')
        if key in results:
            raise ScoreError(f"{where}: image {key!r} occurs twice; give one caption for each image")
        results[key] = caption
    if not results:
        raise ScoreError(f"{path}: holds no captions")
    return results


def save_results(path: Path, captions: Mapping[Any, str]) -> None:
    """Write captions by image id in COCO's results format."""
    results = [{"image_id": key, "caption": caption} for key, caption in captions.items()]
    write_atomically(path, json.dumps(results).encode())


def _entries(path: str | PathLike[str]) -> Iterator[tuple[str, int | str, Any]]:
    """Yield where an entry stands, whose caption it is, and what stands for the caption."""
    data = _load(path)
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        data = data["annotations"]  # captions in COCO's captions format
    elif isinstance(data, dict) and "caption" in data and any(key in data for key in _IDENTITIES):
        data = [data]  # a single JSON line
    elif isinstance(data, dict):
        for key, caption in data.items():
            yield f"{path}: {key!r}", key, caption
        return
    if not isinstance(data, list):
        raise ScoreError(
            f'{path}: expected a list of {{"image_id": …, "caption": …}} entries, not {json_kind(data)}'
        )
    for number, entry in enumerate(data):
        where = f"{path}: entry {number}"
        name = next((key for key in _IDENTITIES if isinstance(entry, dict) and key in entry), "image_id")
        if isinstance(entry, dict) and entry.get("error") and entry.get("caption") is None:
            continue
        identity = identity_of(entry, name, where)
        caption = entry.get("caption")
        yield (
            where,
            identity,
            caption if isinstance(caption, list) else field_of(entry, "caption", str, where),
        )


def _load(path: str | PathLike[str]) -> Any:
    """Parse JSON or, failing that, JSON lines."""
    text = read_json_text(path)
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except ScoreError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        entries = []
        for number, line in lines:
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError) as problem:
                if entries:
                    raise ScoreError(f"{path}: line {number} is not JSON: {problem}") from None
                break
        if len(entries) < 2:
            raise ScoreError(f"{path}: is not JSON: {error}") from None
        return entries


def _unique(pairs: list[tuple[str, Any]], path: str | PathLike[str]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ScoreError(f"{path}: {twice!r} occurs twice in one object; give one caption for each image")
    return found


@dataclass(frozen=True)
class Match:
    """Generated captions by the ids of the annotations.

    Attributes:
        captions: the caption of every annotated image that has one.
        missing: the annotated images that have none.
        surplus: ids of captions whose image has no annotations.
        ways: how many ids were not the same in both files, by what told whose they are.
    """

    captions: dict[Hashable, str]
    missing: tuple[Hashable, ...]
    surplus: tuple[Hashable, ...]
    ways: dict[str, int]


def match_results(
    results: Mapping[Hashable, str], annotations: Annotations, path: str | PathLike[str] = "the results"
) -> Match:
    """Find the image of each caption.

    Ids that are the same go first; then those that are once a number and once a string (``7``, ``"7"``,
    ``"000007"``); then paths, by an image's ``file_name`` or its id: one of the two may have more folders,
    and one of them lack the extension.

    Raises:
        ScoreError: a caption could be of several images, two are of one, or none is of an annotated one.
    """
    ids = [*annotations.references, *annotations.without]
    files = {image["id"]: image.get("file_name") for image in annotations.images}
    names = {key: [*map(_path, filter(None, (_string(files.get(key)), _string(key))))] for key in ids}
    texts = _index((_text(key), key) for key in ids)
    stems = _index((_stem(name), key) for key in ids for name in names[key])
    # a number is the name of a picture that has no other: 391895 for 000000391895.jpg
    whole = _index((name, key) for key in ids for name in names[key] or [_text(key)])
    ends = _index((end, key) for key in ids for name in names[key] for end in _ends(name))
    end_stems = _index((_stem(end), key) for key in ids for name in names[key] for end in _ends(name))

    def as_text(result: Hashable) -> set[Hashable]:
        return texts.get(_text(result), set())

    def with_fewer_folders(result: Hashable) -> set[Hashable]:
        name = _path(_string(result))
        return ends.get(name) or end_stems.get(name) or ends.get(_stem(name)) or set()

    def with_more_folders(result: Hashable) -> set[Hashable]:
        for end in _ends(_path(_string(result))):
            found = whole.get(end) or stems.get(end) or whole.get(_stem(end)) or whole.get(_text(_stem(end)))
            if found:
                return found
        return set()

    everyone = {*ids}
    owners: dict[Hashable, Hashable] = {key: key for key in results if key in everyone}
    ways: dict[str, int] = {}
    for way, find in (
        ("as text", as_text),
        ("by file name", with_fewer_folders),
        ("by file name", with_more_folders),
    ):
        for result in results:
            found = find(result) if result not in owners else set()
            if len(found) > 1:
                raise ScoreError(
                    f"{path}: {result!r} could be any of {len(found)} images "
                    f"({first_of(sorted(found, key=str))}); write the ids as in the annotations"
                )
            if found:
                (owners[result],) = found
                ways[way] = ways.get(way, 0) + 1
    for key, count in Counter(owners.values()).items():
        if count > 1:
            same = [result for result, owner in owners.items() if owner == key]
            raise ScoreError(
                f"{path}: {first_of(same)} are captions of the same image; give one caption for each image"
            )
    captions = {owner: results[result] for result, owner in owners.items() if owner in annotations.references}
    if not captions:
        raise ScoreError(
            f"{path}: none of its {len(results)} images has captions in the annotations "
            f"(first: {first_of([*results])}; there: {first_of(ids)})"
        )
    return Match(
        captions,
        tuple(key for key in annotations.references if key not in captions),
        tuple(result for result in results if owners.get(result) not in captions),
        ways,
    )


def _index(pairs: Iterable[tuple[str, Hashable]]) -> dict[str, set[Hashable]]:
    found: dict[str, set[Hashable]] = {}
    for name, key in pairs:
        if name:
            found.setdefault(name, set()).add(key)
    return found


def _text(key: Hashable) -> str:
    """Return an id as text; of digits only, without zeros in front."""
    text = str(key).strip()
    return (text.lstrip("0") or "0") if text.isascii() and text.isdigit() else text


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _path(name: str) -> str:
    """Return a path with slashes, without those in front."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _ends(path: str) -> list[str]:
    """Return the path and what is left of it without the first folders, the longest first."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _stem(path: str) -> str:
    """Return a path without its extension; an empty string if it has none."""
    stem = PurePosixPath(path)
    return str(stem.with_suffix("")) if stem.suffix else ""
