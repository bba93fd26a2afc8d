"""Captions that name what is surely there.

A caption is searched; where it leaves out a thing that the encoder is sure of, the picture is searched again
with the word required. So a captioner says words that it has hardly ever read in a caption, as constrained
beam search with an image tagger does (Anderson et al. 2017, https://arxiv.org/abs/1612.00576). A word that is
improbable everywhere would stand anywhere; so the sentence that begins with the thing is searched, too, and
the one stays whose other words are likelier.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from captioner.calibration import stem
from captioner.encoder import GridFeatures
from captioner.model import CaptionModel
from captioner.neutral import Avoided
from captioner.search import Hypothesis, Machine, Phrase, SearchOptions, search
from captioner.tokenizer import UNKNOWN

MOST = 2
"""At most so many words are required of a caption because they were guessed."""


def write(
    model: CaptionModel,
    features: GridFeatures,
    options: SearchOptions,
    *,
    prefixes: Sequence[Sequence[int]] | None = None,
    requirements: Sequence[Sequence[Phrase]] = (),
    seeds: Sequence[int] | None = None,
    continues: np.ndarray | None = None,
    avoided: Avoided | None = None,
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
        avoided: what must not be said; it is not named either.

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
        avoided=avoided,
    )
    if options.sample or options.name_above >= 1:
        return found
    tries: list[tuple[int, list[int], Machine]] = []  # picture, prefix, what must appear
    wanted = unnamed(model, features, [h[0].tokens for h in found], options.name_above)
    if avoided is not None:
        wanted = [[token for token in missing if avoided.allows([token])] for missing in wanted]
    for row, missing in enumerate(wanted):
        richer = _richer(requirements, [_forms(model, token) for token in missing[:MOST]], continues)
        prefix = list(prefixes[row]) if prefixes is not None else []
        if richer is None or len(prefix) + int(richer.needed[0]) >= options.max_length:
            continue
        tries.append((row, prefix, richer))
        if not prefix and not requirements:
            tries += [(row, begun, richer) for begun in _begun(model, missing[0])]
    if not tries:
        return found
    again = search(
        model.decoder,
        memory.select(torch.tensor([row for row, _, _ in tries], device=memory.mask.device)),
        options,
        prefixes=[prefix for _, prefix, _ in tries],
        machines=[richer for _, _, richer in tries],
        seeds=[seeds[row] for row, _, _ in tries] if seeds is not None else None,
        continues=continues,
        avoided=avoided,
    )
    named: dict[int, list[Hypothesis]] = {}
    for (row, _, _), hypotheses in zip(tries, again, strict=True):
        if row not in named or hypotheses[0].score > _rest(model, named[row][0], wanted[row][0], options):
            named[row] = hypotheses
    for row, hypotheses in named.items():
        found[row] = (
            hypotheses if prefixes is not None and prefixes[row] else [_ungiven(h) for h in hypotheses]
        )
    return found


def _begun(model: CaptionModel, token: int) -> list[list[int]]:
    """Return how a sentence begins that begins with the thing, if the vocabulary has the words."""
    article = model.tokenizer.encode(_article(model.tokenizer.piece(token)))
    return [] if UNKNOWN in article else [[*article, token]]


def _rest(model: CaptionModel, hypothesis: Hypothesis, token: int, options: SearchOptions) -> float:
    """Return the score of a caption's other words, as if the thing had been given."""
    forms = {phrase[0] for phrase in _forms(model, token)}
    mine = [
        float(p)
        for said, p in zip(hypothesis.tokens, hypothesis.token_log_probabilities, strict=True)
        if said in forms
    ]
    length = max(1, len(hypothesis.tokens) - len(mine) + 1)
    return (hypothesis.log_probability - sum(mine)) / length**options.length_penalty


def _ungiven(hypothesis: Hypothesis) -> Hypothesis:
    """Return a caption whose words all count as the model's own: nobody gave them."""
    return replace(hypothesis, given=0)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


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


def _richer(
    requirements: Sequence[Sequence[Phrase]],
    phrases: Sequence[Sequence[Phrase]],
    continues: np.ndarray | None,
) -> Machine | None:
    """Require as many of the guessed words, too, as there are states for; None if there are none."""
    for count in range(len(phrases), 0, -1):
        with suppress(ValueError):
            return Machine([*requirements, *phrases[:count]], continues)
    return None


def _forms(model: CaptionModel, token: int) -> list[Phrase]:
    """Return the word and its plural, as far as the vocabulary has them."""
    tokenizer = model.tokenizer
    word = tokenizer.piece(token)
    same = [tokenizer.encode(form) for form in (f"{word}s", f"{word}es")]
    known = [(ids[0],) for ids in same if len(ids) == 1 and ids[0] != UNKNOWN]
    return [(token,), *known]
