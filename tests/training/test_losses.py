"""The loss against torch's own in 64 bits, and against its formula."""

import pytest
import torch
import torch.nn.functional as F
from captioner_training.config import LossConfig
from captioner_training.losses import caption_loss

from captioner.model import TeacherForced

LENGTHS = [6, 4, 4, 1]
VOCABULARY, CELLS = 11, 5


def made_up(seed=0):
    """Return logits (N, T, V), attention (N, T, C), targets (N, T) and lengths, padding included."""
    generator = torch.Generator().manual_seed(seed)
    rows, steps = len(LENGTHS), LENGTHS[0]
    logits = torch.randn(rows, steps, VOCABULARY, generator=generator, dtype=torch.double)
    attention = torch.softmax(torch.randn(rows, steps, CELLS, generator=generator, dtype=torch.double), -1)
    targets = torch.randint(4, VOCABULARY, (rows, steps), generator=generator)
    return logits, attention, targets, torch.tensor(LENGTHS)


def valid(lengths, steps):
    return torch.arange(steps) < lengths[:, None]


def positions(inside):
    return inside.flatten().nonzero().squeeze(1)


def loss_of(logits, attention, targets, lengths, rows=slice(None), **config):
    """Return the loss of some of the rows as a part of all."""
    total, captions = int(lengths.sum()), len(lengths)
    lengths = lengths[rows]
    steps = int(lengths[0])
    inside = valid(lengths, steps)
    output = TeacherForced(
        logits[rows, :steps][inside], positions(inside), attention[rows, :steps] * inside[..., None], None
    )
    settings = LossConfig(**config)
    return caption_loss(output, targets[rows, :steps] * inside, settings, tokens=total, captions=captions)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_with_label_smoothing_is_torch_s(smoothing):
    logits, attention, targets, lengths = made_up()
    inside = valid(lengths, logits.shape[1])
    expected = F.cross_entropy(logits[inside], targets[inside], label_smoothing=smoothing)
    found = loss_of(logits, attention, targets, lengths, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_label_smoothing_by_its_formula():
    logits, attention, targets, lengths = made_up()
    log_p = torch.log_softmax(logits, -1)
    expected = 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            expected -= 0.9 * log_p[row, t, targets[row, t]] + 0.1 * log_p[row, t].mean()
    found = loss_of(logits, attention, targets, lengths, label_smoothing=0.1)
    torch.testing.assert_close(found, expected / sum(LENGTHS), rtol=1e-12, atol=0)


def test_reduction_over_captions_sums_the_steps_of_each():
    logits, attention, targets, lengths = made_up()
    by_token = loss_of(logits, attention, targets, lengths, label_smoothing=0.1)
    by_caption = loss_of(logits, attention, targets, lengths, label_smoothing=0.1, reduction="captions")
    torch.testing.assert_close(by_caption, by_token * sum(LENGTHS) / len(LENGTHS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["tokens", "captions"])
def test_padding_contributes_nothing(reduction):
    logits, attention, targets, lengths = made_up()
    config = {"label_smoothing": 0.1, "doubly_stochastic": 0.7, "reduction": reduction}
    before = loss_of(logits, attention, targets, lengths, **config)
    outside = ~valid(lengths, logits.shape[1])
    logits[outside] = 1e3
    attention[outside] = 1e3
    targets[outside] = 0
    assert loss_of(logits, attention, targets, lengths, **config) == before
    logits.requires_grad_()
    loss_of(logits, attention, targets, lengths, **config).backward()
    assert not logits.grad[outside].any()


@pytest.mark.parametrize("reduction", ["tokens", "captions"])
@pytest.mark.parametrize("doubly", [0.0, 0.7])
def test_the_parts_add_up_to_the_whole(reduction, doubly):
    batch = made_up()
    config = {"label_smoothing": 0.1, "doubly_stochastic": doubly, "reduction": reduction}
    whole = loss_of(*batch, **config)
    parts = [loss_of(*batch, rows=rows, **config) for rows in ([0, 2], [1], [3])]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_doubly_stochastic_attention_by_its_formula():
    logits, attention, targets, lengths = made_up()
    expected = 0.0
    for row, length in enumerate(LENGTHS):
        for cell in range(CELLS):
            looked = sum(attention[row, t, cell] for t in range(length))
            expected += (1 - looked) ** 2
    plain = loss_of(logits, attention, targets, lengths)
    found = loss_of(logits, attention, targets, lengths, doubly_stochastic=0.7) - plain
    torch.testing.assert_close(found, 0.7 * expected / len(LENGTHS), rtol=1e-10, atol=0)


def test_a_model_without_attention_has_no_doubly_stochastic_term():
    logits, _, targets, lengths = made_up()
    inside = valid(lengths, logits.shape[1])
    output = TeacherForced(logits[inside], positions(inside), None, None)
    arguments = {"tokens": sum(LENGTHS), "captions": len(LENGTHS)}
    with_term = caption_loss(output, targets, LossConfig(doubly_stochastic=1.0), **arguments)
    assert with_term == caption_loss(output, targets, LossConfig(), **arguments)
