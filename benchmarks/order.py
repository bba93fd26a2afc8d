"""Clips whose caption is decided by order in time: which frame encoder and which attention can tell?

The clips are drawn: coloured shapes that move, appear one before another, change size or colour, and jump, in
places that the caption names too. Each clip has twins with the very same frames in another order, and
another caption. So whoever is blind to order writes one caption for all twins, and of the words in which
their captions differ, the order words, gets as many right as chance would. The same never happens to the same
things at the same places in two splits. Features come from the project's encoder, once, and every variant
learns from them alone.

Bars: without anything that knows order (mean pooling, joint and factorised attention by themselves) within 5
points of chance on the order words; forward and bidirectional frame encoders above 95 % exact captions.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import common
import numpy as np
import torch
from captioner_training.config import LossConfig
from captioner_training.losses import caption_loss
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from captioner import video
from captioner.decoder import DecoderConfig
from captioner.encoder import Encoder, compute
from captioner.frame_encoder import OVER, FrameConfig
from captioner.images import load
from captioner.model import CaptionModel
from captioner.search import SearchOptions, search
from captioner.tokenizer import END, PAD, START, WordTokenizer, detokenize

SIDE = 96
"""Of a frame, in pixels."""

SECONDS = 0.5
"""That a frame is shown."""

POSITIONS = 6
"""The most frames of a clip."""

COMPONENTS = 128
"""Of a cell's features, kept."""

COLOURS = {"red": (215, 35, 35), "green": (35, 165, 55), "blue": (40, 70, 220), "yellow": (235, 210, 30)}
SHAPES = ("square", "disc", "triangle", "cross")
PLACES = {
    "on the left": (0.17, 0.5),
    "on the right": (0.83, 0.5),
    "at the top": (0.5, 0.17),
    "at the bottom": (0.5, 0.83),
}
GROUND = Image.fromarray(
    np.array(
        [
            [(150, 200, 200), (200, 200, 255), (255, 190, 220)],
            [(110, 150, 130), (170, 170, 170), (230, 180, 140)],
            [(60, 100, 60), (110, 100, 60), (150, 100, 60)],
        ],
        np.uint8,
    )
)
"""What is behind the shapes, in large: lighter above, redder on the right."""

Subject = tuple[str, str]
"""Colour and shape."""

Thing = tuple[Subject, float, float, float]
"""A subject, the centre of it (0 to 1, from the left and the top), and its width as a share of the frame."""


@dataclass(frozen=True)
class Twins:
    """Clips of the same frames.

    Attributes:
        kind: a key of `KINDS`.
        things: what is seen where; decides the split.
        frames: what each shows.
        orders: caption and order of the frames, a permutation, of each clip.
    """

    kind: str
    things: str
    frames: Sequence[Sequence[Thing]]
    orders: Sequence[tuple[str, Sequence[int]]]


def order_words(captions: Sequence[str]) -> dict[int, float]:
    """Return, of twins' captions, the places of the words that differ, and the chance to be right there.

    That is the share of the clips for which one word, the same for all twins, is right.
    """
    rows = [caption.split() for caption in captions]
    chances = {}
    for place, words in enumerate(zip(*rows, strict=True)):
        if len(set(words)) > 1:
            chances[place] = max(words.count(word) for word in words) / len(words)
    return chances


# --------------------------------------------------------------------------------------------------
# What happens


def _subjects(chance: random.Random, count: int) -> list[Subject]:
    return chance.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)


def _near(chance: random.Random, place: tuple[float, float]) -> tuple[float, float]:
    return place[0] + chance.uniform(-0.04, 0.04), place[1] + chance.uniform(-0.04, 0.04)


def _width(chance: random.Random) -> float:
    return chance.uniform(0.26, 0.33)


def _called(subject: Subject) -> str:
    return f"a {subject[0]} {subject[1]}"


def _both_ways(captions: Sequence[str], count: int) -> list[tuple[str, Sequence[int]]]:
    """Give the frames forwards to the first caption and backwards to the second."""
    forth, back = captions
    return [(forth, range(count)), (back, range(count - 1, -1, -1))]


def moves(chance: random.Random, count: int) -> Twins:
    """Something moves along a row or a column."""
    mover = _subjects(chance, 1)[0]
    width = _width(chance)
    along = np.linspace(0.17, 0.83, count) + chance.uniform(-0.03, 0.03)
    first = chance.random() < 0.5
    across = (0.17 if first else 0.83) + chance.uniform(-0.04, 0.04)
    if chance.random() < 0.5:
        where = "at the top" if first else "at the bottom"
        frames = [[(mover, x, across, width)] for x in along]
        ways = ("right", "left")
    else:
        where = "on the left" if first else "on the right"
        frames = [[(mover, across, y, width)] for y in along]
        ways = ("down", "up")
    captions = [f"{_called(mover)} moves {way} {where}" for way in ways]
    return Twins("moves", f"{mover} {where}", frames, _both_ways(captions, count))


def before(chance: random.Random, count: int) -> Twins:
    """One thing is there, and then another, elsewhere."""
    names = chance.sample(list(PLACES), 2)
    subjects = _subjects(chance, 2)
    things = [(s, *_near(chance, PLACES[n]), _width(chance)) for s, n in zip(subjects, names, strict=True)]
    turn = chance.randint(1, count - 1)
    frames = [[things[0]]] * turn + [[things[1]]] * (count - turn)
    a, b = (f"{_called(s)} {n}" for s, n in zip(subjects, names, strict=True))
    return Twins(
        "before", str(sorted((a, b))), frames, _both_ways((f"{a} before {b}", f"{b} before {a}"), count)
    )


def sizes(chance: random.Random, count: int) -> Twins:
    """Something grows or shrinks."""
    subject = _subjects(chance, 1)[0]
    name = chance.choice(list(PLACES))
    place = _near(chance, PLACES[name])
    frames = [[(subject, *place, width)] for width in np.linspace(0.12, 0.36, count)]
    ways = [f"{_called(subject)} {name} {verb}" for verb in ("grows", "shrinks")]
    return Twins("sizes", f"{subject} {name}", frames, _both_ways(ways, count))


def turns(chance: random.Random, count: int) -> Twins:
    """Something changes its colour."""
    shape, name = chance.choice(SHAPES), chance.choice(list(PLACES))
    colours = chance.sample(list(COLOURS), 2)
    states = [(colour, shape) for colour in colours]
    place, width = _near(chance, PLACES[name]), _width(chance)
    turn = chance.randint(1, count - 1)
    frames = [[(states[int(i >= turn)], *place, width)] for i in range(count)]
    ways = [f"a {shape} {name} turns from {a} to {b}" for a, b in (colours, colours[::-1])]
    return Twins("turns", f"{sorted(states)} {name}", frames, _both_ways(ways, count))


def jumps(chance: random.Random, count: int) -> Twins:
    """Something is at three places in turn."""
    jumper, width = _subjects(chance, 1)[0], _width(chance)
    names = chance.sample(list(PLACES), 3)
    shares = [count // 3 + (i < count % 3) for i in range(3)]
    runs: list[list[int]] = []
    frames: list[list[Thing]] = []
    for name, share in zip(names, chance.sample(shares, 3), strict=True):
        runs.append(list(range(len(frames), len(frames) + share)))
        frames += [[(jumper, *_near(chance, PLACES[name]), width)]] * share
    short = [name.split()[-1] for name in names]
    ways = []
    for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        caption = f"{_called(jumper)} jumps from {short[a]} to {short[b]} to {short[c]}"
        ways.append((caption, [*runs[a], *runs[b], *runs[c]]))
    return Twins("jumps", f"{jumper} {sorted(names)}", frames, ways)


KINDS = {kind.__name__: kind for kind in (moves, before, sizes, turns, jumps)}


# --------------------------------------------------------------------------------------------------
# Clips in files

SPLITS = {"train": 0.7, "validation": 0.15, "test": 0.15}
"""Each split's share of what can happen to what, and where."""


def split_of(twins: Twins, seed: int) -> str:
    """Return where clips belong in which the same happens to the same things at the same places."""
    place = random.Random(f"{seed} {twins.kind} {twins.things}").random()
    for name, share in SPLITS.items():
        place -= share
        if place < 0:
            return name
    return name


def all_twins(seed: int, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[tuple[str, Twins]]:
    """Yield splits and twins of each kind in turn, without end."""
    for number in itertools.count():
        for name in kinds:
            chance = random.Random(f"{seed} {number} {name}")
            twins = KINDS[name](chance, chance.randint(3, POSITIONS))
            yield split_of(twins, seed), twins


def draw(things: Sequence[Thing], chance: np.random.Generator, ground: float) -> np.ndarray:
    """Return a frame ``(SIDE, SIDE, 3)`` uint8: shapes on the ground, with some noise.

    The ground is the same in all clips but for its brightness, and another at each place: a decoder is not
    told where a cell is, it has to see it.
    """
    scale = 4  # drawn larger, so that edges are smooth
    image = GROUND.resize((SIDE * scale, SIDE * scale), Image.Resampling.BICUBIC)
    image = image.point(lambda value: round(ground * value))
    pen = ImageDraw.Draw(image)
    for (colour, shape), x, y, width in things:
        x, y, half = x * image.width, y * image.height, width * image.width / 2
        box, fill = (x - half, y - half, x + half, y + half), COLOURS[colour]
        if shape == "disc":
            pen.ellipse(box, fill)
        elif shape == "square":
            pen.rectangle(box, fill)
        elif shape == "triangle":
            pen.polygon([(x - half, y + half), (x + half, y + half), (x, y - half)], fill)
        else:
            pen.rectangle((x - half, y - half / 3, x + half, y + half / 3), fill)
            pen.rectangle((x - half / 3, y - half, x + half / 3, y + half), fill)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    return (pixels + chance.normal(0, 5, pixels.shape)).round().clip(0, 255).astype(np.uint8)


def write_clips(
    folder: Path, clips: dict[str, int], seed: int = 0, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, Path]:
    """Write lossless WebP animations, at least so many in each split, and their captions in COCO's format.

    Each picture of the annotations has a ``kind`` and the number of its ``twins`` besides.

    Returns:
        The annotations of each split.
    """
    images: dict[str, list[dict[str, object]]] = {name: [] for name in clips}
    captions: dict[str, list[dict[str, object]]] = {name: [] for name in clips}
    for number, (split, twins) in enumerate(all_twins(seed, kinds)):
        if all(len(images[name]) >= count for name, count in clips.items()):
            break
        if len(images.get(split, ())) >= clips.get(split, 0):
            continue
        noise = np.random.default_rng([seed, number])
        ground = noise.uniform(0.8, 1.0)
        frames = [Image.fromarray(draw(things, noise, ground)) for things in twins.frames]
        (folder / split).mkdir(parents=True, exist_ok=True)
        for way, (caption, order) in enumerate(twins.orders):
            name = f"{split}/{twins.kind}-{number:05d}-{way}.webp"
            first, *others = (frames[i] for i in order)
            first.save(
                folder / name,
                save_all=True,
                append_images=others,
                duration=round(1000 * SECONDS),
                lossless=True,
                quality=0,
                method=0,
            )
            clip = len(images[split])
            images[split].append({"id": clip, "file_name": name, "kind": twins.kind, "twins": number})
            captions[split].append({"id": clip, "image_id": clip, "caption": caption})
    paths = {}
    for split in clips:
        paths[split] = folder / f"{split}.json"
        paths[split].write_text(json.dumps({"images": images[split], "annotations": captions[split]}))
    return paths


# --------------------------------------------------------------------------------------------------
# Features


@dataclass(frozen=True, eq=False)
class Clips:
    """What the encoder sees in the clips of a split, and their captions.

    Attributes:
        frames: ``(all frames, R, D)`` 16-bit features, clip after clip.
        ends: of each clip, where the next one begins.
        captions: of each clip.
        kinds: of each clip, a key of `KINDS`.
        order: of each clip, the places of its order words with the chance to be right there.
    """

    frames: Tensor
    ends: Sequence[int]
    captions: Sequence[str]
    kinds: Sequence[str]
    order: Sequence[dict[int, float]]

    def __len__(self) -> int:
        return len(self.ends)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return features ``(N, F, R, D)`` of these clips, and their mask ``(N, F, R)``: 0 for padding."""
        found = [self.frames[self.ends[row - 1] if row else 0 : self.ends[row]] for row in rows]
        data = pad_sequence(found, batch_first=True).float()
        counts = torch.tensor([len(frames) for frames in found])
        there = torch.arange(data.shape[1]) < counts[:, None]
        return data, there[:, :, None].expand(data.shape[:3]).float()

    def chance(self, kind: str | None = None) -> float:
        """Return the share of the order words, perhaps of a kind, that chance gets right."""
        rows = zip(self.kinds, self.order, strict=True)
        chances = [share for k, order in rows if kind in (None, k) for share in order.values()]
        return statistics.mean(chances)


def make_encoder(annotations: Path, size: int = SIDE) -> Encoder:
    """Return EfficientNet-Lite0 with its ImageNet weights, and a last layer for `COMPONENTS` of the features.

    That layer is their main directions in some of the clips, scaled to a mean variance of 1. It makes
    training several times as fast.
    """
    preprocess = Encoder("efficientnet_lite0").preprocess
    encoder = Encoder("efficientnet_lite0", pretrained=True, preprocess=replace(preprocess, size=size))
    encoder.optimise()
    some = read_clips(annotations, encoder, most=300).frames.double().flatten(0, 1)
    mean = some.mean(0)
    variances, directions = torch.linalg.eigh((some - mean).T @ (some - mean) / len(some))
    weights = directions[:, -COMPONENTS:].T / variances[-COMPONENTS:].mean().sqrt()
    layer = torch.nn.Conv2d(encoder.width, COMPONENTS, 1)
    with torch.no_grad():
        layer.weight.copy_(weights[:, :, None, None])
        layer.bias.copy_(-weights @ mean)  # type: ignore[union-attr]
    encoder.network.append(layer.requires_grad_(False))
    encoder.width = COMPONENTS
    return encoder


def read_clips(annotations: Path, encoder: Encoder, most: int | None = None) -> Clips:
    """Decode clips as captioning does and compute their features."""
    record = json.loads(annotations.read_text())
    images = record["images"][:most]
    captions = [row["caption"] for row in record["annotations"][:most]]
    twins: dict[int, list[int]] = {}
    for row, image in enumerate(images):
        twins.setdefault(image["twins"], []).append(row)
    order: list[dict[int, float]] = [{}] * len(captions)
    for rows in twins.values():
        chances = order_words([captions[row] for row in rows])
        for row in rows:
            order[row] = chances
    known: dict[bytes, int] = {}  # twins share their frames: each is encoded once
    features: list[Tensor] = []
    rows_of: list[int] = []
    ends: list[int] = []
    for image in tqdm(images, desc=f"features of {annotations.stem}", unit="clip", disable=None):
        frames = video.frames(annotations.parent / image["file_name"], SECONDS)
        pixels = [load(frame.image, encoder.preprocess)[0] for frame in frames]
        new = [picture for picture in pixels if picture.tobytes() not in known]
        known.update({picture.tobytes(): len(known) + i for i, picture in enumerate(new)})
        if new:
            with torch.inference_mode():
                found = compute(encoder.network, torch.from_numpy(np.stack(new)), encoder.preprocess)
            features.append(found.half())
        rows_of += [known[picture.tobytes()] for picture in pixels]
        ends.append(len(rows_of))
    everything = torch.cat(features)[torch.tensor(rows_of)]
    return Clips(everything, ends, captions, [image["kind"] for image in images], order)


# --------------------------------------------------------------------------------------------------
# Variants, how they learn, and what they got right


NOTHING = FrameConfig()


@dataclass(frozen=True)
class Variant:
    """A way to see frames in time.

    Attributes:
        attention: to several frames, as ``decoder.frames``.
        frames: the frame encoder.
        decides: a bar depends on it, so it is trained with every seed.
    """

    attention: str
    frames: FrameConfig = NOTHING
    decides: bool = True

    @property
    def name(self) -> str:
        """Say it in words."""
        reads = "nothing"
        if self.frames.cell != "none":
            way = "bidirectional" if self.frames.bidirectional else "forward"
            reads = f"{way} {self.frames.cell} over {self.frames.over}"
        elif self.frames.positions:
            reads = "learned positions"
        return f"{reads}, {self.attention}"

    @property
    def reader(self) -> bool:
        """Whether a recurrent network reads the frames."""
        return self.frames.cell != "none"


def variants() -> list[Variant]:
    """Return what is compared."""
    found = [Variant(attention) for attention in ("mean", "joint", "factorised")]
    attentions = ("joint", "factorised")
    found += [Variant(attention, FrameConfig(positions=POSITIONS), decides=False) for attention in attentions]
    for bidirectional in (False, True):
        for over in OVER:
            for cell in ("gru", "lstm"):
                frames = FrameConfig(
                    cell=cell, over=over, bidirectional=bidirectional, width=128, positions=POSITIONS
                )
                decides = cell == "gru" and over == "cells"
                found += [Variant(attention, frames, decides) for attention in attentions]
    return found


@dataclass(frozen=True)
class Score:
    """How well a model captions a split, in shares.

    Attributes:
        exact: captions without a mistake.
        order: order words.
        kinds: of each kind: exact captions, order words.
    """

    exact: float
    order: float
    kinds: dict[str, tuple[float, float]]


def train(
    variant: Variant,
    encoder: Encoder,
    clips: Clips,
    epochs: int,
    seed: int = 0,
    rate: float = 4e-3,
    batch: int = 32,
) -> CaptionModel:
    """Learn the captions with teacher forcing: AdamW, a linear warm-up, then a cosine.

    Not the loop of ``captioner train``, which scores every epoch with Java's tokenizer and writes
    checkpoints: dozens of models of a minute each are trained here.
    """
    torch.manual_seed(seed)
    chance = random.Random(seed)
    decoder = DecoderConfig(
        hidden=128,
        embedding=64,
        cells=128,
        attention_width=64,
        frame_attention_width=64,
        dropout=0.1,
        frames=variant.attention,
    )
    tokenizer = WordTokenizer.build(clips.captions, min_count=1)
    model = CaptionModel(encoder, decoder, tokenizer, variant.frames)
    learned = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    optimiser = torch.optim.AdamW(learned, rate, weight_decay=0.01)
    steps = epochs * math.ceil(len(clips) / batch)
    targets = [[*tokenizer.encode(caption), END] for caption in clips.captions]
    loss_config = LossConfig(label_smoothing=0.0)
    model.train()
    step = 0
    for _ in range(epochs):
        shuffled = chance.sample(range(len(clips)), len(clips))
        for at in range(0, len(clips), batch):
            rows = sorted(shuffled[at : at + batch], key=lambda row: -len(targets[row]))
            lengths = torch.tensor([len(targets[row]) for row in rows])
            tokens = pad_sequence(
                [torch.tensor([START, *targets[row]]) for row in rows], batch_first=True, padding_value=PAD
            )
            output = model(model.look(*clips.batch(rows)), tokens, lengths)
            loss = caption_loss(
                output, tokens[:, 1:], loss_config, tokens=int(lengths.sum()), captions=len(rows)
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 5.0)
            share = min((step + 1) / (0.05 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimiser.param_groups:
                group["lr"] = share * rate
            optimiser.step()
            step += 1
    return model.eval()


@torch.inference_mode()
def evaluate(model: CaptionModel, clips: Clips, batch: int = 64) -> Score:
    """Caption every clip greedily and compare with what is true."""
    options = SearchOptions(beam=1, no_repeat_ngram=0, alternatives=1)
    found: dict[str, list[tuple[int, int, int]]] = {}
    for at in range(0, len(clips), batch):
        rows = range(at, min(at + batch, len(clips)))
        hypotheses = search(model.decoder, model.look(*clips.batch(rows)), options)
        for row, (best,) in zip(rows, hypotheses, strict=True):
            said, true = detokenize(model.tokenizer, best.tokens).split(), clips.captions[row].split()
            hits = sum(said[place : place + 1] == [true[place]] for place in clips.order[row])
            found.setdefault(clips.kinds[row], []).append((said == true, hits, len(clips.order[row])))

    def shares(rows: Sequence[tuple[int, int, int]]) -> tuple[float, float]:
        exact, hits, words = (sum(column) for column in zip(*rows, strict=True))
        return exact / len(rows), hits / words

    whole = [row for rows in found.values() for row in rows]
    return Score(*shares(whole), {kind: shares(found[kind]) for kind in KINDS if kind in found})


# --------------------------------------------------------------------------------------------------
# The comparison


@dataclass(frozen=True)
class Settings:
    """How much is learned from, how long, and how often.

    Attributes:
        clips: at least so many in each split.
        epochs: over the training clips.
        seeds: of the variants that decide.
        more_seeds: of the others.
    """

    clips: dict[str, int]
    epochs: int
    seeds: int
    more_seeds: int


WHOLE = Settings({"train": 9000, "validation": 400, "test": 600}, epochs=9, seeds=3, more_seeds=1)
SMALL = Settings({"train": 3000, "validation": 100, "test": 200}, epochs=6, seeds=1, more_seeds=0)


FEW = (
    *("nothing, mean", "nothing, joint"),
    *("forward gru over cells, factorised", "bidirectional gru over cells, factorised"),
)
"""The variants of ``--small``."""


@dataclass(frozen=True)
class Result:
    """What one training gave: scores on both splits, and the minutes of processor time it took."""

    validation: Score
    test: Score
    minutes: float


def run(folder: Path, variant: Variant, epochs: int, seed: int) -> Result:
    """Train a variant on the features in a folder, with one thread, and score it."""
    torch.set_num_threads(1)
    clips = {split: load_features(folder, split) for split in SPLITS}
    encoder = Encoder("efficientnet_lite0")  # only its width is needed
    encoder.width = clips["train"].frames.shape[-1]
    begun = time.process_time()
    model = train(variant, encoder, clips["train"], epochs, seed)
    minutes = (time.process_time() - begun) / 60
    return Result(evaluate(model, clips["validation"]), evaluate(model, clips["test"]), minutes)


def save_features(folder: Path, split: str, clips: Clips) -> None:
    """Write the features of a split."""
    part = folder / f"{split}.part"
    torch.save(vars(clips), part)
    part.replace(folder / f"{split}.pt")


def load_features(folder: Path, split: str) -> Clips:
    """Read what `save_features` wrote; the features stay on disk until they are used."""
    return Clips(**torch.load(folder / f"{split}.pt", mmap=True, weights_only=True))


def compare(
    folder: Path, chosen: Sequence[Variant], settings: Settings, processes: int
) -> dict[Variant, list[Result]]:
    """Train every variant with every seed, a process each, and tell of each as it ends."""
    jobs = [
        (variant, seed)
        for seed in range(settings.seeds)
        for variant in chosen
        if seed < (settings.seeds if variant.decides else settings.more_seeds)
    ]
    results: dict[Variant, list[Result]] = {}

    def take(variant: Variant, seed: int, result: Result) -> None:
        results.setdefault(variant, []).append(result)
        score = result.test
        print(
            f"  {variant.name}, seed {seed}: {100 * score.exact:.1f} % exact, order words "
            f"{100 * score.order:.1f} %, {result.minutes:.1f} minutes",
            flush=True,
        )

    if processes == 1:
        for variant, seed in jobs:
            take(variant, seed, run(folder, variant, settings.epochs, seed))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            waiting = {pool.submit(run, folder, v, settings.epochs, seed): (v, seed) for v, seed in jobs}
            for done in as_completed(waiting):
                take(*waiting[done], done.result())
    return {variant: results[variant] for variant in chosen if variant in results}


def report(results: dict[Variant, list[Result]], test: Clips, small: bool) -> bool:
    """Print the table, the bars, and what to choose; return whether the bars hold.

    Few clips do not make captions exact, nor teach the blind to name what they see: ``small`` asks only that
    these are not above chance.
    """
    kinds = list(dict.fromkeys(test.kinds))
    kinds.sort(key=list(KINDS).index)
    print(f"\n{len(test)} test clips; per cent: the mean over seeds (lowest to highest), or of one seed")
    print(f"{'what reads the frames, attention':<42}{'exact captions':>21}{'order words':>20}", end="")
    print("".join(f"{kind:>8}" for kind in kinds) + " minutes")
    chances = "".join(f"{100 * test.chance(kind):8.1f}" for kind in kinds)
    print(f"{'chance':<42}{'':>21}{100 * test.chance():6.1f}{'':14}{chances}")
    for variant, found in results.items():
        exact, order = [r.test.exact for r in found], [r.test.order for r in found]
        of_kinds = "".join(
            f"{100 * statistics.mean(r.test.kinds[kind][1] for r in found):8.1f}" for kind in kinds
        )
        minutes = statistics.mean(r.minutes for r in found)
        print(f"{variant.name:<42}{_spread(exact):>21}{_spread(order):>20}{of_kinds}{minutes:8.1f}")
    print("under a kind: its order words; minutes: of one core, to train\n")
    holds = True
    for variant, found in results.items():
        if not variant.frames.active:
            apart = [r.test.order - test.chance() for r in found]
            away = max(apart if small else map(abs, apart))
            what = f"{variant.name}: most points {'above' if small else 'away from'} chance"
            holds &= common.verdict(what, 100 * away, at_most=5)
        elif variant.reader and variant.decides and not small:
            right = statistics.mean(r.test.exact for r in found)
            holds &= common.verdict(f"{variant.name}: % exact", 100 * right, at_least=95)
    for bidirectional in (False, True):
        readers = {
            v: (statistics.mean(r.validation.exact for r in found), statistics.mean(r.minutes for r in found))
            for v, found in results.items()
            if v.reader and v.frames.bidirectional == bidirectional
        }
        if readers:
            best = max(exact for exact, _ in readers.values())
            good = [v for v, (exact, _) in readers.items() if exact >= best - 0.01]
            choice = min(good, key=lambda v: readers[v][1])
            whom = "the whole clip is there" if bidirectional else "a stream is captioned live"
            print(
                f"where {whom}: {choice.name}, the quickest within a point of the most exact captions on "
                f"validation clips ({100 * readers[choice][0]:.1f} %)"
            )
    return holds


def _spread(values: Sequence[float]) -> str:
    text = f"{100 * statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ({100 * min(values):.1f}-{100 * max(values):.1f})"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return 0 if the bars hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="few clips, one seed, few variants: minutes")
    parser.add_argument("--only", default="", help="only the variants with this in their names")
    parser.add_argument("--folder", type=Path, help="keep clips and features there, and use them again")
    parser.add_argument("--processes", type=common.positive, default=2)
    options = parser.parse_args(arguments)
    settings = SMALL if options.small else WHOLE
    chosen = [v for v in variants() if options.only in v.name and (v.name in FEW or not options.small)]
    if not chosen:
        raise common.wrong_use(f"no variant has {options.only!r} in its name")
    begun = time.monotonic()
    common.print_machine(f"{options.processes} processes of one")
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder / ("small" if options.small else "whole")
        if not all((folder / f"{split}.pt").exists() for split in SPLITS):
            torch.set_num_threads(options.processes)
            paths = write_clips(folder, settings.clips)
            encoder = make_encoder(paths["train"])
            for split, path in paths.items():
                save_features(folder, split, read_clips(path, encoder))
        clips = {split: load_features(folder, split) for split in SPLITS}
        counts = ", ".join(f"{len(clips[split])} for {split}" for split in SPLITS)
        print(f"clips: {counts}; {(time.monotonic() - begun) / 60:.1f} minutes so far", flush=True)
        describe(clips["test"])
        results = compare(folder, chosen, settings, options.processes)
        holds = report(results, clips["test"], options.small)
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes in all")
    return 0 if holds else 1


def describe(clips: Clips) -> None:
    """Print of each kind a caption, its order words, and the chance of each to be right."""
    for kind in KINDS:
        if kind in clips.kinds:
            row = clips.kinds.index(kind)
            words = clips.captions[row].split()
            marked = " ".join(w.upper() if place in clips.order[row] else w for place, w in enumerate(words))
            each = ", ".join(f"{100 * share:.0f}" for share in clips.order[row].values())
            print(f"  {kind}: {marked} (chance at its order words: {each} %)")


if __name__ == "__main__":
    sys.exit(main())
