"""What a request may ask for, checked before any pixel is decoded; every refusal is one line."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.images import identify
from captioner.inputs import ImageError

MAX_BEAM = 10
MAX_CAPTIONS = 10
MAX_LENGTH_PENALTY = 3.0
MAX_BEGINNING = 300
"""Characters of the words that a caption may be made to begin with."""


class LimitError(ValueError):
    """A request beyond what this server allows; one line that says what is allowed."""


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        megapixels: of a photo, in millions of pixels.
        mb: of an uploaded file, in millions of bytes.
        seconds: of a video that are read.
        files: in one batch of photos.
    """

    megapixels: float = 50.0
    mb: float = 50.0
    seconds: float = 300.0
    files: int = 500

    def __post_init__(self) -> None:
        for name in ("megapixels", "mb", "seconds", "files"):
            if not getattr(self, name) > 0:
                raise LimitError(f"the limit on {name} must be above 0, not {getattr(self, name)}")

    @property
    def bytes(self) -> int:
        """`mb` in bytes."""
        return int(self.mb * 1e6)


def read_photo(path: str | os.PathLike[str], limits: Limits, name: str | None = None) -> bytes:
    """Return the bytes of a photo file whose size and kind are allowed; its pixels are not decoded.

    Args:
        path: of the file.
        limits: of this server.
        name: what to call it in messages; by default the file's name.

    Raises:
        LimitError: too many bytes or pixels.
        ImageError: not a photo, or not readable.
    """
    name = name or Path(path).name
    try:
        with open(path, "rb") as file:
            data = file.read(limits.bytes + 1)
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror})") from None
    if len(data) > limits.bytes:
        raise LimitError(f"{name} is larger than the {limits.mb:g} MB that are allowed here")
    width, height = pixel_size(data, name)
    if width * height > limits.megapixels * 1e6:
        raise LimitError(
            f"{name} has {width * height / 1e6:.1f} megapixels; "
            f"at most {limits.megapixels:g} are allowed here"
        )
    return data


def pixel_size(data: bytes, name: str) -> tuple[int, int]:
    """Return the stored width and height of an encoded picture without decoding it.

    Raises:
        ImageError: not a picture.
    """
    try:
        with identify(io.BytesIO(data), Path(name).suffix.lower(), name) as image:
            return image.size
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the damage makes them stumble over
        raise ImageError(f"{name}: the picture is damaged ({error}); give another file") from None


def search_options(beam: Any = None, length_penalty: Any = None, n_best: Any = None) -> dict[str, Any]:
    """Return options for `Captioner.caption` from what a slider or an API call gave; None leaves one out.

    Raises:
        LimitError: a value that is not a number, or beyond what is allowed.
    """
    options: dict[str, Any] = {}
    for key, value, most in (("beam", beam, MAX_BEAM), ("n_best", n_best, MAX_CAPTIONS)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
            raise LimitError(f"{key} must be a whole number, not {value!r}")
        if not 1 <= value <= most:
            raise LimitError(f"{key} must be from 1 to {most}, not {value:g}")
        options[key] = int(value)
    if length_penalty is not None:
        if isinstance(length_penalty, bool) or not isinstance(length_penalty, (int, float)):
            raise LimitError(f"length_penalty must be a number, not {length_penalty!r}")
        if not 0 <= length_penalty <= MAX_LENGTH_PENALTY:
            raise LimitError(
                f"length_penalty must be from 0 to {MAX_LENGTH_PENALTY:g}, not {length_penalty:g}"
            )
        options["length_penalty"] = float(length_penalty)
    if options.get("n_best", 1) > options.get("beam", MAX_CAPTIONS):
        options["beam"] = options["n_best"]
    return options


def beginning(words: Any) -> str:
    """Return the words that a caption is to begin with, checked.

    Raises:
        LimitError: not text, or too long.
    """
    if words is None:
        return ""
    if not isinstance(words, str):
        raise LimitError("the beginning of a caption must be text")
    words = " ".join(words.split())
    if len(words) > MAX_BEGINNING:
        raise LimitError(f"the beginning of a caption may have {MAX_BEGINNING} characters, not {len(words)}")
    return words
