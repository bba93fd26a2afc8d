"""Self-critical training: captions that the model draws itself, judged by CIDEr-D (Rennie et al. 2017,
https://arxiv.org/abs/1612.00563), each against the mean of the other captions drawn of its picture (Luo 2020,
https://arxiv.org/abs/2003.09971).

The policy is the model as the search knows it: padding, start and ``<unk>`` are never said, the end and
pieces that continue a word never come first; a softmax over the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from captioner.decoder import Memory
from captioner.model import CaptionModel, TeacherForced
from captioner.tokenizer import END, PAD, START, UNKNOWN, Tokenizer
from captioner_training.cider import CiderD

_NEVER = float("-inf")
_CUT = 0.75


def self_critical_loss(
    model: CaptionModel,
    memory: Memory,
    judge: CiderD,
    pictures: Sequence[int],
    *,
    drawn_from: Memory | None = None,
    samples: int,
    max_length: int,
    all_captions: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a batch, or of a part of one (the parts add up to the whole), and what happened.

    It is a sum over a caption's tokens and a mean over captions. Without dropout its gradient is, in the mean
    over the draws, exactly that of minus the expected reward of a caption. Its value means nothing.

    Args:
        model: in training mode, dropout acts on the pass that learns; captions are drawn without it.
        memory: of P pictures, a row for each.
        drawn_from: the memory that captions are drawn from, made without dropout; the same one if None.
        judge: gives rewards; the end token counts if it stands in the references.
        pictures: ``(P,)`` which of the judge's pictures each row is.
        samples: K, at least 2, captions drawn of each picture.
        max_length: of a caption in tokens, the end included; one that does not end by then is judged without
            an end.
        all_captions: how many are drawn in the whole batch.
        temperature: of the policy; below 1 it is more like what the search does.
        generator: of the draws, on the memory's device; torch's own if None.

    Returns:
        the loss, and the means over these captions of ``reward`` (CIDEr-D, 0 to 10), ``length`` (tokens
        without the end), ``ended`` (the share of captions that did) and ``spread`` (the standard deviation
        of a picture's rewards).

    Raises:
        ValueError: if there are fewer than 2 samples: nothing to compare with.
    """
    if samples < 2:
        raise ValueError(f"self-critical training needs at least 2 samples of a picture, not {samples}")
    drawn = sample(
        model,
        drawn_from or memory,
        samples=samples,
        max_length=max_length,
        temperature=temperature,
        generator=generator,
    )
    rewards = torch.from_numpy(judge.rewards([p for p in pictures for _ in range(samples)], drawn))
    advantage = advantages(rewards.view(-1, samples)).flatten()

    order = sorted(range(len(drawn)), key=lambda i: -len(drawn[i]))
    rows = torch.tensor(order)
    tokens = torch.full((len(drawn), len(drawn[order[0]]) + 1), PAD)
    for row, i in enumerate(order):
        tokens[row, : len(drawn[i]) + 1] = torch.tensor([START, *drawn[i]])
    lengths = torch.tensor([len(drawn[i]) for i in order])
    device = memory.mask.device
    tokens, lengths, picture = tokens.to(device), lengths.to(device), (rows // samples).to(device)
    output = model(memory.select(picture), tokens, lengths)
    log_probs = log_probabilities(output, tokens[:, 1:], lengths, model.tokenizer, temperature)
    weights = advantage[rows].to(log_probs).repeat_interleave(lengths)
    loss = -(weights * log_probs).sum() / all_captions
    return loss, {
        "reward": float(rewards.mean()),
        "length": sum(len(c) - (c[-1] == END) for c in drawn) / len(drawn),
        "ended": sum(c[-1] == END for c in drawn) / len(drawn),
        "spread": float(rewards.view(-1, samples).std(1).mean()),
    }


def advantages(rewards: Tensor) -> Tensor:
    """Return each reward less the mean of the others of its row: ``(P, K)`` for ``(P, K)``."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


@torch.no_grad()
def sample(
    model: CaptionModel,
    memory: Memory,
    *,
    samples: int,
    max_length: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Draw captions at random, without dropout.

    Args:
        model: what draws; it comes back in the mode that it was in.
        memory: of P pictures; the captions of a picture share its row.
        samples: K captions of each picture.
        max_length: in tokens, the end included.
        temperature: of the softmax.
        generator: on the memory's device; torch's own if None.

    Returns:
        P * K captions as token ids, those of a picture next to each other; each ends with the end token,
        unless it is ``max_length`` tokens long.
    """
    decoder = model.decoder
    training, device = decoder.training, memory.mask.device
    never, first = _forbidden(model.tokenizer)
    never, first = never.to(device), first.to(device)
    count = memory.mask.shape[0]
    drawn = torch.full((count, samples, max_length), PAD, device=device)
    decoder.eval()
    try:
        state = decoder.start(memory).repeat_interleave(samples, 0)
        tokens = torch.full((count, samples), START, device=device)
        running = torch.ones(count, samples, dtype=torch.bool, device=device)
        rows = torch.arange(count, device=device)  # the pictures with captions that have not ended
        for t in range(max_length):
            step = decoder.step(tokens.flatten(), state, memory)
            state = step.state
            going = running.flatten().nonzero().squeeze(1)  # the output layer costs most; others are done
            logits = decoder.logits(step.output.select(going)).float() / temperature
            logits[:, first if t == 0 else never] = _NEVER
            tokens = torch.full_like(tokens, PAD)
            tokens.view(-1)[going] = _draw(torch.softmax(logits, -1), generator)
            drawn[rows, :, t] = tokens
            running &= tokens != END
            kept = running.any(1).nonzero().squeeze(1)
            if len(kept) == 0:
                break
            if len(kept) <= _CUT * len(rows):  # not at every step: cuts cost
                slots = (kept[:, None] * samples + torch.arange(samples, device=device)).flatten()
                memory, state = memory.select(kept), state[slots]
                tokens, running, rows = tokens[kept], running[kept], rows[kept]
    finally:
        decoder.train(training)
    return [[token for token in caption if token != PAD] for caption in drawn.flatten(0, 1).tolist()]


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a token ``(N,)`` for each row ``(N, V)``: one random number each; `torch.multinomial` takes V."""
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    chance = torch.rand(total.shape, generator=generator, device=total.device) * total
    # below the total in spite of rounding, so that what has no probability is never drawn
    chance = torch.minimum(chance, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, chance, right=True).squeeze(1)


def log_probabilities(
    output: TeacherForced,
    targets: Tensor,
    lengths: Tensor,
    tokenizer: Tokenizer,
    temperature: float = 1.0,
) -> Tensor:
    """Return the log-probabilities ``(L,)``, in nats, under which `sample` draws the L = sum(lengths) tokens.

    Args:
        output: of the teacher-forced pass.
        targets: ``(N, T)`` token ids, padding after the end.
        lengths: ``(N,)`` number of tokens of each caption.
        tokenizer: of the model.
        temperature: of the softmax.
    """
    valid = torch.arange(targets.shape[1], device=lengths.device) < lengths[:, None]
    never, first = (indices.to(lengths.device) for indices in _forbidden(tokenizer))
    logits = (output.logits.float() / temperature).index_fill(1, never, _NEVER)
    starts = lengths.cumsum(0) - lengths
    logits[starts[:, None], first] = _NEVER
    return -F.cross_entropy(logits, targets[valid], reduction="none")


def _forbidden(tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return the tokens that are never said, and those that are not said first."""
    never = [PAD, START, UNKNOWN]
    first = [*never, END]
    if tokenizer.kind == "bpe":
        first += _continuing(cast(Any, tokenizer))  # hashable, like any object
    return torch.tensor(never), torch.tensor(first)


@lru_cache(maxsize=8)
def _continuing(tokenizer: Any) -> list[int]:
    """Return the pieces that continue a word."""
    return [i for i in range(UNKNOWN + 1, len(tokenizer)) if tokenizer.piece(i).startswith("##")]
