"""Calibration: fits that are checked against the truth, and a small run from data to checkpoint."""

import json

import numpy as np
import pytest
from captioner_training import calibrate as calibration
from captioner_training import nothing
from captioner_training.calibrate import (
    Sample,
    balance,
    calibrate,
    calibration_error,
    chance_error,
    familiar,
    fit_logistic,
    fit_words,
    nothing_samples,
    photo_samples,
    predict,
    word_pairs,
)
from captioner_training.config import SourceConfig
from captioner_training.data import DataError, load_data_set
from conftest import make_header
from shape_data import captions, draw, make_config, make_seeing_model, write_shapes

from captioner import Captioner, checkpoint
from captioner.calibration import FEATURES, Calibration
from captioner.captioner import pool
from captioner.checkpoint import CheckpointError, read_header


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = write_shapes(tmp_path_factory.mktemp("shapes"))
    return load_data_set("shapes", SourceConfig(annotations="shapes.json", images=["pictures"]), folder)


@pytest.fixture(scope="module")
def seeing_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "seeing.safetensors"
    model = make_seeing_model()
    checkpoint.save(path, model, make_header(model))
    return path


@pytest.fixture(scope="module")
def captioner(seeing_checkpoint):
    return Captioner.load(seeing_checkpoint, device="cpu")


# --------------------------------------------------------------------------------------------------
# the fits


def test_logistic_regression_finds_the_truth():
    chance = np.random.default_rng(0)
    x = chance.normal([3.0, -100.0, 0.0], [1.0, 20.0, 0.01], (20_000, 3))
    truth = np.array([0.5, 1.5, -0.03, 40.0])
    truth[0] -= truth[1] * 3.0 + truth[2] * -100.0
    p = 1 / (1 + np.exp(-(truth[0] + x @ truth[1:])))
    found = fit_logistic(x, (chance.random(len(p)) < p).astype(float))
    assert predict(found, x[0]) == pytest.approx(p[0], abs=0.02)
    np.testing.assert_allclose(found[1:], truth[1:], rtol=0.1)


def test_logistic_regression_takes_shares_for_targets():
    chance = np.random.default_rng(0)
    x = chance.normal(size=(5000, 2))
    p = 1 / (1 + np.exp(-(0.3 + x @ np.array([1.0, -2.0]))))
    np.testing.assert_allclose(fit_logistic(x, p), [0.3, 1.0, -2.0], atol=0.05)


def test_logistic_regression_is_at_its_minimum():
    """The gradient of the penalised cross-entropy is zero."""
    chance = np.random.default_rng(1)
    x, y = chance.normal(size=(300, 2)) * [1, 50] + [0, 7], chance.random(300)
    found = np.array(fit_logistic(x, y))
    p = 1 / (1 + np.exp(-(found[0] + x @ found[1:])))
    scale = x.std(0)
    penalty = 1e-3 * len(x) * found[1:] * scale
    gradient = ((x - x.mean(0)) / scale).T @ (p - y) + penalty
    assert abs((p - y).sum()) < 1e-2
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("y", [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
def test_logistic_regression_stays_finite(y):
    """Also of data that a line separates, and a number that never changes."""
    x = np.column_stack((np.arange(6.0), np.ones(6)))
    assert np.isfinite(fit_logistic(x, np.array(y, float))).all()


def test_counts_are_as_good_as_repetitions():
    chance = np.random.default_rng(2)
    x, y, counts = chance.normal(size=(60, 2)), chance.random(60), chance.integers(1, 4, 60)
    again = fit_logistic(np.repeat(x, counts, 0), np.repeat(y, counts))
    np.testing.assert_allclose(fit_logistic(x, y, counts), again, atol=5e-3)  # scales differ a little
    assert np.abs(np.subtract(fit_logistic(x, y), again)).max() > 0.02


def test_photos_of_a_small_set_count_for_several():
    samples = [Sample([0.0], 0.5, name) for name in ["large"] * 6 + ["small"] * 2 + ["blank"] * 4]
    assert balance(samples).tolist() == [1] * 6 + [3] * 2 + [1] * 4


def test_platt_scaling_undoes_what_was_done_to_the_probabilities():
    chance = np.random.default_rng(0)
    true = chance.uniform(0.02, 0.98, 30_000)
    odds = np.log(true / (1 - true))
    told = 1 / (1 + np.exp(-(2.0 * odds - 0.5)))  # too sure, and off
    right = (chance.random(len(true)) < true).astype(float)
    slope, intercept = fit_words(np.column_stack((told, right)))
    assert slope == pytest.approx(0.5, abs=0.03)
    assert intercept == pytest.approx(0.25, abs=0.03)
    scaled = Calibration((slope, intercept), (0.0,) * (len(FEATURES) + 1), np.zeros(1), np.ones((1, 1)), 1.0)
    again = np.array([scaled.word_confidence(p) for p in told])
    assert calibration_error(told, right) > 0.05
    assert calibration_error(again, right) < 0.01


def test_the_expected_calibration_error_by_hand():
    confidence = np.array([0.1, 0.1, 0.1, 0.1, 0.8, 0.8, 0.8, 0.8])
    right = np.array([0, 0, 0, 1, 1, 1, 0, 1.0])
    assert calibration_error(confidence, right, bins=2) == pytest.approx((0.15 + 0.05) / 2)
    assert calibration_error(np.array([0.5]), np.array([1.0])) == pytest.approx(0.5)


def test_the_error_that_chance_makes():
    chance = np.random.default_rng(0)
    confidence = chance.random(300)
    right = (chance.random((300, 300)) < confidence).astype(float)
    found = np.mean([calibration_error(confidence, r) for r in right])
    assert np.mean([chance_error(confidence, r) for r in right]) == pytest.approx(found, rel=0.05)


# --------------------------------------------------------------------------------------------------
# pictures of nothing


@pytest.mark.parametrize("kind", nothing.KINDS)
def test_pictures_of_nothing_are_pictures_and_the_same_every_time(kind):
    first, second = nothing.pictures(kind, 4), nothing.pictures(kind, 4)
    other = nothing.pictures(kind, 4, seed=1)
    for image in first:
        assert image.mode == "RGB"
        assert all(224 <= side < 520 for side in image.size)
    assert [i.tobytes() for i in first] == [i.tobytes() for i in second]
    assert [i.tobytes() for i in first] != [i.tobytes() for i in other]
    assert len({i.tobytes() for i in first}) == 4


# --------------------------------------------------------------------------------------------------
# from data to a calibrated checkpoint


def test_familiar_pictures_are_at_distance_one(captioner, shapes):
    mean, basis, residual = familiar(captioner, [shapes])
    space = Calibration((1.0, 0.0), (0.0,) * (len(FEATURES) + 1), mean, basis, residual)
    pooled = pool(captioner.encode_batch([shapes.store.read(p.file) for p in shapes.pictures]))
    known = np.array([space.familiarity(p) for p in pooled])
    np.testing.assert_allclose(pooled.mean(0), mean, atol=1e-5)
    np.testing.assert_allclose((known[:, :2] ** 2).mean(0), [1.0, 1.0], rtol=1e-3)
    # directions: uncorrelated, of variance 1
    along = (pooled - mean) @ basis
    np.testing.assert_allclose(along.T @ along / len(along), np.eye(along.shape[1]), atol=1e-3)
    strange = pool(captioner.encode_batch(nothing.pictures("noise", 4)))
    assert min(space.familiarity(p)[1] for p in strange) > known[:, 1].max()


def space_of(captioner, shapes):
    return Calibration((1.0, 0.0), (0.0,) * (len(FEATURES) + 1), *familiar(captioner, [shapes]))


def test_samples_of_photos_and_of_nothing(captioner, shapes):
    space = space_of(captioner, shapes)
    samples = photo_samples(captioner, space, shapes)
    assert len(samples) == 24
    assert {s.source for s in samples} == {"shapes"}
    assert all(len(s.features) == len(FEATURES) and np.isfinite(s.features).all() for s in samples)
    assert all(0 <= s.share <= 1 for s in samples)
    blanks = nothing_samples(captioner, space, "blank", seed=2)
    assert {s.share for s in blanks} == {0.0}
    assert {s.source for s in blanks} == {"blank"}


def test_pairs_hold_the_likeliest_word_of_every_place(captioner, shapes):
    pairs = word_pairs(captioner, shapes)
    known = captioner.model.tokenizer
    places = sum(len(known.encode(c)) + 1 for p in shapes.pictures for c in p.captions)
    assert pairs.shape == (places, 2)
    assert ((pairs[:, 0] > 0) & (pairs[:, 0] <= 1)).all()
    assert set(pairs[:, 1]) <= {0.0, 1.0}
    # of one caption, by the search that is made to say it: the likeliest alternative at each word
    colour, form, ground = "red", "circle", "white"
    text = captions(colour, form, ground)[1]
    one = type(shapes)("one", (type(shapes.pictures[0])(0, shapes.pictures[0].file, (text,)),), shapes.store)
    caption = captioner.caption(draw(colour, form, ground), prefix=text, max_length=len(text.split()))
    told = [word.alternatives[0].probability for word in caption.words]
    tops = word_pairs(captioner, one)[:-1, 0]
    # where the likeliest is a special token it is not among the alternatives
    same = np.isclose(tops, told, atol=1e-4)
    assert same.all() or (tops[~same] > np.array(told)[~same]).all()
    assert same.any()


def test_a_calibrated_checkpoint(tmp_path, seeing_checkpoint, shapes, monkeypatch):
    monkeypatch.setattr(calibration, "_NOTHING", 3)
    folder = write_shapes(tmp_path / "data")
    output = tmp_path / "calibrated.safetensors"
    lines = calibrate(make_config(), folder, seeing_checkpoint, output)
    assert len(lines) == 3 + len(nothing.KINDS)
    assert not any("nan" in line for line in lines[:2])
    before, after = (Captioner.load(path, device="cpu") for path in (seeing_checkpoint, output))
    assert read_header(seeing_checkpoint).calibration is None
    assert read_header(output).calibration is not None
    picture = draw("red", "circle", "white")
    plain, calibrated = before.caption(picture), after.caption(picture)
    assert plain.text == calibrated.text  # calibration never changes the search
    assert plain.score == calibrated.score
    assert [w.probability for w in plain.words] == [w.probability for w in calibrated.words]
    assert [w.confidence for w in plain.words] != [w.confidence for w in calibrated.words]
    assert 0 < calibrated.confidence < 1
    assert after.calibration is not None
    assert after.calibration.mean.shape == (1280,)


def test_the_fit_sees_even_ids_and_the_report_odd_ones(tmp_path, seeing_checkpoint, monkeypatch):
    """Captions of odd pictures change what is measured, and nothing of what is stored."""
    monkeypatch.setattr(calibration, "_NOTHING", 3)
    folder = write_shapes(tmp_path / "data")
    annotations = json.loads((folder / "shapes.json").read_text())
    found = {}
    for name, changed in (("as is", None), ("odd", 1), ("even", 0)):
        record = json.loads(json.dumps(annotations))
        for entry in record["annotations"]:
            if entry["image_id"] % 2 == changed:
                entry["caption"] = "man dog cat bicycle car tree street red blue black white"
        (folder / "changed.json").write_text(json.dumps(record))
        config = make_config(
            data={
                "sources": {"shapes": {"annotations": "shapes.json", "images": ["pictures"]}},
                "validation": {"shapes_val": {"annotations": "changed.json", "images": ["pictures"]}},
            }
        )
        output = tmp_path / f"{name}.safetensors"
        lines = calibrate(config, folder, seeing_checkpoint, output)
        stored = read_header(output).calibration
        found[name] = ((stored["caption"], stored["shown"], stored["word"]), lines[:2])
        assert "of pictures with odd ids" in lines[0]
        assert "on 12 pictures with odd ids" in lines[1]
    assert found["odd"][0] == found["as is"][0]
    assert found["odd"][1] != found["as is"][1]
    assert found["even"][0] != found["as is"][0]


def with_ids(folder, change):
    record = json.loads((folder / "shapes.json").read_text())
    for entry in record["images"]:
        entry["id"] = change(entry["id"])
    for entry in record["annotations"]:
        entry["image_id"] = change(entry["image_id"])
    (folder / "shapes.json").write_text(json.dumps(record))
    return folder


def test_ids_of_one_kind(tmp_path, seeing_checkpoint, monkeypatch):
    monkeypatch.setattr(calibration, "_NOTHING", 3)
    output = tmp_path / "out.safetensors"
    even = with_ids(write_shapes(tmp_path / "even"), lambda i: 2 * i)
    assert (
        "no validation picture has an odd id" in calibrate(make_config(), even, seeing_checkpoint, output)[0]
    )
    odd = with_ids(write_shapes(tmp_path / "odd"), lambda i: 2 * i + 1)
    with pytest.raises(DataError, match="0 of the validation pictures have even ids"):
        calibrate(make_config(), odd, seeing_checkpoint, output)


def test_pictures_of_nothing_are_trusted_less(tmp_path, seeing_checkpoint, captioner, monkeypatch):
    """With references that the model's captions do share words with."""
    monkeypatch.setattr(calibration, "_NOTHING", 6)
    folder = write_shapes(tmp_path / "data")
    data = json.loads((folder / "shapes.json").read_text())
    said = captioner.caption_batch([(folder / "pictures" / i["file_name"]) for i in data["images"]])
    data["annotations"] = [
        {"image_id": image["id"], "caption": caption.text}
        for image, caption in zip(data["images"], said, strict=True)
    ]
    data["annotations"][0]["caption"] = "zebra"
    (folder / "shapes.json").write_text(json.dumps(data))
    output = tmp_path / "calibrated.safetensors"
    calibrate(make_config(), folder, seeing_checkpoint, output)
    calibrated = Captioner.load(output, device="cpu")
    shapes = calibrated.caption_batch([(folder / "pictures" / i["file_name"]) for i in data["images"]])
    others = calibrated.caption_batch([p for k in nothing.KINDS for p in nothing.pictures(k, 3, seed=1)])
    assert np.mean([c.confidence for c in shapes]) > 0.6
    assert np.mean([c.confidence for c in others]) < 0.3


def test_too_few_pictures_are_an_error(tmp_path, seeing_checkpoint):
    folder = write_shapes(tmp_path, 19)
    with pytest.raises(DataError, match="fewer than 20"):
        calibrate(make_config(), folder, seeing_checkpoint, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_missing_model_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        calibrate(make_config(), write_shapes(tmp_path), tmp_path / "absent.safetensors", tmp_path / "out")
