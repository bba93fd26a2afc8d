"""The live tab: the camera captioned while it runs, from the last seconds, with attention on the picture.

The browser sends one small picture, and the next when the answer has come: frames between are dropped, so
that captions never lag further behind, and the rate is what the machine can hold. ``static/live.js`` has the
camera; pictures are forgotten at once, their features with the window.
"""

from __future__ import annotations

import base64
import binascii
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.context import Context

from captioner import Segment
from captioner.clips import Rolling
from captioner_demo import page
from captioner_demo.common import Demo, on_load
from captioner_demo.engine import Engine
from captioner_demo.limits import LimitError, pixel_size

LABEL = "Live"

WINDOW = 4.0
"""Seconds of the past that a caption is about."""

EVERY = 0.25
"""Least seconds between two pictures of one browser."""

SIDE = 384
"""Pixels of the longer side of a picture that the browser sends."""

FRAME_BYTES = 300_000
"""Of one such picture, at most."""

AGAIN = 8.0
"""Seconds without an answer after which the page asks again."""

PEOPLE = 16
"""Cameras at a time; further ones are told to come back."""

IDLE = 20.0
"""Seconds without a picture after which a camera is forgotten."""


# --- without a browser ----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Camera:
    engine: Engine
    rolling: Rolling
    used: float
    newest: float = float("-inf")
    lock: threading.Lock = field(default_factory=threading.Lock)


class Cameras:
    """The windows of those who are live: a bounded number, each forgotten when it is no longer used.

    Safe to call from several threads.
    """

    def __init__(
        self, most: int = PEOPLE, idle: float = IDLE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with none.

        Args:
            most: cameras at a time.
            idle: seconds without a picture after which one is forgotten.
            clock: gives the time in seconds.
        """
        self._most, self._idle, self._clock = most, idle, clock
        self._cameras: dict[str, _Camera] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def __len__(self) -> int:
        with self._lock:
            return len(self._cameras)

    def look(self, key: str, engine: Engine, picture: bytes) -> Segment | None:
        """Caption the window that ends with a picture; None if it came too soon after the one before.

        Args:
            key: of the browser.
            engine: with the model; another one than before begins a new window.
            picture: an encoded picture.

        Raises:
            LimitError: too many cameras, or a picture before the one before is done.
            ImageError: the picture cannot be read.
            ValueError: the model reads frames in both directions.
        """
        camera = self._camera(key, engine)
        if not camera.lock.acquire(blocking=False):
            raise LimitError("one picture at a time: wait for the answer to the one before")
        try:
            now = self._clock()
            if now - camera.newest < EVERY / 2:
                return None
            segment = camera.rolling.add(now, picture)
            camera.newest = now
            return segment
        finally:
            camera.used = self._clock()
            camera.lock.release()

    def forget(self, key: str) -> None:
        """Forget a browser's window, if there is one."""
        with self._lock:
            self._cameras.pop(key, None)

    def sweep(self) -> None:
        """Forget those that have not been used for long."""
        with self._lock:
            now = self._clock()
            for key, camera in list(self._cameras.items()):
                if now - camera.used > self._idle and not camera.lock.locked():
                    del self._cameras[key]

    def _camera(self, key: str, engine: Engine) -> _Camera:
        self.sweep()
        with self._lock:
            camera = self._cameras.get(key)
            if camera is None or camera.engine is not engine:
                if camera is None and len(self._cameras) >= self._most:
                    raise LimitError(f"{self._most} cameras are live here already; try again in a minute")
                camera = _Camera(engine, Rolling(engine.captioner, WINDOW), self._clock())
                self._cameras[key] = camera
            camera.used = self._clock()
            if self._timer is None:  # sweeps also when nobody comes any more
                self._later()
            return camera

    def _later(self) -> None:
        self._timer = threading.Timer(self._idle, self._again)
        self._timer.daemon = True
        self._timer.start()

    def _again(self) -> None:
        self.sweep()
        with self._lock:
            self._timer = None
            if self._cameras:
                self._later()


def read_frame(sent: Any) -> bytes:
    """Return the picture that a browser sent as base64, its kind and size checked.

    Raises:
        LimitError: not a small JPEG.
        ImageError: damaged.
    """
    if not isinstance(sent, str) or not sent:
        raise LimitError("a live picture is a JPEG in base64")
    if len(sent) > FRAME_BYTES * 4 // 3 + 4:
        raise LimitError(f"a live picture may have {FRAME_BYTES // 1000} kB")
    try:
        picture = base64.b64decode(sent, validate=True)
    except (binascii.Error, ValueError):
        raise LimitError("a live picture is a JPEG in base64") from None
    if not picture.startswith(b"\xff\xd8\xff"):
        raise LimitError("a live picture is a JPEG in base64")
    width, height = pixel_size(picture, "the live picture")
    if max(width, height) > SIDE:
        raise LimitError(f"a live picture may have {SIDE} pixels a side, not {width} × {height}")
    return picture


def told(segment: Segment) -> dict[str, Any]:
    """Return what the page shows of a segment: its words, with their attention over the newest frame."""
    caption = segment.caption
    data = page.caption_data(caption)
    cells = caption.grid[0] * caption.grid[1]
    for word in data["words"]:
        if word["attention"] is not None:
            word["attention"] = word["attention"][-cells:]
    data["text"] = page.clean(caption.text)
    data["sure"] = page.sureness(caption)
    data["mark"] = next(kind for least, _, kind in page.HEDGES if caption.confidence >= least or least == 0)
    data["seconds"] = round(segment.end - segment.start, 2)
    return data


def respond(
    cameras: Cameras, engine: Callable[[str], Engine], key: str, model: str, sent: Any
) -> dict[str, Any]:
    """Answer what a browser sent.

    Args:
        cameras: those who are live.
        engine: of a model by its name.
        key: of the browser's session.
        model: that is chosen there.
        sent: ``{"turn": n, "picture": base64}``, or ``{"turn": n, "stop": true}``. It comes from outside:
            nothing in it is trusted.

    Returns:
        ``{"turn": n}`` with what `told` gives; with nothing for a picture that was passed over; or with
        ``error``, one line.
    """
    sent = sent if isinstance(sent, dict) else {}
    turn = sent.get("turn")
    answer: dict[str, Any] = {
        "turn": turn if isinstance(turn, int) and not isinstance(turn, bool) and abs(turn) < 2**53 else None
    }
    if sent.get("stop"):
        cameras.forget(key)
        return answer
    try:
        segment = cameras.look(key, engine(model), read_frame(sent.get("picture")))
    except ValueError as error:  # all of the project's own errors are ValueErrors
        return {**answer, "error": " ".join(str(error).split())}
    return answer if segment is None else {**answer, **told(segment)}


def view() -> str:
    """Return the tab's HTML; ``static/live.js`` fills it."""
    settings = page.encoded({"side": SIDE, "every": EVERY, "again": AGAIN})
    return f"""<section class="cap-explorer cap-live" aria-label="Live camera"
data-settings="{settings}" data-state="off">
<div class="cap-stage">
<div class="cap-view">
<div class="cap-flip"><video muted playsinline aria-label="Preview of the camera"></video>
<canvas aria-hidden="true"></canvas></div>
<p class="cap-off">The camera is off.</p>
</div>
<div class="cap-under">
<div class="cap-tools" role="group" aria-label="Camera">
<button type="button" class="cap-tool cap-main" data-do="start">Start the camera</button>
<button type="button" class="cap-tool" data-do="mirror" aria-pressed="true">Mirror</button>
<button type="button" class="cap-tool" data-do="heat" aria-pressed="true">Show where it looks</button>
<button type="button" class="cap-tool" data-do="other" hidden>Other camera</button>
</div>
<div class="cap-legend" hidden><span>an even share</span><i class="cap-ramp"></i>
<span class="cap-top"></span></div>
</div>
</div>
<div class="cap-reading">
<p class="cap-note cap-note-error cap-trouble" role="alert" hidden></p>
<p class="cap-name cap-rate"></p>
<h2 class="cap-sentence" aria-label="Caption"></h2>
<p class="cap-sure" hidden><i aria-hidden="true"></i><span></span></p>
<div class="cap-card"><p class="cap-hint">What the camera shows is said again and again, from the last
{WINDOW:g} seconds. The colours show where the model looked for the word that is marked; touch a word to keep
it. Small pictures go to the machine that runs this page, and are forgotten there at once.</p></div>
<p class="cap-sr" role="status"></p>
</div>
</section>"""


# --- the tab --------------------------------------------------------------------------------------------


def tab(demo: Demo) -> None:
    """Lay out the tab and connect it."""
    cameras = Cameras()
    screen = gr.HTML(view(), js_on_load=on_load("live"), apply_default_css=False, elem_id="live-view")
    answer = gr.JSON(visible="hidden")

    def seen(event: gr.EventData, model: str, request: gr.Request) -> dict[str, Any]:
        return respond(cameras, demo.engine, str(request.session_hash), model, event._data)

    def left(request: gr.Request) -> None:
        cameras.forget(str(request.session_hash))

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    # places of their own: those who are live wait for each other, and take none from those who ask once
    screen.submit(
        seen,
        demo.model,
        answer,
        concurrency_limit=max(1, demo.workers // 4),
        concurrency_id="live",
        trigger_mode="once",
        **quiet,
    ).then(None, answer, None, js="(answer) => window.captioner.answered(answer)", **quiet)
    if Context.root_block is not None:
        Context.root_block.unload(left)
