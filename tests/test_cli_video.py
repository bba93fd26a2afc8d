"""captioner caption on videos, and on videos among photos."""

from __future__ import annotations

import csv
import fcntl
import functools
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from cli_runs import Run, launch, modules_after, run_here, save, save_lively, the_caption
from lively import pictures
from PIL import Image
from test_video import CLIPS, Camera, write, write_sound

from captioner import Captioner, cli, outputs
from captioner.caption import Caption, Segment, VideoCaption, Word, clock, plain_text
from captioner.images import Fit

FRAMES = [np.asarray(Image.fromarray(picture).resize((96, 64))) for picture in pictures(12)]
"""Patches of colour that the lively model says different things about."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lively(tmp_path_factory.mktemp("model") / "lively.safetensors")


@pytest.fixture(scope="session")
def captioner(model: Path) -> Captioner:
    return Captioner.load(model, device="cpu")


@pytest.fixture
def run(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    """Run ``captioner ARGUMENTS`` in this process and an empty folder; with the lively model by default."""
    return run_here(model, capsys, monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 12 seconds, another picture each second; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    held = [picture for picture in FRAMES for _ in range(5)]
    return write(folder / "made.mp4", held, rate=5, gop=5, options={"movflags": "faststart"})


@pytest.fixture
def clip(made: Path, run: Run) -> str:
    """Its copy in the folder of the run."""
    shutil.copy(made, "clip.mp4")
    return "clip.mp4"


def animate(path: str, count: int = 4, milliseconds: int = 1000) -> str:
    images = [Image.fromarray(picture) for picture in FRAMES[:count]]
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds)
    return path


def lines_of(caption: VideoCaption) -> list[str]:
    return [
        f"{clock(segment.start)} to {clock(segment.end)}: {plain_text(segment.caption)}"
        for segment in caption.segments
    ]


# --------------------------------------------------------------------------------------------------
# What is printed


def test_a_clip_is_a_line_for_each_segment(run: Run, clip: str, captioner: Captioner) -> None:
    outcome = run("caption", clip)
    assert (outcome.code, outcome.err) == (0, "")
    caption = captioner.caption_video(clip)
    assert outcome.out.splitlines() == lines_of(caption)
    assert len(caption.segments) >= 2
    assert re.fullmatch(r"0:00 to 0:05: .*", outcome.out.splitlines()[0])
    # with others, the path stands before it
    save("a.png")
    lines = run("caption", clip, "a.png").out.splitlines()
    assert [line for line in lines if line.startswith(f"{clip}: 0:")] == lines[:-1]
    assert lines[-1].startswith("a.png: ")


def test_photos_and_clips_keep_their_order(run: Run, clip: str, model: Path) -> None:
    for i in range(4):
        save(f"{i}.png", i)
    names = ["0.png", clip, "1.png", "2.png", animate("x.gif"), "gone.mp4", "3.png"]
    outcome = run("caption", *names, "--json", "--batch-size", 2)
    assert outcome.code == 1
    assert [record["path"] for record in outcome.records] == names
    assert ["segments" in record for record in outcome.records] == [name in (clip, "x.gif") for name in names]
    assert [outcome.records[i]["caption"] for i in (0, 2, 3, 6)] == [
        the_caption(model, f"{i}.png") for i in range(4)
    ]
    assert outcome.records[5]["error"] == "gone.mp4: there is no such file; check the path"


def test_the_nth_file_is_drawn_with_the_nth_seed(run: Run, clip: str, captioner: Captioner) -> None:
    save("a.png")
    shutil.copy("a.png", "b.png"), shutil.copy("a.png", "c.png")
    files = ["a.png", "b.png", clip, "c.png"]
    records = run("caption", *files, "--sample", "--seed", 40, "--json").records
    for place in (0, 1, 3):
        expected = captioner.caption("a.png", sample=True, seed=40 + place).text
        assert records[place]["caption"] == expected
    assert records[2]["caption"] == captioner.caption_video(clip, sample=True, seed=42).text


def test_content_tells_what_a_file_is(run: Run, clip: str) -> None:
    shutil.copy(clip, "clip.jpg")
    save("photo.mp4")  # a PNG
    Image.fromarray(FRAMES[0]).save("still.gif")
    animate("moving.png")
    files = ["clip.jpg", "photo.mp4", "still.gif", "moving.png", animate("moving.webp")]
    outcome = run("caption", *files, "--json")
    assert outcome.code == 0
    assert ["segments" in record for record in outcome.records] == [True, False, False, True, True]


def test_folders_hold_clips_too(run: Run, clip: str) -> None:
    Path("in/deep").mkdir(parents=True)
    save("in/b.png"), shutil.copy(clip, "in/a.MP4"), shutil.copy(clip, "in/deep/c.webm")
    Path("in/code.ts").write_text("export const x = 1;")
    Path("in/notes.txt").touch()

    def names(*arguments: object) -> list[str]:
        return [record["path"] for record in run("caption", *arguments, "--json").records]

    assert names("in") == ["in/a.MP4", "in/b.png"]
    assert names("in", "-r") == ["in/a.MP4", "in/b.png", "in/deep/c.webm"]
    assert names("in/**/*.webm", "in/*") == ["in/deep/c.webm", "in/a.MP4", "in/b.png"]
    Path("none").mkdir()
    outcome = run("caption", "none", "*.xyz")
    assert outcome.code == 2
    assert outcome.complaints == [
        "none: no pictures or videos in this folder; they end in .jpg, .png, .heic, .mp4, .mov, .webm, ...",
        "*.xyz: no picture or video matches this pattern; check it",
    ]


def test_records_of_clips(run: Run, clip: str, captioner: Captioner) -> None:
    (record,) = run("caption", clip, "--json", "--n-best", 2).timeless
    caption = captioner.caption_video(clip, n_best=2)
    assert record == json.loads(
        json.dumps(
            {
                "path": clip,
                **caption.to_dict(),
                "model": "lively",
                "model_sha256": captioner.fingerprint,
                "error": None,
            }
        )
    )
    assert record["duration"] == 12
    assert record["segments"][0]["times"] == [
        0,
        0.6,
        1,
        1.6,
        2,
        2.6,
        3,
        3.6,
        4,
        4.6,
    ]  # at 5 frames per second
    assert len(record["segments"][0]["n_best"]) == 2
    assert "attention" not in record["segments"][0]["words"][0]
    line = run("caption", clip, "--jsonl", "--attention").out
    word = json.loads(line)["segments"][0]["words"][0]
    assert np.shape(word["attention"]) == (10, 2, 2)
    assert np.sum(word["attention"]) == pytest.approx(1, abs=1e-4)


def test_csv_has_a_row_for_each_segment(run: Run, clip: str) -> None:
    save("a.png")
    Path("bad.mp4").touch()
    names = ["a.png", clip, "bad.mp4"]
    outcome = run("caption", *names, "--csv")
    rows = list(csv.DictReader(io.StringIO(outcome.out, newline="")))
    photo, moving, bad = run("caption", *names, "--json").records
    assert [row["path"] for row in rows] == ["a.png", *[clip] * len(moving["segments"]), "bad.mp4"]
    assert (rows[0]["start"], rows[0]["end"], rows[0]["caption"]) == ("", "", photo["caption"])
    for row, segment in zip(rows[1:-1], moving["segments"], strict=True):
        assert (float(row["start"]), float(row["end"])) == (segment["start"], segment["end"])
        assert (row["caption"], row["error"], row["schema"]) == (segment["caption"], "", "1")
        assert json.loads(row["words"]) == segment["words"]
    assert (rows[-1]["caption"], rows[-1]["error"]) == ("", bad["error"])


def test_n_best_of_segments_in_plain_text(run: Run, clip: str) -> None:
    lines = run("caption", clip, "--n-best", 2, "--end", 4).out.splitlines()
    assert [line[:5] for line in lines] == ["0:00 ", "  2. "]


# --------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--every", 1.5], {"every": 1.5}),
        (["--segment", 2], {"segment": 2}),
        (["--segment", "whole"], {"segment": None}),
        (["--segment", "shots"], {"segment": None, "shots": True}),
        (["--segment", "shots:0.7", "--every", 0.2], {"segment": 0.7, "shots": True, "every": 0.2}),
        (["--start", "0:00:02.5", "--end", "0:9"], {"start": 2.5, "end": 9.0}),
        (["--start", "7"], {"start": 7.0}),
        (["--prefix", "a gnu", "--must", "water"], {"prefix": "a gnu", "must": ["water"]}),
        (["--region", "0,0,40,30", "--beam", 1], {"region": (0, 0, 40, 30), "beam": 1}),
    ],
)
def test_options_reach_the_clip(
    arguments: list[object], options: dict[str, object], run: Run, clip: str, captioner: Captioner
) -> None:
    expected = lines_of(captioner.caption_video(clip, **options))
    assert run("caption", clip, *arguments).out.splitlines() == expected
    assert expected != lines_of(captioner.caption_video(clip))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["clip.mp4", "--every", 0], "--every 0.0: expected seconds, more than 0"),
        (["clip.mp4", "--every", "nan"], "--every nan: expected seconds"),
        (["clip.mp4", "--segment", "-3"], "--segment -3: expected seconds, more than 0, or whole, shots or"),
        (["clip.mp4", "--segment", "scenes"], "--segment scenes: expected seconds"),
        (["clip.mp4", "--segment", "shots:"], "--segment shots:: expected seconds"),
        (["clip.mp4", "--segment", "inf"], "--segment inf: expected seconds"),
        (["clip.mp4", "--start", "soon"], "--start soon: expected seconds, minutes:seconds or hours:"),
        (["clip.mp4", "--end", "1:2:3:4"], "--end 1:2:3:4: expected seconds"),
        (["clip.mp4", "--start", "1:00", "--end", "50"], "--end 50: expected a time after --start 1:00"),
        (["clip.mp4", "--start", "13"], "clip.mp4: the clip ends at 12.00 s, before start=13; begin earlier"),
        (["clip.mp4", "--region", "900,0,990,9"], "clip.mp4: region 900,0,990,9 lies outside the photo"),
        (["clip.mp4", "--prefix", "a dog " * 9], "more than max_length 12"),
        (
            ["clip.mp4", "--srt", "clip.mp4"],
            "--srt clip.mp4: expected a name that ends in .srt, a folder, or",
        ),
        (["clip.mp4", "--srt", "a.vtt"], "--srt a.vtt: expected a name that ends in .srt"),
        (["clip.mp4", "--vtt", "a.srt"], "--vtt a.srt: expected a name that ends in .vtt"),
        (["clip.mp4", "--srt", "no/such/a.srt"], "--srt no/such/a.srt: its folder does not exist"),
        (["clip.mp4", "--srt", "letter.srt"], "--srt letter.srt: this file exists and holds no subtitles"),
        (["clip.mp4", "--srt", "pipe.srt"], "--srt pipe.srt: this file exists and holds no subtitles"),
        (["clip.mp4", "c2.mp4", "--srt", "a.srt"], "--srt a.srt: this is one file, and there are several"),
        (["clip.mp4", "--srt", "letter.srt/"], "--srt letter.srt: this is a file; give a folder"),
        (["--live", "0", "clip.mp4"], "--live does not go together with a PATH"),
        (["--live", "0", "--overlay", "maps"], "--live does not go together with --overlay"),
        (["--live", "0", "--srt", "a.srt"], "--live does not go together with --srt"),
        (["--live", "0", "--end", "5"], "--live does not go together with --end"),
        (
            ["--live", "0", "--segment", "whole"],
            "--segment whole: with --live, give the seconds to look back",
        ),
        (["--live", "0", "--segment", "shots:3"], "--segment shots:3: with --live, give the seconds"),
        (["--live", "gone.mp4"], "gone.mp4: there is no such file; check the path"),
        (["--live", "clip.gif"], "clip.gif: an animation cannot be played live"),
    ],
)
def test_wrong_wishes_are_one_line(arguments: list[str], reason: str, run: Run, clip: str) -> None:
    shutil.copy(clip, "c2.mp4")
    Path("letter.srt").write_text("Dear reader,\n1\n00:00:01,000 --> 00:00:02,000\n")
    os.mkfifo("pipe.srt")
    animate("clip.gif")
    outcome = run("caption", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.complaints
    assert line.startswith(reason) or reason in line


def test_video_options_with_photos_only_are_noted(run: Run) -> None:
    save("a.png"), save("b.png", 1)
    expected = run("caption", "a.png", "b.png").out
    outcome = run("caption", "a.png", "b.png", "--every", 1, "--vtt", "beside")
    assert (outcome.code, outcome.out) == (0, expected)
    assert outcome.complaints == ["--every, --vtt: only for videos, and there was none"]
    outcome = run("caption", "a.png", "--overlay", "maps", "--overlay-format", "webm")
    assert outcome.complaints == ["--overlay-format webm: only for videos, and there was none"]
    assert os.listdir("maps") == ["a.png"]


# --------------------------------------------------------------------------------------------------
# Subtitles


def test_subtitles_of_one_clip(run: Run, clip: str, captioner: Captioner) -> None:
    from captioner.subtitles import to_srt, to_webvtt

    save("a.png")
    expected = captioner.caption_video(clip)
    for _ in range(2):  # subtitles are replaced
        assert run("caption", "a.png", clip, "--srt", "talk.srt", "--vtt", "talk.vtt").code == 0
        assert Path("talk.srt").read_text() == to_srt(expected)
        assert Path("talk.vtt").read_text() == to_webvtt(expected)
    assert run("caption", clip, "--srt", "talk.srt", "--end", 3).code == 0
    assert Path("talk.srt").read_text() == to_srt(captioner.caption_video(clip, end=3))


def test_subtitles_in_a_folder_and_beside(run: Run, clip: str) -> None:
    Path("other").mkdir()
    shutil.copy(clip, "other/Clip.mp4"), animate("moving.gif"), save("photo.png")
    files = [clip, "other/Clip.mp4", "moving.gif", "photo.png"]
    assert run("caption", *files, "--srt", "new/subs", "--vtt", "beside", "--end", 3).code == 0
    assert sorted(os.listdir("new/subs")) == ["Clip-2.srt", "clip.srt", "moving.srt"]
    assert os.path.exists("clip.vtt")
    assert os.path.exists("other/Clip.vtt")
    assert os.path.exists("moving.vtt")
    assert not os.path.exists("photo.vtt")
    assert Path("clip.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> ")


def test_what_holds_no_subtitles_is_never_replaced(run: Run, clip: str) -> None:
    letter = Path("clip.srt")
    letter.write_text("Dear reader, …", encoding="utf-8")
    shutil.copy(clip, "clip.vtt")  # a video of that name, which is to be captioned, too
    before = letter.read_bytes(), Path("clip.vtt").read_bytes()
    outcome = run("caption", clip, "clip.vtt", "--srt", "beside", "--vtt", "beside", "--end", 2)
    assert outcome.code == 1
    assert len(outcome.out.splitlines()) == 2
    assert outcome.complaints == [
        "clip.mp4: there are no subtitles: clip.srt exists and holds something else"
    ]
    assert (letter.read_bytes(), Path("clip.vtt").read_bytes()) == before
    assert Path("clip-2.vtt").exists()  # for clip.mp4
    record = run("caption", clip, "--srt", "beside", "--end", 2, "--json").records[0]
    assert record["segments"]
    assert record["error"] == outcome.complaints[0]


def test_somebodys_own_subtitles_beside_a_clip_are_kept(run: Run, clip: str) -> None:
    for _ in range(2):  # the same once more is no harm
        assert run("caption", clip, "--srt", "beside", "--end", 2).code == 0
    mine = Path("clip.srt").read_text().replace("\n00:00:00,000", "\n00:00:00,500")
    Path("clip.srt").write_text(mine)
    outcome = run("caption", clip, "--srt", "beside", "--end", 2)
    assert outcome.code == 1
    assert outcome.complaints == [
        "clip.mp4: there are no subtitles: clip.srt exists and is kept; delete it, or give a folder for new "
        "ones"
    ]
    assert Path("clip.srt").read_text() == mine


# --------------------------------------------------------------------------------------------------
# Overlays


def test_overlays_of_clips(run: Run, clip: str) -> None:
    Path("other").mkdir()
    shutil.copy(clip, "other/clip.mp4"), save("clip.png"), animate("moving.gif", 2)
    files = [clip, "clip.png", "other/clip.mp4", "moving.gif"]
    outcome = run(
        "caption", *files, "--overlay", "maps", "--segment", 1, "--end", 2, "--overlay-format", "jpg"
    )
    assert outcome.code == 0
    assert sorted(os.listdir("maps")) == [
        *("clip-1.jpg", "clip-2-1.jpg", "clip-2-2.jpg", "clip-2.jpg", "clip-2.mp4", "clip.jpg", "clip.mp4"),
        *("moving-1.jpg", "moving-2.jpg", "moving.mp4"),
    ]
    with av.open("maps/clip.mp4") as drawn:
        assert drawn.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in drawn.decode(video=0)) == 60
    # a width of 96 is too little for the caption; a note says so
    assert outcome.complaints == [
        f"{name}: width 96 became 240, to give the caption room"
        for name in (clip, "other/clip.mp4", "moving.gif")
    ]


def test_a_sheet_shows_the_frames_that_were_captioned(
    run: Run, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Segment, list[Image.Image]]] = []
    sheet = Segment.overlay

    def overlay(self: Segment, frames: list[Image.Image]) -> Image.Image:
        drawn.append((self, frames))
        return sheet(self, frames)

    monkeypatch.setattr(Segment, "overlay", overlay)
    arguments = ("--segment", 3, "--start", 3, "--end", 9, "--overlay", "maps", "--overlay-format", "webm")
    assert run("caption", clip, *arguments).code == 0
    assert [(segment.start, segment.end) for segment, _ in drawn] == [(3, 6), (6, 9)]
    for segment, frames in drawn:
        for moment, frame in zip(segment.times, frames, strict=True):
            expected = FRAMES[int(moment + 0.001)].astype(float)
            differences = [np.abs(np.asarray(frame, float) - picture).mean() for picture in FRAMES]
            assert np.argmin(differences) == int(moment + 0.001), moment
            assert np.abs(np.asarray(frame, float) - expected).mean() < 12
    assert sorted(os.listdir("maps")) == ["clip-1.png", "clip-2.png", "clip.webm"]
    with Image.open("maps/clip-1.png") as image:
        assert image.width > 6 * 96


def test_many_frames_are_drawn_as_few() -> None:
    rng = np.random.default_rng(0)
    attention = rng.dirichlet(np.ones(100 * 4)).reshape(100, 4).astype(np.float32)
    words = (Word("dog", 0.5, 0.5, attention=attention), Word("runs", 0.5, 0.5))
    caption = Caption("dog runs", words, -1.0, -2.0, 0.5, True, (2, 2), Fit("squash", 64, 64, (0, 0, 64, 64)))
    segment = Segment(0, 100, replace(caption, times=np.arange(100, dtype=np.float32)))
    few = outputs.thinned(segment)
    assert len(few.times) == 24
    assert all(after > before for before, after in pairwise(few.times))
    weights = few.caption.words[0].attention
    assert weights is not None
    assert weights.shape == (24, 4)
    assert weights.sum(0) == pytest.approx(attention.sum(0))
    assert weights[0] == pytest.approx(attention[:4].sum(0))  # the first of 24 stretches of 100 frames
    assert few.caption.words[1].attention is None
    short = replace(segment, caption=replace(caption, times=np.arange(24, dtype=np.float32)))
    assert outputs.thinned(short) is short


def test_an_overlay_never_replaces_a_clip(run: Run, clip: str) -> None:
    before = Path(clip).read_bytes()
    assert run("caption", clip, "--overlay", ".", "--end", 1).code == 0
    assert Path(clip).read_bytes() == before
    assert sorted(os.listdir(".")) == ["clip-2.mp4", "clip-2.png", "clip.mp4"]


# --------------------------------------------------------------------------------------------------
# Bad input


def test_bad_clips_get_a_line_each(run: Run, clip: str) -> None:
    save("a.png")
    data = Path(clip).read_bytes()
    Path("empty.mp4").touch()
    Path("text.mp4").write_text("I am no video.\n" * 100)
    write_sound(Path("sound.mp4"))
    place = data.index(b"mdat") + 4
    Path("hollow.mp4").write_bytes(data[:place] + bytes(len(data) - place))
    Path("index.mp4").write_bytes(data[:300])
    Path("folder.mp4").mkdir()
    reasons = {
        "empty.mp4": "the file is empty",
        "text.mp4": "text, not a video",
        "sound.mp4": "there is sound, but no pictures in it",
        "hollow.mp4": "no frame that this OpenCV can decode",
        "index.mp4": "truncated",
        "gone.mov": "there is no such file",
        "folder.mp4": "no pictures or videos in this folder",
    }
    outcome = run("caption", *reasons, "a.png", clip, "--srt", "subs")
    assert outcome.code == 1
    assert {line.split(": ")[0] for line in outcome.out.splitlines()} == {"a.png", clip}
    assert len(outcome.complaints) == len(reasons)
    for name, reason in reasons.items():
        assert any(line.startswith(f"{name}: ") and reason in line for line in outcome.complaints), name
    assert os.listdir("subs") == ["clip.srt"]
    assert run("caption", *list(reasons)[:4]).code == 2  # nothing could be done
    record = run("caption", "sound.mp4", "--json").records[0]
    assert record.keys() == {"path", "schema", "caption", "model", "model_sha256", "seconds", "error"}


def test_what_a_truncated_clip_holds_is_written(run: Run, clip: str, captioner: Captioner) -> None:
    from captioner.subtitles import to_srt

    data = Path(clip).read_bytes()
    Path("cut.mp4").write_bytes(data[: int(0.6 * len(data))])
    save("a.png")
    caption = captioner.caption_video("cut.mp4", segment=2)
    assert 2 <= len(caption.segments) <= 5
    assert caption.error is not None
    arguments = ["cut.mp4", "a.png", "--segment", 2, "--srt", "cut.srt", "--overlay", "maps"]
    outcome = run("caption", *arguments)
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert lines[:-1] == [f"cut.mp4: {line}" for line in lines_of(caption)]
    assert lines[-1].startswith("a.png: ")
    assert outcome.complaints[0] == caption.error
    assert caption.error.startswith("cut.mp4: the file is truncated; nothing could be read after ")
    assert Path("cut.srt").read_text() == to_srt(caption)
    sheets = [f"cut-{n}.png" for n in range(1, len(caption.segments) + 1)]
    assert sorted(os.listdir("maps")) == sorted(["a.png", "cut.mp4", *sheets])
    record = run("caption", *arguments[:4], "--json").records[0]
    assert record["error"] == caption.error
    assert len(record["segments"]) == len(caption.segments)
    assert record["duration"] == pytest.approx(caption.duration)
    rows = list(csv.DictReader(io.StringIO(run("caption", *arguments[:4], "--csv").out, newline="")))
    assert [bool(row["error"]) for row in rows] == [*[False] * len(caption.segments), True, False]


def test_frames_that_change_size(run: Run, captioner: Captioner) -> None:
    parts = []
    for number, size in enumerate([(96, 64), (128, 80)]):
        images = [np.asarray(Image.fromarray(p).resize(size)) for p in FRAMES[:3] for _ in range(10)]
        parts.append(write(Path(f"{number}.ts"), images, format="mpegts").read_bytes())
    Path("resized.ts").write_bytes(b"".join(parts))
    outcome = run("caption", "resized.ts", "--overlay", "maps")
    assert outcome.code == 0
    assert outcome.out.splitlines() == lines_of(captioner.caption_video("resized.ts"))
    assert "resized.ts: its pictures change size midway" in outcome.err
    assert os.path.exists("maps/resized.mp4")


@pytest.mark.parametrize(
    ("missing", "arguments", "lines", "complaints"),
    [
        ("cv2", [], 1, ['clip.mp4: videos need OpenCV; pip install "captioner[video]"']),
        (
            "av",
            ["--overlay", "maps", "--end", 4],
            2,
            ['clip.mp4: there is no overlay: drawing on clips needs PyAV: pip install "captioner[video]"'],
        ),
        (
            "scenedetect",
            ["--segment", "shots"],
            0,
            ['--segment shots needs PySceneDetect: pip install "captioner[shots]"'],
        ),
    ],
)
def test_missing_packages_are_named(
    missing: str,
    arguments: list[object],
    lines: int,
    complaints: list[str],
    run: Run,
    clip: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save("a.png")
    monkeypatch.setitem(sys.modules, missing, None)
    outcome = run("caption", clip, "a.png", *arguments)
    assert outcome.code == (1 if lines else 2)
    assert len(outcome.out.splitlines()) == lines  # the photo is captioned all the same
    assert outcome.complaints == complaints
    if missing == "av":
        assert sorted(os.listdir("maps")) == ["a.png", "clip.png"]  # the sheets need no PyAV


# --------------------------------------------------------------------------------------------------
# Live


@pytest.fixture
def camera() -> Iterator[list[Camera]]:
    running: list[Camera] = []
    yield running
    for each in running:
        each.over.set()
        each.shutdown()
        each.server_close()


def test_live_captions_change_with_the_picture(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "played.mp4", [picture for picture in FRAMES[:4] for _ in range(3)], rate=10)
    outcome = run("caption", "--live", "played.mp4", "--every", 0.1, "--segment", 0.2)
    assert (outcome.code, outcome.err) == (0, "")  # the end of a stream is no error
    lines = outcome.out.splitlines()
    assert len(lines) >= 2
    assert all(re.match(r"0:0\d(\.\d)?: ", line) for line in lines)
    said = [line.partition(": ")[2] for line in lines]
    assert all(before != after for before, after in pairwise(said))
    for kind in ("--jsonl", "--json"):
        out = run("caption", "--live", "played.mp4", "--every", 0.2, kind).out
        records = json.loads(out) if kind == "--json" else [json.loads(line) for line in out.splitlines()]
        assert records
        for record in records:
            assert (record["path"], record["schema"], record["model"]) == ("played.mp4", 1, "lively")
            assert 0 <= record["start"] <= record["end"] == pytest.approx(record["times"][-1], abs=1e-3)
            assert record["words"]
    rows = list(csv.DictReader(io.StringIO(run("caption", "--live", "played.mp4", "--csv").out, newline="")))
    assert rows[0]["path"] == "played.mp4"
    assert float(rows[0]["end"]) >= float(rows[0]["start"])


class Terminal(io.StringIO):
    """Takes what is printed, as a terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


def test_live_captions_are_one_line_on_a_terminal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "played.mp4", [picture for picture in FRAMES[:4] for _ in range(3)], rate=10)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "50")
    assert run("caption", "--live", "played.mp4", "--every", 0.1, "--segment", 0.2).code == 0
    text = terminal.getvalue()
    assert text.count("\n") == 1
    shown = text.rstrip("\n").split("\r")[1:]
    assert len(shown) >= 2
    assert all(re.match(r"0:0\d: ", line) for line in shown)
    assert all(len(line) < 50 for line in shown)
    # each covers the one before
    assert all(len(after) >= len(before.rstrip()) for before, after in pairwise(shown))


def test_a_live_stream_that_stalls_is_a_line(
    run: Run, camera: list[Camera], monkeypatch: pytest.MonkeyPatch
) -> None:
    camera.append(Camera(60, 0.02, True))
    patient = functools.partialmethod(Captioner.caption_live, stall_seconds=1.0)
    monkeypatch.setattr(Captioner, "caption_live", patient)
    outcome = run("caption", "--live", camera[0].address, "--jsonl")
    assert outcome.code == 1
    (line,) = outcome.complaints
    assert "the stream has stalled: no frame for 1 s" in line
    assert "secret" not in outcome.out + outcome.err
    assert json.loads(outcome.out.splitlines()[0])["path"].startswith("http://127.0.0.1:")


def test_ctrl_c_ends_a_live_caption(model: Path) -> None:
    process = launch("caption", "--live", CLIPS / "world.mp4", "-m", model, "--json", "--every", 0.1)
    assert process.stdout is not None
    assert process.stderr is not None
    begun = process.stdout.readline() + process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = begun + process.stdout.read(), process.stderr.read()
    assert (process.wait(30), err) == (0, b"")
    assert len(json.loads(out)) >= 1


# --------------------------------------------------------------------------------------------------
# In a process of its own


def test_photos_alone_need_nothing_of_videos(model: Path, tmp_path: Path) -> None:
    for i, suffix in enumerate(("png", "jpg", "webp", "gif")):
        Image.fromarray(pictures(9)[i]).save(tmp_path / f"{i}.{suffix}")
    imported = modules_after("caption", tmp_path, "-m", model, "--json")
    assert "torch" in imported
    assert not {"cv2", "av", "scenedetect"} & imported


def test_ctrl_c_keeps_what_was_captioned(model: Path, tmp_path: Path) -> None:
    clip = tmp_path / "long.mp4"
    write(clip, [FRAMES[i % 12] for i in range(1000)], rate=5)
    talk = tmp_path / "talk.srt"
    process = launch("caption", clip, "-m", model, "--every", 0.2, "--segment", 2, "--srt", talk)
    assert process.stdout is not None
    assert process.stderr is not None
    begun = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = begun + process.stdout.read(), process.stderr.read()
    assert process.wait(30) == 130
    assert re.fullmatch(rf"captioner: {clip}: interrupted at \S+\ncaptioner: interrupted\n", err.decode())
    assert out.startswith(b"0:00 to 0:0")
    assert out.count(b"\n") < 100
    assert talk.read_text().startswith("1\n00:00:00,000 --> 00:00:0")


def on_a_terminal(*arguments: object, folder: Path) -> tuple[int, str]:
    """Run a command on a pseudo-terminal; return its exit code and all that it printed there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    root = str(Path(cli.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "captioner", *map(str, arguments)],
        stdout=theirs,
        stderr=theirs,
        env=environment,
        cwd=folder,
    )
    os.close(theirs)
    text, end = b"", time.monotonic() + 60
    while time.monotonic() < end and select.select([ours], [], [], 60)[0]:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side has closed it
            break
        text += part
        if not part:
            break
    os.close(ours)
    return process.wait(30), text.decode()


def test_progress_on_a_terminal(model: Path, made: Path, tmp_path: Path) -> None:
    shutil.copy(made, tmp_path / "clip.mp4"), save(tmp_path / "a.png")
    code, text = on_a_terminal(
        "caption", "a.png", "clip.mp4", "-m", model, "--overlay", "maps", folder=tmp_path
    )
    assert code == 0
    assert "clip.mp4:   0%|" in text
    assert "/12 s of video [" in text
    assert "drawing clip.mp4:" in text
    assert "2/2 [" in text
    assert text.count("clip.mp4:   0%|") < 10  # one bar goes on, and is drawn again below the captions
    assert re.search(
        r"captioner: 12\.0 s of video in [\d.]+ s: [\d.]+ seconds of video per second of computing", text
    )
    # lines on the terminal stand alone, whatever the bars do
    visible = [re.sub(r".*\r(?=.)", "", line.rstrip("\r")) for line in text.split("\n")]
    assert any(re.fullmatch(r"(\x1b\[\w)*clip\.mp4: 0:00 to 0:05: .*", line) for line in visible), visible
