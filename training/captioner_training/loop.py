"""The training loop: teacher-forced cross-entropy in stages, validated on generated captions, resumable."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captioner import checkpoint
from captioner.batch import ahead
from captioner.captioner import choose_device
from captioner.decoder import Memory
from captioner.encoder import ENCODERS, Encoder, cells
from captioner.model import CaptionModel
from captioner.search import SearchOptions
from captioner.tokenizer import END, PAD, START, BpeTokenizer, Tokenizer, WordTokenizer
from captioner_training.config import ConfigError, StageConfig, TrainingConfig
from captioner_training.data import DataSet, chunks, load_data_set
from captioner_training.evaluate import generate
from captioner_training.features import FeatureCache
from captioner_training.losses import caption_loss
from captioner_training.metrics import Scorer
from captioner_training.workers import Workers, run_together

LONGEST = 22
"""Of longer captions the first tokens are learned, without an end."""


@dataclass(frozen=True, eq=False)
class Batch:
    """N captions of P pictures, longest caption first.

    picture ``(N,)`` tells whose caption each is; tokens ``(N, T + 1)`` from start to end and padding;
    lengths ``(N,)`` number of predictions; features ``(P, R', D')`` of the last frozen block of the encoder;
    mask ``(P, R)`` of the grid. It may be one process's share of a batch with ``all_tokens`` predictions and
    ``all_captions`` captions.
    """

    features: Tensor
    mask: Tensor
    picture: Tensor
    tokens: Tensor
    lengths: Tensor
    all_tokens: int
    all_captions: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        moved = {n: getattr(self, n).to(device) for n in ("features", "mask", "picture", "tokens", "lengths")}
        return replace(self, **moved)


def train(
    config: TrainingConfig,
    data_folder: Path,
    output: Path,
    *,
    cache_folder: Path | None = None,
    device: str = "cpu",
    processes: int | None = None,
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
        processes: that share every batch; None for one a core on a CPU, else one.

    Raises:
        DataError, EncoderError: for data or weights that cannot be used.
        ValueError: for a device that is not there.
    """
    device = str(choose_device(device))
    output.mkdir(parents=True, exist_ok=True)
    if processes is None:
        processes = torch.get_num_threads() if device == "cpu" else 1
    experiment = Experiment(config, data_folder, cache_folder or output / "cache")
    experiment.model.to(device)
    experiment.prepare()
    smallest = min(
        min(sum(len(experiment.sources[n]) for n in s.sources), s.batch_pictures) for s in config.stages
    )
    processes = min(processes, smallest)
    run_together(run, processes, config, data_folder, output, cache_folder or output / "cache", device)
    return output / "model.safetensors"


def run(
    workers: Workers, config: TrainingConfig, data_folder: Path, output: Path, cache_folder: Path, device: str
) -> None:
    """Train in one of several processes; see `train`."""
    experiment = Experiment(config, data_folder, cache_folder)
    model, sources, tokenizer = experiment.model.to(device), experiment.sources, experiment.tokenizer
    encoder = model.encoder
    best_path, state_path = output / "model.safetensors", output / "state.pt"
    torch.manual_seed(config.seed * 1000 + workers.rank)  # every process drops other units

    progress: dict[str, Any] = {"stage": 0, "epoch": 0, "step": 0, "best": -math.inf}
    resumed: dict[str, Any] | None = None
    if state_path.exists():
        resumed = torch.load(state_path, weights_only=True, map_location=device)
        progress = dict(resumed["progress"])
        try:
            model.load_state_dict(resumed["model"])
        except RuntimeError as error:
            raise ConfigError(
                f"{state_path} is of another config ({str(error).splitlines()[-1].strip()}): "
                "choose another --output, or delete it to start anew"
            ) from None

    for stage_index, stage in enumerate(config.stages):
        if stage_index < progress["stage"]:
            continue
        encoder.freeze(stage.trainable_blocks)
        trained = encoder.network[len(encoder.network) - stage.trainable_blocks :]
        caches = experiment.caches(stage, workers)
        shape = next(iter(caches.values())).map_shape
        fine_tuned = any(s.trainable_blocks for s in config.stages[: stage_index + 1])
        optimiser = build_optimiser(model, stage)
        average = Average(model, stage.average)
        if resumed is not None:
            optimiser.load_state_dict(resumed["optimiser"])
            average.load_state_dict(resumed["average"])
            if len(resumed["random"]) == workers.count:
                torch.set_rng_state(resumed["random"][workers.rank].cpu())
            resumed = None
        pictures = [
            (name, i)
            for name, times in stage.sources.items()
            for i in range(len(sources[name]))
            for _ in range(times)
        ]
        places = list(chunks(range(len(pictures)), stage.batch_pictures))
        if len(places) > 1 and len(places[-1]) < workers.count:  # nobody may be left without a picture
            places[-2:] = [[*places[-2], *places[-1]]]
        steps = len(places)
        last_save = time.monotonic()
        for epoch in range(progress["epoch"], stage.epochs):
            name = f"{config.seed} {stage_index} {epoch}"
            shuffled = random.Random(name).sample(pictures, len(pictures))
            prepare = partial(make_batch, experiment, caches, stage, workers, name, shuffled)
            model.train()
            started, losses = time.monotonic(), []
            bar = tqdm(
                total=steps,
                initial=progress["step"],
                desc=f"{stage.name} {epoch + 1}/{stage.epochs}",
                unit="batch",
                disable=not workers.first,
            )
            with bar:
                for batch in ahead(prepare, places[progress["step"] :], threads=1):
                    rate = schedule(stage, epoch * steps + progress["step"], stage.epochs * steps)
                    for group in optimiser.param_groups:
                        group["lr"] = rate * group["peak"]
                    batch = batch.to(model.device)
                    memory = remember(model, batch, trained, shape)
                    loss = caption_loss(
                        model(memory, batch.tokens, batch.lengths),
                        batch.tokens[:, 1:],
                        batch.lengths,
                        config.loss,
                        tokens=batch.all_tokens,
                        captions=batch.all_captions,
                    )
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    workers.sum_gradients(average.parameters)
                    nn.utils.clip_grad_norm_(average.parameters, stage.clip)
                    optimiser.step()
                    average.update()
                    losses.append(float(loss.detach()) * batch.all_tokens / int(batch.lengths.sum()))
                    progress["step"] += 1
                    bar.update()
                    bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
                    if progress["step"] % _CHECK_EVERY == 0:
                        due = time.monotonic() - last_save > 60 * config.save_minutes
                        if any(bool(d) for d in workers.gather(torch.tensor([due]))):
                            save_state(state_path, model, optimiser, average, progress, workers)
                            last_save = time.monotonic()

            model.eval()
            record: dict[str, Any] = {
                "stage": stage.name,
                "epoch": epoch + 1,
                "loss": round(sum(losses) / max(1, len(losses)), 4),
                "minutes": round((time.monotonic() - started) / 60, 2),
            }
            if workers.first:
                with average.applied(), workers.all_cores():
                    scores = experiment.validate(model, fine_tuned)
                    mean = sum(s["CIDEr"] for s in scores.values()) / len(scores)
                    if mean > progress["best"]:
                        progress["best"] = mean
                        summary = summarise(config, sources, stage, epoch, scores)
                        checkpoint.save(best_path, model, header(config, model, tokenizer, summary))
                record["validation"] = {n: {k: round(v, 4) for k, v in s.items()} for n, s in scores.items()}
                record["best"] = round(progress["best"], 4)
                with (output / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")
                tqdm.write(json.dumps(record))
            workers.wait()
            progress.update(epoch=epoch + 1, step=0)
            save_state(state_path, model, optimiser, average, progress, workers)
        average.copy_to_model()  # the next stage goes on from the averaged weights
        progress.update(stage=stage_index + 1, epoch=0, step=0)


_CHECK_EVERY = 20


class Experiment:
    """What a config describes, loaded: data sets, tokenizer, a fresh model, targets, caches."""

    def __init__(self, config: TrainingConfig, data_folder: Path, cache_folder: Path) -> None:
        self.config = config
        self.cache_folder = cache_folder
        used = {name for stage in config.stages for name in stage.sources}
        self.sources = {
            n: load_data_set(n, c, data_folder) for n, c in config.data.sources.items() if n in used
        }
        self.validation = {n: load_data_set(n, c, data_folder) for n, c in config.data.validation.items()}
        self.tokenizer = build_tokenizer(config, self.sources)
        torch.manual_seed(config.seed)
        self.model = CaptionModel(build_encoder(config), config.decoder.build(), self.tokenizer)
        blocks = len(self.model.encoder.network)
        for index, stage in enumerate(config.stages):
            if stage.trainable_blocks >= blocks:
                raise ConfigError(
                    f"stages.{index}.trainable_blocks is {stage.trainable_blocks}: {config.encoder.name} has "
                    f"{blocks} blocks, and the first stays frozen"
                )
        self.targets = {
            name: [[[*self.tokenizer.encode(c), END][:LONGEST] for c in p.captions] for p in data.pictures]
            for name, data in self.sources.items()
        }
        self.scorers: dict[str, Scorer] = {}

    def prepare(self) -> None:
        """Compute features with all cores, before processes share the work.

        What the first fine-tuned stage needs can be computed too: it has not changed its frozen blocks.
        """
        for stage in self.config.stages:
            self.caches(stage, Workers())
            if stage.trainable_blocks:
                break
        self.validation_caches()

    def caches(self, stage: StageConfig, workers: Workers) -> dict[str, FeatureCache]:
        """Return what the stage's frozen blocks give for its sources; one process fills the gaps."""
        network = self.model.encoder.network
        blocks = len(network) - stage.trainable_blocks if stage.trainable_blocks else None
        caches = {
            name: FeatureCache(
                self.cache_folder, self.sources[name], self.model.encoder, self.config.flips, blocks
            )
            for name in stage.sources
        }
        for turn in (workers.first, not workers.first):
            if turn:
                for cache in caches.values():
                    cache.build()
            workers.wait()
        return caches

    def validation_caches(self) -> dict[str, FeatureCache]:
        """Return the grid features of the validation pictures under the present encoder."""
        return {
            name: FeatureCache(self.cache_folder, data, self.model.encoder, False).build()
            for name, data in self.validation.items()
        }

    def validate(self, model: CaptionModel, fine_tuned: bool) -> dict[str, dict[str, float]]:
        """Generate a caption for every validation picture and score it."""
        options = SearchOptions(**self.config.search.model_dump())
        scores = {}
        for name, data in self.validation.items():
            if name not in self.scorers:
                self.scorers[name] = Scorer(data.references())
            cache = None if fine_tuned else self.validation_caches()[name]
            captions = generate(model, data, options, cache=cache)
            metrics = self.scorers[name].score(captions, metrics=("BLEU", "METEOR", "CIDEr"), intervals=False)
            scores[name] = dict(metrics.corpus)
        return scores


def build_encoder(config: TrainingConfig) -> Encoder:
    """Return the pretrained encoder with the config's input size and fit."""
    encoder = Encoder(config.encoder.name, pretrained=True)
    preprocess = encoder.preprocess
    if config.encoder.size is not None or config.encoder.fit is not None:
        size = config.encoder.size or preprocess.size
        resize = preprocess.resize if config.encoder.fit in (None, "crop") else None
        preprocess = replace(
            preprocess,
            size=size,
            fit=config.encoder.fit or preprocess.fit,
            resize=None if resize is None else round(resize * size / preprocess.size),
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
    experiment: Experiment,
    caches: dict[str, FeatureCache],
    stage: StageConfig,
    workers: Workers,
    epoch: str,
    pictures: Sequence[tuple[str, int]],
    rows: Sequence[int],
) -> Batch:
    """Gather this process's share of the pictures at ``rows``: features and captions.

    Random choices depend on seed, epoch and place alone, so that a resumed run makes the same ones, with any
    number of processes.
    """
    chance = random.Random(f"{epoch} {rows[0]}")
    chosen = [pictures[i] for i in rows]
    flipped = [int(experiment.config.flips and chance.random() < 0.5) for _ in chosen]
    captions: list[tuple[int, list[int]]] = []
    for position, (name, index) in enumerate(chosen):
        known = experiment.targets[name][index]
        some = chance.sample(known, min(stage.captions_per_picture, len(known)))
        captions += [(position, caption) for caption in some]
    all_tokens, all_captions = sum(len(caption) for _, caption in captions), len(captions)

    # the pictures with the most captions go round first, so that the shares are about equal
    work = [0] * len(chosen)
    for position, caption in captions:
        work[position] += len(caption)
    mine = sorted(range(len(chosen)), key=lambda p: -work[p])[workers.rank :: workers.count]
    place = {position: i for i, position in enumerate(mine)}
    share = [(place[position], caption) for position, caption in captions if position in place]
    share.sort(key=lambda row: -len(row[1]))
    lengths = torch.tensor([len(caption) for _, caption in share])
    tokens = torch.full((len(share), int(lengths[0]) + 1), PAD)
    for i, (_, caption) in enumerate(share):
        tokens[i, : len(caption) + 1] = torch.tensor([START, *caption])
    parts = [caches[chosen[i][0]].read([chosen[i][1]], [flipped[i]]) for i in mine]
    masks = [caches[chosen[i][0]].mask([chosen[i][1]]) for i in mine]
    picture = torch.tensor([i for i, _ in share])
    return Batch(torch.cat(parts), torch.cat(masks), picture, tokens, lengths, all_tokens, all_captions)


def remember(model: CaptionModel, batch: Batch, trained: nn.Sequential, shape: Sequence[int]) -> Memory:
    """Return the decoder's memory, a row for each caption; ``trained`` are the encoder's upper blocks."""
    features = batch.features
    if len(trained):
        features = cells(trained(features.transpose(1, 2).unflatten(2, tuple(shape[1:]))))
    return model.decoder.memory(features, batch.mask).select(batch.picture)


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
    workers: Workers,
) -> None:
    """Save what resuming needs, atomically; it loads without running code."""
    states = workers.gather(torch.get_rng_state())
    if not workers.first:
        return
    buffer = BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "average": average.state_dict(),
            "random": states,
            "progress": dict(progress),
        },
        buffer,
    )
    checkpoint.write_atomically(path, buffer.getvalue())
