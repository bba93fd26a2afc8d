"""Readers of the formats in which people have captions; the format is recognised from the content.

Each gives the pictures with their captions and the splits that the source states. Nothing here looks at the
pictures themselves; `captioner_training.prepare` does.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner.inputs import PHOTO_SUFFIXES, VIDEO_SUFFIXES
from captioner_training.data import DataError, walk

SPLITS = ("train", "val", "test")

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
"""Karpathy's ``restval`` are validation pictures of COCO that everybody trains on."""


@dataclass(eq=False)
class Entry:
    """A picture or clip as a source tells of it.

    Attributes:
        names: where its file may be, likeliest first.
        captions: as they stand there, empty ones included.
        split: ``train``, ``val`` or ``test``, or None if the source does not say.
        id: the source's own, or None.
        set: the source's name for a group of pictures, or None.
        start, end: seconds of a clip in its original video, or None.
        clip: the first of ``names`` is a file of that clip alone.
    """

    names: tuple[str, ...]
    captions: list[str]
    split: str | None = None
    id: int | str | None = None
    set: str | None = None
    start: float | None = None
    end: float | None = None
    clip: bool = False


@dataclass(eq=False)
class Source:
    """What a file or folder of captions holds.

    Attributes:
        path: where it was read.
        format: one of `FORMATS`.
        title: the format as people call it.
        entries: the pictures, in the order of the source.
        media: ``image`` or ``video``.
        notes: what a person should know, such as lines that were passed over.
        roots: folders and tars of the pictures if nobody names others.
        listed: with the format ``list``: the names of the pictures of one split.
    """

    path: Path
    format: str
    title: str
    entries: list[Entry] = field(default_factory=list)
    media: str = "image"
    notes: list[str] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    listed: tuple[str, ...] = ()


FORMATS = ("coco", "karpathy", "flickr", "table", "sidecars", "msvd", "msrvtt", "list")


def read(path: Path, format: str | None = None) -> Source:
    """Read captions of any of the `FORMATS`, recognised from the content unless ``format`` is given.

    Raises:
        DataError: one line that names the file, where in it, and what to do.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"{format}: no such format; there are {', '.join(FORMATS)}")
    if path.is_dir():
        if format not in (None, "sidecars"):
            raise DataError(f"{path}: a folder, but the format {format} is a file; name the file in it")
        return _sidecars(path)
    if format == "sidecars":
        raise DataError(f"{path}: the format sidecars is a folder of pictures with .txt files")
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    data, rows = _json(text, path)
    if format is None:
        format = _recognise_json(data, path) if rows is None else "table"
        format = format or _recognise_text(text)
    readers: dict[str, Callable[[Any, Path], Source]] = {
        "coco": _coco,
        "karpathy": _karpathy,
        "msrvtt": _msrvtt,
    }
    if format in readers:
        if not isinstance(data, dict):
            raise DataError(
                f"{path}: the format {format} is JSON with an object at the top, which this is not"
            )
        source = readers[format](data, path)
    elif format == "table" and (rows is not None or data is not None):
        source = _table(*_records(rows if rows is not None else data, path), path, _RECORDS)
    elif data is not None or rows is not None:
        raise DataError(f"{path}: the format {format} is plain text, and this is JSON")
    elif format == "table":
        source = _delimited(text, path)
    else:
        source = {"flickr": _flickr, "msvd": _msvd, "list": _list}[format](text, path)
    source.roots = source.roots or [path.parent]
    if not source.entries and not source.listed:
        raise DataError(f"{path}: no pictures with captions in it")
    return source


def split_of(name: str) -> str | None:
    """Return the split that a file's name tells of, as ``captions_val2017.json`` does; None if not just one.

    >>> split_of("Flickr_8k.devImages.txt")
    'val'
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", Path(name).stem)
    found = {_SPLIT_NAMES[w.lower()] for w in words if w.lower() in _SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def split_named(value: object, where: str) -> str:
    """Return the split that a source calls ``value``.

    Raises:
        DataError: if it is none.
    """
    name = _SPLIT_NAMES.get(str(value).strip().rstrip("_0123456789").lower())
    if name is None:
        known = ", ".join(_SPLIT_NAMES)
        raise DataError(f"{where}: the split is {value!r}; write one of {known}")
    return name


# Reading and recognising.


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # what spreadsheets call Unicode text
        return data.decode("utf-16", errors="replace")
    if b"\0" in data[:4096]:
        raise DataError(f"{path}: not text; name the file (or folder) that holds the captions")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8, "
            "for instance with iconv -f LATIN1 -t UTF-8"
        ) from None


def _json(text: str, path: Path) -> tuple[Any, list[Any] | None]:
    """Return what a JSON file holds and None, None and the rows of JSON lines, or twice None."""
    start = text.lstrip()[:1]
    if start not in ("{", "["):
        return None, None
    try:
        return json.loads(text), None
    except RecursionError:
        raise DataError(f"{path}: not JSON of any use: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        whole = error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}: not JSON of any use: {error}") from None
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if not rows:  # not even the first line is whole, so it is not JSON lines
                raise DataError(
                    f"{path}: not JSON: {whole.msg} in line {whole.lineno}, column {whole.colno}"
                ) from None
            reason = getattr(error, "msg", "nested too deeply, or with a number too large")
            raise DataError(f"{path}: line {number} is not JSON: {reason}") from None
    return None, rows


def _recognise_json(data: Any, path: Path) -> str | None:
    if data is None:
        return None
    if isinstance(data, dict):
        if "videos" in data and "sentences" in data:
            return "msrvtt"
        images = data.get("images")
        if isinstance(images, list):
            if images and isinstance(images[0], dict) and "sentences" in images[0]:
                return "karpathy"
            return "coco"
    return "table"


_TOKEN = re.compile(r"(.+)#(\d+)\t(.*)")
_CLIP = re.compile(r"([\w-]{11}_\d+_\d+)\s+(\S.*)?")


def _recognise_text(text: str) -> str:
    lines = [line for line in text[:100_000].splitlines()[:60] if line.strip() and not line.startswith("#")]
    first = lines[0] if lines else ""
    if _TOKEN.fullmatch(first):
        return "flickr"
    if _CLIP.fullmatch(first) or _is_msvd_header(first):
        return "msvd"
    if lines and all(len(line.split()) == 1 and not re.search(r"[,;|]", line) for line in lines):
        return "list"
    return "table"


# JSON formats.


def _coco(data: dict[str, Any], path: Path) -> Source:
    """COCO's captions, 2014 and 2017, and whatever has their form."""
    from pycocotools.coco import COCO

    images, annotations = data.get("images"), data.get("annotations")
    if not isinstance(images, list):
        raise DataError(f'{path}: COCO\'s format needs "images", a list')
    if not isinstance(annotations, list):
        raise DataError(
            f'{path}: there are no "annotations", so no captions (COCO publishes none of its test pictures); '
            "use captions_train and captions_val"
        )
    known = set()
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not _is_id(image.get("id")):
            raise DataError(f'{path}: images[{number}] has no "id", a number or text')
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise DataError(f"{path}: image {image['id']} has no file_name")
        if image["id"] in known:
            raise DataError(f"{path}: two images have the id {image['id']}")
        known.add(image["id"])
    strays = []
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or not _is_id(annotation.get("image_id")):
            raise DataError(f'{path}: annotations[{number}] has no "image_id", a number or text')
        if not isinstance(annotation.get("caption"), str):
            raise DataError(
                f'{path}: annotations[{number}] has no "caption"; COCO\'s captions are in captions_*.json, '
                "not in instances_*.json"
            )
        if not _is_id(annotation.get("id")):
            annotation["id"] = -1 - number  # pycocotools' index wants one
        if annotation["image_id"] not in known:
            strays.append(annotation["image_id"])
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress there
        coco.createIndex()
    source = Source(path, "coco", "COCO captions")
    for image in images:
        captions = [a["caption"] for a in coco.imgToAnns[image["id"]]]
        split = image.get("split")
        source.entries.append(
            Entry(
                (image["file_name"],),
                captions,
                split=None if split is None else split_named(split, f"{path}: image {image['id']}"),
                id=image["id"],
                set=image["set"] if isinstance(image.get("set"), str) else None,
                start=_seconds(image.get("start")),
                end=_seconds(image.get("end")),
                clip=image.get("cut") is True,
            )
        )
    info = data.get("info")
    if isinstance(info, dict):  # of a data set that was prepared before
        source.media = "video" if info.get("media") == "video" else "image"
        if isinstance(info.get("images"), list) and all(isinstance(p, str) for p in info["images"]):
            source.roots = [path.parent / p for p in info["images"]]
    if strays:
        source.notes.append(
            f"{len(strays)} captions left out: their {len(set(strays))} images are not listed "
            f"(the first is {strays[0]})"
        )
    return source


def _karpathy(data: dict[str, Any], path: Path) -> Source:
    """Karpathy and Fei-Fei's ``dataset_coco.json``, ``dataset_flickr8k.json``, ``dataset_flickr30k.json``."""
    source = Source(path, "karpathy", "Karpathy's splits")
    if not isinstance(data.get("images"), list):
        raise DataError(f'{path}: Karpathy\'s format needs "images", a list')
    for number, image in enumerate(data["images"]):
        where = f"{path}: images[{number}]"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            raise DataError(f'{where} has no "filename"')
        if not isinstance(image.get("sentences"), list):
            raise DataError(f'{where} has no "sentences", a list')
        captions = []
        for sentence in image["sentences"]:
            raw, tokens = (
                (sentence.get("raw"), sentence.get("tokens")) if isinstance(sentence, dict) else (0, 0)
            )
            if isinstance(raw, str):
                captions.append(raw)
            elif isinstance(tokens, list) and all(isinstance(t, str) for t in tokens):
                captions.append(" ".join(tokens))
            else:
                raise DataError(f'{where} has a sentence without "raw" or "tokens"')
        names = [image["filename"]]
        if isinstance(image.get("filepath"), str) and image["filepath"]:
            names.insert(0, f"{image['filepath']}/{image['filename']}")
        key = image.get("cocoid", image.get("imgid"))
        if isinstance(image.get("cocoid"), int):
            names.append(f"{image['cocoid']:012d}.jpg")  # the same picture's name of 2017
        if "split" not in image:
            raise DataError(f'{where} has no "split"')
        source.entries.append(
            Entry(
                tuple(names),
                captions,
                split_named(image["split"], where),
                key if _is_id(key) else None,
            )
        )
    return source


_MSRVTT_VAL, _MSRVTT_TEST = 6513, 7010
"""First numbers of the official validation and test clips of the 10,000."""


def _msrvtt(data: dict[str, Any], path: Path) -> Source:
    """MSR-VTT: ``videodatainfo`` files of the challenges and ``MSRVTT_data.json``."""
    videos, sentences = data.get("videos"), data.get("sentences")
    if not isinstance(videos, list) or not isinstance(sentences, list):
        raise DataError(f'{path}: MSR-VTT\'s format needs "videos" and "sentences", both lists')
    source = Source(path, "msrvtt", "MSR-VTT", media="video")
    entries: dict[str, Entry] = {}
    for number, video in enumerate(videos):
        where = f"{path}: videos[{number}]"
        if not isinstance(video, dict) or not isinstance(video.get("video_id"), str):
            raise DataError(f'{where} has no "video_id"')
        name = video["video_id"]
        if name in entries:
            raise DataError(f"{where}: {name} stands there twice")
        split = video.get("split")
        index = int(name[5:]) if re.fullmatch(r"video\d{1,9}", name) else None
        if split is None and index is not None:
            split = "train" if index < _MSRVTT_VAL else "val" if index < _MSRVTT_TEST else "test"
        entries[name] = Entry(
            (name,),
            [],
            None if split is None else split_named(split, where),
            start=_seconds(video.get("start time", video.get("start_time"))),
            end=_seconds(video.get("end time", video.get("end_time"))),
            clip=True,
        )
    strays = 0
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, dict) or not isinstance(sentence.get("caption"), str):
            raise DataError(f'{path}: sentences[{number}] has no "caption"')
        if isinstance(sentence.get("video_id"), str) and sentence["video_id"] in entries:
            entries[sentence["video_id"]].captions.append(sentence["caption"])
        else:
            strays += 1
    if strays:
        source.notes.append(f"{strays} captions left out: their videos are not listed")
    source.entries = list(entries.values())
    return source


# Text formats.


def _flickr(text: str, path: Path) -> Source:
    """``name.jpg#0<tab>caption``: Flickr8k.token.txt, results_20130124.token."""
    entries: dict[str, Entry] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _TOKEN.fullmatch(line)
        if match is None:
            raise DataError(f"{path}: line {number} is not of the form name.jpg#0, a tab, and a caption")
        name = re.sub(r"(\.jpe?g)\.\d+$", r"\1", match[1].strip())  # a slip in Flickr8k's own file
        entries.setdefault(name, Entry((name,), [])).captions.append(match[3])
    return Source(path, "flickr", "Flickr token file", list(entries.values()))


def _is_msvd_header(line: str) -> bool:
    columns = [_normal(cell) for cell in line.split(",")]
    return columns[:3] == ["videoid", "start", "end"] and "description" in columns


def _msvd(text: str, path: Path) -> Source:
    """MSVD: the corpus's CSV with its many languages, or ``AllVideoDescriptions.txt``."""
    source = Source(path, "msvd", "MSVD", media="video")
    entries: dict[str, Entry] = {}
    other, blank = 0, 0

    def add(name: str, caption: str) -> None:
        if name not in entries:
            video, start, end = name.rsplit("_", 2)
            entries[name] = Entry((name, video), [], start=float(start), end=float(end), clip=True)
        entries[name].captions.append(caption)

    first = next((line for line in text.splitlines() if line.strip()), "")
    if _is_msvd_header(first):
        for number, row in _csv(text, ",", path):
            if number == 1 or not any(row):
                if number == 1:
                    columns = [_normal(cell) for cell in row]
                    if "description" not in columns:  # the line ends elsewhere than it seemed
                        raise DataError(f"{path}: line 1: no column Description")
                    caption, language = (
                        columns.index("description"),
                        columns.index("language") if ("language" in columns) else -1,
                    )
                continue
            if len(row) <= max(caption, language):
                raise DataError(f"{path}: line {number} has {len(row)} cells, the header {len(columns)}")
            if language >= 0 and row[language].strip().lower() not in ("english", "en"):
                other += 1
            elif not (row[0].strip() and row[1].strip().isdecimal() and row[2].strip().isdecimal()):
                blank += 1
            else:
                add("_".join(cell.strip() for cell in row[:3]), row[caption])
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _CLIP.fullmatch(line)
            if match is None:
                raise DataError(f"{path}: line {number} is not of the form VIDEO_START_END caption")
            add(match[1], match[2] or "")
    if other:
        source.notes.append(f"{other} descriptions left out: they are not in English")
    if blank:
        source.notes.append(f"{blank} rows left out: they name no clip")
    source.entries = list(entries.values())
    return source


def _list(text: str, path: Path) -> Source:
    """Names of pictures, one a line, as ``Flickr_8k.trainImages.txt``."""
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    return Source(path, "list", "list of names", listed=names)


# Tables: CSV, TSV, JSON records.

_PATHS = (
    *("file_name", "filename", "file", "path", "filepath", "file_path", "image_path", "image_file"),
    *("image_name", "image_filename", "img_path", "img_name", "image", "img", "picture", "photo", "name"),
    *("video_path", "video_file", "video_name", "video", "clip", "video_id", "image_id"),
)
_CAPTION = re.compile(
    r"(captions?|texts?|sentences?|descriptions?|comments?|alt|alt_text|label_text|raw)_?(\d+)?"
)
_SPLIT_COLUMNS = ("split", "subset", "partition")
_STARTS, _ENDS = ("start", "start_time", "start_seconds"), ("end", "end_time", "end_seconds")

_RECORDS = "JSON records"

Row = tuple[int, Sequence[Any]]
"""A line's number and its cells."""


def _normal(column: str) -> str:
    return re.sub(r"[\s\-]+", "_", column.strip().strip("\ufeff\"'").lower())


def _delimited(text: str, path: Path) -> Source:
    """CSV, TSV and the like, with or without a line of column names."""
    head = text.lstrip("\r\n \ufeff").split("\n", 1)[0].rstrip("\r")
    found: dict[str, list[str]] = {}
    for delimiter in ("\t", ",", ";", "|"):
        try:
            found[delimiter] = [_normal(c) for c in next(csv.reader([head], delimiter=delimiter), [])]
        except csv.Error:
            continue
    for delimiter, columns in found.items():
        if any(c in _PATHS for c in columns) and any(_CAPTION.fullmatch(c) for c in columns):
            rows = _csv(text, delimiter, path)
            next(rows)
            return _table(columns, rows, path, _TITLES[delimiter])
    for delimiter, columns in found.items():
        if len(columns) > 1 and _suffix(columns[0]) in PHOTO_SUFFIXES | VIDEO_SUFFIXES:
            columns = ["path", *(f"caption{i}" for i in range(1, len(columns)))]
            return _table(columns, _csv(text, delimiter, path), path, _TITLES[delimiter])
    columns = max(found.values(), key=len, default=[])  # none: a line end of its own within the line
    if len(columns) < 2:
        raise DataError(
            f"{path}: no format that can be read: the first line is {head[:60]!r}; a table needs columns "
            "such as path and caption with commas or tabs between them"
        )
    _find_columns(columns, path)
    raise DataError(f"{path}: no table that can be read")  # pragma: no cover


_TITLES = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons", "|": "CSV with bars"}


def _csv(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line numbers and cells of the rows that are not blank."""
    plain = False
    if delimiter in "\t|":  # mostly written without quoting, so that a quotation mark is just that
        marks = all(line.count('"') % 2 == 0 for line in text.split("\n"))
        plain = (
            not marks
            or re.search(rf'{re.escape(delimiter)}"[^"\n]*"[^"\r\n{re.escape(delimiter)}]', text) is not None
        )
    reader = csv.reader(
        io.StringIO(text.lstrip("\r\n"), newline=""),
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
        skipinitialspace=True,
    )
    line = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f'{path}: line {line}: {error}; is a quotation mark not doubled ("") or not closed?'
        ) from None


def _records(data: Any, path: Path) -> tuple[list[str], list[Row]]:
    """Turn JSON objects into columns and rows."""
    if isinstance(data, dict):
        values = list(data.values())
        if (
            values
            and all(isinstance(v, (str, list)) for v in values)
            and not any(_CAPTION.fullmatch(_normal(key)) for key in data)
        ):
            data = [{"path": key, "captions": value} for key, value in data.items()]
        else:
            data = [data]
    columns: dict[str, int] = {}
    for number, record in enumerate(data, 1):
        if not isinstance(record, dict):
            raise DataError(f"{path}: entry {number} is not an object with a path and captions")
        for key in record:
            columns.setdefault(_normal(key), len(columns))
    rows: list[Row] = []
    for number, record in enumerate(data, 1):
        cells: list[Any] = [None] * len(columns)
        for key, value in record.items():
            cells[columns[_normal(key)]] = value
        rows.append((number, cells))
    if not rows:
        raise DataError(f"{path}: the list is empty")
    return list(columns), rows


@dataclass(frozen=True)
class _Columns:
    path: int
    captions: list[int]
    split: int | None
    start: int | None
    end: int | None


def _find_columns(columns: Sequence[str], path: Path) -> _Columns:
    def first(names: Iterable[str]) -> int | None:
        return next((columns.index(n) for n in names if n in columns), None)

    there = ", ".join(c or "''" for c in columns)
    captions = [i for i, c in enumerate(columns) if _CAPTION.fullmatch(c)]
    if not captions:
        raise DataError(
            f"{path}: no column of captions among {there}; name it caption (several: caption1, caption2, …)"
        )
    picture = first(_PATHS)
    if picture is None:
        raise DataError(f"{path}: no column of pictures among {there}; name it path")
    plain = [i for i in captions if columns[i] != "raw"]  # beside others, raw is something else
    return _Columns(picture, plain or captions, first(_SPLIT_COLUMNS), first(_STARTS), first(_ENDS))


def _table(columns: Sequence[str], rows: Iterable[Row], path: Path, title: str) -> Source:
    """Rows of a path and one or more captions; rows of the same path are one picture."""
    found = _find_columns(columns, path)
    last = found.captions == [len(columns) - 1]
    entries: dict[tuple[Any, ...], Entry] = {}
    joined = nameless = 0
    unsplit: int | None = None
    unit = "entry" if title == _RECORDS else "line"
    for line, cells in rows:
        where = f"{path}: {unit} {line}"
        if len(cells) > len(columns):
            if not last:
                raise DataError(
                    f"{where} has {len(cells)} cells, but there are {len(columns)} columns: put quotation "
                    "marks around captions that contain the separator"
                )
            glue = ", " if title == "CSV" else " "
            cells = [*cells[: found.captions[0]], glue.join(c.strip() for c in cells[found.captions[0] :])]
            joined += 1
        cells = [*cells, *[None] * (len(columns) - len(cells))]
        name = _name(cells[found.path])
        if not name:
            nameless += 1
            continue
        captions = [text for i in found.captions for text in _captions(cells[i])]
        if len(found.captions) > 1:  # pictures may have fewer captions than there are columns
            captions = [c for c in captions if c.strip()] or captions[:1]
        elif (
            title == "CSV with bars" and not captions[0] and re.match(r"\s*\d+\s{2,}\S", str(cells[1] or ""))
        ):
            captions = [re.sub(r"^\s*\d+\s+", "", str(cells[1]))]  # a slip in Flickr30k's own results.csv
        split = None
        if found.split is not None:
            value = cells[found.split]
            if value is None or not str(value).strip():
                unsplit = unsplit or line
            else:
                split = split_named(value, where)
        start = _seconds(cells[found.start]) if found.start is not None else None
        end = _seconds(cells[found.end]) if found.end is not None else None
        key = (name, split, start, end)
        entry = entries.setdefault(key, Entry((name,), [], split, start=start, end=end))
        entry.captions += captions
    source = Source(path, "table", title, list(entries.values()))
    if unsplit is not None and any(e.split for e in source.entries):
        raise DataError(f"{path}: {unit} {unsplit} has no split, while others have one")
    if joined:
        source.notes.append(f"{joined} captions with separators outside quotation marks were put together")
    if nameless:
        source.notes.append(f"{nameless} rows left out: they name no picture")
    if source.entries and all(_suffix(e.names[0]) in VIDEO_SUFFIXES for e in source.entries):
        source.media = "video"
    return source


def _name(cell: Any) -> str:
    if isinstance(cell, dict):  # as Hugging Face's datasets write pictures
        cell = cell.get("path") or cell.get("file_name")
    return "" if cell is None or isinstance(cell, (list, bool)) else str(cell).strip().replace("\\", "/")


def _captions(cell: Any) -> list[str]:
    """Return the captions of a cell: one, or a list in JSON's or Python's way of writing."""
    if isinstance(cell, str) and cell.lstrip()[:2] in ("['", '["'):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(cell.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list):
                cell = value
                break
    if isinstance(cell, list):
        return [text for part in cell for text in _captions(part)] or [""]
    if isinstance(cell, dict):
        return _captions(next((cell[k] for k in ("raw", "caption", "text", "sentence") if k in cell), None))
    return ["" if cell is None else str(cell)]


# A folder.

_NO_CAPTIONS = re.compile(
    r"(read_?me|licen[cs]e|copying|notes?|classes|requirements|credits).*", re.IGNORECASE
)


def _sidecars(folder: Path) -> Source:
    """Pictures with a ``.txt`` file of the same name beside each, a caption a line; sub-folders too.

    Folders at the top that are called train, val, test (or the like) state the splits.
    """
    source = Source(folder, "sidecars", "folder with .txt files", roots=[folder])
    texts: dict[str, str] = {}
    pictures: dict[str, list[str]] = {}
    for here, files in walk(folder):
        for file in files:
            name = (here / file).relative_to(folder).as_posix()
            stem, suffix = os.path.splitext(name)
            if file.startswith("."):
                continue
            if suffix.lower() == ".txt":
                texts[stem] = name
            elif suffix.lower() in PHOTO_SUFFIXES | VIDEO_SUFFIXES:
                pictures.setdefault(stem, []).append(name)
    strays = [name for stem, name in texts.items() if stem not in pictures]
    strays = [name for name in strays if _NO_CAPTIONS.fullmatch(Path(name).stem)]
    for stem in [os.path.splitext(name)[0] for name in strays]:
        del texts[stem]
    if not texts.keys() & pictures.keys():
        tables = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _TABLES)
        hint = f"; is it {tables[0]} in it?" if tables else ""
        raise DataError(f"{folder}: no picture in this folder has a .txt file with its name{hint}")
    splits = {
        stem: _SPLIT_NAMES.get(stem.split("/")[0].lower()) for stem in {**pictures, **texts} if "/" in stem
    }
    stated = all(splits.get(stem) for stem in {**pictures, **texts})
    for stem in sorted({**pictures, **texts}):
        captions = _text(folder / texts[stem]).splitlines() if stem in texts else []
        captions = [line for line in captions if line.strip()] or captions[:1]
        for name in pictures.get(stem, [stem]):
            source.entries.append(Entry((name,), list(captions), splits[stem] if stated else None))
    if strays:
        source.notes.append(f"no captions, by their names: {', '.join(strays[:3])}")
    if all(_suffix(e.names[0]) in VIDEO_SUFFIXES for e in source.entries):
        source.media = "video"
    return source


_TABLES = frozenset(".csv .tsv .json .jsonl".split())


# Helpers.


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _seconds(value: Any) -> float | None:
    """Return seconds, also of ``1:02:03.5``; None for what is no time."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str) and ":" in value:
        parts = value.split(":")
        try:
            return sum(float(part) * 60**power for power, part in enumerate(reversed(parts)))
        except (ValueError, OverflowError):
            return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
