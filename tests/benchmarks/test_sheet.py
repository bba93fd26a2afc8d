"""Contact sheets: drawn by seed, captioned, and their verdicts counted."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
from PIL import Image

from captioner import Captioner

sys.path += [str(Path(__file__).parents[2] / "benchmarks"), str(Path(__file__).parents[1] / "training")]
import common
import sheet
from shape_data import write_shapes


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("other"), tar=True)


def sources(data: Path, other: Path) -> list[str]:
    first = ["--annotations", str(data / "shapes.json"), "--images", str(data / "pictures")]
    second = ["--annotations", str(other / "shapes.json"), "--images", str(other / "pictures.tar")]
    return [*first, *second, "--highest", "12"]


def make(output: Path, model: Path, *more: str) -> list[dict[str, str]]:
    assert sheet.main(["--model", str(model), "--threads", "1", "--output", str(output), *more]) == 0
    with open(output / "verdicts.tsv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_pages_and_table(data: Path, other: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    options = [*sources(data, other), "--pictures", "23"]
    rows = make(tmp_path / "a", tiny_checkpoint, *options)
    assert [row["number"] for row in rows] == [str(n) for n in range(1, 24)]
    assert [row["page"] for row in rows] == ["1"] * 20 + ["2"] * 3
    first, second = rows[:12], rows[12:]  # the odd one is the first data set's
    assert {row["source"] for row in first} == {f"{data.name}/shapes"}
    assert {row["source"] for row in second} == {f"{other.name}/shapes"}
    for part in (first, second):
        assert len({row["file"] for row in part}) == len(part)
    assert min(int(row["id"]) for row in second) >= 112  # of 24 ids from 100 on, the 12 highest
    assert min(int(row["id"]) for row in first) < 112
    assert all(row["verdict"] == "" and 0 <= float(row["confidence"]) <= 1 for row in rows)
    captioner = Captioner.load(tiny_checkpoint, device="cpu")
    assert rows[0]["caption"] == captioner.caption(data / "pictures" / rows[0]["file"]).text
    sizes = []
    for number in (1, 2):
        with Image.open(tmp_path / "a" / f"page-{number:02d}.png") as page:
            sizes.append(page.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] > 3 * sizes[1][1]  # four rows, and one

    assert make(tmp_path / "b", tiny_checkpoint, *options) == rows
    files = [row["file"] for row in make(tmp_path / "c", tiny_checkpoint, *options, "--seed", "1")]
    assert files != [row["file"] for row in rows]


def test_a_cell_holds_its_picture() -> None:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 0, 0)).save(buffer, "PNG")
    page = sheet.contact_sheet([(buffer.getvalue(), "word " * 100)] * 2)
    for left in (sheet.GAP, 2 * sheet.GAP + sheet.SIDE):
        assert page.getpixel((left + 150, sheet.GAP + 290)) == (200, 0, 0)
        assert page.getpixel((left + 150, sheet.GAP + 100)) == (255, 255, 255)  # as wide as high: above it
    below = page.crop((0, page.height - sheet.GAP, page.width, page.height))
    assert below.getextrema() == ((255, 255),) * 3  # a long text is cut


def test_verdicts_are_never_overwritten(
    data: Path, other: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "verdicts.tsv").write_text("hours of reading")
    with pytest.raises(SystemExit) as stop:
        make(tmp_path, tiny_checkpoint, *sources(data, other))
    assert stop.value.code == 2
    assert "verdicts.tsv is there already" in capsys.readouterr().err
    assert (tmp_path / "verdicts.tsv").read_text() == "hours of reading"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the pictures: --annotations"),
        (["--images", "x"], "--images belongs to the --annotations before it"),
        (["--annotations", "DATA", "--highest", "2", "--highest", "3"], "--highest belongs to"),
        (["--annotations", "DATA", "--highest", "0"], "above 0"),
        (["--annotations", "DATA", "--images", "nowhere"], "no such folder or tar file"),
        (["--annotations", "nowhere.json"], "nowhere.json"),
        (["--annotations", "DATA", "--images", "PICTURES"], "has 24 pictures, and 100 are to be drawn"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"DATA": str(data / "shapes.json"), "PICTURES": str(data / "pictures")}
    with pytest.raises(SystemExit) as stop:
        sheet.main(["--output", str(tmp_path / "new"), *(places.get(a, a) for a in arguments)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def write_verdicts(path: Path, given: list[tuple[str, str]]) -> Path:
    rows = [(n, 1, source, n, "x.jpg", "a dog", 0.5, verdict) for n, (source, verdict) in enumerate(given, 1)]
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([sheet.COLUMNS, *rows])
    return path


def test_counting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [("a", "right")] * 6 + [("a", "Wrong ")] * 4 + [("b", "p")] * 3 + [("b", "")] * 2
    path = write_verdicts(tmp_path / "v.tsv", given)
    assert sheet.main(["--count", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    a, b, everything = (next(line for line in lines if line.startswith(name)) for name in ("a ", "b ", "all"))
    assert "6 of 10: 60 % (31-83)" in a  # Wilson's interval
    assert "4 of 10: 40 % (17-69)" in a
    assert "3 of 3: 100 % (44-100)" in b
    assert "6 of 13: 46 %" in everything
    assert "2 of 15 captions have no verdict yet" in lines[-1]


@pytest.mark.parametrize("verdict", ["good", "rightly"])
def test_a_word_that_is_no_verdict(tmp_path: Path, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_verdicts(tmp_path / "v.tsv", [("a", "right"), ("a", verdict)])
    with pytest.raises(SystemExit) as stop:
        sheet.main(["--count", str(path)])
    assert stop.value.code == 2
    assert f"number 2: '{verdict}' is none of right, partly, wrong" in capsys.readouterr().err


def test_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.tsv").write_text("a\tb\n")
    for path in (tmp_path / "v.tsv", tmp_path / "none.tsv"):
        with pytest.raises(SystemExit) as stop:
            sheet.main(["--count", str(path)])
        assert stop.value.code == 2
        assert str(path) in capsys.readouterr().err


def test_intervals_cover_as_they_say() -> None:
    """A 95 % interval holds the true share in about 95 % of all outcomes, near the ends of the scale too."""
    for share in (0.02, 0.1, 0.5, 0.93):
        covered = sum(
            math.comb(60, k) * share**k * (1 - share) ** (60 - k)
            for k in range(61)
            if common.share_interval(k, 60)[0] <= share <= common.share_interval(k, 60)[1]
        )
        assert 0.9 < covered <= 1
    assert common.share_interval(0, 0) == (0, 1)
    assert common.share_interval(0, 10)[0] == 0
    assert common.share_interval(10, 10)[1] == pytest.approx(1)
