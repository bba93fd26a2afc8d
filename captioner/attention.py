"""Attention over the cells of grid features: additive, scaled dot product, or none.

All take the cells once (`prepare`) and queries at each step, and obey the same mask: weights are
proportional to ``mask * exp(energy)``, so that a cell that is half covered counts half. Several queries may
share one picture (captions, beams): N pictures, N * G queries, those of a picture next to each other.
Factorised attention over a clip is attention over its frames times attention over the cells within each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from captioner.shared import SharedKeys, SharedMatrices


def masked_softmax(energies: Tensor, mask: Tensor) -> Tensor:
    """Return weights proportional to ``mask * exp(energies)`` that sum to 1 over the last axis.

    Args:
        energies: ``(N, G, C)``.
        mask: ``(N, C)``, 0 to 1; each row needs a cell above 0.
    """
    # log(0) is -inf, which softmax turns into an exact 0
    return torch.softmax(energies + mask.log()[:, None], dim=-1)


def masked_mean(cells: Tensor, mask: Tensor) -> Tensor:
    """Return the mean ``(N, E)`` of cells ``(N, C, E)`` weighted by the mask ``(N, C)``."""
    weights = mask / mask.sum(-1, keepdim=True)
    return torch.einsum("nc,nce->ne", weights, cells)


def factorised_softmax(
    energies: Tensor, frame_energies: Tensor, log_mask: Tensor, frame_log_mask: Tensor
) -> Tensor:
    """Return attention over frames times attention over the cells within each, ``(…, F * R)``.

    The weights sum to 1 over frames and cells together; of a single frame they are those of `masked_softmax`.

    Args:
        energies: ``(…, F * R)``.
        frame_energies: ``(…, F)``.
        log_mask, frame_log_mask: from `frame_log_masks`.
    """
    within = torch.softmax(energies.unflatten(-1, log_mask.shape[-2:]) + log_mask, dim=-1)
    over = torch.softmax(frame_energies + frame_log_mask, dim=-1)
    return (within * over[..., None]).flatten(-2)


def frame_log_masks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return logarithms of a mask ``(…, F, R)``: within each frame, the same shape, and of frames ``(…, F)``.

    A frame counts if any of it may be seen, else not at all.
    """
    seen = mask.amax(-1) > 0
    # a frame that does not count needs a cell all the same, or its softmax would be of nothing
    return torch.where(seen[..., None], mask, 1.0).log(), seen.to(mask.dtype).log()


def mean_over_frames(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return each cell's mean over the frames in which it is seen, ``(N, R, D)``, and a mask ``(N, R)``.

    Args:
        features: ``(N, F, R, D)``.
        mask: ``(N, F, R)``, 0 to 1; a cell counts as much as in the frame that shows most of it.
    """
    shares = mask / mask.sum(1, keepdim=True).clamp(min=1e-9)
    return torch.einsum("nfr,nfrd->nrd", shares, features), mask.amax(1)


class AdditiveAttention(nn.Module):
    """``v . tanh(W cell + U query)`` (Bahdanau, Cho and Bengio 2015)."""

    def __init__(self, cell_width: int, query_width: int, width: int) -> None:
        super().__init__()
        self.key = nn.Linear(cell_width, width, bias=False)
        self.query = nn.Linear(query_width, width)
        self.energy = nn.Linear(width, 1, bias=False)

    def prepare(self, cells: Tensor) -> Tensor:
        """Map cells ``(N, C, E)`` to keys ``(N, C, A)``, once for each picture."""
        return self.key(cells)

    def share(self, keys: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what makes energies ``(n, C)`` of ``query(…)``, ``(n, A)``, at the steps of a long pass."""
        return SharedKeys(keys, self.energy.weight[0]).energies

    def energies(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return ``(N, G, C)`` for the queries ``(N * G, H)``."""
        queries = self.query(query).view(keys.shape[0], -1, 1, keys.shape[-1])
        return self.energy(torch.tanh(keys[:, None] + queries)).squeeze(-1)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Return weights ``(N, G, C)`` for the queries ``(N * G, H)``."""
        return masked_softmax(self.energies(query, keys), mask)


class DotProductAttention(nn.Module):
    """``(W cell) . (U query) / sqrt(A)`` (Vaswani et al. 2017, equation 1)."""

    def __init__(self, cell_width: int, query_width: int, width: int) -> None:
        super().__init__()
        self.key = nn.Linear(cell_width, width, bias=False)
        self.query = nn.Linear(query_width, width)

    def prepare(self, cells: Tensor) -> Tensor:
        """Map cells ``(N, C, E)`` to keys ``(N, C, A)``, once for each picture."""
        return self.key(cells)

    def share(self, keys: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what makes energies ``(n, C)`` of ``query(…)``, ``(n, A)``, at the steps of a long pass."""
        return SharedMatrices(keys.mT / math.sqrt(keys.shape[-1])).multiply

    def energies(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return ``(N, G, C)`` for the queries ``(N * G, H)``."""
        queries = self.query(query).view(keys.shape[0], -1, keys.shape[-1])
        return torch.bmm(queries, keys.transpose(1, 2)) / math.sqrt(keys.shape[-1])

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Return weights ``(N, G, C)`` for the queries ``(N * G, H)``."""
        return masked_softmax(self.energies(query, keys), mask)


ATTENTIONS = {"additive": AdditiveAttention, "dot": DotProductAttention, "none": None}
"""``none``: the decoder sees the picture only through the mean of its cells, its initial state."""
