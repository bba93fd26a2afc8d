"""First embeddings from word vectors, in the text formats of GloVe, word2vec and fastText.

A line is a word and its numbers, with spaces between; word2vec and fastText have a first line
``count width``. Files of gigabytes are read line by line and only the vocabulary's words are kept.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from captioner.model import CaptionModel
from captioner.tokenizer import SPECIAL, Tokenizer
from captioner_training.config import ConfigError

_GZIP, _ZIP, _BOM = b"\x1f\x8b", b"PK\x03\x04", b"\xef\xbb\xbf"
_LONGEST_LINE = 1 << 20


def begin_with(model: CaptionModel, path: Path) -> str:
    """Put a file's vectors into the model's embeddings; return a line that says how many words it had.

    Raises:
        ConfigError: if the file cannot be used, or its vectors have another width than the embeddings.
    """
    words = vocabulary(model.tokenizer)
    try:
        count = initialise(model, load_vectors(path, words))
    except ConfigError as error:
        raise ConfigError(f"word_vectors: {path}: {error}") from None
    return f"word vectors: {path.name} has {count:,} of {len(words):,} words; the others begin at random"


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Return words and their ids; of byte-pair tokens those that begin a word."""
    pieces = {tokenizer.piece(i): i for i in range(len(SPECIAL), len(tokenizer))}
    return {word: i for word, i in pieces.items() if word and not word.startswith("##")}


def load_vectors(path: Path, words: Iterable[str]) -> dict[str, np.ndarray]:
    """Read the vectors ``(M,)``, float32, of the given words; those that the file lacks are left out.

    A word that the file has only with capitals gets the first such vector. Lines whose word is not UTF-8 are
    passed over (word2vec cuts long words anywhere).

    Raises:
        ConfigError: if the file cannot be read, is in another format, or has a line that is no vector; with
            the number of the line.
    """
    wanted = set(words)
    exact: dict[str, np.ndarray] = {}
    similar: dict[str, np.ndarray] = {}
    width = count = number = 0
    for number, line in _lines(path):
        if number == 1:
            count, width = _header(line)
            if count:
                continue
            width = _numbers_at_the_end(line)
            if not width:
                raise ConfigError("line 1: expected a word and numbers, or a count and a width")
        if number == 2 and count and not _is_text(line):
            raise ConfigError(
                "line 2: not text; a binary word2vec file has to be saved in the text format first"
            )
        if not line:
            continue
        parts = line.rsplit(b" ", width)
        if len(parts) <= width or (b" " in parts[0] and _is_number(parts[0].rsplit(b" ", 1)[1])):
            found = _numbers_at_the_end(line)
            raise ConfigError(f"line {number}: expected a word and {width} numbers, found {found} numbers")
        try:
            word = parts[0].decode()
        except UnicodeDecodeError:
            continue
        if word in wanted:
            exact[word] = _vector(parts[1:], number)
            if len(exact) == len(wanted):
                return exact
        elif (lower := word.lower()) in wanted and lower not in similar:
            similar[lower] = _vector(parts[1:], number)
    if not number:
        raise ConfigError("the file is empty")
    if count and number - 1 < count:
        raise ConfigError(f"ends after {number - 1:,} of {count:,} vectors: the file is not complete")
    return {**similar, **exact}


def initialise(model: CaptionModel, vectors: Mapping[str, np.ndarray]) -> int:
    """Put vectors ``(M,)`` into the embeddings, in place; return how many of the vocabulary's words had one.

    They are centred and brought to the spread of the random embeddings that they replace: a common part
    would say nothing about a word, and the output layer may share these weights.

    Raises:
        ConfigError: if there are none for the vocabulary, or they have another width than the embeddings.
    """
    rows = {i: vectors[word] for word, i in vocabulary(model.tokenizer).items() if word in vectors}
    if not rows:
        raise ConfigError("has none of the vocabulary's words: is it of the captions' language?")
    weight = model.decoder.embedding.weight
    found = np.stack(list(rows.values())).astype(np.float64)
    if found.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"its vectors have {found.shape[1]} numbers: set decoder.embedding to {found.shape[1]}, "
            f"it is {weight.shape[1]}"
        )
    found -= found.mean(0)
    spread = float(found.std())
    with torch.no_grad():
        scale = float(weight[len(SPECIAL) :].std()) / spread if spread > 0 else 0.0
        weight[list(rows)] = torch.from_numpy(found * scale).to(weight)
    return len(rows)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield lines without their ends, numbered from 1; tabs become spaces."""
    try:
        with path.open("rb") as raw:
            begin = raw.read(4)
            raw.seek(0)
            if begin == _ZIP:
                raise ConfigError("is a zip archive: unpack it and name the .txt file")
            with gzip.open(raw) if begin.startswith(_GZIP) else raw as file:
                number = 0
                while line := file.readline(_LONGEST_LINE):
                    number += 1
                    if len(line) == _LONGEST_LINE:
                        raise ConfigError(f"line {number}: longer than a vector can be; is this a text file?")
                    if number == 1:
                        line = line.removeprefix(_BOM)
                    line = line.replace(b"\t", b" ").strip(b" \r\n")
                    yield number, b" ".join(line.split()) if b"  " in line else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"damaged or not complete: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}") from None


def _header(line: bytes) -> tuple[int, int]:
    """Return count and width if the first line says them, else zeros."""
    parts = line.split()
    if len(parts) == 2 and all(part.isdigit() for part in parts):
        count, width = (int(part) for part in parts)
        if not count or not width:
            raise ConfigError(f"line 1: says {count} vectors of {width} numbers")
        return count, width
    return 0, 0


def _numbers_at_the_end(line: bytes) -> int:
    count = 0
    for part in reversed(line.split(b" ")[1:]):
        if not _is_number(part):
            break
        count += 1
    return count


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _vector(parts: list[bytes], number: int) -> np.ndarray:
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise ConfigError(f"line {number}: {_first_odd(parts)} is not a number") from None
    if not all(math.isfinite(value) for value in values):
        raise ConfigError(f"line {number}: holds a number that is not finite")
    return np.array(values, np.float32)


def _first_odd(parts: list[bytes]) -> str:
    odd = next(part for part in parts if not _is_number(part))
    return repr(odd[:20].decode(errors="replace"))
