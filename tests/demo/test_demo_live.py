"""The live tab without a browser: windows, their bounds, what is checked, what is told."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from captioner_demo import live
from captioner_demo.engine import Engine
from captioner_demo.limits import LimitError
from captioner_demo.live import Cameras, read_frame, respond, told, view
from gradio import media
from PIL import Image

from captioner import Captioner, ImageError
from captioner.clips import Rolling
from captioner.frame_encoder import FrameConfig
from captioner.model import CaptionModel
from demo.photo_data import bomb


def jpeg(name: str = "cheetah1.jpg", size: tuple[int, int] = (160, 120), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.open(media.get_image(name)).convert("RGB").resize(size).save(buffer, kind)
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Clock:
    """A clock that a test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_camera_is_captioned_from_its_own_window(engine: Engine) -> None:
    clock = Clock()
    cameras = Cameras(clock=clock)
    rolling = Rolling(engine.captioner, live.WINDOW)
    for name in ("cheetah1.jpg", "lion.jpg", "lion.jpg"):
        clock.now += 0.5
        segment = cameras.look("one", engine, jpeg(name))
        other = cameras.look("two", engine, jpeg("tower.jpg"))  # does not disturb it
        expected = rolling.add(clock.now, jpeg(name))
        assert segment is not None
        assert other is not None
        assert segment.caption.text == expected.caption.text
        assert segment.caption.score == pytest.approx(expected.caption.score)
    assert list(segment.times) == pytest.approx([100.5, 101.0, 101.5])
    clock.now += live.WINDOW - 0.25
    later = cameras.look("one", engine, jpeg())
    assert later is not None
    assert list(later.times) == pytest.approx([101.5, 105.25])  # the window moves on
    cameras.forget("one")
    clock.now += 1
    again = cameras.look("one", engine, jpeg())
    assert again is not None
    assert len(again.times) == 1


def test_what_is_told_is_the_newest_frame(engine: Engine) -> None:
    rolling = Rolling(engine.captioner, live.WINDOW)
    rolling.add(0.0, jpeg("lion.jpg"))
    segment = rolling.add(1.5, jpeg())
    answer = json.loads(json.dumps(told(segment), allow_nan=False))
    caption = segment.caption
    assert answer["text"] == caption.text
    assert (answer["frames"], answer["seconds"]) == (2, 1.5)
    assert [word["word"] for word in answer["words"]] == [word.text for word in caption.words]
    for sent, word in zip(answer["words"], caption.words, strict=True):
        assert word.attention is not None
        assert sent["attention"] == pytest.approx(word.attention[-1].tolist(), rel=0.01)
    assert answer["even"] == pytest.approx(1 / caption.words[0].attention.size)  # type: ignore[union-attr]
    assert len(json.dumps(answer)) < 30_000


def test_a_picture_that_comes_too_soon_is_passed_over(engine: Engine) -> None:
    clock = Clock()
    cameras = Cameras(clock=clock)
    assert cameras.look("one", engine, jpeg()) is not None
    clock.now += 0.01
    assert cameras.look("one", engine, jpeg()) is None
    clock.now += live.EVERY
    segment = cameras.look("one", engine, jpeg())
    assert segment is not None
    assert len(segment.times) == 2


def test_one_picture_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, real = threading.Event(), threading.Event(), Rolling.add

    def slow(self: Rolling, when: float, image: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return real(self, when, image)

    monkeypatch.setattr(Rolling, "add", slow)
    cameras = Cameras()
    first = threading.Thread(target=cameras.look, args=("one", engine, jpeg()))
    first.start()
    assert begun.wait(60)
    with pytest.raises(LimitError, match="one picture at a time"):
        cameras.look("one", engine, jpeg())
    go_on.set()
    first.join()
    assert len(cameras) == 1


def test_cameras_are_few_and_idle_ones_are_forgotten(engine: Engine) -> None:
    clock = Clock()
    cameras = Cameras(most=2, idle=20, clock=clock)
    for key in ("one", "two"):
        cameras.look(key, engine, jpeg())
    with pytest.raises(LimitError, match="2 cameras are live here already"):
        cameras.look("three", engine, jpeg())
    clock.now += 15
    cameras.look("two", engine, jpeg())
    clock.now += 10  # 25 s for the first
    assert cameras.look("three", engine, jpeg()) is not None
    assert len(cameras) == 2


def test_cameras_are_forgotten_when_nobody_comes_any_more(engine: Engine) -> None:
    cameras = Cameras(idle=0.1)
    cameras.look("one", engine, jpeg())
    for _ in range(600):
        if not len(cameras):
            break
        time.sleep(0.05)
    assert len(cameras) == 0


def test_another_model_begins_anew(engine: Engine) -> None:
    clock = Clock()
    cameras = Cameras(most=1, clock=clock)
    cameras.look("one", engine, jpeg())
    clock.now += 1
    other = Engine(engine.captioner)
    segment = cameras.look("one", other, jpeg())
    assert segment is not None
    assert len(segment.times) == 1


def test_a_model_that_reads_both_ways_is_refused_in_one_line(captioner: Captioner) -> None:
    model, config = captioner.model, FrameConfig(cell="gru", width=8, bidirectional=True)
    both = Captioner(
        CaptionModel(model.encoder, model.decoder.config, model.tokenizer, config), captioner.header
    )
    sent = {"turn": 3, "picture": text(jpeg())}
    answer = respond(Cameras(), lambda _: Engine(both), "one", "", sent)
    assert answer["turn"] == 3
    assert "both directions" in answer["error"]
    assert "\n" not in answer["error"]


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (None, "JPEG in base64"),
        ("", "JPEG in base64"),
        (["x"], "JPEG in base64"),
        ("no base64!", "JPEG in base64"),
        ("ÄÖ", "JPEG in base64"),
        (text(b"GIF89a"), "JPEG in base64"),
        (text(jpeg(kind="PNG")), "JPEG in base64"),
        (text(bomb(60000, 60000)), "JPEG in base64"),
        (text(jpeg(size=(live.SIDE + 1, 20))), "384 pixels a side, not 385 × 20"),
        ("A" * (2 * live.FRAME_BYTES), "300 kB"),
    ],
)
def test_what_is_no_small_jpeg_is_refused(sent: Any, why: str) -> None:
    with pytest.raises(LimitError, match=why):
        read_frame(sent)


def test_a_damaged_picture_is_told_in_one_line(engine: Engine) -> None:
    whole = jpeg()
    assert read_frame(text(whole)) == whole
    with pytest.raises(ImageError):
        read_frame(text(b"\xff\xd8\xff" + bytes(50)))
    cut = {"turn": 1, "picture": text(whole[: len(whole) // 8])}
    answer = respond(Cameras(), lambda _: engine, "one", "", cut)
    assert answer["turn"] == 1
    assert "\n" not in answer.get("error", "")


@pytest.mark.parametrize(
    "sent", [None, [], "x", 5, {}, {"turn": "<b>"}, {"turn": True, "picture": {}}, {"turn": 10**30}]
)
def test_whatever_is_sent_is_answered(engine: Engine, sent: Any) -> None:
    answer = respond(Cameras(), lambda _: engine, "one", "", sent)
    assert answer["turn"] is None
    assert "JPEG" in answer["error"]


def test_stop_forgets(engine: Engine) -> None:
    cameras = Cameras()
    answer = respond(cameras, lambda _: engine, "one", "", {"turn": 1, "picture": text(jpeg())})
    assert answer["text"]
    assert len(cameras) == 1
    assert respond(cameras, lambda _: engine, "one", "", {"turn": 2, "stop": True}) == {"turn": 2}
    assert len(cameras) == 0


def test_a_model_that_may_not_be_chosen_is_told(engine: Engine) -> None:
    def refuse(model: str) -> Engine:
        raise LimitError(f"no {model}")

    sent = {"turn": 1, "picture": text(jpeg())}
    assert respond(Cameras(), refuse, "one", "other", sent) == {"turn": 1, "error": "no other"}


def test_memory_of_a_window_is_bounded(engine: Engine) -> None:
    """The page sends at most four pictures a second; who sends more often gains nothing."""
    clock = Clock()
    cameras = Cameras(clock=clock)
    features = engine.captioner.encode(jpeg())
    most = 0
    rng = np.random.default_rng(0)
    real: Callable[..., Any] = engine.captioner.encode
    engine.captioner.encode = lambda _: features  # type: ignore[method-assign]
    try:
        for _ in range(60):
            clock.now += float(rng.uniform(0.0, 0.15))
            segment = cameras.look("one", engine, b"")
            most = max(most, 0 if segment is None else len(segment.times))
    finally:
        engine.captioner.encode = real  # type: ignore[method-assign]
    assert 10 < most <= 2 * live.WINDOW / live.EVERY + 1


def test_the_page_says_how_often_and_how_small() -> None:
    assert "&quot;side&quot;:384" in view()
