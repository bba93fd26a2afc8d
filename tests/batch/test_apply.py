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
        "b.jpg: b.txt exists and is kept: captioner did not write it, or it was edited since"
    ]
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
    *lines, more, last = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("captioner: b.jpg: b.txt exists and is kept")
    assert lines[1] == "captioner: gone0.jpg: there is no such file"
    assert len(lines) == 21
    assert more == "captioner: and 10 more not found"
    assert last == "captioner: sidecars: 3 written, 1 kept, 30 not found"


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
