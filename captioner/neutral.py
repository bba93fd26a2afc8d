"""Words that a caption must not say, and what is said in their place.

Gendered words are not exchanged afterwards, which would leave "a person and a person" and "they is", but in
the model's distribution, before every word of the search: what it gives to ``man`` and ``woman`` is added to
``person``. So the probability of ``person`` is that of all the words that it stands for, and the model, which
reads the neutral word, goes on in agreement with it: "two people", "they are".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from captioner.tokenizer import UNKNOWN, Tokenizer

Phrase = tuple[int, ...]

_PERSON, _PEOPLE, _CHILD, _CHILDREN = ("person",), ("people",), ("child", "kid"), ("children", "kids")

NEUTRAL: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys("man woman lady guy gentleman chap dude bloke lad lass gal".split(), _PERSON),
    **dict.fromkeys("men women ladies guys gentlemen chaps dudes blokes lads males females".split(), _PEOPLE),
    **dict.fromkeys("boy girl schoolboy schoolgirl".split(), _CHILD),
    **dict.fromkeys("boys girls schoolboys schoolgirls".split(), _CHILDREN),
    **dict.fromkeys("mother father mom dad mum mommy daddy".split(), ("parent", *_PERSON)),
    **dict.fromkeys("mothers fathers moms dads mums".split(), ("parents", *_PEOPLE)),
    **dict.fromkeys("grandmother grandfather grandma grandpa".split(), ("grandparent", *_PERSON)),
    **dict.fromkeys("son daughter".split(), _CHILD),
    **dict.fromkeys("sons daughters".split(), _CHILDREN),
    **dict.fromkeys("brother sister".split(), ("sibling", *_CHILD)),
    **dict.fromkeys("brothers sisters".split(), ("siblings", *_CHILDREN)),
    **dict.fromkeys("husband wife boyfriend girlfriend".split(), ("partner", *_PERSON)),
    **dict.fromkeys("husbands wives".split(), ("couple", *_PEOPLE)),
    **dict.fromkeys("bride groom bridesmaid groomsman".split(), _PERSON),
    **dict.fromkeys("brides grooms bridesmaids groomsmen".split(), _PEOPLE),
    **dict.fromkeys("uncle aunt nephew niece".split(), ("relative", *_PERSON)),
    **dict.fromkeys("policeman policewoman".split(), ("officer", "police")),
    **dict.fromkeys("policemen policewomen".split(), ("officers", "police")),
    "fireman": ("firefighter", *_PERSON),
    "firemen": ("firefighters", *_PEOPLE),
    **dict.fromkeys("businessman businesswoman workman craftsman".split(), ("worker", *_PERSON)),
    **dict.fromkeys("businessmen businesswomen workmen craftsmen".split(), ("workers", *_PEOPLE)),
    **dict.fromkeys("cameraman fisherman fisherwoman horseman horsewoman".split(), _PERSON),
    **dict.fromkeys("cameramen fishermen horsemen".split(), _PEOPLE),
    **dict.fromkeys("batsman baseman sportsman sportswoman".split(), ("player", *_PERSON)),
    **dict.fromkeys("batsmen basemen sportsmen".split(), ("players", *_PEOPLE)),
    **dict.fromkeys("waitress waiter".split(), ("server", *_PERSON)),
    **dict.fromkeys("waitresses waiters".split(), ("servers", *_PEOPLE)),
    **dict.fromkeys("actress".split(), ("actor", *_PERSON)),
    **dict.fromkeys("he she".split(), ("they",)),
    **dict.fromkeys("him".split(), ("them",)),
    **dict.fromkeys("his her".split(), ("their",)),
    "hers": ("theirs",),
    **dict.fromkeys("himself herself".split(), ("themselves", "themself")),
    # these stand before other words, too ("a cowboy hat", "a male dog"), where no other word fits
    **dict.fromkeys("male female cowboy cowgirl cowboys cowgirls fellow masculine feminine".split(), ()),
}
"""Gendered words that captions use of people, and what is said instead: the first that the model knows.

Names of things (snowman), of figures (superman) and titles (queen) are not among them, nor animals (cow).
"""

TWICE = tuple(f"{one} and{a}{one}" for one in ("person", "child", "parent") for a in (" ", " a "))
"""What nobody says who means two people, and what "a man and a woman" would become."""


@dataclass(frozen=True, eq=False)
class Avoided:
    """What the search must not say, in tokens.

    Attributes:
        tokens: token id -> the token that takes its probability, or None.
        phrases: sequences of two tokens or more.
    """

    tokens: Mapping[int, int | None]
    phrases: tuple[Phrase, ...] = ()

    def allows(self, tokens: Sequence[int]) -> bool:
        """Tell whether a sequence of tokens holds nothing that is avoided."""
        return not any(token in self.tokens for token in tokens) and not any(
            tuple(tokens[i : i + len(phrase)]) == phrase
            for phrase in self.phrases
            for i in range(len(tokens) - len(phrase) + 1)
        )


def avoided(tokenizer: Tokenizer, avoid: Iterable[str] = (), neutral: bool = False) -> Avoided | None:
    """Find the tokens of words to be avoided; None if there are none.

    A model of byte pairs may not say a word in other pieces either. Nor can it say a longer word whose first
    pieces are an avoided word, such as "manhole" in the pieces "man" and "hole".

    Args:
        tokenizer: of the model; what it cannot say anyway is passed over.
        avoid: words or phrases.
        neutral: also avoid the words of `NEUTRAL`, which others stand for.

    Raises:
        ValueError: if ``avoid`` is a text and not a list, or holds a text without words.
    """
    if isinstance(avoid, str):
        raise ValueError(f"avoid is a list of words: write avoid=[{avoid!r}]")
    known = _Pieces(tokenizer)
    tokens: dict[int, int | None] = {}
    phrases: dict[Phrase, None] = {}
    never = {phrase for words in avoid for phrase in known.ways(_checked(words))}
    if neutral:
        phrases.update(dict.fromkeys(way for words in TWICE for way in known.ways(words) if len(way) > 1))
        for word, substitutes in NEUTRAL.items():
            for way in known.ways(word):
                if len(way) > 1:
                    phrases[way] = None
                elif way not in never:
                    found = [w for s in substitutes for w in known.ways(s) if len(w) == 1 and w not in never]
                    tokens[way[0]] = found[0][0] if found else None
    for way in never:
        if len(way) == 1:
            tokens[way[0]] = None
        else:
            phrases[way] = None
    return Avoided(tokens, tuple(phrases)) if tokens or phrases else None


def _checked(words: str) -> str:
    if not isinstance(words, str) or not words.strip():
        raise ValueError(f"avoid holds {words!r}, which is no word")
    return words


class _Pieces:
    """How a tokenizer can say a phrase: as it would, and for byte pairs in all other pieces, too."""

    MOST = 200

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: dict[str, int] = {}
        if tokenizer.kind != "word":
            self.ids = {tokenizer.piece(i): i for i in range(len(tokenizer))}

    def ways(self, phrase: str) -> list[Phrase]:
        usual = tuple(self.tokenizer.encode(phrase))
        if UNKNOWN in usual or not usual:
            return []
        words = [word for word, _ in self.tokenizer.words(usual)]
        if not self.ids or len(words) > 1:
            return [usual]
        found = {usual: None}
        for way in self._split(words[0], ""):
            found[way] = None
            if len(found) >= self.MOST:
                break
        return list(found)

    def _split(self, rest: str, mark: str) -> Iterable[Phrase]:
        if not rest:
            yield ()
        elif not mark and "" in self.ids:  # the mark of a word's beginning may be a piece of its own
            for way in self._split(rest, "##"):
                yield (self.ids[""], *way)
        for end in range(len(rest), 0, -1):
            token = self.ids.get(mark + rest[:end])
            if token is not None:
                for way in self._split(rest[end:], "##"):
                    yield (token, *way)
