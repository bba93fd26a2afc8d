"""Frames in time: the frame encoder, and the three ways of attending over frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_header, make_tiny_model, sharpen
from torch import Tensor, nn

from captioner import Captioner, checkpoint
from captioner.attention import factorised_softmax, frame_log_masks, masked_softmax, mean_over_frames
from captioner.checkpoint import CheckpointError
from captioner.decoder import OVER_FRAMES, Decoder, DecoderConfig
from captioner.encoder import Encoder, concatenate, join_frames
from captioner.frame_encoder import FRAME_CELLS, OVER, FrameConfig, FrameEncoder
from captioner.model import CaptionModel
from captioner.tokenizer import END, START, WordTokenizer

D, R = 6, 4
RECURRENT = [cell for cell in FRAME_CELLS if cell != "none"]
BOTH_WAYS = [(cell, over) for cell in RECURRENT for over in OVER]


def features(clips: int = 3, frames: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(clips, frames, R, D, generator=torch.Generator().manual_seed(seed))


def make(seed: int = 0, **config: object) -> FrameEncoder:
    torch.manual_seed(seed)
    encoder = FrameEncoder(FrameConfig(width=3, **config), D)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0, 0.7)
    return encoder.eval()


# --------------------------------------------------------------------------------------------------
# The frame encoder


@pytest.mark.parametrize(("cell", "over"), BOTH_WAYS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_states_stand_beside_the_features(cell: str, over: str, bidirectional: bool) -> None:
    encoder = make(cell=cell, over=over, bidirectional=bidirectional)
    data = features()
    with torch.inference_mode():
        given = encoder(data, torch.ones(3, 5, R))
    assert encoder.width == D + (6 if bidirectional else 3)
    assert given.shape == (3, 5, R, encoder.width)
    assert torch.equal(given[..., :D], data)


@pytest.mark.parametrize(("cell", "over"), BOTH_WAYS)
def test_it_is_torchs_own_network_over_time(cell: str, over: str) -> None:
    encoder = make(cell=cell, over=over)
    assert isinstance(encoder.past, nn.RNNBase)
    data, mask = features(), torch.rand(3, 5, R) + 0.1
    with torch.inference_mode():
        given = encoder(data, mask)[..., D:]
        for clip in range(3):
            for place in range(R):
                seen = data[clip, :, place]
                if over == "frames":
                    share = mask[clip] / mask[clip].sum(-1, keepdim=True)
                    seen = (data[clip] * share[..., None]).sum(1)
                expected, _ = encoder.past(seen[None])
                torch.testing.assert_close(given[clip, :, place], expected[0])


@pytest.mark.parametrize(("cell", "over"), BOTH_WAYS)
def test_a_forward_encoder_knows_the_past_alone(cell: str, over: str) -> None:
    encoder = make(cell=cell, over=over)
    early, late = features(), features(seed=2)
    late = torch.cat((early[:, :3], late[:, 3:]), 1)
    with torch.inference_mode():
        one, other = (encoder(x, torch.ones(3, 5, R)) for x in (early, late))
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.allclose(one[:, 3:, :, D:], other[:, 3:, :, D:])


def test_a_bidirectional_encoder_reads_backwards_too() -> None:
    encoder = make(cell="gru", bidirectional=True)
    assert isinstance(encoder.future, nn.RNNBase)
    data = features()
    with torch.inference_mode():
        given = encoder(data, torch.ones(3, 5, R))
        backwards, _ = encoder.future(data[1, :, 2].flip(0)[None])
    torch.testing.assert_close(given[1, :, 2, D + 3 :], backwards[0].flip(0))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_nothing(over: str, bidirectional: bool) -> None:
    encoder = make(cell="lstm", over=over, bidirectional=bidirectional, positions=4)
    data = features()
    mask = torch.ones(3, 5, R)
    mask[0, 3:], mask[1, 1:] = 0, 0
    padded = torch.where(mask[..., None] > 0, data, torch.full_like(data, 50.0))
    with torch.inference_mode():
        given = encoder(padded, mask)
        for clip, length in enumerate((3, 1, 5)):
            alone = encoder(data[clip : clip + 1, :length], torch.ones(1, length, R))
            torch.testing.assert_close(given[clip : clip + 1, :length], alone)
    assert given.isfinite().all()


def test_positions_are_learned_and_the_last_serves_for_all_that_follow() -> None:
    encoder = make(positions=3)
    assert encoder.positions is not None
    assert encoder.width == D
    data = features()
    with torch.inference_mode():
        added = encoder(data, torch.ones(3, 5, R)) - data
    for frame, position in enumerate((0, 1, 2, 2, 2)):
        torch.testing.assert_close(
            added[:, frame], encoder.positions.weight[position].expand(3, R, D), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cell": "transformer"}, "frames.cell must be one of none, rnn_tanh"),
        ({"over": "time"}, "frames.over must be one of cells, frames"),
        ({"cell": "gru", "width": 0}, "frames.width must be at least 1"),
        ({"positions": -1}, "frames.positions must be at least 0"),
        ({"bidirectional": True}, "frames.bidirectional needs a frames.cell"),
        ({"cell": "gru", "bidirectional": 1}, "frames.bidirectional must be bool"),
    ],
)
def test_impossible_configs(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameConfig(**config)  # type: ignore[arg-type]


def test_unknown_keys_of_a_config() -> None:
    config = FrameConfig("gru", True, "frames", 7, 9)
    assert FrameConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown key frames\.heads"):
        FrameConfig.from_dict({"cell": "gru", "heads": 8})


# --------------------------------------------------------------------------------------------------
# Attention over frames


def test_factorised_weights_are_a_product_and_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(3)
    energies = torch.randn(2, 3, 5 * R, generator=generator)
    over = torch.randn(2, 3, 5, generator=generator)
    mask = torch.rand(2, 5, R, generator=generator)
    mask[0, 3:], mask[1, 0, 1] = 0, 0
    weights = factorised_softmax(energies, over, *frame_log_masks(mask[:, None])).view(2, 3, 5, R)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 3))
    assert (weights[0, :, 3:] == 0).all()
    assert (weights[1, :, 0, 1] == 0).all()
    frames = torch.softmax(over[0, :, :3], -1)
    torch.testing.assert_close(weights[0, :, :3].sum(-1), frames)
    within = masked_softmax(energies[0].view(3, 5, R)[None, :, 1], mask[:1, 1])
    torch.testing.assert_close(weights[0, :, 1], within[0] * frames[:, 1:2])


def test_the_mean_over_frames_counts_what_is_seen() -> None:
    data = features(1, 3)
    mask = torch.tensor([[[1.0, 1, 0.5, 0], [1, 0, 0.5, 0], [0, 0, 0.5, 0]]])
    mean, left = mean_over_frames(data, mask)
    torch.testing.assert_close(mean[0, 0], (data[0, 0, 0] + data[0, 1, 0]) / 2)
    torch.testing.assert_close(mean[0, 1], data[0, 0, 1])
    torch.testing.assert_close(mean[0, 2], data[0, :, 2].mean(0))
    assert mean.isfinite().all()
    assert left.tolist() == [[1, 1, 0.5, 0]]


SMALL = DecoderConfig(hidden=8, embedding=6, cells=7, attention_width=5, frame_attention_width=4)


def decoder(seed: int = 0, **changes: object) -> Decoder:
    torch.manual_seed(seed)
    made = Decoder(replace(SMALL, **changes), D, 11)
    sharpen(made)
    if made.frame_attention is not None:
        nn.init.normal_(made.frame_attention.energy.weight)
    return made.eval()


@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize("frames", OVER_FRAMES)
def test_for_one_frame_they_are_the_photo_model(attention: str, frames: str) -> None:
    photo, clip = decoder(attention=attention), decoder(seed=5, attention=attention, frames=frames)
    clip.load_state_dict({**clip.state_dict(), **photo.state_dict()})
    data = features(3, 1)
    mask = torch.tensor([[[1.0, 1, 1, 1]], [[1, 0, 0.5, 0]], [[0, 0, 0, 1]]])
    tokens = torch.tensor([START, 5, 9])
    with torch.inference_mode():
        one, other = photo.memory(data.flatten(1, 2), mask.flatten(1, 2)), clip.memory(data, mask)
        a, b = photo.start(one), clip.start(other)
        for _ in range(3):
            x, y = photo.step(tokens, a, one), clip.step(tokens, b, other)
            torch.testing.assert_close(y.attention, x.attention, atol=1e-6, rtol=0)
            torch.testing.assert_close(
                clip.log_probabilities(y.output), photo.log_probabilities(x.output), atol=1e-6, rtol=0
            )
            a, b = x.state, y.state


@pytest.mark.parametrize("frames", OVER_FRAMES)
def test_teacher_forcing_is_the_steps_one_by_one(frames: str) -> None:
    model = video_model(frames, FrameConfig("gru", width=5))
    data = torch.randn(2, 3, 4, model.encoder.width, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 3, 4)
    mask[1, 2:], mask[0, 1, :2] = 0, 0
    tokens = torch.tensor([[START, 5, 9, END], [START, 7, END, 0]])
    lengths = torch.tensor([3, 2])
    with torch.inference_mode():
        memory = model.look(data, mask)
        forced = model(memory, tokens, lengths)
        cells = memory.cells.shape[1]
        assert cells == (4 if frames == "mean" else 12)
        assert forced.attention is not None
        place = 0
        for row, length in enumerate(lengths.tolist()):
            mine = memory.select(torch.tensor([row]))
            state = model.decoder.start(mine)
            for t in range(length):
                step = model.decoder.step(tokens[row, t : t + 1], state, mine)
                state = step.state
                assert step.attention is not None
                torch.testing.assert_close(forced.attention[row, t], step.attention[0])
                torch.testing.assert_close(forced.logits[place], model.decoder.logits(step.output)[0])
                place += 1


def test_padded_frames_do_not_change_what_is_said() -> None:
    for frames in OVER_FRAMES:
        model = video_model(frames, FrameConfig("lstm", bidirectional=True, width=5))
        width = model.encoder.width
        data = torch.randn(1, 2, 4, width, generator=torch.Generator().manual_seed(2))
        padded = torch.cat((data, torch.full((1, 2, 4, width), 9.0)), 1)
        mask = torch.ones(1, 4, 4)
        mask[:, 2:] = 0
        with torch.inference_mode():
            one, other = model.look(data, mask[:, :2]), model.look(padded, mask)
            tokens = torch.tensor([START])
            x = model.decoder.step(tokens, model.decoder.start(one), one)
            y = model.decoder.step(tokens, model.decoder.start(other), other)
        torch.testing.assert_close(model.decoder.logits(x.output), model.decoder.logits(y.output))


def test_untrained_attention_over_frames_is_even() -> None:
    """So a photo model that is given one begins with all frames alike."""
    torch.manual_seed(0)
    fresh = Decoder(replace(SMALL, frames="factorised"), D, 11).eval()
    memory = fresh.memory(features(), torch.ones(3, 5, R))
    with torch.inference_mode():
        step = fresh.step(torch.tensor([START] * 3), fresh.start(memory), memory)
    assert step.attention is not None
    torch.testing.assert_close(step.attention.view(3, 5, R).sum(-1), torch.full((3, 5), 0.2))


def test_factorised_attention_needs_one_within_frames() -> None:
    with pytest.raises(ValueError, match="factorised needs an attention within each frame"):
        replace(SMALL, frames="factorised", attention="none")
    with pytest.raises(ValueError, match=r"decoder\.frames must be one of joint, factorised, mean"):
        replace(SMALL, frames="late")


# --------------------------------------------------------------------------------------------------
# In a model


def video_model(frames: str, config: FrameConfig | None, **options: object) -> CaptionModel:
    photo = make_tiny_model()
    torch.manual_seed(11)
    decoder = replace(photo.decoder.config, frames=frames, frame_attention_width=6, **options)
    model = CaptionModel(photo.encoder, decoder, photo.tokenizer, config)
    sharpen(model.decoder)
    if model.decoder.frame_attention is not None:
        nn.init.normal_(model.decoder.frame_attention.energy.weight)
    return model.eval()


def pictures(count: int = 3) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize("frames", OVER_FRAMES)
def test_a_clip_is_captioned_with_attention_in_every_frame(frames: str) -> None:
    model = video_model(frames, FrameConfig("gru", width=5))
    captioner = Captioner(model, make_header(model))
    clip = captioner.encode_frames(pictures(), [0.0, 0.5, 1.5])
    assert clip.data.shape[:3] == (1, 3, 4)
    caption = captioner.caption(clip)
    assert caption.times.tolist() == [0.0, 0.5, 1.5]
    assert caption.attention is not None
    assert caption.attention.shape == (len(caption.words), 3, 4)
    np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, atol=1e-5)
    if frames == "mean":  # of what was averaged every frame has an equal share
        np.testing.assert_allclose(caption.attention[:, 0], caption.attention[:, 2], atol=1e-7)


def test_a_region_holds_for_all_frames() -> None:
    model = video_model("factorised", FrameConfig("gru", width=5))
    captioner = Captioner(model, make_header(model))
    clip = captioner.encode_frames(pictures())
    left = captioner.caption(clip, region=(0, 0, 32, 48))
    assert left.attention is not None
    assert (left.attention[:, :, [1, 3]] == 0).all()


def test_frames_of_a_clip_must_fit_their_times() -> None:
    captioner = Captioner(video_model("joint", None), make_header(make_tiny_model()))
    with pytest.raises(ValueError, match="2 times do not fit 3 pictures"):
        captioner.encode_frames(pictures(), [0.0, 0.5])
    photos = captioner.encode_batch(pictures())
    joined = join_frames([photos[0], photos[1]], [1.0, 2.0])
    torch.testing.assert_close(joined.data[0], photos.data[:2, 0])
    with pytest.raises(ValueError, match="cannot be joined"):
        concatenate([joined, photos])


def test_batches_of_clips_do_not_change_their_captions() -> None:
    model = video_model("factorised", FrameConfig("lstm", bidirectional=True, width=5))
    captioner = Captioner(model, make_header(model))
    clip = captioner.encode_frames(pictures())
    clips = [replace(clip, data=torch.randn(clip.data.shape)) for _ in range(4)]
    alone = [captioner.caption(clip) for clip in clips]
    together = captioner.caption_batch(concatenate(clips))
    assert [c.text for c in together] == [c.text for c in alone]
    np.testing.assert_allclose([c.score for c in together], [c.score for c in alone], atol=1e-5)
    assert len({round(c.score, 4) for c in alone}) == 4  # they are not all the same anyway


@pytest.mark.parametrize("cell", FRAME_CELLS)
def test_a_checkpoint_brings_its_frame_encoder(cell: str, tmp_path: Path) -> None:
    config = FrameConfig(cell, bidirectional=cell != "none", width=5, positions=3)
    model = video_model("factorised", config)
    path = tmp_path / "clip.safetensors"
    checkpoint.save(path, model, make_header(model, frames=config, decoder=model.decoder.config))
    loaded = checkpoint.load(path)
    assert loaded.header.frames == config
    assert loaded.model.live == (cell == "none")
    data, mask = torch.randn(2, 3, 4, model.encoder.width), torch.ones(2, 3, 4)
    with torch.inference_mode():
        stored = {k: v.half().float() for k, v in model.state_dict().items() if v.is_floating_point()}
        model.load_state_dict({**model.state_dict(), **stored})
        torch.testing.assert_close(loaded.model.look(data, mask).cells, model.look(data, mask).cells)


def test_photo_checkpoints_do_not_mention_frames(tiny_checkpoint: Path) -> None:
    assert checkpoint.read_header(tiny_checkpoint).frames is None
    assert "frames" not in checkpoint.read_header(tiny_checkpoint).to_dict()


def test_a_checkpoint_with_a_damaged_frame_config(tmp_path: Path) -> None:
    model = make_tiny_model()
    header = make_header(model)
    object.__setattr__(header, "frames", type("F", (), {"to_dict": lambda self: {"cell": "no"}})())
    checkpoint.save(tmp_path / "m.safetensors", model, header)
    with pytest.raises(CheckpointError, match=r"frames\.cell must be one of"):
        checkpoint.load(tmp_path / "m.safetensors")


def test_guesses_come_from_what_the_encoder_saw() -> None:
    """The word memory reads the CNN's features, however wide the frame encoder's are."""
    torch.manual_seed(0)
    encoder = Encoder("efficientnet_lite0")
    config = DecoderConfig(hidden=8, embedding=8, cells=8, attention_width=4, words=3, concepts=5)
    model = CaptionModel(
        encoder, config, WordTokenizer(["a", "b", "c", "d", "e"]), FrameConfig("gru", width=4)
    )
    assert model.decoder.guesser is not None
    model.decoder.guesser.tokens[:] = torch.arange(4, 9)
    assert model.decoder.guesser.head.in_features == encoder.width
    assert model.decoder.project.in_features == encoder.width + 4
    memory = model.look(torch.randn(2, 3, 4, encoder.width), torch.ones(2, 3, 4))
    assert memory.words is not None
    assert memory.words.shape == (2, 4, 8)
