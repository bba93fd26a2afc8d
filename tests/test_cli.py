from __future__ import annotations

import csv
import io
import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import gradio.media
import numpy as np
import pytest
import torch
from cli_runs import Run, launch, modules_after, run_here, save, save_lively, the_caption, without_seconds
from conftest import make_header
from lively import make_calibration, make_lively_model, pictures
from PIL import Image

from captioner import Captioner, __version__, checkpoint, cli
from captioner.batch.tables import unguard


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lively(tmp_path_factory.mktemp("model") / "lively.safetensors")


@pytest.fixture
def run(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    """Run ``captioner ARGUMENTS`` in this process and an empty folder; with the lively model by default."""
    return run_here(model, capsys, monkeypatch, tmp_path)


# --------------------------------------------------------------------------------------------------
# What is printed


def test_one_photo(run: Run, model: Path) -> None:
    photo = gradio.media.get_image("cheetah1.jpg")
    outcome = run("caption", photo)
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.count("\n") == 1
    caption = Captioner.load(model, device="cpu").caption(photo)
    expected = caption.text if caption.sure else f"(not sure what this shows; a guess: {caption.text})"
    assert outcome.out == f"{expected}\n"


def test_several_photos(run: Run, tmp_path: Path) -> None:
    for i, name in enumerate("abc"):
        save(f"{name}.png", i)
    outcome = run("caption", "c.png", "a.png", "./b.png")
    assert [line.split(": ")[0] for line in outcome.out.splitlines()] == ["c.png", "a.png", "./b.png"]
    # a folder of one photo does not say which, so the line does
    (tmp_path / "folder").mkdir()
    save("folder/d.png")
    assert run("caption", "folder").out.startswith(f"folder{os.sep}d.png: ")


def test_unsure_and_sure(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = save("a.png")
    text = the_caption(model, photo)
    monkeypatch.setattr("captioner.caption.SURE", 1.1)
    assert run("caption", photo).out == f"(not sure what this shows; a guess: {text})\n"
    monkeypatch.setattr("captioner.caption.SURE", 0)
    assert run("caption", photo).out == f"{text}\n"


def test_json(run: Run, model: Path) -> None:
    save("a.png"), save("b.png", 1)
    outcome = run("caption", "a.png", "gone.png", "b.png", "--json", "--n-best", 2)
    assert outcome.code == 1
    first, failed, second = outcome.records
    assert (first["path"], second["path"], failed["path"]) == ("a.png", "b.png", "gone.png")
    assert first["caption"] == the_caption(model, "a.png")
    assert first["error"] is None
    assert first["model"] == "lively"
    assert " ".join(word["word"] for word in first["words"]) == first["caption"]
    assert 0 < first["words"][0]["probability"] <= 1
    assert {"word", "probability"} == first["words"][0]["alternatives"][0].keys()
    assert "attention" not in first["words"][0]
    assert len(first["n_best"]) == 2
    assert failed["caption"] == ""
    assert failed["error"] == outcome.complaints[0] == "gone.png: there is no such file; check the path"


def test_json_with_attention(run: Run) -> None:
    save("a.png")
    word = run("caption", "a.png", "--json", "--attention").records[0]["words"][0]
    assert np.shape(word["attention"]) == (1, 2, 2)
    assert np.sum(word["attention"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [("gone.png",), ("*.xyz",), ("gone.png", "--must", "zebra"), ("gone.png", "-m", "gone.safetensors")],
)
def test_json_is_an_array_whatever_happens(arguments: tuple[str, ...], run: Run) -> None:
    outcome = run("caption", *arguments, "--json")
    assert outcome.code == 2
    assert isinstance(outcome.records, list)
    assert all(record["caption"] == "" and record["error"] for record in outcome.records)
    assert len(outcome.complaints) == 1


def test_jsonl(run: Run) -> None:
    save("a.png"), save("b.png", 1)
    lines = run("caption", "a.png", "b.png", "--jsonl").out.splitlines()
    records = run("caption", "a.png", "b.png", "--json").timeless
    assert [without_seconds(json.loads(line)) for line in lines] == records


def test_csv(run: Run) -> None:
    save("a.png"), save('with "quotes", commas\nand\rlines.png', 1)
    Path("bad.png").touch()
    arguments = ("a.png", "bad.png", 'with "quotes", commas\nand\rlines.png', "--n-best", 2)
    outcome = run("caption", *arguments, "--csv")
    rows = list(csv.DictReader(io.StringIO(outcome.out, newline="")))
    records = run("caption", *arguments, "--json").records
    assert len(rows) == 3
    for row, record in zip(rows, records, strict=True):
        assert row["path"] == record["path"]
        assert row["caption"] == record["caption"]
        assert row["error"] == (record["error"] or "")
        assert json.loads(row["words"] or "null") == record.get("words")
        assert json.loads(row["n_best"] or "null") == record.get("n_best")
        assert row["confidence"] == str(record.get("confidence", ""))
    assert outcome.out.startswith("path,caption,confidence,")
    assert "\r\n" not in outcome.out
    # a header even if there is nothing below it
    assert run("caption", "a.png", "--must", "zebra", "--csv").out.splitlines()[0].startswith("path,caption,")


def test_n_best_in_plain_text(run: Run) -> None:
    save("a.png")
    lines = run("caption", "a.png", "--n-best", 3).out.splitlines()
    assert [line[:5] for line in lines[1:]] == ["  2. ", "  3. "]


# --------------------------------------------------------------------------------------------------
# What is captioned


def test_folders_globs_and_names(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, name in enumerate(
        ("in/b.png", "in/a.jpg", "in/deep/c.webp", "in/notes.txt", "in/.hidden.png", "d.png")
    ):
        save(name, i)
    (tmp_path / "in" / "link.png").symlink_to("b.png")

    def names(*arguments: object) -> list[str]:
        return [record["path"] for record in run("caption", *arguments, "--json").records]

    assert names("in") == ["in/a.jpg", "in/b.png", "in/link.png"]
    assert names("in", "--recursive") == ["in/a.jpg", "in/b.png", "in/deep/c.webp", "in/link.png"]
    assert names("in/*.png", "d.png") == ["in/b.png", "in/link.png", "d.png"]
    assert names("**/*.png") == ["d.png", "in/b.png", "in/link.png"]
    assert names("in/notes.txt") == ["in/notes.txt"]  # asked for by name: the content counts
    # each photo once, as it was first called
    assert names("./d.png", "d.png", "in", "in/b.png", "./d.png") == [
        "./d.png",
        "in/a.jpg",
        "in/b.png",
        "in/link.png",
    ]


NAMES = [
    "-x.jpg",
    "--json",
    "new\nline.jpg",
    "tab\t and \x1b[31mred.jpg",
    "'quotes' \"double\".jpg",
    "日本 ünï.jpg",
    "l" * 250 + ".jpg",
    "[a].png",
    "..jpg",
]
if sys.platform == "linux":
    NAMES.append(os.fsdecode(b"not utf-8 \xff\xe9.jpg"))


def test_names_of_all_kinds(run: Run) -> None:
    for i, name in enumerate(NAMES):
        save(name, i)
    outcome = run("caption", "--json", "--overlay", "maps", "--", *NAMES)
    assert outcome.code == 0
    assert [record["path"] for record in outcome.records] == NAMES
    assert all(os.path.exists(record["path"]) for record in outcome.records)
    assert len(os.listdir("maps")) == len(NAMES)
    # in plain text a photo is a line, without control characters
    lines = run("caption", "--", *NAMES).out.splitlines()
    assert len(lines) == len(NAMES)
    assert lines[2].startswith("new\\nline.jpg: ")
    assert lines[3].startswith("tab\\t and \\x1b[31mred.jpg: ")
    assert "\x1b" not in "".join(lines)
    rows = list(csv.DictReader(io.StringIO(run("caption", "--csv", "--", *NAMES).out, newline="")))
    # a spreadsheet would take -x.jpg for a formula
    assert [unguard(row["path"]) for row in rows][:9] == NAMES[:9]


@pytest.mark.parametrize("kind", [[], ["--json"], ["--jsonl"], ["--csv"]])
def test_a_standard_output_of_ascii(kind: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names = NAMES[5:6] + NAMES[9:]
    for name in names:
        save(name)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    outcome = run("caption", *names, "--prefix", "ünï", *kind)
    assert outcome.code == 0
    text = raw.getvalue().decode("ascii")
    if kind == ["--json"]:
        assert [record["path"] for record in json.loads(text)] == names
        assert json.loads(text)[0]["caption"].startswith("ünï ")
    elif kind == ["--jsonl"]:
        assert [json.loads(line)["path"] for line in text.splitlines()] == names
    else:
        assert "\\xfcn\\xef" in text


def test_bad_files_get_a_line_each(run: Run, model: Path) -> None:
    save("good.png"), save("also good.png", 1)
    Path("empty.jpg").touch()
    Path("text.jpg").write_text("Dear picture, …", encoding="utf-8")
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:60])
    Path("folder").mkdir()
    Path("loop.jpg").symlink_to("loop.jpg")
    bomb = bytearray(Path("good.png").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    Path("bomb.png").write_bytes(bomb)
    names = [
        "good.png",
        "empty.jpg",
        "text.jpg",
        "cut.png",
        "folder",
        "bomb.png",
        "loop.jpg",
        "also good.png",
    ]
    outcome = run("caption", *names)
    assert outcome.code == 1
    assert [line.split(": ")[0] for line in outcome.out.splitlines()] == ["good.png", "also good.png"]
    assert the_caption(model, "good.png") in outcome.out.splitlines()[0]
    assert sorted(line.split(": ")[0] for line in outcome.complaints) == sorted(
        set(names) - {"good.png", "also good.png"}
    )
    for name, reason in (
        ("empty.jpg", "the file is empty"),
        ("text.jpg", "not a picture"),
        ("cut.png", "truncated"),
        ("folder", "no pictures or videos in this folder"),
        ("bomb.png", "million pixels"),
    ):
        assert any(line.startswith(name) and reason in line for line in outcome.complaints), name
    assert run("caption", *names[1:4]).code == 2  # nothing could be done


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give a photo, a video, a folder or a pattern"),
        (["a.png", "--must", "zebra"], "the required word 'zebra' is not in the model's vocabulary"),
        (["a.png", "--device", "warp"], "unknown device 'warp'"),
        (["a.png", "--region", "1,2,3"], "--region 1,2,3: expected four numbers"),
        (["a.png", "--region", "a,b,c,d"], "--region a,b,c,d: expected four numbers"),
        (["a.png", "--region", "0,0,nan,9"], "--region 0,0,nan,9: expected four numbers"),
        (["a.png", "--region", "9,9,3,12"], "--region 9,9,3,12: the box is empty"),
        (["a.png", "--region", "9000,0,9100,9"], "a.png: region 9000,0,9100,9 lies outside the photo"),
        (["a.png", "--beam", "0"], "--beam 0: expected 1 to 1000"),
        (["a.png", "--beam", "99999999"], "--beam 99999999: expected 1 to 1000"),
        (["a.png", "--batch-size", "0"], "--batch-size 0: expected 1 to 65536"),
        (["a.png", "--threads", "-1"], "--threads -1: expected 0 to 1024"),
        (["a.png", "--n-best", "4", "--beam", "2"], "n_best 4 needs a beam at least as wide"),
        (["a.png", "--min-length", "9", "--max-length", "2"], "min_length 9 is larger than max_length 2"),
        (["a.png", "--prefix", "a dog " * 9], "more than max_length 12"),
        (["a.png", "--sample", "--temperature", "0"], "temperature must be above 0"),
        (["a.png", "--sample", "--top-p", "7"], "top_p must be above 0 and at most 1"),
        (["a.png", "--temperature", "0.5"], "--temperature needs --sample"),
        (["a.png", "--top-k", "5"], "--top-k needs --sample"),
        (["a.png", "--json", "--csv"], "choose one of --json, --jsonl and --csv"),
        (["a.png", "--attention"], "--attention needs --json or --jsonl"),
        (["a.png", "--overlay-format", "svg"], "--overlay-format needs --overlay"),
        (["a.png", "--existing", "append"], "--existing needs --sidecars, or in a batch --srt or --vtt"),
        (["a.png", "--srt", "beside", "--existing", "overwrite"], "--existing needs --sidecars"),
        (["a.png", "-o", "o.csv", "--existing", "overwrite"], "--existing needs --sidecars"),
        (
            ["a.png", "-o", "o.csv", "--vtt", "beside", "--existing", "append"],
            "--existing append needs --sidecars; subtitles are kept or overwritten",
        ),
        (["a.png", "--overlay", "a.png"], "--overlay a.png: this is a file; give a folder"),
        (["a.png", "--overlay", "a.png/below"], "--overlay a.png/below: the folder cannot be made"),
        (["a.png", "--model", "gone.safetensors"], "gone.safetensors: no such checkpoint"),
        (["a.png", "--model", "a.png"], "a.png: damaged, or not a .safetensors file"),
        (["a.png", "--model", "."], ".: is a folder"),
    ],
)
def test_wrong_wishes_are_one_line(arguments: list[str], reason: str, run: Run) -> None:
    save("a.png")
    outcome = run("caption", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.complaints) == 1
    assert outcome.complaints[0].startswith(reason) or reason in outcome.complaints[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a.png", "--beams", "3"], "No such option"),
        (["a.png", "--beam", "many"], "'--beam'"),
        (["a.png", "--precision", "int8"], "int8"),
        (["a.png", "--overlay", "x", "--overlay-format", "tga"], "tga"),
    ],
)
def test_usage_errors(arguments: list[str], reason: str, run: Run) -> None:
    outcome = run("caption", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert reason in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("part", ["half", "vocabulary", "foreign", "calibration"])
def test_damaged_models(part: str, run: Run, model: Path) -> None:
    save("a.png")
    if part == "half":
        Path("bad.safetensors").write_bytes(model.read_bytes()[:100_000])
    elif part == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, "bad.safetensors")
    else:
        lively = make_lively_model()
        header, calibration = make_header(lively), None
        if part == "vocabulary":
            header.tokenizer["vocabulary"].append("surplus")
        else:
            calibration = make_calibration(width=1000)
        checkpoint.save("bad.safetensors", lively, header, calibration)
    for command in (["caption", "a.png"], ["info"]):
        outcome = run(*command, "-m", "bad.safetensors")
        if command == ["info"] and part in ("vocabulary", "calibration"):
            continue  # the header by itself is fine
        assert outcome.code == 2
        assert outcome.out == ""
        assert len(outcome.complaints) == 1
        assert outcome.complaints[0].startswith("bad.safetensors: ")


# --------------------------------------------------------------------------------------------------
# Options


def test_options_reach_the_search(run: Run, model: Path) -> None:
    photo = save("a.png", 3)
    width, height = Image.open(photo).size
    box = (0.0, 0.0, width / 2, height / 2.5)
    region = ",".join(map(str, box))
    for arguments, options in (
        (["--beam", 1], {"beam": 1}),
        (["--prefix", "a gnu"], {"prefix": "a gnu"}),
        (["--must", "red car", "--must", "Water"], {"must": ["red car", "water"]}),
        (["--region", region], {"region": box}),
        (["--length-penalty", 2.5, "--min-length", 3], {"length_penalty": 2.5, "min_length": 3}),
        (["--max-length", 4, "--no-repeat-ngram", 1], {"max_length": 4, "no_repeat_ngram": 1}),
        (
            ["--sample", "--seed", 5, "--temperature", 1.5, "--top-k", 20, "--top-p", 0.9],
            {"sample": True, "seed": 5, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
        ),
    ):
        record = run("caption", photo, "--json", *arguments).records[0]
        assert record["caption"] == the_caption(model, photo, **options), arguments


def test_batch_size_changes_nothing(run: Run) -> None:
    for i in range(9):
        save(f"{i}.png", i)
    expected = run("caption", ".", "--jsonl", "--batch-size", 1).out
    found = run("caption", ".", "--jsonl", "--batch-size", 4, "--threads", 1, "--device", "cpu").out
    for one, other in zip(expected.splitlines(), found.splitlines(), strict=True):
        assert json.loads(one)["caption"] == json.loads(other)["caption"]
    assert len({json.loads(line)["caption"] for line in found.splitlines()}) > 3


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "svg", "html", "npz"])
def test_overlays(kind: str, run: Run) -> None:
    Path("other").mkdir()
    save("a.png"), save("a.jpg", 1), save("other/A.png", 2)
    outcome = run(
        "caption", "a.png", "a.jpg", "other/A.png", "--overlay", "new/maps", "--overlay-format", kind
    )
    assert outcome.code == 0
    assert sorted(os.listdir("new/maps")) == [f"A-3.{kind}", f"a-2.{kind}", f"a.{kind}"]
    assert all(path.stat().st_size > 300 for path in Path("new/maps").iterdir())


def test_an_overlay_never_replaces_a_photo(run: Run) -> None:
    photo, other = save("a.png"), save("a-2.png", 1)
    before = photo.read_bytes(), other.read_bytes()
    for _ in range(2):
        assert run("caption", "a.png", "a-2.png", "--overlay", ".").code == 0
    assert (photo.read_bytes(), other.read_bytes()) == before
    assert len(list(Path().glob("*.png"))) == 4  # the second run writes over the overlays of the first


def test_a_full_disk_while_overlays_are_written(run: Run) -> None:
    save("a.png"), save("b.png", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        outcome = run("caption", "a.png", "b.png", "--overlay", "maps")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 1
    assert len(outcome.out.splitlines()) == 2  # the captions are there
    assert [line.split(": ")[0] for line in outcome.complaints] == ["a.png", "b.png"]
    assert all("maps" in line and "too large" in line for line in outcome.complaints)
    assert os.listdir("maps") == []


def test_a_pdf_without_matplotlib(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save("a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run("caption", "a.png", "--overlay", "maps", "--overlay-format", "pdf")
    assert outcome.code == 2
    assert outcome.complaints == ['PDF figures need matplotlib: pip install "captioner[figures]"']


def test_out_of_memory_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.")

    save("a.png")
    monkeypatch.setattr(Captioner, "encode_pixels", fail)
    outcome = run("caption", "a.png")
    assert outcome.code == 2
    assert outcome.complaints == ["out of memory: try a smaller --batch-size or --beam, or --device cpu"]


# --------------------------------------------------------------------------------------------------
# Outputs that fail


@pytest.mark.parametrize(
    "arguments", [["caption", "a.png"], ["caption", "a.png", "--json"], ["info"], ["--help"], ["--version"]]
)
def test_a_full_standard_output(arguments: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save("a.png")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        outcome = run(*arguments)
        assert outcome.code == 2
        assert outcome.complaints == ["standard output: No space left on device"]


@pytest.mark.parametrize("arguments", [["caption", "a.png"], ["caption", "a.png", "--json"], ["info"]])
def test_nobody_reads_standard_output(
    arguments: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("a.png")
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        outcome = run(*arguments)
    assert outcome.code == 141
    assert outcome.err == ""


def test_closed_outputs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save("a.png")
    stderr = sys.stderr
    monkeypatch.setattr(sys, "stderr", None)
    quiet = run("caption", "a.png", "gone.png")
    assert quiet.code == 1
    assert quiet.out.count("\n") == 1  # no complaint among the captions
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", None)
    outcome = run("caption", "a.png")
    assert outcome.code == 2
    assert outcome.complaints == ["standard output is closed"]
    assert run("info").complaints == ["standard output is closed"]
    assert run("--version").complaints == ["standard output: it is closed"]


def with_streams(streams: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run ``captioner ARGUMENTS`` with standard streams as a shell makes them."""
    root = str(Path(cli.__file__).parents[1])
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "captioner", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such shell")
def test_a_batch_needs_no_outputs(run: Run, model: Path) -> None:
    Path("p").mkdir()
    save("p/a.png")
    Path("p/bad.jpg").write_text("no picture")
    command = ("caption", "p", "-o", "o.jsonl", "-m", model)
    done = with_streams("<&- >&- 2>&-", *command)  # what is opened gets their numbers, and all that is said
    assert done.returncode == 0
    assert len(Path("o.jsonl").read_text().splitlines()) == 2
    assert sorted(os.listdir()) == ["o.errors.jsonl", "o.jsonl", "o.jsonl.journal", "p"]
    files = {name: Path(name).read_bytes() for name in ("o.errors.jsonl", "o.jsonl")}
    assert not any(b"captioner: " in data for data in files.values())
    Path("p/bad.jpg").unlink()  # it would be tried again, which takes long
    streams = [">&-", "2>&-", "<&-", ">/dev/full", "2<o.jsonl"]  # the last: open, and not to be written to
    for one in [*streams, *(["2>/dev/full"] if sys.platform == "linux" else [])]:
        done = with_streams(one, *command)
        assert done.returncode == 0, one
        assert done.stdout == b""
        said = b"" if one.startswith("2") else b"captioner: "
        assert done.stderr.startswith(said)
        assert bool(done.stderr) is bool(said)
    assert files == {name: Path(name).read_bytes() for name in files}
    assert with_streams("2>/dev/full", "caption", "gone", "-o", "o.jsonl").returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such shell")
def test_what_prints_is_refused_at_once(run: Run) -> None:
    save("a.png")
    commands = ("caption a.png", "info", "prepare . -o out", "--version", "--help", "caption --help")
    for arguments in map(str.split, commands):
        done = with_streams(">&-", *arguments)
        assert done.returncode == 2
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("captioner: standard output")
        assert line.endswith("is closed")


# --------------------------------------------------------------------------------------------------
# info, help, version


def test_info(run: Run, model: Path) -> None:
    lines = run("info").out.splitlines()
    assert lines[0] == f"lively: {model} ({model.stat().st_size / 1e6:.2f} MB)"
    text = "\n".join(lines)
    for fact in (
        "efficientnet_lite0, 64x64",
        "lstm of 24",
        "30 words",
        "beam 3",
        "not calibrated",
        "none: 3 pictures, made up",
    ):
        assert fact in text
    facts = json.loads(run("info", "--json", "-m", model).out)
    assert facts["name"] == "lively"
    assert facts["file"] == str(model)
    assert facts["decoder"]["hidden"] == 24
    assert facts["vocabulary"] == "30 words"
    assert "tokenizer" not in facts  # thousands of words


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"data": "text", "scores": 3},
        {"scores": {"val": {"CIDEr": 0.5}}},
        {"data": {"a": None, "b": [1, 2.5, {}]}},
    ],
)
def test_info_of_any_summary(summary: dict[str, Any], run: Run) -> None:
    lively = make_lively_model()
    checkpoint.save("m.safetensors", lively, make_header(lively, name="\x1b[2Jevil", summary=summary))
    outcome = run("info", "-m", "m.safetensors")
    assert outcome.code == 0
    assert "\x1b" not in outcome.out
    if "val" in str(summary):
        assert "val: CIDEr 50.0" in outcome.out


def test_help(run: Run) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    for command in ("caption", "info", "train", "evaluate"):
        assert f"  {command} " in outcome.out
    assert not set("─│╭╮╰╯") & set(outcome.out)  # as readable in a file as on a terminal
    text = run("caption", "-h").out
    for option in (
        *("--json", "--jsonl", "--csv", "--recursive", "--overlay", "--overlay-format", "--beam", "--n-best"),
        *("--prefix", "--must", "--region", "--batch-size", "--device", "--model", "--sample", "--seed"),
    ):
        assert f"{option} " in text
    assert "Exit code: 0 " in text
    for command in ("info", "train", "calibrate", "evaluate"):
        assert run(command, "--help").code == 0


def test_version(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"captioner {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["train", "config.yaml"], "yaml"),
        (["evaluate"], "captioner_training"),
        (["compare", "--data", "."], "accelerate"),
        (["prepare", ".", "-o", "out"], "captioner_training"),
    ],
)
def test_a_missing_extra_is_one_line(tmp_path: Path, arguments: list[str], missing: str) -> None:
    """In a process of its own: here the training code may be loaded already."""
    code = f"import sys; sys.modules[{missing!r}] = None; from captioner.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 1, done.stderr
    assert f"this needs {missing}" in lines[0]
    assert lines[0].endswith('which is not installed: pip install "captioner[train]"')


# --------------------------------------------------------------------------------------------------
# evaluate


OFFICIAL = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]


def write_captions(folder: str = "my data") -> Path:
    """Write six pictures and people's captions of them."""
    Path(folder, "images").mkdir(parents=True)
    data: dict[str, Any] = {"images": [], "annotations": []}
    for number, picture in enumerate(pictures(6), 1):
        Image.fromarray(picture).save(Path(folder, "images", f"{number}.png"))
        data["images"].append({"id": number, "file_name": f"{number}.png"})
        for text in (f"A dog and {number} cats!", "a man on a horse"):
            data["annotations"].append({"image_id": number, "caption": text})
    path = Path(folder, "some captions.json")
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score without METEOR and the official tokenizer, which take seconds to start."""
    from captioner_training import metrics

    monkeypatch.setattr(metrics, "tokenize", lambda texts: [text.lower().strip("!") for text in texts])
    monkeypatch.setattr(
        metrics, "meteor", lambda captions, _: (0.25, [0.25] * len(captions), np.ones((len(captions), 23)))
    )


def test_evaluate_results_of_any_system(run: Run) -> None:
    """The real metrics, with paths that have spaces and ids that are text."""
    annotations = write_captions()
    results = [{"image_id": str(n), "caption": f"a dog and {n} cats"} for n in (1, 2, 3, 4, 5)]
    Path("the results.json").write_text(json.dumps([*results, {"image_id": "77", "caption": "a bus"}]))
    outcome = run("evaluate", "--results", "the results.json", "--annotations", annotations, "--json")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert list(record)[:7] == OFFICIAL
    # 25 words, all of which match, against references of 30
    assert record["Bleu_1"] == pytest.approx(np.exp(1 - 30 / 25))
    assert record["ROUGE_L"] == pytest.approx(5 / 6)
    assert 0 < record["METEOR"] < 1 < record["CIDEr"] < 10
    assert (record["images"], record["missing"], record["missing_count"]) == (6, [6], 1)
    assert (record["ignored"], record["partial"]) == (1, False)
    assert [line.partition(": ")[2] for line in outcome.complaints] == record["warnings"]
    assert any("1 of 6 pictures have no caption and count as empty: 6" in w for w in record["warnings"])
    assert any("CIDEr is not comparable" in w for w in record["warnings"])


@pytest.mark.usefixtures("no_java")
def test_evaluate_generates_first(run: Run) -> None:
    annotations = write_captions("flickr8k")
    outcome = run("evaluate", "--data", annotations, "--save-results", "said.json", "--json", "--beam", 2)
    assert outcome.code == 0, outcome.err
    made = json.loads(outcome.out)
    assert set(OFFICIAL) < made.keys()
    assert made["model"] == "lively"
    assert made["seconds_per_image"] > 0
    assert 0 <= made["confidence"]["error"] <= 1
    assert {row["method"] for row in made["published"]} > {"soft attention, VGG"}
    said = [entry["caption"] for entry in json.loads(Path("said.json").read_text())]
    direct = run("caption", *[f"flickr8k/images/{n}.png" for n in range(1, 7)], "--json", "--beam", 2)
    assert said == [record["caption"] for record in direct.records]
    scored = json.loads(run("evaluate", "--results", "said.json", "--annotations", annotations, "--json").out)
    assert {key: scored[key] for key in (*OFFICIAL, "intervals", "length", "distinct", "warnings")} == {
        key: made[key] for key in (*OFFICIAL, "intervals", "length", "distinct", "warnings")
    }
    # what captioner writes of files can be scored as it is
    Path("records.json").write_text(direct.out)
    records = json.loads(
        run("evaluate", "--results", "records.json", "--annotations", annotations, "--json").out
    )
    assert {key: records[key] for key in OFFICIAL} == {key: made[key] for key in OFFICIAL}


@pytest.mark.usefixtures("no_java")
def test_evaluate_prints_a_table_beside_published_ones(run: Run) -> None:
    annotations = write_captions("flickr8k")
    outcome = run("evaluate", "--data", annotations)
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines[0] == "some captions: 6 pictures, captions by lively"
    assert [line.split()[0] for line in lines[2:9]] == [
        *("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
    ]
    for start in ("length ", "vocabulary ", "distinct ", "novel ", "confidence ", "time ", "warning: CIDEr "):
        assert any(line.startswith(start) for line in lines), start
    assert "[1] Xu et al. 2015, Show, Attend and Tell, arXiv 1502.03044, table 1" in lines
    assert "Xu et al." not in run("evaluate", "--data", annotations, "--published", "none").out


@pytest.mark.usefixtures("no_java")
def test_evaluate_with_a_config_gives_a_record_a_set(run: Run) -> None:
    write_captions("data")
    source = '{annotations: "some captions.json", images: [images]'
    Path("config.yaml").write_text(
        f"name: x\ndata:\n  sources: {{all: {source}}}}}\n"
        f"  validation: {{all: {source}}}, few: {source}, only_highest: 2}}}}\n"
        "encoder: {name: efficientnet_lite0, size: 64}\n"
        "decoder: {}\nstages: [{name: a, sources: {all: 1}, epochs: 1, learning_rate: 0.001}]\n"
    )
    outcome = run("evaluate", "--config", "config.yaml", "--data", "data", "--json")
    assert outcome.code == 0, outcome.err
    assert {name: record["images"] for name, record in json.loads(outcome.out).items()} == {
        "all": 6,
        "few": 2,
    }


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give --data (captions in COCO's format), or --results with --annotations"),
        (["--results", "r.json"], "--results needs --annotations"),
        (["--data", "d.json", "--annotations", "a.json"], "--annotations needs --results"),
        (["--results", "r.json", "--annotations", "a.json", "--beam", 3], "--beam is for generating"),
        (["--results", "r.json", "--data", "d.json"], "--data is for generating"),
        (["--results", "r.json", "--annotations", "a.json"], "a.json: cannot be read: No such file"),
        (["--data", "d.json"], "d.json: cannot be read: No such file"),
        (["--data", "."], "there is no val.json in it"),
    ],
)
def test_wrong_wishes_of_evaluate(arguments: list[str], reason: str, run: Run) -> None:
    outcome = run("evaluate", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.complaints
    assert reason in line


# --------------------------------------------------------------------------------------------------
# In a process of its own


def test_help_does_without_torch() -> None:
    assert not {"torch", "numpy", "PIL", "gradio", "captioner_training"} & modules_after("caption", "--help")


def test_captions_need_no_heavy_packages(model: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "a.png")
    imported = modules_after("caption", photo, "-m", model, "--overlay", tmp_path / "maps")
    assert "torch" in imported
    heavy = {
        "gradio",
        "captioner_training",
        "captioner_demo",
        "timm",
        "torchvision",
        "cv2",
        "matplotlib",
        "rich",
    }
    # sympy comes with torch's compiler, and that costs seconds
    assert not (heavy | {"sympy", "tokenizers", "pandas", "yaml"}) & imported


def test_ctrl_c(model: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "a.png")
    for i in range(5000):
        (tmp_path / f"{i}.png").symlink_to(photo)
    process = launch("caption", tmp_path, "-m", model, "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    begun = process.stdout.readline() + process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = begun + process.stdout.read(), process.stderr.read()
    assert process.wait(30) == 130
    assert err == b"captioner: interrupted\n"
    assert 1 <= len(json.loads(out)) < 5000  # what was done is an array all the same


def test_the_first_line_of_many(model: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "a.png")
    for i in range(5000):
        (tmp_path / f"{i}.png").symlink_to(photo)
    process = launch("caption", tmp_path, "-m", model)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141
