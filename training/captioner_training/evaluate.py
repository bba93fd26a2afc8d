"""Generate a caption for every picture of a data set, once each, and score them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from tqdm import tqdm

from captioner.encoder import GridFeatures, encode
from captioner.model import CaptionModel
from captioner.search import SearchOptions, search
from captioner.tokenizer import detokenize
from captioner_training.data import DataSet, chunks
from captioner_training.features import FeatureCache, ahead, load_pixels

_BATCH = 32


def generate(
    model: CaptionModel,
    data: DataSet,
    options: SearchOptions,
    *,
    cache: FeatureCache | None = None,
    progress: bool = False,
) -> dict[int | str, str]:
    """Return one caption for each picture id; every picture is decoded and encoded once.

    Args:
        model: in evaluation mode.
        data: the pictures.
        options: of the search.
        cache: features of these pictures under the model's encoder; without it they are computed.
        progress: show a bar.
    """
    batches = list(chunks(range(len(data)), _BATCH))
    encoder = copy.deepcopy(model.encoder).eval().optimise() if cache is None else model.encoder

    def features(batch: Sequence[int]) -> GridFeatures:
        if cache is not None:
            return cache.grid_features(batch)
        with torch.inference_mode():
            return encode(encoder, *load_pixels(data, batch, encoder))

    captions: dict[int | str, str] = {}
    threads = torch.get_num_threads()
    computed = ahead(features, batches, threads, initializer=lambda: torch.set_num_threads(1))
    try:
        for batch, grid in zip(
            batches, tqdm(computed, total=len(batches), desc=data.name, disable=not progress), strict=True
        ):
            with torch.inference_mode():
                found = search(model.decoder, model.memory(grid.to(model.device)), options)
            for index, hypotheses in zip(batch, found, strict=True):
                captions[data.pictures[index].id] = detokenize(model.tokenizer, hypotheses[0].tokens)
    finally:
        torch.set_num_threads(threads)
    return captions
