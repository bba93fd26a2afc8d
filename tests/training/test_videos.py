"""Clips from their files to a captioner: features, batches, training, evaluation."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from captioner_training import evaluate as evaluation
from captioner_training import features, loop, tracking
from captioner_training.batches import make_parts
from captioner_training.calibrate import familiar, photo_samples, word_pairs
from captioner_training.compare import take_part
from captioner_training.config import ConfigError, SourceConfig, TrainingConfig
from captioner_training.data import DataError, DataSet, load_data_set
from captioner_training.evaluate import caption_data, evaluate, generate
from captioner_training.experiment import Experiment
from captioner_training.features import (
    FeatureCache,
    LivePictures,
    fingerprint,
    load_pixels,
    look_at,
    same_pictures,
)
from captioner_training.loop import objective, train
from captioner_training.trust import measure
from clip_data import (
    SHORT,
    WAYS,
    draw_frames,
    write_clip,
    write_msrvtt,
    write_msvd,
    write_set,
    write_truncated,
)
from conftest import make_header
from PIL import Image
from shape_data import QuickScorer, log_of, make_seeing_model, plain_config, same, stage, state_of, write_tar
from test_features import close, differ, make_encoder
from typer.testing import CliRunner

from captioner import Captioner, checkpoint, video
from captioner.calibration import FEATURES, Calibration
from captioner.cli import app
from captioner.encoder import encode
from captioner.frame_encoder import FrameConfig
from captioner.images import load
from captioner.model import CaptionModel
from captioner.search import SearchOptions


def load_clips(folder: Path, **changes: Any) -> DataSet:
    return load_data_set("clips", SourceConfig(annotations="clips.json", **changes), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def clips(folder) -> DataSet:
    return load_clips(folder)


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


# --------------------------------------------------------------------------------------------------
# features


@torch.inference_mode()
def test_the_cache_holds_what_the_encoder_gives_of_each_frame(tmp_path, clips):
    encoder = make_seeing_model().encoder
    cache = FeatureCache(tmp_path, clips, encoder, flips=True, frames=5).build()
    assert cache.shape == (2, 6, 5 * 4, 1280)
    assert cache.frames == 5
    rows = [2, 1]
    grid = cache.grid_features(rows)
    assert grid.data.shape == (2, 5, 4, 1280)
    assert grid.times[0].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=2e-3)
    assert grid.times[1].tolist() == pytest.approx([0, 0.1, 0.2, 0.2, 0.2], abs=2e-3)
    assert grid.mask[0].eq(1).all()
    assert grid.mask[1, :SHORT].eq(1).all()
    assert grid.mask[1, SHORT:].eq(0).all()
    assert grid.data[1, SHORT:].eq(0).all()
    for place, row in enumerate(rows):
        with clips.store.as_file(clips.pictures[row].file) as path:
            seen = [frame.image for frame in video.frames(path, every=0.2 if place == 0 else 0.0)]
        pixels, fits = zip(*(load(image, encoder.preprocess) for image in seen), strict=True)
        direct = encode(encoder, torch.stack([torch.from_numpy(p) for p in pixels]), fits)
        assert close(grid.data[place, : len(seen)], direct.data[:, 0])
        assert grid.fits[place] == fits[0]
    assert differ(grid.data[0, 0], grid.data[0, 4])
    only = cache.grid_features([1])
    assert only.data.shape[1] == SHORT  # no more padding than there has to be
    assert torch.equal(only.data[0], grid.data[1, :SHORT])


@torch.inference_mode()
@pytest.mark.parametrize("blocks", [None, 2])
@pytest.mark.parametrize("fit", ["squash", "letterbox"])
def test_cached_live_and_direct_features_are_the_same(tmp_path, clips, blocks, fit):
    encoder = make_encoder(fit)
    options: dict[str, Any] = {"flips": True, "blocks": blocks, "crops": 1, "frames": 4}
    cache = FeatureCache(tmp_path, clips, encoder, **options).build()
    live = LivePictures(clips, encoder, **options, threads=2)
    assert cache.variants == live.variants == 4
    assert cache.shape == live.shape
    rows, variants = [0, 0, 0, 0, 1, 1, 5], [0, 1, 2, 3, 0, 3, 2]
    kept = cache.read(rows, variants)
    assert kept.shape == (7, *cache.shape[2:])
    assert close(live.read(rows, variants), kept)
    mask = cache.mask(rows, variants)
    assert mask.shape == (7, 4 * 4)
    fresh = LivePictures(clips, encoder, **options)  # which has read nothing yet
    assert torch.equal(fresh.mask(rows, variants), mask)
    assert torch.equal(live.mask(rows, variants), mask)
    assert (mask.view(7, 4, 4)[:, -1] == 0).all(1).tolist() == [False] * 4 + [True] * 2 + [False]
    if fit == "letterbox":
        assert 0 < mask[0].min() < 1
        assert mask[2].min() == 1  # crops have no bars
    if blocks is None:
        direct = look_at(clips, [3, 1], encoder, 4)
        for found in (cache.grid_features([3, 1]), live.grid_features([3, 1])):
            assert close(found.data, direct.data)
            assert torch.equal(found.mask, direct.mask)
            torch.testing.assert_close(found.times, direct.times)
            assert found.fits == direct.fits


@torch.inference_mode()
def test_all_frames_are_mirrored_and_cropped_alike(tmp_path, encoder):
    still = write_clip(tmp_path / "clips" / "0.avi", seconds=0.1)
    still.unlink()
    Image.fromarray(draw_frames("red", "left", 1)[0]).save(
        tmp_path / "clips" / "0.gif",
        save_all=True,
        append_images=[Image.new("RGB", (96, 64)), Image.fromarray(draw_frames("red", "left", 1)[0])],
        duration=100,
    )
    record = {"info": {"media": "video"}, "images": [{"id": 4, "file_name": "0.gif"}]}
    record["annotations"] = [{"image_id": 4, "caption": "a clip"}]
    (tmp_path / "clips.json").write_text(json.dumps(record))
    live = LivePictures(load_clips(tmp_path, images=["clips"]), encoder, flips=True, crops=1, frames=3)
    whole, mirrored, crop, both = (live.pixels([0], [variant]).float() for variant in range(4))
    assert whole.shape == (3, 3, 64, 64)
    assert torch.equal(mirrored, whole.flip(-1))
    assert torch.equal(both, crop.flip(-1))
    assert differ(crop[0], whole[0])
    assert torch.equal(crop[0], crop[2])  # the same picture through the same window
    again = live.pixels([0], [2], seed="another").float()
    assert differ(again[0], crop[0])
    assert torch.equal(again[0], again[2])


def test_the_cache_of_pictures_is_where_it_was(tmp_path, data, encoder):
    """Written out as it was before there were clips: what people have cached stays of use."""
    shapes = load_data_set("shapes", SourceConfig(annotations="shapes.json", images=["pictures"]), data)
    cache = FeatureCache(tmp_path, shapes, encoder, flips=True, blocks=2, crops=1, frames=9)
    weights = fingerprint(encoder.network[:2], encoder.preprocess)
    key = hashlib.sha256(f"2 {weights} 2 True 1\n".encode())
    for picture in shapes.pictures:
        key.update(f"{picture.id!r} {picture.file} {shapes.store.size(picture.file)}\n".encode())
    assert cache.folder.name == f"shapes-{key.hexdigest()[:16]}"
    cache.build(progress=False)
    manifest = json.loads((cache.folder / "cache.json").read_text())
    assert list(manifest) == [
        *("format", "key", "data_set", "pictures", "encoder", "preprocess", "weights", "blocks", "flips"),
        *("crops", "variants", "cells", "width", "dtype", "shard_pictures", "shards"),
    ]
    assert manifest["key"] == key.hexdigest()
    assert (manifest["cells"], manifest["shard_pictures"]) == (1024, 32)
    record = json.loads((cache.folder / "00000.json").read_text())
    assert list(record) == ["content", "modified", "fits"]


def test_another_number_of_frames_or_part_makes_another_cache(tmp_path, clips, encoder):
    def place(data, **changes):
        return FeatureCache(tmp_path, data, encoder, False, **{"frames": 4, **changes}).folder

    part = replace(clips, pictures=(replace(clips.pictures[0], end=0.5), *clips.pictures[1:]))
    later = replace(clips, pictures=(replace(clips.pictures[0], start=0.1, end=0.5), *clips.pictures[1:]))
    places = [place(clips), place(clips, frames=5), place(part), place(later), place(clips, crops=1)]
    assert len(set(places)) == 5
    assert place(clips) == places[0]


def test_an_interrupted_cache_goes_on_to_the_same_bits(tmp_path, clips, encoder, monkeypatch):
    monkeypatch.setattr(features, "_SHARD_VIEWS", 8)  # two clips
    whole = FeatureCache(tmp_path / "whole", clips, encoder, flips=False, frames=4).build()
    take, read = features.take_frames, []

    def counting(*arguments):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(arguments[0].name)
        return take(*arguments)

    monkeypatch.setattr(features, "take_frames", counting)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path / "parts", clips, encoder, flips=False, frames=4).build()
    monkeypatch.setattr(features, "take_frames", take)
    parts = FeatureCache(tmp_path / "parts", clips, encoder, flips=False, frames=4).build()
    files = [path.name for path in sorted(whole.folder.iterdir()) if path.suffix != ".lock"]
    assert files == [f"{n:05d}.{kind}" for n in range(3) for kind in ("f16", "json")] + ["cache.json"]
    for name in files:
        assert (parts.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert sum(path.stat().st_size for path in whole.folder.glob("*.f16")) == whole.size


def test_a_record_that_tells_no_times_is_damaged(tmp_path, clips, encoder, capsys):
    cache = FeatureCache(tmp_path, clips, encoder, flips=False, frames=4).build()
    expected = cache.grid_features([1])
    record = json.loads((cache.folder / "00000.json").read_text())
    for times in (None, record["times"][1:], [[0.0] * 9] * 6, [[]] * 6, ["x"] * 6):
        (cache.folder / "00000.json").write_text(json.dumps({**record, "times": times}))
        capsys.readouterr()
        again = FeatureCache(tmp_path, clips, encoder, flips=False, frames=4).build()
        assert "00000.f16 is damaged: its 6 clips are computed anew" in capsys.readouterr().err
        assert torch.equal(again.grid_features([1]).data, expected.data)


def test_a_replaced_clip_is_computed_anew_and_a_touched_one_is_not(tmp_path, encoder, monkeypatch, capsys):
    folder = write_set(tmp_path)
    FeatureCache(tmp_path / "cache", load_clips(folder), encoder, flips=False, frames=4).build()
    clip = folder / "clips" / "2-green-left.avi"
    size, written = clip.stat().st_size, clip.read_bytes()
    other = (folder / "clips" / "3-green-right.avi").read_bytes()
    clip.write_bytes(other[:size].ljust(size, b"\0"))
    capsys.readouterr()
    cache = FeatureCache(tmp_path / "cache", load_clips(folder), encoder, flips=False, frames=4)
    with pytest.raises(DataError) if len(other) > size else monkeypatch.context():
        cache.build()
    assert "clips: 2-green-left.avi has changed" in capsys.readouterr().err
    clip.write_bytes(written)
    FeatureCache(tmp_path / "cache", load_clips(folder), encoder, flips=False, frames=4).build()
    time.sleep(0.01)
    os.utime(clip)
    monkeypatch.setattr(features, "take_frames", lambda *a: pytest.fail("decoded a clip again"))
    FeatureCache(tmp_path / "cache", load_clips(folder), encoder, flips=False, frames=4).build()


def test_clips_of_one_video_differ_by_their_times(tmp_path, clips, encoder):
    first = clips.pictures[0]
    parts = tuple(replace(first, id=n, start=n / 4, end=n / 4 + 0.5) for n in range(3))
    some = FeatureCache(tmp_path, replace(clips, pictures=parts), encoder, False, frames=2).build()
    assert len(set(some.content)) == 3
    held_out = replace(clips, name="other", pictures=(parts[1], replace(first, id=9)))
    other = FeatureCache(tmp_path, held_out, encoder, False, frames=2).build()
    assert same_pictures(some, other) == [(1, 0)]
    assert other.grid_features([0]).times[0].tolist() == pytest.approx([0.3, 0.5], abs=2e-3)


def test_clips_in_a_tar_are_the_same(tmp_path, folder, clips, encoder):
    files = {path.name: path.read_bytes() for path in (folder / "clips").iterdir()}
    write_tar(tmp_path / "clips.tar", files)
    packed = load_clips(folder, images=[str(tmp_path / "clips.tar")])
    one = FeatureCache(tmp_path / "one", clips, encoder, False, frames=3).build()
    two = FeatureCache(tmp_path / "two", packed, encoder, False, frames=3).build()
    assert one.content == two.content
    assert torch.equal(one.read([1, 4], [0, 0]), two.read([1, 4], [0, 0]))


def test_the_size_is_told_before(tmp_path, clips, encoder, capsys):
    FeatureCache(tmp_path, clips, encoder, flips=True, frames=8).build()
    message = "features of clips: 6 clips of 8 frames in 2 variants, 983 kB in "
    assert message in capsys.readouterr().err


def test_a_bad_clip_is_one_line_that_names_it(tmp_path, encoder, capfd):
    folder = write_set(tmp_path)
    write_truncated(folder / "clips" / "2-green-left.avi")
    data = load_clips(folder)
    message = r"^clips: 2-green-left\.avi: the file is truncated; nothing could be read after \S+ s; copy or"
    with pytest.raises(DataError, match=message) as caught:
        FeatureCache(tmp_path / "cache", data, encoder, False).build(progress=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=message):
        LivePictures(data, encoder, False).read([2], [0])
    (folder / "clips" / "2-green-left.avi").unlink()
    with pytest.raises(DataError, match=r"2-green-left\.avi"):
        LivePictures(data, encoder, False).read([2], [0])
    assert "[" not in capfd.readouterr().err  # FFmpeg's "[mjpeg @ …]"


def test_what_is_for_pictures_refuses_clips(clips):
    model = make_seeing_model()
    with pytest.raises(DataError, match="clips: this needs pictures, and they are videos"):
        load_pixels(clips, [0], model.encoder)
    with pytest.raises(DataError, match="clips: this needs pictures, and they are videos"):
        measure(Captioner(model, make_header(model)), clips)


# --------------------------------------------------------------------------------------------------
# training


def on_clips(**changes: Any) -> dict[str, Any]:
    return stage(**{"sources": {"clips": 1}, **changes})


def make_config(stages: list[dict[str, Any]] | None = None, **changes: Any) -> TrainingConfig:
    clips = {"annotations": "clips.json"}
    plain = plain_config(stages or [on_clips()], video={"frames": 4, "cell": "gru", "width": 12})
    plain.update(data={"sources": {"clips": clips}, "validation": {"clips_val": clips}})
    return TrainingConfig.model_validate({**plain, **changes})


def both(folder: Path, data: Path, **changes: Any) -> TrainingConfig:
    """Return a config over clips and pictures."""
    sources = {
        "clips": {"annotations": str(folder / "clips.json")},
        "shapes": {"annotations": str(data / "shapes.json"), "images": [str(data / "pictures")]},
    }
    mixed = [on_clips(sources={"shapes": 1, "clips": 2}, batch_pictures=6, **changes)]
    return make_config(mixed, data={"sources": sources, "validation": sources})


def test_pictures_beside_clips_are_padded(tmp_path, folder, data):
    there = Experiment(both(folder, data), tmp_path, tmp_path / "cache")
    settings = there.config.stages[0]
    known = there.features(settings)
    chosen = [("shapes", 3), ("clips", 1), ("shapes", 5), ("clips", 0)]
    (batch,) = make_parts(chosen, there.targets, known, settings, "x", flips=True)
    assert batch.frames == 4
    assert batch.features.shape == (4, 16, 1280)
    frames = {("shapes", 3): 1, ("shapes", 5): 1, ("clips", 1): SHORT, ("clips", 0): 4}
    for place, data_of_it, mask in zip(batch.places, batch.features, batch.mask, strict=True):
        seen = 4 * frames[place]
        assert mask[:seen].eq(1).all()
        assert mask[seen:].eq(0).all()
        assert data_of_it[seen:].eq(0).all()
        assert data_of_it[:seen].abs().sum(1).gt(0).all()
    alone = make_parts(chosen[::2], there.targets, known, settings, "x", flips=True)
    assert alone[0].frames == 1


@pytest.mark.parametrize("objective_name", ["cross_entropy", "self_critical"])
@pytest.mark.parametrize("frames", ["joint", "factorised", "mean"])
def test_padding_changes_no_loss(tmp_path, folder, objective_name, frames):
    """Nor does it change what is learned."""
    settings = on_clips(objective=objective_name, samples=2)
    config = make_config([settings], decoder={**plain_config()["decoder"], "dropout": 0.0, "frames": frames})
    there = Experiment(config, folder, tmp_path)
    known = there.features(config.stages[0])
    loss_of = objective(there, config.stages[0], known["clips"].map_shape)
    there.model.train()
    (batch,) = make_parts([("clips", 1)], there.targets, known, config.stages[0], "x", flips=True)
    cells, mask = batch.features.view(1, 4, 4, -1)[:, :SHORT], batch.mask.view(1, 4, 4)[:, :SHORT]
    assert batch.mask.view(1, 4, 4)[:, SHORT:].eq(0).all()
    narrow = replace(batch, features=cells.flatten(1, 2), mask=mask.flatten(1), frames=SHORT)
    found = []
    for one in (batch, narrow):
        torch.manual_seed(0)
        there.model.zero_grad()
        loss, told = loss_of(one, 0.5)
        loss.backward()
        gradients = {n: p.grad for n, p in there.model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), told, gradients))
    torch.testing.assert_close(found[0], found[1])
    assert any(name.startswith("frame_encoder.") for name in found[0][2])


@pytest.mark.parametrize("blocks", [1, 3])
def test_fine_tuning_begins_with_the_frozen_loss(tmp_path, folder, blocks):
    """Frames go through the trained blocks one by one, and padding does not."""
    config = make_config(
        [
            on_clips(captions_per_picture=2),
            on_clips(name="fine", trainable_blocks=blocks, captions_per_picture=2),
        ],
        decoder={**plain_config()["decoder"], "dropout": 0.0},
    )
    there = Experiment(config, folder, tmp_path)
    losses = []
    for settings in config.stages:
        there.model.encoder.freeze(settings.trainable_blocks)
        there.model.train()
        known = there.features(settings)
        chosen = [("clips", i) for i in (0, 1, 4)]
        (batch,) = make_parts(chosen, there.targets, known, settings, "x", flips=True)
        loss, told = objective(there, settings, known["clips"].map_shape)(batch, 0.0)
        losses.append(told)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    loss.backward()
    trained = there.model.encoder.network[-blocks:]
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in trained.parameters() if p.requires_grad
    )
    assert sum(float(p.grad.abs().sum()) for p in trained.parameters() if p.grad is not None) > 0


def test_what_is_trained_and_what_is_not(tmp_path, folder, quick):
    config = make_config(
        [on_clips(weight_decay=0.5)], video={"frames": 4, "cell": "lstm", "width": 8, "positions": 4}
    )
    before = {
        k: v.clone() for k, v in Experiment(config, folder, tmp_path / "cache").model.state_dict().items()
    }
    train(config, folder, tmp_path, processes=1)
    after = state_of(tmp_path)["model"]
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        frozen = name.startswith("encoder.")
        assert torch.equal(tensor, before[name]) == frozen, name
    header = checkpoint.read_header(tmp_path / "model.safetensors")
    assert header.frames == FrameConfig("lstm", width=8, positions=4)
    assert header.summary["frames"] == 4


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, folder, quick, monkeypatch):
    config = make_config(
        [on_clips(epochs=2, batch_pictures=2), on_clips(name="fine", trainable_blocks=1, batch_pictures=2)],
        video={"frames": 4, "cell": "gru", "width": 8, "bidirectional": True},
        save_minutes=1e-6,
    )
    cache = tmp_path / "cache"
    train(config, folder, tmp_path / "whole", cache_folder=cache, processes=1)
    validate, seen = loop.validate_and_log, []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return validate(*arguments)

    monkeypatch.setattr(loop, "validate_and_log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, folder, tmp_path / "parts", cache_folder=cache, processes=1)
    monkeypatch.setattr(loop, "validate_and_log", validate)
    train(config, folder, tmp_path / "parts", cache_folder=cache, processes=1)
    assert same(state_of(tmp_path / "parts")["model"], state_of(tmp_path / "whole")["model"])


def test_without_a_cache_and_with_mixed_sources_it_trains(tmp_path, folder, data, quick):
    config = both(folder, data, trainable_blocks=1).model_copy(update={"cache": False, "crops": 1})
    train(config, tmp_path, tmp_path / "run", processes=1)
    (line,) = log_of(tmp_path / "run")
    assert 0 < line["loss"] < 10
    assert line["validation"].keys() == {"clips", "shapes"}


def test_word_guesses_are_of_all_frames(tmp_path, folder, quick):
    config = make_config(
        [on_clips(), on_clips(name="reward", objective="self_critical", samples=2)],
        concepts={"min_pictures": 1, "imagenet": True},
        decoder={**plain_config()["decoder"], "words": 3, "copying": True},
        encoder={"name": "efficientnet_lite0", "size": 64},
    )
    train(config, folder, tmp_path, processes=1)
    found = Captioner.load(tmp_path / "model.safetensors", device="cpu")
    caption = found.caption_video(next((folder / "clips").iterdir()), segment=None).segments[0].caption
    assert len(caption.guesses) == 3


@torch.inference_mode()
@pytest.mark.parametrize("cell", ["gru", "none"])
def test_order_in_time_reaches_the_decoder(tmp_path, cell):
    """A clip and its twin have the same frames the other way round: without a frame encoder they are one."""
    images = [{"id": number, "file_name": f"{number}.avi"} for number in range(2)]
    notes = [{"image_id": number, "caption": "a clip"} for number in range(2)]
    for number, way in enumerate(WAYS):
        write_clip(tmp_path / "clips" / f"{number}.avi", "red", way, rate=5)
    record = {"info": {"images": ["clips"]}, "images": images, "annotations": notes}
    (tmp_path / "clips.json").write_text(json.dumps(record))
    model = make_seeing_model()
    cache = FeatureCache(tmp_path, load_clips(tmp_path), model.encoder, False, frames=5).build()
    grid = cache.grid_features([0, 1])
    assert torch.equal(grid.data[0], grid.data[1].flip(0))
    assert not torch.equal(grid.data[0], grid.data[1])
    config = None if cell == "none" else FrameConfig(cell)
    whole = CaptionModel(model.encoder, model.decoder.config, model.tokenizer, config).eval()
    left, right = whole.decoder.start(whole.memory(grid))
    assert torch.allclose(left, right, rtol=1e-4, atol=1e-5) == (cell == "none")


def test_a_frame_encoder_needs_clips(tmp_path, data):
    shapes = plain_config()["data"]
    config = make_config([stage()], data=shapes)
    with pytest.raises(
        ConfigError, match=r"^video\.cell is gru: .* none of the sources .*\(shapes\) has any"
    ):
        Experiment(config, data, tmp_path)
    positions = config.model_copy(
        update={"video": config.video.model_copy(update={"cell": "none", "positions": 3})}
    )
    with pytest.raises(ConfigError, match=r"^video\.positions is 3: "):
        Experiment(positions, data, tmp_path)


def test_the_sketches_of_clips_show_their_frames(clips):
    model = make_seeing_model()
    drawn = tracking.draw(model, clips, SearchOptions(beam=1, max_length=4), 2, frames=4)
    assert [name for name, _, _ in drawn] == ["clips/0", "clips/5"]
    assert all(sheet.width > 400 for _, _, sheet in drawn)
    assert "a red square goes to the left" in drawn[0].text


# --------------------------------------------------------------------------------------------------
# evaluation, calibration, comparison


def test_captions_of_clips_are_those_of_the_captioner(tmp_path, folder, clips):
    model = make_seeing_model()
    options = SearchOptions(beam=2, max_length=8)
    found = generate(model, clips, options, frames=5)
    cache = FeatureCache(tmp_path, clips, model.encoder, False, frames=5).build()
    assert generate(model, clips, options, cache=cache) == found
    captioner = Captioner(model, make_header(model, summary={"frames": 5}))
    said = caption_data(captioner, clips, {"beam": 2, "max_length": 8, "length_penalty": 0.7})
    assert said.captions == found
    for clip in clips.pictures[::2]:
        alone = captioner.caption_video(
            folder / "clips" / clip.file, every=0.2, segment=None, beam=2, max_length=8, length_penalty=0.7
        )
        assert alone.segments[0].caption.text == found[clip.id]


def test_a_captioner_is_calibrated_on_clips(clips):
    model = make_seeing_model()
    captioner = Captioner(model, make_header(model, summary={"frames": 3}))
    mean, basis, residual = familiar(captioner, [clips])
    space = Calibration((1.0, 0.0), (0.0,) * (len(FEATURES) + 1), mean, basis, residual)
    assert len(photo_samples(captioner, space, clips)) == 6
    assert len(word_pairs(captioner, clips)) == sum(
        len(c.split()) + 1 for p in clips.pictures for c in p.captions
    )


def test_a_part_of_a_data_set_of_clips_is_one(tmp_path, folder):
    record = json.loads((folder / "clips.json").read_text())
    for image in record["images"]:
        image.update(start=0.1, end=0.9)
    del record["info"]["media"]
    (tmp_path / "clips.json").write_text(json.dumps({**record, "info": {"images": [str(folder / "clips")]}}))
    part = take_part(make_config(), tmp_path, tmp_path / "part", 3, 0)
    data = load_data_set("clips", part.data.sources["clips"], tmp_path)
    assert data.is_video
    assert len(data) == 3
    assert {(p.start, p.end) for p in data.pictures} == {(0.1, 0.9)}


# --------------------------------------------------------------------------------------------------
# from the published formats to captions


@pytest.mark.parametrize("name", ["msvd", "msrvtt"])
def test_from_the_published_format_to_captions(name, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(evaluation, "Scorer", QuickScorer)
    annotations = write_msvd(tmp_path, 8) if name == "msvd" else write_msrvtt(tmp_path)
    options = ["--val", "0.25", "--test", "0.25"] if name == "msvd" else []
    ran = CliRunner().invoke(
        app,
        [
            "prepare",
            str(annotations),
            "--videos",
            str(tmp_path / "clips"),
            "-o",
            str(tmp_path / "data"),
            *options,
        ],
    )
    assert ran.exit_code == 0, ran.output
    record = json.loads((tmp_path / "data" / "train.json").read_text())
    assert record["info"]["media"] == "video"
    assert all(image["cut"] for image in record["images"])
    frame_encoder = (
        {"cell": "lstm", "bidirectional": True} if name == "msvd" else {"cell": "gru", "over": "frames"}
    )
    plain = plain_config(
        [
            stage(sources={"train": 1}, batch_pictures=2),
            stage(name="fine", sources={"train": 1}, batch_pictures=2, trainable_blocks=1),
        ],
        name=name,
        data={
            "sources": {"train": {"annotations": "train.json"}},
            "validation": {"val": {"annotations": "val.json"}},
        },
        video={"frames": 4, "width": 8, **frame_encoder},
    )
    plain["encoder"]["pretrained"] = False
    plain["decoder"]["frames"] = "factorised"
    (tmp_path / "config.yaml").write_text(json.dumps(plain))  # JSON is YAML
    prepared, output = tmp_path / "data", tmp_path / "run"
    arguments = ["train", tmp_path / "config.yaml", "--data", prepared, "--output", output, "--device", "cpu"]
    ran = CliRunner().invoke(app, [*map(str, arguments), "--processes", "1"])
    assert ran.exit_code == 0, ran.output
    assert [line["stage"] for line in log_of(output)] == ["first", "fine"]
    tested = json.loads((prepared / "test.json").read_text())["images"]
    captioner = Captioner.load(output / "model.safetensors", device="cpu")
    (found,) = evaluate(captioner, prepared, split="test", compare="none", progress=False).values()
    assert found.scores.images == len(tested)
    clip = tmp_path / "clips" / tested[0]["file_name"]
    caption = captioner.caption_video(clip, every=0.25, segment=None).segments[0].caption
    assert caption.words
    assert caption.words[0].attention.shape == (4, 4)
    assert captioner.model.live == (name == "msrvtt")


def test_a_bad_clip_ends_training_with_one_line(tmp_path, folder, quick):
    folder = write_set(tmp_path)
    write_truncated(folder / "clips" / "4-blue-left.avi")
    (tmp_path / "config.yaml").write_text(json.dumps(make_config().model_dump()))
    arguments = ["train", tmp_path / "config.yaml", "--data", folder, "--output", tmp_path / "run"]
    ran = CliRunner().invoke(app, [*map(str, arguments), "--processes", "1", "--device", "cpu"])
    assert ran.exit_code == 2
    (line,) = [line for line in ran.output.splitlines() if "4-blue-left.avi" in line]
    assert "clips: 4-blue-left.avi: the file is truncated" in line
    assert "Traceback" not in ran.output
