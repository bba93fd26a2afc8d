"""Gradient norms: against closed forms, finite differences, and what must not count."""

import math

import pytest
import torch
import torch.nn.functional as F
from captioner_training.gradients import gradient_norms
from torch import Tensor

from captioner.decoder import Decoder, DecoderConfig, Memory, Output

WIDTH, WORDS = 6, 12


def make_decoder(**changes: object) -> Decoder:
    torch.manual_seed(5)
    shape = {"hidden": 5, "embedding": 4, "cells": 6, "attention_width": 3, "dropout": 0.5}
    return Decoder(DecoderConfig(**{**shape, **changes}), WIDTH, WORDS)


def make_captions(*lengths: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(6)
    return torch.randint(4, WORDS, (len(lengths), max(lengths) + 1)), torch.tensor(lengths)


def memory_for(decoder: Decoder, captions: int) -> Memory:
    torch.manual_seed(7)
    with torch.no_grad():
        features = torch.rand(captions, 9, WIDTH, dtype=decoder.embedding.weight.dtype)
        decoder.eval()
        return decoder.memory(features, torch.ones(captions, 9, dtype=features.dtype))


def test_a_linear_recurrence_halves_the_gradient_at_every_step():
    decoder = make_decoder(cell="rnn_tanh", attention="none")
    with torch.no_grad():  # the state stays 0, where tanh has slope 1: d state / d earlier is W itself
        for parameter in (*decoder.cell.parameters(), *decoder.initial.parameters()):
            parameter.zero_()
        decoder.cell.cell.weight_hh.copy_(0.5 * torch.eye(5))
    norms = gradient_norms(decoder, memory_for(decoder, 2), *make_captions(8, 7), reach=6)
    assert [norm / norms.state[0] for norm in norms.state] == pytest.approx([0.5**k for k in range(7)])
    assert norms.hidden == norms.state


def test_an_open_forget_gate_lets_the_gradient_through():
    decoder = make_decoder(cell="lstm", attention="none")
    cell = decoder.cell.cell
    with torch.no_grad():
        for parameter in (*cell.parameters(), *decoder.initial.parameters()):
            parameter.zero_()
        cell.bias_hh[:5] = -30  # input gate shut
        cell.bias_hh[5:10] = 30  # forget gate open: the memory is copied; the output gate stands at one half
    norms = gradient_norms(decoder, memory_for(decoder, 2), *make_captions(8, 7), reach=6)
    shares = [norm / norms.state[0] for norm in norms.state]
    # d h / d c = o (1 - tanh(c)^2) = 1/2 with the memory at 0, however many steps ago
    assert shares == pytest.approx([1, *[0.5] * 6])
    assert norms.hidden[0] == norms.state[0]
    assert norms.hidden[1:] == pytest.approx([0] * 6)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("attention", ["none", "dot", "additive"])
def test_as_by_finite_differences(cell, attention):
    decoder = make_decoder(cell=cell, attention=attention).double().eval()
    (tokens, lengths), reach = make_captions(4), 3
    memory = memory_for(decoder, 1)

    def loss_from(state: Tensor, first: int) -> float:
        """Go on from the state after step ``first`` and return the loss of the word at the last step."""
        for t in range(first + 1, 4):
            step = decoder.step(tokens[:, t], state, memory)
            state = step.state
        if first == 3:  # at its own step the state reaches the word through the output layer alone
            hidden = decoder.step(tokens[:, 3], before, memory).output.hidden
            output = Output(hidden - decoder.output_state(own[:, 0]) + decoder.output_state(state[:, 0]))
        else:
            output = step.output
        return float(F.cross_entropy(decoder.logits(output), tokens[:, 4]))

    with torch.no_grad():
        states = [decoder.start(memory)]
        for t in range(4):
            states.append(decoder.step(tokens[:, t], states[-1], memory).state)
        before, own = states[3], states[4]
        expected = []
        for k in range(reach + 1):
            state, slopes = states[4 - k], []
            for index in range(state.numel()):
                nudge = torch.zeros_like(state)
                nudge.view(-1)[index] = 1e-6
                slopes.append(
                    (loss_from(state + nudge, 3 - k) - loss_from(state - nudge, 3 - k)) / (2 * 1e-6)
                )
            expected.append(math.hypot(*slopes))
    norms = gradient_norms(decoder, memory, tokens, lengths, reach)
    assert norms.pairs == 1
    assert norms.state == pytest.approx(expected, rel=1e-5)


def test_captions_that_are_too_short_do_not_count():
    decoder = make_decoder()
    tokens, lengths = make_captions(9, 7, 5, 3)
    memory = memory_for(decoder, 4)
    everything = gradient_norms(decoder, memory, tokens, lengths, reach=5)
    long = gradient_norms(decoder, memory.select(torch.tensor([0, 1])), tokens[:2], lengths[:2], reach=5)
    assert everything.pairs == long.pairs == 4 + 2  # steps 5 to 8, and 5 and 6
    assert everything.state == pytest.approx(long.state)


def test_the_mean_is_over_captions_and_steps():
    decoder = make_decoder()
    tokens, lengths = make_captions(6, 6)
    memory = memory_for(decoder, 2)
    both = gradient_norms(decoder, memory, tokens, lengths, reach=5)
    single = [
        gradient_norms(decoder, memory.select(torch.tensor([i])), tokens[i : i + 1], lengths[i : i + 1], 5)
        for i in range(2)
    ]
    means = [(a + b) / 2 for a, b in zip(single[0].state, single[1].state, strict=True)]
    assert both.state == pytest.approx(means)


def test_the_decoder_is_left_as_it_was_and_dropout_is_off():
    decoder = make_decoder()
    memory = memory_for(decoder, 2)
    decoder.train()
    first, second = (gradient_norms(decoder, memory, *make_captions(7, 6), reach=4) for _ in range(2))
    assert first == second
    assert decoder.training
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_captions_must_be_long_enough():
    decoder = make_decoder()
    with pytest.raises(ValueError, match="no caption has more than 6 words"):
        gradient_norms(decoder, memory_for(decoder, 1), *make_captions(6), reach=6)
