"""The training loop: in stages, validated on generated captions, resumable to the bit."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captioner import checkpoint
from captioner.captioner import choose_device
from captioner.encoder import cells
from captioner.model import CaptionModel
from captioner.parallel import ahead
from captioner.search import SearchOptions
from captioner_training.adapt import replace_dropout
from captioner_training.allocator import keep_memory
from captioner_training.batches import Batch, Place, in_order, make_parts
from captioner_training.concepts import word_loss
from captioner_training.config import StageConfig, TrainingConfig
from captioner_training.data import chunks
from captioner_training.experiment import Experiment
from captioner_training.losses import caption_loss
from captioner_training.optimisation import Average, build_optimiser, schedule
from captioner_training.self_critical import self_critical_loss
from captioner_training.state import (
    TrainingError,
    alone_in,
    forget_later,
    load_state,
    save_state,
    take_weights,
)
from captioner_training.tracking import Drawn, Tracker, draw
from captioner_training.workers import Workers, launched, run_together, speaks

_CHECK_EVERY = 20
"""After so many batches losses are read, told, and looked at: reading them makes a GPU wait."""

_DRAWN = 4
"""So many validation pictures are drawn in TensorBoard after every epoch."""


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
        device: where to train; ``auto`` is a CUDA GPU if there is one, else the CPU. Under ``accelerate
            launch`` anything but ``cpu`` is the GPU of each process.
        processes: that share every batch; None for one a core on a CPU, else one. ``accelerate launch``
            decides by itself.

    Raises:
        DataError, EncoderError, ConfigError: for data, weights or combinations that cannot be used.
        TrainingError: if the loss is no longer a number, or the disk is full.
        ValueError: for a device that is not there, or several processes on one GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = str(choose_device(device))
    output.mkdir(parents=True, exist_ok=True)
    cache_folder = cache_folder or output / "cache"
    if launched():
        run(config, data_folder, output, cache_folder, device, prepared=False)
        return output / "model.safetensors"
    if device != "cpu" and processes is not None and processes > 1:
        raise ValueError(
            f"{processes} processes share the cores of a CPU, not {device}: leave --processes out, or start "
            "one for each GPU with accelerate launch -m captioner train"
        )
    if processes is None:
        processes = torch.get_num_threads() if device == "cpu" else 1
    experiment = Experiment(config, data_folder, cache_folder)
    load_state(output / "state.pt", config, experiment.content())  # a mistake there comes before features
    experiment.model.to(device)
    get_ready(experiment)
    smallest = min(sum(len(experiment.sources[n]) for n in s.sources) for s in config.stages)
    del experiment
    run_together(run, min(processes, smallest), config, data_folder, output, cache_folder, device)
    return output / "model.safetensors"


def get_ready(experiment: Experiment) -> None:
    """Compute features before training, and tell what a person should know."""
    experiment.prepare()
    for note in experiment.notes if speaks() else ():
        tqdm.write(note, file=sys.stderr)


def run(
    config: TrainingConfig,
    data_folder: Path,
    output: Path,
    cache_folder: Path,
    device: str = "cpu",
    prepared: bool = True,
) -> None:
    """Train in this process, one of several perhaps; see `train`.

    ``prepared`` says that whoever started it has called `get_ready`.
    """
    keep_memory()
    workers = Workers(device, config.mixed_precision)
    with alone_in(output) if workers.first else nullcontext():
        _run(workers, config, data_folder, output, cache_folder, prepared)


def _run(
    workers: Workers,
    config: TrainingConfig,
    data_folder: Path,
    output: Path,
    cache_folder: Path,
    prepared: bool,
) -> None:
    experiment = Experiment(config, data_folder, cache_folder)
    model = experiment.model.to(workers.device)
    if not prepared:
        get_ready(experiment)
    experiment.know_words()
    content = experiment.content()
    state_path = output / "state.pt"
    resumed = load_state(state_path, config, content)
    if resumed is not None:
        take_weights(state_path, resumed, model)
    if workers.any(resumed is not None) and resumed is None:
        raise TrainingError(
            f"{state_path}: another process found a state there, and this one did not: --output must be a "
            "folder that all machines share"
        )
    best = output / "model.safetensors"
    if resumed is not None and resumed["progress"]["best"] > -math.inf and not best.is_file():
        raise TrainingError(
            f"{best}: the best checkpoint of this run is gone; put it back, choose another --output, or "
            f"delete {state_path} to start anew"
        )
    progress: dict[str, Any] = _BEGINNING if resumed is None else resumed["progress"]
    progress = dict(progress)
    if workers.first:
        forget_later(output / "log.jsonl", progress["logged"])
    if resumed is None and config.start is not None:  # what it starts from may be the best there will be
        validate_and_log(experiment, workers, output, progress, {"stage": "start", "epoch": 0}, False)

    tracker = Tracker(
        output, enabled=config.tensorboard, first=workers.first, first_step=int(progress["total"])
    )
    word_dropout = model.decoder.config.word_dropout
    with tracker:
        for stage_index, stage in enumerate(config.stages):
            if stage_index < progress["stage"]:
                continue
            model.encoder.freeze(stage.trainable_blocks)
            fine_tuned = any(s.trainable_blocks for s in config.stages[: stage_index + 1])
            for known in config.stages[: stage_index + 1]:
                if known.dropout is not None:
                    replace_dropout(model, known.dropout)
            begin_stage(model, stage, bool(experiment.words), word_dropout)
            optimiser = build_optimiser(model, stage)
            average = Average(model, stage.average, stage.average_epochs)
            if resumed is not None:
                optimiser.load_state_dict(resumed["optimiser"])
                average.load_state_dict(resumed["average"])
                resumed = None
            save = partial(save_state, state_path, config, content, model, optimiser, average)
            features = experiment.features(stage)
            loss_of = objective(experiment, stage, next(iter(features.values())).map_shape)
            pictures: list[Place] = [
                (name, i)
                for name, times in stage.sources.items()
                for i in range(len(experiment.sources[name]))
                for _ in range(times)
            ]
            steps = math.ceil(len(pictures) / stage.batch_pictures)
            last_save = time.monotonic()
            for epoch in range(progress["epoch"], stage.epochs):
                name = f"{config.seed} {stage_index} {epoch}"
                batches = list(enumerate(chunks(in_order(pictures, name), stage.batch_pictures)))
                prepare = partial(_prepare, experiment, features, stage, workers, name)
                model.train()
                started = time.monotonic()
                waiting: list[Tensor] = []
                bar = tqdm(
                    total=steps,
                    initial=progress["step"],
                    desc=f"{stage.name} {epoch + 1}/{stage.epochs}",
                    unit="batch",
                    disable=not workers.first,
                )
                with bar, compiled(model, config.compile):
                    for parts in ahead(prepare, batches[progress["step"] :], threads=1):
                        step = epoch * steps + progress["step"]
                        rate = schedule(stage, step, stage.epochs * steps)
                        for group in optimiser.param_groups:
                            group["lr"] = rate * group["peak"]
                        optimiser.zero_grad(set_to_none=True)
                        told = torch.zeros((), device=workers.device)
                        for number, part in enumerate(parts):
                            # not a state to be saved: chance depends on the place in the run alone
                            torch.manual_seed(_seed(f"{name} {progress['step']} {workers.rank} {number}"))
                            with workers.autocast():
                                loss, value = loss_of(part.to(workers.device), step / (stage.epochs * steps))
                            workers.accelerator.backward(loss)
                            told += value
                        told = workers.sum_gradients(average.parameters, told)
                        if stage.clip_value is not None:
                            nn.utils.clip_grad_value_(average.parameters, stage.clip_value)
                        norm = nn.utils.clip_grad_norm_(average.parameters, stage.clip)
                        optimiser.step()
                        average.update()
                        waiting.append(torch.stack((told, norm)))
                        progress["step"] += 1
                        progress["total"] += 1
                        bar.update()
                        if len(waiting) == _CHECK_EVERY or progress["step"] == steps:
                            take_in(waiting, progress, tracker, rate, stage, output)
                            bar.set_postfix(
                                {TOLD[stage.objective]: f"{progress['told'] / progress['step']:.3f}"}
                            )
                            due = time.monotonic() - last_save > 60 * config.save_minutes
                            if progress["step"] < steps and workers.any(due):
                                if workers.first:
                                    save(progress)
                                last_save = time.monotonic()

                model.eval()
                average.end_epoch()
                record = {
                    "stage": stage.name,
                    "epoch": epoch + 1,
                    TOLD[stage.objective]: round(progress["told"] / steps, 6),
                    "gradient_norm": round(progress["norm"] / steps, 4),
                    "learning_rate": rate * stage.learning_rate,
                    "minutes": round((time.monotonic() - started) / 60, 2),
                }
                with average.applied():
                    scores = validate_and_log(experiment, workers, output, progress, record, fine_tuned)
                    tracker.epoch(progress["total"], scores)
                    if tracker.active:
                        tracker.captions(progress["total"], draw_some(experiment))
                    if stage.patience and progress["waited"] == 0:
                        average.keep()
                progress.update(epoch=epoch + 1, step=0, told=0.0, norm=0.0)
                tired = bool(stage.patience) and progress["waited"] >= stage.patience
                if tired:
                    progress["epoch"] = stage.epochs
                if workers.first:
                    save(progress)
                workers.wait()
                if tired:
                    break
            average.copy_to_model(kept=bool(stage.patience))  # what the next stage goes on from
            progress.update(stage=stage_index + 1, epoch=0, step=0, stage_best=-math.inf, waited=0)


def begin_stage(model: CaptionModel, stage: StageConfig, targets: bool, word_dropout: float) -> None:
    """Set what a stage changes about the word memory.

    Args:
        model: changed in place.
        stage: guesses learn where it has cross-entropy, and ``targets``.
        targets: whether there are any to learn from.
        word_dropout: in a self-critical stage none: the words that a caption was drawn from are there when it
            is learned from.
    """
    guesser = model.decoder.guesser
    if guesser is None:
        return
    drawn = stage.objective == "self_critical"
    guesser.requires_grad_(targets and (not drawn or stage.cross_entropy > 0))
    model.decoder.config = replace(model.decoder.config, word_dropout=0.0 if drawn else word_dropout)


_BEGINNING = {
    **{"stage": 0, "epoch": 0, "step": 0, "total": 0, "logged": 0},
    **{"told": 0.0, "norm": 0.0},  # sums over the epoch so far
    **{"best": -math.inf, "stage_best": -math.inf, "waited": 0},
}
"""Where a run is: saved with its state."""


TOLD = {"cross_entropy": "loss", "self_critical": "reward"}
"""What the log tells of each objective."""


def objective(
    experiment: Experiment, stage: StageConfig, shape: tuple[int, ...]
) -> Callable[[Batch, float], tuple[Tensor, Tensor]]:
    """Return what makes a loss of a batch and of the position in the stage, from 0 to 1.

    Of both the loss and the value that the log tells, the parts of a batch add up to the whole.

    Args:
        experiment: the model and its targets.
        stage: says which loss.
        shape: ``(D', H', W')`` of the features that the frozen blocks give.
    """
    model, config = experiment.model, experiment.config
    network = model.encoder.network
    trained = network[len(network) - stage.trainable_blocks :]

    def look(batch: Batch) -> tuple[Tensor, Tensor]:
        """Return features ``(P, F, R, D)`` and their mask ``(P, F, R)``."""
        given, mask = (x.unflatten(1, (batch.frames, -1)) for x in (batch.features, batch.mask))
        if not len(trained):
            return given, mask
        maps = given.flatten(0, 1)
        if batch.frames == 1:
            return cells(trained(maps.transpose(1, 2).unflatten(2, shape[1:])))[:, None], mask
        there = (mask.amax(-1) > 0).flatten().nonzero().squeeze(1)  # nothing is learned from padding
        found = cells(trained(maps[there].transpose(1, 2).unflatten(2, shape[1:])))
        every = found.new_zeros(len(maps), *found.shape[1:]).index_copy(0, there, found)
        return every.unflatten(0, mask.shape[:2]), mask

    def teacher_forced(batch: Batch, position: float) -> tuple[Tensor, Tensor]:
        features, mask = look(batch)
        memory = model.look(features, mask).select(batch.picture)
        styles = None
        if model.decoder.style is not None:
            by_picture = torch.tensor([experiment.styles[name] for name, _ in batch.places])
            styles = by_picture.to(batch.picture.device)[batch.picture]
            if stage.style_dropout:
                styles = styles * (torch.rand(styles.shape, device=styles.device) >= stage.style_dropout)
        output = model(
            memory, batch.tokens, batch.lengths, own=position * stage.scheduled_sampling, styles=styles
        )
        loss = caption_loss(
            output, batch.tokens[:, 1:], config.loss, tokens=batch.all_tokens, captions=batch.all_captions
        )
        told = loss.detach()
        if experiment.words:
            assert config.concepts is not None
            targets = torch.stack([experiment.words[name][i] for name, i in batch.places])
            guesses = model.decoder.guess(features.flatten(1, 2), batch.mask)
            wrong = word_loss(guesses, targets.to(guesses.device)) / batch.all_pictures
            loss = loss + config.concepts.weight * wrong
        return loss, told

    if stage.objective == "cross_entropy":
        return teacher_forced
    judge, begins = experiment.judge(stage)

    def self_critical(batch: Batch, position: float) -> tuple[Tensor, Tensor]:
        features, mask = look(batch)
        model.decoder.eval()  # captions are drawn without dropout
        with torch.no_grad():
            drawn_from = model.look(features, mask)
        model.decoder.train()
        loss, facts = self_critical_loss(
            model,
            model.look(features, mask),
            judge,
            [begins[name] + index for name, index in batch.places],
            drawn_from=drawn_from,
            samples=stage.samples,
            temperature=stage.temperature,
            max_length=config.search.max_length,
            all_captions=batch.all_pictures * stage.samples,
        )
        if stage.cross_entropy:
            loss = loss + stage.cross_entropy * teacher_forced(batch, position)[0]
        return loss, loss.new_tensor(facts["reward"] * len(batch.places) / batch.all_pictures)

    return self_critical


def take_in(
    waiting: list[Tensor],
    progress: dict[str, Any],
    tracker: Tracker,
    rate: float,
    stage: StageConfig,
    output: Path,
) -> None:
    """Read the losses (or rewards) and gradient norms of the last batches, add them up, and empty the list.

    Raises:
        TrainingError: if one is not a number: the weights are spoilt from there on.
    """
    pairs = torch.stack(waiting).tolist()
    first = progress["step"] - len(pairs)
    name = TOLD[stage.objective]
    for number, (told, norm) in enumerate(pairs, 1):
        if not math.isfinite(told) or not math.isfinite(norm):
            what, value = (name, told) if not math.isfinite(told) else ("norm of the gradient", norm)
            saved = (output / "state.pt").exists()
            kept = f"{'the last good state is' if saved else 'nothing was saved yet'} in {output}"
            raise TrainingError(
                f"the {what} is {value} at stage {stage.name!r}, epoch {progress['epoch'] + 1}, batch "
                f"{first + number}: training stopped, {kept}; a lower learning_rate or clip, or a longer "
                "warmup, may help"
            )
        progress["told"] += told
        progress["norm"] += norm
        tracker.step(
            progress["total"] - len(pairs) + number,
            **{name: told, "gradient_norm": norm, "learning_rate": rate * stage.learning_rate},
        )
    waiting.clear()


def validate_and_log(
    experiment: Experiment,
    workers: Workers,
    output: Path,
    progress: dict[str, Any],
    record: dict[str, Any],
    fine_tuned: bool,
) -> dict[str, dict[str, float]]:
    """Validate in the first process, keep the model if it is the best so far, and write a line of the log."""
    scores: dict[str, dict[str, float]] = {}
    if workers.first:
        experiment.model.eval()
        with workers.all_cores():
            scores = experiment.validate(fine_tuned)
        mean = sum(s["CIDEr"] for s in scores.values()) / len(scores)
        if mean > progress["best"]:
            progress["best"] = mean
            header = experiment.header(record["stage"], record["epoch"], scores)
            try:
                checkpoint.save(output / "model.safetensors", experiment.model, header)
            except OSError as error:
                raise TrainingError(
                    f"{output / 'model.safetensors'}: cannot be saved: {error.strerror or error}; what was "
                    "saved before is whole: make room, and give the same command again"
                ) from None
        progress["waited"] = 0 if mean > progress["stage_best"] else progress["waited"] + 1
        progress["stage_best"] = max(progress["stage_best"], mean)
        record["validation"] = {n: {k: round(v, 4) for k, v in s.items()} for n, s in scores.items()}
        record["best"] = round(progress["best"], 4)
        if experiment.partial:
            record["partial"] = experiment.partial
        with (output / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        tqdm.write(json.dumps(record))
    progress["logged"] += 1
    for key in ("best", "stage_best", "waited"):
        progress[key] = workers.tell(progress[key])
    return scores


def draw_some(experiment: Experiment) -> list[Drawn]:
    """Draw a few validation pictures with captions and attention, for TensorBoard."""
    options = SearchOptions(**experiment.config.search.model_dump())
    data = next(iter(experiment.validation.values()))
    return draw(experiment.model, data, options, _DRAWN, frames=experiment.config.video.frames)


@contextmanager
def compiled(model: CaptionModel, wanted: bool) -> Iterator[None]:
    """Compile the decoder's step for a while; validation and checkpoints know nothing of it."""
    if not wanted:
        yield
        return
    decoder: Any = model.decoder
    decoder.unrolled_step = torch.compile(decoder.unrolled_step, dynamic=True)
    try:
        yield
    finally:
        del decoder.unrolled_step


def _prepare(
    experiment: Experiment,
    features: dict[str, Any],
    stage: StageConfig,
    workers: Workers,
    epoch: str,
    batch: tuple[int, list[Place]],
) -> list[Batch]:
    number, chosen = batch
    return make_parts(
        chosen,
        experiment.targets,
        features,
        stage,
        f"{epoch} {number}",
        flips=experiment.config.flips,
        rank=workers.rank,
        count=workers.count,
    )


def _seed(name: str) -> int:
    return random.Random(name).getrandbits(63)
