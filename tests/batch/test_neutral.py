from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_header, sharpen
from lively import make_lively_model, pictures
from PIL import Image

from captioner import Captioner
from captioner.decoder import DecoderConfig
from captioner.model import CaptionModel
from captioner.neutral import NEUTRAL, avoided
from captioner.tokenizer import BpeTokenizer, Tokenizer, WordTokenizer, split_words

WORDS = [
    *("a the in on of with and is are red blue two dog dogs street water rides stands").split(),
    *("man men woman women boy girl lady person people child children their his her he they").split(),
    *("male cowboy hat grass car himself").split(),
]


def make(tokenizer: Tokenizer) -> Captioner:
    """A tiny random captioner of some words."""
    encoder = make_lively_model().encoder
    with torch.random.fork_rng():
        torch.manual_seed(11)
        config = DecoderConfig(hidden=24, embedding=16, cells=20, attention_width=12)
        model = CaptionModel(encoder, config, tokenizer)
        sharpen(model.decoder)
    return Captioner(model.eval(), make_header(model))


@cache
def words() -> Captioner:
    return make(WordTokenizer(WORDS))


@cache
def pieces() -> Captioner:
    sentences = [
        "a man in the manhole",
        "her herd of sheep",
        "he wears a helmet",
        "women and woman",
        "two people",
    ]
    return make(BpeTokenizer.build(sentences * 3, size=60))


def gendered(text: str) -> list[str]:
    return [word for word in split_words(text) if word in NEUTRAL]


# --------------------------------------------------------------------------------------------------
# the words


def test_every_gendered_word_stands_for_one_that_is_not() -> None:
    for word, substitutes in NEUTRAL.items():
        assert word not in substitutes
        assert not set(substitutes) & NEUTRAL.keys()
        assert split_words(word) == [word]


def test_words_that_the_model_lacks_are_passed_over() -> None:
    tokenizer = WordTokenizer(["man", "mother", "person", "cowboy", "policeman"])
    found = avoided(tokenizer, neutral=True)
    assert found is not None
    assert {tokenizer.piece(k): v and tokenizer.piece(v) for k, v in found.tokens.items()} == {
        "man": "person",
        "mother": "person",
        "cowboy": None,
        "policeman": None,
    }
    assert avoided(tokenizer, ["dinosaur"]) is None
    assert avoided(tokenizer) is None


def test_a_word_to_be_avoided_takes_no_others_place() -> None:
    tokenizer = WordTokenizer(["man", "person", "girl", "child", "kid"])
    found = avoided(tokenizer, ["person", "child"], neutral=True)
    assert found is not None
    assert {tokenizer.piece(k): v and tokenizer.piece(v) for k, v in found.tokens.items()} == {
        "man": None,
        "girl": "kid",
        "person": None,
        "child": None,
    }


def test_byte_pairs_are_avoided_however_they_are_cut() -> None:
    tokenizer = pieces().model.tokenizer
    found = avoided(tokenizer, ["man"])
    assert found is not None
    ways = {(token,) for token in found.tokens} | set(found.phrases)
    assert tuple(tokenizer.encode("man")) in ways
    assert len(ways) >= 3
    for way in ways:
        assert [word for word, _ in tokenizer.words(way)] == ["man"]


def test_lists_that_make_no_sense() -> None:
    tokenizer = words().model.tokenizer
    with pytest.raises(ValueError, match=r"avoid is a list of words: write avoid=\['dog'\]"):
        avoided(tokenizer, "dog")
    with pytest.raises(ValueError, match="avoid holds ' ', which is no word"):
        avoided(tokenizer, [" "])
    with pytest.raises(ValueError, match="the required word 'man' is among those to be avoided"):
        words().check(must=["dog", "man"], neutral=True)
    with pytest.raises(ValueError, match="the required word 'red dog' is among those to be avoided"):
        words().check(must=["red dog"], avoid=["dog"])
    words().check(must=[["man", "person"]], neutral=True)


# --------------------------------------------------------------------------------------------------
# the search

SEARCHES = [
    {"beam": 1},
    {"beam": 3, "n_best": 3},
    {"sample": True, "n_best": 2},
    {"beam": 3, "must": ["hat"]},
    {"beam": 2, "sample": True, "must": [["dog", "man"]]},
]


@pytest.mark.parametrize("options", SEARCHES)
def test_no_gendered_word_is_said(options: dict[str, object]) -> None:
    captioner = words()
    features = captioner.encode_batch(pictures(12))
    plain = captioner.caption_batch(features, max_length=12, **options)
    assert any(gendered(c.text) for c in plain)
    neutral = captioner.caption_batch(features, max_length=12, neutral=True, **options)
    for caption in neutral:
        for one in (caption, *caption.n_best):
            assert not gendered(one.text)
            assert np.isfinite(one.score)
            assert all(0 < word.probability <= 1 for word in one.words)
            for word in one.words:
                assert word.attention is not None
                assert word.attention.sum() == pytest.approx(1, abs=1e-4)
    # the words do not depend on what else is in the batch
    alone = captioner.caption(features[4], max_length=12, neutral=True, seed=4, **options)
    assert alone.text == neutral[4].text


def raw(captioner: Captioner, features: object, said: list[str]) -> dict[str, float]:
    """The model's own probabilities of the word that follows others."""
    count = len(captioner.model.tokenizer)
    caption = captioner.caption(
        features,
        prefix=" ".join(said),
        beam=1,
        alternatives=count,
        min_length=len(said) + 1,
        no_repeat_ngram=0,
    )
    return {a.text: a.probability for a in caption.words[len(said)].alternatives}


def test_a_word_has_the_probability_of_all_that_it_stands_for() -> None:
    captioner = words()
    found = avoided(captioner.model.tokenizer, neutral=True)
    assert found is not None
    piece = captioner.model.tokenizer.piece
    moved = 0
    for n, picture in enumerate(pictures(6)):
        features = captioner.encode(picture)
        caption = captioner.caption(features, neutral=True, beam=1 + n % 3, max_length=8)
        total = 0.0
        for place, word in enumerate(caption.words):
            model = raw(captioner, features, [w.text for w in caption.words[:place]])
            stood_for = [piece(k) for k, v in found.tokens.items() if v is not None and piece(v) == word.text]
            expected = model[word.text] + sum(model[other] for other in stood_for)
            assert word.probability == pytest.approx(expected, rel=1e-4)
            assert {a.text for a in word.alternatives}.isdisjoint(NEUTRAL)
            moved += bool(stood_for)
            total += np.log(expected)
        end = (
            raw(captioner, features, [w.text for w in caption.words]).get("<end>")
            if caption.finished
            else None
        )
        if end is not None:
            # `raw` forbids the end, but lists it
            assert caption.log_probability == pytest.approx(total + np.log(end), rel=1e-3)
    assert moved >= 3


def test_attention_is_that_of_the_words_said() -> None:
    captioner = words()
    for picture in pictures(4):
        features = captioner.encode(picture)
        caption = captioner.caption(features, neutral=True, max_length=8)
        read = captioner.caption(features, prefix=caption.text, max_length=9)
        for word, same in zip(caption.words, read.words, strict=False):
            assert word.text == same.text
            np.testing.assert_allclose(word.attention, same.attention, atol=1e-5)
            assert word.gate == pytest.approx(same.gate, abs=1e-5)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_prefix_may_hold_what_is_avoided(beam: int) -> None:
    captioner = words()
    for picture in pictures(4):
        features = captioner.encode(picture)
        plain = captioner.caption(features, prefix="the man and his", beam=beam, max_length=10)
        caption = captioner.caption(
            features, prefix="the man and his", beam=beam, max_length=10, neutral=True
        )
        assert caption.text.startswith("the man and his")
        assert not gendered(caption.text[len("the man and his") :])
        for a, b in zip(plain.words[:4], caption.words[:4], strict=True):
            assert a.probability == pytest.approx(b.probability, rel=1e-5)
            assert b.given


def test_words_and_phrases_are_avoided() -> None:
    captioner = words()
    features = captioner.encode_batch(pictures(8))
    for caption in captioner.caption_batch(features, max_length=10):
        said = [word.text for word in caption.words]
        for phrase in ([said[0]], said[1:3], said[2:5]):
            for beam in (1, 4):
                others = captioner.caption_batch(features, max_length=10, beam=beam, avoid=[" ".join(phrase)])
                for other in others:
                    text = [word.text for word in other.words]
                    assert phrase not in [text[i : i + len(phrase)] for i in range(len(text))]
    everything = captioner.caption(features[0], avoid=WORDS, beam=2)
    assert everything.text == ""


def test_avoiding_what_would_not_be_said_changes_nothing() -> None:
    captioner = words()
    features = captioner.encode_batch(pictures(4))
    plain = captioner.caption_batch(features, max_length=6, beam=1)
    unsaid = [w for w in WORDS if not any(w in split_words(c.text) for c in plain)]
    same = captioner.caption_batch(features, max_length=6, beam=1, avoid=unsaid)
    assert [(c.text, c.log_probability) for c in plain] == [(c.text, c.log_probability) for c in same]


@pytest.mark.parametrize(("beam", "sample"), list(product((1, 3), (False, True))))
def test_byte_pairs_say_no_avoided_word(beam: int, sample: bool) -> None:
    captioner = pieces()
    features = captioner.encode_batch(pictures(6))
    options = {"beam": beam, "sample": sample, "max_length": 14}
    for caption in captioner.caption_batch(features, **options):
        never = sorted({word.text for word in caption.words if len(word.text) < 9})[:3]
        for other in captioner.caption_batch(features, avoid=never, **options):
            assert not set(never) & {word.text for word in other.words}
    for caption in captioner.caption_batch(features, neutral=True, **options):
        assert not gendered(caption.text)


def test_files_are_captioned_so(tmp_path: Path) -> None:
    from captioner.batch import caption_files

    paths = [tmp_path / f"{n}.png" for n in range(8)]
    for path, pixels in zip(paths, pictures(8), strict=True):
        Image.fromarray(pixels).save(path)
    captioner = words()

    def caption(**options: object) -> list[str]:
        return [str(found.caption) for found in caption_files(captioner, paths, max_length=10, **options)]

    plain = caption()
    assert any(map(gendered, plain))
    assert not any(map(gendered, caption(neutral=True)))
    said = plain[0].split()[0]
    assert not any(said in text.split() for text in caption(avoid=[said]))
    with pytest.raises(ValueError, match="avoid is a list of words"):
        caption_files(captioner, paths, avoid="dog")


# --------------------------------------------------------------------------------------------------
# the built-in model


def test_a_photo_of_a_person() -> None:
    from skimage import data

    captioner = Captioner.load(device="cpu")
    features = captioner.encode(data.astronaut())
    plain = captioner.caption(features)
    neutral = captioner.caption(features, neutral=True)
    assert gendered(plain.text)
    assert not gendered(neutral.text)
    assert {"person", "people", "child"} & set(split_words(neutral.text))
    one = next(w for w in neutral.words if w.text in ("person", "people", "child"))
    assert one.probability > 0.3
