"""The documentation says what is so: the records' keys and types, links, and names in the code."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import make_header, make_tiny_model
from PIL import Image
from typer.testing import CliRunner

from captioner import Captioner
from captioner.batch import ClipResult, FileResult, caption_files, caption_media, to_record
from captioner.caption import SCHEMA_VERSION, SURE
from captioner.cli import app

ROOT = Path(__file__).parents[1]
RECORDS = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")

TYPES: dict[str, Any] = {
    "integer": int,
    "number": (int, float),
    "text": str,
    "boolean": bool,
    "list": list,
    "object": dict,
    "null": type(None),
}


def tables() -> list[dict[str, str]]:
    """Return the documented tables in order: key -> type."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", RECORDS, re.MULTILINE)
    return [dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", block, re.MULTILINE)) for block in blocks]


CAPTION, WORD, ALTERNATIVE, ATTENTION, WORD_ATTENTION, FIT, N_BEST, FURTHER, VIDEO, SEGMENT, FILE, FAILED = (
    tables()
)


def agree(record: dict[str, Any], *documented: dict[str, str]) -> None:
    types = {key: kind for table in documented for key, kind in table.items()}
    assert record.keys() == types.keys()
    for key, kind in types.items():
        allowed = [TYPES[name] for name in kind.split(" or ")]
        value = record[key]
        assert any(isinstance(value, a) for a in allowed), (key, value)
        if bool not in allowed:
            assert not isinstance(value, bool), key


def agree_all(record: dict[str, Any], *documented: dict[str, str], attention: bool = False) -> None:
    """Check a caption's record and all that is in it."""
    agree(record, *documented)
    assert record["words"]
    for word in record["words"]:
        agree(word, WORD, *([WORD_ATTENTION] if attention else []))
        assert word["alternatives"]
        for alternative in word["alternatives"]:
            agree(alternative, ALTERNATIVE)
        for key in ("probability", "confidence"):
            assert 0 <= word[key] <= 1
    assert 0 <= record["confidence"] <= 1
    assert record["score"] <= 0
    assert record["log_probability"] <= 0
    assert record["schema"] == SCHEMA_VERSION == 1
    for other in record.get("n_best", []):
        agree(other, FURTHER)
    if attention:
        agree(record["fit"], FIT)
    json.dumps(record, allow_nan=False)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.effect_mandelbrot((120, 80), (-2, -1, 1, 1), 40).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def captioner(tiny_checkpoint: Path) -> Captioner:
    return Captioner.load(tiny_checkpoint, device="cpu")


def test_a_caption(captioner, photo):
    agree_all(captioner.caption(photo).to_dict(), CAPTION)


def test_a_caption_with_given_words(captioner, photo):
    record = captioner.caption(photo, prefix="a unicorn").to_dict()
    agree_all(record, CAPTION)
    assert [w["given"] for w in record["words"]][:2] == [True, True]


def test_a_caption_with_attention(captioner, photo):
    record = captioner.caption(photo).to_dict(attention=True)
    agree_all(record, CAPTION, ATTENTION, attention=True)
    rows, columns = record["grid"]
    for word in record["words"]:
        (frame,) = word["attention"]
        assert len(frame) == rows
        assert {len(row) for row in frame} == {columns}
        assert sum(map(sum, frame)) == pytest.approx(1, abs=1e-4)
    assert record["times"] == [0.0]
    assert (record["fit"]["width"], record["fit"]["height"]) == (120, 80)


def test_a_caption_of_a_model_without_attention(photo):
    model = make_tiny_model(attention="none")
    record = Captioner(model, make_header(model)).caption(photo).to_dict(attention=True)
    agree_all(record, CAPTION, ATTENTION, attention=True)
    assert {word["attention"] for word in record["words"]} == {None}
    assert {word["gate"] for word in record["words"]} == {None}


def test_further_captions(captioner, photo):
    record = captioner.caption(photo, n_best=3).to_dict()
    agree_all(record, CAPTION, N_BEST)
    assert len(record["n_best"]) == 3
    assert record["n_best"][0]["caption"] == record["caption"]


def test_files(captioner, photo):
    absent = photo.with_name("absent.jpg")
    good, bad = (to_record(result, "tiny") for result in caption_files(captioner, [photo, absent]))
    agree_all(good, CAPTION, FILE)
    assert good["error"] is None
    agree(bad, FAILED)
    assert bad["caption"] == ""
    assert FAILED.keys() <= good.keys()
    (result,) = caption_files(captioner, [photo], n_best=2)
    everything = to_record(result, "tiny", attention=True)
    agree_all(everything, CAPTION, ATTENTION, N_BEST, FILE, attention=True)
    agree(to_record(FileResult("a.jpg", None, "why"), "tiny", attention=True), FAILED)


def test_the_examples_are_records():
    photo, clip = map(json.loads, re.findall(r"```json\n(.*?)```", RECORDS, re.DOTALL))
    agree_all(photo, CAPTION, N_BEST, FILE)
    agree(clip, VIDEO, FILE)
    (segment,) = clip["segments"]
    agree({**segment, "schema": 1}, CAPTION, SEGMENT)


def test_videos(captioner, photo):
    clip = photo.with_name("clip.gif")
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "green")]
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=500)
    (result,) = caption_media(captioner, [clip], n_best=2)
    record = to_record(result, "tiny", attention=True)
    agree(record, VIDEO, FILE)
    assert record["segments"]
    for segment in record["segments"]:
        agree_all({**segment, "schema": 1}, CAPTION, ATTENTION, N_BEST, SEGMENT, attention=True)
        for word in segment["words"]:
            assert len(word["attention"]) == len(segment["times"])
    agree(to_record(ClipResult("a.mp4", None, "why"), "tiny"), FAILED)


def test_the_csv_has_the_columns_that_are_documented(photo, tiny_checkpoint):
    text = RECORDS.partition("## CSV")[2].partition(".")[0]
    columns = re.findall(r"`(\w+)`", text)
    result = CliRunner().invoke(app, ["caption", str(photo), "--csv", "--model", str(tiny_checkpoint)])
    header, row = csv.reader(io.StringIO(result.stdout))
    assert header == columns
    cells = dict(zip(header, row, strict=True))
    assert cells["finished"] in ("true", "false")
    assert cells["n_best"] == cells["error"] == ""
    for word in json.loads(cells["words"]):
        agree(word, WORD)
    assert set(columns) == {*CAPTION, *FILE, *N_BEST, "start", "end"}


def test_the_numbers_that_are_quoted():
    assert f"hedges below {SURE}" in RECORDS
    assert f"**version {SCHEMA_VERSION}**" in RECORDS


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target
