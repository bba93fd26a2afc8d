"""The recurrent decoder: RNN, GRU and LSTM cells; ``start()`` and ``step()``.

Soft attention with the gate on the context vector and the deep output layer of Show, Attend and Tell
(Xu et al. 2015, https://arxiv.org/abs/1502.03044). Shapes: N rows (pictures times captions or beams),
C = F * R cells, E' projected cell width, H hidden width, M embedding width, V vocabulary. Over the frames of
a clip, attention is joint (a softmax over all cells of all frames), factorised (over frames, as in Yao et al.
2015, https://arxiv.org/abs/1502.08029, times over the cells within each), or there is none over time: cells
are averaged. For one frame the three are the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.attention import (
    ATTENTIONS,
    AdditiveAttention,
    factorised_softmax,
    frame_log_masks,
    masked_mean,
    masked_softmax,
    mean_over_frames,
)
from captioner.shared import SharedMatrices
from captioner.words import WordGuesser

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
OVER_FRAMES = ("joint", "factorised", "mean")


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder's shape.

    Attributes:
        cell: one of `CELLS`.
        attention: a key of `ATTENTIONS`.
        hidden: H, width of the recurrent state.
        embedding: M, width of the word embeddings.
        cells: E', width to which grid features are projected.
        attention_width: A, width of keys and queries.
        gate: gate the context vector (section 4.2.1 of the paper).
        deep_output: words depend on state, context and previous word (equation 7), else on the state alone.
        tied: output weights are the embeddings (Press and Wolf 2017).
        layer_norm: normalise what goes into the gates, and the LSTM's memory (Ba, Kiros and Hinton 2016).
        dropout: probability, on embeddings, projected cells and the output layer.
        words: W, how many of the guessed words the decoder attends to beside the grid; 0: no word memory.
        concepts: K, how many words can be guessed.
        word_attention_width: width of keys and queries of the word memory.
        word_dropout: probability that a guess is left out in training, so that none is trusted blindly.
        copying: a word can be copied from the word memory, past the output layer (See et al. 2017).
        styles: how many ways of writing are told apart in training beside the one that the model speaks.
        frames: one of `OVER_FRAMES`: how several frames are attended to.
        frame_attention_width: width of keys and queries of the factorised attention over frames.
    """

    cell: str = "lstm"
    attention: str = "additive"
    hidden: int = 512
    embedding: int = 300
    cells: int = 512
    attention_width: int = 256
    gate: bool = True
    deep_output: bool = True
    tied: bool = True
    layer_norm: bool = False
    dropout: float = 0.5
    words: int = 0
    concepts: int = 0
    word_attention_width: int = 128
    word_dropout: float = 0.0
    copying: bool = False
    styles: int = 0
    frames: str = "joint"
    frame_attention_width: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            wanted: Any = {"str": str, "int": int, "bool": bool, "float": (int, float)}[str(field.type)]
            if not isinstance(value, wanted) or (isinstance(value, bool) and field.type != "bool"):
                raise ValueError(f"decoder.{field.name} must be {field.type}, not {value!r}")
            least = 0 if field.name in ("words", "concepts", "styles") else 1
            if field.type == "int" and value < least:
                raise ValueError(f"decoder.{field.name} must be at least {least}, not {value}")
        if self.cell not in CELLS:
            raise ValueError(f"decoder.cell must be one of {', '.join(CELLS)}, not {self.cell!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(
                f"decoder.attention must be one of {', '.join(ATTENTIONS)}, not {self.attention!r}"
            )
        if self.frames not in OVER_FRAMES:
            raise ValueError(f"decoder.frames must be one of {', '.join(OVER_FRAMES)}, not {self.frames!r}")
        if self.frames == "factorised" and self.attention == "none":
            raise ValueError("decoder.frames: factorised needs an attention within each frame")
        for name in ("dropout", "word_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"decoder.{name} must be in [0, 1), not {getattr(self, name)}")
        if self.copying and not self.words:
            raise ValueError("decoder.copying needs decoder.words: there is nothing to copy from")
        if self.words > self.concepts:
            raise ValueError(
                f"decoder.words is {self.words}, but only decoder.concepts = {self.concepts} can be guessed"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecoderConfig:
        """Rebuild from a dict; an unknown key is an error that names it."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown key decoder.{min(unknown)}")
        return cls(**data)


class Memory(NamedTuple):
    """What the decoder attends to: computed once for each picture, read at every step.

    cells ``(N, C, E')``, keys ``(N, C, A)`` or None without attention, mask ``(N, C)``. The word memory, or
    None: words ``(N, 1 + W, M)``, the first of which says that no guess is meant, their keys
    ``(N, 1 + W, A')``, their mask ``(N, 1 + W)``, the probability of each guess, and the ids ``(N, W)``.
    frame_keys ``(N, F, A'')`` with factorised attention, else None. Cells that were averaged over time are R.
    """

    cells: Tensor
    keys: Tensor | None
    mask: Tensor
    words: Tensor | None = None
    word_keys: Tensor | None = None
    word_mask: Tensor | None = None
    word_tokens: Tensor | None = None
    frame_keys: Tensor | None = None

    def select(self, rows: Tensor) -> Memory:
        """Return the memory of the given rows, in that order; a row may repeat."""
        return Memory(*(None if part is None else part.index_select(0, rows) for part in self))  # type: ignore[arg-type]

    def detach(self) -> Memory:
        """Return the memory without its history of gradients."""
        return Memory(*(None if part is None else part.detach() for part in self))  # type: ignore[arg-type]


class Output(NamedTuple):
    """What the output layer turns into words.

    hidden ``(N, M)``. With copying, else None: copied ``(N, W)``, the probability that each guess is copied,
    and tokens ``(N, W)``, the guesses' ids.
    """

    hidden: Tensor
    copied: Tensor | None = None
    tokens: Tensor | None = None

    def select(self, rows: Tensor) -> Output:
        """Return the given rows, in that order."""
        return Output(*(None if part is None else part.index_select(0, rows) for part in self))  # type: ignore[arg-type]


class StepOutput(NamedTuple):
    """One step: what the output layer needs, new state, attention, gate.

    output goes through `Decoder.logits`; state ``(N, S, H)``; attention ``(N, C)`` or None;
    gate ``(N,)`` or None; word_attention ``(N, 1 + W)`` or None, as `Memory` has the words.
    """

    output: Output
    state: Tensor
    attention: Tensor | None
    gate: Tensor | None
    word_attention: Tensor | None = None


class UnrolledStep(NamedTuple):
    """One step of a pass over known words: new state ``(n, S, H)`` and what was seen at it.

    context ``(n, E')``, after its gate, attention ``(n, C)``, gate ``(n,)``: None without attention. named
    ``(n, M)``: what was read in the word memory, word_attention ``(n, 1 + W)``: None without one.
    """

    state: Tensor
    context: Tensor | None
    attention: Tensor | None
    gate: Tensor | None
    named: Tensor | None = None
    word_attention: Tensor | None = None


class RecurrentCell(nn.Module):
    """RNN (tanh or relu), GRU and LSTM behind one interface: the state is one tensor ``(N, S, H)``.

    S is 2 for the LSTM (hidden and memory) and 1 for the others; row 0 is the hidden state.
    """

    def __init__(self, kind: str, inputs: int, hidden: int, layer_norm: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.states = 2 if kind == "lstm" else 1
        self.cell: nn.RNNCellBase | NormalisedCell
        if layer_norm:
            self.cell = NormalisedCell(kind, inputs, hidden)
        elif kind == "lstm":
            self.cell = nn.LSTMCell(inputs, hidden)
            with torch.no_grad():  # remember by default (Jozefowicz et al. 2015)
                self.cell.bias_hh[hidden : 2 * hidden].fill_(1.0)
        elif kind == "gru":
            self.cell = nn.GRUCell(inputs, hidden)
        else:
            self.cell = nn.RNNCell(inputs, hidden, nonlinearity=kind.removeprefix("rnn_"))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Return the next state ``(N, S, H)`` from the input ``(N, I)``."""
        if self.kind == "lstm":
            return torch.stack(self.cell(x, (state[:, 0], state[:, 1])), dim=1)
        return self.cell(x, state[:, 0])[:, None]

    def maps(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return weight and bias of what the gates get from the input, and of that from the hidden state."""
        cell = self.cell
        if isinstance(cell, NormalisedCell):
            return cell.input.weight, None, cell.recurrent.weight, None
        return cell.weight_ih, cell.bias_ih, cell.weight_hh, cell.bias_hh

    def advance(self, from_input: Tensor, from_hidden: Tensor, state: Tensor) -> Tensor:
        """Do `forward` with what the maps make of the input and of the hidden state."""
        cell = self.cell
        own: Any = (state[:, 0], state[:, 1]) if self.kind == "lstm" else state[:, 0]
        if isinstance(cell, NormalisedCell):
            new = cell.advance(from_input, from_hidden, own)
        else:
            new = advance(self.kind, from_input, from_hidden, own)
        return torch.stack(new, dim=1) if self.kind == "lstm" else new[:, None]


class NormalisedCell(nn.Module):
    """A recurrent cell with layer normalisation, called as torch's own cells are.

    What comes from the input and from the state is normalised on its own, and so is the LSTM's memory on its
    way out (Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450, equations 20 to 22). The GRU's reset
    gate multiplies the normalised product, as in torch's cell.
    """

    def __init__(self, kind: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.kind = kind
        gates = {"lstm": 4, "gru": 3}.get(kind, 1) * hidden
        self.input = nn.Linear(inputs, gates, bias=False)
        self.recurrent = nn.Linear(hidden, gates, bias=False)
        for half in range(0, gates, hidden):  # a gate at a time, each an orthogonal map
            nn.init.orthogonal_(self.recurrent.weight[half : half + hidden])
        self.input_norm = nn.LayerNorm(gates)
        self.recurrent_norm = nn.LayerNorm(gates)
        self.memory_norm = nn.LayerNorm(hidden) if kind == "lstm" else None
        if kind == "lstm":
            with torch.no_grad():  # remember by default, as below
                self.recurrent_norm.bias[hidden : 2 * hidden].fill_(1.0)

    def forward(self, x: Tensor, state: Any) -> Any:
        """Return ``(hidden, memory)`` for the LSTM and the hidden state ``(N, H)`` for the others."""
        hidden = state[0] if self.kind == "lstm" else state
        return self.advance(self.input(x), self.recurrent(hidden), state)

    def advance(self, from_input: Tensor, from_hidden: Tensor, state: Any) -> Any:
        """Do `forward` with the two products."""
        from_input, from_hidden = self.input_norm(from_input), self.recurrent_norm(from_hidden)
        return advance(self.kind, from_input, from_hidden, state, self.memory_norm)


def advance(
    kind: str, from_input: Tensor, from_hidden: Tensor, state: Any, memory_norm: nn.Module | None = None
) -> Any:
    """Return a cell's next state from what its gates get from the input and from the hidden state."""
    if kind == "lstm":
        write, forget, new, read = (from_input + from_hidden).chunk(4, dim=-1)
        memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(write) * torch.tanh(new)
        shown = memory if memory_norm is None else memory_norm(memory)
        return torch.sigmoid(read) * torch.tanh(shown), memory
    if kind == "gru":
        reset_x, update_x, new_x = from_input.chunk(3, dim=-1)
        reset_h, update_h, new_h = from_hidden.chunk(3, dim=-1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return (1 - update) * new + update * state
    total = from_input + from_hidden
    return torch.relu(total) if kind == "rnn_relu" else torch.tanh(total)


class Decoder(nn.Module):
    """Writes a caption one token at a time while it looks at the cells."""

    def __init__(
        self, config: DecoderConfig, feature_width: int, vocabulary: int, guess_width: int | None = None
    ) -> None:
        """Build it for features of width D' and a vocabulary of V tokens.

        ``guess_width`` is the width D of what words are guessed from, if it is another.
        """
        super().__init__()
        self.config = config
        attention = ATTENTIONS[config.attention]
        self.embedding = nn.Embedding(vocabulary, config.embedding)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.project = nn.Linear(feature_width, config.cells)
        self.attention = attention(config.cells, config.hidden, config.attention_width) if attention else None
        context = config.cells if attention else 0
        self.cell = RecurrentCell(config.cell, config.embedding + context, config.hidden, config.layer_norm)
        self.initial = nn.Linear(config.cells, self.cell.states * config.hidden)
        self.frame_attention: AdditiveAttention | None = None
        if config.frames == "factorised":
            self.frame_attention = AdditiveAttention(
                config.cells, config.hidden, config.frame_attention_width
            )
            nn.init.zeros_(self.frame_attention.energy.weight)  # all frames alike at first
        self.gate = nn.Linear(config.hidden, 1) if config.gate and attention else None
        self.output_state = nn.Linear(config.hidden, config.embedding)
        deep = config.deep_output and attention is not None
        self.output_context = nn.Linear(context, config.embedding, bias=False) if deep else None
        self.output = nn.Linear(config.embedding, vocabulary)
        nn.init.zeros_(self.output.bias)
        if config.tied:
            self.output.weight = self.embedding.weight
        self.dropout = nn.Dropout(config.dropout)
        self.style = nn.Parameter(torch.zeros(config.styles, config.embedding)) if config.styles else None
        self.guesser: WordGuesser | None = None
        if config.words:
            width = config.embedding
            self.guesser = WordGuesser(guess_width or feature_width, config.concepts)
            self.nothing = nn.Parameter(torch.zeros(width))
            self.sure = nn.Parameter(torch.zeros(width))
            self.word_attention = AdditiveAttention(width, config.hidden, config.word_attention_width)
            self.input_words = nn.Linear(width, width, bias=False)
            self.output_words = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.input_words.weight)
            if not self.output_words.weight.is_meta:  # there it would import torch's compiler, for seconds
                # what is read makes its own word likelier: a beginning of copying
                nn.init.eye_(self.output_words.weight)
        self.copy = nn.Linear(config.hidden + config.embedding, 1) if config.copying else None
        if self.copy is not None:
            nn.init.constant_(self.copy.bias, -2.0)  # seldom at first

    def memory(self, features: Tensor, mask: Tensor, guess_from: Tensor | None = None) -> Memory:
        """Project grid features, once for each picture or clip.

        Args:
            features: ``(N, C, D')`` of photos, or ``(N, F, R, D')`` of clips.
            mask: the same without D'.
            guess_from: ``(N, F, R, D)``, features that words are guessed from, if they are others.
        """
        if features.dim() == 3:
            features, mask = features[:, None], mask[:, None]
        guesses = None
        if self.guesser is not None:
            seen = features if guess_from is None else guess_from
            guesses = self._remember(self.guess(seen.flatten(1, 2), mask.flatten(1, 2)))
        if self.config.frames == "mean" and mask.shape[1] > 1:
            pooled, mask = mean_over_frames(features, mask)
            features, mask = pooled[:, None], mask[:, None]
        cells = self.dropout(torch.relu(self.project(features)))
        frame_keys = None
        if self.frame_attention is not None:
            seen = mask.flatten(0, 1)
            counts = seen.amax(-1, keepdim=True) > 0
            means = masked_mean(cells.flatten(0, 1), torch.where(counts, seen, 1.0))
            frame_keys = self.frame_attention.prepare(means.unflatten(0, mask.shape[:2]))
        cells, mask = cells.flatten(1, 2), mask.flatten(1, 2)
        keys = self.attention.prepare(cells) if self.attention else None
        memory = Memory(cells, keys, mask, frame_keys=frame_keys)
        if guesses is None:
            return memory
        words, word_keys, word_mask, word_tokens = guesses
        return memory._replace(words=words, word_keys=word_keys, word_mask=word_mask, word_tokens=word_tokens)

    def guess(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return the logits ``(N, K)`` of the words that features ``(N, C, D)`` bring to mind."""
        assert self.guesser is not None
        return self.guesser(features, mask)

    def _remember(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the likeliest words, their keys, their mask and their ids: see `Memory`.

        The guesses learn from what they should have been alone, and not from the captions' loss: they stay
        probabilities.
        """
        assert self.guesser is not None
        tokens, probabilities, _ = self.guesser.best(logits.detach(), self.config.words)
        if self.training and self.config.word_dropout:
            kept = torch.rand(probabilities.shape, device=probabilities.device) >= self.config.word_dropout
            probabilities = probabilities * kept
        guessed = self.embedding(tokens) + probabilities[..., None] * self.sure
        nothing = self.nothing.expand(len(guessed), 1, -1)
        words = self.dropout(torch.cat((nothing, guessed), 1))
        mask = torch.cat((torch.ones_like(probabilities[:, :1]), probabilities), 1)
        return words, self.word_attention.prepare(words), mask, tokens

    def start(self, memory: Memory) -> Tensor:
        """Return the initial state ``(N, S, H)`` from the mean of the cells that may be seen."""
        mean = masked_mean(memory.cells, memory.mask)
        return torch.tanh(self.initial(mean)).view(-1, self.cell.states, self.config.hidden)

    def step(self, tokens: Tensor, state: Tensor, memory: Memory) -> StepOutput:
        """Read the previous tokens ``(N,)`` and look at the cells; `logits` turns the output into words.

        The memory may be of fewer pictures, N / G, each shared by G rows next to each other.
        """
        return self.step_embedded(self.dropout(self.embedding(tokens)), state, memory)

    def step_embedded(self, embedded: Tensor, state: Tensor, memory: Memory) -> StepOutput:
        """Do `step` with embeddings ``(N, M)`` in the place of tokens."""
        weights = gate = context = named = word_weights = None
        read = embedded
        if memory.words is not None:
            word_weights = self.word_attention(state[:, 0], memory.word_keys, memory.word_mask)
            named = torch.bmm(word_weights, memory.words).flatten(0, 1)
            read = embedded + self.input_words(named)
        if self.attention is not None:
            assert memory.keys is not None
            energies = self.attention.energies(state[:, 0], memory.keys)
            if self.frame_attention is None:
                weights = masked_softmax(energies, memory.mask)
            else:
                assert memory.frame_keys is not None
                frames = memory.frame_keys.shape[1]
                masks = frame_log_masks(memory.mask.unflatten(1, (frames, -1))[:, None])
                over = self.frame_attention.energies(state[:, 0], memory.frame_keys)
                weights = factorised_softmax(energies, over, *masks)
            context = torch.bmm(weights, memory.cells).flatten(0, 1)
            if self.gate is not None:
                gate = torch.sigmoid(self.gate(state[:, 0]))
                context = gate * context
            state = self.cell(torch.cat((read, context), dim=-1), state)
        else:
            state = self.cell(read, state)
        return StepOutput(
            self.output_of(
                embedded,
                state[:, 0],
                context,
                named,
                None if word_weights is None else word_weights.flatten(0, 1),
                memory.word_tokens,
            ),
            state,
            None if weights is None else weights.flatten(0, 1),
            None if gate is None else gate.squeeze(-1),
            None if word_weights is None else word_weights.flatten(0, 1),
        )

    def output_of(
        self,
        embedded: Tensor,
        hidden: Tensor,
        context: Tensor | None,
        named: Tensor | None = None,
        word_attention: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Output:
        """Return what the output layer needs of a step.

        Args:
            embedded: ``(n, M)`` the word that it read.
            hidden: ``(n, H)`` its new state.
            context: ``(n, E')`` what it saw.
            named: ``(n, M)`` what it read in the word memory.
            word_attention: ``(n, 1 + W)`` how much of each guess it read.
            tokens: ``(n, W)`` ids of the guesses; if of fewer pictures, each is shared by rows side by side.
        """
        hidden = self.dropout(hidden)
        output = self.output_state(hidden)
        if self.output_context is not None and context is not None:
            output = output + embedded + self.output_context(context)  # equation 7
        if named is None:
            return Output(output)
        output = output + self.output_words(named)
        if self.copy is None:
            return Output(output)
        assert word_attention is not None
        assert tokens is not None
        copied = torch.sigmoid(self.copy(torch.cat((hidden, named), -1))) * word_attention[:, 1:]
        return Output(output, copied, tokens.repeat_interleave(len(copied) // len(tokens), 0))

    def unrolled_step(self, from_words: Tensor, state: Tensor, unrolled: Unrolled) -> UnrolledStep:
        """Do `step_embedded` for the first n rows of a pass, but for the output, which can wait."""
        weights = gate = context = named = word_weights = None
        hidden = state[:, 0]
        if unrolled.words is not None:
            energies = unrolled.word_energies(self.word_attention.query(hidden))
            word_weights = torch.softmax(energies + unrolled.word_log_mask[: len(state)], dim=-1)
            named = unrolled.words.multiply(word_weights)
            from_words = torch.addmm(from_words, named, unrolled.named_map)
        if self.attention is not None:
            energies, n = unrolled.energies(self.attention.query(hidden)), len(state)
            if self.frame_attention is None:
                weights = torch.softmax(energies + unrolled.log_mask[:n], dim=-1)
            else:
                over = unrolled.frame_energies(self.frame_attention.query(hidden))
                masks = (unrolled.log_mask[:n], unrolled.frame_log_mask[:n])
                weights = factorised_softmax(energies, over, *masks)
            context = unrolled.cells.multiply(weights)
            if self.gate is not None:
                gate = torch.sigmoid(self.gate(hidden))
                context = gate * context
            from_words = torch.addmm(from_words, context, unrolled.context_map)
        from_hidden = F.linear(hidden, unrolled.hidden_map, unrolled.hidden_bias)
        state = self.cell.advance(from_words, from_hidden, state)
        return UnrolledStep(
            state, context, weights, None if gate is None else gate.squeeze(-1), named, word_weights
        )

    def log_probabilities(self, output: Output) -> Tensor:
        """Map step outputs to log-probabilities ``(n, V)``, in nats."""
        logits = self.logits(output).float()
        return logits if output.copied is not None else torch.log_softmax(logits, -1)

    def logits(self, output: Output) -> Tensor:
        """Map step outputs to logits ``(n, V)``.

        With copying they are log-probabilities: with the probability in ``copied`` a guess is said as it is,
        else a word of the output layer's (the mixture of See et al. 2017, https://arxiv.org/abs/1704.04368,
        equation 9).
        """
        logits = self.output(self.dropout(torch.tanh(output.hidden)))
        if output.copied is None or output.tokens is None:
            return logits
        logits, copied = logits.float(), output.copied.float()  # 16 bits would round 1 - copied to 0
        generated = torch.log_softmax(logits, -1) + torch.log1p(
            -copied.sum(-1, keepdim=True).clamp(max=_MOST)
        )
        both = torch.logaddexp(generated.gather(-1, output.tokens), copied.clamp(min=_LEAST).log())
        return generated.scatter(-1, output.tokens, both)


_LEAST, _MOST = 1e-8, 1 - 1e-6
"""Between these a probability has a logarithm with a gradient."""


class Unrolled:
    """What the steps of one teacher-forced pass share."""

    def __init__(self, decoder: Decoder, memory: Memory) -> None:
        width = decoder.config.embedding
        input_map, self.input_bias, self.hidden_map, self.hidden_bias = decoder.cell.maps()
        self.word_map = input_map[:, :width]
        if decoder.attention is not None:
            assert memory.keys is not None
            self.context_map = input_map[:, width:].T
            self.cells = SharedMatrices(memory.cells)
            self.energies = decoder.attention.share(memory.keys)
            self.log_mask = memory.mask.log()
        if decoder.frame_attention is not None:
            assert memory.frame_keys is not None
            self.frame_energies = decoder.frame_attention.share(memory.frame_keys)
            frames = memory.frame_keys.shape[1]
            self.log_mask, self.frame_log_mask = frame_log_masks(memory.mask.unflatten(1, (frames, -1)))
        self.words = None
        if memory.words is not None:
            assert memory.word_keys is not None
            assert memory.word_mask is not None
            self.words = SharedMatrices(memory.words)
            self.word_energies = decoder.word_attention.share(memory.word_keys)
            self.word_log_mask = memory.word_mask.log()
            self.named_map = (self.word_map @ decoder.input_words.weight).T  # both maps in one

    def from_words(self, embedded: Tensor) -> Tensor:
        """Return what embeddings ``(…, M)`` contribute to the gates; those of all steps fit one product."""
        return F.linear(embedded, self.word_map, self.input_bias)
