"""What a config describes, loaded: data sets, tokenizer, model, targets, features, validation."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from captioner import checkpoint
from captioner.encoder import ENCODERS, Encoder
from captioner.model import CaptionModel
from captioner.search import SearchOptions
from captioner.tokenizer import END, BpeTokenizer, Tokenizer, WordTokenizer
from captioner_training import concepts
from captioner_training.adapt import begin, frame_config
from captioner_training.cider import CiderD
from captioner_training.config import (
    ConfigError,
    DecoderSection,
    EncoderConfig,
    StageConfig,
    TrainingConfig,
)
from captioner_training.data import DataSet, load_data_set
from captioner_training.evaluate import generate
from captioner_training.features import FeatureCache, Features, LivePictures, same_pictures
from captioner_training.measures import common_caption_warning
from captioner_training.metrics import Scorer
from captioner_training.vectors import begin_with
from captioner_training.workers import speaks

LONGEST = 22
"""Of longer captions the first tokens are learned, without an end."""

VALIDATED = ("BLEU", "METEOR", "CIDEr")


class Experiment:
    """What a config describes, loaded; the model is on the CPU until somebody moves it.

    Attributes:
        sources: data sets to train on, by name.
        validation: data sets to validate on, by name.
        model: fresh, or what ``start`` names with its new words.
        styles: for each source whose way of writing its captions have, see `SourceConfig.style`.
        words: for each source the ``(n, K)`` targets of the word guesses, empty before `know_words` and
            without a word memory.
        targets: for each source and picture the token ids of its captions, at most `LONGEST`.
        notes: what a person should be told before training starts.
    """

    def __init__(self, config: TrainingConfig, data_folder: Path, cache_folder: Path) -> None:
        """Load everything but the features.

        Raises:
            DataError, ConfigError: for data, weights or a combination that cannot be used.
        """
        self.config = config
        self.cache_folder = cache_folder
        self.notes: list[str] = []
        self.concepts: list[int] = []
        used = {name for stage in config.stages for name in stage.sources}
        self.sources = {
            n: load_data_set(n, c, data_folder) for n, c in config.data.sources.items() if n in used
        }
        self.validation = {n: load_data_set(n, c, data_folder) for n, c in config.data.validation.items()}
        self._check_media()
        self.started: checkpoint.Header | None = None
        torch.manual_seed(config.seed)
        self.model = self._begin(data_folder)
        self.tokenizer = self.model.tokenizer
        blocks = len(self.model.encoder.network)
        for index, stage in enumerate(config.stages):
            if stage.trainable_blocks >= blocks:
                raise ConfigError(
                    f"stages.{index}.trainable_blocks is {stage.trainable_blocks}: {self.encoder_name} has "
                    f"{blocks} blocks, and the first stays frozen"
                )
        self.references = {
            name: [[[*self.tokenizer.encode(c), END] for c in p.captions] for p in data.pictures]
            for name, data in self.sources.items()
        }
        self.targets = {
            name: [[caption[:LONGEST] for caption in picture] for picture in pictures]
            for name, pictures in self.references.items()
        }
        cut = sum(len(c) > LONGEST for pictures in self.references.values() for p in pictures for c in p)
        if cut:
            self.notes.append(
                f"{cut:,} captions are longer than {LONGEST - 1} tokens: of these the beginning is learned"
            )
        self.styles = {name: config.data.sources[name].style for name in self.sources}
        self._check_styles()
        self.words: dict[str, torch.Tensor] = {}
        self._scorers: dict[str, Scorer] = {}

    def _begin(self, data_folder: Path) -> CaptionModel:
        config = self.config
        captions = [c for data in self.sources.values() for p in data.pictures for c in p.captions]
        if config.start is not None:
            start = begin(config.start, captions, min_count=config.tokenizer.min_count, video=config.video)
            self.started = start.header
            self.notes += start.lines
            return start.model
        assert config.encoder is not None
        tokenizer = build_tokenizer(config, self.sources)
        if config.concepts is not None and config.decoder is not None and config.decoder.words:
            self.concepts = concepts.choose(config.concepts, self.sources, tokenizer)
            if config.concepts.imagenet:
                concepts.classifier(config.encoder.name)  # a mistake there comes before features
        styles = max(config.data.sources[name].style for name in self.sources)
        decoder = config.decoder or DecoderSection()
        model = CaptionModel(
            build_encoder(config.encoder),
            decoder.build(len(self.concepts), styles),
            tokenizer,
            config.video.build(),
        )
        if config.word_vectors is not None:
            self.notes.append(begin_with(model, data_folder / config.word_vectors))
        return model

    def _check_media(self) -> None:
        """Refuse a frame encoder that would never see a clip.

        Raises:
            ConfigError: naming the key.
        """
        if self.config.video.build() is None or any(data.is_video for data in self.sources.values()):
            return
        key = "positions" if self.config.video.cell == "none" else "cell"
        raise ConfigError(
            f"video.{key} is {getattr(self.config.video, key)}: a frame encoder learns from clips, and none "
            f"of the sources that are trained on ({', '.join(self.sources)}) has any"
        )

    def _check_styles(self) -> None:
        known = self.model.decoder.config.styles
        for name, style in self.styles.items():
            if style > known:
                raise ConfigError(
                    f"data.sources.{name}.style is {style}: the captioner under start tells {known} other "
                    "styles apart"
                )
        if self.config.start is None and min(self.styles.values()) > 0:
            raise ConfigError(
                "data.sources: no source that is trained on has style: 0, the one that the model is to speak"
            )

    def know_words(self) -> None:
        """Fill `words`, and begin the model's guesses from them; the encoder must be as it was at first.

        With ImageNet's knowledge this computes features if no earlier run kept the targets.
        """
        wanted = self.config.concepts
        if wanted is None or not self.concepts or self.words:
            return
        tokenizer = cast(WordTokenizer, self.tokenizer)
        encoder = self.model.encoder
        classes = concepts.class_words(self.concepts, tokenizer) if wanted.imagenet else None
        first = self.config.stages[0]
        for name, data in self.sources.items():
            shared = name in first.sources and not first.trainable_blocks  # its features serve here too
            frozen = first if shared else first.model_copy(update={"trainable_blocks": 0, "crops": 0})
            path = concepts.remember(
                self.cache_folder, encoder, data, self.concepts, classes, self.config.video.frames
            )
            targets = concepts.recall(path)
            if targets is None:
                targets = concepts.mentioned(data, self.concepts, tokenizer)
                if classes is not None:
                    features = self._features(name, frozen)
                    known = concepts.recognised(
                        features, self.encoder_name, classes, len(self.concepts), speaks()
                    )
                    targets = torch.maximum(targets, known)
                targets = concepts.keep(path, targets)
            self.words[name] = targets
        guesser = self.model.decoder.guesser
        assert guesser is not None
        shares = concepts.mean_share(self.words.values())
        concepts.begin(guesser, self.concepts, shares, classes, self.encoder_name)

    @property
    def encoder_name(self) -> str:
        """A key of `captioner.encoder.ENCODERS`."""
        if self.started is not None:
            return self.started.encoder
        assert self.config.encoder is not None
        return self.config.encoder.name

    @property
    def partial(self) -> list[str]:
        """Names of the data sets of which pictures are missing: scores are not comparable with others'."""
        return [name for name, data in {**self.sources, **self.validation}.items() if data.partial]

    def content(self) -> str:
        """Return a hash of the captions, pictures and vocabulary that are trained on."""
        digest = hashlib.sha256()
        for name, data in sorted(self.sources.items()):
            for picture, captions in zip(data.pictures, self.references[name], strict=True):
                digest.update(f"{name} {picture.id} {picture.file}{picture.part} {captions}\n".encode())
        for token in range(len(self.tokenizer)):
            digest.update(self.tokenizer.piece(token).encode())
        return digest.hexdigest()[:16]

    def prepare(self) -> None:
        """Compute features with all cores, before processes share the work.

        What the first fine-tuned stage needs can be computed too: it has not changed its frozen blocks.
        """
        if not self.config.cache:
            self._compare_files()
            self.know_words()
            return
        self.know_words()
        trained: dict[str, FeatureCache] = {}
        for stage in self.config.stages:
            for name, features in self.features(stage).items():
                if isinstance(features, FeatureCache):
                    trained[name] = features
            if stage.trainable_blocks:
                break
        for name, held_out in self.validation_features().items():
            for source, features in trained.items():
                twice = same_pictures(features, held_out)
                if twice:
                    first = self.sources[source].pictures[twice[0][0]].file
                    self.notes.append(_in_both(len(twice), name, source, first))

    def _compare_files(self) -> None:
        """Look for pictures of validation among those of training by their files, without their content."""

        def files(data: DataSet) -> set[tuple[Path, str]]:
            return {(data.store.places(p.file)[0], p.file + p.part) for p in data.pictures}

        for name, held_out in self.validation.items():
            for source, data in self.sources.items():
                twice = files(data) & files(held_out)
                if twice:
                    self.notes.append(_in_both(len(twice), name, source, min(file for _, file in twice)))

    def features(self, stage: StageConfig) -> dict[str, Features]:
        """Return what the stage's frozen blocks give for its sources, computing what a cache lacks."""
        return {name: self._features(name, stage) for name in stage.sources}

    def _features(self, name: str, stage: StageConfig) -> Features:
        config, encoder, data = self.config, self.model.encoder, self.sources[name]
        blocks = len(encoder.network) - stage.trainable_blocks if stage.trainable_blocks else None
        crops = config.crops if stage.crops is None else stage.crops
        if config.cache:
            cache = FeatureCache(
                self.cache_folder,
                data,
                encoder,
                config.flips,
                blocks,
                crops=crops,
                frames=config.video.frames,
            )
            return cache.build(progress=speaks())
        half = config.mixed_precision == "bf16"
        return LivePictures(
            data, encoder, config.flips, blocks, crops=crops, frames=config.video.frames, half=half
        )

    def validation_features(self) -> dict[str, FeatureCache]:
        """Return the grid features of the validation pictures under the present encoder."""
        return {
            name: FeatureCache(
                self.cache_folder, data, self.model.encoder, False, frames=self.config.video.frames
            ).build(speaks())
            for name, data in self.validation.items()
        }

    def judge(self, stage: StageConfig) -> tuple[CiderD, dict[str, int]]:
        """Return the reward of self-critical training and where each source begins in it."""
        begins: dict[str, int] = {}
        references: list[list[list[int]]] = []
        for name in stage.sources:
            begins[name] = len(references)
            references += self.references[name]
        return CiderD(references), begins

    def validate(self, fine_tuned: bool) -> dict[str, dict[str, float]]:
        """Generate a caption for every validation picture and score it.

        Args:
            fine_tuned: whether the encoder has changed, so that features of the pictures cannot be kept.
        """
        options = SearchOptions(**self.config.search.model_dump())
        caches: Mapping[str, FeatureCache] = {}
        if self.config.cache and not fine_tuned:
            caches = self.validation_features()
        scores = {}
        for name, data in self.validation.items():
            if name not in self._scorers:
                self._scorers[name] = Scorer(data.references())
            captions = generate(
                self.model, data, options, cache=caches.get(name), frames=self.config.video.frames
            )
            metrics = self._scorers[name].score(captions, metrics=VALIDATED, intervals=False)
            scores[name] = dict(metrics.corpus)
            warning = common_caption_warning(list(captions.values()))
            if warning:
                tqdm.write(f"warning: {name}: {warning}", file=sys.stderr)
        return scores

    def header(self, stage: str, epoch: int, scores: dict[str, dict[str, float]]) -> checkpoint.Header:
        """Return the header of a checkpoint of the model as it is."""
        config, model = self.config, self.model
        if self.started is not None:
            weights = str(self.started.summary.get("encoder_weights", "unknown"))
        else:
            weights = ENCODERS[self.encoder_name]().weights_note
        summary: dict[str, Any] = {
            "config": config.name,
            "stage": stage,
            "epoch": epoch,
            "encoder_weights": weights,
            "data": {
                name: {
                    "pictures": len(data),
                    "captions": sum(len(p.captions) for p in data.pictures),
                    "note": config.data.sources[name].note,
                }
                for name, data in self.sources.items()
            },
            "scores": {n: {k: round(v, 4) for k, v in s.items()} for n, s in scores.items()},
        }
        if any(data.is_video for data in self.sources.values()):
            summary["frames"] = config.video.frames
        if self.partial:
            summary["partial"] = self.partial
        if self.started is not None:
            kept = {k: v for k, v in self.started.summary.items() if k not in ("started_from", "scores")}
            summary["started_from"] = {"name": self.started.name, **kept}
            if "licence" in kept:  # its terms hold for what was made from it
                summary["licence"] = kept["licence"]
        return checkpoint.Header(
            name=config.name,
            encoder=self.encoder_name,
            preprocess=model.encoder.preprocess,
            decoder=model.decoder.config,
            tokenizer=model.tokenizer.to_dict(),
            search=config.search.model_dump(),
            summary=summary,
            frames=frame_config(model),
        )


def _in_both(count: int, validation: str, source: str, first: str) -> str:
    return (
        f"{count} pictures of {validation} are also in {source} (the first: {first}): scores on them mean "
        "nothing; captioner prepare takes them out"
    )


def build_encoder(config: EncoderConfig) -> Encoder:
    """Return the encoder with the config's input size and fit."""
    encoder = Encoder(config.name, pretrained=config.pretrained)
    preprocess = encoder.preprocess
    if config.size is not None or config.fit is not None:
        size = config.size or preprocess.size
        resize = preprocess.resize if config.fit in (None, "crop") else None
        preprocess = replace(
            preprocess,
            size=size,
            fit=config.fit or preprocess.fit,
            resize=None if resize is None else round(resize * size / preprocess.size),
        )
        network = encoder.network
        encoder = Encoder(config.name, preprocess=preprocess)
        encoder.network.load_state_dict(network.state_dict())
    return encoder


def build_tokenizer(config: TrainingConfig, sources: dict[str, DataSet]) -> Tokenizer:
    """Learn the vocabulary from the captions of the training sources alone, and what ImageNet may guess."""
    sentences = [c for data in sources.values() for p in data.pictures for c in p.captions]
    if config.tokenizer.kind == "bpe":
        return BpeTokenizer.build(sentences, size=config.tokenizer.size)
    count = config.tokenizer.min_count
    largest = config.tokenizer.max_size
    tokenizer = WordTokenizer.build(sentences, min_count=count, max_size=largest)
    if len(tokenizer) == len(WordTokenizer.build([])):
        raise ConfigError(f"tokenizer.min_count is {count}: no word of the training captions is so common")
    if config.concepts is not None and config.concepts.imagenet:  # what can be guessed can be said
        sentences += concepts.everyday_words() * count
        tokenizer = WordTokenizer.build(sentences, min_count=count, max_size=largest)
    return tokenizer
