"""Hostile files: a folder of several hundred, made here, goes through the captioner, and nothing may break.

The corpus is mutated from good files of every format that is read (cut off at many places, bits turned,
header fields at their extremes, chunks swapped, wrong suffixes). It holds the classic bombs, crafted headers,
names that break what prints them, links that loop, devices and pipes. The same seed makes the same files.

Every command of `COMMANDS` runs over it in a process of its own, and every file then alone, against a clock.
Bars: no crash; no file takes longer than 10 s; the most memory is at most 3 GiB above that of as many good
files; every file is named exactly once in outputs that parse; standard error holds lines of ours only. What
writes beside files or into them works on a corpus of its own: there every file must have the bytes that it
had, or at least the pixels, and what stands beside it must be its caption.

A clip takes time by the pictures in it that differ, as a folder of so many photos would, whatever its length
is said to be, and a progress bar tells how far it is. The bar holds for the 50 that a clip has here at most.

``--fuzz N`` runs the tests of tests/hostile with N inputs for each reader instead.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import random
import selectors
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

SLOWEST = 10.0
"""Seconds that no file may take."""
_PATIENCE = 60.0
"""Seconds after which a process is ended."""
EXTRA_MEMORY = 3 * 2**30
"""Bytes above a run over good files: the largest picture allowed takes one GiB decoded, and is converted."""


# Good files.


@cache
def _photo() -> Image.Image:
    return common.photos()["cheetah1"]


def _pixels(width: int, height: int, number: int = 0) -> Image.Image:
    """A part of a photo with a bright square in it, elsewhere for every number."""
    image = _photo().resize((width, height))
    side = max(1, min(width, height) // 4)
    left = number * side // 2 % max(1, width - side)
    image.paste((255, 40 * number % 256, 0), (left, 0, left + side, side))
    return image


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _clip(
    name: str, codec: str, size: tuple[int, int] = (96, 64), times: Sequence[float] = (), **options: Any
) -> bytes:
    """A clip through PyAV: of 12 frames, 10 a second, or of one at each of these seconds."""
    from fractions import Fraction

    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with av.open(str(path), "w", options=options) as container:
            stream: Any = container.add_stream(codec, rate=25 if codec == "mpeg1video" else 10)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.thread_count = 1  # the same bytes on every machine
            if times:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number in range(len(times) or 12):
                frame = av.VideoFrame.from_image(_pixels(*size, number))
                if times:
                    frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
                for packet in stream.encode(frame):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        return path.read_bytes()


@cache
def good_files() -> dict[str, bytes]:
    """Return a small good file of every format, by a name with the right suffix.

    What this machine cannot write is left out: HEIC without pillow-heif, and codecs that PyAV lacks.
    """
    rgb = _pixels(96, 64)
    frames = [_pixels(96, 64, number) for number in range(6)]
    rest: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 120}
    rgba = rgb.convert("RGBA")
    rgba.putalpha(rgb.convert("L"))
    made: dict[str, Callable[[], bytes]] = {
        "plain.jpg": lambda: _saved(rgb, "JPEG"),
        "progressive.jpg": lambda: _saved(rgb, "JPEG", progressive=True),
        "cmyk.jpg": lambda: _saved(rgb.convert("CMYK"), "JPEG"),
        "exif.jpg": lambda: _saved(rgb, "JPEG", exif=_exif()),
        "plain.png": lambda: _saved(rgb, "PNG"),
        "palette.png": lambda: _saved(rgb.convert("P"), "PNG", transparency=3),
        "deep.png": lambda: _saved(
            Image.fromarray(np.arange(96 * 64, dtype=np.uint16).reshape(64, 96)), "PNG"
        ),
        "moving.png": lambda: _saved(frames[0], "PNG", **rest),
        "plain.gif": lambda: _saved(rgb, "GIF"),
        "moving.gif": lambda: _saved(frames[0], "GIF", **rest),
        "plain.webp": lambda: _saved(rgb, "WEBP"),
        "lossless.webp": lambda: _saved(rgba, "WEBP", lossless=True),
        "moving.webp": lambda: _saved(frames[0], "WEBP", **rest),
        "plain.bmp": lambda: _saved(rgb, "BMP"),
        "palette.bmp": lambda: _saved(rgb.convert("P"), "BMP"),
        "plain.tif": lambda: _saved(rgb, "TIFF"),
        "lzw.tif": lambda: _saved(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tif": lambda: _saved(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": lambda: _saved(rgb, "TIFF", compression="jpeg"),
        "fax.tif": lambda: _saved(rgb.convert("1"), "TIFF", compression="group4"),
        "float.tif": lambda: _saved(rgb.convert("F"), "TIFF"),
        "pages.tif": lambda: _saved(frames[0], "TIFF", save_all=True, append_images=frames[1:3]),
        "big.tif": lambda: _saved(rgb, "TIFF", big_tiff=True),
        "plain.jp2": lambda: _saved(rgb, "JPEG2000"),
        "bare.j2k": lambda: _saved(rgb, "JPEG2000", no_jp2=True),
        "plain.ppm": lambda: _saved(rgb, "PPM"),
        "plain.pgm": lambda: _saved(rgb.convert("L"), "PPM"),
        "plain.pbm": lambda: _saved(rgb.convert("1"), "PPM"),
        "text.pgm": lambda: b"P2\n4 3\n255\n" + b" ".join(b"%d" % (20 * n) for n in range(12)) + b"\n",
        "plain.avif": lambda: _saved(rgb, "AVIF"),
        "moving.avif": lambda: _saved(frames[0], "AVIF", **rest),
        "plain.mpo": lambda: _saved(frames[0], "MPO", save_all=True, append_images=frames[1:2]),
        "plain.heic": _heic,
        "h264.mp4": lambda: _clip("a.mp4", "libx264"),
        "parts.mp4": lambda: _clip("a.mp4", "libx264", movflags="frag_keyframe+empty_moov"),
        "mpeg4.mp4": lambda: _clip("a.mp4", "mpeg4"),
        "h264.mov": lambda: _clip("a.mov", "libx264"),
        "mpeg4.mkv": lambda: _clip("a.mkv", "mpeg4"),
        "vp9.webm": lambda: _clip("a.webm", "libvpx-vp9"),
        "vp8.webm": lambda: _clip("a.webm", "libvpx"),
        "mjpeg.avi": lambda: _clip("a.avi", "mjpeg"),
        "mpeg4.avi": lambda: _clip("a.avi", "mpeg4"),
        "mpeg1.mpg": lambda: _clip("a.mpg", "mpeg1video"),
        "stream.m2ts": lambda: _clip("a.ts", "mpeg2video"),
        "flash.flv": lambda: _clip("a.flv", "flv"),
    }
    found = {}
    for name, make in made.items():
        try:
            found[name] = make()
        except Exception as error:  # a codec that is not there
            print(f"  left out: {name} cannot be written here ({error})", file=sys.stderr)
    return found


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    return exif


def _heic() -> bytes:
    import pillow_heif

    stream = io.BytesIO()
    pillow_heif.from_pillow(_pixels(96, 64)).save(stream)
    return stream.getvalue()


# Mutations.

_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Return what one random kind of damage makes of ``data``."""
    if not data:
        return b"\0"
    changed = bytearray(data)
    kind = chance.randrange(8)
    if kind == 0:
        return data[: chance.randrange(len(data))]
    if kind == 1:  # bits anywhere
        for _ in range(chance.choice((1, 4, 32))):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 2:  # bits in the header
        for _ in range(chance.choice((1, 2, 4))):
            changed[chance.randrange(min(len(data), 200))] ^= 1 << chance.randrange(8)
    elif kind == 3:  # a field at its extreme
        width = chance.choice((1, 2, 4, 8))
        at = chance.randrange(min(len(data), 512))
        value = chance.choice(_EXTREMES) & ((1 << 8 * width) - 1)
        changed[at : at + width] = value.to_bytes(width, chance.choice(("big", "little")))
    elif kind == 4:  # two parts change places
        size = chance.choice((4, 16, 64, 256))
        a, b = chance.randrange(len(data)), chance.randrange(len(data))
        changed[a : a + size], changed[b : b + size] = data[b : b + size], data[a : a + size]
    elif kind == 5:  # a part comes again
        a, b = sorted((chance.randrange(len(data)), chance.randrange(len(data))))
        changed[b:b] = data[a:b] * chance.choice((1, 3, 20))
        del changed[1_000_000:]
    elif kind == 6:  # a part is missing
        a = chance.randrange(len(data))
        del changed[a : a + chance.choice((1, 2, 7, 64, 512))]
    else:  # a part is noise, or nothing
        a = chance.randrange(len(data))
        size = chance.choice((4, 32, 400))
        noise = chance.randbytes(size) if chance.random() < 0.5 else bytes(size)
        changed[a : a + size] = noise[: len(changed[a : a + size])]
    return bytes(changed)


def _mutants(chance: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents: of every good file so many cut off, and so many damaged otherwise."""
    files = good_files()
    names = sorted(files)
    for name in names:
        data = files[name]
        stem, suffix = os.path.splitext(name)
        for number in range(each):
            keep = (4, 12, 40, len(data) // 3, len(data) // 2, len(data) - 20, len(data) - 1)
            at = keep[number] if number < len(keep) else chance.randrange(len(data))
            yield f"{stem}-cut-{number}{suffix}", data[: max(1, at)]
        for number in range(each):
            yield f"{stem}-damaged-{number}{suffix}", mutate(data, chance)
    for number, name in enumerate(names):  # another's suffix
        other = names[(number * 7 + 3) % len(names)]
        yield f"{Path(name).stem}-called{Path(other).suffix}", files[name]


# Bombs and crafted headers.


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, extra: bytes = b"", rows: int | None = None
) -> bytes:
    """Return a PNG of zeros; ``rows`` of them, if not all. Their compressed data are never held at once."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + (width * channels * depth + 7) // 8)
    squeeze = zlib.compressobj(9)
    parts, left = [], height if rows is None else rows
    many = max(1, (1 << 20) // len(row))
    while left > 0:
        parts.append(squeeze.compress(row * min(many, left)))
        left -= many
    data = b"".join(parts) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    palette = png_chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    body = png_chunk(b"IHDR", header) + extra + palette + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@cache
def _zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def gif(
    width: int, height: int, frames: int, *, part: tuple[int, int] = (1, 1), comment: int = 0, delay: int = 5
) -> bytes:
    """Return a GIF whose frames are ``part`` pixels of a screen; ``comment`` blocks of text go first.

    Each is shown for ``delay`` hundredths of a second.
    """
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    text = b"!\xfe" + (b"\xff" + b"x" * 255) * comment + b"\0" if comment else b""
    control = b"!\xf9\x04\x08" + struct.pack("<H", delay) + b"\0\0"  # then the background again
    image = control + b"," + struct.pack("<HHHHB", 0, 0, *part, 0) + b"\x02\x02\x44\x01\0"
    return screen + text + image * frames + b";"


def tiff(
    entries: list[tuple[int, int, int, int]], tail: bytes = b"", following: int = 0, order: str = "<"
) -> bytes:
    """Return a TIFF of one directory of ``(tag, type, count, value)``; ``tail`` comes right behind it."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    body = struct.pack(order + "H", len(entries) & 0xFFFF)
    for tag, kind, count, value in sorted(entries):
        packed = (
            struct.pack(order + "HH", value, 0)
            if kind == 3 and count == 1
            else struct.pack(order + "I", value)
        )
        body += struct.pack(order + "HHI", tag, kind, count) + packed
    return head + body + struct.pack(order + "I", following) + tail


def _tiff_entries(width: int, height: int, **more: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    fields: dict[int, tuple[int, int, int]] = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, 200),
        277: (3, 1, 1),
        278: (4, 1, height),
        279: (4, 1, width * height & 0xFFFFFFFF),
    }
    fields.update({int(tag[1:]): value for tag, value in more.items()})
    return [(tag, *value) for tag, value in fields.items()]


def box(kind: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a box of an ISO base media file, perhaps with a length that is not true."""
    return struct.pack(">I", len(body) + 8 if length is None else length) + kind + body


def _nested(kind: bytes, depth: int) -> bytes:
    """Return boxes, each in the one before."""
    return b"".join(struct.pack(">I", 8 * (depth - level)) + kind for level in range(depth))


def _webp(chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def _webp_canvas(width: int, height: int, flags: int, chunks: bytes = b"") -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return _webp(b"VP8X" + struct.pack("<I", 10) + bytes((flags, 0, 0, 0)) + size + chunks)


def _jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """Return a JPEG whose frame header tells another size."""
    for marker in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"):
        at = data.find(marker)
        if at >= 0:
            return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]
    raise ValueError("no frame header")


def _many_scans(width: int, height: int, scans: int) -> bytes:
    """Return a progressive JPEG of so many scans without data: each makes the decoder go over all pixels."""
    data = _saved(Image.new("L", (16, 16), 90), "JPEG", progressive=True)
    data = _jpeg_size(data, width, height)
    first = data.index(b"\xff\xda")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x05\x00" + b"\xe0\x00\x00"  # AC 1 to 5; one run to the end
    second = data.index(b"\xff\xda", first + 2)
    return data[:second] + scan * scans + b"\xff\xd9"


def _rewritten(data: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    return data.replace(old, new)


def _matroska_nested(depth: int) -> bytes:
    header = b"\x1aE\xdf\xa3\x84\x42\x82\x81w"
    return header + b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" * depth


def _large_bombs() -> Iterator[tuple[str, bytes]]:
    files = good_files()
    yield "largest-allowed.png", png(16_384, 16_384, colour=0, depth=1)
    yield "largest-transparent.png", png(16_384, 16_384, colour=6)
    yield "largest-16-bit.png", png(16_384, 16_384, colour=0, depth=16)
    yield "strip.png", png(2**28, 1, colour=0)
    yield "many-frames.gif", gif(3_000, 3_000, 20_000)
    yield "many-tiny-frames.gif", gif(2, 2, 5_000)
    yield "frames-of-11-minutes.gif", gif(2, 2, 1_000, delay=65_535)
    yield "long-comment.gif", gif(8, 8, 2, comment=40_000)
    yield "16000-by-16000.jpg", _jpeg_size(files["plain.jpg"], 16_000, 16_000)
    yield "16000-by-16000-progressive.jpg", _jpeg_size(files["progressive.jpg"], 16_000, 16_000)
    yield "fill-bytes.jpg", b"\xff\xd8" + b"\xff" * 5_000_000
    strips = _tiff_entries(
        64, 1_000_000, _273=(4, 1_000_000, 122), _278=(4, 1, 1), _279=(4, 1_000_000, 4_000_122)
    )
    yield "million-strips.tif", tiff(strips, struct.pack("<I", 64) * 2_000_000)
    flat = zlib.compress(bytes(16_000 * 16_000), 9)
    packed_strip = _tiff_entries(16_000, 16_000, _259=(3, 1, 8), _273=(4, 1, 122), _279=(4, 1, len(flat)))
    yield "deflated.tif", tiff(packed_strip, flat)
    yield "endless-comment.ppm", b"P6\n#" + b"x" * 3_000_000
    yield "text-of-200-megapixels.pgm", b"P2\n16000 16000\n255\n" + b"1 " * 1_000_000
    yield "bits-of-200-megapixels.pbm", b"P1\n16000 16000\n" + b"10" * 1_000_000
    yield "million-boxes.mp4", box(b"ftyp", b"isom\0\0\0\0isom") + box(b"free") * 1_000_000
    yield "million-tracks.mp4", box(b"ftyp", b"isom\0\0\0\0isom") + box(b"moov", box(b"trak") * 500_000)
    yield "million-elements.mkv", _matroska_nested(1) + b"\xec\x80" * 1_000_000
    j2k = files["bare.j2k"]
    yield "tiles.j2k", j2k[:8] + struct.pack(">8I", 16_000, 16_000, 0, 0, 64, 64, 0, 0) + j2k[40:]


def bombs(small: bool = False) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of files that ask for far more than they are.

    ``small`` leaves out what takes long to make, or to read.
    """
    files = good_files()
    if not small:
        yield from _large_bombs()
    # PNG
    yield "1e5-by-1e5.png", png(100_000, 100_000, rows=30)
    yield "sizes-of-4e9.png", png(2**31 - 1, 2**31 - 1, rows=0, colour=0)
    yield "no-size.png", png(0, 0, rows=0)
    yield "column.png", png(1, 2**28 - 1, colour=0, rows=5)
    packed = _zeros(100_000_000)
    yield "text-bomb.png", png(8, 8, extra=png_chunk(b"zTXt", b"Comment\0\0" + packed))
    yield "many-text-bombs.png", png(8, 8, extra=png_chunk(b"zTXt", b"Comment\0\0" + _zeros(2**20 - 1)) * 500)
    yield "text-bomb-2.png", png(8, 8, extra=png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed))
    yield "profile-bomb.png", png(8, 8, extra=png_chunk(b"iCCP", b"p\0\0" + packed))
    yield "many-chunks.png", png(8, 8, extra=png_chunk(b"tEXt", b"a\0b") * 100_000)
    claims = png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    yield "1e9-frames.png", png(8, 8, extra=claims)
    control = struct.pack(">IIIIIHHBB", 0, 16_000, 16_000, 0, 0, 1, 20, 1, 0)
    yield (
        "huge-frames.png",
        png(16_000, 16_000, colour=0, depth=1, extra=claims + png_chunk(b"fcTL", control)),
    )
    yield "lengths-of-2e9.png", files["plain.png"][:33] + b"\x7f\xff\xff\xffIDAT" + bytes(60)
    # GIF
    yield "65535-by-65535.gif", gif(65_535, 65_535, 50)
    yield "many-frames-of-a-large-screen.gif", gif(16_000, 16_000, 3_000)
    yield "two-frames-of-11-minutes.gif", gif(2, 2, 2, delay=65_535)
    frames = [_pixels(16, 16, number) for number in range(50)]
    slides = _saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=655_350)
    yield "slides-of-11-minutes.gif", slides
    yield "no-frames.gif", gif(64, 64, 0)
    yield "no-screen.gif", gif(0, 0, 3)
    # JPEG
    yield "65500-by-65500.jpg", _jpeg_size(files["plain.jpg"], 65_500, 65_500)
    yield "no-size.jpg", _jpeg_size(files["plain.jpg"], 0, 0)
    yield "many-scans.jpg", _many_scans(8_000, 8_000, 3_000)
    yield "many-scans-small.jpg", _many_scans(2_000, 2_000, 30_000)
    yield (
        "segments.jpg",
        b"\xff\xd8" + (b"\xff\xe1\xff\xffhttp://ns.adobe.com/xap/1.0/\0" + bytes(65_504)) * 60,
    )
    yield "exif-loop.jpg", files["exif.jpg"].replace(b"II*\0\x08\0\0\0", b"II*\0\x00\0\0\0")
    # TIFF
    many = [(1_000 + n, 7, 900_000, 8) for n in range(2_000)]
    yield "overlapping-tags.tif", tiff([*_tiff_entries(8, 8), *many], bytes(1_000_000))
    values = [(1_000 + n, 3, 2_000_000, 8) for n in range(20)]
    yield "many-values.tif", tiff([*_tiff_entries(8, 8), *values], bytes(4_100_000))
    yield "huge-strip.tif", tiff(_tiff_entries(16_000, 16_000, _279=(4, 1, 0xFFFFFFFF)), bytes(400))
    yield "loop.tif", tiff(_tiff_entries(8, 8), bytes(400), following=8)
    yield "count-of-4e9.tif", tiff([*_tiff_entries(8, 8), (700, 12, 0xFFFFFFFF, 8)], bytes(400))
    yield "sub-loop.tif", tiff([*_tiff_entries(8, 8), (34665, 4, 1, 8), (330, 4, 1, 8)], bytes(400))
    yield "sizes-of-4e9.tif", tiff(_tiff_entries(0xFFFFFFFF, 0xFFFFFFFF), bytes(400))
    yield "big-endian.tif", tiff(_tiff_entries(8, 8), bytes(400), order=">")
    samples = _tiff_entries(4_000, 4_000, _277=(3, 1, 65_535), _258=(3, 65_535, 8))
    yield "65535-samples.tif", tiff(samples, bytes(140_000))
    # WebP
    yield "huge-canvas.webp", _webp_canvas(2**24, 2**24, 0x02)
    yield "largest-canvas.webp", _webp_canvas(16_383, 16_383, 0x00, files["plain.webp"][12:])
    yield "many-large-frames.webp", _large_webp(16_383, 16_383, 300)
    # BMP
    header = struct.pack("<IiiHHIIiiII", 40, 16_000, 16_000, 1, 8, 1, 0, 0, 0, 256, 0)
    yield "run-length-lines.bmp", _bmp(header, bytes(1024) + b"\x01\x00\x00\x00" * 16_000)
    header = struct.pack("<IiiHHIIiiII", 40, 2**28 - 1, 1, 1, 8, 1, 0, 0, 0, 256, 0)
    yield "run-length-strip.bmp", _bmp(header, bytes(1024) + b"\x01\x00\x00\x00")
    header = struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0)
    yield "sizes-of-2e9.bmp", _bmp(header, bytes(100))
    header = struct.pack("<IiiHHIIiiII", 40, 16_000, 16_000, 1, 32, 0, 0, 0, 0, 0, 0)
    yield "lacks-all-pixels.bmp", _bmp(header, bytes(100))
    # the others
    yield "sizes-of-1e9.ppm", b"P6\n999999999 999999999\n255\n" + bytes(100)
    yield "infinite.ppm", b"Pf\n64 64\n-1.0\n" + b"\x00\x00\x80\x7f" * 4096
    yield "largest-floats.ppm", b"Pf\n16000 16000\n-1.0\n" + bytes(1000)
    j2k = files["bare.j2k"]
    yield "tiles-of-a-pixel.j2k", j2k[:8] + struct.pack(">8I", 16_000, 16_000, 0, 0, 1, 1, 0, 0) + j2k[40:]
    yield (
        "sizes-of-4e9.j2k",
        j2k[:8] + struct.pack(">8I", *[0xFFFFFFFF] * 2, 0, 0, *[0xFFFFFFFF] * 2, 0, 0) + j2k[40:],
    )
    for name in ("plain.avif", "plain.heic"):
        if name in files:
            sizes = struct.pack(">II", 96, 64)
            for label, wide, high in (("large", 16_000, 16_000), ("huge", 2**31 - 1, 2**31 - 1)):
                if small and label == "large":
                    continue
                yield (
                    f"{label}-{name}",
                    _rewritten(
                        files[name], b"ispe\0\0\0\0" + sizes, b"ispe\0\0\0\0" + struct.pack(">II", wide, high)
                    ),
                )
    # videos
    yield "nested.mp4", box(b"ftyp", b"isom\0\0\0\0isom") + _nested(b"moov", 20_000)
    yield "nested-tracks.mp4", box(b"ftyp", b"isom\0\0\0\0isom") + box(b"moov", _nested(b"trak", 50_000))
    if "h264.mp4" in files:
        mp4 = files["h264.mp4"]
        for kind in (b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"stss", b"elst"):
            at = mp4.find(kind)
            if at > 0:
                for label, count in (("4e9", 0xFFFFFFFF), ("1e8", 100_000_000)):
                    where = at + (12 if kind == b"stsz" else 8)
                    yield (
                        f"{kind.decode()}-{label}.mp4",
                        mp4[:where] + struct.pack(">I", count) + mp4[where + 4 :],
                    )
        yield "sizes-of-65535.mp4", mp4.replace(struct.pack(">HH", 96, 64), b"\xff\xff\xff\xff")
        yield (
            "lasts-for-ever.mp4",
            mp4.replace(
                b"mvhd" + mp4[mp4.find(b"mvhd") + 4 :][:20],
                b"mvhd" + mp4[mp4.find(b"mvhd") + 4 :][:16] + b"\xff" * 4,
            ),
        )
    try:
        yield "frames-10-hours-apart.mp4", _clip("a.mp4", "mpeg4", times=(0, 36_000))
        yield "frames-10-hours-apart.mkv", _clip("a.mkv", "mpeg4", times=(0, 36_000))
    except Exception:  # a codec that is not there, as in `good_files`
        pass
    yield "nested.mkv", _matroska_nested(20_000)
    yield (
        "nested-tracks.mkv",
        _matroska_nested(1) + b"\x16\x54\xae\x6b\x01\xff\xff\xff\xff\xff\xff\xff" * 5_000,
    )
    if "mjpeg.avi" in files:
        avi = files["mjpeg.avi"]
        at = avi.find(b"strf") + 8
        yield "sizes-of-2e9.avi", avi[: at + 4] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + avi[at + 12 :]
        yield "nested.avi", b"RIFF\xff\xff\xff\xffAVI " + b"LIST\xff\xff\xff\x7fhdrl" * 20_000
    large = _jpeg_size(files["plain.jpg"], 16_000, 16_000)
    yield "frames-of-256-megapixels.avi", _mjpeg_avi(large, 16_000, 16_000, 200)
    if "stream.m2ts" in files:
        yield "noise.m2ts", random.Random(5).randbytes(2_000_000)
        yield "packets.m2ts", (b"\x47\x1f\xff\x10" + b"\xff" * 184) * 20_000
    yield "empty-packs.mpg", b"\0\0\x01\xba" + bytes(10) + b"\0\0\x01\xbe\xff\xff" * 100_000
    # what other programs would follow
    secret = "file:///etc/hostname"
    yield "playlist.mp4", f"#EXTM3U\n#EXTINF:10,\n{secret}\n".encode()
    yield (
        "playlist-with-a-control-character.mp4",
        f"#EXTM3U\n#EXTINF:10,\x01\n{secret}\n#EXT-X-ENDLIST\n".encode(),
    )
    yield "list.mkv", b"ffconcat version 1.0\nfile /etc/hostname\n\x01\n"
    yield (
        "session.mp4",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n\x01",
    )
    entities = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    laughs = f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY l0 "ha">{entities}]><svg>&l9;</svg>'
    yield "billion-laughs.jpg", laughs.encode()
    yield "billion-laughs.mp4", laughs.encode()
    yield "archive.jpg", b"PK\x03\x04" + bytes(200)
    yield "packed.png", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + _zeros(10_000_000)
    yield "script.jpg", b"%!PS-Adobe-3.0\n(/etc/passwd) (r) file\n"
    yield "program.gif", b"\x7fELF" + bytes(500)
    yield "page.webp", b"<!DOCTYPE html><script>alert(1)</script>"
    yield "nothing.jpg", b""
    yield "nothing.mp4", b""
    yield "a-byte.png", b"\x89"


def _large_webp(width: int, height: int, frames: int) -> bytes:
    still = good_files()["plain.webp"][12:]
    body = (
        bytes(6)
        + (95).to_bytes(3, "little")
        + (63).to_bytes(3, "little")
        + (600).to_bytes(3, "little")
        + b"\x02"
    )
    frame = b"ANMF" + struct.pack("<I", len(body) + len(still)) + body + still
    return _webp_canvas(width, height, 0x02, b"ANIM" + struct.pack("<IIH", 6, 0, 0) + frame * frames)


def _bmp(header: bytes, rest: bytes) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 14 + len(header) + len(rest), 0, 0, 14 + len(header) + 1024)
        + header
        + rest
    )


def _mjpeg_avi(frame: bytes, width: int, height: int, frames: int) -> bytes:
    """Return an AVI of one JPEG, repeated."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    main = struct.pack("<10I", 100_000, 0, 0, 0x10, frames, 0, 1, 0, width, height) + bytes(16)
    stream = b"vidsMJPG" + struct.pack("<IHHIIIIIIII4H", 0, 0, 0, 0, 1, 10, 0, frames, 0, 0, 0, *[0] * 4)
    form = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", 0, 0, 0, 0, 0)
    streams = chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", form))
    body = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + streams)
    return chunk(b"RIFF", b"AVI " + body + chunk(b"LIST", b"movi" + chunk(b"00dc", frame) * frames))


# Names and places.

# fmt: off
_NAMES: tuple[str | bytes, ...] = (
    "new\nline.jpg", "return\rhere.jpg", "tab\there.jpg", "bell\x07.jpg", "\x1b[31mred\x1b[0m.jpg",
    "\x7f.jpg", 'quote\'".jpg', "comma, and; semicolon.jpg", '",".jpg', "back\\slash.jpg", "\\n.jpg",
    "{curly}[square].jpg", "<img src=x onerror=alert(1)>.jpg", "<!--.jpg", "&lt;b&gt;&amp;.jpg",
    "'];alert(1);.jpg", "=cmd|' C calc'!A0.jpg", "=1+1.jpg", "+1+1.jpg", "-2+3.jpg", "@SUM(1,1).jpg",
    "\t=1+1.jpg", "--help.jpg", "-rf.jpg", "--output=x.jpg", "-.jpg", "~.jpg", "$HOME.jpg", "`id`.jpg",
    "$(id).jpg", ";id.jpg", "|id.jpg", "*.jpg", "[a-z].jpg", "?.jpg", "%s%n%d.jpg", "a%03d.jpg",
    "http:x.jpg", "file:x.jpg", "NUL.jpg", " leading.jpg", "trailing .jpg", "dots...jpg",
    "\u202egpj.exe.jpg", "\u2066\u200b\ufeff.jpg", "\u2028.jpg", "e\u0301.jpg", "\xe9.jpg",
    "\U0001f600.jpg", "a" * 251 + ".jpg", "\u00fc" * 125 + ".jpg", "UPPER.JPG",
    b"not-utf-8-\xff\xfe\x80.jpg", b"\xe9t\xe9.jpg", "new\nline.mp4", "=1+1.mp4", "concat:a|b.mp4",
    "a%03d.mp4", "-i.mp4", "\u202e4pm.mp4", "pipe:0.mp4", "a*.mp4", b"not-utf-8-\xff.mp4", "<b>.gif",
    "=1+1.gif", b"\xff.gif",
)
# fmt: on


@dataclass(frozen=True)
class Case:
    """One file of the corpus.

    Attributes:
        path: where it is.
        listed: whether a listing of its folder must name it; None for what is no file (a device, a pipe, an
            unreadable folder), which may be named or not.
    """

    path: bytes
    listed: bool | None = True


def write_corpus(folder: Path, *, each: int = 4, seed: int = 0, small: bool = False) -> list[Case]:
    """Make the corpus in a new folder.

    Args:
        folder: does not exist yet.
        each: how many files of each format are cut off, and as many damaged otherwise.
        seed: of the damage.
        small: leave out what takes long to make or to read.

    Returns:
        a case for each file and place.
    """
    chance = random.Random(seed)
    cases: list[Case] = []

    def add(group: str, name: str | bytes, data: bytes) -> None:
        path = os.path.join(os.fsencode(folder / group), os.fsencode(name))
        with open(path, "wb") as file:
            file.write(data)
        cases.append(Case(path))

    for group in ("good", "damaged", "bombs", "names", "places"):
        (folder / group).mkdir(parents=True)
    for name, data in good_files().items():
        add("good", name, data)
    for name, data in _mutants(chance, each):
        add("damaged", name, data)
    for name, data in bombs(small):
        add("bombs", name, data)
    for given in _NAMES:
        suffix = os.path.splitext(given if isinstance(given, str) else os.fsdecode(given))[1].lower()
        source = {".mp4": "mpeg4.mp4", ".gif": "moving.gif"}.get(suffix, "plain.jpg")
        try:
            add("names", given, good_files()[source])
        except (OSError, UnicodeError):  # a file system that takes fewer names
            continue
    cases += _places(folder / "places")
    return cases


def _places(folder: Path) -> Iterator[Case]:
    """Make links, devices, pipes, folders and sparse files."""
    good = good_files()
    photo = folder / "photo.jpg"
    photo.write_bytes(good["plain.jpg"])
    yield Case(os.fsencode(photo))

    def link(name: str, target: str, listed: bool | None = True) -> Case:
        (folder / name).symlink_to(target)
        return Case(os.fsencode(folder / name), listed)

    yield link("linked.jpg", "photo.jpg")
    yield link("self.jpg", "self.jpg")
    yield link("round-a.jpg", "round-b.jpg")
    yield link("round-b.jpg", "round-a.jpg")
    yield link("round-a.mp4", "round-b.mp4")
    yield link("round-b.mp4", "round-a.mp4")
    yield link("dangling.jpg", "nowhere.jpg")
    yield link("dangling.mp4", "nowhere.mp4")
    yield link("zeros.jpg", "/dev/zero", None)
    yield link("zeros.mp4", "/dev/zero", None)
    yield link("null.png", "/dev/null", None)
    yield link("up", "..", None)  # a folder within itself
    yield link("far.jpg", "x" * 4000)
    for name in ("pipe.jpg", "pipe.mp4"):
        os.mkfifo(folder / name)
        yield Case(os.fsencode(folder / name), None)
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "inside.jpg").write_bytes(good["plain.jpg"])
    yield Case(os.fsencode(folder / "folder.jpg"), False)
    yield Case(os.fsencode(folder / "folder.jpg" / "inside.jpg"))
    (folder / "folder.mp4").mkdir()
    yield Case(os.fsencode(folder / "folder.mp4"), False)
    (folder / ".hidden.jpg").write_bytes(good["plain.jpg"])
    yield Case(os.fsencode(folder / ".hidden.jpg"), False)
    (folder / "unreadable.jpg").write_bytes(good["plain.jpg"])
    (folder / "unreadable.jpg").chmod(0)
    yield Case(os.fsencode(folder / "unreadable.jpg"))
    (folder / "locked").mkdir()
    (folder / "locked" / "photo.jpg").write_bytes(good["plain.jpg"])
    (folder / "locked").chmod(0)
    yield Case(os.fsencode(folder / "locked"), None)
    yield Case(os.fsencode(folder / "locked" / "photo.jpg"), None)
    for name, data in good.items():  # 8 GiB of nothing behind a beginning that is right
        if Path(name).stem in (
            "plain",
            "h264",
            "mpeg4",
            "vp9",
            "mjpeg",
            "mpeg1",
            "stream",
            "flash",
            "moving",
        ):
            path = folder / f"sparse-{name}"
            path.write_bytes(data[: len(data) * 2 // 3])
            os.truncate(path, 8 * 2**30)
            yield Case(os.fsencode(path))
    # deeper than a path may be long
    here = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(20):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
    except OSError:
        pass
    finally:
        os.chdir(here)


def remove(folder: Path) -> None:
    """Remove a corpus."""
    import shutil

    locked = folder / "places" / "locked"
    if locked.is_dir():
        locked.chmod(0o700)
    shutil.rmtree(folder)


# Running.


@dataclass(frozen=True)
class Command:
    """A way to caption a folder.

    Attributes:
        options: of ``captioner caption FOLDER --recursive``; ``{results}`` is a path in a new folder.
        names: returns the paths that the results name, as bytes, from standard output, that path, and the
            cases.
        code: how it ends when some files could not be captioned.
        apart: if given, the files come as a list on standard input, and only the first of those for which
            this is the same: their outputs would be one.
        writes: whether it writes beside files or into them, so that it gets a corpus of its own.
        look: returns what else is wrong with the results, from that path, the corpus as it was, the corpus as
            it is now, and the cases.
    """

    options: tuple[str, ...]
    names: Callable[[bytes, Path, Sequence[Case]], list[bytes]]
    code: int = 1
    apart: Callable[[str], object] | None = None
    writes: bool = False
    look: Callable[[Path, Path, Path, Sequence[Case]], list[str]] | None = None

    def chosen(self, cases: Sequence[Case]) -> list[Case]:
        """Return the cases that it is about."""
        if self.apart is None:
            return list(cases)
        found: dict[object, Case] = {}
        for case in cases:
            if case.listed:
                found.setdefault(self.apart(os.fsdecode(case.path)), case)
        return list(found.values())


def _json_names(text: bytes, results: Path, cases: Sequence[Case]) -> list[bytes]:
    return [os.fsencode(record["path"]) for record in json.loads(text.decode())]


def _jsonl_records(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.decode().split("\n") if line]


def _jsonl_names(text: bytes, results: Path, cases: Sequence[Case]) -> list[bytes]:
    return [os.fsencode(record["path"]) for record in _jsonl_records(text)]


def _csv_names(text: bytes, results: Path, cases: Sequence[Case]) -> list[bytes]:
    rows = csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True)
    # a video has a row for each of its segments, and one for its error
    return [_unescaped(path) for path, _ in itertools.groupby(row["path"] for row in rows)]


def _parquet_names(text: bytes, results: Path, cases: Sequence[Case]) -> list[bytes]:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(results.with_suffix(".parquet"))["path"].to_pylist()
    return [_unescaped(path) for path, _ in itertools.groupby(rows)]


def _coco_names(text: bytes, results: Path, cases: Sequence[Case]) -> list[bytes]:
    """Return what has a caption, and nothing twice."""
    from captioner.batch.tables import image_id

    own = {image_id(os.fsdecode(case.path)): case.path for case in cases}
    records = json.loads(results.with_suffix(".json").read_text("utf-8"))
    assert all(record["caption"] for record in records)
    return [own[record["image_id"]] for record in records]


def _unescaped(path: str) -> bytes:
    """Return a path in which half surrogates stand as escapes, because the format must be UTF-8."""
    data = os.fsencode(path)
    for byte in range(0x80, 0x100):
        data = data.replace(b"\\udc%02x" % byte, bytes([byte]))
    return data


def _of_table(names: Callable[..., list[bytes]], suffix: str) -> Callable[..., list[bytes]]:
    """Return what a table names, and what only the list of errors does: arguments that stand for no file."""

    def found(text: bytes, results: Path, cases: Sequence[Case]) -> list[bytes]:
        named = names(results.with_suffix(suffix).read_bytes(), results, cases)
        errors = _jsonl_names(results.with_name("results.errors.jsonl").read_bytes(), results, cases)
        known = set(named)
        return named + [path for path in errors if path not in known]

    return found


# What a command leaves behind beside its table.


class _Tags(HTMLParser):
    """The elements of a page with their attributes, and the rows in its data."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.rows: list[list[Any]] = []
        self._in_rows = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_rows = ("class", "rows") in attrs
        if not self._in_rows:
            self.tags.append((tag, tuple(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._in_rows = False

    def handle_data(self, data: str) -> None:
        if self._in_rows:
            self.rows += json.loads(data.split("\n", 1)[0])


def _page_faults(page: Path, names: list[bytes]) -> list[str]:
    """Return whether a report has other elements than an empty one: a name would have become one."""
    from captioner.batch.page import write_page

    read, plain = _Tags(), _Tags()
    read.feed(page.read_text("utf-8"))
    empty = page.with_name("empty.html")
    write_page(empty, "nothing", [])
    plain.feed(empty.read_text("utf-8"))
    found = []
    if read.tags != plain.tags:
        other = [tag for tag in read.tags if tag not in plain.tags]
        found.append(f"the report has elements of its own, such as {other[:1]}")
    if sorted(os.fsencode(row[0]) for row in read.rows) != sorted(names):
        found.append("the report does not show what the table names")
    return found


def _same_pixels(one: Path, other: Path) -> bool:
    """Tell whether two pictures have the same frames; of very large ones, the same size."""
    from captioner import images

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # Pillow's, of damage
        images._quiet_libtiff()
        a, b = stack.enter_context(Image.open(one)), stack.enter_context(Image.open(other))
        frames = getattr(a, "n_frames", 1)
        if a.size != b.size or frames != getattr(b, "n_frames", 1):
            return False
        if a.width * a.height > 2**24:
            return True
        for number in range(min(frames, 16)):
            a.seek(number)
            b.seek(number)
            if a.convert("RGBA").tobytes() != b.convert("RGBA").tobytes():
                return False
    return True


def _left_behind(results: Path, before: Path, now: Path, cases: Sequence[Case]) -> list[str]:
    """Look at a corpus after a run that wrote beside files and into them, and at the report."""
    records = {
        os.fsencode(record["path"]): record
        for record in _jsonl_records(results.with_suffix(".jsonl").read_bytes())
    }
    found, changed, beside = [], 0, 0
    for case in cases:
        path = Path(os.fsdecode(case.path))
        was = before / path.relative_to(now)
        try:
            if not os.access(path, os.R_OK) or not path.is_file() or path.stat().st_size > 2**26:
                continue
        except OSError:  # a link to nowhere
            continue
        record = records[case.path]
        if path.read_bytes() != was.read_bytes():
            changed += 1
            same = False
            with contextlib.suppress(OSError):  # it cannot be decoded any more
                same = _same_pixels(was, path)
            if record["error"] is not None or not same:
                found.append(f"{case.path!r} is not the picture that it was")
        texts = {suffix: path.with_suffix(suffix) for suffix in (".txt", ".srt")}
        if not record["caption"]:
            found += [f"{text} is of no caption" for text in texts.values() if os.path.lexists(text)]
            continue
        beside += 1
        if texts[".txt"].read_bytes() != f"{record['caption']}\n".encode():
            found.append(f"{texts['.txt']} is not the caption")
        if "segments" in record and path.suffix.lower() in (".mp4", ".mkv", ".webm"):
            cues = texts[".srt"].read_text("utf-8").strip().split("\n\n")
            if not all("-->" in cue.split("\n")[1] for cue in cues):
                found.append(f"{texts['.srt']} is no subtitles")
    if not changed or not beside:
        found.append(f"alt text was written into {changed} files and sidecars beside {beside}")
    return found + _page_faults(results.with_suffix(".html"), [*records])


def _sidecar(path: str) -> str:
    """Return what the sidecars of files have in common, on a disk that tells as little apart as any."""
    return unicodedata.normalize("NFC", os.path.splitext(path)[0]).casefold()


def _coco_id(path: str) -> object:
    from captioner.batch.tables import image_id

    return image_id(path)


_EVERYTHING = "--sidecars --alt-text --srt beside --output {results}.jsonl --report {results}.html"

COMMANDS = {
    "jsonl": Command(("--jsonl",), _jsonl_names),
    "json": Command(("--json",), _json_names),
    "csv": Command(("--csv",), _csv_names),
    "output-jsonl": Command(("--output", "{results}.jsonl"), _of_table(_jsonl_names, ".jsonl"), code=0),
    "output-csv": Command(("--output", "{results}.csv", "--strict"), _of_table(_csv_names, ".csv")),
    "output-parquet": Command(
        ("--output", "{results}.parquet"), _of_table(_parquet_names, ".parquet"), code=0
    ),
    "output-coco": Command(
        ("--output", "{results}.json"), _of_table(_coco_names, ".json"), code=0, apart=_coco_id
    ),
    "everything": Command(
        tuple(_EVERYTHING.split()),
        _of_table(_jsonl_names, ".jsonl"),
        code=0,
        apart=_sidecar,
        writes=True,
        look=_left_behind,
    ),
}
"""What is run over the corpus; add to it what else is written."""


@dataclass(frozen=True)
class Outcome:
    """What a run left behind; ``peak`` in bytes."""

    code: int
    out: bytes
    err: str
    seconds: float
    peak: int
    results: Path


def caption_folder(
    folder: Path,
    command: Command,
    cases: Sequence[Case],
    options: list[str],
    place: Path,
    patience: float = 3600.0,
) -> Outcome:
    """Caption a folder, or the cases that the command chooses, in a process of its own, and measure it.

    Args:
        folder, command, cases: what and how.
        options: for all commands.
        place: a folder that is there, for the results.
        patience: seconds after which the process is ended.
    """
    import psutil

    results = place / "results"
    given = [option.replace("{results}", str(results)) for option in command.options]
    listed = b"" if command.apart is None else b"".join(c.path + b"\0" for c in command.chosen(cases))
    what = [str(folder), "--recursive"] if command.apart is None else ["-"]
    code = "from captioner.cli import main; main()"
    (place / "in").write_bytes(listed)
    begun, peak = time.monotonic(), 0
    with open(place / "in", "rb") as read, open(place / "out", "wb") as out, open(place / "err", "wb") as err:
        process = psutil.Popen(
            [sys.executable, "-c", code, "caption", *what, *given, *options],
            stdin=read,
            stdout=out,
            stderr=err,
        )
        while process.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.Error:
                break
            if time.monotonic() - begun > patience:
                process.kill()
            time.sleep(0.02)
        returned = process.wait()
    complaints = (place / "err").read_bytes().decode("utf-8", "backslashreplace")
    seconds = time.monotonic() - begun
    return Outcome(returned, (place / "out").read_bytes(), complaints, seconds, peak, results)


def faults(outcome: Outcome, command: Command, cases: Sequence[Case]) -> list[str]:
    """Return what a run over the corpus did wrong, a line each."""
    found = []
    if outcome.code != command.code:
        found.append(f"exit code {outcome.code}, expected {command.code}")
    for line in outcome.err.splitlines():
        if not line.startswith("captioner: "):
            found.append(f"on standard error: {line[:200]}")
            break
    if "Traceback" in outcome.err:
        found.append("a traceback: " + " | ".join(outcome.err.splitlines()[-3:])[:300])
    cases = command.chosen(cases)
    try:
        names = command.names(outcome.out, outcome.results, cases)
    except Exception as error:
        return [*found, f"the output does not parse: {type(error).__name__}: {str(error)[:200]}"]
    counted: dict[bytes, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    known = {case.path: case.listed for case in cases}
    missing = [path for path, listed in known.items() if listed and path not in counted]
    surplus = [path for path in counted if known.get(path, None if b"d" * 250 in path else False) is False]
    twice = [path for path, count in counted.items() if count > 1]
    for what, paths in (("not named", missing), ("named, but not to be", surplus), ("named twice", twice)):
        if paths:
            found.append(f"{len(paths)} {what}, such as {paths[0]!r}")
    return found


def work(model: str) -> int:
    """Caption the files whose paths come on standard input, each ended by NUL; print a JSON line for each."""
    import torch

    from captioner import Captioner
    from captioner.batch import caption_media

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    captioner = Captioner.load(model or None, device="cpu") if model else Captioner.load(device="cpu")
    print(json.dumps({"ready": True}), flush=True)
    path = b""
    while byte := sys.stdin.buffer.read(1):
        if byte != b"\0":
            path += byte
            continue
        record: dict[str, Any] = {"error": None, "exception": None}
        _forget_peak()
        begun, busy = time.monotonic(), time.process_time()
        try:
            (result,) = caption_media(captioner, [os.fsdecode(path)], beam=1)
            record["error"] = result.error
        except BaseException as error:  # that is what is looked for
            record["exception"] = f"{type(error).__name__}: {error}"
        record["seconds"] = time.monotonic() - begun
        record["busy"] = time.process_time() - busy
        record["peak"] = _peak()
        print(json.dumps(record), flush=True)
        path = b""
    return 0


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the most memory since `_forget_peak`, in bytes; 0 where Linux is not."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def caption_each(paths: list[bytes], model: str = "") -> Iterator[dict[str, Any]]:
    """Caption files one by one in a process that is watched; yield its records.

    A file that takes longer than a minute has ``hang``, one that ends the process ``crash``.
    """
    process: subprocess.Popen[bytes] | None = None

    def answer() -> bytes | None:
        assert process is not None
        assert process.stdout is not None
        waiting = selectors.DefaultSelector()
        waiting.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if waiting.select(_PATIENCE) else None

    try:
        for path in paths:
            if process is None or process.poll() is not None:
                process = subprocess.Popen(
                    [sys.executable, __file__, "--worker", "--model", model],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONWARNINGS": "ignore"},  # as the command line does
                )
                answer()
            assert process.stdin is not None
            begun = time.monotonic()
            process.stdin.write(path + b"\0")
            process.stdin.flush()
            line = answer()
            record: dict[str, Any] = {"path": path, "seconds": time.monotonic() - begun, "error": None}
            if line is None:
                record["hang"] = True
                process.kill()
                process.wait()
                process = None
            elif not line:
                record["crash"] = process.wait()
                process = None
            else:
                record.update(json.loads(line))
            yield record
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> int:
    """Run it; return 0 if the bars hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="a checkpoint; the built-in captioner if left out")
    parser.add_argument(
        "--each", type=int, default=4, help="files of each format cut off, and as many damaged"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--commands",
        nargs="*",
        default=[*COMMANDS],
        metavar="NAME",
        help=f"of {', '.join(COMMANDS)}, or none",
    )
    parser.add_argument("--no-files", action="store_true", help="do without the run file by file")
    parser.add_argument("--keep", type=Path, help="make the corpus in this new folder, run nothing, keep it")
    parser.add_argument("--fuzz", type=int, metavar="N", help="N inputs for each reader through hypothesis")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [label for label in options.commands if label not in COMMANDS]
    if unknown:
        parser.error(f"no command {unknown[0]}; there are {', '.join(COMMANDS)}")
    if options.worker:
        return work(options.model)
    if options.fuzz:
        tests = Path(__file__).resolve().parents[1] / "tests" / "hostile"
        command = [sys.executable, "-m", "pytest", str(tests), "-k", "fuzz", "-v", "--durations=20"]
        return subprocess.run(
            command, env={**os.environ, "CAPTIONER_FUZZ": str(options.fuzz)}, check=False
        ).returncode
    if options.keep:
        print(f"{len(write_corpus(options.keep, each=options.each, seed=options.seed))} cases")
        return 0
    common.print_machine(options.threads)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        print("as root, whom no permissions keep out: the unreadable files are read")
    more = ["--device", "cpu", "--threads", str(options.threads), "--beam", "1"]
    more += ["--model", options.model] if options.model else []
    place = Path(tempfile.mkdtemp(prefix="captioner-hostile-"))
    try:
        return _all(place, options, more)
    finally:
        for corpus in place.glob("*/places"):
            remove(corpus.parent)
        remove(place)


def _all(place: Path, options: argparse.Namespace, more: list[str]) -> int:
    cases = write_corpus(place / "corpus", each=options.each, seed=options.seed)
    files = [case for case in cases if case.listed]
    others = sum(case.listed is None for case in cases)
    print(f"{len(cases)} cases: {len(files)} files, {others} devices, pipes and the like", flush=True)
    usual = _over_good_files(place, len(files), more) if options.commands else 0
    failed = False
    for label in options.commands:
        command, folder, own = COMMANDS[label], place / "corpus", cases
        if command.writes:
            folder = place / "written"
            own = write_corpus(folder, each=options.each, seed=options.seed)
        results = Path(tempfile.mkdtemp(dir=place))
        found = caption_folder(folder, command, own, more, results)
        problems = faults(found, command, own)
        if command.look is not None:
            try:
                problems += command.look(found.results, place / "corpus", folder, command.chosen(own))
            except Exception as error:
                problems.append(f"what it left cannot be read: {type(error).__name__}: {str(error)[:200]}")
        extra = found.peak - usual
        if extra > EXTRA_MEMORY:
            problems.append("too much memory")
        failed |= bool(problems)
        print(
            f"{label}: {len(command.chosen(own))} cases, exit code {found.code}, {found.seconds:.0f} s,"
            f" {found.peak / 2**20:.0f} MiB at most ({extra / 2**20:+.0f}):"
            f" {'good' if not problems else 'FAILED'}"
        )
        for problem in problems[:20]:
            print(f"    {problem}")
        sys.stdout.flush()
        if command.writes:
            remove(folder)
    if not options.no_files:
        failed |= not _file_by_file([case.path for case in cases if case.listed is not False], options.model)
    return int(failed)


def _over_good_files(place: Path, count: int, more: list[str]) -> int:
    """Caption as many good files, say what it took, and return the bytes of memory."""
    plain = place / "plain"
    plain.mkdir()
    sources = [*good_files().items()]
    for number in range(count):
        name, data = sources[number % len(sources)]
        (plain / f"{number:05d}{Path(name).suffix}").write_bytes(data)
    good = caption_folder(plain, COMMANDS["jsonl"], [], more, Path(tempfile.mkdtemp(dir=place)))
    print(f"\nas many good files: exit code {good.code}, {good.seconds:.0f} s, {good.peak / 2**20:.0f} MiB")
    return good.peak


def _file_by_file(paths: list[bytes], model: str) -> bool:
    """Caption each file alone; print what became of them, and return whether the bars hold."""
    records = list(caption_each(paths, model))
    hangs = [record for record in records if record.get("hang")]
    crashes = [r for r in records if "crash" in r or r.get("exception")]
    reported = sum(bool(record["error"]) for record in records)
    captioned = len(records) - reported - len(hangs) - len(crashes)
    slowest = sorted(records, key=lambda record: -record["seconds"])[:5]
    hungry = sorted(records, key=lambda record: -record.get("peak", 0))[:3]
    print(
        f"\nfile by file: {len(records)}: {captioned} captioned, {reported} reported, {len(crashes)} crashes"
    )
    for record in [*crashes, *hangs]:
        print(f"    {record['path']!r}: {record.get('exception') or record.get('crash', 'does not end')}")
    for record in slowest:
        busy = f"{record.get('busy', 0):.2f} of the processor"
        print(f"    {record['seconds']:6.2f} s, {busy}  {os.path.basename(record['path'])!r}")
    for record in hungry:
        print(f"    {record.get('peak', 0) / 2**20:6.0f} MiB  {os.path.basename(record['path'])!r}")
    most = slowest[0]["seconds"] if slowest else 0.0
    return common.verdict("slowest file, seconds", most, at_most=SLOWEST) and not crashes and not hangs


if __name__ == "__main__":
    raise SystemExit(main())
