from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("cv2", reason='needs OpenCV: pip install "captioner[video]"')
pytest.importorskip("av", reason='needs PyAV: pip install "captioner[video]"')

from captioner_demo import video
from captioner_demo.engine import Engine
from captioner_demo.limits import LimitError, Limits
from captioner_demo.video import Cut, Session, Working
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from captioner import Captioner, VideoCaption
from captioner.caption import clock
from captioner.video import VideoError, frames, probe
from demo.clip_data import write_clip, write_sound

LIMITS = Limits(mb=4, seconds=60)
CUT = Cut(segment=3.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A clip of two scenes of 3 seconds."""
    return str(write_clip(tmp_path_factory.mktemp("clips") / "two scenes.mp4"))


@pytest.fixture(scope="module")
def steps(captioner: Captioner, clip: str) -> list[Working | Session]:
    return list(video.caption_clip(captioner, LIMITS, clip, CUT))


@pytest.fixture(scope="module")
def session(steps: list[Working | Session]) -> Session:
    assert isinstance(steps[-1], Session)
    return steps[-1]


def sent(text: str) -> dict[str, Any]:
    found = re.search(r'data-clip="([^"]*)"', text)
    assert found
    return json.loads(html.unescape(found[1]))


def error_of(captioner: Captioner, path: Path | str, limits: Limits = LIMITS) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        list(video.caption_clip(captioner, limits, str(path), CUT))
    line = str(caught.value)
    assert "\n" not in line
    assert str(Path(path).parent) not in line
    return line


# --- captioning -----------------------------------------------------------------------------------------


def test_progress_then_the_captions(captioner: Captioner, clip: str, steps: list[Working | Session]) -> None:
    *working, session = steps
    assert isinstance(session, Session)
    assert all(isinstance(step, Working) for step in working)
    counts = [len(step.segments) for step in working if isinstance(step, Working)]
    assert counts == sorted(counts)
    assert {0, 1, 2} <= set(counts)
    expected = captioner.caption_video(clip, segment=3.0)
    assert json.dumps(session.caption.to_dict()) == json.dumps(expected.to_dict())
    assert session.caption.error is None
    assert len({segment.caption.text for segment in session.caption.segments}) == 2


def test_closing_ends_the_work(captioner: Captioner, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.mp4", seconds=30)
    steps = video.caption_clip(captioner, LIMITS, str(path), Cut(every=0.1))
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "captioner-clip"]


def test_when_it_is_stopped_what_was_captioned_stays(captioner: Captioner, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.mp4", seconds=30)
    stop = threading.Event()
    for step in video.caption_clip(captioner, LIMITS, str(path), Cut(every=0.5, segment=2), stop):
        if isinstance(step, Working) and len(step.segments) >= 2:
            stop.set()
    assert isinstance(step, Session)
    assert step.stopped
    count = len(step.caption.segments)
    assert 2 <= count < 30
    assert step.caption.duration == step.caption.segments[-1].end
    until = clock(step.caption.duration)
    assert step.caption.error == f"long.mp4: stopped; captioned up to {until} of 1:00"
    assert not [thread for thread in threading.enumerate() if thread.name == "captioner-clip"]
    shown = video.show(step)
    assert "stopped; captioned up to" in shown
    assert len(sent(shown)["segments"]) == count


def test_a_clip_can_be_stopped_before_its_first_segment(captioner: Captioner, clip: str) -> None:
    stop = threading.Event()
    stop.set()
    *_, session = video.caption_clip(captioner, LIMITS, clip, CUT, stop)
    assert isinstance(session, Session)
    assert session.stopped
    assert len(session.caption.segments) < 2
    assert "stopped; captioned up to 0:0" in video.show(session)


def test_only_ones_own_work_is_stopped() -> None:
    stops = video.Stops()
    with stops.event("one") as one, stops.event("two") as two:
        stops.stop("one")
        stops.stop("three")
        assert (one.is_set(), two.is_set()) == (True, False)
        with stops.event("two") as later:
            stops.stop("two")
            assert (two.is_set(), later.is_set()) == (False, True)
    stops.stop("one")
    assert stops._events == {}


def test_longer_clips_are_captioned_up_to_the_limit(captioner: Captioner, clip: str) -> None:
    *_, session = video.caption_clip(captioner, replace(LIMITS, seconds=2), clip, CUT)
    assert isinstance(session, Session)
    assert session.caption.duration == pytest.approx(2, abs=0.01)
    assert session.caption.error == (
        "two scenes.mp4: only the first 2 seconds were captioned; that is the limit here"
    )
    assert html.escape(session.caption.error) in video.show(session)


def test_a_truncated_clip_is_captioned_as_far_as_it_goes(captioner: Captioner, tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mkv", codec="mpeg4")
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole.read_bytes()[: int(0.7 * whole.stat().st_size)])
    *_, session = video.caption_clip(captioner, LIMITS, str(path), CUT)
    assert isinstance(session, Session)
    assert session.caption.segments
    assert session.caption.error is not None
    assert session.caption.error.startswith("cut.mkv: the file is truncated")
    text = video.show(session)
    assert 'class="cap-note cap-note-error" role="status"' in text
    assert html.escape(session.caption.error) in text
    assert all(picture for s in sent(text)["segments"] for picture in s["pictures"])


def test_what_cannot_be_captioned_is_told_in_one_line(
    captioner: Captioner, clip: str, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the photo tab" in error_of(captioner, photo)
    assert "larger than the 0.001 MB" in error_of(captioner, clip, Limits(mb=0.001))
    assert "0.0 megapixels a frame; at most 0.01" in error_of(captioner, clip, Limits(megapixels=0.01))
    line = error_of(captioner, write_sound(tmp_path / "song.mp4"))
    assert line == "song.mp4: there is sound, but no pictures in it; give a video"
    head = tmp_path / "head.mp4"
    head.write_bytes(Path(clip).read_bytes()[:100])
    assert error_of(captioner, head).startswith("head.mp4: the file is truncated")
    text = tmp_path / "notes.mp4"
    text.write_text("dear diary")
    assert error_of(captioner, text).startswith("notes.mp4: ")
    assert "choose it again" in error_of(captioner, tmp_path / "gone.mp4")
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert error_of(captioner, clip) == 'two scenes.mp4: videos need OpenCV; pip install "captioner[video]"'


def test_a_large_animation_is_refused_before_it_is_decoded(captioner: Captioner, tmp_path: Path) -> None:
    path = tmp_path / "large.gif"
    shades = [Image.new("L", (3000, 2000), shade) for shade in (0, 255)]
    shades[0].save(path, save_all=True, append_images=shades[1:])
    assert "6.0 megapixels a frame; at most 5" in error_of(captioner, path, replace(LIMITS, megapixels=5))


def test_an_animation_is_captioned(captioner: Captioner, photo: str, tmp_path: Path) -> None:
    path = tmp_path / "moves.gif"
    picture = Image.open(photo).resize((120, 90))
    picture.save(path, save_all=True, append_images=[picture.rotate(180)], duration=500)
    *_, session = video.caption_clip(captioner, LIMITS, str(path), CUT)
    assert isinstance(session, Session)
    assert session.caption.segments[0].times.tolist() == [0, 0.5]
    assert len(sent(video.show(session))["segments"][0]["pictures"]) == 2


def test_shots_need_pyscenedetect(captioner: Captioner, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(VideoError, match=r"PySceneDetect; pip install"):
        list(video.caption_clip(captioner, LIMITS, clip, Cut(shots=True)))


def test_shots_are_found(captioner: Captioner, clip: str) -> None:
    pytest.importorskip("scenedetect", reason='needs PySceneDetect: pip install "captioner[shots]"')
    *_, session = video.caption_clip(captioner, LIMITS, clip, Cut(segment=60, shots=True))
    assert isinstance(session, Session)
    assert [s.start for s in session.caption.segments] == pytest.approx([0, 3.0], abs=0.11)


def test_options_from_outside_are_checked() -> None:
    assert video.cut_options() == Cut()
    assert video.cut_options(1, 10, True) == Cut(1.0, 10.0, True)
    for wrong in ({"every": 0}, {"every": "1"}, {"every": float("nan")}, {"segment": 1e9}, {"segment": True}):
        with pytest.raises(LimitError, match=next(iter(wrong))):
            video.cut_options(**wrong)


# --- what the browser gets ------------------------------------------------------------------------------


def test_the_browser_gets_all_attention(session: Session) -> None:
    shown = sent(video.show(session))["segments"]
    assert len(shown) == len(session.caption.segments) == 2
    for found, segment in zip(shown, session.caption.segments, strict=True):
        assert [word["word"] for word in found["words"]] == [w.text for w in segment.caption.words]
        assert found["times"] == pytest.approx(segment.times.tolist(), abs=1e-3)
        for packed, word in zip(found["words"], segment.caption.words, strict=True):
            attention = packed["attention"]
            weights = np.frombuffer(base64.b64decode(attention["data"]), "<u2") / 65535 * attention["most"]
            assert word.attention is not None
            assert np.abs(weights - word.attention.reshape(-1)).max() < attention["most"] / 1e5
            assert attention["shares"] == pytest.approx(word.attention.sum(1).tolist(), abs=1e-3)


def test_pictures_are_those_of_the_segments_times(session: Session) -> None:
    by_time = {round(frame.time, 2): frame.image for frame in frames(session.path, 0)}
    for segment, jpegs in zip(session.caption.segments, video.pictures(session), strict=True):
        assert len(jpegs) == len(segment.times)
        for time, jpeg in zip(segment.times, jpegs, strict=True):
            picture = np.asarray(Image.open(io.BytesIO(jpeg)), float)
            assert np.abs(picture - by_time[round(float(time), 2)]).mean() < 8


def test_of_many_frames_some_are_shown(session: Session) -> None:
    assert video.spread(3) == [0, 1, 2]
    indices = video.spread(600)
    assert len(indices) == video.SHOWN
    assert (indices[0], indices[-1]) == (0, 599)
    assert indices == sorted(set(indices))
    segment = session.caption.segments[0]
    word = replace(segment.caption.words[0], attention=np.full((600, 4), 1 / 2400, np.float32))
    packed = video.packed(word, indices)
    assert packed is not None
    assert len(packed["shares"]) == video.SHOWN
    assert packed["shares"][0] == pytest.approx(1 / 600, rel=1e-3)
    assert video.packed(replace(word, attention=None), indices) is None


def test_every_text_is_escaped(session: Session) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&"
    first, *others = session.caption.segments
    words = (replace(first.caption.words[0], text=evil), *first.caption.words[1:])
    first = replace(first, caption=replace(first.caption, text=evil, words=words))
    caption = VideoCaption((first, *others), 6.0, evil)
    odd = replace(session, name=evil, caption=caption)
    for text in (
        video.show(odd),
        video.show_working(Working(evil, 1.0, 6.0, (first,))),
        video.show_overlay(Path("/x/a.mp4"), evil, (evil,)),
    ):
        assert "<img" not in text
        assert "&lt;img" in text
    assert video.download(odd, "srt")["name"].isascii()
    assert not set('<>"/&') & set(video.download(odd, "srt")["name"])


def test_downloads(session: Session) -> None:
    def content(kind: str) -> str:
        return base64.b64decode(video.download(session, kind)["base64"]).decode()

    texts = [segment.caption.text for segment in session.caption.segments]
    assert content("srt").startswith("1\n00:00:00,000 --> 00:00:03,000\n")
    assert content("vtt").startswith("WEBVTT\n\n00:00:00.000 --> 00:00:03.000\n")
    for text in texts:
        assert all(text.split()[0] in content(kind) for kind in video.KINDS)
    record = json.loads(content("json"))
    assert record["path"] == "two scenes.mp4"
    assert [segment["caption"] for segment in record["segments"]] == texts
    assert np.shape(record["segments"][0]["words"][0]["attention"])[0] == len(
        session.caption.segments[0].times
    )
    assert video.download(session, "srt")["name"] == "two-scenes.srt"
    with pytest.raises(LimitError, match="srt, vtt, json"):
        video.download(session, "exe")


# --- the overlay ----------------------------------------------------------------------------------------


def test_the_overlay_is_drawn(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "overlay.mp4"
    *done, notes = video.draw_overlay(session, LIMITS, path)
    assert isinstance(notes, tuple)
    assert all(isinstance(seconds, float) for seconds in done)
    facts = probe(path)
    assert facts.duration == pytest.approx(6.0, abs=0.2)
    assert facts.height > 120  # the caption is below
    written = next(frames(path, 1.0)).image[:120, -160:].astype(float)
    assert np.abs(written - next(frames(session.path, 1.0)).image).mean() > 10  # heat is on it


def test_an_overlay_that_cannot_be_drawn(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(now: Session = session, limits: Limits = LIMITS) -> str:
        with pytest.raises(ValueError, match=r"\w") as caught:
            list(video.draw_overlay(now, limits, tmp_path / "o.mp4"))
        assert list(tmp_path.iterdir()) == []
        assert str(Path(session.path).parent) not in str(caught.value)
        return str(caught.value)

    assert "longer than the 2 seconds" in line(limits=replace(LIMITS, seconds=2))
    assert "choose it again" in line(replace(session, path=str(tmp_path / "gone.mp4")))
    monkeypatch.setitem(sys.modules, "av", None)
    assert line() == 'drawing on clips needs PyAV: pip install "captioner[video]"'


def test_closing_ends_the_drawing(session: Session, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.mp4", seconds=25)
    steps = video.draw_overlay(replace(session, path=str(path)), LIMITS, tmp_path / "o.mp4")
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert [file.name for file in tmp_path.iterdir()] == ["long.mp4"]
    assert not [thread for thread in threading.enumerate() if thread.name == "captioner-overlay"]


# --- examples and the API -------------------------------------------------------------------------------


def test_examples(tmp_path: Path) -> None:
    paths = video.examples()
    assert Path(paths[0]).name == "world.mp4"
    text = video.gallery(paths)
    assert text.count("<img") == text.count("data-pick") == len(paths)
    copy = video.shelved(paths[0], tmp_path)
    assert Path(copy).read_bytes() == Path(paths[0]).read_bytes()
    assert video.shelved(paths[0], tmp_path) == copy
    assert len(list(Path(copy).parent.iterdir())) == 1


def test_without_opencv_examples_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert ">world.mp4</span>" in video.gallery((video.examples()[0], "missing.mp4"))
    video.gallery.cache_clear()


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("client")))


def test_caption_video(client: Client, engine: Engine, clip: str) -> None:
    record = client.predict(handle_file(clip), segment=3, api_name="/caption_video")
    expected = engine.captioner.caption_video(clip, segment=3.0).to_dict()
    assert record.keys() == expected.keys()
    assert [s["caption"] for s in record["segments"]] == [s["caption"] for s in expected["segments"]]
    assert "attention" not in record["segments"][0]["words"][0]
    record = client.predict(handle_file(clip), every=1, attention=True, api_name="/caption_video")
    assert np.shape(record["segments"][0]["words"][0]["attention"])[1:] == (8, 8)


def test_mistakes_are_told_to_the_api(client: Client, clip: str, photo: str) -> None:
    for given, options, told in (
        (photo, {}, "cheetah1.jpg is a photo"),
        (clip, {"every": 0.001}, "every must be from 0.1 to 10 seconds"),
    ):
        with pytest.raises(AppError, match=told):
            client.predict(handle_file(given), **options, api_name="/caption_video")
    with pytest.raises(AppError, match="give a clip"):
        client.predict(None, api_name="/caption_video")


def test_the_api_is_described(url: str) -> None:
    described = httpx.get(f"{url}/gradio_api/info").json()["named_endpoints"]["/caption_video"]
    assert "segment by segment" in described["description"]
    assert [p["parameter_name"] for p in described["parameters"]] == [
        "clip",
        "every",
        "segment",
        "shots",
        "attention",
    ]


def test_other_files_are_not_read(url: str, clip: str) -> None:
    for path in (clip, "/etc/passwd", "http://127.0.0.1/a.mp4"):
        body = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, None, None, False, False]}
        assert httpx.post(f"{url}/gradio_api/call/caption_video", json=body).status_code == 403
