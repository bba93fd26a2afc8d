"""The model behind the page: photos of several people in one batch, each looked at only once.

One thread alone runs the network. It takes whatever waits, at most `BATCH` requests, and waits for no more: a
single user loses nothing, and many share the work. What a photo gave is kept in a bounded cache, so that
another beam, beginning or region needs no second look.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from captioner import Caption, Captioner
from captioner.encoder import GridFeatures, concatenate
from captioner.images import Fit, load, open_image

BATCH = 8
"""Requests that are captioned together at most."""

DISPLAY = 1024
"""Pixels of the longer side of the photo that is sent back to the browser."""

CACHE_BYTES = 64_000_000
"""Features and display photos that are kept, together."""


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen of one photo.

    Attributes:
        key: of the file's content.
        features: ``(1, 1, R, D)``.
        display: the photo as people see it, a JPEG of at most `DISPLAY` pixels a side.
    """

    key: str
    features: GridFeatures
    display: bytes

    @property
    def fit(self) -> Fit:
        """The photo's size in pixels and what of it the grid covers."""
        return self.features.fits[0]

    @property
    def nbytes(self) -> int:
        """What keeping it costs."""
        return self.features.data.nbytes + self.features.mask.nbytes + len(self.display)


@dataclass(eq=False)
class _Job:
    """One request; either features or pixels are given."""

    features: GridFeatures | None
    pixels: tuple[np.ndarray, Fit] | None
    prefix: str = ""
    region: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    wants_caption: bool = True
    done: Future[tuple[GridFeatures, Caption | None]] = field(default_factory=Future)


class Engine:
    """One loaded captioner, shared by everybody. Safe to call from several threads."""

    def __init__(self, captioner: Captioner, *, batch: int = BATCH, cache_bytes: int = CACHE_BYTES) -> None:
        """Wrap a captioner.

        Args:
            captioner: the model.
            batch: requests that are captioned together at most.
            cache_bytes: of features and display photos that are kept.
        """
        self.captioner = captioner
        self.batch = batch
        self.encoded = 0
        """Photos that the network has looked at."""
        self.largest = 0
        """The most requests that were captioned together."""
        self._cache: OrderedDict[str, Look] = OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._waiting = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    # --- asking --------------------------------------------------------------------------------------

    def look(self, data: bytes) -> Look:
        """Look at a photo, or remember it.

        Raises:
            ImageError: if it cannot be read.
        """
        return self._see(data, None)[0]

    def caption_photo(
        self, data: bytes, *, prefix: str = "", region: Any = None, **options: Any
    ) -> tuple[Look, Caption]:
        """Look at a photo (or remember it) and caption it.

        Args:
            data: the encoded photo.
            prefix, region, options: as `Captioner.caption`.

        Raises:
            ImageError: if the photo cannot be read.
            ValueError: for impossible options or an empty region.
        """
        self.captioner.check(**options)
        return self._see(data, _Job(None, None, prefix, region, options))

    def caption(self, look: Look, *, prefix: str = "", region: Any = None, **options: Any) -> Caption:
        """Caption what has been looked at; the network does not look again.

        Raises:
            ValueError: for impossible options or an empty region.
        """
        self.captioner.check(**options)
        found = self._submit(_Job(look.features, None, prefix, region, options)).result()[1]
        assert found is not None
        return found

    def recall(self, key: str) -> Look | None:
        """Return what is remembered of a photo, or None."""
        with self._lock:
            look = self._cache.get(key)
            if look is not None:
                self._cache.move_to_end(key)
            return look

    def close(self) -> None:
        """Finish what is waiting and end the thread."""
        with self._lock:
            self._closed = True
            self._waiting.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    # --- at work -------------------------------------------------------------------------------------

    def _see(self, data: bytes, job: _Job | None) -> tuple[Look, Any]:
        key = hashlib.blake2b(data, digest_size=16).hexdigest()
        look = self.recall(key)
        wanted = job or _Job(None, None, wants_caption=False)
        if look is not None:
            if job is None:
                return look, None
            wanted.features = look.features
            return look, self._submit(wanted).result()[1]
        wanted.pixels = load(data, self.captioner.model.encoder.preprocess)
        answer = self._submit(wanted)
        display = display_photo(data)  # while the network is at work
        features, caption = answer.result()
        look = Look(key, features, display)
        self._remember(look)
        return look, caption

    def _remember(self, look: Look) -> None:
        with self._lock:
            old = self._cache.pop(look.key, None)
            self._cached += look.nbytes - (old.nbytes if old else 0)
            self._cache[look.key] = look
            while self._cached > self._cache_bytes and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes

    def _submit(self, job: _Job) -> Future[tuple[GridFeatures, Caption | None]]:
        with self._lock:
            if self._closed:
                raise RuntimeError("this engine has been closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="captioner-engine", daemon=True)
                self._thread.start()
            self._jobs.append(job)
            self._waiting.notify()
        return job.done

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._jobs and not self._closed:
                    self._waiting.wait()
                if not self._jobs:
                    return
                jobs = [self._jobs.popleft() for _ in range(min(self.batch, len(self._jobs)))]
            self.largest = max(self.largest, len(jobs))
            self._work(jobs)

    def _work(self, jobs: Sequence[_Job]) -> None:
        """Encode what is new together, then caption together what is asked for with the same options."""
        new = [job for job in jobs if job.features is None]
        if new:
            try:
                features = self.captioner.encode_pixels([job.pixels for job in new if job.pixels is not None])
            except Exception as error:  # the waiting threads raise it
                for job in new:
                    job.done.set_exception(error)
                jobs = [job for job in jobs if job.features is not None]
            else:
                self.encoded += len(new)
                for i, job in enumerate(new):
                    own = features[i]
                    # a slice would keep the whole batch alive in the cache
                    job.features = own.to(own.data.device) if len(new) == 1 else _copy(own)
        groups: dict[Any, list[_Job]] = {}
        for job in jobs:
            if job.wants_caption:
                groups.setdefault(tuple(sorted(job.options.items())), []).append(job)
            elif job.features is not None:
                job.done.set_result((job.features, None))
        for group in groups.values():
            self._caption(group)

    def _caption(self, group: list[_Job]) -> None:
        try:
            captions = self.captioner.caption_batch(
                concatenate([job.features for job in group if job.features is not None]),
                prefix=[job.prefix for job in group],
                regions=[job.region for job in group],
                seeds=[0] * len(group),
                **group[0].options,
            )
        except Exception as error:
            if len(group) > 1:  # one request that is wrong must not spoil the others
                for job in group:
                    self._caption([job])
                return
            group[0].done.set_exception(error)
            return
        for job, caption in zip(group, captions, strict=True):
            assert job.features is not None
            job.done.set_result((job.features, caption))


def _copy(features: GridFeatures) -> GridFeatures:
    from dataclasses import replace

    return replace(features, data=features.data.clone(), mask=features.mask.clone())


def display_photo(data: bytes, side: int = DISPLAY) -> bytes:
    """Return a photo as people see it, upright, as a JPEG of at most ``side`` pixels a side.

    Raises:
        ImageError: if it cannot be read.
    """
    image = open_image(data, draft_size=side // 2)
    image.thumbnail((side, side), reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
