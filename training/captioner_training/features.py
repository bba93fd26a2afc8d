"""Pixels and cached features: what the encoder sees, and what it gave, kept as 16-bit memory maps."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from captioner.batch import ahead
from captioner.checkpoint import write_atomically
from captioner.encoder import Encoder, GridFeatures, compute, fuse, photo_mask
from captioner.images import Fit, ImageError, Preprocess, load
from captioner_training.data import DataError, DataSet, chunks

_BATCH = 16
_SAVE_EVERY = 20


def load_pixels(data: DataSet, indices: Sequence[int], encoder: Encoder) -> tuple[Tensor, list[Fit]]:
    """Return uint8 pixels ``(N, 3, S, S)`` of the given pictures, and how each was fitted.

    Raises:
        DataError: if a picture cannot be read, naming it.
    """
    arrays, fits = [], []
    for index in indices:
        picture = data.pictures[index]
        try:
            pixels, fit = load(data.store.read(picture.file), encoder.preprocess)
        except ImageError as error:
            raise DataError(f"{data.name}: {picture.file}: {error}") from None
        arrays.append(pixels)
        fits.append(fit)
    return torch.from_numpy(np.stack(arrays)), fits


def fingerprint(network: nn.Module, preprocess: Preprocess) -> str:
    """Return a hash of weights and preprocessing; a change makes a cache stale."""
    digest = hashlib.sha256(json.dumps(preprocess.to_dict(), sort_keys=True).encode())
    for tensor in network.state_dict().values():
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


class FeatureCache:
    """What an encoder's frozen blocks give for a data set: ``(variants, N, R, D)`` 16-bit, one memory map.

    Variant 0 is the picture as it is, variant 1 is mirrored. Building is resumable: the number of
    finished pictures is written beside the map every few batches.
    """

    def __init__(
        self, folder: Path, data: DataSet, encoder: Encoder, flips: bool, blocks: int | None = None
    ) -> None:
        """Prepare a cache; `build` fills it.

        Args:
            folder: where it is kept.
            data: the pictures.
            encoder: a hash of its weights and preprocessing names the cache, so that no stale one is used.
            flips: keep the mirrored pictures too.
            blocks: keep what the first blocks of the network give; None for all: the grid features.
        """
        self.data = data
        self.encoder = encoder
        frozen = encoder.network[:blocks]
        self.network = fuse(copy.deepcopy(frozen)).eval().to(memory_format=torch.channels_last)
        self.variants = 2 if flips else 1
        key = hashlib.sha256()
        key.update(f"{fingerprint(frozen, encoder.preprocess)} {self.variants}".encode())
        if blocks is not None:
            key.update(f" {blocks}".encode())
        for picture in data.pictures:
            key.update(f"{picture.id} {picture.file}\n".encode())
        self._stem = folder / f"{data.name}-{key.hexdigest()[:16]}"
        self._progress = self._stem.with_suffix(".json")
        size = encoder.preprocess.size
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            blank = torch.zeros(1, 3, size, size, device=device)
            width, rows, columns = (int(n) for n in self.network(blank).shape[1:])
        self.shape = (self.variants, len(data), rows * columns, width)
        self.map_shape = (width, rows, columns)
        self._map: np.ndarray | None = None
        self.fits: list[Fit] = []

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * 2

    def build(self) -> FeatureCache:
        """Compute what is not there yet."""
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        done = 0
        if self._progress.exists():
            state = json.loads(self._progress.read_text())
            done = state["done"]
            self.fits = [Fit(f[0], f[1], f[2], tuple(f[3])) for f in state["fits"]]
        file = self._stem.with_suffix(".f16")
        mode: Literal["r+", "w+"] = "r+" if done and file.exists() else "w+"
        if mode == "w+":
            done, self.fits = 0, []
        array = np.memmap(str(file), np.float16, mode, shape=self.shape)
        if done < len(self.data):
            self._compute(array, done)
        self._map = np.memmap(str(file), np.float16, "r", shape=self.shape)
        return self

    def _compute(self, array: np.memmap, done: int) -> None:
        def work(batch: Sequence[int]) -> tuple[list[np.ndarray], list[Fit]]:
            pixels, fits = load_pixels(self.data, batch, self.encoder)
            views = [pixels] if self.variants == 1 else [pixels, pixels.flip(-1)]
            with torch.inference_mode():
                given = [compute(self.network, view, self.encoder.preprocess) for view in views]
                return [features.half().cpu().numpy() for features in given], fits

        batches = list(chunks(range(done, len(self.data)), _BATCH))
        bar = tqdm(total=len(self.data), initial=done, desc=f"features of {self.data.name}", unit="picture")
        # a thread for each core and one core for each thread: small convolutions scale better so than
        # with all cores on one convolution, above all on a busy machine
        threads = torch.get_num_threads()
        try:
            with bar:
                computed = ahead(work, batches, threads, initializer=lambda: torch.set_num_threads(1))
                for count, (batch, (views, fits)) in enumerate(zip(batches, computed, strict=True), 1):
                    where = slice(batch[0], batch[-1] + 1)
                    for variant, features in enumerate(views):
                        array[variant, where] = features
                    self.fits += fits
                    bar.update(len(batch))
                    if count % _SAVE_EVERY == 0 or count == len(batches):
                        self._save_progress(array, where.stop)
        finally:
            torch.set_num_threads(threads)

    def _save_progress(self, array: np.memmap, done: int) -> None:
        array.flush()
        state = {"done": done, "fits": [[f.mode, f.width, f.height, f.box] for f in self.fits]}
        write_atomically(self._progress, json.dumps(state).encode())

    def read(self, indices: Sequence[int], variants: Sequence[int]) -> Tensor:
        """Return ``(N, R, D)`` as float32, one variant for each picture; R cells of the last cached block."""
        assert self._map is not None, "build() comes first"
        return torch.from_numpy(self._map[list(variants), list(indices)].astype(np.float32))

    def mask(self, indices: Sequence[int]) -> Tensor:
        """Return ``(N, R)``: the share of each cell that lies on the photo."""
        return torch.tensor([photo_mask(self.encoder.grid, self.fits[i]) for i in indices])

    def grid_features(self, indices: Sequence[int]) -> GridFeatures:
        """Return the grid features of whole, unmirrored pictures, as ``encode`` would."""
        data = self.read(indices, [0] * len(indices))
        return GridFeatures(
            data=data[:, None],
            mask=self.mask(indices)[:, None],
            grid=self.encoder.grid,
            times=torch.zeros(len(indices), 1),
            fits=tuple(self.fits[i] for i in indices),
        )
