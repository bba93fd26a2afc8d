"""Show where the model looked: heat maps on the photo, sheets, animations, figures, a web page, arrays.

Every picture shows the CNN's native grid. A cell's colour says how many times its even share of the
attention it got, on a logarithmic scale from 1 (an even share or less: uncoloured) to a top that all words
of a caption share and that a legend names; attention spread evenly therefore looks flat. Smoothing only
interpolates between the cells' centres: a centre keeps its own value and no maximum is invented.

What the network did not see (outside the centre crop) is drawn dark and hatched. A caption from a model
without attention gets pictures that say so.
"""

from __future__ import annotations

import base64
import html as _html
import io
import json
import math
import os
import re
import threading
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageFont

from captioner import files
from captioner.caption import Caption, Word
from captioner.images import Fit, open_image

__all__ = [
    "animation",
    "arrays",
    "colour",
    "figure",
    "heat_map",
    "html",
    "save",
    "save_arrays",
    "scale",
    "sheet",
    "word_overlay",
]

NO_ATTENTION = "This model has no attention: it cannot show where it looked."
NONE_HERE = "There is no attention for this word."
SHORT_NO_ATTENTION = "no attention"

# The scale never ends below 4 times an even share, so that small unevenness stays pale.
SMALLEST_TOP = 4.0

# Heat from 0 to 1 as (heat, red, green, blue, opacity). Lightness rises all the way, so the order can be
# read without seeing hue; opacity stays low enough for the photo to be recognised underneath.
_COLOURS = np.array(
    [
        (0.00, 110, 60, 190, 0.00),
        (0.15, 140, 56, 180, 0.30),
        (0.35, 205, 56, 120, 0.46),
        (0.55, 240, 100, 50, 0.56),
        (0.78, 255, 176, 40, 0.64),
        (1.00, 255, 248, 165, 0.74),
    ]
)
# Under the heat the photo keeps this share of its colour and of its brightness.
_SATURATION, _BRIGHTNESS, _UNSEEN = 0.4, 0.66, 0.38

_INK, _MUTED, _FAINT, _TRACK, _PILL, _PAPER = "#1f2328", "#59636e", "#8c959f", "#e4e7eb", "#ffd9a0", "#ffffff"
_HATCH = (170, 170, 170)
_TALLEST = 1.8  # a picture is at most this many times as high as the room is wide: phones' portraits fit


# --- heat -----------------------------------------------------------------------------------------------


def scale(caption: Caption) -> float:
    """Return the top of the colour scale that all words of a caption share.

    It is the largest attention weight of any word, frame and cell as a multiple of the even share
    ``1 / (F * R)``, rounded up to 4, 6, 8, 12, 16, 24, … so that legends read well. Pass the largest of
    several captions' scales as ``top=`` to compare them.
    """
    ratios = [
        float(word.attention.max()) * word.attention.size
        for word in caption.words
        if word.attention is not None
    ]
    peak = max(ratios, default=0.0)
    top = SMALLEST_TOP
    while top < peak * (1 - 1e-6):
        top *= 1.5 if math.log2(top).is_integer() else 4 / 3
    return top


def heat_map(
    weights: np.ndarray,
    grid: tuple[int, int],
    fit: Fit,
    size: tuple[int, int] | None = None,
    *,
    top: float | None = None,
    even: float | None = None,
    smooth: bool = True,
) -> np.ndarray:
    """Place one frame's attention weights on the photo's pixels.

    Args:
        weights: ``(R,)`` or ``(H, W)`` weights of one word in one frame, row by row.
        grid: ``(H, W)`` cells, with ``R == H * W``.
        fit: how the photo was fitted into the network's square; ``fit.box`` is where the grid lies.
        size: ``(width, height)`` of the result in pixels, by default the photo's own.
        top: the multiple of the even share that is drawn as 1; by default the peak of these weights, and
            at least 4. Give `scale` of the caption to compare words.
        even: the even share of one cell, by default ``1 / R``; ``1 / (F * R)`` for one frame out of F.
        smooth: interpolate between the cells' centres; False draws the bare cells.

    Returns:
        ``(height, width)`` float32 heat, 0 to 1: ``log(weight / even) / log(top)``, cut off at both ends.
        It is 0 where the network did not see the photo. With ``smooth``, every pixel is a weighted mean of
        the nearest four cells' heat, so it lies between them.

    Raises:
        ValueError: the weights do not fit the grid, are not finite or are negative.
    """
    heat = _cell_heat(weights, grid, top=top, even=even)
    down, across = _placement(grid, fit, size or (fit.width, fit.height), smooth)
    return np.asarray(down @ heat @ across.T, np.float32).clip(0, 1)


def _cell_heat(
    weights: np.ndarray, grid: tuple[int, int], *, top: float | None = None, even: float | None = None
) -> np.ndarray:
    """Return the ``(H, W)`` heat of the cells themselves, 0 to 1."""
    cells = np.asarray(weights, np.float64)
    if cells.size != grid[0] * grid[1]:
        raise ValueError(f"{cells.size} attention weights do not fill a grid of {grid[0]}×{grid[1]} cells")
    if not (np.isfinite(cells).all() and (cells >= 0).all()):
        raise ValueError("attention weights must be finite and not negative")
    ratio = cells.reshape(grid) / (even if even is not None else 1 / cells.size)
    if top is None:
        top = max(float(ratio.max()), SMALLEST_TOP)
    if top <= 1:
        raise ValueError(f"top is {top:g}; it must exceed 1, the even share")
    # float32 softmax weights miss the even share by rounding; that must not show
    ratio[np.abs(ratio - 1) < 1e-4] = 1.0
    return np.clip(np.log(np.maximum(ratio, 1.0)) / math.log(top), 0.0, 1.0)


def _frames(caption: Caption, attention: np.ndarray) -> np.ndarray:
    """Return a word's attention as ``(F, H, W)``."""
    shape = (len(caption.times), *caption.grid)
    if attention.size != math.prod(shape):
        raise ValueError(f"attention of shape {attention.shape} does not fill (F, H, W) = {shape}")
    return attention.reshape(shape)


def _placement(
    grid: tuple[int, int], fit: Fit, size: tuple[int, int], smooth: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(h, H)`` and ``(w, W)`` matrices: what each cell counts in each row and column of pixels.

    Rows are non-negative and sum to 1, or to 0 where the network saw nothing; hence no overshoot.
    """
    left, top, right, bottom = fit.box
    return (
        _axis(size[1], fit.height, top, bottom, grid[0], smooth),
        _axis(size[0], fit.width, left, right, grid[1], smooth),
    )


def _axis(pixels: int, length: float, low: float, high: float, cells: int, smooth: bool) -> np.ndarray:
    matrix = np.zeros((pixels, cells))
    centres = (np.arange(pixels) + 0.5) * (length / pixels)
    position = (centres - low) / (high - low) * cells  # in cells from the box's edge
    inside = (position >= 0) & (position < cells)
    rows = np.flatnonzero(inside)
    if not smooth:
        matrix[rows, position[rows].astype(int)] = 1.0
        return matrix
    between = np.clip(position[rows] - 0.5, 0, cells - 1)  # 0 at the first cell's centre
    first = between.astype(int)
    second = np.minimum(first + 1, cells - 1)
    t = between - first
    # Halfway from linear to smoothstep: round blobs without creases, and still a weighted mean.
    t = 0.5 * t + 0.5 * t * t * (3 - 2 * t)
    matrix[rows, first] += 1 - t
    matrix[rows, second] += t
    return matrix


def colour(heat: np.ndarray) -> np.ndarray:
    """Return ``heat.shape + (4,)`` uint8 RGBA for heat from 0 to 1."""
    return _RAMP[np.rint(heat * (len(_RAMP) - 1)).astype(np.int32)]


def _ramp(colours: np.ndarray) -> np.ndarray:
    heat = np.linspace(0, 1, 4096)
    rgba = [np.interp(heat, colours[:, 0], colours[:, i]) for i in range(1, 5)]
    rgba[3] = rgba[3] * 255
    return np.rint(np.stack(rgba, -1)).astype(np.uint8)


# interpolating between the colours for every pixel would take most of the time of a large picture
_RAMP = _ramp(_COLOURS)


# --- pages: the same drawing for pixels and for vectors --------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    x: float
    y: float
    width: float
    height: float
    picture: Image.Image


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float
    fill: str
    opacity: float = 1.0
    radius: float = 0.0


@dataclass(frozen=True)
class _Text:
    x: float
    y: float  # of the baseline
    text: str
    size: float
    fill: str
    anchor: str = "l"  # l, m or r


@dataclass
class _Page:
    """A list of things to draw, in pixels from the top left; drawn by `_to_image`, `_to_svg`, `_to_pdf`."""

    width: int
    height: int = 0
    items: list[_Picture | _Box | _Text] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, size: float, fill: str = _INK, anchor: str = "l") -> None:
        self.items.append(_Text(x, y, text, size, fill, anchor))

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        opacity: float = 1,
        radius: float = 0,
    ) -> None:
        self.items.append(_Box(x, y, width, height, fill, opacity, radius))

    def note(self, x: float, y: float, text: str, size: float, width: float) -> float:
        """Write small print downwards from ``y``; return its height."""
        lines = _lines(text, size, width)
        for i, line in enumerate(lines):
            self.text(x, y + size * (1 + 1.4 * i), line, size, _MUTED)
        return size * 1.4 * len(lines)

    def picture(self, x: float, y: float, width: float, height: float, picture: Image.Image) -> None:
        self.items.append(_Picture(x, y, width, height, picture))


def _to_image(page: _Page) -> Image.Image:
    canvas = Image.new("RGB", (page.width, page.height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for item in page.items:
        if isinstance(item, _Picture):
            picture = item.picture
            size = (max(1, round(item.width)), max(1, round(item.height)))
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.BILINEAR)
            mask = picture.getchannel("A") if picture.mode == "RGBA" else None
            canvas.paste(picture.convert("RGB"), (round(item.x), round(item.y)), mask)
        elif isinstance(item, _Box):
            mask = _box_mask(max(1, round(item.width)), max(1, round(item.height)), item.radius, item.opacity)
            canvas.paste(item.fill, (round(item.x), round(item.y)), mask)
        else:
            text, font = _typeset(item.text, item.size)
            draw.text((item.x, item.y), text, font=font, fill=item.fill, anchor=item.anchor + "s")
    return canvas


def _box_mask(width: int, height: int, radius: float, opacity: float) -> Image.Image:
    if not radius:
        return Image.new("L", (width, height), round(255 * opacity))
    many = 4  # Pillow draws no smooth corners; average finer ones
    mask = Image.new("L", (width * many, height * many), 0)
    corner = min(radius, width / 2, height / 2) * many
    ImageDraw.Draw(mask).rounded_rectangle(
        (0, 0, width * many - 1, height * many - 1), corner, round(255 * opacity)
    )
    return mask.resize((width, height), Image.Resampling.BOX)


def _to_svg(page: _Page, title: str) -> bytes:
    known: dict[int, str] = {}
    definitions: list[str] = []
    body: list[str] = []
    for item in page.items:
        if isinstance(item, _Picture):
            name = known.get(id(item.picture))
            if name is None:  # the dimmed photo lies under every word: embed it once
                name = known[id(item.picture)] = f"picture{len(known)}"
                definitions.append(
                    f'<image id="{name}" width="{item.width:g}" height="{item.height:g}" '
                    f'preserveAspectRatio="none" xlink:href="{_data_uri(item.picture)}"/>'
                )
            body.append(f'<use xlink:href="#{name}" x="{item.x:g}" y="{item.y:g}"/>')
        elif isinstance(item, _Box):
            corner = f' rx="{item.radius:g}"' if item.radius else ' shape-rendering="crispEdges"'
            alpha = f' fill-opacity="{item.opacity:.3g}"' if item.opacity < 1 else ""
            body.append(
                f'<rect x="{item.x:.2f}" y="{item.y:.2f}" width="{item.width:.2f}" '
                f'height="{item.height:.2f}" fill="{item.fill}"{alpha}{corner}/>'
            )
        else:
            anchor = {"l": "start", "m": "middle", "r": "end"}[item.anchor]
            # whatever font the viewer has, the text takes the room that the layout gave it
            wide = _measure(item.text, item.size)
            body.append(
                f'<text x="{item.x:.2f}" y="{item.y:.2f}" font-size="{item.size:g}" fill="{item.fill}" '
                f'text-anchor="{anchor}" textLength="{wide:.2f}" lengthAdjust="spacingAndGlyphs">'
                f"{escape(item.text)}</text>"
            )
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{page.width}" height="{page.height}" viewBox="0 0 {page.width} {page.height}" '
        f'role="img" aria-label={quoteattr(title)} font-family="Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{page.width}" height="{page.height}" fill="{_PAPER}"/>',
        "<defs>",
        *definitions,
        "</defs>",
        *body,
        "</svg>\n",
    ]
    return "\n".join(lines).encode()


# rc_context changes matplotlib's settings for the whole process until it ends
_MATPLOTLIB = threading.Lock()


def _to_pdf(page: _Page, title: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch, Rectangle
    except ImportError as error:
        raise ImportError('PDF figures need matplotlib: pip install "captioner[figures]"') from error
    import logging

    settings: dict[Any, Any] = {
        "pdf.fonttype": 42,  # real text: to be selected and edited
        "font.family": ["DejaVu Sans"],
    }
    with _MATPLOTLIB, matplotlib.rc_context(settings):
        quiet = logging.getLogger("matplotlib").level
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        try:
            figure = Figure(figsize=(page.width / 100, page.height / 100))
            axes = figure.add_axes((0, 0, 1, 1))
            axes.set_axis_off()
            for order, item in enumerate(page.items, 1):
                if isinstance(item, _Picture):
                    axes.imshow(
                        np.asarray(item.picture),
                        extent=(item.x, item.x + item.width, item.y + item.height, item.y),
                        interpolation="none",
                        aspect="auto",
                        zorder=order,
                    )
                elif isinstance(item, _Box):
                    common: dict[str, Any] = {
                        "facecolor": item.fill,
                        "alpha": item.opacity,
                        "linewidth": 0,
                        "zorder": order,
                    }
                    corner = min(item.radius, item.width / 2, item.height / 2)
                    if corner:
                        axes.add_patch(
                            FancyBboxPatch(
                                (item.x, item.y),
                                item.width,
                                item.height,
                                boxstyle=f"round,pad=0,rounding_size={corner}",
                                **common,
                            )
                        )
                    else:
                        axes.add_patch(
                            Rectangle((item.x, item.y), item.width, item.height, antialiased=False, **common)
                        )
                else:
                    axes.text(
                        item.x,
                        item.y,
                        item.text,
                        # points; DejaVu Sans runs wider than the font that the layout was measured with
                        fontsize=item.size * 0.72 * 0.88,
                        color=item.fill,
                        ha={"l": "left", "m": "center", "r": "right"}[item.anchor],
                        va="baseline",
                        parse_math=False,
                        zorder=order,
                    )
            axes.set_xlim(0, page.width)
            axes.set_ylim(page.height, 0)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="pdf", metadata={"Title": title, "CreationDate": None})
        finally:
            logging.getLogger("matplotlib").setLevel(quiet)
    return buffer.getvalue()


# --- text -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _font(name: str | None, size: float) -> ImageFont.FreeTypeFont | None:
    try:
        font = ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    except OSError:
        return None
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@lru_cache(maxsize=1)
def _fallback_fonts() -> tuple[str, ...]:
    """Fonts to look for when Pillow's own, which is ASCII only, lacks a letter."""
    names = ["DejaVuSans.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc"]
    matplotlib = find_spec("matplotlib")  # comes with DejaVu Sans; finding it does not import it
    if matplotlib and matplotlib.origin:
        names.insert(0, str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"))
    return tuple(names)


@lru_cache(maxsize=4096)
def _has(name: str | None, letter: str) -> bool:
    font = _font(name, 20)
    if font is None:
        return False
    if letter == " ":
        return True
    mask, missing = font.getmask(letter), font.getmask("\U0010ffff")
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


@lru_cache(maxsize=1024)
def _face(text: str) -> tuple[str, str | None]:
    """Return the text and the font that can draw it; accents go before letters become boxes."""
    if text.isascii():
        return text, None
    letters = set(text)
    for name in (None, *_fallback_fonts()):
        if all(_has(name, letter) for letter in letters):
            return text, name
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    if all(_has(None, letter) for letter in set(plain)):
        return plain, None
    best = max((None, *_fallback_fonts()), key=lambda name: sum(_has(name, letter) for letter in letters))
    return text, best


def _typeset(text: str, size: float) -> tuple[str, ImageFont.FreeTypeFont]:
    text, name = _face(text)
    font = _font(name, size)
    assert font is not None
    return text, font


@lru_cache(maxsize=4096)
def _measure(text: str, size: float) -> float:
    text, font = _typeset(text, size)
    return font.getlength(text)


def _clean(text: str) -> str:
    """Drop what cannot be drawn on one line: control characters, line breaks, lone surrogates."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "?"


def _shorten(text: str, size: float, width: float) -> str:
    """Cut text to a width in pixels."""
    if _measure(text, size) <= width:
        return text
    fits = bisect_right(range(1, len(text)), width, key=lambda n: _measure(text[:n] + "...", size))
    return text[:fits].rstrip() + "..."


def _wrap(pieces: Sequence[str], size: float, width: float) -> list[list[tuple[int, float, str]]]:
    """Break words into lines of ``(index, x, word)``; a word wider than a line is shortened."""
    lines: list[list[tuple[int, float, str]]] = [[]]
    space = _measure(" ", size)
    x = 0.0
    for index, piece in enumerate(pieces):
        piece = _shorten(piece, size, width)
        wide = _measure(piece, size)
        # as join_words does: 's attaches to its left
        gap = 0.0 if not lines[-1] or piece.startswith("'") else space
        if lines[-1] and x + gap + wide > width:
            lines.append([])
            x = gap = 0.0
        lines[-1].append((index, x + gap, piece))
        x += gap + wide
    return lines


def _lines(text: str, size: float, width: float) -> list[str]:
    """Break running text into lines."""
    return [" ".join(piece for _, _, piece in line) for line in _wrap(text.split(), size, width)]


def _percent(probability: float) -> str:
    if 0 < probability < 0.01:
        return "<1%"
    if 0.99 < probability < 1:
        return ">99%"
    return f"{probability:.0%}"


def _chance(word: Word) -> str:
    return "given" if word.given else _percent(word.probability)


def _standing(caption: Caption, frame: int | None = 0) -> str:
    """The line under the heading; None leaves out the time of a frame."""
    parts = [f"confidence {_percent(caption.confidence)}"]
    if not caption.sure:
        parts.append("not sure: a guess")
    if not caption.finished:
        parts.append("cut off before its end")
    if frame is not None and len(caption.times) > 1:
        parts.append(f"frame at {float(caption.times[frame]):.1f} s")
    return ", ".join(parts)


# --- the photo under the heat ---------------------------------------------------------------------------


class _View:
    """One photo, one caption and one colour scale; draws the photo under any word's heat."""

    def __init__(
        self,
        caption: Caption,
        image: Any,
        width: int,
        frame: int,
        smooth: bool,
        top: float | None,
        vector: bool = False,
    ):
        _check_width(width)
        frames = len(caption.times)
        if not 0 <= frame < frames:
            raise IndexError(f"frame {frame} of a caption with {frames}: frames count from 0")
        self.caption, self.frame, self.smooth, self.vector = caption, frame, smooth, vector
        self.top = scale(caption) if top is None else float(top)
        self.photo = open_image(image, draft_size=width)  # twice what can be shown
        fit = caption.fit
        width, height = self.photo.size
        if abs(width * fit.height / fit.width - height) > 1 + 0.02 * height:
            raise ValueError(
                f"this picture has {width}×{height} pixels, the captioned one {fit.width}×{fit.height}: "
                "another picture?"
            )
        self._bases: dict[tuple[int, int], tuple[Image.Image, Image.Image]] = {}
        self._veil: Image.Image | None = None

    @property
    def attends(self) -> bool:
        """Whether any word has attention."""
        return any(word.attention is not None for word in self.caption.words)

    @property
    def whole(self) -> bool:
        """Whether the network saw all of the photo."""
        left, top, right, bottom = self.caption.fit.box
        fit = self.caption.fit
        return left <= 0.5 and top <= 0.5 and right >= fit.width - 0.5 and bottom >= fit.height - 0.5

    def within(self, width: float, height: float) -> tuple[int, int]:
        """Return the photo's size in pixels when it fills a rectangle, aspect ratio kept."""
        w, h = self.photo.size
        ratio = min(width / w, height / h)
        return max(1, round(w * ratio)), max(1, round(h * ratio))

    def bases(self, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
        """Return the photo at a size, and dimmed as it lies under the heat."""
        if size not in self._bases:
            filter_ = Image.Resampling.LANCZOS if size[0] < self.photo.width else Image.Resampling.BICUBIC
            photo = self.photo.resize(size, filter_, reducing_gap=2.0)
            self._bases[size] = photo, self.dimmed(photo)
        return self._bases[size]

    def dimmed(self, photo: Image.Image) -> Image.Image:
        """Return a picture as it lies under the heat."""
        dim = ImageEnhance.Color(photo).enhance(_SATURATION)
        dim = ImageEnhance.Brightness(dim).enhance(_BRIGHTNESS)
        return self._hatch(dim) if self.attends and not self.whole else dim

    def _hatch(self, dim: Image.Image) -> Image.Image:
        if self._veil is None or self._veil.size != dim.size:
            self._veil = self._unseen(dim.size)
        dim.paste(self._veil, (0, 0), self._veil)
        return dim

    def _unseen(self, size: tuple[int, int]) -> Image.Image:
        """Return an RGBA picture that darkens and hatches what the network did not see."""
        down, across = _placement((1, 1), self.caption.fit, size, False)
        unseen = down @ across.T < 0.5
        rows, columns = np.indices((size[1], size[0]), sparse=True)
        lines = unseen & ((rows + columns) % 8 < 1)
        veil = np.zeros((size[1], size[0], 4), np.uint8)
        veil[unseen, 3] = round(255 * (1 - _UNSEEN))
        left = 0.78 * _UNSEEN  # of the photo, where a line of 22 % grey crosses it
        veil[lines] = [*(round(0.22 * c / (1 - left)) for c in _HATCH), round(255 * (1 - left))]
        return Image.fromarray(veil)

    def draw(self, page: _Page, x: float, y: float, size: tuple[int, int], word: Word | None) -> bool:
        """Put the photo on a page: bare without a word, else under the word's heat.

        Return whether the picture says in full that there is no attention to show.
        """
        photo, dim = self.bases(size)
        if word is None:
            page.picture(x, y, *size, photo)
            return False
        page.picture(x, y, *size, dim)
        if word.attention is None:
            return self._say_so(page, x, y, size)
        if self.vector and not self.smooth:
            weights = _frames(self.caption, word.attention)[self.frame]
            cells = _cell_heat(weights, self.caption.grid, top=self.top, even=1 / word.attention.size)
            page.items.extend(_cell_boxes(cells, self.caption.fit, x, y, size))
            return False
        page.picture(x, y, *size, self.heat(size, word.attention))
        return False

    def heat(self, size: tuple[int, int], attention: np.ndarray) -> Image.Image:
        """Return one word's heat in this view's frame as an RGBA picture."""
        weights = _frames(self.caption, attention)[self.frame]
        return Image.fromarray(
            colour(
                heat_map(
                    weights,
                    self.caption.grid,
                    self.caption.fit,
                    size,
                    top=self.top,
                    even=1 / attention.size,
                    smooth=self.smooth,
                )
            )
        )

    def _say_so(self, page: _Page, x: float, y: float, size: tuple[int, int]) -> bool:
        width, height = size
        full = NONE_HERE if self.attends else NO_ATTENTION
        for text in (full, SHORT_NO_ATTENTION)[width < 450 :]:  # a sheet says it in full below its tiles
            for points in (18, 15, 12):
                if _measure(text, points) + 16 <= width and points * 2 <= height:
                    page.box(x, y + height / 2 - points, width, points * 2, "#000000", 0.65)
                    page.text(x + width / 2, y + height / 2 + points * 0.36, text, points, _PAPER, "m")
                    return text == NO_ATTENTION
        return False

    def legend(self, page: _Page, x: float, y: float, width: float, unit: float) -> float:
        """Draw the colour scale from ``(x, y)`` down within a width; return its height."""
        small = 12 * unit
        if not self.attends:
            return page.note(x, y, NO_ATTENTION, small, width) if self.caption.words else 0.0
        label = "attention per cell (1x = an even share)"
        bar = min(220 * unit, width)
        at = x
        top = y
        if _measure(label, small) + 12 * unit + bar <= width:
            page.text(x, y + small, label, small, _MUTED)
            at += _measure(label, small) + 12 * unit
        else:
            top += page.note(x, y, label, small, width) + 2 * unit
        thick = round(11 * unit)
        ramp = np.linspace(0, 1, max(2, round(bar)))
        # over the grey that a dimmed photo has on average, as the eye meets it there
        page.box(at, top + 1, bar, thick, "#5c5c5c")
        page.picture(at, top + 1, round(bar), thick, Image.fromarray(colour(np.tile(ramp, (thick, 1)))))
        ticks = [float(2**k) for k in range(int(math.log2(self.top) + 1e-9) + 1)]
        if ticks[-1] < self.top * 0.999:
            if math.log2(self.top / ticks[-1]) < 0.75 and len(ticks) > 1:
                ticks.pop()
            ticks.append(self.top)
        for tick in ticks:
            place = at + bar * math.log(tick) / math.log(self.top)
            anchor = "l" if tick == ticks[0] else "r" if tick == ticks[-1] else "m"
            page.text(place, top + thick + 3 * unit + 10 * unit, f"{tick:g}x", 11 * unit, _FAINT, anchor)
        height = top - y + thick + 16 * unit
        if not self.whole:
            note = "hatched: outside what the model saw"
            after = at + bar + 20 * unit
            if after + _measure(note, small) <= x + width:
                page.text(after, top + small, note, small, _MUTED)
            else:
                height += 3 * unit
                height += page.note(x, y + height, note, small, width)
        return height


def _cell_boxes(heat: np.ndarray, fit: Fit, x: float, y: float, size: tuple[int, int]) -> Iterator[_Box]:
    """Yield one rectangle for each coloured cell, cut to the photo."""
    rows, columns = heat.shape
    left, top, right, bottom = fit.box
    colours = colour(heat)
    for row, column in np.argwhere(heat > 0):
        x0 = (left + (right - left) * column / columns) * size[0] / fit.width
        x1 = (left + (right - left) * (column + 1) / columns) * size[0] / fit.width
        y0 = (top + (bottom - top) * row / rows) * size[1] / fit.height
        y1 = (top + (bottom - top) * (row + 1) / rows) * size[1] / fit.height
        x0, x1 = np.clip((x0, x1), 0, size[0])
        y0, y1 = np.clip((y0, y1), 0, size[1])
        if x1 > x0 and y1 > y0:
            red, green, blue, alpha = (int(c) for c in colours[row, column])
            yield _Box(
                float(x + x0),
                float(y + y0),
                float(x1 - x0),
                float(y1 - y0),
                f"#{red:02x}{green:02x}{blue:02x}",
                alpha / 255,
            )


# --- pictures -------------------------------------------------------------------------------------------


def word_overlay(
    caption: Caption,
    index: int,
    image: Any,
    *,
    frame: int = 0,
    width: int = 640,
    smooth: bool = True,
    top: float | None = None,
) -> Image.Image:
    """Draw one word: the photo under its heat, and below it the word, its probability and the scale.

    Args:
        caption: what `captioner.Captioner.caption` returned.
        index: which word, from 0; negative counts from the end.
        image: the photo that was captioned: path, bytes, PIL image or array.
        frame: which frame of the attention, from 0; ``image`` is that frame's picture.
        width: of the result in pixels, at least 160.
        smooth: interpolate between the cells' centres; False draws the bare cells.
        top: the multiple of an even share that gets the strongest colour; by default `scale` of the
            caption, so that its words compare.

    Returns:
        An RGB picture ``width`` wide; the photo keeps its aspect ratio and is at most 1.8 times as high.

    Raises:
        IndexError: no such word or frame.
        ValueError: the picture has another shape than the captioned one, or cannot be decoded
            (`captioner.images.ImageError`).
    """
    count = len(caption.words)
    if not -count <= index < count:
        raise IndexError(f"word {index} of a caption with {count} words")
    view = _View(caption, image, width, frame, smooth, top)
    word = caption.words[index]
    unit = max(1.0, width / 640)
    pad = 14 * unit
    page = _Page(width)
    size = view.within(width, width * _TALLEST)
    said = view.draw(page, (width - size[0]) // 2, 0, size, word)
    y = size[1] + 32 * unit
    chance = _chance(word)
    reserve = _measure(chance, 18 * unit) + 12 * unit
    page.text(pad, y, _shorten(_clean(word.text), 24 * unit, width - 2 * pad - reserve), 24 * unit)
    page.text(width - pad, y, chance, 18 * unit, _MUTED, "r")
    y += 10 * unit
    _meter(page, pad, y, width - 2 * pad, word, unit)
    y += 18 * unit
    if not said:
        y += view.legend(page, pad, y, width - 2 * pad, unit)
    page.height = math.ceil(y + 8 * unit)
    return _to_image(page)


def _meter(page: _Page, x: float, y: float, width: float, word: Word, unit: float) -> None:
    """A bar as long as the word is probable; none for a given word, which the model did not choose."""
    thick = max(2, round(3 * unit))
    if not word.given:
        page.box(x, y, width, thick, _TRACK)
        long = width * min(max(word.probability, 0.0), 1.0)
        if long >= 0.5:
            page.box(x, y, long, thick, _MUTED)


def sheet(
    caption: Caption,
    image: Any,
    *,
    columns: int | None = None,
    width: int = 1200,
    frame: int = 0,
    smooth: bool = True,
    top: float | None = None,
) -> Image.Image:
    """Draw the whole caption: the photo, then one tile for each word with its heat and probability.

    The caption and its confidence stand above, the colour scale that all words share below.

    Args:
        caption: what `captioner.Captioner.caption` returned.
        image: the photo that was captioned: path, bytes, PIL image or array.
        columns: tiles in a row; by default as many as suit the photo's shape and the width.
        width: of the sheet in pixels, at least 160.
        frame: which frame of the attention, from 0; ``image`` is that frame's picture.
        smooth: interpolate between the cells' centres; False draws the bare cells.
        top: the multiple of an even share that gets the strongest colour; by default `scale` of the caption.

    Returns:
        An RGB picture ``width`` wide, as high as it takes.

    Raises:
        IndexError: no such frame.
        ValueError: the picture has another shape than the captioned one, or cannot be decoded
            (`captioner.images.ImageError`); or a width or number of columns that is too small.
    """
    return _to_image(_sheet_page(_View(caption, image, width, frame, smooth, top), columns, width))


def _sheet_page(view: _View, columns: int | None, width: int) -> _Page:
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")
    caption = view.caption
    unit = max(1.0, width / 1200)
    margin = min(28 * unit, width * 0.05)
    gap = 18 * unit
    room = width - 2 * margin
    page = _Page(width)

    y = margin * 0.6
    big = 26 * unit
    for line in _lines(_clean(caption.text) if caption.words else "(no words)", big, room):
        y += big * 1.2
        page.text(margin, y, line, big)
    y += 25 * unit
    for line in _lines(_standing(caption, view.frame), 15 * unit, room):
        page.text(margin, y, line, 15 * unit, _MUTED)
        y += 18 * unit

    tiles: list[Word | None] = [None, *caption.words]
    columns, cell = _columns(view.photo.size, len(tiles), room, gap, unit, columns)
    size = view.within(cell, max(420 * unit, cell * _TALLEST))
    cell = min(cell, max(size[0], round(130 * unit)))
    label = max(float(size[0]), min(cell, 130 * unit))
    big, small = 17 * unit, 14 * unit
    for first in range(0, len(tiles), columns):
        for column, word in enumerate(tiles[first : first + columns]):
            x = round(margin + column * (cell + gap))
            view.draw(page, x, round(y), size, word)
            base = round(y) + size[1] + 20 * unit
            if word is None:
                page.text(x, base, "photo", big, _FAINT)
                continue
            chance = _chance(word)
            reserve = _measure(chance, small) + 8 * unit
            page.text(x, base, _shorten(_clean(word.text), big, label - reserve), big)
            page.text(x + label, base, chance, small, _MUTED, "r")
            _meter(page, x, base + 7 * unit, label, word, unit)
        y += size[1] + 50 * unit
    y += view.legend(page, margin, y, room, unit)
    page.height = math.ceil(y + margin * 0.5)
    return page


def _columns(
    photo: tuple[int, int], tiles: int, room: float, gap: float, unit: float, columns: int | None
) -> tuple[int, int]:
    """Return the number of columns and their width in pixels."""
    target = min(max(240 * unit * math.sqrt(photo[0] / photo[1]), 130 * unit), room)
    widest = room
    if columns is None:
        columns = max(1, min(tiles, round((room + gap) / (target + gap))))
        rows = math.ceil(tiles / columns)
        columns = math.ceil(tiles / rows)  # no lone tile in the last row where it can be helped
        widest = max(1.6 * target, 1.0)
    return columns, max(1, int(min((room - gap * (columns - 1)) / columns, widest)))


def _check_width(width: int) -> None:
    if width < 160:
        raise ValueError(f"width is {width}; it must be at least 160 pixels")


def animation(
    caption: Caption,
    image: Any,
    format: str = "webp",
    *,
    seconds: float = 0.8,
    width: int = 480,
    frame: int = 0,
    smooth: bool = True,
    top: float | None = None,
) -> bytes:
    """Draw an endless animation: the photo, then every word's heat with the word marked in the caption.

    Args:
        caption: what `captioner.Captioner.caption` returned.
        image: the photo that was captioned: path, bytes, PIL image or array.
        format: ``webp`` (smaller and cleaner) or ``gif``.
        seconds: for each word; the photo at the beginning stays twice as long.
        width: of the animation in pixels, at least 160.
        frame: which frame of the attention, from 0; ``image`` is that frame's picture.
        smooth: interpolate between the cells' centres; False draws the bare cells.
        top: the multiple of an even share that gets the strongest colour; by default `scale` of the caption.

    Returns:
        The file's bytes: one picture more than the caption has words.

    Raises:
        IndexError: no such frame.
        ValueError: an unknown format, seconds below 0.02 (players ignore less), a width that is too small,
            or a picture that has another shape than the captioned one or cannot be decoded.
    """
    format = format.lower()
    if format not in ("gif", "webp"):
        raise ValueError(f"an animation is gif or webp, not {format!r}")
    if not 0.02 <= seconds <= 60:
        raise ValueError(f"seconds is {seconds:g}; it must be 0.02 to 60")
    view = _View(caption, image, width, frame, smooth, top)
    pictures = [_to_image(_moment(view, index, width)) for index in range(-1, len(caption.words))]
    each = round(seconds * 100) * 10  # milliseconds; GIF counts hundredths of a second
    durations = [2 * each] + [each] * len(caption.words)
    buffer = io.BytesIO()
    if format == "gif":
        pictures = [_palette(picture) for picture in pictures]
        options: dict[str, Any] = {"optimize": False, "disposal": 1}
    else:
        options = {"quality": 82, "method": 3}
    more = {"duration": durations, "loop": 0} if len(pictures) > 1 else {}
    pictures[0].save(buffer, format.upper(), save_all=True, append_images=pictures[1:], **more, **options)
    return buffer.getvalue()


def _palette(picture: Image.Image) -> Image.Image:
    """Reduce a picture to 256 colours: those of the text and the heat, and the best for the rest."""
    heat = colour(np.linspace(0, 1, 27)).astype(float)
    ramp = heat[:, :3] * heat[:, 3:] / 255 + 0x5C * (1 - heat[:, 3:] / 255)
    fixed = [ImageColor.getrgb(c) for c in (_PAPER, _INK, _MUTED, _FAINT, _PILL)]
    fixed += [(int(r), int(g), int(b)) for r, g, b in ramp]
    best = picture.quantize(256 - len(fixed), Image.Quantize.MEDIANCUT).getpalette() or []
    holder = Image.new("P", (1, 1))
    holder.putpalette([*(value for colour in fixed for value in colour[:3]), *best])
    reduced = picture.quantize(palette=holder, dither=Image.Dither.FLOYDSTEINBERG)
    # Pillow looks colours up roughly; white paper must not turn grey beside a photo with pale tones
    paper = (np.asarray(picture) == 255).all(-1)
    reduced.paste(0, mask=Image.fromarray(paper))
    return reduced


def _moment(view: _View, current: int, width: int) -> _Page:
    """One picture of the animation; ``current`` is the word, or -1 for the photo before the first."""
    caption = view.caption
    unit = max(1.0, width / 480)
    pad = 14 * unit
    page = _Page(width)
    size = view.within(width, width * _TALLEST)
    word = caption.words[current] if current >= 0 else None
    view.draw(page, (width - size[0]) // 2, 0, size, word)
    big, small = 21 * unit, 13 * unit
    y = _sentence(page, caption, current, pad, size[1] + 10 * unit, big, unit)
    y += 28 * unit
    if word is None:
        below = _standing(caption, view.frame)
    elif word.given:
        below = "given"
    else:
        below = f"probability {_percent(word.probability)}"
    page.text(pad, y, _shorten(below, small, width - 2 * pad), small, _MUTED)
    y += 12 * unit
    y += view.legend(page, pad, y, width - 2 * pad, unit)
    page.height = math.ceil(y + 8 * unit)
    return page


def _sentence(
    page: _Page, caption: Caption, current: int, pad: float, y: float, big: float, unit: float
) -> float:
    """Write the caption downwards from ``y`` with one word marked; return its last line's baseline."""
    for line in _wrap([_clean(w.text) for w in caption.words], big, page.width - 2 * pad):
        y += big * 1.4
        for index, x, piece in line:
            if index == current:
                wide = _measure(piece, big)
                page.box(pad + x - 4 * unit, y - big, wide + 8 * unit, big * 1.34, _PILL, radius=5 * unit)
            page.text(pad + x, y, piece, big, _INK if current < 0 or index <= current else _FAINT)
    return y


def figure(
    caption: Caption,
    image: Any,
    format: str = "svg",
    *,
    columns: int | None = None,
    width: int = 1200,
    frame: int = 0,
    smooth: bool = True,
    top: float | None = None,
) -> bytes:
    """Draw the sheet as a vector figure, for papers: text as text, the photo embedded.

    Args:
        caption: what `captioner.Captioner.caption` returned.
        image: the photo that was captioned: path, bytes, PIL image or array.
        format: ``svg``, or ``pdf``, which needs matplotlib.
        columns: tiles in a row; by default as many as suit the photo's shape and the width.
        width: in SVG pixels; 1200 are 12 inches of PDF.
        frame: which frame of the attention, from 0; ``image`` is that frame's picture.
        smooth: interpolated heat, embedded as a picture of its own over the photo; False draws the cells as
            rectangles.
        top: the multiple of an even share that gets the strongest colour; by default `scale` of the caption.

    Returns:
        The file's bytes.

    Raises:
        ImportError: PDF without matplotlib; the message says what to install.
        IndexError: no such frame.
        ValueError: an unknown format, or as for `sheet`.
    """
    format = format.lower()
    if format not in ("svg", "pdf"):
        raise ValueError(f"a figure is svg or pdf, not {format!r}")
    page = _sheet_page(_View(caption, image, width, frame, smooth, top, vector=True), columns, width)
    title = _clean(caption.text)
    return _to_svg(page, title) if format == "svg" else _to_pdf(page, title)


# --- arrays and files -----------------------------------------------------------------------------------


def arrays(caption: Caption) -> dict[str, np.ndarray]:
    """Return what it takes to draw figures of one's own, as plain arrays without objects.

    Returns:
        A dict with T words, F frames and an ``(H, W)`` grid:

        - ``caption``: the sentence, a string of shape ``()``;
        - ``words``: ``(T,)`` strings;
        - ``probabilities``, ``confidences``: ``(T,)`` float32, 0 to 1;
        - ``given``: ``(T,)`` bool, whether the caller gave the word;
        - ``gates``: ``(T,)`` float32, 0 to 1, NaN where the model has none;
        - ``attention``: ``(T, F, H, W)`` float32, sums to 1 over F, H and W, NaN for a word without; there
          is no such key when no word has attention;
        - ``grid``: ``(2,)`` int, H and W;
        - ``times``: ``(F,)`` float32 seconds;
        - ``photo``: ``(2,)`` int, width and height in pixels;
        - ``box``: ``(4,)`` float32, left, top, right and bottom in photo pixels of what the grid covers;
        - ``fit``: ``squash``, ``crop`` or ``letterbox``, a string of shape ``()``.
    """
    words, fit = caption.words, caption.fit
    result = {
        "caption": np.array(caption.text, dtype=str),
        "words": np.array([w.text for w in words], dtype=str),
        "probabilities": np.array([w.probability for w in words], np.float32),
        "confidences": np.array([w.confidence for w in words], np.float32),
        "given": np.array([w.given for w in words], bool),
        "gates": np.array([math.nan if w.gate is None else w.gate for w in words], np.float32),
        "grid": np.array(caption.grid, np.int64),
        "times": np.asarray(caption.times, np.float32),
        "photo": np.array((fit.width, fit.height), np.int64),
        "box": np.array(fit.box, np.float32),
        "fit": np.array(fit.mode, dtype=str),
    }
    if any(w.attention is not None for w in words):
        none = np.full((len(caption.times), *caption.grid), np.nan)
        maps = [none if w.attention is None else _frames(caption, w.attention) for w in words]
        result["attention"] = np.stack(maps).astype(np.float32)
    return result


def save_arrays(caption: Caption, path: str | os.PathLike[str]) -> Path:
    """Write `arrays` as a compressed ``.npz``, to be read by ``np.load`` without pickle; return the path.

    Raises:
        OSError: the file cannot be written.
    """
    return files.save(Path(path), _npz(caption))


def _npz(caption: Caption) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays(caption))  # type: ignore[arg-type]
    return buffer.getvalue()


def encode(picture: Image.Image, format: str, **options: Any) -> bytes:
    """Return a picture as a file of a format that Pillow writes."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def _data_uri(picture: Image.Image) -> str:
    if picture.mode == "RGBA":
        kind, data = "png", encode(picture, "PNG")
    else:
        kind, data = "jpeg", encode(picture, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _json(caption: Caption, image: Any) -> bytes:
    return (json.dumps(caption.to_dict(attention=True), ensure_ascii=False) + "\n").encode()


def _jpeg(caption: Caption, image: Any, **options: Any) -> bytes:
    return encode(sheet(caption, image, **options), "JPEG", quality=92, subsampling=0)


_RENDERERS: dict[str, Callable[..., bytes]] = {
    ".png": lambda caption, image, **options: encode(sheet(caption, image, **options), "PNG"),
    ".jpg": _jpeg,
    ".jpeg": _jpeg,
    ".webp": lambda caption, image, **options: animation(caption, image, "webp", **options),
    ".gif": lambda caption, image, **options: animation(caption, image, "gif", **options),
    ".svg": lambda caption, image, **options: figure(caption, image, "svg", **options),
    ".pdf": lambda caption, image, **options: figure(caption, image, "pdf", **options),
    ".html": lambda caption, image, **options: html(caption, image, **options).encode(),
    ".htm": lambda caption, image, **options: html(caption, image, **options).encode(),
    ".npz": lambda caption, image: _npz(caption),
    ".json": _json,
}


def save(caption: Caption, image: Any, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write a caption's overlay in the format that the path's suffix names, all at once or not at all.

    ``.png`` and ``.jpg`` hold the `sheet`, ``.gif`` and ``.webp`` the `animation`, ``.svg`` and ``.pdf`` the
    `figure`, ``.html`` the page of `html`, ``.npz`` the `arrays`, ``.json`` the record
    ``caption.to_dict(attention=True)``.

    Args:
        caption: what `captioner.Captioner.caption` returned.
        image: the photo that was captioned: path, bytes, PIL image or array; unused for npz and json.
        path: where to; an existing file is replaced.
        options: of the function that draws the format; npz and json take none.

    Returns:
        The path.

    Raises:
        ValueError: an unknown suffix, or what the drawing function raises.
        ImportError: a PDF without matplotlib.
        OSError: the file cannot be written.
    """
    path = Path(path)
    render = _RENDERERS.get(path.suffix.lower())
    if render is None:
        known = ", ".join(sorted(_RENDERERS))
        raise ValueError(f"cannot tell a format from {path.name!r}: the suffix must be one of {known}")
    return files.save(path, render(caption, image, **options))


# --- the web page ---------------------------------------------------------------------------------------


def html(
    caption: Caption,
    image: Any,
    *,
    width: int = 960,
    frame: int = 0,
    smooth: bool = True,
    top: float | None = None,
) -> str:
    """Return one HTML page that shows a word's attention when it is hovered, tapped or focused.

    Beside the photo stand the word's probability and what the model might have said instead. The page is one
    file: the photo is embedded, nothing is fetched, and a content security policy forbids it.

    Args:
        caption: what `captioner.Captioner.caption` returned.
        image: the photo that was captioned: path, bytes, PIL image or array.
        width: of the embedded photo in pixels at most, at least 160; its height is at most 1.8 times that.
        frame: which frame of the attention, from 0; ``image`` is that frame's picture.
        smooth: whether the page begins with interpolated heat or bare cells; a reader may switch.
        top: the multiple of an even share that gets the strongest colour; by default `scale` of the caption.

    Returns:
        The page's text, to be written as UTF-8.

    Raises:
        IndexError: no such frame.
        ValueError: a width that is too small, or a picture that has another shape than the captioned one or
            cannot be decoded.
    """
    view = _View(caption, image, width, frame, smooth, top)
    size = view.within(min(width, max(view.photo.width, 160)), width * _TALLEST)
    photo, _ = view.bases(size)
    fit = caption.fit
    left, upper, right, lower = fit.box
    words = []
    for word in caption.words:
        cells = None
        if word.attention is not None:
            cells = _frames(caption, word.attention)[frame].reshape(-1)
            _cell_heat(cells, caption.grid)  # the same checks as for every other picture
        words.append(
            {
                "word": _clean(word.text),
                "probability": _percent(word.probability),
                "share": round(min(max(word.probability, 0.0), 1.0), 4),
                "given": word.given,
                "gate": None if word.gate is None else _percent(word.gate),
                "alternatives": [
                    [_clean(a.text), _percent(a.probability), round(min(max(a.probability, 0.0), 1.0), 4)]
                    for a in word.alternatives
                ],
                "attention": None if cells is None else [float(f"{c:.4g}") for c in cells],
            }
        )
    data = {
        "grid": list(caption.grid),
        "box": [left / fit.width, upper / fit.height, right / fit.width, lower / fit.height],
        "even": 1 / (len(caption.times) * caption.grid[0] * caption.grid[1]),
        "top": view.top,
        "size": list(size),
        "colours": colour(np.linspace(0, 1, 128)).tolist(),
        "words": words,
    }
    # inside a script element only "<" could end it, but "&" and ">" confuse other readers
    encoded = json.dumps(data, separators=(",", ":"))
    for letter in "<>&":
        encoded = encoded.replace(letter, f"\\u{ord(letter):04x}")
    buttons = []
    for i, word in enumerate(caption.words):
        text = _clean(word.text)
        space = "" if i == 0 or text.startswith("'") else " "
        buttons.append(
            f'{space}<button type="button" class="word" data-word="{i}" aria-pressed="false">'
            f"{_html.escape(text)}</button>"
        )
    ramp = ", ".join(
        f"rgba({r:.0f},{g:.0f},{b:.0f},{a:.2f}) {100 * at:.0f}%" for at, r, g, b, a in _COLOURS.tolist()
    )
    title = _html.escape(_clean(caption.text) if caption.words else "(no words)")
    values = {
        "TITLE": title,
        "STANDING": _html.escape(_standing(caption, frame)),
        "WORDS": "".join(buttons) or title,
        "PHOTO": _data_uri(photo),
        "WIDTH": str(size[0]),
        "HEIGHT": str(size[1]),
        "DISPLAY": str(max(size[0], round(min(420.0, 420 * size[0] / size[1])))),
        "FILTER": f"saturate({_SATURATION}) brightness({_BRIGHTNESS})",
        "RAMP": ramp,
        "TOP": f"{view.top:g}",
        "LEGEND": "" if view.attends else " hidden",
        "NOTE": f'<p class="note">{NO_ATTENTION}</p>' if caption.words and not view.attends else "",
        "HATCHED": "" if view.whole or not view.attends else " Hatched: outside what the model saw.",
        "SMOOTH": " checked" if smooth else "",
        "DATA": encoded,
    }
    # one pass, so that no word of the caption is taken for a place to fill
    return re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], _PAGE)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --line: #d1d9e0; --paper: #ffffff;
  --card: #f6f8fa; --pill: #ffd9a0; --pill-ink: #1f2328; --bar: #b35a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #9aa4ae; --line: #30363d;
  --paper: #0d1117; --card: #161b22; --pill: #f2a33a; --pill-ink: #1a1206; --bar: #f2a33a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 40px; }
h1 { font-size: clamp(1.35rem, 4.5vw, 1.9rem); font-weight: 600; line-height: 1.6; margin: 0; }
p { margin: 0; color: var(--muted); }
.word { font: inherit; color: inherit; background: none; border: 0; margin: 0 -.15em; padding: 0 .15em;
  border-radius: .25em; cursor: pointer; overflow-wrap: anywhere; text-align: left;
  text-decoration: underline 2px var(--line); text-underline-offset: .28em; }
.word:hover, .word.on { background: var(--pill); color: var(--pill-ink); text-decoration-color: transparent; }
.word:focus-visible, input:focus-visible, #play:focus-visible { outline: 3px solid var(--bar);
  outline-offset: 2px; }
.both { display: grid; grid-template-columns: minmax(0, 1fr); gap: 20px; margin-top: 16px; }
@media (min-width: 820px) { .both { grid-template-columns: minmax(0, @DISPLAY@px) minmax(240px, 340px); } }
figure { margin: 0; }
.photo { position: relative; width: @DISPLAY@px; max-width: 100%; line-height: 0; border-radius: 8px;
  overflow: hidden; background: #000; }
.photo img { width: 100%; height: auto; }
.photo.on img { filter: @FILTER@; }
.photo canvas { position: absolute; inset: 0; width: 100%; height: 100%; visibility: hidden; }
.photo.on canvas { visibility: visible; }
.photo.none::after { content: "no attention"; position: absolute; left: 0; right: 0; top: 50%;
  transform: translateY(-50%); background: #000a; color: #fff; text-align: center;
  font-size: 1rem; line-height: 2; }
.legend { margin-top: 12px; font-size: .85rem; max-width: 420px; }
.ramp { height: 12px; border-radius: 3px; background: linear-gradient(to right, @RAMP@), #5c5c5c; }
.ends { display: flex; justify-content: space-between; color: var(--muted); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  align-self: start; min-height: 11rem; }
.card h2 { font-size: 1.25rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
.card h3 { font-size: .85rem; font-weight: 600; color: var(--muted); margin: .9rem 0 .2rem; }
ol { list-style: none; margin: 0; padding: 0; }
li { display: flex; justify-content: space-between; gap: 1em; }
li span:first-child { overflow-wrap: anywhere; }
.meter { height: 4px; background: var(--line); border-radius: 2px; margin: 0 0 .35rem; }
.meter i { display: block; height: 100%; border-radius: 2px; background: var(--bar); }
.tools { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center; margin-top: 12px;
  font-size: .9rem; }
#play { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .25rem .8rem; cursor: pointer; }
.note { margin-top: 8px; }
[hidden] { display: none !important; }
</style>
</head>
<body>
<main>
<h1>@WORDS@</h1>
<p>@STANDING@</p>
@NOTE@
<div class="both">
<figure>
<div class="photo" id="photo">
<img src="@PHOTO@" width="@WIDTH@" height="@HEIGHT@" alt="@TITLE@">
<canvas id="heat" width="@WIDTH@" height="@HEIGHT@" aria-hidden="true"></canvas>
</div>
<figcaption>
<div class="legend"@LEGEND@>
<div class="ramp"></div>
<div class="ends"><span>1× an even share</span><span>@TOP@×</span></div>
<p>Colour says how much attention a cell of the model's grid got.@HATCHED@</p>
</div>
<div class="tools" id="tools" hidden>
<button type="button" id="play">Play</button>
<label@LEGEND@><input type="checkbox" id="smooth"@SMOOTH@> smooth</label>
</div>
</figcaption>
</figure>
<section class="card" id="card" aria-live="polite">
<p>Hover over a word, tap it or move to it with Tab to see where the model looked.</p>
<noscript><p>This page needs JavaScript to draw attention.</p></noscript>
</section>
</div>
</main>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const buttons = Array.from(document.querySelectorAll(".word"));
  const photo = document.getElementById("photo"), card = document.getElementById("card");
  const canvas = document.getElementById("heat"), context = canvas.getContext("2d");
  const smooth = document.getElementById("smooth"), play = document.getElementById("play");
  const hint = card.firstElementChild;
  const [H, W] = data.grid, [width, height] = data.size;
  let pinned = -1, shown = -1, timer = 0;

  // For each pixel along an axis: two cells and the share of the second, or null outside the box.
  function axis(pixels, low, high, cells) {
    return Array.from({ length: pixels }, (_, i) => {
      const at = ((i + 0.5) / pixels - low) / (high - low) * cells;
      if (at < 0 || at >= cells) return null;
      if (!smooth.checked) return [Math.floor(at), Math.floor(at), 0];
      const between = Math.min(Math.max(at - 0.5, 0), cells - 1), first = Math.floor(between);
      const t = between - first;
      return [first, Math.min(first + 1, cells - 1), 0.5 * t + 0.5 * t * t * (3 - 2 * t)];
    });
  }

  function draw(attention) {
    const heat = attention.map(function (a) {
      const ratio = a / data.even;
      return ratio < 1.0001 ? 0 : Math.min(Math.log(ratio) / Math.log(data.top), 1);
    });
    const across = axis(width, data.box[0], data.box[2], W), down = axis(height, data.box[1], data.box[3], H);
    const pixels = context.createImageData(width, height), last = data.colours.length - 1;
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const at = 4 * (y * width + x), d = down[y], a = across[x];
        if (!d || !a) {
          pixels.data.set((x + y) % 8 < 1 ? [110, 110, 110, 170] : [0, 0, 0, 158], at);
          continue;
        }
        const upper = heat[d[0] * W + a[0]] * (1 - a[2]) + heat[d[0] * W + a[1]] * a[2];
        const lower = heat[d[1] * W + a[0]] * (1 - a[2]) + heat[d[1] * W + a[1]] * a[2];
        pixels.data.set(data.colours[Math.round((upper * (1 - d[2]) + lower * d[2]) * last)], at);
      }
    }
    context.putImageData(pixels, 0, 0);
  }

  function add(parent, name, text) {
    const element = document.createElement(name);
    if (text) element.textContent = text;
    parent.appendChild(element);
    return element;
  }

  function meter(parent, share) {
    const bar = add(parent, "div");
    bar.className = "meter";
    add(bar, "i").style.width = 100 * share + "%";
  }

  function describe(word) {
    card.textContent = "";
    add(card, "h2", word.word);
    if (word.given) {
      add(card, "p", "given, not chosen by the model");
    } else {
      add(card, "p", "probability " + word.probability);
      meter(card, word.share);
    }
    if (word.gate !== null) add(card, "p", "weight of the picture (gate) " + word.gate);
    if (!word.attention) add(card, "p", "no attention for this word");
    if (word.alternatives.length) {
      add(card, "h3", "The likeliest words here");
      const list = add(card, "ol");
      word.alternatives.forEach(function (other) {
        const item = add(list, "li");
        add(item, "span", other[0]);
        add(item, "span", other[1]);
        meter(list, other[2]);
      });
    }
  }

  function show(index, again) {
    if (index === shown && !again) return;
    shown = index;
    buttons.forEach((button, i) => button.classList.toggle("on", i === index));
    const word = index < 0 ? null : data.words[index];
    photo.classList.toggle("on", Boolean(word && word.attention));
    photo.classList.toggle("none", Boolean(word && !word.attention));
    if (!word) {
      card.textContent = "";
      card.appendChild(hint);
      return;
    }
    if (word.attention) draw(word.attention);
    describe(word);
  }

  function pin(index) {
    pinned = index;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
    show(index);
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  }

  buttons.forEach(function (button, i) {
    button.addEventListener("pointerenter", function (event) {
      if (event.pointerType === "mouse" && !timer) show(i);
    });
    button.addEventListener("pointerleave", function (event) {
      if (event.pointerType === "mouse" && !timer) show(pinned);
    });
    button.addEventListener("focus", function () {
      if (button.matches(":focus-visible")) { stop(); show(i); }
    });
    button.addEventListener("blur", function () { if (!timer) show(pinned); });
    button.addEventListener("click", function () { stop(); pin(pinned === i ? -1 : i); });
    button.addEventListener("keydown", function (event) {
      const next = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (event.key === "Escape") { stop(); pin(-1); }
      if (next === undefined || !buttons[next]) return;
      event.preventDefault();
      buttons[next].focus();
    });
  });
  smooth.addEventListener("change", () => show(shown, true));
  play.addEventListener("click", function () {
    if (timer) { stop(); pin(-1); return; }
    let next = 0;
    play.textContent = "Stop";
    pin(0);
    timer = setInterval(function () {
      next += 1;
      if (next < data.words.length) { pin(next); } else { stop(); pin(-1); }
    }, 900);
  });
  document.getElementById("tools").hidden = !buttons.length;
}());
</script>
</body>
</html>
"""
