"""Files of captions in every shape that systems write them, and whose captions they are."""

import json

import pytest
from captioner_training.metrics import ScoreError, load_annotations
from captioner_training.results import load_results, match_results, save_results

CAPTIONS = {1: "a dog", 20: "a cat on a mat", 300: "", 4000: "ein Café 🐕"}


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def entries(captions):
    return [{"image_id": key, "caption": text} for key, text in captions.items()]


def lines(records):
    return "\n".join(map(json.dumps, records)) + "\n"


@pytest.fixture
def annotations(tmp_path):
    """Return a function that makes annotations of images: ids, or file names by id."""

    def make(images, without=()):
        names = images if isinstance(images, dict) else {}
        ids = [*images, *without]
        data = {
            "images": [{"id": key, **({"file_name": names[key]} if key in names else {})} for key in ids],
            "annotations": [{"image_id": key, "caption": "a picture"} for key in images],
        }
        return load_annotations(write(tmp_path / "annotations.json", data))

    return make


@pytest.mark.parametrize(
    "data",
    [
        entries(CAPTIONS),
        lines(entries(CAPTIONS)),
        [{"id": 7, **entry} for entry in entries(CAPTIONS)],
        [{"image_id": float(key), "caption": text} for key, text in CAPTIONS.items()],
        {"images": [], "annotations": entries(CAPTIONS)},
        [{"id": key, "caption": text} for key, text in CAPTIONS.items()],
        "\ufeff" + json.dumps(entries(CAPTIONS)),
    ],
)
def test_shapes_of_files(data, tmp_path):
    found = load_results(write(tmp_path / "results.json", data))
    assert found == CAPTIONS
    assert {type(key) for key in found} == {int}


@pytest.mark.parametrize(
    "data",
    [
        {str(key): text for key, text in CAPTIONS.items()},
        {str(key): [text] for key, text in CAPTIONS.items()},
        {str(key): [{"caption": text}] for key, text in CAPTIONS.items()},
        [{"path": str(key), "caption": text, "error": None} for key, text in CAPTIONS.items()],
        [{"file_name": str(key), "image": 3, "caption": text} for key, text in CAPTIONS.items()],
        # what captioner writes of a file that it could not read
        [
            *entries({str(k): v for k, v in CAPTIONS.items()}),
            {"path": "5", "caption": None, "error": "broken"},
        ],
    ],
)
def test_shapes_of_files_with_text_for_ids(data, tmp_path):
    found = load_results(write(tmp_path / "results.json", data))
    assert found == {str(key): text for key, text in CAPTIONS.items()}


def test_one_json_line(tmp_path):
    assert load_results(write(tmp_path / "r.jsonl", lines(entries({1: "a dog"})))) == {1: "a dog"}


def test_what_is_saved_is_loaded(tmp_path):
    captions = CAPTIONS | {"a/b.jpg": "line\nend \u2028", "\udcff.jpg": "a name that is not UTF-8"}
    save_results(tmp_path / "with space.json", captions)
    assert load_results(tmp_path / "with space.json") == captions
    assert json.loads((tmp_path / "with space.json").read_text())[0] == {"image_id": 1, "caption": "a dog"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "is not JSON"),
        ("hello", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (lines(entries(CAPTIONS)) + "oops", "line 5 is not JSON"),
        ("3", "expected a list .* not a number"),
        ([], "holds no captions"),
        ({}, "holds no captions"),
        (["a dog"], "entry 0: expected an object, not a string"),
        ([{"image_id": 1}], 'entry 0: the key "caption" is missing'),
        ([{"caption": "a dog"}], 'entry 0: the key "image_id" is missing'),
        (
            [{"image_id": True, "caption": "a"}],
            '"image_id" must be an integer or a string, not true or false',
        ),
        ([{"image_id": 1.5, "caption": "a"}], '"image_id" must be an integer or a string, not a number'),
        ([{"image_id": 1, "caption": None}], 'entry 0: "caption" must be a string, not null'),
        ([{"image_id": 1, "caption": ["a", "b"]}], 'entry 0: "caption" must be a string, not a list'),
        (entries({1: "a"}) * 2, "entry 1: image 1 occurs twice"),
        ('{"1": "a", "1": "b"}', "'1' occurs twice"),
    ],
)
def test_files_that_are_wrong(data, message, tmp_path):
    path = write(tmp_path / "results.json", data)
    with pytest.raises(ScoreError, match=message) as caught:
        load_results(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ScoreError, match=r"none.json: cannot be read: No such file"):
        load_results(tmp_path / "none.json")


COCO = {key: f"val2014/COCO_val2014_{key:012}.jpg" for key in (5, 60, 391895)}


@pytest.mark.parametrize(
    ("images", "spelling"),
    [
        ([5, 60, 391895], "{}"),
        ([5, 60, 391895], "{:012}"),
        ([5, 60, 391895], "images/{:012}.jpg"),
        (["5", "60", "391895"], int),
        (["5", "60", "391895"], "{:07}"),
        (COCO, "{}"),
        (COCO, "val2014/COCO_val2014_{:012}.jpg"),
        (COCO, "COCO_val2014_{:012}.jpg"),
        (COCO, "/home/me/my data/val2014/COCO_val2014_{:012}.jpg"),
        (COCO, "C:\\data\\val2014\\COCO_val2014_{:012}.jpg"),
        (COCO, "./val2014/COCO_val2014_{:012}"),
        (COCO, "COCO_val2014_{:012}"),
        ({key: f"{key}" for key in COCO}, "pictures/{}.png"),
        (["a/5.jpg", "a/60.jpg", "a/391895.jpg"], "a/{}.jpg"),
        (["a/5.jpg", "a/60.jpg", "a/391895.jpg"], "{}.jpg"),
        (["5.jpg", "60.jpg", "391895.jpg"], "{}"),
    ],
)
def test_ids_that_are_written_otherwise(images, spelling, annotations):
    known = annotations(images)
    written = [spelling(key) if spelling is int else spelling.format(key) for key in (5, 60, 391895)]
    match = match_results({key: f"caption {key}" for key in reversed(written)}, known)
    assert match.captions == {
        key: f"caption {name}" for key, name in zip(known.references, written, strict=True)
    }
    assert match.missing == match.surplus == ()
    assert sum(match.ways.values()) == (0 if written == [*images] else 3)


def test_ids_that_are_the_same_go_first(annotations):
    known = annotations([7, "7", "x/1.jpg", "1.jpg"])
    captions = {"7": "text", 7: "number", "1.jpg": "short", "x/1.jpg": "long"}
    match = match_results(captions, known)
    assert match.captions == captions
    assert match.ways == {}


def test_missing_and_surplus(annotations):
    known = annotations({1: "val/1.jpg", 2: "val/2.jpg", 3: "val/3.jpg"}, without=[4])
    match = match_results({2: "b", "val/3.jpg": "c", 4: "d", 5: "e", "train/1.jpg": "f"}, known)
    assert match.captions == {2: "b", 3: "c"}
    assert match.missing == (1,)
    assert match.surplus == (4, 5, "train/1.jpg")  # of another folder is another picture
    assert match.ways == {"by file name": 1}


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        ([1], {1: "a", "1": "b"}, r"1, '1' are captions of the same image"),
        ([1], {"1": "a", "01": "b"}, r"'1', '01' are captions of the same image"),
        ({1: "a/1.jpg"}, {"1.jpg": "a", "a/1.jpg": "b"}, "are captions of the same image"),
        ({1: "a/1.jpg", 2: "b/1.jpg"}, {"1.jpg": "a"}, r"'1.jpg' could be any of 2 images \(1, 2\)"),
        ([7, "07"], {"007": "a"}, "'007' could be any of 2 images"),
        ([1, 2], {3: "a", 4: "b"}, r"none of its 2 images .*\(first: 3, 4; there: 1, 2\)"),
    ],
)
def test_whose_captions_cannot_be_told(images, captions, message, annotations):
    with pytest.raises(ScoreError, match=message) as caught:
        match_results(captions, annotations(images), "results.json")
    assert str(caught.value).startswith("results.json: ")
