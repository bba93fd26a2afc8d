import json
import sys

import pytest

from captioner.caption import join_words
from captioner.tokenizer import (
    END,
    PAD,
    SPECIAL,
    START,
    UNKNOWN,
    BpeTokenizer,
    WordTokenizer,
    detokenize,
    from_dict,
    split_words,
)

SENTENCES = [
    "A man's dog runs on the grass.",
    "The dog runs, the dog jumps!",
    "Two well-known dogs are running near the man's bicycle",
    "a bicycle and some bicycles",
    "the t-shirt of the man",
] * 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog, on THE beach.", ["a", "dog", "on", "the", "beach"]),
        ("a well-known T-shirt - and a -3", ["a", "well-known", "t-shirt", "and", "a", "3"]),
        ("the man's hat", ["the", "man", "'s", "hat"]),
        ("the man’s hat", ["the", "man", "'s", "hat"]),
        ("the man`s and the manʼs", ["the", "man", "'s", "and", "the", "man", "'s"]),
        ("a man 's hat", ["a", "man", "'s", "hat"]),  # as data sets that are already split have it
        ("it isn't", ["it", "isn", "'t"]),
        ("two dogs' tails", ["two", "dogs", "tails"]),
        ("a sign says 'stop' and ‘go’", ["a", "sign", "says", "stop", "and", "go"]),
        ('a "quoted" word', ["a", "quoted", "word"]),
        ("an o'clock", ["an", "o", "'clock"]),
        ("'t-shirt'", ["t-shirt"]),
        ("Un Café à Zürich", ["un", "café", "à", "zürich"]),
        ("cafe\u0301s", ["cafés"]),
        ("well\u2011known", ["well-known"]),
        ("一只 猫", ["一只", "猫"]),
        ("snake_case 3.5 50%", ["snake", "case", "3", "5", "50"]),
        ("tabs\tand\nlines", ["tabs", "and", "lines"]),
        ("", []),
        ("... !? '", []),
    ],
)
def test_sentences_are_split_into_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_splitting_what_was_joined_gives_the_same_words() -> None:
    for sentence in [*SENTENCES, "isn't it the man's"]:
        words = split_words(sentence)
        assert split_words(join_words(words)) == words
        assert split_words(" ".join(words)) == words
    assert split_words(join_words(["o", "'clock"])) == ["o", "'clock"]


def test_the_vocabulary_is_ordered_by_frequency_then_alphabet() -> None:
    tokenizer = WordTokenizer.build(["b b b", "c a", "a c", "d"], min_count=1)
    assert tokenizer.vocabulary == [*SPECIAL, "b", "a", "c", "d"]
    again = WordTokenizer.build(["d", "a c", "c a b", "b b"], min_count=1)
    assert again.vocabulary == tokenizer.vocabulary


def test_rare_words_are_unknown() -> None:
    tokenizer = WordTokenizer.build(["b b b", "c a", "a c", "d"], min_count=2)
    assert tokenizer.vocabulary == [*SPECIAL, "b", "a", "c"]
    assert tokenizer.encode("B, d a?") == [4, UNKNOWN, 5]
    assert len(WordTokenizer.build(["b b b", "c a", "a c", "d"], min_count=1, max_size=6)) == 6
    assert WordTokenizer.build(["a b"], min_count=1, max_size=2).vocabulary == [*SPECIAL]
    assert WordTokenizer.build(["a " * 5, "b " * 4]).vocabulary == [*SPECIAL, "a"]  # five are needed


def test_words_round_trip() -> None:
    tokenizer = WordTokenizer.build(SENTENCES, min_count=1)
    ids = tokenizer.encode("The man's dog runs")
    assert UNKNOWN not in ids
    assert tokenizer.words(ids) == [("the", [0]), ("man", [1]), ("'s", [2]), ("dog", [3]), ("runs", [4])]
    assert detokenize(tokenizer, [START, *ids, END, PAD]) == "the man's dog runs"
    assert detokenize(tokenizer, [UNKNOWN, ids[0]]) == "<unk> the"
    assert detokenize(tokenizer, []) == ""
    assert tokenizer.piece(ids[3]) == "dog"


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.build(SENTENCES, size=60)


def test_bpe_round_trip(bpe: BpeTokenizer) -> None:
    for sentence in [*SENTENCES, "a bicyclist's dogs", "running-shirt"]:
        ids = bpe.encode(sentence)
        assert detokenize(bpe, [START, *ids, END]) == join_words(split_words(sentence))
        assert [word for word, _ in bpe.words(ids)] == split_words(sentence)


def test_bpe_words_hold_all_their_tokens(bpe: BpeTokenizer) -> None:
    ids = bpe.encode("some bicycles running near")
    words = bpe.words(ids)
    assert [p for _, positions in words for p in positions] == list(range(len(ids)))
    assert any(len(positions) > 1 for _, positions in words)
    for _, positions in words:
        pieces = [bpe.piece(ids[p]) for p in positions]
        assert not pieces[0].startswith("##")
        assert all(piece.startswith("##") for piece in pieces[1:])
    whole = ["".join(bpe.piece(ids[p]).removeprefix("##") for p in positions) for _, positions in words]
    assert whole == ["some", "bicycles", "running", "near"]


def test_bpe_size_and_special_tokens(bpe: BpeTokenizer) -> None:
    assert len(bpe) == 60
    assert [bpe.piece(i) for i in range(4)] == list(SPECIAL)
    assert not set(range(4)) & set(bpe.encode("the man's dog <end> <pad>"))


def test_bpe_is_the_same_every_time(bpe: BpeTokenizer) -> None:
    assert BpeTokenizer.build(SENTENCES, size=60).to_dict() == bpe.to_dict()


def test_bpe_of_characters_never_seen(bpe: BpeTokenizer) -> None:
    ids = bpe.encode("the 猫 dog")
    assert UNKNOWN in ids
    words = [word for word, _ in bpe.words(ids)]
    assert words == ["the", "<unk>", "dog"]


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_tokenizers_survive_json(kind: str, bpe: BpeTokenizer) -> None:
    tokenizer = bpe if kind == "bpe" else WordTokenizer.build(SENTENCES, min_count=2)
    data = json.loads(json.dumps(tokenizer.to_dict()))
    again = from_dict(data)
    assert type(again) is type(tokenizer)
    assert again.kind == kind
    assert len(again) == len(tokenizer)
    assert again.to_dict() == tokenizer.to_dict()
    for sentence in SENTENCES[:5]:
        assert again.encode(sentence) == tokenizer.encode(sentence)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "unknown tokenizer kind None; expected 'word' or 'bpe'"),
        ({"kind": "wordpiece"}, "unknown tokenizer kind 'wordpiece'"),
        ({"kind": "word", "vocabulary": "abc"}, "unknown tokenizer kind 'word'; expected .* with its data"),
        ({"kind": "word", "vocabulary": ["a", 3]}, "something that is not a word"),
        ({"kind": "word", "vocabulary": ["a", "b", "a"]}, "holds a word twice"),
        ({"kind": "word", "vocabulary": ["a", "<end>"]}, "holds a word twice"),
        ({"kind": "bpe", "model": {"version": "1.0"}}, "the BPE tokenizer cannot be read"),
    ],
)
def test_broken_tokenizers(data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_dict(data)
    assert "\n" not in str(caught.value)


def test_bpe_needs_our_special_tokens(bpe: BpeTokenizer) -> None:
    text = json.dumps(bpe.to_dict()["model"])
    with pytest.raises(ValueError, match="does not begin with <pad>, <start>, <end>, <unk>"):
        BpeTokenizer(text.replace("<start>", "<s>"))


def test_bpe_without_its_library(monkeypatch: pytest.MonkeyPatch, bpe: BpeTokenizer) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r'pip install "captioner\[bpe\]"'):
        from_dict(bpe.to_dict())
