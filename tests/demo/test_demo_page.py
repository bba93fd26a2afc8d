from __future__ import annotations

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from captioner_demo import page

from captioner import Caption, Word
from captioner.caption import Alternative
from captioner.images import Fit
from captioner.overlay import heat_map, scale

NASTY = ("</section><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "${alert(1)}", "{{value}}")


def make_caption(words: list[str], **changes: object) -> Caption:
    attention = np.random.default_rng(3).dirichlet(np.ones(6), len(words)).astype(np.float32)
    return replace(
        Caption(
            text=" ".join(words),
            words=tuple(
                Word(w, 0.5, 0.5, (Alternative(w, 0.5), Alternative("<end>", 0.2)), a[None], 0.5)
                for w, a in zip(words, attention, strict=True)
            ),
            score=-1.0,
            log_probability=-5.0,
            confidence=0.5,
            finished=True,
            grid=(2, 3),
            fit=Fit("squash", 300, 200, (0.0, 0.0, 300.0, 200.0)),
        ),
        **changes,
    )


def sent(text: str) -> dict:
    found = re.search(r'data-caption="([^"]*)"', text)
    assert found
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("nasty", NASTY)
def test_nothing_from_outside_becomes_html(nasty: str) -> None:
    caption = make_caption(["a", nasty])
    other = replace(caption, text=nasty, confidence=0.4)
    text = page.explorer(caption, b"jpeg", ranked=[caption, other], name=f"{nasty}.jpg")
    bare = re.sub(r'"[^"]*"', '""', text)  # without attributes
    assert "<script" not in bare
    assert "<img" in bare
    assert bare.count("<img") == 1  # the photo
    assert nasty not in text or "<" not in nasty
    assert html.escape(nasty) in text
    assert sent(text)["words"][1]["word"] == nasty  # as data, whole


def test_all_words_attention_is_sent_as_the_overlay_draws_it() -> None:
    caption = make_caption(["a", "dog", "runs"])
    data = sent(page.explorer(caption, b"jpeg"))
    assert data["grid"] == [2, 3]
    assert data["top"] == scale(caption)
    assert data["even"] == pytest.approx(1 / 6)
    assert data["box"] == [0, 0, 1, 1]
    for word, shown in zip(caption.words, data["words"], strict=True):
        assert word.attention is not None
        np.testing.assert_allclose(shown["attention"], word.attention.reshape(-1), rtol=6e-3)
        # the formula of page.js at the cells' centres
        cells = np.log(np.maximum(np.array(shown["attention"]) / data["even"], 1)) / np.log(data["top"])
        drawn = heat_map(word.attention, caption.grid, caption.fit, (3, 2), top=data["top"], smooth=False)
        np.testing.assert_allclose(cells.reshape(2, 3), drawn, atol=5e-3)


def test_the_less_probable_a_word_the_stronger_its_tint() -> None:
    words = make_caption(["sure", "unsure", "mine"]).words
    words = (
        replace(words[0], probability=0.95),
        replace(words[1], probability=0.1),
        replace(words[2], given=True),
    )
    text = page.sentence(replace(make_caption(["x"]), words=words))
    tints = [float(t) for t in re.findall(r"--doubt:([\d.]+)", text)]
    assert tints[0] < 0.05
    assert tints[1] > 0.7
    assert tints[2] == 0
    assert "given by you" in text
    assert "probability 10 %" in text


@pytest.mark.parametrize(
    ("confidence", "words"),
    [(0.9, "Quite sure"), (0.5, "Fairly sure"), (0.35, "Not very sure"), (0.1, "A guess")],
)
def test_how_sure_it_is_in_words(confidence: float, words: str) -> None:
    assert page.sureness(make_caption(["a"], confidence=confidence)).startswith(words)


def test_the_hedge_agrees_with_the_library() -> None:
    for confidence in (0.0, 0.29, 0.3, 1.0):
        caption = make_caption(["a"], confidence=confidence)
        assert (page.how_sure(confidence) == "A guess") == (not caption.sure)


def test_a_cut_sentence_says_so() -> None:
    assert "cut off" in page.sureness(make_caption(["a"], finished=False))


def test_no_attention_is_said_and_nothing_is_faked() -> None:
    caption = make_caption(["a"])
    words = tuple(replace(word, attention=None) for word in caption.words)
    text = page.explorer(replace(caption, words=words), b"jpeg")
    assert "no attention" in text
    assert sent(text)["words"][0]["attention"] is None
    assert 'data-do="play"' not in text


def test_a_caption_without_words() -> None:
    assert "no words" in page.explorer(make_caption([]), b"jpeg")


def test_the_photo_has_the_caption_as_its_text() -> None:
    assert 'alt="a dog"' in page.explorer(make_caption(["a", "dog"]), b"jpeg")
    assert 'alt="a dog (of the boxed part)"' in page.explorer(
        make_caption(["a", "dog"]), b"jpeg", region=(0, 0, 9, 9)
    )


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("photo.jpg", "photo"),
        ("../../etc/passwd", "passwd"),
        ("a<b>.jpg", "a-b"),
        ("C:\\x\\y z.png", "y-z"),
        ("...", "photo"),
        ("日本.jpg", "photo"),
        ("a" * 300 + ".jpg", "a" * 60),
    ],
)
def test_names_of_downloads_are_harmless(name: str, stem: str) -> None:
    assert page.safe_stem(name) == stem
