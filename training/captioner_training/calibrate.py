"""Fit a `captioner.calibration.Calibration` for a trained model, and report how well it holds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from captioner import checkpoint
from captioner.calibration import FEATURES, Calibration, caption_features, content_share, word_ranks
from captioner.caption import SURE
from captioner.captioner import Captioner, pool
from captioner.encoder import GridFeatures
from captioner.images import load
from captioner.parallel import ahead
from captioner.tokenizer import END, PAD, START, split_words
from captioner_training import nothing
from captioner_training.clips import trained_frames
from captioner_training.config import TrainingConfig
from captioner_training.data import DataError, DataSet, chunks, load_data_set
from captioner_training.features import look_at

_BATCH = 16
_DIRECTIONS = 64
_FAMILIAR = 4000
"""How many training pictures tell what is familiar."""
_NOTHING = 30
"""How many pictures of each kind show nothing."""
_SHARE = (
    "mean_log_probability",
    "least_log_probability",
    "content_log_probability",
    "content_probability",
    "content_rank",
)
"""What tells how much of a photo's caption is right."""
_SHOWN = (*FEATURES[:5], "size")
"""What tells a photo from a picture of nothing."""
_LEAST = 10
"""How many pictures a fit needs."""


def is_even(key: int | str) -> bool:
    """Tell on which side a picture stands: calibrations are fitted on even ids and measured on odd ones.

    A text of digits counts as its number, any other by a hash that is the same everywhere.
    """
    if isinstance(key, str):
        key = int(key) if key.isdecimal() else blake2b(key.encode("utf-8", "surrogatepass")).digest()[0]
    return key % 2 == 0


def half(data: DataSet, *, even: bool) -> DataSet:
    """Return the pictures with even or with odd ids; there may be none."""
    return replace(data, pictures=tuple(p for p in data.pictures if is_even(p.id) == even))


@dataclass(frozen=True, eq=False)
class Sample:
    """One captioned picture: numbers of `FEATURES`, share of right content words, where it is from."""

    features: list[float]
    share: float
    source: str


def calibrate(config: TrainingConfig, data_folder: Path, model: Path, output: Path) -> list[str]:
    """Fit on the validation sets and on pictures of nothing, write the checkpoint, return a report.

    The fit sees the validation pictures with even ids, the report those with odd ids (`is_even`).

    Raises:
        DataError, CheckpointError: for data or a model that cannot be used.
    """
    if output.is_dir() or not output.absolute().parent.is_dir():  # now, and not when all is computed
        raise DataError(f"--output {output}: name a file in a folder that exists")
    trained, header, _ = checkpoint.load(model)
    captioner = Captioner(*checkpoint.load(model))
    sources = [load_data_set(n, c, data_folder) for n, c in config.data.sources.items()]
    validation = [load_data_set(n, c, data_folder) for n, c in config.data.validation.items()]
    if sum(len(data) for data in validation) < 20:
        raise DataError("the validation sets hold fewer than 20 pictures: too few to calibrate on")
    fitted, held = ([d for data in validation if (d := half(data, even=even))] for even in (True, False))
    if (count := sum(len(data) for data in fitted)) < _LEAST:
        raise DataError(
            f"{count} of the validation pictures have even ids, which are those to calibrate on: at least "
            f"{_LEAST} are needed; number the pictures one by one, or add some"
        )
    mean, basis, residual = familiar(captioner, sources)
    space = Calibration((1.0, 0.0), (0.0,) * (len(FEATURES) + 1), mean, basis, residual)
    samples = [s for data in fitted for s in photo_samples(captioner, space, data)]
    for kind in nothing.KINDS:
        samples += nothing_samples(captioner, space, kind)
    pairs = np.concatenate([word_pairs(captioner, data) for data in fitted])
    calibration = replace(
        space, word=fit_words(pairs), caption=fit_captions(samples), shown=fit_shown(samples)
    )
    checkpoint.save(output, trained, header, calibration)
    lines = ["no validation picture has an odd id: there is nothing to measure on"]
    if held:
        others = [s for data in held for s in photo_samples(captioner, space, data)]
        lines = report(others, np.concatenate([word_pairs(captioner, data) for data in held]), calibration)
    return lines + report_nothing(samples, calibration)


def familiar(captioner: Captioner, sources: Sequence[DataSet]) -> tuple[np.ndarray, np.ndarray, float]:
    """Return mean ``(D,)``, whitened directions ``(D, K)`` and residual scale of the training pictures."""
    chance = random.Random(0)
    everything = [(data, i) for data in sources for i in range(len(data))]
    chosen = chance.sample(everything, min(_FAMILIAR, len(everything)))

    def work(batch: Sequence[int]) -> np.ndarray:
        mine = [chosen[i] for i in batch]
        sets = {data.name: data for data, _ in mine}
        parts = [[i for data, i in mine if data is one] for one in sets.values()]
        return np.concatenate(
            [pool(_look(captioner, d, part)) for d, part in zip(sets.values(), parts, strict=True)]
        )

    pooled = _parallel(work, list(chunks(range(len(chosen)), _BATCH))).astype(np.float64)
    mean = pooled.mean(0)
    centred = pooled - mean
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    count = min(_DIRECTIONS, len(spread) // 2)  # of a few pictures something must be left outside
    along = centred @ directions[:count].T
    outside = centred - along @ directions[:count]
    deviations = spread[:count] / np.sqrt(len(pooled))
    return mean, directions[:count].T / deviations, float(np.sqrt((outside**2).sum(1).mean()))


def photo_samples(captioner: Captioner, space: Calibration, data: DataSet) -> list[Sample]:
    """Caption a data set and compare each caption with people's."""

    def work(batch: Sequence[int]) -> list[Sample]:
        references = [[split_words(c) for c in data.pictures[i].captions] for i in batch]
        return _samples(captioner, space, _look(captioner, data, batch), references, data.name)

    return [s for part in _parallel_lists(work, list(chunks(range(len(data)), _BATCH))) for s in part]


def nothing_samples(captioner: Captioner, space: Calibration, kind: str, seed: int = 0) -> list[Sample]:
    """Caption pictures that show nothing: whatever is said is wrong."""
    preprocess = captioner.model.encoder.preprocess
    pictures: list[Image.Image] = nothing.pictures(kind, _NOTHING, seed)
    features = captioner.encode_pixels([load(picture, preprocess) for picture in pictures])
    return _samples(captioner, space, features, [[] for _ in pictures], kind)


def _look(captioner: Captioner, data: DataSet, batch: Sequence[int]) -> GridFeatures:
    """Return the features of pictures, or of clips of as many frames as the captioner was trained with."""
    return look_at(data, batch, captioner.model.encoder, trained_frames(captioner.header))


def _samples(
    captioner: Captioner,
    space: Calibration,
    features: GridFeatures,
    references: list[list[list[str]]],
    source: str,
) -> list[Sample]:
    captions = captioner.caption_batch(features)
    samples = []
    for caption, pooled, known in zip(captions, pool(features), references, strict=True):
        words = [w.text for w in caption.words]
        ranks = word_ranks(captioner.model.tokenizer, words)
        probabilities = [w.probability for w in caption.words]
        numbers = caption_features(words, probabilities, ranks, *space.familiarity(pooled))
        samples.append(Sample(numbers, content_share(words, known), source))
    return samples


def word_pairs(captioner: Captioner, data: DataSet) -> np.ndarray:
    """Return ``(P, 2)``: the probability of the likeliest word at each place of people's captions, and
    whether it is the word that stands there.
    """
    model = captioner.model

    def work(batch: Sequence[int]) -> np.ndarray:
        grid = _look(captioner, data, batch)
        rows = [
            (row, [*model.tokenizer.encode(caption), END])
            for row, i in enumerate(batch)
            for caption in data.pictures[i].captions
        ]
        rows.sort(key=lambda row: -len(row[1]))
        lengths = torch.tensor([len(tokens) for _, tokens in rows])
        tokens = torch.full((len(rows), int(lengths[0]) + 1), PAD)
        for i, (_, caption) in enumerate(rows):
            tokens[i, : len(caption) + 1] = torch.tensor([START, *caption])
        with torch.inference_mode():
            mine = torch.tensor([row for row, _ in rows], device=model.device)
            logits = model(model.memory(grid).select(mine), tokens.to(model.device), lengths).logits
            best, word = (found.cpu() for found in torch.softmax(logits, -1).max(-1))
        valid = torch.arange(tokens.shape[1] - 1) < lengths[:, None]
        return torch.stack((best, (word == tokens[:, 1:][valid]).float()), 1).numpy()

    return _parallel(work, list(chunks(range(len(data)), _BATCH)))


def fit_words(pairs: np.ndarray) -> tuple[float, float]:
    """Platt scaling: slope and intercept on the log-odds of probabilities, ``pairs`` of `word_pairs`."""
    p = np.clip(pairs[:, 0].astype(np.float64), 1e-6, 1 - 1e-6)
    weights = fit_logistic(np.log(p / (1 - p))[:, None], pairs[:, 1])
    return weights[1], weights[0]


def fit_captions(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Logistic regression of photos' shares on some numbers of `FEATURES`; all sets weigh alike."""
    photos = [s for s in samples if s.source not in nothing.KINDS]
    return _fit(photos, _SHARE, np.array([s.share for s in photos]))


def fit_shown(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Logistic regression of whether a picture shows something."""
    return _fit(samples, _SHOWN, np.array([float(s.source not in nothing.KINDS) for s in samples]))


def _fit(samples: Sequence[Sample], names: Sequence[str], targets: np.ndarray) -> tuple[float, ...]:
    """Return intercept and weights for all of `FEATURES`: zeros for those that are not named."""
    columns = [FEATURES.index(name) for name in names]
    features = np.array([s.features for s in samples])[:, columns]
    found = fit_logistic(features, targets, balance(samples))
    weights = dict(zip(names, found[1:], strict=True))
    return (found[0], *(weights.get(name, 0.0) for name in FEATURES))


def balance(samples: Sequence[Sample]) -> np.ndarray:
    """Return a weight for each sample: photos of a small set count for several, pictures of nothing once."""
    counts = Counter(s.source for s in samples if s.source not in nothing.KINDS)
    return np.array([max(counts.values()) / counts[s.source] if s.source in counts else 1 for s in samples])


def fit_logistic(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, ...]:
    """Return intercept and weights of least cross-entropy with targets of 0 to 1, by Newton's method.

    Args:
        x: ``(N, K)``.
        y: ``(N,)`` targets.
        counts: ``(N,)``, how many times each sample counts; once if None.
    """
    mean, scale = x.mean(0), x.std(0) + 1e-9
    often = np.ones(len(x)) if counts is None else counts * len(x) / counts.sum()
    design = np.column_stack((np.ones(len(x)), (x - mean) / scale))
    weights = np.zeros(design.shape[1])
    # keeps data finite that a line separates, or that are all alike
    ridge = np.diag([1e-6 * len(x), *[1e-3 * len(x)] * x.shape[1]])
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (often * (p - y)) + ridge @ weights
        hessian = (design * (often * p * (1 - p))[:, None]).T @ design + ridge
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    raw = weights[1:] / scale
    return (float(weights[0] - raw @ mean), *(float(w) for w in raw))


def report(photos: Sequence[Sample], pairs: np.ndarray, calibration: Calibration) -> list[str]:
    """Return lines about photos that a calibration was not fitted to, all of them with odd ids."""
    told = np.array([calibration.word_confidence(float(p)) for p in pairs[:, 0]])
    lines = [
        f"words: expected calibration error {calibration_error(pairs[:, 0], pairs[:, 1]):.4f} before, "
        f"{calibration_error(told, pairs[:, 1]):.4f} after, on {len(pairs)} words of pictures with odd ids"
    ]
    confidence = np.array([calibration.caption_confidence(s.features) for s in photos])
    share = np.array([s.share for s in photos])
    for source in dict.fromkeys(s.source for s in photos):
        here = np.array([s.source == source for s in photos])
        lines.append(
            f"captions, {source}: mean confidence {confidence[here].mean():.3f}, mean share of right content "
            f"words {share[here].mean():.3f}, error {calibration_error(confidence[here], share[here]):.4f} "
            f"(by chance {chance_error(confidence[here], share[here]):.4f}), correlation "
            f"{_three(correlation(confidence[here], share[here]))}, on {here.sum()} pictures with odd ids"
        )
    lines.append(
        f"photos below the threshold of {SURE}: {(confidence < SURE).mean():.1%}, with a mean share of "
        f"{share[confidence < SURE].mean() if (confidence < SURE).any() else float('nan'):.3f}; "
        f"of the others {share[confidence >= SURE].mean():.3f}"
    )
    return lines


def report_nothing(samples: Sequence[Sample], calibration: Calibration) -> list[str]:
    """Return a line for each kind of picture of nothing, judged by what was fitted on the other kinds."""
    lines = []
    for kind in nothing.KINDS:
        others = replace(calibration, shown=fit_shown([s for s in samples if s.source != kind]))
        told = np.array([others.caption_confidence(s.features) for s in samples if s.source == kind])
        lines.append(
            f"nothing, {kind}: mean confidence {told.mean():.3f}, "
            f"below the threshold {(told < SURE).mean():.0%} (this kind left out of the fit)"
        )
    return lines


def predict(weights: Sequence[float], features: Sequence[float]) -> float:
    """Return the confidence that a fit gives."""
    return float(1 / (1 + np.exp(-(weights[0] + np.dot(weights[1:], features)))))


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over bins of equal size (Naeini et al. 2015)."""
    order = np.argsort(confidence)
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [len(part) * abs(confidence[part].mean() - right[part].mean()) for part in parts]
    return float(sum(gaps) / len(confidence))


def chance_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Return what `calibration_error` would be of confidences that hold, because the bins are small.

    In each bin the mean of n differences of standard deviation s is off by s * sqrt(2 / (pi n)) on average.
    """
    order = np.argsort(confidence)
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [np.sqrt(2 / np.pi * len(part)) * (confidence - right)[part].std() for part in parts]
    return float(sum(gaps) / len(confidence))


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the correlation of two series; None if one of them does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None


def _three(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _parallel_lists(work: Any, batches: list[Any]) -> list[Any]:
    threads = torch.get_num_threads()
    try:
        return list(ahead(work, batches, threads, lambda: torch.set_num_threads(1)))
    finally:
        torch.set_num_threads(threads)


def _parallel(work: Any, batches: list[Any]) -> np.ndarray:
    return np.concatenate(_parallel_lists(work, batches))
