"""A process of its own that reads what it is sent: what crashes or hangs there does not end the tests.

``python fuzz_worker.py FOLDER`` takes lines ``SUFFIX LENGTH`` on standard input, each followed by so many
bytes, and answers each with a line of JSON: what came out, and the seconds.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("CAPTIONER_FUZZ", "0")) or 120
"""Inputs for each reader; CAPTIONER_FUZZ=20000 for the long trial."""
MEMORY = 3 * 2**30
"""Bytes that a reader may take."""
PATIENCE = 60.0
"""Seconds without an answer that count as a hang; the others are of the processor's time."""


def check_message(error: BaseException, path: Path) -> None:
    """An error for a user is one printable line that names the file."""
    message = str(error)
    assert message.isprintable(), repr(message)
    assert str(path) in message or path.name in message, message
    assert len(message) < 5000


def read(path: str) -> str:
    """Look at a photo or a video as captioning does; return what came out."""
    from captioner import images, video
    from captioner.inputs import ImageError

    preprocess = images.Preprocess(64, "squash", (127.0,) * 3, (128.0,) * 3)
    try:
        if video.is_video(path):
            for frame in itertools.islice(video.frames(path, every=0.5), 8):
                assert frame.image.ndim == 3
                assert min(frame.image.shape) > 0
            return "video"
        pixels, _ = images.load(path, preprocess)
        assert pixels.shape == (3, 64, 64)
        return "photo"
    except (video.VideoError, ImageError) as error:
        check_message(error, Path(path))
        return type(error).__name__


def main() -> None:
    """Answer until the input ends."""
    import resource

    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    folder = Path(sys.argv[1])
    for line in sys.stdin.buffer:
        suffix, length = line.split()
        path = folder / f"input{suffix.decode()}"
        path.write_bytes(sys.stdin.buffer.read(int(length)))
        begun = time.process_time()
        try:
            answer: dict[str, Any] = {"out": read(str(path))}
        except BaseException as error:
            answer = {"bad": f"{type(error).__name__}: {error}"[:500]}
        answer["seconds"] = time.process_time() - begun
        print(json.dumps(answer), flush=True)


class Worker:
    """Sends inputs to such a process, and starts it anew when one has ended it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.counts: dict[str, int] = {}
        self.slowest = 0.0

    def give(self, suffix: str, data: bytes) -> None:
        """Fail if the input does anything but be read, or be refused in one line."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONWARNINGS": "ignore",
                },
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{suffix} {len(data)}\n".encode() + data)
        self.process.stdin.flush()
        waiting = selectors.DefaultSelector()
        waiting.register(self.process.stdout, selectors.EVENT_READ)
        line = self.process.stdout.readline() if waiting.select(PATIENCE) else b"hang"
        if line in (b"", b"hang"):
            self.close()
            self._keep(suffix, data)
            raise AssertionError("the process ended" if not line else f"no answer in {PATIENCE} s")
        answer = json.loads(line)
        if "bad" in answer:
            self._keep(suffix, data)
        assert "bad" not in answer, answer["bad"]
        self.slowest = max(self.slowest, answer["seconds"])
        self.counts[answer["out"]] = self.counts.get(answer["out"], 0) + 1

    def _keep(self, suffix: str, data: bytes) -> None:
        place = os.environ.get("CAPTIONER_FUZZ_KEEP")
        if place:
            (Path(place) / f"bad-{random.getrandbits(32):08x}{suffix}").write_bytes(data)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def worker(folder: Path) -> Iterator[Worker]:
    """A worker for a module's tests, which says at the end what came out."""
    made = Worker(folder)
    yield made
    made.close()
    print(f"\n{sum(made.counts.values())} inputs: {made.counts}, the slowest {made.slowest:.2f} s")


def only(raised: type[Exception], action: Callable[[], object], path: Path) -> None:
    """Run what may fail in one documented way."""
    try:
        action()
    except raised as error:
        check_message(error, path)


if __name__ == "__main__":
    main()
