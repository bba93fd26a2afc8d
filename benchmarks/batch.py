"""Batch captioning: speed, cores, memory, and how long it takes to find that nothing is left to do.

Speed: files a second of a run with ``--output``, greedy, its journal and table included, the files read from
the disk and not from memory where the system allows to ask for that; against the bare encoder's forward pass
over the same pictures in memory, see speed.py. Bar: at least 0.75 of that. Cores: the same with one core to
all. Memory: the most that ``captioner caption FOLDER --output`` takes for many files against 1,000, the same
photos under many names, in a process each. Bar: at most 1.10 times. Rerun: the same command when all files
are done, against a process that only lists the folder and asks for every file's size and time. Bar: at most 3
times.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common

LISTING = """
import os, sys
count = 0
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        os.stat(os.path.join(folder, name)).st_mtime_ns
        count += 1
print(count)
"""


def main() -> int:
    """Run it; return 0 if the bars hold."""
    parser = common.arguments(__doc__)
    parser.add_argument("--pictures", type=int, default=256, help="for the speed")
    parser.add_argument("--files", type=int, default=100_000, help="for memory and rerun")
    parser.add_argument("--photos", type=Path, help="for memory: a folder of real ones; else 300 are made")
    parser.add_argument("--threads", type=int, default=2, help="and cores, where possible")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "cores", "memory", "rerun"), help="one of the four")
    options = parser.parse_args()
    holds = True
    if options.only in (None, "rerun"):
        holds &= rerun(options.files, options.repeats, options.model)
    if options.only in (None, "memory"):
        holds &= memory(options.files, options.photos, options.model)
    if options.only in (None, "cores"):
        cores(options.pictures, options.model)
    if options.only in (None, "speed"):
        holds &= speed(options.pictures, options.threads, options.repeats, options.model)
    return 0 if holds else 1


def forget(files: list[Path]) -> None:
    """Ask the system not to keep the files in memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def batch_run(captioner: Any, files: list[Path], folder: Path) -> Callable[[], None]:
    """Return what captions the files as ``--output`` does."""
    from captioner.batch import caption_records

    def work() -> None:
        for path in folder.glob("out.*"):
            path.unlink()
        records = caption_records(files, captioner=captioner, output=folder / "out.jsonl", beam=1)
        assert sum(record["error"] is None for record in records) == len(files)

    return work


def speed(pictures: int, threads: int, repeats: int, model: Path | None) -> bool:
    """Measure files a second against the encoder alone."""
    common.take_cores(threads)
    import torch
    from speed import encoders, rates

    from captioner import Captioner

    torch.set_num_threads(threads)
    common.print_machine(threads)
    captioner = Captioner.load(model, device="cpu")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=Path.cwd()) as name:
        folder = Path(name)
        (folder / "p").mkdir()
        files = common.write_photos(folder / "p", pictures)
        work = batch_run(captioner, files, folder)

        def cold() -> None:
            forget(files)
            work()

        measures = encoders(captioner, model, files, 32)
        seconds = common.in_turn({**measures, "batch, greedy": cold}, repeats)
    print(f"\n{pictures} photos of 224 to 500 pixels")
    rates(seconds, pictures)
    share = common.ratio(seconds["encoder, plain"], seconds["batch, greedy"])
    return common.verdict("batch / encoder, plain", share, at_least=0.75)


ONE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import common
from batch import batch_run
threads, folder = int(sys.argv[2]), Path(sys.argv[3])
common.take_cores(threads)
import torch
torch.set_num_threads(threads)
from captioner import Captioner
captioner = Captioner.load(sys.argv[4] or None, device="cpu")
files = sorted((folder / "p").iterdir())
work = batch_run(captioner, files, folder)
work()
begun = time.perf_counter()
work()
print(len(files) / (time.perf_counter() - begun))
"""


def cores(pictures: int, model: Path | None) -> None:
    """Print files a second with one core to all."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = str(Path(__file__).parent)
    print("\ncores  files a second")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=Path.cwd()) as name:
        folder = Path(name)
        (folder / "p").mkdir()
        common.write_photos(folder / "p", pictures)
        first = 0.0
        for count in range(1, available + 1):
            command = [sys.executable, "-c", ONE, here, str(count), name, str(model or "")]
            rate = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            first = first or rate
            print(f"{count:5}  {rate:.1f} ({rate / first:.2f} times)", flush=True)


def many_names(folder: Path, count: int, base: list[Path]) -> None:
    """Make so many names for a few photos, a thousand a folder."""
    for start in range(0, count, 1000):
        part = folder / f"{start // 1000:04}"
        part.mkdir(parents=True)
        for number in range(start, min(start + 1000, count)):
            os.link(base[number % len(base)], part / f"{number:06}.jpg")


def command(folder: Path, output: Path, model: Path | None) -> list[str]:
    """Return the batch command."""
    found = [
        sys.executable,
        "-m",
        "captioner.cli",
        "caption",
        str(folder),
        "--recursive",
        "--output",
        str(output),
    ]
    return [*found, "--model", str(model)] if model is not None else found


def memory(count: int, photos: Path | None, model: Path | None) -> bool:
    """Measure the most memory of many files against 1,000; see, too, that all are captioned, and alike."""
    peaks = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=Path.cwd()) as name:
        folder = Path(name)
        (folder / "base").mkdir()
        base = (
            common.write_photos(folder / "base", 300)
            if photos is None
            else sorted(path for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        )
        for files in (1000, count):
            many_names(folder / f"m{files}", files, base)
            begun = time.perf_counter()
            process = subprocess.Popen(
                command(folder / f"m{files}", folder / f"{files}.jsonl", model), stderr=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
            assert status == 0, status
            peaks[files] = usage.ru_maxrss / 1024
            seconds = time.perf_counter() - begun
            print(
                f"{files:,} files: {peaks[files]:.0f} MB at most, {files / seconds:.0f} files a second",
                flush=True,
            )
            paths, captions = set(), defaultdict(set)
            with (folder / f"{files}.jsonl").open(encoding="utf-8") as lines:
                for line in lines:
                    record = json.loads(line)
                    assert record["error"] is None, record["error"]
                    assert record["path"] not in paths, record["path"]
                    paths.add(record["path"])
                    captions[int(Path(record["path"]).stem) % len(base)].add(record["caption"])
            assert len(paths) == files, len(paths)
            unlike = sum(len(found) > 1 for found in captions.values())
            print(f"each has one record; {unlike} of {len(captions):,} photos differ from name to name")
    return common.verdict(f"memory of {count:,} files / of 1,000", peaks[count] / peaks[1000], at_most=1.1)


def rerun(count: int, repeats: int, model: Path | None) -> bool:
    """Measure how long a run takes that has nothing to do."""
    from captioner.batch.journal import Journal
    from captioner.batch.run import Finished, Run
    from captioner.batch.sources import Source, find_sources

    def engine(sources: Iterator[Source]) -> Iterator[Finished]:
        for source in sources:  # a record of usual length, without a model
            words = [{"word": f"word{n}", "probability": 0.5, "alternatives": []} for n in range(10)]
            record = {"path": source.path, "schema": 1, "caption": "a caption", "confidence": 0.5}
            yield Finished({**record, "words": words, "error": None})

    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=Path.cwd()) as name:
        folder = Path(name)
        (folder / "base").mkdir()
        (folder / "p").mkdir()
        output = folder / "out.jsonl"
        base = common.write_photos(folder / "base", 20)
        os.link(base[0], folder / "p" / "first.jpg")
        subprocess.run(command(folder / "p", output, model), check=True, stdout=subprocess.PIPE)
        many_names(folder / "p", count - 1, base)  # file systems allow some ten thousand names of one file
        with Journal(folder / "out.jsonl.journal") as journal:
            run = Run(journal, journal.identities()[0], output=output)
            for _ in run.run(find_sources(folder / "p", recursive=True), lambda: engine):
                pass
            run.finish()
        measures = {
            "listing": [sys.executable, "-c", LISTING, str(folder / "p")],
            "rerun": command(folder / "p", output, model),
        }
        said = subprocess.run(measures["rerun"], check=True, capture_output=True, text=True).stderr
        assert f"captioned 0 files; {count:,} files done before" in said, said

        def process(arguments: list[str]) -> Callable[[], object]:
            return lambda: subprocess.run(arguments, check=True, stdout=subprocess.PIPE)

        seconds = common.in_turn({key: process(value) for key, value in measures.items()}, repeats)
    for key, values in seconds.items():
        print(f"{key} of {count:,} files: {statistics.median(values):.2f} s")
    return common.verdict("rerun / listing", common.ratio(seconds["rerun"], seconds["listing"]), at_most=3)


if __name__ == "__main__":
    sys.exit(main())
