"""Captioner: the one class that users hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioner import checkpoint, identity
from captioner.calibration import Calibration, caption_features, plain_confidence, word_ranks
from captioner.caption import Alternative, Caption, Segment, VideoCaption, Word, join_words
from captioner.checkpoint import Header
from captioner.encoder import GridFeatures, encode, join_frames, region_shares
from captioner.images import Fit, load
from captioner.model import CaptionModel
from captioner.naming import write
from captioner.neutral import Avoided, avoided
from captioner.search import Hypothesis, Machine, Phrase, SearchOptions
from captioner.tokenizer import END, PAD, SPECIAL, START, UNKNOWN, split_words

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Image = Any
"""A path, encoded bytes, a file object, a PIL image, or an array (see `captioner.images.open_image`)."""


class Captioner:
    """Looks at photos and clips and says what it sees. Safe to call from several threads.

    >>> from captioner import Captioner
    >>> captioner = Captioner.load()
    >>> caption = captioner.caption("photo.jpg")  # doctest: +SKIP
    >>> print(caption.text, caption.confidence)  # doctest: +SKIP
    >>> caption.overlay("photo.jpg").save("where.png")  # doctest: +SKIP
    >>> print(captioner.caption_video("clip.mp4"))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: CaptionModel,
        header: Header,
        calibration: Calibration | None = None,
        precision: str = "float32",
    ) -> None:
        """Wrap a model for captioning; `load` is the usual way. The encoder is folded in place.

        Args:
            model: on the device where it is to run.
            header: of its checkpoint.
            calibration: for confidences; probabilities stand in without one.
            precision: ``float32``, ``bfloat16`` or ``float16``, of the encoder's arithmetic.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.model = model.eval().requires_grad_(False)
        self.model.encoder.optimise().to(PRECISIONS[precision])
        self.header = header
        self.calibration = calibration
        self.fingerprint: str | None = None
        """`captioner.identity.fingerprint` of the checkpoint that it was loaded from."""
        tokenizer = model.tokenizer
        self._continues = (
            None
            if tokenizer.kind == "word"
            else np.array([tokenizer.piece(i).startswith("##") for i in range(len(tokenizer))])
        )
        self.defaults = SearchOptions(**header.search)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        precision: str = "float32",
    ) -> Captioner:
        """Load the built-in model, or a checkpoint.

        Args:
            path: a ``.safetensors`` file of captioner; None for the built-in model.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``. ``auto`` takes CUDA where there is
                one, then Apple's MPS if it gives the CPU's words on a test picture, else the CPU.
            precision: of the encoder's arithmetic; 16 bits are faster on most GPUs and slower on CPUs
                without instructions for them.

        Raises:
            CheckpointError: if the file cannot be used.
            ValueError: for a device that is not there, or an unknown precision.
        """
        path = Path(path) if path is not None else identity.BUILT_IN
        chosen = choose_device(device)
        if device != "auto" or chosen.type != "mps":
            captioner = cls(*checkpoint.load(path, chosen), precision=precision)
        else:
            captioner = reference = cls(*checkpoint.load(path, "cpu"), precision=precision)
            with suppress(RuntimeError):  # an operation that the device lacks
                there = cls(*checkpoint.load(path, chosen), precision=precision)
                captioner = there if there._agrees_with(reference) else reference
        with suppress(OSError):  # it has just been read
            captioner.fingerprint = identity.fingerprint(path)
        return captioner

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    @property
    def vocabulary(self) -> list[str]:
        """The words (or pieces of words) that the model knows, without the special tokens."""
        tokenizer = self.model.tokenizer
        return [tokenizer.piece(i) for i in range(len(SPECIAL), len(tokenizer))]

    # ----------------------------------------------------------------------------------------------

    def encode(self, image: Image) -> GridFeatures:
        """Look at one picture: grid features ``(1, 1, R, D)`` that `caption` accepts in its place.

        Raises:
            ImageError: if the picture cannot be read.
        """
        return self.encode_batch([image])

    def encode_batch(self, images: Iterable[Image]) -> GridFeatures:
        """Look at several pictures: ``(B, 1, R, D)``.

        Raises:
            ImageError: if one of the pictures cannot be read.
            ValueError: if there are none, or only one and not in a list.
        """
        one = isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(images, "read")
        if one or not isinstance(images, Iterable) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise ValueError("give a list of pictures, [picture] if it is only one")
        return self.encode_pixels([load(image, self.model.encoder.preprocess) for image in images])

    def encode_frames(self, images: Iterable[Image], times: Sequence[float] | None = None) -> GridFeatures:
        """Look at the frames of one clip: ``(1, F, R, D)``, which `caption` takes for one picture.

        Args:
            images: pictures of one size.
            times: in seconds, one for each; None for 0, 1, 2, …

        Raises:
            ImageError: if one of the pictures cannot be read.
            ValueError: if there are none, or not as many times.
        """
        found = self.encode_batch(images)
        moments = list(range(len(found))) if times is None else times
        return join_frames([found[i] for i in range(len(found))], moments)

    @torch.inference_mode()
    def encode_pixels(self, loaded: Sequence[tuple[np.ndarray, Fit]]) -> GridFeatures:
        """Encode pictures that `captioner.images.load` has already prepared (by other threads, say)."""
        if not loaded:
            raise ValueError("there are no pictures to look at")
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in loaded]))
        return encode(self.model.encoder, pixels, [fit for _, fit in loaded])

    def caption(
        self,
        image: Image | GridFeatures,
        *,
        prefix: str = "",
        region: Any = None,
        must: Sequence[str | Sequence[str]] = (),
        avoid: Sequence[str] = (),
        neutral: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> Caption:
        """Caption one picture.

        Args:
            image: a picture, or what `encode` made of it.
            prefix: words that the caption begins with; a word that the model does not know is kept as typed.
            region: a box ``(left, top, right, bottom)`` in pixels of the photo as seen (after EXIF
                rotation), or a mask ``(height, width)`` of booleans or 0 to 1: what the model may see.
            must: words or phrases that have to appear; in the place of one, a sequence of alternatives.
            avoid: words or phrases that must not appear, except in the prefix.
            neutral: say "person" instead of "man" or "woman", "their" instead of "his" or "her", and so on;
                see `captioner.neutral`. Such a word's probability is that of all the words it stands for.
            seed: of the random numbers when ``sample=True``.
            options: fields of `captioner.search.SearchOptions`: ``beam``, ``n_best``, ``sample``, …; the
                rest is the model's default.

        Raises:
            ImageError: if the picture cannot be read.
            ValueError: for an impossible option, an empty region, or a required word that is not in the
                vocabulary or has to be avoided.
        """
        features = image if isinstance(image, GridFeatures) else self.encode(image)
        if len(features) != 1:
            raise ValueError(
                f"caption() takes one picture, and these are {len(features)}: use caption_batch()"
            )
        return self.caption_batch(
            features,
            prefix=prefix,
            regions=[region],
            must=must,
            avoid=avoid,
            neutral=neutral,
            seeds=[seed],
            **options,
        )[0]

    @torch.inference_mode()
    def caption_batch(
        self,
        images: Sequence[Image] | GridFeatures,
        *,
        prefix: str | Sequence[str] = "",
        regions: Sequence[Any] | None = None,
        must: Sequence[str | Sequence[str]] = (),
        avoid: Sequence[str] = (),
        neutral: bool = False,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Caption]:
        """Caption several pictures at once; the words do not depend on what else is in the batch.

        Args:
            images: pictures, or features of several.
            prefix: one for all, or one for each picture.
            regions: for each picture a region or None, see `caption`.
            must, avoid, neutral: the same for all, see `caption`.
            seeds: for each picture; the default is 0, 1, 2, …
            options: see `caption`.

        Raises:
            ImageError, ValueError: as `caption`.
        """
        chosen = self.options(**options)
        never = avoided(self.model.tokenizer, avoid, neutral)
        requirements = self._requirements(must, never)
        features = images if isinstance(images, GridFeatures) else self.encode_batch(images)
        if features.data.shape[-1] != self.model.encoder.width:
            raise ValueError(
                f"these features have width {features.data.shape[-1]}, and this model's encoder gives "
                f"{self.model.encoder.width}: they come from another model"
            )
        count = len(features)
        prefixes = [prefix] * count if isinstance(prefix, str) else list(prefix)
        for name, given in (("prefix", prefixes), ("regions", regions), ("seeds", seeds)):
            if given is not None and len(given) != count:
                raise ValueError(f"{name}: expected one for each of {count} pictures, found {len(given)}")
        features = features.to(self.device)
        if regions is not None and any(region is not None for region in regions):
            features = self._limit(features, regions)
        given_tokens = [self.model.tokenizer.encode(p) for p in prefixes]
        found = write(
            self.model,
            features,
            chosen,
            prefixes=given_tokens,
            requirements=requirements,
            seeds=[int(seed) for seed in seeds] if seeds is not None else range(count),
            continues=self._continues,
            avoided=never,
        )
        familiar = self._familiarity(features)
        guesses = self._guesses(features)
        captions = []
        for i, hypotheses in enumerate(found):
            ranked = [
                self._caption(h, features, i, prefixes[i], familiar[i] if familiar else None, guesses[i])
                for h in hypotheses
            ]
            captions.append(replace(ranked[0], n_best=tuple(ranked)) if chosen.n_best > 1 else ranked[0])
        return captions

    def caption_video(
        self,
        path: str | os.PathLike[str],
        *,
        every: float = 0.5,
        segment: float | None = 5.0,
        shots: bool = False,
        start: float = 0.0,
        end: float | None = None,
        progress: Callable[[float], None] | None = None,
        **options: Any,
    ) -> VideoCaption:
        """Caption a clip, segment by segment; neighbours that say the same are one.

        Of a clip that breaks off, what was captioned is returned with the reason in ``error``.

        Args:
            path: of a video, an animation or a picture; OpenCV reads videos (``captioner[video]``).
            every: seconds between the frames that are looked at.
            segment: seconds of a segment; a rest of less than a quarter belongs to the last. None for the
                whole clip, or whole shots.
            shots: cut where the picture changes at once (``captioner[shots]``), and longer shots as well.
            start, end: the part of the clip that is captioned, in seconds.
            progress: called with the seconds of the clip that have been read.
            options: see `caption`; a region is in pixels of the frames, and holds for all of them.

        Raises:
            ValueError: a number or an option is impossible.
            VideoError: nothing of the clip can be read, or a package is missing.
        """
        from captioner.video import VideoError

        segments: list[Segment] = []
        error = None
        try:
            segments.extend(
                self.caption_segments(
                    path,
                    every=every,
                    segment=segment,
                    shots=shots,
                    start=start,
                    end=end,
                    progress=progress,
                    **options,
                )
            )
        except VideoError as problem:
            if not segments:
                raise
            error = str(problem)
        return VideoCaption(tuple(segments), segments[-1].end if segments else 0.0, error)

    def caption_segments(self, path: str | os.PathLike[str], **options: Any) -> Iterator[Segment]:
        """Do `caption_video` and give out segments as they come; a clip that breaks off raises at its end.

        Raises:
            ValueError, VideoError: as `caption_video`.
        """
        from captioner.clips import caption_segments

        return caption_segments(self, path, **options)

    def caption_live(
        self,
        source: int | str,
        *,
        every: float = 0.5,
        window: float = 4.0,
        stall_seconds: float = 10.0,
        **options: Any,
    ) -> Generator[Segment, None, None]:
        """Caption a camera or a stream while it runs, over a window of past frames, until it ends.

        Frames that arrive while one is captioned are dropped: the captions never lag behind.

        Args:
            source: a camera's number, a device, an address of a stream; see `captioner.video.live`.
            every: least seconds between two captions.
            window: seconds of the past that each caption is about.
            stall_seconds: how long the source may be silent.
            options: see `caption`.

        Raises:
            ValueError: a number or an option is impossible, or the model reads frames from the end.
            VideoError: the source cannot be opened, has no frames, or stalls.
        """
        from captioner.clips import caption_live

        return caption_live(self, source, every=every, window=window, stall_seconds=stall_seconds, **options)

    def options(self, **options: Any) -> SearchOptions:
        """Return the model's search options with some of them replaced.

        Raises:
            ValueError: for an unknown or impossible option.
        """
        known = {field.name for field in fields(SearchOptions)}
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r}; there are {', '.join(sorted(known))}")
        chosen = replace(self.defaults, **options)
        if "beam" not in options and isinstance(chosen.n_best, int) and chosen.n_best > chosen.beam:
            chosen = replace(chosen, beam=chosen.n_best)
        return chosen.check()

    def check(
        self,
        *,
        must: Sequence[str | Sequence[str]] = (),
        avoid: Sequence[str] = (),
        neutral: bool = False,
        **options: Any,
    ) -> None:
        """See, without a picture, whether `caption` would refuse these words and options.

        Raises:
            ValueError: for an unknown or impossible option, or a required word that is not in the vocabulary
                or has to be avoided.
        """
        self.options(**options)
        requirements = self._requirements(must, avoided(self.model.tokenizer, avoid, neutral))
        if requirements:
            Machine(requirements, self._continues)

    # ----------------------------------------------------------------------------------------------

    def _limit(self, features: GridFeatures, regions: Sequence[Any]) -> GridFeatures:
        shares = [
            [1.0] * features.mask.shape[-1] if region is None else region_shares(region, features.grid, fit)
            for region, fit in zip(regions, features.fits, strict=True)
        ]
        return features.within(torch.tensor(shares))

    def _requirements(self, must: Sequence[str | Sequence[str]], never: Avoided | None) -> list[list[Phrase]]:
        if isinstance(must, str):
            raise ValueError(f"must is a list of words: write must=[{must!r}]")
        requirements = []
        for entry in must:
            phrases = []
            for phrase in [entry] if isinstance(entry, str) else entry:
                tokens = self.model.tokenizer.encode(phrase)
                if not tokens or UNKNOWN in tokens:
                    raise ValueError(f"the required word {phrase!r} is not in the model's vocabulary")
                if never is None or never.allows(tokens):
                    phrases.append(tuple(tokens))
            if not phrases and entry:
                raise ValueError(f"the required word {phrase!r} is among those to be avoided")
            requirements.append(phrases)
        return requirements

    def _familiarity(self, features: GridFeatures) -> list[tuple[float, float, float]] | None:
        if self.calibration is None:
            return None
        pooled = pool(features)
        return [self.calibration.familiarity(p) for p in pooled]

    def _guesses(self, features: GridFeatures) -> list[tuple[Alternative, ...]]:
        found = self.model.guesses(features)
        if found is None:
            return [()] * len(features)
        return [
            tuple(
                Alternative(self.model.tokenizer.piece(token), probability)
                for token, probability in zip(tokens, probabilities, strict=True)
            )
            for tokens, probabilities in zip(found.tokens.tolist(), found.probabilities.tolist(), strict=True)
        ]

    def _caption(
        self,
        hypothesis: Hypothesis,
        features: GridFeatures,
        item: int,
        prefix: str,
        familiar: tuple[float, float, float] | None,
        guesses: tuple[Alternative, ...],
    ) -> Caption:
        """Turn tokens into words: probabilities multiply, attention and gate are averaged."""
        attention = self._over_frames(hypothesis, features.mask[item])
        probabilities = np.exp(hypothesis.token_log_probabilities.astype(np.float64))
        words = []
        for text, positions in self._words(hypothesis, prefix):
            given = positions[-1] < hypothesis.given
            probability = float(probabilities[positions].prod())
            first = positions[0]
            words.append(
                Word(
                    text=text,
                    probability=probability,
                    confidence=self.calibration.word_confidence(probability)
                    if self.calibration
                    else probability,
                    alternatives=tuple(
                        Alternative(
                            "<end>" if token == END else self.model.tokenizer.piece(int(token)), float(p)
                        )
                        for token, p in zip(
                            hypothesis.alternatives[first],
                            hypothesis.alternative_probabilities[first],
                            strict=True,
                        )
                        if token not in (PAD, START, UNKNOWN)
                    ),
                    attention=None if attention is None else attention[positions].mean(0),
                    gate=None if hypothesis.gates is None else float(hypothesis.gates[positions].mean()),
                    given=given,
                    word_attention=None
                    if hypothesis.word_attention is None
                    else hypothesis.word_attention[positions].mean(0),
                )
            )
        chosen = [w for w in words if not w.given] or words
        if self.calibration is not None and familiar is not None:
            texts = [w.text for w in chosen]
            ranks = word_ranks(self.model.tokenizer, texts)
            confidence = self.calibration.caption_confidence(
                caption_features(texts, [w.probability for w in chosen], ranks, *familiar)
            )
        else:
            confidence = plain_confidence([w.probability for w in chosen])
        return Caption(
            text=join_words([w.text for w in words]),
            words=tuple(words),
            score=hypothesis.score,
            log_probability=hypothesis.log_probability,
            confidence=confidence,
            finished=hypothesis.finished,
            grid=features.grid,
            fit=features.fits[item],
            times=features.times[item].cpu().numpy().astype(np.float32),
            guesses=guesses,
        )

    def _over_frames(self, hypothesis: Hypothesis, mask: torch.Tensor) -> np.ndarray | None:
        """Return attention ``(T, F, R)``; of cells that were averaged over time, each frame's share."""
        weights = hypothesis.attention
        if weights is None:
            return None
        frames, cells = mask.shape
        if weights.shape[-1] == frames * cells:
            return weights.reshape(-1, frames, cells)
        seen = mask.float().cpu().numpy()
        shares = seen / np.maximum(seen.sum(0), 1e-9)
        return weights[:, None] * shares

    def _words(self, hypothesis: Hypothesis, prefix: str) -> list[tuple[str, list[int]]]:
        """Group tokens into words; the prefix is not grown by what follows, and its unknown words return."""
        tokenizer, given = self.model.tokenizer, hypothesis.given
        words = tokenizer.words(hypothesis.tokens[:given])
        typed = split_words(prefix, lower=False)
        if len(typed) == len(words):
            words = [
                (own if UNKNOWN in (hypothesis.tokens[p] for p in positions) else text, positions)
                for own, (text, positions) in zip(typed, words, strict=True)
            ]
        following = tokenizer.words(hypothesis.tokens[given:])
        return words + [(text, [given + p for p in positions]) for text, positions in following]

    def _agrees_with(self, reference: Captioner) -> bool:
        """Return whether this device gives another's words on scripted pictures."""
        grid = np.indices((240, 320)).sum(0)
        pictures = [
            np.stack([(grid * k) % 256 for k in (1, 2, 3)], -1).astype(np.uint8),
            np.stack([255 - grid // 3, grid // 3, grid // 4], -1).astype(np.uint8),
        ]
        here, there = self.caption_batch(pictures), reference.caption_batch(pictures)
        return [c.text for c in here] == [c.text for c in there]


def pool(features: GridFeatures) -> np.ndarray:
    """Return the mean feature ``(B, D)`` of the cells that may be seen."""
    weights = features.mask / features.mask.sum((1, 2), keepdim=True)
    return torch.einsum("bfr,bfrd->bd", weights, features.data).cpu().numpy()


def choose_device(device: str) -> torch.device:
    """Return the device of that name; ``auto`` is the best there is.

    Raises:
        ValueError: if it is unknown or not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda, cuda:N or mps") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(chosen.type, False):
        raise ValueError(f"device {device!r} is not available here; use --device auto or cpu")
    return chosen
