from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captioner_training.adapt import begin, describe, extend, replace_dropout, start_from
from captioner_training.config import ConfigError, StartConfig
from conftest import TINY_WORDS, make_header, make_tiny_model

from captioner import checkpoint
from captioner.calibration import FEATURES, Calibration
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
