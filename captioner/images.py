"""Decode and normalise pictures: EXIF, modes, bombs, truncation; fit them into the network's square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
