"""The vanishing gradient, measured: how much of a word's loss reaches the state of each earlier step.

Bengio, Simard and Frasconi 1994; Pascanu, Mikolov and Bengio 2013.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from captioner.decoder import Decoder, Memory


@dataclass(frozen=True)
class GradientNorms:
    """Mean norms of d loss_t / d state_(t-k) for k = 0, 1, … reach.

    Attributes:
        state: of the gradient that reaches the whole state, which for the LSTM is hidden state and memory.
        hidden: of that part of it that reaches the hidden state.
        pairs: over how many pairs of a caption and a step t the mean is taken; the same ones for every k.
    """

    state: list[float]
    hidden: list[float]
    pairs: int


def gradient_norms(
    decoder: Decoder, memory: Memory, tokens: Tensor, lengths: Tensor, reach: int = 10
) -> GradientNorms:
    """Measure the gradient that reaches each earlier step, under teacher forcing and without dropout.

    loss_t is the cross-entropy of the word predicted at step t alone; state_t is the decoder's state after
    step t, from which that word is predicted. The gradient is the total one, along every path from the
    earlier state to that word: through the recurrent cell, the attention's query and the gate. Only steps
    t >= reach count, so that all k are measured on the same words.

    Args:
        decoder: its dropout is turned off while it is measured.
        memory: for each of N captions.
        tokens: ``(N, T + 1)``: start, the caption, end, padding.
        lengths: ``(N,)`` number of predictions of each caption, its end included.
        reach: the largest k.

    Raises:
        ValueError: if no caption is longer than ``reach``.
    """
    steps = int(lengths.max())
    if steps <= reach:
        raise ValueError(f"no caption has more than {reach} words: choose a smaller reach")
    was_training = decoder.training
    decoder.eval()
    try:
        with torch.enable_grad():
            states = [decoder.start(memory).detach().requires_grad_()]
            outputs = []
            for t in range(steps):
                step = decoder.step(tokens[:, t], states[-1], memory)
                states.append(step.state)
                outputs.append(step.output)
            sums = torch.zeros(2, reach + 1, dtype=torch.float64)
            pairs = 0
            for t in range(reach, steps):
                rows = (lengths > t).nonzero()[:, 0]
                losses = F.cross_entropy(
                    decoder.logits(outputs[t].select(rows)), tokens[rows, t + 1], reduction="sum"
                )
                # captions do not mix: the gradient of the sum holds every caption's own in its row
                earlier = [states[t + 1 - k] for k in range(reach + 1)]
                gradients = torch.autograd.grad(losses, earlier, retain_graph=t + 1 < steps)
                for k, gradient in enumerate(gradients):
                    own = gradient[rows].double()
                    sums[0, k] += own.flatten(1).norm(dim=1).sum().cpu()
                    sums[1, k] += own[:, 0].norm(dim=1).sum().cpu()
                pairs += len(rows)
    finally:
        decoder.train(was_training)
    state, hidden = (sums / pairs).tolist()
    return GradientNorms(state, hidden, pairs)
