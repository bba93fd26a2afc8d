"""What the benchmarks share: photos out of installed packages, timings taken in turn, the report's head.

Nothing here imports torch before it is asked to, so that a script may choose its cores first, and so that one
that measures the memory of others stays small itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageEnhance, ImageOps

if TYPE_CHECKING:
    from captioner_training.data import DataSet

_PHOTOS = {
    "gradio": ("media_assets/images", ("cheetah.jpg", "cheetah1.jpg", "lion.jpg", "tower.jpg", "groot.jpeg")),
    "skimage": (
        "data",
        ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    ),
}


def photos() -> dict[str, Image.Image]:
    """Return the photos that come with gradio and scikit-image, by name, in RGB.

    Raises:
        SystemExit: if one of the two packages is not installed.
    """
    found = {}
    for package, (folder, names) in _PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f'the photos of {package} are needed: pip install "captioner[dev]"')
        for name in names:
            with Image.open(Path(spec.origin).parent / folder / name) as image:
                found[Path(name).stem] = image.convert("RGB")
    return found


def varied(count: int, seed: int = 0) -> Iterator[Image.Image]:
    """Yield pictures cut, turned, mirrored and recoloured out of `photos`, short side 224 to 500 pixels.

    The same seed gives the same pictures, and a larger count begins with those of a smaller one.
    """
    sources = list(photos().values())
    chance = random.Random(seed)
    for number in range(count):
        image = sources[number % len(sources)]
        width, height = (round(side * chance.uniform(0.5, 1.0)) for side in image.size)
        left, top = chance.randint(0, image.width - width), chance.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
        if chance.random() < 0.5:
            image = ImageOps.mirror(image)
        if chance.random() < 0.5:
            image = image.rotate(chance.uniform(-20, 20), Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))
        for kind in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
            image = kind(image).enhance(chance.uniform(0.5, 1.5))
        side = chance.randint(224, 500) / min(image.size)
        yield image.resize((max(1, round(image.width * side)), max(1, round(image.height * side))))


def write_photos(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Save `varied` pictures as JPEG and return their paths."""
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]
    for path, image in zip(paths, varied(count, seed), strict=True):
        image.save(path, quality=90)
    return paths


def write_phone_photos(folder: Path, count: int) -> list[Path]:
    """Save photos enlarged to 12 megapixels, as phones take them, and return their paths."""
    paths = []
    for number, image in enumerate(varied(count)):
        size = (4000, 3000) if image.width >= image.height else (3000, 4000)
        paths.append(folder / f"phone-{number:04d}.jpg")
        image.resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def repeat(source: Path, path: Path, seconds: float) -> None:
    """Write a clip of that length out of copies of another, packet by packet, without encoding it again."""
    import av

    with av.open(str(path), "w") as output:
        target = None
        shift = 0.0
        while shift < seconds - 1e-3:
            with av.open(str(source)) as clip:
                stream = clip.streams.video[0]
                target = target or output.add_stream_from_template(stream)
                assert stream.time_base is not None
                assert stream.duration is not None
                for packet in clip.demux(stream):
                    if packet.dts is None or packet.pts is None:
                        continue
                    if shift + float(packet.pts * stream.time_base) >= seconds:
                        continue
                    packet.pts += round(shift / stream.time_base)
                    packet.dts += round(shift / stream.time_base)
                    packet.stream = target
                    output.mux(packet)
                shift += float(stream.duration * stream.time_base)


def take_cores(count: int) -> int:
    """Confine this process to ``count`` cores where the system allows it; return how many it has then.

    To be called before torch is imported: its pools of threads inherit the cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    return len(os.sched_getaffinity(0))


def in_turn(measures: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each measure, ``repeats`` times, after one that does not count.

    They take turns, each round in another order, so that whatever else the machine does hits all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    chance = random.Random(0)
    for number in range(repeats + 1):
        for name in chance.sample(list(measures), len(measures)):
            begun = time.perf_counter()
            measures[name]()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median over the rounds of the ratio of two measures."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def verdict(what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> bool:
    """Print a value beside its bar and return whether it holds."""
    if at_least is not None:
        holds, bar = value >= at_least, f"at least {at_least:g}"
    else:
        assert at_most is not None
        holds, bar = value <= at_most, f"at most {at_most:g}"
    print(f"{what}: {value:.3g} ({bar}: {'holds' if holds else 'DOES NOT HOLD'})", flush=True)
    return holds


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint; the built-in model if left out")
    return parser


class _Source(argparse.Action):
    """Collects ``--annotations A --images I … --highest K``, given once or several times, in ``sources``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        if self.dest == "annotations":
            namespace.sources = [*namespace.sources, {"annotations": values}]
        elif not namespace.sources or self.dest in namespace.sources[-1]:
            parser.error(f"{option} belongs to the --annotations before it, once: name that file first")
        else:
            namespace.sources[-1][self.dest] = values


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options that name data sets; they repeat, and `load_sources` reads them."""
    parser.set_defaults(sources=[])
    for name, settings in {
        "--annotations": {
            "type": Path,
            "help": "captions in COCO's format; repeat it for a further data set",
        },
        "--images": {"type": Path, "nargs": "+", "help": "folders and tars of its pictures"},
        "--highest": {"type": positive, "help": "only those of its pictures with the highest ids"},
    }.items():
        parser.add_argument(name, action=_Source, default=argparse.SUPPRESS, **settings)  # type: ignore[arg-type]


def load_sources(options: argparse.Namespace) -> list[DataSet]:
    """Return the data sets that the options of `add_sources` name, each named after its folder and file.

    Raises:
        SystemExit: if there are none, or one cannot be used.
    """
    from captioner_training.config import SourceConfig
    from captioner_training.data import load_data_set

    if not options.sources:
        raise wrong_use("name the pictures: --annotations FILE --images FOLDER_OR_TAR …")
    found = []
    for source in options.sources:
        annotations = source["annotations"].absolute()
        places = source.get("images") or [annotations.parent]
        try:
            config = SourceConfig(
                annotations=annotations.name,
                images=[str(place.absolute()) for place in places],
                only_highest=source.get("highest", 0),
            )
            name = f"{annotations.parent.name}/{annotations.stem}"
            found.append(load_data_set(name, config, annotations.parent))
        except ValueError as error:
            raise wrong_use(str(error)) from None
    return found


def positive(text: str) -> int:
    """Read a whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text}")
    return number


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, by Wilson (1927); 0 to 1 if there is nothing to share."""
    if not total:
        return 0.0, 1.0
    z = 1.959964
    share, room = count / total, z * z / total
    middle = (share + room / 2) / (1 + room)
    half = z / (1 + room) * math.sqrt(share * (1 - share) / total + room / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_text(count: int, total: int) -> str:
    """Return a share with its interval as text: ``12 of 40: 30 % (18-45)``."""
    if not total:
        return "0 of 0"
    low, high = share_interval(count, total)
    return f"{count} of {total}: {100 * count / total:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def wrong_use(message: str) -> SystemExit:
    """Return what a script raises for a user's mistake: one line on stderr, exit code 2."""
    print(message, file=sys.stderr)
    return SystemExit(2)


def print_machine(threads: int | str) -> None:
    """Print what the numbers depend on."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("captioner", "torch", "pillow", "numpy"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"machine: {_processor()}, {cores} cores for this process, {platform.platform()}")
    print(f"versions: Python {platform.python_version()}, {versions}; threads: {threads}", flush=True)


def _version(package: str) -> str:
    if package != "captioner":
        return metadata.version(package)
    spec = importlib.util.find_spec(package)  # importing it would import torch
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "_version.py").read_text().split('"')[-2]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
