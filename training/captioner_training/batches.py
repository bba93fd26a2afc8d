"""Batches: which pictures come when, with which of their captions, and who computes what."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from captioner.tokenizer import PAD, START
from captioner_training.config import StageConfig
from captioner_training.features import Features

Place = tuple[str, int]
"""A picture or clip: the name of its source, and its index there."""


@dataclass(frozen=True, eq=False)
class Batch:
    """N captions of P pictures or clips, longest caption first; perhaps one process's part of a larger batch.

    Attributes:
        features: ``(P, F * R', D')`` of the last frozen block of the encoder.
        mask: ``(P, F * R)`` of the grid; frames that are padding have zeros.
        frames: F.
        places: whose they are, P of them.
        picture: ``(N,)`` which of the P pictures each caption is of.
        tokens: ``(N, T + 1)`` from start to end and padding.
        lengths: ``(N,)`` number of predictions; it stays on the CPU, which decides by it.
        all_tokens: predictions of the whole batch.
        all_captions: captions of the whole batch.
        all_pictures: pictures of the whole batch.
    """

    features: Tensor
    mask: Tensor
    places: Sequence[Place]
    picture: Tensor
    tokens: Tensor
    lengths: Tensor
    all_tokens: int
    all_captions: int
    all_pictures: int
    frames: int = 1

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        if device.type == "cpu":
            return self
        names = ("features", "mask", "picture", "tokens")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def in_order(places: Sequence[Place], epoch: str) -> list[Place]:
    """Return the pictures in an order that depends on the epoch alone."""
    return random.Random(epoch).sample(places, len(places))


def make_parts(
    chosen: Sequence[Place],
    targets: Mapping[str, Sequence[Sequence[Sequence[int]]]],
    features: Mapping[str, Features],
    stage: StageConfig,
    name: str,
    *,
    flips: bool,
    rank: int = 0,
    count: int = 1,
) -> list[Batch]:
    """Gather the parts of a batch that one of several processes computes: features and captions.

    Random choices depend on the name and on the pictures of the whole batch alone, so that a resumed run
    makes the same ones, with any number of processes.

    Args:
        chosen: the pictures of the whole batch.
        targets: token ids of their captions, by source.
        features: what the encoder's frozen blocks give, by source.
        stage: how many captions of each picture, and in how many parts for each process.
        name: of the batch, unlike that of any other.
        flips: whether every other variant of the features is a mirrored picture.
        rank: of the process.
        count: how many processes there are.

    Returns:
        At most ``stage.accumulate`` parts; none if there are fewer pictures than processes.
    """
    chance = random.Random(name)
    variants = []
    for source, _ in chosen:
        views = features[source].variants // (2 if flips else 1)
        view = chance.randrange(views) if views > 1 else 0
        variants.append(2 * view + int(chance.random() < 0.5) if flips else view)
    captions: list[tuple[int, Sequence[int]]] = []
    for position, (source, index) in enumerate(chosen):
        known = targets[source][index]
        some = chance.sample(known, min(stage.captions_per_picture, len(known)))
        captions += [(position, caption) for caption in some]
    seed = chance.getrandbits(32)

    # the pictures with the most captions go round first, so that the parts are about equal
    work = [0] * len(chosen)
    for position, caption in captions:
        work[position] += len(caption)
    ordered = sorted(range(len(chosen)), key=lambda p: -work[p])
    parts = []
    for part in range(rank, count * stage.accumulate, count):
        mine = ordered[part :: count * stage.accumulate]
        if not mine:
            continue
        place = {position: i for i, position in enumerate(mine)}
        share = [(place[position], caption) for position, caption in captions if position in place]
        share.sort(key=lambda row: -len(row[1]))
        lengths = torch.tensor([len(caption) for _, caption in share])
        tokens = torch.full((len(share), int(lengths[0]) + 1), PAD)
        for i, (_, caption) in enumerate(share):
            tokens[i, : len(caption) + 1] = torch.tensor([START, *caption])
        # the seed is the whole batch's: a crop must not depend on who computes it
        data, mask = _read([chosen[p] for p in mine], [variants[p] for p in mine], features, str(seed))
        frames = max(features[chosen[p][0]].frames for p in mine)
        parts.append(
            Batch(
                features=data,
                mask=mask,
                places=[chosen[p] for p in mine],
                picture=torch.tensor([i for i, _ in share]),
                tokens=tokens,
                lengths=lengths,
                all_tokens=sum(len(caption) for _, caption in captions),
                all_captions=len(captions),
                all_pictures=len(chosen),
                frames=frames,
            )
        )
    return parts


def _read(
    places: Sequence[Place], variants: Sequence[int], features: Mapping[str, Features], seed: str
) -> tuple[Tensor, Tensor]:
    """Read each source's pictures together, and put them into the order asked for.

    Where pictures stand beside clips they are padded to as many frames.
    """
    data: list[Tensor] = []
    masks: list[Tensor] = []
    order: list[int] = []
    for source in dict.fromkeys(name for name, _ in places):
        rows = [row for row, (name, _) in enumerate(places) if name == source]
        indices, views = [places[row][1] for row in rows], [variants[row] for row in rows]
        data.append(features[source].read(indices, views, seed=seed))
        masks.append(features[source].mask(indices, views))
        order += rows
    if len(data) == 1:
        return data[0], masks[0]
    back = torch.tensor(order).argsort()
    return _padded(data)[back], _padded(masks)[back]


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Join ``(n, C, …)`` along the first axis, with zeros where C is smaller."""
    most = max(part.shape[1] for part in parts)
    if all(part.shape[1] == most for part in parts):
        return torch.cat(list(parts))
    joined = parts[0].new_zeros(sum(map(len, parts)), most, *parts[0].shape[2:])
    row = 0
    for part in parts:
        joined[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    return joined
