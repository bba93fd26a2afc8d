"""Published results to stand beside one's own, each with where it is printed.

Only what is printed in the paper that is named; a result that could not be checked is not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """One row of a paper's table.

    Attributes:
        data: ``flickr8k``, ``flickr30k`` or ``coco``.
        method: what was trained, and on what features.
        scores: times 100, by the names of `captioner_training.metrics.Scores.corpus`.
        source: paper and table.
    """

    data: str
    method: str
    source: str
    scores: Mapping[str, float] = field(default_factory=dict)


DATA_SETS = {
    "flickr8k": "Flickr8k's test split of 1,000 pictures",
    "flickr30k": "Flickr30k's test split of 1,000 pictures (Karpathy and Li 2015)",
    "coco": "COCO's test split of 5,000 pictures (Karpathy and Li 2015)",
}
"""What the rows were measured on."""

_XU = "Xu et al. 2015, Show, Attend and Tell, arXiv 1502.03044, table 1"
_CHEN = "Chen et al. 2017, SCA-CNN, arXiv 1611.05594, comparison with the state of the art"
_ANDERSON = "Anderson et al. 2018, Bottom-Up and Top-Down Attention, arXiv 1707.07998, table 1"
_NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")


def _row(data: str, method: str, source: str, *scores: float | None) -> Published:
    named = {name: score for name, score in zip(_NAMES, scores, strict=False) if score is not None}
    return Published(data, method, source, named)


PUBLISHED = (
    _row("flickr8k", "soft attention, VGG", _XU, 67.0, 44.8, 29.9, 19.5, 18.93),
    _row("flickr8k", "hard attention, VGG", _XU, 67.0, 45.7, 31.4, 21.3, 20.30),
    _row("flickr8k", "SCA-CNN, ResNet", _CHEN, None, None, None, 25.8, 22.4),
    _row("flickr30k", "soft attention, VGG", _XU, 66.7, 43.4, 28.8, 19.1, 18.49),
    _row("flickr30k", "hard attention, VGG", _XU, 66.9, 43.9, 29.6, 19.9, 18.46),
    _row("coco", "NIC ensemble, own split", _XU, 66.6, 46.1, 32.9, 24.6),
    _row("coco", "soft attention, VGG", _XU, 70.7, 49.2, 34.4, 24.3, 23.90),
    _row("coco", "hard attention, VGG", _XU, 71.8, 50.4, 35.7, 25.0, 23.04),
    _row("coco", "SCA-CNN, ResNet", _CHEN, 71.9, 54.8, 41.1, 31.1, 25.0),
    _row("coco", "SCST Att2all", _ANDERSON, None, None, None, 34.2, 26.7, 55.7, 114.0),
    _row("coco", "LSTM attention, ResNet", _ANDERSON, 74.5, None, None, 33.4, 26.1, 54.4, 105.4, 19.2),
    _row("coco", "Up-Down", _ANDERSON, 77.2, None, None, 36.2, 27.0, 56.4, 113.5, 20.3),
    _row("coco", "Up-Down, SCST", _ANDERSON, 79.8, None, None, 36.3, 27.7, 56.9, 120.1, 21.4),
)


def guess(texts: Iterable[str]) -> str | None:
    """Return which of `DATA_SETS` is meant by names and descriptions, the first that tells; else None."""
    for text in texts:
        text = text.lower().replace("_", "").replace("-", "").replace(" ", "")
        for data in DATA_SETS:
            if data in text:
                return data
    return None


def published(data: str) -> list[Published]:
    """Return the rows of one of `DATA_SETS`."""
    return [row for row in PUBLISHED if row.data == data]


def format_published(data: str, scores: Mapping[str, float], note: str) -> str:
    """Return a table of one's own scores beside published ones, with the sources below it.

    Args:
        data: one of `DATA_SETS`.
        scores: one's own, not yet times 100, by the names of `captioner_training.metrics.Scores.corpus`.
        note: what they were measured on.
    """
    rows = published(data)
    names = [name for name in _NAMES if name in scores or any(name in row.scores for row in rows)]
    sources = list(dict.fromkeys(row.source for row in rows))
    lines = [f"{'x 100':<27}" + "".join(f"{name:>8}" for name in names)]
    own = {name: 100 * value for name, value in scores.items()}
    for method, mark, values in (
        ("these captions", "", own),
        *((row.method, f"[{sources.index(row.source) + 1}]", row.scores) for row in rows),
    ):
        cells = "".join(f"{values[name]:8.1f}" if name in values else f"{'-':>8}" for name in names)
        lines.append(f"{method:<23}{mark:<4}{cells}")
    lines.append(f"these captions: {note}; [n]: {DATA_SETS[data]}")
    lines.append("tokenisation, splits and versions of the metrics differ a little among papers")
    lines += [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
    return "\n".join(lines)
