"""The HTML of a captioned picture, made from plain data; every text from outside is escaped here.

What is sent holds all words' attention, so that selecting a word needs no server; ``static/page.js`` draws.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from captioner import Caption, Word
from captioner.overlay import colour, scale

HEDGES = (
    (0.65, "Quite sure", "sure"),
    (0.45, "Fairly sure", "fair"),
    (0.3, "Not very sure", "doubt"),
    (0.0, "A guess", "guess"),
)
"""From which confidence on which words are said (and the CSS class of the mark beside them)."""


def how_sure(confidence: float) -> str:
    """Return in words how sure a confidence from 0 to 1 is: ``fairly sure``, ``a guess``, …"""
    return next(words for least, words, _ in HEDGES if confidence >= least or least == 0.0)


def share_in_words(share: float) -> str:
    """Return a share from 0 to 1 as people say it."""
    steps = (
        (0.94, "nearly all"),
        (0.83, "nine in ten"),
        (0.71, "three quarters"),
        (0.59, "two thirds"),
        (0.42, "about half"),
        (0.29, "about a third"),
        (0.17, "about a fifth"),
        (0.0, "hardly any"),
    )
    return next(words for least, words in steps if share >= least or least == 0.0)


def sureness(caption: Caption) -> str:
    """Return one plain line that says how sure the model is of a caption."""
    words = how_sure(caption.confidence)
    share = share_in_words(caption.confidence)
    line = f"{words}: people describing this would use {share} of its telling words."
    if not caption.sure:
        line = f"{words}: it does not know what this shows, and says what it can."
    if not caption.finished:
        line += " The sentence was cut off."
    return line


def percent(probability: float) -> str:
    """Return a probability as people read it: ``62 %``, ``<1 %``."""
    if 0 < probability < 0.01:
        return "<1 %"
    if 0.99 < probability < 1:
        return ">99 %"
    return f"{100 * probability:.0f} %"


def clean(text: str) -> str:
    """Return text on one line without control characters and lone surrogates."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def safe_stem(name: str) -> str:
    """Return a file name without its suffix that is safe to offer for a download."""
    base = re.split(r"[\\/]", name)[-1]
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", base.rpartition(".")[0] or base)
    return stem.strip("-._")[:60] or "photo"


def encoded(data: Any) -> str:
    """Return data as JSON that may stand in a double-quoted HTML attribute."""
    return html.escape(
        json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False), quote=True
    )


def data_uri(data: bytes, kind: str = "image/jpeg") -> str:
    """Return bytes as a data URI: nothing is fetched, and no path is told."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def ramp() -> list[int]:
    """Return the heat's colours, 128 × (red, green, blue, opacity), for ``page.js``."""
    return [int(value) for value in colour(np.linspace(0, 1, 128)).reshape(-1)]


def word_data(word: Word) -> dict[str, Any]:
    """Return what the page shows of a word; its attention is a flat list over frames and cells."""
    cells = word.attention
    return {
        "word": clean(word.text),
        "p": round(float(word.probability), 4),
        "given": word.given,
        "gate": None if word.gate is None else round(float(word.gate), 3),
        "alternatives": [[a.text, round(float(a.probability), 4)] for a in word.alternatives],
        "attention": None if cells is None else [float(f"{c:.3g}") for c in cells.reshape(-1)],
    }


def caption_data(caption: Caption) -> dict[str, Any]:
    """Return what ``page.js`` draws a caption's heat with; the box is in shares of the photo."""
    left, top, right, bottom = caption.fit.box
    width, height = caption.fit.width, caption.fit.height
    frames, (rows, columns) = len(caption.times), caption.grid
    return {
        "grid": [rows, columns],
        "box": [left / width, top / height, right / width, bottom / height],
        "size": [width, height],
        "frames": frames,
        "even": 1 / (frames * rows * columns),
        "top": scale(caption),
        "words": [word_data(word) for word in caption.words],
    }


def sentence(caption: Caption) -> str:
    """Return the caption's words as buttons; the less probable a word, the stronger its tint."""
    parts = []
    for index, word in enumerate(caption.words):
        text = clean(word.text)
        space = "" if index == 0 or text.startswith("'") else " "
        # the power keeps words that are likelier than not nearly clear: few sentences are likely word by word
        doubt = 0.0 if word.given else (1 - min(max(word.probability, 0.0), 1.0)) ** 1.7
        said = "given by you" if word.given else f"probability {percent(word.probability)}"
        kind = "cap-word cap-given" if word.given else "cap-word"
        parts.append(
            f'{space}<button type="button" class="{kind}" data-word="{index}" aria-pressed="false" '
            f'style="--doubt:{doubt:.3f}" title="{said}">{html.escape(text)}</button>'
        )
    return "".join(parts) or "<em>no words</em>"


def candidates(caption: Caption, ranked: Sequence[Caption], chosen: int) -> str:
    """Return the n-best list as buttons, or nothing when there is only one."""
    if len(ranked) < 2:
        return ""
    rows = "".join(
        f'<li><button type="button" class="cap-candidate" data-candidate="{i}" '
        f'aria-pressed="{"true" if i == chosen else "false"}">'
        f"<span>{html.escape(clean(other.text)) or '<em>no words</em>'}</span>"
        f"<small>{how_sure(other.confidence).lower()}</small></button></li>"
        for i, other in enumerate(ranked)
    )
    return f'<div class="cap-candidates"><h3>Its best {len(ranked)}</h3><ol>{rows}</ol></div>'


_TURNS = itertools.count()


def explorer(
    caption: Caption,
    photo: bytes,
    *,
    ranked: Sequence[Caption] = (),
    chosen: int = 0,
    region: Sequence[float] | None = None,
    selected: int = -1,
    name: str = "",
) -> str:
    """Return the photo, the sentence and all that can be touched, as one piece of HTML.

    Args:
        caption: the one that is shown.
        photo: the photo as people see it, a JPEG of any size.
        ranked: the n-best list that it is from.
        chosen: which of ``ranked`` it is.
        region: the box that was captioned, in pixels of the photo as seen.
        selected: the word whose attention is shown at first; -1 for none.
        name: of the photo's file.
    """
    data = caption_data(caption)
    data["region"] = None if region is None else [round(float(v), 2) for v in region]
    data["selected"] = selected
    data["turn"] = next(_TURNS)  # no two are equal, so that the script notices each
    width, height = caption.fit.width, caption.fit.height
    text = clean(caption.text) or "no words"
    alt = html.escape(text if region is None else f"{text} (of the boxed part)", quote=True)
    mark = next(kind for least, _, kind in HEDGES if caption.confidence >= least or least == 0.0)
    attends = any(word.attention is not None for word in caption.words)
    given = any(word.given for word in caption.words)
    legend = (
        '<div class="cap-legend"><span>an even share</span><i class="cap-ramp"></i>'
        f"<span>{data['top']:g}× that</span></div>"
        if attends
        else '<p class="cap-legend">This model has no attention: it cannot show where it looked.</p>'
    )
    back = (
        '<button type="button" class="cap-tool" data-do="own">Its own words again</button>' if given else ""
    )
    whole = (
        '<button type="button" class="cap-tool" data-do="whole">The whole photo again</button>'
        if region is not None
        else ""
    )
    play = '<button type="button" class="cap-tool" data-do="play">Play</button>' if attends else ""
    cells = (
        '<button type="button" class="cap-tool" data-do="cells" aria-pressed="false">Bare cells</button>'
        if attends
        else ""
    )
    return f"""<section class="cap-explorer" aria-label="Captioned photo" data-caption="{encoded(data)}">
<div class="cap-stage">
<div class="cap-photo" style="--w:{width};--h:{height}">
<img src="{data_uri(photo)}" alt="{alt}" draggable="false">
<canvas aria-hidden="true"></canvas>
<button type="button" class="cap-box" hidden aria-label="Box"></button>
</div>
<div class="cap-under">
{legend}
<div class="cap-tools" role="group" aria-label="Photo">
<button type="button" class="cap-tool" data-do="box" aria-pressed="false">Box a part</button>
{whole}{play}{cells}
<button type="button" class="cap-tool" data-do="another">Another photo</button>
</div>
<p class="cap-hint cap-boxhint" hidden>Drag over the photo, or move the box with the arrow keys, size it with
Shift and the arrow keys, and press Enter.</p>
</div>
</div>
<div class="cap-reading">
<p class="cap-name">{html.escape(clean(name))}{" · the boxed part" if region is not None else ""}</p>
<h2 class="cap-sentence">{sentence(caption)}</h2>
<p class="cap-sure cap-{mark}"><i aria-hidden="true"></i>{html.escape(sureness(caption))}</p>
<div class="cap-back">{back}</div>
<div class="cap-card"><p class="cap-hint">Touch a word: where did it look, how sure was it, what else could it
have said? Tinted words are doubtful ones.</p></div>
<p class="cap-sr" role="status"></p>
{candidates(caption, ranked, chosen)}
</div>
</section>"""


def note(text: str, kind: str = "note") -> str:
    """Return one line for people."""
    return (
        f'<p class="cap-note cap-note-{html.escape(kind, quote=True)}" role="status">{html.escape(text)}</p>'
    )
