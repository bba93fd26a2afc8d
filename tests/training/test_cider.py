"""CIDEr-D of token ids against pycocoevalcap's, given the same sentences and document frequencies."""

import time

import numpy as np
import pytest
from captioner_training.cider import CiderD
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider_scorer import CiderScorer

from captioner.tokenizer import END, WordTokenizer

SENTENCES = [
    ["a brown dog runs along the beach", "a dog runs on wet sand", "the dog is running near the water"],
    ["two men ride bicycles down a street", "men on bikes", "two men on two bicycles in a street"],
    ["a red bus", "a red bus parked on the side of the road", "the bus is red"],
    ["a man rides a wave on a surfboard", "a surfer rides a big wave", "a man on a surfboard"],
    ["a dog and a man on the beach"],
]
CANDIDATES = [
    "a brown dog runs along the beach",  # a reference of its own
    "",
    "bus",
    "a man on a man on a man on a man",  # n-grams that repeat
    "a zebra a zebra grazes by a zebra",  # words that no reference has
]


class Documents(list):
    """The references that pycocoevalcap judges by, out of so many documents."""

    documents = 0

    def __len__(self):
        return self.documents


def text(tokens):
    return " ".join(map(str, tokens))


def count_documents(references):
    """Return pycocoevalcap's document frequencies, by n-grams of token ids."""
    counter = CiderScorer()
    for captions in references:
        counter += ("", [text(c) for c in captions])
    counter.compute_doc_freq()
    return {tuple(map(int, gram)): f for gram, f in counter.document_frequency.items()}


def official(references, pictures, candidates, frequencies=None, documents=None):
    """Return pycocoevalcap's values; the frequencies are those of the references if none are given."""
    if frequencies is None:
        frequencies, documents = count_documents(references), len(references)
    scorer = CiderScorer()
    for picture, candidate in zip(pictures, candidates, strict=True):
        scorer += (text(candidate), [text(c) for c in references[picture]])
    scorer.document_frequency.update({tuple(map(str, gram)): f for gram, f in frequencies.items()})
    scorer.crefs = Documents(scorer.crefs)
    scorer.crefs.documents = documents
    return np.array(scorer.compute_cider())


def encoded(sentences=SENTENCES):
    tokenizer = WordTokenizer.build((s for some in sentences for s in some), min_count=1)
    return tokenizer, [[[*tokenizer.encode(s), END] for s in some] for some in sentences]


def test_is_pycocoevalcap_s_from_end_to_end():
    """Its own document frequencies, words and literal end word; nothing of ours in between."""
    tokenizer, references = encoded()
    scorer = CiderScorer()
    for candidate, captions in zip(CANDIDATES, SENTENCES, strict=True):
        scorer += (f"{candidate} <end>", [f"{c} <end>" for c in captions])
    _, expected = scorer.compute_score()
    ids = {word: 100 + i for i, word in enumerate("zebra grazes by".split())}
    candidates = [[*(ids.get(w, tokenizer.index.get(w)) for w in c.split()), END] for c in CANDIDATES]
    found = CiderD(references).rewards(range(len(SENTENCES)), candidates)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert found[0] > 3
    assert found[3] > 0


sentence = st.lists(st.integers(2, 9), max_size=9)
corpora = st.lists(st.lists(sentence, min_size=1, max_size=4), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(corpora, st.lists(st.tuples(st.integers(0, 5), sentence), max_size=8), st.booleans())
@example([[[]]], [(0, [])], False)
@example([[[2]], [[2]]], [(0, [2]), (1, [])], True)
@example([[[2, 3] * 5, []]], [(0, [2, 3] * 5)], True)
def test_is_pycocoevalcap_s_on_random_sentences(references, judged, end):
    if end:
        references = [[[*c, END] for c in captions] for captions in references]
        judged = [(p, [*c, END]) for p, c in judged]
    pictures = [p % len(references) for p, _ in judged]
    candidates = [c for _, c in judged]
    expected = official(references, pictures, candidates)
    found = CiderD(references).rewards(pictures, candidates)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(corpora, corpora, st.lists(st.tuples(st.integers(0, 5), sentence), min_size=1, max_size=5))
def test_frequencies_of_another_corpus(corpus, references, judged):
    frequencies = count_documents(corpus)
    pictures = [p % len(references) for p, _ in judged]
    candidates = [c for _, c in judged]
    documents = len(corpus) + 3
    expected = official(references, pictures, candidates, frequencies, documents)
    judge = CiderD(references, document_frequencies=frequencies, documents=documents)
    np.testing.assert_allclose(judge.rewards(pictures, candidates), expected, rtol=0, atol=1e-9)


def test_by_hand():
    """Two pictures, single words: unigrams only, of weight log 2 each; the lengths (in bigrams) agree."""
    judge = CiderD([[[5]], [[6]]])
    # cosine 1 for n = 1 and 0 for the others: 10 * 1 / 4
    assert judge.rewards([0, 1, 0], [[5], [6], [6]]).tolist() == pytest.approx([2.5, 2.5, 0.0])
    # two words: 10 / 4 * log(2)**2 / (sqrt(2) log(2) * log(2)), and a bigram too many
    expected = 2.5 / np.sqrt(2) * np.exp(-1 / 72)
    assert judge.rewards([0], [[5, 7]])[0] == pytest.approx(expected)


def test_a_corpus_of_one_picture_gives_nothing():
    """The logarithm of one document is 0, as pycocoevalcap has it."""
    assert CiderD([[[4, 5, END]]]).rewards([0], [[4, 5, END]]).tolist() == [0.0]


def test_the_end_counts_as_a_word():
    _, references = encoded()
    judge = CiderD(references)
    whole = references[2][1]
    cut = whole[:-3]  # "... on the side of the"
    ended, unended = judge.rewards([2, 2], [[*cut, END], cut])
    assert judge.rewards([2], [whole])[0] > max(ended, unended)
    assert ended != unended


def test_candidates_do_not_see_one_another():
    _, references = encoded()
    judge = CiderD(references)
    candidates = [c for captions in references for c in captions]
    pictures = [3 * i % len(references) for i in range(len(candidates))]
    together = judge.rewards(pictures, candidates)
    alone = [judge.rewards([p], [c])[0] for p, c in zip(pictures, candidates, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    assert judge.rewards([], []).shape == (0,)


def test_large_token_ids_do_not_overflow():
    huge = 2**40
    references = [[[huge + t for t in c] for c in captions] for captions in encoded()[1]]
    candidates = [[huge + 5, huge + 4, huge + 7, huge + 6], references[1][0]]
    expected = official(references, [0, 1], candidates)
    np.testing.assert_allclose(CiderD(references).rewards([0, 1], candidates), expected, atol=1e-9)


def test_thousands_a_second():
    random = np.random.default_rng(0)
    references = [[[*random.integers(4, 300, 10).tolist(), END] for _ in range(5)] for _ in range(200)]
    judge = CiderD(references)
    pictures = np.repeat(np.arange(50), 5)
    candidates = [references[p][i % 5] for i, p in enumerate(pictures)]
    judge.rewards(pictures, candidates)
    started = time.process_time()
    for _ in range(8):
        judge.rewards(pictures, candidates)
    assert 8 * len(candidates) / (time.process_time() - started) > 2000  # about 30,000 on one core


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "there are no references"),
        (([[[4]], []],), "picture 1 has no references"),
        (([[[4]]], {(4,): 1}, None), "belong together"),
        (([[[4]]], {(4,): 3}, 2), "not from 0 to the 2 documents"),
        (([[[4]]], {(4, 4, 4, 4, 4): 1}, 2), "1 to 4 tokens"),
    ],
)
def test_what_cannot_be_judged(arguments, message):
    references, frequencies, documents = (*arguments, None, None)[:3]
    with pytest.raises(ValueError, match=message):
        CiderD(references, document_frequencies=frequencies, documents=documents)


def test_pictures_that_do_not_fit_the_candidates():
    judge = CiderD([[[4, 5]]])
    with pytest.raises(ValueError, match="2 candidates came with 1 pictures"):
        judge.rewards([0], [[4], [5]])
    for picture in (-1, 1):
        with pytest.raises(IndexError, match=f"no picture {picture}, only 0 to 0"):
            judge.rewards([picture], [[4]])
