"""The photos of installed packages: the table is sound, and captions are judged strictly."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from pathlib import Path

import pytest
from conftest import TINY_WORDS
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import naming


@pytest.mark.parametrize(
    ("caption", "nouns", "exceptions", "expected"),
    [
        ("a lion lies on a rock", ["lion", "big cat"], [], "lion"),
        ("Two lions.", ["lion"], [], "lion"),
        ("a lion's face", ["lion"], [], "lion"),
        ("a big cat on a rock", ["lion", "big cat"], [], "big cat"),
        ("a cat on a rock", ["lion", "big cat"], [], None),
        ("a brown dog lies on a rock", ["lion"], [], None),
        ("a lion and two dogs", ["lion"], [], None),
        ("a sea lion on a beach", ["lion"], ["sea lion"], None),
        ("sea lions beside a lion", ["lion"], ["sea lion"], "lion"),
        ("a dandelion", ["lion"], [], None),
        ("a lion-shaped cake", ["lion"], [], None),
        ("a table with cups on it", ["coffee", "cup"], [], "cup"),
        ("a cupboard", ["cup"], [], None),
        ("ladies with cities, churches and boxes", ["lady"], [], "lady"),
        ("churches", ["church"], [], "church"),
        ("cities", ["city"], [], "city"),
        ("toys", ["toy"], [], "toy"),
        ("an old woman in a hat", ["woman", "person"], [], "woman"),
        ("an old man in a hat", ["woman", "person"], [], None),
        ("people in hats", ["woman", "person"], [], "person"),
        ("a dog runs in the grass", ["grass"], [], None),
        ("green grass", ["grass"], [], "grass"),
    ],
)
def test_named(caption: str, nouns: list[str], exceptions: list[str], expected: str | None) -> None:
    assert naming.named(caption, nouns, exceptions) == expected


def test_the_table_is_fixed_and_sound() -> None:
    photos = naming.read_table(naming.TABLE)
    assert len(photos) >= 18
    assert len({photo.sha256 for photo in photos}) == len(photos)
    assert {photo.package for photo in photos} == {"gradio", "matplotlib", "skimage", "sklearn"}
    for photo in photos:
        assert len(photo.sha256) == 12
        for noun in photo.nouns:
            assert noun == noun.lower().strip() != ""
            assert naming.named(f"a {noun} here", photo.nouns, photo.exceptions), (photo, noun)
        for phrase in photo.exceptions:
            assert naming.named(f"a {phrase} here", photo.nouns, photo.exceptions) is None, (photo, phrase)
            assert naming.named(f"a {phrase} here", photo.nouns) is not None, (photo, phrase)
    installed = [naming.locate(photo) for photo in photos if photo.package == "skimage"]
    assert all(isinstance(place, Path) for place in installed), installed


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of two photos of a package that is made up."""
    package = tmp_path / "made_up_photos"
    package.mkdir()
    (package / "__init__.py").touch()
    rows = []
    for colour, nouns in (("red", "zzz"), ("blue", "|".join(TINY_WORDS))):
        Image.new("RGB", (40, 30), colour).save(package / f"{colour}.png")
        digest = hashlib.sha256((package / f"{colour}.png").read_bytes()).hexdigest()[:12]
        rows.append([package.name, f"{colour}.png", f"all {colour}", nouns, "", digest])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(naming, "_BEINGS", [])  # the tiny model says anything
    path = tmp_path / "table.csv"
    with open(path, "w", newline="") as file:
        file.write("# a remark, with a comma\n")
        csv.writer(file).writerows([naming._COLUMNS, *rows])
    return path


def run(table: Path, model: Path, *more: str) -> int:
    return naming.main(["--table", str(table), "--model", str(model), "--threads", "1", *more])


def test_report(table: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(table, tiny_checkpoint, "--json") == 1  # one of two is less than four in five
    report = json.loads(capsys.readouterr().out)
    assert (report["named"], report["measured"], report["not_measured"]) == (1, 2, [])
    red, blue = report["photos"]
    assert red["named"] is None
    assert blue["named"] in blue["caption"]
    assert run(table, tiny_checkpoint) == 1
    out = capsys.readouterr().out
    assert "named rightly: 1 of 2: 50 % (9-91)\n" in out
    assert red["caption"] in out
    assert "(all red)" in out  # what was not named is told
    assert "(all blue)" not in out


def test_what_is_missing_is_said_and_not_counted(
    table: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table.read_text()
    digest = text.splitlines()[2].split(",")[-1]
    lines = [f"no_such_package,x.png,x,x,,{digest}", f"made_up_photos,gone.png,x,x,,{digest}"]
    table.write_text(text.replace(digest, "0" * 12) + "\n".join(lines) + "\n")
    assert run(table, tiny_checkpoint) == 2
    out = capsys.readouterr().out
    assert "named rightly: 1 of 1: 100 % (21-100); 3 not measured" in out
    assert "not measured: another picture than the listed one" in out
    assert "not measured: pip install no_such_package" in out
    assert "not measured: this release of the package has no such file" in out


def test_nothing_installed(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.csv"
    path.write_text(",".join(naming._COLUMNS) + "\nno_such_package,x.png,x,x,,000000000000\n")
    assert run(path, tiny_checkpoint) == 2
    assert "0 of 0; 1 not measured" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "a,b\n", ",".join(naming._COLUMNS) + "\nx,y\n"])
def test_another_table(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        naming.read_table(path)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1
