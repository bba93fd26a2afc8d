from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch.killed_run import caption_of

from captioner.batch import run as runs
from captioner.batch.journal import Journal, JournalError
from captioner.batch.run import Finished, Run, Stopped
from captioner.batch.sidecars import Sidecars
from captioner.batch.sources import Missing, Source, find_sources
from captioner.batch.tables import TableFormatError

SCRIPT = Path(__file__).with_name("killed_run.py")


class Texts:
    """An engine that captions files by their content, and notes which."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, sources: Iterable[Source]) -> Iterator[Finished]:
        for source in sources:
            assert source.file is not None
            self.seen.append(Path(source.path).name)
            yield Finished({"path": source.path, **caption_of(Path(source.file).read_bytes())})


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files 1.jpg to 5.jpg, "pic 1" and so on, in the folder ``p`` of the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for number in range(1, 6):
        Path("p", f"{number}.jpg").write_text(f"pic {number}")
    return Path("p")


def go(
    inputs: Any = "p",
    output: str | None = "out.jsonl",
    identity: str = "tiny",
    stop_after: int = 0,
    errors: str | None = None,
    engine: Texts | None = None,
    **options: Any,
) -> tuple[list[str], Run]:
    """Run, and return the names that were captioned."""
    engine = engine or Texts()
    with Journal(Path(f"{output}.journal")) as journal:
        run = Run(
            journal,
            identity,
            output=None if output is None else Path(output),
            errors=None if errors is None else Path(errors),
            **options,
        )
        for number, _ in enumerate(run.run(find_sources(inputs), lambda: engine), 1):
            if number == stop_after:
                break
        run.finish()
    return engine.seen, run


def records(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def captions(path: str = "out.jsonl") -> dict[str, str]:
    found = records(path)
    assert len({record["path"] for record in found}) == len(found)
    return {Path(record["path"]).name: record["caption"] for record in found}


ALL = {f"{n}.jpg": f"a pic {n}" for n in range(1, 6)}


@pytest.mark.parametrize(
    "kind", [".jsonl", ".csv", ".parquet", ".json", "txt", "alt-text", "subtitles", "report"]
)
@pytest.mark.parametrize(
    ("stride", "rounds"), [(5, 2), pytest.param(1, 8, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_killed_at_every_step(tmp_path: Path, kind: str, stride: int, rounds: int) -> None:
    if kind == ".parquet":
        pytest.importorskip("pyarrow")
    if kind == "alt-text":
        pytest.importorskip("exiv2")
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, kind, str(stride), str(rounds)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    steps, kills = map(int, done.stdout.split())
    assert steps >= 35 // stride
    assert kills >= rounds  # some moments come after the end


def test_nothing_is_done_twice(pictures: Path) -> None:
    assert go()[0] == sorted(ALL)
    assert captions() == ALL
    written = Path("out.jsonl").stat().st_mtime_ns
    seen, run = go()
    assert seen == []
    assert run.counts.skipped == 5
    assert Path("out.jsonl").stat().st_mtime_ns == written
    (pictures / "6.jpg").write_text("pic 6")
    assert go()[0] == ["6.jpg"]
    assert captions() == {**ALL, "6.jpg": "a pic 6"}


def test_whoever_stops_early_keeps_what_was_captioned(pictures: Path) -> None:
    first, _ = go(stop_after=2)
    assert set(captions()) == set(first) == {"1.jpg", "2.jpg"}
    assert go()[0] == ["3.jpg", "4.jpg", "5.jpg"]
    assert captions() == ALL


def test_changed_files_are_captioned_anew(pictures: Path) -> None:
    go()
    (pictures / "2.jpg").write_text("changed")
    assert go()[0] == ["2.jpg"]
    assert captions() == {**ALL, "2.jpg": "a changed"}
    assert [Path(record["path"]).name for record in records()] == sorted(ALL)  # it kept its place


def test_times_and_checksums(pictures: Path) -> None:
    go(use_checksum=True)
    os.utime(pictures / "1.jpg", ns=(1, 1))
    before = (pictures / "2.jpg").stat()
    (pictures / "2.jpg").write_text("PIC 2")  # the same size
    os.utime(pictures / "2.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert go(use_checksum=True)[0] == ["2.jpg"]
    assert go(use_checksum=True)[0] == []
    assert go()[0] == []  # the new time of 1.jpg was noted
    os.utime(pictures / "1.jpg", ns=(2, 2))
    assert go()[0] == ["1.jpg"]


def test_another_model_captions_anew(pictures: Path) -> None:
    go()
    assert go(identity="other")[0] == sorted(ALL)
    assert captions() == ALL
    assert go(identity="other")[0] == []


def test_failures_are_tried_again(pictures: Path) -> None:
    (pictures / "3.jpg").write_text("bad")
    _, run = go(errors="errors.jsonl")
    assert run.counts.failed == 1
    (error,) = records("errors.jsonl")
    assert error == {"path": str(pictures / "3.jpg"), "error": "damaged"}
    assert captions()["3.jpg"] == ""
    assert go()[0] == ["3.jpg"]
    (pictures / "3.jpg").write_text("pic 3")
    assert go(errors="errors.jsonl")[0] == ["3.jpg"]
    assert captions() == ALL
    assert not Path("errors.jsonl").exists()


def test_what_is_missing_is_told(pictures: Path) -> None:
    with Journal(Path("journal")) as journal:
        run = Run(journal, "tiny", errors=Path("errors.jsonl"))
        found = [Missing("gone/", "gone/: there is no such folder"), *find_sources("p")]
        assert len(list(run.run(found, Texts))) == 5
        run.finish()
    assert records("errors.jsonl") == [{"path": "gone/", "error": "gone/: there is no such folder"}]
    assert run.counts.missing == [("gone/", "gone/: there is no such folder")]


def test_doubtful_captions_go_to_a_file_of_their_own(pictures: Path) -> None:
    (pictures / "2.jpg").write_text("doubt")
    _, run = go(min_confidence=0.5, beside={"sidecar": Sidecars()})
    assert run.counts.doubtful == 1
    assert captions("out.review.jsonl") == {"2.jpg": "a doubt"}
    assert set(captions()) == {"1.jpg", "3.jpg", "4.jpg", "5.jpg"}
    assert not (pictures / "2.txt").exists()
    assert (pictures / "1.txt").read_text() == "a pic 1\n"
    # another bound moves it, and nothing is captioned for that
    assert go(beside={"sidecar": Sidecars()})[0] == []
    assert not Path("out.review.jsonl").exists()
    assert len(captions()) == 5
    assert (pictures / "2.txt").read_text() == "a doubt\n"


def test_what_is_wanted_beside_files_later_is_written_later(pictures: Path) -> None:
    go()
    (pictures / "1.txt").write_text("mine")
    seen, run = go(beside={"sidecar": Sidecars()})
    assert seen == []
    assert [path for path, _ in run.counts.kept] == [str(pictures / "1.jpg")]
    assert (pictures / "1.txt").read_text() == "mine"
    assert (pictures / "2.txt").read_text() == "a pic 2\n"
    _, run = go(beside={"sidecar": Sidecars("overwrite")})
    assert not run.counts.kept
    assert (pictures / "1.txt").read_text() == "a pic 1\n"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json"])
def test_an_edited_table_is_moved_aside(pictures: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    output = Path(f"out{suffix}")
    go(output=str(output))
    edited = output.read_bytes() + b"\n"
    output.write_bytes(edited)
    go(output=str(output))
    assert output.read_bytes() == edited  # there was nothing to write
    (pictures / "6.jpg").write_text("pic 6")
    _, run = go(output=str(output))
    aside = Path(f"out.edited-1{suffix}")
    assert aside.read_bytes() == edited
    assert run.ledgers[0].moved == aside
    go(output=str(output))
    assert not Path(f"out.edited-2{suffix}").exists()


def test_a_table_that_is_gone_is_written_again(pictures: Path) -> None:
    go()
    Path("out.jsonl").unlink()
    assert go()[0] == []
    assert captions() == ALL


@pytest.mark.parametrize("change", ["edit", "replace", "delete", "append"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_table_that_is_changed_during_the_run(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, change: str
) -> None:
    output = Path(f"out{suffix}")
    go(output="whole" + suffix)
    monkeypatch.setattr(runs, "COMMIT_FILES", 1)

    class Meddled(Texts):
        def __call__(self, sources: Iterable[Source]) -> Iterator[Finished]:
            for number, finished in enumerate(super().__call__(sources)):
                if number == 3:
                    if change == "append":
                        with output.open("ab") as file:
                            file.write(b"mine")
                    elif change == "edit":
                        output.write_bytes(b"mine")
                    else:
                        output.unlink()
                    if change == "replace":
                        output.write_bytes(b"mine")
                yield finished

    _, run = go(output=str(output), engine=Meddled())
    assert output.read_bytes() == Path(f"whole{suffix}").read_bytes()
    assert (run.ledgers[0].moved is None) == (change == "delete")
    if change != "delete":
        assert b"mine" in Path(f"out.edited-1{suffix}").read_bytes()


def test_what_fails_as_before_changes_no_table(pictures: Path) -> None:
    (pictures / "0.jpg").write_text("bad")
    go(errors="out.errors.jsonl")
    edited = Path("out.jsonl").read_bytes().replace(b"pic 1", b"my 1")
    Path("out.jsonl").write_bytes(edited)
    seen, run = go(errors="out.errors.jsonl")
    assert seen == ["0.jpg"]
    assert (run.counts.failed, run.counts.skipped) == (1, 5)
    assert Path("out.jsonl").read_bytes() == edited
    assert len(records("out.errors.jsonl")) == 1


class Looking(Texts):
    """Gives a preview of each file; what has gone bad fails."""

    def __call__(self, sources: Iterable[Source]) -> Iterator[Finished]:
        for finished in super().__call__(sources):
            yield replace(finished, preview=b"P")


def test_a_later_look_takes_no_caption_away(pictures: Path) -> None:
    times = [(path, path.stat().st_mtime_ns) for path in pictures.iterdir()]
    go()
    table = Path("out.jsonl").read_bytes()
    for path, time_ in times:  # a server that does not answer, say: nothing tells of a change
        path.write_text("bad 11"[: path.stat().st_size])
        os.utime(path, ns=(time_, time_))
    _, run = go(engine=Looking(), looks=True)
    assert (run.counts.skipped, run.counts.failed, run.counts.looked) == (5, 0, 0)
    assert Path("out.jsonl").read_bytes() == table
    for number, (path, time_) in enumerate(sorted(times), 1):
        path.write_text(f"pic {number}")
        os.utime(path, ns=(time_, time_))
    _, run = go(engine=Looking(), looks=True)
    assert run.counts.looked == 5
    assert Path("out.jsonl").read_bytes() == table


def test_lists_are_known_by_their_first_line(tmp_path: Path) -> None:
    place = tmp_path / "a.jsonl"
    assert runs.is_list_of(["alike"], place)
    for text, ours in (
        ("", True),
        (json.dumps({"alike": ["x" * 100] * 30_000}), True),
        ('{"alike": [], "more": 1}', False),
        ("[]", False),
        ("1", False),
        ("\0", False),
    ):
        place.write_text(text)
        assert runs.is_list_of(["alike"], place) == ours, text[:50]


def test_a_list_of_errors_replaces_nothing_of_a_person(pictures: Path) -> None:
    mine = Path("out.errors.jsonl")
    mine.write_text('{"my": "own"}\n')
    with pytest.raises(TableFormatError, match=r"^out\.errors\.jsonl: .* holds something else"):
        go(errors=str(mine))
    mine.write_text('{"path": "a.jpg", "error": "of another run"}\n')
    go(errors=str(mine))
    assert mine.exists()  # there was no error, and it is not ours
    (pictures / "0.jpg").write_text("bad")
    go(errors=str(mine))
    assert [record["path"] for record in records(str(mine))] == [str(pictures / "0.jpg")]
    (pictures / "0.jpg").write_text("good")
    go(errors=str(mine))
    assert not mine.exists()


def test_a_picture_that_was_moved_keeps_its_coco_id(pictures: Path) -> None:
    go(output="out.json")
    Path("q").mkdir()
    (pictures / "3.jpg").rename("q/3.jpg")
    go(["p", "q"], output="out.json")
    found = json.loads(Path("out.json").read_text())
    assert {record["image_id"]: record["caption"] for record in found} == {
        n: f"a pic {n}" for n in range(1, 6)
    }
    Path("p/3.jpg").write_text("pic 3, too")
    with pytest.raises(TableFormatError, match=r"q/3\.jpg have the same COCO id 3; .* begin anew"):
        go(["p", "q"], output="out.json")


def test_a_link_as_output_stays_one(pictures: Path) -> None:
    Path("far").mkdir()
    Path("out.json").symlink_to("far/real.json")
    go(output="out.json")
    assert Path("out.json").is_symlink()
    assert len(json.loads(Path("far/real.json").read_text())) == 5


def test_a_file_of_somebody_else_is_not_replaced(pictures: Path) -> None:
    Path("out.jsonl").write_text("mine\n")
    with pytest.raises(TableFormatError, match=r"^out\.jsonl: this file exists, and out\.jsonl\."):
        go()
    assert Path("out.jsonl").read_text() == "mine\n"


def test_two_runs_at_once(pictures: Path) -> None:
    with Journal(Path("j")), pytest.raises(JournalError, match="j: another run is at work here"):
        Journal(Path("j"))


@pytest.mark.parametrize("content", [b"no journal", b"SQLite format 3\0" + b"\1" * 200])
def test_what_is_no_journal(pictures: Path, content: bytes) -> None:
    Path("j").write_bytes(content * 100)
    with pytest.raises(JournalError, match="j: this is no journal of captioner"):
        Journal(Path("j"))
    assert Path("j").read_bytes() == content * 100


def test_formulas_and_strange_names(pictures: Path) -> None:
    names = ["=cmd|' ' !A0.jpg", "+1.jpg", "@SUM.jpg", 'quo"te,\n.jpg', "<b>.jpg", "\udcff.jpg"]
    for name in names:
        Path("p", name).write_text("=1+1")
    os.chdir("p")
    go(inputs=[f"{name}" for name in names], output="../o.csv")
    with open("../o.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(names)
    assert all(row["path"][0] not in "=+-@" for row in rows)
    assert rows[0]["path"] == f"'{names[0]}"
    assert rows[3]["path"] == names[3]


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from batch.test_run import Texts
from captioner.batch.journal import Journal
from captioner.batch.run import Run, Stopped
from captioner.batch.sources import find_sources
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Journal(Path("out.jsonl.journal")) as journal:
    run = Run(journal, "tiny", output=Path("out.jsonl"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    try:
        for _ in run.run(find_sources("p"), Texts):
            pass
        run.finish()
    except Stopped as stop:
        print(stop)
"""


@pytest.mark.parametrize("room", [50_000, 250_000])
def test_a_full_disk(pictures: Path, room: int) -> None:
    for number in range(1000):
        Path("p", f"x{number:03}.jpg").write_text(f"pic {number} {os.urandom(20).hex()}")
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", FULL, root, str(Path(root).parent), str(room)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out.jsonl"), done.stdout  # the table, or its journal
    assert len(done.stdout.splitlines()) == 1
    if Path("out.jsonl").exists():
        assert all(record["caption"] for record in records())
    _, run = go()
    assert run.counts.failed == 0
    assert len(captions()) == 1005
    assert 0 < run.counts.skipped < 1005 or room == 50_000


def test_a_stopped_run_says_where(pictures: Path) -> None:
    with Journal(Path("j")) as journal:
        run = Run(journal, "tiny", output=Path("out.jsonl"))
        Path("out.jsonl").mkdir()
        with pytest.raises(Stopped, match=r"^out\.jsonl: Is a directory"):
            list(run.run(find_sources("p"), Texts))
