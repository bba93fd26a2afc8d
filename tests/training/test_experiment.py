"""What a config describes, loaded."""

import json

import pytest
import torch
from captioner_training import experiment
from captioner_training.config import ConfigError
from captioner_training.experiment import Experiment, build_encoder
from captioner_training.loop import train
from shape_data import log_of, make_config, same, write_shapes

from captioner.checkpoint import read_header
from captioner.encoder import Encoder


def test_the_vocabulary_comes_from_the_training_sources_alone(data, cache):
    shapes = {"annotations": "shapes.json", "images": ["pictures"]}
    config = make_config(
        data={
            "sources": {
                "shapes": {**shapes, "skip_highest": 18},
                "unused": shapes,
            },
            "validation": {"rest": {**shapes, "only_highest": 18}},
        }
    )
    found = Experiment(config, data, cache)
    assert set(found.sources) == {"shapes"}
    assert "red" in found.tokenizer.index
    assert "blue" not in found.tokenizer.index


def test_a_vocabulary_without_a_word_is_refused(data, cache):
    with pytest.raises(ConfigError, match=r"^tokenizer\.min_count is 100000: no word"):
        Experiment(make_config(tokenizer={"min_count": 100_000}), data, cache)


def test_the_encoder_is_prepared_as_the_config_says():
    assert build_encoder(make_config().encoder).preprocess.fit == "squash"
    cropped = build_encoder(
        make_config(encoder={"name": "efficientnet_lite0", "size": 96, "fit": "crop"}).encoder
    )
    assert (cropped.preprocess.size, cropped.preprocess.fit) == (96, "crop")
    assert cropped.grid == (3, 3)
    pretrained = Encoder("efficientnet_lite0", pretrained=True)
    assert same(cropped.network.state_dict(), pretrained.network.state_dict())
    assert (
        build_encoder(make_config(encoder={"name": "efficientnet_lite0"}).encoder).preprocess
        == pretrained.preprocess
    )


def test_a_crop_scales_with_the_size():
    """torchvision's networks take the centre of a picture that was resized to somewhat more."""
    usual = Encoder("resnet50").preprocess
    assert (usual.size, usual.resize) == (224, 232)
    config = make_config(encoder={"name": "resnet50", "size": 448})
    with pytest.MonkeyPatch.context() as patch:  # its weights are not here, and do not matter
        patch.setattr(
            experiment, "Encoder", lambda name, pretrained=False, **options: Encoder(name, **options)
        )
        preprocess = build_encoder(config.encoder).preprocess
    assert (preprocess.size, preprocess.fit, preprocess.resize) == (448, "crop", 464)


def test_data_that_is_only_partly_there_is_told(tmp_path, data, cache, quick):
    folder = write_shapes(tmp_path / "data")
    text = json.loads((folder / "shapes.json").read_text())
    (folder / "shapes.json").write_text(
        json.dumps({**text, "info": {"partial": True, "missing_pictures": 3}})
    )
    train(make_config(), folder, tmp_path / "run", cache_folder=cache, processes=1)
    assert log_of(tmp_path / "run")[0]["partial"] == ["shapes", "shapes_val"]
    assert read_header(tmp_path / "run" / "model.safetensors").summary["partial"] == ["shapes", "shapes_val"]
    train(make_config(), data, tmp_path / "whole", cache_folder=cache, processes=1)
    assert "partial" not in log_of(tmp_path / "whole")[0]


def test_pictures_that_stand_in_two_splits_are_told(data, cache):
    twice = Experiment(make_config(), data, cache)
    twice.prepare()
    assert any(note.startswith("24 pictures of shapes_val are also in shapes") for note in twice.notes)
    shapes = {"annotations": "shapes.json", "images": ["pictures"]}
    apart = Experiment(
        make_config(
            data={
                "sources": {"shapes": {**shapes, "skip_highest": 4}},
                "validation": {"rest": {**shapes, "only_highest": 4}},
            }
        ),
        data,
        cache,
    )
    apart.prepare()
    assert apart.notes == []


def test_word_vectors_begin_the_embeddings(tmp_path, cache):
    folder = write_shapes(tmp_path / "data")
    vector = torch.arange(24.0) - 11.5  # the file's mean is taken off: here it is 0
    lines = [f"{w} {' '.join(str(float(x)) for x in v)}" for w, v in (("red", vector), ("blue", -vector))]
    (folder / "vectors.txt").write_text("\n".join([*lines, "dog" + 24 * " 0.0"]))
    found = Experiment(make_config(word_vectors="vectors.txt"), folder, cache)
    plain = Experiment(make_config(), folder, cache)
    index = found.tokenizer.index
    rows, others = (e.model.decoder.embedding.weight for e in (found, plain))
    for word, sign in (("red", 1), ("blue", -1)):
        correlation = torch.corrcoef(torch.stack((rows[index[word]].detach(), vector)))[0, 1]
        assert float(correlation) == pytest.approx(sign, abs=1e-5)
    assert torch.equal(rows[index["cross"]], others[index["cross"]])
    assert any("vectors.txt has 2 of" in note for note in found.notes)
    with pytest.raises(ConfigError, match=r"word_vectors: .*nowhere\.txt"):
        Experiment(make_config(word_vectors="nowhere.txt"), folder, cache)
