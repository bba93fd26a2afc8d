"""captioner: image and video captioning that shows where it looks.

>>> from captioner import Captioner
>>> captioner = Captioner.load()
>>> caption = captioner.caption("photo.jpg")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captioner._version import __version__

if TYPE_CHECKING:
    from captioner.caption import Alternative, Caption, Segment, VideoCaption, Word
    from captioner.captioner import Captioner
    from captioner.checkpoint import CheckpointError
    from captioner.encoder import EncoderError, GridFeatures
    from captioner.inputs import ImageError
    from captioner.video import VideoError

__all__ = [
    "Alternative",
    "Caption",
    "Captioner",
    "CheckpointError",
    "EncoderError",
    "GridFeatures",
    "ImageError",
    "Segment",
    "VideoCaption",
    "VideoError",
    "Word",
    "__version__",
]

# imported when they are first used, because torch takes seconds and `captioner --help` should not
_HOMES = {
    "Alternative": "caption",
    "Caption": "caption",
    "Captioner": "captioner",
    "CheckpointError": "checkpoint",
    "EncoderError": "encoder",
    "GridFeatures": "encoder",
    "ImageError": "inputs",
    "Segment": "caption",
    "VideoCaption": "caption",
    "VideoError": "video",
    "Word": "caption",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
