"""Every shipped config is run, for a few steps, on a few tiny pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from captioner_training.config import TrainingConfig, _Loader
from captioner_training.loop import train
from clip_data import write_set
from shape_data import log_of

from captioner import Captioner

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SHAPES = {"annotations": "shapes.json", "images": ["pictures"], "only_highest": 4}


CLIPS = {"annotations": "clips.json", "only_highest": 3}


def made_small(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config over tiny data and an encoder without its weights; all else stays."""
    source = CLIPS if "video" in raw else SHAPES
    raw["data"] = {"sources": {"shapes": source}, "validation": {"shapes_val": source}}
    if "video" in raw:
        raw["video"]["frames"] = 3
    if "encoder" in raw:
        # the classifier that tells ImageNet's kinds of things needs its own weights
        known = raw.get("concepts", {}).get("imagenet", False)
        raw["encoder"].update(size=64, pretrained=known)
    raw.setdefault("tokenizer", {})["min_count"] = 1
    for stage in raw["stages"]:
        stage.update(epochs=1, sources={"shapes": 1}, batch_pictures=2)
    raw["search"].update(beam=1, max_length=6)
    raw["tensorboard"] = False
    return raw


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("clips"), 3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_trains(path, tmp_path, data, clips, quick):
    raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    config = TrainingConfig.model_validate(made_small(raw))
    best = train(config, clips if "video" in raw else data, tmp_path, processes=1)
    stages = [line["stage"] for line in log_of(tmp_path)]
    assert stages == [*(["start"] if config.start else []), *(stage.name for stage in config.stages)]
    captioner = Captioner.load(best, device="cpu")
    assert captioner.caption((data / "pictures" / "red-circle-white.png").read_bytes()).words is not None
    if "video" in raw:
        assert (
            captioner.caption_video(clips / "clips" / "0-red-left.avi").segments[0].caption.words is not None
        )
        assert captioner.header.frames == config.video.build()
    weights = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_says_how_to_use_it(path):
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("captioner train" in line or "captioner compare" in line for line in head), head
