"""Typed, strict configs: one YAML is one experiment; an unknown key or an impossible value is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from captioner.decoder import DecoderConfig
from captioner.encoder import ENCODERS
from captioner.frame_encoder import FrameConfig
from captioner.inputs import one_line
from captioner.search import SearchOptions
from captioner_training.clips import FRAMES


class ConfigError(ValueError):
    """A config that cannot be used; the message, one line, names the file and the key."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class SourceConfig(_Strict):
    """One data set in COCO's captions format; paths are relative to the data folder."""

    annotations: str
    images: list[str] = []
    """Tar files or folders that hold the pictures by ``file_name``; those that ``captioner prepare`` noted
    in the annotations if empty."""
    skip_highest: Annotated[int, Field(ge=0)] = 0
    """Leave out the pictures with the highest ids (they are validation)."""
    only_highest: Annotated[int, Field(ge=0)] = 0
    """Take only the pictures with the highest ids."""
    exclude_sets: list[str] = []
    """Leave out the pictures whose ``set`` is one of these."""
    style: Annotated[int, Field(ge=0)] = 0
    """Whose way of writing: 0 is the one that the model is to speak, others begin with a start token each."""
    note: str = ""
    """Who wrote the captions, under what terms; goes into the checkpoint."""


class EncoderConfig(_Strict):
    """Which CNN looks at the picture, and how the picture is prepared for it."""

    name: str
    size: Annotated[int, Field(ge=32)] | None = None
    fit: Literal["squash", "crop", "letterbox"] | None = None
    pretrained: bool = True
    """Begin with ImageNet weights; without them the encoder is random, which is for tests."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ENCODERS:
            raise ValueError(f"unknown encoder {name!r}; there are {', '.join(ENCODERS)}")
        return name


class TokenizerConfig(_Strict):
    """Words by frequency, or byte-pair encoding."""

    kind: Literal["word", "bpe"] = "word"
    min_count: Positive = 5
    max_size: Annotated[int, Field(ge=8)] | None = None
    size: Annotated[int, Field(ge=8)] = 4000


class DecoderSection(_Strict):
    """See `captioner.decoder.DecoderConfig`."""

    cell: Literal["rnn_tanh", "rnn_relu", "gru", "lstm"] = "lstm"
    attention: Literal["additive", "dot", "none"] = "additive"
    hidden: Positive = 512
    embedding: Positive = 300
    cells: Positive = 512
    attention_width: Positive = 256
    gate: bool = True
    deep_output: bool = True
    tied: bool = True
    layer_norm: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    words: Annotated[int, Field(ge=0)] = 0
    word_attention_width: Positive = 128
    word_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    copying: bool = False
    frames: Literal["joint", "factorised", "mean"] = "joint"
    frame_attention_width: Positive = 128

    @model_validator(mode="after")
    def _possible(self) -> DecoderSection:
        if self.frames == "factorised" and self.attention == "none":
            raise ValueError("frames: factorised needs an attention within each frame, additive or dot")
        return self

    def build(self, concepts: int = 0, styles: int = 0) -> DecoderConfig:
        """Return the library's own config, for so many words to guess and further styles."""
        return DecoderConfig(**self.model_dump(), concepts=concepts, styles=styles)


class VideoSection(_Strict):
    """How clips are looked at; see `captioner.frame_encoder.FrameConfig`."""

    frames: Annotated[int, Field(ge=1, le=1000)] = FRAMES
    """At most so many frames of a clip, evenly spread over it."""
    cell: Literal["none", "rnn_tanh", "rnn_relu", "gru", "lstm"] = "none"
    bidirectional: bool = False
    over: Literal["cells", "frames"] = "cells"
    width: Positive = 256
    positions: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _possible(self) -> VideoSection:
        if self.bidirectional and self.cell == "none":
            raise ValueError(
                "bidirectional needs a cell that reads the frames: rnn_tanh, rnn_relu, gru or lstm"
            )
        return self

    def build(self) -> FrameConfig | None:
        """Return the library's own config; None if there is nothing for a frame encoder to do."""
        config = FrameConfig(**self.model_dump(exclude={"frames"}))
        return config if config.active else None


class ConceptsConfig(_Strict):
    """Which words are guessed of a picture, for the word memory (``decoder.words``)."""

    min_pictures: Positive = 50
    """Content words of so many training pictures' captions are guessed."""
    imagenet: bool = False
    """Guess what the encoder's ImageNet classifier knows too, and keep it known while the encoder changes."""
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Of the guesses' loss: binary cross-entropy, summed over words, mean over pictures."""


class LossConfig(_Strict):
    """Teacher-forced cross-entropy and what may be added to it."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    reduction: Literal["tokens", "captions"] = "tokens"
    """``tokens``: mean over all words; ``captions``: sum over a caption's steps, mean over captions."""
    doubly_stochastic: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the regularisation that every cell be looked at in turn (Xu et al. 2015, equation 14)."""


class StageConfig(_Strict):
    """One stage of training: which sources, how long, how fast, towards what."""

    name: str
    sources: Annotated[dict[str, Positive], Field(min_length=1)]
    """Source name -> how often each of its pictures comes in an epoch."""
    epochs: Positive
    objective: Literal["cross_entropy", "self_critical"] = "cross_entropy"
    """Teacher forcing on people's captions, or the CIDEr-D of sampled ones (Rennie et al. 2017)."""
    learning_rate: Annotated[float, Field(gt=0)]
    batch_pictures: Positive = 32
    captions_per_picture: Positive = 5
    """Cross-entropy: at most so many captions of each picture, drawn anew every time."""
    samples: Annotated[int, Field(ge=2)] = 5
    """Self-critical: captions sampled for each picture; each is judged against the mean of the others."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Self-critical: of the sampling; below 1 the samples are more like what the search says."""
    cross_entropy: Annotated[float, Field(ge=0)] = 0.0
    """Self-critical: weight of the cross-entropy on people's captions that is added (Wu et al. 2016)."""
    accumulate: Positive = 1
    """Parts of a batch that are computed one after the other, for large batches in little memory."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: Fraction = 0.05
    """Share of the stage's steps over which the learning rate rises before it follows the schedule."""
    final: Fraction = 0.05
    """What the cosine falls to, as a share of the learning rate."""
    step_epochs: Positive = 3
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.8
    """``step``: multiply the learning rate by the factor every so many epochs."""
    scheduled_sampling: Fraction = 0.0
    """Probability at the stage's end that a word is read from the model itself and not from the caption; it
    rises from 0 in proportion (Bengio et al. 2015)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 5.0
    """Largest norm of the gradient."""
    clip_value: Annotated[float, Field(gt=0)] | None = None
    """Largest size of each of its numbers, before the norm is clipped."""
    crops: Annotated[int, Field(ge=0)] | None = None
    """Other than the experiment's ``crops``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Another dropout than the stage before."""
    style_dropout: Fraction = 0.0
    """Share of the captions of other styles that begin with the usual start token all the same."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the exponential moving average of the weights that is validated and kept; 0 turns it off."""
    average_epochs: Positive = 1
    """Validate and keep the mean of the weights at the ends of so many last epochs; needs ``average: 0``."""
    patience: Annotated[int, Field(ge=0)] = 0
    """End the stage after so many epochs without a better validation score; 0 never does."""
    trainable_blocks: Annotated[int, Field(ge=0)] = 0
    """How many of the encoder's last blocks are fine-tuned; the cache holds what comes before them."""
    encoder_learning_rate: Annotated[float, Field(gt=0)] = 1e-4

    @model_validator(mode="after")
    def _fits_together(self) -> StageConfig:
        if self.average and self.average_epochs > 1:
            raise ValueError("average_epochs needs average: 0; choose one of the two ways of averaging")
        if self.accumulate > self.batch_pictures:
            raise ValueError(
                f"accumulate is {self.accumulate}, but a batch has only {self.batch_pictures} pictures"
            )
        if self.objective == "self_critical" and self.scheduled_sampling:
            raise ValueError(
                "scheduled_sampling is for objective: cross_entropy; self_critical samples anyway"
            )
        if self.objective == "cross_entropy" and self.cross_entropy:
            raise ValueError("cross_entropy is the weight of what is added to objective: self_critical")
        return self


class StartConfig(_Strict):
    """Go on from a trained captioner instead of starting with a fresh decoder."""

    model: str
    """``built-in``, or the path of a checkpoint, relative to the working directory."""
    new_words: bool = True
    """Add the words of the new captions (see ``tokenizer.min_count``) to the vocabulary; the old stay."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Another dropout than the captioner was trained with."""
    frames: Literal["joint", "factorised", "mean"] | None = None
    """Another way to attend to several frames than the captioner has (see ``decoder.frames``)."""


class SearchConfig(_Strict):
    """How validation captions are generated."""

    beam: Positive = 3
    length_penalty: float = 0.7
    max_length: Positive = 30
    name_above: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _possible(self) -> SearchConfig:
        SearchOptions(**self.model_dump()).check()  # now, and not after the first epoch
        return self


class DataConfig(_Strict):
    """Sources to train on and sets to validate on."""

    sources: dict[str, SourceConfig]
    validation: dict[str, SourceConfig]


class TrainingConfig(_Strict):
    """One experiment."""

    name: Annotated[str, Field(pattern=r"\S")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig
    start: StartConfig | None = None
    encoder: EncoderConfig | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()
    word_vectors: str | None = None
    """First embeddings from a text file of GloVe's or word2vec's format, relative to the data folder."""
    decoder: DecoderSection | None = None
    video: VideoSection = VideoSection()
    concepts: ConceptsConfig | None = None
    loss: LossConfig = LossConfig()
    flips: bool = True
    """Show each picture mirrored every other time."""
    crops: Annotated[int, Field(ge=0)] = 0
    """Random crops of each picture beside the whole; with a cache so many, else a new one every time."""
    cache: bool = True
    """Keep what the frozen blocks of the encoder give; without, every picture is read and encoded anew."""
    mixed_precision: Literal["none", "bf16"] = "none"
    compile: bool = False
    """Compile the decoder's steps with torch.compile."""
    tensorboard: bool = True
    """Write TensorBoard logs if the package is installed."""
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    search: SearchConfig = SearchConfig()
    save_minutes: Annotated[float, Field(gt=0)] = 5.0
    """How often the state is saved within an epoch."""

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingConfig:
        for index, stage in enumerate(self.stages):
            for name in stage.sources:
                if name not in self.data.sources:
                    raise ValueError(
                        f"stages.{index}.sources names {name!r}, which is not under data.sources "
                        f"({', '.join(self.data.sources)})"
                    )
        if not self.data.validation:
            raise ValueError(
                "data.validation must name at least one set: the best checkpoint is chosen on it"
            )
        if self.decoder is not None and self.decoder.words and self.concepts is None:
            raise ValueError("decoder.words needs the section concepts: which words are to be guessed")
        if self.concepts is not None and not (self.decoder and "words" in self.decoder.model_fields_set):
            raise ValueError("concepts needs decoder.words: how many of the guesses are attended to")
        known = self.concepts is not None and self.concepts.imagenet
        if known and self.encoder is not None and not self.encoder.pretrained:
            raise ValueError(
                "concepts.imagenet needs encoder.pretrained: true, the weights of its classifier"
            )
        if self.start is None and self.search.name_above < 1 and not known:
            raise ValueError(
                "search.name_above needs concepts.imagenet: no other guess is known to be of a thing"
            )
        if self.start is None and self.encoder is None:
            raise ValueError("encoder is missing (or start, to go on from a trained captioner)")
        if self.start is not None:
            for key in ("encoder", "decoder", "concepts", "word_vectors"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} cannot be given with start: the captioner there brings its own")
            if self.tokenizer.kind != "word":
                raise ValueError(
                    "tokenizer.kind cannot be given with start: the captioner there brings its own tokenizer"
                )
        return self


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-3`` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands there twice", key.start_mark
                )
            seen.add((key.tag, key.value if isinstance(key.value, str) else id(key)))
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what ``<<`` names, each key once: merges of merges would grow with every level."""
        super().flatten_mapping(node)
        kept = {
            (key.tag, key.value if isinstance(key.value, str) else id(key)): (key, value)
            for key, value in node.value
        }
        node.value = list(kept.values())


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


_LONGEST = 2**20
"""Characters of a config."""


def load_config(path: str | Path) -> TrainingConfig:
    """Read and check a config.

    Raises:
        ConfigError: one line that names the file and the key.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise ConfigError(f"{path}: more than {_LONGEST} characters: this is no config")
        raw: Any = yaml.load(text, _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, ValueError, TypeError) as error:
        # what the library stumbles over: an impossible date is a ValueError, a huge number an OverflowError
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not YAML: nested too deeply") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level")
    try:
        return TrainingConfig.model_validate(raw)
    except (RecursionError, OverflowError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "(top level)"
            message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
            message = message.removeprefix("Value error, ")
            problems.append(f"{key}: {message}")
        raise ConfigError(f"{path}: {'; '.join(problems)}") from None
