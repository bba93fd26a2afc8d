"""The caption as the picture's own alt text: IPTC's "Alt Text (Accessibility)" in its XMP metadata.

The property is ``Iptc4xmpCore:AltTextAccessibility`` of the IPTC Photo Metadata Standard 2021.1. Exiv2, by
way of python-exiv2 (GPL-3.0-or-later: an extra that nothing else needs), reads and writes the XMP, and that
alone is put into a JPEG, PNG or WebP, where the old was or where it belongs: every other byte stays. A TIFF
is written by Exiv2 as a whole and compared with the old one, tag by tag and strip by strip.

Only an alt text counts as a person's description that must not be replaced. A caption in another field
(``dc:description``, EXIF's ImageDescription, IPTC's Caption) says what the picture is about rather than what
is to be seen, and cameras fill it with their name: it is left as it is, and is no reason against an alt text
unless ``keep_described`` says so.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from captioner.batch.beside import (
    Mark,
    Plan,
    is_remote,
    one_line,
    read_marks,
    sha256,
    state,
    why_not,
    write_marks,
)

_ALT = "Xmp.iptc.AltTextAccessibility"
_DEFAULT = "x-default"

_LARGEST = 1 << 29
"""Bytes; larger pictures are not read into memory for a line of text."""

_LARGEST_XMP = 1 << 24
"""Bytes of XMP when it is unpacked."""

_CAMERAS = ("digital camera", "dcim", "sony dsc", "digital still camera", "exif_jpeg_picture", "created with")
"""What cameras and programs call every picture."""

_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_ALT_TAG = "{http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/}AltTextAccessibility"

_lock = threading.Lock()  # Exiv2's XMP toolkit serves one thread at a time


class MetadataError(ValueError):
    """Alt text that cannot be read or written; one line that names the file."""


class AltText:
    """Plans the caption as alt text in each picture; a person's alt text is never replaced.

    The modified time of a picture stays as it was, so that albums and site generators that sort by it are not
    shuffled; its size changes.

    Args:
        keep_described: leave pictures alone that have a description in another field, too.

    Raises:
        MetadataError: the library is missing.
    """

    name = "alt-text"

    def __init__(self, keep_described: bool = False) -> None:
        _library()
        self.keep_described = keep_described

    def plan(self, path: str, record: Mapping[str, Any], ours: str | None = None) -> Plan:
        """Plan the alt text of a picture.

        Args:
            path: of the picture.
            record: of it, see ``docs/records.md``.
            ours: the digest of the last plan for this file, None if there was none.
        """
        target = Path(path)

        def no(reason: str) -> Plan:
            return Plan(target, None, ours or "", f"{path}: there is no alt text: {reason}")

        text = one_line(record.get("caption") or "")
        if not text:
            return no("nothing was captioned")
        if "segments" in record:
            return no("videos have no place for it")
        reason = why_not(path, target)
        if reason is not None:
            return no(reason)
        seen = state(target)
        try:
            picture = _Picture(path, _read(path))
            theirs = picture.alt_text()
            default = theirs.get(_DEFAULT, "")
            mark = Mark(sha256(text.encode()))
            before = [m for m in read_marks(ours) if m.sha256 == sha256(default.encode())]
            if default == text:
                return Plan(target, None, str(mark))
            if theirs and not before:
                return Plan(target, None, ours or "", f"{path}: it has an alt text that is kept")
            if self.keep_described and picture.described():
                return no("it has a description")
            data = picture.with_alt_text({**theirs, _DEFAULT: text})
        except MetadataError as error:
            return no(str(error).removeprefix(f"{path}: "))
        return Plan(target, data, write_marks([mark, *before[:1]]), keep_time=True, seen=seen)


def read_alt_text(path: str | os.PathLike[str]) -> str | None:
    """Return the alt text in a picture's metadata; None if there is none.

    Raises:
        MetadataError: the library is missing, or the file cannot be read or is of another kind.
    """
    path = os.fspath(path)
    found = _Picture(path, _read(path)).alt_text()
    return found.get(_DEFAULT) or next(iter(found.values()), None)


def _read(path: str) -> bytes:
    if is_remote(path):
        raise MetadataError(f"{path}: it is on another machine")
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise MetadataError(f"{path}: {error.strerror or error}") from None
    if len(data) > _LARGEST:
        raise MetadataError(f"{path}: it is larger than {_LARGEST >> 20} MB")
    return data


def _library() -> Any:
    if importlib.util.find_spec("exiv2") is None:
        raise MetadataError('alt text needs the exiv2 library: pip install "captioner[metadata]"')
    import exiv2

    if not hasattr(_library, "ready"):
        exiv2.XmpParser.initialize()
        exiv2.LogMsg.setLevel(exiv2.LogMsg.Level.mute)
        logging.getLogger("exiv2").addHandler(logging.NullHandler())
        _library.ready = True  # type: ignore[attr-defined]
    return exiv2


class _Picture:
    """An encoded picture with its metadata.

    Raises:
        MetadataError: it cannot be read, or not be changed without harm.
    """

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.data = path, data
        self.kind = _kind(path, data)
        self._exiv2 = _library()
        self.packet = "" if self.kind == "TIFF" else _decoded(path, _CONTAINERS[self.kind](path, data).xmp())
        with _lock:
            image: Any = self._call(self._open) if self.packet or self.kind == "TIFF" else None
            if self.kind == "TIFF":
                self.packet = image.xmpPacket()
        self._image = image

    def _open(self, data: bytes | None = None) -> Any:
        """Let Exiv2 read a TIFF, or the XMP of another picture by itself."""
        if data is None:
            data = self.data if self.kind == "TIFF" else self.packet.encode()
        image = self._exiv2.ImageFactory.open(data)
        image.readMetadata()
        return image

    def _call(self, what: Any, *arguments: Any) -> Any:
        try:
            return what(*arguments)
        except MetadataError:
            raise
        except (self._exiv2.Exiv2Error, ValueError, IndexError, OverflowError, RuntimeError) as error:
            message = " ".join(str(getattr(error, "message", error)).split())
            raise MetadataError(f"{self.path}: its metadata cannot be used: {message}") from None

    def alt_text(self) -> dict[str, str]:
        """Return the alt text by language; empty if there is none."""
        with _lock:
            return self._call(self._texts, _ALT)

    def _texts(self, key: str) -> dict[str, str]:
        found = self._xmp()
        if key not in found:
            return {}
        value = found[key].value()
        texts = dict(value.items()) if hasattr(value, "items") else {_DEFAULT: value.toString()}
        return {language: text for language, text in texts.items() if text.strip()}

    def _xmp(self) -> Any:
        return self._exiv2.XmpData() if self._image is None else self._image.xmpData()

    def described(self) -> bool:
        """Tell whether a description stands in one of the other fields that people fill."""

        def look() -> list[str]:
            texts = list(self._texts("Xmp.dc.description").values())
            image = self._open(self.data)
            for data, key in (
                (image.exifData(), "Exif.Image.ImageDescription"),
                (image.iptcData(), "Iptc.Application2.Caption"),
            ):
                if key in data:
                    texts.append(data[key].toString())
            return texts

        with _lock:
            texts = [text.strip("\0 \r\n\t").lower() for text in self._call(look)]
        return any(text and not any(name in text for name in _CAMERAS) for text in texts)

    def with_alt_text(self, texts: Mapping[str, str]) -> bytes:
        """Return the picture with another alt text, by language, and nothing else changed."""
        with _lock:
            data, packet = self._call(self._tiff if self.kind == "TIFF" else self._spliced, texts)
        if _meaning(self.path, self.packet) != _meaning(self.path, packet):
            raise MetadataError(f"{self.path}: its XMP holds something that would be lost")
        if self.kind == "TIFF" and _parts(self.path, data) != _parts(self.path, self.data):
            raise MetadataError(f"{self.path}: this TIFF cannot be changed without harm")
        return data

    def _changed(self, texts: Mapping[str, str]) -> Any:
        value = self._exiv2.LangAltValue()
        for language in sorted(texts, key=lambda language: language != _DEFAULT):
            value[language] = texts[language]
        found = self._xmp()
        found[_ALT] = value
        return found

    def _spliced(self, texts: Mapping[str, str]) -> tuple[bytes, str]:
        parser = self._exiv2.XmpParser
        code, body = parser.encode(
            self._changed(texts),
            parser.XmpFormatFlags.useCompactFormat | parser.XmpFormatFlags.omitPacketWrapper,
        )
        if code:
            raise MetadataError(f"{self.path}: its XMP cannot be written")
        packet = f"{_BEGIN}\n{body.strip()}\n{_END}"
        return _CONTAINERS[self.kind](self.path, self.data).with_xmp(packet.encode()), packet

    def _tiff(self, texts: Mapping[str, str]) -> tuple[bytes, str]:
        image = self._image
        self._changed(texts)
        image.writeMetadata()
        written = image.io()
        written.open()
        try:
            data = bytes(written.mmap())
        finally:
            written.munmap()
            written.close()
        return data, self._open(data).xmpPacket()


_BEGIN = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
_END = '<?xpacket end="w"?>'


def _decoded(path: str, packet: bytes | None) -> str:
    """Return XMP as Exiv2 takes it by itself."""
    try:
        text = (packet or b"").decode("utf-8-sig").strip("\0 \r\n\t")
    except UnicodeDecodeError:
        raise MetadataError(f"{path}: its XMP is not in UTF-8") from None
    if text and not text.startswith(("<?xpacket", "<x:xmpmeta")):
        text = f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{text}</x:xmpmeta>'
    return text


def _kind(path: str, data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    # raw pictures of cameras are TIFFs, too
    if data[:4] in (b"II*\0", b"MM\0*") and path.lower().endswith((".tif", ".tiff")):
        return "TIFF"
    raise MetadataError(f"{path}: only JPEG, PNG, WebP and TIFF can be given one without harm")


# --- what XMP says --------------------------------------------------------------------------------------


def _meaning(path: str, packet: str) -> dict[str, Any]:
    """Return the properties of an XMP packet but the alt text, however they are written."""
    from xml.etree import ElementTree

    if not packet.strip("\0 \r\n\t"):
        return {}
    if "<!DOCTYPE" in packet or "<!ENTITY" in packet:
        raise MetadataError(f"{path}: its XMP is not what XMP may be")
    begin, end = packet.find("<"), packet.rfind(">")
    try:
        root = ElementTree.fromstring(packet[begin : end + 1].encode())
    except (ElementTree.ParseError, ValueError) as error:
        raise MetadataError(f"{path}: its XMP is damaged: {error}") from None
    found: dict[str, Any] = {}
    for part in root.iter(f"{_RDF}Description"):
        if any(part in parent for parent in root.iter(f"{_RDF}RDF")):
            found.update(_fields(part))
    found.pop(_ALT_TAG, None)
    return found


def _fields(element: Any) -> dict[str, Any]:
    """Return the fields of a structure: those written as attributes, and those written as elements."""
    fields: dict[str, Any] = {
        name: value for name, value in element.attrib.items() if not name.startswith(_RDF) and "}" in name
    }
    for child in element:
        fields[child.tag] = _value(child)
    return fields


def _value(element: Any) -> Any:
    attributes = dict(element.attrib)
    language = attributes.pop("{http://www.w3.org/XML/1998/namespace}lang", None)
    attributes.pop(f"{_RDF}parseType", None)
    body: Any
    children = list(element)
    if len(children) == 1 and children[0].tag in (f"{_RDF}Bag", f"{_RDF}Seq", f"{_RDF}Alt"):
        body = [children[0].tag, *map(_value, children[0])]
    elif len(children) == 1 and children[0].tag == f"{_RDF}Description":
        body = {**attributes, **_fields(children[0])}
    elif children or attributes:
        body = {**attributes, **{child.tag: _value(child) for child in children}}
    else:
        body = element.text or ""
    return body if language is None else (language, body)


# --- where XMP stands in a file -------------------------------------------------------------------------

_SIGNED = "it carries Content Credentials, which a change would break"


class _Container:
    """A file cut into pieces ``(kind, bytes)``, which are the whole file when they are joined.

    Raises:
        MetadataError: it is damaged, or must not be changed.
    """

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        try:
            self.pieces: list[tuple[Any, bytes]] = list(self._cut(data))
        except (struct.error, IndexError):
            raise MetadataError(f"{path}: it is damaged") from None
        places = [i for i, (kind, piece) in enumerate(self.pieces) if self._content(kind, piece) is not None]
        if len(places) > 1:
            raise MetadataError(f"{path}: it has XMP twice")
        self.place = places[0] if places else None

    def xmp(self) -> bytes | None:
        """Return the XMP, if there is any."""
        return None if self.place is None else self._content(*self.pieces[self.place])

    def with_xmp(self, packet: bytes) -> bytes:
        """Return the file with other XMP, in the place of the old or where it belongs."""
        if self._signed():
            raise MetadataError(f"{self.path}: {_SIGNED}")
        piece = self._piece(packet)
        if self.place is None:
            place = self._otherwise()
            self.pieces = [*self.pieces[:place], piece, *self.pieces[place:]]
        else:
            self.pieces[self.place] = piece
        return b"".join(piece for _, piece in self.pieces)

    def _cut(self, data: bytes) -> Iterator[tuple[Any, bytes]]:
        raise NotImplementedError

    def _content(self, kind: Any, piece: bytes) -> bytes | None:
        """Return the XMP in a piece; None if it holds something else."""
        raise NotImplementedError

    def _piece(self, packet: bytes) -> tuple[Any, bytes]:
        """Return the piece that holds XMP."""
        raise NotImplementedError

    def _otherwise(self) -> int:
        """Return before which piece XMP belongs."""
        raise NotImplementedError

    def _signed(self) -> bool:
        """Tell whether Content Credentials seal the file."""
        raise NotImplementedError

    def _damaged(self) -> MetadataError:
        return MetadataError(f"{self.path}: it is damaged")


class _Jpeg(_Container):
    """Segments by marker; the last, from the first scan on, has marker 0."""

    head = b"http://ns.adobe.com/xap/1.0/\0"

    def _cut(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        yield 0xD8, data[:2]
        place = 2
        while True:
            if data[place] != 0xFF:
                raise self._damaged()
            marker, length = data[place + 1], 1
            if marker == 0xDA:
                yield 0, data[place:]
                return
            if marker != 0xFF:  # that is filling before a marker
                length = 2 + int(struct.unpack_from(">H", data, place + 2)[0])
            yield marker, data[place : place + length]
            place += length

    def _content(self, kind: int, piece: bytes) -> bytes | None:
        if kind == 0xE1 and piece[4:].startswith(self.head):
            return piece[4 + len(self.head) :]
        return None

    def _piece(self, packet: bytes) -> tuple[int, bytes]:
        length = 2 + len(self.head) + len(packet)
        if length > 0xFFFF:
            raise MetadataError(f"{self.path}: its XMP has no room for it")
        return 0xE1, b"\xff\xe1" + struct.pack(">H", length) + self.head + packet

    def _otherwise(self) -> int:
        place = 1
        while self.pieces[place][0] in (0xE0, 0xFF) or (
            self.pieces[place][0] == 0xE1 and self.pieces[place][1][4:10] == b"Exif\0\0"
        ):
            place += 1
        return place

    def _signed(self) -> bool:
        return any(kind == 0xEB and b"c2pa" in piece for kind, piece in self.pieces)

    def with_xmp(self, packet: bytes) -> bytes:
        """Do as others; the further pictures of a file are found by their distance from a segment."""
        before = self._distances()
        data = super().with_xmp(packet)
        if self._distances() != before:
            raise MetadataError(f"{self.path}: the further pictures in it would be lost")
        return data

    def _distances(self) -> list[int]:
        """Return how far from the end those segments are that point at what follows the picture."""
        after, found = 0, []
        for kind, piece in reversed(self.pieces):
            after += len(piece)
            if kind == 0xE2 and piece[4:8] == b"MPF\0":
                found.append(after)
        return found


class _Png(_Container):
    """Chunks by type; what precedes and follows them has types of its own."""

    head = b"XML:com.adobe.xmp\0"

    def _cut(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        yield b"head", data[:8]
        place, kind = 8, b""
        while kind != b"IEND":
            length, kind = struct.unpack_from(">I4s", data, place)
            if place + 12 + length > len(data):
                raise self._damaged()
            yield kind, data[place : place + 12 + length]
            place += 12 + length
        yield b"tail", data[place:]

    def _content(self, kind: bytes, piece: bytes) -> bytes | None:
        if kind != b"iTXt" or not piece[8:].startswith(self.head):
            return None
        compressed, rest = piece[8 + len(self.head)], piece[10 + len(self.head) : -4]
        text = rest.split(b"\0", 2)[-1]  # after the language and a translated keyword
        if not compressed:
            return text
        try:
            return zlib.decompressobj().decompress(text, _LARGEST_XMP)
        except zlib.error:
            raise self._damaged() from None

    def _piece(self, packet: bytes) -> tuple[bytes, bytes]:
        body = b"iTXt" + self.head + b"\0\0\0\0" + packet
        return b"iTXt", struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    def _otherwise(self) -> int:
        for place, (kind, _) in enumerate(self.pieces):
            if kind == b"IDAT":
                return place
        raise self._damaged()

    def _signed(self) -> bool:
        return any(kind == b"caBX" for kind, _ in self.pieces)


class _WebP(_Container):
    """Chunks by type, with their padding; what precedes and follows them has types of its own."""

    def _cut(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        yield b"head", data[:12]
        end, place = 8 + int(struct.unpack_from("<I", data, 4)[0]), 12
        while place < end:
            kind, length = struct.unpack_from("<4sI", data, place)
            length += 8 + (length & 1)
            if place + length > len(data):
                raise self._damaged()
            yield kind, data[place : place + length]
            place += length
        yield b"tail", data[place:]

    def _content(self, kind: bytes, piece: bytes) -> bytes | None:
        return piece[8 : 8 + struct.unpack_from("<I", piece, 4)[0]] if kind == b"XMP " else None

    def _piece(self, packet: bytes) -> tuple[bytes, bytes]:
        return b"XMP ", b"XMP " + struct.pack("<I", len(packet)) + packet + b"\0" * (len(packet) & 1)

    def _otherwise(self) -> int:
        return len(self.pieces) - 1

    def _signed(self) -> bool:
        return any(kind == b"C2PA" for kind, _ in self.pieces)

    def with_xmp(self, packet: bytes) -> bytes:
        """Do as others, and say in the header that there is XMP; a plain file gets that header."""
        from PIL import Image

        if self.pieces[1][0] == b"VP8X":
            head = bytearray(self.pieces[1][1])
        else:
            try:
                with Image.open(io.BytesIO(b"".join(p for _, p in self.pieces)), formats=["WEBP"]) as image:
                    (width, height), alpha = image.size, image.mode == "RGBA"
            except Exception:  # Pillow raises nearly anything on damaged files
                raise self._damaged() from None
            sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
            head = bytearray(b"VP8X" + struct.pack("<II", 10, 16 * alpha) + sizes)
            self.pieces.insert(1, (b"VP8X", b""))
            self.place = None if self.place is None else self.place + 1
        head[8] |= 4
        self.pieces[1] = (b"VP8X", bytes(head))
        data = super().with_xmp(packet)
        length = len(data) - len(self.pieces[-1][1]) - 8
        return data[:4] + struct.pack("<I", length) + data[8:]


_CONTAINERS: dict[str, type[_Container]] = {"JPEG": _Jpeg, "PNG": _Png, "WebP": _WebP}

_PLACES = {273, 324, 700, 34665, 34853}
"""Tags of a TIFF that tell where something is, and XMP."""


def _parts(path: str, data: bytes) -> list[Any]:
    """Return all that a TIFF holds but its XMP, wherever it stands in the file.

    Raises:
        MetadataError: it cannot be read, or has parts that cannot be compared.
    """
    from PIL import Image

    pages: list[Any] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture: Any = Image.open(io.BytesIO(data), formats=["TIFF"])
            for page in range(picture.n_frames):
                picture.seek(page)
                tags = picture.tag_v2
                if 330 in tags or 0xCD41 in tags:
                    raise MetadataError(
                        f"{path}: it has pictures within pictures" if 330 in tags else f"{path}: {_SIGNED}"
                    )
                starts = tags.get(273) or tags.get(324) or ()
                lengths = tags.get(279) or tags.get(325) or ()
                if not starts or len(starts) != len(lengths):
                    raise MetadataError(f"{path}: it is damaged")
                exif = picture.getexif()
                pages.append(
                    (
                        {tag: value for tag, value in tags.items() if tag not in _PLACES},
                        [sha256(data[a : a + n]) for a, n in zip(starts, lengths, strict=True)],
                        [dict(exif.get_ifd(tag)) for tag in (34665, 34853) if tag in tags],
                    )
                )
    except MetadataError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise MetadataError(f"{path}: it cannot be read: {' '.join(str(error).split())}") from None
    return pages
