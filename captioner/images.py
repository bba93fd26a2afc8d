"""Decode and normalise pictures: EXIF, modes, bombs, truncation; fit them into the network's square.

Pillow decodes, but `PIL.Image.open` is not used for what users give: its pixel limit is a process-wide
setting that warns on standard error, and it tries every plugin (PostScript among them) on unknown bytes.
Here the magic bytes choose one decoder from a short list, and `MAX_PIXELS` is checked before any pixel
is decoded. All of this may be called from many threads. Nothing changes state outside this module, but one
thing: the first TIFF stops libtiff from writing to standard error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Union, cast

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, TiffImagePlugin

from captioner.inputs import (
    MAX_BYTES,
    RAW_SUFFIXES,
    ImageError,
    kind_of,
    name_of,
    not_a_picture,
    open_file,
    printable,
    unreadable,
)

if TYPE_CHECKING:
    import torch

ImageSource = Union[str, "os.PathLike[str]", bytes, bytearray, memoryview, IO[bytes], Image.Image, np.ndarray]
"""What can be captioned: a path, an encoded file as bytes or file object, a PIL image, a NumPy array."""

MAX_PIXELS = 2**28
"""Pictures with more pixels (268 million) are refused before they are decoded.

Decoded, that many take one gibibyte as Pillow holds them. A 20,000 x 10,000 panorama and the 200-megapixel
photos of phones pass. Of those above a sixteenth of it, all threads together decode one at a time."""

MAX_SIDE = 2**20
"""Longer and higher pictures are refused, too: every row takes memory of its own."""

_FITS = ("squash", "crop", "letterbox")
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Fit:
    """How a photo was fitted into the network's square input.

    Attributes:
        mode: ``squash`` (the whole photo, aspect ratio given up), ``crop`` (the centre) or
            ``letterbox`` (the whole photo with bars).
        width, height: of the photo in pixels, as a person sees it (after EXIF rotation).
        box: ``(left, top, right, bottom)`` in photo pixels of what the square shows; larger than the
            photo when there are bars.
    """

    mode: str
    width: int
    height: int
    box: tuple[float, float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {"mode": self.mode, "width": self.width, "height": self.height, "box": list(self.box)}


@dataclass(frozen=True)
class Preprocess:
    """How a network wants its pictures; travels in the checkpoint.

    Attributes:
        size: side of the square input in pixels.
        fit: ``squash``, ``crop`` or ``letterbox``, see `Fit`; the bars of a letterbox have the mean colour.
        mean, std: of red, green and blue on the scale 0 to 255; the input is ``(pixel - mean) / std``.
        interpolation: ``bilinear`` or ``bicubic``, both antialiased.
        resize: only for ``crop``: the short side is resized to this many pixels before the centre is cut
            out; None means ``size``. ``crop`` gives the very pixels of torchvision's
            ``ImageClassification`` transform with ``resize_size=resize, crop_size=size``.

    Raises:
        ValueError: a value is of the wrong type or impossible; the message names the field.
    """

    size: int
    fit: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"
    resize: int | None = None

    def __post_init__(self) -> None:
        _require(_is_int(self.size) and self.size > 0, "size", "a whole number above 0", self.size)
        _require(self.size <= _LARGEST_SIZE, "size", f"at most {_LARGEST_SIZE}", self.size)
        _require(self.fit in _FITS, "fit", f"one of {', '.join(_FITS)}", self.fit)
        _require(_is_rgb(self.mean), "mean", "three numbers on the scale 0 to 255", self.mean)
        _require(_is_rgb(self.std) and min(self.std) > 0, "std", "three numbers above 0", self.std)
        _require(
            isinstance(self.interpolation, str) and self.interpolation in _RESAMPLING,
            "interpolation",
            f"one of {', '.join(_RESAMPLING)}",
            self.interpolation,
        )
        if self.resize is not None:
            _require(self.fit == "crop", "resize", f"null, because fit is {self.fit!r}", self.resize)
            _require(
                _is_int(self.resize) and self.resize >= self.size,
                "resize",
                f"null or a whole number of at least size={self.size}",
                self.resize,
            )
            _require(self.resize <= 2 * _LARGEST_SIZE, "resize", f"at most {2 * _LARGEST_SIZE}", self.resize)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {
            "size": self.size,
            "fit": self.fit,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "resize": self.resize,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Preprocess:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: a key is unknown or missing, or its value is of the wrong type or impossible; the
                message names the key.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"preprocess: expected keys and values, found {record!r}")
        known = [field.name for field in fields(cls)]
        for key in record:
            if key not in known:
                raise ValueError(f"preprocess.{key}: unknown key; known are {', '.join(known)}")
        for key in ("size", "fit", "mean", "std"):
            if key not in record:
                raise ValueError(f"preprocess.{key}: missing")
        values = dict(record)
        for key in ("mean", "std"):
            if isinstance(values[key], (list, tuple)):
                _require(_is_rgb(values[key]), key, "three numbers", values[key])
                values[key] = tuple(float(value) for value in values[key])
        return cls(**values)


_LARGEST_SIZE = 2048
"""A checkpoint can ask for any size, and its pictures then take as much memory."""


def _require(condition: bool, key: str, expected: str, found: object) -> None:
    if not condition:
        raise ValueError(f"preprocess.{key}: expected {expected}, found {found!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rgb(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in value)
    )


def load(source: ImageSource, preprocess: Preprocess) -> tuple[np.ndarray, Fit]:
    """Decode a picture and fit it into the network's square.

    Large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, never below twice the size they are then
    resized to; the difference is below a grey level on average.

    Args:
        source: see `open_image`.
        preprocess: what the network wants.

    Returns:
        pixels: ``(3, size, size)`` uint8 RGB, 0 to 255, C-contiguous; `normalise` makes batches of them
            the network's input.
        fit: the photo's true size as a person sees it, and the part of it that the square shows.

    Raises:
        ImageError: the picture cannot be used.
    """
    with contextlib.ExitStack() as held:
        image, width, height, box = _decode(source, functools.partial(_shrinkage, preprocess), held)
        square, fit = _fit(image, width, height, box, preprocess)
        del image
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)), fit


def open_image(source: ImageSource, *, draft_size: int | None = None) -> Image.Image:
    """Decode a picture as a person sees it.

    EXIF rotation is applied. Transparency is laid on white, the paper that cut-outs and logos are drawn
    for: the colours under transparent pixels are arbitrary and often black. Greyscale of 16 bits is scaled
    to 8; 32-bit integers beyond 16 bits and floats beyond 0 to 255 are stretched from their minimum to
    their maximum. Of an animation or a document the first frame or page counts.

    Args:
        source: a path; an encoded file as bytes or as a file object opened in binary mode, read from its
            beginning; a PIL image, which is left as it is; or an array ``(H, W)``, ``(H, W, 1)``,
            ``(H, W, 3)`` or ``(H, W, 4)`` of uint8, uint16, bool, or float from 0 to 1.
        draft_size: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its short side keeps
            at least twice this many pixels. Other formats are not affected.

    Returns:
        A new image in mode ``RGB`` without metadata.

    Raises:
        ImageError: the picture is missing, unreadable, damaged, of an unknown kind, or has more than
            `MAX_PIXELS` pixels.
        ValueError: ``draft_size`` is below 1.
    """
    if draft_size is not None and draft_size < 1:
        raise ValueError(f"draft_size must be at least 1, found {draft_size}")
    shrinkage = None if draft_size is None else lambda width, height: min(width, height) / draft_size
    with contextlib.ExitStack() as held:
        image = _decode(source, shrinkage, held).image
    if image is source or isinstance(image, ImageFile.ImageFile):
        image = image.copy()
    image.info = {}  # an orientation left behind would be applied a second time by the next reader
    return image


def normalise(batch: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Turn pixels into the network's input, on the device where they are.

    Args:
        batch: ``(N, 3, size, size)`` uint8, 0 to 255.
        preprocess: mean and standard deviation per channel.

    Returns:
        ``(N, 3, size, size)`` float32, ``(pixel - mean) / std``.

    Raises:
        ValueError: the batch is of another type or shape.
    """
    import torch

    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
        raise ValueError(f"expected (N, 3, H, W) uint8 pixels, found {tuple(batch.shape)} {batch.dtype}")
    pixels = batch.to(torch.float32)
    mean = pixels.new_tensor(preprocess.mean).view(1, 3, 1, 1)
    std = pixels.new_tensor(preprocess.std).view(1, 3, 1, 1)
    return pixels.sub_(mean).div_(std)


# Fitting: how a photo of any shape becomes a square.


def _shrinkage(preprocess: Preprocess, width: int, height: int) -> float:
    """Return how many photo pixels one pixel of the square covers along the axis with the fewest."""
    if preprocess.fit == "letterbox":
        return max(width, height) / preprocess.size
    return min(width, height) / (preprocess.resize or preprocess.size)


def _fit(
    image: Image.Image,
    width: int,
    height: int,
    box: tuple[float, float, float, float],
    preprocess: Preprocess,
) -> tuple[Image.Image, Fit]:
    """Fit ``image`` into the square; ``box`` is where in it the ``width`` x ``height`` photo lies."""
    size, resample = preprocess.size, _RESAMPLING[preprocess.interpolation]
    if preprocess.fit == "squash":
        square = image.resize((size, size), resample, box, _REDUCING_GAP)
        return square, Fit("squash", width, height, (0.0, 0.0, float(width), float(height)))

    if preprocess.fit == "letterbox":
        scale = size / max(width, height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
        bars = tuple(min(255, max(0, round(mean))) for mean in preprocess.mean)
        square = Image.new("RGB", (size, size), bars)
        square.paste(image.resize(inner, resample, box, _REDUCING_GAP), (left, top))
        left, top = -left, -top
    else:
        # torchvision's roundings: the long side down, the offsets to the nearest (half to even)
        short, long = min(width, height), max(width, height)
        edge = preprocess.resize or size
        inner = (edge, int(edge * long / short)) if width <= height else (int(edge * long / short), edge)
        left, top = round((inner[0] - size) / 2), round((inner[1] - size) / 2)
        if long <= _LONGEST * short:
            resized = image.resize(inner, resample, box)
            square = resized.crop((left, top, left + size, top + size))
        else:  # resizing all of a thin strip to cut a square from it can take gigabytes
            x, y = (box[2] - box[0]) / inner[0], (box[3] - box[1]) / inner[1]
            window = (
                box[0] + left * x,
                box[1] + top * y,
                min(box[0] + (left + size) * x, image.width),
                min(box[1] + (top + size) * y, image.height),
            )
            square = image.resize((size, size), resample, window)
    x, y = width / inner[0], height / inner[1]
    return square, Fit(
        preprocess.fit, width, height, (left * x, top * y, (left + size) * x, (top + size) * y)
    )


_LONGEST = 8
"""Aspect ratio above which ``crop`` resizes only what it shows; equal to the rest within a grey level."""

_REDUCING_GAP = 3.0
"""Averaging whole pixels down to 3 times the final size first is much faster and differs invisibly."""


# Decoding: from whatever was given to an RGB image as a person sees it.


class _Decoded(NamedTuple):
    image: Image.Image
    """RGB, perhaps decoded at a reduced size."""
    width: int
    height: int
    """Of the photo, as a person sees it."""
    box: tuple[float, float, float, float]
    """Where the photo lies in ``image``: a reduced JPEG has a partial last column and row."""


def _decode(
    source: ImageSource, shrinkage: Callable[[int, int], float] | None, held: contextlib.ExitStack
) -> _Decoded:
    """Decode ``source``.

    Args:
        source: see `open_image`.
        shrinkage: maps width and height to the factor the picture is reduced by afterwards.
        held: takes the lock under which a large picture is decoded; to be closed when it is needed no more.
    """
    name = _name(source)
    if isinstance(source, np.ndarray):
        return _whole(_from_array(source, name))
    with contextlib.ExitStack() as stack:
        try:
            if isinstance(source, Image.Image):
                return _render(source, name, None, held)
            stream, suffix = _open_stream(source, name)
            stack.enter_context(stream)
            return _render(identify(stream, suffix, name), name, shrinkage, held)
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever the damage makes them stumble over
            raise explain(error, name) from error


def _whole(image: Image.Image) -> _Decoded:
    return _Decoded(image, *image.size, (0.0, 0.0, float(image.width), float(image.height)))


def _render(
    image: Image.Image,
    name: str,
    shrinkage: Callable[[int, int], float] | None,
    held: contextlib.ExitStack,
) -> _Decoded:
    """Decode an image that has been opened; turn it upright and into RGB."""
    width, height = image.size
    _check_size(width, height, name)
    if isinstance(image, ImageFile.ImageFile):
        _check_work(image, name)

    photo = None
    if shrinkage is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        most = min(shrinkage(width, height) / 2, width, height)
        factor = max((factor for factor in (2, 4, 8) if factor <= most), default=1)
        drafted = factor > 1 and image.draft(None, (width // factor, height // factor))
        photo = drafted[1][2:] if drafted else None  # in decoded pixels, with a fraction
    if image.width * image.height > MAX_PIXELS // 16:
        held.enter_context(_LARGE)
    image.load()
    if photo is None:
        photo = width, height = image.size  # a TIFF may have turned itself upright

    orientation = _orientation(image)
    spare = image.width - photo[0], image.height - photo[1]
    image = _to_rgb(image)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    if orientation >= 5:
        width, height, photo, spare = height, width, photo[::-1], spare[::-1]
    # the decoder's partial last column and row come to lie on the left and on top when they are turned over
    left = spare[0] if orientation in (2, 3, 6, 7) else 0
    top = spare[1] if orientation in (3, 4, 7, 8) else 0
    return _Decoded(image, width, height, (left, top, left + photo[0], top + photo[1]))


_LARGE = threading.RLock()
"""Held while a large picture is in memory: four threads with one each would take several gibibytes."""


def _fresh_lock() -> None:
    global _LARGE
    _LARGE = threading.RLock()


if hasattr(os, "register_at_fork"):  # a process that is forked meanwhile would wait for ever
    os.register_at_fork(after_in_child=_fresh_lock)


def _check_size(width: int, height: int, name: str) -> None:
    """Refuse a picture by what its header says."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(name, width, height)
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the picture has no pixels ({width} x {height}); give another picture")


def _check_work(image: ImageFile.ImageFile, name: str) -> None:
    """Refuse a picture that takes far longer to decode than its size tells."""
    unusual = ""
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.info.get("progressive"):
        scans = _scans(image.fp)
        if scans * (image.width // 8 + 1) * (image.height // 8 + 1) > _MOST_BLOCKS:
            unusual = f"a progressive JPEG of {scans} scans"
    elif len(image.tile) > _MOST_TILES:
        unusual = f"made of {len(image.tile)} parts"
    elif any(tile[0] == "bmp_rle" for tile in image.tile) and image.width * image.height > MAX_PIXELS // 16:
        unusual = "a run-length encoded BMP, which is read slowly"
    if unusual:
        raise ImageError(
            f"{name}: {image.width} x {image.height} pixels, and {unusual}; save it again as PNG or as an"
            " ordinary JPEG"
        )


_MOST_BLOCKS = 2**28
"""Blocks of 8 x 8 pixels times scans of a progressive JPEG; takes seconds. Usual are ten scans."""
_MOST_TILES = 2**17
"""Strips or tiles of a TIFF: each takes longer than its pixels."""


def _scans(stream: Any) -> int:
    """Count the scans of a JPEG; the marker cannot occur within compressed data."""
    stream.seek(0)
    count, last = 0, b""
    while block := stream.read(2**20):
        count += (last + block).count(b"\xff\xda")
        last = block[-1:]
    return count


# EXIF orientation to the transposition that undoes it; 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 when there is none or the EXIF data are damaged."""
    exif = image.info.get("exif")
    if not isinstance(image, ImageFile.ImageFile) or not isinstance(exif, bytes):
        try:  # the caller's own object, or a format that keeps EXIF elsewhere
            value = image.getexif().get(_ORIENTATION, 1)
        except Exception:
            return 1
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    # Read by hand because Pillow's reader warns about damage, and takes longer than decoding a small photo.
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == _ORIENTATION and kind in _EXIF_TYPES:
                (value,) = struct.unpack_from(order + _EXIF_TYPES[kind], exif, entry + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


_ORIENTATION = 0x0112
_EXIF_TYPES = {1: "B", 3: "H", 4: "I"}


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB by what it means, not by clipping; may return ``image``."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return Image.fromarray(_grey_to_8_bits(np.asarray(image))).convert("RGB")
    if mode in ("CMYK", "LAB"):
        return _by_profile(image)
    if mode == "La":
        image = image.convert("LA")
    if mode in ("RGBa", "La") or image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() != (255, 255):
            paper = Image.new("RGB", image.size, "white")
            paper.paste(image, mask=alpha)
            return paper
    return image if mode == "RGB" and image.mode == "RGB" else image.convert("RGB")


def _by_profile(image: Image.Image) -> Image.Image:
    """Convert CMYK by its embedded ICC profile, or by the plain formula without a usable one; and CIELAB."""
    from PIL import ImageCms

    try:
        profile: Any = io.BytesIO(image.info["icc_profile"])
        if image.mode == "LAB":
            profile = ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(
            image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except Exception:
        converted = None
    return converted or image.convert("RGB")


def _grey_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale ``(H, W)`` greys of any range to uint8: 16 bits as they are, other ranges by their extremes."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return _from_16_bits(values)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no pixel is a number")
    known = values if finite.all() else values[finite]
    low, high = float(known.min()), float(known.max())
    if values.dtype.kind == "i" and low >= 0 and high <= 65535:
        return _from_16_bits(values)  # Pillow before 11.0 opens 16-bit PNGs as 32-bit integers
    if values.dtype.kind == "f" and low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    span = (high - low) or 1.0
    greys = np.empty(values.shape, np.uint8)
    for rows in _bands(values):  # in float64, which would take eight times the picture's memory at once
        scaled = (np.where(finite[rows], values[rows], low).astype(np.float64) - low) * (255 / span)
        greys[rows] = np.rint(scaled)
    return greys


def _bands(values: np.ndarray) -> Iterator[slice]:
    """Cut rows into bands of about a million pixels."""
    step = max(1, 2**20 // max(1, values.shape[1]))
    for top in range(0, values.shape[0], step):
        yield slice(top, top + step)


@functools.cache
def _table_16_to_8() -> np.ndarray:
    return ((np.arange(65536) + 128) // 257).astype(np.uint8)


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    """Map 0..65535 to the nearest of 0..255."""
    greys, table = np.empty(values.shape, np.uint8), _table_16_to_8()
    for rows in _bands(values):
        greys[rows] = table[values[rows]]
    return greys


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """Convert an array as `open_image` describes it to an RGB image."""
    shape = " x ".join(map(str, array.shape))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        hint = "give (H, W), (H, W, 3) or (H, W, 4)"
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "channels come last: use array.transpose(1, 2, 0)"
        elif array.ndim == 4:
            hint = "give one picture at a time"
        raise ImageError(f"{name}: its shape ({shape}) is not that of a picture; {hint}")
    if array.size == 0:
        raise ImageError(f"{name}: the picture has no pixels ({shape}); give another picture")
    _check_size(array.shape[1], array.shape[0], name)

    if array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint8:
        pixels = array
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        pixels = _from_16_bits(array)
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ImageError(f"{name}: it holds NaN or infinity; use numpy.nan_to_num first")
        if low < -_TOLERANCE or high > 1 + _TOLERANCE:
            raise ImageError(
                f"{name}: floats must be from 0 to 1 and run from {low:.4g} to {high:.4g};"
                " scale them, or give uint8 from 0 to 255"
            )
        pixels = np.rint(np.clip(array, 0, 1).astype(np.float32) * 255).astype(np.uint8)
    else:
        raise ImageError(
            f"{name}: its type is {array.dtype}; give uint8 (0 to 255), uint16, bool or float (0 to 1)"
        )
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return _to_rgb(image)


_TOLERANCE = 1e-3
"""How far floats may leave 0 to 1, as arithmetic on pixels makes them."""


# Finding the decoder: by content, not by suffix.

_DECODERS = {
    "png": ("PIL.PngImagePlugin", "PngImageFile"),
    "gif": ("PIL.GifImagePlugin", "GifImageFile"),
    "webp": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "bmp": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "ppm": ("PIL.PpmImagePlugin", "PpmImageFile"),
    "jpeg 2000": ("PIL.Jpeg2KImagePlugin", "Jpeg2KImageFile"),
    "avif": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "heif": ("pillow_heif", "HeifImageFile"),
}
_HEAD = 1024
"""Bytes at the beginning by which a kind is recognised."""


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """The first picture of a JPEG or MPO file."""

    def getexif(self) -> Image.Exif:
        """Return nothing: Pillow would read it for the resolution, slowly, and warn about damage."""
        return Image.Exif()


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF without Pillow's process-wide pixel limit; `MAX_PIXELS` has been checked."""

    def load_prepare(self) -> None:
        if Image.MAX_IMAGE_PIXELS is not None and self.width * self.height > Image.MAX_IMAGE_PIXELS:
            self.im = Image.new(self.mode, getattr(self, "_tile_size", self.size)).im
            ImageFile.ImageFile.load_prepare(self)
        else:
            super().load_prepare()


def identify(stream: IO[bytes], suffix: str, name: str) -> Image.Image:
    """Open an encoded picture without decoding its pixels."""
    head = stream.read(_HEAD)
    if not head:
        raise ImageError(f"{name}: the file is empty; copy or download it again")
    stream.seek(0)
    kind = kind_of(head)
    if kind is None or (suffix in RAW_SUFFIXES and kind == "tiff"):  # a raw file's first page is a thumbnail
        raise not_a_picture(head, suffix, name)
    if kind not in _READ_IN_PARTS and stream.seek(0, os.SEEK_END) > MAX_BYTES:
        raise ImageError(
            f"{name}: the file has more than the {MAX_BYTES / 1e6:.0f} million bytes allowed; make it smaller"
        )
    stream.seek(0)
    if kind in _READ_BYTEWISE:
        stream = cast("IO[bytes]", _Patient(stream))
    if kind == "jpeg":
        return _Jpeg(stream)
    if kind == "tiff":
        _check_tiff(stream, name)
        _quiet_libtiff()
        return _Tiff(stream)
    if kind == "gif":
        _check_gif(stream, name)
    module, decoder = _DECODERS[kind]
    try:
        plugin = importlib.import_module(module)
        if not getattr(plugin, "SUPPORTED", True):
            raise ImportError(f"Pillow was built without {kind}")
    except ImportError as error:
        if kind == "heif":
            raise ImageError(
                f'{name}: HEIC pictures need one more package; pip install "captioner[heif]"'
            ) from error
        hint = "pip install --upgrade pillow, or save the picture as JPEG or PNG"
        raise ImageError(f"{name}: this Pillow cannot read {kind.upper()} pictures; {hint}") from error
    try:
        image: Image.Image = getattr(plugin, decoder)(stream)
    except Exception as error:
        # libwebp does not say that the end is missing, but the header tells the length
        if kind == "webp" and int.from_bytes(head[4:8], "little") + 8 > stream.seek(0, os.SEEK_END):
            raise _truncated(name) from error
        raise
    return image


_READ_IN_PARTS = frozenset(("tiff", "bmp", "ppm"))
_READ_BYTEWISE = frozenset(("jpeg", "png", "ppm"))


class _Patient:
    """A file that is read in at most half a million calls: headers can be made of countless tiny parts."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._left = 2**19

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError("it has too many parts")
        return self._stream.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@functools.cache
def _quiet_libtiff() -> None:
    """Let libtiff not write of damage to standard error; Pillow says it in its error."""
    import ctypes

    with contextlib.suppress(Exception):  # built otherwise: then it writes
        package = Path(Image.__file__).parent
        for place in (package.parent / "pillow.libs", package / ".dylibs"):
            for library in place.glob("libtiff*"):
                ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)


def _check_tiff(stream: IO[bytes], name: str) -> None:
    """Refuse a TIFF whose tags take more than the file: Pillow reads each of them, though they overlap."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(16)
    order = "<" if head[:1] == b"I" else ">"
    big = b"+" in head[2:4]
    place, fields = (order + "Q", order + "HHQQ") if big else (order + "I", order + "HHII")
    total = 0
    try:
        stream.seek(struct.unpack_from(place, head, 8 if big else 4)[0])
        (count,) = struct.unpack(order + ("Q" if big else "H"), stream.read(8 if big else 2))
        entries = stream.read(min(count, 2**16) * struct.calcsize(fields))
        for at in range(0, len(entries) - struct.calcsize(fields) + 1, struct.calcsize(fields)):
            _, kind, values, offset = struct.unpack_from(fields, entries, at)
            taken = values * _TIFF_BYTES.get(kind, 0)
            if taken > (8 if big else 4):
                total += min(taken, max(0, size - offset))
            if kind not in _TIFF_RAW and values > 2**22 and taken <= size:
                raise ImageError(
                    f"{name}: the picture is damaged: one of its tags holds {values} numbers;"
                    " save it again as PNG"
                )
    except (struct.error, OverflowError, OSError):  # Pillow says what is wrong
        total = 0
    if total > min(max(size, 2**16), MAX_BYTES // 2):
        raise ImageError(
            f"{name}: the picture is damaged: its tags take more bytes than the file; save it again as PNG"
        )
    stream.seek(0)


_TIFF_BYTES = dict(zip(range(1, 19), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8), strict=True))
"""How long a value of each type is."""
_TIFF_RAW = frozenset((1, 2, 6, 7))
"""Types that are not taken apart into numbers."""


def _check_gif(stream: IO[bytes], name: str) -> None:
    """Refuse a GIF with a comment so long that Pillow, which joins it block by block, takes minutes."""
    head = stream.read(13)
    colours = head[10] if len(head) > 10 else 0
    stream.seek(13 + (3 << (colours & 7) + 1 if colours & 0x80 else 0))
    comments = 0

    def skip() -> int:
        taken = 0
        while (length := stream.read(1)) and length[0]:
            taken += length[0]
            stream.seek(length[0], os.SEEK_CUR)
        return taken

    while mark := stream.read(1):
        if mark == b"!":
            label = stream.read(1)
            taken = skip()
            comments += taken if label == b"\xfe" else 0
            if comments > 2**20:
                raise ImageError(
                    f"{name}: the picture is of an unusual kind: a comment of more than a million bytes is"
                    " in it; save it again without"
                )
        elif mark == b",":
            part = stream.read(9)
            flags = part[8] if len(part) > 8 else 0
            stream.seek((3 << (flags & 7) + 1 if flags & 0x80 else 0) + 1, os.SEEK_CUR)
            skip()
        elif mark == b";":
            break
    stream.seek(0)


def _open_stream(source: Any, name: str) -> tuple[IO[bytes], str]:
    """Return a seekable binary stream at its beginning, and the lower-case suffix of a path."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), ""
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        return open_file(path, name), os.path.splitext(path)[1].lower()
    if not hasattr(source, "read"):
        raise ImageError(
            f"{name}: this is no picture; give a path, bytes, a file object, a PIL image or a NumPy array"
        )
    with contextlib.suppress(AttributeError, OSError):  # pipes and network responses cannot seek
        source.seek(0)
    data = source.read()
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: the file object gives text; open it in binary mode, open(path, 'rb')")
    return io.BytesIO(data), ""


# Errors.


def _name(source: object) -> str:
    """Return what to call a source in a message: one line that any terminal can print."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "the given bytes"
    if isinstance(source, np.ndarray):
        return "the given array"
    if isinstance(source, (str, os.PathLike)):
        return name_of(source)
    elif isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "the given image"
    elif hasattr(source, "read"):
        name = getattr(source, "name", "")
        name = name if isinstance(name, str) and name else "the given file"
    else:
        name = f"the given {type(source).__name__}"
    return printable(str(name))


def explain(error: Exception, name: str) -> ImageError:
    """Turn whatever a decoder raised into the line for the user; a mistake of our own stays what it is."""
    if isinstance(error, NameError):
        raise error
    if isinstance(error, MemoryError):
        return ImageError(f"{name}: not enough memory to decode it; make the picture smaller")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"{name}: the picture is too large; make it smaller")
    detail = " ".join(str(error).split())
    cut = (EOFError, IndexError, struct.error)
    if isinstance(error, cut) or isinstance(error.__cause__, cut) or _CUT.search(detail):
        return _truncated(name)
    if isinstance(error, OSError) and error.errno:
        return unreadable(error, name)
    detail = f" ({detail})" if detail else ""
    hint = "save it again as PNG or JPEG with another program"
    return ImageError(f"{name}: the picture is damaged or of an unusual kind{detail}; {hint}")


_CUT = re.compile(
    r"truncat|unexpected end|end of file|\beof\b|premature|but only got|insufficient input|cannot read full",
    re.IGNORECASE,
)
"""How Pillow's decoders and libheif say that the end of a file is missing."""


def _truncated(name: str) -> ImageError:
    return ImageError(f"{name}: the file is truncated; copy or download it again")


def _too_large(name: str, width: int, height: int, most: int | None = None) -> ImageError:
    most = MAX_PIXELS if most is None else most
    if width * height <= most:
        return ImageError(
            f"{name}: {width} x {height} has a side of more than {MAX_SIDE} pixels; cut it in parts"
        )
    return ImageError(
        f"{name}: {width} x {height} is more than the {most / 1e6:.0f} million pixels allowed;"
        " make the picture smaller"
    )
