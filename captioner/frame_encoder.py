"""The frame encoder: what came before, and perhaps what comes after, beside every frame's features.

A recurrent network runs over the frames in time, as in Video Description (Venugopalan et al. 2015,
https://arxiv.org/abs/1505.00487), and its state is put beside the features that it read: nothing of them is
lost, and with the state's weights at zero in what follows, the model is the one without it. Shapes: N clips,
F frames, R cells, D feature width, H width of the state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from captioner.attention import masked_mean

FRAME_CELLS = ("none", "rnn_tanh", "rnn_relu", "gru", "lstm")
OVER = ("cells", "frames")


@dataclass(frozen=True)
class FrameConfig:
    """The frame encoder's shape.

    Attributes:
        cell: one of `FRAME_CELLS`; ``none``: frames are not related to each other.
        bidirectional: read the frames from the end, too, which needs the whole clip. Without it, a frame
            knows those before it only, and a live stream can be captioned.
        over: ``cells``: a state for each cell, over what is seen at that place; ``frames``: one for each
            frame, over the mean of its cells.
        width: H, of the state in one direction.
        positions: learn what it means to be the first, second, … frame, for so many; those that follow count
            as the last. 0: none.
    """

    cell: str = "none"
    bidirectional: bool = False
    over: str = "cells"
    width: int = 256
    positions: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            wanted = {"str": str, "int": int, "bool": bool}[str(field.type)]
            if not isinstance(value, wanted) or (isinstance(value, bool) and field.type != "bool"):
                raise ValueError(f"frames.{field.name} must be {field.type}, not {value!r}")
        for name, known in (("cell", FRAME_CELLS), ("over", OVER)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"frames.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}"
                )
        if self.width < 1:
            raise ValueError(f"frames.width must be at least 1, not {self.width}")
        if self.positions < 0:
            raise ValueError(f"frames.positions must be at least 0, not {self.positions}")
        if self.bidirectional and self.cell == "none":
            raise ValueError("frames.bidirectional needs a frames.cell that reads them")

    @property
    def active(self) -> bool:
        """Whether there is anything to compute."""
        return self.cell != "none" or self.positions > 0

    @property
    def live(self) -> bool:
        """Whether a frame's features depend on the past alone."""
        return not self.bidirectional

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FrameConfig:
        """Rebuild from a dict; an unknown key is an error that names it."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown key frames.{min(unknown)}")
        return cls(**data)


class FrameEncoder(nn.Module):
    """Puts a state over time beside every cell's features.

    Attributes:
        width: D', of what it gives: D and the state's H, or twice H if bidirectional.
    """

    def __init__(self, config: FrameConfig, feature_width: int) -> None:
        """Build it for features of width D."""
        super().__init__()
        self.config = config
        states = 0 if config.cell == "none" else config.width * (2 if config.bidirectional else 1)
        self.width = feature_width + states
        self.positions = nn.Embedding(config.positions, feature_width) if config.positions else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        self.past = _recurrent(config, feature_width)
        self.future = _recurrent(config, feature_width) if config.bidirectional else None

    def forward(self, data: Tensor, mask: Tensor) -> Tensor:
        """Return features ``(N, F, R, D')``.

        Args:
            data: ``(N, F, R, D)``.
            mask: ``(N, F, R)``, 0 to 1; frames of zeros at the end are padding and change nothing.
        """
        if self.positions is not None:
            last = self.positions.num_embeddings - 1
            order = torch.arange(data.shape[1], device=data.device).clamp(max=last)
            data = data + self.positions(order)[:, None]
        if self.past is None:
            return data
        states = [self._read(self.past, data, mask)]
        if self.future is not None:
            turned = _turn(mask)
            back = self._read(self.future, _take(data, turned), _take(mask, turned))
            states.append(_take(back, turned))
        return torch.cat((data, *states), -1)

    def _read(self, network: nn.RNNBase, data: Tensor, mask: Tensor) -> Tensor:
        """Return the states ``(N, F, R, H)`` after each frame."""
        clips, frames, cells, width = data.shape
        if self.config.over == "frames":
            seen = mask.flatten(0, 1)
            padding = seen.amax(-1, keepdim=True) == 0  # has no mean
            means = masked_mean(data.flatten(0, 1), seen.masked_fill(padding, 1.0))
            states, _ = network(means.view(clips, frames, width))
            return states[:, :, None].expand(-1, -1, cells, -1)
        courses = data.transpose(1, 2).reshape(clips * cells, frames, width)
        states, _ = network(courses)
        return states.view(clips, cells, frames, -1).transpose(1, 2)


def _recurrent(config: FrameConfig, inputs: int) -> nn.RNNBase | None:
    width = config.width
    network: nn.RNNBase
    if config.cell == "none":
        return None
    if config.cell == "lstm":
        network = nn.LSTM(inputs, width, batch_first=True)
    elif config.cell == "gru":
        network = nn.GRU(inputs, width, batch_first=True)
    else:
        kind = config.cell.removeprefix("rnn_")
        network = nn.RNN(inputs, width, batch_first=True, nonlinearity=kind)
    for name, parameter in network.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
            if config.cell == "lstm" and "ih" in name:  # remember by default (Jozefowicz et al. 2015)
                nn.init.ones_(parameter[width : 2 * width])
            continue
        for gate in range(0, len(parameter), width):
            if "ih" in name:  # torch's own range forgets how many inputs there are, and gates would saturate
                nn.init.xavier_uniform_(parameter[gate : gate + width])
            else:
                nn.init.orthogonal_(parameter[gate : gate + width])
    return network


def _turn(mask: Tensor) -> Tensor:
    """Return the order ``(N, F)`` in which each clip's frames run backwards; padding stays where it is."""
    frames = mask.shape[1]
    order = torch.arange(frames, device=mask.device)
    # the last frame of which anything is seen
    ends = torch.where(mask.amax(-1) > 0, order, -1).amax(1, keepdim=True)
    return torch.where(order <= ends, ends - order, order)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Return ``(N, F, …)`` with each clip's frames in the order ``(N, F)``."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]
