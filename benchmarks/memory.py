"""Memory: the most that captioning a folder ever holds, for many files against few.

Each is a process of its own, ``captioner caption FOLDER --jsonl``; the files are links to a few photos.
Bar: at most 1.10 times as much for twenty times as many.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

_DIFFERENT = 50
"""How many of the files differ."""


def main() -> int:
    """Run it; return 0 if the bar holds."""
    parser = common.arguments(__doc__)
    parser.add_argument("--many", type=int, default=10_000, help="files")
    parser.add_argument("--few", type=int, default=500, help="files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beam", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="of both, in turn")
    options = parser.parse_args()
    common.print_machine(options.threads)
    command = [sys.executable, "-c", "from captioner.cli import main; main()", "caption", "--jsonl"]
    command += ["--threads", str(options.threads), "--beam", str(options.beam), "--device", "cpu"]
    if options.model is not None:
        command += ["--model", str(options.model)]
    peaks: dict[int, list[float]] = {options.few: [], options.many: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = common.write_photos(folder, min(_DIFFERENT, options.few))
        for count in peaks:
            fill(folder / f"files-{count}", photos, count)
        for _ in range(options.repeats):
            for count, values in peaks.items():
                values.append(peak([*command, str(folder / f"files-{count}")], count))
                print(f"  {count:>7} files: {values[-1]:.0f} MB at most", flush=True)
    few, many = (statistics.median(values) for values in peaks.values())
    return 0 if common.verdict("many / few", many / few, at_most=1.10) else 1


def fill(folder: Path, photos: list[Path], count: int) -> None:
    """Make ``count`` files out of a few, as links where the file system has them."""
    folder.mkdir()
    for number in range(count):
        source, target = photos[number % len(photos)], folder / f"{number:07d}.jpg"
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def peak(command: list[str], count: int) -> float:
    """Run a command and return the megabytes that it held at most.

    The system hands a process the peak of the one that started it, so this script must stay small: no torch.
    """
    assert "torch" not in sys.modules
    with tempfile.TemporaryFile() as output:
        # read from the parent's side, so that the library is measured as it is
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = sum(1 for _ in output)
    if process.returncode or lines != count:
        raise SystemExit(
            f"{' '.join(command)} ended with {process.returncode} after {lines} of {count} records"
        )
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    sys.exit(main())
