"""Regions: of two photos side by side, does the caption of one half tell of that half?

Each half is captioned through ``region=``, with the whole picture encoded, and by cutting it out; and the
whole picture without either. With a data set each caption is scored (CIDEr) against people's captions
of its own half and of the other one; without, captions of the photos in installed packages are printed.
"""

from __future__ import annotations

import argparse
import random
import sys
from io import BytesIO
from pathlib import Path

import common
from PIL import Image

SIDES = ("left", "right")
WAYS = ("region", "cut out", "whole")


def main() -> int:
    """Run it."""
    parser = common.arguments(__doc__)
    parser.add_argument("--annotations", type=Path, help="captions in COCO's format")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="folders and tars of the pictures")
    parser.add_argument("--highest", type=int, default=0, help="only those with the highest ids; 0: all")
    parser.add_argument("--pairs", type=int, default=200, help="at most so many pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    import torch
    from tqdm import tqdm

    from captioner import Captioner

    torch.set_num_threads(options.threads)
    common.print_machine(options.threads)
    captioner = Captioner.load(options.model, device="cpu")
    pairs = from_data(options) if options.annotations else from_packages()
    captions: dict[str, dict[str, str]] = {way: {} for way in WAYS}
    own: dict[str, list[str]] = {}
    other: dict[str, list[str]] = {}
    for number, halves in enumerate(tqdm(pairs, disable=options.annotations is None)):
        joined, boxes = side_by_side([image for image, _ in halves])
        features = captioner.encode(joined)
        whole = captioner.caption(features).text
        for side, box in enumerate(boxes):
            key = f"{number} {SIDES[side]}"
            captions["region"][key] = captioner.caption(features, region=box).text
            captions["cut out"][key] = captioner.caption(joined.crop(box)).text
            captions["whole"][key] = whole
            own[key], other[key] = halves[side][1], halves[1 - side][1]
    if options.annotations is None:
        for key in own:
            print(f"\n{key}: {own[key][0]}")
            for way in WAYS:
                print(f"  {way:<8} {captions[way][key]}")
        return 0

    from captioner_training.metrics import Scorer

    scorers = {"own half": Scorer(own), "other half": Scorer(other)}
    print(f"\n{len(pairs)} pairs, CIDEr x 100 against people's captions of the half")
    print(f"{'':<10}" + "".join(f"{name:>12}" for name in scorers))
    for way in WAYS:
        values = [
            scorer.score(captions[way], metrics=("CIDEr",), intervals=False).corpus["CIDEr"]
            for scorer in scorers.values()
        ]
        print(f"{way:<10}" + "".join(f"{100 * value:12.1f}" for value in values))
    return 0


def side_by_side(
    images: list[Image.Image],
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Return two pictures pasted at one height, and the box of each."""
    height = 320
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    joined = Image.new("RGB", (sum(image.width for image in scaled), height))
    boxes, left = [], 0
    for image in scaled:
        joined.paste(image, (left, 0))
        boxes.append((left, 0, left + image.width, height))
        left += image.width
    return joined, boxes


def from_packages() -> list[list[tuple[Image.Image, list[str]]]]:
    """Return pairs of the photos that come with installed packages, with their names."""
    named = [(image, [name]) for name, image in common.photos().items()]
    return [[named[i], named[i + len(named) // 2]] for i in range(len(named) // 2)]


def from_data(options: argparse.Namespace) -> list[list[tuple[Image.Image, list[str]]]]:
    """Return pairs of different pictures of a data set, with people's captions."""
    from captioner_training.config import SourceConfig
    from captioner_training.data import load_data_set

    places = options.images or [options.annotations.parent]
    source = SourceConfig(
        annotations=options.annotations.name,
        images=[str(place.absolute()) for place in places],
        only_highest=options.highest,
    )
    data = load_data_set("data", source, options.annotations.absolute().parent)
    order = random.Random(options.seed).sample(data.pictures, len(data))
    halves = [
        (Image.open(BytesIO(data.store.read(picture.file))).convert("RGB"), list(picture.captions))
        for picture in order[: 2 * options.pairs]
    ]
    return [halves[i : i + 2] for i in range(0, len(halves) - 1, 2)]


if __name__ == "__main__":
    sys.exit(main())
