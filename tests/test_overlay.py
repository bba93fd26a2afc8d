from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from captioner import overlay
from captioner.caption import Alternative, Caption, Word
from captioner.images import Fit
from captioner.inputs import ImageError


def fitted(mode: str, width: int, height: int) -> Fit:
    side = min(width, height) if mode == "crop" else max(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (0, 0, width, height) if mode == "squash" else (left, top, left + side, top + side)
    return Fit(mode, width, height, box)


def one_cell(grid: tuple[int, int], row: int, column: int, weight: float = 1.0) -> np.ndarray:
    cells = np.full(grid, (1 - weight) / (grid[0] * grid[1] - 1), np.float32)
    cells[row, column] = weight
    return cells.reshape(1, -1)


def make(
    text: str = "a red bird",
    size: tuple[int, int] = (300, 200),
    maps: list[np.ndarray | None] | None = None,
    grid: tuple[int, int] = (8, 8),
    mode: str = "squash",
    **more: object,
) -> Caption:
    tokens = text.split()
    if maps is None:
        maps = [one_cell(grid, i % grid[0], i % grid[1], 0.5) for i in range(len(tokens))]
    words = tuple(
        Word(t, 0.1 + 0.8 / (i + 1), 0.5, (Alternative(t, 0.5), Alternative("other", 0.2)), maps[i], 0.7)
        for i, t in enumerate(tokens)
    )
    return Caption(text, words, -1.0, -3.0, 0.62, True, grid, fitted(mode, *size), **more)  # type: ignore[arg-type]


def grey(width: int = 300, height: int = 200) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def noise(width: int = 300, height: int = 200) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (max(1, height // 8), max(1, width // 8), 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def chroma(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture.convert("RGB"), int)
    return pixels.max(-1) - pixels.min(-1)


# --- geometry -------------------------------------------------------------------------------------------

# mode, grid, cell -> (left, top, right, bottom) of the cell on a photo of 300×200, worked out by hand
CELLS = [
    ("squash", (4, 5), (1, 3), (180, 50, 240, 100)),
    ("squash", (5, 4), (4, 0), (0, 160, 75, 200)),
    ("crop", (4, 4), (2, 0), (50, 100, 100, 150)),
    ("crop", (4, 4), (0, 3), (200, 0, 250, 50)),
    ("letterbox", (6, 6), (1, 2), (100, 0, 150, 50)),
    ("letterbox", (6, 6), (4, 5), (250, 150, 300, 200)),
]


@pytest.mark.parametrize(("mode", "grid", "cell", "place"), CELLS)
def test_bare_cell_covers_its_pixels_and_no_others(mode, grid, cell, place):
    heat = overlay.heat_map(one_cell(grid, *cell), grid, fitted(mode, 300, 200), smooth=False)
    left, top, right, bottom = place
    expected = np.zeros((200, 300))
    expected[top:bottom, left:right] = 1
    assert heat.dtype == np.float32
    np.testing.assert_array_equal(heat, expected)


@pytest.mark.parametrize(("mode", "grid", "cell", "place"), CELLS)
@pytest.mark.parametrize("scale", [1.0, 0.5, 2.5])
def test_smooth_peak_stays_at_the_cells_centre(mode, grid, cell, place, scale):
    size = (round(300 * scale), round(200 * scale))
    heat = overlay.heat_map(one_cell(grid, *cell), grid, fitted(mode, 300, 200), size)
    assert heat.shape == (size[1], size[0])
    left, top, right, bottom = (scale * edge for edge in place)
    y, x = np.argwhere(heat >= heat.max() - 1e-6).mean(0) + 0.5
    # a plateau runs on from the outermost centres to the edge of what the network saw
    box = [scale * edge for edge in fitted(mode, 300, 200).box]
    at_edge_x, at_edge_y = cell[1] in (0, grid[1] - 1), cell[0] in (0, grid[0] - 1)
    assert left <= x <= right if at_edge_x else abs(x - (left + right) / 2) <= 1, (x, box)
    assert top <= y <= bottom if at_edge_y else abs(y - (top + bottom) / 2) <= 1, (y, box)


def test_smoothing_invents_no_maximum():
    random = np.random.default_rng(1)
    fit = fitted("squash", 240, 180)
    for _ in range(5):
        weights = random.dirichlet(np.full(30, 0.3))
        bare = overlay.heat_map(weights, (5, 6), fit, smooth=False)
        smooth = overlay.heat_map(weights, (5, 6), fit)
        # within a quarter of cells around a corner, all values lie between the four cells'
        for y in range(0, 180, 7):
            for x in range(0, 240, 7):
                rows = np.clip([(y - 18) // 36, (y - 18) // 36 + 1], 0, 4) * 36
                columns = np.clip([(x - 20) // 40, (x - 20) // 40 + 1], 0, 5) * 40
                four = bare[np.ix_(rows, columns)]
                assert four.min() - 1e-6 <= smooth[y, x] <= four.max() + 1e-6
        # and the centres keep their own values (even cells: the pixels beside the centre are a little off)
        np.testing.assert_allclose(smooth[18::36, 20::40], bare[18::36, 20::40], atol=0.03)


def test_nothing_outside_the_crop():
    weights = np.full(16, 1 / 16)
    weights[:] = 0.001
    weights[0::4] = (1 - 0.012) / 4  # the left column
    for smooth in (True, False):
        heat = overlay.heat_map(weights, (4, 4), fitted("crop", 300, 200), smooth=smooth)
        assert not heat[:, :50].any()
        assert not heat[:, 250:].any()
        assert heat[:, 50:60].min() > 0.9


def test_a_grid_of_one_cell_is_flat():
    assert not overlay.heat_map(np.ones(1), (1, 1), fitted("squash", 30, 20)).any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(15) / 15, "15 attention weights.*4×4"),
        (np.full(16, np.nan), "finite"),
        (np.full(16, -1.0), "negative"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        overlay.heat_map(weights, (4, 4), fitted("squash", 30, 20))


# --- scale ----------------------------------------------------------------------------------------------


def test_even_attention_is_neutral():
    even = np.full((1, 49), 1 / 49, np.float32)
    assert not overlay.heat_map(even, (7, 7), fitted("squash", 300, 200)).any()
    caption = make("flat", maps=[even], grid=(7, 7))
    picture = overlay.word_overlay(caption, 0, grey(), width=300)
    photo = np.asarray(picture)[:200]
    assert (photo == photo[0, 0]).all()
    assert chroma(picture)[:200].max() == 0
    peaked = overlay.word_overlay(
        make("peak", maps=[one_cell((7, 7), 3, 3)], grid=(7, 7)), 0, grey(), width=300
    )
    assert chroma(peaked)[:200].max() > 60


def test_nearly_even_attention_stays_pale():
    weights = np.random.default_rng(0).uniform(0.8, 1.2, 64)
    heat = overlay.heat_map(weights / weights.sum(), (8, 8), fitted("squash", 64, 64))
    assert 0 < heat.max() < 0.2


def test_scale_is_common_to_the_words_of_a_caption():
    strong, weak = one_cell((8, 8), 2, 2, 0.5), one_cell((8, 8), 2, 2, 0.1)
    caption = make("weak strong", maps=[weak, strong])
    assert overlay.scale(caption) == 32  # 0.5 * 64
    second, first = (overlay.word_overlay(caption, i, grey(), width=300) for i in (0, 1))
    alone = overlay.word_overlay(make("weak", maps=[weak]), 0, grey(), width=300)
    y, x = 62, 93  # the centre of the cell
    assert first.convert("L").getpixel((x, y)) > second.convert("L").getpixel((x, y)) + 40
    assert np.abs(np.asarray(alone)[y, x].astype(int) - np.asarray(second)[y, x]).max() > 20
    same = overlay.word_overlay(make("weak", maps=[weak]), 0, grey(), width=300, top=32)
    np.testing.assert_array_equal(np.asarray(same)[y, x], np.asarray(second)[y, x])


def test_heat_is_the_logarithm_of_even_shares():
    heat = overlay.heat_map(
        one_cell((8, 8), 0, 0, 4 / 64), (8, 8), fitted("squash", 8, 8), top=16, smooth=False
    )
    assert heat[0, 0] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("peak", "top"), [(0.02, 4), (4 / 64, 4), (5 / 64, 6), (7 / 64, 8), (33 / 64, 48), (1, 64)]
)
def test_scale_ends_at_a_round_number(peak, top):
    assert overlay.scale(make("bird", maps=[one_cell((8, 8), 1, 1, peak)])) == pytest.approx(top)


def test_top_must_exceed_an_even_share():
    with pytest.raises(ValueError, match="top is 1"):
        overlay.sheet(make(), grey(), top=1)


# --- pictures -------------------------------------------------------------------------------------------


def test_word_overlay_puts_the_blob_on_the_cell_and_the_label_below():
    caption = make("a red bird", maps=[one_cell((8, 8), r, c) for r, c in ((0, 0), (6, 1), (1, 6))])
    for index, (row, column) in ((1, (6, 1)), (-1, (1, 6))):
        picture = overlay.word_overlay(caption, index, grey(), width=600)
        assert picture.width == 600
        colourful = chroma(picture)[:400]
        y, x = np.unravel_index(colourful.argmax(), colourful.shape)
        assert (y // 50, x // 75) == (row, column)
        below = np.asarray(picture.convert("L"))[400:]
        assert (below < 100).any()  # the word in ink on paper
        assert (below == 255).mean() > 0.5
    with pytest.raises(IndexError, match="word 3 of a caption with 3 words"):
        overlay.word_overlay(caption, 3, grey())


def test_unseen_part_is_darker():
    caption = make("bird", maps=[np.full((1, 64), 1 / 64, np.float32)], mode="crop")
    light = np.asarray(overlay.word_overlay(caption, 0, grey(), width=300).convert("L"), int)[:200]
    assert light[:, :48].mean() < 0.6 * light[:, 52:248].mean()
    assert light[:, 252:].mean() < 0.6 * light[:, 52:248].mean()
    assert light[:, 52:248].std() == 0
    assert light[:, :48].std() > 1  # hatched


def test_sheet_shows_the_photo_and_one_tile_for_each_word():
    caption = make("a red bird")
    picture = overlay.sheet(caption, grey(), columns=2, width=700)
    assert picture.width == 700
    row = overlay.sheet(caption, grey(), columns=4, width=700)
    assert row.height < picture.height
    # tiles: connected runs of grey photo along the row's middle
    pixels = np.asarray(row.convert("L"), int)
    middle = (pixels != 255).sum(1).argmax()
    edges = np.diff(np.concatenate([[0], (pixels[middle] != 255).astype(int), [0]]))
    assert (edges == 1).sum() == 4


def test_sheet_never_hides_words_of_long_captions():
    short, long = (overlay.sheet(make(" ".join(["bird"] * n)), grey()) for n in (8, 60))
    assert long.width == short.width == 1200
    assert long.height > 3.5 * short.height


@pytest.mark.parametrize("size", [(1, 1), (20000, 500), (300, 9000), (2, 3)])
@pytest.mark.parametrize("mode", ["squash", "crop", "letterbox"])
def test_extreme_shapes(size, mode):
    caption = make("a bird", size=size, mode=mode)
    photo = grey(*size)
    assert overlay.sheet(caption, photo, width=600).width == 600
    assert overlay.word_overlay(caption, 1, photo, width=300).width == 300
    assert "<img" in overlay.html(caption, photo)


def test_pictures_keep_the_aspect_ratio():
    caption = make("bird", size=(400, 100), maps=[np.full((1, 64), 1 / 64, np.float32)])
    dark = np.asarray(overlay.word_overlay(caption, 0, grey(400, 100), width=640).convert("L"))
    assert (dark[:160] < 130).all()
    assert (dark[160:170] == 255).all()


def test_a_thumbnail_of_the_photo_will_do_but_not_another_picture():
    caption = make()
    assert overlay.sheet(caption, grey(150, 100)).width == 1200
    with pytest.raises(ValueError, match=r"200×200.*300×200.*another picture"):
        overlay.sheet(caption, grey(200, 200))


def test_sources(tmp_path):
    caption = make()
    path = tmp_path / "photo.png"
    noise().save(path)
    expected = overlay.sheet(caption, noise(), width=400)
    for source in (path, str(path), path.read_bytes(), np.asarray(noise())):
        np.testing.assert_array_equal(overlay.sheet(caption, source, width=400), expected)
    np.testing.assert_array_equal(caption.overlay(path, width=400), expected)
    with pytest.raises(ImageError):
        overlay.sheet(caption, tmp_path / "none.png")


def test_without_attention_it_says_so(monkeypatch):
    caption = make("a bird", maps=[None, None])
    said: list[str] = []
    text = overlay._Page.text
    monkeypatch.setattr(
        overlay._Page, "text", lambda page, x, y, t, *rest: (said.append(t), text(page, x, y, t, *rest))[0]
    )
    picture = overlay.word_overlay(caption, 1, grey())
    assert overlay.NO_ATTENTION in said
    assert chroma(picture)[:400].max() == 0  # no heat
    said.clear()
    overlay.sheet(caption, grey())
    assert said.count("no attention") == 2
    assert overlay.NO_ATTENTION in said
    assert not any("even share" in t for t in said)
    assert overlay.NO_ATTENTION in overlay.html(caption, grey())
    svg = overlay.figure(caption, grey()).decode()
    assert overlay.NO_ATTENTION in svg
    said.clear()
    mixed = make("a bird", maps=[None, one_cell((8, 8), 1, 1)])
    overlay.word_overlay(mixed, 0, grey())
    assert "There is no attention for this word." in said
    assert overlay.NO_ATTENTION not in said


def test_an_empty_caption(tmp_path):
    caption = make("")
    for name in ("a.png", "a.gif", "a.webp", "a.svg", "a.html", "a.npz", "a.json"):
        overlay.save(caption, grey(), tmp_path / name)
    assert np.load(tmp_path / "a.npz", allow_pickle=False)["words"].shape == (0,)


def test_words_that_the_font_lacks():
    caption = make("naïve 猫 кошка \x00\n  \ud800 $x^$ a&b <b> " + "long" * 50)
    assert overlay.sheet(caption, grey()).width == 1200
    assert overlay.animation(caption, grey(), width=200)
    ET.fromstring(overlay.figure(caption, grey()))
    # without any other font, accents go before letters become boxes
    overlay._face.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(overlay, "_fallback_fonts", tuple)
            assert overlay._face("naïve") == ("naive", None)
    finally:
        overlay._face.cache_clear()


def test_frames_of_a_clip():
    weights = np.zeros((1, 2, 64), np.float32)
    weights[0, 0, 9] = 0.5
    weights[0, 1, 54] = 0.5
    caption = make("bird", maps=[weights[0]], times=np.array([0.0, 1.5], np.float32))
    assert overlay.scale(caption) == 64  # 0.5 of 128 even shares
    for frame, (row, column) in ((0, (1, 1)), (1, (6, 6))):
        colourful = chroma(overlay.word_overlay(caption, 0, grey(), frame=frame, width=600))[:400]
        y, x = np.unravel_index(colourful.argmax(), colourful.shape)
        assert (y // 50, x // 75) == (row, column)
    even = make("bird", maps=[np.full((2, 64), 1 / 128, np.float32)], times=caption.times)
    assert chroma(overlay.word_overlay(even, 0, grey(), frame=1, width=300))[:200].max() == 0
    less = make(
        "bird", maps=[np.repeat(np.array([[0.3], [0.7]], np.float32) / 64, 64, 1)], times=caption.times
    )
    assert chroma(overlay.word_overlay(less, 0, grey(), frame=0, width=300))[:200].max() == 0
    assert chroma(overlay.word_overlay(less, 0, grey(), frame=1, width=300))[:200].min() > 5
    for frame in (2, -1):
        with pytest.raises(IndexError, match=f"frame {frame} of a caption with 2"):
            overlay.sheet(caption, grey(), frame=frame)


def test_sheet_is_quick():
    caption = make("a man riding a wave on top of a surfboard", size=(500, 375))
    photo = noise(500, 375)
    overlay.sheet(caption, photo)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        overlay.sheet(caption, photo)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


@pytest.mark.parametrize("options", [{"width": 100}, {"columns": 0}])
def test_impossible_layouts_are_refused(options):
    with pytest.raises(ValueError, match="must be at least"):
        overlay.sheet(make(), grey(), **options)


# --- animations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["gif", "webp"])
def test_animation_has_the_photo_and_every_word(format):
    data = overlay.animation(make("a red red bird"), noise(), format, seconds=0.5, width=240)
    durations = []
    with Image.open(io.BytesIO(data)) as movie:
        assert movie.format == format.upper()
        assert movie.n_frames == 5
        assert movie.info["loop"] == 0
        shapes = set()
        for i in range(movie.n_frames):
            movie.seek(i)
            movie.load()
            durations.append(movie.info["duration"])
            shapes.add(movie.size)
            paper = np.asarray(movie.convert("RGB"))[-4:]
            assert paper.min() >= 250
    assert durations == [1000, 500, 500, 500, 500]
    assert len(shapes) == 1


def test_gif_paper_stays_white_beside_a_pale_photo():
    pale = Image.fromarray((np.asarray(noise()) // 10 + 229).astype(np.uint8))
    with Image.open(io.BytesIO(overlay.animation(make("a bird"), pale, "gif", width=300))) as movie:
        assert np.asarray(movie.convert("RGB"))[-4:].min() == 255


def test_animation_marks_the_current_word():
    pill = np.array((0xFF, 0xD9, 0xA0))
    places = []
    with Image.open(io.BytesIO(overlay.animation(make("a red bird"), grey(), "gif", width=300))) as movie:
        for i in range(4):
            movie.seek(i)
            marked = (np.abs(np.asarray(movie.convert("RGB"), int)[200:] - pill) < 6).all(-1)
            places.append(np.argwhere(marked)[:, 1].mean() if marked.sum() > 50 else None)
    assert places[0] is None
    assert places[1] < places[2] < places[3]


@pytest.mark.parametrize(("format", "seconds"), [("mp4", 1), ("gif", 0), ("gif", math.nan), ("webp", 1e9)])
def test_impossible_animations_are_refused(format, seconds):
    with pytest.raises(ValueError, match=r"gif or webp|seconds"):
        overlay.animation(make(), grey(), format, seconds=seconds)


# --- figures --------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("smooth", [True, False])
def test_svg_is_xml_with_words_as_text(smooth):
    caption = make("a <red> bird & co", maps=[one_cell((8, 8), 2, 2)] * 5)
    root = ET.fromstring(overlay.figure(caption, noise(), smooth=smooth))
    texts = ["".join(t.itertext()) for t in root.iter(SVG + "text")]
    assert "a <red> bird & co" in texts
    assert {"a", "<red>", "bird", "&", "co", "90%"} <= set(texts)
    hrefs = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert hrefs
    assert all(h.startswith(("#", "data:image/")) for h in hrefs)
    photos = [h for h in hrefs if h.startswith("data:image/jpeg")]
    assert len(photos) == 2  # bare and dimmed, once each
    # bare cells are rectangles, smooth heat is a picture
    cells = [r for r in root.iter(SVG + "rect") if 0 < float(r.get("fill-opacity", 1)) < 1]
    assert len(cells) == (0 if smooth else 5)


def test_svg_cell_lies_on_its_pixels():
    caption = make("bird", maps=[one_cell((8, 8), 3, 5)], mode="crop")
    root = ET.fromstring(overlay.figure(caption, grey(), smooth=False))
    use = list(root.iter(SVG + "use"))[1]
    tile = next(i for i in root.iter(SVG + "image"))
    ratio = float(tile.get("width", 0)) / 300
    (cell,) = (r for r in root.iter(SVG + "rect") if r.get("fill-opacity"))
    assert float(cell.get("x", 0)) - float(use.get("x", 0)) == pytest.approx((50 + 5 * 25) * ratio, abs=0.5)
    assert float(cell.get("y", 0)) - float(use.get("y", 0)) == pytest.approx(3 * 25 * ratio, abs=0.5)
    assert float(cell.get("width", 0)) == pytest.approx(25 * ratio, abs=0.5)


def test_pdf():
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    pyplot = "matplotlib.pyplot" in sys.modules
    caption = make("a $x^$ bird")
    data = overlay.figure(caption, noise(), "pdf", width=600, smooth=False)
    smooth = overlay.figure(caption, noise(), "pdf", width=600)
    assert smooth.count(b"/Subtype /Image") > data.count(b"/Subtype /Image")  # heat apart from the photo
    assert data.startswith(b"%PDF-")
    assert b"FontFile2" in data  # text as text
    assert data == overlay.figure(caption, noise(), "pdf", width=600, smooth=False)
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_pdf_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('pip install "captioner[figures]"')) as caught:
        overlay.figure(make(), grey(), "pdf")
    assert "\n" not in str(caught.value)


def test_unknown_figure_format():
    with pytest.raises(ValueError, match="svg or pdf"):
        overlay.figure(make(), grey(), "eps")


# --- HTML -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.buttons: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br", "link"):
            self.open.append(tag)
        if tag == "button":
            self.buttons.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "button":
            self.buttons[-1] += data
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def test_html_is_self_contained_and_accessible():
    caption = make("a red bird", maps=[one_cell((8, 8), i, i) for i in range(3)], mode="crop")
    text = overlay.html(caption, noise())
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object")
        assert (attributes.get("src") or "data:").startswith("data:")
        assert "href" not in attributes
    (image,) = (a for t, a in page.tags if t == "img")
    assert image["alt"] == "a red bird"
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert page.buttons[:3] == ["a", "red", "bird"]
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    assert "prefers-color-scheme: dark" in text
    data = json.loads(page.scripts[0])
    assert [w["word"] for w in data["words"]] == ["a", "red", "bird"]
    assert np.argmax(data["words"][2]["attention"]) == 18
    assert data["words"][0]["alternatives"][1][:2] == ["other", "20%"]
    np.testing.assert_allclose(data["box"], [1 / 6, 0, 5 / 6, 1])
    assert not re.search("@[A-Z]+@", text)  # nothing left to fill in


@pytest.mark.parametrize(
    "word", ["<script>alert(1)</script>", '"onload="x', "</script><b>", "@DATA@", "<!--", "a&b"]
)
def test_html_escapes_words(word):
    caption = make(word + " bird", maps=[one_cell((8, 8), 1, 1)] * 2)
    page = Page(overlay.html(caption, grey()))
    plain = Page(overlay.html(make("x bird"), grey()))
    assert [t for t, _ in page.tags] == [t for t, _ in plain.tags]
    assert page.buttons[0] == word
    assert [a["alt"] for t, a in page.tags if t == "img"] == [word + " bird"]
    assert json.loads(page.scripts[0])["words"][0]["word"] == word


NODE = """
const page = JSON.parse(require("fs").readFileSync(0, "utf8"));
const make = (name) => ({ name, textContent: "", style: {}, checked: true, firstElementChild: null, on: {},
  classList: { toggle() {} }, appendChild() {}, setAttribute() {}, matches: () => true,
  addEventListener(event, run) { this.on[event] = run; } });
const known = {};
let drawn = null;
const button = make("button");
global.document = {
  getElementById(id) {
    known[id] = known[id] || make(id);
    if (id === "data") known[id].textContent = page.data;
    if (id === "heat") known[id].getContext = () => ({
      createImageData: (w, h) => ({ data: new Uint8ClampedArray(4 * w * h) }),
      putImageData: (image) => { drawn = image.data; } });
    if (id === "smooth") known[id].checked = page.smooth;
    return known[id];
  },
  querySelectorAll: () => [button],
  createElement: make,
};
eval(page.script);
button.on.focus();
console.log(JSON.stringify(Array.from(drawn)));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in Node")
@pytest.mark.parametrize("mode", ["squash", "crop", "letterbox"])
@pytest.mark.parametrize("smooth", [True, False])
def test_html_draws_the_same_heat(mode, smooth):
    weights = np.random.default_rng(3).dirichlet(np.full(24, 0.3)).astype(np.float32)
    caption = make("bird", size=(200, 160), maps=[weights.reshape(1, -1)], grid=(4, 6), mode=mode)
    page = Page(overlay.html(caption, grey(200, 160)))
    job = json.dumps({"data": page.scripts[0], "script": page.scripts[1], "smooth": smooth})
    done = subprocess.run(["node", "-e", NODE], input=job, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    drawn = np.array(json.loads(done.stdout)).reshape(160, 200, 4)
    top = overlay.scale(caption)
    heat = overlay.heat_map(weights, (4, 6), caption.fit, (200, 160), top=top, smooth=smooth)
    seen = np.s_[:, 20:180] if mode == "crop" else np.s_[:, :]
    assert heat.max() > 0.5
    np.testing.assert_allclose(drawn[seen][..., 3], overlay.colour(heat)[seen][..., 3], atol=4)
    if mode == "crop":
        assert (drawn[:, :20, 3] > 140).all()


# --- arrays and files -----------------------------------------------------------------------------------


def test_arrays_round_trip_without_pickle(tmp_path):
    caption = make("a red bird")
    path = overlay.save_arrays(caption, tmp_path / "a.npz")
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["attention"].shape == (3, 1, 8, 8)
        assert arrays["attention"].dtype == np.float32
        np.testing.assert_array_equal(arrays["attention"].reshape(3, 1, 64), caption.attention)
        assert arrays["words"].tolist() == ["a", "red", "bird"]
        np.testing.assert_allclose(arrays["probabilities"], [w.probability for w in caption.words], rtol=1e-6)
        np.testing.assert_allclose(arrays["gates"], 0.7)
        assert str(arrays["caption"]) == "a red bird"
        assert arrays["box"].tolist() == [0, 0, 300, 200]
        assert set(arrays) == set(overlay.arrays(caption))


def test_arrays_fake_no_attention():
    assert "attention" not in overlay.arrays(make("a bird", maps=[None, None]))
    mixed = overlay.arrays(make("a bird", maps=[None, one_cell((8, 8), 1, 1)]))["attention"]
    assert np.isnan(mixed[0]).all()
    assert mixed[1].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a.png", b"\x89PNG"),
        ("a.JPG", b"\xff\xd8\xff"),
        ("a.webp", b"RIFF"),
        ("a.gif", b"GIF8"),
        ("a.svg", b"<?xml"),
        ("a.html", b"<!DOCTYPE html>"),
        ("a.npz", b"PK"),
        ("a.json", b'{"schema"'),
    ],
)
def test_save_goes_by_the_suffix(tmp_path, name, start):
    path = tmp_path / name
    path.write_bytes(b"old")
    assert overlay.save(make(), grey(), str(path)) == path
    assert path.read_bytes().startswith(start)
    assert os.listdir(tmp_path) == [name]


def test_save_json_holds_the_record(tmp_path):
    caption = make("a café")
    overlay.save(caption, None, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == caption.to_dict(attention=True)


def test_save_passes_options_on(tmp_path):
    with Image.open(overlay.save(make(), grey(), tmp_path / "a.png", width=333)) as picture:
        assert picture.width == 333


@pytest.mark.parametrize("name", ["a.bmp", "a", "png"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(ValueError, match=r"suffix must be one of \.gif, .*\.webp"):
        overlay.save(make(), grey(), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "none" / "a.png", tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(OSError, match="cannot write") as caught:
            overlay.save(make(), grey(), path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(overlay.os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot write .*a\.png: No space left on device"):
        overlay.save(make(), grey(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_heavy_packages_load_lazily():
    code = "import sys, captioner.overlay; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
