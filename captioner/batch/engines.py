"""What captions sources: this process, one for each of several devices, or a Ray cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

from captioner.batch.run import Engine, Finished
from captioner.batch.sources import Source

if TYPE_CHECKING:
    from captioner.captioner import Captioner


def identity_of(
    fingerprint: str | None, options: Mapping[str, Any], clips: Mapping[str, Any], precision: str = "float32"
) -> str:
    """Name all that a caption depends on: the model, by its fingerprint, and what is asked of it.

    Options that are as they would be if they were left out do not count.
    """
    usual = {"n_best": 1, "seed": 0, "precision": "float32"}
    asked = {**options, **clips, "precision": precision}
    if not asked.get("sample"):
        asked.pop("seed", None)
    left_out: tuple[Any, ...] = (None, "", [], ())
    # 0 is a choice and not False, to which it is equal
    named = {k: v for k, v in asked.items() if v not in left_out and v is not False and usual.get(k) != v}
    return f"{fingerprint} {json.dumps(named, sort_keys=True, default=str)}"


class Seeds:
    """Seeds that a file keeps, wherever in a list it stands."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, path: str) -> int:
        """Return the seed of a file."""
        return self.seed + crc32(os.fsencode(path))


def local_engine(captioner: Captioner, **options: Any) -> Engine:
    """Return what captions on this machine; options are those of `captioner.batch.caption_media`."""
    from captioner.batch.media import caption_media, to_record

    def engine(sources: Iterator[Source]) -> Iterator[Finished]:
        for result in caption_media(captioner, sources, **options):
            record = to_record(result, captioner.header.name, captioner.fingerprint)
            yield Finished(record, *(result.looked or (None, None)))

    return engine


def ray_engine(**options: Any) -> Engine:
    """Return what captions on a cluster; options are those of `captioner.batch.on_ray.caption_on_ray`."""
    from captioner.batch.on_ray import caption_on_ray

    return _elsewhere(partial(caption_on_ray, **options))


def devices_engine(devices: Sequence[str], **options: Any) -> Engine:
    """Return what captions on several devices, see `captioner.batch.on_devices.caption_on_devices`."""
    from captioner.batch.on_devices import caption_on_devices

    return _elsewhere(partial(caption_on_devices, devices=devices, **options))


def _elsewhere(caption: Callable[[Iterator[Source]], Iterator[dict[str, Any]]]) -> Engine:
    """Return an engine of what yields records in which ``looked`` is what was looked at closely."""

    def engine(sources: Iterator[Source]) -> Iterator[Finished]:
        for record in caption(sources):
            looked = record.pop("looked", None)
            yield Finished(record, *(looked or (None, None)))

    return engine


def look_closely(
    pixels: Any, fit: Any, caption: Any, frame: int | None = None, first_word: int = 0
) -> tuple[bytes, bytes | None]:
    """Return what the report shows of a photo or a video's frame, and a photo's perceptual hash."""
    from captioner.batch.alike import perceptual_hash
    from captioner.batch.page import preview

    shown = preview(pixels, fit, caption, frame or 0, first_word)
    return shown, perceptual_hash(pixels, fit) if frame is None else None
