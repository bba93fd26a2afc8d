"""Cold start: one photo from the command line, against a Python that only imports torch and torchvision.

Both are whole processes, started in turn. Bar: at most 1.5 times the imports.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common


def main() -> int:
    """Run it; return 0 if the bar holds."""
    parser = common.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    common.print_machine("as the libraries choose")
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.jpg"
        common.photos()["chelsea"].save(photo, quality=90)
        # what the `captioner` script does
        caption = [sys.executable, "-c", "from captioner.cli import main; main()", "caption", str(photo)]
        if options.model is not None:
            caption += ["--model", str(options.model)]
        print(f"captioner caption photo.jpg -> {run(caption)}")
        imports = [sys.executable, "-c", "import torch, torchvision"]
        seconds = common.in_turn(
            {"caption": lambda: run(caption), "imports": lambda: run(imports)}, options.repeats
        )
    for name, values in seconds.items():
        print(f"  {name:<8} {statistics.median(values):.2f} s   ({min(values):.2f} to {max(values):.2f})")
    value = common.ratio(seconds["caption"], seconds["imports"])
    return 0 if common.verdict("caption / imports", value, at_most=1.5) else 1


def run(command: list[str]) -> str:
    """Run a command to its end and return what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
