"""The feature cache: building it against a plain loop, reading it at random, and reading without a cache.

The plain loop goes over the same pictures batch by batch: decode one after the other, normalise, one forward
pass with all threads, for the pictures and for their mirror images; its features stay in memory. Bar: the
cache is built, on disk, at least as fast. Random reads are batches as training reads them, one variant for
each picture, out of pages that the system has in memory. Beside them stands NumPy's indexing of one large
memory map followed by `astype`, with masks made at every read. Bar: at least as fast, masks included.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import common


def main() -> int:
    """Run it; return 0 if the bars hold."""
    parser = common.arguments(__doc__)
    parser.add_argument("--pictures", type=int, default=64, help="photos of 224 to 500 pixels")
    parser.add_argument(
        "--encoder", default="efficientnet_lite0", help="with random weights: as fast as others"
    )
    parser.add_argument(
        "--fit", choices=("squash", "crop", "letterbox"), help="the encoder's own if left out"
    )
    parser.add_argument("--crops", type=int, default=0, help="of each picture beside the whole")
    parser.add_argument("--batch", type=int, default=32, help="pictures read together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    common.take_cores(options.threads)

    from dataclasses import replace

    import numpy as np
    import torch
    from captioner_training.data import DataSet, Picture, PictureStore
    from captioner_training.features import FeatureCache, LivePictures, load_pixels

    from captioner.encoder import Encoder, photo_mask
    from captioner.images import normalise

    torch.set_num_threads(options.threads)
    common.print_machine(options.threads)
    torch.manual_seed(0)
    encoder = Encoder(options.encoder).eval()
    if options.fit:
        resize = encoder.preprocess.resize if options.fit == "crop" else None
        preprocess = replace(encoder.preprocess, fit=options.fit, resize=resize)
        encoder = Encoder(options.encoder, preprocess=preprocess).eval()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = common.write_photos(folder, options.pictures)
        pictures = tuple(Picture(i, path.name, ("",)) for i, path in enumerate(paths))
        data = DataSet("photos", pictures, PictureStore([folder]))
        built = iter(range(10**6))

        def build() -> FeatureCache:
            where = folder / f"cache{next(built)}"
            return FeatureCache(where, data, encoder, True, crops=options.crops).build(progress=False)

        @torch.inference_mode()
        def plain() -> None:
            for start in range(0, len(data), 32):
                rows = range(start, min(start + 32, len(data)))
                pixels, _ = load_pixels(data, rows, encoder)
                for view in (pixels, pixels.flip(-1)):
                    encoder(normalise(view, encoder.preprocess)).half()

        measures: dict[str, Callable[[], object]] = {"cache": build, "plain loop": plain}
        seconds = common.in_turn(measures, options.repeats)
        per_picture = {"cache": 2 * (1 + options.crops), "plain loop": 2}
        rates = {n: [len(data) * per_picture[n] / s for s in seconds[n]] for n in measures}
        for key, values in rates.items():
            print(f"{key}: {statistics.median(values):.1f} views a second")
        cache = build()
        print(f"{cache.size / len(data) / cache.variants / 1000:.1f} kB a view, shape {cache.shape[2:]}")
        fast = common.verdict(
            "views a second, cache : plain loop",
            common.ratio(rates["cache"], rates["plain loop"]),
            at_least=1,
        )

        large = np.memmap(folder / "large", np.float16, "w+", shape=cache.shape)
        everything = range(len(data))
        for variant in range(cache.variants):
            large[variant] = cache.read(everything, [variant] * len(data)).numpy()
        large.flush()
        large = np.memmap(folder / "large", np.float16, "r", shape=cache.shape)
        live = LivePictures(data, encoder, True, crops=options.crops)
        chance = random.Random(0)
        draws = [
            [chance.choices(range(n), k=options.batch) for n in (len(data), cache.variants)]
            for _ in range(20)
        ]

        def sharded() -> None:
            for rows, variants in draws:
                cache.read(rows, variants)
                cache.mask(rows, variants)

        def indexed() -> None:
            for rows, variants in draws:
                torch.from_numpy(large[variants, rows].astype(np.float32))
                torch.tensor([photo_mask(encoder.grid, cache.fits[i]) for i in rows])

        def computed() -> None:
            live.read(*draws[0])

        measures = {"cache": sharded, "indexing": indexed, "no cache": computed}
        seconds = common.in_turn(measures, 3 * options.repeats)
        seconds["no cache"] = [len(draws) * s for s in seconds["no cache"]]
        for key, values in seconds.items():
            one = statistics.median(values) / len(draws)
            rate = f"{options.batch / one:,.0f} a second"
            print(f"reading, {key}: {1000 * one:.2f} ms for {options.batch} pictures, {rate}")
        quick = common.verdict(
            "reading, indexing : cache", common.ratio(seconds["indexing"], seconds["cache"]), at_least=1
        )
        print(f"reading, no cache : cache: {common.ratio(seconds['no cache'], seconds['cache']):.0f}")
    return 0 if fast and quick else 1


if __name__ == "__main__":
    sys.exit(main())
