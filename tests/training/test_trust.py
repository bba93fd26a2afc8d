"""Trust: what is hidden, what is made of the falls, and a small run against models whose answer is known."""

import json
from pathlib import Path

import numpy as np
import pytest
from captioner_training import trust as measuring
from captioner_training.calibrate import half, is_even
from captioner_training.config import SourceConfig
from captioner_training.data import DataError, load_data_set
from captioner_training.report import ReportError
from captioner_training.trust import (
    Deleted,
    Trust,
    check_plot,
    deletion,
    differences,
    fill,
    hidden,
    measure,
    moved,
    ranked,
    reliability,
    trust,
    word_log_probabilities,
)
from conftest import make_header
from lively import lively_captioner, make_calibration, make_lively_model, pictures
from PIL import Image
from shape_data import write_shapes
from typer.testing import CliRunner

from captioner import Captioner, checkpoint
from captioner.caption import Caption, Word
from captioner.cli import app
from captioner.images import Fit, load

SQUASH = Fit("squash", 300, 200, (0.0, 0.0, 300.0, 200.0))
# a photo of twice its height: bars of a quarter above and below
LETTERBOX = Fit("letterbox", 200, 100, (0.0, -50.0, 200.0, 150.0))
# bars of 3/16: the second of eight rows of cells lies half under one
CUT = Fit("letterbox", 160, 100, (0.0, -30.0, 160.0, 130.0))


# --------------------------------------------------------------------------------------------------
# what is hidden


@pytest.mark.parametrize(
    ("grid", "size"), [((8, 8), 256), ((7, 7), 224), ((9, 9), 260), ((14, 14), 224), ((2, 2), 64)]
)
@pytest.mark.parametrize("fit", [SQUASH, LETTERBOX, CUT])
def test_a_tenth_of_the_photo_is_hidden(grid, size, fit):
    mask = hidden(np.random.default_rng(0).permutation(grid[0] * grid[1]), grid, fit, size)
    top, bottom = {SQUASH: (0, size), LETTERBOX: (size // 4, size * 3 // 4)}.get(
        fit, (round(size * 30 / 160), round(size * 130 / 160))
    )
    assert not mask[:top].any()
    assert not mask[bottom:].any()
    assert mask.sum() / (size * (bottom - top)) == pytest.approx(0.1, abs=0.004)


def test_whole_cells_and_a_part_of_the_next():
    """A tenth of 64 cells: the six most attended, and 0.4 of the seventh in its middle."""
    weights = np.zeros(64)
    order = [9, 0, 63, 30, 31, 5, 40, 2]
    weights[order] = np.arange(8, 0, -1) / 36
    mask = hidden(ranked(weights, (8, 8), SQUASH, np.random.default_rng()), (8, 8), SQUASH, 256)
    shares = mask.reshape(8, 32, 8, 32).mean((1, 3)).ravel()
    assert (shares[order[:6]] == 1).all()
    assert shares[40] == pytest.approx(0.4, abs=0.01)
    assert shares.sum() == shares[order[:7]].sum()
    part = mask[160:192, :32]
    rows, columns = part.any(1).nonzero()[0], part.any(0).nonzero()[0]
    assert part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert abs((rows[0] + rows[-1]) / 2 - 15.5) <= 0.5
    assert abs((columns[0] + columns[-1]) / 2 - 15.5) <= 0.5


def test_what_counts_is_the_attention_for_the_area():
    """A cell that is half bar and has 0.4 of the attention ranks before a whole one with 0.6."""
    weights = np.zeros(64)
    weights[8 * 1 + 2], weights[8 * 4 + 4] = 0.4, 0.6  # rows 1 and 6 lie half under a bar
    ranks = ranked(weights, (8, 8), CUT, np.random.default_rng(0))
    assert sorted(ranks) == list(range(64))
    assert ranks[8 * 1 + 2] == 63
    assert ranks[8 * 4 + 4] == 62
    bars = [*range(8), *range(56, 64)]
    assert set(ranks[bars]) == set(range(16))
    mask = hidden(ranks, (8, 8), CUT, 256)
    assert mask[48:64, 64:96].all()
    assert mask[128:160, 128:160].all()


def test_ties_fall_at_random():
    """Sharp attention is exactly 0 in most cells: they must not always be those at the top."""
    chance = np.random.default_rng(0)
    highest = [int(np.argmax(ranked(np.zeros(64), (8, 8), SQUASH, chance))) for _ in range(100)]
    assert len(set(highest)) > 40


@pytest.mark.parametrize("fit", [SQUASH, CUT])
def test_a_random_tenth_has_the_same_shape_elsewhere(fit):
    chance = np.random.default_rng(1)
    rows = slice(0, 8) if fit is SQUASH else slice(1, 7)  # those with a part of the photo
    weights = np.zeros((8, 8))
    weights[3, 3:6], weights[4, 3] = 0.25, 0.25
    ranks = ranked(weights.ravel(), (8, 8), fit, chance).reshape(8, 8)
    places = set()
    for _ in range(40):
        other = moved(ranks.ravel(), (8, 8), fit, chance).reshape(8, 8)
        assert any(
            np.array_equal(np.roll(shape, (r, c), (0, 1)), other[rows])
            for shape in (ranks[rows], ranks[rows, ::-1])
            for r in range(8)
            for c in range(8)
        )
        if fit is CUT:
            assert np.array_equal(other[[0, 7]], ranks[[0, 7]])
        places.add(int(np.argmax(other)))
    assert len(places) > 15


def test_the_hole_has_the_mean_colour_of_the_photo():
    pixels = np.zeros((3, 64, 64), np.uint8)
    pixels[0, 16:48], pixels[1, 16:32] = 200, 100  # the photo; above and below are bars
    pixels[:, :16] = pixels[:, 48:] = 255
    mask = np.zeros((64, 64), bool)
    mask[20:30, 5:9] = True
    filled = fill(pixels, mask, LETTERBOX)
    assert (filled[:, mask] == np.array([[200], [50], [0]])).all()
    assert (filled[:, ~mask] == pixels[:, ~mask]).all()
    assert filled.dtype == np.uint8


# --------------------------------------------------------------------------------------------------
# log-probabilities and falls


@pytest.mark.parametrize("decoder", [{}, {"words": 3, "concepts": 6}, {"attention": "dot", "cell": "gru"}])
def test_log_probabilities_are_those_of_the_search(decoder):
    """With a word memory too: what is hidden changes what is guessed."""
    model = make_lively_model(**decoder)
    captioner = Captioner(model, make_header(model))
    for picture in pictures(2):
        features = captioner.encode(picture)
        caption = captioner.caption(features)
        told = word_log_probabilities(captioner, features, caption)
        expected = np.log([word.probability for word in caption.words])
        np.testing.assert_allclose(told, expected[None], atol=2e-4)


def test_falls_are_those_of_captioning_the_damaged_picture(monkeypatch):
    """By another way: the caption given as a prefix to the picture with a hole."""
    captioner = lively_captioner()
    preprocess = captioner.model.encoder.preprocess
    monkeypatch.setattr(measuring, "is_content_word", lambda word: True)
    for n, picture in enumerate(pictures(2)):
        pixels, fit = load(picture, preprocess)
        features = captioner.encode_pixels([(pixels, fit)])
        caption = captioner.caption(features, beam=1, max_length=4)
        found = measuring.delete(captioner, pixels, fit, caption, n)
        assert found.words == [word.text for word in caption.words]
        for i, word in enumerate(caption.words):
            ranks = ranked(word.attention[0], caption.grid, fit, np.random.default_rng())
            hole = fill(pixels, hidden(ranks, caption.grid, fit, 64), fit)
            again = captioner.caption(
                captioner.encode_pixels([(hole, fit)]), prefix=caption.text, max_length=len(caption.words)
            )
            fall = np.log(word.probability) - np.log(again.words[i].probability)
            assert found.attended[i] == pytest.approx(fall, abs=1e-3)
        same = measuring.delete(captioner, pixels, fit, caption, n)
        assert (same.elsewhere == found.elsewhere).all()
        assert np.abs(found.attended).max() > 1e-3


def said(words, cells):
    """A caption of these words, each with all of its attention on one of 8 x 8 cells."""
    maps = np.eye(64, dtype=np.float32)[cells][:, None]
    return Caption(
        text=" ".join(words),
        words=tuple(Word(w, 0.5, 0.5, attention=m) for w, m in zip(words, maps, strict=True)),
        score=0.0,
        log_probability=0.0,
        confidence=0.5,
        finished=True,
        grid=(8, 8),
        fit=SQUASH,
    )


def test_attention_that_means_something_is_told_from_attention_that_does_not(monkeypatch):
    """A model whose "dog" hangs on cell 20 alone and whose "red" on cell 50."""
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (3, 256, 256), dtype=np.uint8)
    true = {"dog": 20, "red": 50}

    def known(captioner, views, caption):
        damage = np.abs(views.numpy().astype(float) - pixels).mean(1).reshape(-1, 8, 32, 8, 32).mean((2, 4))
        damage = damage.reshape(len(views), 64)
        return np.stack([-damage[:, true.get(w.text, 0)] for w in caption.words], 1)

    monkeypatch.setattr(measuring, "encode", lambda encoder, views, fits: views)
    monkeypatch.setattr(measuring, "word_log_probabilities", known)
    monkeypatch.setattr(measuring, "DRAWS", 200)
    captioner = lively_captioner()
    words = ["a", "red", "dog"]
    honest = measuring.delete(captioner, pixels, SQUASH, said(words, [0, 50, 20]), 0)
    assert honest.words == ["red", "dog"]
    assert honest.places == [1, 2]
    all_of_it = np.abs(pixels - pixels.mean((1, 2)).round()[:, None, None])
    for n, (row, column) in enumerate(((6, 2), (2, 4))):
        cell = all_of_it[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        assert honest.attended[n] == pytest.approx(cell.mean())
        # six and a bit of the 64 cells are hidden: that is how often a random tenth hits
        assert honest.elsewhere[n] == pytest.approx(0.1 * cell.mean(), rel=0.5)
        assert honest.scattered[n] == pytest.approx(0.1 * cell.mean(), rel=0.5)
    assert honest.others == pytest.approx([0, 0])
    found = deletion([honest])
    assert 5 < found["random"]["ratio"] < 20
    assert found["random"]["attended_more"] == 1
    lying = measuring.delete(captioner, pixels, SQUASH, said(words, [0, 20, 50]), 0)
    assert lying.attended == pytest.approx([0, 0])
    assert lying.others == pytest.approx(honest.attended)
    assert deletion([lying])["random"]["ratio"] == 0


def one(words, attended, random, places=None, maps=None, others=None):
    n = len(words)
    return Deleted(
        words=words,
        places=places or list(range(n)),
        maps=np.full((n, 4), 0.25) if maps is None else np.array(maps, float),
        share=np.ones(4),
        attended=np.array(attended, float),
        elsewhere=np.array(random, float),
        scattered=np.array(random, float) * 2,
        others=np.full(n, np.nan) if others is None else np.array(others, float),
        encodings=3,
    )


def test_ratios_by_hand():
    found = deletion(
        [one(["dog", "red"], [3.0, 1.0], [0.5, 1.5], others=[1.0, 2.0]), one(["cat"], [2.0], [0.0])]
    )
    assert found["words"] == 3
    assert found["encodings"] == 6
    assert found["attended"] == pytest.approx(2)
    assert found["random"]["fall"] == pytest.approx(2 / 3)
    assert found["random"]["ratio"] == pytest.approx(3)
    assert found["random"]["attended_more"] == pytest.approx(2 / 3)
    low, high = found["random"]["interval"]
    assert low == pytest.approx(2.0)  # the first picture alone
    assert high is None  # the second alone: nothing to divide by
    assert found["random_cells"]["ratio"] == pytest.approx(1.5)
    # the cat's caption has no other word
    assert found["other_words"]["fall"] == pytest.approx(1.5)
    assert found["other_words"]["ratio"] == pytest.approx(4 / 3)
    assert found["other_words"]["attended_more"] == pytest.approx(0.5)
    json.dumps(found, allow_nan=False)


def test_no_ratio_to_a_fall_of_nothing():
    found = deletion([one(["dog"], [1.0], [-0.5])])
    assert found["random"]["ratio"] is None
    assert found["random"]["interval"] is None
    assert found["other_words"]["fall"] is None


def test_differences_by_hand():
    left, right, both = [1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0]
    found = differences(
        [
            one(["dog", "cat", "dogs"], [0] * 3, [0] * 3, places=[1, 3, 5], maps=[left, right, left]),
            one(["red"], [0], [0], places=[1], maps=[both]),
        ]
    )
    # two dogs are the same word; the pairs are dog-cat and cat-dogs
    assert found["within"]["pairs"] == 2
    assert found["within"]["total_variation"] == pytest.approx(1)
    assert found["within"]["jensen_shannon"] == pytest.approx(1)
    # only the place 1 is there in two pictures
    assert found["between"]["pairs"] == 2
    assert found["between"]["total_variation"] == pytest.approx(0.5)
    assert found["entropy"] == pytest.approx((0 + 0 + 0 + 1 / 2) / 4)
    assert differences([one(["dog"], [0], [0])])["within"] is None
    assert differences([one(["dog"], [0], [0])])["entropy"] == pytest.approx(1)


def test_reliability_by_hand():
    confidence = np.array([0.05, 0.05, 0.95, 1.0])
    right = np.array([0.0, 1.0, 1.0, 1.0])
    found = reliability(confidence, right)
    assert [b["count"] for b in found["bins"]] == [2] + [0] * 8 + [2]
    assert found["bins"][0]["right"] == 0.5
    assert found["bins"][4]["right"] is None
    assert found["bins"][9]["confidence"] == pytest.approx(0.975)
    assert found["error_by_width"] == pytest.approx((0.45 + 0.025) / 2)
    assert reliability(np.zeros(0), np.zeros(0)) is None


def test_an_error_is_known_from_chance():
    """Confidences that hold, and the same ones off by 0.1."""
    chance = np.random.default_rng(0)
    confidence = chance.random(400)
    right = (chance.random((200, 400)) < confidence).astype(float)
    found = [reliability(confidence, r) for r in right]
    assert np.mean([f["error"] for f in found]) == pytest.approx(
        np.mean([f["by_chance"] for f in found]), rel=0.1
    )
    off = reliability(np.clip(confidence + 0.1, 0, 1), right[0])
    assert off["error"] > 2 * off["by_chance"]


def test_even_and_odd_ids():
    assert is_even(4)
    assert not is_even(7)
    assert is_even("0012")
    assert not is_even("7")
    names = [f"picture-{n}.jpg" for n in range(400)]
    sides = [is_even(name) for name in names]
    assert 150 < sum(sides) < 250
    assert sides[:4] == [is_even(n) for n in names[:4]]
    assert is_even("a") is False  # the same on every machine
    assert is_even("²") in (True, False)  # a digit, but not a number


# --------------------------------------------------------------------------------------------------
# on data


def shapes(folder, count=24):
    return load_data_set(
        "shapes", SourceConfig(annotations="shapes.json", images=["pictures"]), write_shapes(folder, count)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "lively.safetensors"
    model = make_lively_model()
    checkpoint.save(path, model, make_header(model, name="lively"), make_calibration())
    return path


@pytest.fixture(scope="module")
def captioner(saved):
    return Captioner.load(saved, device="cpu")


def test_everything_at_once(tmp_path, captioner):
    data = shapes(tmp_path)
    found = measure(captioner, data, {"beam": 1}, pictures=5)
    assert found.attention == "additive"
    assert found.deletion["pictures"] <= 5
    assert found.deletion["encodings"] > found.deletion["pictures"]
    assert found.maps["cells"] == 4
    held = half(data, even=False)
    assert found.captions["count"] == len(held) == 12
    said = captioner.caption_batch([held.store.read(p.file) for p in held.pictures], beam=1)
    assert found.captions["confidence"] == pytest.approx(np.mean([c.confidence for c in said]), abs=1e-5)
    places = sum(len(captioner.model.tokenizer.encode(c)) + 1 for p in held.pictures for c in p.captions)
    assert found.words["count"] == places
    json.dumps(found.to_dict(), allow_nan=False)
    text = found.format()
    for phrase in (
        "attended at the word",
        "calibration error",
        "attention: additive",
        "on pictures with odd",
    ):
        assert phrase in text
    again = measure(captioner, data, {"beam": 1}, pictures=5)
    assert {**again.to_dict(), "seconds": 0} == {**found.to_dict(), "seconds": 0}


def test_a_model_without_attention(tmp_path):
    model = make_lively_model(attention="none")
    captioner = Captioner(model, make_header(model))
    found = measure(captioner, shapes(tmp_path, 6), pictures=2)
    assert found.deletion is None
    assert found.maps is None
    assert "not applicable: the model has no attention" in found.format()
    assert found.captions["count"] == 3
    assert "the model has no calibration" in found.format()


def test_a_set_without_odd_ids(tmp_path, captioner):
    folder = write_shapes(tmp_path, 3)
    record = json.loads((folder / "shapes.json").read_text())
    for entry in record["images"]:
        entry["id"] *= 2
    for entry in record["annotations"]:
        entry["image_id"] *= 2
    (folder / "shapes.json").write_text(json.dumps(record))
    (found,) = trust(captioner, folder / "shapes.json", images=[folder / "pictures"], pictures=1).values()
    assert found.words is None
    assert "no picture of this data set has an odd id" in found.format()


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    confidence = np.random.default_rng(0).random(50)
    record = reliability(confidence, (confidence > 0.5).astype(float))
    found = [
        Trust("first & <second>", "tiny", "none", True, None, None, record, record, 1.0),
        Trust("none", "tiny", "none", True, None, None, None, None, 1.0),
    ]
    measuring.write_plot(tmp_path / "plot.PNG", found)
    with Image.open(tmp_path / "plot.PNG") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
    measuring.write_plot(tmp_path / "plot.svg", found)
    assert b"</svg>" in (tmp_path / "plot.svg").read_bytes()


def test_the_plot_is_written(tmp_path, captioner):
    pytest.importorskip("matplotlib")
    folder = write_shapes(tmp_path, 4)
    path = tmp_path / "plot.pdf"
    trust(captioner, folder / "shapes.json", images=[folder / "pictures"], pictures=1, plot=path)
    assert path.read_bytes().startswith(b"%PDF")


def test_a_plot_that_cannot_be_is_refused_first(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"plot\.gif: name a file that ends in \.png, \.svg, \.pdf"):
        check_plot(tmp_path / "plot.gif")
    with pytest.raises(DataError, match="there is no folder"):
        check_plot(tmp_path / "absent" / "plot.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ReportError, match=r'pip install "captioner\[figures\]"'):
        check_plot(tmp_path / "plot.png")


def test_the_command(tmp_path, saved):
    folder = write_shapes(tmp_path, 6)
    common = ["evaluate", "--model", str(saved), "--data", str(folder / "shapes.json")]
    common += ["--images", str(folder / "pictures"), "--device", "cpu"]
    told = CliRunner().invoke(app, [*common, "--trust", "--pictures", "2", "--highest", "4", "--json"])
    assert told.exit_code == 0, told.output
    record = json.loads(told.stdout)
    assert record["deletion"]["pictures"] <= 2
    assert record["captions"]["count"] == 2
    documented = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for key in (
        *record,
        *record["deletion"],
        *record["deletion"]["random"],
        *record["words"],
        *record["maps"],
    ):
        assert f"`{key}`" in documented, key
    told = CliRunner().invoke(app, [*common, "--trust", "--pictures", "1"])
    assert "shapes: what can be trusted in lively" in told.stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--plot", "a.png"], "--plot needs --trust"),
        (["--pictures", "3"], "--pictures needs --trust"),
        (["--trust", "--results", "a.json"], "--results is for scores"),
        (["--trust", "--no-spice"], "--spice is for scores"),
        (["--trust"], "give --data"),
    ],
)
def test_wrong_wishes(options, reason):
    outcome = CliRunner().invoke(app, ["evaluate", *options])
    assert outcome.exit_code == 2
    assert reason in outcome.output
