"""Training: it learns, resumes to the bit, leaves alone what is frozen, and keeps the best checkpoint."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from captioner_training import experiment
from captioner_training.config import ConfigError
from captioner_training.data import DataError, load_data_set
from captioner_training.loop import train
from captioner_training.metrics import Scores
from shape_data import COMBINATIONS, QuickScorer, captions, log_of, make_config, same, stage, state_of

from captioner import Captioner
from captioner.checkpoint import read_header
from captioner.encoder import Encoder

# --------------------------------------------------------------------------------------------------
# learning

BY_HEART = {
    "stages": [
        stage(sources={"shapes": 32}, epochs=4, learning_rate=8e-3),
        stage(name="second", sources={"shapes": 4}, learning_rate=1e-3, trainable_blocks=2),
    ],
    "decoder": {"hidden": 48, "embedding": 48, "cells": 128, "attention_width": 16, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory, data, cache) -> Path:
    """Train until the shapes are known by heart."""
    output = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "Scorer", QuickScorer)
        best = train(make_config(**BY_HEART), data, output, cache_folder=cache, processes=1)
    assert best == output / "model.safetensors"
    return output


def test_the_loss_falls(learned):
    losses = [line["loss"] for line in log_of(learned)]
    assert len(losses) == 5
    assert losses[0] > losses[1] > losses[3]
    assert losses[4] < 0.5 * losses[0]


def test_what_was_learned_by_heart_is_said(learned, data):
    captioner = Captioner.load(learned / "model.safetensors", device="cpu")
    source = make_config().data.sources["shapes"]
    pictures = load_data_set("shapes", source, data)
    found = captioner.caption_batch([pictures.store.read(p.file) for p in pictures.pictures])
    right = [c.text in captions(*shape) for c, shape in zip(found, COMBINATIONS, strict=True)]
    assert sum(right) >= 22, [c.text for c in found]
    assert all(c.finished for c in found)
    assert max(line["best"] for line in log_of(learned)) >= 22 / 24


def test_the_checkpoint_tells_where_it_comes_from(learned):
    header = read_header(learned / "model.safetensors")
    assert header.name == "shapes"
    assert header.encoder == "efficientnet_lite0"
    assert header.preprocess.size == 64
    assert header.search["beam"] == 1
    summary = header.summary
    assert summary["data"] == {"shapes": {"pictures": 24, "captions": 48, "note": ""}}
    assert summary["scores"].keys() == {"shapes_val"}
    assert summary["config"] == "shapes"
    assert "Apache-2.0" in summary["encoder_weights"]


def test_the_log_has_a_line_for_each_epoch(learned):
    lines = log_of(learned)
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        *(("first", n) for n in (1, 2, 3, 4)),
        ("second", 1),
    ]
    assert all(line["validation"]["shapes_val"].keys() == {"CIDEr"} for line in lines)


def test_a_finished_run_does_nothing_more(learned, data, cache, quick):
    before = {path: path.read_bytes() for path in learned.iterdir() if path.is_file()}
    train(make_config(**BY_HEART), data, learned, cache_folder=cache, processes=1)
    assert {path: path.read_bytes() for path in learned.iterdir() if path.is_file()} == before


# --------------------------------------------------------------------------------------------------
# what fine-tuning may touch


def test_fine_tuning_changes_the_chosen_blocks_and_no_statistics(learned):
    pretrained = Encoder("efficientnet_lite0", pretrained=True).state_dict()
    trained = {
        k.removeprefix("encoder."): v for k, v in state_of(learned)["model"].items() if "encoder." in k
    }
    assert trained.keys() == pretrained.keys()
    blocks = len(Encoder("efficientnet_lite0").network)
    for name, tensor in trained.items():
        block = int(name.split(".")[1])
        is_statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        if block < blocks - 2 or is_statistic:
            assert torch.equal(tensor, pretrained[name]), name
        else:
            assert not torch.equal(tensor, pretrained[name]), name


def test_a_frozen_encoder_stays_as_it_was(tmp_path, data, cache, quick):
    train(make_config(), data, tmp_path, cache_folder=cache, processes=1)
    pretrained = Encoder("efficientnet_lite0", pretrained=True).state_dict()
    trained = state_of(tmp_path)["model"]
    assert all(torch.equal(trained[f"encoder.{name}"], tensor) for name, tensor in pretrained.items())


@pytest.mark.parametrize("blocks", [18, 100])
def test_the_first_block_cannot_be_trained(tmp_path, data, blocks):
    config = make_config([stage(trainable_blocks=blocks)])
    with pytest.raises(ConfigError, match=rf"^stages\.0\.trainable_blocks is {blocks}: .* has 18 blocks"):
        train(config, data, tmp_path, processes=1)


# --------------------------------------------------------------------------------------------------
# the best checkpoint


def test_the_best_checkpoint_is_chosen_by_generated_captions(tmp_path, data, cache, monkeypatch):
    """Not by the loss, which falls to the end."""
    told, seen = iter([0.2, 0.9, 0.4, 0.9]), []

    class Scripted(QuickScorer):
        def score(self, generated, **options):
            assert "CIDEr" in options["metrics"]
            seen.append(dict(generated))
            return Scores({"CIDEr": next(told)}, {}, len(generated), len(generated))

    monkeypatch.setattr(experiment, "Scorer", Scripted)
    config = make_config([stage(sources={"shapes": 12}, epochs=4, learning_rate=8e-3)])
    train(config, data, tmp_path, cache_folder=cache, processes=1)
    lines = log_of(tmp_path)
    assert [line["best"] for line in lines] == [0.2, 0.9, 0.9, 0.9]
    assert lines[3]["loss"] < lines[1]["loss"]
    summary = read_header(tmp_path / "model.safetensors").summary
    assert summary["epoch"] == 2
    assert summary["scores"] == {"shapes_val": {"CIDEr": 0.9}}
    # what was scored is what the checkpoint says, of every validation picture
    captioner = Captioner.load(tmp_path / "model.safetensors", device="cpu")
    pictures = load_data_set("shapes", config.data.validation["shapes_val"], data)
    found = captioner.caption_batch([pictures.store.read(p.file) for p in pictures.pictures])
    assert {p.id: c.text for p, c in zip(pictures.pictures, found, strict=True)} == seen[1]
    assert seen[1] != seen[3]


def test_several_validation_sets_count_alike(tmp_path, data, cache, monkeypatch):
    class ByName(QuickScorer):
        def score(self, generated, **options):
            value = 0.25 if len(generated) == 4 else 0.75
            return Scores({"CIDEr": value}, {}, len(generated), len(generated))

    monkeypatch.setattr(experiment, "Scorer", ByName)
    few = {"annotations": "shapes.json", "images": ["pictures"], "only_highest": 4}
    many = {"annotations": "shapes.json", "images": ["pictures"], "skip_highest": 4}
    config = make_config(data={"sources": {"shapes": many}, "validation": {"few": few, "many": many}})
    train(config, data, tmp_path, cache_folder=cache, processes=1)
    assert log_of(tmp_path)[0]["best"] == 0.5


# --------------------------------------------------------------------------------------------------
# resuming

RESUMABLE = {
    "stages": [
        stage(sources={"shapes": 2}, epochs=2, batch_pictures=1),
        stage(name="second", sources={"shapes": 2}, batch_pictures=1, trainable_blocks=1),
    ],
    "save_minutes": 1e-6,
}


def train_quickly(data: Path, output: Path, cache: Path) -> None:
    """Train in a process of its own, to be killed."""
    torch.set_num_threads(1)
    experiment.Scorer = QuickScorer
    train(make_config(**RESUMABLE), data, output, cache_folder=cache, processes=1)


def test_a_run_killed_at_any_time_ends_with_the_same_weights(tmp_path, data, cache):
    """Bit for bit: weights, averages, optimiser, random numbers and the checkpoint."""
    context = multiprocessing.get_context("forkserver")  # a fresh process, with torch imported already
    context.set_forkserver_preload(["captioner_training.loop", "captioner_training.metrics"])

    def start(output: Path):
        process = context.Process(target=train_quickly, args=(data, output, cache))
        process.start()
        return process

    def wait_for_a_save(output: Path, process) -> None:
        def saved() -> int:
            return path.stat().st_mtime_ns if path.exists() else 0

        path = output / "state.pt"
        before = saved()
        while process.is_alive() and saved() == before:
            time.sleep(0.002)

    process = start(tmp_path / "whole")
    wait_for_a_save(tmp_path / "whole", process)
    begun = time.monotonic()
    process.join()
    assert process.exitcode == 0
    pause = (time.monotonic() - begun) / 8  # it saves three times in each of three epochs

    chance, places, killed = random.Random(5), set(), 0
    output = tmp_path / "parts"
    while True:
        process = start(output)
        wait_for_a_save(output, process)  # or it would never come to an end
        if killed < 5:
            time.sleep(chance.uniform(0, pause))
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        killed += 1
        progress = state_of(output)["progress"]  # whole, whenever it was killed
        places.add((progress["stage"], progress["epoch"], progress["step"]))
    assert killed >= 3
    assert len(places) == killed
    assert any(step for _, _, step in places)  # in the midst of an epoch
    assert same(state_of(output), state_of(tmp_path / "whole"))
    best = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert best[0] == best[1]
    assert not list(output.glob(".*"))[killed:]  # no more than a half-written file for each kill
    stages = [(line["stage"], line["epoch"]) for line in log_of(output)]
    assert list(dict.fromkeys(stages)) == [("first", 1), ("first", 2), ("second", 1)]


def test_a_state_of_another_config_is_a_mistake_in_one_line(tmp_path, data, cache, quick):
    train(make_config(), data, tmp_path, cache_folder=cache, processes=1)
    other = make_config(decoder={"hidden": 32, "embedding": 24, "cells": 32, "attention_width": 16})
    with pytest.raises(
        ConfigError, match=r"state\.pt is of another config \(.*decoder\.hidden was 48, is 32\): .*--output"
    ) as caught:
        train(other, data, tmp_path, cache_folder=cache, processes=1)
    assert "\n" not in str(caught.value)


def test_missing_data_is_told_before_anything_is_computed(tmp_path):
    with pytest.raises((DataError, ValueError), match=r"shapes\.json"):
        train(make_config(), tmp_path, tmp_path / "output", processes=1)


def test_a_device_that_is_not_there_is_a_mistake(tmp_path, data):
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=device):
            train(make_config(), data, tmp_path, device=device, processes=1)
