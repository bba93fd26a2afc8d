"""Teacher forcing keeps what its steps share and makes gradients once: they are autograd's own."""

from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model
from torch import Tensor

from captioner.attention import ATTENTIONS
from captioner.decoder import CELLS, Memory
from captioner.model import CaptionModel
from captioner.tokenizer import END, PAD, START

BOTH = [(cell, attention) for cell in CELLS for attention in ATTENTIONS]
CAPTIONS = [[5, 9, 30, 8, 12, 6, END], [7, 6, 21, END], [7, 8, 9, END], [11, END], [END]]
LENGTHS = torch.tensor([len(c) for c in CAPTIONS])
TOKENS = torch.tensor([[START, *c] + [PAD] * (7 - len(c)) for c in CAPTIONS])
MASK = torch.tensor([[1.0] * 6, [1, 1, 0, 0, 0.5, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 0], [1] * 6])


@pytest.fixture(scope="module")
def tiny() -> CaptionModel:
    return make_tiny_model()


def make(tiny: CaptionModel, **changes: object) -> CaptionModel:
    torch.manual_seed(3)
    model = CaptionModel(tiny.encoder, replace(tiny.decoder.config, **changes), tiny.tokenizer)
    for parameter in model.decoder.parameters():  # far from zero, so that nothing is nearly linear
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def look(model: CaptionModel) -> Memory:
    dtype = model.decoder.project.weight.dtype
    features = torch.randn(5, 6, model.encoder.width, generator=torch.Generator().manual_seed(1))
    return model.decoder.memory(features.to(dtype), MASK.to(dtype))


def loss_of(logits: Tensor, attention: Tensor | None) -> Tensor:
    loss = torch.nn.functional.cross_entropy(logits, torch.cat([torch.tensor(c) for c in CAPTIONS]))
    return loss if attention is None else loss + ((1 - attention.sum(1)) ** 2).mean()


def by_steps(model: CaptionModel) -> Tensor:
    """Every caption on its own, step by step, with autograd alone."""
    memory = look(model)
    logits, looked = [], []
    for row, caption in enumerate(CAPTIONS):
        mine = memory.select(torch.tensor([row]))
        state, weights = model.decoder.start(mine), []
        for t in range(len(caption)):
            step = model.decoder.step(TOKENS[row, t : t + 1], state, mine)
            state = step.state
            logits.append(model.decoder.logits(step.output))
            if step.attention is not None:
                weights.append(step.attention)
        if weights:
            looked.append(torch.cat(weights + [torch.zeros_like(weights[0])] * (7 - len(weights))))
    return loss_of(torch.cat(logits), torch.stack(looked) if looked else None)


def at_once(model: CaptionModel) -> Tensor:
    output = model(look(model), TOKENS, LENGTHS)
    return loss_of(output.logits, output.attention)


def gradients(model: CaptionModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad for n, p in model.decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("cell", "attention"), BOTH)
def test_gradients_are_those_of_the_steps(
    tiny: CaptionModel, cell: str, attention: str, layer_norm: bool
) -> None:
    model = make(tiny, cell=cell, attention=attention, layer_norm=layer_norm)
    model.decoder.double()
    expected = gradients(model, by_steps(model))
    found = gradients(model, at_once(model))
    assert found.keys() == expected.keys() == dict(model.decoder.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("attention", ["additive", "dot"])
def test_compiled_steps_leave_the_gradients_to_autograd(
    tiny: CaptionModel, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tiny, attention=attention)
    expected = gradients(model, at_once(model))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = gradients(model, at_once(model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["additive", "dot"])
def test_a_pass_may_be_differentiated_twice(tiny: CaptionModel, attention: str) -> None:
    model = make(tiny, attention=attention)
    loss = at_once(model)
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.decoder.named_parameters()}
    loss.backward()
    for name, parameter in model.decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("attention", ["additive", "dot"])
def test_what_is_frozen_gets_no_gradient(tiny: CaptionModel, attention: str) -> None:
    model = make(tiny, attention=attention)
    expected = gradients(model, at_once(model))
    frozen = ("project.weight", "project.bias", "attention.key.weight")
    for name in frozen:
        model.decoder.get_parameter(name).requires_grad_(False)
    found = gradients(model, at_once(model))
    assert found.keys() == expected.keys() - set(frozen)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("attention", ["additive", "dot", "none"])
def test_gradients_in_mixed_precision(tiny: CaptionModel, attention: str) -> None:
    model = make(tiny, attention=attention)
    expected = gradients(model, at_once(model))
    with torch.autocast("cpu", torch.bfloat16):
        loss = at_once(model)
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    whole = torch.cat([g.flatten() for g in expected.values()])
    rounded = torch.cat([found[n].flatten() for n in expected])
    assert rounded.dtype == torch.float32
    assert (rounded - whole).norm() < 0.1 * whole.norm()


def test_nothing_is_kept_without_gradients(tiny: CaptionModel) -> None:
    model = make(tiny)
    expected = at_once(model)
    with torch.no_grad():
        loss = at_once(model)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, expected.detach())
