"""Preparing data sets: finding, checking, splitting and writing."""

import csv
import io
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from captioner_training.config import StartConfig, load_config
from captioner_training.data import DataError, load_data_set
from captioner_training.experiment import Experiment, build_tokenizer
from captioner_training.prepare import config_text, prepare
from clip_data import write_clip, write_sound, write_truncated
from PIL import Image
from pycocotools.coco import COCO
from shape_data import COMBINATIONS, captions, draw, write_tar
from typer.testing import CliRunner

from captioner.cli import app

ROOT = Path(__file__).parents[2]


def picture(number: int, kind: str = "PNG", **options: Any) -> bytes:
    """Return an encoded picture; another number is another picture."""
    chance = random.Random(number)
    small = Image.frombytes("RGB", (4, 4), chance.randbytes(48))
    buffer = io.BytesIO()
    small.resize((40, 32), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(picture(number))


def write_csv(
    path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("path", "caption")
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rows(count: int) -> list[list[object]]:
    return [[f"{number:03}.png", f"picture {number}"] for number in range(count)]


@pytest.fixture
def forty(tmp_path: Path) -> Path:
    """A CSV of forty pictures beside it."""
    write_pictures(tmp_path / "mine", 40)
    return write_csv(tmp_path / "mine" / "captions.csv", rows(40))


def files(output: Path, split: str) -> list[str]:
    path = output / f"{split}.json"
    return [image["file_name"] for image in json.loads(path.read_text())["images"]] if path.exists() else []


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)], catch_exceptions=False)


# What is written.


def test_the_data_set(forty, tmp_path):
    result = run(forty, "--output", tmp_path / "data", "--note", "by me: all rights")
    assert result.exit_code == 0
    data = {s: json.loads((tmp_path / "data" / f"{s}.json").read_text()) for s in ("train", "val", "test")}
    assert {split: len(d["images"]) for split, d in data.items()} == {"train": 32, "val": 4, "test": 4}
    for split, d in data.items():
        assert d["info"] == {
            "prepared_by": d["info"]["prepared_by"],
            "description": f"{split} split of captions.csv (CSV)",
            "split": split,
            "media": "image",
            "partial": False,
            "missing_pictures": 0,
            "images": ["../mine"],
        }
        texts = {a["image_id"]: a["caption"] for a in d["annotations"]}
        for image in d["images"]:
            assert texts[image["id"]] == f"picture {int(image['file_name'][:3])}"
            assert (image["width"], image["height"]) == (40, 32)
    official = COCO(str(tmp_path / "data" / "val.json"))  # reads them, too
    assert len(official.loadAnns(official.getAnnIds(imgIds=official.getImgIds()))) == 4
    ids = [a["id"] for d in data.values() for a in d["annotations"]]
    assert len(set(ids)) == 40
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["status"] == "written"
    assert report["splits"]["train"] == {"pictures": 32, "captions": 32, "missing_pictures": 0}
    assert [report[k] for k in ("missing", "unreadable", "similar", "empty_captions", "notes")] == [[]] * 5
    assert "captioner train" in result.stdout
    assert "Nothing was left out" in result.stdout
    assert "by me: all rights" in (tmp_path / "data" / "config.yaml").read_text()


def test_the_config_trains_on_it(forty, tmp_path):
    prepare([forty], [], tmp_path / "data")
    config = load_config(tmp_path / "data" / "config.yaml")
    assert config.name == "data"
    (source,), (validation,) = config.data.sources.values(), config.data.validation.values()
    train = load_data_set("train", source, tmp_path / "data")
    val = load_data_set("val", validation, tmp_path / "data")
    assert (len(train), len(val)) == (32, 4)
    assert not train.partial
    assert train.store.read(train.pictures[0].file).startswith(b"\x89PNG")


@pytest.mark.parametrize(("train", "val"), [(1, 1), (160, 20), (300, 100), (6000, 1000), (113_287, 5000)])
def test_configs_for_all_sizes(tmp_path, train, val):
    path = tmp_path / "config.yaml"
    path.write_text(config_text("a", train, val, 'a "note": #x'))
    config = load_config(path)
    assert config.data.sources["train"].note == 'a "note": #x'
    assert config.data.validation["val"].only_highest == (1000 if val > 2000 else 0)
    if train < 2000:  # as in the measured example
        own = load_config(ROOT / "configs" / "own_pictures.yaml")
        assert (config.start, config.tokenizer, config.loss) == (own.start, own.tokenizer, own.loss)
        assert config.encoder is None
        shown = {"sources": own.stages[0].sources}
        assert config.stages[0].model_copy(update=shown) == own.stages[0]
        return
    small = load_config(ROOT / "configs" / "small.yaml")
    assert (config.encoder, config.loss, config.start) == (small.encoder, small.loss, None)
    # the comment in it tells how to go on from the built-in captioner: that is a config, too
    raw = yaml.safe_load(path.read_text())
    del raw["encoder"], raw["decoder"]
    path.write_text(yaml.dump({**raw, "start": {"model": "built-in"}}))
    assert load_config(path).start is not None


def test_a_config_that_was_edited_is_kept(forty, tmp_path):
    prepare([forty], [], tmp_path / "data")
    (tmp_path / "data" / "config.yaml").write_text("mine")
    report = prepare([forty], [], tmp_path / "data").report
    assert (tmp_path / "data" / "config.yaml").read_text() == "mine"
    assert "kept as it was" in report["notes"][0]


def test_ids_of_the_source_are_kept(tmp_path):
    write_pictures(tmp_path, 3)
    data = {
        "images": [
            {"id": i, "file_name": f"{n:03}.png", "split": s, "set": "x"}
            for n, (i, s) in enumerate([(77, "train"), ("b", "val"), (5, "train")])
        ],
        "annotations": [{"image_id": i, "caption": "x"} for i in (77, "b", 5)],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    prepare([tmp_path / "a.json"], [], tmp_path / "data")
    train = json.loads((tmp_path / "data" / "train.json").read_text())
    assert [(i["id"], i["set"]) for i in train["images"]] == [(77, "x"), (5, "x")]


def test_a_prepared_data_set_can_be_prepared_again(forty, tmp_path):
    first = tmp_path / "first"
    prepare([forty], [], first)
    sources = [first / f"{split}.json" for split in ("train", "val", "test")]
    report = prepare(sources, [], tmp_path / "elsewhere" / "second").report
    for split in ("train", "val", "test"):
        assert files(first, split) == files(tmp_path / "elsewhere" / "second", split)
    assert report["drawn"] == {}
    info = json.loads((tmp_path / "elsewhere" / "second" / "val.json").read_text())["info"]
    assert info["images"] == [str((tmp_path / "mine").resolve())]  # they do not lie together


# Splits.


def test_the_draw_depends_on_content_and_seed_alone(forty, tmp_path):
    prepare([forty], [], tmp_path / "a")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    lines = []
    for number in reversed(range(40)):
        name = f"{number * 7919 % 41}-x.png"
        shutil.copy(tmp_path / "mine" / f"{number:03}.png", renamed / name)
        lines.append([name, f"picture {number}"])
    prepare([write_csv(renamed / "a.csv", lines)], [], tmp_path / "b")
    prepare([forty], [], tmp_path / "c", seed=1)
    prepare([forty], [], tmp_path / "quick", decode=False)

    def texts(folder: str, split: str) -> set[str]:
        return {
            a["caption"] for a in json.loads((tmp_path / folder / f"{split}.json").read_text())["annotations"]
        }

    for split in ("train", "val", "test"):
        assert texts("a", split) == texts("b", split) == texts("quick", split)
    assert texts("a", "test") != texts("c", "test")


def test_shares_that_are_asked_for(forty, tmp_path):
    prepare([forty], [], tmp_path / "a", val=0.25, test=0.0)
    assert [len(files(tmp_path / "a", s)) for s in ("train", "val", "test")] == [30, 10, 0]
    assert not (tmp_path / "a" / "test.json").exists()
    for wrong in ({"val": 1.0}, {"test": -0.1}, {"val": 0.5, "test": 0.5}):
        with pytest.raises(DataError, match=r"^--(val|test) "):
            prepare([forty], [], tmp_path / "a", **wrong)


def test_splits_of_earlier_calls_do_not_stay(forty, tmp_path):
    prepare([forty], [], tmp_path / "a")
    assert files(tmp_path / "a", "test")
    prepare([forty], [], tmp_path / "a", test=0.0)
    assert not (tmp_path / "a" / "test.json").exists()


def test_stated_splits(tmp_path):
    write_pictures(tmp_path, 6)
    lines = [
        [*row, split] for row, split in zip(rows(6), "train test val train test train".split(), strict=True)
    ]
    table = write_csv(tmp_path / "a.csv", lines, ("path", "caption", "split"))
    prepare([table], [], tmp_path / "a")
    assert files(tmp_path / "a", "train") == ["000.png", "003.png", "005.png"]
    assert files(tmp_path / "a", "val") == ["002.png"]
    assert files(tmp_path / "a", "test") == ["001.png", "004.png"]
    with pytest.raises(DataError, match="--val: the source states its val split"):
        prepare([table], [], tmp_path / "a", val=0.1)
    report = prepare([table], [], tmp_path / "a", resplit=True, val=0.5, test=0.0).report
    assert report["splits"]["val"]["pictures"] == 3


def test_a_stated_training_split_alone_gives_some_for_validation(tmp_path):
    write_pictures(tmp_path, 20)
    table = write_csv(tmp_path / "a.csv", [[*r, "train"] for r in rows(20)], ("path", "caption", "split"))
    report = prepare([table], [], tmp_path / "a").report
    assert report["drawn"] == {"val": 0.1}
    assert [report["splits"][s]["pictures"] for s in ("train", "val", "test")] == [18, 2, 0]
    table = write_csv(tmp_path / "b.csv", [[*r, "val"] for r in rows(20)], ("path", "caption", "split"))
    with pytest.raises(DataError, match="states only val, nothing to train on"):
        prepare([table], [], tmp_path / "a")


def test_files_whose_names_tell_their_splits(tmp_path):
    write_pictures(tmp_path, 10)
    train = write_csv(tmp_path / "captions_train.csv", rows(10)[:6])
    val = write_csv(tmp_path / "captions_val.csv", rows(10)[6:9])
    more = write_csv(tmp_path / "more.csv", rows(10)[9:])
    prepare([train, val], [], tmp_path / "a")
    assert files(tmp_path / "a", "val") == ["006.png", "007.png", "008.png"]
    with pytest.raises(DataError, match=r"more\.csv: of which split .* write train=.*more\.csv"):
        prepare([train, val, more], [], tmp_path / "a")
    prepare([train, val, f"test={more}"], [], tmp_path / "a")
    assert files(tmp_path / "a", "test") == ["009.png"]
    # of one file alone the name means nothing: somebody has captions_train.csv and nothing else
    assert prepare([train], [], tmp_path / "a").report["drawn"] == {"val": 0.1, "test": 0.1}


def test_lists_of_names(tmp_path):
    write_pictures(tmp_path / "p", 8)
    tokens = "".join(f"{n:03}.png#{k}\ta {n} {k}\n" for n in range(8) for k in range(2))
    (tmp_path / "Flickr8k.token.txt").write_text(tokens)
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("".join(f"{n:03}.png\n" for n in range(4)))
    (tmp_path / "Flickr_8k.devImages.txt").write_text("004\n005\n")  # without the suffix, as some lists
    (tmp_path / "last").write_text("006.png\n999.png\n")
    result = run(
        tmp_path / "Flickr8k.token.txt",
        tmp_path / "Flickr_8k.trainImages.txt",
        *("--split", tmp_path / "Flickr_8k.devImages.txt", "--split", f"test={tmp_path / 'last'}"),
        *("--images", tmp_path / "p", "-o", tmp_path / "a"),
    )
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "a", "train") == ["000.png", "001.png", "002.png", "003.png"]
    assert files(tmp_path / "a", "val") == ["004.png", "005.png"]
    assert files(tmp_path / "a", "test") == ["006.png"]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["unlisted"] == ["007.png"]
    assert report["notes"] == ["1 names in the lists have no captions"]
    (tmp_path / "again.txt").write_text("000.png\n")
    source, lists = [tmp_path / "Flickr8k.token.txt"], [tmp_path / "Flickr_8k.trainImages.txt"]
    with pytest.raises(DataError, match=r"000\.png is in another list, too"):
        prepare(source, [tmp_path / "p"], tmp_path / "a", lists=[*lists, f"val={tmp_path / 'again.txt'}"])
    with pytest.raises(DataError, match="a list of names, of which split"):
        prepare([*source, tmp_path / "again.txt"], [tmp_path / "p"], tmp_path / "a")
    with pytest.raises(DataError, match="only lists of names"):
        prepare(lists, [tmp_path / "p"], tmp_path / "a")


# Finding pictures.


def test_coco_in_a_tar_and_a_folder(tmp_path):
    write_tar(tmp_path / "train.tar", {f"./{n:012}.png": picture(n) for n in range(4)})
    write_pictures(tmp_path / "val", 2)
    for n in range(2):
        (tmp_path / "val" / f"{n:03}.png").rename(tmp_path / "val" / f"{n + 4:012}.png")
        (tmp_path / "val" / f"{n + 4:012}.png").write_bytes(picture(n + 4))
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        data = {
            "images": [{"id": n, "file_name": f"{n:012}.png"} for n in numbers],
            "annotations": [{"id": n, "image_id": n, "caption": f"{n}"} for n in numbers],
        }
        (tmp_path / f"captions_{split}2017.json").write_text(json.dumps(data))
    result = run(
        *(tmp_path / "captions_train2017.json", tmp_path / "captions_val2017.json"),
        *("--images", tmp_path / "train.tar", "--images", tmp_path / "val", "-o", tmp_path / "data"),
    )
    assert result.exit_code == 0, result.output
    info = json.loads((tmp_path / "data" / "train.json").read_text())["info"]
    assert info["images"] == ["../train.tar", "../val"]
    config = load_config(tmp_path / "data" / "config.yaml")
    train = load_data_set("train", config.data.sources["train"], tmp_path / "data")
    assert [p.id for p in train.pictures] == [0, 1, 2, 3]
    assert train.store.read(train.pictures[3].file) == picture(3)


def test_karpathys_names_fit_coco_as_it_came_and_as_of_2017(tmp_path):
    images = [
        {
            "filepath": f"{part}2014",
            "filename": f"COCO_{part}2014_{n:012}.jpg",
            "cocoid": n,
            "split": split,
            "sentences": [{"raw": f"{n}"}],
        }
        for n, (part, split) in enumerate(
            [("train", "train"), ("val", "restval"), ("val", "val"), ("val", "test")]
        )
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    for image in images:
        for path in (
            tmp_path / "old" / image["filepath"] / image["filename"],
            tmp_path / "flat" / image["filename"],
            tmp_path / "new" / "train2017" / f"{image['cocoid']:012}.jpg",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(image["cocoid"], "JPEG"))
    expected = {
        "old": "val2014/COCO_val2014_000000000001.jpg",
        "flat": "COCO_val2014_000000000001.jpg",
        "new": "train2017/000000000001.jpg",
    }
    for name, file in expected.items():
        prepare([tmp_path / "dataset_coco.json"], [tmp_path / name], tmp_path / "data")
        assert files(tmp_path / "data", "train")[1] == file
        assert len(files(tmp_path / "data", "test")) == 1


def test_paths_from_elsewhere_and_missing_suffixes(tmp_path):
    write_pictures(tmp_path / "p" / "sub", 3)
    lines = [["/home/old/p/sub/000.png", "a"], ["001", "b"], ["002.png", "c"], ["x/003.png", "d"]]
    report = prepare([write_csv(tmp_path / "a.csv", lines)], [tmp_path / "p"], tmp_path / "data").report
    assert [m["file"] for m in report["missing"]] == ["x/003.png"]
    assert report["notes"][0].startswith("2 files lie in another folder than named or have another suffix")
    done = prepare([tmp_path / "a.csv"], [tmp_path / "p"], tmp_path / "data", allow_missing=True)
    found = [f for s in ("train", "val", "test") for f in files(done.output, s)]
    assert sorted(found) == ["sub/000.png", "sub/001.png", "sub/002.png"]


def test_a_picture_is_not_taken_for_another_of_its_name(tmp_path):
    for n, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(picture(n))
        (tmp_path / folder / "2.png").write_bytes(picture(7))
    plain = write_csv(tmp_path / "plain.csv", [["1.png", "x"], ["2.png", "y"]])
    with pytest.raises(DataError, match=r"1\.png may be a/1\.png or b/1\.png"):
        prepare([plain], [tmp_path], tmp_path / "data")
    with pytest.raises(DataError, match=r"1\.png: .*a and .*b hold different pictures of this name"):
        prepare([plain], [tmp_path / "a", tmp_path / "b"], tmp_path / "data")
    both = write_csv(tmp_path / "both.csv", [["a/1.png", "x"], ["b/1.png", "y"]])
    with pytest.raises(DataError, match=r"a/1\.png and b/1\.png would both be 1\.png"):
        prepare([both], [tmp_path / "a"], tmp_path / "data")
    report = prepare([both], [tmp_path], tmp_path / "data", val=0.4, test=0.0).report
    assert report["missing"] == []
    # one is missing, and the other is not put into its place
    (tmp_path / "b" / "1.png").unlink()
    shutil.copy(tmp_path / "a" / "1.png", tmp_path / "1.png")
    mixed = write_csv(tmp_path / "mixed.csv", [["1.png", "x"], ["b/1.png", "y"], ["a/2.png", "z"]])
    report = prepare([mixed], [tmp_path], tmp_path / "data").report
    assert [m["file"] for m in report["missing"]] == ["b/1.png"]


def test_no_picture_at_all_is_a_wrong_folder(forty, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(forty, "--images", tmp_path / "empty", "-o", tmp_path / "data")
    assert result.exit_code == 2
    assert "none of the 40 pictures (such as 000.png) is among" in result.stderr
    assert result.stderr.count("\n") == 1
    assert run(forty, "--images", tmp_path / "absent", "-o", tmp_path / "data").exit_code == 2


# Checks.


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Twelve pictures, of which some are not there, broken, or stand there twice."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.jpg").write_bytes(picture(number, "JPEG", quality=95))
    lines = [
        [f"{n:02}.jpg", f"picture {n}", "train" if n < 8 else "val" if n < 10 else "test"] for n in range(12)
    ]
    half = folder / "00.jpg"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (folder / "01.jpg").write_bytes(b"")
    (folder / "02.jpg").write_text("<html>404 not found</html>")
    (folder / "03.jpg").unlink()
    shutil.copy(folder / "10.jpg", folder / "04.jpg")  # a test picture under another name
    lines[5][0] = "05.png"  # a validation picture in another container
    Image.open(folder / "08.jpg").save(folder / "05.png")
    lines[6][1] = " \t "
    lines.append(["07.jpg", "", "train"])
    lines.append(["11.jpg", "picture  11", "test"])
    return write_csv(folder / "a.csv", lines, ("path", "caption", "split"))


def test_what_is_wrong_is_reported_and_nothing_is_written(broken, tmp_path):
    result = run(broken, "-o", tmp_path / "data")
    assert result.exit_code == 1
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["report.json"]
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["status"].startswith("stopped")
    assert report["missing"] == [{"file": "03.jpg", "split": "train"}]
    reasons = {item["file"]: item["reason"] for item in report["unreadable"]}
    assert reasons.keys() == {"00.jpg", "01.jpg", "02.jpg"}
    assert "truncated" in reasons["00.jpg"]
    assert "empty" in reasons["01.jpg"]
    assert "web page" in reasons["02.jpg"]
    assert report["empty_captions"] == [
        {"file": "06.jpg", "split": "train", "captions": 1},
        {"file": "07.jpg", "split": "train", "captions": 1},
    ]
    assert report["without_captions"] == [{"file": "06.jpg", "split": "train"}]
    assert report["repeated_captions"] == [{"file": "11.jpg", "split": "test", "captions": ["picture 11"]}]
    assert report["duplicates"]["across_splits"] == [
        {
            "kept": {"file": "10.jpg", "split": "test"},
            "dropped": [{"file": "04.jpg", "split": "train"}],
        },
        {
            "kept": {"file": "08.jpg", "split": "val"},
            "dropped": [{"file": "05.png", "split": "train"}],
        },
    ]
    for told in ("1 picture missing", "3 pictures unreadable", "2 empty captions", "--allow-missing"):
        assert told in result.stdout
    assert "04.jpg (train) = 10.jpg (test, kept)" in result.stdout


def test_a_partial_data_set_says_so(broken, tmp_path):
    result = run(broken, "-o", tmp_path / "data", "--allow-missing")
    assert result.exit_code == 0
    assert "PARTIAL" in result.stdout
    assert files(tmp_path / "data", "train") == ["07.jpg"]
    assert files(tmp_path / "data", "val") == ["08.jpg", "09.jpg"]
    assert files(tmp_path / "data", "test") == ["10.jpg", "11.jpg"]
    info = json.loads((tmp_path / "data" / "train.json").read_text())["info"]
    assert (info["partial"], info["missing_pictures"]) == (True, 4)
    info = json.loads((tmp_path / "data" / "test.json").read_text())["info"]
    assert (info["partial"], info["missing_pictures"]) == (True, 0)
    config = load_config(tmp_path / "data" / "config.yaml")
    assert load_data_set("val", config.data.validation["val"], tmp_path / "data").partial


def test_an_attempt_that_stops_leaves_no_older_data_set(forty, tmp_path):
    prepare([forty], [], tmp_path / "data")
    (tmp_path / "mine" / "007.png").unlink()
    assert prepare([forty], [], tmp_path / "data").stopped
    assert not (tmp_path / "data" / "train.json").exists()


def test_the_quick_look_finds_less_but_the_same_bytes(broken, tmp_path):
    result = run(broken, "-o", tmp_path / "data", "--no-decode")
    assert result.exit_code == 1
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert {item["file"] for item in report["unreadable"]} == {"01.jpg", "02.jpg"}
    dropped = [d["file"] for group in report["duplicates"]["across_splits"] for d in group["dropped"]]
    assert dropped == ["04.jpg"]


def test_the_quick_look_compares_files_that_begin_alike_to_their_ends(tmp_path):
    body = b"x" * 10_000
    head = b"\x89PNG\r\n\x1a\n" + body
    for name, end in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / f"{name}.png").write_bytes(head + end)
    lines = [["a.png", "x", "train"], ["b.png", "y", "train"], ["c.png", "z", "test"]]
    table = write_csv(tmp_path / "a.csv", lines, ("path", "caption", "split"))
    report = prepare([table], [], tmp_path / "data", decode=False, val=0.0).report
    (group,) = report["duplicates"]["across_splits"]
    assert [d["file"] for d in group["dropped"]] == ["a.png"]


def test_a_picture_twice_in_a_split_and_ones_that_look_alike(tmp_path):
    write_pictures(tmp_path, 12)
    shutil.copy(tmp_path / "003.png", tmp_path / "again.png")
    image = Image.open(tmp_path / "004.png").convert("RGB")
    image.point([min(255, v + 1) for v in range(256)] * 3).save(tmp_path / "brighter.png")
    lines = [[*r, "train"] for r in rows(12)] + [["again.png", "x", "train"], ["brighter.png", "y", "val"]]
    table = write_csv(tmp_path / "a.csv", lines, ("path", "caption", "split"))
    prepared = prepare([table], [], tmp_path / "data")
    assert prepared.report["duplicates"] == {
        "across_splits": [],
        "within_split": [{"split": "train", "files": ["003.png", "again.png"]}],
    }
    assert prepared.report["similar"] == [
        [{"file": "004.png", "split": "train"}, {"file": "brighter.png", "split": "val"}]
    ]
    assert files(tmp_path / "data", "val") == ["brighter.png"]  # only told of
    assert any("004.png (train) ~ brighter.png (val)" in line for line in prepared.lines())


@pytest.mark.parametrize("seed", range(6))
def test_a_draw_keeps_copies_together(tmp_path, seed):
    write_pictures(tmp_path, 12)
    lines = rows(12)
    for number in range(12):
        Image.open(tmp_path / f"{number:03}.png").save(tmp_path / f"copy-{number}.bmp")
        lines.append([f"copy-{number}.bmp", "x"])
    table = write_csv(tmp_path / "a.csv", lines)
    prepare([table], [], tmp_path / "data", val=0.3, test=0.3, seed=seed)
    split_of = {f: s for s in ("train", "val", "test") for f in files(tmp_path / "data", s)}
    assert len(split_of) == 24
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert sorted(group["split"] for group in report["duplicates"]["within_split"]) == sorted(
        split_of[f"{number:03}.png"] for number in range(12)
    )
    for number in range(12):
        assert split_of[f"{number:03}.png"] == split_of[f"copy-{number}.bmp"]


def test_entries_of_one_file_become_one_picture(tmp_path):
    write_pictures(tmp_path, 4)
    data = {
        "images": [{"id": n, "file_name": f"{n // 2:03}.png"} for n in range(8)],
        "annotations": [{"image_id": n, "caption": f"caption {n}"} for n in range(8)],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    report = prepare([tmp_path / "a.json"], [], tmp_path / "data", val=0.25, test=0.0).report
    assert report["notes"] == ["4 entries of a file that had one before were put together with it"]
    assert report["splits"]["train"] == {"pictures": 3, "captions": 6, "missing_pictures": 0}


def test_nothing_of_the_users_is_overwritten(forty, tmp_path):
    own = write_csv(tmp_path / "mine" / "train.json", rows(40))
    before = own.read_bytes()
    for source in (own, forty):
        with pytest.raises(DataError, match=r"train\.json: exists and is not a prepared split"):
            prepare([source], [], tmp_path / "mine")
    with pytest.raises(DataError, match="this is a file; give a folder"):
        prepare([forty], [], forty)
    first = prepare([forty], [], tmp_path / "data").output
    with pytest.raises(DataError, match="not a prepared split; choose another --output"):
        prepare([first / "train.json"], [], first)
    assert own.read_bytes() == before


def test_odd_names(tmp_path):
    names = ["ä ö.png", 'a "quoted" name.png', "line\nbreak.png"]
    for n, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(n))
    prepare([write_csv(tmp_path / "my table.csv", [[n, "x"] for n in names])], [], tmp_path / "my data")
    found = [f for s in ("train", "val", "test") for f in files(tmp_path / "my data", s)]
    assert sorted(found) == sorted(names)


# Kept-out texts.


def test_texts_of_kept_out_pictures_enter_nothing(tmp_path, tiny_checkpoint):
    """No word of validation or test captions reaches the training file, a vocabulary, or n-gram counts."""
    folder = tmp_path / "mine"
    folder.mkdir()

    def write(secret: str) -> Path:
        lines = []
        for n, combination in enumerate(COMBINATIONS):
            draw(*combination, size=32).save(folder / f"{n}.png")
            split = "train" if n < 16 else "val" if n < 20 else "test"
            for caption in captions(*combination):
                text = caption if split == "train" else f"{caption} {secret}{split}{n} {secret}{split}"
                lines.append([f"{n}.png", text, split])
        return write_csv(folder / "a.csv", lines, ("path", "caption", "split"))

    written = []
    for secret in ("secret", "hidden"):
        prepare([write(secret)], [], tmp_path / secret)
        written.append((tmp_path / secret / "train.json").read_bytes())
        assert secret in (tmp_path / secret / "val.json").read_text()
        assert secret in (tmp_path / secret / "test.json").read_text()
    assert written[0] == written[1]
    assert b"secret" not in written[0]
    train = json.loads(written[0])
    kept_out = {
        image["id"]
        for split in ("val", "test")
        for image in json.loads((tmp_path / "secret" / f"{split}.json").read_text())["images"]
    }
    assert len(kept_out) == 8
    assert not kept_out & {image["id"] for image in train["images"]}
    assert not kept_out & {annotation["image_id"] for annotation in train["annotations"]}

    config = load_config(tmp_path / "secret" / "config.yaml")
    sources = {n: load_data_set(n, c, tmp_path / "secret") for n, c in config.data.sources.items()}
    assert {c for p in sources["train"].pictures for c in p.captions} == {
        text for combination in COMBINATIONS[:16] for text in captions(*combination)
    }
    for kind in ("word", "bpe"):
        tokenizer_config = config.tokenizer.model_copy(update={"kind": kind, "min_count": 1, "size": 300})
        tokenizer = build_tokenizer(config.model_copy(update={"tokenizer": tokenizer_config}), sources)
        known = json.dumps(tokenizer.to_dict())
        assert "background" in known
        assert "secret" not in known
        assert "val" not in known

    # the model that is trained, fresh or going on from another, and the document frequencies of its reward
    experiments = [Experiment(config, tmp_path / "secret", tmp_path / "cache")]
    started = config.model_copy(
        update={"start": StartConfig(model=str(tiny_checkpoint)), "encoder": None, "decoder": None}
    )
    experiments.append(Experiment(started, tmp_path / "secret", tmp_path / "cache"))
    for experiment in experiments:
        assert "secret" not in json.dumps(experiment.tokenizer.to_dict())
        assert experiment.references.keys() == {"train"}
        judge, begins = experiment.judge(config.stages[0])
        assert (len(judge), begins) == (16, {"train": 0})
        again = Experiment(experiment.config, tmp_path / "hidden", tmp_path / "cache")
        assert again.content() == experiment.content()
        candidates = [experiment.references["train"][n][0] for n in (0, 5)]
        same, _ = again.judge(config.stages[0])
        assert same.rewards([0, 3], candidates).tolist() == judge.rewards([0, 3], candidates).tolist()


# Videos.


def test_videos(tmp_path):
    for n in range(4):
        write_clip(tmp_path / "clips" / f"video{n}.mp4", start=n)
    shutil.copy(tmp_path / "clips" / "video0.mp4", tmp_path / "clips" / "video4.mp4")
    (tmp_path / "clips" / "video5.webm").write_bytes(b"")
    data = {
        "videos": [
            {"video_id": f"video{n}", "split": s, "start time": 1.5 * n, "end time": 1.5 * n + 9}
            for n, s in enumerate("train train validate test test train train".split())
        ],
        "sentences": [{"video_id": f"video{n}", "caption": f"clip {n}"} for n in range(7)],
    }
    (tmp_path / "train_val_videodatainfo.json").write_text(json.dumps(data))
    result = run(
        *(tmp_path / "train_val_videodatainfo.json", "--videos", tmp_path / "clips"),
        *("-o", tmp_path / "data", "--allow-missing"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert [m["file"] for m in report["missing"]] == ["video6"]
    assert [m["file"] for m in report["unreadable"]] == ["video5.webm"]
    assert [d["dropped"][0]["file"] for d in report["duplicates"]["across_splits"]] == ["video0.mp4"]
    train = json.loads((tmp_path / "data" / "train.json").read_text())
    assert train["info"]["media"] == "video"
    (clip,) = train["images"]
    assert clip["file_name"] == "video1.mp4"
    assert (clip["start"], clip["end"], clip["cut"]) == (1.5, 10.5, True)
    config = load_config(tmp_path / "data" / "config.yaml")
    assert (config.start.model, config.video.frames, config.video.cell) == ("built-in", 16, "gru")
    assert "captioner train" in result.stdout
    assert "fewer than 20 validation clips" in result.stdout


def test_clips_that_cannot_be_used_are_told_of_at_once(tmp_path):
    clips = tmp_path / "clips"
    write_clip(clips / "good.avi")
    write_truncated(clips / "short.avi")
    write_sound(clips / "sound.mp4")
    (clips / "page.mp4").write_bytes(b"<!DOCTYPE html><html></html>")
    (clips / "no.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(50))
    write_csv(tmp_path / "a.csv", [[f.name, "a clip"] for f in sorted(clips.iterdir())], ("video", "caption"))
    prepared = prepare([tmp_path / "a.csv"], [clips], tmp_path / "data")
    assert prepared.stopped
    reasons = {bad["file"]: bad["reason"] for bad in prepared.report["unreadable"]}
    assert reasons.keys() == {"short.avi", "sound.mp4", "page.mp4", "no.mp4"}
    assert reasons["short.avi"].startswith("the file is truncated; nothing could be read after 1.")
    assert reasons["sound.mp4"] == "there is sound, but no pictures in it; give a video"
    assert "a web page" in reasons["page.mp4"]


def test_clips_of_one_long_video_are_different(tmp_path):
    write_clip(tmp_path / "AbCdEfGhIjK.avi", seconds=6, rate=2)
    names = [f"AbCdEfGhIjK_{n}_{n + 5} clip {n}\n" for n in (*range(4), 9)]
    (tmp_path / "a.txt").write_text("".join(names))
    prepared = prepare([tmp_path / "a.txt"], [], tmp_path / "data", val=0.25, test=0.25, allow_missing=True)
    (late,) = prepared.report["unreadable"]
    assert late["reason"] == "the clip begins at 9 s, and the video ends at 6.00 s"
    assert prepared.report["duplicates"] == {"across_splits": [], "within_split": []}
    assert [c["pictures"] for c in prepared.report["splits"].values()] == [2, 1, 1]
    clip = json.loads((tmp_path / "data" / "val.json").read_text())["images"][0]
    assert clip["cut"] is False
    assert "customary splits" in prepared.report["notes"][0]


def test_msvds_customary_splits(tmp_path):
    (tmp_path / "clips").mkdir()
    names = [f"{n:011}_{n}_{n + 9}" for n in range(1970)]
    for name in names:
        (tmp_path / "clips" / f"{name}.avi").write_bytes(name.encode())
    shuffled = random.Random(0).sample(names, len(names))
    (tmp_path / "all.txt").write_text("".join(f"{name} caption of {name}\n" for name in shuffled))
    prepare([tmp_path / "all.txt"], [tmp_path / "clips"], tmp_path / "data", decode=False)
    expected = {"train": names[:1200], "val": names[1200:1300], "test": names[1300:]}
    for split, stems in expected.items():
        assert sorted(files(tmp_path / "data", split)) == [f"{stem}.avi" for stem in stems]


# The size of COCO.


def prepare_many(tmp_path: Path, count: int) -> None:
    encoded = picture(0)
    # a chunk that decoders pass over makes every file another one
    write_tar(tmp_path / "all.tar", {f"{n:012}.png": encoded + f"{n}".encode() for n in range(count)})
    data = {
        "images": [{"id": n, "file_name": f"{n:012}.png", "height": 32, "width": 40} for n in range(count)],
        "annotations": [{"id": n, "image_id": n // 5, "caption": f"a caption {n}"} for n in range(5 * count)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(data))
    report = prepare(
        [tmp_path / "captions.json"], [tmp_path / "all.tar"], tmp_path / "data", decode=False
    ).report
    assert report["splits"]["train"] == {
        "pictures": count * 8 // 10,
        "captions": count * 4,
        "missing_pictures": 0,
    }


def test_many_pictures(tmp_path):
    prepare_many(tmp_path, 3000)


@pytest.mark.slow
def test_a_hundred_thousand_pictures(tmp_path):
    prepare_many(tmp_path, 100_000)
