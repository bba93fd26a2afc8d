"""captioner: image captioning that shows where it looks.

>>> from captioner import Captioner
>>> captioner = Captioner.load()
>>> caption = captioner.caption("photo.jpg")  # doctest: +SKIP
"""

from captioner._version import __version__
from captioner.caption import Alternative, Caption, Word
from captioner.captioner import Captioner
from captioner.checkpoint import CheckpointError
from captioner.encoder import EncoderError, GridFeatures
from captioner.images import ImageError

__all__ = [
    "Alternative",
    "Caption",
    "Captioner",
    "CheckpointError",
    "EncoderError",
    "GridFeatures",
    "ImageError",
    "Word",
    "__version__",
]
