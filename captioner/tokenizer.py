"""Words and byte-pair encoding: sentences to token ids and back.

Both kinds share four special tokens at fixed ids, and both are a JSON-able dict in the checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from captioner.caption import join_words

LONGEST = 200
"""Characters in one entry of a vocabulary."""
PAD, START, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")

# a run of letters or digits, perhaps hyphenated; what follows an apostrophe is a word of its own ("dog 's"),
# unless the apostrophe is a quotation mark: it needs a letter before it or a whole clitic after it
_WORD = re.compile(r"(?:(?<=[^\W_])'|'(?=(?:s|t|re|ve|ll|d|m)(?![\w-])))?[^\W_]+(?:-[^\W_]+)*")
_SAME = str.maketrans({"’": "'", "`": "'", "ʼ": "'", "‐": "-", "‑": "-"})


def split_words(text: str, *, lower: bool = True) -> list[str]:
    """Split a sentence into lower-case words; punctuation is dropped, as the metrics' tokenizer does."""
    # composed, because a combining accent by itself is not a letter
    text = unicodedata.normalize("NFC", text)
    return _WORD.findall((text.lower() if lower else text).translate(_SAME))


class Tokenizer(Protocol):
    """What the model needs of a tokenizer."""

    kind: str

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a sentence, without start and end."""
        ...

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Group token ids into words: each with the positions of its tokens."""
        ...

    def piece(self, token: int) -> str:
        """Return one token as text for a list of alternatives."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` rebuilds."""
        ...


class WordTokenizer:
    """One token a word, by frequency; rarer words become ``<unk>``."""

    kind = "word"

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Take the words in id order, without the special tokens.

        Raises:
            ValueError: if a word occurs twice or is a special token.
        """
        self.vocabulary = [*SPECIAL, *vocabulary]
        self.index = {word: i for i, word in enumerate(self.vocabulary)}
        if len(self.index) != len(self.vocabulary):
            raise ValueError("the vocabulary holds a word twice")

    @classmethod
    def build(
        cls, sentences: Iterable[str], *, min_count: int = 5, max_size: int | None = None
    ) -> WordTokenizer:
        """Learn the vocabulary: words that occur at least ``min_count`` times, the frequent first."""
        counts = Counter(word for sentence in sentences for word in split_words(sentence))
        ranked = sorted((w for w, c in counts.items() if c >= min_count), key=lambda w: (-counts[w], w))
        return cls(ranked if max_size is None else ranked[: max(0, max_size - len(SPECIAL))])

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a sentence, without start and end."""
        return [self.index.get(word, UNKNOWN) for word in split_words(text)]

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Group token ids into words; here every token is one."""
        return [(self.vocabulary[token], [i]) for i, token in enumerate(ids)]

    def piece(self, token: int) -> str:
        """Return one token as text."""
        return self.vocabulary[token]

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` rebuilds."""
        return {"kind": self.kind, "vocabulary": self.vocabulary[len(SPECIAL) :]}


class BpeTokenizer:
    """Byte-pair encoding through the `tokenizers` library (Sennrich et al. 2016); no word is unknown
    whose characters were seen in training.
    """

    kind = "bpe"

    def __init__(self, model: str) -> None:
        """Take the library's own JSON.

        Raises:
            ValueError: if the library is missing, or the JSON is not a tokenizer as `build` makes them.
        """
        _check_bpe(model)
        library = _tokenizers()
        try:
            self._model = library.Tokenizer.from_str(model)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the BPE tokenizer cannot be read: {error}") from None
        if [self._model.id_to_token(i) for i in range(len(SPECIAL))] != list(SPECIAL):
            raise ValueError(f"the BPE tokenizer does not begin with {', '.join(SPECIAL)}")

    @classmethod
    def build(cls, sentences: Iterable[str], *, size: int = 4000) -> BpeTokenizer:
        """Learn ``size`` tokens, the special ones included, from sentences."""
        library = _tokenizers()
        model = library.Tokenizer(library.models.BPE(unk_token=SPECIAL[UNKNOWN]))
        # words are split by us, so that both kinds see the same words; the prefix marks where one begins
        model.pre_tokenizer = library.pre_tokenizers.Metaspace(replacement=_MARK, prepend_scheme="always")
        trainer = library.trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(SPECIAL), show_progress=False, min_frequency=2
        )
        model.train_from_iterator((" ".join(split_words(s)) for s in sentences), trainer)
        return cls(model.to_str())

    def __len__(self) -> int:
        return int(self._model.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a sentence, without start and end."""
        return list(self._model.encode(" ".join(split_words(text)), add_special_tokens=False).ids)

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Group token ids into words: a token that begins with the mark begins a word."""
        groups: list[tuple[str, list[int]]] = []
        for position, token in enumerate(ids):
            text = self._model.id_to_token(token) or SPECIAL[UNKNOWN]
            if text.startswith(_MARK) or not groups:
                groups.append((text.removeprefix(_MARK), [position]))
            else:
                word, positions = groups[-1]
                groups[-1] = (word + text, [*positions, position])
        return [(word, positions) for word, positions in groups if word]

    def piece(self, token: int) -> str:
        """Return one token as text: a piece that continues a word begins with ``##``."""
        text = self._model.id_to_token(token) or SPECIAL[UNKNOWN]
        return text.removeprefix(_MARK) if text.startswith(_MARK) or text in SPECIAL else f"##{text}"

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` rebuilds."""
        return {"kind": self.kind, "model": json.loads(self._model.to_str())}


_MARK = "▁"


def _check_bpe(text: str) -> None:
    """Refuse what `BpeTokenizer.build` does not make.

    The library's JSON can ask for far more than a vocabulary: regular expressions, padding to any length,
    ids of any size. Some of that ends the process before there is an error to catch.
    """
    try:
        data = json.loads(text)
        model, splitter, vocabulary = data["model"], data["pre_tokenizer"], data["model"]["vocab"]
        merges = model.get("merges", [])
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
        sound = (
            model["type"] == "BPE"
            and splitter["type"] == "Metaspace"
            and all(
                data.get(key) is None
                for key in ("normalizer", "post_processor", "decoder", "truncation", "padding")
            )
            and not any(model.get(key) for key in ("dropout", "byte_fallback"))
            and all(isinstance(word, str) and len(word) <= LONGEST for word in vocabulary)
            and all(isinstance(token, int) for token in vocabulary.values())
            and sorted(vocabulary.values()) == list(range(len(vocabulary)))
            and all(len(m) == 2 and {*m, "".join(m)} <= vocabulary.keys() for m in merges)
            and all(vocabulary.get(added["content"]) == added["id"] for added in data["added_tokens"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError("the BPE tokenizer cannot be read: it is not one that captioner made")


def _tokenizers() -> Any:
    if importlib.util.find_spec("tokenizers") is None:
        raise ValueError('BPE needs the tokenizers library: pip install "captioner[bpe]"')
    import tokenizers

    return tokenizers


def from_dict(data: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its dict.

    Raises:
        ValueError: if the dict is not one that ``to_dict`` wrote.
    """
    kind = data.get("kind")
    if kind == "word" and isinstance(data.get("vocabulary"), list):
        if not all(isinstance(word, str) for word in data["vocabulary"]):
            raise ValueError("the vocabulary holds something that is not a word")
        if any(len(word) > LONGEST for word in data["vocabulary"]):
            raise ValueError(f"the vocabulary holds a word of more than {LONGEST} letters")
        return WordTokenizer(data["vocabulary"])
    if kind == "bpe" and isinstance(data.get("model"), dict):
        return BpeTokenizer(json.dumps(data["model"]))
    raise ValueError(f"unknown tokenizer kind {kind!r}; expected 'word' or 'bpe' with its data")


def detokenize(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the sentence of ids, special tokens left out."""
    kept = [token for token in ids if token not in (PAD, START, END)]
    return join_words([word for word, _ in tokenizer.words(kept)])
