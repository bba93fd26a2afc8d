"""Export where the model looked, as arrays, for a study of attention.

    python examples/attention_maps.py PHOTOS MAPS

For each photo writes MAPS/NAME.npz with ``words`` (T,), ``probability`` (T,), ``attention`` (T, H, W), which
sums to 1 for each word, and ``box``: the pixels of the photo that the H x W cells cover (left, top, right,
bottom).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from captioner import Captioner
from captioner.batch import caption_files, find_files


def export(photos: Path, maps: Path, captioner: Captioner | None = None) -> list[Path]:
    """Write the arrays and return their files."""
    captioner = captioner or Captioner.load()
    maps.mkdir(parents=True, exist_ok=True)
    written = []
    for result in caption_files(captioner, find_files([photos])):
        if result.caption is None or result.caption.attention is None:
            print(result.error or f"{result.path}: the model has no attention", file=sys.stderr)
            continue
        caption = result.caption
        written.append(maps / f"{Path(result.path).name}.npz")
        np.savez_compressed(
            written[-1],
            words=np.array([word.text for word in caption.words]),
            probability=np.array([word.probability for word in caption.words]),
            attention=caption.attention[:, 0].reshape(-1, *caption.grid),
            box=np.array(caption.fit.box),
        )
    return written


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"{len(export(Path(sys.argv[1]), Path(sys.argv[2])))} files")
