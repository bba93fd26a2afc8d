"""What a config describes, loaded."""

import pytest
from captioner_training import experiment
from captioner_training.experiment import Experiment, build_encoder
from shape_data import make_config, same

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
