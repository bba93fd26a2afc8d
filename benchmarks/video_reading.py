"""Reading video: the memory of an hour against a minute, and the speed against OpenCV's bare loop.

Both clips are joined from copies of one that comes with gradio, without encoding it again, which takes PyAV.
Memory: each is a process of its own that samples frames; bar: at most 1.10 times as much for the hour. Speed:
`captioner.video.frames` against a loop of OpenCV's ``grab()`` that converts the same number of frames, at two
sampling intervals, in seconds of processor time, which other programs disturb little; bar: at least 0.90 of
its rate. Besides, what a seek, a checked duration and shot boundaries cost.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from pathlib import Path

import common

_SAMPLE = """
import sys
from captioner import video
for frame in video.frames(sys.argv[1], float(sys.argv[2])):
    pass
print(frame.index + 1, frame.time)
"""


def main() -> int:
    """Run it; return 0 if the bars hold."""
    parser = common.arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="of the long clip; the short one has 1")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between sampled frames")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    common.take_cores(options.cores)
    common.print_machine(options.cores)
    print(f"OpenCV {_opencv_version()}, clip: world.mp4 of gradio, 480 x 270, 30 frames a second, H.264")
    with tempfile.TemporaryDirectory() as name:
        minute, long = Path(name) / "minute.mp4", Path(name) / "long.mp4"
        join(minute, 60.0)
        join(long, 60.0 * options.minutes)
        peaks: dict[Path, list[float]] = {minute: [], long: []}
        for _ in range(options.repeats):
            for clip, values in peaks.items():
                values.append(peak(clip, options.every))
        few, many = (statistics.median(values) for values in peaks.values())
        print(f"  memory: {few:.0f} MB for 1 minute, {many:.0f} MB for {options.minutes:g} minutes")
        holds = common.verdict("memory, long / minute", many / few, at_most=1.10)
        holds &= speed(minute, long, options.repeats)
    return 0 if holds else 1


def speed(minute: Path, long: Path, repeats: int) -> bool:
    """Print the rates; return whether the bars hold. Imports OpenCV."""
    from captioner import video

    holds = True
    for every in (0.5, 0.0):
        label = f"every {every:g} s" if every else "every frame"
        seconds = in_turn(
            {
                "bare": partial(bare, minute, every),
                "frames": partial(count_frames, minute, every),
            },
            repeats,
        )
        rate = 60 / statistics.median(seconds["frames"])
        print(f"  {label}: {rate:.0f} seconds of video per second of processor time")
        holds &= common.verdict(
            f"rate of frames() / bare loop, {label}",
            common.ratio(seconds["bare"], seconds["frames"]),
            at_least=0.90,
        )
    begun = time.perf_counter()
    frame = next(video.frames(long, 0.5, start=0.9 * 60 * _minutes(long)))
    took = time.perf_counter() - begun
    print(f"  a start at 90 % of the long clip: {took:.2f} s, frame at {frame.time:.2f} s")
    begun = time.perf_counter()
    print(f"  its checked duration, {video.duration(long):.2f} s: {time.perf_counter() - begun:.2f} s")
    if util.find_spec("scenedetect") is not None:
        seconds = in_turn(
            {
                "frames": partial(count_frames, minute, 0.5),
                "shots": partial(video.segments, minute, shots=True),
            },
            repeats,
        )
        factor = common.ratio(seconds["shots"], seconds["frames"])
        print(f"  shot boundaries: {factor:.1f} times as long as sampling every 0.5 s")
    return holds


def in_turn(measures: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the processor seconds of each measure, taken in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(repeats + 1):
        for name in list(measures)[:: 1 if number % 2 else -1]:
            begun = time.process_time()
            measures[name]()
            if number:
                seconds[name].append(time.process_time() - begun)
    return seconds


def bare(clip: Path, every: float) -> int:
    """Decode a clip with OpenCV alone and convert a frame every so often; return how many."""
    import cv2

    capture = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG)
    gap = max(1, round(every * capture.get(cv2.CAP_PROP_FPS)))
    number = count = 0
    while capture.grab():
        if number % gap == 0:
            cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
            count += 1
        number += 1
    return count


def count_frames(clip: Path, every: float) -> int:
    """Sample a clip with the library; return how many frames it gave."""
    from captioner import video

    return sum(1 for _ in video.frames(clip, every))


def join(path: Path, seconds: float) -> None:
    """Write a clip of that length out of copies of gradio's, packet by packet."""

    spec = util.find_spec("gradio")
    if spec is None or spec.origin is None:
        raise SystemExit('the clips of gradio are needed: pip install "captioner[dev]"')
    source = Path(spec.origin).parent / "media_assets" / "videos" / "world.mp4"
    common.repeat(source, path, seconds)


def peak(clip: Path, every: float) -> float:
    """Sample a clip in a process of its own and return the megabytes that it held at most.

    The system hands a process the peak of the one that started it, so this runs before OpenCV is imported.
    """
    assert "cv2" not in sys.modules
    command = [sys.executable, "-c", _SAMPLE, str(clip), str(every)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read().decode().strip()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{clip.name}: the sampling ended with {process.returncode}")
    count, last = said.split()
    megabytes = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    print(f"  {clip.name}: {count} frames, the last at {float(last):.1f} s, {megabytes:.0f} MB", flush=True)
    return megabytes


def _minutes(clip: Path) -> float:
    from captioner import video

    return (video.probe(clip).duration or 0.0) / 60


def _opencv_version() -> str:
    for name in ("opencv-python-headless", "opencv-python"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise SystemExit('OpenCV is needed: pip install "captioner[video]"')


if __name__ == "__main__":
    sys.exit(main())
