"""The loss: teacher-forced cross-entropy with label smoothing and doubly stochastic attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from captioner.model import TeacherForced
from captioner_training.config import LossConfig


def caption_loss(
    output: TeacherForced,
    targets: Tensor,
    config: LossConfig,
    *,
    tokens: int,
    captions: int,
) -> Tensor:
    """Return the scalar loss of a batch, or of a part of one: the parts add up to the whole.

    Args:
        output: of the model's teacher-forced pass over N captions.
        targets: ``(N, T)`` token ids, the end included, padding after it.
        config: label smoothing (Szegedy et al. 2016), reduction, and the weight of the doubly stochastic
            term (Xu et al. 2015, equation 14).
        tokens, captions: how many there are in the whole batch.
    """
    wanted = targets.flatten().index_select(0, output.positions)
    loss = F.cross_entropy(output.logits, wanted, label_smoothing=config.label_smoothing, reduction="sum")
    loss = loss / (tokens if config.reduction == "tokens" else captions)
    if config.doubly_stochastic and output.attention is not None:
        # every cell should get its share of the looks: sum over the steps near 1
        looked = output.attention.sum(1)
        loss = loss + config.doubly_stochastic * ((1 - looked) ** 2).sum() / captions
    return loss
