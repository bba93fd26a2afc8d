"""Evaluation: one caption for every picture, scored as the metrics score a file of results."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from captioner_training import evaluate as evaluation
from captioner_training.config import SourceConfig
from captioner_training.data import DataError, load_data_set
from captioner_training.evaluate import evaluate, generate
from captioner_training.features import FeatureCache
from captioner_training.metrics import ScoreError
from captioner_training.scoring import evaluate_files
from conftest import make_header, sharpen
from lively import make_calibration
from PIL import Image
from shape_data import (
    COMBINATIONS,
    QuickScorer,
    captions,
    make_seeing_model,
    plain_config,
    write_shapes,
)

from captioner import Captioner
from captioner.calibration import content_share
from captioner.model import CaptionModel
from captioner.search import SearchOptions
from captioner.tokenizer import BpeTokenizer, split_words

OPTIONS = SearchOptions(beam=2, max_length=8)


@pytest.fixture
def captioner():
    model = make_seeing_model()
    return Captioner(model, make_header(model))


@pytest.fixture
def quick(monkeypatch):
    """Keep what would be scored."""
    seen = []

    class Recorder(QuickScorer):
        def score(self, generated, **options):
            seen.append((dict(generated), dict(self.references)))
            return super().score(generated, **options)

    monkeypatch.setattr(evaluation, "Scorer", Recorder)
    return seen


def shapes(folder, **changes):
    source = SourceConfig(**{"annotations": "shapes.json", "images": ["pictures"], **changes})
    return load_data_set("shapes", source, folder)


def test_every_picture_gets_one_caption(tmp_path, captioner):
    data = shapes(write_shapes(tmp_path))
    found = generate(captioner.model, data, OPTIONS)
    assert list(found) == [p.id for p in data.pictures]
    direct = captioner.caption_batch(
        [data.store.read(p.file) for p in data.pictures], beam=2, max_length=8, length_penalty=0.7
    )
    assert list(found.values()) == [c.text for c in direct]
    assert len(set(found.values())) > 1


def test_cached_features_give_the_same_captions(tmp_path):
    model = make_seeing_model()
    data = shapes(write_shapes(tmp_path))
    cache = FeatureCache(tmp_path / "cache", data, model.encoder, flips=False).build()
    assert generate(model, data, OPTIONS, cache=cache) == generate(model, data, OPTIONS)


def test_the_model_and_the_threads_are_left_as_they_were(tmp_path):
    model = make_seeing_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    generate(model, shapes(write_shapes(tmp_path, 3)), OPTIONS)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.get_num_threads() == 1


def test_batches_do_not_matter(tmp_path, captioner, monkeypatch):
    data = shapes(write_shapes(tmp_path))
    found = generate(captioner.model, data, OPTIONS)
    monkeypatch.setattr(evaluation, "_BATCH", 5)
    assert generate(captioner.model, data, OPTIONS) == found


def test_an_unreadable_picture_is_named(tmp_path, captioner):
    folder = write_shapes(tmp_path, 4)
    (folder / "pictures" / "red-square-white.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"red-square-white\.png"):
        generate(captioner.model, shapes(folder), OPTIONS)


def test_scores_are_those_of_the_results_that_are_written(tmp_path, captioner):
    """With the real metrics."""
    folder = write_shapes(tmp_path / "a folder", 8)
    results = tmp_path / "the results.json"
    ((name, ours),) = evaluate(
        captioner, folder / "shapes.json", images=[folder / "pictures"], save_results=results, progress=False
    ).items()
    assert name == ours.name == "shapes"
    assert (ours.scores.images, ours.scores.missing) == (8, ())
    assert {*ours.scores.corpus} == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    theirs = evaluate_files(results, folder / "shapes.json", metrics=("BLEU", "ROUGE_L", "CIDEr"))
    assert theirs.scores.corpus == {k: v for k, v in ours.scores.corpus.items() if k != "METEOR"}
    assert theirs.scores.per_image == {k: v for k, v in ours.scores.per_image.items() if k != "METEOR"}
    assert theirs.scores.intervals == {k: v for k, v in ours.scores.intervals.items() if k != "METEOR"}
    assert theirs.measures == ours.measures
    assert theirs.warnings == ours.warnings
    entries = json.loads(results.read_text())
    assert [entry["image_id"] for entry in entries] == list(range(100, 108))
    assert all(entry.keys() == {"image_id", "caption"} for entry in entries)


def test_confidence_is_compared_with_the_share_of_right_words(tmp_path, quick):
    folder = write_shapes(tmp_path, 12)
    model = make_seeing_model()
    captioner = Captioner(model, make_header(model), make_calibration())
    (found,) = evaluate(
        captioner, folder / "shapes.json", images=[folder / "pictures"], progress=False
    ).values()
    data = shapes(folder, only_highest=12)
    said = captioner.caption_batch([data.store.read(p.file) for p in data.pictures])
    told = [caption.confidence for caption in said]
    right = [
        content_share([w.text for w in caption.words], [split_words(text) for text in picture.captions])
        for caption, picture in zip(said, data.pictures, strict=True)
    ]
    assert found.confidence["mean"] == pytest.approx(sum(told) / 12)
    assert found.confidence["content_share"] == pytest.approx(sum(right) / 12)
    # bins of equal size, worked out by hand: the two lowest, the next two, and then one by one
    order = sorted(range(12), key=told.__getitem__)
    bins = [order[0:2], order[2:4], *([i] for i in order[4:])]
    gaps = [abs(sum(told[i] - right[i] for i in part)) for part in bins]
    assert found.confidence["error"] == pytest.approx(sum(gaps) / 12)
    assert found.confidence["calibrated"] is True
    assert found.seconds_per_image > 0
    assert "calibration error" in found.format()
    assert "seconds a picture" in found.format()


def test_a_model_without_calibration_says_so(tmp_path, captioner, quick):
    folder = write_shapes(tmp_path, 3)
    (found,) = evaluate(captioner, folder / "shapes.json", images=[folder / "pictures"]).values()
    assert found.confidence["calibrated"] is False
    assert found.model == captioner.header.name
    assert "(the model has no calibration)" in found.format()


def prepared(folder, **info):
    """Write a folder as captioner prepare does."""
    write_shapes(folder, 12)
    data = json.loads((folder / "shapes.json").read_text())
    for split, images in (("train", data["images"][:6]), ("val", data["images"][6:])):
        ids = {image["id"] for image in images}
        record = {
            "info": {
                "description": "shapes",
                "split": split,
                "partial": False,
                "images": ["pictures"],
                **info,
            },
            "images": images,
            "annotations": [a for a in data["annotations"] if a["image_id"] in ids],
        }
        (folder / f"{split}.json").write_text(json.dumps(record))
    (folder / "shapes.json").unlink()
    return folder


def test_a_prepared_folder(tmp_path, captioner, quick):
    folder = prepared(tmp_path / "my data")
    (found,) = evaluate(captioner, folder).values()
    assert found.name == "val"
    assert [*quick[0][0]] == list(range(106, 112))
    assert found.measures["training_captions"] == 12  # train.json stands beside
    assert found.measures["novel"] == 1.0
    assert not found.scores.partial
    (found,) = evaluate(captioner, folder, split="train").values()
    assert [*quick[1][0]] == list(range(100, 106))
    assert found.measures["novel"] is None
    with pytest.raises(DataError, match=r"there is no test\.json in it \(train\.json, val\.json\)"):
        evaluate(captioner, folder, split="test")


def test_a_partial_set_says_so_beside_every_score(tmp_path, captioner, quick):
    (found,) = evaluate(captioner, prepared(tmp_path, partial=True, missing_pictures=7)).values()
    assert found.scores.partial
    assert found.to_dict()["partial"] is True
    assert any("partial" in warning and "7 pictures" in warning for warning in found.warnings)
    assert "CIDEr" in found.format()
    assert all(line.endswith("partial") for line in found.format().splitlines() if line.startswith("CIDEr"))


def test_novel_captions(tmp_path, captioner, quick):
    folder = write_shapes(tmp_path, 6)
    said = generate(captioner.model, shapes(folder), captioner.defaults)
    learned = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": f"{said[100].upper()}!"}]}
    (tmp_path / "learned.json").write_text(json.dumps(learned))
    (found,) = evaluate(
        captioner,
        folder / "shapes.json",
        images=[folder / "pictures"],
        training=[tmp_path / "learned.json"],
    ).values()
    same = sum(caption == said[100] for caption in said.values())
    assert found.measures["novel"] == pytest.approx(1 - same / 6)


def test_what_fails_fails_before_captions_are_made(tmp_path, captioner, quick, monkeypatch):
    folder = write_shapes(tmp_path, 3)
    monkeypatch.setattr(evaluation, "caption_data", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.setattr(evaluation, "spice_missing", lambda: "SPICE needs its models")
    for changes, message in (
        ({"spice": True}, "SPICE needs its models"),
        ({"training": [tmp_path / "absent.json"]}, r"absent\.json: cannot be read"),
        ({"save_results": tmp_path / "none" / "results.json"}, "there is no folder"),
        ({"options": {"beam": 0}}, "beam"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(captioner, folder / "shapes.json", images=[folder / "pictures"], **changes)


@pytest.mark.parametrize("tar", [False, True])
def test_pictures_are_found_beside_the_captions(tmp_path, captioner, quick, tar):
    folder = write_shapes(tmp_path, 6, tar=tar)
    if not tar:
        (folder / "pictures").rename(folder / "images")
    evaluate(captioner, folder / "shapes.json")
    assert len(quick[0][0]) == 6


def test_only_the_highest_ids(tmp_path, captioner, quick):
    folder = write_shapes(tmp_path)
    evaluate(captioner, folder / "shapes.json", images=[folder / "pictures"], highest=5)
    ((generated, references),) = quick
    assert list(generated) == list(references) == list(range(119, 124))


def test_paths_may_be_relative(tmp_path, captioner, quick, monkeypatch):
    write_shapes(tmp_path / "data", 4)
    monkeypatch.chdir(tmp_path)
    evaluate(captioner, Path("data/shapes.json"), images=[Path("data/pictures")])
    assert len(quick[0][0]) == 4


def test_options_reach_the_search(tmp_path, captioner, quick):
    folder = write_shapes(tmp_path, 4)
    evaluate(captioner, folder / "shapes.json", images=[folder / "pictures"], options={"max_length": 1})
    assert all(len(caption.split()) == 1 for caption in quick[0][0].values())
    with pytest.raises(ValueError, match="beam"):
        evaluate(captioner, folder / "shapes.json", images=[folder / "pictures"], options={"beam": 0})


def test_another_fit(tmp_path, quick):
    """Pictures that are not square, of which a crop loses the sides."""
    folder = write_shapes(tmp_path, 8)
    for path in (folder / "pictures").iterdir():
        wide = Image.new("RGB", (240, 96), "white")
        wide.paste(Image.open(path), (0, 0))
        wide.save(path)
    captions = {}
    for fit in (None, "squash", "crop", "letterbox"):
        model = make_seeing_model()
        captioner = Captioner(model, make_header(model))
        evaluate(captioner, folder / "shapes.json", images=[folder / "pictures"], fit=fit)
        captions[fit] = quick[-1][0]
    assert captions[None] == captions["squash"]
    assert captions["crop"] != captions["squash"]
    assert captions["letterbox"] != captions["squash"]


def test_the_validation_sets_of_a_config(tmp_path, captioner, quick):
    folder = write_shapes(tmp_path / "data", 10)
    plain = plain_config()
    plain["data"]["validation"]["few"] = {
        "annotations": "shapes.json",
        "images": ["pictures"],
        "only_highest": 3,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(plain))
    scores = evaluate(captioner, folder, config=config)
    assert {name: found.scores.images for name, found in scores.items()} == {"shapes_val": 10, "few": 3}
    # the config says what was learned, too
    assert {found.measures["training_captions"] for found in scores.values()} == {20}
    assert {found.measures["novel"] for found in scores.values()} == {1.0}
    with pytest.raises(DataError, match="--save-results"):
        evaluate(captioner, folder, config=config, save_results=tmp_path / "results.json")


def test_missing_captions_are_named(tmp_path, captioner):
    with pytest.raises(ScoreError, match=r"absent\.json"):
        evaluate(captioner, tmp_path / "absent.json")


def test_pieces_of_words_never_come_first(tmp_path):
    """The captions that are validated with are those that people will get."""
    pytest.importorskip("tokenizers")
    said = [c for combination in COMBINATIONS for c in captions(*combination)]
    seeing = make_seeing_model()
    tokenizer = BpeTokenizer.build(said, size=40)
    model = CaptionModel(seeing.encoder, replace(seeing.decoder.config), tokenizer).eval()
    sharpen(model.decoder)
    data = shapes(write_shapes(tmp_path, 12))
    found = generate(model, data, OPTIONS)
    captioner = Captioner(model, make_header(model))
    direct = captioner.caption_batch(
        [data.store.read(p.file) for p in data.pictures], beam=2, max_length=8, length_penalty=0.7
    )
    assert list(found.values()) == [c.text for c in direct]
