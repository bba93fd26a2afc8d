"""Consistency: the words of a photo depend neither on the batch that it is in nor on its place in the batch.

Varied pictures are captioned one by one, and again in batches of 7 and of 32 and in a shuffled order. Bars:
no caption changes, and no attention weight by more than 1e-4. Then the encoder computes in bfloat16, and the
captions that change are counted (no bar: 16 bits are another model, slightly).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

import common
import numpy as np


def main() -> int:
    """Run it; return 0 if the bars hold."""
    parser = common.arguments(__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--bfloat16", type=int, default=250, help="how many of them also in bfloat16")
    parser.add_argument("--beam", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import torch
    from tqdm import tqdm

    from captioner import Captioner
    from captioner.images import load

    torch.set_num_threads(options.threads)
    common.print_machine(options.threads)
    captioner = Captioner.load(options.model, device=options.device)
    preprocess = captioner.model.encoder.preprocess
    pictures = common.varied(options.pictures, options.seed)
    loaded = [load(picture, preprocess) for picture in tqdm(pictures, total=options.pictures, leave=False)]

    def captions(model: Captioner, order: Sequence[int], size: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for start in tqdm(range(0, len(order), size), leave=False):
            some = order[start : start + size]
            features = model.encode_pixels([loaded[i] for i in some])
            found.update(zip(some, model.caption_batch(features, beam=options.beam), strict=True))
        return found

    order = list(range(len(loaded)))
    shuffled = random.Random(options.seed).sample(order, len(order))
    reference = captions(captioner, order, 1)
    different = len({caption.text for caption in reference.values()})
    print(
        f"{len(order)} pictures, {different} different captions, beam {options.beam}, on {captioner.device}"
    )
    holds = True
    for what, sequence, size in (
        ("batches of 7", order, 7),
        ("batches of 32", order, 32),
        ("batches of 32, shuffled", shuffled, 32),
    ):
        changed, difference = compare(reference, captions(captioner, sequence, size))
        holds &= common.verdict(f"{what}: changed captions", changed, at_most=0)
        holds &= common.verdict(f"{what}: largest difference of attention", difference, at_most=1e-4)
    some = order[: options.bfloat16]
    if some:
        half = Captioner.load(options.model, device=options.device, precision="bfloat16")
        changed, difference = compare(reference, captions(half, some, 32))
        print(
            f"bfloat16 encoder: {changed} captions of {len(some)} change ({changed / len(some):.1%}); in the "
            f"others attention differs by {difference:.2g} at most"
        )
    return 0 if holds else 1


def compare(reference: dict[int, Any], other: dict[int, Any]) -> tuple[int, float]:
    """Return how many captions differ, and the largest difference of attention in those that do not."""
    changed, difference = 0, 0.0
    for i, found in other.items():
        caption = reference[i]
        if found.text != caption.text:
            changed += 1
        elif caption.attention is not None and caption.attention.size:
            difference = max(difference, float(np.abs(caption.attention - found.attention).max()))
    return changed, difference


if __name__ == "__main__":
    sys.exit(main())
