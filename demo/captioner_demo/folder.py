"""The folder tab: many photos at once, a table that fills, files to take along; no bad file stops the rest.

The page's script uploads one file at a time, so that a file which is refused is a row with a reason, and a
batch may be larger than one upload may be. Photos go through the shared engine a few at a time: whoever
captions a single photo meanwhile waits for no more than those.
"""

from __future__ import annotations

import base64
import codecs
import html
import io
import logging
import os
import re
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import media
from gradio.utils import get_upload_folder

from captioner import Caption
from captioner.batch import FileResult, to_record
from captioner.batch.tables import head, lines
from captioner.parallel import ahead
from captioner_demo import page, photo
from captioner_demo.common import Demo, on_load
from captioner_demo.engine import Engine, display_photo
from captioner_demo.guard import PathError, check_files
from captioner_demo.limits import LimitError, Limits, read_photo, search_options

LABEL = "Folder"

KINDS = ("csv", "jsonl", "zip")
"""What `download` makes."""

TOGETHER = 4
"""Photos of one folder that the engine has at a time."""

RUNS = 2
"""Folders that are captioned at a time; further ones wait in a queue of their own."""

EVERY = 0.3
"""Seconds between two updates of the table."""

WHOLE = 20
"""A folder may have this many times the bytes that one file may have."""

EXAMPLES = (*photo.EXAMPLES, "groot.jpeg", "screenshot.gif")
"""Photos that come with Gradio."""

THUMB = 112
"""Pixels of the longer side of the photos in the table."""

WHY = {
    "video": "this is a video, not a photo; caption it as a video",
    "kind": "this is not a photo",
    "upload": "it could not be uploaded; try it once more",
}
"""Why the page's script did not upload a file; it sends the key."""


# --- without a browser ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """One file of a folder: a path, or the reason why there is none. ``name`` is relative to the folder."""

    name: str
    path: str | None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """What became of one file.

    Attributes:
        name: of the file for people, with the folders that it came from: ``holiday/beach.jpg``.
        path: of the upload.
        key: of the photo in the engine's cache.
        ranked: captions, best first; empty if there is an error.
        thumb: the photo as a small JPEG.
        error: one line that names the file.
        session: how the caption was changed by touching it, if it was.
        seconds: that captioning took.
    """

    name: str
    path: str = ""
    key: str = ""
    ranked: tuple[Caption, ...] = ()
    thumb: bytes = b""
    error: str | None = None
    session: photo.Session | None = None
    seconds: float = 0.0

    @property
    def caption(self) -> Caption | None:
        """The caption that counts: what a person made of it, else the best."""
        if self.session is not None:
            return self.session.caption
        return self.ranked[0] if self.ranked else None

    @property
    def result(self) -> FileResult:
        """What `captioner.batch.to_record` takes."""
        return FileResult(self.name, self.caption, self.error, self.seconds)


@dataclass(eq=False)
class Run:
    """One folder that is, or was, captioned.

    Attributes:
        token: what the page's script calls it.
        names: of all its files.
        model: the model's name, for the records.
        model_sha256: of its checkpoint, for the records.
        options: see `Captioner.caption`.
        rows: what has become of the files so far, in order.
        stop: when it is set, no further file is begun.
    """

    token: str
    names: tuple[str, ...]
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    model_sha256: str | None = None

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the record of each row (``docs/records.md``)."""
        for row in self.rows:
            yield to_record(row.result, self.model, self.model_sha256)


def given_name(name: Any) -> str:
    """Return a file's name from outside as a relative path on one line: ``holiday/beach.jpg``.

    Drives' colons stay, but no step upwards, no root, and nothing that cannot be seen.
    """
    parts = []
    for part in re.split(r"[\\/]", name if isinstance(name, str) else ""):
        seen = "".join(c if c.isprintable() else "_" for c in part).strip()[:150]
        if seen not in ("", ".", ".."):
            parts.append(seen)
    return "/".join(parts[-8:]) or "photo"


def given_files(items: Any, limits: Limits, folder: str | os.PathLike[str]) -> list[Given]:
    """Return the files that a browser or a program named, checked.

    Args:
        items: a list of ``{"name", "path"}``, or ``{"name", "why"}`` with a key of `WHY` (or ``"big"``,
            ``"total"``) for a file that was not uploaded. Nothing in it is trusted.
        limits: of this server.
        folder: where uploads are.

    Raises:
        LimitError: it is no such list, or too long.
    """
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, dict) for item in items):
        raise LimitError("give a list of photos")
    if not items:
        raise LimitError("give at least one photo")
    if len(items) > limits.files:
        raise LimitError(f"at most {limits.files} photos at a time are allowed here, not {len(items)}")
    files, total = [], 0
    for item in items:
        name, path = given_name(item.get("name")), item.get("path")
        error: str | None = None
        if path:
            try:
                check_files({"path": path, "meta": {}}, folder)
                total += os.stat(path).st_size
                error = _total(limits) if total > WHOLE * limits.bytes else None
            except PathError as problem:
                error = str(problem)
            except OSError:
                error = "the upload is no longer kept here; choose it again"
        else:
            why = str(item.get("why"))
            big = f"it is larger than the {limits.mb:g} MB that are allowed here"
            error = {**WHY, "big": big, "total": _total(limits)}.get(why, WHY["upload"])
        files.append(Given(name, None if error else path, error and f"{name}: {error}"))
    return files


def _total(limits: Limits) -> str:
    return f"with it there are more than the {WHOLE * limits.mb:g} MB that are allowed at a time"


def caption_photos(
    engine: Engine,
    limits: Limits,
    files: Iterable[Given],
    options: dict[str, Any] | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Row]:
    """Caption photos, in order, a few at a time; memory does not grow with their number.

    Args:
        engine: the model.
        limits: of this server.
        files: from `given_files`.
        options: see `Captioner.caption`.
        stop: when it is set, what has not been yielded is given up.

    Yields:
        one `Row` for each file, with an error in the place of a caption where there can be none.

    Raises:
        ValueError: for impossible options, before any file is read.
    """
    options = options or {}
    engine.captioner.check(**options)
    return _caption_photos(engine, limits, files, options, stop or threading.Event())


def _caption_photos(
    engine: Engine, limits: Limits, files: Iterable[Given], options: dict[str, Any], stop: threading.Event
) -> Iterator[Row]:
    def work(given: Given) -> Row | None:
        return None if stop.is_set() else _caption_photo(engine, limits, given, options)

    for row in ahead(work, files, TOGETHER):
        if row is None or stop.is_set():
            return
        yield row


def _caption_photo(engine: Engine, limits: Limits, given: Given, options: dict[str, Any]) -> Row:
    """Caption one photo; whatever is wrong with it becomes a line that names it."""
    name = given.name
    if given.path is None:
        return Row(name, error=given.error)
    begun = time.perf_counter()
    try:
        look, caption = engine.caption_photo(read_photo(given.path, limits, name), **options)
        thumb = display_photo(look.display, THUMB)
    except ValueError as error:
        line = " ".join(str(error).split()).removeprefix("the given bytes: ")
        return Row(name, error=line if name in line else f"{name}: {line}")
    except Exception:  # one file, whatever it is, must not stop the others
        logging.getLogger(__name__).exception("a photo could not be captioned")
        return Row(name, error=f"{name}: it could not be captioned")
    seconds = time.perf_counter() - begun
    return Row(name, given.path, look.key, caption.n_best or (caption,), thumb, seconds=seconds)


def fill(engine: Engine, limits: Limits, run: Run, files: Iterable[Given]) -> Iterator[str]:
    """Caption a run's files; yield the feed that ``folder.js`` fills the table from, every now and then.

    Each feed begins with the one before: Gradio sends only what is new.

    Raises:
        ValueError: for impossible options.
    """
    feed = _item({"run": run.token, "names": list(run.names)})
    rows = caption_photos(engine, limits, files, run.options, run.stop)
    yield feed
    last = 0.0
    for row in rows:
        feed += _item(row_data(len(run.rows), row))
        run.rows.append(row)
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            yield feed
    yield feed + _item({"end": "stopped" if len(run.rows) < len(run.names) else "done"})


def _item(data: dict[str, Any]) -> str:
    return f'<i data-item="{page.encoded(data)}"></i>'


def row_data(index: int, row: Row) -> dict[str, Any]:
    """Return what the table shows of a file; texts are plain, ``folder.js`` never takes them for HTML."""
    folder, _, name = row.name.rpartition("/")
    data: dict[str, Any] = {"row": index, "name": name, "folder": folder}
    caption = row.caption
    if caption is None:
        return {**data, "reason": (row.error or "").removeprefix(f"{row.name}: ")}
    words, mark = next(
        (words, mark) for least, words, mark in page.HEDGES if caption.confidence >= least or least == 0.0
    )
    return {
        **data,
        "caption": page.clean(caption.text) or "no words",
        "thumb": page.data_uri(row.thumb),
        "sure": words,
        "mark": mark,
        "yours": row.session is not None,
    }


@dataclass(frozen=True, eq=False)
class Opened:
    """The photo of a run that is looked at."""

    row: int
    session: photo.Session


def open_row(engine: Engine, limits: Limits, run: Run, index: Any) -> tuple[Opened, str]:
    """Return a row's photo with its words and attention, as the photo tab shows it.

    Raises:
        LimitError: there is no such row, it has no caption, or the upload is no longer kept.
    """
    row = run.rows[photo.whole_number(index, "photo", len(run.rows))]
    if row.caption is None:
        raise LimitError(row.error or "this photo has no caption")
    session = row.session or photo.Session(row.key, row.path, row.name, row.ranked, options=run.options)
    return Opened(index, session), _shown(photo.show(session, photo.look_again(engine, limits, session)))


def act(
    engine: Engine, limits: Limits, run: Run, opened: Opened, action: dict[str, Any]
) -> tuple[Opened | None, str, str]:
    """Do what was asked for by touching an opened photo; other words are kept in the run's row.

    Args:
        engine: the model.
        limits: of this server.
        run: the folder.
        opened: what is looked at.
        action: as `photo.act`.

    Returns:
        what is looked at then (None for the list), its HTML, and the feed that changes the table's row.

    Raises:
        LimitError, ValueError: for an impossible action; one line.
    """
    session, text = photo.act(engine, limits, opened.session, action)
    if session is None:
        return None, "", ""
    feed = ""
    if session.region is None:  # a caption of a part is none of the photo
        row = run.rows[opened.row]
        own = session.caption.text == row.ranked[0].text and not session.prefix
        row = run.rows[opened.row] = replace(row, session=None if own else session)
        feed = _item({"run": run.token, "turn": time.monotonic_ns()}) + _item(row_data(opened.row, row))
    return replace(opened, session=session), _shown(text), feed


def _shown(text: str) -> str:
    return text.replace(">Another photo<", ">All photos<")


def steps(run: Run, index: int) -> str:
    """Return the buttons that lead from an opened photo to its neighbours and back to the list."""
    able = [i for i, row in enumerate(run.rows) if row.caption is not None]
    before = max((i for i in able if i < index), default=None)
    after = min((i for i in able if i > index), default=None)

    def button(kind: str, label: str, goal: int | None) -> str:
        aim = "disabled" if goal is None else f'data-pick="{goal}"'
        return f'<button type="button" class="cap-tool" data-step="{kind}" {aim}>{label}</button>'

    return (
        '<nav class="cap-steps" aria-label="Photos of the folder">'
        f"{button('back', '← All photos', -1)}"
        f"<span>{index + 1} of {len(run.names)}</span>"
        f"{button('before', 'Previous', before)}{button('after', 'Next', after)}</nav>"
    )


# --- files to take along --------------------------------------------------------------------------------


def to_csv(run: Run) -> bytes:
    """Return the rows as CSV, with the columns of ``captioner caption --csv`` and no formulas.

    It begins with a byte order mark only if there is more than ASCII in it: spreadsheets need one then.
    """
    text = head(".csv") + b"".join(lines(record, ".csv") for record in run.records())
    return text if text.isascii() else codecs.BOM_UTF8 + text


def to_jsonl(run: Run) -> bytes:
    """Return the rows as records (``docs/records.md``), one a line."""
    return b"".join(lines(record, ".jsonl") for record in run.records())


def to_zip(run: Run) -> bytes:
    """Return a ZIP archive: ``x.txt`` with the caption for each ``x.jpg``, and ``captions.jsonl``.

    Unpacked beside the photos, each text lies beside its photo; photos of one name get ``x-2.txt``, ….
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        names = members([row.name for row in run.rows if row.caption is not None])
        texts = [row.caption.text for row in run.rows if row.caption is not None]
        for name, text in zip(names, texts, strict=True):
            archive.writestr(zipfile.ZipInfo(name, time.localtime()[:6]), f"{text}\n")
        archive.writestr(zipfile.ZipInfo("captions.jsonl", time.localtime()[:6]), to_jsonl(run))
        for entry in archive.infolist():
            entry.external_attr = 0o644 << 16
    return buffer.getvalue()


def members(names: Sequence[str]) -> list[str]:
    """Return for each photo the name of its text in an archive: relative, valid everywhere, no two alike.

    Args:
        names: as `given_name` makes them.
    """
    stems = []
    for name in names:
        *above, last = (_part(part) for part in given_name(name).split("/"))
        stems.append("/".join([*above, last.rpartition(".")[0] or last]))
    folders = {folder.casefold() for stem in stems for folder in _above(stem)}
    taken: set[str] = set()
    chosen = []
    for stem in stems:
        number = 1
        while True:
            name = f"{stem}.txt" if number == 1 else f"{stem}-{number}.txt"
            if name.casefold() not in taken and name.casefold() not in folders:
                break
            number += 1
        taken.add(name.casefold())
        chosen.append(name)
    return chosen


def _above(name: str) -> Iterator[str]:
    """Yield the folders that a name lies in."""
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def _part(part: str) -> str:
    """Return one step of a path that Windows can hold, too."""
    part = re.sub(r'[<>:"|?*]', "_", part)
    part = re.sub(r"[. ]+$", lambda found: "_" * len(found[0]), part)
    if re.match(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)", part):
        part = f"_{part}"
    return part


def download(run: Run, kind: str) -> dict[str, str]:
    """Return a file as ``{"name", "type", "base64"}``.

    Args:
        run: the folder.
        kind: one of `KINDS`.

    Raises:
        LimitError: an unknown kind, or nothing to take along.
    """
    if kind not in KINDS:
        raise LimitError(f"a download is one of {', '.join(KINDS)}")
    if not run.rows:
        raise LimitError("caption some photos first")
    make = {"csv": to_csv, "jsonl": to_jsonl, "zip": to_zip}[kind]
    mime = {"csv": "text/csv;charset=utf-8", "jsonl": "application/jsonl", "zip": "application/zip"}[kind]
    return {
        "name": f"captions.{kind}",
        "type": mime,
        "base64": base64.b64encode(make(run)).decode(),
    }


def records(
    engine: Engine, limits: Limits, paths: Sequence[str] | None, *, attention: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Caption photo files; return the record of each (``docs/records.md``), in order, for Gradio's clients.

    ``path`` is called ``name`` there: `gradio_client` takes every object with a ``path`` for a file of the
    server, and puts a download of it in the place of the whole record.

    Raises:
        LimitError, ValueError: no or too many photos, impossible options. A bad file is no error here.
    """
    items = [{"name": Path(path).name, "path": str(path)} for path in paths or ()]
    files = given_files(items, limits, get_upload_folder())
    captioner = engine.captioner
    model = captioner.header.name, captioner.fingerprint
    found = []
    for row in caption_photos(engine, limits, files, options):
        record = to_record(row.result, *model, attention=bool(attention))
        found.append({"name": record.pop("path"), **record})
    return found


class Stops:
    """The runs that somebody stopped, perhaps before they began; the oldest are forgotten."""

    def __init__(self, kept: int = 1000) -> None:
        self.kept = kept
        self._events: OrderedDict[str, threading.Event] = OrderedDict()
        self._lock = threading.Lock()

    def event(self, token: Any) -> threading.Event:
        """Return the event that stops the run of that name.

        Raises:
            LimitError: it is no name that ``folder.js`` gives.
        """
        if not isinstance(token, str) or not re.fullmatch(r"[0-9a-f-]{16,64}", token):
            raise LimitError("this folder has no valid name")
        with self._lock:
            event = self._events.setdefault(token, threading.Event())
            self._events.move_to_end(token)
            while len(self._events) > self.kept:
                self._events.popitem(last=False)
            return event


# --- the tab --------------------------------------------------------------------------------------------


def intake(limits: Limits) -> str:
    """Return the place that photos are chosen at or dropped on."""
    told = (
        f"At most {limits.files} at a time, {limits.mb:g} MB and {limits.megapixels:g} megapixels each. "
        "A file that is no photo is listed with the reason."
    )
    return f"""<section class="cap-drop" aria-label="Photos to caption" data-files="{limits.files}"
data-bytes="{limits.bytes}" data-total="{WHOLE * limits.bytes}">
<h2>Drop photos or a whole folder here</h2>
<div class="cap-tools">
<label class="cap-tool cap-choose"><input type="file" multiple accept="image/*,.heic,.heif,.avif"
data-choose="files">Choose photos</label>
<label class="cap-tool cap-choose"><input type="file" multiple webkitdirectory
data-choose="folder">Choose a folder</label>
<button type="button" class="cap-tool" data-choose="examples">Try {len(EXAMPLES)} examples</button>
</div>
<p class="cap-hint">{html.escape(told)}</p>
</section>"""


TABLE = """<section class="cap-folder" aria-label="Captions of the folder" hidden>
<div class="cap-course"><progress max="1" value="0" aria-label="Photos captioned"></progress>
<span class="cap-count"></span>
<button type="button" class="cap-tool" data-do="stop" hidden>Stop</button></div>
<p class="cap-sr" role="status"></p>
<table><caption class="cap-sr">Photos and their captions; choose one to see where the model looked</caption>
<thead><tr><th scope="col"><span class="cap-sr">Photo</span></th><th scope="col">Caption</th>
<th scope="col" class="cap-how">How sure</th></tr></thead><tbody></tbody></table>
</section>"""


def tab(demo: Demo) -> None:
    """Lay out the tab and connect it."""
    run = gr.State(None, time_to_live=3600)
    opened = gr.State(None, time_to_live=3600)
    stops = Stops()
    chooser = gr.HTML(
        intake(demo.limits),
        js_on_load=on_load("folderIntake"),
        apply_default_css=False,
        elem_id="folder-intake",
        elem_classes="cap-listing",
    )
    nav = gr.HTML("", js_on_load=on_load("picker"), apply_default_css=False, elem_id="folder-nav")
    view = gr.HTML("", js_on_load=on_load("explorer"), apply_default_css=False, elem_id="folder-view")
    with gr.Row(visible=False, elem_classes="cap-downloads cap-listing") as downloads:
        buttons = {
            kind: gr.Button(label, size="sm", min_width=90, elem_id=f"folder-{kind}")
            for kind, label in zip(KINDS, ("Save CSV", "Save JSONL", "Save zip"), strict=True)
        }
    table = gr.HTML(
        TABLE,
        js_on_load=on_load("folderTable"),
        apply_default_css=False,
        elem_id="folder-table",
        elem_classes="cap-listing",
    )
    feed = gr.HTML("", js_on_load=None, apply_default_css=False, visible="hidden", elem_id="folder-feed")
    handed = gr.JSON(visible="hidden")

    def captioned(event: gr.EventData, model: str) -> Iterator[tuple[Any, ...]]:
        with demo.mistakes():
            data = event._data or {}
            engine = demo.engine(model)
            if data.get("examples"):
                files = [Given(name, media.get_image(name)) for name in EXAMPLES]
            else:
                files = given_files(data.get("files"), demo.limits, get_upload_folder())
            stop = stops.event(data.get("token"))
            names = tuple(given.name for given in files)
            captioner = engine.captioner
            now = Run(
                data["token"],
                names,
                captioner.header.name,
                stop=stop,
                model_sha256=captioner.fingerprint,
            )
            for text in fill(engine, demo.limits, now, files):
                yield now, text, gr.update(visible=bool(now.rows))

    def stopped(event: gr.EventData) -> None:
        stops.event((event._data or {}).get("stop")).set()

    def chosen(index: Any, now: Run | None, model: str) -> tuple[Any, ...]:
        with demo.mistakes():
            if now is None:
                raise LimitError("these captions are no longer kept here; choose the photos again")
            found, text = open_row(demo.engine(model), demo.limits, now, index)
            return found, text, steps(now, found.row)

    def picked(event: gr.EventData, now: Run | None, model: str) -> tuple[Any, ...]:
        return chosen((event._data or {}).get("row"), now, model)

    def stepped(event: gr.EventData, now: Run | None, model: str) -> tuple[Any, ...]:
        index = (event._data or {}).get("pick")
        return (None, "", "") if index == -1 else chosen(index, now, model)

    def touched(event: gr.EventData, now: Run | None, what: Opened | None, model: str) -> tuple[Any, ...]:
        if now is None or what is None:
            return None, "", "", gr.skip()
        with demo.mistakes():
            found, text, news = act(demo.engine(model), demo.limits, now, what, event._data or {})
            way = steps(now, found.row) if found else ""
            return found, text, way, news or gr.skip()

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", **demo.model_queue}
    queue: dict[str, Any] = {"concurrency_limit": RUNS, "concurrency_id": "folder"}
    chooser.submit(
        captioned,
        demo.model,
        [run, feed, downloads],
        api_visibility="private",
        show_progress="hidden",
        **queue,
    ).then(None, None, None, js="() => window.captioner.folderEnded()", api_visibility="private")
    chooser.stop(stopped, None, None, queue=False, api_visibility="private", show_progress="hidden")
    table.submit(picked, [run, demo.model], [opened, view, nav], **quiet)
    nav.submit(stepped, [run, demo.model], [opened, view, nav], **quiet)
    view.submit(touched, [run, opened, demo.model], [opened, view, nav, feed], **quiet)
    for kind, button in buttons.items():

        def make(now: Run | None, kind: str = kind) -> Any:
            with demo.mistakes():
                if now is None:
                    raise LimitError("caption some photos first")
                return download(now, kind)

        button.click(make, run, handed, api_visibility="private", show_progress="minimal").success(
            None, handed, None, js="(file) => window.captioner.download(file)", api_visibility="private"
        )
    with gr.Column(visible=False):
        _endpoint(demo, queue)


def _endpoint(demo: Demo, queue: dict[str, Any]) -> None:
    """The API: photos in, records out."""

    def caption_folder(
        photos: list[str] | None,
        beam: float | None = None,
        length_penalty: float | None = None,
        n_best: float | None = None,
        attention: bool = False,
    ) -> list[dict[str, Any]]:
        with demo.mistakes(plain=True):
            options = search_options(beam, length_penalty, n_best)
            return records(demo.engine(), demo.limits, photos, attention=attention, **options)

    def number(label: str) -> Any:
        return gr.Number(None, label=label)

    gr.Button(visible=False).click(
        caption_folder,
        [
            gr.File(file_count="multiple", label="photos: picture files"),
            number("beam: sentences kept in mind at a time, 1 to 10 (none: the model's default)"),
            number("length_penalty: 0 to 3, higher for longer captions (none: the model's default)"),
            number("n_best: how many captions to list under n_best, 1 to 10 (none: only the best)"),
            gr.Checkbox(False, label="attention: also give every word's attention weights"),
        ],
        gr.JSON(label="records"),
        api_name="caption_folder",
        api_description=(
            f"Caption up to {demo.limits.files} photos. The answer is a list with the record of each file, "
            "in order (docs/records.md, where name is called path): what `Caption.to_dict()` gives, name, "
            "model and error. A file that cannot be captioned has an error in its record and does not stop "
            "the others."
        ),
        **queue,
    )
