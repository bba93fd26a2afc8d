"""Train a small grid of models on equal terms, several seeds of each, and write one report about them.

Every run is a process of its own with one thread, in a folder of its own under ``OUTPUT/runs``, whose name
ends with a hash of config and data: what is finished is found again, what was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from pydantic import ValidationError
from tqdm import tqdm

from captioner import __version__, checkpoint
from captioner.captioner import choose_device
from captioner.files import write_atomically
from captioner.model import CaptionModel
from captioner.search import SearchOptions
from captioner.tokenizer import END, PAD, START
from captioner_training import experiment
from captioner_training.adapt import frame_config
from captioner_training.config import ConfigError, SourceConfig, TrainingConfig, _Loader
from captioner_training.data import DataSet, Picture, load_data_set
from captioner_training.evaluate import generate
from captioner_training.experiment import Experiment
from captioner_training.features import FeatureCache
from captioner_training.gradients import gradient_norms
from captioner_training.loop import train
from captioner_training.metrics import Scorer
from captioner_training.report import METRICS, check_matplotlib, phrase_data, summary_table, write_report

DEFAULT_VARY = ("decoder.cell=rnn_tanh,gru,lstm", "decoder.attention=none,dot,additive")
"""The grid if nothing else is asked for."""
REACH = 10
"""How many steps back gradients are followed; captions with fewer words do not count there."""
_GRADIENT_CAPTIONS = 200
_SAME_EVERYWHERE = {"name": "it names the runs", "seed": "use --seeds", "tensorboard": "it changes nothing"}


def default_config() -> Path:
    """Return the path of the comparison that is made if no config is given.

    Raises:
        ConfigError: if it did not come along with the installation.
    """
    for path in (
        Path(__file__).with_name("compare.yaml"),
        Path(__file__).parents[2] / "configs/compare.yaml",
    ):
        if path.is_file():
            return path
    raise ConfigError("the default config is not installed: give a CONFIG such as configs/compare.yaml")


@dataclass(frozen=True)
class Run:
    """One training of the grid: what distinguishes it, and its whole config."""

    key: str
    settings: dict[str, Any]
    seed: int
    config: TrainingConfig

    def describe(self) -> str:
        """Return a phrase for people."""
        return ", ".join([*map(_plain, self.settings.values()), f"seed {self.seed}"])


@dataclass(frozen=True)
class Comparison:
    """What `compare` did.

    Attributes:
        report: the HTML file; None if no run finished.
        finished: how many runs of the grid are finished.
        failures: run -> why it failed, one line each.
    """

    report: Path | None
    finished: int
    failures: dict[str, str]


# --------------------------------------------------------------------------------------------------
# the grid


def parse_vary(options: Sequence[str]) -> dict[str, list[Any]]:
    """Read ``KEY=VALUE,VALUE,…``, with values as in YAML.

    Raises:
        ConfigError: if an option is not of that form, or the same key or value comes twice.
    """
    grid: dict[str, list[Any]] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip()
        if not key or not equals or not text.strip():
            raise ConfigError(f"--vary {option}: expected KEY=VALUE,VALUE,… such as decoder.cell=gru,lstm")
        try:
            values = yaml.load(f"[{text}]", _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--vary {option}: not values as in YAML: {str(error).splitlines()[0]}"
            ) from None
        if key in grid:
            raise ConfigError(f"--vary {key} is given twice: give all of its values in one list")
        if key in _SAME_EVERYWHERE:
            raise ConfigError(f"--vary {key}: {_SAME_EVERYWHERE[key]}")
        for index, value in enumerate(values):
            if _plain(value) in map(_plain, values[:index]):  # where 1 is not true
                raise ConfigError(f"--vary {option}: {_plain(value)} comes twice")
        grid[key] = values
    return grid


def with_values(config: TrainingConfig, values: Mapping[str, Any]) -> TrainingConfig:
    """Return the config with other values at dotted keys; numbers are places in lists.

    Raises:
        ConfigError: one line that names the key, if it is unknown or the value does not fit.
    """
    raw: Any = config.model_dump()
    for key, value in values.items():
        *parents, last = key.split(".")
        place: Any = raw
        for parent in parents:
            place = _within(place, parent, key)
        if isinstance(place, list):
            _within(place, last, key)
            place[int(last)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise ConfigError(f"--vary {key}: unknown key")
    try:
        return TrainingConfig.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        chosen = ", ".join(f"{key}={_plain(value)}" for key, value in values.items())
        place_of_it = "" if where in ("", chosen.partition("=")[0]) else f"{where}: "
        raise ConfigError(f"--vary {chosen}: {place_of_it}{message.removeprefix('Value error, ')}") from None


def _within(place: Any, name: str, key: str) -> Any:
    """Step into a mapping or list of a plain config; a section that is left out begins empty."""
    if isinstance(place, dict) and name in place:
        if place[name] is None:
            place[name] = {}
        return place[name]
    if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
        return place[int(name)]
    raise ConfigError(f"--vary {key}: unknown key ({name!r} is not there)")


def make_grid(config: TrainingConfig, vary: Mapping[str, Sequence[Any]], seeds: int, data: str) -> list[Run]:
    """Return all runs: every combination of the values, with as many seeds, counted from the config's.

    Where the direction of a frame encoder varies and there is none (``video.cell`` none), one of the two is
    left out. All combinations of the first seed come first, so that an interrupted comparison has whole
    grids.

    Args:
        config: what all have in common.
        vary: dotted key -> its values.
        seeds: how many of each.
        data: a hash of the data; part of the runs' names.

    Raises:
        ConfigError: for an unknown key, a wrong value or an impossible combination.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: expected at least 1")
    runs = []
    directions = vary.get("video.bidirectional", ())
    for seed in range(config.seed, config.seed + seeds):
        for values in itertools.product(*vary.values()):
            settings = dict(zip(vary, values, strict=True))
            cell = settings.get("video.cell", config.video.cell)
            if cell == "none" and settings.get("video.bidirectional") is True and len(directions) > 1:
                continue
            name = "-".join([*(_slug(_plain(value)) for value in values), f"seed{seed}"])
            changed = with_values(config, settings).model_copy(
                update={"name": f"{config.name} {name}", "seed": seed, "tensorboard": False}
            )
            content = json.dumps([changed.model_dump(exclude={"name"}), data], sort_keys=True)
            digest = hashlib.sha256(content.encode()).hexdigest()[:8]
            runs.append(Run(f"{name}-{digest}", settings, seed, changed))
    return runs


def _plain(value: Any) -> str:
    """Return a value as people write it in YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.")[:40] or "_"


# --------------------------------------------------------------------------------------------------
# the data


def take_part(
    config: TrainingConfig, data_folder: Path, folder: Path, pictures: int, validation_pictures: int
) -> TrainingConfig:
    """Write annotations of random pictures of each set, and return the config that uses these instead.

    The choice depends on the config's seed and the set's name alone. 0 leaves a set as it is.
    """
    raw = config.model_dump()
    for kind, count in (("sources", pictures), ("validation", validation_pictures)):
        for name, source in getattr(config.data, kind).items():
            data = load_data_set(name, source, data_folder)
            if not 0 < count < len(data):
                continue
            chosen = set(random.Random(f"{config.seed} {name}").sample(range(len(data)), count))
            part = [p for i, p in enumerate(data.pictures) if i in chosen]
            # where the pictures are: what the config says, else what `captioner prepare` noted
            annotations = (data_folder / source.annotations).absolute()
            info = json.loads(annotations.read_text(encoding="utf-8-sig")).get("info") or {}
            base, places = data_folder.absolute(), source.images
            if not places:
                base, places = annotations.parent, info.get("images", [])
            content: dict[str, Any] = {
                "info": {**info, "images": [str(base / place) for place in places], "media": data.media},
                "images": [_entry(p) for p in part],
                "annotations": [
                    {"id": number, "image_id": image, "caption": caption}
                    for number, (image, caption) in enumerate((p.id, c) for p in part for c in p.captions)
                ],
            }
            folder.mkdir(parents=True, exist_ok=True)
            path = (folder / f"{_slug(name)}-{count}.json").absolute()
            write_atomically(path, json.dumps(content, ensure_ascii=False).encode())
            raw["data"][kind][name] = {
                "annotations": str(path),
                "images": content["info"]["images"],
                "note": source.note,
                "style": source.style,
            }
    return TrainingConfig.model_validate(raw)


def _entry(picture: Picture) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": picture.id, "file_name": picture.file}
    return {**entry, "start": picture.start, "end": picture.end} if picture.part else entry


def describe_data(
    config: TrainingConfig, data_folder: Path, original: TrainingConfig
) -> list[dict[str, Any]]:
    """Load the sets once, so that mistakes show before anything is trained, and count what is used.

    Args:
        config: what is trained on.
        data_folder: paths in the config are relative to it.
        original: the config before `take_part`; of its files the part is taken.

    Raises:
        DataError, ScoreError: for data that cannot be used.
    """
    used = {name for stage in config.stages for name in stage.sources}
    facts = []
    for kind in ("sources", "validation"):
        for name, source in getattr(config.data, kind).items():
            if kind == "sources" and name not in used:
                continue
            data = load_data_set(name, source, data_folder)
            whole: SourceConfig = getattr(original.data, kind)[name]
            everything = json.loads((data_folder / whole.annotations).read_text(encoding="utf-8-sig"))
            facts.append(
                {
                    "kind": "training" if kind == "sources" else "validation",
                    "name": name,
                    "pictures": len(data),
                    "captions": sum(len(p.captions) for p in data.pictures),
                    "of": len({a["image_id"] for a in everything["annotations"]}),
                    "annotations": whole.annotations,
                    "how": _how(whole, source),
                    "partial": bool((everything.get("info") or {}).get("partial")),
                    "hash": hashlib.sha256(
                        repr([(p.id, p.file + p.part, p.captions) for p in data.pictures]).encode()
                    ).hexdigest()[:16],
                }
            )
    return facts


def _how(whole: SourceConfig, source: SourceConfig) -> str:
    """Return in words which part of an annotation file is used."""
    how = []
    if whole.only_highest:
        how.append("those with the highest ids")
    if whole.skip_highest:
        how.append(f"without the {whole.skip_highest:,} highest ids")
    if whole.exclude_sets:
        how.append(f"without the sets {', '.join(whole.exclude_sets)}")
    if source.annotations != whole.annotations:
        how.append("drawn at random")
    return ", ".join(how)


# --------------------------------------------------------------------------------------------------
# the whole


def compare(
    config: TrainingConfig,
    data_folder: Path,
    output: Path,
    *,
    vary: Sequence[str] = DEFAULT_VARY,
    seeds: int = 3,
    pictures: int = 0,
    validation_pictures: int = 0,
    jobs: int = 0,
    device: str = "auto",
    cache_folder: Path | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> Comparison:
    """Train every combination and write ``output/report.html``, ``results.json`` and ``figures/``.

    The same call goes on after an interruption, and trains only what is missing.

    Args:
        config: what all runs have in common.
        data_folder: paths in the config are relative to it.
        output: folder for the runs and the report.
        vary: ``KEY=VALUE,VALUE,…`` for each key that varies.
        seeds: how many runs of each combination.
        pictures, validation_pictures: train and validate on so many random pictures of each set; 0: on all.
        jobs: runs at a time; 0 for one a core, at most 8, on a CPU, else one.
        device: where to train: auto, cpu, cuda or mps.
        cache_folder: for cached features, which all runs share; ``output/cache`` if None.
        command: how all this was called; for the report.
        say: is given lines for people.

    Raises:
        ConfigError: for a key or value that cannot be, before anything is trained.
        DataError, ScoreError: for data that cannot be used.
        ReportError: if matplotlib is not installed.
        ValueError: for a device that is not there.
    """
    check_matplotlib()
    device = str(choose_device(device))
    grid = parse_vary(vary)
    output.mkdir(parents=True, exist_ok=True)
    used = config
    if pictures or validation_pictures:
        used = take_part(config, data_folder, output / "data", pictures, validation_pictures)
    make_grid(used, grid, seeds, "")  # mistakes in keys come before mistakes in data
    facts = describe_data(used, data_folder, config)
    runs = make_grid(used, grid, seeds, " ".join(fact["hash"] for fact in facts))
    jobs = jobs or (min(_cores(), 8) if device == "cpu" else 1)
    for fact in facts:
        say(phrase_data(fact))

    results = {run.key: read_result(output / "runs" / run.key) for run in runs}
    waiting = [run for run in runs if results[run.key] is None]
    kept = f"; {len(runs) - len(waiting)} of them finished before" if len(waiting) < len(runs) else ""
    say(f"{len(runs)} runs, {min(jobs, len(runs))} at a time{kept}")
    started = time.monotonic()
    failures: dict[str, str] = {}
    clock = output / "minutes.json"
    before = json.loads(clock.read_text())["minutes"] if clock.exists() else 0.0
    minutes = before
    try:
        build_features(waiting, jobs, data_folder, cache_folder or output / "cache")
        with tqdm(total=len(runs), initial=len(runs) - len(waiting), desc="runs", unit="run") as bar:
            for run, failure in _train_all(
                waiting, jobs, data_folder, output, cache_folder or output / "cache", device
            ):
                result = results[run.key] = read_result(output / "runs" / run.key)
                if failure is None and result is not None:
                    cider, took = 100 * result["scores"]["CIDEr"], result["minutes"]
                    tqdm.write(f"{run.describe()}: CIDEr {cider:.1f} ({took:.1f} minutes)", file=sys.stderr)
                else:
                    failures[run.describe()] = failure or "it ended without a result"
                    tqdm.write(f"{run.describe()}: failed: {failures[run.describe()]}", file=sys.stderr)
                bar.update()
                minutes = _tick(clock, before, started)  # not only at the end: that may never come
    finally:
        if waiting:
            minutes = _tick(clock, before, started)

    finished = [result for result in results.values() if result is not None]
    if not finished:
        return Comparison(None, 0, failures)
    facts_of_all = {
        "name": config.name,
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "minutes": round(minutes, 1),
        "processor_minutes": round(sum(result["processor_minutes"] for result in finished), 1),
        "cores": _cores(),
        "jobs": jobs,
        "device": device,
        "processor": _processor(),
        "versions": {
            "captioner": __version__,
            "torch": torch.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        },
        "vary": {key: [_plain(value) for value in values] for key, values in grid.items()},
        "seeds": seeds,
        "reach": REACH,
        "data": facts,
        "config": yaml.safe_dump(
            config.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True
        ),
        "failures": failures,
        "runs": finished,
    }
    write_atomically(output / "results.json", json.dumps(facts_of_all, ensure_ascii=False).encode())
    report = output / "report.html"
    write_report(facts_of_all, report, output / "figures")
    say(summary_table(facts_of_all))
    return Comparison(report, len(finished), failures)


def _tick(clock: Path, before: float, started: float) -> float:
    """Write down and return how many minutes all calls together have taken."""
    minutes = before + (time.monotonic() - started) / 60
    write_atomically(clock, json.dumps({"minutes": round(minutes, 2)}).encode())
    return minutes


def build_features(runs: Sequence[Run], threads: int, data_folder: Path, cache_folder: Path) -> None:
    """Compute the features that runs share, once, with all threads; what fails fails again in its run."""
    done = set()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for run in runs:
            config = run.config
            stages = [(stage.sources, stage.trainable_blocks) for stage in config.stages]
            frames = config.video.frames
            needs = repr(
                (config.data, config.encoder, config.start, config.flips, config.crops, frames, stages)
            )
            if needs not in done and config.cache:
                done.add(needs)
                with suppress(ValueError):
                    Experiment(config, data_folder, cache_folder).prepare()
    finally:
        torch.set_num_threads(before)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what a finished run measured; None if it is not finished."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


class _Process(Protocol):
    """What `_train_all` needs of a process."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def _train_all(
    runs: Sequence[Run], jobs: int, data_folder: Path, output: Path, cache_folder: Path, device: str
) -> Any:
    """Train some runs at a time; yield each when it has ended, with the reason if it failed."""
    waiting, running = list(runs), dict[Any, Run]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                folder = output / "runs" / run.key
                if read_result(folder) is not None:  # somebody else has done it meanwhile
                    yield run, None
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                job = {
                    "config": run.config.model_dump(),
                    "settings": {key: _plain(value) for key, value in run.settings.items()},
                    "seed": run.seed,
                    "data": str(data_folder.absolute()),
                    "cache": str(cache_folder.absolute()),
                    "device": device,
                }
                write_atomically(folder / "job.json", json.dumps(job).encode())
                running[_start(folder)] = run
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                run = running.pop(process)
                code = process.poll()
                yield run, None if code == 0 else _reason(output / "runs" / run.key, code)
            if not ended:
                time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _start(folder: Path) -> _Process:
    """Start a run in a process of its own, with one thread."""
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    environment = {**os.environ, **threads, "TQDM_DISABLE": "1"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "captioner_training.compare", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )


def _reason(folder: Path, code: int) -> str:
    """Return the last line that a failed run wrote."""
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if code < 0:
        return f"ended by signal {-code}{' (out of memory?)' if code == -9 else ''}; see {folder / 'log.txt'}"
    return f"{last or f'exit code {code}'} (see {folder / 'log.txt'})"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else ""


# --------------------------------------------------------------------------------------------------
# one run, in its own process


def train_and_measure(folder: Path) -> None:
    """Do what ``folder/job.json`` says and write ``folder/result.json``."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config = TrainingConfig.model_validate(job["config"])
    started = time.monotonic()
    data_folder, cache_folder = Path(job["data"]), Path(job["cache"])
    best = train(config, data_folder, folder, cache_folder=cache_folder, device=job["device"], processes=1)
    epochs = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = {
        "settings": job["settings"],
        "seed": job["seed"],
        "epochs": [_epoch(line) for line in epochs if line["epoch"]],  # 0: what it started from
        **measure(config, data_folder, best, cache_folder),
    }
    result["minutes"] = round((time.monotonic() - started) / 60, 2)
    used = os.times()  # with the Java programs that score
    result["processor_minutes"] = round(sum(used[:4]) / 60, 2)
    write_atomically(folder / "result.json", json.dumps(result).encode())
    (folder / "state.pt").unlink(missing_ok=True)  # large, and of no more use


def _epoch(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the report shows of a line of the log; scores are means over the validation sets."""
    sets = list(line["validation"].values())
    means = {name: sum(s[name] for s in sets) / len(sets) for name in METRICS if name in sets[0]}
    loss = line["loss"] if "loss" in line else -line["reward"]  # of self-critical training
    return {"epoch": line["epoch"], "loss": loss, "seconds": 60 * line["minutes"], **means}


def measure(config: TrainingConfig, data_folder: Path, best: Path, cache_folder: Path) -> dict[str, Any]:
    """Measure a trained checkpoint: its size, validation scores, scores of each picture, gradients."""
    loaded = checkpoint.load(best)
    model = loaded.model
    fine_tuned = any(stage.trainable_blocks for stage in config.stages)
    options = SearchOptions(**config.search.model_dump())
    scores: list[dict[str, float]] = []
    by_picture = []
    captions: list[str] = []
    gradients: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if fine_tuned else cache_folder  # nobody else has that encoder
        for name, source in config.data.validation.items():
            data = load_data_set(name, source, data_folder)
            cache = FeatureCache(folder, data, model.encoder, False, frames=config.video.frames).build()
            generated = generate(model, data, options, cache=cache)
            measured = Scorer(data.references()).score(
                generated, metrics=("BLEU", "METEOR", "CIDEr"), intervals=False
            )
            scores.append({metric: measured.corpus.get(metric, 0.0) for metric in METRICS})
            by_picture += [
                {
                    "words": sum(len(c.split()) for c in people) / len(people),
                    "CIDEr": measured.per_image.get("CIDEr", {}).get(p.id, 0.0),
                }
                for p in data.pictures
                # words, not the full stop that some captions end with
                if (people := [re.sub(r"[^\w\s'-]", " ", c) for c in p.captions])
            ]
            captions += generated.values()
            if not gradients:
                gradients = measure_gradients(model, data, cache, config.seed)
    return {
        "parameters": {
            # what is trained beside the picture's encoder
            "decoder": _count(model) - _count(model.encoder),
            "encoder": _count(model.encoder),
        },
        "vocabulary": len(model.tokenizer),
        "scores": {metric: sum(s[metric] for s in scores) / len(scores) for metric in METRICS},
        "by_picture": by_picture,
        "distinct": len(set(captions)) / len(captions),
        "gradients": gradients,
    }


def measure_gradients(model: CaptionModel, data: DataSet, cache: FeatureCache, seed: int) -> dict[str, Any]:
    """Return the gradient norms of the trained decoder, and of one of the same shape before training.

    They are taken on the first caption of the first validation pictures that is long enough.
    """
    rows = []
    for index, picture in enumerate(data.pictures):
        encoded = ([*model.tokenizer.encode(caption), END] for caption in picture.captions)
        long = next((tokens for tokens in encoded if len(tokens) > REACH), None)
        if long is not None:
            rows.append((index, long))
        if len(rows) == _GRADIENT_CAPTIONS:
            break
    if not rows:
        return {}
    lengths = torch.tensor([len(tokens) for _, tokens in rows])
    tokens = torch.full((len(rows), int(lengths.max()) + 1), PAD)
    for row, (_, caption) in enumerate(rows):
        tokens[row, : len(caption) + 1] = torch.tensor([START, *caption])
    features = cache.grid_features([index for index, _ in rows])
    torch.manual_seed(seed)
    fresh = CaptionModel(model.encoder, model.decoder.config, model.tokenizer, frame_config(model)).eval()
    if fresh.decoder.guesser is not None and model.decoder.guesser is not None:
        fresh.decoder.guesser.tokens.copy_(model.decoder.guesser.tokens)
    found: dict[str, Any] = {}
    for name, one in (("trained", model), ("untrained", fresh)):
        with torch.no_grad():
            memory = one.memory(features)
        found[name] = asdict(gradient_norms(one.decoder, memory, tokens, lengths, REACH))
    return {**found, "captions": len(rows)}


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _follow(parent: int) -> None:
    """End this process when the one that started it has gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Run one job in this process; the last line it writes says what went wrong."""
    torch.set_num_threads(1)
    # while it trains: CIDEr chooses the checkpoint, and METEOR would take longer than many an epoch
    setattr(experiment, "VALIDATED", ("CIDEr",))  # noqa: B010 (for this process alone)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    try:
        train_and_measure(Path(sys.argv[1]))
    except ValueError as error:  # a user's mistake
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
