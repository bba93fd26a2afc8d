"""The video tab in a real browser: needs Chromium (Debian's package chromium) and playwright."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cv2", reason='needs OpenCV: pip install "captioner[video]"')
pytest.importorskip("av", reason='needs PyAV: pip install "captioner[video]"')

import gradio as gr
from captioner_demo import Limits, about, build, mount, photo, video
from captioner_demo.engine import Engine
from fastapi import FastAPI
from gradio.route_utils import delete_files_created_by_app
from PIL import Image

from captioner import Segment, VideoCaption
from demo.clip_data import write_clip
from demo.pages import accessible, answers_quickly, asked, opened, until

LIMITS = Limits(mb=4, seconds=40)
WORD = ".cap-clip .cap-word"


@pytest.fixture(scope="module")
def blocks(start: Callable[[Any], str], engine: Engine) -> gr.Blocks:
    return build(engine, LIMITS, tabs=(photo, video, about))


@pytest.fixture(scope="module")
def address(start: Callable[[Any], str], blocks: gr.Blocks) -> str:
    return start(mount(FastAPI(), "/captioner", blocks=blocks, limits=LIMITS)) + "/captioner"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A clip of two scenes of 4 seconds: a segment of 5 seconds and one of 3."""
    return str(write_clip(tmp_path_factory.mktemp("clips") / "two scenes.mp4", seconds=4))


@pytest.fixture(scope="module")
def segments(engine: Engine, clip: str) -> tuple[Segment, ...]:
    """What the page must show."""
    found = engine.captioner.caption_video(clip).segments
    assert len(found) == 2
    return found


@pytest.fixture(scope="module")
def tab(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address, "Video") as page:
        yield page


@pytest.fixture
def page(tab: Any) -> Any:
    """The tab, opened once, without a clip."""
    empty(tab)
    return tab


@pytest.fixture
def captioned(tab: Any, clip: str) -> Any:
    """The tab with the clip of two scenes; its first segment is shown, and no word is selected."""
    if tab.locator(".cap-clip").count() == 0 or tab.inner_text(".cap-clip .cap-name") != Path(clip).name:
        empty(tab)
        give(tab, clip)
    tab.click(".cap-block[data-segment='0']")
    return tab


def empty(page: Any) -> None:
    if page.locator(".cap-clip").count():
        page.click(".cap-clip [data-do=another]")
        page.wait_for_selector(".cap-clip", state="detached")
    page.wait_for_selector("#video-upload input[type=file]", state="attached")


def give(page: Any, path: str | Path, wait: bool = True) -> None:
    page.set_input_files("#video-upload input[type=file]", str(path))
    if wait:
        page.wait_for_selector(WORD)


def position(page: Any, where: str = ".cap-clip") -> float:
    return page.evaluate(f"document.querySelector('{where} video').currentTime")


def drawn(page: Any) -> list[list[int]]:
    """Return the opacity of every frame's canvas at a hundred places."""
    return page.evaluate(
        """() => Array.from(document.querySelectorAll(".cap-frame canvas"), (c) => {
        const p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return Array.from({length: 100}, (_, i) => p[4 * Math.floor(i / 100 * c.width * c.height) + 3]); })"""
    )


def test_upload_shows_progress_and_then_the_captions(
    page: Any, segments: tuple[Segment, ...], clip: str
) -> None:
    # what is shown for a moment only is noted by the page itself
    page.evaluate(
        """() => { window.noted = []; const view = document.getElementById("video-view");
        new MutationObserver(() => { const work = view.querySelector(".cap-working");
        if (work && work.querySelector("[role=progressbar]")) window.noted.push(work.innerText); })
        .observe(view, {childList: true, subtree: true}); }"""
    )
    give(page, clip)
    assert any("two scenes.mp4" in text and "Watching: 0:0" in text for text in page.evaluate("window.noted"))
    page.wait_for_selector(WORD)
    assert page.locator(".cap-working").count() == 0
    expected = [segment.caption.text for segment in segments]
    assert page.locator(".cap-line .cap-text").all_inner_texts() == expected
    assert " ".join(page.inner_text(".cap-clip .cap-sentence").split()) == expected[0]
    page.wait_for_function("document.querySelector('.cap-clip video').duration > 7.5")


def test_selecting_a_segment_seeks_and_shows_its_frames(
    captioned: Any, segments: tuple[Segment, ...]
) -> None:
    page = captioned
    first = page.get_attribute(".cap-frame img >> nth=0", "src")
    page.click(".cap-block[data-segment='1']")
    page.wait_for_function("Math.abs(document.querySelector('.cap-clip video').currentTime - 5) < 0.01")
    page.wait_for_function("document.querySelector('.cap-clip video').readyState >= 2")
    assert page.locator(".cap-frame").count() == len(segments[1].times)
    assert page.get_attribute(".cap-frame img >> nth=0", "src") != first
    until(
        page,
        "() => Array.from(document.querySelectorAll('.cap-frame img')).every((i) => i.naturalWidth > 50)",
    )
    assert " ".join(page.inner_text(".cap-clip .cap-sentence").split()) == segments[1].caption.text
    assert page.get_attribute(".cap-line[data-segment='1']", "aria-pressed") == "true"
    page.click(".cap-frame[data-frame='4']")  # and a frame leads there
    assert position(page) == pytest.approx(float(segments[1].times[4]), abs=0.01)
    page.click(".cap-line[data-segment='0']")
    assert position(page) == 0


def test_selecting_a_word_shows_where_it_looked_in_every_frame(
    captioned: Any, segments: tuple[Segment, ...]
) -> None:
    page = captioned
    requests = asked(page)
    caption = segments[0].caption
    page.click(f"{WORD}[data-word='1']")
    first = drawn(page)
    assert len(first) == len(caption.times)
    assert max(map(max, first)) > 60
    assert page.evaluate("getComputedStyle(document.querySelector('.cap-frame canvas')).opacity") == "1"
    page.click(f"{WORD}[data-word='2']")
    assert drawn(page) != first
    attention = caption.words[2].attention
    assert attention is not None
    shown = [float(text.split()[0].strip("<>")) for text in page.locator(".cap-share").all_inner_texts()]
    assert shown == pytest.approx((100 * attention.sum(1)).tolist(), abs=1)
    assert page.inner_text(".cap-clip .cap-cardtop strong") == caption.words[2].text
    page.click(f"{WORD}[data-word='2']")
    page.mouse.move(5, 5)
    assert page.evaluate("getComputedStyle(document.querySelector('.cap-frame canvas')).opacity") == "0"
    assert requests == []  # the server was asked nothing


def test_selecting_a_word_answers_within_100_ms(captioned: Any) -> None:
    answers_quickly(captioned, WORD)


def test_while_it_plays_the_page_follows(captioned: Any) -> None:
    page = captioned
    page.evaluate(
        "const v = document.querySelector('.cap-clip video'); v.muted = true; v.currentTime = 4.6; v.play()"
    )
    page.wait_for_selector(".cap-block[data-segment='1'][aria-pressed=true]")
    page.wait_for_function("document.querySelector('.cap-clip video').currentTime > 5.1")
    page.click(f"{WORD}[data-word='0']")  # a look at a word holds it
    assert page.evaluate("document.querySelector('.cap-clip video').paused")


def test_by_keyboard(captioned: Any) -> None:
    page = captioned
    page.focus(".cap-block[data-segment='0']")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.segment") == "1"
    assert position(page) == pytest.approx(5, abs=0.01)
    assert page.locator(".cap-block[tabindex='0']").count() == 1
    page.focus(f"{WORD}[data-word='0']")
    page.keyboard.press("Enter")
    first = drawn(page)
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.word") == "1"
    assert drawn(page) != first
    assert page.inner_text(".cap-clip .cap-sr").startswith(page.inner_text(f"{WORD}[data-word='1']"))
    page.keyboard.press("Escape")
    assert page.locator(f"{WORD}[aria-pressed=true]").count() == 0


def test_downloads_open(captioned: Any, tmp_path: Path) -> None:
    page = captioned
    said = page.locator(".cap-line .cap-text").all_inner_texts()
    for kind, name in (
        ("srt", "two-scenes.srt"),
        ("vtt", "two-scenes.vtt"),
        ("json", "two-scenes-captions.json"),
    ):
        with page.expect_download() as waited:
            page.click(f"#video-{kind}")
        assert waited.value.suggested_filename == name
        waited.value.save_as(tmp_path / name)
    assert (tmp_path / "two-scenes.srt").read_text().startswith("1\n00:00:00,000 --> 00:00:05,000\n")
    assert (tmp_path / "two-scenes.vtt").read_text().startswith("WEBVTT\n")
    record = json.loads((tmp_path / "two-scenes-captions.json").read_text())
    assert [segment["caption"] for segment in record["segments"]] == said


def test_the_overlay_is_drawn_plays_and_is_cleaned_up(
    captioned: Any, blocks: gr.Blocks, uploads: Path, tmp_path: Path
) -> None:
    page = captioned
    page.click("#video-draw")
    page.wait_for_selector(".cap-overlay video")
    page.wait_for_function("document.querySelector('.cap-overlay video').duration > 7.5")
    page.evaluate("const v = document.querySelector('.cap-overlay video'); v.muted = true; v.play()")
    page.wait_for_function("document.querySelector('.cap-overlay video').currentTime > 0.5")
    assert page.evaluate("document.querySelector('.cap-overlay video').videoHeight") > 120
    with page.expect_download() as waited:
        page.click(".cap-overlay a")
    assert waited.value.suggested_filename == "two-scenes-overlay.mp4"
    waited.value.save_as(tmp_path / "o.mp4")
    assert (tmp_path / "o.mp4").read_bytes()[4:8] == b"ftyp"
    page.click(".cap-clip [data-do=another]")
    page.wait_for_selector(".cap-overlay", state="detached")
    assert list(uploads.rglob("*-overlay.mp4"))
    delete_files_created_by_app(blocks, None)
    assert not list(uploads.rglob("*-overlay.mp4"))


def test_options_are_obeyed(captioned: Any) -> None:
    page = captioned
    page.click("button:has-text('Advanced') >> visible=true")
    page.fill("input[type=number][aria-label*='Segment'] >> visible=true", "60")
    page.press("input[type=number][aria-label*='Segment'] >> visible=true", "Tab")
    page.click("#video-again")
    page.wait_for_function("document.querySelectorAll('.cap-block').length === 1")
    assert page.inner_text(".cap-when") == "0:00 to 0:08"
    page.fill("input[type=number][aria-label*='Segment'] >> visible=true", "5")
    page.press("input[type=number][aria-label*='Segment'] >> visible=true", "Tab")
    page.click("button:has-text('Advanced') >> visible=true")
    empty(page)


def test_what_is_no_clip_is_told_in_one_line(page: Any, photo: str, clip: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("dear diary")
    give(page, path, wait=False)
    told = page.inner_text(".toast-body:has-text('notes.mp4')")
    assert "/" not in told.replace("http://", "")
    page.wait_for_selector(".cap-working", state="detached")
    page.wait_for_selector("#video-upload >> visible=true")
    give(page, clip)  # and the page goes on


def test_a_clip_that_the_browser_cannot_play_is_shown_by_its_frames(
    page: Any, photo: str, tmp_path: Path
) -> None:
    path = tmp_path / "<img src=x onerror=document.title='bad'>.gif"
    picture = Image.open(photo).resize((120, 90))
    picture.save(path, save_all=True, append_images=[picture.rotate(180)], duration=500)
    give(page, path)
    page.wait_for_selector(".cap-still img")
    before = page.get_attribute(".cap-still img", "src")
    page.click(".cap-frame[data-frame='1']")
    assert page.get_attribute(".cap-still img", "src") != before
    assert page.get_attribute(".cap-still img", "alt")
    assert page.locator(".cap-clip .cap-name img").count() == 0
    assert page.title() != "bad"


def test_stop_keeps_what_was_captioned(
    page: Any, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clip is held after the first of its scenes, until Stop has been clicked."""
    real, free = engine.captioner.caption_segments, threading.Event()

    def held(*arguments: Any, **options: Any) -> Iterator[Segment]:
        for count, segment in enumerate(real(*arguments, **options), 1):
            yield segment
            assert count > 1 or free.wait(120)

    monkeypatch.setattr(engine.captioner, "caption_segments", held)
    give(page, write_clip(tmp_path / "long.mp4", seconds=10), wait=False)
    page.wait_for_selector(".cap-sofar li")
    accessible(page, "at work")
    page.click("#video-stop")
    page.wait_for_selector(WORD)
    free.set()
    assert page.locator(".cap-line").count() == 1
    assert "long.mp4: stopped; captioned up to 0:10 of 0:20" in page.inner_text(".cap-clip .cap-note")
    page.wait_for_selector("#video-stop", state="hidden")
    with page.expect_download() as waited:
        page.click("#video-srt")
    assert Path(waited.value.path()).read_text().count("-->") == 1


def test_drawing_can_be_stopped(
    captioned: Any, engine: Engine, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, free = captioned, threading.Event()
    real = VideoCaption.overlay

    def held(self: VideoCaption, clip: str, path: Path, *, progress: Callable[[float], None]) -> Any:
        def slow(seconds: float) -> None:
            progress(seconds)
            assert seconds < 2 or free.wait(120)

        return real(self, clip, path, progress=slow)

    monkeypatch.setattr(VideoCaption, "overlay", held)
    before = set(uploads.rglob("*overlay*"))
    page.click("#video-draw")
    page.wait_for_selector("#video-overlay .cap-at")
    page.click("#video-undraw")
    free.set()
    page.wait_for_selector("#video-undraw", state="hidden")
    page.wait_for_selector("#video-overlay .cap-working", state="detached")
    assert page.locator(".cap-overlay").count() == 0
    for _ in range(100):
        if set(uploads.rglob("*overlay*")) == before:
            break
        time.sleep(0.1)
    assert set(uploads.rglob("*overlay*")) == before


@pytest.mark.slow
def test_an_example(page: Any) -> None:
    page.click("#video-examples [data-pick='0']")
    page.wait_for_selector(WORD)
    assert page.inner_text(".cap-clip .cap-name") == "world.mp4"
    page.wait_for_function("document.querySelector('.cap-clip video').duration > 29")


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("dark", 390),
        pytest.param("light", 390, marks=pytest.mark.slow),
        pytest.param("light", 1280, marks=pytest.mark.slow),
        pytest.param("dark", 1280, marks=pytest.mark.slow),
    ],
)
def test_no_serious_violation_of_accessibility(
    browser: Any, address: str, clip: str, scheme: str, width: int
) -> None:
    size = {"width": width, "height": 844}
    with opened(browser, address, "Video", color_scheme=scheme, viewport=size) as page:
        accessible(page, "empty")
        give(page, clip)
        page.click(f"{WORD}[data-word='1']")
        accessible(page, "captioned")
