from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captioner_training.config import SourceConfig
from captioner_training.data import load_data_set
from captioner_training.tracking import FOLDER, Drawn, Tracker, draw
from conftest import make_tiny_model
from PIL import Image
from shape_data import write_shapes

from captioner.captioner import Captioner
from captioner.search import SearchOptions

pytest.importorskip("tensorboard")


def read(output: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(output / FOLDER)).Reload()


def points(events: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_numbers_arrive(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        assert tracker.active
        for step in (10, 20):
            tracker.step(step, loss=5 - step / 10, gradient_norm=0.5, learning_rate=1e-3)
        tracker.epoch(20, {"mine": {"CIDEr": 0.5, "BLEU-4": 0.25}, "other": {"CIDEr": 0.75}}, loss=3.5)
    assert not tracker.active
    events = read(tmp_path)
    assert points(events, "train/loss") == [(10, 4.0), (20, 3.0)]
    assert points(events, "train/gradient_norm") == [(10, 0.5), (20, 0.5)]
    assert points(events, "train/learning_rate") == [(10, 0.001), (20, 0.001)]
    assert points(events, "CIDEr/mine") == [(20, 0.5)]
    assert points(events, "CIDEr/other") == [(20, 0.75)]
    assert points(events, "BLEU-4/mine") == [(20, 0.25)]
    assert points(events, "epoch/loss") == [(20, 3.5)]


def test_a_resumed_run_leaves_no_doubled_points(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in range(1, 8):
        tracker.step(step, loss=float(step))
    tracker.epoch(7, {"mine": {"CIDEr": 0.1}})
    tracker.close()  # killed here; the last saved state was of step 4
    with Tracker(tmp_path, first_step=4) as resumed:
        for step in range(5, 10):
            resumed.step(step, loss=step + 0.5)
        resumed.epoch(9, {"mine": {"CIDEr": 0.2}})
    events = read(tmp_path)
    old, new = [(s, float(s)) for s in range(1, 5)], [(s, s + 0.5) for s in range(5, 10)]
    assert points(events, "train/loss") == old + new
    assert points(events, "CIDEr/mine") == [(9, 0.2)]


def test_a_run_that_begins_anew_replaces_old_points(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with Tracker(tmp_path, first_step=0) as tracker:
            tracker.step(1, loss=value)
    assert points(read(tmp_path), "train/loss") == [(1, 2.0)]


@pytest.mark.parametrize("arguments", [{"enabled": False}, {"first": False}])
def test_nothing_is_written_where_nothing_should_be(arguments: dict[str, bool], tmp_path: Path) -> None:
    with Tracker(tmp_path, **arguments) as tracker:
        tracker.step(1, loss=1.0)
        tracker.epoch(1, {"mine": {"CIDEr": 0.5}})
        tracker.captions(1, [Drawn("mine/1", "a dog", Image.new("RGB", (4, 4)))])
        assert not tracker.active
    assert not any(tmp_path.iterdir())


def test_without_tensorboard_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest)
    )
    with Tracker(tmp_path) as tracker:
        tracker.step(1, loss=1.0)
    assert capsys.readouterr().out.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_pictures_are_drawn_as_the_captioner_sees_them(tmp_path: Path) -> None:
    source = SourceConfig(annotations="shapes.json", images=["pictures"])
    data = load_data_set("shapes", source, write_shapes(tmp_path / "data", 7))
    model = make_tiny_model().train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    drawn = draw(model, data, SearchOptions(beam=2, max_length=8), 3)
    # training goes on as if nothing had happened
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.requires_grad for p in model.decoder.parameters())
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    assert [d.name for d in drawn] == ["shapes/100", "shapes/103", "shapes/106"]
    with Tracker(tmp_path / "run") as tracker:
        tracker.captions(5, drawn)
    events = read(tmp_path / "run")
    for name, text, sheet in drawn:
        (image,) = events.Images(name)
        assert (image.step, image.width, image.height) == (5, *sheet.size)
        shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)), float)
        assert np.abs(shown - np.asarray(sheet, float)).mean() < 5
        (written,) = events.Tensors(f"{name}/text_summary")
        assert written.tensor_proto.string_val[0].decode() == text

    from conftest import make_header

    captioner = Captioner(make_tiny_model(), make_header(model))
    first = data.pictures[0]
    expected = captioner.caption(data.store.read(first.file), beam=2, max_length=8).text
    assert drawn[0].text.startswith(f"**{expected or '(no words)'}**")
    assert all(f"- {caption}" in drawn[0].text for caption in first.captions)
    assert np.asarray(drawn[0].sheet).std() > 10  # not blank


def test_a_small_set_is_drawn_whole(tmp_path: Path) -> None:
    source = SourceConfig(annotations="shapes.json", images=["pictures"])
    data = load_data_set("shapes", source, write_shapes(tmp_path, 2))
    assert len(draw(make_tiny_model(attention="none"), data, SearchOptions(max_length=5), 9)) == 2
