"""Self-critical training against the exact gradient of the expected reward, by enumeration."""

import itertools

import pytest
import torch
from captioner_training.cider import CiderD
from captioner_training.self_critical import advantages, log_probabilities, sample, self_critical_loss
from conftest import sharpen
from shape_data import COMBINATIONS, captions

from captioner.decoder import DecoderConfig
from captioner.model import CaptionModel
from captioner.tokenizer import END, PAD, START, UNKNOWN, WordTokenizer

X, Y = 4, 5
LONGEST = 3
REFERENCES = [[[X, Y, END], [X, END]], [[Y, Y, X], [Y, END]]]


class Blind(torch.nn.Module):
    """Stands in for an encoder: memories are made by hand."""

    width = 6


def make_model(words=("x", "y"), dropout=0.0, **config):
    torch.manual_seed(5)
    shape = {"hidden": 8, "embedding": 6, "cells": 7, "attention_width": 5, "dropout": dropout, **config}
    model = CaptionModel(Blind(), DecoderConfig(**shape), WordTokenizer(words))
    sharpen(model.decoder)
    with torch.no_grad():
        model.decoder.output.bias[END] = 2.0  # captions of all lengths
    return model.train()


def make_memory(model, pictures=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(pictures, 4, Blind.width, generator=generator)
    return model.decoder.memory(features.to(model.device), torch.ones(pictures, 4))


def all_captions():
    """Return every caption that can be drawn: 2 of one word, 4 of two, 8 that do not end in time."""
    found = []
    for length in (1, 2):
        found += [[*words, END] for words in itertools.product((X, Y), repeat=length)]
    return found + [list(words) for words in itertools.product((X, Y), repeat=LONGEST)]


def log_probs_of(model, memory, drawn, temperature=1.0):
    """Return the log-probability ``(N,)`` of each caption of the memory's one picture."""
    order = sorted(range(len(drawn)), key=lambda i: -len(drawn[i]))
    lengths = torch.tensor([len(drawn[i]) for i in order])
    tokens = torch.full((len(drawn), int(lengths[0]) + 1), PAD)
    for row, i in enumerate(order):
        tokens[row, : len(drawn[i]) + 1] = torch.tensor([START, *drawn[i]])
    output = model(memory.select(torch.zeros(len(drawn), dtype=torch.long)), tokens, lengths)
    each = log_probabilities(output, tokens[:, 1:], lengths, model.tokenizer, temperature)
    sums = torch.stack([part.sum() for part in each.split(lengths.tolist())])
    return sums[torch.tensor(order).argsort()]


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.decoder.parameters() if p.grad is not None])


def exact_gradient(model, temperature=1.0):
    """Return the gradient of the expected reward over all captions of the first picture."""
    memory = make_memory(model).select(torch.tensor([0]))
    drawn = all_captions()
    rewards = torch.from_numpy(CiderD(REFERENCES).rewards([0] * len(drawn), drawn))
    return gradient(model, (log_probs_of(model, memory, drawn, temperature).exp() * rewards).sum())


def test_the_captions_that_can_be_drawn_have_probability_1_together():
    model = make_model()
    total = log_probs_of(model, make_memory(model, 1), all_captions()).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("attention", ["additive", "dot", "none"])
def test_captions_are_drawn_as_often_as_their_probability_says(attention):
    model = make_model(attention=attention)
    memory = make_memory(model, 2)
    torch.manual_seed(1)
    count = 20_000
    drawn = sample(model, memory, samples=count, max_length=LONGEST)
    assert len(drawn) == 2 * count
    for picture in range(2):
        some = drawn[picture * count : (picture + 1) * count]
        shares = torch.tensor([some.count(caption) / count for caption in all_captions()])
        assert float(shares.sum()) == pytest.approx(1.0)  # nothing else was said
        expected = log_probs_of(model, memory.select(torch.tensor([picture])), all_captions()).exp()
        spread = (expected * (1 - expected) / count).sqrt()
        assert ((shares - expected).abs() < 4.5 * spread + 1e-9).all()


def test_what_the_search_never_says_is_never_drawn():
    model = make_model(tuple("abcdefgh"))
    with torch.no_grad():
        model.decoder.output.bias[[PAD, START, UNKNOWN, END]] = 3.0  # it would like to
    drawn = sample(model, make_memory(model, 30), samples=5, max_length=4)
    assert not {PAD, START, UNKNOWN} & {token for caption in drawn for token in caption}
    assert all(len(caption) >= 1 and caption[0] != END for caption in drawn)
    assert all(END not in caption[:-1] for caption in drawn)
    assert all(caption[-1] == END or len(caption) == 4 for caption in drawn)


def test_pieces_that_continue_a_word_do_not_come_first():
    model = make_model(tuple("abcdefgh"))
    pieces = {i: "##" * (i > 6) + str(i) for i in range(12)}

    class Pieces:
        kind = "bpe"

        def __len__(self):
            return len(pieces)

        def piece(self, token):
            return pieces[token]

    model.tokenizer = Pieces()
    drawn = sample(model, make_memory(model, 30), samples=5, max_length=6)
    assert {caption[0] for caption in drawn} <= {4, 5, 6}
    assert any(token > 6 for caption in drawn for token in caption[1:])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradient_is_that_of_the_expected_reward(temperature):
    model = make_model()
    expected = exact_gradient(model, temperature)
    memory = make_memory(model).select(torch.tensor([0]))
    torch.manual_seed(0)
    loss, info = self_critical_loss(
        model,
        memory,
        CiderD(REFERENCES),
        [0],
        samples=20_000,
        max_length=LONGEST,
        all_captions=20_000,
        temperature=temperature,
    )
    found = -gradient(model, loss)
    assert (found - expected).norm() < 0.06 * expected.norm()
    drawn = all_captions()
    probabilities = log_probs_of(model, memory, drawn, temperature).detach().exp()
    mean = probabilities.double() @ torch.from_numpy(CiderD(REFERENCES).rewards([0] * len(drawn), drawn))
    assert info["reward"] == pytest.approx(mean.item(), rel=0.05)
    assert info["ended"] == pytest.approx(probabilities[:6].sum().item(), abs=0.02)


def test_the_baseline_moves_no_mean():
    """Over all pairs of draws the mean of the estimate is the exact gradient, to rounding."""
    model = make_model()
    expected = exact_gradient(model)
    memory = make_memory(model).select(torch.tensor([0]))
    drawn = all_captions()
    rewards = torch.from_numpy(CiderD(REFERENCES).rewards([0] * len(drawn), drawn))
    log_probs = log_probs_of(model, memory, drawn)
    pairs = torch.cartesian_prod(torch.arange(len(drawn)), torch.arange(len(drawn)))
    chance = log_probs.detach()[pairs].sum(1).exp()
    estimate = (advantages(rewards[pairs]) * log_probs[pairs]).sum(1) / 2
    found = gradient(model, (chance * estimate).sum())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_advantage_is_over_the_mean_of_the_others():
    found = advantages(torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]]))
    assert found.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


def test_the_same_seed_gives_the_same_loss():
    model = make_model(dropout=0.3)

    def loss(seed):
        torch.manual_seed(seed)
        value, info = self_critical_loss(
            model, make_memory(model), CiderD(REFERENCES), [0, 1], samples=20, max_length=4, all_captions=40
        )
        return gradient(model, value), info

    first, info = loss(3)
    again, info_again = loss(3)
    assert torch.equal(first, again)
    assert info == info_again
    assert not torch.equal(first, loss(4)[0])
    assert model.training
    assert model.decoder.dropout.training


def test_a_generator_of_its_own():
    model = make_model(tuple("abcdefgh"))
    memory = make_memory(model)
    draws = [
        sample(model, memory, samples=3, max_length=6, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_dropout_is_off_while_drawing():
    """What dropout does to the loss is left to the pass that learns; and the mode stays as it was."""
    model = make_model(tuple("abcdefgh"), dropout=0.9)
    memory = make_memory(model.eval()).detach()
    drawn = []
    for training in (True, False):
        model.train(training)
        generator = torch.Generator().manual_seed(1)
        drawn.append(sample(model, memory, samples=20, max_length=6, generator=generator))
        assert model.decoder.training is training
        assert model.decoder.dropout.training is training
    assert drawn[0] == drawn[1]


def test_parts_of_a_batch_add_up():
    model = make_model()
    judge, memory = CiderD(REFERENCES), make_memory(model)
    torch.manual_seed(0)
    drawn = sample(model, memory, samples=3, max_length=LONGEST)
    rewards = torch.from_numpy(judge.rewards([0, 0, 0, 1, 1, 1], drawn)).view(2, 3)
    expected = 0.0
    for picture in range(2):
        log_probs = log_probs_of(model, memory.select(torch.tensor([picture])), drawn[3 * picture :][:3])
        expected -= (advantages(rewards)[picture] * log_probs).sum() / 6
    torch.manual_seed(0)
    loss, info = self_critical_loss(
        model, memory, judge, [0, 1], samples=3, max_length=LONGEST, all_captions=6
    )
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-6)
    assert info["reward"] == pytest.approx(float(rewards.mean()))
    words = [len([t for t in caption if t != END]) for caption in drawn]
    assert info["length"] == pytest.approx(sum(words) / 6)
    torch.manual_seed(0)
    half, _ = self_critical_loss(model, memory, judge, [0, 1], samples=3, max_length=LONGEST, all_captions=12)
    torch.testing.assert_close(2 * half, loss)


def test_captions_end_at_different_times():
    """Pictures that are done are dropped on the way; their captions are what they would be alone."""
    model = make_model(tuple("abcdefgh"))
    memory = make_memory(model, 12)
    with torch.no_grad():
        model.decoder.output.bias[END] = 1.5
    drawn = sample(model, memory, samples=2, max_length=25)
    assert len({len(caption) for caption in drawn}) > 3
    judge = CiderD([[[4, 5, END]], [[6, END]]])
    loss, _ = self_critical_loss(model, memory, judge, [0, 1] * 6, samples=2, max_length=25, all_captions=24)
    assert loss.isfinite()
    assert gradient(model, loss).isfinite().all()


def test_one_sample_has_nothing_to_compare_with():
    model = make_model()
    with pytest.raises(ValueError, match="at least 2 samples"):
        self_critical_loss(
            model, make_memory(model), CiderD(REFERENCES), [0, 1], samples=1, max_length=3, all_captions=2
        )


def test_it_raises_the_reward():
    """Cross-entropy for a moment, then self-critical training, on captions of coloured shapes."""
    sentences = [captions(*shape) for shape in COMBINATIONS[:12]]
    words = sorted({word for some in sentences for c in some for word in c.split()})
    model = make_model(words, hidden=32, embedding=16, cells=24, attention_width=16)
    tokenizer = model.tokenizer
    references = [[[*tokenizer.encode(c), END] for c in some] for some in sentences]
    judge, pictures = CiderD(references), list(range(len(references)))
    features = torch.randn(len(references), 4, Blind.width, generator=torch.Generator().manual_seed(2))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)

    def memory():
        return model.decoder.memory(features, torch.ones(len(references), 4))

    tokens = torch.tensor([[START, *some[0]] for some in references])
    lengths = torch.full((len(references),), tokens.shape[1] - 1)
    for _ in range(20):
        logits = model(memory(), tokens, lengths).logits
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    rewards = []
    for _ in range(40):
        loss, info = self_critical_loss(
            model, memory(), judge, pictures, samples=5, max_length=12, all_captions=5 * len(pictures)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rewards.append(info["reward"])
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])
