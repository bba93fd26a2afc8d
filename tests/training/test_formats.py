"""Readers of caption formats: what each file says, line by line."""

import json
from pathlib import Path

import pytest
from captioner_training.data import DataError
from captioner_training.formats import Source, read, split_of


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_json(path: Path, data: object) -> Path:
    return write(path, json.dumps(data))


def told(source: Source) -> dict[str, tuple[list[str], str | None]]:
    """Return name -> captions and split."""
    return {entry.names[0]: (entry.captions, entry.split) for entry in source.entries}


COCO = {
    "info": {"year": 2017},
    "images": [
        {"id": 9, "file_name": "000000000009.jpg", "license": 3},
        {"id": 25, "file_name": "000000000025.jpg"},
        {"id": 30, "file_name": "000000000030.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 25, "caption": "A giraffe."},
        {"id": 2, "image_id": 9, "caption": "Food."},
        {"id": 3, "image_id": 25, "caption": "Two giraffes.\n"},
    ],
}


def test_coco(tmp_path):
    source = read(write_json(tmp_path / "captions_val2017.json", COCO))
    assert (source.format, source.media, source.roots) == ("coco", "image", [tmp_path])
    assert told(source) == {
        "000000000009.jpg": (["Food."], None),
        "000000000025.jpg": (["A giraffe.", "Two giraffes.\n"], None),
        "000000000030.jpg": ([], None),
    }
    assert [entry.id for entry in source.entries] == [9, 25, 30]


def test_coco_says_nothing_on_standard_output(tmp_path, capsys):
    read(write_json(tmp_path / "a.json", COCO))
    assert capsys.readouterr().out == ""


def test_coco_with_text_ids_without_annotation_ids_and_with_splits(tmp_path):
    data = {
        "images": [{"id": "x/1", "file_name": "1.jpg", "split": "val2014", "set": "mine"}],
        "annotations": [{"image_id": "x/1", "caption": "one"}, {"image_id": "gone", "caption": "none"}],
    }
    source = read(write_json(tmp_path / "a.json", data))
    (entry,) = source.entries
    assert (entry.id, entry.captions, entry.split, entry.set) == ("x/1", ["one"], "val", "mine")
    assert source.notes == ["1 captions left out: their 1 images are not listed (the first is gone)"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["images"].append({"id": 9, "file_name": "x.jpg"}), "two images have the id 9"),
        (lambda d: d["images"][1].pop("file_name"), "image 25 has no file_name"),
        (lambda d: d["images"][1].update(id=[1]), r"images\[1\] has no \"id\""),
        (lambda d: d["annotations"][0].pop("image_id"), r"annotations\[0\] has no \"image_id\""),
        (lambda d: d["annotations"][2].pop("caption"), r"annotations\[2\] has no \"caption\".*instances"),
        (lambda d: d.pop("annotations"), "no captions.*test pictures"),
        (lambda d: d["images"].clear(), "no pictures with captions"),
    ],
)
def test_coco_that_is_not_right(tmp_path, change, reason):
    data = json.loads(json.dumps(COCO))
    change(data)
    with pytest.raises(DataError, match=rf"a\.json: .*{reason}"):
        read(write_json(tmp_path / "a.json", data))


def test_karpathy(tmp_path):
    data = {
        "dataset": "coco",
        "images": [
            {
                "filepath": "val2014",
                "filename": "COCO_val2014_000000391895.jpg",
                "cocoid": 391895,
                "imgid": 0,
                "split": "test",
                "sentences": [{"raw": "A man.", "tokens": ["a", "man"]}, {"tokens": ["two", "men"]}],
            },
            {"filename": "a.jpg", "imgid": 1, "split": "restval", "sentences": [{"raw": "x"}]},
            {"filename": "b.jpg", "imgid": 2, "split": "val", "sentences": [{"raw": "y"}]},
        ],
    }
    source = read(write_json(tmp_path / "dataset_coco.json", data))
    assert source.format == "karpathy"
    first, second, third = source.entries
    assert first.names == (
        "val2014/COCO_val2014_000000391895.jpg",
        "COCO_val2014_000000391895.jpg",
        "000000391895.jpg",
    )
    assert (first.id, first.split, first.captions) == (391895, "test", ["A man.", "two men"])
    assert (second.id, second.split) == (1, "train")
    assert third.split == "val"


def test_flickr_token_file(tmp_path):
    text = "a.jpg#0\tA child .\r\na.jpg#1\tA girl .\n\nb.jpg#0\t\n225_58.jpg.1#0\tA dog # 3 .\n"
    source = read(write(tmp_path / "Flickr8k.token.txt", text))
    assert source.format == "flickr"
    assert told(source) == {
        "a.jpg": (["A child .", "A girl ."], None),
        "b.jpg": ([""], None),
        "225_58.jpg": (["A dog # 3 ."], None),
    }
    with pytest.raises(DataError, match="line 2 is not of the form"):
        read(write(tmp_path / "b.txt", "a.jpg#0\tA child .\na.jpg A girl .\n"))


def test_lists_of_names(tmp_path):
    source = read(write(tmp_path / "Flickr_8k.devImages.txt", "a.jpg\r\nb.jpg\r\n"))
    assert (source.format, source.listed) == ("list", ("a.jpg", "b.jpg"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Flickr_8k.trainImages.txt", "train"),
        ("Flickr_8k.devImages.txt", "val"),
        ("captions_val2017.json", "val"),
        ("TEST.csv", "test"),
        ("my_validation-set.txt", "val"),
        ("trains_and_planes.csv", None),
        ("train_val_videodatainfo.json", None),
        ("captions.json", None),
    ],
)
def test_names_that_tell_a_split(name, split):
    assert split_of(f"test/{name}") == split


# Tables.

TABLES = {
    "kaggle": 'image,caption\na.jpg,A dog .\na.jpg,"A dog, running ."\nb.jpg,A cat\n',
    "no header": 'a.jpg,A dog .,"A dog, running ."\nb.jpg,A cat\n',
    "several columns": 'Caption 1;Caption-2;FILE NAME\nA dog .;"A dog, running .";a.jpg\nA cat;;b.jpg\n',
    "bars": "image_name| comment_number| comment\n"
    "a.jpg| 0| A dog .\na.jpg| 1| A dog, running .\nb.jpg| 0| A cat\n",
    "tabs": "path\ttext\na.jpg\tA dog .\na.jpg\tA dog, running .\nb.jpg\tA cat\n",
    "a list": 'filename,raw,sentids\na.jpg,"[""A dog ."", ""A dog, running .""]",1\nb.jpg,"[\'A cat\']",2\n',
    "JSON lines": '{"file_name": "a.jpg", "text": ["A dog .", "A dog, running ."]}\n\n'
    '{"file_name": "b.jpg", "text": "A cat"}\n',
    "JSON records": json.dumps(
        [
            {"caption": "A dog .", "image": {"path": "a.jpg", "bytes": None}},
            {"image": {"path": "a.jpg"}, "caption": "A dog, running ."},
            {"image": "b.jpg", "caption": [{"raw": "A cat"}]},
        ]
    ),
    "JSON object": json.dumps({"a.jpg": ["A dog .", "A dog, running ."], "b.jpg": "A cat"}),
    "JSON lines without an end": '{"path": "a.jpg", "captions": ["A dog .", "A dog, running ."]}\n'
    '{"path": "b.jpg", "captions": ["A cat"]}',
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "crlf", "utf-16"])
def test_tables(tmp_path, kind, encoding):
    text = TABLES[kind]
    if encoding == "crlf":
        data = text.replace("\n", "\r\n").encode()
    else:
        data = text.encode(encoding)
    source = read(write(tmp_path / "some file", data))
    assert source.format == "table"
    captions = {name: [c.strip() for c in cs] for name, (cs, _) in told(source).items()}
    assert captions == {"a.jpg": ["A dog .", "A dog, running ."], "b.jpg": ["A cat"]}


def test_a_table_of_one_json_line(tmp_path):
    assert told(read(write(tmp_path / "a.jsonl", '{"path": "a.jpg", "caption": "x"}'))) == {
        "a.jpg": (["x"], None)
    }


def test_quotation_marks(tmp_path):
    comma = read(
        write(tmp_path / "a.csv", 'path,caption\na.jpg,"He says ""hi"", twice"\nb.jpg,"two\nlines"\n')
    )
    assert told(comma) == {"a.jpg": (['He says "hi", twice'], None), "b.jpg": (["two\nlines"], None)}
    bare = read(write(tmp_path / "a.tsv", 'path\tcaption\na.jpg\t"Hi" says he\nb.jpg\ta 5" nail\n'))
    assert told(bare) == {"a.jpg": (['"Hi" says he'], None), "b.jpg": (['a 5" nail'], None)}
    quoted = read(write(tmp_path / "b.tsv", 'path\tcaption\r\na.jpg\t"with\ttab"\r\nb.jpg\t"plain"\r\n'))
    assert told(quoted) == {"a.jpg": (["with\ttab"], None), "b.jpg": (["plain"], None)}


def test_unquoted_commas_in_the_last_column_are_the_captions(tmp_path):
    source = read(write(tmp_path / "a.csv", "path,caption\na.jpg,A red, round thing\n"))
    assert told(source) == {"a.jpg": (["A red, round thing"], None)}
    assert source.notes == ["1 captions with separators outside quotation marks were put together"]


def test_the_slip_in_flickr30ks_own_table(tmp_path):
    text = "image_name| comment_number| comment\na.jpg| 3| A dog .\na.jpg| 4   A dog runs .\n"
    assert told(read(write(tmp_path / "results.csv", text))) == {"a.jpg": (["A dog .", "A dog runs ."], None)}


def test_splits_in_a_column(tmp_path):
    source = read(
        write(tmp_path / "a.csv", "path,caption,split\na.jpg,x,Train\nb.jpg,y,dev\nc.jpg,z,testing\n")
    )
    assert [entry.split for entry in source.entries] == ["train", "val", "test"]


def test_empty_cells_are_kept_to_be_reported(tmp_path):
    source = read(write(tmp_path / "a.csv", "path,caption\na.jpg,\nb.jpg,  \nc.jpg\n\n,lost\n"))
    assert {name: [c.strip() for c in cs] for name, (cs, _) in told(source).items()} == {
        "a.jpg": [""],
        "b.jpg": [""],
        "c.jpg": [""],
    }
    assert source.notes == ["1 rows left out: they name no picture"]


def test_windows_paths_and_clips_with_times(tmp_path):
    source = read(
        write(tmp_path / "a.csv", "file,start,end,caption\nc\\v.mp4,1.5,0:01:02,x\nc\\v.mp4,70,80,y\n")
    )
    assert source.media == "video"
    assert [(e.names, e.start, e.end, e.clip) for e in source.entries] == [
        (("c/v.mp4",), 1.5, 62.0, False),
        (("c/v.mp4",), 70.0, 80.0, False),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "the file is empty"),
        (b"path,caption\n", "no pictures with captions"),
        (b"foo,bar\n1,2\n", "no column of captions among foo, bar; name it caption"),
        (b"foo,caption\n1,2\n", "no column of pictures among foo, caption; name it path"),
        (b"prose and more\nprose\n", "the first line is 'prose and more'"),
        (b"path,caption\na.jpg,x\nb.jpg,caf\xe9\n", r"line 3 is not UTF-8 \(byte 0xe9\).*iconv"),
        (b'path,caption\na.jpg,x\n"b.jpg,y\nc.jpg,z\n', "line 3: .*quotation mark"),
        (b"path,caption,x\na.jpg,b,c,d\n", "line 2 has 4 cells, but there are 3 columns"),
        (b"path,caption,split\na.jpg,x,train\nb.jpg,y,\n", "line 3 has no split, while others have one"),
        (b"path,caption,split\na.jpg,x,later\n", "line 2: the split is 'later'"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "not text"),
        (b'{"images": [', "not JSON: .* in line 1, column 13"),
        (b'{"path": "a.jpg", "text": "x"}\n{"path": "b.jpg"\n', "line 2 is not JSON"),
        (b'[{"path": "a.jpg", "text": "x"}, 3]', "entry 2 is not an object"),
        (b'[{"path": "a.jpg", "text": "x", "split": "?"}]', r"entry 1: the split is '\?'"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "the list is empty"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read(write(tmp_path / "file", text))
    assert str(caught.value).startswith(str(tmp_path / "file"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="absent: no such file or folder"):
        read(tmp_path / "absent")


def test_a_format_can_be_forced(tmp_path):
    path = write(tmp_path / "a.txt", "a.jpg\nb.jpg\n")
    with pytest.raises(DataError, match=r"line 1 is not of the form name\.jpg#0"):
        read(path, "flickr")
    with pytest.raises(DataError, match="the format coco is JSON"):
        read(path, "coco")
    with pytest.raises(DataError, match="the format sidecars is a folder"):
        read(path, "sidecars")
    with pytest.raises(DataError, match="a folder, but the format coco is a file"):
        read(tmp_path, "coco")
    with pytest.raises(DataError, match="the format flickr is plain text"):
        read(write_json(tmp_path / "a.json", COCO), "flickr")
    with pytest.raises(DataError, match="no such format; there are coco"):
        read(path, "voc")


# Folders.


def test_sidecars(tmp_path):
    for name in ("one.jpg", "deep/two.PNG", "three.jpg", ".hidden.jpg"):
        write(tmp_path / name, b"x")
    write(tmp_path / "one.txt", "A dog.\n\n A cat.\n")
    write(tmp_path / "deep/two.txt", "Two\n")
    write(tmp_path / "gone.txt", "Its picture is not there")
    write(tmp_path / "README.txt", "About")
    source = read(tmp_path)
    assert (source.format, source.roots) == ("sidecars", [tmp_path])
    assert told(source) == {
        "deep/two.PNG": (["Two"], None),
        "gone": (["Its picture is not there"], None),
        "one.jpg": (["A dog.", " A cat."], None),
        "three.jpg": ([], None),
    }
    assert source.notes == ["no captions, by their names: README.txt"]


def test_sidecars_in_folders_that_are_splits(tmp_path):
    for split in ("train", "valid", "test"):
        write(tmp_path / split / "a.jpg", b"x")
        write(tmp_path / split / "a.txt", split)
    (tmp_path / "train" / "circle").symlink_to(tmp_path)  # is not followed for ever
    assert told(read(tmp_path)) == {
        "train/a.jpg": (["train"], "train"),
        "valid/a.jpg": (["valid"], "val"),
        "test/a.jpg": (["test"], "test"),
    }


def test_a_folder_without_sidecars_names_the_table_in_it(tmp_path):
    write(tmp_path / "a.jpg", b"x")
    write(tmp_path / "metadata.csv", "file_name,text\na.jpg,x\n")
    with pytest.raises(DataError, match=r"is it metadata\.csv in it"):
        read(tmp_path)


# Videos.


def test_msvd_list(tmp_path):
    text = (
        "# comment\n-4wsuPCjDBc_5_15 a squirrel is eating\n-4wsuPCjDBc_5_15 a chipmunk\n"
        "_UqrOmo-dU0_105_110 x\n"
    )
    source = read(write(tmp_path / "AllVideoDescriptions.txt", text))
    assert (source.format, source.media) == ("msvd", "video")
    first, second = source.entries
    assert first.names == ("-4wsuPCjDBc_5_15", "-4wsuPCjDBc")
    assert (first.start, first.end, first.clip) == (5.0, 15.0, True)
    assert first.captions == ["a squirrel is eating", "a chipmunk"]
    assert second.names[0] == "_UqrOmo-dU0_105_110"


def test_msvd_table(tmp_path):
    text = (
        "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\r\n"
        "mv89psg6zh4,33,46,588702,unverified,55,English,A bird is bathing.\r\n"
        "mv89psg6zh4,33,46,588702,clean,30,Slovene,Ptica se umiva.\r\n"
        'mv89psg6zh4,33,46,362812,clean,45,English,"A bird, in a sink."\r\n'
        ",,,,,,English,lost\r\n"
    )
    source = read(write(tmp_path / "video_corpus.csv", text))
    assert (source.format, source.media) == ("msvd", "video")
    assert told(source) == {"mv89psg6zh4_33_46": (["A bird is bathing.", "A bird, in a sink."], None)}
    assert source.notes == [
        "1 descriptions left out: they are not in English",
        "1 rows left out: they name no clip",
    ]


def test_msrvtt(tmp_path):
    data = {
        "info": {},
        "videos": [
            {"video_id": "video0", "split": "train", "start time": 137.72, "end time": 149.44, "id": 0},
            {"video_id": "video6513", "split": "validate", "id": 6513},
            {"video_id": "video7009"},
            {"video_id": "video7010"},
        ],
        "sentences": [
            {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
            {"caption": "a band", "video_id": "video6513", "sen_id": 1},
            {"caption": "stray", "video_id": "video1", "sen_id": 2},
        ],
    }
    source = read(write_json(tmp_path / "MSRVTT_data.json", data))
    assert (source.format, source.media) == ("msrvtt", "video")
    assert told(source) == {
        "video0": (["a car is shown"], "train"),
        "video6513": (["a band"], "val"),
        "video7009": ([], "val"),
        "video7010": ([], "test"),
    }
    assert (source.entries[0].start, source.entries[0].end, source.entries[0].clip) == (137.72, 149.44, True)
    assert source.notes == ["1 captions left out: their videos are not listed"]
    data["videos"].append({"video_id": "video0"})
    with pytest.raises(DataError, match=r"videos\[4\]: video0 stands there twice"):
        read(write_json(tmp_path / "b.json", data))
