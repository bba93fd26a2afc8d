from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from captioner_training.config import ConfigError
from captioner_training.vectors import begin_with, initialise, load_vectors, vocabulary
from conftest import TINY_WORDS, make_tiny_model

from captioner.tokenizer import BpeTokenizer

GLOVE = "the 0.1 -0.2 3e-1\ndog 1 2 3\n. . . 7 8 9\nat name@domain.com 4 5 6\n's 0 0 1\n"


def write(folder: Path, text: str | bytes, name: str = "vectors.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        GLOVE,
        "5 3\n" + GLOVE,  # word2vec, fastText
        GLOVE.replace("\n", " \n"),  # word2vec's C program ends lines so
        GLOVE.replace("\n", "\r\n"),
        GLOVE.replace("dog 1 2 3", "dog\t1\t2  3"),
        "\ufeff" + GLOVE,
        GLOVE.rstrip("\n"),
    ],
    ids=["glove", "word2vec", "trailing space", "windows", "tabs", "bom", "no last newline"],
)
def test_usual_formats(text: str, tmp_path: Path) -> None:
    found = load_vectors(write(tmp_path, text), ["dog", "the", "'s", "cat", "domain.com", "."])
    assert sorted(found) == ["'s", "dog", "the"]
    np.testing.assert_array_equal(found["dog"], np.array([1, 2, 3], np.float32))
    np.testing.assert_allclose(found["the"], [0.1, -0.2, 0.3], rtol=1e-6)


def test_gzip(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(GLOVE.encode()), "vectors.gz")
    assert list(load_vectors(path, ["dog"])) == ["dog"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ConfigError, match="not complete"):
        load_vectors(path, ["cat"])


def test_capitals_serve_where_there_is_nothing_better(tmp_path: Path) -> None:
    path = write(tmp_path, "Dog 1 1\nDOG 2 2\ndog 3 3\nParis 4 4\nPARIS 5 5\n")
    found = load_vectors(path, ["dog", "paris"])
    assert found["dog"].tolist() == [3, 3]
    assert found["paris"].tolist() == [4, 4]


def test_words_cut_inside_a_letter_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, b"the 1 2\nna\xc3 3 4\ndog 5 6\n")
    assert sorted(load_vectors(path, ["dog", "the", "na"])) == ["dog", "the"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the 1 2 3\ndog 1 2\n", "line 2: expected a word and 3 numbers, found 2 numbers"),
        ("the 1 2 3\ndog 1 2 3 4\n", "line 2: expected a word and 3 numbers, found 4 numbers"),
        ("2 3\nthe 1 2 3\ndog 1 2\n", "line 3: expected a word and 3 numbers, found 2 numbers"),
        ("the 1 2 3\ndog 1 x 3\n", "line 2: 'x' is not a number"),
        ("the 1 2 3\ndog 1 nan 3\n", "line 2: holds a number that is not finite"),
        ("the 1 2 3\ndog 1 1e999 3\n", "line 2: holds a number that is not finite"),
        ("just text\n", "line 1: expected a word and numbers, or a count and a width"),
        ("3 2\nthe 1 2\ndog 3 4\n", "ends after 2 of 3 vectors: the file is not complete"),
        ("0 3\n", "line 1: says 0 vectors of 3 numbers"),
        ("", "the file is empty"),
        (
            b"2 3\n</s> \x00\xff\xfe\x80\x81 \xff\n",
            "line 2: not text; a binary word2vec file has",
        ),
        (b"x" * (1 << 20), "line 1: longer than a vector can be; is this a text file"),
    ],
)
def test_a_line_that_is_no_vector_is_named(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_vectors(write(tmp_path, text), ["dog", "cat"])
    assert message in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_vectors(tmp_path / "missing.txt", ["dog"])
    with zipfile.ZipFile(tmp_path / "glove.zip", "w") as archive:
        archive.writestr("glove.txt", GLOVE)
    with pytest.raises(ConfigError, match="zip archive: unpack it"):
        load_vectors(tmp_path / "glove.zip", ["dog"])


def test_embeddings_are_replaced_in_place_centred_and_to_scale() -> None:
    model = make_tiny_model()
    before = model.decoder.embedding.weight.detach().clone()
    chance = np.random.default_rng(0)
    vectors = {w: chance.normal(5, 3, 16).astype(np.float32) for w in ["dog", "man", "the", "unknown"]}
    assert initialise(model, vectors) == 3
    after = model.decoder.embedding.weight.detach()
    assert model.decoder.output.weight is model.decoder.embedding.weight
    rows = [model.tokenizer.encode(w)[0] for w in ("dog", "man", "the")]
    others = [i for i in range(len(before)) if i not in rows]
    assert torch.equal(after[others], before[others])
    given = np.stack([vectors[w] for w in ("dog", "man", "the")])
    given = given - given.mean(0)
    np.testing.assert_allclose(after[rows], given * (float(before[4:].std()) / given.std()), rtol=1e-4)


def test_a_wrong_width_says_which_key_to_set(tmp_path: Path) -> None:
    path = write(tmp_path, GLOVE)
    with pytest.raises(ConfigError) as error:
        begin_with(make_tiny_model(), path)
    assert str(error.value) == (
        f"word_vectors: {path}: its vectors have 3 numbers: set decoder.embedding to 3, it is 16"
    )


def test_begin_with_says_how_many_words_were_found(tmp_path: Path) -> None:
    path = write(tmp_path, GLOVE)
    line = begin_with(make_tiny_model(embedding=3), path)
    assert line == f"word vectors: vectors.txt has 3 of {len(TINY_WORDS)} words; the others begin at random"
    with pytest.raises(ConfigError, match="has none of the vocabulary's words"):
        begin_with(make_tiny_model(embedding=3), write(tmp_path, "hund 1 2 3\n"))


def test_of_byte_pairs_only_beginnings_are_words() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = BpeTokenizer.build(["dogs dog dogged log"] * 5, size=30)
    words = vocabulary(tokenizer)
    assert "dog" in words
    assert not any(word.startswith(("##", "<", "▁")) for word in words)
    assert all(tokenizer.piece(i) == word for word, i in words.items())
