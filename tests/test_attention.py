import math

import numpy as np
import pytest
import torch
from torch import Tensor

from captioner.attention import (
    ATTENTIONS,
    AdditiveAttention,
    DotProductAttention,
    masked_mean,
    masked_softmax,
)

N, G, C, E, H, A = 3, 4, 7, 5, 6, 8
KINDS = [AdditiveAttention, DotProductAttention]


def make(kind: type) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    attention = kind(E, H, A)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    mask = torch.tensor([[1.0] * 7, [1, 0, 1, 0.5, 0, 1, 0.25], [0, 0, 0, 1, 0, 0, 0]])
    return attention, torch.randn(N, C, E), torch.randn(N * G, H), mask


def reference(attention: torch.nn.Module, cells: Tensor, queries: Tensor, mask: Tensor) -> np.ndarray:
    """The formulas, one query and one cell at a time, in 64 bits."""
    p = {k: v.detach().double().numpy() for k, v in attention.named_parameters()}
    weights = np.zeros((N, G, C))
    for n in range(N):
        for g in range(G):
            query = p["query.weight"] @ queries[n * G + g].double().numpy() + p["query.bias"]
            for c in range(C):
                key = p["key.weight"] @ cells[n, c].double().numpy()
                if isinstance(attention, AdditiveAttention):
                    energy = float(p["energy.weight"][0] @ np.tanh(key + query))
                else:
                    energy = float(key @ query) / math.sqrt(A)
                weights[n, g, c] = float(mask[n, c]) * math.exp(energy)
            weights[n, g] /= weights[n, g].sum()
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_the_formula(kind: type) -> None:
    attention, cells, queries, mask = make(kind)
    found = attention(queries, attention.prepare(cells), mask)
    assert found.shape == (N, G, C)
    np.testing.assert_allclose(
        found.detach().numpy(), reference(attention, cells, queries, mask), rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_one_and_masked_cells_get_nothing(kind: type) -> None:
    attention, cells, queries, mask = make(kind)
    weights = attention(queries, attention.prepare(cells), mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, G))
    assert (weights[mask[:, None].expand_as(weights) == 0] == 0).all()  # exactly
    assert (weights[mask[:, None].expand_as(weights) > 0] > 0).all()
    assert (weights[2, :, 3] == 1).all()  # the only cell there is


def test_a_cell_that_is_half_covered_counts_half() -> None:
    weights = masked_softmax(torch.zeros(1, 1, 3), torch.tensor([[1.0, 0.5, 0.5]]))
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.25, 0.25]]]))
    # two halves of a cell together are the cell
    energies = torch.tensor([[[0.3, -1.2]]])
    whole = masked_softmax(energies, torch.ones(1, 2))
    halves = masked_softmax(energies[..., [0, 0, 1]], torch.tensor([[0.5, 0.5, 1.0]]))
    torch.testing.assert_close(halves[..., :2].sum(-1), whole[..., 0])


@pytest.mark.parametrize("kind", KINDS)
def test_queries_of_one_picture_share_its_memory(kind: type) -> None:
    attention, cells, queries, mask = make(kind)
    shared = attention(queries, attention.prepare(cells), mask)
    repeated = attention(
        queries, attention.prepare(cells.repeat_interleave(G, 0)), mask.repeat_interleave(G, 0)
    )
    torch.testing.assert_close(shared.flatten(0, 1), repeated.squeeze(1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_under_the_mask_leaves_no_trace(kind: type) -> None:
    attention, cells, queries, mask = make(kind)
    other = torch.where(mask[..., None] == 0, torch.full_like(cells, 1e6), cells)
    first = attention(queries, attention.prepare(cells), mask)
    second = attention(queries, attention.prepare(other), mask)
    assert torch.equal(first, second)
    assert torch.equal(masked_mean(cells, mask), masked_mean(other, mask))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_to_what_is_seen_and_nowhere_else(kind: type) -> None:
    attention, cells, queries, mask = make(kind)
    cells.requires_grad_()
    weights = attention(queries, attention.prepare(cells), mask)
    (weights * torch.randn_like(weights)).sum().backward()
    assert cells.grad is not None
    assert cells.grad.isfinite().all()
    assert (cells.grad[mask == 0] == 0).all()
    assert (cells.grad[0].abs().sum(-1) > 0).all()


def test_mean_is_weighted_by_the_mask() -> None:
    cells = torch.tensor([[[1.0], [3.0], [100.0]]])
    torch.testing.assert_close(masked_mean(cells, torch.tensor([[1.0, 0.5, 0.0]])), torch.tensor([[5 / 3]]))
    # a faint region counts like a strong one
    torch.testing.assert_close(masked_mean(cells, torch.tensor([[0.01, 0.01, 0.0]])), torch.tensor([[2.0]]))


def test_none_is_among_the_attentions() -> None:
    assert set(ATTENTIONS) == {"additive", "dot", "none"}
    assert ATTENTIONS["none"] is None
