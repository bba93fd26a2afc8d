from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captioner_training.adapt import (
    begin,
    describe,
    extend,
    frame_config,
    replace_dropout,
    start_from,
    with_frames,
)
from captioner_training.config import ConfigError, StartConfig, VideoSection
from conftest import TINY_WORDS, make_header, make_tiny_model

from captioner import checkpoint
from captioner.calibration import FEATURES, Calibration
from captioner.encoder import GridFeatures
from captioner.frame_encoder import FrameConfig
from captioner.images import Fit
from captioner.model import CaptionModel
from captioner.search import SearchOptions, search
from captioner.tokenizer import BpeTokenizer, WordTokenizer

CAPTIONS = ["A zebra on the grass.", "a zebra runs", "A Giraffe", "a giraffe, a zebra", "an okapi"]


@pytest.mark.parametrize("tied", [True, False])
def test_old_rows_stay_to_the_bit(tied: bool) -> None:
    model = make_tiny_model(tied=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extended, words = extend(model, CAPTIONS, min_count=2)
    assert words == ["zebra", "giraffe"]  # three and two; "an" and "okapi" come once
    old = len(TINY_WORDS) + 4
    assert extended.tokenizer.to_dict()["vocabulary"] == [*TINY_WORDS, "zebra", "giraffe"]
    for name, tensor in extended.state_dict().items():
        if name in ("decoder.embedding.weight", "decoder.output.weight", "decoder.output.bias"):
            assert len(tensor) == old + 2
            tensor = tensor[:old]
        assert torch.equal(tensor, before[name]), name
    assert (extended.decoder.output.weight is extended.decoder.embedding.weight) == tied
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(model.tokenizer) == old


def test_new_rows_differ_from_each_other_and_are_the_same_every_time() -> None:
    state = torch.get_rng_state()
    first, second = (extend(make_tiny_model(), CAPTIONS)[0].decoder for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)  # whoever trains draws what it would have drawn
    rows = first.embedding.weight[-4:]
    assert torch.equal(rows, second.embedding.weight[-4:])
    assert torch.cdist(rows, rows).add(torch.eye(4)).min() > 0.01
    assert rows.requires_grad
    assert first.output.bias.requires_grad


def test_what_is_known_adds_nothing() -> None:
    model = make_tiny_model()
    same, words = extend(model, ["a man on a bicycle", "THE DOG"])
    assert same is model
    assert words == []


def test_old_captions_are_read_as_before() -> None:
    model = make_tiny_model()
    extended, _ = extend(model, CAPTIONS)
    cells = torch.rand(3, 4, model.encoder.width, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[1, 4, 14, 26, 2], [1, 5, 15, 2, 0], [1, 4, 2, 0, 0]])
    lengths = torch.tensor([4, 3, 2])
    old, new = (
        m(m.decoder.memory(cells, torch.ones(3, 4)), tokens, lengths).logits for m in (model, extended)
    )
    torch.testing.assert_close(new[:, : old.shape[1]], old)


def test_new_words_can_be_learned_and_survive_a_checkpoint(tmp_path: Path) -> None:
    extended, _ = extend(make_tiny_model(dropout=0.0), ["a zebra"])
    for parameter in extended.decoder.parameters():
        parameter.data /= 3  # of a sharpened decoder the sigmoids learn nothing
    optimiser = torch.optim.Adam(extended.decoder.parameters(), lr=0.01)
    cells = torch.rand(1, 4, extended.encoder.width, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[1, *extended.tokenizer.encode("a zebra runs"), 2]])
    for _ in range(60):
        memory = extended.decoder.memory(cells, torch.ones(1, 4))
        logits = extended(memory, tokens, torch.tensor([4])).logits
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    path = tmp_path / "zebra.safetensors"
    checkpoint.save(path, extended.eval(), make_header(extended))
    loaded = checkpoint.load(path).model
    with torch.no_grad():
        found = search(loaded.decoder, loaded.decoder.memory(cells, torch.ones(1, 4)), SearchOptions(beam=1))
    assert [loaded.tokenizer.piece(t) for t in found[0][0].tokens] == ["a", "zebra", "runs"]


def test_byte_pairs_are_left_alone() -> None:
    pytest.importorskip("tokenizers")
    tiny = make_tiny_model()
    tokenizer = BpeTokenizer.build(["a man runs", "a dog runs"] * 3, size=30)
    model = CaptionModel(tiny.encoder, tiny.decoder.config, tokenizer)
    assert extend(model, CAPTIONS) == (model, [])


def test_describe_counts_words_and_what_stays_unknown() -> None:
    model, words = extend(make_tiny_model(), CAPTIONS, min_count=2)
    assert describe(words, model, CAPTIONS) == [
        "start: 2 new words: zebra, giraffe",
        # a zebra on the grass / a zebra runs / a giraffe / a giraffe a zebra / AN OKAPI
        "start: 2 of 16 words in the training captions stay unknown; "
        "a lower tokenizer.min_count adds more of them",
    ]
    assert describe(["zebra"], *extend(model, ["an okapi"])[:1], ["a zebra"]) == ["start: 1 new word: zebra"]


def test_dropout_is_replaced() -> None:
    model = make_tiny_model(dropout=0.5)
    replace_dropout(model, 0.25)
    assert model.decoder.config.dropout == 0.25
    assert model.decoder.dropout.p == 0.25


def test_begin_does_what_the_config_says(tmp_path: Path) -> None:
    path = tmp_path / "calibrated.safetensors"
    model = make_tiny_model()
    width = model.encoder.width
    calibration = Calibration(
        (1.0, 0.0), (0.0,) * (len(FEATURES) + 1), np.zeros(width), np.ones((width, 2)), 1.0
    )
    checkpoint.save(path, model, replace(make_header(model), calibration=None), calibration)
    start = begin(StartConfig(model=str(path), dropout=0.1), CAPTIONS, min_count=3)
    assert start.new_words == ["zebra"]
    assert start.model.decoder.config.dropout == 0.1
    assert start.header.calibration is None
    assert start.lines[0] == "start: goes on from tiny"
    assert start.lines[1] == "start: 1 new word: zebra"
    assert "captioner calibrate" in start.lines[-1]
    assert isinstance(start.model.tokenizer, WordTokenizer)

    same = begin(StartConfig(model=str(path), new_words=False), CAPTIONS, min_count=1)
    assert same.new_words == []
    assert len(same.model.tokenizer) == len(TINY_WORDS) + 4
    assert same.lines[1] == "start: 0 new words"


def test_the_built_in_model_is_a_start() -> None:
    loaded = start_from("built-in")
    assert loaded.header.name == "builtin"
    assert any(p.requires_grad for p in loaded.model.parameters())


FRAME_ENCODERS = [
    FrameConfig("gru", width=5),
    FrameConfig("lstm", bidirectional=True, over="frames", width=3),
    FrameConfig(positions=4),
    FrameConfig("rnn_tanh", width=6, positions=2),
]


def make_clips(model: CaptionModel) -> GridFeatures:
    """Three clips of up to four frames; the last cells and frames are padding."""
    chance = torch.Generator().manual_seed(3)
    data = torch.rand(3, 4, 4, model.encoder.width, generator=chance)
    mask = torch.ones(3, 4, 4)
    mask[1, 3:] = 0
    mask[2, 1:] = 0
    mask[:, :, 3] *= 0.5
    fit = Fit("squash", 64, 64, (0, 0, 64, 64))
    return GridFeatures(data, mask, (2, 2), torch.arange(4.0).expand(3, 4), (fit,) * 3)


def logits_of(model: CaptionModel, clips: GridFeatures) -> torch.Tensor:
    tokens = torch.tensor([[1, 4, 14, 26, 2], [1, 5, 15, 2, 0], [1, 4, 2, 0, 0]])
    return model(model.memory(clips), tokens, torch.tensor([4, 3, 2])).logits


@pytest.mark.parametrize("wanted", FRAME_ENCODERS, ids=str)
@pytest.mark.parametrize("words", [0, 3])
@torch.no_grad()
def test_a_new_frame_encoder_changes_nothing_at_first(wanted: FrameConfig, words: int) -> None:
    model = make_tiny_model(words=words, concepts=2 * words, copying=bool(words))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new, lines = with_frames(model, wanted, None)
    assert frame_config(new) == wanted
    clips = make_clips(model)
    torch.testing.assert_close(logits_of(new, clips), logits_of(model, clips), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    width = model.encoder.width
    assert new.decoder.project.weight.shape == (20, new.frame_encoder.width)
    assert torch.equal(new.decoder.project.weight[:, :width], before["decoder.project.weight"])
    assert new.decoder.project.weight[:, width:].eq(0).all()
    assert lines == [lines[0]]
    assert lines[0].startswith("start: a new frame encoder (")


@pytest.mark.parametrize("wanted", FRAME_ENCODERS, ids=str)
def test_a_new_frame_encoder_learns(wanted: FrameConfig) -> None:
    """Zeros do not keep it from learning: the columns move first, and then what they weigh."""
    new, _ = with_frames(make_tiny_model(dropout=0.0), wanted, None)
    assert new.frame_encoder is not None
    clips = make_clips(new)
    clips = replace(clips, data=0.1 * clips.data)  # more would saturate cells as narrow as these
    optimiser = torch.optim.SGD(new.decoder.parameters(), lr=0.1)
    for _ in range(2):
        new.zero_grad()
        logits_of(new, clips).logsumexp(-1).mean().backward()
        optimiser.step()
    assert all(float(p.grad.abs().sum()) > 1e-9 for p in new.frame_encoder.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in new.frame_encoder.parameters())


@pytest.mark.parametrize("frames", ["factorised", "mean"])
@torch.no_grad()
def test_of_a_picture_another_attention_says_the_same(frames: str) -> None:
    model = make_tiny_model()
    new, lines = with_frames(model, FrameConfig("gru", width=5), frames)
    assert new.decoder.config.frames == frames
    assert len(lines) == 2
    clips = make_clips(model)
    pictures = replace(clips, data=clips.data[:, :1], mask=clips.mask[:, :1], times=clips.times[:, :1])
    torch.testing.assert_close(logits_of(new, pictures), logits_of(model, pictures), rtol=1e-6, atol=1e-6)
    again, none = with_frames(new, None, None)
    assert frame_config(again) == FrameConfig("gru", width=5)
    assert none == []
    assert torch.equal(logits_of(again, clips), logits_of(new, clips))


def test_a_frame_encoder_of_another_shape_is_not_replaced(tmp_path: Path) -> None:
    model, _ = with_frames(make_tiny_model(), FrameConfig("gru", width=5), None)
    same, lines = with_frames(model, FrameConfig("gru", width=5), "joint")
    assert (frame_config(same), lines) == (FrameConfig("gru", width=5), [])
    message = (
        r"^video: the captioner under start has a frame encoder of its own \(cell: gru, width: 5\), and not "
    )
    with pytest.raises(ConfigError, match=message + r"cell: lstm, bidirectional: true: leave out"):
        with_frames(model, FrameConfig("lstm", True), None)
    path = tmp_path / "video.safetensors"
    checkpoint.save(path, model, make_header(model, frames=frame_config(model)))
    started = begin(StartConfig(model=str(path)), CAPTIONS, min_count=2)
    assert frame_config(started.model) == FrameConfig("gru", width=5)
    assert started.new_words == ["zebra", "giraffe"]
    with pytest.raises(ConfigError, match="frame encoder of its own"):
        begin(StartConfig(model=str(path)), CAPTIONS, min_count=2, video=VideoSection(cell="lstm"))


def test_without_attention_nothing_is_factorised() -> None:
    with pytest.raises(ConfigError, match=r"^start\.frames: factorised needs an attention"):
        with_frames(make_tiny_model(attention="none"), None, "factorised")


def test_the_built_in_model_begins_on_clips_as_it_is() -> None:
    """What it says of a clip before a step of training is what the photo model says of it."""
    config = StartConfig(model="built-in", new_words=False, frames="joint")
    started = begin(config, [], min_count=1, video=VideoSection(cell="lstm", bidirectional=True, width=8))
    plain = start_from("built-in").model
    clips = make_clips(plain)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(started.model, clips), logits_of(plain, clips), rtol=1e-6, atol=1e-6
        )
    assert any("a new frame encoder (cell: lstm, bidirectional: true, width: 8)" in s for s in started.lines)
    assert started.model.frame_encoder is not None


@pytest.mark.parametrize("name", ["missing.safetensors", "damaged.safetensors", "."])
def test_a_bad_start_is_one_line_that_names_key_and_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError) as error:
        start_from(name)
    assert str(error.value).startswith(f"start.model: {name}: ")
    assert "\n" not in str(error.value)
