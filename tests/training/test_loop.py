"""Training: it learns, resumes to the bit, leaves alone what is frozen, and keeps the best checkpoint."""

import contextlib
import errno
import multiprocessing
import os
import random
import time
from pathlib import Path

import psutil
import pytest
import torch
from captioner_training import experiment, loop, self_critical, state
from captioner_training.batches import make_parts
from captioner_training.config import ConfigError
from captioner_training.data import DataError, load_data_set
from captioner_training.loop import train
from captioner_training.metrics import Scores
from captioner_training.state import TrainingError
from captioner_training.workers import run_together
from shape_data import (
    COMBINATIONS,
    QuickScorer,
    captions,
    log_of,
    make_config,
    same,
    stage,
    state_of,
    write_shapes,
)

from captioner import Captioner, checkpoint
from captioner.checkpoint import read_header
from captioner.encoder import Encoder
from captioner.files import write_atomically

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


def train_quickly(data: Path, output: Path, cache: Path, processes: int) -> None:
    """Train in a process of its own, to be killed."""
    torch.set_num_threads(1)
    experiment.Scorer = QuickScorer
    loop.run_together = run_quickly_together
    train(make_config(**RESUMABLE), data, output, cache_folder=cache, processes=processes)


def run_quickly_together(work, count, *arguments):
    run_together(run_quickly, count, *arguments)


def run_quickly(*arguments):
    """Train in one of several processes."""
    torch.set_num_threads(1)
    experiment.Scorer = QuickScorer
    loop.run(*arguments)


def kill_all(process) -> None:
    """Kill a process and then those that it started: they may be in the midst of anything."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.mark.parametrize(("processes", "kills"), [(1, 5), (2, 3)])
def test_a_run_killed_at_any_time_ends_with_the_same_weights(tmp_path, data, cache, processes, kills):
    kill_and_compare(tmp_path, data, cache, processes, kills)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_twenty_times_ends_with_the_same_weights(tmp_path, data, cache, processes):
    kill_and_compare(tmp_path, data, cache, processes, kills=20)


def kill_and_compare(folder: Path, data: Path, cache: Path, processes: int, kills: int) -> None:
    """Bit for bit: weights, averages, optimiser, the log and the checkpoint."""
    context = multiprocessing.get_context("forkserver")  # a fresh process, with torch imported already
    context.set_forkserver_preload(["captioner_training.loop", "captioner_training.metrics"])

    def start(output: Path):
        process = context.Process(target=train_quickly, args=(data, output, cache, processes))
        process.start()
        return process

    def wait_for_a_save(output: Path, process) -> None:
        def saved() -> int:
            return path.stat().st_mtime_ns if path.exists() else 0

        path = output / "state.pt"
        before = saved()
        while process.is_alive() and saved() == before:
            time.sleep(0.002)

    process = start(folder / "whole")
    wait_for_a_save(folder / "whole", process)
    begun = time.monotonic()
    process.join()
    assert process.exitcode == 0
    # it saves three times in each of three epochs
    pause = (time.monotonic() - begun) / max(8, kills)

    chance, places, killed = random.Random(5), [], 0
    output = folder / "parts"
    while True:
        process = start(output)
        if killed < 2 * kills // 3:  # or it would never come to an end
            wait_for_a_save(output, process)
            time.sleep(chance.uniform(0, pause))
        elif killed < kills:  # before it has saved anything: twice from the same place
            time.sleep(chance.uniform(0, 2 * pause))
        if killed < kills and process.is_alive():
            kill_all(process)
            process.join()
        else:
            process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        killed += 1
        progress = state_of(output)["progress"]  # whole, whenever it was killed
        places.append((progress["stage"], progress["epoch"], progress["step"]))
    assert killed >= min(kills, 3)
    assert any(step for _, _, step in places)  # in the midst of an epoch
    assert same(state_of(output), state_of(folder / "whole"))
    best = [(folder / name / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert best[0] == best[1]
    assert [path.name for path in output.glob(".*")] in ([], [".lock"])  # no half-written files stay
    logs = [[{**line, "minutes": 0} for line in log_of(folder / name)] for name in ("parts", "whole")]
    assert logs[0] == logs[1]
    assert [(line["stage"], line["epoch"]) for line in logs[0]] == [("first", 1), ("first", 2), ("second", 1)]


class FullDisk:
    """Stands in for writing: the disk is full after some files."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path: Path, content: bytes) -> None:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= 1
        write_atomically(path, content)


def test_a_full_disk_leaves_the_last_good_state(tmp_path, data, cache, quick, monkeypatch):
    def run(output):
        train(make_config(**RESUMABLE), data, output, cache_folder=cache, processes=1)

    run(tmp_path / "whole")
    monkeypatch.setattr(state, "write_atomically", FullDisk(4))
    with pytest.raises(TrainingError, match=r"state\.pt: the state cannot be saved: No space left") as caught:
        run(tmp_path / "full")
    assert "\n" not in str(caught.value)
    kept = state_of(tmp_path / "full")["progress"]
    assert (kept["stage"], kept["epoch"], kept["step"]) == (0, 1, 20)
    monkeypatch.undo()
    monkeypatch.setattr(experiment, "Scorer", QuickScorer)
    run(tmp_path / "full")
    assert same(state_of(tmp_path / "full"), state_of(tmp_path / "whole"))


def test_a_loss_that_is_no_number_stops_training_and_keeps_the_last_state(
    tmp_path, data, cache, quick, monkeypatch
):
    real, calls = loop.caption_loss, []

    def spoilt(*arguments, **options):
        calls.append(1)
        return real(*arguments, **options) * (float("nan") if len(calls) == 60 else 1.0)

    monkeypatch.setattr(loop, "caption_loss", spoilt)
    where = r"the loss is nan at stage 'first', epoch 2, batch 12: .* last good state is in"
    with pytest.raises(TrainingError, match=where) as caught:
        train(make_config(**RESUMABLE), data, tmp_path, cache_folder=cache, processes=1)
    assert "\n" not in str(caught.value)
    kept = state_of(tmp_path)
    assert (kept["progress"]["epoch"], kept["progress"]["step"]) == (1, 0)
    assert all(t.isfinite().all() for t in kept["model"].values())


def test_data_that_changed_is_not_trained_on_as_if_nothing_had_happened(tmp_path, cache, quick):
    folder = write_shapes(tmp_path / "data")
    train(make_config(), folder, tmp_path / "run", cache_folder=cache, processes=1)
    text = (folder / "shapes.json").read_text()
    (folder / "shapes.json").write_text(text.replace("a red circle", "a round circle"))
    with pytest.raises(ConfigError, match=r"state\.pt is of other data: .* vocabulary have changed"):
        train(make_config(), folder, tmp_path / "run", cache_folder=cache, processes=1)


def test_a_damaged_state_is_a_mistake_in_one_line(tmp_path, data, cache, quick):
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(ConfigError, match=r"state\.pt: not a state that can be resumed") as caught:
        train(make_config(), data, tmp_path, cache_folder=cache, processes=1)
    assert "\n" not in str(caught.value)


def test_a_best_checkpoint_that_is_gone_is_told(tmp_path, data, cache, quick):
    train(make_config(), data, tmp_path, cache_folder=cache, processes=1)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"model\.safetensors: the best checkpoint of this run is gone"):
        train(make_config(), data, tmp_path, cache_folder=cache, processes=1)


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


def test_several_processes_on_one_gpu_are_a_mistake(tmp_path, data, monkeypatch):
    monkeypatch.setattr(loop, "choose_device", lambda device: device)
    with pytest.raises(ValueError, match=r"cuda: leave --processes out, or .* accelerate launch"):
        train(make_config(), data, tmp_path, device="cuda", processes=2)


def test_a_state_that_only_another_machine_sees_is_a_mistake(tmp_path, data, monkeypatch):
    monkeypatch.setattr(loop.Workers, "any", lambda self, condition: True)
    with pytest.raises(TrainingError, match=r"state\.pt: another process found a state .* machines share"):
        train(make_config(), data, tmp_path, processes=1)


# --------------------------------------------------------------------------------------------------
# ways of training


def trained(output: Path, data: Path, caches: Path, /, *stages, **changes) -> list[dict]:
    """Train, and return the log."""
    train(make_config(list(stages) or None, **changes), data, output, cache_folder=caches, processes=1)
    return log_of(output)


STEADY = {"hidden": 24, "embedding": 16, "cells": 16, "attention_width": 8, "dropout": 0.0}


def test_a_batch_computed_in_parts_gives_the_same_weights(tmp_path, data, cache, quick):
    states = []
    for parts in (1, 3):
        output = tmp_path / str(parts)
        trained(output, data, cache, stage(accumulate=parts, learning_rate=1e-3), decoder=STEADY)
        states.append(state_of(output)["model"])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_without_a_cache_the_same_is_learned(tmp_path, data, cache, quick):
    logs = [
        trained(tmp_path / str(kept), data, tmp_path / "caches", cache=kept, decoder=STEADY)
        for kept in (True, False)
    ]
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-3)  # the cache holds 16 bits
    assert {path.name.split("-")[0] for path in (tmp_path / "caches").iterdir()} == {"shapes", "shapes_val"}


def test_crops_are_shown(tmp_path, data, cache, quick):
    plain = trained(tmp_path / "plain", data, cache, decoder=STEADY)
    cropped = trained(tmp_path / "crops", data, tmp_path / "cache", decoder=STEADY, crops=2)
    assert cropped[0]["loss"] != plain[0]["loss"]
    assert cropped[0]["loss"] == pytest.approx(plain[0]["loss"], abs=0.3)


def test_mixed_precision_trains_almost_as_well(tmp_path, data, cache, quick):
    stages = [stage(sources={"shapes": 4}), stage(name="second", trainable_blocks=1)]
    full = trained(tmp_path / "full", data, cache, *stages, decoder=STEADY)
    half = trained(tmp_path / "half", data, cache, *stages, decoder=STEADY, mixed_precision="bf16")
    for a, b in zip(full, half, strict=True):
        assert a["loss"] != b["loss"]
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03)
    assert {t.dtype for t in state_of(tmp_path / "half")["model"].values()} <= {torch.float32, torch.int64}


def test_scheduled_sampling_makes_the_task_harder(tmp_path, data, cache, quick):
    """Only towards the end of the stage: at its beginning the probability is 0."""
    usual = {"sources": {"shapes": 24}, "epochs": 2, "learning_rate": 8e-3, "schedule": "constant"}
    decoder = BY_HEART["decoder"]
    sampled = trained(
        tmp_path / "sampled", data, cache, stage(**usual, scheduled_sampling=1.0), decoder=decoder
    )
    plain = trained(tmp_path / "plain", data, cache, stage(**usual), decoder=decoder)
    assert sampled[1]["loss"] > plain[1]["loss"] + 0.05
    assert sampled[1]["loss"] - plain[1]["loss"] > sampled[0]["loss"] - plain[0]["loss"]


def test_layer_normalisation_trains(tmp_path, data, cache, quick):
    log = trained(
        tmp_path,
        data,
        cache,
        stage(sources={"shapes": 16}, epochs=2, learning_rate=8e-3),
        decoder={**STEADY, "layer_norm": True},
    )
    assert log[1]["loss"] < log[0]["loss"]
    captioner = Captioner.load(tmp_path / "model.safetensors", device="cpu")
    assert captioner.model.decoder.config.layer_norm


def test_values_of_the_gradient_are_clipped(tmp_path, data, cache, quick):
    log = trained(tmp_path, data, cache, stage(clip_value=1e-6))
    count = sum(t.numel() for n, t in state_of(tmp_path)["model"].items() if n.startswith("decoder"))
    assert 0 < log[0]["gradient_norm"] <= 1e-6 * count**0.5


def test_training_stops_early_when_captions_get_no_better(tmp_path, data, cache, monkeypatch):
    told = iter([0.5, 0.7, 0.6, 0.7, 0.1, 0.2])

    class Scripted(QuickScorer):
        def score(self, generated, **options):
            return Scores({"CIDEr": next(told)}, {}, len(generated), len(generated))

    monkeypatch.setattr(experiment, "Scorer", Scripted)
    config = make_config([stage(epochs=10, patience=2), stage(name="second", epochs=2)])
    train(config, data, tmp_path, cache_folder=cache, processes=1)
    places = [(line["stage"], line["epoch"]) for line in log_of(tmp_path)]
    assert places == [*(("first", n) for n in (1, 2, 3, 4)), ("second", 1), ("second", 2)]
    assert read_header(tmp_path / "model.safetensors").summary["epoch"] == 2
    train(config, data, tmp_path, cache_folder=cache, processes=1)  # and is not taken up again
    assert len(log_of(tmp_path)) == 6


def test_epochs_are_averaged_and_the_mean_is_kept(tmp_path, data, cache, quick):
    trained(
        tmp_path,
        data,
        cache,
        stage(sources={"shapes": 8}, epochs=3, average=0.0, average_epochs=2, learning_rate=8e-3),
    )
    saved = state_of(tmp_path)
    assert len(saved["average"]["ends"]) == 2
    assert saved["average"]["values"] == []


def test_tensorboard_tells_losses_scores_and_pictures(tmp_path, data, cache, quick):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, data, cache, stage(epochs=2), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/gradient_norm", "train/learning_rate", "CIDEr/shapes_val"} <= set(
        tags["scalars"]
    )
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    mean = sum(e.value for e in events.Scalars("train/loss")[:3]) / 3
    assert mean == pytest.approx(log_of(tmp_path)[0]["loss"], abs=1e-5)
    assert len(tags["images"]) == 4


def test_a_trained_captioner_goes_on_with_new_words(tmp_path, data, learned, quick, capsys):
    folder = write_shapes(tmp_path / "data")
    text = (folder / "shapes.json").read_text()
    (folder / "shapes.json").write_text(text.replace(" circle on", " roundel on"))
    config = make_config(
        [stage(sources={"shapes": 32}, epochs=2, learning_rate=8e-3)],
        encoder=None,
        decoder=None,
        start={"model": str(learned / "model.safetensors"), "dropout": 0.0},
    )
    train(config, folder, tmp_path / "run", cache_folder=tmp_path / "cache", processes=1)
    told = capsys.readouterr().err
    assert "1 new word: roundel" in told
    log = log_of(tmp_path / "run")
    assert [(line["stage"], line["epoch"]) for line in log] == [("start", 0), ("first", 1), ("first", 2)]
    assert log[0]["best"] <= 18 / 24  # it says circle
    assert log[-1]["best"] > 0.8
    old, new = (read_header(path / "model.safetensors") for path in (learned, tmp_path / "run"))
    assert new.tokenizer["vocabulary"][: len(old.tokenizer["vocabulary"])] == old.tokenizer["vocabulary"]
    assert new.summary["started_from"]["name"] == "shapes"
    assert new.summary["encoder_weights"] == old.summary["encoder_weights"]
    captioner = Captioner.load(tmp_path / "run" / "model.safetensors", device="cpu")
    said = captioner.caption((folder / "pictures" / "red-circle-white.png").read_bytes()).text
    assert "roundel" in said


def test_what_it_started_from_is_kept_if_nothing_better_comes(tmp_path, data, cache, learned, monkeypatch):
    told = iter([0.9, 0.5])

    class Scripted(QuickScorer):
        def score(self, generated, **options):
            return Scores({"CIDEr": next(told)}, {}, len(generated), len(generated))

    monkeypatch.setattr(experiment, "Scorer", Scripted)
    start = {"model": str(learned / "model.safetensors")}
    trained(tmp_path, data, cache, stage(), encoder=None, decoder=None, start=start)
    assert read_header(tmp_path / "model.safetensors").summary["stage"] == "start"


def test_self_critical_training_raises_the_reward(tmp_path, data, learned, quick):
    start = {"model": str(learned / "model.safetensors"), "new_words": False}
    log = trained(
        tmp_path / "run",
        data,
        tmp_path / "cache",
        stage(objective="self_critical", sources={"shapes": 8}, epochs=3, learning_rate=2e-3),
        encoder=None,
        decoder=None,
        start=start,
    )
    rewards = [line["reward"] for line in log[1:]]
    assert "loss" not in log[1]
    assert rewards[-1] > rewards[0] > 0


def test_cross_entropy_is_mixed_into_self_critical_training(tmp_path, data, cache, learned, quick):
    start = {"model": str(learned / "model.safetensors"), "new_words": False, "dropout": 0.0}

    def loss(**changes):
        config = make_config([stage(**changes)], encoder=None, decoder=None, start=start, flips=False)
        loaded = experiment.Experiment(config, data, cache)
        chosen = config.stages[0]
        features = loaded.features(chosen)
        places = [("shapes", i) for i in range(8)]
        (batch,) = make_parts(places, loaded.targets, features, chosen, "one", flips=False)
        torch.manual_seed(1)
        return loop.objective(loaded, chosen, (1280, 2, 2))(batch, 0.0)[0].item()

    plain = loss(objective="self_critical")
    mixed = loss(objective="self_critical", cross_entropy=0.5)
    assert mixed - plain == pytest.approx(0.5 * loss(), rel=1e-4)


def test_captions_are_drawn_without_dropout(tmp_path, data, cache, learned, quick, monkeypatch):
    seen, real = [], self_critical.sample

    def watched(model, memory, **options):
        seen.append((model.decoder.memory, memory))
        return real(model, memory, **options)

    monkeypatch.setattr(self_critical, "sample", watched)
    trained(
        tmp_path,
        data,
        cache,
        stage(objective="self_critical", trainable_blocks=1),
        encoder=None,
        decoder=None,
        start={"model": str(learned / "model.safetensors"), "new_words": False, "dropout": 0.9},
        flips=False,
    )
    # with dropout nine tenths of the cells' numbers would be 0
    share = [float((memory.cells == 0).float().mean()) for _, memory in seen]
    assert len(share) == 3
    assert max(share) < 0.85


def test_two_runs_do_not_share_a_folder(tmp_path, data, cache, quick, monkeypatch):
    monkeypatch.setattr(state, "_PATIENCE", 0.1)
    with (
        state.alone_in(tmp_path),
        pytest.raises(TrainingError, match=r"another run is training there; choose another --output"),
    ):
        train(make_config(), data, tmp_path, cache_folder=cache, processes=1)
    (tmp_path / ".state.pt.abcd1234").write_bytes(b"half")
    train(make_config(), data, tmp_path, cache_folder=cache, processes=1)
    assert not (tmp_path / ".state.pt.abcd1234").exists()


def test_with_patience_the_next_stage_goes_on_from_the_best_weights(tmp_path, data, cache, monkeypatch):
    def scripted(values):
        told = iter(values)

        class Scripted(QuickScorer):
            def score(self, generated, **options):
                return Scores({"CIDEr": next(told)}, {}, len(generated), len(generated))

        monkeypatch.setattr(experiment, "Scorer", Scripted)

    # the second stage changes next to nothing: its weights tell where it began
    still = stage(name="second", learning_rate=1e-12, weight_decay=0.0, average=0.0)
    scripted([0.9, 0.5, 0.5, 0.1])
    moving = stage(sources={"shapes": 8}, epochs=3, patience=2, learning_rate=2e-2, schedule="constant")
    trained(tmp_path / "patient", data, cache, moving, still, decoder=STEADY)
    best = checkpoint.load(tmp_path / "patient" / "model.safetensors").model.state_dict()
    ended = state_of(tmp_path / "patient")["model"]
    for name, tensor in best.items():  # stored in 16 bits
        torch.testing.assert_close(tensor, ended[name], rtol=2e-3, atol=2e-3, msg=name)
