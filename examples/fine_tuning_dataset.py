"""Make a data set of pictures and captions for fine-tuning an image generator.

    python examples/fine_tuning_dataset.py PHOTOS DATASET [TRIGGER]

Writes DATASET/metadata.jsonl with ``file_name`` and ``text``, the layout that Hugging Face's image folders
and most fine-tuning scripts read, and links (or copies) the photos beside it. Captions are neutral, begin
with TRIGGER if one is given, and doubtful ones are left out.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from captioner import Captioner
from captioner.batch import caption_records


def make(
    photos: Path, data_set: Path, trigger: str = "", captioner: Captioner | None = None, least: float = 0.2
) -> int:
    """Write the data set and return how many pictures it has."""
    data_set.mkdir(parents=True, exist_ok=True)
    lines = []
    records = caption_records(photos, recursive=True, captioner=captioner, neutral=True, errors="skip")
    for number, record in enumerate(records):
        if "segments" in record or record["confidence"] < least:
            continue
        name = f"{number:06}{Path(record['path']).suffix.lower()}"
        place(Path(record["path"]), data_set / name)
        text = f"{trigger}, {record['caption']}" if trigger else record["caption"]
        lines.append(json.dumps({"file_name": name, "text": text}, ensure_ascii=False))
    (data_set / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def place(photo: Path, target: Path) -> None:
    """Link a photo, or copy it to another disk."""
    target.unlink(missing_ok=True)
    try:
        os.link(photo, target)
    except OSError:
        shutil.copyfile(photo, target)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    count = make(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    print(f"{count} pictures")
