"""CIDEr-D of token ids, in memory: the reward of self-critical training, thousands of captions a second.

The numbers are those of pycocoevalcap's CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726),
its habits included: n-grams of 1 to 4 tokens with equal weight, counts clipped to the reference's, a Gaussian
(sigma 6) on the difference of lengths, a length being the number of bigrams, and a factor of 10.

N-grams are numbers. Those of the references stand in four sorted tables, one for each n; the key of an
n-gram is made of the numbers of its first n - 1 tokens and of its last one, so that nothing overflows,
whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

ORDERS = 4
"""The longest n-grams."""

SIGMA = 6.0


class CiderD:
    """Judges captions against the references of their pictures.

    In memory it takes 10 bytes for every different n-gram of every reference, and a table of all: 0.4 GB for
    the 113,000 pictures of COCO, and five times as much for a moment, while it is made.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Sequence[int]]],
        *,
        document_frequencies: Mapping[tuple[int, ...], float] | None = None,
        documents: int | None = None,
    ) -> None:
        """Take the references; what they hold is all that counts, so give the end token if it is to count.

        Args:
            references: for each picture, its captions as token ids.
            document_frequencies: in the captions of how many pictures an n-gram occurs, from another corpus;
                n-grams that are not there count as if they occurred in one. Those of ``references`` if None.
            documents: how many pictures that other corpus has.

        Raises:
            ValueError: if a picture has no references, or the frequencies are impossible.
        """
        counts = np.array([len(captions) for captions in references], np.int64)
        if len(counts) == 0 or not counts.all():
            missing = f"picture {int(np.argmin(counts))} has" if len(counts) else "there are"
            raise ValueError(f"{missing} no references to judge captions against")
        if (document_frequencies is None) != (documents is None):
            raise ValueError("document_frequencies and documents belong together: give both or neither")
        given = document_frequencies or {}
        if documents is None:
            documents = len(references)
        if any(not 0 <= f <= documents for f in given.values()):
            raise ValueError(f"a document frequency is not from 0 to the {documents} documents")
        if any(not 1 <= len(gram) <= ORDERS for gram in given):
            raise ValueError(f"document frequencies are of n-grams of 1 to {ORDERS} tokens")

        captions = [caption for some in references for caption in some]
        self._picture = np.repeat(np.arange(len(counts)), counts)  # of each caption
        self._captions = counts
        lengths = np.array([len(caption) for caption in captions], np.int64)
        self._bigrams = np.maximum(lengths - 1, 0)

        sizes = np.array([len(gram) for gram in given], np.int64)
        values = np.fromiter(given.values(), np.float64, len(given))
        tables: list[np.ndarray] = []
        frequencies, rows, grams, tfs = [], [], [], []
        # n-grams of given frequencies are sentences too, so that the tables know them
        for n, (keys, row, gram) in enumerate(_ngrams([*captions, *given]), 1):
            ours = row < len(captions)
            theirs, their_gram = row[~ours] - len(captions), gram[~ours]
            row, gram, tf = _count(row[ours], gram[ours], len(keys))
            frequency = np.zeros(len(keys))
            if document_frequencies is None:
                _, seen, _ = _count(self._picture[row], gram, len(keys))
                frequency += np.bincount(seen, minlength=len(keys))
            else:
                whole = sizes[theirs] == n
                frequency[their_gram[whole]] = values[theirs[whole]]
            rows.append(row.astype(np.int32))
            grams.append((gram + sum(len(table) for table in tables)).astype(np.int32))
            tfs.append(tf.astype(np.uint16))
            tables.append(keys)
            frequencies.append(frequency)
        self._tables = tables
        self._firsts = np.cumsum([0, *(len(table) for table in tables)])  # the first number of each order
        # the last one, number -1, is of n-grams that no table has
        self._idf = np.log(documents) - np.log(np.maximum(1.0, np.concatenate([*frequencies, [0.0]])))

        orders = np.repeat(np.arange(ORDERS), [len(r) for r in rows])
        row, gram, tf = np.concatenate(rows), np.concatenate(grams), np.concatenate(tfs)
        self._norms = _norms(row, orders, tf * self._idf[gram], len(captions))
        by_picture = np.argsort(self._picture[row] * len(self._idf) + gram)
        self._row, self._gram, self._tf = row[by_picture], gram[by_picture], tf[by_picture]
        self._starts = np.searchsorted(self._picture[self._row], np.arange(len(counts) + 1))

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._captions)

    def rewards(self, pictures: Sequence[int], candidates: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the CIDEr-D ``(N,)`` of N candidates, each 0 to 10.

        Args:
            pictures: for each candidate, which picture's references judge it.
            candidates: token ids, the end token included where it was said.

        Raises:
            ValueError: if there is not one picture for each candidate.
            IndexError: for a picture that is not there.
        """
        if len(pictures) != len(candidates):
            raise ValueError(f"{len(candidates)} candidates came with {len(pictures)} pictures")
        if len(candidates) == 0:
            return np.zeros(0)
        distinct, slot = np.unique(np.asarray(pictures, np.int64), return_inverse=True)
        if distinct[0] < 0 or distinct[-1] >= len(self):
            wrong = distinct[0] if distinct[0] < 0 else distinct[-1]
            raise IndexError(f"there is no picture {wrong}, only 0 to {len(self) - 1}")
        row, gram, order, tf = self._look_up(candidates)
        idf = self._idf[gram]
        norms = _norms(row, order, tf * idf, len(candidates))

        # the references' n-grams of these pictures, sorted by picture and n-gram
        starts, counts = self._starts[distinct], np.diff(self._starts)[distinct]
        place = _ranges(starts, counts)
        theirs = np.repeat(np.arange(len(distinct)), counts) * len(self._idf) + self._gram[place]

        shared = (gram >= 0) & (idf > 0)
        row, gram, order, tf, idf = row[shared], gram[shared], order[shared], tf[shared], idf[shared]
        ours = slot[row] * len(self._idf) + gram
        low, high = np.searchsorted(theirs, ours, "left"), np.searchsorted(theirs, ours, "right")
        match = place[_ranges(low, high - low)]
        row, order, tf, idf = (np.repeat(x, high - low) for x in (row, order, tf, idf))

        caption, their_tf = self._row[match], self._tf[match].astype(np.float64)
        cosine = np.minimum(tf, their_tf) * their_tf * idf**2
        cosine /= norms[row, order] * self._norms[caption, order]
        bigrams = np.array([max(0, len(candidate) - 1) for candidate in candidates])
        penalty = np.exp(-((bigrams[row] - self._bigrams[caption]) ** 2) / (2 * SIGMA**2))
        total = np.bincount(row, cosine * penalty, minlength=len(candidates))
        return 10.0 * total / (ORDERS * self._captions[distinct][slot])

    def _look_up(
        self, candidates: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the candidates' n-grams: row, number (-1 for one that no table has), order less 1, count."""
        rows, grams, tfs = [], [], []
        numbers: list[np.ndarray] = []  # what the tables call the candidates' own n-grams, by order
        for order, (keys, row, gram) in enumerate(_ngrams(candidates)):
            if order:
                prefix, last = np.divmod(keys, max(1, len(numbers[0])))
                prefix, last = numbers[-1][prefix], numbers[0][last]
                keys = np.where((prefix < 0) | (last < 0), -1, prefix * len(self._tables[0]) + last)
            table = self._tables[order]
            place = np.searchsorted(table, keys)
            known = place < len(table)
            known[known] = table[place[known]] == keys[known]
            numbers.append(np.where(known, place, -1))
            row, gram, tf = _count(row, gram, len(keys))
            found = numbers[-1][gram]
            rows.append(row)
            grams.append(np.where(found < 0, -1, found + self._firsts[order]))
            tfs.append(tf)
        orders = np.repeat(np.arange(ORDERS), [len(r) for r in rows])
        return np.concatenate(rows), np.concatenate(grams), orders, np.concatenate(tfs)


def _ngrams(
    sentences: Sequence[Sequence[int]],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield for each order n the sorted keys of the different n-grams, and row and number of every one.

    The key of a token is the token itself; that of a longer n-gram is ``prefix * tokens + last``, with the
    numbers of its first n - 1 tokens and of its last token, where ``tokens`` is how many there are.
    """
    lengths = np.array([len(sentence) for sentence in sentences], np.int64)
    flat = np.fromiter(chain.from_iterable(sentences), np.int64, int(lengths.sum()))
    row = np.repeat(np.arange(len(lengths)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))  # tokens from here to the end
    keys, token = np.unique(flat, return_inverse=True)
    tokens = len(keys)
    number, place = token, np.arange(len(flat))
    yield keys, row, number
    for order in range(2, ORDERS + 1):
        longer = left[place] >= order
        place = place[longer]
        keys, number = np.unique(number[longer] * tokens + token[place + order - 1], return_inverse=True)
        yield keys, row[place], number


def _count(row: np.ndarray, gram: np.ndarray, grams: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the different pairs of row and n-gram, and how often each occurs."""
    pairs, counts = np.unique(row * max(1, grams) + gram, return_counts=True)
    row, gram = np.divmod(pairs, max(1, grams))
    return row, gram, counts


def _norms(row: np.ndarray, order: np.ndarray, weight: np.ndarray, rows: int) -> np.ndarray:
    """Return the length ``(rows, ORDERS)`` of each row's vector of each order."""
    squares = np.bincount(row * np.int64(ORDERS) + order, weight**2, minlength=rows * ORDERS)
    return np.sqrt(squares).reshape(rows, ORDERS)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the whole numbers from each start, as many as its count, one range after the other."""
    shift = starts - (np.cumsum(counts) - counts)
    return np.repeat(shift, counts) + np.arange(int(counts.sum()))
