"""Pictures that show nothing a captioner knows, drawn by script: blanks, noise, text, screens, patterns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

_WORDS = (
    "invoice total amount due report quarter the of and review section figure table summary page terms "
    "agreement date signed order number account balance method results discussion data value name address"
).split()


def _blank(chance: np.random.Generator) -> Image.Image:
    return Image.new("RGB", _size(chance), tuple(int(v) for v in chance.integers(0, 256, 3)))


def _gradient(chance: np.random.Generator) -> Image.Image:
    width, height = _size(chance)
    start, end = chance.uniform(0, 255, (2, 3))
    angle = chance.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    along = np.cos(angle) * x + np.sin(angle) * y
    along = (along - along.min()) / np.ptp(along)
    return Image.fromarray((start + along[..., None] * (end - start)).astype(np.uint8))


def _noise(chance: np.random.Generator) -> Image.Image:
    width, height = _size(chance)
    channels = int(chance.choice([1, 3]))
    noise = chance.integers(0, 256, (height, width, channels)).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(noise, (height, width, 3)).copy())


def _clouds(chance: np.random.Generator) -> Image.Image:
    return _noise(chance).filter(ImageFilter.GaussianBlur(float(chance.uniform(3, 25))))


def _stripes(chance: np.random.Generator) -> Image.Image:
    width, height = _size(chance)
    y, x = np.mgrid[0:height, 0:width]
    period = chance.integers(4, 60)
    kind = int(chance.integers(3))
    on = [x // period, y // period, x // period + y // period][kind] % 2
    colours = chance.integers(0, 256, (2, 3)).astype(np.uint8)
    return Image.fromarray(colours[on])


def _text(chance: np.random.Generator) -> Image.Image:
    width, height = _size(chance)
    dark = chance.random() < 0.2
    paper, ink = ("black", "white") if dark else ("white", "black")
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    size = int(chance.integers(8, 28))
    font = ImageFont.load_default(size)
    y = int(chance.integers(5, 40))
    while y < height - size:
        line = " ".join(chance.choice(_WORDS) for _ in range(int(chance.integers(3, 14))))
        draw.text((int(chance.integers(8, 24)), y), line, ink, font=font)
        y += int(size * chance.uniform(1.2, 2.0))
    return image


def _screen(chance: np.random.Generator) -> Image.Image:
    width, height = _size(chance)
    image = Image.new("RGB", (width, height), tuple(int(v) for v in chance.integers(200, 256, 3)))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width, 24), tuple(int(v) for v in chance.integers(30, 120, 3)))
    draw.rectangle((0, 24, width // 5, height), tuple(int(v) for v in chance.integers(220, 250, 3)))
    font = ImageFont.load_default(12)
    for row in range(40, height - 14, 22):
        draw.text((8, row), str(chance.choice(_WORDS)), "black", font=font)
        words = " ".join(chance.choice(_WORDS) for _ in range(int(chance.integers(1, 8))))
        draw.text((width // 5 + 12, row), words, "black", font=font)
    for _ in range(int(chance.integers(1, 5))):
        left, top = int(chance.integers(width // 5, width - 60)), int(chance.integers(30, height - 30))
        draw.rounded_rectangle(
            (left, top, left + 60, top + 22), 5, tuple(int(v) for v in chance.integers(0, 256, 3))
        )
    return image


def _table(chance: np.random.Generator) -> Image.Image:
    width, height = _size(chance)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(11)
    column, row = int(chance.integers(40, 90)), int(chance.integers(16, 28))
    for x in range(0, width, column):
        draw.line((x, 0, x, height), "lightgrey")
        for y in range(0, height, row):
            draw.line((0, y, width, y), "lightgrey")
            draw.text((x + 4, y + 3), f"{chance.uniform(0, 1000):.1f}", "black", font=font)
    return image


def _chart(chance: np.random.Generator) -> Image.Image:
    width, height = _size(chance)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.line((30, 10, 30, height - 30), "black")
    draw.line((30, height - 30, width - 10, height - 30), "black")
    colour = tuple(int(v) for v in chance.integers(0, 200, 3))
    count = int(chance.integers(4, 16))
    xs = np.linspace(40, width - 20, count)
    ys = chance.uniform(20, height - 40, count)
    if chance.random() < 0.5:
        for x, y in zip(xs, ys, strict=True):
            draw.rectangle((x - 6, y, x + 6, height - 30), colour)
    else:
        draw.line([(float(x), float(y)) for x, y in zip(xs, ys, strict=True)], colour, 2)
    return image


KINDS: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "blank": _blank,
    "gradient": _gradient,
    "noise": _noise,
    "clouds": _clouds,
    "stripes": _stripes,
    "text": _text,
    "screen": _screen,
    "table": _table,
    "chart": _chart,
}


def pictures(kind: str, count: int, seed: int = 0) -> list[Image.Image]:
    """Draw pictures of one of `KINDS`; the same seed draws the same."""
    chance = np.random.default_rng([seed, *kind.encode()])
    return [KINDS[kind](chance) for _ in range(count)]


def _size(chance: np.random.Generator) -> tuple[int, int]:
    width, height = chance.integers(224, 520, 2)
    return int(width), int(height)
