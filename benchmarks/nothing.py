"""Pictures that show nothing: does the model know that it does not know?

Scripted pictures of every kind of `captioner_training.nothing`, drawn with another seed than the one that
calibration uses, and photos, cut and recoloured, from installed packages: the mean confidence of their
captions, and how many would be hedged in plain text.
"""

from __future__ import annotations

import statistics
import sys

import common


def main() -> int:
    """Run it."""
    parser = common.arguments(__doc__)
    parser.add_argument("--pictures", type=int, default=30, help="of each kind")
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="0 is the one that calibration uses")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    import torch
    from captioner_training import nothing

    from captioner import Captioner
    from captioner.caption import SURE

    torch.set_num_threads(options.threads)
    common.print_machine(options.threads)
    captioner = Captioner.load(options.model, device="cpu")
    if captioner.calibration is None:
        print("the model has no calibration: its confidences are bare probabilities")
    kinds = {kind: nothing.pictures(kind, options.pictures, options.seed) for kind in nothing.KINDS}
    kinds["photos as they are"] = list(common.photos().values())
    kinds["photos, varied"] = list(common.varied(options.photos, options.seed))
    print(f"\nhedged: confidence below {SURE}")
    print(f"{'':<20}{'pictures':>9}{'confidence':>12}{'hedged':>9}   the most confident caption")
    for kind, pictures in kinds.items():
        captions = [
            caption
            for start in range(0, len(pictures), 16)
            for caption in captioner.caption_batch(pictures[start : start + 16])
        ]
        mean = statistics.mean(caption.confidence for caption in captions)
        hedged = statistics.mean(not caption.sure for caption in captions)
        surest = max(captions, key=lambda caption: caption.confidence)
        numbers = f"{len(pictures):>9}{mean:>12.3f}{hedged:>9.0%}"
        print(f"{kind:<20}{numbers}   {surest.confidence:.2f} {surest.text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
