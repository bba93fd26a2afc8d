"""Length, vocabulary, novelty and repetition of captions, worked out by hand."""

import pytest
from captioner_training.measures import FEW, common_caption_warning, few_pictures_warning, measure

CAPTIONS = {1: "A dog runs.", 2: "a dog runs", 3: "a cat", 4: "", 5: "the cat's mat, on a chair"}
REFERENCES = {
    1: ["A brown dog is running!", "dog"],
    2: ["a dog"],
    3: ["a cat sits"],
    4: ["a bus"],
    5: ["..."],
}


def test_measures_by_hand():
    found = measure(CAPTIONS, REFERENCES, training=["A CAT", "a dog sleeps"])
    # 3, 3, 2 and 7 words: an apostrophe begins a word of its own
    assert found["length"]["mean"] == pytest.approx(15 / 4)
    assert found["length"]["sd"] == pytest.approx(((2 * 0.75**2 + 1.75**2 + 3.25**2) / 4) ** 0.5)
    assert (found["length"]["min"], found["length"]["max"]) == (2, 7)
    assert found["length"]["references"]["mean"] == pytest.approx((5 + 1 + 2 + 3 + 2) / 5)
    assert found["vocabulary"] == {"words": 9, "references": 8}
    assert found["empty"] == 1
    assert found["distinct"] == pytest.approx(3 / 4)
    assert found["novel"] == pytest.approx(3 / 4)  # all but "a cat"
    assert found["training_captions"] == 2
    assert found["common"][0] == {"caption": "a dog runs", "count": 2, "share": 2 / 5}


def test_what_nobody_knows_is_none():
    found = measure({1: ""}, {1: ["a dog"]})
    assert found["novel"] is found["distinct"] is found["length"]["mean"] is None
    assert measure({1: "a dog"}, {1: ["a dog"]})["novel"] is None
    assert measure({1: "a dog"}, {1: ["a dog"]}, training=[])["novel"] == 1


@pytest.mark.parametrize(
    ("captions", "warned"),
    [
        (["a dog"] * 6 + [f"{n}" for n in range(94)], True),
        (["a dog"] * 5 + [f"{n}" for n in range(95)], False),  # 5 % is not more than 5 %
        (["A dog!", "a dog"] * 3 + [f"{n}" for n in range(94)], True),
        (["a dog", "a cat", "a bus"], False),  # each is a third of the pictures, but only one
        (["a dog", "a dog", "a bus"], True),
        ([], False),
        ({1: "a dog", 2: "a dog"}, True),
    ],
)
def test_warning_of_a_caption_that_covers_many_pictures(captions, warned):
    warning = common_caption_warning(captions)
    assert (warning is not None) == warned
    if warned:
        assert '"a dog"' in warning
        assert "\n" not in warning


def test_the_warning_gives_figures():
    assert common_caption_warning(["a dog"] * 6 + [f"{n}" for n in range(94)]).startswith(
        'the caption "a dog" covers 6 of 100 pictures (6 %)'
    )
    assert common_caption_warning(["", "", "a"]).startswith("an empty caption covers 2 of 3 pictures (67 %)")


def test_warning_of_few_pictures():
    assert few_pictures_warning(FEW) is None
    assert f"({FEW - 1}, fewer than {FEW})" in few_pictures_warning(FEW - 1)
    assert "it is 0" in few_pictures_warning(1)
