"""CaptionModel: encoders, decoder and tokenizer put together; the teacher-forced ``forward()``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from captioner.decoder import Decoder, DecoderConfig, Memory, Unrolled, UnrolledStep
from captioner.encoder import Encoder, GridFeatures, encode
from captioner.frame_encoder import FrameConfig, FrameEncoder
from captioner.images import Fit
from captioner.tokenizer import Tokenizer
from captioner.words import Guesses


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
    """A CNN encoder, perhaps a frame encoder, and a recurrent decoder that share grid features alone."""

    def __init__(
        self,
        encoder: Encoder,
        config: DecoderConfig,
        tokenizer: Tokenizer,
        frames: FrameConfig | None = None,
    ) -> None:
        """Put the parts together; ``frames`` is the shape of the frame encoder, None for none."""
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        active = frames is not None and frames.active
        self.frame_encoder = FrameEncoder(frames, encoder.width) if frames is not None and active else None
        width = encoder.width if self.frame_encoder is None else self.frame_encoder.width
        self.decoder = Decoder(config, width, len(tokenizer), encoder.width)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.decoder.embedding.weight.device

    def encode(self, pixels: Tensor, fits: Sequence[Fit]) -> GridFeatures:
        """Turn uint8 pictures ``(B, 3, S, S)`` into grid features ``(B, 1, R, D)``."""
        return encode(self.encoder, pixels, fits)

    @property
    def live(self) -> bool:
        """Whether frames are read in the light of the past alone, so that a stream can be captioned."""
        return self.frame_encoder is None or self.frame_encoder.config.live

    def memory(self, features: GridFeatures) -> Memory:
        """Read the features over time and project them for the decoder, once for each picture or clip."""
        return self.look(features.data, features.mask)

    def look(self, data: Tensor, mask: Tensor) -> Memory:
        """Do `memory` with features ``(N, F, R, D)`` and mask ``(N, F, R)``; padding has a mask of 0."""
        if self.frame_encoder is None:
            return self.decoder.memory(data, mask)
        return self.decoder.memory(self.frame_encoder(data, mask), mask, guess_from=data)

    def guesses(self, features: GridFeatures) -> Guesses | None:
        """Return the words that the decoder attends to, W of each picture; None without a word memory."""
        guesser, count = self.decoder.guesser, self.decoder.config.words
        if guesser is None:
            return None
        return guesser.best(guesser(features.data.flatten(1, 2), features.mask.flatten(1, 2)), count)

    def forward(
        self,
        memory: Memory,
        tokens: Tensor,
        lengths: Tensor,
        own: float = 0.0,
        styles: Tensor | None = None,
    ) -> TeacherForced:
        """Run the decoder on the true captions.

        Args:
            memory: for each caption (N rows).
            tokens: ``(N, T + 1)``: start, the caption, end, padding.
            lengths: ``(N,)`` number of predictions of each caption, its end included; descending, so
                that the captions still running are always the first rows and little padding is computed. On
                a GPU they are best left on the CPU, which would have to wait for them.
            own: probability that a word is read from the model's own distribution and not from the caption:
                scheduled sampling (Bengio et al. 2015, https://arxiv.org/abs/1506.03099).
            styles: ``(N,)`` who wrote each caption: 0 for those whose way of writing the model is to
                speak; the others begin with a start token of their own.

        Raises:
            ValueError: if the lengths do not descend.
        """
        counts = lengths.tolist()
        if counts != sorted(counts, reverse=True):
            raise ValueError("captions must be sorted by length, longest first")
        decoder, device, steps = self.decoder, tokens.device, counts[0]
        # padding is left out: what follows holds the running captions of step 0, then those of step 1, …
        valid = torch.arange(steps)[:, None] < torch.tensor(counts)
        running = valid.sum(1).tolist()
        here = valid.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        words = decoder.embedding(tokens[:, :steps].T.flatten().index_select(0, here))
        if styles is not None and decoder.style is not None:
            first = words[: len(styles)] + F.pad(decoder.style, (0, 0, 1, 0))[styles]
            words = torch.cat((first, words[len(styles) :]))
        words = decoder.dropout(words)
        unrolled = Unrolled(decoder, memory)
        from_words = list(unrolled.from_words(words).split(running))
        read = list(words.split(running))
        state = decoder.start(memory).to(decoder.initial.weight.dtype)
        taken: list[UnrolledStep] = []
        for t, count in enumerate(running):
            if own and t > 0:
                read[t] = self._mix(read[t], read[t - 1][:count], taken[-1], own, memory)
                from_words[t] = unrolled.from_words(read[t])
            step = decoder.unrolled_step(from_words[t], state[:count], unrolled)
            state = step.state
            taken.append(step)
        hidden = torch.cat([step.state[:, 0] for step in taken])
        seen = [step.context for step in taken if step.context is not None]
        words = torch.cat(read) if own else words
        named = [step.named for step in taken if step.named is not None]
        looked = [step.word_attention for step in taken if step.word_attention is not None]
        outputs = decoder.output_of(
            words,
            hidden,
            torch.cat(seen) if seen else None,
            torch.cat(named) if named else None,
            torch.cat(looked) if looked else None,
            None
            if memory.word_tokens is None
            else torch.cat([memory.word_tokens[:count] for count in running]),
        )
        rows = (valid.flatten().cumsum(0).view_as(valid) - 1).T[valid.T].to(device, non_blocking=True)
        return TeacherForced(
            logits=decoder.logits(outputs.select(rows)),
            positions=valid.T.flatten().nonzero().squeeze(1).to(device, non_blocking=True),
            attention=_padded([step.attention for step in taken]),
            gates=_padded([step.gate for step in taken]),
        )

    def _mix(self, words: Tensor, before: Tensor, step: UnrolledStep, own: float, memory: Memory) -> Tensor:
        """Replace a share of the true words' embeddings by those of words that the model would have said.

        Args:
            words: embeddings ``(n, M)`` of the true words.
            before: of the words before them.
            step: at which those were read.
            own: the share.
            memory: of all captions.
        """
        count, decoder = len(words), self.decoder
        with torch.no_grad():
            context = None if step.context is None else step.context[:count]
            named = None if step.named is None else step.named[:count]
            looked = None if step.word_attention is None else step.word_attention[:count]
            tokens = None if memory.word_tokens is None else memory.word_tokens[:count]
            logits = decoder.logits(
                decoder.output_of(before, step.state[:count, 0], context, named, looked, tokens)
            )
            said = torch.multinomial(logits.float().softmax(-1), 1).squeeze(1)
            chosen = torch.rand(count, 1, device=words.device) < own
        return torch.where(chosen, decoder.dropout(decoder.embedding(said)), words)


def _padded(steps: Sequence[Tensor | None]) -> Tensor | None:
    """Return ``(N, T, …)`` of the running captions' ``(n, …)`` at each step; zeros for those that ended."""
    found = [step for step in steps if step is not None]
    return pad_sequence(found) if found else None
