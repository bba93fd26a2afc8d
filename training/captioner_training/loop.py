"""The training loop: teacher-forced cross-entropy in stages, validated on generated captions, resumable."""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captioner import checkpoint
from captioner.decoder import Memory
from captioner.encoder import ENCODERS, Encoder, encode, fuse, photo_mask
from captioner.images import Fit
from captioner.model import CaptionModel
from captioner.search import SearchOptions
from captioner.tokenizer import END, PAD, START, BpeTokenizer, Tokenizer, WordTokenizer
from captioner_training.config import StageConfig, TrainingConfig
from captioner_training.data import DataSet, chunks, load_data_set
from captioner_training.evaluate import generate
from captioner_training.features import FeatureCache, ahead, load_pixels
from captioner_training.losses import caption_loss
from captioner_training.metrics import Scorer

LONGEST = 40
"""Training captions are cut to this many tokens."""


@dataclass(frozen=True, eq=False)
class Batch:
    """N captions of P pictures, longest caption first.

    picture ``(N,)`` tells whose caption each is; tokens ``(N, T + 1)`` from start to end and padding;
    lengths ``(N,)`` number of predictions. Features ``(P, R, D)`` come from the cache, or pixels
    ``(P, 3, S, S)`` uint8 when the encoder is trained; mask ``(P, R)``.
    """

    features: Tensor | None
    pixels: Tensor | None
    fits: list[Fit]
    mask: Tensor
    picture: Tensor
    tokens: Tensor
    lengths: Tensor


def train(
    config: TrainingConfig,
    data_folder: Path,
    output: Path,
    *,
    cache_folder: Path | None = None,
    device: str = "cpu",
) -> Path:
    """Train a captioner and return the path of the best checkpoint.

    The state is saved in ``output`` after every epoch and every few minutes; the same call goes on from
    there. ``log.jsonl`` gets a line for each epoch.

    Args:
        config: the experiment.
        data_folder: paths in the config are relative to it.
        output: folder for checkpoint, state and log.
        cache_folder: for cached features; ``output/cache`` if None. It may be shared by experiments.
        device: where to train.

    Raises:
        DataError, EncoderError: for data or weights that cannot be used.
    """
    output.mkdir(parents=True, exist_ok=True)
    cache_folder = cache_folder or output / "cache"
    used = {name for stage in config.stages for name in stage.sources}
    sources = {n: load_data_set(n, c, data_folder) for n, c in config.data.sources.items() if n in used}
    validation = {n: load_data_set(n, c, data_folder) for n, c in config.data.validation.items()}

    torch.manual_seed(config.seed)
    encoder = build_encoder(config)
    tokenizer = build_tokenizer(config, sources)
    model = CaptionModel(encoder, config.decoder.build(), tokenizer).to(device)
    targets = {
        name: [[tokenizer.encode(c)[: LONGEST - 1] for c in p.captions] for p in data.pictures]
        for name, data in sources.items()
    }
    cached = {n for stage in config.stages if not stage.trainable_blocks for n in stage.sources}
    caches = {
        n: FeatureCache(cache_folder, sources[n], encoder, config.flips).build() for n in sorted(cached)
    }
    validation_caches = {
        n: FeatureCache(cache_folder, data, encoder, False).build() for n, data in validation.items()
    }
    scorers = {n: Scorer(data.references()) for n, data in validation.items()}
    best_path = output / "model.safetensors"
    state_path = output / "state.pt"

    progress = {"stage": 0, "epoch": 0, "step": 0, "best": -math.inf}
    resumed: dict[str, Any] | None = None
    if state_path.exists():
        resumed = torch.load(state_path, weights_only=True, map_location=device)
        progress = dict(resumed["progress"])
        model.load_state_dict(resumed["model"])

    encoder_changed = any(stage.trainable_blocks for stage in config.stages[: progress["stage"]])
    for stage_index, stage in enumerate(config.stages):
        if stage_index < progress["stage"]:
            continue
        encoder.freeze(stage.trainable_blocks)
        network = fold_frozen(encoder, stage.trainable_blocks) if stage.trainable_blocks else None
        encoder_changed = encoder_changed or network is not None
        optimiser = build_optimiser(model, stage)
        average = Average(model, stage.average)
        if resumed is not None:
            optimiser.load_state_dict(resumed["optimiser"])
            average.load_state_dict(resumed["average"])
            torch.set_rng_state(resumed["random"].cpu())
            resumed = None
        pictures = [
            (name, i)
            for name, times in stage.sources.items()
            for i in range(len(sources[name]))
            for _ in range(times)
        ]
        steps = math.ceil(len(pictures) / stage.batch_pictures)
        last_save = time.monotonic()
        for epoch in range(progress["epoch"], stage.epochs):
            order = random.Random(f"{config.seed} {stage_index} {epoch}")
            shuffled = order.sample(pictures, len(pictures))
            batches = list(chunks(range(len(shuffled)), stage.batch_pictures))[progress["step"] :]

            def prepare(rows: Sequence[int], epoch: int = epoch, shuffled: Any = shuffled) -> Batch:
                chosen = [shuffled[i] for i in rows]
                seed = f"{config.seed} {stage_index} {epoch} {rows[0]}"  # noqa: B023 (used within this epoch)
                return make_batch(
                    chosen, sources, targets, caches, encoder, config, stage, random.Random(seed)
                )  # noqa: B023

            model.train()
            started, losses = time.monotonic(), []
            bar = tqdm(
                total=steps,
                initial=progress["step"],
                desc=f"{stage.name} {epoch + 1}/{stage.epochs}",
                unit="batch",
            )
            with bar:
                for batch in ahead(prepare, batches):
                    rate = schedule(stage, epoch * steps + progress["step"], stage.epochs * steps)
                    for group in optimiser.param_groups:
                        group["lr"] = rate * group["peak"]
                    memory = remember(model, batch, network)
                    out = model(memory, batch.tokens.to(device), batch.lengths.to(device))
                    loss = caption_loss(
                        out, batch.tokens[:, 1:].to(device), batch.lengths.to(device), config.loss
                    )
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(average.parameters, stage.clip)
                    optimiser.step()
                    average.update()
                    losses.append(float(loss.detach()))
                    progress["step"] += 1
                    bar.update()
                    bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
                    if time.monotonic() - last_save > 60 * config.save_minutes:
                        save_state(state_path, model, optimiser, average, progress)
                        last_save = time.monotonic()

            model.eval()
            with average.applied():
                scores = validate(model, validation, validation_caches, scorers, config, encoder_changed)
                mean = sum(s["CIDEr"] for s in scores.values()) / len(scores)
                if mean > progress["best"]:
                    progress["best"] = mean
                    summary = summarise(config, sources, stage, epoch, scores)
                    checkpoint.save(best_path, model, header(config, model, tokenizer, summary))
            record = {
                "stage": stage.name,
                "epoch": epoch + 1,
                "loss": round(sum(losses) / max(1, len(losses)), 4),
                "minutes": round((time.monotonic() - started) / 60, 2),
                "validation": {n: {k: round(v, 4) for k, v in s.items()} for n, s in scores.items()},
                "best": round(progress["best"], 4),
            }
            with (output / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            tqdm.write(json.dumps(record))
            progress.update(epoch=epoch + 1, step=0)
            save_state(state_path, model, optimiser, average, progress)
        average.copy_to_model()  # the next stage goes on from the averaged weights
        progress.update(stage=stage_index + 1, epoch=0, step=0)
    return best_path


def build_encoder(config: TrainingConfig) -> Encoder:
    """Return the pretrained encoder with the config's input size and fit."""
    encoder = Encoder(config.encoder.name, pretrained=True)
    preprocess = encoder.preprocess
    if config.encoder.size is not None or config.encoder.fit is not None:
        preprocess = replace(
            preprocess,
            size=config.encoder.size or preprocess.size,
            fit=config.encoder.fit or preprocess.fit,
            resize=preprocess.resize if config.encoder.fit in (None, "crop") else None,
        )
        network = encoder.network
        encoder = Encoder(config.encoder.name, preprocess=preprocess)
        encoder.network.load_state_dict(network.state_dict())
    return encoder


def build_tokenizer(config: TrainingConfig, sources: dict[str, DataSet]) -> Tokenizer:
    """Learn the vocabulary from the captions of the training sources alone."""
    sentences = [c for data in sources.values() for p in data.pictures for c in p.captions]
    if config.tokenizer.kind == "bpe":
        return BpeTokenizer.build(sentences, size=config.tokenizer.size)
    return WordTokenizer.build(
        sentences, min_count=config.tokenizer.min_count, max_size=config.tokenizer.max_size
    )


def fold_frozen(encoder: Encoder, trainable: int) -> nn.Sequential:
    """Return the encoder's network with its frozen lower blocks folded for speed and the trained ones as they are."""
    count = len(encoder.network) - trainable
    lower = fuse(copy.deepcopy(encoder.network[:count])).eval().to(memory_format=torch.channels_last)
    return nn.Sequential(*lower.requires_grad_(False), *encoder.network[count:])


def build_optimiser(model: CaptionModel, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW; no decay for biases, norms and embeddings; the encoder has its own learning rate."""
    groups = []
    for module, rate in ((model.decoder, stage.learning_rate), (model.encoder, stage.encoder_learning_rate)):
        trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        decayed = [p for n, p in trained if p.dim() > 1 and "embedding" not in n]
        plain = [p for n, p in trained if p.dim() <= 1 or "embedding" in n]
        for parameters, decay in ((decayed, stage.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "peak": rate})
    return torch.optim.AdamW(groups, lr=stage.learning_rate)


def schedule(stage: StageConfig, step: int, steps: int) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, then a cosine."""
    warmup = stage.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    position = (step - warmup) / max(1.0, steps - warmup)
    return stage.final + (1 - stage.final) * 0.5 * (1 + math.cos(math.pi * position))


class Average:
    """Exponential moving average of the trained weights; its horizon grows at first."""

    def __init__(self, model: CaptionModel, decay: float) -> None:
        self.decay = decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.parameters]
        self.updates = 0

    def update(self) -> None:
        """Move the average towards the present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the model for a while."""
        kept = [p.detach().clone() for p in self.parameters]
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([p.detach() for p in self.parameters], kept)

    def copy_to_model(self) -> None:
        """Put the averaged weights into the model for good."""
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.parameters], self.values)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and a number."""
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        torch._foreach_copy_(self.values, state["values"])
        self.updates = state["updates"]


def make_batch(
    chosen: Sequence[tuple[str, int]],
    sources: dict[str, DataSet],
    targets: dict[str, list[list[list[int]]]],
    caches: dict[str, FeatureCache],
    encoder: Encoder,
    config: TrainingConfig,
    stage: StageConfig,
    chance: random.Random,
) -> Batch:
    """Gather features or pixels and captions of the chosen pictures; every random choice is ``chance``'s."""
    flipped = [config.flips and chance.random() < 0.5 for _ in chosen]
    rows: list[tuple[int, list[int]]] = []
    for position, (name, index) in enumerate(chosen):
        captions = targets[name][index]
        some = chance.sample(captions, min(stage.captions_per_picture, len(captions)))
        rows += [(position, caption) for caption in some]
    rows.sort(key=lambda row: -len(row[1]))
    lengths = torch.tensor([len(caption) + 1 for _, caption in rows])
    tokens = torch.full((len(rows), int(lengths[0]) + 1), PAD)
    for i, (_, caption) in enumerate(rows):
        tokens[i, : len(caption) + 2] = torch.tensor([START, *caption, END])
    features = pixels = None
    fits: list[Fit] = []
    if stage.trainable_blocks:
        loaded = [load_pixels(sources[name], [index], encoder) for name, index in chosen]
        pictures = [
            augment(p[0], flip, stage.crop, chance) for (p, _), flip in zip(loaded, flipped, strict=True)
        ]
        pixels = torch.stack(pictures)
        fits = [f[0] for _, f in loaded]
        mask = torch.tensor([photo_mask(encoder.grid, fit) for fit in fits])
    else:
        parts = [caches[n].read([i], [int(f)]) for (n, i), f in zip(chosen, flipped, strict=True)]
        features = torch.cat(parts)
        mask = torch.cat([caches[n].mask([i]) for n, i in chosen])
    return Batch(features, pixels, fits, mask, torch.tensor([p for p, _ in rows]), tokens, lengths)


def augment(pixels: Tensor, flip: bool, crop: float, chance: random.Random) -> Tensor:
    """Mirror and crop one picture ``(3, S, S)`` uint8; a crop is resized back to S."""
    if flip:
        pixels = pixels.flip(-1)
    if crop < 1:
        side = pixels.shape[-1]
        height, width = (round(side * chance.uniform(crop, 1)) for _ in range(2))
        top, left = chance.randint(0, side - height), chance.randint(0, side - width)
        part = pixels[None, :, top : top + height, left : left + width].float()
        part = nn.functional.interpolate(part, (side, side), mode="bilinear", align_corners=False)
        pixels = part[0].round().clamp(0, 255).to(torch.uint8)
    return pixels


def remember(model: CaptionModel, batch: Batch, network: nn.Module | None) -> Memory:
    """Return the decoder's memory with one row for each caption of the batch."""
    device = model.device
    if batch.pixels is not None:
        features = encode(model.encoder, batch.pixels, batch.fits, network).data[:, 0]
    else:
        assert batch.features is not None
        features = batch.features.to(device)
    return model.decoder.memory(features, batch.mask.to(device)).select(batch.picture.to(device))


def validate(
    model: CaptionModel,
    validation: dict[str, DataSet],
    caches: dict[str, FeatureCache],
    scorers: dict[str, Scorer],
    config: TrainingConfig,
    encoder_changed: bool,
) -> dict[str, dict[str, float]]:
    """Generate a caption for every validation picture and score it."""
    options = SearchOptions(**config.search.model_dump())
    scores = {}
    for name, data in validation.items():
        cache = None if encoder_changed else caches[name]
        captions = generate(model, data, options, cache=cache)
        scores[name] = dict(scorers[name].score(captions, metrics=("BLEU", "METEOR", "CIDEr")).corpus)
    return scores


def summarise(
    config: TrainingConfig,
    sources: dict[str, DataSet],
    stage: StageConfig,
    epoch: int,
    scores: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Return what people may want to know of a checkpoint."""
    return {
        "config": config.name,
        "stage": stage.name,
        "epoch": epoch + 1,
        "encoder_weights": build_note(config),
        "data": {
            name: {
                "pictures": len(data),
                "captions": sum(len(p.captions) for p in data.pictures),
                "note": config.data.sources[name].note,
            }
            for name, data in sources.items()
        },
        "scores": {n: {k: round(v, 4) for k, v in s.items()} for n, s in scores.items()},
    }


def build_note(config: TrainingConfig) -> str:
    """Return where the encoder's first weights come from."""
    return ENCODERS[config.encoder.name]().weights_note


def header(
    config: TrainingConfig, model: CaptionModel, tokenizer: Tokenizer, summary: dict[str, Any]
) -> checkpoint.Header:
    """Return the checkpoint's header."""
    return checkpoint.Header(
        name=config.name,
        encoder=config.encoder.name,
        preprocess=model.encoder.preprocess,
        decoder=model.decoder.config,
        tokenizer=tokenizer.to_dict(),
        search=config.search.model_dump(),
        summary=summary,
    )


def save_state(
    path: Path,
    model: CaptionModel,
    optimiser: torch.optim.Optimizer,
    average: Average,
    progress: dict[str, Any],
) -> None:
    """Save what resuming needs, atomically; it loads without running code."""
    buffer = BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "average": average.state_dict(),
            "random": torch.get_rng_state(),
            "progress": dict(progress),
        },
        buffer,
    )
    checkpoint.write_atomically(path, buffer.getvalue())
