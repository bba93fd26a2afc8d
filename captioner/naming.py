"""Captions that name what is surely there.

A caption is searched; where it leaves out a thing that the encoder is sure of, the picture is searched again
with the word required. So a captioner says words that it has hardly ever read in a caption, as constrained
beam search with an image tagger does (Anderson et al. 2017, https://arxiv.org/abs/1612.00576).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from captioner.calibration import stem
from captioner.encoder import GridFeatures
from captioner.model import CaptionModel
from captioner.search import Hypothesis, Machine, Phrase, SearchOptions, search

MOST = 2
"""At most so many words are required of a caption because they were guessed."""

_REQUIRED = 6


def write(
    model: CaptionModel,
    features: GridFeatures,
    options: SearchOptions,
    *,
    prefixes: Sequence[Sequence[int]] | None = None,
    requirements: Sequence[Sequence[Phrase]] = (),
    seeds: Sequence[int] | None = None,
    continues: np.ndarray | None = None,
) -> list[list[Hypothesis]]:
    """Search captions for a batch, and name what ``options.name_above`` says; see `captioner.search.search`.

    Args:
        model: in evaluation mode.
        features: ``(B, F, R, D)`` on the model's device.
        options: how to search.
        prefixes: for each picture, the token ids that its caption begins with.
        requirements: words that must appear in all captions, see `captioner.search.Machine`.
        seeds: for each picture, of its random numbers.
        continues: ``(V,)`` whether a token continues a word (BPE).

    Raises:
        ValueError: for impossible options, or words that do not fit.
    """
    memory = model.memory(features)
    count = len(features)
    machine = Machine(requirements, continues) if requirements else None
    found = search(
        model.decoder,
        memory,
        options,
        prefixes=prefixes,
        machines=[machine] * count if machine else None,
        seeds=seeds,
        continues=continues,
    )
    room = _REQUIRED - len(requirements)
    if options.sample or options.name_above >= 1 or room < 1:
        return found
    rows, machines = [], []
    for row, missing in enumerate(unnamed(model, features, [h[0].tokens for h in found], options.name_above)):
        if not missing:
            continue
        phrases = [_forms(model, token) for token in missing[: min(MOST, room)]]
        richer = Machine([*requirements, *phrases], continues)
        given = len(prefixes[row]) if prefixes is not None else 0
        if given + int(richer.needed[0]) < options.max_length:
            rows.append(row)
            machines.append(richer)
    if rows:
        again = search(
            model.decoder,
            memory.select(torch.tensor(rows, device=memory.mask.device)),
            options,
            prefixes=[prefixes[row] for row in rows] if prefixes is not None else None,
            machines=machines,
            seeds=[seeds[row] for row in rows] if seeds is not None else None,
            continues=continues,
        )
        for row, hypotheses in zip(rows, again, strict=True):
            found[row] = hypotheses
    return found


def unnamed(
    model: CaptionModel, features: GridFeatures, captions: Sequence[Sequence[int]], above: float
) -> list[list[int]]:
    """Return the things guessed with a greater probability that each picture's caption leaves out.

    Plurals and simple inflections count as the same word.
    """
    guesses = model.guesses(features)
    if guesses is None:
        return [[] for _ in captions]
    tokenizer = model.tokenizer
    result = []
    for tokens, probabilities, things, caption in zip(
        guesses.tokens.tolist(),
        guesses.probabilities.tolist(),
        guesses.things.tolist(),
        captions,
        strict=True,
    ):
        said = {stem(tokenizer.piece(token)) for token in caption}
        missing: dict[str, int] = {}
        for token, probability, thing in zip(tokens, probabilities, things, strict=True):
            name = stem(tokenizer.piece(token))
            if thing and probability > above and name not in said:
                missing.setdefault(name, token)
        result.append(list(missing.values()))
    return result


def _forms(model: CaptionModel, token: int) -> list[Phrase]:
    """Return the word and its plural, as far as the vocabulary has them."""
    tokenizer = model.tokenizer
    word = tokenizer.piece(token)
    same = [tokenizer.encode(form) for form in (f"{word}s", f"{word}es")]
    known = [(ids[0],) for ids in same if len(ids) == 1 and tokenizer.piece(ids[0]) != "<unk>"]
    return [(token,), *known]
