"""Do attention and confidence mean anything? Pixels are hidden, maps compared, confidences counted.

Deletion: for a content word of a generated caption the tenth of the picture that was most attended at it is
hidden, the picture is encoded again, and the word's log-probability after the same words is compared with
what it was. The same is done for a tenth elsewhere.
"""

from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captioner.calibration import is_content_word, stem
from captioner.caption import Caption
from captioner.captioner import Captioner
from captioner.encoder import GridFeatures, encode, photo_mask
from captioner.files import write_atomically
from captioner.images import Fit
from captioner.parallel import ahead
from captioner.tokenizer import END, START
from captioner_training.calibrate import calibration_error, chance_error, correlation, half, word_pairs
from captioner_training.data import DataError, DataSet, chunks, load_data_set
from captioner_training.evaluate import caption_data, choose_fit, data_sources
from captioner_training.features import load_pixels
from captioner_training.report import check_matplotlib

PICTURES = 200
"""How many pictures are hidden parts of, if nobody says; of 1,000 words the ratio is known to about 10 %."""
HIDDEN = 0.1
"""The share of the picture that is hidden."""
DRAWS = 4
"""How many random tenths each word's fall is averaged over."""
FORMATS = (".png", ".svg", ".pdf")
"""What a plot may be called."""
_BATCH = 32
_BINS = 10
_SAMPLES = 2000

# --------------------------------------------------------------------------------------------------
# what is hidden


def ranked(weights: np.ndarray, grid: tuple[int, int], fit: Fit, chance: np.random.Generator) -> np.ndarray:
    """Return a rank ``(R,)`` for each cell, the most attended for its area the highest; ties fall at random.

    Args:
        weights: ``(R,)`` attention.
        grid: ``(H, W)``.
        fit: how the photo was fitted; of a cell at a letterbox's border only a part can be attended to.
        chance: for the ties.
    """
    share = np.array(photo_mask(grid, fit))
    density = np.where(share > 0, weights / np.maximum(share, 1e-9), -1)
    ranks = np.empty(len(density), int)
    ranks[np.lexsort((chance.random(len(density)), density))] = np.arange(len(density))
    return ranks


def moved(ranks: np.ndarray, grid: tuple[int, int], fit: Fit, chance: np.random.Generator) -> np.ndarray:
    """Return the ranks ``(R,)`` of cells of the same shape elsewhere on the photo.

    They are shifted at random, and half of the time mirrored; what leaves on one side returns on the other.
    """
    share = np.array(photo_mask(grid, fit)).reshape(grid)
    photo = np.ix_(share.any(1), share.any(0))
    result = ranks.reshape(grid).copy()
    inside = result[photo]
    if chance.random() < 0.5:
        inside = inside[:, ::-1]
    result[photo] = np.roll(inside, [int(chance.integers(n)) for n in inside.shape], (0, 1))
    return result.ravel()


def hidden(ranks: np.ndarray, grid: tuple[int, int], fit: Fit, size: int) -> np.ndarray:
    """Return which pixels of the network's square are hidden, ``(size, size)`` booleans.

    The cells of the highest ranks, whole ones as long as they fit into a tenth of the photo, and of the next
    one a rectangle in its middle. Bars are not part of the photo.

    Args:
        ranks: ``(R,)``, of the cells.
        grid: ``(H, W)``.
        fit: how the photo was fitted.
        size: side of the square in pixels.
    """
    boxes = _cells(grid, fit, size)
    areas = [(bottom - top) * (right - left) for left, top, right, bottom in boxes]
    left_over = round(HIDDEN * sum(areas))
    mask = np.zeros((size, size), bool)
    for cell in np.argsort(-ranks):
        left, top, right, bottom = boxes[cell]
        if areas[cell] > left_over:
            height = max(1, round((bottom - top) * math.sqrt(left_over / areas[cell])))
            width = min(right - left, round(left_over / height))
            left += (right - left - width) // 2
            top += (bottom - top - height) // 2
            mask[top : top + height, left : left + width] = True
            break
        mask[top:bottom, left:right] = True
        left_over -= areas[cell]
    return mask


def fill(pixels: np.ndarray, mask: np.ndarray, fit: Fit) -> np.ndarray:
    """Return pixels ``(3, S, S)`` with the mean colour of the photo where the mask ``(S, S)`` is."""
    left, top, right, bottom = _photo(fit, pixels.shape[-1])
    colour = pixels[:, top:bottom, left:right].reshape(3, -1).mean(1)
    return np.where(mask, np.round(colour)[:, None, None], pixels).astype(np.uint8)


def _photo(fit: Fit, size: int) -> tuple[int, int, int, int]:
    """Return ``(left, top, right, bottom)`` of what is photo and not bar, in pixels of the square."""
    left, top, right, bottom = fit.box
    x, y = size / (right - left), size / (bottom - top)
    edges = (-left * x, -top * y, (fit.width - left) * x, (fit.height - top) * y)
    found = [min(max(round(edge), 0), size) for edge in edges]
    return found[0], found[1], found[2], found[3]


def _cells(grid: tuple[int, int], fit: Fit, size: int) -> list[tuple[int, int, int, int]]:
    """Return of each cell the part on the photo, in pixels of the square, row by row; it may be empty."""
    left, top, right, bottom = _photo(fit, size)
    xs, ys = ([round(i * size / n) for i in range(n + 1)] for n in (grid[1], grid[0]))
    boxes = []
    for r in range(grid[0]):
        for c in range(grid[1]):
            x, y = max(xs[c], left), max(ys[r], top)
            boxes.append((x, y, max(x, min(xs[c + 1], right)), max(y, min(ys[r + 1], bottom))))
    return boxes


# --------------------------------------------------------------------------------------------------
# one picture


@dataclass(frozen=True, eq=False)
class Deleted:
    """One picture's content words, n of them, and how far their log-probability falls.

    Attributes:
        words: the words.
        places: where each stands in the caption.
        maps: ``(n, R)`` attention at each.
        share: ``(R,)`` of each cell that lies on the photo.
        attended: ``(n,)`` fall, in nats, with the most attended tenth hidden.
        elsewhere: ``(n,)`` mean fall over random tenths of the same shape.
        scattered: ``(n,)`` mean fall over tenths of single random cells.
        others: ``(n,)`` mean fall with a tenth hidden that another word attended to; NaN if there is none.
        encodings: how many pictures went through the network.
    """

    words: list[str]
    places: list[int]
    maps: np.ndarray
    share: np.ndarray
    attended: np.ndarray
    elsewhere: np.ndarray
    scattered: np.ndarray
    others: np.ndarray
    encodings: int


def delete(captioner: Captioner, pixels: np.ndarray, fit: Fit, caption: Caption, seed: Any) -> Deleted | None:
    """Hide parts of a picture, and measure what becomes of its caption's content words.

    Args:
        captioner: the model; it has attention.
        pixels: ``(3, S, S)`` uint8, the prepared picture.
        fit: how it was fitted.
        caption: what the captioner says of it.
        seed: of the random tenths.

    Returns:
        None for a caption without content words.
    """
    places = [i for i, word in enumerate(caption.words) if is_content_word(word.text)]
    grid, size = caption.grid, pixels.shape[-1]
    maps = [weights.sum(0) for i in places if (weights := caption.words[i].attention) is not None]
    if not maps:
        return None
    chance = np.random.default_rng(seed)
    kept: dict[bytes, int] = {}
    masks = [np.zeros((size, size), bool)]

    def number(ranks: np.ndarray) -> int:
        """Hide a tenth by these ranks; the same tenth is encoded once."""
        mask = hidden(ranks, grid, fit, size)
        key = np.packbits(mask).tobytes()
        if key not in kept:
            kept[key] = len(masks)
            masks.append(mask)
        return kept[key]

    ranks = [ranked(weights, grid, fit, chance) for weights in maps]
    own = [number(one) for one in ranks]
    away = [[number(moved(one, grid, fit, chance)) for _ in range(DRAWS)] for one in ranks]
    single = [number(chance.permutation(grid[0] * grid[1])) for _ in range(DRAWS)]
    log_probabilities = []
    for part in chunks(masks, _BATCH):
        views = torch.from_numpy(np.stack([fill(pixels, mask, fit) for mask in part]))
        features = encode(captioner.model.encoder, views, [fit] * len(part))
        log_probabilities.append(word_log_probabilities(captioner, features, caption))
    told = np.concatenate(log_probabilities)[:, places]
    falls = told[0] - told  # (pictures, words)
    n = range(len(places))
    others = [
        [falls[own[k], i] for k in n if stem(caption.words[places[k]].text) != stem(caption.words[p].text)]
        for i, p in enumerate(places)
    ]
    return Deleted(
        words=[caption.words[i].text for i in places],
        places=places,
        maps=np.stack(maps),
        share=np.array(photo_mask(grid, fit)),
        attended=np.array([falls[own[i], i] for i in n]),
        elsewhere=np.array([falls[away[i], i].mean() for i in n]),
        scattered=falls[single].mean(0),
        others=np.array([np.mean(found) if found else np.nan for found in others]),
        encodings=len(masks),
    )


@torch.inference_mode()
def word_log_probabilities(captioner: Captioner, features: GridFeatures, caption: Caption) -> np.ndarray:
    """Return ``(B, T)``: the log-probability of a caption's T words, each after those before it.

    Args:
        captioner: the model.
        features: B views of one picture.
        caption: its words; of one that is several tokens the log-probabilities are added.
    """
    model = captioner.model
    groups: list[list[int]] = []
    tokens: list[int] = []
    for word in caption.words:
        own = model.tokenizer.encode(word.text)
        groups.append(list(range(len(tokens), len(tokens) + len(own))))
        tokens += own
    rows = torch.tensor([START, *tokens, END], device=captioner.device).expand(len(features), -1)
    lengths = torch.full((len(rows),), len(tokens) + 1)
    logits = model(model.memory(features.to(captioner.device)), rows, lengths).logits
    steps = torch.log_softmax(logits.float(), -1).view(len(rows), -1, logits.shape[-1])
    told = steps.gather(2, rows[:, 1:, None])[..., 0].cpu().numpy()
    return np.stack([told[:, group].sum(1) for group in groups], 1)


# --------------------------------------------------------------------------------------------------
# what is made of many


def deletion(pictures: Sequence[Deleted], seed: int = 0) -> dict[str, Any]:
    """Return mean falls in nats and their ratios to the fall for the attended tenth, ready for JSON.

    The intervals are 95 % bootstrap intervals over pictures. A ratio is None if hiding that tenth costs
    nothing.
    """
    chance = np.random.default_rng(seed)
    drawn = chance.integers(0, len(pictures), (_SAMPLES, len(pictures)))

    def compared(name: str) -> dict[str, Any]:
        attended, other = [], []
        for picture in pictures:
            fall = getattr(picture, name)
            there = ~np.isnan(fall)
            attended.append([picture.attended[there].sum(), there.sum()])
            other.append([fall[there].sum(), (picture.attended > fall)[there].sum()])
        ours, theirs = np.array(attended), np.array(other)
        count = int(ours[:, 1].sum())
        if not count:
            return {"fall": None, "ratio": None, "interval": None, "attended_more": None}
        numerators, denominators = ours[drawn, 0].sum(1), theirs[drawn, 0].sum(1)
        usable = theirs[:, 0].sum() > 0
        # where a draw of pictures does not fall at all the ratio has no bound
        ratios = np.where(denominators > 0, numerators / np.where(denominators > 0, denominators, 1), np.inf)
        low, high = np.percentile(ratios, [2.5, 97.5], method="nearest")
        return {
            "fall": float(theirs[:, 0].sum() / count),
            "ratio": float(ours[:, 0].sum() / theirs[:, 0].sum()) if usable else None,
            "interval": [float(low), float(high) if np.isfinite(high) else None] if usable else None,
            "attended_more": float(theirs[:, 1].sum() / count),
        }

    return {
        "pictures": len(pictures),
        "words": sum(len(picture.words) for picture in pictures),
        "hidden": HIDDEN,
        "draws": DRAWS,
        "attended": float(np.concatenate([picture.attended for picture in pictures]).mean()),
        "random": compared("elsewhere"),
        "random_cells": compared("scattered"),
        "other_words": compared("others"),
        "encodings": sum(picture.encodings for picture in pictures),
    }


def differences(pictures: Sequence[Deleted], seed: int = 0) -> dict[str, Any]:
    """Return how far maps differ, ready for JSON: total variation and Jensen-Shannon divergence in bits.

    ``within``: between different content words of one caption; ``between``: between content words at the same
    place of captions of two pictures, drawn at random; None where there are no such pairs. ``entropy``: of
    the maps, as a share of that of looking everywhere alike.
    """
    chance = random.Random(seed)
    within: list[tuple[np.ndarray, np.ndarray]] = []
    by_place: dict[int, list[tuple[int, np.ndarray]]] = {}
    entropies = []
    for n, picture in enumerate(pictures):
        stems = [stem(word) for word in picture.words]
        for i in range(len(stems)):
            within += [
                (picture.maps[i], picture.maps[k]) for k in range(i + 1, len(stems)) if stems[i] != stems[k]
            ]
            by_place.setdefault(picture.places[i], []).append((n, picture.maps[i]))
        uniform = picture.share / picture.share.sum()
        most = _entropy(uniform)
        entropies += [_entropy(weights) / most for weights in picture.maps if most > 0]
    between = []
    for found in by_place.values():
        for n, weights in found:
            if strangers := [other for k, other in found if k != n]:
                between.append((weights, chance.choice(strangers)))

    def compared(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any] | None:
        if not pairs:
            return None
        a, b = (np.stack(side) for side in zip(*pairs, strict=True))
        shannon = [_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2 for p, q in zip(a, b, strict=True)]
        return {
            "total_variation": float(np.abs(a - b).sum(1).mean() / 2),
            "jensen_shannon": float(np.mean(shannon)),
            "pairs": len(pairs),
        }

    return {
        "within": compared(within),
        "between": compared(between),
        "entropy": float(np.mean(entropies)) if entropies else None,
        "cells": len(pictures[0].share),
    }


def _entropy(p: np.ndarray) -> float:
    """Return an entropy in bits."""
    p = p[p > 0].astype(np.float64)
    return float(-(p * np.log2(p)).sum())


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any] | None:
    """Return how well confidences hold, ready for JSON; None if there are none.

    Args:
        confidence: ``(n,)``, 0 to 1.
        right: ``(n,)``, 0 to 1: whether, or how much of it, was right.

    ``error`` is the expected calibration error over ten bins of equal size, ``by_chance`` what it would be of
    so many confidences that hold, ``error_by_width`` the error over ten bins of equal width, which ``bins``
    describes.
    """
    if not len(confidence):
        return None
    which = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    bins: list[dict[str, Any]] = []
    gaps = 0.0
    for i in range(_BINS):
        inside = which == i
        count = int(inside.sum())
        told, true = (float(v[inside].mean()) if count else None for v in (confidence, right))
        bins.append(
            {"low": i / _BINS, "high": (i + 1) / _BINS, "count": count, "confidence": told, "right": true}
        )
        gaps += abs(float((confidence - right)[inside].sum()))
    return {
        "count": len(confidence),
        "confidence": float(confidence.mean()),
        "right": float(right.mean()),
        "error": calibration_error(confidence, right, _BINS),
        "by_chance": chance_error(confidence, right, _BINS),
        "error_by_width": gaps / len(confidence),
        "correlation": correlation(confidence, right),
        "bins": bins,
    }


# --------------------------------------------------------------------------------------------------
# a data set


@dataclass(frozen=True, eq=False)
class Trust:
    """What was measured on a data set.

    Attributes:
        data: its name.
        model: the captioner's name.
        attention: its type of attention.
        calibrated: whether the captioner has a calibration; else probabilities stand for confidences.
        deletion: of `deletion`; None for a model without attention, or without content words.
        maps: of `differences`; None as ``deletion``.
        words, captions: of `reliability`, on odd ids; None if there are none.
        seconds: that it took.
    """

    data: str
    model: str
    attention: str
    calibrated: bool
    deletion: dict[str, Any] | None
    maps: dict[str, Any] | None
    words: dict[str, Any] | None
    captions: dict[str, Any] | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return a record ready for JSON; docs/evaluation.md describes it."""
        return {
            "data": self.data,
            "model": self.model,
            "attention": self.attention,
            "calibrated": self.calibrated,
            "deletion": self.deletion,
            "maps": self.maps,
            "words": self.words,
            "captions": self.captions,
            "seconds": self.seconds,
        }

    def format(self) -> str:
        """Return everything as plain text."""
        lines = [f"{self.data}: what can be trusted in {self.model}, attention: {self.attention}", ""]
        if self.deletion is None:
            why = (
                "the model has no attention" if self.attention == "none" else "no caption has a content word"
            )
            lines += [f"{'deletion':<13}not applicable: {why}", f"{'maps':<13}not applicable: {why}"]
        else:
            lines += [*_deletion_lines(self.deletion), "", *_map_lines(self.maps or {})]
        note = "" if self.calibrated else " (the model has no calibration: bare probabilities)"
        lines += ["", f"confidence, on pictures with odd ids{note}"]
        if self.words is None and self.captions is None:
            lines.append("  not measured: no picture of this data set has an odd id")
        for name, what, found in (
            ("words", "right ones", self.words),
            ("captions", "right content words", self.captions),
        ):
            if found is not None:
                lines.append(
                    f"  {name:<11}{found['count']:>7}: mean confidence {found['confidence']:.3f}, {what} "
                    f"{found['right']:.3f}, calibration error {found['error']:.3f} (by "
                    f"chance {found['by_chance']:.3f})"
                    + (
                        f", correlation {found['correlation']:.2f}"
                        if found["correlation"] is not None
                        else ""
                    )
                )
        lines += ["", f"{'time':<13}{self.seconds:.0f} seconds"]
        return "\n".join(lines)


def _deletion_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{'deletion':<13}{found['words']} content words of {found['pictures']} pictures, "
        f"{found['encodings']} pictures encoded",
        f"  {'hidden: a tenth of the picture':<38}{'fall, nats':>11}{'ratio':>8}{'95 %':>16}"
        f"{'attended more':>15}",
        f"  {'attended at the word':<38}{found['attended']:>11.3f}",
    ]
    for key, name in (
        ("random", "at random, of the same shape"),
        ("random_cells", "at random, single cells"),
        ("other_words", "attended at another word"),
    ):
        other = found[key]
        if other["fall"] is None:
            continue
        ratio, interval = "-", "-"
        if other["ratio"] is not None:
            low, high = other["interval"]
            ratio = f"{other['ratio']:.2f}"
            interval = f"{low:.2f} to " + ("any" if high is None else f"{high:.2f}")
        lines.append(
            f"  {name:<38}{other['fall']:>11.3f}{ratio:>8}{interval:>16}{other['attended_more']:>14.0%}"
        )
    return lines


def _map_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{'maps':<13}total variation: 0 the same, 1 nothing in common"]
    for key, name in (
        ("within", "different words of one caption"),
        ("between", "words at the same place, two pictures"),
    ):
        if found[key] is not None:
            lines.append(f"  {name:<38}{found[key]['total_variation']:>11.3f}")
    if found["entropy"] is not None:
        lines.append(
            f"  {'entropy, share of the uniform one':<38}{found['entropy']:>11.3f}   as if "
            f"{found['cells'] ** found['entropy']:.0f} of {found['cells']} cells were looked at"
        )
    return lines


def measure(
    captioner: Captioner,
    data: DataSet,
    options: Mapping[str, Any] | None = None,
    *,
    pictures: int = PICTURES,
    seed: int = 0,
    progress: bool = False,
) -> Trust:
    """Measure attention on some pictures of a data set, and confidence on all that have odd ids.

    Args:
        captioner: the model.
        data: pictures and people's captions of them.
        options: of the search, by name.
        pictures: how many, drawn at random, to hide parts of; 0 takes all. Each needs about six encodings
            for each content word of its caption.
        seed: of the draws.
        progress: show bars.
    """
    start = time.perf_counter()
    chosen = options or {}
    deleted = []
    attention = captioner.header.decoder.attention
    if attention != "none":
        count = len(data) if pictures == 0 else min(pictures, len(data))
        drawn = sorted(random.Random(seed).sample(range(len(data)), count))
        deleted = [d for d in _each(captioner, data, drawn, chosen, seed, progress) if d is not None]
    words = captions = None
    if held := half(data, even=False):
        said = caption_data(captioner, held, chosen, progress=progress)
        captions = reliability(np.array([*said.confidences.values()]), np.array([*said.shares.values()]))
        pairs = word_pairs(captioner, held)
        scaling = captioner.calibration
        told = pairs[:, 0] if scaling is None else [scaling.word_confidence(float(p)) for p in pairs[:, 0]]
        words = reliability(np.array(told), pairs[:, 1])
    return Trust(
        data=data.name,
        model=captioner.header.name,
        attention=attention,
        calibrated=captioner.calibration is not None,
        deletion=deletion(deleted, seed) if deleted else None,
        maps=differences(deleted, seed) if deleted else None,
        words=words,
        captions=captions,
        seconds=time.perf_counter() - start,
    )


def _each(
    captioner: Captioner,
    data: DataSet,
    drawn: Sequence[int],
    options: Mapping[str, Any],
    seed: int,
    progress: bool,
) -> list[Deleted | None]:
    def work(index: int) -> Deleted | None:
        pixels, fits = load_pixels(data, [index], captioner.model.encoder)
        with torch.inference_mode():
            features = encode(captioner.model.encoder, pixels, fits)
            (caption,) = captioner.caption_batch(features, **options)
            own = [seed, *str(data.pictures[index].id).encode()]
            return delete(captioner, pixels[0].numpy(), fits[0], caption, own)

    threads = torch.get_num_threads()
    single = lambda: torch.set_num_threads(1)  # noqa: E731
    try:
        computed = ahead(work, drawn, threads, single)
        bar = tqdm(computed, f"{data.name}, hiding", len(drawn), unit="picture", disable=not progress)
        return list(bar)
    finally:
        torch.set_num_threads(threads)


def trust(
    captioner: Captioner,
    data: Path,
    *,
    images: Sequence[Path] = (),
    highest: int = 0,
    split: str = "val",
    config: Path | None = None,
    fit: str | None = None,
    options: dict[str, Any] | None = None,
    pictures: int = PICTURES,
    seed: int = 0,
    plot: Path | None = None,
    progress: bool = True,
) -> dict[str, Trust]:
    """Measure what can be trusted of a captioner, on data sets named as for `evaluate`.

    Args:
        captioner: the model.
        data, images, highest, split, config, fit, options: see `captioner_training.evaluate.evaluate`.
        pictures, seed: see `measure`.
        plot: write reliability diagrams here, in one of `FORMATS`.
        progress: show bars.

    Raises:
        DataError, ScoreError, ConfigError, ReportError: for what cannot be used, before anything is measured.
    """
    _, root, sources = data_sources(data, images=images, highest=highest, split=split, config=config)
    if plot is not None:
        check_plot(plot)
    choose_fit(captioner, fit)
    captioner.check(**(options or {}))
    sets = [load_data_set(name, source, root) for name, source in sources.items()]
    found = {
        data_set.name: measure(captioner, data_set, options, pictures=pictures, seed=seed, progress=progress)
        for data_set in sets
    }
    if plot is not None:
        write_plot(plot, [*found.values()])
    return found


# --------------------------------------------------------------------------------------------------
# reliability diagrams


def check_plot(path: Path) -> None:
    """See, before anything is measured, that a plot can be drawn and written.

    Raises:
        DataError: for another format, or a folder that is not there.
        ReportError: if matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS or path.is_dir():
        raise DataError(f"--plot {path}: name a file that ends in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise DataError(f"--plot {path}: there is no folder {path.parent} to write it into")
    check_matplotlib()


def write_plot(path: Path, found: Sequence[Trust]) -> None:
    """Draw a reliability diagram with its counts for words and captions of each data set."""
    from matplotlib.figure import Figure

    panels = [
        (f"{t.data}: {name}", record, what)
        for t in found
        for name, record, what in (
            ("words", t.words, "share that is right"),
            ("captions", t.captions, "share of content words that is right"),
        )
    ]
    rows = len(found)
    figure = Figure(figsize=(8, 4.8 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, 2, squeeze=False, height_ratios=[3, 1] * rows, sharex=True)
    for n, (title, record, what) in enumerate(panels):
        upper, lower = axes[2 * (n // 2)][n % 2], axes[2 * (n // 2) + 1][n % 2]
        upper.set_title(title, fontsize=10)
        upper.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1)
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel=what)
        lower.set(xlabel="confidence", ylabel="count")
        lower.tick_params(labelbottom=True)
        for one in (upper, lower):
            one.grid(True, alpha=0.25, color="#808080", linewidth=0.6)
            one.set_axisbelow(True)
            one.spines[["top", "right"]].set_visible(False)
        if record is None:
            upper.text(0.5, 0.5, "no pictures with odd ids", ha="center", va="center")
            continue
        filled = [b for b in record["bins"] if b["count"]]
        middles = [(b["low"] + b["high"]) / 2 for b in filled]
        upper.bar(middles, [b["right"] for b in filled], 1 / _BINS, color="#3d6fd1", alpha=0.25)
        upper.plot([b["confidence"] for b in filled], [b["right"] for b in filled], "o-", color="#3d6fd1")
        error = f"calibration error {record['error']:.3f}\n{record['count']} {title.split(': ')[-1]}"
        upper.text(0.04, 0.95, error, va="top", fontsize=9)
        bars = lower.bar(middles, [b["count"] for b in filled], 0.9 / _BINS, color="#3d6fd1")
        lower.bar_label(bars, fontsize=7)
        lower.margins(y=0.25)
    buffer = io.BytesIO()
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=150, metadata=metadata)
    write_atomically(path, buffer.getvalue())
