from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lively import make_calibration

from captioner.calibration import (
    FEATURES,
    Calibration,
    caption_features,
    content_share,
    is_content_word,
    plain_confidence,
    stem,
    word_ranks,
)
from captioner.tokenizer import UNKNOWN, WordTokenizer

# --------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    "forms",
    """
    dog dogs; bus buses; building buildings; glass glasses; box boxes; bench benches; horse horses; eye eyes
    tree trees; baby babies; boy boys; cookie cookies; movie movies; tomato tomatoes; tie ties; ball balls
    man men; woman women; fireman firemen; child children; person people; foot feet; leaf leaves; knife knives
    run runs running; sit sits sitting; ride rides riding; roll rolls rolled rolling; dress dresses dressed
    carry carries carried carrying; ski skis skiing; play plays played playing; walk walks walked walking
    stand stands standing; cross crosses crossing; pass passing; fly flies flying; sky skies; use uses
    """.replace("\n", ";")
    .strip(" ;")
    .split(";"),
)
def test_inflections_have_one_stem(forms: str) -> None:
    assert len({stem(word) for word in forms.split()}) == 1, {word: stem(word) for word in forms.split()}


def test_other_words_have_other_stems() -> None:
    words = """dog cat horse house mouse man woman person child boy girl ski sky bus boat plane train car cart
    street tree grass glass glove ball bat bath bed bread red ring king wing sing string thing rug run rain
    hat hand head bear beer bee bird board book boot box bench beach cake lake kite knife leaf"""
    stems: dict[str, str] = {}
    for word in words.split():
        assert stem(word) not in stems, (word, stems[stem(word)])
        stems[stem(word)] = word


@given(st.text(max_size=12))
def test_every_word_has_a_stem(word: str) -> None:
    assert bool(stem(word)) == bool(word)


def test_content_words() -> None:
    content = [
        w
        for w in "a man 's dog is sitting on top of 2 red tables near the <unk> tv".split()
        if is_content_word(w)
    ]
    assert content == ["man", "dog", "sitting", "red", "tables", "<unk>", "tv"]


def test_content_share() -> None:
    references = ["two dogs are running".split(), "a brown dog on the grass".split()]
    assert content_share("a dog runs on the grass".split(), references) == 1
    assert content_share("a cat sits on the grass".split(), references) == pytest.approx(1 / 3)
    assert content_share("a dog and a dog and a cat".split(), references) == 0.5  # each word counts once
    assert content_share("on top of the".split(), references) == 0
    assert content_share([], references) == 0
    assert content_share(["dog"], []) == 0


# --------------------------------------------------------------------------------------------------
# Numbers


def test_familiarity_is_what_it_says() -> None:
    """Against the definition: distances along the main directions in their own units, and what is left."""
    rng = np.random.default_rng(0)
    spread = np.array([5.0, 2.0, 1.0] + [0.05] * 17)
    training = rng.normal(size=(4000, 20)) * spread @ np.linalg.qr(rng.normal(size=(20, 20)))[0] + rng.normal(
        size=20
    )
    mean = training.mean(0)
    _, singular, directions = np.linalg.svd(training - mean, full_matrices=False)
    scales = singular[:3] / math.sqrt(len(training))
    inside = (training - mean) @ directions[:3].T
    left = np.linalg.norm(training - mean - inside @ directions[:3], axis=1)
    calibration = Calibration(
        word=(1.0, 0.0),
        caption=(0.0,) * (len(FEATURES) + 1),
        mean=mean,
        basis=directions[:3].T / scales,
        residual=float(np.sqrt((left**2).mean())),
    )
    found = np.array([calibration.familiarity(picture) for picture in training[:200]])
    np.testing.assert_allclose(found[:, 0], np.sqrt(((inside / scales) ** 2).mean(1))[:200], rtol=1e-8)
    np.testing.assert_allclose(found[:, 1], left[:200] / calibration.residual, rtol=1e-6)
    # 1 is typical
    everything = np.array([calibration.familiarity(picture) for picture in training])
    np.testing.assert_allclose((everything[:, :2] ** 2).mean(0), 1, rtol=1e-6)
    # a step of 10 deviations along the second direction is seen in the distance alone …
    distance, residual, size = calibration.familiarity(mean + 10 * scales[1] * directions[1])
    assert size == pytest.approx(math.log(np.linalg.norm(mean + 10 * scales[1] * directions[1])))
    assert distance == pytest.approx(10 / math.sqrt(3))
    assert residual == pytest.approx(0, abs=1e-9)
    # … and one along the last in the residual alone
    distance, residual, _ = calibration.familiarity((mean + 3 * directions[-1]).astype(np.float32))
    assert distance == pytest.approx(0, abs=1e-4)
    assert residual == pytest.approx(3 / calibration.residual, rel=1e-4)


def test_word_confidence_is_platt_scaling() -> None:
    calibration = make_calibration()
    for p in (1e-4, 0.2, 0.5, 0.97):
        logit = 0.8 * math.log(p / (1 - p)) + 0.3
        assert calibration.word_confidence(p) == pytest.approx(1 / (1 + math.exp(-logit)))
    assert 0 <= calibration.word_confidence(0.0) < calibration.word_confidence(1.0) <= 1


def test_caption_features() -> None:
    words = ["a", "dog", "on", "grass"]
    probabilities = [0.9, 0.5, 0.8, 0.1]
    features = caption_features(words, probabilities, [4, 10, 7, 1000], 1.5, 99.0, -0.5)
    assert len(features) == len(FEATURES)
    expected = {
        "mean_log_probability": np.mean(np.log(probabilities)),
        "least_log_probability": np.log(0.1),
        "content_log_probability": np.mean(np.log([0.5, 0.1])),
        "distance": 1.5,
        "residual": 10.0,  # cut
        "size": -0.5,
        "content_probability": 0.3,
        "content_rank": (np.log(10) + np.log(1000)) / 2,
    }
    for name, value in zip(FEATURES, features, strict=True):
        assert value == pytest.approx(expected[name]), name
    # without content words all words stand in; without words there is nothing; 0 has a logarithm
    assert caption_features(["a"], [0.5], [4], 0, 0, 0)[:3] == [math.log(0.5)] * 3
    assert caption_features([], [], [], 0, 0, 0) == [0.0] * 6 + [1.0, 0.0]
    assert all(map(math.isfinite, caption_features(["dog"], [0.0], [0], 0, 0, 0)))


def test_a_rank_is_a_place_in_the_vocabulary() -> None:
    tokenizer = WordTokenizer(["a", "dog", "zebra"])
    assert word_ranks(tokenizer, ["zebra", "a", "dog"]) == [6, 4, 5]
    assert word_ranks(tokenizer, ["", "unicorn"]) == [7, UNKNOWN]


def test_caption_confidence_is_a_product_of_two_regressions() -> None:
    calibration = make_calibration()
    assert calibration.shown is not None
    numbers = [-1.0, -3.0, -2.0, 1.2, 0.8, 2.8, 0.4, 5.0]
    share, shown = (
        1 / (1 + math.exp(-weights[0] - sum(w * x for w, x in zip(weights[1:], numbers, strict=True))))
        for weights in (calibration.caption, calibration.shown)
    )
    assert calibration.caption_confidence(numbers) == pytest.approx(share * shown)
    assert replace(calibration, shown=None).caption_confidence(numbers) == pytest.approx(share)
    for extreme in (-1e9, 1e9):
        assert calibration.caption_confidence([extreme] * len(FEATURES)) in (0, 1)


def test_plain_confidence_is_the_geometric_mean() -> None:
    assert plain_confidence([0.5, 0.02]) == pytest.approx(0.1)
    assert plain_confidence([]) == 0
    assert 0 <= plain_confidence([0.0, 0.0]) < 1e-8
    assert plain_confidence([1.0]) == 1


# --------------------------------------------------------------------------------------------------
# Files


def test_round_trip() -> None:
    calibration = make_calibration()
    data = json.loads(json.dumps(calibration.to_dict()))
    again = Calibration.from_parts(data, calibration.mean, calibration.basis)
    assert again.word == calibration.word
    assert again.caption == calibration.caption
    assert again.shown == calibration.shown
    picture = np.random.default_rng(0).normal(size=1280)
    assert again.familiarity(picture) == calibration.familiarity(picture)


def test_a_calibration_of_an_older_file_is_one_regression() -> None:
    """Of the first five numbers, pictures of nothing included."""
    calibration = make_calibration()
    data = {"word": [1.0, 0.0], "caption": [0.5, 0.4, 0.05, 0.1, -0.2, -0.1], "residual": 2.5}
    again = Calibration.from_parts(data, calibration.mean, calibration.basis)
    assert again.shown is None
    numbers = [-1.0, -3.0, -2.0, 1.2, 0.8]
    logit = 0.5 + np.dot(data["caption"][1:], numbers)
    assert again.caption_confidence([*numbers, 9.0, 9.0, 9.0]) == pytest.approx(1 / (1 + math.exp(-logit)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"caption": [1.0, 2.0]}, "does not fit the features"),
        ({"shown": [1.0, 2.0]}, "does not fit the features"),
        ({"shown": [float("nan")] * 9}, "not finite"),
        ({"word": [1.0]}, "does not fit the features"),
        ({"word": [1.0, float("nan")]}, "not finite"),
        ({"caption": [float("inf")] * 9}, "not finite"),
        ({"residual": 0.0}, "units of zero"),
        ({"residual": -1.0}, "units of zero"),
        ({"mean": np.full(1280, np.inf)}, "not finite"),
        ({"basis": np.zeros((1280, 4))}, "units of zero"),
        ({"basis": np.zeros(1280)}, "shape"),
        ({"basis": np.zeros((1280, 0))}, "shape"),
        ({"mean": np.zeros((1, 1280))}, "shape"),
    ],
)
def test_parts_that_make_no_calibration(change: dict[str, Any], reason: str) -> None:
    calibration = make_calibration()
    parts = {**calibration.to_dict(), "mean": calibration.mean, "basis": calibration.basis, **change}
    with pytest.raises(ValueError, match=reason):
        Calibration.from_parts(parts, parts["mean"], parts["basis"])
