"""captioner: image captioning that shows where it looks."""

from captioner._version import __version__

__all__ = ["__version__"]
