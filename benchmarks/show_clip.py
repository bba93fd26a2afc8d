"""Make the clip and the sheet that the documentation shows: pans over photos of scikit-image.

    python benchmarks/show_clip.py

Writes docs/images/clip.mp4 and docs/images/clip_sheet.jpg: a cup of coffee by Rachel Michetti and a cat by
Stéfan van der Walt, both CC0. Needs captioner[video] and scikit-image.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from skimage import data

from captioner import Captioner
from captioner.video import frames

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIZE = (384, 256)
RATE = 25
SECONDS = 4


def pan(
    photo: np.ndarray, begin: tuple[float, float, float], end: tuple[float, float, float]
) -> Iterator[Image.Image]:
    """Move a window over a photo: ``(centre x, centre y, share of the width)``, each 0 to 1."""
    image = Image.fromarray(photo)
    for step in np.linspace(0, 1, SECONDS * RATE):
        x, y, share = (1 - step) * np.array(begin) + step * np.array(end)
        width = share * image.width
        height = width * SIZE[1] / SIZE[0]
        left = np.clip(x * image.width - width / 2, 0, image.width - width)
        top = np.clip(y * image.height - height / 2, 0, image.height - height)
        yield image.resize(SIZE, Image.Resampling.LANCZOS, (left, top, left + width, top + height))


def main() -> None:
    """Write the clip, and the sheet of a caption for both of its shots."""
    pictures = [
        *pan(data.coffee(), (0.5, 0.5, 0.75), (0.55, 0.5, 0.9)),
        *pan(data.chelsea(), (0.35, 0.4, 0.7), (0.6, 0.4, 0.8)),
    ]
    clip = IMAGES / "clip.mp4"
    with av.open(str(clip), "w") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"crf": "27", "preset": "slow"})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, RATE)
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
    captioner = Captioner.load()
    print(captioner.caption_video(clip, segment=None, shots=True))
    (both,) = captioner.caption_video(clip, segment=None, every=1.0).segments  # two shots taken for one
    both.overlay([frame.image for frame in frames(clip, 1.0)]).save(IMAGES / "clip_sheet.jpg", quality=80)
    print(f"{clip.stat().st_size} bytes")


if __name__ == "__main__":
    main()
