"""Generate a caption for every picture or clip of a data set, once each, and score them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captioner.calibration import content_share
from captioner.captioner import Captioner
from captioner.encoder import GridFeatures
from captioner.model import CaptionModel
from captioner.naming import write
from captioner.parallel import ahead
from captioner.search import SearchOptions
from captioner.tokenizer import detokenize, split_words
from captioner_training.calibrate import calibration_error, correlation
from captioner_training.clips import FRAMES, trained_frames
from captioner_training.config import SourceConfig, TrainingConfig, load_config
from captioner_training.data import DataError, DataSet, chunks, load_data_set
from captioner_training.features import FeatureCache, look_at
from captioner_training.metrics import Annotations, ScoreError, Scorer, load_annotations, spice_missing
from captioner_training.results import save_results as write_results
from captioner_training.scoring import Evaluation, assess, choose_published, training_captions

_BATCH = 32
_BATCH_FRAMES = 128


def generate(
    model: CaptionModel,
    data: DataSet,
    options: SearchOptions,
    *,
    cache: FeatureCache | None = None,
    frames: int = FRAMES,
    progress: bool = False,
) -> dict[int | str, str]:
    """Return one caption for each id; every picture or clip is decoded and encoded once.

    Args:
        model: in evaluation mode.
        data: the pictures or clips.
        options: of the search.
        cache: features of these pictures under the model's encoder; without it they are computed.
        frames: of a clip, at most; a cache has its own number.
        progress: show a bar.
    """
    encoder = copy.deepcopy(model.encoder).eval().optimise() if cache is None else model.encoder
    tokenizer = model.tokenizer
    continues = (
        None
        if tokenizer.kind == "word"
        else np.array([tokenizer.piece(i).startswith("##") for i in range(len(tokenizer))])
    )

    def features(batch: Sequence[int]) -> GridFeatures:
        if cache is not None:
            return cache.grid_features(batch)
        return look_at(data, batch, encoder, frames)

    captions: dict[int | str, str] = {}
    for batch, grid in _looked_at(data, features, frames, progress):
        with torch.inference_mode():
            found = write(model, grid.to(model.device), options, continues=continues)
        for index, hypotheses in zip(batch, found, strict=True):
            captions[data.pictures[index].id] = detokenize(tokenizer, hypotheses[0].tokens)
    return captions


@dataclass(frozen=True, eq=False)
class Generated:
    """What a captioner said of a data set, by picture id.

    Attributes:
        captions: one for each picture.
        confidences: how sure the captioner was of each, 0 to 1.
        shares: the share of each caption's content words that people's captions of the picture contain.
        seconds: for all pictures, from files to words.
    """

    captions: dict[int | str, str]
    confidences: dict[int | str, float]
    shares: dict[int | str, float]
    seconds: float

    def confidence(self, calibrated: bool) -> dict[str, Any]:
        """Return a record of how well the confidences are calibrated, ready for JSON."""
        told, right = np.array([*self.confidences.values()]), np.array([*self.shares.values()])
        return {
            "mean": float(told.mean()),
            "content_share": float(right.mean()),
            "error": calibration_error(told, right),
            "correlation": correlation(told, right),
            "calibrated": calibrated,
        }


def caption_data(
    captioner: Captioner,
    data: DataSet,
    options: Mapping[str, Any],
    *,
    frames: int | None = None,
    progress: bool = False,
) -> Generated:
    """Caption every picture or clip of a data set once, with confidences.

    Args:
        captioner: the captions are those of `captioner.Captioner.caption_batch`.
        data: the pictures or clips and people's captions of them.
        options: of the search, by name.
        frames: of a clip, at most; None for as many as the captioner was trained with.
        progress: show a bar.
    """
    encoder = captioner.model.encoder
    most = trained_frames(captioner.header) if frames is None else frames
    found = Generated({}, {}, {}, 0.0)
    start = time.perf_counter()
    for batch, grid in _looked_at(data, lambda b: look_at(data, b, encoder, most), most, progress):
        for index, caption in zip(batch, captioner.caption_batch(grid, **options), strict=True):
            picture = data.pictures[index]
            found.captions[picture.id] = caption.text
            found.confidences[picture.id] = caption.confidence
            found.shares[picture.id] = content_share(
                [word.text for word in caption.words], [split_words(text) for text in picture.captions]
            )
    return replace(found, seconds=time.perf_counter() - start)


def _looked_at(
    data: DataSet, features: Callable[[Sequence[int]], GridFeatures], frames: int, progress: bool
) -> Iterator[tuple[Sequence[int], GridFeatures]]:
    """Yield the pictures in batches with their features, which threads compute ahead."""
    size = max(1, min(_BATCH, _BATCH_FRAMES // frames)) if data.is_video else _BATCH
    batches = list(chunks(range(len(data)), size))

    def work(batch: Sequence[int]) -> GridFeatures:
        with torch.inference_mode():
            return features(batch)

    threads = torch.get_num_threads()
    computed = ahead(work, batches, threads, initializer=lambda: torch.set_num_threads(1))
    try:
        with tqdm(total=len(data), desc=data.name, unit=data.thing, disable=not progress) as bar:
            for batch, grid in zip(batches, computed, strict=True):
                yield batch, grid
                bar.update(len(batch))
    finally:
        torch.set_num_threads(threads)


def evaluate(
    captioner: Captioner,
    data: Path,
    *,
    images: Sequence[Path] = (),
    highest: int = 0,
    split: str = "val",
    config: Path | None = None,
    fit: str | None = None,
    save_results: Path | None = None,
    options: dict[str, Any] | None = None,
    spice: bool | None = None,
    training: Sequence[Path] = (),
    compare: str = "auto",
    progress: bool = True,
) -> dict[str, Evaluation]:
    """Caption data sets with a loaded captioner and score them by the official metrics.

    Args:
        captioner: the model.
        data: captions in COCO's format, or a folder that ``captioner prepare`` made; with ``config`` the
            folder that its paths are relative to.
        images: folders and tars of the pictures; if empty, those that ``data`` names, else the folder of
            ``data``, its folder ``images`` and its tar files.
        highest: only so many pictures, those with the highest ids.
        split: which file of a prepared folder: ``train``, ``val`` or ``test``.
        config: evaluate on the validation sets of this training config.
        fit: another way to fit pictures into the square.
        save_results: write the captions here, in COCO's results format.
        options: of the search, by name.
        spice: run SPICE too; None: if its models are there.
        training: files of the captions that the model was trained on, in COCO's format; if empty, the
            sources of ``config``, or what stands beside ``data`` in a prepared folder.
        compare: the data set whose published results to print, ``none``, or ``auto`` to guess it.
        progress: show a bar.

    Raises:
        DataError, ScoreError, ConfigError: for data that cannot be used.
    """
    settings, root, sources = data_sources(data, images=images, highest=highest, split=split, config=config)
    if save_results is not None:
        if len(sources) > 1:
            raise DataError("--save-results needs one data set; give it with --data and not --config")
        if not save_results.absolute().parent.is_dir():
            raise DataError(f"{save_results}: there is no folder {save_results.parent} to write it into")
        if save_results.is_dir():
            raise DataError(f"{save_results}: is a folder; name a file for --save-results")
    choose_fit(captioner, fit)
    chosen = options or {}
    captioner.check(**chosen)
    if spice and (lacking := spice_missing()):
        raise ScoreError(lacking)
    # all that can fail comes before the captions, which take long
    known = {name: load_annotations(root / source.annotations) for name, source in sources.items()}
    sets = {name: load_data_set(name, source, root) for name, source in sources.items()}
    learned = {
        name: training_captions(training, known[name], root / source.annotations)
        for name, source in sources.items()
    }
    if settings is not None and not training:
        learned = dict.fromkeys(sources, _learned(settings, root))
    references = {name: _references(data_set, known[name]) for name, data_set in sets.items()}
    scorers = {name: Scorer(texts) for name, texts in references.items()}
    evaluations = {}
    for name, data_set in sets.items():
        generated = caption_data(captioner, data_set, chosen, progress=progress)
        if save_results is not None:
            write_results(save_results, generated.captions)
        place = root / sources[name].annotations
        evaluations[name] = replace(
            assess(
                name,
                generated.captions,
                references[name],
                known[name],
                scorer=scorers[name],
                spice=spice,
                training=learned[name],
                compare=choose_published(compare, known[name], place, name),
            ),
            confidence=generated.confidence(captioner.calibration is not None),
            seconds_per_image=generated.seconds / len(data_set),
            model=captioner.header.name,
        )
    return evaluations


def data_sources(
    data: Path, *, images: Sequence[Path], highest: int, split: str, config: Path | None
) -> tuple[TrainingConfig | None, Path, dict[str, SourceConfig]]:
    """Return the config if there is one, the folder of all paths, and the data sets to evaluate on.

    The arguments are those of `evaluate`.

    Raises:
        DataError, ScoreError, ConfigError: for data that cannot be used.
    """
    if config is not None:
        if images or highest:
            raise DataError("--images and --highest are not for --config, which names pictures itself")
        settings = load_config(config)
        return settings, data, dict(settings.data.validation)
    path = _annotations(data, split)
    places = [str(p.absolute()) for p in images]
    if not places and not load_annotations(path).info.get("images"):
        places = _places(path)
    source = SourceConfig(annotations=path.name, images=places, only_highest=highest)
    return None, path.absolute().parent, {path.stem: source}


def choose_fit(captioner: Captioner, fit: str | None) -> None:
    """Let a captioner fit pictures into the square in another way; None leaves it as it is."""
    if fit is not None:
        preprocess = captioner.model.encoder.preprocess
        resize = None if fit != "crop" else preprocess.resize
        captioner.model.encoder.preprocess = replace(preprocess, fit=fit, resize=resize)


def _annotations(data: Path, split: str) -> Path:
    """Return the file that is meant by a file or a prepared folder."""
    if not data.is_dir():
        return data
    path = data / f"{split}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in data.glob("*.json"))) or "no JSON file"
        raise DataError(f"{data}: there is no {split}.json in it ({there}); name the file, or --split")
    return path


def _references(data: DataSet, annotations: Annotations) -> dict[Any, list[str]]:
    """Return people's captions as they stand in the file, as a file of results is scored with."""
    wanted = {picture.id for picture in data.pictures}
    return {key: texts for key, texts in annotations.references.items() if key in wanted}


def _learned(settings: TrainingConfig, root: Path) -> list[str] | None:
    """Return the captions of a config's sources; None if they are not all there."""
    try:
        sets = [load_data_set(name, source, root) for name, source in settings.data.sources.items()]
    except (DataError, ScoreError, OSError):
        return None
    return [caption for data in sets for picture in data.pictures for caption in picture.captions]


def _places(data: Path) -> list[str]:
    """Return where pictures may be when nobody says: beside the captions."""
    folder = data.absolute().parent
    return [str(p) for p in (folder, folder / "images") if p.is_dir()] + [
        str(p) for p in sorted(folder.glob("*.tar"))
    ]
