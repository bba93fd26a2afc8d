"""CaptionModel: encoder, decoder and tokenizer put together; the teacher-forced ``forward()``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captioner.decoder import Decoder, DecoderConfig, Memory
from captioner.encoder import Encoder, GridFeatures, encode
from captioner.images import Fit
from captioner.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """What a teacher-forced pass gives, over N captions of at most T tokens.

    Attributes:
        logits: ``(P, V)``, only for the P positions that are not padding, row by row.
        positions: ``(P,)`` where these are among the ``N * T``.
        attention: ``(N, T, C)`` weights, or None; rows of padding are zero.
        gates: ``(N, T)`` or None; zero where padded.
    """

    logits: Tensor
    positions: Tensor
    attention: Tensor | None
    gates: Tensor | None


class CaptionModel(nn.Module):
    """A CNN encoder and a recurrent decoder that share nothing but grid features."""

    def __init__(self, encoder: Encoder, config: DecoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.decoder = Decoder(config, encoder.width, len(tokenizer))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.decoder.embedding.weight.device

    def encode(self, pixels: Tensor, fits: Sequence[Fit]) -> GridFeatures:
        """Turn uint8 pictures ``(B, 3, S, S)`` into grid features ``(B, 1, R, D)``."""
        return encode(self.encoder, pixels, fits)

    def memory(self, features: GridFeatures) -> Memory:
        """Project the features for the decoder; frames and cells become one axis ``C = F * R``."""
        return self.decoder.memory(features.data.flatten(1, 2), features.mask.flatten(1, 2))

    def forward(self, memory: Memory, tokens: Tensor, lengths: Tensor, own: float = 0.0) -> TeacherForced:
        """Run the decoder on the true captions.

        Args:
            memory: for each caption (N rows).
            tokens: ``(N, T + 1)``: start, the caption, end, padding.
            lengths: ``(N,)`` number of predictions of each caption, its end included; descending, so
                that the captions still running are always the first rows and little padding is computed. On
                a GPU they are best left on the CPU, which would have to wait for them.
            own: probability that a word is read from the model's own distribution and not from the caption:
                scheduled sampling (Bengio et al. 2015, https://arxiv.org/abs/1506.03099).

        Raises:
            ValueError: if the lengths do not descend.
        """
        counts = lengths.tolist()
        if counts != sorted(counts, reverse=True):
            raise ValueError("captions must be sorted by length, longest first")
        rows, steps = len(counts), counts[0]
        embedded = self.decoder.dropout(self.decoder.embedding(tokens[:, :steps]))
        state = self.decoder.start(memory)
        outputs: list[Tensor] = []
        attention: list[Tensor] = []
        gates: list[Tensor] = []
        kept = running = rows
        for t in range(steps):
            while counts[running - 1] <= t:
                running -= 1
            if running <= _CUT * kept:  # drop the captions that have ended, but not at every step: cuts cost
                kept = running
                state = state[:kept]
                keys = None if memory.keys is None else memory.keys[:kept]
                memory = Memory(memory.cells[:kept], keys, memory.mask[:kept])
            words = embedded[:kept, t]
            if own and t > 0:
                words = self._mix(words, outputs[-1][:kept], own)
            step = self.decoder.step_embedded(words, state, memory)
            state = step.state
            outputs.append(_pad_rows(step.output, rows))
            if step.attention is not None:
                attention.append(_pad_rows(step.attention, rows))
            if step.gate is not None:
                gates.append(_pad_rows(step.gate, rows))
        valid = torch.arange(steps) < torch.tensor(counts)[:, None]
        positions = valid.flatten().nonzero().squeeze(1).to(tokens.device, non_blocking=True)
        valid = valid.to(tokens.device, non_blocking=True)
        return TeacherForced(
            logits=self.decoder.logits(torch.stack(outputs, 1).flatten(0, 1).index_select(0, positions)),
            positions=positions,
            attention=torch.stack(attention, 1) * valid[..., None] if attention else None,
            gates=torch.stack(gates, 1) * valid if gates else None,
        )

    def _mix(self, words: Tensor, output: Tensor, own: float) -> Tensor:
        """Replace a share of the true words' embeddings by those of words that the model would have said."""
        with torch.no_grad():
            said = torch.multinomial(self.decoder.logits(output).float().softmax(-1), 1).squeeze(1)
            chosen = torch.rand(len(words), 1, device=words.device) < own
        return torch.where(chosen, self.decoder.dropout(self.decoder.embedding(said)), words)


_CUT = 0.75


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x
    return torch.cat((x, x.new_zeros(rows - x.shape[0], *x.shape[1:])))
