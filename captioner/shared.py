"""What all steps of a teacher-forced pass look at: keys and cells, with gradients that are made once.

Autograd makes the gradient of such a tensor anew at every step, as large as the tensor itself (20 MB for the
cells of 160 captions), and adds these up. Here every step leaves what its share of the gradient is made of,
and the sum is made when all have done so. It is the same but for rounding.

A pass may be differentiated several times, but each time as far as these tensors: after
`torch.autograd.grad` with respect to others alone, shares would be left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

Shares = list[tuple[Tensor, Tensor]]


class SharedMatrices:
    """Matrices ``(N, K, M)``, one for each row, that are multiplied with a vector at every step."""

    def __init__(self, matrices: Tensor) -> None:
        self.shares: Shares = []
        self.matrices = _Share.apply(_lowered(matrices), self.shares, _products)

    def multiply(self, x: Tensor) -> Tensor:
        """Return ``x @ matrix``, ``(n, M)``, for ``(n, K)``: the first n rows, not more than before."""
        x = x.to(self.matrices.dtype)
        if torch.compiler.is_compiling():
            return _multiply(x, self.matrices)
        return _Multiply.apply(x, self.matrices, self.shares)


class SharedKeys:
    """Keys ``(N, C, A)`` of additive attention, and the weights ``(A,)`` that make energies of them."""

    def __init__(self, keys: Tensor, weights: Tensor) -> None:
        self.shares: Shares = []
        self.keys = _Share.apply(_lowered(keys), self.shares, _scaled)
        self.weights = weights.to(self.keys.dtype)

    def energies(self, queries: Tensor) -> Tensor:
        """Return ``weights . tanh(key + query)``, ``(n, C)``, for queries ``(n, A)`` of the first n rows."""
        queries = queries.to(self.keys.dtype)
        if torch.compiler.is_compiling():
            return torch.tanh(self.keys[: len(queries)] + queries[:, None]) @ self.weights
        return _Energies.apply(queries, self.weights, self.keys, self.shares)


def _lowered(x: Tensor) -> Tensor:
    """Return a tensor in the precision of mixed-precision training: once, and not at every step."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Share(torch.autograd.Function):
    """Hands a tensor to the steps; its gradient is made of the shares that they leave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Shares, finish: Callable[[Shares], Tensor]) -> Tensor:
        ctx.shares, ctx.finish = shares, finish
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        if ctx.shares:  # else the steps were compiled
            gradient = ctx.finish(ctx.shares)
            ctx.shares.clear()
        return gradient, None, None


def _multiply(x: Tensor, matrices: Tensor) -> Tensor:
    return torch.bmm(x[:, None], matrices[: len(x)])[:, 0]


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: Tensor, shares: Shares) -> Tensor:
        ctx.save_for_backward(x, matrices)
        ctx.shares = shares
        return _multiply(x, matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, matrices = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.shares.append((x, gradient))
        return _multiply(gradient, matrices.mT), None, None


def _products(shares: Shares) -> Tensor:
    # (N, T, …), zero where a caption has ended; the last share is that of the first step, which has all rows
    left, right = (pad_sequence(list(side)) for side in zip(*reversed(shares), strict=True))
    return torch.bmm(left.mT, right)


class _Energies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, weights: Tensor, keys: Tensor, shares: Shares) -> Tensor:
        hidden = (keys[: len(queries)] + queries[:, None]).tanh_()
        ctx.save_for_backward(hidden, weights)
        ctx.shares, ctx.shape = shares, keys.shape
        return hidden @ weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weights = ctx.saved_tensors
        # gradient * (1 - hidden ** 2); times the weights only when that is less work
        slope = torch.ops.aten.tanh_backward(gradient[:, :, None], hidden)
        if ctx.needs_input_grad[2]:
            if not ctx.shares:
                precise = torch.promote_types(hidden.dtype, torch.float32)
                ctx.shares.append((hidden.new_zeros(ctx.shape, dtype=precise), weights))
            ctx.shares[0][0][: len(slope)] += slope
        return slope.sum(1) * weights, gradient.flatten() @ hidden.flatten(0, 1), None, None


def _scaled(shares: Shares) -> Tensor:
    ((total, weights),) = shares
    return (total * weights).to(weights.dtype)
