"""The word memory: what the encoder guesses is there, as words that the decoder can attend to.

A second, multi-label head on the encoder (Fang et al. 2015, https://arxiv.org/abs/1411.4952) guesses which
words people would use of the picture; the likeliest of them, embedded, are a memory beside the grid, attended
with weights of its own (semantic attention, You et al. 2016, https://arxiv.org/abs/1603.03925).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner.attention import masked_mean


class Guesses(NamedTuple):
    """The likeliest words, best first: token ids, probabilities 0 to 1, and whether each names a thing.

    All are ``(N, W)``.
    """

    tokens: Tensor
    probabilities: Tensor
    things: Tensor


class WordGuesser(nn.Module):
    """Gives each of K words the probability that a caption of the picture holds it.

    Attributes:
        head: from the mean of the cells that may be seen to K logits.
        tokens: ``(K,)`` ids of the words in the vocabulary.
        things: ``(K,)`` 1 for the names of things that a sure guess may put into a caption, else 0.
    """

    tokens: Tensor
    things: Tensor

    def __init__(self, feature_width: int, concepts: int) -> None:
        """Build it for features of width D and K words, whose ids are filled in later."""
        super().__init__()
        self.head = nn.Linear(feature_width, concepts)
        self.register_buffer("tokens", torch.zeros(concepts, dtype=torch.int32))
        self.register_buffer("things", torch.zeros(concepts, dtype=torch.int32))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return logits ``(N, K)`` for grid features ``(N, C, D)`` with their mask ``(N, C)``."""
        return self.head(masked_mean(features, mask))

    def best(self, logits: Tensor, count: int) -> Guesses:
        """Return the likeliest words of logits ``(N, K)``."""
        likeliest, places = logits.topk(min(count, logits.shape[-1]), -1)
        return Guesses(self.tokens.long()[places], torch.sigmoid(likeliest), self.things[places] > 0)
