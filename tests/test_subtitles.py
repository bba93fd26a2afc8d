from __future__ import annotations

import io
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pysubs2
import pytest
import srt
import webvtt

from captioner.caption import SCHEMA_VERSION, Alternative, Caption, Segment, VideoCaption, Word
from captioner.images import Fit
from captioner.subtitles import merge, save, to_srt, to_webvtt

FIT = Fit("squash", 64, 48, (0, 0, 64, 48))


def segment(
    start: float,
    end: float,
    text: str,
    *,
    probability: float = 0.5,
    confidence: float = 0.6,
    frames: int = 2,
    fit: Fit = FIT,
    attention: bool = True,
    **more: object,
) -> Segment:
    cells = np.full((frames, 4), 1 / (4 * frames), np.float32)
    cells[0] = np.array([0.7, 0.1, 0.1, 0.1], np.float32) / frames
    words = tuple(
        Word(t, probability, 0.4, (Alternative(t, probability),), cells if attention else None, 0.5)
        for t in text.split()
    )
    times = start + np.arange(frames, dtype=np.float32) / 4
    values = {"score": -1.0, "log_probability": -3.0, "finished": True, **more}
    caption = Caption(text, words, confidence=confidence, grid=(2, 2), fit=fit, times=times, **values)  # type: ignore[arg-type]
    return Segment(start, end, caption)


def cues(segments: list[Segment] | VideoCaption) -> list[tuple[int, int, str]]:
    """Return start and end (ms) and text of every cue; three libraries must agree on both formats."""
    as_srt, as_vtt = to_srt(segments), to_webvtt(segments)
    one = [(ms(c.start), ms(c.end), c.content) for c in srt.parse(as_srt, ignore_errors=False)]
    assert [c.index for c in srt.parse(as_srt)] == list(range(1, len(one) + 1))
    two = [
        (milliseconds(c.start, "."), milliseconds(c.end, "."), c.text)
        for c in webvtt.from_buffer(io.StringIO(as_vtt))
    ]
    assert [cue[:2] for cue in one] == [cue[:2] for cue in two]
    for text, format_ in ((as_srt, "srt"), (as_vtt, "vtt")):
        three = pysubs2.SSAFile.from_string(text, format_=format_) if one else []
        assert [(e.start, e.end) for e in three] == [cue[:2] for cue in one]
        assert [e.plaintext for e in three] == [c[2] for c in (one if format_ == "srt" else two)]
    return one


def ms(time: timedelta) -> int:
    return round(time / timedelta(milliseconds=1))


# --- results --------------------------------------------------------------------------------------------


def test_records() -> None:
    one = segment(0, 2.5, "a dog", confidence=0.5)
    caption = VideoCaption((one, segment(2.5, 10, "a cat sits", confidence=0.9)), 10.0)
    record = json.loads(json.dumps(caption.to_dict()))
    assert list(record) == ["schema", "caption", "confidence", "duration", "segments", "error"]
    assert record["error"] is None
    assert record["schema"] == SCHEMA_VERSION
    assert record["caption"] == caption.text == "a dog. a cat sits"
    assert record["confidence"] == pytest.approx(0.8)  # by length
    assert record["duration"] == 10
    first = record["segments"][0]
    photo = one.caption.to_dict()
    assert (first["start"], first["end"], first["times"]) == (0, 2.5, [0.0, 0.25])
    assert {k: v for k, v in first.items() if k not in ("start", "end", "times")} == {
        k: v for k, v in photo.items() if k != "schema"
    }
    full = caption.to_dict(attention=True)["segments"][1]
    assert np.shape(full["words"][0]["attention"]) == (2, 2, 2)  # frame, row, column
    assert full["grid"] == [2, 2]
    assert str(caption) == "0:00 to 0:02.5: a dog\n0:02.5 to 0:10: a cat sits"
    assert VideoCaption((), 1.0).to_dict()["caption"] == ""
    assert VideoCaption((), 1.0).confidence == 0


# --- formats --------------------------------------------------------------------------------------------


def test_formats() -> None:
    segments = [segment(0, 2.5, "a dog runs"), segment(2.5, 4, "a cat sits")]
    assert to_srt(segments) == (
        "1\n00:00:00,000 --> 00:00:02,500\na dog runs\n\n2\n00:00:02,500 --> 00:00:04,000\na cat sits\n"
    )
    assert to_webvtt(VideoCaption(tuple(segments), 4)) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\na dog runs\n\n00:00:02.500 --> 00:00:04.000\na cat sits\n"
    )
    assert cues(segments) == [(0, 2500, "a dog runs"), (2500, 4000, "a cat sits")]


def test_no_segments() -> None:
    assert to_srt([]) == ""
    assert to_webvtt([]) == "WEBVTT\n"
    assert cues([segment(0, 1, "")]) == []
    assert cues([segment(0, 1, " \n ")]) == []


def test_hours_beyond_99() -> None:
    late = [segment(3600 * 123 + 61.5, 3600 * 123 + 62, "a dog")]
    assert "123:01:01,500 --> 123:01:02,000" in to_srt(late)
    assert "123:01:01.500 --> 123:01:02.000" in to_webvtt(late)
    (cue,) = srt.parse(to_srt(late))
    assert cue.start == timedelta(hours=123, minutes=1, seconds=1.5)


def test_text_cannot_break_out() -> None:
    said = "a <b>dog</b> & cat\n\n9\n00:00:09,000 --> 00:00:10,000\r\nNOTE \x00{\\an8}\u2028\ud800x"
    segments = [segment(1, 2, said), segment(2, 3, "a cat")]
    plain = [c.content for c in srt.parse(to_srt(segments), ignore_errors=False)]
    assert len(plain) == 2
    assert " ".join(plain[0].split()) == ("a ‹b›dog‹/b› & cat 9 00:00:09,000 --› 00:00:10,000 NOTE (\\an8} x")
    for line in to_webvtt(segments).splitlines()[1:]:
        if "-->" in line:
            assert line.count(":") == 4
            assert len(line) == 29
        assert "<" not in line
        assert line.replace("-->", "").count(">") == 0
    assert "&lt;b&gt;dog&lt;/b&gt; &amp; cat" in to_webvtt(segments)
    assert "--&gt;" in to_webvtt(segments)
    assert len(webvtt.from_buffer(io.StringIO(to_webvtt(segments)))) == 2
    to_srt(segments).encode()  # no lone surrogate is left


def test_unsure_captions_say_so() -> None:
    assert cues([segment(0, 1, "a dog", confidence=0.2)])[0][2] == "(a guess) a dog"
    assert "\nA DOG\n" in to_srt([segment(0, 1, "a dog")], text=lambda caption: caption.text.upper())


# --- time -----------------------------------------------------------------------------------------------


def test_order_and_overlap() -> None:
    segments = [segment(4, 9, "c"), segment(0, 5, "a"), segment(3, 4.5, "b")]
    assert cues(segments) == [(0, 3000, "a"), (3000, 4000, "b"), (4000, 9000, "c")]
    same_start = [segment(0, 5, "long"), segment(0, 3, "short")]
    assert cues(same_start) == [(0, 3000, "short"), (3000, 5000, "long")]


def test_one_frame_is_shown_for_a_moment() -> None:
    assert cues([segment(1, 1, "a dog")]) == [(1000, 2000, "a dog")]
    assert cues([segment(1, 1, "a dog"), segment(1.4, 2, "a cat")]) == [
        (1000, 1400, "a dog"),
        (1400, 2000, "a cat"),
    ]
    assert cues([segment(1, 1.0002, "a dog")]) == [(1000, 2000, "a dog")]


def test_times_before_the_clip() -> None:
    assert cues([segment(-2, -1, "a"), segment(-0.04, 1, "b")]) == [(0, 1000, "b")]


@pytest.mark.parametrize("times", [(2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_impossible_times(times: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"^a segment (ends at|from)[^\n]*$"):
        to_srt([segment(*times, "a dog", frames=1)])


def test_random_segments_keep_the_rules() -> None:
    chance = random.Random(3)
    words = ["a", "dog", "runs", "-->", "<i>", "&", "{\\b1}", "Straße", "犬" * 30, "x" * 50, "über"]
    for _ in range(50):
        segments = []
        for _ in range(chance.randrange(12)):
            start = chance.choice([chance.uniform(0, 8), float(chance.randrange(8))])
            length = chance.choice([0, 0.0004, 0.001, 0.003, chance.uniform(0, 5)])
            text = " ".join(chance.choices(words, k=chance.randrange(30)))
            segments.append(segment(start, start + length, text, frames=1))
        for document, mark in ((to_srt(segments), ","), (to_webvtt(segments), ".")):
            before = 0
            for block in document.removeprefix("WEBVTT\n\n").split("\n\n"):
                lines = block.strip("\n").split("\n")
                if lines in ([""], ["WEBVTT"]):
                    continue
                times, *said = lines[1:] if mark == "," else lines
                begin, finish = (milliseconds(t, mark) for t in times.split(" --> "))
                assert before <= begin < finish
                before = finish
                assert said
                assert all(line.strip() for line in said)
                if finish - begin >= 20:
                    assert len(said) <= 2
        list(srt.parse(to_srt(segments), ignore_errors=False))
        webvtt.from_buffer(io.StringIO(to_webvtt(segments)))


def milliseconds(time: str, mark: str) -> int:
    clock, rest = time.split(mark)
    hours, minutes, seconds = map(int, clock.split(":"))
    assert minutes < 60
    assert seconds < 60
    assert len(rest) == 3
    return 1000 * (3600 * hours + 60 * minutes + seconds) + int(rest)


# --- lines ----------------------------------------------------------------------------------------------


def test_two_lines_of_about_the_same_length() -> None:
    (cue,) = cues([segment(0, 4, "a man in a red shirt is riding a bicycle down the street")])
    first, second = cue[2].split("\n")
    assert max(len(first), len(second)) <= 42
    assert abs(len(first) - len(second)) < 8


def test_long_texts_follow_each_other() -> None:
    text = " ".join(["a man in a red shirt is riding a bicycle"] * 4)  # 163 letters
    found = cues([segment(10, 20, text)])
    assert len(found) == 2
    assert " ".join(c[2].replace("\n", " ") for c in found) == text
    assert found[0][0] == 10_000
    assert found[0][1] == found[1][0]
    assert found[1][1] == 20_000
    assert 4500 < found[0][1] - found[0][0] < 6500  # by their length
    assert all(len(line) <= 42 for c in found for line in c[2].split("\n"))


def test_no_time_for_two_cues() -> None:
    text = " ".join(["word"] * 60)
    (one, two) = cues([segment(0, 0.001, text), segment(0.001, 5, "b")])
    assert one[:2] == (0, 1)
    assert one[2].replace("\n", " ") == text
    assert two == (1, 5000, "b")


def test_scripts_without_spaces() -> None:
    (cue,) = cues([segment(0, 4, "一只黑色的狗在长满青草的田野上奔跑着追逐一只红色的球")])
    lines = cue[2].split("\n")
    assert len(lines) == 2
    assert all(len(line) <= 21 for line in lines)


# --- neighbours -----------------------------------------------------------------------------------------


def test_cues_that_say_the_same_are_one() -> None:
    segments = [
        segment(0, 2, "a dog"),
        segment(2, 4, "a dog"),
        segment(4, 6, "a cat"),
        segment(6, 8, "a dog"),
    ]
    assert cues(segments) == [(0, 4000, "a dog"), (4000, 6000, "a cat"), (6000, 8000, "a dog")]
    assert len(cues([segment(0, 2, "a dog"), segment(3, 4, "a dog")])) == 2  # a pause lies between


def test_merge() -> None:
    parts = [
        segment(0, 2, "a dog", probability=0.2, confidence=0.4, frames=2, score=-1.0),
        segment(2, 8, "a dog", probability=0.6, confidence=0.8, frames=6, score=-2.0, finished=False),
        segment(8, 10, "a cat"),
    ]
    dog, cat = merge(parts)
    assert (dog.start, dog.end, dog.caption.text) == (0, 8, "a dog")
    assert cat is parts[2]
    assert dog.caption.confidence == pytest.approx(0.7)
    assert dog.caption.score == pytest.approx(-1.75)
    assert not dog.caption.finished
    assert dog.times.tolist() == [*parts[0].times.tolist(), *parts[1].times.tolist()]
    word = dog.caption.words[0]
    assert word.probability == pytest.approx(0.5)
    assert word.alternatives[0].text == "a"
    assert word.alternatives[0].probability == pytest.approx(0.5)
    assert word.attention is not None
    assert word.attention.shape == (8, 4)
    assert word.attention.dtype == np.float32
    assert word.attention.sum() == pytest.approx(1)
    # relative to an even share, every cell keeps its weight: the same colours
    apart = [part.caption.words[0].attention for part in parts[:2]]
    before = np.concatenate([cells * cells.size for cells in apart if cells is not None])
    np.testing.assert_allclose(word.attention * word.attention.size, before, rtol=1e-5)
    assert dog.caption.attention is not None
    assert dog.caption.attention.shape == (2, 8, 4)


def test_merge_of_many_weighs_each_by_its_length() -> None:
    parts = [segment(i, i + 1, "a dog", confidence=c) for i, c in enumerate((0.1, 0.2, 0.6))]
    (one,) = merge(parts)
    assert one.caption.confidence == pytest.approx(0.3)
    assert one.caption.words[0].attention.sum() == pytest.approx(1)  # type: ignore[union-attr]
    assert merge([]) == []
    assert parts[0].end == 1  # as it was


def test_guesses_that_both_name_are_merged() -> None:
    def guessing(start: float, end: float, guesses: dict[str, float], weights: list[float]) -> Segment:
        made = segment(start, end, "a dog")
        words = tuple(replace(w, word_attention=np.array(weights, np.float32)) for w in made.caption.words)
        named = tuple(Alternative(word, p) for word, p in guesses.items())
        return replace(made, caption=replace(made.caption, words=words, guesses=named))

    (both,) = merge(
        [
            guessing(0, 1, {"dog": 0.9, "grass": 0.5, "park": 0.4}, [0.5, 0.2, 0.1]),
            guessing(1, 4, {"park": 0.8, "dog": 0.5}, [0.3, 0.6]),
        ]
    )
    assert [(g.text, round(g.probability, 6)) for g in both.caption.guesses] == [("dog", 0.6), ("park", 0.7)]
    for word in both.caption.words:
        assert word.word_attention is not None
        np.testing.assert_allclose(word.word_attention, [0.575, 0.25], rtol=1e-6)


def test_what_does_not_merge() -> None:
    dog = segment(0, 2, "a dog")
    assert len(merge([dog, segment(3, 4, "a dog")])) == 2
    assert len(merge([dog, segment(2, 4, "a dog", fit=Fit("squash", 32, 48, (0, 0, 32, 48)))])) == 2
    assert len(merge([dog, segment(2, 4, "a dog", attention=False)])) == 2
    (one,) = merge([segment(0, 2, "a dog", attention=False), segment(2, 4, "a dog", attention=False)])
    assert one.caption.words[0].attention is None


# --- files ----------------------------------------------------------------------------------------------


def test_save(tmp_path: Path) -> None:
    segments = [segment(0, 1, "ein Hund läuft über die Straße 犬")]
    for name in ("a.srt", "a.VTT"):
        path = save(segments, tmp_path / name)
        assert path == tmp_path / name
        (event,) = pysubs2.load(str(path), encoding="utf-8")
        assert event.plaintext == "ein Hund läuft über die Straße 犬"
        assert b"\r" not in path.read_bytes()
    assert (tmp_path / "a.VTT").read_bytes().startswith(b"WEBVTT\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.VTT", "a.srt"]


def test_save_keeps_the_old_file_when_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.srt"
    path.write_text("old")
    with pytest.raises(ValueError, match="ends at"):
        save([segment(2, 1, "a")], path)
    with pytest.raises(ValueError, match=r"cannot tell a format from 'a\.txt': .*\.srt or \.vtt"):
        save([], tmp_path / "a.txt")
    with pytest.raises(OSError, match=r"^cannot write [^\n]*no[^\n]*a\.srt"):
        save([], tmp_path / "no" / "a.srt")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.srt"]


def test_subtitles_need_no_video_libraries() -> None:
    code = (
        "import sys, captioner.subtitles, captioner.caption;"
        "print([name for name in ('cv2', 'av', 'scenedetect') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
