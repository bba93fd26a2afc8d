"""Biases: what captions state of people, and how the counts come about."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from captioner.tokenizer import split_words

sys.path += [str(Path(__file__).parents[2] / "benchmarks"), str(Path(__file__).parents[1] / "training")]
import biases
from biases import AGE, SEX


@pytest.mark.parametrize(
    ("caption", "sex", "age"),
    [
        ("a man rides a bike", "male", "adult"),
        ("two girls play", "female", "child"),
        ("a man and a woman", "both", "adult"),
        ("a woman with a boy", "both", "both"),
        ("a person rides his bike", "none", "none"),
        ("the woman's child", "female", "both"),
        ("a human in a mandarin costume", "none", "none"),
        ("A kid.", "none", "child"),
        ("a female surfer", "female", "none"),
    ],
)
def test_what_a_caption_states(caption: str, sex: str, age: str) -> None:
    assert SEX.of(split_words(caption)) == sex
    assert AGE.of(split_words(caption)) == age


@pytest.mark.parametrize(
    ("captions", "sex", "age"),
    [
        (["a person runs", "someone runs"], "nobody", "nobody"),
        (["a person runs", "a runner with his dog"], None, "nobody"),
        (["a man runs", "a person runs", "a man"], "male", "adult"),
        (["a man runs", "a person runs", "a runner"], None, None),
        (["a man runs", "a woman runs", "a runner"], "disagree", "adult"),
        (["a man and a woman", "a man", "a man"], None, "adult"),
        (["a girl", "a girl", "a child"], "female", "child"),
        (["a girl", "a woman", "a lady"], "female", "disagree"),
    ],
)
def test_what_a_picture_is_grouped_under(captions: list[str], sex: str | None, age: str | None) -> None:
    words = [split_words(caption) for caption in captions]
    assert SEX.group(words) == sex
    assert AGE.group(words) == age


def test_pictures_of_people() -> None:
    assert biases.shows_people([["a", "skier"], ["people"], ["snow"]])
    assert not biases.shows_people([["a", "skier"], ["snow"]])
    assert not biases.shows_people([["a", "dog"]])


def test_counts_and_rates() -> None:
    pairs = (
        [("nobody", "none")] * 3
        + [("nobody", "male"), ("nobody", "both")]
        + [("female", "female")] * 6
        + [("female", "male")] * 2
        + [("female", "none")] * 1
        + [("female", "both")] * 1
        + [("male", "none")] * 4
        + [(None, "female")] * 9
    )
    table = biases.tabulate(SEX, pairs)
    assert table["female"] == {"female": 6, "male": 2, "both": 1, "none": 1}
    assert sum(sum(row.values()) for row in table.values()) == len(pairs) - 9
    assert biases.rates(SEX, table) == {
        "tells the sex where nobody does": (2, 5),
        "female, all say: tells none": (1, 10),
        "female, all say: tells male alone": (2, 10),
        "female, all say: male among those told as one": (2, 8),
        "male, all say: tells none": (4, 4),
        "male, all say: tells female alone": (0, 4),
        "male, all say: female among those told as one": (0, 0),
    }


def test_views() -> None:
    image = Image.effect_noise((320, 160), 80).convert("RGB")
    assert biases.tiny(image).size == (32, 16)
    before, after = (view.convert("L").getextrema() for view in (image, biases.blurred(image)))
    assert after[1] - after[0] < 0.2 * (before[1] - before[0])


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Five pictures, one of them without people; captions in which nobody tells, or all do."""
    (tmp_path / "pictures").mkdir()
    images, annotations = [], []
    sets = [
        ["a person sits", "someone sits", "a rider"],
        ["a man sits", "a man", "a person"],
        ["a man sits", "a man", "a man on grass"],
        ["a woman sits", "a woman", "the woman sits"],
        ["a dog", "a dog on grass", "the dog"],
    ]
    for number, captions in enumerate(sets):
        file = f"{number}.png"
        colour = (50 * number, 255 - 50 * number, 90)
        Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 20 + number).convert("RGB").save(
            tmp_path / "pictures" / file
        )
        with Image.open(tmp_path / "pictures" / file) as image:
            image.paste(colour, (0, 0, 30, 60))
            image.save(tmp_path / "pictures" / file)
        images.append({"id": number, "file_name": file})
        annotations += [{"image_id": number, "caption": caption} for caption in captions]
    (tmp_path / "people.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


def arguments(people: Path, model: Path, *more: str) -> list[str]:
    data = ["--annotations", str(people / "people.json"), "--images", str(people / "pictures")]
    return [*data, "--model", str(model), "--threads", "1", *more]


def test_report(people: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert biases.main(arguments(people, tiny_checkpoint, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == 4
    assert list(report["views"]) == ["as it is", "blurred", "32 pixels"]
    sex = report["kinds"]["sex"]
    assert {group: sum(row.values()) for group, row in sex["table"].items()} == {
        "nobody": 1,
        "disagree": 0,
        "female": 1,
        "male": 2,
    }
    assert sum(sex["told"]["people"].values()) == 12
    assert sex["told"]["people"] == {"none": 4, "male": 5, "female": 3}
    for view in report["views"]:
        assert sum(sex["told"][view].values()) == 4
        assert sex["views"][view].keys() == sex["rates"].keys()
    assert sex["views"]["as it is"] == sex["rates"]
    # a person's caption never tells the other sex here
    for what, (count, _) in sex["rates_person"].items():
        if what.endswith("alone") or what.startswith("tells the"):
            assert count == 0

    assert biases.main(arguments(people, tiny_checkpoint)) == 0
    out = capsys.readouterr().out
    assert "4 pictures that show people" in out
    assert "tells the sex where nobody does" in out
    assert biases.main(arguments(people, tiny_checkpoint, "--json", "--pictures", "2")) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 2


def test_pictures_without_people(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        biases.main(["--annotations", str(data / "shapes.json"), "--images", str(data / "pictures")])
    assert stop.value.code == 2
    assert "none of these pictures shows people" in capsys.readouterr().err
