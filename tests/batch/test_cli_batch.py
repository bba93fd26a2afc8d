from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Outcome, Run, launch, run_here, save, save_lively, the_caption, without_seconds
from PIL import Image

from captioner import Captioner
from captioner.batch import CaptionError, caption_records
from captioner.batch.journal import Journal
from captioner.batch.tables import COLUMNS, image_id


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lively(tmp_path_factory.mktemp("model") / "lively.safetensors")


@pytest.fixture
def run(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    """Run ``captioner ARGUMENTS`` in a folder where ``p`` holds 000001.png to 000006.png and a bad.jpg."""
    found = run_here(model, capsys, monkeypatch, tmp_path)
    Path("p").mkdir()
    for number in range(1, 7):
        save(f"p/{number:06}.png", number)
    Path("p/bad.jpg").write_text("no picture")
    return found


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def said(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return paths and captions, which do not depend on what goes through the network together."""
    return [(record["path"], record["caption"]) for record in records]


def plain(run: Run, *options: object) -> list[dict[str, Any]]:
    return [without_seconds(record) for record in run("caption", "p", "--json", *options).records]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json"])
def test_outputs(run: Run, suffix: str) -> None:
    expected = {record["path"]: record for record in plain(run)}
    outcome = run("caption", "p", "--output", f"out{suffix}")
    assert outcome.code == 0
    assert outcome.out == ""
    assert any(line.startswith("p/bad.jpg: this is not a picture") for line in outcome.complaints)
    assert "captioned 6 files; 1 file could not be: see out.errors.jsonl" in outcome.complaints
    assert [record["path"] for record in read("out.errors.jsonl")] == ["p/bad.jpg"]
    if suffix == ".jsonl":
        assert {record["path"]: without_seconds(record) for record in read("out.jsonl")} == expected
        return
    good = {path: record["caption"] for path, record in expected.items() if record["caption"]}
    if suffix == ".json":
        found = json.loads(Path("out.json").read_text())
        assert {record["image_id"]: record["caption"] for record in found} == {
            image_id(path): caption for path, caption in good.items()
        }
        assert {record["image_id"] for record in found} == set(range(1, 7))
        return
    if suffix == ".csv":
        with open("out.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert json.loads(rows[0]["words"]) == expected[rows[0]["path"]]["words"]
        printed = list(csv.DictReader(io.StringIO(run("caption", "p", "--csv").out, newline="")))
        for row in (*rows, *printed):
            del row["seconds"]
        assert rows == printed
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table("out.parquet")
        assert tuple(table.column_names) == COLUMNS
        rows = table.to_pylist()
        assert rows[0]["finished"] in (True, False)
        assert rows[0]["confidence"] == expected[rows[0]["path"]]["confidence"]
    assert {row["path"]: row["caption"] for row in rows if row["caption"]} == good


def test_strictness_and_exit_codes(run: Run) -> None:
    assert run("caption", "p", "-o", "a.jsonl").code == 0
    assert run("caption", "p", "-o", "a.jsonl", "--strict").code == 1
    assert run("caption", "p/bad.jpg", "-o", "b.jsonl").code == 2
    assert run("caption", "gone", "p", "-o", "c.jsonl", "--strict").code == 1
    Path("p/bad.jpg").unlink()
    assert run("caption", "p", "-o", "a.jsonl", "--strict").code == 0


MISTAKES = {
    "--output out.txt": "--output out.txt: expected a name that ends in .jsonl, .csv, .parquet, or .json",
    "--output gone/out.csv": "--output gone/out.csv: there is no folder gone; make it first",
    "--output p": "--output p: expected a name that ends in",
    "--output o.jsonl --json": "--json does not go together with --output, which writes files of its own",
    "--sidecars --overlay maps": "--overlay does not go together with --sidecars",
    "--before x": "--before needs --sidecars",
    "--strict": "--strict is for a batch: give --output, --sidecars, --alt-text, --report or --watch too",
    "--min-confidence 0.5": "--min-confidence is for a batch",
    "--output o.jsonl --workers 2": "--workers needs --engine ray",
    "--output o.jsonl --srt a.srt": "--srt a.srt: in a batch, give --srt beside for a file next to each",
    "-o o.jsonl --poll": "--poll needs --watch",
    "--watch --engine ray": "--watch does not go together with --engine ray",
    "--report r.pdf": "--report r.pdf: expected a name that ends in .html",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes(run: Run, options: str) -> None:
    outcome = run("caption", "p", *options.split())
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert line.startswith(MISTAKES[options])


def test_two_pictures_that_want_the_same_file(run: Run) -> None:
    save("p/000001.jpg", 9)
    outcome = run("caption", "p", "--sidecars")
    assert outcome.code == 2
    assert any("000001.txt" in line for line in outcome.complaints)
    assert not list(Path("p").glob("*.txt"))
    outcome = run("caption", "p", "--output", "o.json")
    assert outcome.code == 2
    assert "would have the same COCO id" in outcome.complaints[0]
    assert not Path("o.json").exists()


def test_sidecars_alone(run: Run, model: Path) -> None:
    outcome = run("caption", "p", "--sidecars", "--before", "trigger, ", "--after", "!")
    assert outcome.code == 0
    caption = the_caption(model, "p/000001.png")
    assert Path("p/000001.txt").read_text() == f"trigger, {caption}!\n"
    assert sorted(os.listdir("p"))[0] == ".captioner.journal"
    assert "wrote text files beside 6 files" in outcome.complaints
    Path("p/000002.txt").write_text("edited")
    Path("p/bad.jpg").unlink()
    outcome = run("caption", "p", "--sidecars")  # without the trigger
    assert Path("p/000001.txt").read_text() == f"{caption}\n"
    assert Path("p/000002.txt").read_text() == "edited"
    assert any("p/000002.txt" in line for line in outcome.complaints)


def test_lists_tables_and_archives(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"p/{number:06}.png" for number in range(1, 4)]
    expected = {name: the_caption(model, name) for name in names}

    def captions(outcome: Outcome, output: str) -> dict[str, str]:
        assert outcome.code == 0, outcome.err
        return dict(said(read(output)))

    Path("list.csv").write_text("\ufeffid,photo\n" + "".join(f"1,{name}\n" for name in names))
    assert captions(run("caption", "list.csv", "--column", "photo", "-o", "a.jsonl"), "a.jsonl") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\0".join(names).encode())))
    assert captions(run("caption", "-", "-o", "b.jsonl"), "b.jsonl") == expected
    with tarfile.open("s.tar", "w") as archive:
        for name in names:
            archive.add(name)
    found = captions(run("caption", "s.tar", "-o", "c.jsonl"), "c.jsonl")
    assert found == {f"s.tar/{name}": caption for name, caption in expected.items()}
    assert "captioned 0 files; 3 files done before" in run("caption", "s.tar", "-o", "c.jsonl").complaints


def test_clips_in_a_batch(run: Run) -> None:
    pytest.importorskip("cv2")
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "green")]
    frames[0].save("p/clip.gif", save_all=True, append_images=frames[1:], duration=500)
    with tarfile.open("s.tar", "w") as archive:
        archive.add("p/clip.gif", "clip.gif")
    outcome = run("caption", "p", "s.tar", "-o", "o.jsonl", "--srt", "beside", "--report", "r.html")
    assert outcome.code == 0
    clips = {record["path"]: record for record in read("o.jsonl") if "segments" in record}
    assert clips.keys() == {"p/clip.gif", "s.tar/clip.gif"}
    assert clips["p/clip.gif"]["segments"] == clips["s.tar/clip.gif"]["segments"]
    assert Path("p/clip.srt").read_text().startswith("1\n00:00:00,000 --> ")
    assert not list(Path("p").glob("000*.srt"))


def test_options_change_the_identity(run: Run) -> None:
    run("caption", "p", "-o", "o.jsonl")
    first = read("o.jsonl")
    assert (
        "captioned 6 files; 1 file could not be: see o.errors.jsonl"
        in run("caption", "p", "-o", "o.jsonl", "--prefix", "two").complaints
    )
    assert all(record["caption"].startswith("two") for record in read("o.jsonl") if record["caption"])
    run("caption", "p", "-o", "o.jsonl", "--batch-size", 2)
    assert said(read("o.jsonl")) == said(first)


def test_zero_is_another_option_than_none(run: Run) -> None:
    run("caption", "p", "-o", "o.jsonl")
    outcome = run("caption", "p", "-o", "o.jsonl", "--length-penalty", 0)
    assert any(line.startswith("captioned 6 files") for line in outcome.complaints)


def test_another_bound_sorts_anew_and_says_so(run: Run) -> None:
    run("caption", "p", "-o", "o.jsonl")
    outcome = run("caption", "p", "-o", "o.jsonl", "--min-confidence", 1)
    assert "o.jsonl was sorted anew by --min-confidence 1.0" in outcome.complaints
    assert len(read("o.review.jsonl")) == 6
    outcome = run("caption", "p", "-o", "o.jsonl", "--min-confidence", 1)
    assert not any("sorted" in line for line in outcome.complaints)


def test_sampling_does_not_depend_on_where_a_run_was_stopped(run: Run) -> None:
    options = ("--sample", "--seed", 3)
    run("caption", "p", "-o", "a.jsonl", *options)
    run("caption", *[f"p/{number:06}.png" for number in (4, 2)], "-o", "b.jsonl", *options)
    run("caption", "p", "-o", "b.jsonl", *options)
    one, two = ({r["path"]: r["caption"] for r in read(f"{name}.jsonl")} for name in "ab")
    assert one == two


def test_a_report(run: Run) -> None:
    pytest.importorskip("imagehash")
    for name in ("000001.png", "again.png"):
        Image.radial_gradient("L").save(f"p/{name}")  # the others are noise
    outcome = run("caption", "p", "-o", "o.jsonl", "--report", "r.html")
    assert outcome.code == 0
    assert "r.html shows 8 files" in outcome.complaints
    assert any("look alike" in line for line in outcome.complaints), outcome.err
    assert {"alike": ["p/000001.png", "p/again.png"]} in read("r.alike.jsonl")
    text = Path("r.html").read_text()
    assert "p/000003.png" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_a_report_replaces_nothing_of_a_person(run: Run) -> None:
    pytest.importorskip("imagehash")
    for name, text in (("r.html", "<p>my page</p>"), ("q.alike.jsonl", '{"my": "list"}')):
        Path(name).write_text(text)
        outcome = run("caption", "p", "-o", "o.jsonl", "--report", f"{name[0]}.html")
        assert outcome.code == 2
        assert f"{name} exists and holds something else" in outcome.complaints[0]
        assert Path(name).read_text() == text


def test_a_report_of_what_was_captioned_before(run: Run) -> None:
    assert run("caption", "p", "-o", "o.jsonl", "--sidecars").code == 0
    before = Path("o.jsonl").read_text().splitlines()
    save("p/000009.png", 9)
    outcome = run("caption", "p", "-o", "o.jsonl", "--sidecars", "--report", "r.html")
    assert "captioned 1 file; 6 files done before; 6 files looked at once more for --report" in " ".join(
        outcome.complaints
    )
    records = Path("o.jsonl").read_text().splitlines()
    assert [line for line in before if "bad.jpg" not in line] == records[:6]
    with Journal(Path("o.jsonl.journal")) as journal:
        seen = {record["path"]: preview is not None for record, preview in journal.previews()}
        assert len([*journal.likenesses()]) == 7
    assert seen == {path: path != "p/bad.jpg" for path in seen}
    assert len(seen) == 8
    for options in (["--report", "r.html"], [], ["--report", "r.html"]):
        outcome = run("caption", "p", "-o", "o.jsonl", "--sidecars", *options)
        assert "captioned 0 files; 7 files done before; 1 file could not be" in " ".join(outcome.complaints)


def test_nothing_to_do_takes_no_torch(run: Run, model: Path) -> None:
    Path("p/bad.jpg").unlink()
    run("caption", "p", "-o", "o.jsonl", "-m", model)
    code = (
        "import sys\n"
        f"sys.argv = ['captioner', 'caption', 'p', '-o', 'o.jsonl', '-m', {str(model)!r}]\n"
        "from captioner.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules)\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.stderr == "captioner: captioned 0 files; 6 files done before\n"
    assert done.stdout == "False\n"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_what_is_in_work(tmp_path: Path, model: Path, kind: signal.Signals) -> None:
    (tmp_path / "p").mkdir()
    picture = tmp_path / "picture.png"
    save(picture)
    for number in range(3000):
        os.link(picture, tmp_path / "p" / f"{number}.png")
    command = ("caption", "p", "-o", "o.jsonl", "-m", model, "--batch-size", 4, "--threads", 1)
    process = launch(*command, cwd=tmp_path)
    table = tmp_path / "o.jsonl"
    deadline = time.monotonic() + 120
    while not (table.exists() and table.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(kind)
    _, err = process.communicate(timeout=120)
    lines = err.decode().splitlines()
    assert process.returncode == (130 if kind == signal.SIGINT else 143), lines
    assert lines[0] == "captioner: finishing what is in work; once more stops at once"
    assert lines[-1] == "captioner: interrupted; the same command goes on where it was"
    captioned = len(read(str(table)))
    assert 0 < captioned < 3000
    assert f"captioner: captioned {captioned:,} files" in lines


def test_a_signal_ends_waiting_for_names(tmp_path: Path, model: Path) -> None:
    save(tmp_path / "1.png", 1)
    process = launch("caption", "-", "-o", "o.jsonl", "-m", model, cwd=tmp_path, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"1.png\n")
    process.stdin.flush()
    journal = tmp_path / "o.jsonl.journal"
    deadline = time.monotonic() + 60
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr is not None
    assert b"Fatal" not in process.stderr.read()


def test_workers_that_are_lost_stop_a_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from captioner.batch import command
    from captioner.batch.on_devices import DeviceError

    engine = command.local_engine

    def lost(*arguments: Any, **options: Any) -> Any:
        def give(sources: Any) -> Any:
            for number, finished in enumerate(engine(*arguments, **options)(sources)):
                if number == after:
                    raise DeviceError("cpu: gone")
                yield finished

        return give

    monkeypatch.setattr(command, "local_engine", lost)
    after = 0
    outcome = run("caption", "p", "-o", "o.parquet")
    assert (outcome.code, outcome.complaints) == (2, ["cpu: gone"])
    after = 3
    outcome = run("caption", "p", "-o", "o.parquet")
    assert outcome.code == 3
    assert (
        "stopped: cpu: gone; what was captioned is kept, and the same command goes on" in outcome.complaints
    )
    assert Path("o.parquet").exists()


@pytest.mark.parametrize("options", [[], ["--poll"]])
def test_watching(tmp_path: Path, model: Path, options: list[str]) -> None:
    pytest.importorskip("watchfiles")
    (tmp_path / "p").mkdir()
    save(tmp_path / "p" / "1.png", 1)
    process = launch(
        "caption", "p", "-o", "o.jsonl", "-m", model, "--watch", *options, "--sidecars", cwd=tmp_path
    )
    table = tmp_path / "o.jsonl"

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if table.exists() and len(table.read_text().splitlines()) == count:
                return
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        pytest.fail(f"{count} records did not come")

    try:
        wait_for(1)
        save(tmp_path / "p" / "2.png", 2)
        wait_for(2)
        save(tmp_path / "p" / "1.png", 9)  # another picture
        save(tmp_path / "p" / "3.png", 3)
        wait_for(3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "captioner: captioned 4 files" in err.decode()
    assert sorted(path.name for path in (tmp_path / "p").glob("*.txt")) == ["1.txt", "2.txt", "3.txt"]


def test_a_watched_folder_that_goes_away(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "p").mkdir()
    os.utime(save(tmp_path / "p" / "1.png", 1), (1e9, 1e9))  # so that it is not waited for
    process = launch("caption", "p", "-o", "o.parquet", "-m", model, "--watch", "--poll", cwd=tmp_path)
    assert process.stderr is not None
    said = iter(process.stderr.readline, b"")
    assert any(b"watching p" in line for line in said)
    shutil.rmtree(tmp_path / "p")
    rest = process.stderr.read().decode()
    assert process.wait(timeout=60) == 3, rest
    assert "captioner: stopped: p" in rest
    assert (tmp_path / "o.parquet").stat().st_size


# --------------------------------------------------------------------------------------------------
# from Python


def test_records(run: Run, model: Path) -> None:
    captioner = Captioner.load(model, device="cpu")
    expected = plain(run)
    assert [without_seconds(r) for r in caption_records("p", captioner=captioner)] == expected
    skipped = list(caption_records(["p", "gone"], captioner=captioner, errors="skip"))
    assert [without_seconds(r) for r in skipped] == [r for r in expected if r["error"] is None]
    (gone,) = (r for r in caption_records(["p", "gone"], captioner=captioner) if r["path"] == "gone")
    assert gone["error"].startswith("gone: there is no such file")
    with pytest.raises(CaptionError, match=r"p/bad\.jpg: this is not a picture"):
        list(caption_records("p", captioner=captioner, errors="raise"))
    with pytest.raises(ValueError, match="errors must be one of record, skip, raise, not 'ignore'"):
        caption_records("p", errors="ignore")


def test_records_that_are_kept(run: Run, model: Path) -> None:
    captioner = Captioner.load(model, device="cpu")
    records = caption_records("p", captioner=captioner, output="o.jsonl", batch_size=1)
    first = next(records)
    records.close()  # type: ignore[attr-defined]
    assert first["path"] in [record["path"] for record in read("o.jsonl")]
    rest = list(caption_records("p", captioner=captioner, output="o.jsonl"))
    assert first["path"] not in [record["path"] for record in rest]
    assert said(read("o.jsonl")) == said(plain(run))


def test_the_command_line_and_python_go_on_with_each_others_work(run: Run, model: Path) -> None:
    captioner = Captioner.load(model, device="cpu")
    Path("p/bad.jpg").unlink()
    run("caption", "p", "-o", "o.jsonl", "--prefix", "two", "--beam", 2)
    assert list(caption_records("p", captioner=captioner, output="o.jsonl", prefix="two", beam=2)) == []
    assert len(list(caption_records("p", captioner=captioner, output="o.jsonl", prefix="two"))) == 6


def test_apply(run: Run, model: Path) -> None:
    Path("p/bad.jpg").unlink()
    run("caption", "p", "-o", "o.csv", "--sidecars")
    with open("o.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0]["caption"] = "edited"
    Path("p/000002.txt").write_text("by hand")
    with open("o.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    outcome = run("apply", "o.csv", "--dry-run")
    assert outcome.code == 0
    assert "1 to be written" in outcome.complaints[-1]
    assert run("apply", "o.csv").code == 0
    assert Path("p/000001.txt").read_text() == "edited\n"
    assert Path("p/000002.txt").read_text() == "by hand"
    run("caption", "p", "-o", "o.csv", "--sidecars")
    assert Path("p/000001.txt").read_text() == "edited\n"  # nothing takes it back
    outcome = run("apply", "gone.csv")
    assert outcome.code == 2
    assert "gone.csv" in outcome.complaints[0]


def test_apply_keeps_the_words_around_captions(run: Run) -> None:
    run("caption", "p", "-o", "o.csv", "--sidecars", "--before", "mine, ")
    path, caption, _ = Path("o.csv").read_text().splitlines()[1].split(",", 2)
    Path("o.csv").write_text(Path("o.csv").read_text().replace(f"{path},{caption}", f"{path},edited", 1))
    assert run("apply", "o.csv").code == 0
    said = {path.read_text() for path in Path("p").glob("*.txt")}
    assert "mine, edited\n" in said
    assert all(text.startswith("mine, ") for text in said)


def test_nothing_to_caption_leaves_nothing_behind(run: Run) -> None:
    Path("empty").mkdir()
    for inputs in (["gone"], ["empty"], ["gone", "empty"]):
        outcome = run("caption", *inputs, "-o", "x.jsonl")
        assert outcome.code == 2
        for name in inputs:
            assert any(line.startswith(f"{name}: ") for line in outcome.complaints)
        assert not list(Path().glob("x.jsonl*"))
    outcome = run("caption", "p", "-o", "x.jsonl", "--beam", 2, "--must", "notaword")
    assert outcome.code == 2
    assert len(outcome.complaints) == 1
    assert not list(Path().glob("x.jsonl*"))


def test_many_errors_are_summed_up(run: Run) -> None:
    for number in range(25):
        Path(f"p/{number}.jpg").write_text("no picture")
    outcome = run("caption", "p", "-o", "x.jsonl")
    assert outcome.code == 0
    lines = outcome.complaints
    assert sum(line.startswith("p/") for line in lines) == 20
    assert "further errors: see x.errors.jsonl" in lines
    assert lines[-1].startswith("26 x this is not a picture")
    assert len(read("x.errors.jsonl")) == 26
