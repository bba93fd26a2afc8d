"""Data sets in COCO's format over folders and tar files."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from captioner_training.config import SourceConfig
from captioner_training.data import DataError, PictureStore, chunks, load_data_set
from captioner_training.metrics import ScoreError
from shape_data import COMBINATIONS, captions, write_shapes, write_tar


def source(**changes):
    return SourceConfig(**{"annotations": "shapes.json", "images": ["pictures"], **changes})


def edit(folder, change):
    path = folder / "shapes.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_folder_of_pictures(tmp_path):
    data = load_data_set("shapes", source(), write_shapes(tmp_path))
    assert len(data) == 24
    assert [p.id for p in data.pictures] == list(range(100, 124))
    assert data.pictures[0].captions == tuple(captions(*COMBINATIONS[0]))
    assert data.references()[101] == captions(*COMBINATIONS[1])
    first = data.pictures[0]
    assert data.store.read(first.file) == (tmp_path / "pictures" / first.file).read_bytes()


def test_a_tar_gives_the_same_bytes(tmp_path):
    folder = load_data_set("shapes", source(), write_shapes(tmp_path / "folder"))
    tar = load_data_set("shapes", source(images=["pictures.tar"]), write_shapes(tmp_path / "tar", tar=True))
    assert [p.file for p in tar.pictures] == [p.file for p in folder.pictures]
    for picture in tar.pictures:
        assert tar.store.read(picture.file) == folder.store.read(picture.file)
    tar.store.close()
    assert tar.store.read(tar.pictures[0].file)  # opens the file again


def test_folders_and_tars_together(tmp_path):
    write_tar(tmp_path / "a.tar", {"one.jpg": b"1", "sub/two.jpg": b"22"})
    write_tar(tmp_path / "b.tar", {"three.jpg": b"333"})
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "four.jpg").write_bytes(b"4444")
    store = PictureStore([tmp_path / "a.tar", tmp_path / "folder", tmp_path / "b.tar"])
    contents = {"one.jpg": b"1", "sub/two.jpg": b"22", "three.jpg": b"333", "sub/four.jpg": b"4444"}
    for name, content in contents.items():
        assert name in store
        assert store.read(name) == content
    assert "two.jpg" not in store
    with pytest.raises(DataError, match=r"two\.jpg"):
        store.read("two.jpg")


def test_many_threads_may_read_one_store(tmp_path):
    chance = random.Random(0)
    contents = {f"{i}.bin": chance.randbytes(chance.randint(0, 20_000)) for i in range(60)}
    write_tar(tmp_path / "a.tar", dict(list(contents.items())[:30]))
    write_tar(tmp_path / "b.tar", dict(list(contents.items())[30:]))
    store = PictureStore([tmp_path / "a.tar", tmp_path / "b.tar"])
    names = [chance.choice(list(contents)) for _ in range(3000)]
    with ThreadPoolExecutor(16) as pool:
        for name, data in zip(names, pool.map(store.read, names), strict=True):
            assert data == contents[name]


def test_pictures_are_in_id_order_whatever_the_file_says(tmp_path):
    write_shapes(tmp_path)
    edit(tmp_path, lambda data: data["images"].reverse())
    data = load_data_set("shapes", source(), tmp_path)
    assert [p.id for p in data.pictures] == list(range(100, 124))


def test_ids_may_be_numbers_and_words(tmp_path):
    write_shapes(tmp_path)

    def rename(data):
        data["images"][3]["id"] = "three"
        for annotation in data["annotations"]:
            if annotation["image_id"] == 103:
                annotation["image_id"] = "three"

    edit(tmp_path, rename)
    data = load_data_set("shapes", source(), tmp_path)
    assert [p.id for p in data.pictures][-2:] == [123, "three"]


@pytest.mark.parametrize("count", [1, 7, 23])
def test_the_highest_ids_are_kept_apart(tmp_path, count):
    write_shapes(tmp_path)
    rest = load_data_set("training", source(skip_highest=count), tmp_path)
    highest = load_data_set("validation", source(only_highest=count), tmp_path)
    training, validation = ({p.id for p in data.pictures} for data in (rest, highest))
    assert len(validation) == count
    assert not training & validation
    assert training | validation == set(range(100, 124))
    assert min(validation) > max(training)


def test_sets_can_be_left_out(tmp_path):
    write_shapes(tmp_path)
    data = load_data_set("shapes", source(exclude_sets=["circle", "nothing"]), tmp_path)
    assert len(data) == 16
    assert not any("circle" in p.file for p in data.pictures)


def test_leaving_out_a_set_does_not_move_the_border_to_the_validation_pictures(tmp_path):
    write_shapes(tmp_path)
    training = load_data_set("a", source(skip_highest=6, exclude_sets=["cross"]), tmp_path)
    validation = load_data_set("b", source(only_highest=6), tmp_path)
    assert max(p.id for p in training.pictures) < min(p.id for p in validation.pictures)


def test_pictures_without_captions_are_left_out(tmp_path):
    write_shapes(tmp_path)

    def blank(data):
        for annotation in data["annotations"]:
            if annotation["image_id"] == 100:
                annotation["caption"] = "  "
        data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 101]

    edit(tmp_path, blank)
    data = load_data_set("shapes", source(), tmp_path)
    assert [p.id for p in data.pictures] == list(range(102, 124))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data["images"][4].pop("file_name"), "image 104 has no file_name"),
        (lambda data: data["images"][4].update(file_name=5), "image 104 has no file_name"),
        (lambda data: data["images"][4].update(file_name="x.png"), "x.png is not among pictures"),
    ],
)
def test_a_picture_that_is_not_there_is_named(tmp_path, change, told):
    write_shapes(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(DataError, match=r"shapes\.json: " + told):
        load_data_set("shapes", source(), tmp_path)


def test_nothing_left_is_an_error(tmp_path):
    write_shapes(tmp_path)
    for nothing in (source(skip_highest=24), source(exclude_sets=["circle", "square", "cross"])):
        with pytest.raises(DataError, match="no picture with a caption is left for data set 'shapes'"):
            load_data_set("shapes", nothing, tmp_path)


def test_a_missing_folder_or_annotation_file_is_named(tmp_path):
    write_shapes(tmp_path)
    with pytest.raises(DataError, match=r"absent\.tar: no such folder or tar file"):
        load_data_set("shapes", source(images=["absent.tar"]), tmp_path)
    with pytest.raises(ScoreError, match=r"absent\.json"):
        load_data_set("shapes", source(annotations="absent.json"), tmp_path)


def test_what_is_no_tar_is_named(tmp_path):
    (tmp_path / "text.tar").write_text("not a tar" * 100)
    write_tar(tmp_path / "packed.tar.gz", {"one.jpg": b"1" * 1000}, "w:gz")
    for name in ("text.tar", "packed.tar.gz"):
        with pytest.raises(DataError, match=rf"{name}: neither a folder nor an uncompressed tar"):
            PictureStore([tmp_path / name])


def note(folder, **info):
    """Write down what captioner prepare does."""
    edit(folder, lambda data: data.update(info=info))


def test_pictures_where_the_annotations_say(tmp_path):
    write_shapes(tmp_path / "data")
    (tmp_path / "data" / "pictures").rename(tmp_path / "elsewhere")
    for place in ("../elsewhere", str(tmp_path / "elsewhere")):
        note(tmp_path / "data", images=[place])
        data = load_data_set("shapes", source(images=[]), tmp_path / "data")
        assert len(data) == 24
        assert data.store.read(data.pictures[0].file)
    # what the config says goes first
    with pytest.raises(DataError, match="pictures: no such folder or tar file"):
        load_data_set("shapes", source(), tmp_path / "data")


@pytest.mark.parametrize("images", [None, [], "elsewhere", [3]])
def test_annotations_that_do_not_say_where_the_pictures_are(tmp_path, images):
    write_shapes(tmp_path)
    note(tmp_path, images=images)
    with pytest.raises(
        DataError, match=r"shapes\.json: it does not say where its pictures are.*captioner prepare"
    ):
        load_data_set("shapes", source(images=[]), tmp_path)


def test_a_partial_data_set_is_one(tmp_path):
    write_shapes(tmp_path)
    assert not load_data_set("shapes", source(), tmp_path).partial
    note(tmp_path, partial=True, missing_pictures=3)
    data = load_data_set("shapes", source(), tmp_path)
    assert data.partial
    assert data.info["missing_pictures"] == 3
    note(tmp_path, partial=False)
    assert not load_data_set("shapes", source(), tmp_path).partial


def test_a_file_that_stands_there_twice(tmp_path):
    """Half of the ids might be validation: the same picture would be on both sides."""
    write_shapes(tmp_path)
    edit(tmp_path, lambda data: data["images"][23].update(file_name=data["images"][0]["file_name"]))
    for config in (source(), source(skip_highest=4), source(only_highest=4)):
        with pytest.raises(
            DataError, match=r"red-circle-white\.png stands there twice, with the ids 100 and 123"
        ):
            load_data_set("shapes", config, tmp_path)


def test_captions_without_a_picture(tmp_path):
    write_shapes(tmp_path)
    edit(tmp_path, lambda data: data["annotations"].append({"image_id": 7, "caption": "x"}))
    with pytest.raises(ScoreError, match=r"\"image_id\" 7 is not the \"id\" of any of the images"):
        load_data_set("shapes", source(), tmp_path)


def test_where_several_hold_a_name(tmp_path):
    for number, name in enumerate(("a.tar", "b.tar")):
        write_tar(tmp_path / name, {"./one.jpg": b"%d" % number * 9, f"{number}.jpg": b"x"})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.jpg").write_bytes(b"folder")
    paths = [tmp_path / "folder", tmp_path / "a.tar", tmp_path / "b.tar"]
    store = PictureStore(paths)
    assert store.places("one.jpg") == [paths[1], paths[2], paths[0]]
    assert store.read("one.jpg") == b"0" * 9
    assert [store.read("one.jpg", place=p) for p in paths] == [b"folder", b"0" * 9, b"1" * 9]
    assert store.read("one.jpg", 3) == b"000"
    assert store.read("one.jpg", 3, place=paths[0]) == b"fol"
    assert (store.size("one.jpg"), store.size("1.jpg")) == (9, 1)
    assert sorted(store.names()) == ["0.jpg", "1.jpg", "one.jpg", "one.jpg"]
    assert store.places("absent") == []
    assert "zero\0byte" not in store
    with pytest.raises(DataError, match="absent: no such picture"):
        store.size("absent")


def test_chunks_cover_everything_once():
    assert [list(c) for c in chunks(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([], 3)) == []
