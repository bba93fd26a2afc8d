"""Fetch COCO: resumable, checked, unpacked; or say what to fetch by hand."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from captioner_training.data import DataError

OFFICIAL = "http://images.cocodataset.org"
"""COCO's own server; it has no certificate of its own name, so plain HTTP, and checksums matter."""


class DownloadError(DataError):
    """A download that failed; the message says what to do, by hand if need be."""


@dataclass(frozen=True)
class Archive:
    """One file to fetch.

    Attributes:
        path: on the server.
        size: in bytes, as the server says.
        md5: COCO publishes no checksums; this is what several independent projects check against. None where
            they do not agree. The checksums of its members, which every zip file carries, are checked anyway.
        wanted: what is unpacked: names that begin so.
    """

    path: str
    size: int
    md5: str | None
    wanted: str = ""

    @property
    def name(self) -> str:
        """Return the file's name."""
        return self.path.rsplit("/", 1)[-1]


SETS: dict[str, dict[str, Archive]] = {
    "coco2017": {
        "annotations": Archive(
            "annotations/annotations_trainval2017.zip",
            252_907_541,
            "f4bbac642086de4f52a3fdda2de5fa2c",
            "annotations/captions_",
        ),
        "val": Archive("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
        "train": Archive("zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
    },
    "coco2014": {
        "annotations": Archive(
            "annotations/annotations_trainval2014.zip",
            252_872_794,
            "0a379cfc70b0e71301e0f377548639bd",
            "annotations/captions_",
        ),
        "val": Archive("zips/val2014.zip", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3"),
        "train": Archive("zips/train2014.zip", 13_510_573_713, None),
    },
}

CHUNK = 1 << 20
ATTEMPTS = 6
"""Times in a row that a connection may fail without a byte before we give up."""


def download(
    name: str,
    output: Path,
    *,
    parts: Sequence[str] = (),
    mirror: str = OFFICIAL,
    sha256: Mapping[str, str] | None = None,
    keep_archives: bool = False,
    wait: float = 1.0,
) -> list[str]:
    """Fetch, check and unpack a set; what is already there is not fetched again.

    A download that stopped goes on where it was. Archives that somebody else put into ``output`` are used.

    Args:
        name: of `SETS`.
        output: folder; gets ``annotations/captions_*.json`` and a folder for each part's pictures.
        parts: some of ``annotations``, ``val``, ``train``; all if empty.
        mirror: another server with the same paths.
        sha256: checksums that you trust, by the archive's name.
        keep_archives: do not delete what has been unpacked.
        wait: seconds before the first new attempt; doubled each time.

    Returns:
        Lines that say what is there and how to go on.

    Raises:
        DownloadError: for unknown names, no network, a full disk, or files that are not what they should be.
    """
    if name not in SETS:
        raise DownloadError(f"{name}: no such set; there are {', '.join(SETS)}")
    archives = SETS[name]
    unknown = [part for part in parts if part not in archives]
    if unknown:
        raise DownloadError(f"{unknown[0]}: {name} has no such part; there are {', '.join(archives)}")
    chosen = {part: archives[part] for part in archives if part in (parts or archives)}
    trusted = dict(sha256 or {})
    names = [archive.name for archive in chosen.values()]
    for unused in trusted.keys() - set(names):
        raise DownloadError(f"--sha256 {unused}: that is not fetched; {', '.join(names)} are")
    for archive_name, digest in trusted.items():
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest.strip()):
            raise DownloadError(f"--sha256 {archive_name}={digest}: expected 64 hexadecimal digits")
    if not mirror.startswith(("http://", "https://")):
        raise DownloadError(f"--mirror {mirror}: expected an address that begins with http:// or https://")
    output.mkdir(parents=True, exist_ok=True)
    for archive in chosen.values():
        if _is_done(archive, output):
            continue
        file = output / archive.name
        if not file.exists():
            try:
                fetch(f"{mirror.rstrip('/')}/{archive.path}", file, size=archive.size, wait=wait)
            except _NetworkError as error:
                raise DownloadError(_by_hand(error, name, chosen, output, mirror)) from None
        verify(file, archive, trusted.get(archive.name))
        unpack(file, output, archive.wanted)
        _done_marker(archive, output).write_text(json.dumps({"archive": archive.name, "size": archive.size}))
        if not keep_archives:
            file.unlink()
    return _next(name, archives, output)


class _NetworkError(Exception):
    """No connection, or the server refuses."""


def fetch(url: str, file: Path, *, size: int | None = None, wait: float = 1.0) -> None:
    """Download ``url`` to ``file`` through ``file.part``, from where an earlier attempt stopped.

    A server that drops the connection is asked for the rest; one that gives no ranges, or whose file has
    changed meanwhile, for the whole.

    Args:
        url: of the file.
        file: where it goes once it is whole.
        size: bytes it must have, if known.
        wait: seconds before the second attempt in a row; doubled each time.

    Raises:
        _NetworkError: if there is no connection or the server refuses.
        DownloadError: if the file has another size, or the disk is full.
    """
    part, state = file.with_name(file.name + ".part"), file.with_name(file.name + ".part.json")
    failures = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have and size is not None and have >= size:
            break
        request = urllib.request.Request(url, headers={"User-Agent": "captioner"})
        if have:
            request.add_header("Range", f"bytes={have}-")
            if version := _read_state(state).get("version"):
                request.add_header("If-Range", version)
        try:
            total = _receive(request, part, state, have, size)
            now = part.stat().st_size
            if total is None or now >= total:
                break
            reason: object = f"the connection ended after {now:,} of {total:,} bytes"
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code == 416:  # the file is shorter than what we have, so it is another one
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise _NetworkError(f"{url}: {reason}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
        now = part.stat().st_size if part.exists() else 0
        failures = 0 if now > have else failures + 1
        if failures >= (ATTEMPTS if now else ATTEMPTS // 2):
            raise _NetworkError(f"{url}: {reason}") from None
        time.sleep(wait * 2**failures if failures else 0)
    found = part.stat().st_size
    state.unlink(missing_ok=True)
    if size is not None and found != size:
        part.unlink()
        raise DownloadError(_wrong_size(url, found, size))
    part.replace(file)


def _wrong_size(where: object, found: int, size: int) -> str:
    return f"{where}: {found:,} bytes instead of {size:,}: not the file that it should be"


def _receive(
    request: urllib.request.Request, part: Path, state: Path, have: int, size: int | None
) -> int | None:
    """Append what the server sends to ``part``; return how long the whole is, if it says so."""
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise DownloadError(f"{request.full_url}: the server sends another part than it was asked for")
        length = response.headers.get("Content-Length")
        have = have if resumed else 0
        total = have + int(length) if length else None
        if size is not None and total is not None and total != size:
            raise DownloadError(_wrong_size(request.full_url, total, size))
        needed, free = (total or 0) - have, shutil.disk_usage(part.parent).free
        if needed > free:
            raise DownloadError(
                f"{part.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free; make room and "
                "give the same command again"
            )
        tag = response.headers.get("ETag") or ""
        version = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
        state.write_text(json.dumps({"url": request.full_url, "version": version}))
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name.removesuffix(".part"))
        with bar, part.open("ab" if resumed else "wb") as file:
            while block := response.read1(CHUNK):
                _write(file, block)
                bar.update(len(block))
    return total


def _write(file: Any, block: bytes) -> None:
    try:
        file.write(block)
    except OSError as error:
        raise DownloadError(
            f"{file.name}: {error.strerror or error}; make room and give the same command again"
        ) from None


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def verify(file: Path, archive: Archive, sha256: str | None) -> None:
    """Check size and checksum of an archive.

    Raises:
        DownloadError: if it is not what it should be.
    """
    size = file.stat().st_size
    if size != archive.size:
        raise DownloadError(
            f"{file}: {size:,} bytes instead of {archive.size:,}: delete it and give the same command again"
        )
    checks = [("SHA-256", hashlib.sha256(), sha256), ("MD5", hashlib.md5(usedforsecurity=False), archive.md5)]
    kind, digest, expected = next((c for c in checks if c[2]), checks[1])
    if not expected:
        return
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {file.name}")
    with bar, file.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected.lower():
        raise DownloadError(
            f"{file}: its {kind} is {digest.hexdigest()}, not {expected.lower()}: delete it and "
            "give the same command again"
        )


def unpack(file: Path, folder: Path, wanted: str = "") -> None:
    """Unpack the members whose names begin with ``wanted``; each is checked against the zip's CRC.

    Raises:
        DownloadError: for a damaged archive, one that would write outside the folder, or a full disk.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = [m for m in archive.infolist() if m.filename.startswith(wanted) and not m.is_dir()]
            for member in members:
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise DownloadError(
                        f"{file}: {member.filename} would lie outside {folder}: do not use it"
                    )
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise DownloadError(f"{file}: {member.filename} is a link: do not use it")
            if not members:
                raise DownloadError(f"{file}: there is no {wanted or 'file'} in it")
            needed, free = sum(m.file_size for m in members), shutil.disk_usage(folder).free
            if needed > free:
                raise DownloadError(
                    f"{folder}: {needed / 1e9:.1f} GB are needed for {file.name}, {free / 1e9:.1f} GB free; "
                    "make room and give the same command again"
                )
            for member in tqdm(members, desc=f"unpacking {file.name}", unit="file"):
                target = folder / member.filename
                if target.exists() and target.stat().st_size == member.file_size and wanted == "":
                    continue  # of an unpacking that was interrupted; a file is whole once it has its name
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(target.name + ".part")
                with archive.open(member) as source, part.open("wb") as copy:
                    shutil.copyfileobj(source, copy, CHUNK)
                part.replace(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(f"{file}: damaged ({error}): delete it and give the same command again") from None


def _done_marker(archive: Archive, output: Path) -> Path:
    return output / f".{archive.name}.unpacked"


def _is_done(archive: Archive, output: Path) -> bool:
    folder = output / (archive.wanted.split("/")[0] if archive.wanted else Path(archive.name).stem)
    state = _read_state(_done_marker(archive, output))
    return state.get("size") == archive.size and folder.is_dir()


def _by_hand(error: Exception, name: str, archives: Mapping[str, Archive], output: Path, mirror: str) -> str:
    missing = [a for a in archives.values() if not _is_done(a, output) and not (output / a.name).exists()]
    files = ", ".join(f"{OFFICIAL}/{a.path} ({a.size / 1e9:.1f} GB)" for a in missing)
    return (
        f"{error}. Without a network here fetch by hand: {files}; put what you fetched into {output} as it "
        "is, and give the same command again, which checks and unpacks it"
    )


def _next(name: str, archives: Mapping[str, Archive], output: Path) -> list[str]:
    year = name.removeprefix("coco")
    there = [part for part in archives if _is_done(archives[part], output)]
    lines = [f"In {output}: {', '.join(there)} of {name}"]
    if len(there) == len(archives):
        captions = " ".join(
            str(output / "annotations" / f"captions_{s}{year}.json") for s in ("train", "val")
        )
        folders = " ".join(f"--images {output / f'{s}{year}'}" for s in ("train", "val"))
        target = output.with_name(output.resolve().name + "-prepared")
        lines.append(f"Next: captioner prepare {captions} {folders} --output {target}")
    return lines
