"""Confidence: what the model's probabilities are worth, measured.

A word's confidence is its probability after Platt scaling (Platt 1999), fitted under teacher forcing. A
caption's confidence is the product of two logistic regressions on a few numbers that do not grow with its
length. One tells the share of its content words that people's captions of the picture also contain, from how
probable its words were and how rare they are: a rare word is said for a reason. The other tells pictures that
show something from scripted ones that show nothing, from the probabilities too and from how familiar the
picture is: the distance of its mean feature from those of the training pictures (Mahalanobis distance within
the main directions, and what lies outside of them, as in ViM, Wang et al. 2022), and its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from captioner.tokenizer import Tokenizer

FEATURES = (
    "mean_log_probability",
    "least_log_probability",
    "content_log_probability",
    "distance",
    "residual",
    "size",
    "content_probability",
    "content_rank",
)
_FIRST = 5
"""How many of them a calibration of an older file has, which is one regression."""

# words that carry no picture content; what remains are content words
_FUNCTION_WORDS = frozenset(
    """a an the this that these those some any each every all both another other its his her their our my
    he she it they him them who which what there here and or but while as if than so of in on at by to from
    with without into onto over under above below between through across along around against behind beside
    besides near next front back top side off up down out for about after before during is are was were be
    been being am has have having had do does doing done can could will would may very not no one two three
    four several many few lot lots group bunch couple pair 's s t""".split()
)


def is_content_word(word: str) -> bool:
    """Tell nouns, verbs and adjectives from the words between them, by a list of the latter."""
    return word not in _FUNCTION_WORDS and any(c.isalpha() for c in word)


def content_share(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the share of a caption's different content words that occur in at least one reference.

    Plurals and simple inflections count as the same word. A caption without content words has share 0.
    """
    said = {stem(w) for w in words if is_content_word(w)}
    known = {stem(w) for reference in references for w in reference}
    return len(said & known) / len(said) if said else 0.0


# whose plural no ending tells
_IRREGULAR = {
    "people": "person",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "wives": "wife",
    "knives": "knife",
    "leaves": "leaf",
    "shelves": "shelf",
    "loaves": "loaf",
    "calves": "calf",
    "wolves": "wolf",
    "scarves": "scarf",
    "skies": "sky",
    "flies": "fly",
}


def stem(word: str) -> str:
    """Return a word without plural and simple inflections; crude, and the same on both sides of a comparison.

    What is left need not be a word: ``horse`` and ``horses`` are ``hors``.
    """
    word = _IRREGULAR.get(word, word)
    if word.endswith("men"):
        word = f"{word[:-2]}an"
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    word = word.rstrip("e") or word
    if len(word) > 3 and word.endswith("y") and word[-2] not in "aeiou":
        word = f"{word[:-1]}i"
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was fitted.

    Attributes:
        word: slope and intercept of Platt scaling on the log-odds of a word's probability.
        caption: intercept and one weight for each of `FEATURES`, of the share of right content words.
        mean: ``(D,)`` mean feature of the training pictures.
        basis: ``(D, K)`` main directions, each divided by the standard deviation along it.
        residual: root mean square of what lies outside the main directions, for scale.
        shown: intercept and weights of whether the picture shows something; None: it always does.
    """

    word: tuple[float, float]
    caption: tuple[float, ...]
    mean: np.ndarray
    basis: np.ndarray
    residual: float
    shown: tuple[float, ...] | None = None

    def familiarity(self, pooled: np.ndarray) -> tuple[float, float, float]:
        """Return distance and residual of a mean feature ``(D,)``, and the logarithm of its length.

        1 is typical of the first two, more is strange.
        """
        centred = pooled.astype(np.float64) - self.mean
        along = centred @ self.basis
        # the basis is whitened: its columns are v / s, so v = column * s and |v along| = along * s
        scales = 1 / np.linalg.norm(self.basis, axis=0)
        inside = (self.basis * scales**2) @ along
        outside = np.linalg.norm(centred - inside)
        size = math.log(max(float(np.linalg.norm(pooled.astype(np.float64))), 1e-6))
        return float(np.sqrt(np.mean(along**2))), float(outside / self.residual), size

    def word_confidence(self, probability: float) -> float:
        """Return the calibrated probability that a word of this probability is right."""
        p = min(max(probability, 1e-6), 1 - 1e-6)
        return _sigmoid(self.word[0] * math.log(p / (1 - p)) + self.word[1])

    def caption_confidence(self, features: Sequence[float]) -> float:
        """Return the calibrated share of right content words from the numbers of `caption_features`."""
        share = _sigmoid(self.caption[0] + float(np.dot(self.caption[1:], features)))
        if self.shown is None:
            return share
        return share * _sigmoid(self.shown[0] + float(np.dot(self.shown[1:], features)))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers that are not tensors."""
        shown = {} if self.shown is None else {"shown": list(self.shown)}
        return {"word": list(self.word), "caption": list(self.caption), "residual": self.residual, **shown}

    @classmethod
    def from_parts(cls, data: dict[str, Any], mean: np.ndarray, basis: np.ndarray) -> Calibration:
        """Rebuild from a checkpoint.

        Raises:
            ValueError: if the numbers do not fit `FEATURES`, or are none to calculate with.
        """
        caption = tuple(float(v) for v in data["caption"])
        shown = tuple(float(v) for v in data["shown"]) if "shown" in data else None
        if shown is None and len(caption) == _FIRST + 1:
            caption += (0.0,) * (len(FEATURES) - _FIRST)
        sizes = {len(weights) for weights in (caption, shown) if weights is not None}
        if sizes != {len(FEATURES) + 1} or len(data["word"]) != 2:
            raise ValueError(f"the calibration does not fit the features {', '.join(FEATURES)}")
        slope, intercept = (float(v) for v in data["word"])
        residual = float(data["residual"])
        if mean.ndim != 1 or basis.ndim != 2 or basis.shape[1] == 0:
            raise ValueError(f"the calibration has a mean of shape {mean.shape}, a basis of {basis.shape}")
        parts = [slope, intercept, *caption, *(shown or ()), residual]
        if not (np.isfinite(parts).all() and np.isfinite(mean).all() and np.isfinite(basis).all()):
            raise ValueError("the calibration holds numbers that are not finite")
        if residual <= 0 or not basis.any(0).all():
            raise ValueError("the calibration measures distances in units of zero")
        return cls((slope, intercept), caption, mean, basis, residual, shown)


def caption_features(
    words: Sequence[str],
    probabilities: Sequence[float],
    ranks: Sequence[int],
    distance: float,
    residual: float,
    size: float,
) -> list[float]:
    """Return the numbers named in `FEATURES` for a caption's words (those that the model chose).

    Args:
        words: the words.
        probabilities: of each.
        ranks: of each, its place in the vocabulary, in which frequent words come first (`word_ranks`).
        distance, residual, size: of `Calibration.familiarity`.
    """
    logs = [math.log(max(p, 1e-9)) for p in probabilities] or [0.0]
    places = [i for i, w in enumerate(words) if is_content_word(w)] or list(range(len(words)))
    content = [logs[i] for i in places] or logs
    rarities = [math.log(max(ranks[i], 1)) for i in places] or [0.0]
    return [
        sum(logs) / len(logs),
        min(logs),
        sum(content) / len(content),
        min(distance, 10.0),
        min(residual, 10.0),
        size,
        sum(math.exp(v) for v in content) / len(content),
        sum(rarities) / len(rarities),
    ]


def word_ranks(tokenizer: Tokenizer, words: Sequence[str]) -> list[int]:
    """Return each word's place in a vocabulary; of one that is several tokens, that of the last of them."""
    return [max(tokenizer.encode(word), default=len(tokenizer)) for word in words]


def plain_confidence(probabilities: Sequence[float]) -> float:
    """Return the geometric mean of the words' probabilities, for a model without a calibration."""
    if not probabilities:
        return 0.0
    return math.exp(sum(math.log(max(p, 1e-9)) for p in probabilities) / len(probabilities))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
