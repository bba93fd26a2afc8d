"""The photo tab: caption a photo, see where it looked, choose other words, box a part, take it with you."""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import media

from captioner import Caption
from captioner.overlay import animation, sheet
from captioner_demo import page
from captioner_demo.common import Demo, endpoint, on_load, photo_upload
from captioner_demo.engine import Engine, Look, display_photo
from captioner_demo.limits import LimitError, Limits, beginning, read_photo, search_options

LABEL = "Photo"

EXAMPLES = ("cheetah1.jpg", "lion.jpg", "bus.png", "tower.jpg")
"""Photos that come with Gradio."""

KINDS = ("text", "json", "sheet", "animation")
"""What `download` makes."""


# --- without a browser ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Session:
    """What one tab of a browser is looking at.

    Attributes:
        key: of the photo in the engine's cache.
        path: of the uploaded file, to look again when the cache has forgotten it.
        name: of the file, for people.
        ranked: captions, best first.
        chosen: which of them is shown.
        region: the box that is captioned, in pixels of the photo as seen; None for all of it.
        prefix: words that were chosen by the person.
    """

    key: str
    path: str
    name: str
    ranked: tuple[Caption, ...]
    chosen: int = 0
    region: tuple[float, float, float, float] | None = None
    prefix: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def caption(self) -> Caption:
        """The caption that is shown."""
        return self.ranked[self.chosen]


def open_photo(
    engine: Engine, limits: Limits, path: str, options: dict[str, Any] | None = None
) -> tuple[Session, str]:
    """Caption a photo file; return the session and the page's HTML.

    Raises:
        LimitError: too many bytes or pixels.
        ImageError: not a photo.
    """
    name = page.clean(Path(path).name)
    options = options or {}
    look, caption = engine.caption_photo(read_photo(path, limits, name), **options)
    session = Session(look.key, path, name, _ranked(caption), options=options)
    return session, show(session, look)


def look_again(engine: Engine, limits: Limits, session: Session) -> Look:
    """Return what was seen of the session's photo; the network looks again only if the cache forgot it.

    Raises:
        LimitError: the upload is no longer kept.
    """
    look = engine.recall(session.key)
    if look is None:
        if not Path(session.path).is_file():
            raise LimitError("this photo is no longer kept here; choose it again")
        look = engine.look(read_photo(session.path, limits, session.name))
    return look


def rewrite(
    engine: Engine,
    limits: Limits,
    session: Session,
    *,
    prefix: str = "",
    region: Any = None,
    options: dict[str, Any] | None = None,
    selected: int = -1,
) -> tuple[Session, str]:
    """Caption the session's photo anew with other words at the beginning, another region or other options.

    Raises:
        LimitError, ValueError: for impossible ones.
    """
    look = look_again(engine, limits, session)
    options = session.options if options is None else options
    prefix = beginning(prefix)
    caption = engine.caption(look, prefix=prefix, region=region, **options)
    session = replace(
        session, ranked=_ranked(caption), chosen=0, region=region, prefix=prefix, options=options
    )
    return session, show(session, look, selected)


def act(
    engine: Engine, limits: Limits, session: Session, action: dict[str, Any]
) -> tuple[Session | None, str]:
    """Do what was asked for by touching the page; return session and HTML (None and "" for a new photo).

    Args:
        engine: the model.
        limits: of this server.
        session: what the browser is looking at.
        action: from ``page.js``: ``{"action": "choose", "word": 2, "text": "dog"}``, ``"region"`` with
            ``left``, ``top``, ``right`` and ``bottom``, ``"whole"``, ``"own"``, ``"candidate"`` with
            ``index``, ``"another"``. It comes from outside: nothing in it is trusted.

    Raises:
        LimitError, ValueError: for an impossible action; one line.
    """
    kind = action.get("action")
    if kind == "choose":
        index = whole_number(action.get("word"), "word", len(session.caption.words))
        words = [word.text for word in session.caption.words[:index]]
        text = action.get("text")
        if not isinstance(text, str) or not text.strip():
            raise LimitError("choose a word")
        prefix = " ".join([*words, text])
        return rewrite(engine, limits, session, prefix=prefix, region=session.region, selected=index)
    if kind == "own":
        return rewrite(engine, limits, session, region=session.region)
    if kind == "whole":
        return rewrite(engine, limits, session)
    if kind == "region":
        return rewrite(engine, limits, session, region=box(action))
    if kind == "candidate":
        index = whole_number(action.get("index"), "candidate", len(session.ranked))
        session = replace(session, chosen=index)
        return session, show(session, look_again(engine, limits, session))
    if kind == "another":
        return None, ""
    raise LimitError("unknown action")


def whole_number(value: Any, name: str, count: int) -> int:
    """Return an index that came from outside, checked.

    Raises:
        LimitError: it is not one of ``count``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise LimitError(f"there is no such {name}")
    return value


def box(values: dict[str, Any]) -> tuple[float, float, float, float]:
    """Return ``(left, top, right, bottom)`` that came from outside, as numbers.

    Raises:
        LimitError: a side is missing or not a number.
    """
    sides = []
    for name in ("left", "top", "right", "bottom"):
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LimitError(f"a region needs a number for {name}, in pixels of the photo")
        sides.append(float(value))
    return sides[0], sides[1], sides[2], sides[3]


def show(session: Session, look: Look, selected: int = -1) -> str:
    """Return the page's HTML for a session."""
    return page.explorer(
        session.caption,
        look.display,
        ranked=session.ranked,
        chosen=session.chosen,
        region=session.region,
        selected=min(selected, len(session.caption.words) - 1),
        name=session.name,
    )


def download(engine: Engine, limits: Limits, session: Session, kind: str) -> dict[str, str]:
    """Return a file as ``{"name", "type", "base64"}``: it goes to the browser and leaves nothing on the disk.

    Args:
        engine: the model.
        limits: of this server.
        session: what the browser is looking at.
        kind: one of `KINDS`.

    Raises:
        LimitError: an unknown kind, or a photo that is no longer kept.
    """
    caption, stem = session.caption, page.safe_stem(session.name)
    if kind == "text":
        return _file(f"{stem}-caption.txt", "text/plain;charset=utf-8", (caption.text + "\n").encode())
    if kind == "json":
        record = {"path": session.name, **caption.to_dict(attention=True)}
        if session.region is not None:
            record["region"] = list(session.region)
        data = json.dumps(record, ensure_ascii=False, indent=1).encode() + b"\n"
        return _file(f"{stem}-caption.json", "application/json", data)
    photo = look_again(engine, limits, session).display
    if kind == "sheet":
        buffer = io.BytesIO()
        sheet(caption, photo).save(buffer, "PNG")
        return _file(f"{stem}-attention.png", "image/png", buffer.getvalue())
    if kind == "animation":
        return _file(f"{stem}-attention.webp", "image/webp", animation(caption, photo))
    raise LimitError(f"a download is one of {', '.join(KINDS)}")


def _file(name: str, kind: str, data: bytes) -> dict[str, str]:
    return {"name": name, "type": kind, "base64": base64.b64encode(data).decode()}


def _ranked(caption: Caption) -> tuple[Caption, ...]:
    return caption.n_best or (caption,)


def record(
    engine: Engine,
    limits: Limits,
    path: str | None,
    *,
    prefix: str = "",
    region: Sequence[float] | None = None,
    attention: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Caption one photo file; return the record of ``Caption.to_dict``.

    Raises:
        LimitError, ImageError, ValueError: one line that says what is wrong.
    """
    if not path:
        raise LimitError("give a photo")
    data = read_photo(path, limits, page.clean(Path(path).name))
    caption = engine.caption_photo(data, prefix=beginning(prefix), region=region, **options)[1]
    return caption.to_dict(attention=bool(attention))


@lru_cache(maxsize=1)
def examples() -> tuple[str, ...]:
    """Return the paths of the example photos."""
    return tuple(media.get_image(name) for name in EXAMPLES)


def gallery(paths: Sequence[str]) -> str:
    """Return the example photos as a row of buttons."""
    buttons = []
    for index, path in enumerate(paths):
        photo = page.data_uri(display_photo(Path(path).read_bytes(), 240))
        alt = html.escape(f"Example {index + 1}: {Path(path).stem.strip('0123456789')}", quote=True)
        image = f'<img src="{photo}" alt="{alt}" loading="lazy">'
        buttons.append(f'<button type="button" data-pick="{index}">{image}</button>')
    return (
        f'<p class="cap-gallery-title">Or one of these</p><div class="cap-gallery">{"".join(buttons)}</div>'
    )


# --- the tab --------------------------------------------------------------------------------------------


def tab(demo: Demo) -> None:
    """Lay out the tab and connect it."""
    defaults = demo.engine().captioner.defaults
    session = gr.State(None, time_to_live=3600)
    with gr.Row(elem_classes="cap-intake"):
        with gr.Column(scale=5, min_width=300):
            upload = photo_upload(
                label="Photo",
                sources=["upload", "webcam", "clipboard"],
                height=400,
                buttons=[],
                elem_id="photo-upload",
            )
        with gr.Column(scale=3, min_width=260):
            shelf = gr.HTML(
                gallery(examples()),
                js_on_load=on_load("picker"),
                apply_default_css=False,
                elem_id="photo-examples",
            )
    view = gr.HTML("", js_on_load=on_load("explorer"), apply_default_css=False, elem_id="photo-view")
    with gr.Row(visible=False, elem_classes="cap-downloads") as downloads:
        buttons = {
            kind: gr.Button(label, size="sm", min_width=120, elem_id=f"photo-{kind}")
            for kind, label in zip(
                KINDS, ("Save text", "Save JSON", "Save overlay sheet", "Save animation"), strict=True
            )
        }
    with gr.Accordion("Advanced", open=False), gr.Row():
        beam = gr.Slider(1, 10, defaults.beam, step=1, label="Beams", info="Sentences kept in mind at a time")
        penalty = gr.Slider(
            0, 3, defaults.length_penalty, step=0.05, label="Length penalty", info="Higher: longer captions"
        )
        n_best = gr.Slider(1, 10, 1, step=1, label="Captions", info="How many to list, best first")
    handed = gr.JSON(visible="hidden")
    taken = gr.JSON(visible="hidden")
    settings = [beam, penalty, n_best]
    everything = [session, view, downloads]

    def shown(found: tuple[Session | None, str]) -> tuple[Any, ...]:
        return (*found, gr.update(visible=found[0] is not None))

    def uploaded(path: str | None, model: str, *chosen: Any) -> tuple[Any, ...]:
        if not path:
            return tuple(gr.skip() for _ in (*everything, taken))
        with demo.mistakes():
            found = open_photo(demo.engine(model), demo.limits, path, search_options(*chosen))
            return *shown(found), {"turn": time.monotonic_ns()}

    def picked(event: gr.EventData, model: str, *chosen: Any) -> tuple[Any, ...]:
        with demo.mistakes():
            path = examples()[whole_number(event._data.get("pick"), "example", len(examples()))]
            return shown(open_photo(demo.engine(model), demo.limits, path, search_options(*chosen)))

    def touched(event: gr.EventData, now: Session | None, model: str) -> tuple[Any, ...]:
        action = event._data or {}
        if now is None and action.get("action") == "another":
            return shown((None, ""))
        with demo.mistakes():
            if now is None:  # idle for an hour, or too many others came
                raise LimitError("this photo is no longer kept here; choose it again")
            return shown(act(demo.engine(model), demo.limits, now, action))

    def changed(now: Session | None, model: str, *chosen: Any) -> tuple[Any, ...]:
        if now is None:
            return tuple(gr.skip() for _ in everything)
        with demo.mistakes():
            engine, options = demo.engine(model), search_options(*chosen)
            return shown(
                rewrite(engine, demo.limits, now, prefix=now.prefix, region=now.region, options=options)
            )

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal", **demo.model_queue}
    # The upload is emptied when it has been captioned or refused. Opening the camera is an input without a
    # path, after which it must be left alone: Gradio 6.0 closes the camera when it is sent anything.
    empty: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    upload.input(uploaded, [upload, demo.model, *settings], [*everything, taken], **quiet).failure(
        lambda: None, None, upload, **empty
    )
    taken.change(lambda: None, None, upload, **empty)
    shelf.submit(picked, [demo.model, *settings], everything, **quiet)
    view.submit(touched, [session, demo.model], everything, **quiet)
    for slider in settings:
        slider.release(changed, [session, demo.model, *settings], everything, **quiet)
    demo.model.change(changed, [session, demo.model, *settings], everything, **quiet)
    for kind, button in buttons.items():

        def make(now: Session | None, model: str, kind: str = kind) -> Any:
            with demo.mistakes():
                if now is None:
                    raise LimitError("caption a photo first")
                return download(demo.engine(model), demo.limits, now, kind)

        button.click(make, [session, demo.model], handed, **quiet).success(
            None, handed, None, js="(file) => window.captioner.download(file)", api_visibility="private"
        )
    _endpoints(demo)


def _endpoints(demo: Demo) -> None:
    """The API: one photo in, one record out, nothing remembered of who asked."""

    def caption_photo(
        photo: str | None,
        beam: float | None = None,
        length_penalty: float | None = None,
        n_best: float | None = None,
        attention: bool = False,
    ) -> dict[str, Any]:
        with demo.mistakes(plain=True):
            options = search_options(beam, length_penalty, n_best)
            return record(demo.engine(), demo.limits, photo, attention=attention, **options)

    def caption_region(
        photo: str | None,
        left: float | None,
        top: float | None,
        right: float | None,
        bottom: float | None,
        beam: float | None = None,
        length_penalty: float | None = None,
        n_best: float | None = None,
        attention: bool = False,
    ) -> dict[str, Any]:
        with demo.mistakes(plain=True):
            region = box({"left": left, "top": top, "right": right, "bottom": bottom})
            options = search_options(beam, length_penalty, n_best)
            return record(demo.engine(), demo.limits, photo, region=region, attention=attention, **options)

    def continue_caption(
        photo: str | None,
        words: str,
        beam: float | None = None,
        length_penalty: float | None = None,
        n_best: float | None = None,
        attention: bool = False,
    ) -> dict[str, Any]:
        with demo.mistakes(plain=True):
            options = search_options(beam, length_penalty, n_best)
            return record(demo.engine(), demo.limits, photo, prefix=words, attention=attention, **options)

    def photo() -> Any:
        return photo_upload(label="photo: a picture file")

    def number(label: str) -> Any:
        return gr.Number(None, label=label)

    def options() -> list[Any]:
        return [
            number("beam: sentences kept in mind at a time, 1 to 10 (none: the model's default)"),
            number("length_penalty: 0 to 3, higher for longer captions (none: the model's default)"),
            number("n_best: how many captions to list under n_best, 1 to 10 (none: only the best)"),
            gr.Checkbox(False, label="attention: also give every word's attention weights"),
        ]

    told = (
        "The answer is the record that `Caption.to_dict()` gives (docs/records.md): caption, confidence, "
        "score, words with probability and alternatives, guesses. A wrong request is refused in one line."
    )
    with gr.Column(visible=False):
        endpoint(demo, caption_photo, [photo(), *options()], f"Caption one photo. {told}")
        sides = [
            number(f"{side}: of the box, in pixels of the photo as seen (after EXIF rotation)")
            for side in ("left", "top", "right", "bottom")
        ]
        endpoint(
            demo,
            caption_region,
            [photo(), *sides, *options()],
            f"Caption the part of a photo inside a box. {told}",
        )
        words = gr.Textbox(label="words: what the caption begins with; the model writes the rest")
        endpoint(
            demo,
            continue_caption,
            [photo(), words, *options()],
            f"Let the model go on from words of yours. {told}",
        )
