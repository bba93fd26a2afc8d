"""Evaluation: one caption for every picture, scored as the metrics score a file of results."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from captioner_training import evaluate as evaluation
from captioner_training.config import SourceConfig
from captioner_training.data import DataError, load_data_set
from captioner_training.evaluate import evaluate, generate
from captioner_training.features import FeatureCache
from captioner_training.metrics import ScoreError, Scores, evaluate_files
from conftest import make_header
from PIL import Image
from shape_data import QuickScorer, make_seeing_model, plain_config, write_shapes

from captioner import Captioner
from captioner.search import SearchOptions

OPTIONS = SearchOptions(beam=2, max_length=8)


@pytest.fixture
def captioner():
    model = make_seeing_model()
    return Captioner(model, make_header(model))


@pytest.fixture
def quick(monkeypatch):
    """Keep what would be scored."""
    seen = []

    def score(generated, references):
        seen.append((dict(generated), dict(references)))
        return Scores(QuickScorer(references).score(generated).corpus, {}, len(generated), len(references))

    monkeypatch.setattr(evaluation, "score", score)
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
    folder = write_shapes(tmp_path, 8)
    results = tmp_path / "results.json"
    (name, scores), *others = evaluate(
        captioner, folder / "shapes.json", images=[folder / "pictures"], save_results=results
    ).items()
    assert name == "shapes"
    assert not others
    assert scores.images == 8
    assert {*scores.corpus} == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    quick_ones = ("BLEU", "ROUGE_L", "CIDEr")
    again = evaluate_files(results, folder / "shapes.json", metrics=quick_ones, intervals=False)
    assert again.corpus.items() <= scores.corpus.items()
    entries = json.loads(results.read_text())
    assert [entry["image_id"] for entry in entries] == list(range(100, 108))


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
    assert {name: s.images for name, s in scores.items()} == {"shapes_val": 10, "few": 3}
    with pytest.raises(DataError, match="--save-results"):
        evaluate(captioner, folder, config=config, save_results=tmp_path / "results.json")


def test_missing_captions_are_named(tmp_path, captioner):
    with pytest.raises(ScoreError, match=r"absent\.json"):
        evaluate(captioner, tmp_path / "absent.json")
