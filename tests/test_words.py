"""The word memory: guesses, attention to them, and what becomes of it in search, captions and checkpoints."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_header, make_tiny_model
from lively import make_lively_model, pictures

from captioner import Captioner, checkpoint
from captioner.decoder import DecoderConfig, Memory
from captioner.model import CaptionModel
from captioner.naming import unnamed
from captioner.search import SearchOptions, search
from captioner.tokenizer import END, PAD, START

CONCEPTS = [14, 15, 16, 17, 24, 25, 30, 31]  # dog, cat, bicycle, car, small, large, grass, water
WORDS = {"words": 3, "concepts": len(CONCEPTS), "word_attention_width": 6}


def make_model(lively: bool = False, **changes: object) -> CaptionModel:
    model = (make_lively_model if lively else make_tiny_model)(**{**WORDS, **changes})
    assert model.decoder.guesser is not None
    model.decoder.guesser.tokens.copy_(torch.tensor(CONCEPTS))
    with torch.no_grad():  # as after training: words matter to the state too
        model.decoder.input_words.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        model.decoder.nothing.normal_(0, 1, generator=torch.Generator().manual_seed(2))
    return model


def look(model: CaptionModel, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.randn(4, 6, model.encoder.width, generator=torch.Generator().manual_seed(seed))
    return features, torch.tensor([[1.0] * 6, [1, 1, 0, 0, 0.5, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 0]])


def test_the_likeliest_words_are_remembered_with_their_probabilities() -> None:
    model = make_model()
    features, mask = look(model)
    decoder = model.decoder
    memory = decoder.memory(features, mask)
    assert decoder.guesser is not None
    pooled = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.sigmoid(pooled @ decoder.guesser.head.weight.T + decoder.guesser.head.bias)
    assert memory.word_mask is not None
    assert memory.words is not None
    assert torch.equal(memory.word_mask[:, 0], torch.ones(4))
    for row in range(4):
        order = expected[row].argsort(descending=True)[:3]
        assert torch.allclose(memory.word_mask[row, 1:], expected[row][order])
        tokens = torch.tensor(CONCEPTS)[order]
        entries = decoder.embedding(tokens) + expected[row][order][:, None] * decoder.sure
        assert torch.allclose(memory.words[row, 1:], entries, atol=1e-6)
        assert torch.equal(memory.words[row, 0], decoder.nothing)


def test_what_is_masked_brings_nothing_to_mind() -> None:
    model = make_model()
    features, mask = look(model)
    spoilt = torch.where(mask[..., None] == 0, torch.full_like(features, 1e4), features)
    assert torch.equal(model.decoder.guess(features, mask), model.decoder.guess(spoilt, mask))


def test_attention_to_words_is_a_share_that_grows_with_their_probability() -> None:
    model = make_model()
    memory = model.decoder.memory(*look(model))
    step = model.decoder.step(torch.tensor([START] * 4), model.decoder.start(memory), memory)
    assert step.word_attention is not None
    assert step.word_attention.shape == (4, 4)
    assert torch.allclose(step.word_attention.sum(1), torch.ones(4))
    assert memory.word_mask is not None
    doubtful = memory._replace(word_mask=memory.word_mask * torch.tensor([1.0, 0.5, 1.0, 0.0]))
    less = model.decoder.step(torch.tensor([START] * 4), model.decoder.start(memory), doubtful)
    assert less.word_attention is not None
    odds = step.word_attention[:, 1] / step.word_attention[:, 0]
    assert torch.allclose(less.word_attention[:, 1] / less.word_attention[:, 0], odds / 2, rtol=1e-4)
    assert torch.equal(less.word_attention[:, 3], torch.zeros(4))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"copying": True},
        {"attention": "none", "copying": True},
        {"cell": "gru", "gate": False},
        {"layer_norm": True},
    ],
)
def test_teacher_forcing_is_the_steps_one_by_one(changes: dict[str, object]) -> None:
    model = make_model(**changes)
    memory = model.decoder.memory(*look(model))
    captions = [[5, 9, 30, 8, 12], [7, 6, 21], [7, 8, 9], [11]]
    tokens = torch.tensor([[START, *c, END] + [PAD] * (5 - len(c)) for c in captions])
    lengths = torch.tensor([len(c) + 1 for c in captions])
    forced = model(memory, tokens, lengths)
    place = 0
    for row, length in enumerate(lengths.tolist()):
        mine = memory.select(torch.tensor([row]))
        state = model.decoder.start(mine)
        for t in range(length):
            step = model.decoder.step(tokens[row, t : t + 1], state, mine)
            state = step.state
            assert torch.allclose(model.decoder.logits(step.output)[0], forced.logits[place], atol=1e-4)
            place += 1


def test_gradients_of_the_unrolled_pass_are_those_of_the_steps() -> None:
    tokens = torch.tensor([[START, 5, 9, END], [START, 7, 6, END]])

    def gradients(unrolled: bool) -> dict[str, torch.Tensor]:
        model = make_model()
        features, mask = look(model)
        memory = model.decoder.memory(features[:2], mask[:2])
        if unrolled:
            logits = model(memory, tokens, torch.tensor([3, 3])).logits.view(2, 3, -1)
        else:
            state, rows = model.decoder.start(memory), []
            for t in range(3):
                step = model.decoder.step(tokens[:, t], state, memory)
                state = step.state
                rows.append(model.decoder.logits(step.output))
            logits = torch.stack(rows, 1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return {n: p.grad for n, p in model.decoder.named_parameters() if p.grad is not None}

    one, other = gradients(True), gradients(False)
    assert one.keys() == other.keys()
    names = ("nothing", "sure", "input_words.weight", "output_words.weight", "word_attention.key.weight")
    for name in names:
        assert one[name].abs().sum() > 0, name
    for name, gradient in one.items():
        assert torch.allclose(gradient, other[name], atol=1e-5), name


def test_guesses_learn_from_their_own_targets_alone() -> None:
    model = make_model()
    features, mask = look(model)
    model(
        model.decoder.memory(features, mask), torch.tensor([[START, 5, END]] * 4), torch.tensor([2] * 4)
    ).logits.sum().backward()
    assert model.decoder.guesser is not None
    assert model.decoder.guesser.head.weight.grad is None
    model.decoder.guess(features, mask).sum().backward()
    assert model.decoder.guesser.head.weight.grad is not None


def test_guesses_are_left_out_in_training_alone() -> None:
    model = make_model(word_dropout=0.9, dropout=0.0)
    features, mask = look(model)
    whole = model.decoder.memory(features, mask).word_mask
    assert whole is not None
    model.train()
    torch.manual_seed(0)
    some = model.decoder.memory(features, mask).word_mask
    assert some is not None
    gone = some == 0
    assert gone.sum() > 6
    assert not gone[:, 0].any()
    assert torch.equal(some[~gone], whole[~gone])


def test_a_style_begins_with_a_start_token_of_its_own() -> None:
    model = make_tiny_model(styles=2)
    assert model.decoder.style is not None
    with torch.no_grad():
        model.decoder.style[1].fill_(2.0)
    memory = model.decoder.memory(*look(model))
    tokens, lengths = torch.tensor([[START, 5, 9, END]] * 4), torch.tensor([3] * 4)
    usual = model(memory, tokens, lengths).logits
    assert torch.equal(model(memory, tokens, lengths, styles=torch.tensor([0] * 4)).logits, usual)
    assert torch.equal(model(memory, tokens, lengths, styles=torch.tensor([1] * 4)).logits, usual)
    mixed = model(memory, tokens, lengths, styles=torch.tensor([0, 2, 0, 0])).logits.view(4, 3, -1)
    assert torch.equal(mixed[[0, 2, 3]], usual.view(4, 3, -1)[[0, 2, 3]])
    assert (mixed[1] - usual.view(4, 3, -1)[1]).abs().max() > 0.01


@pytest.mark.parametrize("options", [{"beam": 1}, {"beam": 3, "n_best": 3}, {"sample": True, "n_best": 2}])
def test_attention_to_words_follows_the_hypothesis(options: dict[str, object]) -> None:
    model = make_model()
    memory = model.decoder.memory(*look(model))
    found = search(model.decoder, memory, SearchOptions(max_length=6, **options))  # type: ignore[arg-type]
    for row, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            mine = memory.select(torch.tensor([row]))
            state, previous = model.decoder.start(mine), START
            assert hypothesis.word_attention is not None
            assert hypothesis.word_attention.shape == (len(hypothesis.tokens), 3)
            for t, token in enumerate(hypothesis.tokens):
                step = model.decoder.step(torch.tensor([previous]), state, mine)
                state, previous = step.state, token
                assert step.word_attention is not None
                weights = step.word_attention[0, 1:].detach().numpy()
                assert np.allclose(hypothesis.word_attention[t], weights, atol=1e-5)


def test_without_a_word_memory_nothing_is_made_up() -> None:
    model = make_tiny_model()
    memory = model.decoder.memory(*look(model))
    assert set(memory[3:]) == {None}
    assert search(model.decoder, memory, SearchOptions(beam=1))[0][0].word_attention is None


def test_a_caption_tells_what_the_picture_brought_to_mind() -> None:
    model = make_model(lively=True)
    captioner = Captioner(model, make_header(model))
    caption = captioner.caption(pictures(1)[0])
    assert len(caption.guesses) == 3
    assert {g.text for g in caption.guesses} <= {model.tokenizer.piece(token) for token in CONCEPTS}
    chances = [g.probability for g in caption.guesses]
    assert chances == sorted(chances, reverse=True)
    for word in caption.words:
        assert word.word_attention is not None
        assert word.word_attention.shape == (3,)
        assert 0 <= word.word_attention.sum() <= 1 + 1e-6


def test_a_region_limits_the_guesses_too() -> None:
    model = make_model(lively=True)
    captioner = Captioner(model, make_header(model))
    photo = np.zeros((64, 128, 3), np.uint8)
    photo[:, 64:] = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    features = captioner.encode(photo)
    whole = captioner.caption(features)
    half = captioner.caption(features, region=(64, 0, 128, 64))
    assert [g.probability for g in whole.guesses] != [g.probability for g in half.guesses]
    # what the other half shows does not matter then
    other = features.data.clone()
    other[0, 0, [0, 2]] = 7.0
    again = captioner.caption(replace(features, data=other), region=(64, 0, 128, 64))
    assert [g.probability for g in again.guesses] == [g.probability for g in half.guesses]


def test_a_checkpoint_keeps_the_word_memory(tmp_path: Path) -> None:
    model = make_model(lively=True)
    path = tmp_path / "words.safetensors"
    checkpoint.save(path, model, make_header(model))
    loaded = checkpoint.load(path).model
    assert loaded.decoder.guesser is not None
    assert loaded.decoder.guesser.tokens.tolist() == CONCEPTS
    before, after = (Captioner(m, make_header(m)).caption(pictures(2)[1]) for m in (model, loaded))
    assert [g.text for g in before.guesses] == [g.text for g in after.guesses]


@pytest.mark.parametrize("token", [-1, 34, END, CONCEPTS[0]])
def test_ids_that_the_vocabulary_has_not_are_refused(tmp_path: Path, token: int) -> None:
    model = make_model()
    assert model.decoder.guesser is not None
    model.decoder.guesser.tokens[2] = token
    path = tmp_path / "bad.safetensors"
    checkpoint.save(path, model, make_header(model))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"guesser\.tokens holds ids that the vocabulary has not"
    ):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": 4, "concepts": 3}, "only decoder.concepts = 3 can be guessed"),
        ({"words": -1}, "decoder.words must be at least 0"),
        ({"word_dropout": 1.0}, "decoder.word_dropout must be in"),
        ({"words": 2, "concepts": 3, "word_attention_width": 0}, "must be at least 1"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DecoderConfig(), **changes)


def test_the_memory_is_selected_whole() -> None:
    model = make_model()
    memory = model.decoder.memory(*look(model))
    rows = torch.tensor([2, 0])
    for part, chosen in zip(memory, memory.select(rows), strict=True):
        assert (part is None and chosen is None) or torch.equal(part[rows], chosen)
    assert isinstance(memory.detach(), Memory)


def test_copying_mixes_the_guesses_into_what_the_output_layer_says() -> None:
    model = make_model(copying=True)
    decoder = model.decoder
    memory = decoder.memory(*look(model))
    with torch.no_grad():
        step = decoder.step(torch.tensor([START, 5, 9, 7]), decoder.start(memory), memory)
        plain = torch.softmax(decoder.logits(step.output._replace(copied=None)), -1)
        mixed = decoder.logits(step.output).exp()
    copied, tokens = step.output.copied, step.output.tokens
    assert copied is not None
    assert tokens is not None
    assert torch.allclose(mixed.sum(-1), torch.ones(4), atol=1e-5)
    expected = plain * (1 - copied.sum(-1, keepdim=True))
    for row in range(4):
        for token, probability in zip(tokens[row].tolist(), copied[row].tolist(), strict=True):
            expected[row, token] += probability
    assert torch.allclose(mixed, expected, atol=1e-6)


def test_a_word_that_the_output_layer_never_says_can_be_copied() -> None:
    model = make_model(copying=True)
    decoder = model.decoder
    features, mask = look(model)
    assert decoder.guesser is not None
    assert decoder.copy is not None
    with torch.no_grad():
        decoder.output.bias[CONCEPTS[2]] = -50
        decoder.guesser.head.weight.zero_()
        decoder.guesser.head.bias.fill_(-9.0)
        decoder.guesser.head.bias[2] = 9.0
        decoder.nothing.zero_()
        decoder.word_attention.energy.weight.zero_()
        decoder.copy.bias.fill_(20.0)
        decoder.copy.weight.zero_()
    memory = decoder.memory(features, mask)
    found = search(decoder, memory, SearchOptions(beam=3, no_repeat_ngram=0, max_length=4))
    assert CONCEPTS[2] in found[0][0].tokens


def test_a_missing_guess_gives_no_gradient_that_is_not_finite() -> None:
    model = make_model(copying=True, word_dropout=0.9, dropout=0.0).train()
    torch.manual_seed(0)
    memory = model.decoder.memory(*look(model))
    tokens, lengths = torch.tensor([[START, 14, 15, END]] * 4), torch.tensor([3] * 4)
    model(memory, tokens, lengths).logits.square().sum().backward()
    for name, parameter in model.decoder.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def sure_model(probability: float, thing: bool = True) -> CaptionModel:
    """Guesses a bicycle wherever it looks, and has no word memory to speak of otherwise."""
    model = make_model(lively=True)
    guesser = model.decoder.guesser
    assert guesser is not None
    with torch.no_grad():
        guesser.head.weight.zero_()
        guesser.head.bias.fill_(-9.0)
        guesser.head.bias[2] = np.log(probability / (1 - probability))
        guesser.things[2] = int(thing)
        model.decoder.output.bias[CONCEPTS[2]] = -6.0
    return model


@pytest.mark.parametrize(
    ("probability", "thing", "named"), [(0.9, True, True), (0.6, True, False), (0.9, False, False)]
)
def test_what_is_surely_there_is_named(probability: float, thing: bool, named: bool) -> None:
    model = sure_model(probability, thing)
    captioner = Captioner(model, make_header(model))
    photos = pictures(3)
    usual = captioner.caption_batch(photos)
    assert not any("bicycle" in c.text for c in usual)
    found = captioner.caption_batch(photos, name_above=0.7)
    for before, after in zip(usual, found, strict=True):
        assert ("bicycle" in after.text.split()) == named
        if not named:
            assert after.text == before.text


def test_naming_goes_together_with_all_else_that_is_asked_for() -> None:
    model = sure_model(0.9)
    captioner = Captioner(model, make_header(model))
    photo = pictures(1)[0]
    caption = captioner.caption(photo, name_above=0.7, prefix="the red", must=["dog"], n_best=2)
    assert len(caption.n_best) == 2
    for one in caption.n_best:
        assert one.text.startswith("the red")
        assert {"bicycle", "dog"} <= set(one.text.split())
    # no room: the caption is the one without
    short = captioner.caption(photo, name_above=0.7, prefix="the red", max_length=2)
    assert short.text == "the red"
    # six words, or phrases that take many states, are required already: there is room for no more
    six = ["man", "dog", "cat", "car", "tree", "street"]
    assert set(six) <= set(captioner.caption(photo, name_above=0.7, must=six).text.split())
    phrases = ["red dog", "blue cat", "black tree", "white car"]
    text = captioner.caption(photo, name_above=0.7, must=phrases).text
    assert all(phrase in text for phrase in phrases)


def test_a_plural_names_it_too() -> None:
    model = sure_model(0.9)
    tokens = [[model.tokenizer.index["bicycle"]], [5], []]  # type: ignore[attr-defined]
    features = Captioner(model, make_header(model)).encode_batch(pictures(3))
    assert unnamed(model, features, tokens, 0.7) == [[], [CONCEPTS[2]], [CONCEPTS[2]]]


def test_the_threshold_must_be_a_probability() -> None:
    with pytest.raises(ValueError, match="name_above must be above 0 and at most 1, not 0"):
        SearchOptions(name_above=0.0).check()


def test_loading_a_word_memory_imports_no_compiler(tmp_path: Path) -> None:
    """It would take seconds."""
    model = make_model(copying=True, styles=1)
    path = tmp_path / "words.safetensors"
    checkpoint.save(path, model, make_header(model))
    code = (
        "import sys; from captioner import Captioner; "
        f"Captioner.load({str(path)!r}, device='cpu'); "
        "sys.exit(any(name.startswith(('torch._dynamo', 'sympy')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
