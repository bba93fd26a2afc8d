"""Go on from a trained captioner on data of one's own: load it, add what is new, set its dropout.

New words get new rows at the end of the vocabulary; every old word keeps its id and, to the bit, its
embedding, output weights and bias. A new frame encoder's states get new columns, of zeros, in the projection
of the cells: at first the captioner says of clips what it said without it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner import checkpoint
from captioner.frame_encoder import FrameConfig
from captioner.identity import BUILT_IN
from captioner.model import CaptionModel
from captioner.tokenizer import SPECIAL, UNKNOWN, WordTokenizer, split_words
from captioner_training.config import ConfigError, StartConfig, VideoSection

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


def begin(
    config: StartConfig, captions: Iterable[str], *, min_count: int, video: VideoSection | None = None
) -> Start:
    """Do all that a config's ``start`` asks for.

    Args:
        config: the section.
        captions: of the training pictures alone.
        min_count: a new word must occur so often in them.
        video: the section on clips; None for its defaults.

    Raises:
        ConfigError: if the checkpoint cannot be used, or has another frame encoder.
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
    wanted = None if video is None else video.build()
    if wanted is not None or config.frames is not None:
        model, added = with_frames(model, wanted, config.frames)
        lines += added
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


def frame_config(model: CaptionModel) -> FrameConfig | None:
    """Return the shape of a model's frame encoder; None if it has none."""
    return None if model.frame_encoder is None else model.frame_encoder.config


def with_frames(
    model: CaptionModel, wanted: FrameConfig | None, frames: str | None
) -> tuple[CaptionModel, list[str]]:
    """Give a model a frame encoder, or another way to attend to several frames.

    What the new parts contribute is zero at first: with ``joint`` attention the model says of a clip what it
    said before, to rounding, and of a picture with every kind of attention.

    Args:
        model: stays as it is.
        wanted: the frame encoder; None leaves the model's own, if it has one.
        frames: see `captioner.decoder.DecoderConfig`; None leaves the model's own.

    Returns:
        a model that shares nothing with the other, and lines for the person who trains.

    Raises:
        ConfigError: if it has a frame encoder of another shape, or has no attention to factorise.
    """
    known = frame_config(model)
    if known is not None and wanted is not None and known != wanted:
        raise ConfigError(
            f"video: the captioner under start has a frame encoder of its own ({_shape(known)}), and not "
            f"{_shape(wanted)}: leave out video.cell and the like, which keeps it"
        )
    config = model.decoder.config
    if frames == "factorised" and config.attention == "none":
        raise ConfigError(
            "start.frames: factorised needs an attention, and the captioner under start has none"
        )
    if frames is not None:
        config = replace(config, frames=frames)
    lines = []
    if known is None and wanted is not None:
        lines.append(f"start: a new frame encoder ({_shape(wanted)}), which changes nothing at first")
    if config.frames != model.decoder.config.frames:
        lines.append(f"start: attends to frames in another way: {config.frames}")
    old = copy.deepcopy(model)
    new = CaptionModel(old.encoder, config, old.tokenizer, wanted or known)
    state = new.state_dict()
    for name, tensor in old.state_dict().items():
        if name in state:
            state[name] = torch.zeros_like(state[name])
            state[name][tuple(slice(n) for n in tensor.shape)] = tensor
    new.load_state_dict(state)
    if new.frame_encoder is not None and new.frame_encoder.positions is not None and known is None:
        nn.init.zeros_(new.frame_encoder.positions.weight)
    return new.train(model.training), lines


def _shape(config: FrameConfig) -> str:
    """Return what is not usual about a frame encoder, in the words of a config."""
    usual = FrameConfig().to_dict()
    changed = {key: value for key, value in config.to_dict().items() if value != usual[key]}
    return ", ".join(f"{key}: {str(value).lower()}" for key, value in changed.items())


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
