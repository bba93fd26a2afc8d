"""Go on from a trained captioner on pictures of one's own: load it, add the new words, set its dropout.

New words get new rows at the end of the vocabulary; every old word keeps its id and, to the bit, its
embedding, output weights and bias.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner import checkpoint
from captioner.captioner import BUILT_IN
from captioner.model import CaptionModel
from captioner.tokenizer import SPECIAL, UNKNOWN, WordTokenizer, split_words
from captioner_training.config import ConfigError, StartConfig

BUILT_IN_NAME = "built-in"
"""What a config says for the model that comes with captioner."""

_RAREST = 4
_NOISE = 0.1
_NAMED = 20


class Start(NamedTuple):
    """What training goes on from.

    model: extended, in evaluation mode; header: of the checkpoint, without calibration; new_words: appended
    to the vocabulary, in id order; lines: for the person who trains.
    """

    model: CaptionModel
    header: checkpoint.Header
    new_words: list[str]
    lines: list[str]


def begin(config: StartConfig, captions: Iterable[str], *, min_count: int) -> Start:
    """Do all that a config's ``start`` asks for.

    Args:
        config: the section.
        captions: of the training pictures alone.
        min_count: a new word must occur so often in them.

    Raises:
        ConfigError: if the checkpoint cannot be used.
    """
    loaded = start_from(config.model)
    sentences = list(captions)
    model = loaded.model
    words: list[str] = []
    lines = [f"start: goes on from {loaded.header.name}"]
    if config.new_words and isinstance(model.tokenizer, WordTokenizer):
        model, words = extend(model, sentences, min_count=min_count)
        lines += describe(words, model, sentences)
    elif config.new_words:
        lines.append("start: no words are added: its tokens are byte pairs, and every word is made of them")
    else:
        lines += describe(words, model, sentences)
    if config.dropout is not None:
        replace_dropout(model, config.dropout)
    if loaded.calibration is not None:
        lines.append(
            "start: its confidences do not hold for the new model; captioner calibrate fits new ones"
        )
    return Start(model, replace(loaded.header, calibration=None), words, lines)


def start_from(model: str) -> checkpoint.Loaded:
    """Load a checkpoint to go on from: ``built-in``, or a path relative to the working directory.

    Raises:
        ConfigError: if it is missing, damaged, or not a checkpoint.
    """
    try:
        return checkpoint.load(BUILT_IN if model == BUILT_IN_NAME else model)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"start.model: {error}") from None


def extend(
    model: CaptionModel, captions: Iterable[str], *, min_count: int = 1
) -> tuple[CaptionModel, list[str]]:
    """Append to the vocabulary the words that the model lacks and that occur ``min_count`` times or more.

    A new embedding starts at the mean of the rarest quarter of the known ones, with a little noise to
    tell the new ones apart; the bias likewise. So new words begin as unlikely as rare ones, and until it is
    trained the model says what it said before.

    Returns:
        a copy with the new rows, or the model itself if there are none or its tokens are byte pairs; and the
        new words in id order, the frequent first.
    """
    tokenizer = model.tokenizer
    if not isinstance(tokenizer, WordTokenizer):
        return model, []
    counted = WordTokenizer.build(captions, min_count=min_count).vocabulary[len(SPECIAL) :]
    words = [word for word in counted if word not in tokenizer.index]
    if not words:
        return model, []
    extended = copy.deepcopy(model)
    extended.tokenizer = WordTokenizer([*tokenizer.vocabulary[len(SPECIAL) :], *words])
    decoder = extended.decoder
    with torch.no_grad():
        embeddings = _more_rows(decoder.embedding.weight, len(words))
        weights = embeddings if decoder.config.tied else _more_rows(decoder.output.weight, len(words))
        known = decoder.output.bias
        bias = torch.cat((known, _rarest(known).mean().expand(len(words))))
    decoder.embedding.num_embeddings = decoder.output.out_features = len(extended.tokenizer)
    decoder.embedding.weight = nn.Parameter(embeddings)
    decoder.output.weight = decoder.embedding.weight if decoder.config.tied else nn.Parameter(weights)
    decoder.output.bias = nn.Parameter(bias)
    return extended, words


def describe(words: list[str], model: CaptionModel, captions: Iterable[str]) -> list[str]:
    """Say which words were added, and how much of the captions the vocabulary now covers."""
    named = ", ".join(words[:_NAMED]) + (", …" if len(words) > _NAMED else "")
    count = f"{len(words)} new word{'' if len(words) == 1 else 's'}"
    lines = [f"start: {count}{': ' + named if words else ''}"]
    total = unknown = 0
    for caption in captions:
        ids = model.tokenizer.encode(caption)
        total += len(split_words(caption))
        unknown += ids.count(UNKNOWN)
    if unknown:
        lines.append(
            f"start: {unknown:,} of {total:,} words in the training captions stay unknown; "
            "a lower tokenizer.min_count adds more of them"
        )
    return lines


def replace_dropout(model: CaptionModel, dropout: float) -> None:
    """Set the decoder's dropout, 0 to 1, in place."""
    model.decoder.config = replace(model.decoder.config, dropout=dropout)
    for module in model.decoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def _more_rows(known: Tensor, count: int) -> Tensor:
    """Return ``(V + count, M)``: the known rows as they are, then the new ones."""
    rare = _rarest(known)
    # own random numbers: a model extended twice is the same, and nothing else draws other ones
    noise = torch.randn(count, known.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.cat((known, rare.mean(0) + _NOISE * rare.std() * noise.to(known)))


def _rarest(rows: Tensor) -> Tensor:
    """Return the last quarter of the words' rows: the vocabulary is in order of frequency."""
    words = rows[len(SPECIAL) :] if len(rows) > len(SPECIAL) else rows
    return words[-max(1, len(words) // _RAREST) :]
