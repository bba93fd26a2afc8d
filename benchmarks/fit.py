"""How photos become squares: squashed, the centre cut out, or with bars; scores of each on a data set.

The model was trained with one of the three; the table says what the others cost, or whether one pays.
"""

from __future__ import annotations

import sys
from pathlib import Path

import common

MODES = ("squash", "crop", "letterbox")


def main() -> int:
    """Run it."""
    parser = common.arguments(__doc__)
    parser.add_argument("annotations", type=Path, help="captions in COCO's format")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="*",
        default=[],
        help="folders and tars of the pictures",
    )
    parser.add_argument("--highest", type=int, default=0, help="only those with the highest ids; 0: all")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    import torch
    from captioner_training.evaluate import evaluate

    from captioner import Captioner

    torch.set_num_threads(options.threads)
    common.print_machine(options.threads)
    table = {}
    for mode in MODES:
        captioner = Captioner.load(options.model, device="cpu")
        trained = captioner.model.encoder.preprocess.fit
        (evaluation,) = evaluate(
            captioner, options.annotations, images=options.images, highest=options.highest, fit=mode
        ).values()
        table[mode] = evaluation.scores
    names = list(table[MODES[0]].corpus)
    print(f"\n{table[MODES[0]].images} pictures; the model was trained with {trained}; scores x 100")
    print(f"{'':<10}" + "".join(f"{name:>9}" for name in names) + "   95 % interval of CIDEr")
    for mode, scores in table.items():
        low, high = scores.intervals["CIDEr"]
        values = "".join(f"{100 * scores.corpus[name]:9.1f}" for name in names)
        print(f"{mode:<10}{values}   {100 * low:.1f} to {100 * high:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
