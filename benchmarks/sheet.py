"""Reading: captions of pictures drawn at random on contact sheets, with a table for a person's verdicts.

Pictures are chosen by seed, as many from each data set, captioned, and drawn onto pages with their number,
caption and confidence. ``verdicts.tsv`` beside the pages has a row for each: write into its last column
``right`` (what is said is there), ``partly`` (the main thing is right, something else is not) or ``wrong``,
and count them with ``--count``, which prints shares with 95 % intervals.
"""

from __future__ import annotations

import csv
import math
import random
import statistics
import sys
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from captioner_training.data import DataSet, Picture

VERDICTS = ("right", "partly", "wrong")
COLUMNS = ("number", "page", "source", "id", "file", "caption", "confidence", "verdict")
ACROSS, DOWN = 5, 4
SIDE, TEXT, GAP = 300, 84, 12  # pixels: the picture's square, the caption below it, between cells


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = common.arguments(__doc__)
    common.add_sources(parser)
    parser.add_argument("--pictures", type=common.positive, default=100, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a folder for the pages and verdicts.tsv")
    parser.add_argument(
        "--count", type=Path, metavar="FILE.tsv", help="count the verdicts of this table instead"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.count:
        print(count(options.count))
        return 0
    if options.output is None:
        parser.error("name a folder for the pages: --output FOLDER")
    table = options.output / "verdicts.tsv"
    if table.exists():
        raise common.wrong_use(f"{table} is there already: move it away, or name another folder")
    drawn = draw(common.load_sources(options), options.pictures, options.seed)

    import torch

    from captioner import Captioner

    torch.set_num_threads(options.threads)
    captioner = Captioner.load(options.model, device="cpu")
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for first in range(0, len(drawn), ACROSS * DOWN):
        page = first // (ACROSS * DOWN) + 1
        some = drawn[first : first + ACROSS * DOWN]
        encoded = [data.store.read(picture.file) for data, picture in some]
        captions = captioner.caption_batch(encoded)
        cells = []
        for number, (data, picture), image, caption in zip(
            range(first + 1, first + len(some) + 1), some, encoded, captions, strict=True
        ):
            told = f"{caption.confidence:.2f}"
            rows.append((number, page, data.name, picture.id, picture.file, caption.text, told, ""))
            cells.append((image, f"{number}. {caption.text} ({told}{'' if caption.sure else ', hedged'})"))
        contact_sheet(cells).save(options.output / f"page-{page:02d}.png")
    with open(table, "x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
    print(f"{len(rows)} captions on {rows[-1][1]} pages in {options.output}")
    print(f"write {', '.join(VERDICTS)} into the last column of {table}, then give it to --count")
    return 0


def draw(sources: Sequence[DataSet], pictures: int, seed: int) -> list[tuple[DataSet, Picture]]:
    """Draw pictures without replacement, as many from each data set (the first ones give the odd ones).

    Raises:
        SystemExit: if a data set has too few.
    """
    found: list[tuple[DataSet, Picture]] = []
    for number, data in enumerate(sources):
        share = pictures // len(sources) + (number < pictures % len(sources))
        if share > len(data):
            raise common.wrong_use(
                f"{data.name} has {len(data)} pictures, and {share} are to be drawn from it"
            )
        chance = random.Random(f"{seed} {data.name}")
        found += [(data, picture) for picture in chance.sample(data.pictures, share)]
    return found


def contact_sheet(cells: Sequence[tuple[bytes, str]]) -> Image.Image:
    """Return a page of encoded pictures with a text under each."""
    width, height = SIDE + GAP, SIDE + TEXT + GAP
    sheet = Image.new("RGB", (ACROSS * width + GAP, math.ceil(len(cells) / ACROSS) * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, (encoded, text) in enumerate(cells):
        left, top = GAP + number % ACROSS * width, GAP + number // ACROSS * height
        with Image.open(BytesIO(encoded)) as opened:
            image = opened.convert("RGB")
        scale = SIDE / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        sheet.paste(image, (left + (SIDE - image.width) // 2, top + SIDE - image.height))
        lines = textwrap.wrap(text, SIDE // 8, max_lines=TEXT // 20, placeholder=" …")
        pen.text((left, top + SIDE + 2), "\n".join(lines), "black", font)
    return sheet


def count(path: Path) -> str:
    """Return the counts of the verdicts in a table, by data set and in all, with 95 % intervals.

    Raises:
        SystemExit: for a table that cannot be read, or a word that is no verdict.
    """
    rows = read_verdicts(path)
    lines = [f"{'':<28}{'read':>6}" + "".join(f"   {verdict:<28}" for verdict in VERDICTS)]
    groups = dict.fromkeys(row["source"] for row in rows)
    for source in [*groups, "all"] if len(groups) > 1 else groups:
        given = [row["verdict"] for row in rows if row["source"] == source or source == "all"]
        given = [verdict for verdict in given if verdict]
        shares = (common.share_text(given.count(verdict), len(given)) for verdict in VERDICTS)
        lines.append(f"{source:<28}{len(given):>6}" + "".join(f"   {share:<28}" for share in shares))
    told = {v: [float(row["confidence"]) for row in rows if row["verdict"] == v] for v in VERDICTS}
    means = (f"{verdict} {statistics.mean(values):.2f}" for verdict, values in told.items() if values)
    lines.append(f"mean confidence: {', '.join(means)}")
    unread = sum(not row["verdict"] for row in rows)
    if unread:
        lines.append(f"{unread} of {len(rows)} captions have no verdict yet and do not count")
    return "\n".join(line.rstrip() for line in lines)


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Read a table of `main` with its verdicts, which may be shortened to a letter; empty ones stay empty.

    Raises:
        SystemExit: as `count`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise common.wrong_use(f"{path}: {error.strerror}") from None
    reader = csv.DictReader(text.splitlines(), delimiter="\t")
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise common.wrong_use(f"{path}: expected columns {', '.join(COLUMNS)}, divided by tabs")
    rows = []
    for row in reader:
        given = (row["verdict"] or "").strip().lower()
        full = [verdict for verdict in VERDICTS if given and verdict.startswith(given)]
        if given and not full:
            raise common.wrong_use(
                f"{path}, number {row['number']}: {given!r} is none of {', '.join(VERDICTS)}"
            )
        rows.append({**row, "verdict": full[0] if full else ""})
    return rows


if __name__ == "__main__":
    sys.exit(main())
