from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captioner.batch.apply import Applied, ApplyError, apply_table, run_apply
from captioner.batch.rows import TableError
from captioner.batch.sidecars import SidecarError, Sidecars
from captioner.batch.tables import write_table


def record(path: str, caption: str, **more: Any) -> dict[str, Any]:
    """What captioner writes of a photo, as far as it matters here."""
    words = [{"word": word, "probability": 0.5} for word in caption.split()]
    return {
        **{"path": path, "schema": 1, "caption": caption, "confidence": 0.5, "score": -1.0},
        **{"log_probability": -2.0, "finished": True, "words": words, "guesses": [], "model": "builtin"},
        **{"error": None, "model_sha256": "0" * 16, "seconds": 0.1, **more},
    }


def clip(path: str, *captions: str) -> dict[str, Any]:
    segments = [
        {"start": 2.5 * n, "end": 2.5 * n + 2.5, **record("", caption)} for n, caption in enumerate(captions)
    ]
    for segment in segments:
        for key in ("path", "schema", "model", "error", "model_sha256", "seconds"):
            del segment[key]
    return record(path, ". ".join(captions), segments=segments, duration=2.5 * len(captions), words=[])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    return tmp_path


RECORDS = [
    record("a.jpg", "a dog"),
    record("b.jpg", "a cat"),
    clip("clip.mp4", "a man walks", "a man sits"),
    record("c.jpg", "a cow"),
]


def make(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    with path.open("wb") as file:
        write_table(path, records, file)
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], object], **habits: Any) -> Path:
    """Change the rows of a table, as a spreadsheet would write them."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            change(row)
        rows = habits.get("order", lambda found: found)(rows)
        with path.open("w", newline="", encoding=habits.get("encoding", "utf-8")) as file:
            writer = csv.DictWriter(
                file,
                list(rows[0]),
                delimiter=habits.get("delimiter", ","),
                lineterminator=habits.get("end", "\n"),
            )
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            change(row)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            change(row)
        pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return path


HINT = "what was kept may be captioner's own: the journal of the run tells; name it with --journal FILE"


def cut(path: Path, *columns: str) -> Path:
    """Leave only some columns of a CSV table."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def drop(path: Path, *captions: str) -> Path:
    """Leave out the rows with these captions."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not any(f",{c}," in line for c in captions)), "utf-8")
    return path


def rename(row: dict[str, Any]) -> None:
    row["caption"] = {"a dog": "Rex, our dog", "a man sits": "Papa sitzt"}.get(row["caption"], row["caption"])


def what(found: list[Applied]) -> dict[str, str]:
    return {applied.path: applied.what for applied in found}


def text(folder: Path, name: str) -> str:
    return (folder / name).read_text("utf-8")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_edited_captions_become_sidecars(suffix: str, folder: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    for found in RECORDS[:3]:
        Sidecars(before="x, ").plan(found["path"], found).write()
    (folder / "b.txt").write_text("my cat")
    table = edit(make(Path(f"t{suffix}")), rename)
    if suffix == ".jsonl":
        edit(table, lambda row: [rename(segment) for segment in row.get("segments", [])])
    found = list(apply_table(table, before="x, "))
    assert what(found) == {"a.jpg": "written", "b.jpg": "kept", "clip.mp4": "written", "c.jpg": "written"}
    assert text(folder, "a.txt") == "x, Rex, our dog\n"
    assert text(folder, "b.txt") == "my cat"
    assert text(folder, "c.txt") == "x, a cow\n"
    assert text(folder, "clip.txt") == "x, a man walks. Papa sitzt\n"
    assert [applied.reason for applied in found if applied.what == "kept"] == [
        "b.jpg: b.txt exists and is kept: nothing tells that captioner wrote it"
    ]
    kept = {applied.path: applied.reason for applied in apply_table(table, ours=lambda p, o: None)}
    assert kept["b.jpg"] == (
        "b.jpg: b.txt exists and is kept: captioner did not write it, or it was edited since"
    )
    assert set(what(list(apply_table(table, before="x, "))).values()) == {"same", "kept"}
    assert what(list(apply_table(table, before="x, ", existing="overwrite")))["b.jpg"] == "written"
    assert text(folder, "b.txt") == "x, a cat\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_habits_of_spreadsheets(end: str, encoding: str, delimiter: str, folder: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        rename(row)
        if row["path"] == "b.jpg":
            row["caption"] = ' "Mia", am Weg;\nweiß '
        if row["start"]:
            row["start"] = row["start"].replace(".", ",")

    table = make(Path("t.csv"), [*RECORDS, record("=c.jpg", "-1 + a cow"), record("'tis.jpg", "'tis a dog")])
    for name in ("=c.jpg", "'tis.jpg"):
        (folder / name).write_bytes(b"x")
    # sorted by caption: the segments of the clip come apart and the wrong way round
    edit(
        table,
        change,
        end=end,
        encoding=encoding,
        delimiter=delimiter,
        order=lambda rows: sorted(rows, key=lambda r: r["caption"], reverse=True),
    )
    assert "'=c.jpg" in table.read_text(encoding)
    assert set(what(list(apply_table(table))).values()) == {"written"}
    assert text(folder, "=c.txt") == "-1 + a cow\n"
    assert text(folder, "'tis.txt") == "'tis a dog\n"
    assert text(folder, "b.txt") == '"Mia", am Weg; weiß\n'
    assert text(folder, "clip.txt") == "a man walks. Papa sitzt\n"


def test_a_table_is_edited_and_applied_again(folder: Path) -> None:
    """With the journal's help; captioner does not take a person's words for its own afterwards."""
    journal: dict[tuple[str, str], str] = {}
    before: list[str] = []

    def note(path: str, output: str, target: Path, digest: str) -> None:
        before.append(target.read_text())
        journal[path, output] = digest

    plan = Sidecars().plan("a.jpg", RECORDS[0])
    journal["a.jpg", "sidecar"] = plan.digest
    plan.write()
    table = make(Path("t.csv"), RECORDS[:1])
    for words in ("Rex", "Rex and I"):
        edit(table, lambda row, words=words: row.update(caption=words, words=""))
        (found,) = apply_table(table, ours=lambda p, o: journal.get((p, o)), note=note)
        assert found == Applied("a.jpg", Path("a.txt"), "written")
        assert text(folder, "a.txt") == f"{words}\n"
    assert before == ["a dog\n", "Rex\n"]  # noted before it is written
    assert set(journal) == {("a.jpg", "sidecar"), ("a.jpg", "sidecar applied")}
    assert Sidecars().plan("a.jpg", record("a.jpg", "a wolf"), journal["a.jpg", "sidecar"]).kept
    # without the journal the words in the table tell what was captioner's, but not what was applied
    edit(table, lambda row: row.update(caption="Max"))
    assert what(list(apply_table(table))) == {"a.jpg": "kept"}
    (folder / "a.txt").write_text("edited there\n")
    assert what(list(apply_table(table, ours=lambda p, o: journal.get((p, o)), note=note))) == {
        "a.jpg": "kept"
    }


THREE = clip("clip.mp4", "a man walks", "a man sits", "a man sleeps")


def noted(found: dict[str, Any], **options: Any) -> dict[tuple[str, str], str]:
    """Write a record's sidecar as a run does, and return what its journal notes."""
    plan = Sidecars(**options).plan(found["path"], found)
    plan.write()
    return {(found["path"], "sidecar"): plan.digest}


@pytest.mark.parametrize("columns", [("path", "caption"), ("path", "caption", "words"), ("caption", "path")])
def test_segments_without_times_shorten_nothing(
    columns: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = noted(THREE)
    table = cut(edit(make(Path("t.csv"), [RECORDS[0], THREE]), rename), *columns)
    reason = (
        "clip.mp4: it has 3 rows, not all of them with a start, so nothing was changed: "
        "keep the columns start and end, or give it one row with the whole caption"
    )
    for existing in ("keep", "overwrite", "append"):
        found = list(apply_table(table, existing=existing, ours=lambda p, o: journal.get((p, o))))
        assert what(found) == {"a.jpg": "same" if existing != "keep" else "written", "clip.mp4": "error"}
        assert found[1].reason == reason
        assert text(folder, "clip.txt") == "a man walks. a man sits. a man sleeps\n"
    assert run_apply(table) == 1
    assert f"captioner: {reason}\n" in capsys.readouterr().err
    # one row is the whole
    table.write_text("path,caption\nclip.mp4,a man's day\n")
    assert what(list(apply_table(table, ours=lambda p, o: journal.get((p, o))))) == {"clip.mp4": "written"}
    assert text(folder, "clip.txt") == "a man's day\n"


def test_animations_and_photos_that_stand_twice(folder: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "still.gif")
    table = Path("t.csv")
    table.write_text("path,caption\nmoves.gif,a\nmoves.gif,b\nstill.gif,a\nstill.gif,b\n")
    found = list(apply_table(table))
    assert [(applied.path, applied.what) for applied in found] == [
        ("still.gif", "written"),
        ("still.gif", "error"),
        ("moves.gif", "error"),
    ]
    assert "it has 2 rows" in str(found[2].reason)
    assert text(folder, "still.txt") == "a\n"
    assert not (folder / "moves.txt").exists()


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        (["a man walks"], "clip.txt has more segments than the table"),
        (["a man sits"], "one row ends at 2.5 s and the next starts at 5 s"),
        (["a man sleeps"], "clip.txt has more segments than the table"),
        (["a man walks", "a man sleeps"], "clip.txt has more segments than the table"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"before": "x, ", "after": " y"}, {"existing": "append"}])
@pytest.mark.parametrize("columns", [("words",), ()])
def test_segments_without_rows_shorten_nothing(
    gone: list[str], why: str, columns: tuple[str, ...], options: dict[str, str], folder: Path
) -> None:
    """As when a table is filtered for what is doubtful, and saved."""
    (folder / "clip.txt").write_text("mine. " if options.get("existing") else "")
    journal = noted(THREE, **options)
    before = text(folder, "clip.txt")
    table = cut(make(Path("t.csv"), [THREE]), "path", "caption", "start", "end", *columns)
    drop(table, *gone)
    edit(table, lambda row: row.update(caption=row["caption"].replace("man", "dog")))
    (found,) = apply_table(table, ours=lambda p, o: journal.get((p, o)), **options)
    assert found.what == "error"
    assert why in str(found.reason)
    assert "with an empty caption to leave it out" in str(found.reason)
    assert text(folder, "clip.txt") == before


@pytest.mark.parametrize("options", [{}, {"before": "x. ", "after": ". y"}, {"existing": "append"}])
@pytest.mark.parametrize("columns", [("words",), ()])
def test_an_empty_caption_leaves_a_segment_out(
    columns: tuple[str, ...], options: dict[str, str], folder: Path
) -> None:
    mine = "mine. " if options.get("existing") else ""
    (folder / "clip.txt").write_text(mine)
    journal = noted(THREE, **options)
    table = cut(make(Path("t.csv"), [THREE]), "path", "caption", "start", "end", *columns)
    edit(table, lambda row: row.update(caption=row["caption"].replace("a man sits", "")))
    for _ in range(2):
        (found,) = apply_table(
            table,
            ours=lambda p, o: journal.get((p, o)),
            note=lambda p, o, t, d: journal.update({(p, o): d}),
            **options,
        )
        assert found.reason is None
    whole = "a man walks. a man sleeps"
    assert text(folder, "clip.txt").rstrip("\n") == (
        f"{mine}{options.get('before', '')}{whole}{options.get('after', '')}"
    )


def test_a_report_s_row_is_the_whole_of_a_video(folder: Path) -> None:
    """As the page writes it: one row from beginning to end, with all words."""
    journal = noted(THREE)
    words = json.dumps([{"word": word} for word in THREE["caption"].split()])
    with open("t.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["path", "caption", "start", "end", "words"], ["clip.mp4", "Papa", 0, 7.5, words]]
        )
    assert what(list(apply_table("t.csv", ours=lambda p, o: journal.get((p, o))))) == {"clip.mp4": "written"}
    assert text(folder, "clip.txt") == "Papa\n"


def test_words_are_added_to_a_persons_once(folder: Path) -> None:
    (folder / "a.txt").write_text("mychar,\n")
    table = edit(make(Path("t.csv"), RECORDS[:1]), rename)
    journal: dict[tuple[str, str], str] = {}
    for expected in ("mychar, Rex, our dog\n", "mychar, Rex\n"):
        for _ in range(2):
            list(
                apply_table(
                    table,
                    existing="append",
                    ours=lambda p, o: journal.get((p, o)),
                    note=lambda p, o, t, d: journal.update({(p, o): d}),
                )
            )
            assert text(folder, "a.txt") == expected
        edit(table, lambda row: row.update(caption="Rex"))


def test_what_cannot_be_applied_is_told_row_by_row(folder: Path) -> None:
    (folder / "shard.tar").write_bytes(b"x")
    records = [
        record("gone.jpg", "a dog"),
        record("a.jpg", "a dog"),
        record("b.jpg", "", error="b.jpg: not a picture"),
        record("a.jpg", "another dog"),
        record("s3://bucket/x.jpg", "a dog"),
        record("shard.tar/x.jpg", "a dog"),
    ]
    table = make(Path("t.csv"), records)
    with table.open("a") as file:
        file.write("," * 15 + "\n")
        file.write(",a dog" + "," * 14 + "\n")
    found = list(apply_table(table))
    assert [(applied.path, applied.what, applied.reason) for applied in found] == [
        ("gone.jpg", "missing", "gone.jpg: there is no such file"),
        ("a.jpg", "written", None),
        ("a.jpg", "error", "a.jpg: it stands in the table twice; its first row was taken"),
        (
            "s3://bucket/x.jpg",
            "kept",
            "s3://bucket/x.jpg: there is no sidecar: the file is on another machine",
        ),
        (
            "shard.tar/x.jpg",
            "kept",
            "shard.tar/x.jpg: there is no sidecar: the file is in an archive, or gone",
        ),
        (f"{table}: row 8", "error", f"{table}: row 8: it has no path"),
        ("b.jpg", "kept", "b.jpg: it has no caption in the table, so nothing was changed"),
    ]
    assert not (folder / "b.txt").exists()


def test_rows_of_errors_do_not_count(folder: Path) -> None:
    broken = clip("clip.mp4", "a man walks") | {"error": "clip.mp4: truncated"}
    failed = record("a.jpg", "", error="a.jpg: truncated")
    for records in ([broken, failed, RECORDS[0]], [RECORDS[0], failed, broken]):
        table = make(Path("t.csv"), records)
        assert what(list(apply_table(table, existing="overwrite"))).keys() == {"a.jpg", "clip.mp4"}
        assert text(folder, "clip.txt") == "a man walks\n"
        assert text(folder, "a.txt") == "a dog\n"


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_case_and_spaces_of_columns_do_not_count(name: str, folder: Path) -> None:
    table = make(Path(name), RECORDS)
    if name == "t.csv":
        head, body = table.read_text().split("\n", 1)
        table.write_text(f"{head.replace(',', ' , ').title()}\n{body}")
        assert "Caption ," in table.read_text()
    else:
        records = [json.loads(line) for line in table.read_text().splitlines()]
        for found in records:
            for segment in found.get("segments", []):
                rename(segment)
            if "segments" in found:
                parts = [{key.upper(): part[key] for key in part} for part in found["segments"]]
                found["segments"] = parts
        rows = [{key.capitalize(): value for key, value in found.items()} for found in records]
        table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for found in RECORDS:
        noted(found)  # what the words in the table tell to be captioner's
    names = {"a dog": "Rex, our dog", "a man sits": "Papa sitzt"}
    edit(table, lambda row: row.update({key: names.get(str(row[key]), row[key]) for key in row}))
    found = what(list(apply_table(table, column="CAPTION")))
    assert found == {"a.jpg": "written", "b.jpg": "same", "clip.mp4": "written", "c.jpg": "same"}
    assert text(folder, "a.txt") == "Rex, our dog\n"
    assert text(folder, "clip.txt") == "a man walks. Papa sitzt\n"


def test_columns_that_differ_in_case_only(folder: Path) -> None:
    table = Path("t.csv")
    for names, said in (
        ("path,caption,Caption", "'caption' and 'Caption'"),
        ("path,Path ,caption", "'path' and"),
    ):
        table.write_text(f"{names}\na.jpg,b.jpg,c\n")
        with pytest.raises(ApplyError, match=rf"t\.csv: the columns {said}.* differ in case or spaces only"):
            apply_table(table)


def test_tables_of_other_programs(folder: Path) -> None:
    table = Path("t.csv")
    for n, content in enumerate(
        (
            b"path\tcaption\na.jpg\t0, with; all\n",
            b"sep=;\r\npath;caption\r\na.jpg;1, with; all\r\n".replace(b"1, with; all", b'"1, with; all"'),
            b'path,caption\ra.jpg,"2, with; all"\r',
        )
    ):
        table.write_bytes(content)
        assert what(list(apply_table(table, existing="overwrite"))) == {"a.jpg": "written"}
        assert text(folder, "a.txt") == f"{n}, with; all\n"


@pytest.mark.parametrize("to", ["sidecars", "alt-text"])
def test_a_wrong_row_is_told_before_anything_is_written(to: str, folder: Path) -> None:
    """It may be a segment of a video, which would be shorter without."""
    if to == "alt-text":
        pytest.importorskip("exiv2")
    before = (folder / "a.jpg").read_bytes()
    table = Path("t.csv")
    table.write_text("path,caption\na.jpg,a dog\nb.jpg,a cat, or two\nc.jpg,a cow\n")
    with pytest.raises(TableError, match=r"t\.csv: row 2 \(line 3\): 3 fields, but the first line has 2"):
        apply_table(table, to=to)
    assert not list(folder.glob("*.txt"))
    assert (folder / "a.jpg").read_bytes() == before


def test_clashes_are_refused_before_anything_is_written(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    table = make(Path("t.csv"), [*RECORDS, record("a.png", "a dog")])
    with pytest.raises(
        ApplyError, match=r"a\.txt is wanted by .*a\.jpg and by .*a\.png; nothing was written"
    ):
        apply_table(table)
    assert not list(folder.glob("*.txt"))


def test_paths_count_from_the_root_or_the_table(folder: Path, tmp_path: Path, monkeypatch) -> None:
    table = make(folder / "t.csv", RECORDS[:1])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert what(list(apply_table(table))) == {"a.jpg": "written"}
    assert text(folder, "a.txt") == "a dog\n"
    assert what(list(apply_table(table, root=elsewhere))) == {"a.jpg": "missing"}
    Image.new("RGB", (8, 8)).save(elsewhere / "a.jpg")
    assert what(list(apply_table(table, root=elsewhere))) == {"a.jpg": "written"}
    assert text(elsewhere, "a.txt") == "a dog\n"


def test_names_that_are_no_text(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n.jpg")
    try:
        Image.new("RGB", (8, 8)).save(folder / "x.jpg")
        os.rename(folder / "x.jpg", folder / name)
    except OSError:
        pytest.skip("this disk has no such names")
    asked: list[str] = []
    for suffix in (".csv", ".jsonl"):
        table = make(folder / f"t{suffix}", [record(name, "a dog")])
        (found,) = apply_table(table, ours=lambda path, output: asked.append(path))  # type: ignore[func-returns-value]
        assert found.what in ("written", "same")
    assert set(asked) == {name}
    assert (folder / os.fsdecode(b"caf\xe9\n.txt")).read_text() == "a dog\n"


def test_nothing_is_written_in_a_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = make(Path("t.csv"))

    def never(*_: object) -> None:
        raise AssertionError("a dry run notes nothing")

    assert run_apply(table, dry_run=True, note=never) == 0
    assert not list(folder.glob("*.txt"))
    assert capsys.readouterr().err == "captioner: sidecars: 4 to be written\n"


def test_the_command_tells_what_became_of_the_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.txt").write_text("mine")
    table = make(Path("t.csv"), [*RECORDS, *(record(f"gone{n}.jpg", "a dog") for n in range(30))])
    assert run_apply(table, sidecars=True) == 1
    *lines, more, last, hint = capsys.readouterr().err.splitlines()
    assert lines[0] == "captioner: b.jpg: b.txt exists and is kept: nothing tells that captioner wrote it"
    assert lines[1] == "captioner: gone0.jpg: there is no such file"
    assert len(lines) == 21
    assert more == "captioner: and 10 more not found"
    assert last == "captioner: sidecars: 3 written, 1 kept, 30 not found"
    assert hint == f"captioner: {HINT}"
    table = make(Path("t.csv"), RECORDS)
    assert run_apply(table, ours=lambda path, output: None) == 0  # with a journal, which says the truth
    assert capsys.readouterr().err.splitlines() == [
        "captioner: b.jpg: b.txt exists and is kept: captioner did not write it, or it was edited since",
        "captioner: sidecars: 0 written, 3 as they were, 1 kept",
    ]
    make(Path("t.csv"), [record("a.jpg", ""), RECORDS[0] | {"path": "s3://b/a.jpg"}])
    assert run_apply(table) == 0
    assert "--journal" not in capsys.readouterr().err  # it would not help


def test_a_full_disk_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from captioner import files

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        list(apply_table(make(Path("t.csv"))))
    assert not list(folder.glob("*.txt"))


def test_alt_text_is_applied(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("exiv2")
    from captioner.batch.metadata import AltText, read_alt_text

    AltText().plan("a.jpg", RECORDS[0]).write()
    AltText().plan("b.jpg", record("b.jpg", "Mia")).write()  # as if a person had written it
    table = edit(make(Path("t.csv")), rename)
    assert run_apply(table, alt_text=True) == 0
    assert [read_alt_text(name) for name in ("a.jpg", "b.jpg", "c.jpg")] == ["Rex, our dog", "Mia", "a cow"]
    assert not list(folder.glob("*.txt"))
    assert capsys.readouterr().err.splitlines() == [
        "captioner: b.jpg: it has an alt text that is kept",
        "captioner: clip.mp4: there is no alt text: videos have no place for it",
        "captioner: alt-text: 2 written, 2 kept",
        f"captioner: {HINT}",
    ]
    with pytest.raises(ApplyError, match="never replaced"):
        apply_table(table, to="alt-text", existing="overwrite")
    with pytest.raises(ApplyError, match="are for sidecars"):
        apply_table(table, to="alt-text", before="x")


def test_mistakes_are_told_before_anything_is_written(folder: Path) -> None:
    table = make(Path("t.csv"))
    with pytest.raises(ApplyError, match=r"t\.csv: no column text; there are path, caption, confidence"):
        apply_table(table, column="text")
    (folder / "n.csv").write_text("caption,name\na dog,x\n")
    with pytest.raises(ApplyError, match=r"n\.csv: no column path; there are caption, name"):
        apply_table(folder / "n.csv")
    with pytest.raises(ApplyError, match="to sidecars or alt-text, not to 'exif'"):
        apply_table(table, to="exif")
    with pytest.raises(SidecarError, match="existing must be one of"):
        apply_table(table, existing="merge")
    with pytest.raises(TableError, match=r"nowhere\.csv"):
        apply_table(folder / "nowhere.csv")
    table.write_bytes(table.read_text().encode("utf-16"))
    with pytest.raises(TableError, match="UTF-16; save it as UTF-8"):
        apply_table(table)


def test_it_brings_no_torch() -> None:
    code = "import sys, captioner.batch.apply; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
