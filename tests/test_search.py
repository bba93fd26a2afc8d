import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from captioner.decoder import Decoder, DecoderConfig, Memory
from captioner.search import Hypothesis, Machine, SearchOptions, search
from captioner.tokenizer import END, PAD, START, UNKNOWN

PLAIN = SearchOptions(beam=3, no_repeat_ngram=0, min_length=0, max_length=4, length_penalty=0.7)


def make(seed: int, words: int = 3, cell: str = "lstm", attention: str = "additive") -> Decoder:
    """A random decoder of a few words whose choices depend on all that it has said and seen."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        hidden=10, embedding=6, cells=7, attention_width=5, tied=False, cell=cell, attention=attention
    )
    decoder = Decoder(config, 9, 4 + words).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(10 if name.startswith("embedding") else 4)
        decoder.output.weight.mul_(1.5)
        decoder.output.bias.normal_(0, 0.5)
    return decoder.requires_grad_(False)


def look(decoder: Decoder, pictures: int = 1, seed: int = 0) -> Memory:
    features = torch.randn(pictures, 5, 9, generator=torch.Generator().manual_seed(seed)) * 3
    mask = torch.ones(pictures, 5)
    mask[::2, 3] = 0
    mask[1::3, :2] = torch.tensor([0.5, 0.0])
    return decoder.memory(features, mask)


# --------------------------------------------------------------------------------------------------
# The slow and obvious way


class Node(NamedTuple):
    log_probs: np.ndarray
    state: torch.Tensor
    attention: np.ndarray | None
    gate: float | None


class Naive:
    """One picture; every prefix is run from its parent, one at a time."""

    def __init__(self, decoder: Decoder, memory: Memory, picture: int = 0) -> None:
        self.decoder = decoder
        self.memory = memory.select(torch.tensor([picture]))
        self.nodes: dict[tuple[int, ...], Node] = {}
        self.vocabulary = decoder.output.weight.shape[0]

    def after(self, tokens: Sequence[int]) -> Node:
        """What the decoder says after these tokens."""
        tokens = tuple(tokens)
        if tokens not in self.nodes:
            state = self.after(tokens[:-1]).state if tokens else self.decoder.start(self.memory)
            last = torch.tensor([tokens[-1] if tokens else START])
            step = self.decoder.step(last, state, self.memory)
            self.nodes[tokens] = Node(
                torch.log_softmax(self.decoder.logits(step.output)[0].double(), -1).numpy(),
                step.state,
                None if step.attention is None else step.attention[0].numpy(),
                None if step.gate is None else float(step.gate[0]),
            )
        return self.nodes[tokens]

    def allowed(self, tokens: Sequence[int], options: SearchOptions) -> list[int]:
        """What may follow, the end included."""
        size = options.no_repeat_ngram
        blocked = {
            tokens[i + size - 1]
            for i in range(len(tokens) - size + 1)
            if size and list(tokens[i : i + size - 1]) == list(tokens[len(tokens) - size + 1 :])
        }
        found = [t for t in range(4, self.vocabulary) if t not in blocked]
        if len(tokens) >= options.min_length or not found:
            found.append(END)
        return found

    def log_prob(self, tokens: Sequence[int], given: int = 0) -> float:
        """Of the tokens that were not given, and the end."""
        return sum(self.after(tokens[:i]).log_probs[t] for i, t in enumerate([*tokens, END]) if i >= given)

    def captions(self, options: SearchOptions, prefix: Sequence[int] = ()) -> list[tuple[int, ...]]:
        """Every caption there is."""
        found, running = [], [tuple(prefix)]
        while running:
            tokens = running.pop()
            if len(tokens) == options.max_length:
                found.append(tokens)
                continue
            for token in self.allowed(tokens, options):
                if token == END:
                    found.append(tokens)
                else:
                    running.append((*tokens, token))
        return found

    def score(self, tokens: Sequence[int], options: SearchOptions, given: int = 0) -> float:
        return self.log_prob(tokens, given) / (len(tokens) - given + 1) ** options.length_penalty

    def best(
        self, options: SearchOptions, prefix: Sequence[int] = (), holds: object = None
    ) -> list[tuple[float, tuple[int, ...]]]:
        """The best captions of all, by enumeration."""
        ranked = [
            (self.score(tokens, options, len(prefix)), tokens)
            for tokens in self.captions(options, prefix)
            if holds is None or holds(tokens)
        ]
        return sorted(ranked, reverse=True)[: options.n_best]

    def greedy(self, options: SearchOptions, prefix: Sequence[int] = ()) -> tuple[int, ...]:
        tokens = list(prefix)
        while len(tokens) < options.max_length:
            log_probs = self.after(tokens).log_probs
            token = max(self.allowed(tokens, options), key=lambda t: log_probs[t])
            if token == END:
                break
            tokens.append(token)
        return tuple(tokens)

    def beam(
        self, options: SearchOptions, prefix: Sequence[int] = (), machine: Machine | None = None
    ) -> list[tuple[float, tuple[int, ...]]]:
        """Beam search with lists: ends are collected, the best ``beam`` of the rest go on.

        With required words the best of each state of the machine go on, and only ends that hold them count.
        """
        given, penalty = len(prefix), options.length_penalty
        running, pool, pruned = [(0.0, tuple(prefix))], [], False
        for length in range(given, options.max_length + 1):
            following = []
            for score, tokens in running:
                log_probs = self.after(tokens).log_probs
                allowed = [END] if length == options.max_length else self.allowed(tokens, options)
                for token in allowed:
                    total = score + log_probs[token]
                    if token != END:
                        following.append((total, (*tokens, token)))
                    elif machine is None or machine.accepting[run(machine, tokens)]:
                        pool.append((total / (length - given + 1) ** penalty, tokens))
            pool = sorted(pool, reverse=True)[: options.n_best]
            pruned = pruned or len(following) > options.beam
            states: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
            for total, tokens in sorted(following, reverse=True):
                states.setdefault(0 if machine is None else run(machine, tokens), []).append((total, tokens))
            running = sorted((r for kept in states.values() for r in kept[: options.beam]), reverse=True)
            if not running:
                break
            reach = length + 2 if pruned or penalty <= 0 else options.max_length + 1
            bound = running[0][0] / (reach - given) ** penalty
            if len(pool) == options.n_best and pool[-1][0] >= bound:
                break
        return pool


def run(machine: Machine, tokens: Sequence[int]) -> int:
    """The state of the machine after these tokens."""
    state = 0
    for token in tokens:
        other = int(machine.continues is not None and machine.continues[token])
        state = int(machine.table[state, machine.symbols.get(token, other)])
    return state


def check(hypothesis: Hypothesis, naive: Naive, options: SearchOptions, given: int = 0) -> None:
    """Everything that a hypothesis carries is what teacher forcing gives for its tokens."""
    tokens = hypothesis.tokens
    nodes = [naive.after(tokens[:i]) for i in range(len(tokens) + 1)]
    assert hypothesis.given == given
    assert hypothesis.log_probability == pytest.approx(naive.log_prob(tokens, given), abs=1e-4)
    assert hypothesis.score == pytest.approx(naive.score(tokens, options, given), abs=1e-4)
    chosen = [node.log_probs[t] for node, t in zip(nodes, tokens, strict=False)]
    np.testing.assert_allclose(hypothesis.token_log_probabilities, chosen, atol=1e-4)
    if nodes[0].attention is None:
        assert hypothesis.attention is None
        assert hypothesis.gates is None
    else:
        assert hypothesis.attention.shape == (len(tokens), 5)
        for found, node in zip(hypothesis.attention, nodes, strict=False):
            np.testing.assert_allclose(found, node.attention, atol=1e-5)
        np.testing.assert_allclose(hypothesis.gates, [n.gate for n in nodes[:-1]], atol=1e-5)
    count = min(options.alternatives, naive.vocabulary)
    assert hypothesis.alternatives.shape == (len(tokens), count)
    assert hypothesis.alternative_probabilities.shape == (len(tokens), count)
    for ids, probabilities, node in zip(
        hypothesis.alternatives, hypothesis.alternative_probabilities, nodes, strict=False
    ):
        np.testing.assert_allclose(probabilities, np.exp(node.log_probs[ids]), atol=1e-5)
        np.testing.assert_allclose(probabilities, np.exp(np.sort(node.log_probs)[::-1][:count]), atol=1e-5)
    if len(tokens) == options.max_length:
        assert hypothesis.finished == (int(nodes[-1].log_probs.argmax()) == END)
    else:
        assert hypothesis.finished


def tokens_of(results: list[list[Hypothesis]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(h.tokens) for h in found] for found in results]


def assert_ranked(found: list[Hypothesis], expected: list[tuple[float, tuple[int, ...]]]) -> None:
    assert [tuple(h.tokens) for h in found] == [tokens for _, tokens in expected]
    np.testing.assert_allclose([h.score for h in found], [score for score, _ in expected], atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Beam and greedy


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length_penalty", [-0.5, 0, 0.7, 1.0, 2.0])
def test_a_beam_that_holds_everything_finds_the_best_of_all(seed: int, length_penalty: float) -> None:
    decoder = make(seed)
    memory = look(decoder, 2)
    naives = [Naive(decoder, memory, picture) for picture in range(2)]
    for changes in (
        {},
        {"min_length": 2},
        {"min_length": 4},
        {"no_repeat_ngram": 1},
        {"no_repeat_ngram": 2, "min_length": 1},
        {"n_best": 81},
    ):
        options = replace(PLAIN, **{"beam": 81, "n_best": 10, "length_penalty": length_penalty, **changes})
        for naive, found in zip(naives, search(decoder, memory, options), strict=True):
            assert_ranked(found, naive.best(options))
            for hypothesis in found[:3]:
                check(hypothesis, naive, options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_a_beam_is_a_beam(seed: int, beam: int) -> None:
    decoder = make(seed, words=6)
    memory = look(decoder, 4)
    naives = [Naive(decoder, memory, picture) for picture in range(4)]
    for changes in (
        {},
        {"length_penalty": 0.0, "min_length": 3},
        {"length_penalty": 1.0, "no_repeat_ngram": 2},
    ):
        options = replace(PLAIN, beam=beam, n_best=beam, max_length=7, **changes)
        for naive, found in zip(naives, search(decoder, memory, options), strict=True):
            if beam == 1:
                expected = naive.greedy(options)
                assert [tuple(h.tokens) for h in found] == [expected]
            else:
                assert_ranked(found, naive.beam(options))
            for hypothesis in found:
                check(hypothesis, naive, options)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("attention", ["additive", "dot", "none"])
def test_attention_and_the_rest_follow_the_hypotheses(cell: str, attention: str) -> None:
    decoder = make(5, 6, cell, attention)
    memory = look(decoder, 4)
    for options in (
        replace(PLAIN, beam=4, n_best=4, max_length=8, min_length=5),
        replace(PLAIN, beam=1, max_length=8, min_length=5),
        replace(PLAIN, sample=True, n_best=3, max_length=8),
    ):
        for picture, found in enumerate(search(decoder, memory, options)):
            for hypothesis in found:
                check(hypothesis, Naive(decoder, memory, picture), options)


def test_scores_descend_and_hypotheses_differ() -> None:
    decoder = make(3, 6)
    for found in search(decoder, look(decoder, 6), replace(PLAIN, beam=6, n_best=6)):
        scores = [h.score for h in found]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(h.tokens) for h in found}) == len(found) == 6


def bias_end(decoder: Decoder, value: float) -> Decoder:
    decoder.output.bias[END] = value
    return decoder


def count_steps(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows, step = [], decoder.step
    monkeypatch.setattr(decoder, "step", lambda t, s, m: rows.append(len(t)) or step(t, s, m))
    return rows


@pytest.mark.parametrize("options", [{"beam": 1}, {"beam": 3}, {"sample": True}])
def test_the_search_ends_with_the_last_caption(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = bias_end(make(0), 60.0)
    steps = count_steps(decoder, monkeypatch)
    found = search(decoder, look(decoder, 3), replace(PLAIN, max_length=30, min_length=2, **options))
    assert [len(h[0].tokens) for h in found] == [2, 2, 2]
    assert all(h[0].finished for h in found)
    assert len(steps) == 3


def test_pictures_that_are_done_cost_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make(3, 6)
    memory = look(decoder, 12)
    lengths = [len(h[0].tokens) for h in search(decoder, memory, replace(PLAIN, beam=1, max_length=9))]
    assert min(lengths) < max(lengths)  # else this shows nothing
    rows = count_steps(decoder, monkeypatch)
    search(decoder, memory, replace(PLAIN, beam=1, max_length=9))
    assert rows == [sum(n >= t for n in lengths) for t in range(max(lengths) + 1)]


@pytest.mark.parametrize("options", [{"beam": 1}, {"beam": 3, "n_best": 3}, {"sample": True, "n_best": 2}])
def test_captions_that_never_end_are_returned_all_the_same(options: dict) -> None:
    decoder = bias_end(make(0), -60.0)
    memory = look(decoder, 2)
    for picture, found in enumerate(search(decoder, memory, replace(PLAIN, max_length=6, **options))):
        assert found
        for hypothesis in found:
            assert len(hypothesis.tokens) == 6
            assert not hypothesis.finished
            check(hypothesis, Naive(decoder, memory, picture), replace(PLAIN, max_length=6))


@pytest.mark.parametrize("options", [{"beam": 1}, {"beam": 3}, {"beam": 3, "n_best": 3}, {"sample": True}])
def test_what_may_say_nothing_more_ends(options: dict) -> None:
    decoder = make(0)
    options = replace(PLAIN, no_repeat_ngram=1, min_length=9, max_length=9, **options)
    for found in search(decoder, look(decoder, 2), options):
        for hypothesis in found:
            assert sorted(hypothesis.tokens) == [4, 5, 6]  # each word once


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("options", [{"beam": 10, "n_best": 10}, {"beam": 1}, {"sample": True, "top_k": 50}])
def test_a_vocabulary_smaller_than_everything(words: int, options: dict) -> None:
    decoder = make(0, words)
    options = replace(PLAIN, alternatives=20, **options)
    for picture, found in enumerate(search(decoder, look(decoder, 2), options)):
        assert 1 <= len(found) <= options.n_best
        for hypothesis in found:
            check(hypothesis, Naive(decoder, look(decoder, 2), picture), options)


def test_no_alternatives() -> None:
    decoder = make(0)
    found = search(decoder, look(decoder), replace(PLAIN, alternatives=0))[0][0]
    assert found.alternatives.shape == (len(found.tokens), 0)


def test_special_tokens_are_never_said() -> None:
    decoder = make(0)
    decoder.output.bias[[PAD, START, UNKNOWN]] = 60.0
    for options in (replace(PLAIN, beam=1), PLAIN, replace(PLAIN, sample=True)):
        for found in search(decoder, look(decoder, 3), options):
            assert not {PAD, START, UNKNOWN, END} & set(found[0].tokens)


# --------------------------------------------------------------------------------------------------
# Batches

MODES = {
    "greedy": {"beam": 1},
    "beam": {"beam": 3, "n_best": 2},
    "sample": {"sample": True, "n_best": 2, "temperature": 1.5, "top_p": 0.9},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("must", [False, True])
def test_captions_depend_on_their_picture_alone(mode: str, must: bool) -> None:
    decoder = make(2, 6)
    pictures = 7
    memory = look(decoder, pictures)
    options = replace(PLAIN, max_length=8, no_repeat_ngram=2, **MODES[mode])
    prefixes = [[], [4], [5, 6], [], [7, 7, 8], [9], []]
    required = [[], [[(4,)]], [[(5,)], [(7, 8)]], [], [[(6,), (9,)]], [[(4,)], [(5,)], [(6,)]], [[(9, 9)]]]
    seeds = [100 + i for i in range(pictures)]

    def run(rows: list[int]) -> list[list[Hypothesis]]:
        return search(
            decoder,
            memory.select(torch.tensor(rows)),
            options,
            prefixes=[prefixes[i] for i in rows],
            machines=[Machine(required[i]) for i in rows] if must else None,
            seeds=[seeds[i] for i in rows],
        )

    together = run(list(range(pictures)))
    orders = [[6, 5, 4, 3, 2, 1, 0], [3, 0, 5], [4, 4, 1], *([i] for i in range(pictures))]
    for rows in orders:
        for i, found in zip(rows, run(rows), strict=True):
            assert [h.tokens for h in found] == [h.tokens for h in together[i]]
            for one, other in zip(found, together[i], strict=True):
                assert one.score == pytest.approx(other.score, abs=1e-4)
                np.testing.assert_allclose(one.attention, other.attention, atol=1e-5)
                np.testing.assert_array_equal(one.alternatives, other.alternatives)


def test_no_pictures_at_all() -> None:
    decoder = make(0)
    memory = look(decoder).select(torch.zeros(0, dtype=torch.long))
    for options in (PLAIN, replace(PLAIN, beam=1), replace(PLAIN, sample=True)):
        assert search(decoder, memory, options) == []


# --------------------------------------------------------------------------------------------------
# Prefixes


@pytest.mark.parametrize("seed", range(3))
def test_prefixes_of_different_lengths_in_one_batch(seed: int) -> None:
    decoder = make(seed, 3)
    memory = look(decoder, 5)
    prefixes = [[], [4], [5, 5], [6, 4, 5], [4, 4, 4, 4]]  # the last one leaves room for nothing
    naives = [Naive(decoder, memory, picture) for picture in range(5)]
    for changes in ({"length_penalty": 0.0}, {"no_repeat_ngram": 2}, {"min_length": 3}):
        options = replace(PLAIN, **{"beam": 81, "n_best": 3, **changes})
        greedy = replace(options, beam=1, n_best=1)
        everything = search(decoder, memory, options, prefixes=prefixes)
        narrow = search(decoder, memory, replace(options, beam=3), prefixes=prefixes)
        walks = search(decoder, memory, greedy, prefixes=prefixes)
        samples = search(decoder, memory, replace(greedy, sample=True, n_best=4), prefixes=prefixes)
        for picture, prefix in enumerate(prefixes):
            naive = naives[picture]
            assert_ranked(everything[picture], naive.best(options, prefix))
            assert_ranked(narrow[picture], naive.beam(replace(options, beam=3), prefix))
            assert tuple(walks[picture][0].tokens) == naive.greedy(greedy, prefix)
            for hypothesis in (*everything[picture], *narrow[picture], *walks[picture], *samples[picture]):
                assert hypothesis.tokens[: len(prefix)] == prefix
                check(hypothesis, naive, options, len(prefix))


def test_a_prefix_may_hold_what_the_search_would_never_say() -> None:
    decoder = make(1)
    options = replace(PLAIN, no_repeat_ngram=1)
    for found in search(decoder, look(decoder, 2), options, prefixes=[[UNKNOWN, 4], [5, 5]]):
        assert found[0].tokens[:2] in ([UNKNOWN, 4], [5, 5])
        picture = int(found[0].tokens[0] == 5)
        check(found[0], Naive(decoder, look(decoder, 2), picture), options, 2)


def test_a_prefix_that_is_too_long() -> None:
    decoder = make(1)
    with pytest.raises(ValueError, match="take 5 tokens, more than max_length 4"):
        search(decoder, look(decoder), PLAIN, prefixes=[[4] * 5])


# --------------------------------------------------------------------------------------------------
# Required words


def says(tokens: Sequence[int], phrases: Sequence[tuple[int, ...]], continues: np.ndarray | None) -> bool:
    """Whether one of the phrases is there, as whole words."""
    return any(
        tuple(tokens[i : i + len(phrase)]) == phrase
        and not (continues is not None and continues[[*tokens, END][i + len(phrase)]])
        for phrase in phrases
        for i in range(len(tokens) - len(phrase) + 1)
    )


PIECES = np.array([False] * 7 + [True] * 2)  # tokens 7 and 8 continue words
REQUIRED: list[tuple[list, np.ndarray | None]] = [
    ([[(4,)]], None),
    ([[(4,)], [(5,)]], None),
    ([[(4, 5)]], None),
    ([[(4, 5, 4)]], None),
    ([[(4, 4, 5)]], None),
    ([[(4,), (5,)]], None),
    ([[(4, 5, 6), (5,)]], None),  # the short one within the long one
    ([[(4, 5, 6, 4), (5, 5)]], None),
    ([[(4, 5)], [(5, 4)]], None),  # they may overlap
    ([[(5,)], [(4, 5)]], None),
    ([[(4, 5), (6,)], [(5, 6)]], None),
    ([[(4,)], [(4,)]], None),
    ([[(4,)], [(5,)], [(6,)]], None),
    ([[(4,)]], PIECES),
    ([[(4, 7)]], PIECES),
    ([[(4,), (4, 7)]], PIECES),
    ([[(4, 7, 8), (5,)]], PIECES),
    ([[(4, 5)]], PIECES),  # two words
    ([[(4, 5, 6), (5,)]], PIECES),
    ([[(4,)], [(5, 7)]], PIECES),
]


@pytest.mark.parametrize(("required", "continues"), REQUIRED)
def test_machines_accept_what_holds_the_words(required: list, continues: np.ndarray | None) -> None:
    machine = Machine(required, continues)
    alphabet = [4, 5, 6] if continues is None else [4, 5, 6, 7, 8]
    shortest: dict[int, int] = {}
    for length in range(6 if continues is None else 5):
        for tokens in itertools.product(alphabet, repeat=length):
            state, path = 0, [0]
            for token in tokens:
                other = int(continues is not None and continues[token])
                state = int(machine.table[state, machine.symbols.get(token, other)])
                path.append(state)
            assert state == run(machine, tokens)
            holds = all(says(tokens, phrases, continues) for phrases in required)
            assert machine.accepting[state] == holds, tokens
            if holds:
                for i, passed in enumerate(path):
                    shortest[passed] = min(shortest.get(passed, 99), length - i)
    for state, count in shortest.items():
        assert machine.needed[state] == count


@pytest.mark.parametrize(("required", "continues"), REQUIRED)
@pytest.mark.parametrize("seed", range(2))
def test_a_beam_that_holds_everything_finds_the_best_with_the_words(
    required: list, continues: np.ndarray | None, seed: int
) -> None:
    words = 3 if continues is None else 5
    decoder = make(seed, words)
    memory = look(decoder, 2)
    prefixes = [[], [4]]
    length = 4 if continues is None else 3
    options = replace(PLAIN, beam=words**length, n_best=4, max_length=length)
    machines = [Machine(required, continues)] * 2
    for picture, found in enumerate(search(decoder, memory, options, prefixes=prefixes, machines=machines)):
        naive = Naive(decoder, memory, picture)
        expected = naive.best(
            options, prefixes[picture], lambda t: all(says(t, phrases, continues) for phrases in required)
        )
        assert_ranked(found, expected)
        for hypothesis in found:
            check(hypothesis, naive, options, len(prefixes[picture]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("required", "continues"), REQUIRED)
def test_required_words_appear(mode: str, required: list, continues: np.ndarray | None) -> None:
    decoder = make(4, 5)
    memory = look(decoder, 3)
    prefixes = [[], [4], [5, 6]]
    options = replace(PLAIN, max_length=10, **MODES[mode])
    machines = [Machine(required, continues)] * 3
    results = search(decoder, memory, options, prefixes=prefixes, machines=machines)
    for picture, found in enumerate(results):
        assert found
        for hypothesis in found:
            assert all(says(hypothesis.tokens, phrases, continues) for phrases in required)
            assert hypothesis.tokens[: len(prefixes[picture])] == prefixes[picture]
            check(hypothesis, Naive(decoder, memory, picture), options, len(prefixes[picture]))


@pytest.mark.parametrize("mode", MODES)
def test_words_that_the_model_would_never_say(mode: str) -> None:
    decoder = make(4, 8)
    decoder.output.bias[[9, 10]] = -30.0
    options = replace(PLAIN, max_length=8, top_k=2, **MODES[mode])
    for found in search(decoder, look(decoder, 3), options, machines=[Machine([[(9,)], [(10,)]])] * 3):
        assert {9, 10} <= set(found[0].tokens)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beam", [1, 2, 3])
def test_every_state_keeps_a_beam_of_its_own(seed: int, beam: int) -> None:
    decoder = make(seed, 10)
    # most words go on: "bicycle" is not said by "bicycle ##s"
    pieces = np.array([False] * 7 + [True] * 7)
    decoder.output.bias[7:] += 3.0
    memory = look(decoder, 3)
    naives = [Naive(decoder, memory, picture) for picture in range(3)]
    for required, continues in [REQUIRED[0], REQUIRED[9], *REQUIRED[13::2]]:
        machine = Machine(required, None if continues is None else pieces)
        options = replace(PLAIN, beam=beam, n_best=beam, max_length=7)
        results = search(decoder, memory, options, machines=[machine] * 3)
        for naive, found in zip(naives, results, strict=True):
            assert_ranked(found, naive.beam(options, (), machine))


def test_the_prefix_may_hold_the_words_already() -> None:
    decoder = make(1)
    memory = look(decoder, 2)
    options = replace(PLAIN, beam=81)
    found = search(decoder, memory, options, prefixes=[[4], [5]], machines=[Machine([[(4,)]])] * 2)
    free = search(decoder, memory, options, prefixes=[[4], [5]])
    assert found[0][0].tokens == free[0][0].tokens
    assert 4 in found[1][0].tokens


def test_required_words_must_fit() -> None:
    decoder = make(1)
    memory = look(decoder)
    overlapping = Machine([[(4,)], [(5, 4)]])
    options = replace(PLAIN, beam=2, max_length=2)
    assert search(decoder, memory, options, machines=[overlapping])[0][0].tokens == [5, 4]
    with pytest.raises(ValueError, match="take 3 tokens, more than max_length 2"):
        search(decoder, memory, options, machines=[Machine([[(4, 5, 6)]])])
    with pytest.raises(ValueError, match="take 3 tokens, more than max_length 2"):
        search(decoder, memory, options, prefixes=[[6, 6]], machines=[Machine([[(4,)]])])


def test_there_is_a_caption_even_if_the_words_are_impossible() -> None:
    decoder = make(1)
    memory = look(decoder, 2)
    # 4 may not be said twice, and only 4 4 is required
    for mode in MODES.values():
        options = replace(PLAIN, no_repeat_ngram=1, max_length=6, **mode)
        for found in search(decoder, memory, options, machines=[Machine([[(4, 4)]])] * 2):
            assert len(found) >= 1
            assert set(found[0].tokens) <= {4, 5, 6}


def test_how_many_words_may_be_required() -> None:
    six = Machine([[(token,)] for token in range(4, 10)])
    assert len(six.table) == 64
    with pytest.raises(ValueError, match="too many required words: at most six"):
        Machine([[(token,)] for token in range(4, 11)])
    with pytest.raises(ValueError, match="too many required words"):
        Machine([[(token, token + 1, token + 2)] for token in range(4, 8)])
    for empty in ([[]], [[()]], [[(4,)], []]):
        with pytest.raises(ValueError, match="a required word is empty"):
            Machine(empty)
    decoder = make(0, 6)
    options = replace(PLAIN, max_length=12, beam=2)
    found = search(decoder, look(decoder), options, machines=[six])[0][0]
    assert set(found.tokens) == set(range(4, 10))


# --------------------------------------------------------------------------------------------------
# Sampling


def draw(decoder: Decoder, count: int, options: SearchOptions, machine: Machine | None = None) -> Counter:
    """Sample many captions of one picture."""
    memory = look(decoder).select(torch.zeros(count, dtype=torch.long))
    machines = None if machine is None else [machine] * count
    found = search(decoder, memory, options, machines=machines, seeds=range(count))
    return Counter(tuple(h[0].tokens) for h in found)


def walk_probabilities(
    naive: Naive, options: SearchOptions, always: Sequence[int] = ()
) -> dict[tuple[int, ...], float]:
    """The probability of every caption under temperature, top-k and top-p; cut at the maximum length.

    The tokens in ``always`` stay possible whatever top-k and top-p say.
    """

    def following(tokens: tuple[int, ...]) -> dict[int, float]:
        log_probs = naive.after(tokens).log_probs
        weights = {t: math.exp(log_probs[t] / options.temperature) for t in naive.allowed(tokens, options)}
        ranked = sorted(weights, key=lambda t: -weights[t])
        if options.top_k:
            ranked = ranked[: options.top_k]
        total, kept, reached = sum(weights[t] for t in ranked), [], 0.0
        for token in ranked:
            if reached >= options.top_p * total:
                break
            kept.append(token)
            reached += weights[token]
        kept += [t for t in always if t not in kept and t in weights]
        return {t: weights[t] / sum(weights[k] for k in kept) for t in kept}

    found: dict[tuple[int, ...], float] = {}
    running: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while running:
        tokens, p = running.pop()
        if len(tokens) == options.max_length:
            found[tokens] = found.get(tokens, 0) + p
            continue
        for token, q in following(tokens).items():
            if token == END:
                found[tokens] = found.get(tokens, 0) + p * q
            else:
                running.append(((*tokens, token), p * q))
    return found


def assert_drawn_from(counts: Counter, expected: dict[tuple[int, ...], float]) -> None:
    """Pearson's chi-squared test; a sound sampler fails it once in ten thousand seeds, which are fixed."""
    n = sum(counts.values())
    assert set(counts) <= {k for k, p in expected.items() if p > 0}
    common = {k: p for k, p in expected.items() if p * n >= 5}
    observed = [counts[k] for k in common] + [sum(c for k, c in counts.items() if k not in common)]
    wanted = [p * n for p in common.values()] + [n - sum(common.values()) * n]
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    freedom = len(wanted) - 1
    # Wilson and Hilferty's approximation
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert freedom >= 1
    assert z < 3.7, f"chi-squared {statistic:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 1},
        {"max_length": 2},
        {"max_length": 2, "temperature": 0.5},
        {"max_length": 2, "temperature": 2.0, "min_length": 1},
        {"max_length": 2, "top_k": 2},
        {"max_length": 2, "top_p": 0.7},
        {"max_length": 2, "top_k": 3, "top_p": 0.8, "temperature": 1.5},
    ],
)
def test_samples_follow_the_models_probabilities(changes: dict) -> None:
    decoder = make(0, 3)
    decoder.output.weight.mul_(0.3)  # less sure, so that there is something to draw from
    options = replace(PLAIN, sample=True, **changes)
    expected = walk_probabilities(Naive(decoder, look(decoder)), options)
    assert len(expected) > 1
    assert_drawn_from(draw(decoder, 2000, options), expected)


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 1.7}, {"top_k": 2}, {"top_p": 0.6}, {"min_length": 2}]
)
def test_samples_with_required_words_follow_them_too(changes: dict) -> None:
    decoder = make(0, 3)
    decoder.output.weight.mul_(0.3)
    options = replace(PLAIN, **{"sample": True, "beam": 9, "max_length": 2, **changes})
    naive = Naive(decoder, look(decoder))
    required = min(range(4, 7), key=lambda t: naive.after([]).log_probs[t])
    everything = walk_probabilities(naive, options, [required])
    holding = {tokens: p for tokens, p in everything.items() if required in tokens}
    total = sum(holding.values())
    counts = draw(decoder, 1500, options, Machine([[(required,)]]))
    assert_drawn_from(counts, {tokens: p / total for tokens, p in holding.items()})


def test_the_seed_decides() -> None:
    decoder = make(1, 6)
    memory = look(decoder).select(torch.zeros(30, dtype=torch.long))
    options = replace(PLAIN, sample=True, max_length=8, temperature=2.0)
    first = tokens_of(search(decoder, memory, options, seeds=range(30)))
    assert first == tokens_of(search(decoder, memory, options, seeds=range(30)))
    assert first[::-1] == tokens_of(search(decoder, memory, options, seeds=range(29, -1, -1)))
    assert len({tuple(f[0]) for f in first}) > 5
    assert first == tokens_of(search(decoder, memory, options))  # 0, 1, 2, ... unless told otherwise
    state = torch.get_rng_state()
    search(decoder, memory, options, seeds=[2**70, -5, *range(28)])
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are used


def test_several_samples_of_a_picture_differ() -> None:
    decoder = make(1, 6)
    options = replace(PLAIN, sample=True, n_best=20, beam=1, max_length=8, min_length=3)
    for found in search(decoder, look(decoder, 2), options, seeds=[1, 2]):
        assert len(found) == 20
        assert len({tuple(h.tokens) for h in found}) > 5
        scores = [h.score for h in found]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    "changes", [{"temperature": 1e-5}, {"temperature": 1e-45}, {"top_k": 1}, {"top_p": 1e-9}]
)
def test_cold_samples_are_greedy(changes: dict) -> None:
    decoder = make(2, 6)
    memory = look(decoder, 6)
    options = replace(PLAIN, beam=1, max_length=8, no_repeat_ngram=2)
    greedy = search(decoder, memory, options)
    cold = search(decoder, memory, replace(options, sample=True, **changes))
    assert tokens_of(cold) == tokens_of(greedy)


# --------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam": 0}, "beam must be from 1 to 1000, not 0"),
        ({"max_length": 0, "min_length": 0}, "max_length must be from 1 to 1000, not 0"),
        ({"n_best": 0}, "n_best must be from 1 to 1000, not 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must not be negative, and is -1"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"alternatives": -1}, "alternatives must not be negative"),
        ({"min_length": -1}, "min_length must not be negative"),
        ({"min_length": 9, "max_length": 8}, "min_length 9 is larger than max_length 8"),
        ({"temperature": 0}, "temperature must be above 0, not 0"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"length_penalty": math.nan}, "length_penalty must be a finite number, not nan"),
        ({"length_penalty": "long"}, "length_penalty must be of type float, not 'long'"),
        ({"n_best": 4, "beam": 3}, "n_best 4 needs a beam at least as wide; it is 3"),
        ({"beam": 2.0}, "beam must be of type int, not 2.0"),
        ({"beam": "3"}, "beam must be of type int, not '3'"),
        ({"beam": True}, "beam must be of type int, not True"),
        ({"sample": 1}, "sample must be of type bool, not 1"),
        ({"max_length": None}, "max_length must be of type int, not None"),
    ],
)
def test_options_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SearchOptions(), **changes).check()
    decoder = make(0)
    with pytest.raises(ValueError, match=message):
        search(decoder, look(decoder), replace(SearchOptions(), **changes))


def test_options_of_numpy_types() -> None:
    options = SearchOptions(beam=np.int64(2), temperature=np.float32(0.5), length_penalty=1, n_best=2)
    assert options.check() is options
    assert SearchOptions(sample=True, beam=1, n_best=5).check().n_best == 5
    decoder = make(0)
    for penalty in (-1, 0, 2):  # whole numbers do as well
        for sample in (False, True):
            search(decoder, look(decoder), replace(PLAIN, length_penalty=penalty, sample=sample))


def test_the_reference_model_is_worth_searching() -> None:
    """The tests above show nothing if all captions were alike."""
    decoder = make(2, 6)
    found = {tuple(h[0].tokens) for h in search(decoder, look(decoder, 20), replace(PLAIN, max_length=8))}
    assert len(found) > 10


@pytest.mark.parametrize("mode", [{"beam": 1}, {"beam": 3}, {"sample": True, "n_best": 2}])
def test_a_piece_that_continues_a_word_never_begins_one(mode: dict) -> None:
    decoder, prefixes = make(3, words=5), [[], [4], [4, 5], [6, 7]]
    memory = look(decoder, 4)
    continues = np.isin(np.arange(9), [7, 8])
    with torch.no_grad():
        decoder.output.bias[7:] += 4  # what is forbidden is what it would like to say
    options = replace(PLAIN, **mode)
    free = search(decoder, memory, options, prefixes=prefixes)
    held = search(decoder, memory, options, prefixes=prefixes, continues=continues)
    first = [(h.tokens[len(p) :] or [END])[0] for p, hs in zip(prefixes, held, strict=True) for h in hs]
    assert not any(continues[token] for token in first)
    assert any(
        continues[(h.tokens[len(p) :] or [END])[0]] for p, hs in zip(prefixes, free, strict=True) for h in hs
    )
    assert any(continues[token] for hs in held for h in hs for token in h.tokens[1:])
