"""Naming: does the caption of a photo name the thing that the photo shows?

Photos that come with gradio, matplotlib, scikit-image and scikit-learn; ``naming.csv`` lists them, says how
they were chosen, and gives for each the nouns that count as right. Printed for each: whether one of them was
said, and how sure the model was. Bar: four in five. A photo that is not installed, or is another file than
the listed one, is not measured, and the exit code is 2 then.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common

TABLE = Path(__file__).parent / "naming.csv"
BAR = 0.8

_PROJECTS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}  # as pip calls them
_COLUMNS = ["package", "file", "what it is", "nouns", "except", "sha256"]
_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "cameraman": "cameramen",
}
_BEINGS = """person man woman boy girl child kid baby lady guy player crowd dog puppy cat kitten horse cow
sheep goat bird duck elephant bear zebra giraffe lion tiger leopard cheetah monkey""".split()


@dataclass(frozen=True)
class Photo:
    """One row of the table."""

    package: str
    file: str
    shows: str
    nouns: tuple[str, ...]
    exceptions: tuple[str, ...]
    sha256: str

    @property
    def name(self) -> str:
        """How the report calls it."""
        return f"{self.package} {Path(self.file).name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return 0 if the bar holds, 1 if not, and 2 if not every photo could be measured."""
    parser = common.arguments(__doc__)
    parser.add_argument("--table", type=Path, default=TABLE, help="the photos and their nouns")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)

    photos = read_table(options.table)
    found: dict[Photo, Path] = {}
    missing: dict[Photo, str] = {}
    for photo in photos:
        place = locate(photo)
        if isinstance(place, Path):
            found[photo] = place
        else:
            missing[photo] = place

    import torch

    from captioner import Captioner

    torch.set_num_threads(options.threads)
    if not options.json:
        common.print_machine(options.threads)
    captioner = Captioner.load(options.model, device="cpu")
    paths = list(found.values())
    captions = [
        caption
        for start in range(0, len(paths), 16)
        for caption in captioner.caption_batch(paths[start : start + 16])
    ]
    records: list[dict[str, object]] = [
        {
            "package": photo.package,
            "file": photo.file,
            "shows": photo.shows,
            "caption": caption.text,
            "confidence": round(caption.confidence, 4),
            "hedged": not caption.sure,
            "named": named(caption.text, photo.nouns, photo.exceptions),
        }
        for photo, caption in zip(found, captions, strict=True)
    ]
    right = sum(bool(record["named"]) for record in records)
    if options.json:
        report = {
            "named": right,
            "measured": len(records),
            "interval": common.share_interval(right, len(records)),
            "photos": records,
            "not_measured": [
                {"package": photo.package, "file": photo.file, "why": why} for photo, why in missing.items()
            ],
        }
        print(json.dumps(report, indent=2))
        holds = right >= BAR * len(records)
    else:
        holds = _print_table(list(found), records, missing)
    return 2 if missing else 0 if holds else 1


def _print_table(photos: list[Photo], records: list[dict[str, object]], missing: dict[Photo, str]) -> bool:
    print(f"\n{'':<32}{'named':<11}{'confidence':>10}   caption (what it is, where it was not named)")
    for photo, record in zip(photos, records, strict=True):
        verdict = record["named"] or "-"
        told = f"{record['confidence']:.2f}{' hedged' if record['hedged'] else '       '}"
        shows = "" if record["named"] else f"  ({photo.shows})"
        print(f"{photo.name:<32}{verdict:<11}{told:>10}   {record['caption']}{shows}")
    for photo, why in missing.items():
        print(f"{photo.name:<32}not measured: {why}")
    right = [record for record in records if record["named"]]
    wrong = [record for record in records if not record["named"]]
    print(f"\nnamed rightly: {common.share_text(len(right), len(records))}", end="")
    print(f"; {len(missing)} not measured" if missing else "")
    print(
        f"hedged: {sum(bool(r['hedged']) for r in right)} of the {len(right)} named rightly, "
        f"{sum(bool(r['hedged']) for r in wrong)} of the {len(wrong)} others"
    )
    return common.verdict("share named rightly", len(right) / max(1, len(records)), at_least=BAR)


def read_table(path: Path) -> list[Photo]:
    """Read the photos and their nouns; lines that begin with # are remarks.

    Raises:
        SystemExit: if the file is not such a table.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise common.wrong_use(f"{path}: {error.strerror}") from None
    rows = list(csv.reader(line for line in lines if line.strip() and not line.startswith("#")))
    if not rows or rows[0] != _COLUMNS:
        raise common.wrong_use(f"{path}: the columns have to be {', '.join(_COLUMNS)}")
    photos = []
    for row in rows[1:]:
        if len(row) != len(_COLUMNS) or not row[3]:
            raise common.wrong_use(
                f"{path}: expected {len(_COLUMNS)} fields with nouns, found {','.join(row)}"
            )
        package, file, shows, *lists, sha256 = row
        nouns, exceptions = (tuple(filter(None, cell.split("|"))) for cell in lists)
        photos.append(Photo(package, file, shows, nouns, exceptions, sha256))
    return photos


def locate(photo: Photo) -> Path | str:
    """Return where a photo is, or why it cannot be measured."""
    spec = importlib.util.find_spec(photo.package)  # does not import it
    if spec is None or spec.origin is None:
        return f"pip install {_PROJECTS.get(photo.package, photo.package)}"
    path = Path(spec.origin).parent / photo.file
    if not path.is_file():
        return "this release of the package has no such file"
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(photo.sha256):
        return "another picture than the listed one"
    return path


def named(caption: str, nouns: Sequence[str], exceptions: Sequence[str] = ()) -> str | None:
    """Return the first of the nouns (or of their plurals) that a caption says.

    None if it says none, or also tells of a person or an animal that is not among them.

    Args:
        caption: the words.
        nouns: words or phrases in the singular.
        exceptions: phrases that are not read, their plurals included.
    """
    for phrase in exceptions:
        caption = _any_number(phrase).sub("|", caption)
    said = next((noun for noun in nouns if _any_number(noun).search(caption)), None)
    for noun in nouns:  # "wild cat" tells of no cat
        caption = _any_number(noun).sub("|", caption)
    return None if any(_any_number(being).search(caption) for being in _BEINGS) else said


def _any_number(phrase: str) -> re.Pattern[str]:
    """Match a phrase as whole words, its last word in the singular or plural, ``'s`` aside."""
    first, space, last = phrase.rpartition(" ")
    if last in _IRREGULAR:
        plural = _IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        plural = f"{last}es"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        plural = f"{last[:-1]}ies"
    else:
        plural = f"{last}s"
    words = f"{re.escape(first + space)}(?:{re.escape(last)}|{re.escape(plural)})"
    return re.compile(rf"(?<![\w-]){words}(?![\w-])", re.IGNORECASE)


if __name__ == "__main__":
    sys.exit(main())
