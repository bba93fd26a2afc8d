"""Generate a caption for every picture of a data set, once each, and score them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from captioner.batch import ahead
from captioner.captioner import Captioner
from captioner.checkpoint import write_atomically
from captioner.encoder import GridFeatures, encode
from captioner.model import CaptionModel
from captioner.search import SearchOptions, search
from captioner.tokenizer import detokenize
from captioner_training.config import SourceConfig, load_config
from captioner_training.data import DataError, DataSet, chunks, load_data_set
from captioner_training.features import FeatureCache, load_pixels
from captioner_training.metrics import Scores, score

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


def evaluate(
    captioner: Captioner,
    data: Path,
    *,
    images: Sequence[Path] = (),
    highest: int = 0,
    config: Path | None = None,
    fit: str | None = None,
    save_results: Path | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Scores]:
    """Caption data sets with a loaded captioner and score them by the official metrics.

    Args:
        captioner: the model.
        data: captions in COCO's format; with ``config`` the folder that its paths are relative to.
        images: folders and tars of the pictures; the folder of ``data``, its folder ``images`` and its tar
            files if empty.
        highest: only so many pictures, those with the highest ids.
        config: evaluate on the validation sets of this training config.
        fit: another way to fit pictures into the square.
        save_results: write the captions here, in COCO's results format.
        options: of the search, by name.

    Raises:
        DataError, ScoreError, ConfigError: for data that cannot be used.
    """
    if config is not None:
        settings = load_config(config)
        sets = {name: load_data_set(name, c, data) for name, c in settings.data.validation.items()}
    else:
        places = [str(path.absolute()) for path in images] or _places(data)
        source = SourceConfig(annotations=data.name, images=places, only_highest=highest)
        sets = {data.stem: load_data_set(data.stem, source, data.absolute().parent)}
    if save_results is not None and len(sets) > 1:
        raise DataError("--save-results needs one data set; give it with --data and not --config")
    if fit is not None:
        preprocess = captioner.model.encoder.preprocess
        resize = None if fit != "crop" else preprocess.resize
        captioner.model.encoder.preprocess = replace(preprocess, fit=fit, resize=resize)
    search_options = captioner.options(**(options or {}))
    scores = {}
    for name, data_set in sets.items():
        captions = generate(captioner.model, data_set, search_options, progress=True)
        if save_results is not None:
            results = [{"image_id": i, "caption": c} for i, c in captions.items()]
            write_atomically(save_results, json.dumps(results, ensure_ascii=False).encode())
        scores[name] = score(captions, data_set.references())
    return scores


def _places(data: Path) -> list[str]:
    """Return where pictures may be when nobody says: beside the captions."""
    folder = data.absolute().parent
    return [str(p) for p in (folder, folder / "images") if p.is_dir()] + [
        str(p) for p in sorted(folder.glob("*.tar"))
    ]
