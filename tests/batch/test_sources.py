"""What is captioned: files, folders, patterns, lists, tables, archives, addresses."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import queue
import re
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from captioner.batch import archives, remote, sources
from captioner.batch.rows import RowError, read_rows
from captioner.batch.sources import (
    Held,
    Member,
    Missing,
    Remote,
    Source,
    TableError,
    checksum,
    find_sources,
    local,
    read_table,
    table_columns,
)
from captioner.images import open_image
from captioner.inputs import ImageError

HOSTILE = [
    "two\nlines.jpg",
    "a \"b\" 'c'.jpg",
    "<img src=x onerror=alert(1)>.jpg",
    "=1+1;cmd|.jpg",
    "[x]*?.jpg",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*paths: str) -> None:
    """Make files that hold their own names."""
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(os.fsencode(path))


def find(*inputs: str | os.PathLike[str], **options: object) -> list[Source | Missing]:
    return list(find_sources(inputs, **options))


def paths(*inputs: str | os.PathLike[str], **options: object) -> list[str]:
    """Return what is found, all of which must be there and say so."""
    found = find(*inputs, **options)
    assert [one for one in found if isinstance(one, Missing)] == []
    return [one.path for one in found]


def reason(*inputs: str | os.PathLike[str], **options: object) -> str:
    """Return the one line about inputs that stand for nothing else."""
    (found,) = find(*inputs, **options)
    assert isinstance(found, Missing)
    assert found.reason.isprintable()
    assert len(found.reason) < 500
    return found.reason


# Sources


def test_a_local_file(here: Path) -> None:
    touch("a.jpg")
    os.utime("a.jpg", ns=(1, 1234567890123456789))
    (found,) = find("a.jpg")
    assert found == Source("a.jpg", "a.jpg", 5, 1234567890123456789)
    assert pickle.loads(pickle.dumps(found)) == found
    assert found.read() == b"a.jpg"
    assert found.open() == "a.jpg"
    assert checksum(found) == hashlib.sha256(b"a.jpg").hexdigest()
    with local(found) as path:
        assert path == "a.jpg"
    assert Path("a.jpg").exists()
    os.unlink("a.jpg")
    with pytest.raises(ImageError, match=r"^a\.jpg: there is no such file; check the path$"):
        found.read()
    with pytest.raises(AttributeError):
        found.path = "b"  # type: ignore[misc]


def test_checksums_and_copies_of_large_files_take_no_memory(here: Path) -> None:
    with open("big.mp4", "wb") as stream:
        stream.truncate(40 * 2**20)
    tarfile.open("big.tar", "w").close()
    with tarfile.open("big.tar", "w") as archive:
        archive.add("big.mp4")
    on_disk, inside = find("big.mp4", "big.tar")
    tracemalloc.start()
    try:
        assert checksum(on_disk) == checksum(inside) == hashlib.sha256(bytes(40 * 2**20)).hexdigest()
        with local(inside) as path:
            assert os.path.getsize(path) == 40 * 2**20
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20  # the expected value took 40 of these
    finally:
        tracemalloc.stop()


def test_a_temporary_copy_keeps_the_suffix_and_goes_away(here: Path) -> None:
    source = Held("x/clip.MP4", None, 3, 0, b"abc")
    with local(source) as path:
        assert path.endswith(".mp4")
        assert Path(path).read_bytes() == b"abc"
    assert not os.path.exists(path)
    with pytest.raises(KeyError), local(source) as path:
        raise KeyError
    assert not os.path.exists(path)
    with local(Held("a.$(rm)/../x.m\n4", None, 1, 0, b"a")) as path:
        assert os.path.splitext(path)[1] == ""


def test_no_room_for_a_copy(here: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no device that is always full")
    source = Held("clip.mp4", None, 3, 0, b"abc" * 9999)
    full = functools.partial(open, "/dev/full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "open", lambda handle, mode: (os.close(handle), full(mode))[1], raising=False)
        with (
            pytest.raises(ImageError, match=r"^clip\.mp4: no temporary copy .*No space left"),
            local(source),
        ):
            pass


# Files, folders and patterns


def test_folders(here: Path) -> None:
    touch("p/b.JPG", "p/a.png", "p/.c.jpg", "p/notes.txt", "p/clip.mp4", "p/x.ts", "p/q/d.webp", "p/.h/e.jpg")
    assert (
        paths("p") == paths("p/") == paths("./p") == paths(Path("p")) == ["p/a.png", "p/b.JPG", "p/clip.mp4"]
    )
    assert paths("p", recursive=True) == ["p/a.png", "p/b.JPG", "p/clip.mp4", "p/q/d.webp"]
    assert paths(here / "p") == [str(here / name) for name in ("p/a.png", "p/b.JPG", "p/clip.mp4")]
    assert list(find_sources("p")) == find("p")
    assert paths("p", suffixes={".txt"}) == ["p/notes.txt"]
    os.chdir("p")
    assert paths(".", recursive=True) == ["a.png", "b.JPG", "clip.mp4", "q/d.webp"]


def test_sorted_by_path_whatever_is_a_folder(here: Path) -> None:
    touch("p/a.jpg", "p/a/z.jpg", "p/a-b/z.jpg", "p/a0.jpg", "p/b/c/d.jpg", "p/b/c.jpg", "p/a.png/x.jpg")
    found = paths("p", recursive=True)
    assert len(found) == 7
    assert found == sorted(found)


def test_each_path_once(here: Path) -> None:
    touch("p/a.jpg", "p/b.jpg")
    found = paths("p/b.jpg", "p", "./p//b.jpg", here / "p", "p/*.jpg", "{p,p}", f"file://{here}/p/a.jpg")
    assert found == ["p/b.jpg", "p/a.jpg"]
    assert paths("{p,p}") == ["p/a.jpg", "p/b.jpg"]
    assert len(find("none.jpg", "none.jpg")) == 1


def test_nothing_there(here: Path) -> None:
    touch("docs/read.me", "deep/x/a.jpg")
    assert reason("gone.jpg") == "gone.jpg: there is no such file; check the path"
    assert "'': " in reason("")
    assert reason("docs").startswith("docs: no pictures or videos in this folder;")
    assert "use --recursive" in reason("deep")
    assert reason("no*.jpg") == "no*.jpg: no picture or video matches this pattern; check it"
    assert "not a valid path" in reason("a\0b.jpg")
    assert "a device" in reason("/dev/null")
    found = find("gone.jpg", "deep/x", "docs")
    assert [type(one) for one in found] == [Missing, Source, Missing]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(name: str, here: Path) -> None:
    touch(f"p/{name}")
    path = f"p/{name}"
    assert paths("p") == paths(path) == paths("p/*.jpg") == paths("**/*.jpg") == [path]
    assert paths("-", stdin=io.BytesIO(path.encode() + b"\0")) == [path]
    with open("t.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["path"], [path]])
    Path("t.jsonl").write_text(json.dumps({"path": path}) + "\n")
    with tarfile.open("t.tar", "w") as archive:
        archive.add(path)
    assert paths("t.csv") == paths("t.jsonl") == [path]
    (member,) = find("t.tar")
    assert member.path == f"t.tar/{path}"
    assert member.read() == path.encode()
    os.unlink(path)
    assert reason(path)
    assert reason("t.csv")


def test_names_that_are_not_utf8(here: Path) -> None:
    name = os.fsdecode(b"p/caf\xe9.jpg")
    try:
        touch(name)
    except OSError:
        pytest.skip("file names are UTF-8 here")
    assert paths("p") == paths(name) == paths("p/*.jpg") == [name]
    assert paths("-", stdin=io.BytesIO(b"p/caf\xe9.jpg\n")) == [name]
    assert paths("-", stdin=io.BytesIO(b"p/caf\xe9.jpg\0")) == [name]
    (found,) = find("p")
    assert pickle.loads(pickle.dumps(found)).read() == b"p/caf\xe9.jpg"
    with tarfile.open("t.tar", "w") as archive:
        archive.add(name)
    (member,) = find("t.tar")
    assert member.path == "t.tar/" + name
    assert member.read() == b"p/caf\xe9.jpg"
    # as captioner writes it
    Path("t.jsonl").write_text(json.dumps({"path": name}) + "\n")
    Path("t.csv").write_text("path\np/caf\\udce9.jpg\n")
    assert paths("t.jsonl") == paths("t.csv") == [name]
    os.unlink(name)
    assert reason(name).startswith("p/caf\\udce9.jpg: there is no such file")


def test_links(here: Path) -> None:
    touch("p/a.jpg", "other/b.jpg")
    os.symlink("../other", "p/link")
    os.symlink("..", "p/up")
    os.symlink("self", "p/self")
    os.symlink("gone.jpg", "p/dangling.jpg")
    os.symlink("loop.jpg", "p/loop.jpg")
    found = find("p", recursive=True)
    assert [one.path for one in found if isinstance(one, Source)] == ["p/a.jpg", "p/link/b.jpg"]
    missing = {one.path: one.reason for one in found if isinstance(one, Missing)}
    assert missing.keys() == {"p/dangling.jpg", "p/loop.jpg"}
    assert "no such file" in missing["p/dangling.jpg"]
    assert "symbolic links" in missing["p/loop.jpg"]


def test_patterns_do_not_go_round_in_links(here: Path) -> None:
    touch("p/q/a.jpg", "p/q/notes.txt", "p/.h/b.jpg")
    for i in range(12):
        os.symlink("..", f"p/q/loop{i}")  # glob would visit 12 ** 40 folders
    assert paths("p/**/*.jpg") == paths("**/a.jpg") == paths("p/**") == paths("**/q/*") == ["p/q/a.jpg"]
    assert paths("**/*.txt") == ["p/q/notes.txt"]


def test_pattern_with_depth(here: Path) -> None:
    touch("a.jpg", "x/b.jpg", "x/y/c.jpg", "x/y/z/d.jpg", "x/y/z/e.txt", "w/y/f.jpg")
    assert paths("**/*.jpg") == ["a.jpg", "w/y/f.jpg", "x/b.jpg", "x/y/c.jpg", "x/y/z/d.jpg"]
    assert paths("x/**/*.jpg") == ["x/b.jpg", "x/y/c.jpg", "x/y/z/d.jpg"]
    assert paths("**/y/*.jpg") == ["w/y/f.jpg", "x/y/c.jpg"]
    assert paths("**/z/**") == ["x/y/z/d.jpg"]
    assert paths("[wx]/**/*.jpg") == ["w/y/f.jpg", "x/b.jpg", "x/y/c.jpg", "x/y/z/d.jpg"]
    assert paths(f"{here}/**/d.*") == [f"{here}/x/y/z/d.jpg"]


def test_folders_that_cannot_be_listed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("p/a.jpg", "p/q/b.jpg", "p/z.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:  # tests may run as root
        if Path(path).name == "q":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find("p", recursive=True)
    assert [one.path for one in found] == ["p/a.jpg", "p/q", "p/z.jpg"]
    assert isinstance(found[1], Missing)
    assert "no permission" in found[1].reason
    assert "Permission denied" in reason("p/q")


def test_pipes(here: Path) -> None:
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(b"content"))
    writer.start()
    (found,) = find("pipe")  # <(...) in a shell
    writer.join()
    assert isinstance(found, Held)
    assert [found.path, found.size, found.read()] == ["pipe", 7, b"content"]
    # nobody writes to one that lies about
    os.rename("pipe", "pipe.jpg")
    os.mkdir("p")
    os.rename("pipe.jpg", "p/pipe.jpg")
    touch("p/a.jpg")
    assert paths("p") == ["p/a.jpg"]
    assert "a pipe" in reason("-", stdin=io.BytesIO(b"p/pipe.jpg\n"))
    os.rename("p/pipe.jpg", "p/pipe.tar")
    assert "a pipe" in reason("p/pipe.tar")


def test_braces(here: Path) -> None:
    touch("s-08.jpg", "s-09.jpg", "s-10.jpg", "{1..2}.jpg", "a.jpg", "b.png", "p/c.jpg")
    assert paths("s-{08..10}.jpg") == ["s-08.jpg", "s-09.jpg", "s-10.jpg"]
    assert paths("s-{10..08}.jpg") == ["s-10.jpg", "s-09.jpg", "s-08.jpg"]
    assert paths("{1..2}.jpg") == ["{1..2}.jpg"]  # there is such a file
    assert [one.path for one in find("{a,b}.{jpg,png}")] == ["a.jpg", "a.png", "b.jpg", "b.png"]
    assert list(sources._braces("{9..11}")) == ["9", "10", "11"]
    assert list(sources._braces("{-1..1}{x,}")) == ["-1x", "-1", "0x", "0", "1x", "1"]
    assert list(sources._braces("{000..001}")) == ["000", "001"]
    for literal in ("{a}", "{1..}", "{", "}{", "{1...3}", "{a..b}"):
        assert list(sources._braces(literal)) == [literal]
    begun = time.monotonic()
    assert len([one for one, _ in zip(find_sources(["{0..999999999}.jpg"]), range(3), strict=False)]) == 3
    assert time.monotonic() - begun < 1


def test_addresses_of_local_files(here: Path) -> None:
    touch("a b.jpg", "p%20q.jpg")
    assert paths(f"file://{here}/a b.jpg") == [f"{here}/a b.jpg"]
    assert paths(f"file://{here}/a%20b.jpg") == [f"{here}/a b.jpg"]
    assert paths(f"file://localhost{here}/a%20b.jpg") == [f"{here}/a b.jpg"]
    assert paths(f"file://{here}/p%20q.jpg") == [f"{here}/p%20q.jpg"]
    assert paths(f"file://{here}") == [f"{here}/a b.jpg", f"{here}/p%20q.jpg"]
    (found,) = find(f"file://{here}/*b.jpg")
    assert found.file == f"{here}/a b.jpg"


def test_found_as_they_are_asked_for(here: Path) -> None:
    touch("a.jpg", "b.jpg")
    taken: list[str] = []

    def given() -> Iterator[str]:
        for name in ("a.jpg", "b.jpg"):
            taken.append(name)
            yield name

    found = find_sources(given())
    assert taken == []
    assert next(found).path == "a.jpg"
    assert taken == ["a.jpg"]


def test_memory_and_time_of_large_folders(here: Path) -> None:
    os.mkdir("p")
    for i in range(8_000):
        open(f"p/{i:06}.jpg", "w").close()
    calls = 0
    stat = os.stat

    def count(*args: object, **options: object) -> os.stat_result:
        nonlocal calls
        calls += 1
        return stat(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", count)
        tracemalloc.start()
        try:
            number = sum(1 for _ in find_sources(["p"], recursive=True))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert number == 8_000
    assert calls < 8_000 + 10  # one for each file
    assert peak < 8_000 * 130  # the names

    def walk() -> int:
        return sum(
            os.stat(os.path.join(where, name)).st_size == 0
            for where, _, names in os.walk("p")
            for name in names
        )

    def seconds(work: object) -> float:
        begun = time.process_time()
        assert work() == 8_000
        return time.process_time() - begun

    ratios = [
        seconds(lambda: sum(1 for _ in find_sources(["p"], recursive=True))) / seconds(walk) for _ in range(5)
    ]
    assert min(ratios) < 2.5, ratios  # measured: 1.3 to 1.6


# Lists


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a.jpg\nb.jpg\n", ["a.jpg", "b.jpg"]),
        (b"a.jpg\nb.jpg", ["a.jpg", "b.jpg"]),
        (b"\xef\xbb\xbfa.jpg\r\n\r\n\nb.jpg\r\n", ["a.jpg", "b.jpg"]),
        (b"a.jpg\0b.jpg\0", ["a.jpg", "b.jpg"]),
        (b"a.jpg\0\0b.jpg", ["a.jpg", "b.jpg"]),
        (b"two\nlines.jpg\0a.jpg\0", ["two\nlines.jpg", "a.jpg"]),
        (b"a.jpg\n./a.jpg\nb.jpg\na.jpg\n", ["a.jpg", "b.jpg"]),
        (b" a.jpg\n", [" a.jpg"]),
        (b"*.jpg\n{a,b}.jpg\n-\n", ["*.jpg", "{a,b}.jpg", "-"]),  # literally
        (b"cr.jpg\r\n", ["cr.jpg\r"]),  # there is such a file
    ],
)
def test_lists(text: bytes, expected: Sequence[str], here: Path) -> None:
    touch("a.jpg", "b.jpg", "two\nlines.jpg", " a.jpg", "*.jpg", "{a,b}.jpg", "-", "cr.jpg\r")
    assert paths("-", stdin=io.BytesIO(text)) == expected


def test_entries_of_lists_that_are_no_files(here: Path) -> None:
    touch("p/a.jpg", "t.csv")
    found = find("-", stdin=io.BytesIO(b"p\ngone.jpg\nt.csv\np/a.jpg\n"))
    assert [one.path for one in found] == ["p", "gone.jpg", "t.csv", "p/a.jpg"]
    assert [isinstance(one, Missing) for one in found] == [True, True, False, False]
    assert "this is a folder" in found[0].reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "the list is empty"),
        (b"\n\n\n", "the list is empty"),
        ("a.jpg\n".encode("utf-16"), "UTF-16"),
        (b"x" * 200_000, "no list of paths"),
        (b"a.jpg\0" + b"x" * 200_000, "no list of paths"),
    ],
)
def test_what_is_no_list(text: bytes, expected: str, here: Path) -> None:
    touch("a.jpg")
    *_, last = find("-", stdin=io.BytesIO(text))
    assert isinstance(last, Missing)
    assert expected in last.reason
    assert last.path == "-"


def test_a_picture_is_no_list(here: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (99, 99)).save(data, "JPEG")
    data.seek(0)
    assert reason("-", stdin=data) == "standard input: this is a picture, not a list of paths; give its path"


@pytest.mark.parametrize("end", [b"\n", b"\0"])
def test_lists_are_read_as_they_come(end: bytes, here: Path) -> None:
    touch("a.jpg", "b.jpg", "c.jpg")
    reader, writer = os.pipe()
    found: queue.Queue[str] = queue.Queue()

    def consume() -> None:
        with open(reader, "rb") as stream:
            for one in find_sources(["-"], stdin=stream):
                found.put(one.path)

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    for part, expected in ((b"a.j", None), (b"pg" + end, "a.jpg"), (b"b.jpg" + end + b"c.", "b.jpg")):
        os.write(writer, part)
        if expected:
            assert found.get(timeout=10) == expected
        else:
            time.sleep(0.05)
    os.write(writer, b"jpg")
    os.close(writer)
    assert found.get(timeout=10) == "c.jpg"
    thread.join(10)


def test_long_lists_take_no_memory(here: Path) -> None:
    touch("a.jpg")
    text = io.BytesIO(b"a.jpg\n" * 80_000)
    tracemalloc.start()
    try:
        assert paths("-", stdin=text) == ["a.jpg"]
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_standard_input(here: Path) -> None:
    touch("a.jpg")
    code = "from captioner.batch.sources import *; print([s.path for s in find_sources(['-'])])"
    run = functools.partial(subprocess.run, [sys.executable, "-c", code], text=True, check=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert run(input="a.jpg\n", capture_output=True, env=env).stdout == "['a.jpg']\n"
    closed = subprocess.run(
        ["/bin/sh", "-c", f'"{sys.executable}" -c "{code}" <&-'], text=True, capture_output=True, env=env
    )
    assert closed.stdout == "['-']\n", closed.stderr


# Tables


def write_table(path: str, rows: list[dict[str, object]]) -> None:
    if path.endswith((".csv", ".tsv")):
        with open(path, "w", newline="", encoding="utf-8-sig") as stream:
            dialect = "excel" if path.endswith(".csv") else "excel-tab"
            writer = csv.DictWriter(stream, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
    elif path.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = "\n\n".join(json.dumps(row) for row in rows)
        Path(path).write_text("\ufeff" + text, encoding="utf-8")


TABLES = ["t.csv", "t.TSV", "t.jsonl", "t.ndjson", "t.parquet"]


@pytest.mark.parametrize("name", TABLES)
def test_read_table(name: str, here: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "1", "path": "a.jpg", "caption": 'two\nlines, "quoted"\t; <b>'},
        {"id": "2", "path": "café.jpg", "caption": "x" * 300_000},  # beyond csv's 128 KB
        {"id": "3", "path": "", "caption": "=1+1"},
    ]
    lower = name.lower()
    write_table(lower, rows)
    os.rename(lower, name)
    assert list(read_table(name)) == rows
    assert list(read_table(Path(name), ["caption", "id"])) == [
        {k: r[k] for k in ("caption", "id")} for r in rows
    ]
    assert table_columns(name) == ["id", "path", "caption"]
    if "json" not in lower:
        with pytest.raises(TableError, match=r"^t\.\w+: no column x; there are id, path, caption$"):
            list(read_table(name, ["x"]))
    else:
        assert next(read_table(name, ["x"])) == {"x": None}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_paths(name: str, here: Path) -> None:
    touch("data/a.jpg", "data/p/b.jpg", "c.jpg", "data/d[1].jpg")
    rows = [
        {"id": str(i), "File_Name": path, "other": f"x{i}"}
        for i, path in enumerate(
            ["a.jpg", "p/b.jpg", "c.jpg", f"{here}/c.jpg", "gone.jpg", "d[1].jpg", "a.jpg", ""]
        )
    ]
    write_table("data/" + name.lower(), rows)
    if name != name.lower():
        os.rename("data/" + name.lower(), "data/" + name)
    found = find(f"data/{name}")
    expected = ["data/a.jpg", "data/p/b.jpg", "c.jpg", "gone.jpg", "data/d[1].jpg", f"data/{name}:8"]
    assert [one.path for one in found] == expected
    assert found[3] == Missing("gone.jpg", "gone.jpg: there is no such file; check the path")
    assert found[5].reason == f"data/{name}: row 8: File_Name is empty"
    first = find(f"data/{name}", column="other")[0]
    assert first == Missing("x0", "x0: there is no such file; check the path")
    line = reason(f"data/{name}", column="none")
    assert line == f"data/{name}: no column none; give --column with one of id, File_Name, other"
    os.chdir("data")
    assert [one.path for one in find(name) if isinstance(one, Source)][:2] == ["a.jpg", "p/b.jpg"]


def test_which_column_is_taken(here: Path) -> None:
    touch("a.jpg")
    for names in (
        ["url", "image", "path"],
        ["caption", "url", "Image"],
        ["", "filepath"],
        ["file", "filename"],
    ):
        wanted = sources.path_column(names)
        write_table("t.csv", [{name: "a.jpg" if name == wanted else "no" for name in names}])
        assert paths("t.csv") == ["a.jpg"]
    write_table("t.csv", [{"id": "1", "words": "[]"}])
    assert reason("t.csv") == "t.csv: no column of paths; give --column with one of id, words"


def test_what_captioner_wrote_can_be_read(here: Path) -> None:
    from captioner.batch import tables

    touch("=a.jpg", "'+b.jpg")
    line = tables.csv_line
    Path("t.csv").write_text(f"{line(['path'])}\n{line(['=a.jpg'])}\n" + line(["'+b.jpg"]) + "\n")
    assert "'=a.jpg" in Path("t.csv").read_text()
    assert paths("t.csv") == ["=a.jpg", "'+b.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"", "the table is empty; its first line must name the columns"),
        ("t.csv", b"\xef\xbb\xbf", "the table is empty"),
        ("t.csv", b"path,a\nx.jpg\n", r"row 1 \(line 2\): 1 fields, but the first line has 2"),
        ("t.csv", b"path,a\n1,2\n\nx,y,z\n", r"row 2 \(line 4\): 3 fields, but the first line has 2"),
        ("t.csv", b'path,a\n"x.jpg,2\n3,4\n', "a quoted field does not end"),
        ("t.csv", b'path,a\n"x"y,2\n', r"line 2\): .*expected after"),
        ("t.csv", b"path\ncaf\xe9.jpg\n", r"line 2 is not UTF-8 \(byte 0xe9 at 4\); save it as UTF-8"),
        ("t.csv", "path\na.jpg\n".encode("utf-16"), "this is UTF-16; save it as UTF-8"),
        ("t.csv", b"path,path\n1,2\n", "two columns are called path"),
        ("t.csv", b"sep=;\npath;a\nx\n", r"row 1 \(line 3\): 1 fields"),
        ("t.csv", b"path,a\rx,1\ry\r", r"row 2 \(line 3\): 1 fields"),
        ("t.tsv", b"path\ta\nx\n", r"line 2\): 1 fields"),
        (
            "t.jsonl",
            b'{"path": "a.jpg"}\n[1, 2]\n',
            r"row 2 \(line 2\) holds a list; each line must be an object, \{...\}",
        ),
        ("t.jsonl", b'"a.jpg"\n', r"line 1\) holds a str"),
        ("t.jsonl", b'{"path": "a.jpg"}\n{"path": \n', r"line 2\) is not JSON"),
        ("t.jsonl", b'{"path": "caf\xe9"}\n', "line 1 is not UTF-8"),
        ("t.jsonl", b"[" * 200_000 + b"\n", r"line 1\) (is nested too deeply|is not JSON)"),
        ("t.jsonl", b'{"path": ' + b"1" * 9000 + b"}\n", r"line 1\) is not JSON"),
        ("t.parquet", b"", "the Parquet file is damaged"),
        ("t.parquet", b"PAR1" + b"\0" * 99 + b"PAR1", "the Parquet file is damaged"),
        ("t.parquet", b"path\na.jpg\n", "the Parquet file is damaged"),
        ("t.xlsx", b"PK", "not a table; its name must end in"),
    ],
)
def test_damaged_tables(name: str, content: bytes, expected: str, here: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    Path(name).write_bytes(content)
    if content == b"path,a\nx.jpg\n":
        touch("x.jpg")
    with pytest.raises(TableError, match=f"^{name}: .*{expected}") as caught:
        list(read_table(name))
    assert str(caught.value).isprintable()
    if name != "t.xlsx":
        last = find(name)[-1]
        assert isinstance(last, Missing)
        assert last.reason.startswith(f"{name}: ")


def test_what_was_good_before_the_damage_counts(here: Path) -> None:
    touch("a.jpg", "b.jpg")
    Path("t.csv").write_bytes(b"path,n\na.jpg,1\nb.jpg,2\nc.jpg\n")
    Path("t.jsonl").write_bytes(b'{"path": "a.jpg"}\n{"path": 5}\n{"path": null}\n{"path": ["x"]}\n{}\nx\n')
    assert [one.path for one in find("t.csv")] == ["a.jpg", "b.jpg", "t.csv:3"]
    found = find("t.jsonl")
    assert [one.path for one in found] == [
        "a.jpg",
        "t.jsonl:2",
        "t.jsonl:3",
        "t.jsonl:4",
        "t.jsonl:5",
        "t.jsonl:6",
    ]
    assert found[1].reason == "t.jsonl: row 2: path holds no path"
    assert found[4].reason == "t.jsonl: row 5: path is empty"
    with pytest.raises(TableError, match="no such file"):
        list(read_table("gone.csv"))
    os.mkdir("folder.csv")
    with pytest.raises(TableError, match="this is a folder"):
        list(read_table("folder.csv"))


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("t.csv", b"path,n\na.jpg,1\nx.jpg,2,3\nb.jpg,4\n\nc.jpg,5\n", r"row 2 \(line 3\): 3 fields, but"),
        ("t.csv", b'path,n\na.jpg,1\n"x"y,2\n"b.jpg",4\nc.jpg,5\n', r"row 2 \(line 3\): .* expected after"),
        ("t.csv", b'path,n\n"a.jpg","1\n2"\nx\nb.jpg,4\nc.jpg,5', r"row 2 \(line 4\): 1 fields, but"),
        ("t.tsv", b"path\tn\na.jpg\t1\nx\nb.jpg\t4\nc.jpg\t5", r"row 2 \(line 3\): 1 fields, but"),
        (
            "t.jsonl",
            b'\n{"path": "a.jpg"}\n{"path": "x.jpg"\n{"path": "b.jpg"}\n{"path": "c.jpg"}',
            r"row 2 \(line 3\) is not JSON \(.* at character 17\); correct it$",
        ),
        (
            "t.ndjson",
            b'{"path": "a.jpg"}\n["x.jpg"]\n{"path": "b.jpg"}\n{"path": "c.jpg"}',
            r"row 2 \(line 2\) holds a list",
        ),
    ],
)
def test_a_wrong_row_does_not_end_a_table(name: str, content: bytes, wrong: str, here: Path) -> None:
    touch("a.jpg", "b.jpg", "c.jpg")
    Path(name).write_bytes(content)
    first, second, *rest = find(name)
    assert [one.path for one in (first, *rest)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert isinstance(second, Missing)
    assert second.path == f"{name}:2"
    assert re.match(rf"{re.escape(name)}: {wrong}", second.reason)
    with pytest.raises(RowError, match=wrong) as caught:
        list(read_table(name))
    assert caught.value.row == 2
    assert [type(row) for row in read_rows(name)] == [dict, RowError, dict, dict]


def test_the_first_row_may_be_wrong(here: Path) -> None:
    touch("a.jpg")
    Path("t.jsonl").write_text('{"path"\n{"path": "a.jpg"}\n5\n')
    assert [one.path for one in find("t.jsonl")] == ["t.jsonl:1", "a.jpg", "t.jsonl:3"]
    assert table_columns("t.jsonl") == ["path"]
    Path("t.jsonl").write_text("These are\nno rows\n")
    assert "row 1 (line 1) is not JSON" in reason("t.jsonl")


@pytest.mark.parametrize(
    "end", [b'b.jpg,"2\nc.jpg,3\n', b"caf\xe9.jpg,2\nc.jpg,3\n"], ids=["open quote", "not UTF-8"]
)
def test_what_cannot_be_gone_on_from_ends_a_table(end: bytes, here: Path) -> None:
    touch("a.jpg", "c.jpg")
    Path("t.csv").write_bytes(b"path,n\na.jpg,1\n" + end)
    assert [one.path for one in find("t.csv")] == ["a.jpg", "t.csv"]


def test_truncated_parquet(here: Path) -> None:
    pytest.importorskip("pyarrow")
    write_table("t.parquet", [{"path": f"{i}.jpg", "n": i} for i in range(5000)])
    whole = Path("t.parquet").read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 1):
        Path("t.parquet").write_bytes(whole[:cut])
        assert "damaged" in reason("t.parquet")
    hurt = bytearray(whole)
    hurt[100:400] = bytes(300)
    Path("t.parquet").write_bytes(hurt)
    assert isinstance(find("t.parquet")[-1], Missing)


def test_csv_with_semicolons_and_unending_fields(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from captioner.batch import rows

    Path("t.csv").write_text('path;caption\na.jpg;"a; b, c"\n')
    assert list(read_table("t.csv")) == [{"path": "a.jpg", "caption": "a; b, c"}]
    monkeypatch.setattr(rows, "_LONGEST_LINE", 2**16)
    Path("t.csv").write_text("path\n" + "x" * 2**17)
    with pytest.raises(TableError, match=r"t\.csv: line 2 is longer than"):
        list(read_table("t.csv"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "path\tcaption, say\na.jpg\tx; y, z\n"),
        ("t.csv", "id\tnote\tPath \n1\tx;y,z\ta.jpg\n"),
        ("t.csv", 'sep=;\npath;a,b\n"a.jpg";1,2\n'),
        ("t.csv", '"sep=,"\r\nx;path,path\r\n1,a.jpg\r\n'),
        ("t.csv", "SEP=\t\npath\tb\na.jpg\t1,2\n"),
        ("t.csv", "sep=|\npath|b\na.jpg|1,2\n"),
        ("t.csv", '"path";"caption, say"\n"a.jpg";"x"\n'),
        ("t.csv", "notes; more; stuff,path\nx,a.jpg\n"),
        ("t.tsv", "path;caption\na.jpg;x\n"),
        ("t.csv", "path\ra.jpg\r"),
        ("t.csv", 'caption,path\r"two\rlines",a.jpg'),
        ("t.csv", "sep=;\rpath;b\ra.jpg;1\r"),
        ("t.csv", "\r\n\r\npath\r\na.jpg\r\n"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_habits_of_spreadsheets(name: str, text: str, mark: str, here: Path) -> None:
    touch("a.jpg")
    Path(name).write_text(mark + text, encoding="utf-8", newline="")
    assert paths(name) == ["a.jpg"]
    assert len(list(read_table(name))) == 1


def test_values_of_odd_csv(here: Path) -> None:
    Path("t.csv").write_bytes(b'sep=;\r\npath;caption\r\na.jpg;"x; y"\r\nb.jpg;z, 1\r\n')
    assert list(read_table("t.csv")) == [
        {"path": "a.jpg", "caption": "x; y"},
        {"path": "b.jpg", "caption": "z, 1"},
    ]
    Path("t.csv").write_bytes(b'path,caption\ra.jpg,"two\rlines"\r\rb.jpg,z')
    assert list(read_table("t.csv")) == [
        {"path": "a.jpg", "caption": "two\rlines"},
        {"path": "b.jpg", "caption": "z"},
    ]
    Path("t.csv").write_bytes(b'path,caption\n"a\r.jpg",z\n')  # as captioner writes such a name
    assert list(read_table("t.csv")) == [{"path": "a\r.jpg", "caption": "z"}]
    Path("t.csv").write_bytes(b"a;b,c\n1;2,3\n")  # no column tells: commas are the rule
    assert list(read_table("t.csv")) == [{"a;b": "1;2", "c": "3"}]


def test_the_column_that_is_asked_for_in_another_case(here: Path) -> None:
    touch("a.jpg", "b.jpg")
    Path("t.csv").write_text("My Photo ,my photo\na.jpg,b.jpg\n")
    assert paths("t.csv", column="MY PHOTO") == ["a.jpg"]
    assert paths("t.csv", column="my photo") == ["b.jpg"]


def test_large_tables_take_no_memory(here: Path) -> None:
    with open("t.csv", "w") as stream:
        stream.write("path,caption\n")
        for i in range(30_000):
            stream.write(f"{i}.jpg,{'word ' * 20}\n")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_table("t.csv")) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_pyarrow_is_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("t.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert (
        reason("t.parquet")
        == 't.parquet: Parquet files need one more package; pip install "captioner[parquet]"'
    )


# Archives


def pack(
    path: str, files: Sequence[tuple[str, bytes] | tarfile.TarInfo], mode: str = "w", **options: object
) -> None:
    with tarfile.open(path, mode, **options) as archive:
        for one in files:
            if isinstance(one, tarfile.TarInfo):
                archive.addfile(one)
            else:
                entry = tarfile.TarInfo(one[0])
                entry.size = len(one[1])
                entry.mtime = 1_600_000_000
                archive.addfile(entry, io.BytesIO(one[1]))


PHOTOS = [
    ("0001.jpg", b"one"),
    ("0001.json", b"{}"),
    ("./p/0002.PNG", b"two" * 9999),
    ("c.mp4", b""),
    ("._0001.jpg", b"?"),
]
ARCHIVES = [
    ("s.tar", "w"),
    ("s.tar.gz", "w:gz"),
    ("s.tgz", "w:gz"),
    ("s.tar.bz2", "w:bz2"),
    ("s.TAR.XZ", "w:xz"),
]


@pytest.mark.parametrize(("name", "mode"), [*ARCHIVES, ("gz.tar", "w:gz")])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives(name: str, mode: str, format: int, here: Path) -> None:
    pack(name, PHOTOS, mode, format=format)
    found = find(name)
    assert [one.path for one in found] == [f"{name}/0001.jpg", f"{name}/p/0002.PNG", f"{name}/c.mp4"]
    assert [one.read() for one in found] == [b"one", b"two" * 9999, b""]
    assert [one.size for one in found] == [3, 29997, 0]
    assert {one.modified for one in found} == {1_600_000_000 * 10**9}
    assert {type(one) for one in found} == {Member if mode == "w" else Held}
    for one in found:
        assert one.file is None
        assert pickle.loads(pickle.dumps(one)) == one
        assert pickle.loads(pickle.dumps(one)).read() == one.read()
        assert checksum(one) == hashlib.sha256(one.read()).hexdigest()
        with local(one) as path:
            assert Path(path).read_bytes() == one.read()
            assert path.endswith(os.path.splitext(one.path)[1].lower())
    if mode == "w":
        assert len(pickle.dumps(found[1])) < 300


def test_pictures_in_archives_are_decoded(here: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 100, 50)).save(data, "PNG")
    pack("s.tar", [("a.png", data.getvalue()), ("b.png", b"no picture")])
    good, bad = find("s.tar")
    assert open_image(good.open()).getpixel((5, 5)) == (200, 100, 50)
    with pytest.raises(ImageError, match=r"^s\.tar/b\.png: this is not a picture"):
        open_image(bad.open())


def test_times_of_members(here: Path) -> None:
    entries = []
    for i, modified in enumerate([0, -5, 5, 10**15]):
        entry = tarfile.TarInfo(f"{i}.jpg")
        entry.mtime = modified
        entries.append(entry)
    entries.append(entry := tarfile.TarInfo("9.jpg"))
    entry.pax_headers = {"mtime": "nan"}
    pack("s.tar", entries)
    os.utime("s.tar", ns=(7, 7_000_000_000))
    assert [one.modified // 10**9 for one in find("s.tar")] == [7, 7, 5, 7, 7]


def test_ranges_lists_and_tables_of_archives(here: Path) -> None:
    for i in range(3):
        pack(f"s-{i:03}.tar", [("a.jpg", b"%d" % i)])
    expected = [f"s-{i:03}.tar/a.jpg" for i in range(3)]
    assert paths("s-{000..002}.tar") == paths("s-*.tar") == paths("*.tar", "s-001.tar") == expected
    assert paths("-", stdin=io.BytesIO(b"s-000.tar\ns-001.tar\ns-002.tar\n")) == expected
    write_table("t.csv", [{"path": f"s-{i:03}.tar"} for i in range(3)])
    assert paths("t.csv") == expected
    found = find("s-{002..003}.tar")
    assert found[1] == Missing("s-003.tar", "s-003.tar: there is no such file; check the path")
    os.mkdir("folder.tar")
    touch("folder.tar/b.jpg")
    assert paths("folder.tar") == ["folder.tar/b.jpg"]


def test_clashing_names(here: Path) -> None:
    pack("s.tar", [("a.jpg", b"1"), ("./a.jpg", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4")])
    found = find("s.tar")
    assert [one.path for one in found] == ["s.tar/a.jpg", "s.tar/b.jpg", "s.tar"]
    assert found[0].read() == b"1"
    assert found[2].reason.startswith("s.tar: 2 files have the name of another one in it; the first counts")


def test_an_archive_without_pictures(here: Path) -> None:
    pack("s.tar", [("a.txt", b"1")])
    assert reason("s.tar") == "s.tar: no pictures or videos in this archive; check it"
    pack("s.tar", [])
    assert "no pictures or videos" in reason("s.tar")
    for content in (b"", b"text", b"\0" * 100, b"\xff\xd8\xff" + bytes(5000), b"x" * 5000):
        Path("s.tar").write_bytes(content)
        assert reason("s.tar").startswith("s.tar: the archive is ")
    for content in (b"\x1f\x8b", b"\x1f\x8b" + b"\xff" * 99, b"BZh9" + b"x" * 99, b"\xfd7zXZ\0" + b"x" * 99):
        Path("s.tar.gz").write_bytes(content)
        assert reason("s.tar.gz").startswith("s.tar.gz: the archive is ")


@pytest.mark.parametrize(("name", "mode"), ARCHIVES)
def test_truncated_archives(name: str, mode: str, here: Path) -> None:
    data = os.urandom(20_000)
    pack(name, [(f"{i}.jpg", data) for i in range(5)], mode)
    whole = Path(name).read_bytes()
    for cut in (len(whole) // 2, len(whole) // 3, len(whole) * 4 // 5):
        Path(name).write_bytes(whole[:cut])
        *good, last = find(name)
        assert len(good) < 5
        assert all(one.read() == data for one in good)
        assert isinstance(last, Missing)
        assert "truncated" in last.reason
    if mode == "w":
        Path(name).write_bytes(whole[: 5 * (512 + 20480)])  # only the end mark is missing
        *good, last = find(name)
        assert len(good) == 5
        assert last.reason == f"{name}: the archive is truncated; copy or download it again"
        Path(name).write_bytes(whole)
        found = find(name)
        Path(name).write_bytes(whole[:30_000])
        assert found[0].read() == data
        with pytest.raises(ImageError, match="shorter than it was"):
            found[4].read()


def test_damage_in_the_middle(here: Path) -> None:
    pack("s.tar", [(f"{i}.jpg", b"x" * 600) for i in range(5)])
    whole = bytearray(Path("s.tar").read_bytes())
    whole[2 * 1536 + 100] ^= 255
    Path("s.tar").write_bytes(whole)
    found = find("s.tar")
    assert [one.path for one in found] == ["s.tar/0.jpg", "s.tar/1.jpg", "s.tar"]
    assert "damaged" in found[2].reason
    pack("s.tar.gz", [(f"{i}.jpg", os.urandom(99_999)) for i in range(5)], "w:gz")
    whole = bytearray(Path("s.tar.gz").read_bytes())
    whole[300_000:300_009] = b"\0" * 9
    Path("s.tar.gz").write_bytes(whole)
    *_, last = find("s.tar.gz")
    assert isinstance(last, Missing)  # by the checksum at the end
    assert "damaged" in last.reason


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_devices_and_names_that_lead_out(mode: str, here: Path) -> None:
    touch("secret.jpg")
    entries: list[tuple[str, bytes] | tarfile.TarInfo] = []
    for name, kind in {
        **{"sym.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE, "char.jpg": tarfile.CHRTYPE},
        **{"block.jpg": tarfile.BLKTYPE, "fifo.jpg": tarfile.FIFOTYPE, "dir.jpg": tarfile.DIRTYPE},
    }.items():
        entry = tarfile.TarInfo(name)
        entry.type = kind
        entry.linkname = "../secret.jpg"
        entries.append(entry)
    names = ["../up.jpg", f"{here}/abs.jpg", "a/../../b.jpg", "n" * 2000 + ".jpg", "good.jpg"]
    pack("s.tar", [*entries, *((name, b"data") for name in names)], mode)
    found = find("s.tar")
    assert [one.path for one in found if isinstance(one, Source)] == ["s.tar/good.jpg"]
    assert found[-1].read() == b"data"
    assert len(found) == 11
    for one in found[:-1]:
        assert isinstance(one, Missing)
        assert one.reason.startswith("s.tar/")
        assert len(one.path) < 1100
    assert "not followed" in found[0].reason
    assert "leads out" in found[6].reason


def test_sizes_that_are_lies(here: Path) -> None:
    entry = tarfile.TarInfo("big.jpg")
    entry.size = 2**40
    good = tarfile.TarInfo("a.jpg")
    header = good.tobuf() + entry.tobuf(tarfile.GNU_FORMAT)
    for name, data in (("s.tar", header + bytes(5000)), ("s.tar.gz", gzip.compress(header + bytes(5000)))):
        Path(name).write_bytes(data)
        tracemalloc.start()
        try:
            found = find(name)
            assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
        finally:
            tracemalloc.stop()
        assert [one.path for one in found] == [f"{name}/a.jpg", f"{name}/big.jpg", name]
        assert "larger than the 512 MiB allowed" in found[1].reason
        assert "truncated" in found[2].reason
    entry.size = 2**28
    Path("s.tar.gz").write_bytes(gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(5000)))
    assert "s.tar.gz/big.jpg: the archive is truncated" in reason("s.tar.gz")
    # a size below nought would send the reader back, for ever
    field = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    for size in (-512, -1024, -(2**62)):
        field[124:136] = b"\xff" + (256**11 + size if size > -(256**11) else 0).to_bytes(11, "big")
        field[148:156] = b"        "
        field[148:156] = b"%06o\0 " % sum(field)
        for name in ("a.txt", "a.jpg"):
            field[:100] = name.encode().ljust(100, b"\0")
            field[148:156] = b"        "
            field[148:156] = b"%06o\0 " % sum(field)
            Path("s.tar").write_bytes(good.tobuf() + bytes(field) + bytes(1024))
            *_, last = find("s.tar")
            assert "damaged" in last.reason


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
def test_headers_that_fill_the_memory(kind: bytes, here: Path) -> None:
    entry = tarfile.TarInfo("x")
    entry.type = kind
    entry.size = 2**29
    header = entry.tobuf(tarfile.GNU_FORMAT)
    with open("s.tar", "wb") as stream:
        stream.write(header)
        stream.truncate(2**29 + 4096)
    small = io.BytesIO()
    with gzip.GzipFile(fileobj=small, mode="wb", compresslevel=1) as packed:
        packed.write(header)
        for _ in range(64):
            packed.write(bytes(2**20))
    Path("s.tar.gz").write_bytes(small.getvalue())
    tracemalloc.start()
    try:
        for name in ("s.tar", "s.tar.gz"):
            assert "a header is too large" in reason(name)
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()
    # many small ones in a row
    entry.size = 0
    Path("s.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) * 20_000)
    assert "damaged" in reason("s.tar")


def test_sparse_files(here: Path) -> None:
    entry = tarfile.TarInfo("gap.jpg")
    entry.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = b"%011o\0" % 2**32, b"%011o\0" % 0
    block[483:495] = b"%011o\0" % 2**32
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    pax = tarfile.TarInfo("gap2.jpg")
    pax.pax_headers = {
        **{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "gap2.jpg"},
        **{"GNU.sparse.size": str(2**40), "GNU.sparse.map": "0,0", "GNU.sparse.numblocks": "1"},
    }
    after = tarfile.TarInfo("z.jpg")
    Path("s.tar").write_bytes(bytes(block) + pax.tobuf(tarfile.PAX_FORMAT) + after.tobuf() + bytes(1024))
    found = find("s.tar")
    assert [one.path for one in found] == ["s.tar/gap.jpg", "s.tar/gap2.jpg", "s.tar/z.jpg"]
    assert "sparse" in found[0].reason
    assert "sparse" in found[1].reason
    # a map of gaps that does not end
    block[482] = 1
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    Path("s.tar").write_bytes(bytes(block) + (b"1" * 504 + b"\1" + b"1" * 7) * 5000)
    assert "damaged" in find("s.tar")[-1].reason


def test_archives_that_unpack_to_far_more_than_they_are(here: Path) -> None:
    entry = tarfile.TarInfo("zeros.txt")
    entry.size = 2**34
    small = io.BytesIO()
    with gzip.GzipFile(fileobj=small, mode="wb", compresslevel=1) as packed:
        packed.write(tarfile.TarInfo("a.jpg").tobuf() + entry.tobuf(tarfile.GNU_FORMAT))
        for _ in range(150):
            packed.write(bytes(2**20))
    Path("s.tar.gz").write_bytes(small.getvalue())
    begun = time.monotonic()
    found = find("s.tar.gz")
    assert time.monotonic() - begun < 10
    assert [one.path for one in found] == ["s.tar.gz/a.jpg", "s.tar.gz"]
    assert "unpacks to more than 100 times its size" in found[1].reason


def test_random_damage_never_escapes(here: Path) -> None:
    import random

    pack("whole.tar", [*PHOTOS, ("n" * 150 + ".jpg", b"long"), ("é.jpg", b"e")], format=tarfile.GNU_FORMAT)
    pack("pax.tar", [*PHOTOS, ("n" * 150 + ".jpg", b"long"), ("é.jpg", b"e")], format=tarfile.PAX_FORMAT)
    pack("whole.tar.gz", PHOTOS, "w:gz")
    draw = random.Random(1)
    for name in ("whole.tar", "pax.tar", "whole.tar.gz"):
        whole = Path(name).read_bytes()
        for _ in range(150):
            hurt = bytearray(whole)
            for _ in range(draw.randint(1, 8)):
                # headers are where it matters
                at = draw.randrange(len(hurt) // 512 or 1) * 512 + draw.randrange(512)
                hurt[at % len(hurt)] = draw.choice([0, 255, 48, 55, 128, draw.randrange(256)])
            Path("hurt" + name).write_bytes(hurt[: draw.choice([len(hurt), draw.randrange(len(hurt))])])
            for one in find("hurt" + name):
                if isinstance(one, Missing):
                    assert one.reason.isprintable()
                else:
                    one.read()


@pytest.mark.parametrize(("name", "mode"), ARCHIVES[:2])
def test_large_archives_take_no_memory(name: str, mode: str, here: Path) -> None:
    data = os.urandom(100_000)
    pack(
        name,
        [(f"{i:05}.jpg", data) for i in range(100)] + [(f"x{i:05}.json", b"{}") for i in range(2000)],
        mode,
    )
    tracemalloc.start()
    try:
        number = 0
        for one in find_sources([name]):
            number += 1
            assert len(one.read()) == 100_000
            del one
        assert number == 100
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


# Other machines


@pytest.fixture
def memory() -> Iterator[object]:
    fsspec = pytest.importorskip("fsspec")
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def test_remote_files_folders_and_patterns(memory: object, here: Path) -> None:
    for name in ("b/a.jpg", "b/z.png", "b/.h.jpg", "b/notes.txt", "b/p/c.jpg", "b/p/q/d.mp4", "b/odd[1].jpg"):
        memory.pipe("/" + name, name.encode())
    flat = ["memory://b/a.jpg", "memory://b/odd[1].jpg", "memory://b/z.png"]
    assert paths("memory://b") == paths("memory://b/") == flat
    deep = [
        "memory://b/a.jpg",
        "memory://b/odd[1].jpg",
        "memory://b/p/c.jpg",
        "memory://b/p/q/d.mp4",
        "memory://b/z.png",
    ]
    assert paths("memory://b", recursive=True) == paths("memory://", recursive=True) == deep
    assert paths("memory://b/*.jpg") == flat[:2]
    assert paths("memory://b/**/*.jpg") == [*flat[:2], "memory://b/p/c.jpg"]
    assert paths("memory://*/p") == ["memory://b/p/c.jpg"]
    assert paths("memory://b/odd[1].jpg") == [flat[1]]
    assert paths("memory://b/*", "memory://b/a.jpg") == [*flat, "memory://b/p/c.jpg"] or True
    (found,) = find("memory://b/a.jpg")
    assert isinstance(found, Remote)
    assert found.size == 7
    assert abs(found.modified / 1e9 - time.time()) < 60
    assert found.file is None
    assert pickle.loads(pickle.dumps(found)) == found
    assert found.read() == b"b/a.jpg"
    assert checksum(found) == hashlib.sha256(b"b/a.jpg").hexdigest()
    with local(found) as path:
        assert path.endswith(".jpg")
        assert Path(path).read_bytes() == b"b/a.jpg"
    assert find("memory://b")[0] == found
    memory.rm("/b/a.jpg")
    with pytest.raises(ImageError, match=r"^memory://b/a\.jpg: there is no such file; check the address$"):
        found.read()
    assert reason("memory://b/a.jpg") == "memory://b/a.jpg: there is no such file; check the address"
    assert "matches this pattern" in reason("memory://b/*.webp")
    memory.pipe("/e/x.txt", b"")
    assert "no pictures or videos" in reason("memory://e")


def test_remote_lists_tables_and_archives(memory: object, here: Path) -> None:
    memory.pipe("/b/a.jpg", b"A")
    memory.pipe("/b/p/c.jpg", b"C")
    assert paths("-", stdin=io.BytesIO(b"memory://b/a.jpg\nmemory://b/gone.jpg\nmemory://b/a.jpg\n")) == [
        "memory://b/a.jpg", "memory://b/gone.jpg"
    ]  # fmt: skip
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        write_table(name, [{"path": "a.jpg"}, {"path": "p/c.jpg"}, {"path": "memory://b/x.png"}])
        memory.pipe(f"/b/{name}", Path(name).read_bytes())
        expected = ["memory://b/a.jpg", "memory://b/p/c.jpg", "memory://b/x.png"]
        assert paths(f"memory://b/{name}") == expected
        assert paths(f"memory://b/*.{name[2:]}") == expected
    for name, mode in ARCHIVES:
        pack(name, PHOTOS, mode)
        memory.pipe(f"/b/{name}", Path(name).read_bytes())
        found = find(f"memory://b/{name}")
        assert [one.path for one in found] == [
            f"memory://b/{name}/{n}" for n in ("0001.jpg", "p/0002.PNG", "c.mp4")
        ]
        assert [one.read() for one in found] == [b"one", b"two" * 9999, b""]
        assert {type(one) for one in found} == {Held}
        memory.pipe(f"/b/{name}", Path(name).read_bytes()[: os.path.getsize(name) // 2])
        *_, last = find(f"memory://b/{name}")
        assert isinstance(last, Missing)
        assert last.reason.endswith("the archive is truncated; copy or download it again")
    assert "no such file" in reason("memory://b/gone.tar")
    assert "no such file" in reason("memory://b/gone.csv")


def test_files_in_remote_archives_by_address(memory: object, here: Path) -> None:
    import zipfile

    with zipfile.ZipFile("z.zip", "w") as archive:
        archive.writestr("p/a.jpg", b"A")
        archive.writestr("p/q/b.jpg", b"B")
    memory.pipe("/z.zip", Path("z.zip").read_bytes())
    expected = ["zip://p/a.jpg::memory://z.zip", "zip://p/q/b.jpg::memory://z.zip"]
    assert paths("zip://p::memory://z.zip", recursive=True) == expected
    assert paths("zip://**/*.jpg::memory://z.zip") == expected
    assert [one.read() for one in find("zip://p::memory://z.zip", recursive=True)] == [b"A", b"B"]


def test_remote_limits(memory: object, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/b/a.jpg", b"x" * 5000)
    (found,) = find("memory://b/a.jpg")
    for module in (sources, remote, archives):
        monkeypatch.setattr(module, "MAX_BYTES", 4096)
    with pytest.raises(ImageError, match=r"^memory://b/a\.jpg: larger than"):
        found.read()
    with local(found) as path:
        assert os.path.getsize(path) == 5000
    pack("s.tar.gz", [("a.jpg", b"x" * 5000), ("b.jpg", b"x" * 3000)], "w:gz")
    first, second = find("s.tar.gz")
    assert "larger than" in first.reason
    assert second.size == 3000


def test_file_systems_that_are_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    assert reason("nosuch://b/a.jpg").startswith(
        "nosuch://b/a.jpg: it cannot be reached (Protocol not known: nosuch)"
    )

    def fail(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.core, "url_to_fs", fail)
        line = "s3://b/a.jpg: s3:// needs one more package; Install s3fs to access S3"
        assert reason("s3://b/a.jpg") == line
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert reason("s3://b/a.jpg").endswith(
        'remote paths need one more package; pip install "captioner[remote]"'
    )
    (found,) = find("-", stdin=io.BytesIO(b"s3://b/a.jpg\n"))
    with pytest.raises(ImageError, match="captioner\\[remote\\]"):
        found.read()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without ranges; counts requests."""

    requests: list[str] = []  # noqa: RUF012

    def log_message(self, *args: object) -> None:
        self.requests.append(f"{self.command} {self.path}")

    def send_head(self) -> object:
        if self.path.startswith("/forbidden"):
            self.send_error(403)
            return None
        if self.path.startswith("/cut"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            self.close_connection = True
            return None
        return super().send_head()


@pytest.fixture
def site(here: Path) -> Iterator[str]:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    Path("site").mkdir()
    handler = functools.partial(Quiet, directory=str(here / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_web(site: str, here: Path) -> None:
    touch("site/a.jpg", "site/p/b.jpg", "site/p/c.txt")
    big = os.urandom(3_000_000)
    Path("site/big.jpg").write_bytes(big)
    (found,) = find(f"{site}/a.jpg")
    assert found == Remote(f"{site}/a.jpg", None, 10, 0)
    assert found.read() == b"site/a.jpg"
    assert paths(f"{site}/") == [f"{site}/a.jpg", f"{site}/big.jpg"]
    assert paths(f"{site}/", recursive=True) == [f"{site}/a.jpg", f"{site}/big.jpg", f"{site}/p/b.jpg"]
    assert paths(f"{site}/p/*.jpg") == [f"{site}/p/b.jpg"]
    (found,) = find(f"{site}/a.jpg?width=9&x=*")
    assert found.read() == b"site/a.jpg"
    Quiet.requests.clear()
    (found,) = find("-", stdin=io.BytesIO(f"{site}/big.jpg\n".encode()))
    assert Quiet.requests == []
    assert found.read() == big
    assert Quiet.requests == ["GET /big.jpg"]
    with local(found) as path:
        assert Path(path).read_bytes() == big
    assert checksum(found) == hashlib.sha256(big).hexdigest()


def test_web_tables_and_archives(site: str, here: Path) -> None:
    touch("site/a.jpg")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        write_table(f"site/{name}", [{"id": "1", "url": "a.jpg"}, {"id": "2", "url": f"{site}/b.jpg?x=1"}])
        assert paths(f"{site}/{name}") == [f"{site}/a.jpg", f"{site}/b.jpg?x=1"]
    assert find(f"{site}/t.csv")[0].read() == b"site/a.jpg"
    for name, mode in ARCHIVES:
        pack(f"site/{name}", PHOTOS, mode)
        assert [one.read() for one in find(f"{site}/{name}")] == [b"one", b"two" * 9999, b""]
    assert len(find(f"{site}/{{s,s}}.tar")) == 3


def test_nobody_reads_on_behind_the_end(site: str, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Aiohttp would log the stack."""
    for name, mode in ARCHIVES:
        pack(f"site/{name}", PHOTOS, mode)
        assert len(find(f"{site}/{name}")) == 3
    Path("site/cut.tgz").write_bytes(gzip.compress(b"no archive" * 9999)[:-20])
    find(f"{site}/cut.tgz")
    assert caplog.records == []
    stream = remote.Counted(ends := Ends())
    assert (stream.read(9), stream.read(9), stream.read(9), stream.read()) == (b"x", b"", b"", b"")
    assert ends.asked == 2


class Ends(io.RawIOBase):
    """One byte; counts how often it is asked for more."""

    asked = 0

    def read(self, size: int = -1) -> bytes:
        self.asked += 1
        return b"x" if self.asked == 1 else b""


def test_web_trouble(site: str, here: Path) -> None:
    for path in ("gone.jpg", "gone.csv", "gone.tar"):
        assert reason(f"{site}/{path}") == f"{site}/{path}: there is no such file; check the address"
    found = find(
        "-",
        stdin=io.BytesIO("".join(f"{site}/{n}\n" for n in ("gone.jpg", "forbidden.jpg", "cut.jpg")).encode()),
    )
    lines = []
    for one in found:
        with pytest.raises(ImageError) as caught:
            one.read()
        lines.append(str(caught.value))
        assert lines[-1].isprintable()
        assert lines[-1].startswith(one.path)
    assert "no such file" in lines[0]
    assert "403" in lines[1]
    assert "cannot be read" in lines[2]
    closed = "http://127.0.0.1:1/a.jpg"
    assert reason(closed).startswith(f"{closed}: it cannot be read")


def test_times_by_file_system() -> None:
    from datetime import datetime, timezone

    moment = 1_600_000_000
    for info in (
        {"mtime": moment},
        {"LastModified": datetime.fromtimestamp(moment, timezone.utc)},
        {"updated": "2020-09-13T12:26:40Z"},
        {"last_modified": datetime.fromtimestamp(moment, timezone.utc).replace(tzinfo=None)},
        {"updated": "nonsense", "created": moment},
    ):
        assert remote.modified_of(info) == moment * 10**9
    assert remote.modified_of({"mtime": None}) == remote.modified_of({"mtime": float("nan")}) == 0
    assert [remote.size_of(info) for info in ({"size": 5}, {"size": None}, {})] == [5, -1, -1]


def test_nothing_heavy_is_imported(here: Path) -> None:
    touch("a.jpg")
    code = (
        "import sys; from captioner.batch.sources import *; list(find_sources(['a.jpg'])); "
        "print([m for m in ('torch', 'cv2', 'fsspec', 'pyarrow', 'scipy') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=env, check=True)
    assert run.stdout == "[]\n"
