from __future__ import annotations

import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captioner.batch.beside import Plan
from captioner.batch.sidecars import SidecarError, Sidecars, SubtitleFiles, clashes


def said(caption: str) -> dict[str, Any]:
    return {"schema": 1, "caption": caption, "error": None}


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "x.jpg"
    Image.new("RGB", (8, 8)).save(path)
    return str(path)


def do(plan: Plan) -> str:
    """Write a plan and return its digest, as the journal keeps it."""
    plan.write()
    return plan.digest


def test_a_sidecar_is_one_line_beside_the_picture(photo: str) -> None:
    plan = Sidecars(before="mychar, ", after=" in ink").plan(photo, said("a dög"))
    assert plan.target == Path(photo).with_name("x.txt")
    assert not plan.target.exists()
    plan.write()
    assert plan.target.read_bytes() == "mychar, a dög in ink\n".encode()
    again = Sidecars(before="mychar, ", after=" in ink").plan(photo, said("a dög"), plan.digest)
    assert (again.data, again.kept, again.digest) == (None, None, plan.digest)


def test_fine_tuning_tools_read_it_as_it_was_meant(tmp_path: Path) -> None:
    # names as such tools make them: everything before the last full stop, and the suffix
    for name in ("a.b.jpg", "UPPER.JPG", "no suffix", "ünï.jpeg", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
        Sidecars().plan(str(tmp_path / name), said("a dog")).write()
        lines = (tmp_path / (os.path.splitext(name)[0] + ".txt")).read_text("utf-8").splitlines()
        assert lines == ["a dog"]


def test_what_a_person_wrote_or_edited_is_kept(photo: str) -> None:
    target = Path(photo).with_name("x.txt")
    target.write_text("my own words")
    plan = Sidecars().plan(photo, said("a dog"))
    assert plan.data is None
    assert (
        plan.kept
        == f"{photo}: {target} exists and is kept: captioner did not write it, or it was edited since"
    )
    target.unlink()
    ours = do(Sidecars().plan(photo, said("a dog")))
    target.write_text("a brown dog\n")
    assert Sidecars().plan(photo, said("a cat"), ours).kept
    assert target.read_text() == "a brown dog\n"


def test_what_captioner_wrote_follows_the_caption(photo: str) -> None:
    ours = do(Sidecars().plan(photo, said("a dog")))
    ours = do(Sidecars().plan(photo, said("a cat"), ours))
    assert Path(photo).with_name("x.txt").read_text() == "a cat\n"
    os.chmod(Path(photo).with_name("x.txt"), 0o600)
    do(Sidecars().plan(photo, said("a cow"), ours))
    assert Path(photo).with_name("x.txt").read_text() == "a cow\n"
    assert Path(photo).with_name("x.txt").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("existing", "own", "expected"),
    [
        ("overwrite", b"mychar", b"a dog\n"),
        ("append", b"mychar", b"mychar a dog\n"),
        ("append", b"mychar, \r\n", b"mychar, a dog\r\n"),
        ("append", b"\xef\xbb\xbfmychar\nand more\n", b"\xef\xbb\xbfmychar\nand more a dog\n"),
        ("append", b"\n", b"a dog\n"),
        ("prepend", b"mychar\n", b"a dog mychar\n"),
        ("prepend", b"\xef\xbb\xbfmychar", b"\xef\xbb\xbfa dog mychar"),
        ("keep", b"", b"a dog\n"),  # an empty file is nobody's word
        ("overwrite", b"\xff\xfe\x00", b"a dog\n"),
    ],
)
def test_existing_words(photo: str, existing: str, own: bytes, expected: bytes) -> None:
    target = Path(photo).with_name("x.txt")
    target.write_bytes(own)
    ours = do(Sidecars(existing).plan(photo, said("a dog")))
    assert target.read_bytes() == expected
    # neither again, nor with another model, nor when the journal is lost, anything is said twice
    assert Sidecars(existing).plan(photo, said("a dog"), ours).data is None
    assert Sidecars(existing).plan(photo, said("a dog")).data is None
    do(Sidecars(existing).plan(photo, said("two cats"), ours))
    assert target.read_bytes() == expected.replace(b"a dog", b"two cats")


@pytest.mark.parametrize("existing", ["append", "prepend"])
def test_words_are_not_added_to_what_is_no_text(photo: str, existing: str) -> None:
    for content in (b"caf\xe9", "mychar".encode("utf-16"), b"long " * 300_000):
        Path(photo).with_name("x.txt").write_bytes(content)
        plan = Sidecars(existing).plan(photo, said("a dog"))
        assert plan.data is None
        assert "is kept: it is not a short text in UTF-8" in str(plan.kept)


@pytest.mark.parametrize("existing", ["keep", "overwrite", "append", "prepend"])
@pytest.mark.parametrize("own", [None, b"mychar\n"])
def test_a_kill_at_any_moment_neither_loses_nor_doubles(photo: str, existing: str, own: bytes | None) -> None:
    """Runs that are killed before the note, before the writing and before the mark, in random order."""
    target = Path(photo).with_name("x.txt")
    rng = random.Random(existing)
    for _ in range(30):
        target.unlink(missing_ok=True)
        if own is not None:
            target.write_bytes(own)
        journal: str | None = None
        sidecars = Sidecars(existing)
        for caption in ("a dog", "a cat", "a dog in the snow"):
            for _ in range(rng.randrange(4)):
                plan = sidecars.plan(photo, said(caption), journal)
                if rng.random() < 0.7:
                    journal = plan.digest or journal
                    if rng.random() < 0.5:
                        plan.write()
            plan = sidecars.plan(photo, said(caption), journal)
            journal = plan.digest
            plan.write()
        last = b"a dog in the snow"
        expected = {
            "keep": own or last + b"\n",
            "overwrite": last + b"\n",
            "append": b"mychar " + last + b"\n",
            "prepend": last + b" mychar\n",
        }[existing]
        assert target.read_bytes() == (expected if own is not None else last + b"\n")


def test_what_changes_between_plan_and_writing_is_not_lost(photo: str) -> None:
    plan = Sidecars("overwrite").plan(photo, said("a dog"))
    plan.target.write_text("just typed")
    with pytest.raises(OSError, match="changed while it was being captioned") as caught:
        plan.write()
    assert caught.value.filename == str(plan.target)
    assert plan.target.read_text() == "just typed"


def test_places_without_a_sidecar(photo: str, tmp_path: Path) -> None:
    sidecars, record = Sidecars("overwrite"), said("a dog")

    def reason(path: str) -> str:
        plan = sidecars.plan(path, record)
        assert plan.data is None
        assert plan.kept is not None
        assert "\n" not in plan.kept
        return plan.kept

    assert reason("s3://bucket/x.jpg") == (
        "s3://bucket/x.jpg: there is no sidecar: the file is on another machine"
    )
    (tmp_path / "shard.tar").write_bytes(b"x")
    for member in ("shard.tar/a/x.jpg", "shard.tar::x.jpg"):
        assert reason(str(tmp_path / member)).endswith(
            "there is no sidecar: the file is in an archive, or gone"
        )
    target = Path(photo).with_name("x.txt")
    target.mkdir()
    assert reason(photo).endswith(f"{target} is a folder")
    target.rmdir()
    (tmp_path / "elsewhere.txt").write_text("mine")
    target.symlink_to(tmp_path / "elsewhere.txt")
    assert reason(photo).endswith(f"{target} is a link, and is kept")
    assert (tmp_path / "elsewhere.txt").read_text() == "mine"
    target.unlink()
    os.mkfifo(target)
    assert reason(photo).endswith(f"{target} is not a file")
    target.unlink()
    misnamed = tmp_path / "photo.txt"
    misnamed.write_bytes(Path(photo).read_bytes())
    assert reason(str(misnamed)).endswith(f"{misnamed} is the file itself")
    record = {"schema": 1, "caption": "", "error": "no picture"}
    assert reason(photo).endswith("there is no sidecar: nothing was captioned")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may write anywhere"
)
def test_a_folder_that_cannot_be_written_to(photo: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written to" in str(Sidecars().plan(photo, said("a dog")).kept)
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_cannot_be_written_to_is_named(photo: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    plan = Sidecars().plan(photo, said("a dog"))
    assert plan.kept == f"{photo}: there is no sidecar: the folder {tmp_path} cannot be written to"


def test_a_caption_stays_one_line(photo: str) -> None:
    plan = Sidecars().plan(photo, said(" a dog\r\nand a\x00 cat\u2028 "))
    assert plan.data is not None
    assert plan.data.count(b"\n") == 1
    assert plan.data.startswith(b"a dog  and a")


def test_options_that_make_no_sense() -> None:
    with pytest.raises(
        SidecarError, match="existing must be one of keep, overwrite, append, prepend, not 'merge'"
    ):
        Sidecars("merge")
    with pytest.raises(SidecarError, match="before must be one line of plain text"):
        Sidecars(before="a\nb")
    with pytest.raises(SidecarError, match="after must be one line of plain text"):
        Sidecars(after="a\udce4b")
    with pytest.raises(SidecarError, match="subtitles are srt or vtt, not 'ass'"):
        SubtitleFiles("ass")


# --- subtitles ------------------------------------------------------------------------------------------

CLIP = {
    "schema": 1,
    "caption": "a dog. a cat",
    "segments": [
        {"start": 0.0, "end": 2.5, "caption": "a dog", "confidence": 0.8},
        {"start": 2.5, "end": 4.0, "caption": "a cat", "confidence": 0.1},
    ],
}


def test_subtitles_stand_beside_a_video(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"x")
    ours = do(SubtitleFiles("srt").plan(str(clip), CLIP))
    assert (tmp_path / "clip.srt").read_text() == (
        "1\n00:00:00,000 --> 00:00:02,500\na dog\n\n2\n00:00:02,500 --> 00:00:04,000\n(a guess) a cat\n"
    )
    assert SubtitleFiles("srt").plan(str(clip), CLIP, ours).data is None
    other = {**CLIP, "segments": CLIP["segments"][:1]}
    ours = do(SubtitleFiles("srt").plan(str(clip), other, ours))
    assert "cat" not in (tmp_path / "clip.srt").read_text()
    (tmp_path / "clip.srt").write_text("1\n00:00:00,000 --> 00:00:02,500\nRex!\n")
    assert "is kept" in str(SubtitleFiles("srt").plan(str(clip), CLIP, ours).kept)
    assert SubtitleFiles("srt", "overwrite").plan(str(clip), CLIP, ours).data is not None
    do(SubtitleFiles("vtt").plan(str(clip), CLIP))
    assert (tmp_path / "clip.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.500\na dog\n")
    do(Sidecars().plan(str(clip), CLIP))
    assert (tmp_path / "clip.txt").read_text() == "a dog. a cat\n"


def test_photos_have_no_subtitles(photo: str) -> None:
    plan = SubtitleFiles("srt").plan(photo, said("a dog"))
    assert (plan.data, plan.kept) == (None, None)


# --- clashes --------------------------------------------------------------------------------------------


def test_two_files_that_want_one_sidecar() -> None:
    paths = [
        "a/x.jpg",
        "a/y.jpg",
        "b/x.png",
        "a/X.PNG",
        "a/y.jpg",
        "é.jpg",
        "e\u0301.png",
        "q.jpg",
        "x.a.jpg",
    ]
    assert list(clashes(iter(paths))) == [
        "a/x.txt is wanted by a/x.jpg and by a/X.PNG",
        "é.txt is wanted by é.jpg and by e\u0301.png",
    ]
    assert list(clashes(["a.mp4", "a.mov", "a.jpg"], ".srt")) == [
        "a.srt is wanted by a.mp4 and by a.mov, a.jpg"
    ]
    assert list(clashes(["s3://b/x.jpg", "s3://b/x.png", "strange\udcff\n.jpg", "strange\udcff\n.png"])) == [
        "strange\udcff\n.txt is wanted by strange\udcff\n.jpg and by strange\udcff\n.png"
    ]
    assert list(clashes([])) == []
    odd = ["a.b/x", "a.b/x.jpg", ".jpg", ".jpg.txt", "..x", "b/.x", "b/.x.png", "c./y", "x..jpg", "x."]
    wanted = [os.path.splitext(path)[0] for path in odd]
    said = {line.split(".txt is wanted by ")[0] for line in clashes(odd)}
    assert said == {stem for stem in wanted if wanted.count(stem) > 1} == {"a.b/x", ".jpg", "b/.x"}


def test_clashes_of_many_paths_take_little_memory() -> None:
    list(clashes(["x.jpg", "x.png"]))
    tracemalloc.start()
    many = (f"folder {n // 1000}/picture {n}.jpg" for n in range(30_000))
    assert list(clashes(many)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def test_planning_brings_no_torch() -> None:
    code = (
        "import sys\nfrom captioner.batch.sidecars import Sidecars, clashes\n"
        "list(clashes(['a.jpg']))\nSidecars().plan('a.jpg', {'caption': 'x'})\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
