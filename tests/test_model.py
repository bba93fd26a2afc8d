from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tiny_model, sharpen
from torch import Tensor

from captioner.attention import ATTENTIONS
from captioner.decoder import CELLS, Memory
from captioner.images import Fit
from captioner.model import CaptionModel
from captioner.tokenizer import END, PAD, START

BOTH = [(cell, attention) for cell in CELLS for attention in ATTENTIONS]
CAPTIONS = [[5, 9, 30, 8, 12], [7, 6, 21], [7, 8, 9], [11]]
LENGTHS = torch.tensor([len(c) + 1 for c in CAPTIONS])


@pytest.fixture(scope="module")
def shared() -> CaptionModel:
    """The tiny model, for tests that do not change its encoder."""
    return make_tiny_model()


def decoder_of(shared: CaptionModel, **changes: object) -> CaptionModel:
    """Another decoder on the same encoder."""
    torch.manual_seed(3)
    config = replace(shared.decoder.config, **changes)
    model = CaptionModel(shared.encoder, config, shared.tokenizer)
    sharpen(model.decoder)
    return model.eval()


def batch(pad: int = PAD) -> Tensor:
    width = max(len(c) for c in CAPTIONS) + 2
    rows = [[START, *c, END] for c in CAPTIONS]
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def look(model: CaptionModel, garbage: float = 0.0) -> Memory:
    features = torch.randn(4, 6, model.encoder.width, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1.0] * 6, [1, 1, 0, 0, 0.5, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 0]])
    features = torch.where(mask[..., None] == 0, torch.full_like(features, garbage), features)
    return model.decoder.memory(features, mask)


@pytest.mark.parametrize(("cell", "attention"), BOTH)
def test_teacher_forcing_is_the_steps_one_by_one(shared: CaptionModel, cell: str, attention: str) -> None:
    model = decoder_of(shared, cell=cell, attention=attention)
    memory, tokens = look(model), batch()
    forced = model(memory, tokens, LENGTHS)
    assert forced.logits.shape == (LENGTHS.sum(), len(model.tokenizer))
    place = 0
    for row, length in enumerate(LENGTHS.tolist()):
        mine = memory.select(torch.tensor([row]))
        state = model.decoder.start(mine)
        for t in range(length):
            step = model.decoder.step(tokens[row, t : t + 1], state, mine)
            state = step.state
            torch.testing.assert_close(
                forced.logits[place], model.decoder.logits(step.output)[0], rtol=1e-4, atol=1e-5
            )
            if attention == "none":
                assert forced.attention is None
                assert forced.gates is None
            else:
                torch.testing.assert_close(forced.attention[row, t], step.attention[0])
                torch.testing.assert_close(forced.gates[row, t], step.gate[0])
            place += 1
        if attention != "none":
            assert (forced.attention[row, length:] == 0).all()
            assert (forced.gates[row, length:] == 0).all()
    assert place == len(forced.logits)


def test_scheduled_sampling_reads_the_models_own_words(shared: CaptionModel) -> None:
    """With probability 1 and a model that is all but certain, the input is its greedy caption."""
    model = decoder_of(shared, dropout=0.0)
    with torch.no_grad():  # far apart: a draw is then the best word
        model.decoder.output.bias.copy_(
            torch.randn(len(model.tokenizer), generator=torch.Generator().manual_seed(1))
        )
        model.decoder.embedding.weight.mul_(1000)
    memory, tokens = look(model), batch()
    mixed = model(memory, tokens, LENGTHS, own=1.0)
    said = tokens.clone()
    state = model.decoder.start(memory)
    for t in range(int(LENGTHS[0]) - 1):
        step = model.decoder.step(said[:, t], state, memory)
        state = step.state
        said[:, t + 1] = model.decoder.logits(step.output).argmax(-1)
    assert not torch.equal(said, tokens)
    torch.testing.assert_close(mixed.logits, model(memory, said, LENGTHS).logits)

    torch.manual_seed(0)
    some = model(memory, tokens, LENGTHS, own=0.5).logits
    plain = model(memory, tokens, LENGTHS).logits
    torch.testing.assert_close(some[0], plain[0])  # the first word follows the start in any case
    assert not torch.equal(some, plain)
    assert not torch.equal(some, mixed.logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_counts_for_nothing(shared: CaptionModel, attention: str) -> None:
    model = decoder_of(shared, attention=attention)
    first = model(look(model), batch(), LENGTHS)
    second = model(look(model, garbage=1e6), batch(pad=17), LENGTHS)
    assert torch.equal(first.logits, second.logits)
    if attention != "none":
        assert torch.equal(first.attention, second.attention)
        assert torch.equal(first.gates, second.gates)

    # nor do gradients reach the embedding of the padding
    untied = decoder_of(shared, attention=attention, tied=False)
    output = untied(look(untied), batch(pad=17), LENGTHS)
    output.logits.logsumexp(-1).sum().backward()
    gradient = untied.decoder.embedding.weight.grad
    assert (gradient[17] == 0).all()
    assert (gradient[START].abs().sum() > 0).all()


def test_captions_do_not_see_each_other(shared: CaptionModel) -> None:
    model = decoder_of(shared)
    together = model(look(model), batch(), LENGTHS).logits.split(LENGTHS.tolist())
    alone = model(look(model).select(torch.tensor([1])), batch()[1:2], LENGTHS[1:2]).logits
    torch.testing.assert_close(together[1], alone, rtol=1e-4, atol=1e-5)


def test_the_last_words_loss_reaches_the_first_word(shared: CaptionModel) -> None:
    model = decoder_of(shared, tied=False)
    logits = model(look(model), batch(), LENGTHS).logits
    logits[LENGTHS[0] - 1, END].backward()  # the end of the longest caption
    gradient = model.decoder.embedding.weight.grad
    for token in [START, *CAPTIONS[0]]:
        assert gradient[token].abs().sum() > 0
    assert gradient[CAPTIONS[1][1]].abs().sum() == 0  # of another caption


def test_lengths_must_descend(shared: CaptionModel) -> None:
    with pytest.raises(ValueError, match="longest first"):
        shared(look(shared), batch(), LENGTHS.flip(0))


def test_pictures_to_words(shared: CaptionModel) -> None:
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    fits = [Fit("squash", 100, 80, (0.0, 0.0, 100.0, 80.0))] * 3
    with torch.inference_mode():
        features = shared.encode(pixels, fits)
        assert features.data.shape == (3, 1, 4, 1280)
        assert features.grid == (2, 2)
        memory = shared.memory(features)
    assert memory.cells.shape == (3, 4, 20)
    assert memory.mask.shape == (3, 4)
    assert shared.device == torch.device("cpu")
    one = shared.memory(shared.encode(pixels[1:2], fits[:1]))
    np.testing.assert_allclose(one.cells[0].detach(), memory.cells[1], atol=1e-4)


def test_frames_and_cells_become_one_axis(shared: CaptionModel) -> None:
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    fits = [Fit("squash", 100, 80, (0.0, 0.0, 100.0, 80.0))] * 2
    with torch.inference_mode():
        photos = shared.encode(pixels, fits)
        clip = replace(
            photos,
            data=photos.data.transpose(0, 1),
            mask=torch.tensor([[[1.0, 1, 1, 1], [0, 0, 1, 1]]]),
            fits=photos.fits[:1],
        )
        memory = shared.memory(clip)
        assert memory.cells.shape == (1, 8, 20)
        assert memory.mask.tolist() == [[1, 1, 1, 1, 0, 0, 1, 1]]
        torch.testing.assert_close(memory.cells[0, 4:], shared.memory(photos).cells[1])


def test_freezing_keeps_gradients_from_the_encoder(tiny_model: CaptionModel) -> None:
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    fits = [Fit("squash", 64, 64, (0.0, 0.0, 64.0, 64.0))]
    for trainable in (0, 2):
        tiny_model.zero_grad(set_to_none=True)
        tiny_model.encoder.freeze(trainable)
        memory = tiny_model.memory(tiny_model.encode(pixels, fits))
        tiny_model(memory, batch()[:1], LENGTHS[:1]).logits.sum().backward()
        blocks = [any(p.grad is not None for p in block.parameters()) for block in tiny_model.encoder.network]
        assert blocks == [False] * (len(blocks) - trainable) + [True] * trainable
        assert tiny_model.decoder.project.weight.grad is not None
