"""What Ray costs: the same photos captioned through Ray Data and plainly, in one run on the same machine.

Both get the same number of cores: Ray a worker on each, the plain way a thread on each. The cluster is
started before the clock; its pool of workers is not, because every run has to start one: the time to the
first record tells. The rates are those of the last three quarters, when all workers are there; beside the
time on the wall stands that of the processors, of all of Ray's processes, which a busy machine disturbs less.
Then the same with a model that does nothing, on files that are not read, so that only Ray's handling of them
remains: how many files a second one driver can feed, however many machines there are.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import psutil


@dataclass(frozen=True)
class Taken:
    """Seconds: to the first record, and for each file on the wall and of processors."""

    first: float
    wall: float
    processor: float


def main() -> int:
    """Run it; there is no bar."""
    parser = common.arguments(__doc__)
    parser.add_argument("--pictures", type=common.positive, default=1024, help="photos of 224 to 500 pixels")
    parser.add_argument("--cores", type=common.positive, default=2)
    parser.add_argument("--batch-size", type=common.positive, default=32)
    parser.add_argument("--repeats", type=common.positive, default=3)
    parser.add_argument("--empty", type=int, default=20_000, help="files with nothing to do; 0 for none")
    options = parser.parse_args()
    common.take_cores(options.cores)

    import torch

    from captioner import Captioner
    from captioner.batch import caption_media, to_record
    from captioner.batch.on_ray import Worker, caption_on_ray, import_ray
    from captioner.batch.sources import Source

    torch.set_num_threads(options.cores)
    common.print_machine(options.cores)
    captioner = Captioner.load(options.model, device="cpu")
    ray = import_ray()
    print(f"Ray {ray.__version__}", flush=True)
    settings = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    ray.init("local", num_cpus=options.cores, **settings)

    def plain(sources: list[Source]) -> Iterator[dict[str, Any]]:
        results = caption_media(captioner, sources, batch_size=options.batch_size)
        return (to_record(result, captioner.header.name, captioner.fingerprint) for result in results)

    def on_ray(sources: Iterable[Source]) -> Iterator[dict[str, Any]]:
        return caption_on_ray(sources, model=options.model, batch_size=options.batch_size)

    with tempfile.TemporaryDirectory() as folder:
        files = [str(path) for path in common.write_photos(Path(folder), options.pictures)]
        sources = [Source(file, file) for file in files]
        ways = {"plain": (plain, time.process_time), "Ray": (on_ray, everybody)}
        taken: dict[str, list[Taken]] = {name: [] for name in ways}
        for repeat in range(options.repeats):
            for name in list(ways)[:: -1 if repeat % 2 else 1]:
                way, processor = ways[name]
                taken[name].append(measure(way(sources), len(sources), processor))
    print(
        f"\n{len(sources)} photos, batches of {options.batch_size}: the fastest of {options.repeats} rounds"
    )
    best = {
        name: Taken(
            *(min(getattr(value, part) for value in values) for part in ("first", "wall", "processor"))
        )
        for name, values in taken.items()
    }
    for name, value in best.items():
        print(
            f"  {name:<6} first record after {value.first:5.1f} s, then {1000 * value.wall:6.2f} ms a photo "
            f"({1 / value.wall:.1f} a second), {1000 * value.processor:.2f} ms of a processor"
        )
    for what in ("wall", "processor"):
        ours, theirs = getattr(best["Ray"], what), getattr(best["plain"], what)
        print(
            f"overhead by {what}: {1000 * (ours - theirs):.2f} ms a photo, {100 * (ours / theirs - 1):.1f} %"
        )

    if options.empty:
        Worker.caption = nothing  # type: ignore[method-assign]
        ray.cloudpickle.register_pickle_by_value(sys.modules[Worker.__module__])
        sources = [Source(f"{number:08}.jpg", f"{number:08}.jpg") for number in range(options.empty)]
        empty = measure(on_ray(sources), len(sources), time.process_time)
        print(
            f"with nothing to do: {1000 * empty.wall:.3f} ms a file, {1 / empty.wall:.0f} a second, ", end=""
        )
        print(f"{1000 * empty.processor:.3f} ms of the driver's processor")
    ray.shutdown()
    return 0


def nothing(self: Any, chunk: Any) -> list[dict[str, Any]]:
    """Stand in for captioning: records of the usual size, without looking at anything."""
    alternatives = [{"word": "word", "probability": 0.1}] * 5
    words = [{"word": "word", "probability": 0.123456, "alternatives": alternatives}] * 10
    return [{"path": source.path, "caption": "a caption", "words": words} for _, source in chunk]


def measure(records: Iterator[Any], count: int, processor: Callable[[], float]) -> Taken:
    """Take the time to the first record, and that for each file in the last three quarters."""
    begun = time.perf_counter()
    quarter = count // 4
    for number, _ in enumerate(records):
        if number == 0:
            first = time.perf_counter() - begun
        if number == quarter:
            begun, used = time.perf_counter(), processor()
        if number == count - 1:  # before Ray ends its workers
            wall, used = time.perf_counter() - begun, processor() - used
    assert number + 1 == count, f"{number + 1} records of {count}"
    return Taken(first, wall / (count - quarter - 1), used / (count - quarter - 1))


def everybody() -> float:
    """Return the processor time of this process and of all that it has started and that are alive."""
    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    sys.exit(main())
