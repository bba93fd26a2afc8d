from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from PIL import Image

from captioner.caption import (
    SCHEMA_VERSION,
    SURE,
    Alternative,
    Caption,
    Word,
    join_words,
    plain_text,
)
from captioner.images import Fit

FIT = Fit("squash", 60, 40, (0.0, 0.0, 60.0, 40.0))


def make_caption(**changes: object) -> Caption:
    def word(text: str, cell: int) -> Word:
        weights = np.full((1, 6), 0.1, np.float32)
        weights[0, cell] = 0.5
        return Word(text, 0.25, 0.3, (Alternative(text, 0.25), Alternative("cat", 0.1)), weights, 0.75)

    caption = Caption(
        text="a dog's",
        words=(word("a", 0), word("dog", 4), replace(word("'s", 5), given=True)),
        score=-1.23456789,
        log_probability=-3.5,
        confidence=0.5,
        finished=True,
        grid=(2, 3),
        fit=FIT,
    )
    return replace(caption, **changes)


def test_record() -> None:
    record = make_caption().to_dict()
    assert record == {
        "schema": SCHEMA_VERSION,
        "caption": "a dog's",
        "confidence": 0.5,
        "score": -1.23457,
        "log_probability": -3.5,
        "finished": True,
        "words": [
            {
                "word": text,
                "probability": 0.25,
                "confidence": 0.3,
                "gate": 0.75,
                "given": text == "'s",
                "alternatives": [{"word": text, "probability": 0.25}, {"word": "cat", "probability": 0.1}],
            }
            for text in ("a", "dog", "'s")
        ],
        "guesses": [],
    }
    assert json.loads(json.dumps(record)) == record


def test_guesses_are_written_and_attention_to_them_when_it_is_asked_for() -> None:
    caption = make_caption()
    words = [replace(w, word_attention=np.array([0.25, 0.125], np.float32)) for w in caption.words]
    caption = replace(
        caption, words=tuple(words), guesses=(Alternative("dog", 0.9), Alternative("grass", 0.123456789))
    )
    record = caption.to_dict()
    assert record["guesses"] == [
        {"word": "dog", "probability": 0.9},
        {"word": "grass", "probability": 0.123457},
    ]
    assert "word_attention" not in record["words"][0]
    assert caption.to_dict(attention=True)["words"][2]["word_attention"] == [0.25, 0.125]
    assert make_caption().to_dict(attention=True)["words"][0]["word_attention"] is None


def test_attention_is_written_when_it_is_asked_for() -> None:
    caption = make_caption()
    record = caption.to_dict(attention=True)
    assert json.loads(json.dumps(record)) == record
    assert record["grid"] == [2, 3]
    assert record["times"] == [0.0]
    assert record["fit"] == {"mode": "squash", "width": 60, "height": 40, "box": [0, 0, 60, 40]}
    # frame, row, column
    assert record["words"][1]["attention"] == [[[0.1, 0.1, 0.1], [0.1, 0.5, 0.1]]]
    without = replace(caption, words=(replace(caption.words[0], attention=None, gate=None),))
    assert without.to_dict(attention=True)["words"][0]["attention"] is None
    assert without.to_dict()["words"][0]["gate"] is None


def test_n_best_in_the_record() -> None:
    first, second = make_caption(), make_caption(text="a cat", score=-2.0, finished=False)
    record = replace(first, n_best=(first, second)).to_dict()
    assert [entry["caption"] for entry in record["n_best"]] == ["a dog's", "a cat"]
    assert record["n_best"][1] == {
        "caption": "a cat",
        "confidence": 0.5,
        "score": -2.0,
        "log_probability": -3.5,
        "finished": False,
    }


def test_attention_of_all_words() -> None:
    caption = make_caption()
    attention = caption.attention
    assert attention is not None
    assert attention.shape == (3, 1, 6)
    assert attention.argmax(-1)[:, 0].tolist() == [0, 4, 5]
    clip = make_caption(words=(), times=np.array([0.0, 1.0], np.float32))
    assert clip.attention is not None
    assert clip.attention.shape == (0, 2, 6)
    words = (caption.words[0], replace(caption.words[1], attention=None))
    assert replace(caption, words=words).attention is None


def test_plain_text_hedges_below_the_bar() -> None:
    sure, unsure = make_caption(confidence=SURE), make_caption(confidence=SURE - 1e-6)
    assert sure.sure
    assert plain_text(sure) == "a dog's"
    assert not unsure.sure
    assert "not sure" in plain_text(unsure)
    assert "a dog's" in plain_text(unsure)
    assert str(unsure) == "a dog's"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "dog", "'s", "red-haired", "tail"], "a dog's red-haired tail"),
        (["'s", "dog"], "'s dog"),
    ],
)
def test_join_words(words: list[str], text: str) -> None:
    assert join_words(words) == text


def test_overlay() -> None:
    photo = Image.new("RGB", (60, 40), "green")
    wide, narrow = make_caption().overlay(photo), make_caption().overlay(photo, width=500)
    assert wide.size[0] > narrow.size[0] == 500


def test_results_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        make_caption().text = "another"  # type: ignore[misc]
    # arrays have no truth value, so results compare by identity
    assert make_caption() != make_caption()
    assert len({make_caption(), make_caption()}) == 2
