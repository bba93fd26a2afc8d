"""Files in, records out: resumable, and one bad file never stops the run.

What is read: ``sources`` (files, lists, tables, archives, remote paths). How it is captioned: ``media``, in
order, with decoding beside the network. What has been done: ``journal``. What is written: ``tables``,
``sidecars``, ``metadata``. ``run`` puts them together.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.batch.media import (
        DEFAULT_BATCH,
        ClipResult,
        FileResult,
        caption_files,
        caption_media,
        find_files,
        to_record,
    )
    from captioner.batch.records import CaptionError, caption_records
    from captioner.batch.sources import LISTED

__all__ = [
    "DEFAULT_BATCH",
    "LISTED",
    "CaptionError",
    "ClipResult",
    "FileResult",
    "caption_files",
    "caption_media",
    "caption_records",
    "find_files",
    "to_record",
]

# imported when they are first used: to find that nothing is left to do takes no torch
_HOMES = {
    **dict.fromkeys(__all__, "media"),
    **{"CaptionError": "records", "LISTED": "sources", "caption_records": "records"},
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
