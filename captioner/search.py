"""Greedy, beam and sampling search: batched over pictures, vectorised over beams, on the model's device.

One bookkeeping serves all: at every step each picture has ``G`` slots (hypotheses), and a trace records for
each step which slot every new hypothesis came from. Attention, gate, probabilities and alternatives are
recorded once, by slot, and read back along the parents at the end; nothing is recomputed.

Required words (``must``) follow constrained beam search (Anderson et al. 2017, https://arxiv.org/abs/1612.00576):
a finite-state machine tells which required words a hypothesis holds, and every state of it keeps a beam of
its own. Without required words the machine has one state and this is plain beam search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from captioner.decoder import Decoder, Memory, StepOutput
from captioner.neutral import Avoided
from captioner.tokenizer import END, PAD, START, UNKNOWN

MAX_STATES = 64
"""Largest number of machine states: six required words of one token each."""

LARGEST = 1000
"""Largest beam, length and number of captions; more would be a mistake, or an attack on the memory."""

_NEVER = float("-inf")


@dataclass(frozen=True)
class SearchOptions:
    """How to search; `check` refuses impossible values.

    Attributes:
        beam: hypotheses kept at each step; 1 is greedy.
        sample: draw words at random instead; ``beam`` then matters only to required words.
        length_penalty: a finished hypothesis is ranked by log-probability / length ** length_penalty (given
            words do not count, the end does). 0 prefers short captions, larger values longer ones.
        no_repeat_ngram: no sequence of this many tokens occurs twice; 0 allows all.
        min_length, max_length: of the caption in tokens, given words included, the end excluded.
        n_best: how many hypotheses to return, best first.
        temperature: of sampling; below 1 is more cautious.
        top_k: sample among the k likeliest tokens; 0 means all.
        top_p: sample among the fewest tokens whose probabilities reach p (Holtzman et al. 2020).
        alternatives: how many of the likeliest tokens to keep at each word.
        name_above: a thing that was guessed with a greater probability has to be named (`captioner.naming`);
            1 leaves it to the beam. Sampling does not heed it.
    """

    beam: int = 3
    sample: bool = False
    length_penalty: float = 0.7
    no_repeat_ngram: int = 3
    min_length: int = 1
    max_length: int = 30
    n_best: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    alternatives: int = 5
    name_above: float = 1.0

    def check(self) -> SearchOptions:
        """Return self.

        Raises:
            ValueError: naming the option that is impossible.
        """
        for option in fields(self):
            value = getattr(self, option.name)
            wanted = {"bool": bool, "int": Integral, "float": Real}[str(option.type)]
            if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
                raise ValueError(f"{option.name} must be of type {option.type}, not {value!r}")
            if isinstance(value, Real) and not math.isfinite(value):
                raise ValueError(f"{option.name} must be a finite number, not {value}")
        for name in ("beam", "max_length", "n_best"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} must be from 1 to {LARGEST}, not {getattr(self, name)}")
        for name in ("no_repeat_ngram", "min_length", "top_k", "alternatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, and is {getattr(self, name)}")
        if self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is larger than max_length {self.max_length}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.name_above <= 1:
            raise ValueError(f"name_above must be above 0 and at most 1, not {self.name_above}")
        if not self.sample and self.n_best > self.beam:
            raise ValueError(f"n_best {self.n_best} needs a beam at least as wide; it is {self.beam}")
        return self


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A token sequence that the search returns, T tokens without start and end.

    Attributes:
        tokens: T ids; the first ``given`` of them are the prefix.
        given: number of tokens that the caller gave.
        finished: whether the end was chosen, as opposed to the maximum length reached.
        score: log-probability / length ** length_penalty, in nats; what the beam ranks by.
        log_probability: of the chosen tokens and the end, in nats; given tokens do not count.
        token_log_probabilities: ``(T,)``, of all tokens, the given ones too.
        attention: ``(T, C)`` or None.
        gates: ``(T,)`` or None.
        word_attention: ``(T, W)`` on the guessed words, or None without a word memory; the rest, to 1, is
            on none of them.
        alternatives: ``(T, A)`` ids of the likeliest tokens.
        alternative_probabilities: ``(T, A)``, 0 to 1.
    """

    tokens: list[int]
    given: int
    finished: bool
    score: float
    log_probability: float
    token_log_probabilities: np.ndarray
    attention: np.ndarray | None
    gates: np.ndarray | None
    word_attention: np.ndarray | None
    alternatives: np.ndarray
    alternative_probabilities: np.ndarray


# --------------------------------------------------------------------------------------------------
# Required words as a finite-state machine

Phrase = tuple[int, ...]
_DONE: Phrase = (-1,)


class Machine:
    """Accepts the token sequences that hold, for each requirement, one of its phrases as whole words.

    Attributes:
        symbols: token id -> symbol; other tokens have symbol 0, or 1 if they continue a word.
        table: ``(states, symbols)`` next state; state 0 is the first.
        accepting: ``(states,)`` whether everything required has been said.
        needed: ``(states,)`` number of tokens that are still needed at the least.
    """

    def __init__(self, requirements: Sequence[Sequence[Phrase]], continues: np.ndarray | None = None) -> None:
        """Build it.

        Args:
            requirements: for each required word, its alternatives as token sequences.
            continues: ``(V,)`` whether a token continues a word (BPE); None if every token is a word.

        Raises:
            ValueError: if something required is empty, or it would take more than `MAX_STATES` states.
        """
        if any(not phrases or not all(phrases) for phrases in requirements):
            raise ValueError("a required word is empty")
        tokens = sorted({token for phrases in requirements for phrase in phrases for token in phrase})
        self.symbols = {token: i + 2 for i, token in enumerate(tokens)}
        self.continues = continues
        alphabet = [
            (None, False),
            (None, True),
            *((token, bool(continues is not None and continues[token])) for token in tokens),
        ]
        begin: tuple[Phrase, ...] = tuple(() for _ in requirements)
        index: dict[tuple[Phrase, ...], int] = {begin: 0}
        queue, table = [begin], []
        for state in queue:
            row = []
            for token, continuing in alphabet:
                following = tuple(
                    self._advance(part, phrases, token, continuing)
                    for part, phrases in zip(state, requirements, strict=True)
                )
                if following not in index:
                    if len(index) >= MAX_STATES:
                        raise ValueError(
                            "too many required words: at most six, and fewer if they take several tokens each"
                        )
                    index[following] = len(index)
                    queue.append(following)
                row.append(index[following])
            table.append(row)
        self.table = np.array(table, dtype=np.int64)
        said = [
            [part == _DONE or _says(part, phrases) for part, phrases in zip(state, requirements, strict=True)]
            for state in queue
        ]
        self.accepting = np.array([all(parts) for parts in said])
        # the shortest way to an accepting state: one token more than from the best next state
        self.needed = np.where(self.accepting, 0, len(queue))
        for _ in queue:
            self.needed = np.minimum(self.needed, self.needed[self.table].min(1) + 1)

    def _advance(
        self, part: Phrase, phrases: Sequence[Phrase], token: int | None, continuing: bool
    ) -> Phrase:
        """Return the longest suffix that begins a phrase, or done; a whole phrase must end with its word."""
        if part == _DONE or (_says(part, phrases) and not continuing):
            return _DONE
        if token is None:
            return ()
        grown = (*part, token)
        if self.continues is None and _says(grown, phrases):
            return _DONE
        for start in range(len(grown)):
            suffix = grown[start:]
            if any(phrase[: len(suffix)] == suffix for phrase in phrases):
                return suffix
        return ()


def _says(part: Phrase, phrases: Sequence[Phrase]) -> bool:
    """Return whether the tokens end with a whole phrase (while they may begin a longer one)."""
    return any(part[len(part) - len(phrase) :] == phrase for phrase in phrases if len(phrase) <= len(part))


class _Machines:
    """The machines of a batch as tensors: tables padded to the largest, token ids mapped to symbols."""

    def __init__(self, machines: Sequence[Machine], vocabulary: int, device: torch.device) -> None:
        self.states = max(len(m.table) for m in machines)
        self.sizes = [len(m.table) for m in machines]
        self.continues = any(m.continues is not None for m in machines)
        symbols = max(m.table.shape[1] for m in machines)
        table = np.zeros((len(machines), self.states, symbols), np.int64)
        accepting = np.zeros((len(machines), self.states), bool)
        mapping = np.zeros((len(machines), vocabulary), np.int64)
        tokens = np.full((len(machines), max(len(m.symbols) for m in machines)), PAD, np.int64)
        for i, machine in enumerate(machines):
            table[i, : len(machine.table), : machine.table.shape[1]] = machine.table
            accepting[i, : len(machine.table)] = machine.accepting
            if machine.continues is not None:
                mapping[i] = machine.continues
            for k, (token, symbol) in enumerate(machine.symbols.items()):
                mapping[i, token] = symbol
                tokens[i, k] = token
        self.table = torch.from_numpy(table).to(device)
        self.accepting = torch.from_numpy(accepting).to(device)
        self.mapping = torch.from_numpy(mapping).to(device)
        self.tokens = torch.from_numpy(tokens).to(device)

    def keep(self, rows: Tensor) -> None:
        self.table, self.accepting = self.table[rows], self.accepting[rows]
        self.mapping, self.tokens = self.mapping[rows], self.tokens[rows]

    def follow(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the next states ``(n, …)`` of states and tokens of that shape."""
        n, symbols = tokens.shape[0], self.table.shape[2]
        symbol = self.mapping.gather(1, tokens.reshape(n, -1))
        flat = states.reshape(n, -1) * symbols + symbol
        return self.table.flatten(1).gather(1, flat).view(tokens.shape)


class _Avoided:
    """What must not be said, as tensors."""

    def __init__(self, avoided: Avoided, device: torch.device) -> None:
        def ids(numbers: Sequence[int] | Sequence[Phrase]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        self.never = ids(list(avoided.tokens))
        moved = {token: target for token, target in avoided.tokens.items() if target is not None}
        self.targets = ids(sorted(set(moved.values())))
        # (targets, most words that one stands for), the target itself first and again where there are fewer
        groups = [[int(t), *(k for k, v in moved.items() if v == t)] for t in self.targets]
        widest = max(map(len, groups), default=0)
        self.groups = ids([tuple(g + g[:1] * widest)[:widest] for g in groups])
        self.counts = torch.tensor([len(g) for g in groups], device=device)
        # by length: the tokens before the last (P, length - 1), the last (P,)
        self.phrases: dict[int, tuple[Tensor, Tensor]] = {}
        for size in sorted({len(phrase) for phrase in avoided.phrases}):
            same = [phrase for phrase in avoided.phrases if len(phrase) == size]
            self.phrases[size] = ids([p[:-1] for p in same]), ids([p[-1] for p in same])

    def move(self, raw: Tensor) -> Tensor:
        """Return log-probabilities ``(n, G, V)``, those of avoided tokens moved to what is said instead."""
        moved = raw.clone()
        if len(self.targets):
            members = raw[..., self.groups]
            repeated = torch.arange(self.groups.shape[1], device=raw.device) >= self.counts[:, None]
            moved[..., self.targets] = members.masked_fill(repeated, _NEVER).logsumexp(-1)
        moved[..., self.never] = _NEVER
        return moved

    def forbid(self, allowed: Tensor, history: Tensor) -> None:
        """Forbid the last token of phrases whose other tokens have just been said."""
        for size, (before, last) in self.phrases.items():
            if history.shape[2] >= size - 1:
                said = (history[:, :, None, 1 - size :] == before).all(-1)
                row, slot, phrase = said.nonzero(as_tuple=True)
                allowed[row, slot, last[phrase]] = _NEVER


# --------------------------------------------------------------------------------------------------
# The trace


@dataclass
class _Trace:
    """What happened, step by step; row ``r`` of step ``t`` belongs to picture ``rows[t][r]``."""

    rows: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)  # (n, G) chosen into each new slot
    parents: list[Tensor] = field(default_factory=list)  # (n, G) the slot it came from
    log_probs: list[Tensor] = field(default_factory=list)  # (n, G) of the chosen token
    attention: list[Tensor] = field(default_factory=list)  # (n, G, C) by old slot
    gates: list[Tensor] = field(default_factory=list)  # (n, G) by old slot
    word_attention: list[Tensor] = field(default_factory=list)  # (n, G, W) by old slot
    alternatives: list[Tensor] = field(default_factory=list)  # (n, G, A) by old slot
    probabilities: list[Tensor] = field(default_factory=list)

    def read(
        self,
        ends: list[tuple[int, int, int]],
        given: Sequence[int],
        facts: list[tuple[bool, float, float]],
    ) -> list[Hypothesis]:
        """Follow the parents back from ``(picture, step, slot)``; a step of -1 stands for no token at all."""
        arrays = {
            name: [tensor.cpu().numpy() for tensor in getattr(self, name)]
            for name in ("rows", "tokens", "parents", "log_probs", "gates", "alternatives", "probabilities")
        }
        attention = [tensor.float().cpu().numpy() for tensor in self.attention]
        named = [tensor.float().cpu().numpy() for tensor in self.word_attention]
        positions = [{int(b): r for r, b in enumerate(rows)} for rows in arrays["rows"]]
        found = []
        for (picture, step, slot), (finished, score, log_probability) in zip(ends, facts, strict=True):
            path: list[tuple[int, int, int, int]] = []  # step, row, old slot, new slot
            while step >= 0:
                row = positions[step][picture]
                parent = int(arrays["parents"][step][row, slot])
                path.append((step, row, parent, slot))
                step, slot = step - 1, parent
            path.reverse()
            width = self.alternatives[0].shape[-1] if self.alternatives else 0
            cells = attention[0].shape[-1] if attention else 0
            found.append(
                Hypothesis(
                    tokens=[int(arrays["tokens"][t][r, new]) for t, r, _, new in path],
                    given=given[picture],
                    finished=finished,
                    score=score,
                    log_probability=log_probability,
                    token_log_probabilities=np.array(
                        [arrays["log_probs"][t][r, new] for t, r, _, new in path], np.float32
                    ),
                    attention=np.array([attention[t][r, old] for t, r, old, _ in path], np.float32).reshape(
                        len(path), cells
                    )
                    if self.attention
                    else None,
                    gates=np.array([arrays["gates"][t][r, old] for t, r, old, _ in path], np.float32)
                    if self.gates
                    else None,
                    word_attention=np.array([named[t][r, old] for t, r, old, _ in path], np.float32).reshape(
                        len(path), named[0].shape[-1]
                    )
                    if named
                    else None,
                    alternatives=np.array(
                        [arrays["alternatives"][t][r, old] for t, r, old, _ in path], np.int64
                    ).reshape(len(path), width),
                    alternative_probabilities=np.array(
                        [arrays["probabilities"][t][r, old] for t, r, old, _ in path], np.float32
                    ).reshape(len(path), width),
                )
            )
        return found


# --------------------------------------------------------------------------------------------------
# The search


@torch.inference_mode()
def search(
    decoder: Decoder,
    memory: Memory,
    options: SearchOptions,
    *,
    prefixes: Sequence[Sequence[int]] | None = None,
    machines: Sequence[Machine] | None = None,
    seeds: Sequence[int] | None = None,
    continues: np.ndarray | None = None,
    avoided: Avoided | None = None,
) -> list[list[Hypothesis]]:
    """Write captions for a batch of pictures.

    Args:
        decoder: in evaluation mode.
        memory: of B pictures.
        options: how to search.
        prefixes: for each picture, the token ids that its caption begins with.
        machines: for each picture, the words that must appear.
        seeds: for each picture, the seed of its random numbers; the same seed gives the same caption
            whatever else is in the batch.
        continues: ``(V,)`` whether a token continues a word (BPE): none of them may come first, nor right
            after a prefix, which ends with a whole word.
        avoided: what must not be said, except in a prefix.

    Returns:
        for each picture, at least one and at most ``n_best`` hypotheses, best first.

    Raises:
        ValueError: for impossible options, or a prefix or required words that do not fit ``max_length``.
    """
    options.check()
    pictures = memory.mask.shape[0]
    prefixes = [list(p) for p in prefixes] if prefixes is not None else [[] for _ in range(pictures)]
    seeds = list(seeds) if seeds is not None else list(range(pictures))
    bound = [i for i in range(pictures) if machines and len(machines[i].table) > 1]
    if machines and len(bound) < pictures:  # pictures that require nothing get what they get by themselves
        results: dict[int, list[Hypothesis]] = {}
        for rows in (bound, [i for i in range(pictures) if i not in bound]):
            some = search(
                decoder,
                memory.select(torch.tensor(rows, dtype=torch.long, device=memory.mask.device)),
                options,
                prefixes=[prefixes[i] for i in rows],
                machines=[machines[i] for i in rows] if rows is bound else None,
                seeds=[seeds[i] for i in rows],
                continues=continues,
                avoided=avoided,
            )
            results.update(zip(rows, some, strict=True))
        return [results[i] for i in range(pictures)]
    for i, prefix in enumerate(prefixes):
        needed = len(prefix) + (int(machines[i].needed[_state_after(machines[i], prefix)]) if machines else 0)
        if needed > options.max_length:
            raise ValueError(
                f"the prefix and the required words take {needed} tokens, "
                f"more than max_length {options.max_length}"
            )
    if options.sample:
        repeated = torch.arange(pictures).repeat_interleave(options.n_best).to(memory.mask.device)
        found = _Search(
            decoder,
            memory.select(repeated),
            options,
            [prefixes[i] for i in repeated.tolist()],
            [machines[i] for i in repeated.tolist()] if machines else None,
            [seed * 1_000_003 + k for seed in seeds for k in range(options.n_best)],
            continues,
            avoided,
        ).run()
        groups = [found[i : i + options.n_best] for i in range(0, len(found), options.n_best)]
        return [sorted((h for group in g for h in group), key=lambda h: -h.score) for g in groups]
    return _Search(decoder, memory, options, prefixes, machines, None, continues, avoided).run()


def _state_after(machine: Machine, tokens: Sequence[int]) -> int:
    state = 0
    for token in tokens:
        other = int(machine.continues is not None and machine.continues[token])
        state = int(machine.table[state, machine.symbols.get(token, other)])
    return state


class _Search:
    """One run over a batch. G slots = machine states times beam width K; slot ``s * K + k``."""

    def __init__(
        self,
        decoder: Decoder,
        memory: Memory,
        options: SearchOptions,
        prefixes: Sequence[Sequence[int]],
        machines: Sequence[Machine] | None,
        seeds: Sequence[int] | None,
        continues: np.ndarray | None,
        avoided: Avoided | None,
    ) -> None:
        self.decoder = decoder
        self.options = options
        self.device = device = memory.mask.device
        self.vocabulary = decoder.output.weight.shape[0]
        pictures = memory.mask.shape[0]
        self.machines = _Machines(machines, self.vocabulary, device) if machines else None
        self.states = self.machines.states if self.machines else 1
        # required words are drawn by a beam as well, the best of it under random noise
        self.beam = 1 if options.sample and self.machines is None else options.beam
        self.slots = self.states * self.beam
        # one walk (greedy or sampled) takes the end like any other token; a beam collects ends in a pool
        self.walk = self.beam == 1 and self.machines is None
        self.given = [len(p) for p in prefixes]
        longest = max(self.given, default=0)
        forced = torch.full((pictures, longest), PAD)
        for i, prefix in enumerate(prefixes):
            forced[i, : len(prefix)] = torch.tensor(prefix, dtype=torch.long)
        self.forced = forced.to(device)
        self.lengths = torch.tensor(self.given, device=device)
        self.continues = None if continues is None else torch.from_numpy(continues).to(device)
        self.avoided = None if avoided is None else _Avoided(avoided, device)
        self.generators = (
            None if seeds is None else [torch.Generator().manual_seed(s & (2**63 - 1)) for s in seeds]
        )
        self.rows = torch.arange(pictures, device=device)  # the pictures still running
        self.pool_size = options.n_best if not options.sample else 1
        shape = (pictures, self.pool_size)
        self.pool_score = torch.full(shape, _NEVER, device=device)
        self.pool_log_prob = torch.full(shape, _NEVER, device=device)
        self.pool_step = torch.full(shape, -2, device=device)
        self.pool_slot = torch.zeros(shape, dtype=torch.long, device=device)
        self.pool_finished = torch.zeros(shape, dtype=torch.bool, device=device)
        self.pruned = torch.zeros(pictures, dtype=torch.bool, device=device)
        self.trace = _Trace()

        state = decoder.start(memory)
        self.memory = memory  # one for all the slots of a picture
        self.state = state.repeat_interleave(self.slots, 0)
        self.tokens = torch.full((pictures, self.slots), START, device=device)
        self.score = torch.full((pictures, self.slots), _NEVER, device=device)
        self.score[:, 0] = 0.0
        # the score is what running hypotheses are ranked by: their log-probability, or noise (`_perturbed`)
        self.log_prob = self.score.clone()
        self.drawn = self.score.clone()  # log-probability under the distribution that samples come from
        self.machine_state = torch.arange(self.states, device=device).repeat_interleave(self.beam)
        self.history = torch.zeros(pictures, self.slots, 0, dtype=torch.long, device=device)

    def run(self) -> list[list[Hypothesis]]:
        """Step until every picture is done, then read the hypotheses back."""
        for t in range(self.options.max_length + 1):
            if len(self.rows) == 0:
                break
            self._step(t)
        counts = (self.pool_score > _NEVER).sum(1).tolist()
        if self.options.sample:  # report the hypothesis without the noise that chose it
            length = self.pool_step + 2 - torch.tensor(self.given, device=self.device)[:, None]
            self.pool_score = self.pool_log_prob / length.clamp(min=1).float() ** self.options.length_penalty
        ends, facts = [], []
        steps, slots = self.pool_step.tolist(), self.pool_slot.tolist()
        finished, scores = self.pool_finished.tolist(), self.pool_score.tolist()
        log_probs = self.pool_log_prob.tolist()
        for picture, count in enumerate(counts):
            for k in range(count):
                ends.append((picture, steps[picture][k], slots[picture][k]))
                facts.append((finished[picture][k], scores[picture][k], log_probs[picture][k]))
        found = iter(self.trace.read(ends, self.given, facts))
        return [[next(found) for _ in range(count)] for count in counts]

    def _step(self, t: int) -> None:
        options, n = self.options, len(self.rows)
        output = self.decoder.step(self.tokens.flatten(), self.state, self.memory)
        raw = self.decoder.log_probabilities(output.output).view(n, self.slots, -1)
        if self.avoided is not None:  # given words keep their own probabilities
            raw = torch.where((t < self.lengths)[:, None, None], raw, self.avoided.move(raw))
        if t == options.max_length:  # nothing but the end may follow; what does not end is returned as it is
            self._cut(raw, t)
            self.rows = self.rows[:0]
            return
        self._record(raw, output)
        allowed = self._allowed(raw, t)
        if self.walk:
            done = self._walk(raw, allowed, t, output.state)
        else:
            done = self._beam(raw, allowed, t, output.state)
        if bool(done.any()):
            self._keep(~done)

    def _allowed(self, raw: Tensor, t: int) -> Tensor:
        """Return log-probabilities ``(n, G, V)``, -inf for what must not follow, 0 for given words."""
        options = self.options
        allowed = raw.clone()
        allowed[..., [PAD, START, UNKNOWN]] = _NEVER
        if t < options.min_length:
            allowed[..., END] = _NEVER
        if self.continues is not None:
            first = self.lengths == t
            allowed = allowed.masked_fill(first[:, None, None] & self.continues, _NEVER)
        if self.avoided is not None:
            self.avoided.forbid(allowed, self.history)
        size = options.no_repeat_ngram
        if size and t >= size:
            # tokens that followed an earlier occurrence of the last size - 1 tokens
            windows = self.history.unfold(2, size, 1)
            same = (windows[..., :-1] == self.history[..., None, t - size + 1 :]).all(-1)
            hit, slot, place = same.nonzero(as_tuple=True)
            allowed[hit, slot, windows[hit, slot, place, -1]] = _NEVER
        if t < self.forced.shape[1]:
            given = t < self.lengths
            if bool(given.any()):
                allowed[given] = _NEVER
                which = given.nonzero().squeeze(1)
                allowed[which, :, self.forced[which, t]] = 0.0
        stuck = allowed.amax(-1) == _NEVER  # what can say nothing more can only end
        allowed[..., END] = torch.where(stuck, raw[..., END], allowed[..., END])
        return allowed

    def _record(self, raw: Tensor, output: StepOutput) -> None:
        n, (attention, gate, named) = len(self.rows), output[2:]
        self.trace.rows.append(self.rows)
        count = min(self.options.alternatives, self.vocabulary)
        likeliest, ids = raw.topk(count, -1)
        self.trace.alternatives.append(ids)
        self.trace.probabilities.append(likeliest.exp())
        if attention is not None:
            self.trace.attention.append(attention.view(n, self.slots, -1))
        if gate is not None:
            self.trace.gates.append(gate.view(n, self.slots).float())
        if named is not None:
            self.trace.word_attention.append(named[:, 1:].reshape(n, self.slots, -1))

    def _walk(self, raw: Tensor, allowed: Tensor, t: int, state: Tensor) -> Tensor:
        """Take one token for each picture: the likeliest, or one drawn at random."""
        token = self._draw(allowed[:, 0]) if self.options.sample else allowed[:, 0].argmax(-1)
        ended = token == END
        if bool(ended.any()):
            ends = raw[..., END]
            self._finish((self.score + ends).masked_fill(~ended[:, None], _NEVER), ends, t)
        gained = raw[:, 0].gather(1, token[:, None])
        free = (t >= self.lengths).to(gained)[:, None]
        self.log_prob = self.score = self.score + gained * free
        self.trace.tokens.append(token[:, None])
        self.trace.parents.append(torch.zeros_like(token)[:, None])
        self.trace.log_probs.append(gained)
        self.history = torch.cat((self.history, token[:, None, None]), -1)
        self.tokens, self.state = token[:, None], state
        return ended

    def _draw(self, log_probs: Tensor) -> Tensor:
        """Draw tokens by the inverse of the cumulative distribution, with each picture's own generator."""
        assert self.generators is not None
        options = self.options
        # on the CPU, where the generators are: not every device has 64-bit floats
        ranked, ids = self._tempered(log_probs).cpu().sort(dim=-1, descending=True, stable=True)
        probs = torch.softmax(ranked, -1)
        if options.top_k:
            probs[:, options.top_k :] = 0
        if options.top_p < 1:
            before = probs.cumsum(-1) - probs
            probs = probs.masked_fill(before >= options.top_p * probs.sum(-1, keepdim=True), 0)
        cumulative = probs.double().cumsum(-1)
        uniform = torch.cat(
            [torch.rand(1, generator=self.generators[row], dtype=torch.double) for row in self.rows.tolist()]
        )
        place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        # rounding must not step beyond the last token that has any probability
        last = (probs > 0).sum(-1, keepdim=True) - 1
        return ids.gather(1, torch.minimum(place, last)).squeeze(1).to(self.device)

    def _tempered(self, log_probs: Tensor) -> Tensor:
        """Divide by the temperature, however small: the best stays at 0."""
        return (log_probs - log_probs.amax(-1, keepdim=True)) / max(self.options.temperature, 1e-6)

    def _beam(self, raw: Tensor, allowed: Tensor, t: int, following: Tensor) -> Tensor:
        """Extend every hypothesis, keep the best K of each machine state, and pool those that end."""
        n, slots, beam = len(self.rows), self.slots, self.beam
        drawn = None
        if self.options.sample:
            total, drawn = self._perturbed(allowed)
        else:
            total = self.score[..., None] + allowed
        ends = total[..., END]
        if self.machines is not None:
            ends = ends.masked_fill(~self.machines.accepting[:, self.machine_state], _NEVER)
        self._finish(ends, raw[..., END], t)
        total[..., END] = _NEVER
        # while everything fits into the beam the search is exhaustive
        self.pruned |= (total > _NEVER).flatten(1).sum(1) > beam
        count = min(beam, self.vocabulary)
        if self.machines is None:
            scores, tokens = total.topk(count, -1)
            width = count
            best, choice = scores.flatten(1).topk(beam, -1)
        else:
            # every slot offers its best K of the tokens that are alike to the machine, and all required ones
            offers = []
            for symbol in range(2 if self.machines.continues else 1):
                alike = self.machines.mapping[:, None] == symbol
                offers.append(total.masked_fill(~alike, _NEVER).topk(count, -1))
            required = self.machines.tokens[:, None].expand(n, slots, -1)
            tokens = torch.cat([*(o.indices for o in offers), required], -1)
            scores = torch.cat([*(o.values for o in offers), total.gather(2, required)], -1)
            width = tokens.shape[-1]
            old = self.machine_state[None, :, None].expand(n, slots, width)
            target = self.machines.follow(old, tokens).flatten(1)
            kept = [
                scores.flatten(1).masked_fill(target != state, _NEVER).topk(beam, -1)
                for state in range(self.states)
            ]
            best = torch.cat([k.values for k in kept], -1)
            choice = torch.cat([k.indices for k in kept], -1)
            lost = (best.amax(1) == _NEVER) & (self.pool_score[self.rows, 0] == _NEVER)
            if bool(lost.any()):  # the required words have become impossible
                self._cut(raw, t, lost)
        parents = choice // width
        token = tokens.flatten(1).gather(1, choice)
        flat_parent = (torch.arange(n, device=self.device)[:, None] * slots + parents).flatten()
        gained = raw.flatten(0, 1)[flat_parent].gather(1, token.flatten()[:, None]).view(n, slots)
        free = (t >= self.lengths).to(gained)[:, None]
        self.log_prob = self.log_prob.gather(1, parents) + gained * free
        if drawn is not None:
            self.drawn = drawn.flatten(0, 1)[flat_parent].gather(1, token.flatten()[:, None]).view(n, slots)
        self.score = best
        self.trace.tokens.append(token)
        self.trace.parents.append(parents)
        self.trace.log_probs.append(gained)
        self.history = torch.cat(
            (self.history.flatten(0, 1)[flat_parent].view(n, slots, t), token[..., None]), -1
        )
        self.tokens, self.state = token, following[flat_parent]
        return self._done(t)

    def _perturbed(self, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Return random scores and log-probabilities, both ``(n, G, V)``: stochastic beam search.

        Each hypothesis gets its log-probability plus Gumbel noise, drawn such that the best continuation of
        a hypothesis has its very score (Kool et al. 2019, https://arxiv.org/abs/1903.06059). The best caption
        of all is then a sample, and the best that holds the required words a sample of those that do, as far
        as the beam reaches.
        """
        assert self.generators is not None
        assert self.machines is not None
        options = self.options
        scaled = self._tempered(allowed)
        chosen = scaled
        if options.top_k and options.top_k < self.vocabulary:
            chosen = chosen.masked_fill(chosen < chosen.topk(options.top_k, -1).values[..., -1:], _NEVER)
        if options.top_p < 1:
            ranked, order = chosen.sort(-1, descending=True)
            probs = torch.softmax(ranked, -1)
            outside = (probs.cumsum(-1) - probs) >= options.top_p
            chosen = chosen.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), _NEVER)
        # required words always stay possible
        required = self.machines.tokens[:, None].expand(-1, self.slots, -1)
        chosen = chosen.scatter(-1, required, scaled.gather(-1, required))
        drawn = self.drawn[..., None] + torch.log_softmax(chosen, -1)

        noise = torch.full(drawn.shape, 0.5)
        for i, row in enumerate(self.rows.tolist()):  # as many numbers as the picture would take by itself
            own = self.machines.sizes[row] * self.beam
            noise[i, :own] = torch.rand(own, self.vocabulary, generator=self.generators[row])
        noisy = drawn - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7))).to(self.device)
        # shift the noise such that the largest becomes the score of the parent (appendix B.3 of the paper)
        gap = noisy - noisy.amax(-1, keepdim=True)
        less = torch.where(gap > -math.log(2), torch.log(-torch.expm1(gap)), torch.log1p(-torch.exp(gap)))
        score = self.score[..., None]
        v = score - noisy + less
        total = score - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
        return total.masked_fill((allowed == _NEVER) | (noisy == _NEVER) | noisy.isnan(), _NEVER), drawn

    def _cut(self, raw: Tensor, t: int, pictures: Tensor | None = None) -> None:
        """End every hypothesis where it is, whether it wants to or not; of some ``pictures`` ``(n,)`` only.

        What holds the required words is preferred; there is always something to return.
        """
        ends = raw[..., END]
        total = self.score if self.options.sample else self.score + ends
        if self.machines is not None:
            accepting = self.machines.accepting[:, self.machine_state]
            possible = (accepting & (total > _NEVER)).any(1) | (self.pool_score[self.rows, 0] > _NEVER)
            total = total.masked_fill(possible[:, None] & ~accepting, _NEVER)
        if pictures is not None:
            total = total.masked_fill(~pictures[:, None], _NEVER)
        self._finish(total, ends, t, finished=raw.argmax(-1) == END)

    def _finish(self, total: Tensor, ends: Tensor, t: int, finished: Tensor | None = None) -> None:
        """Put hypotheses that end at step ``t`` into the pool of their picture.

        ``total`` ``(n, G)`` is the score with the end, -inf where it must not come, ``ends`` the
        log-probability of the end, and ``finished`` tells which end by themselves (all, if it is None).
        """
        rows = self.rows
        score = total
        if not self.options.sample:
            length = (t - self.lengths + 1).clamp(min=1).to(total)[:, None]
            score = total / length**self.options.length_penalty
        slots = torch.arange(score.shape[1], device=self.device).expand_as(score)
        best, choice = torch.cat((self.pool_score[rows], score), 1).topk(self.pool_size, -1)

        def merge(pool: Tensor, new: Tensor) -> None:
            pool[rows] = torch.cat((pool[rows], new.to(pool.dtype)), 1).gather(1, choice)

        merge(self.pool_log_prob, self.log_prob + ends)
        merge(self.pool_step, torch.full_like(slots, t - 1))
        merge(self.pool_slot, slots)
        merge(self.pool_finished, torch.ones_like(slots) if finished is None else finished)
        self.pool_score[rows] = best

    def _done(self, t: int) -> Tensor:
        """Return ``(n,)``: nothing that is still running can beat the pool.

        A running hypothesis is judged at its present length, as if it ended now at no cost. While nothing has
        been pruned the bound is the exact one, the best over all lengths that it may still reach.
        """
        alive = self.score.amax(1)
        worst = self.pool_score[self.rows].amin(1)
        if self.options.sample:  # no continuation has a better score
            return worst >= alive
        length = (t + 2 - self.lengths).clamp(min=1).to(alive)
        penalty = self.options.length_penalty
        bound = alive / length**penalty
        if penalty > 0:
            longest = (self.options.max_length + 1 - self.lengths).clamp(min=1).to(alive)
            bound = torch.where(self.pruned, bound, alive / longest**penalty)
        return (alive == _NEVER) | (worst >= bound)

    def _keep(self, running: Tensor) -> None:
        """Drop the pictures that are done, so that the rest runs faster."""
        kept = running.nonzero().squeeze(1)
        self.rows = self.rows[kept]
        self.forced, self.lengths = self.forced[kept], self.lengths[kept]
        self.tokens, self.score = self.tokens[kept], self.score[kept]
        self.log_prob, self.drawn = self.log_prob[kept], self.drawn[kept]
        self.history, self.pruned = self.history[kept], self.pruned[kept]
        if self.machines is not None:
            self.machines.keep(kept)
        slots = (kept[:, None] * self.slots + torch.arange(self.slots, device=self.device)).flatten()
        self.memory, self.state = self.memory.select(kept), self.state[slots]
