from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from captioner.attention import ATTENTIONS
from captioner.decoder import CELLS, Decoder, DecoderConfig, Memory, NormalisedCell

V, D = 11, 9
SMALL = DecoderConfig(hidden=8, embedding=6, cells=7, attention_width=5)
BOTH = [(cell, attention) for cell in CELLS for attention in ATTENTIONS]
MASK = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0.5, 0], [0, 0, 0, 1]])


def make(seed: int = 0, **changes: object) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(replace(SMALL, **changes), D, V)
    nn.init.normal_(decoder.embedding.weight)
    return decoder.eval()


def look(decoder: Decoder, seed: int = 1) -> Memory:
    features = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(seed))
    return decoder.memory(features, MASK)


# --------------------------------------------------------------------------------------------------
# The cells


@pytest.mark.parametrize("cell", CELLS)
def test_without_attention_the_decoder_is_torchs_own_recurrent_network(cell: str) -> None:
    decoder = make(cell=cell, attention="none")
    module = {
        "lstm": lambda: nn.LSTM(6, 8, batch_first=True),
        "gru": lambda: nn.GRU(6, 8, batch_first=True),
        "rnn_tanh": lambda: nn.RNN(6, 8, nonlinearity="tanh", batch_first=True),
        "rnn_relu": lambda: nn.RNN(6, 8, nonlinearity="relu", batch_first=True),
    }[cell]()
    module.load_state_dict({f"{k}_l0": v for k, v in decoder.cell.cell.state_dict().items()})
    memory = look(decoder)
    tokens = torch.randint(V, (3, 5))
    start = decoder.start(memory).transpose(0, 1).contiguous()
    first = (start[:1], start[1:]) if cell == "lstm" else start
    expected, last = module(decoder.embedding(tokens), first)
    last = torch.stack([s[0] for s in last], 1) if cell == "lstm" else last.transpose(0, 1)

    state, found = decoder.start(memory), []
    for t in range(5):
        step = decoder.step(tokens[:, t], state, memory)
        state = step.state
        found.append(state[:, 0])
        assert step.attention is None
        assert step.gate is None
    torch.testing.assert_close(torch.stack(found, 1), expected)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("cell", CELLS)
def test_a_normalised_cell_is_what_the_paper_says(cell: str) -> None:
    """Equations 20 to 22 of Ba, Kiros and Hinton (2016), and their like for the other cells."""
    torch.manual_seed(0)
    made = NormalisedCell(cell, 5, 8)
    for p in made.parameters():
        nn.init.normal_(p)
    x, h, c = torch.randn(3, 5), torch.randn(3, 8), torch.randn(3, 8)
    found = made(x, (h, c)) if cell == "lstm" else made(x, h)

    def norm(z: Tensor, layer: nn.LayerNorm) -> Tensor:
        mean, deviation = z.mean(-1, keepdim=True), z.std(-1, correction=0, keepdim=True)
        return (z - mean) / deviation * layer.weight + layer.bias

    a = norm(x @ made.input.weight.T, made.input_norm)
    b = norm(h @ made.recurrent.weight.T, made.recurrent_norm)
    if cell == "lstm":
        i, f, g, o = (a + b).split(8, -1)
        memory = f.sigmoid() * c + i.sigmoid() * g.tanh()
        assert made.memory_norm is not None
        torch.testing.assert_close(found[1], memory, rtol=1e-3, atol=1e-4)  # torch adds an epsilon
        torch.testing.assert_close(
            found[0], o.sigmoid() * norm(memory, made.memory_norm).tanh(), rtol=1e-3, atol=1e-4
        )
        return
    if cell == "gru":
        (ra, za, na), (rb, zb, nb) = a.split(8, -1), b.split(8, -1)
        z = (za + zb).sigmoid()
        expected = (1 - z) * (na + (ra + rb).sigmoid() * nb).tanh() + z * h
    else:
        expected = (a + b).relu() if cell == "rnn_relu" else (a + b).tanh()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_normalised_cells_take_the_place_of_plain_ones(cell: str) -> None:
    decoder = make(cell=cell, layer_norm=True)
    memory = look(decoder)
    state = decoder.start(memory)
    step = decoder.step(torch.tensor([1, 2, 3]), state, memory)
    assert step.state.shape == state.shape == make(cell=cell).start(memory).shape
    # what comes in may be a thousand times larger: normalised, it makes next to no difference
    large = memory._replace(cells=memory.cells * 1000)
    step_large = decoder.cell(torch.cat((torch.zeros(3, 6), large.cells[:, 0]), -1), state)
    step_small = decoder.cell(torch.cat((torch.zeros(3, 6), memory.cells[:, 0]), -1), state)
    torch.testing.assert_close(step_large, step_small, rtol=1e-2, atol=1e-3)
    if cell == "lstm":
        assert isinstance(decoder.cell.cell, NormalisedCell)
        assert (decoder.cell.cell.recurrent_norm.bias[8:16] == 1).all()


def test_the_lstm_remembers_by_default() -> None:
    bias = make(cell="lstm").cell.cell.bias_hh
    assert (bias[8:16] == 1).all()  # torch's order of gates: input, forget, cell, output
    assert (bias[:8].abs() < 1).all()
    assert (bias[16:].abs() < 1).all()


# --------------------------------------------------------------------------------------------------
# One step against the paper's equations


@pytest.mark.parametrize(("gate", "deep"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_step_is_what_the_paper_says(gate: bool, deep: bool) -> None:
    decoder = make(gate=gate, deep_output=deep).double()
    features = torch.randn(1, 4, D, dtype=torch.double)
    mask = MASK[1:2].double()
    memory = decoder.memory(features, mask)
    state, token = torch.randn(1, 2, 8, dtype=torch.double), torch.tensor([4])
    step = decoder.step(token, state, memory)

    h, c = state[0]
    cells = torch.relu(features[0] @ decoder.project.weight.T + decoder.project.bias)
    att = decoder.attention
    energies = torch.stack(
        [
            att.energy.weight[0] @ torch.tanh(att.key.weight @ cell + att.query.weight @ h + att.query.bias)
            for cell in cells
        ]
    )
    weights = mask[0] * energies.exp()
    weights = weights / weights.sum()
    context = weights @ cells
    if gate:
        beta = torch.sigmoid(decoder.gate.weight[0] @ h + decoder.gate.bias[0])
        context = beta * context
        torch.testing.assert_close(step.gate[0], beta)
    else:
        assert step.gate is None
    x = torch.cat((decoder.embedding.weight[4], context))
    lstm = decoder.cell.cell
    i, f, g, o = (lstm.weight_ih @ x + lstm.bias_ih + lstm.weight_hh @ h + lstm.bias_hh).view(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    output = decoder.output_state.weight @ h + decoder.output_state.bias
    if deep:
        output = output + decoder.embedding.weight[4] + decoder.output_context.weight @ context
    logits = decoder.output.weight @ output.tanh() + decoder.output.bias
    torch.testing.assert_close(step.attention[0], weights)
    torch.testing.assert_close(step.state[0], torch.stack((h, c)))
    torch.testing.assert_close(decoder.logits(step.output)[0], logits)


@pytest.mark.parametrize(("cell", "attention"), BOTH)
def test_shapes_and_ranges(cell: str, attention: str) -> None:
    decoder = make(cell=cell, attention=attention)
    memory = look(decoder)
    state = decoder.start(memory)
    assert state.shape == (3, 2 if cell == "lstm" else 1, 8)
    step = decoder.step(torch.tensor([1, 2, 3]), state, memory)
    assert step.state.shape == state.shape
    assert decoder.logits(step.output).shape == (3, V)
    if attention == "none":
        assert step.attention is None
        assert step.gate is None
        return
    assert step.attention.shape == (3, 4)
    torch.testing.assert_close(step.attention.sum(-1), torch.ones(3))
    assert (step.attention[MASK == 0] == 0).all()
    assert ((step.gate > 0) & (step.gate < 1)).all()
    assert step.gate.shape == (3,)


# --------------------------------------------------------------------------------------------------
# Masks and memory


def test_the_initial_state_is_the_mean_of_what_is_seen() -> None:
    decoder = make()
    memory = look(decoder)
    weights = torch.tensor([1, 0, 0.5, 0]) / 1.5
    mean = (memory.cells[1] * weights[:, None]).sum(0)
    expected = torch.tanh(decoder.initial(mean)).view(2, 8)
    torch.testing.assert_close(decoder.start(memory)[1], expected)
    # the last picture shows one cell
    torch.testing.assert_close(
        decoder.start(memory)[2], torch.tanh(decoder.initial(memory.cells[2, 3])).view(2, 8)
    )


@pytest.mark.parametrize(("cell", "attention"), BOTH)
def test_what_lies_under_the_mask_leaves_no_trace(cell: str, attention: str) -> None:
    decoder = make(cell=cell, attention=attention)
    features = torch.randn(3, 4, D)
    garbage = torch.where(MASK[..., None] == 0, torch.full_like(features, 1e6), features)
    outputs = []
    for seen in (features, garbage):
        memory = decoder.memory(seen, MASK)
        state = decoder.start(memory)
        for token in (1, 5, 2):
            step = decoder.step(torch.full((3,), token), state, memory)
            state = step.state
        outputs.append((decoder.logits(step.output), state, step.attention, step.gate))
    for one, other in zip(*outputs, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_beams_share_the_memory_of_their_picture(attention: str) -> None:
    decoder = make(attention=attention)
    memory = look(decoder)
    rows = torch.arange(3).repeat_interleave(2)
    state, tokens = torch.randn(6, 2, 8), torch.randint(V, (6,))
    shared = decoder.step(tokens, state, memory)
    repeated = decoder.step(tokens, state, memory.select(rows))
    for one, other in zip(shared, repeated, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


def test_memory_selects_rows_in_order() -> None:
    memory = look(make())
    picked = memory.select(torch.tensor([2, 0, 0]))
    assert torch.equal(picked.cells, memory.cells[[2, 0, 0]])
    assert torch.equal(picked.keys, memory.keys[[2, 0, 0]])
    assert torch.equal(picked.mask, MASK[[2, 0, 0]])


# --------------------------------------------------------------------------------------------------
# Tied weights, dropout, gradients


def test_tied_weights_are_one_tensor_and_others_are_not() -> None:
    tied, free = make(tied=True), make(tied=False)
    assert tied.output.weight is tied.embedding.weight
    assert free.output.weight is not free.embedding.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == V * 6
    other = make(seed=5, tied=True)
    other.load_state_dict(tied.state_dict())
    assert other.output.weight is other.embedding.weight
    assert torch.equal(other.output.weight, tied.output.weight)


def test_dropout_only_in_training() -> None:
    decoder = make(dropout=0.5)
    features = torch.randn(3, 4, D)

    def run() -> Tensor:
        memory = decoder.memory(features, MASK)
        return decoder.logits(decoder.step(torch.tensor([1, 2, 3]), decoder.start(memory), memory).output)

    assert torch.equal(run(), run())
    decoder.train()
    assert not torch.equal(run(), run())


@pytest.mark.parametrize(("cell", "attention"), BOTH)
def test_gradients_flow_through_the_whole_caption(cell: str, attention: str) -> None:
    decoder = make(cell=cell, attention=attention)
    memory = look(decoder)
    embedded = decoder.embedding(torch.randint(V, (3, 6))).detach().requires_grad_()
    state = decoder.start(memory)
    for t in range(6):
        step = decoder.step_embedded(embedded[:, t], state, memory)
        state = step.state
    decoder.logits(step.output)[:, 3].sum().backward()  # of the last step alone
    assert (embedded.grad.flatten(2).abs().sum(-1) > 0).all()  # the first word included
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# --------------------------------------------------------------------------------------------------
# The configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": "lstmm"}, "decoder.cell must be one of rnn_tanh, rnn_relu, gru, lstm, not 'lstmm'"),
        ({"attention": "dots"}, "decoder.attention must be one of additive, dot, none, not 'dots'"),
        ({"hidden": 0}, "decoder.hidden must be at least 1, not 0"),
        ({"hidden": "512"}, "decoder.hidden must be int, not '512'"),
        ({"hidden": True}, "decoder.hidden must be int, not True"),
        ({"gate": 1}, "decoder.gate must be bool, not 1"),
        ({"dropout": 1.0}, r"decoder.dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": float("nan")}, "decoder.dropout must be in"),
        ({"width": 3}, "unknown key decoder.width"),
    ],
)
def test_config_errors_name_the_field(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict({**SMALL.to_dict(), **changes})


def test_config_round_trip() -> None:
    config = replace(SMALL, gate=False, dropout=0, cell="gru")
    assert DecoderConfig.from_dict(config.to_dict()) == config
