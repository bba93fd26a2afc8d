"""What turns gradients into weights: the optimiser, its schedule, and averages of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captioner.model import CaptionModel
from captioner_training.config import StageConfig


def build_optimiser(model: CaptionModel, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW; no decay for biases, norms and embeddings; the picture's encoder has its own learning rate."""
    groups = []
    parts = [(model.decoder, stage.learning_rate), (model.encoder, stage.encoder_learning_rate)]
    if model.frame_encoder is not None:
        parts.append((model.frame_encoder, stage.learning_rate))
    for module, rate in parts:
        trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        decayed = [p for n, p in trained if p.dim() > 1 and not n.startswith(_EMBEDDINGS)]
        plain = [p for n, p in trained if p.dim() <= 1 or n.startswith(_EMBEDDINGS)]
        for parameters, decay in ((decayed, stage.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "peak": rate})
    return torch.optim.AdamW(groups, lr=stage.learning_rate)


_EMBEDDINGS = ("embedding.", "positions.")


def schedule(stage: StageConfig, step: int, steps: int) -> float:
    """Return the learning rate at a step as a share of its peak.

    Args:
        stage: linear warm-up, then a cosine (Loshchilov and Hutter 2017), steps, or no change.
        step: from 0.
        steps: of the whole stage.
    """
    warmup = stage.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if stage.schedule == "constant":
        return 1.0
    if stage.schedule == "step":
        epoch = step * stage.epochs // steps
        return stage.step_factor ** (epoch // stage.step_epochs)
    position = (step - warmup) / max(1.0, steps - warmup)
    return stage.final + (1 - stage.final) * 0.5 * (1 + math.cos(math.pi * position))


class Average:
    """A mean of the trained weights over time: what is validated and kept.

    Either exponential after every step, with a horizon that grows at first, or the plain mean of the weights
    at the ends of the last few epochs; with neither it is the weights as they are.
    """

    def __init__(self, model: CaptionModel, decay: float, epochs: int = 1) -> None:
        self.decay = decay
        self.epochs = epochs
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.parameters] if decay else []
        self.ends: list[list[Tensor]] = []
        self.best: list[Tensor] = []
        self.updates = 0

    def update(self) -> None:
        """Take in the weights after a step."""
        self.updates += 1
        if self.decay:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def end_epoch(self) -> None:
        """Take in the weights at the end of an epoch."""
        if self.epochs > 1:
            self.ends = [*self.ends, [p.detach().clone() for p in self.parameters]][-self.epochs :]

    def keep(self) -> None:
        """Remember the weights that are in the model now as the best so far."""
        self.best = [p.detach().clone() for p in self.parameters]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the model for a while."""
        kept = [p.detach().clone() for p in self.parameters]
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([p.detach() for p in self.parameters], kept)

    def copy_to_model(self, kept: bool = False) -> None:
        """Put the averaged weights, or those that were kept as the best, into the model for good."""
        if kept and self.best:
            with torch.no_grad():
                torch._foreach_copy_([p.detach() for p in self.parameters], self.best)
            return
        values = self.values
        if self.ends:
            values = [torch.stack(same).mean(0) for same in zip(*self.ends, strict=True)]
        if values:
            with torch.no_grad():
                torch._foreach_copy_([p.detach() for p in self.parameters], values)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and a number."""
        return {"values": self.values, "ends": self.ends, "best": self.best, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        if self.values:
            torch._foreach_copy_(self.values, state["values"])
        self.ends = [self._here(values) for values in state["ends"]]
        self.best = self._here(state["best"]) if state["best"] else []
        self.updates = state["updates"]

    def _here(self, values: list[Tensor]) -> list[Tensor]:
        return [value.to(p.device) for value, p in zip(values, self.parameters, strict=True)]
