"""Which words are guessed, where the guesses begin, and what they should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from captioner_training import concepts, loop
from captioner_training.config import ConceptsConfig, ConfigError
from captioner_training.data import load_data_set
from captioner_training.experiment import Experiment
from captioner_training.loop import train
from captioner_training.state import save_state
from conftest import make_header, make_tiny_model
from pydantic import ValidationError
from shape_data import make_config, plain_config, same, stage, state_of

from captioner import Captioner, checkpoint
from captioner.encoder import Encoder, encode
from captioner.images import load
from captioner.tokenizer import BpeTokenizer, WordTokenizer
from captioner.words import WordGuesser

WORDS = {
    "decoder": {**plain_config()["decoder"], "words": 4, "word_dropout": 0.1},
    "concepts": {"min_pictures": 6, "weight": 0.5},
}


@pytest.fixture(scope="module")
def shapes(data: Path):
    return load_data_set("shapes", make_config().data.sources["shapes"], data)


@pytest.fixture(scope="module")
def tokenizer(shapes) -> WordTokenizer:
    return WordTokenizer.build([c for p in shapes.pictures for c in p.captions], min_count=1)


def chosen(config: ConceptsConfig, shapes, tokenizer: WordTokenizer) -> list[str]:
    return [tokenizer.vocabulary[token] for token in concepts.choose(config, {"shapes": shapes}, tokenizer)]


def test_imagenet_has_a_word_for_each_of_its_classes() -> None:
    words = concepts.everyday_words()
    assert len(words) == 1000
    assert (words[0], words[254], words[291], words[967], words[999]) == (
        "fish",
        "dog",
        "lion",
        "coffee",
        "paper",
    )
    assert all(word.isalpha() and word.islower() for word in words)


def test_the_frequent_content_words_are_guessed(shapes, tokenizer) -> None:
    found = chosen(ConceptsConfig(min_pictures=8), shapes, tokenizer)
    # 24 pictures have "background", 12 each ground, 8 each form, 6 each colour; "a" and "on" are no content
    assert found == ["background", "black", "white", "circle", "cross", "square"]
    with_colours = chosen(ConceptsConfig(min_pictures=6), shapes, tokenizer)
    assert with_colours[6:] == ["blue", "green", "red", "yellow"]


def test_imagenets_words_are_guessed_if_the_vocabulary_has_them(shapes) -> None:
    known = WordTokenizer(["a", "circle", "dog", "lion"])
    assert chosen(ConceptsConfig(min_pictures=8, imagenet=True), shapes, known) == ["circle", "dog", "lion"]


def test_nothing_to_guess_is_a_mistake(shapes, tokenizer) -> None:
    with pytest.raises(
        ConfigError, match=r"concepts\.min_pictures is 25: no word is in the captions of so many"
    ):
        chosen(ConceptsConfig(min_pictures=25), shapes, tokenizer)
    pieces = BpeTokenizer.build(["a red circle"] * 5, size=40)
    with pytest.raises(ConfigError, match=r"needs tokenizer\.kind: word"):
        concepts.choose(ConceptsConfig(), {"shapes": shapes}, pieces)


def test_a_target_is_the_share_of_captions_that_hold_the_word(shapes, tokenizer) -> None:
    tokens = [tokenizer.index[word] for word in ("background", "red", "cross")]
    shares = concepts.mentioned(shapes, tokens, tokenizer)
    by_name = {p.file: row.tolist() for p, row in zip(shapes.pictures, shares, strict=True)}
    # the second caption says no "background"
    assert by_name["red-cross-white.png"] == [0.5, 1.0, 1.0]
    assert by_name["blue-circle-black.png"] == [0.5, 0.0, 0.0]


@dataclass
class FakeFeatures:
    data: list[int]
    cells: torch.Tensor  # (n, R, D)

    def read(self, indices, variants, *, seed=None):
        assert set(variants) == {0}
        return self.cells[list(indices)]

    def mask(self, indices, variants=None):
        mask = torch.ones(len(indices), self.cells.shape[1])
        mask[:, -1] = 0
        return mask


def test_what_the_classifier_knows_is_added_up_by_word(monkeypatch) -> None:
    weight, bias = torch.randn(1000, 4), torch.randn(1000)
    monkeypatch.setattr(concepts, "classifier", lambda encoder: (weight, bias))
    words = torch.full((1000,), -1)
    words[[3, 5]], words[7] = 0, 1
    cells = torch.randn(2, 3, 4)
    found = concepts.recognised(FakeFeatures([0, 1], cells), "any", words, 2, False)  # type: ignore[arg-type]
    p = torch.softmax(cells[:, :2].mean(1) @ weight.T + bias, -1)
    assert torch.allclose(found, torch.stack((p[:, 3] + p[:, 5], p[:, 7]), 1), atol=1e-6)


def test_guesses_begin_right_on_average_and_with_the_classifiers_directions(monkeypatch) -> None:
    weight, bias = torch.randn(1000, 4), torch.zeros(1000)
    monkeypatch.setattr(concepts, "classifier", lambda encoder: (weight, bias))
    guesser = WordGuesser(4, 3)
    shares = torch.tensor([0.5, 0.01, 0.2])
    concepts.begin(guesser, [8, 6, 9], shares, None, "any")
    assert guesser.tokens.tolist() == [8, 6, 9]
    cells = torch.zeros(1, 2, 4)
    assert torch.allclose(torch.sigmoid(guesser(cells, torch.ones(1, 2))), shares[None], atol=1e-6)
    words = torch.full((1000,), -1)
    words[[3, 5]] = 1
    concepts.begin(guesser, [8, 6, 9], shares, words, "any")
    expected = weight[[3, 5]].mean(0) - weight.mean(0)
    assert torch.allclose(guesser.head.weight[1], expected, atol=1e-6)


def test_the_classifier_is_the_encoders_own() -> None:
    weight, bias = concepts.classifier("efficientnet_lite0")
    assert weight.shape == (1000, 1280)
    assert bias.shape == (1000,)
    with pytest.raises(ConfigError, match=r"is for the EfficientNet-Lites; encoder\.name is resnet50"):
        concepts.classifier("resnet50")


def test_a_lion_is_known_for_a_lion() -> None:
    """Encoder, classifier and table belong together: a photo that none of them was told about."""
    gradio = pytest.importorskip("gradio.media")
    encoder = Encoder("efficientnet_lite2", pretrained=True).eval()
    pixels, fit = load(gradio.get_image("lion.jpg"), encoder.preprocess)
    with torch.inference_mode():
        cells = encode(encoder, torch.from_numpy(pixels)[None], [fit]).data.flatten(1, 2)
    weight, bias = concepts.classifier("efficientnet_lite2")
    best = int((cells.mean(1) @ weight.T + bias).argmax())
    assert concepts.everyday_words()[best] == "lion"


def test_targets_are_kept_until_something_changes(tmp_path, shapes) -> None:
    encoder = Encoder("efficientnet_lite0")
    classes = torch.full((1000,), -1)

    def remember(tokens=(5, 6), classes=classes):
        return concepts.remember(tmp_path / "cache", encoder, shapes, tokens, classes)

    path = remember()
    assert concepts.recall(path) is None
    targets = torch.rand(24, 2)
    kept = concepts.keep(path, targets)
    assert torch.equal(concepts.recall(path), kept)
    assert torch.allclose(kept.float(), targets, atol=1e-3)
    assert remember() == path
    assert remember([5, 7]) != path
    assert remember(classes=None) != path
    assert remember(classes=torch.zeros(1000, dtype=torch.long)) != path
    with torch.no_grad():
        next(encoder.network.parameters()).add_(1)
    assert remember() != path
    path.write_bytes(b"nonsense")
    assert concepts.recall(path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": WORDS["decoder"]}, r"decoder\.words needs the section concepts"),
        ({"concepts": WORDS["concepts"]}, r"concepts needs decoder\.words"),
        (
            {
                **WORDS,
                "concepts": {"imagenet": True},
                "encoder": {"name": "efficientnet_lite0", "pretrained": False},
            },
            r"concepts\.imagenet needs encoder\.pretrained: true",
        ),
        ({**WORDS, "search": {"name_above": 0.7}}, r"search\.name_above needs concepts\.imagenet"),
    ],
)
def test_impossible_combinations_are_mistakes(changes, message) -> None:
    with pytest.raises(ValidationError, match=message):
        make_config(**changes)


def test_no_words_can_be_compared_with_some(data, cache) -> None:
    """The section may stay where ``decoder.words`` is 0: a comparison varies that one key."""
    config = make_config(**{**WORDS, "decoder": {**WORDS["decoder"], "words": 0}})
    experiment = Experiment(config, data, cache)
    experiment.know_words()
    assert experiment.words == {}
    assert experiment.model.decoder.guesser is None


def test_targets_are_looked_up_once(data, cache) -> None:
    experiment = Experiment(make_config(**WORDS), data, cache)
    experiment.know_words()
    before = experiment.model.decoder.guesser.head.weight.clone()
    experiment.know_words()
    assert torch.equal(experiment.model.decoder.guesser.head.weight, before)


@pytest.mark.parametrize(("style", "known"), [(2, 1), (1, 0)])
def test_a_style_that_the_start_does_not_know_is_a_mistake(data, cache, tmp_path, style, known) -> None:
    model = make_tiny_model(styles=known)
    path = tmp_path / "start.safetensors"
    checkpoint.save(path, model, make_header(model))
    shapes = {"annotations": "shapes.json", "images": ["pictures"], "style": style}
    config = make_config(
        encoder=None,
        decoder=None,
        start={"model": str(path)},
        data={"sources": {"shapes": shapes}, "validation": {"shapes_val": {**shapes, "style": 0}}},
    )
    with pytest.raises(ConfigError, match=rf"style is {style}: the captioner under start tells {known}"):
        Experiment(config, data, cache)


def test_somebody_has_to_write_as_the_model_is_to_speak(data, cache) -> None:
    shapes = {"annotations": "shapes.json", "images": ["pictures"]}
    config = make_config(
        data={"sources": {"shapes": {**shapes, "style": 1}}, "validation": {"shapes_val": shapes}}
    )
    with pytest.raises(ConfigError, match="no source that is trained on has style: 0"):
        Experiment(config, data, cache)


def test_in_self_critical_training_no_guess_is_left_out(tmp_path, data, cache, quick, monkeypatch) -> None:
    seen = []
    real = loop.self_critical_loss

    def watched(model, memory, *arguments, drawn_from, **options):
        seen.append((memory.word_mask, drawn_from.word_mask, model.decoder.guesser.head.weight.requires_grad))
        return real(model, memory, *arguments, drawn_from=drawn_from, **options)

    monkeypatch.setattr(loop, "self_critical_loss", watched)
    stages = [stage(), stage(name="second", objective="self_critical")]
    words = {**WORDS, "decoder": {**WORDS["decoder"], "word_dropout": 0.8}}
    train(make_config(stages, **words), data, tmp_path, cache_folder=cache, processes=1)
    assert len(seen) == 3
    for learned, drawn, learns in seen:
        assert torch.equal(learned, drawn)
        assert not learns


def test_kept_out_pictures_give_no_words(data, cache) -> None:
    """Neither words to guess nor targets: the pictures that are validated on are not among them."""
    shapes = {"annotations": "shapes.json", "images": ["pictures"]}
    config = make_config(
        **{**WORDS, "concepts": {"min_pictures": 1}},
        data={
            "sources": {"shapes": {**shapes, "skip_highest": 18}},
            "validation": {"rest": {**shapes, "only_highest": 18}},
        },
    )
    experiment = Experiment(config, data, cache)
    experiment.know_words()
    words = [experiment.tokenizer.piece(token) for token in experiment.concepts]
    assert "red" in words
    assert "blue" not in words
    assert experiment.words["shapes"].shape == (6, len(words))


def test_guesses_are_learned_and_used(tmp_path, data, cache, quick) -> None:
    best = train(make_config([stage(epochs=6)], **WORDS), data, tmp_path, cache_folder=cache, processes=1)
    captioner = Captioner.load(best, device="cpu")
    right = 0
    for path in sorted((data / "pictures").iterdir()):
        colour, form, ground = path.stem.split("-")
        guessed = {g.text for g in captioner.caption(path).guesses}
        right += len(guessed & {colour, form, ground})
    assert right >= 48, right  # of 72; three of the ten words by chance would be 22


def test_a_killed_run_with_words_and_a_fine_tuned_encoder_ends_with_the_same_weights(
    tmp_path, data, cache, quick, monkeypatch
) -> None:
    """The targets are those of the encoder as it was at first, also after it has changed."""
    stages = [stage(), stage(name="second", trainable_blocks=2, epochs=2, encoder_learning_rate=1e-3)]
    config = make_config(stages, **WORDS)
    train(config, data, tmp_path / "whole", cache_folder=cache, processes=1)
    saves: list[int] = []

    def save_and_stop(*arguments):
        save_state(*arguments)
        saves.append(1)
        if len(saves) == 2:  # after the first epoch with the encoder
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, data, tmp_path / "torn", cache_folder=cache, processes=1)
    train(config, data, tmp_path / "torn", cache_folder=cache, processes=1)
    assert len(saves) == 2
    assert same(state_of(tmp_path / "whole")["model"], state_of(tmp_path / "torn")["model"])


@pytest.mark.parametrize("sources", [{"shapes": 1, "others": 1}, {"shapes": 1}], ids=["both", "one"])
def test_a_style_is_learned_from_its_own_sources(tmp_path, data, cache, quick, sources) -> None:
    shapes = {"annotations": "shapes.json", "images": ["pictures"]}
    config = make_config(
        [stage(sources=sources)],
        data={
            "sources": {"shapes": shapes, "others": {**shapes, "style": 1}},
            "validation": {"shapes_val": shapes},
        },
    )
    best = train(config, data, tmp_path, cache_folder=cache, processes=1)
    style = Captioner.load(best, device="cpu").model.decoder.style
    if "others" in sources:
        assert style is not None
        assert style.shape == (1, 24)
        assert style.abs().sum() > 0
    else:
        assert style is None
