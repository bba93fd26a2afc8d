"""Captioning videos: the speed against decoding and encoding alone, the memory of an hour against a minute.

Speed: `Captioner.caption_segments` against the sum of OpenCV's bare decoding (``grab()`` every frame,
``retrieve()`` those that are sampled) and the encoder's bare forward pass over these frames, decoded and
normalised in memory beforehand: folded, channels-last, batches of 8, as many threads, in the library's way,
which is a thread for each core. Bar: at least 0.75 of that rate. Besides, the ratio with batches called one
after the other, each by all threads, and with the encoder as it was trained (not folded); and greedy search.
Clips: gradio's world.mp4, and 1280 x 720 pixels of H.264 made of moving photos. All take turns in one run;
medians over the rounds.

Memory: a clip of small frames, an hour of it and a minute, captioned in a process each; and an hour in which
nothing happens. Bar: at most 1.10 times as much as the minute takes.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

import common
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from captioner import Captioner

Measures = dict[str, Callable[[], object]]
Seconds = dict[str, list[tuple[float, float]]]
"""By name, of each round: by the clock, and of the processor."""

_BATCH = 8
OWN_WAY = "encoder, library's way"

_CAPTION = """
import sys, torch
from captioner import Captioner
torch.set_num_threads(int(sys.argv[2]))
captioner = Captioner.load(sys.argv[4] or None, device="cpu")
count, last = 0, None
for segment in captioner.caption_segments(sys.argv[1], every=float(sys.argv[3])):
    count, last = count + 1, segment
print(count, last.end)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return 0 if the bars hold."""
    parser = common.arguments(__doc__)
    parser.add_argument("--seconds", type=common.positive, default=40, help="of the clips for the speed")
    parser.add_argument("--repeats", type=common.positive, default=5)
    parser.add_argument("--minutes", type=common.positive, default=60, help="of the clips for the memory")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between sampled frames")
    parser.add_argument("--threads", type=common.positive, default=2, help="and cores, where possible")
    parser.add_argument("--only", choices=("speed", "memory"), help="one of the two")
    options = parser.parse_args(arguments)
    common.take_cores(options.threads)
    common.print_machine(options.threads)
    holds = True
    with tempfile.TemporaryDirectory() as name:
        if options.only != "speed":  # before torch is imported: a process begins with the peak of its parent
            holds &= memory(Path(name), options)
        if options.only != "memory":
            holds &= speed(Path(name), options)
    return 0 if holds else 1


# --------------------------------------------------------------------------------------------------
# Speed


def speed(folder: Path, options: argparse.Namespace) -> bool:
    """Print rates and ratios; return whether the bar holds."""
    world, large = folder / "world.mp4", folder / "720p.mp4"
    spec = util.find_spec("gradio")
    if spec is None or spec.origin is None:
        raise SystemExit('the clips of gradio are needed: pip install "captioner[dev]"')
    common.repeat(Path(spec.origin).parent / "media_assets" / "videos" / "world.mp4", world, options.seconds)
    write(large, pan(options.seconds, 25, (1280, 720)), 25, "libx264")

    import torch

    from captioner import Captioner

    torch.set_num_threads(options.threads)
    captioner = Captioner.load(options.model, device="cpu")
    holds = True
    for clip in (world, large):
        seconds = in_turn(measures(captioner, clip, options), options.repeats)
        holds &= tell(clip, seconds, options.seconds, options.threads)
    return holds


def measures(captioner: Captioner, clip: Path, options: argparse.Namespace) -> Measures:
    """Return what is measured of a clip."""
    import torch

    from captioner import checkpoint, video
    from captioner.identity import BUILT_IN
    from captioner.images import load, normalise
    from captioner.parallel import ahead

    preprocess = captioner.model.encoder.preprocess
    raw = [torch.from_numpy(load(f.image, preprocess)[0]) for f in video.frames(clip, options.every)]
    batches = [normalise(torch.stack(raw[i : i + _BATCH]), preprocess) for i in range(0, len(raw), _BATCH)]
    laid_out = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    folded = copy.deepcopy(captioner.model.encoder.network)
    unfolded = checkpoint.load(options.model or BUILT_IN).model.encoder.network.eval().requires_grad_(False)

    @torch.inference_mode()
    def plain(network: torch.nn.Module, batches: list[torch.Tensor]) -> None:
        for batch in batches:
            network(batch)

    def one(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return folded(batch)

    def own_way() -> None:
        try:
            for _ in ahead(one, laid_out, options.threads, lambda: torch.set_num_threads(1)):
                pass
        finally:
            torch.set_num_threads(options.threads)

    def captions(**search: int) -> None:
        for _ in captioner.caption_segments(clip, every=options.every, **search):
            pass

    return {
        "decoding": partial(decode, clip, options.every),
        "encoder": partial(plain, folded, laid_out),
        OWN_WAY: own_way,
        "encoder, not folded": partial(plain, unfolded, batches),
        "captions": captions,
        "captions, greedy": partial(captions, beam=1),
    }


def decode(clip: Path, every: float) -> int:
    """Decode a clip with OpenCV alone and take a frame every so often; return how many."""
    import cv2

    capture = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG)
    gap = max(1, round(every * capture.get(cv2.CAP_PROP_FPS)))
    number = count = 0
    while capture.grab():
        if number % gap == 0:
            count += capture.retrieve()[0]
        number += 1
    return count


def in_turn(measures: Measures, repeats: int) -> Seconds:
    """Return the seconds of each measure, by the clock and of the processor; the first does not count."""
    seconds: Seconds = {name: [] for name in measures}
    chance = random.Random(0)
    for number in range(repeats + 1):
        for name in chance.sample(list(measures), len(measures)):
            begun, used = time.perf_counter(), time.process_time()
            measures[name]()
            if number:
                seconds[name].append((time.perf_counter() - begun, time.process_time() - used))
    return seconds


def tell(clip: Path, seconds: Seconds, length: float, cores: int) -> bool:
    """Print the rates; return whether the bar holds."""
    print(f"\n{clip.name}, {length:g} seconds; seconds of video a second, and a second of processor time:")
    for name, values in seconds.items():
        wall, used = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"  {name:<24}{length / wall:>8.1f}{length / used:>8.1f}")
    print(f"  on {cores} cores, {length / best(seconds['captions']):.1f} in the best of {len(values)} rounds")

    def share(captions: str, encoder: str, column: int = 0) -> float:
        return statistics.median(
            (d[column] + e[column]) / c[column]
            for d, e, c in zip(seconds["decoding"], seconds[encoder], seconds[captions], strict=True)
        )

    holds = common.verdict("captions / (decoding + encoder)", share("captions", OWN_WAY), at_least=0.75)
    for captions in ("captions", "captions, greedy"):
        others = [
            f"{share(captions, OWN_WAY):.2f}",
            f"{share(captions, OWN_WAY, 1):.2f} by processor time",
            f"{share(captions, 'encoder'):.2f} with the encoder called plainly",
            f"{share(captions, 'encoder, not folded'):.2f} and not folded",
        ]
        print(f"  {captions}: {', '.join(others)}", flush=True)
    return holds


def best(values: list[tuple[float, float]]) -> float:
    """Return the least seconds by the clock."""
    return min(wall for wall, _ in values)


# --------------------------------------------------------------------------------------------------
# Memory


def memory(folder: Path, options: argparse.Namespace) -> bool:
    """Print the peaks; return whether the bar holds."""
    minute, still = folder / "minute.mp4", folder / "still minute.mp4"
    size, rate = (160, 120), 10
    write(minute, pan(60, rate, size), rate, "mpeg4")
    first = next(pan(60, rate, size))
    write(still, (first for _ in range(60 * rate)), rate, "mpeg4")
    clips = {"a minute": minute}
    for name, source in (("of several shots", minute), ("in which nothing happens", still)):
        clips[f"{options.minutes} minutes {name}"] = folder / f"long {source.name}"
        common.repeat(source, folder / f"long {source.name}", 60.0 * options.minutes)
    # the short one is over before all that happens at once by chance has done so: the median of three
    peaks = {
        name: statistics.median(peak(clip, options) for _ in range(3 if name == "a minute" else 1))
        for name, clip in clips.items()
    }
    holds = True
    for name in list(peaks)[1:]:
        holds &= common.verdict(f"memory, {name} / a minute", peaks[name] / peaks["a minute"], at_most=1.10)
    return holds


def peak(clip: Path, options: argparse.Namespace) -> float:
    """Caption a clip in a process of its own and return the megabytes that it held at most."""
    assert "torch" not in sys.modules
    command = [sys.executable, "-c", _CAPTION, str(clip), str(options.threads), str(options.every)]
    begun = time.perf_counter()
    process = subprocess.Popen([*command, str(options.model or "")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read().decode().split()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{clip.name}: captioning ended with {process.returncode}")
    megabytes = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    took = time.perf_counter() - begun
    what = f"{said[0]} segments, to {float(said[1]):.1f} s"
    print(f"  {clip.name}: {what}, in {took:.0f} s: {megabytes:.0f} MB at most", flush=True)
    return megabytes


# --------------------------------------------------------------------------------------------------
# Clips


def pan(seconds: float, rate: int, size: tuple[int, int], shot: float = 8.0) -> Iterator[Image.Image]:
    """Yield the frames of shots of several seconds, each a slow pan and zoom over a photo."""
    photos = list(common.photos().values())
    chance = random.Random(0)
    for number in range(round(seconds * rate)):
        count = round(shot * rate)
        if number % count == 0:
            photo = photos[number // count % len(photos)]
            scale = max(1.5 * size[0] / photo.width, 1.5 * size[1] / photo.height)
            photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
            ends = [(chance.uniform(0.8, 1), chance.random(), chance.random()) for _ in range(2)]
        at = number % count / count
        share, x, y = ((1 - at) * a + at * b for a, b in zip(*ends, strict=True))
        width, height = share * 1.5 * size[0], share * 1.5 * size[1]
        left, top = x * (photo.width - width), y * (photo.height - height)
        box = (max(0.0, left), max(0.0, top), left + width, top + height)
        yield photo.resize(size, Image.Resampling.BILINEAR, box=box)


def write(path: Path, pictures: Iterator[Image.Image], rate: int, codec: str) -> None:
    """Write a clip with PyAV."""
    import av

    with av.open(str(path), "w") as output:
        stream = None
        for picture in pictures:
            if stream is None:
                stream = output.add_stream(codec, rate=rate)
                stream.width, stream.height = picture.size
                stream.pix_fmt = "yuv420p"
                if codec == "libx264":
                    stream.options = {"preset": "veryfast"}
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
        assert stream is not None
        output.mux(stream.encode())


if __name__ == "__main__":
    sys.exit(main())
