"""The command line. Heavy imports wait inside the subcommands, so that ``--help`` is immediate."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from captioner._version import __version__
from captioner.console import (
    FAILED,
    INTERRUPTED,
    STOPPED,
    TERMINATED,
    UNREAD,
    UNUSABLE,
    do_without_output,
    dumps,
    fail,
    mistakes,
    need_output,
    open_closed_streams,
    say,
    show,
)
from captioner.inputs import printable
from captioner.outputs import (
    CLIP_FORMATS,
    CsvWriter,
    JsonlWriter,
    JsonWriter,
    Names,
    OverlayFormat,
    Overlays,
    Progress,
    Rolling,
    Subtitles,
    Writer,
)

if TYPE_CHECKING:
    from captioner.batch import ClipResult, FileResult
    from captioner.captioner import Captioner

app = typer.Typer(
    name="captioner",
    help="Say what photos and videos show, and show where the model looked for each word: "
    "captioner caption photo.jpg",
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


class FitMode(str, Enum):
    """How a photo becomes a square."""

    squash = "squash"
    crop = "crop"
    letterbox = "letterbox"


class Existing(str, Enum):
    """What happens to somebody's own sidecars."""

    keep = "keep"
    overwrite = "overwrite"
    append = "append"
    prepend = "prepend"


class EngineName(str, Enum):
    """Where a batch is captioned."""

    local = "local"
    ray = "ray"


class PublishedData(str, Enum):
    """Which published results stand beside one's own; auto guesses it by the names."""

    auto = "auto"
    flickr8k = "flickr8k"
    flickr30k = "flickr30k"
    coco = "coco"
    none = "none"


Model = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="A .safetensors checkpoint. [default: built-in]", metavar="FILE"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", metavar="NAME")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.", metavar="N")]


def main() -> NoReturn:
    """Run the command line; users' mistakes are one line on stderr, never a traceback."""
    open_closed_streams()
    if not sys.warnoptions:  # of damaged files and bad connections: each gets a line of ours
        warnings.filterwarnings("ignore", module=r"(PIL|fsspec|aiohttp)\.")
        for library in ("PIL", "fsspec", "aiohttp", "asyncio"):
            logging.getLogger(library).addHandler(logging.NullHandler())
    if isinstance(sys.stdout, io.TextIOWrapper):
        # for what ASCII lacks; half a surrogate (a file name that is not UTF-8) becomes its escape in JSON
        sys.stdout.reconfigure(errors="backslashreplace")
    code: object = 0
    try:
        app(prog_name="captioner")
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as error:  # from --help
        say(f"standard output: {error.strerror or error}")
        code = UNUSABLE
    try:
        sys.stdout.flush()
    except OSError as error:
        # what cannot be written must not be tried again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not code:
            say(f"standard output: {error.strerror or error}")
            code = UNUSABLE
    if code in (INTERRUPTED, TERMINATED, UNREAD) or (code == STOPPED and "-" in sys.argv):
        os._exit(int(code))  # threads may be at work for seconds on what nobody wants any more
    sys.exit(code)  # type: ignore[arg-type]


def _version(value: bool) -> None:
    if value:
        show(f"captioner {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in ("caption", "apply"):  # which may print nothing
        need_output()


def _load(model: Path | None, device: str, precision: str = "float32", threads: int = 0) -> Captioner:
    import torch

    from captioner.captioner import Captioner

    if threads:
        torch.set_num_threads(threads)
    return Captioner.load(model, device=device, precision=precision)


# --------------------------------------------------------------------------------------------------
# caption


_BOUNDS = {
    "beam": (1, 1000),
    "n_best": (1, 1000),
    "min_length": (0, 1000),
    "max_length": (1, 1000),
    "no_repeat_ngram": (0, 1000),
    "batch_size": (1, 65536),
    "threads": (0, 1024),
}


@app.command()
def caption(
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="PATH", hidden=True, show_default=False)
    ] = None,  # the docstring tells more
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Look into sub-folders too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array of records.")] = False,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Print a JSON record a line, as they come.")
    ] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: path, caption, confidence, …, the words as JSON.")
    ] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="With --json or --jsonl: write every word's attention too.")
    ] = False,
    overlay: Annotated[
        Path | None,
        typer.Option(
            help="Draw where the model looked into this folder: of a photo a picture, of a video the video "
            "itself and, for each segment, a sheet of its words and frames.",
            metavar="DIR",
        ),
    ] = None,
    overlay_format: Annotated[
        OverlayFormat | None,
        typer.Option(
            help="Of photos png, jpg: a sheet; gif, webp: an animation; svg, pdf: a figure; html: a page; "
            "npz: arrays. Of videos mp4, webm. [default: png, mp4]",
            metavar="FORMAT",
        ),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(
            help="Of videos: seconds between the frames that are looked at. [default: 0.5]", metavar="SECONDS"
        ),
    ] = None,
    segment: Annotated[
        str | None,
        typer.Option(
            help="Of videos: what gets a caption of its own: so many seconds, whole, or shots (where the "
            "picture changes at once; shots:8 cuts longer ones). With --live, the seconds looked back. "
            "[default: 5, live 4]",
            metavar="LENGTH",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Of videos: where to begin, in seconds or as 1:02:03.", metavar="TIME"),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option(help="Of videos: where to stop, in seconds or as 1:02:03.", metavar="TIME"),
    ] = None,
    srt: Annotated[
        str | None,
        typer.Option(
            help="Of videos: write subtitles to FILE.srt. For several videos give a folder, or the word "
            "beside for a file next to each, where there is none.",
            metavar="FILE",
        ),
    ] = None,
    vtt: Annotated[
        str | None, typer.Option(help="The same as WebVTT, for web pages, to FILE.vtt.", metavar="FILE")
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            help="In the place of PATH: caption a camera (0 is the first), a device or a stream's address "
            "while it runs, until Ctrl-C.",
            metavar="SOURCE",
        ),
    ] = None,
    beam: Annotated[
        int | None,
        typer.Option(
            help="Hypotheses kept at each step; 1 is greedy. [default: the model's]",
            metavar="N",
        ),
    ] = None,
    n_best: Annotated[
        int, typer.Option(help="Captions for each photo or segment, best first.", metavar="N")
    ] = 1,
    prefix: Annotated[
        str, typer.Option(help="Words that every caption begins with.", metavar="TEXT", show_default=False)
    ] = "",
    must: Annotated[
        list[str] | None,
        typer.Option(help="A word or phrase that has to appear; may be repeated.", metavar="TEXT"),
    ] = None,
    avoid: Annotated[
        list[str] | None,
        typer.Option(help="A word or phrase that must not appear; may be repeated.", metavar="TEXT"),
    ] = None,
    neutral: Annotated[
        bool,
        typer.Option("--neutral", help="Say person, child, they in place of man, girl, she and the like."),
    ] = False,
    region: Annotated[
        str,
        typer.Option(
            help="Look only into the box LEFT,TOP,RIGHT,BOTTOM, in pixels of the photo or video.",
            metavar="BOX",
            show_default=False,
        ),
    ] = "",
    length_penalty: Annotated[
        float | None, typer.Option(help="Larger makes longer captions. [default: the model's]", metavar="X")
    ] = None,
    min_length: Annotated[
        int | None, typer.Option(help="Least number of tokens. [default: the model's]", metavar="N")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Largest number of tokens. [default: the model's]", metavar="N")
    ] = None,
    no_repeat_ngram: Annotated[
        int | None,
        typer.Option(
            help="No sequence of this many tokens twice; 0 allows all. [default: the model's]",
            metavar="N",
        ),
    ] = None,
    name_above: Annotated[
        float | None,
        typer.Option(
            help="Name what was guessed with a probability above P; 1 leaves it to the beam. "
            "[default: the model's]",
            metavar="P",
        ),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw words at random instead of searching.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="With --sample: below 1 is more cautious. [default: 1]", metavar="X"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="With --sample: among the k likeliest only; 0 means all. [default: 0]", metavar="K"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="With --sample: among the fewest that reach this probability. [default: 1]", metavar="P"
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="With --sample: the n-th file, from 0, gets seed + n; in a batch a file's seed depends on "
            "its path.",
            metavar="N",
        ),
    ] = 0,
    batch_size: Annotated[
        int,
        typer.Option(help="Photos that go through the network together.", metavar="N"),
    ] = 32,
    model: Model = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda, cuda:N or mps; in a batch several, as in cuda:0,cuda:1, and auto takes "
            "all CUDA GPUs.",
            metavar="NAME",
        ),
    ] = "auto",
    precision: Annotated[
        Precision,
        typer.Option(help="Of the encoder: float32, bfloat16 or float16.", metavar="TYPE"),
    ] = Precision.float32,
    threads: Threads = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Batch: write records to FILE.jsonl, .csv, .parquet, or .json for COCO results. Run it "
            "again after a crash, or with more files: what is done is not done twice.",
            metavar="FILE",
        ),
    ] = None,
    sidecars: Annotated[
        bool, typer.Option("--sidecars", help="Batch: write the caption of photos/x.jpg to photos/x.txt.")
    ] = False,
    alt_text: Annotated[
        bool,
        typer.Option("--alt-text", help="Batch: write the caption into the photo's metadata as alt text."),
    ] = False,
    existing: Annotated[
        Existing,
        typer.Option(
            help="Sidecars that captioner did not write, or that were edited since: keep, overwrite, append "
            "or prepend.",
            metavar="HOW",
        ),
    ] = Existing.keep,
    before: Annotated[
        str,
        typer.Option(
            help="With --sidecars: put this in front of every caption, as it is (a trigger word). The model "
            "does not see it; --prefix is what the model goes on from.",
            metavar="TEXT",
            show_default=False,
        ),
    ] = "",
    after: Annotated[
        str,
        typer.Option(help="With --sidecars: put this behind it.", metavar="TEXT", show_default=False),
    ] = "",
    min_confidence: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Batch: captions below P go to FILE.review.jsonl, and to no sidecar or metadata.",
            metavar="P",
        ),
    ] = 0.0,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Batch: write a page with all pictures, captions and attention, to look them over.",
            metavar="FILE.html",
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="The column of paths of a PATH that is a table. [default: path, file, …]", metavar="NAME"
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Batch: go on as files arrive, until Ctrl-C.")
    ] = False,
    poll: Annotated[
        bool,
        typer.Option(
            "--poll",
            help="With --watch: list the folders every few seconds, for network drives, where the system "
            "tells nothing of what other machines write.",
        ),
    ] = False,
    checksum: Annotated[
        bool, typer.Option("--checksum", help="Batch: tell changed files by content, not by size and time.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Batch: exit code 1 if any file could not be captioned.")
    ] = False,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Batch: where what is done is noted. [default: beside --output, or in the folder]",
            metavar="FILE",
        ),
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="Batch: local, or ray for a cluster.", metavar="NAME")
    ] = EngineName.local,
    ray_address: Annotated[
        str | None,
        typer.Option(help="With --engine ray: the cluster. [default: as Ray finds it]", metavar="HOST:PORT"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="With --engine ray. [default: as many as there is room for]", metavar="N"),
    ] = None,
) -> None:
    """Say what photos and videos show.

    PATH is a photo, a video, a folder or a glob (quoted: '**/*.jpg'); there may be several. Photos and videos
    are told apart by content; GIF and WebP animations are videos. With --output, --sidecars, --alt-text,
    --report or --watch it may also be a tar archive, a table with a column of paths, an address (s3://…), or
    - for a list of paths on standard input: see docs/batch.md.

    Prints a caption a line, and for a video a line for each segment: "path: caption", or "path: 0:05 to 0:10:
    caption"; without the path for a single file. When the model is not sure what it sees, the line says so.
    Results go to stdout, everything else to stderr.

    Exit code: 0 if all files were captioned; 1 if some could not be, or not to their end (each gets a line on
    stderr, the others are captioned); 2 if nothing could be done; 130 after Ctrl-C, which with --live is the
    usual end, and 0. In a batch 0 although some could not be, but for --strict; 3 if it had to stop early.
    """
    if as_json + as_jsonl + as_csv > 1:
        fail("choose one of --json, --jsonl and --csv")
    if attention and not (as_json or as_jsonl):
        fail("--attention needs --json or --jsonl")
    if overlay_format is not None and overlay is None:
        fail("--overlay-format needs --overlay DIR")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, value in sampling.items():
        if value is not None and not sample:
            fail(f"--{name.replace('_', '-')} needs --sample")
    chosen = {
        "beam": beam,
        "length_penalty": length_penalty,
        "name_above": name_above,
        "min_length": min_length,
        "max_length": max_length,
        "no_repeat_ngram": no_repeat_ngram,
        **sampling,
    }
    for name, value in {**chosen, "n_best": n_best, "batch_size": batch_size, "threads": threads}.items():
        low, high = _BOUNDS.get(name, (-math.inf, math.inf))
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    options: dict[str, Any] = {k: v for k, v in chosen.items() if v is not None}
    options.update(n_best=n_best, sample=sample, prefix=prefix, must=must or [], seed=seed)
    options.update(avoid=avoid or [], neutral=neutral)
    options["region"] = _box(region)
    clips = _clip_options(every, segment, start, end)
    batch = {
        **{"--output": output, "--sidecars": sidecars, "--alt-text": alt_text},
        **{"--report": report, "--watch": watch},
    }
    with_batch = {
        **{"--min-confidence": min_confidence, "--column": column, "--checksum": checksum},
        **{"--strict": strict, "--journal": journal, "--workers": workers, "--ray-address": ray_address},
        "--engine": engine is not EngineName.local,
    }
    wish: object
    for option, wish in {"--before": before, "--after": after}.items():
        if wish and not sidecars:
            fail(f"{option} needs --sidecars")
    if existing is not Existing.keep and not sidecars:
        if not (any(batch.values()) and (srt or vtt)):
            fail("--existing needs --sidecars, or in a batch --srt or --vtt: it is about files beside others")
        if existing is not Existing.overwrite:
            fail(f"--existing {existing.value} needs --sidecars; subtitles are kept or overwritten")
    if poll and not watch:
        fail("--poll needs --watch")
    if any(batch.values()):
        writes = next(option for option, value in batch.items() if value)
        printing = {"--json": as_json, "--jsonl": as_jsonl, "--csv": as_csv, "--attention": attention}
        for option, wish in {**printing, "--overlay": overlay, "--live": live}.items():
            if wish:
                fail(f"{option} does not go together with {writes}, which writes files of its own")
        for option, wish in {"--srt": srt, "--vtt": vtt}.items():
            if wish not in (None, "beside"):
                fail(f"{option} {wish}: in a batch, give {option} beside for a file next to each video")
        for option, wish in {"--ray-address": ray_address, "--workers": workers}.items():
            if wish is not None and engine is EngineName.local:
                fail(f"{option} needs --engine ray")
        if not paths:
            fail("give files, folders or patterns, or - for a list on standard input")
        if watch and engine is EngineName.ray:
            fail("--watch does not go together with --engine ray: a cluster is for what is there already")
        do_without_output()
        with mistakes():
            from captioner.batch.command import Batch, run_batch

            code = run_batch(
                Batch(
                    paths,
                    recursive=recursive,
                    column=column,
                    output=output,
                    journal=journal,
                    sidecars=sidecars,
                    alt_text=alt_text,
                    srt=srt is not None,
                    vtt=vtt is not None,
                    existing=existing.value,
                    before=before,
                    after=after,
                    min_confidence=min_confidence,
                    checksum=checksum,
                    strict=strict,
                    report=report,
                    watch=watch,
                    poll=poll,
                    ray=engine is EngineName.ray,
                    address=ray_address,
                    workers=workers,
                    model=model,
                    device=device,
                    precision=precision.value,
                    threads=threads,
                    batch_size=batch_size,
                    clips=clips,
                    options=options,
                )
            )
        raise typer.Exit(code)
    for option, wish in with_batch.items():
        if wish:
            fail(f"{option} is for a batch: give --output, --sidecars, --alt-text, --report or --watch too")
    need_output()
    kind = JsonWriter if as_json else JsonlWriter if as_jsonl else CsvWriter if as_csv else Writer
    if live is not None:
        file_options = {"a PATH": paths, "--overlay": overlay, "--srt": srt, "--vtt": vtt}
        for name, given in {**file_options, "--start": start, "--end": end}.items():
            if given:
                fail(f"--live does not go together with {name}")
        if clips.pop("shots", False) or clips.get("segment", 0) is None:
            fail(f"--segment {segment}: with --live, give the seconds to look back")
        if "segment" in clips:
            clips["window"] = clips.pop("segment")
        with mistakes(), kind(attention) as writer:
            captioner = _load(model, device, precision.value, threads)
            writer.of(captioner)
            code = _caption_live(captioner, live, writer, {**clips, **options})
        raise typer.Exit(code)
    if not paths:
        fail("give a photo, a video, a folder or a pattern, or --live SOURCE; captioner caption --help")
    unused = {"--every": every, "--segment": segment, "--start": start, "--end": end}
    unused.update({"--srt": srt, "--vtt": vtt})
    if overlay_format in CLIP_FORMATS:
        unused[f"--overlay-format {overlay_format.value}"] = overlay_format
    with mistakes(), kind(attention) as writer:
        from tqdm import tqdm

        from captioner.batch import ClipResult, FileResult, caption_media

        files, missing = _find(paths, recursive)
        writer.heads = files != paths[:1]
        names = Names(files if overlay or srt or vtt else [])
        subtitles = [
            Subtitles(f"--{o}", place, files, names) for o, place in (("srt", srt), ("vtt", vtt)) if place
        ]
        overlays = Overlays(overlay, overlay_format, names, clips) if overlay else None
        captioner = _load(model, device, precision.value, threads)
        writer.of(captioner)
        captioned = failures = 0
        clip_count, seconds, computing = 0, 0.0, 0.0

        def results() -> Iterator[FileResult | ClipResult]:
            yield from (FileResult(path, None, reason) for path, reason in missing)
            yield from caption_media(
                captioner,
                files,
                batch_size=batch_size,
                clips=clips,
                progress=progress.reading,
                said=writer.write_segment,
                **options,
            )

        with Progress(len(files) + len(missing), clips) as progress:
            for result in results():
                errors = [result.error] if result.error is not None else []
                notes: list[str] = []
                if isinstance(result, ClipResult):
                    clip_count += 1
                if result.caption is not None:
                    captioned += 1
                    if isinstance(result, ClipResult):
                        seconds += result.caption.duration - clips.get("start", 0.0)
                        computing += result.seconds
                        errors += [error for s in subtitles if (error := s.save(result.path, result.caption))]
                    if overlays:
                        drawn, notes = overlays.save(result.path, result.caption, progress.drawing)
                        errors += drawn
                with tqdm.external_write_mode(file=sys.stdout):  # takes the bar off a terminal meanwhile
                    for line in (*errors, *notes):
                        say(line)
                    writer.write(replace(result, error="; ".join(errors) or None))
                failures += bool(errors)
                progress.done()
        if captioned and not clip_count and any(unused.values()):
            given = ", ".join(name for name, value in unused.items() if value)
            say(f"{given}: only for videos, and there was none")
        if computing and sys.stderr.isatty():
            rate = seconds / computing
            say(
                f"{seconds:.1f} s of video in {computing:.1f} s: "
                f"{rate:.1f} seconds of video per second of computing"
            )
    if failures:
        raise typer.Exit(FAILED if captioned else UNUSABLE)


def _clip_options(
    every: float | None, segment: str | None, start: str | None, end: str | None
) -> dict[str, Any]:
    """Return the options of `Captioner.caption_video` that were given."""
    options: dict[str, Any] = {}
    if every is not None:
        if not (math.isfinite(every) and every > 0):
            fail(f"--every {every}: expected seconds, more than 0")
        options["every"] = every
    if segment is not None:
        options.update(_segment_options(segment))
    for name, text in (("start", start), ("end", end)):
        if text is not None:
            options[name] = _seconds(text, name)
    if "end" in options and options["end"] <= options.get("start", 0.0):
        fail(f"--end {end}: expected a time after --start {start or 0}")
    return options


def _segment_options(text: str) -> dict[str, Any]:
    shots = text == "shots" or text.startswith("shots:")
    if shots:
        from importlib.util import find_spec

        if find_spec("scenedetect") is None:
            fail('--segment shots needs PySceneDetect: pip install "captioner[shots]"')
    if text in ("whole", "shots"):
        return {"segment": None, "shots": shots}
    try:
        seconds = float(text.removeprefix("shots:"))
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        fail(f"--segment {text}: expected seconds, more than 0, or whole, shots or shots:SECONDS")
    return {"segment": seconds, "shots": shots}


def _seconds(text: str, name: str) -> float:
    """Read a time: ``90``, ``1:30`` or ``1:02:03.5``."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text, re.ASCII):
        fail(f"--{name} {text}: expected seconds, minutes:seconds or hours:minutes:seconds")
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _caption_live(captioner: Captioner, source: str, writer: Writer, options: dict[str, Any]) -> int:
    """Print what a camera or stream shows while it runs, whenever that changes; return the exit code."""
    from captioner.caption import plain_text

    said = None
    error: str | None = None
    with Rolling(writer, source) as rolling:
        try:
            for segment in captioner.caption_live(source, **options):
                text = plain_text(segment.caption)
                if text != said:
                    said = text
                    rolling.show(segment)
        except KeyboardInterrupt:  # the usual end
            pass
        except ValueError as problem:
            from captioner.video import VideoError

            if not isinstance(problem, VideoError):
                raise
            error = str(problem)
    if error is None:
        return 0
    say(error)
    return UNUSABLE if said is None else FAILED


def _box(text: str) -> tuple[float, ...] | None:
    if not text:
        return None
    try:
        box = tuple(float(part) for part in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)):
        fail(f"--region {text}: expected four numbers, LEFT,TOP,RIGHT,BOTTOM in pixels")
    if box[0] >= box[2] or box[1] >= box[3]:
        fail(f"--region {text}: the box is empty; give LEFT,TOP,RIGHT,BOTTOM in pixels")
    return box


def _find(paths: list[str], recursive: bool) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the files that the arguments name, each once, and for the others (argument, reason)."""
    from captioner.batch import find_files
    from captioner.inputs import ImageError

    files: dict[Path, str] = {}
    missing: dict[str, str] = {}
    for path in paths:
        try:
            for file in find_files([path], recursive):
                # a file that was given by name keeps its spelling
                files.setdefault(file, path if file == Path(path) else str(file))
        except ImageError as error:
            missing[path] = str(error)
    return list(files.values()), list(missing.items())


# --------------------------------------------------------------------------------------------------
# apply


@app.command()
def apply(
    table: Annotated[Path, typer.Argument(help="CSV, JSON Lines or Parquet.", metavar="TABLE")],
    sidecars: Annotated[
        bool, typer.Option("--sidecars", help="Write photos/x.txt for photos/x.jpg. [default]")
    ] = False,
    alt_text: Annotated[
        bool, typer.Option("--alt-text", help="Write into the photos' metadata as alt text.")
    ] = False,
    existing: Annotated[
        Existing,
        typer.Option(help="Sidecars that a person wrote: keep, overwrite, append or prepend.", metavar="HOW"),
    ] = Existing.keep,
    before: Annotated[
        str,
        typer.Option(
            help="Put this in front of every caption, as it is.", metavar="TEXT", show_default=False
        ),
    ] = "",
    after: Annotated[str, typer.Option(help="Put this behind it.", metavar="TEXT", show_default=False)] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Of the run that wrote the table. [default: TABLE.journal, if there is one]", metavar="FILE"
        ),
    ] = None,
) -> None:
    """Write the captions of an edited table to sidecars or metadata.

    TABLE is what captioner caption --output wrote, after a person has edited its caption column. What
    captioner wrote beside the files is replaced; what a person wrote there is kept.

    Exit code: 0; 1 if a file is missing or could not be written (each gets a line); 2 if nothing could be
    done.
    """
    do_without_output()
    with mistakes():
        from captioner.batch.command import apply as run

        code = run(
            table,
            sidecars=sidecars,
            alt_text=alt_text,
            existing=existing.value,
            before=before,
            after=after,
            dry_run=dry_run,
            journal=journal,
        )
    raise typer.Exit(code)


# --------------------------------------------------------------------------------------------------
# info


@app.command()
def info(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model is: its size, parts, data, scores and terms."""
    with mistakes():
        from captioner import identity
        from captioner.checkpoint import read_header

        path = model or identity.BUILT_IN
        header = read_header(path)
        facts = header.to_dict()
        tokenizer = facts.pop("tokenizer")
        facts["file"] = str(path)
        facts["megabytes"] = round(path.stat().st_size / 1e6, 2)
        facts["vocabulary"] = f"{len(tokenizer['vocabulary'])} words" if "vocabulary" in tokenizer else "BPE"
        if as_json:
            show(dumps(facts, indent=2))
            return
        for line in _describe(facts):
            show(printable(line))


def _describe(facts: dict[str, Any]) -> Iterator[str]:
    decoder, preprocess = facts["decoder"], facts["preprocess"]
    size = preprocess["size"]
    yield f"{facts['name']}: {facts['file']} ({facts['megabytes']} MB)"
    yield _line("encoder", f"{facts['encoder']}, {size}x{size} pixels, {preprocess['fit']}")
    yield _line("decoder", f"{decoder['cell']} of {decoder['hidden']}, attention: {decoder['attention']}")
    yield _line("vocabulary", facts["vocabulary"])
    yield _line("search", ", ".join(f"{k} {v}" for k, v in facts["search"].items()) or "the usual options")
    yield _line("confidence", "calibrated" if facts["calibration"] else "not calibrated")
    for name, value in facts["summary"].items():  # free-form
        title = {"data": "trained on", "encoder_weights": "started at"}.get(name, name)
        for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
            yield _line(title, f"{key}: {_phrase(entry)}" if key else _phrase(entry))


def _line(title: str, text: str) -> str:
    return f"  {title:<11} {text}"


def _phrase(value: object) -> str:
    """Return plain types as a person reads them: ``6000 pictures``, and scores (x 100) like papers."""
    if isinstance(value, dict):
        return ", ".join(
            f"{entry} {key}"
            if isinstance(entry, int)
            else _phrase(entry)
            if isinstance(entry, str)
            else f"{key} {_phrase(entry)}"
            for key, entry in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(_phrase, value))
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------------
# prepare


class CaptionFormat(str, Enum):
    """Formats of captions; see `captioner_training.formats`."""

    coco = "coco"
    karpathy = "karpathy"
    flickr = "flickr"
    table = "table"
    sidecars = "sidecars"
    msvd = "msvd"
    msrvtt = "msrvtt"


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", hidden=True)],  # the docstring tells more
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the data set.", metavar="DIR")],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images",
            "--videos",
            help="Folder or uncompressed tar of the pictures; may be repeated. [default: where SOURCE is]",
            metavar="PATH",
        ),
    ] = None,
    format: Annotated[
        CaptionFormat | None,
        typer.Option(
            help="coco, karpathy, flickr, table, sidecars, msvd or msrvtt. [default: by the content]",
            metavar="NAME",
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="A list of picture names, one a line, that are a split: by its name, as "
            "Flickr_8k.devImages.txt, or val=FILE; may be repeated.",
            metavar="FILE",
        ),
    ] = None,
    val: Annotated[
        float | None,
        typer.Option(
            help="Share of the pictures to draw for validation. [default: 0.1 unless SOURCE states a split]",
            metavar="X",
        ),
    ] = None,
    test: Annotated[
        float | None,
        typer.Option(
            help="Share to draw for testing. [default: 0.1 unless SOURCE states splits]", metavar="X"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.", metavar="N")] = 0,
    resplit: Annotated[
        bool, typer.Option("--resplit", help="Draw all splits, whatever SOURCE states.")
    ] = False,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Go on without missing and unreadable pictures; the data set is then marked as partial.",
        ),
    ] = False,
    no_decode: Annotated[
        bool,
        typer.Option(
            "--no-decode", help="Look only at the beginning of each picture: quicker, and finds less."
        ),
    ] = False,
    note: Annotated[
        str,
        typer.Option(
            help="Who wrote the captions, under what terms; goes into checkpoints.",
            metavar="TEXT",
            show_default=False,
        ),
    ] = "",
    threads: Threads = 0,
) -> None:
    """Make one checked, split data set of pictures and captions, ready for captioner train.

    SOURCE is a file or folder of captions: COCO's JSON, Karpathy's splits, Flickr token files, a CSV, TSV or
    JSON Lines file of paths and captions, a folder of pictures with .txt files, MSVD or MSR-VTT. There may be
    several; val=FILE says which split one is.

    Prints what was found and what was left out; the whole report is DIR/report.json.

    Exit code: 0 if the data set was written; 1 if pictures are missing or unreadable and --allow-missing was
    not given (only the report was written then); 2 if nothing could be done.
    """
    if threads < 0:
        fail(f"--threads {threads}: expected 0 or more")
    with mistakes():
        from captioner_training.prepare import prepare as run

        prepared = run(
            sources,
            images or [],
            output,
            format=format.value if format else None,
            lists=split or [],
            val=val,
            test=test,
            seed=seed,
            resplit=resplit,
            allow_missing=allow_missing,
            decode=not no_decode,
            threads=threads or None,
            note=note,
        )
        for line in prepared.lines():
            show(printable(line))
    if prepared.stopped:
        say(f"pictures are missing or unreadable: see {output / 'report.json'}")
        raise typer.Exit(FAILED)


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="coco2017 or coco2014.", metavar="SET")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where it goes.", metavar="DIR")],
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="annotations, val or train; may be repeated. [default: all, 20 GB and more]", metavar="NAME"
        ),
    ] = None,
    sha256: Annotated[
        list[str] | None,
        typer.Option(
            help="A checksum that you trust: train2017.zip=HEX; may be repeated.", metavar="FILE=HEX"
        ),
    ] = None,
    mirror: Annotated[
        str,
        typer.Option(
            help="Another server with the paths of images.cocodataset.org.", metavar="URL", show_default=False
        ),
    ] = "",
    keep_archives: Annotated[
        bool, typer.Option("--keep-archives", help="Do not delete zip files that have been unpacked.")
    ] = False,
) -> None:
    """Fetch COCO, go on with what was interrupted, check and unpack it.

    Without a network it says what to fetch by hand, and where to put it.
    """
    with mistakes():
        from captioner_training.download import OFFICIAL
        from captioner_training.download import download as run

        sums = {pair.partition("=")[0]: pair.partition("=")[2] for pair in sha256 or []}
        for line in run(
            name,
            output,
            parts=part or [],
            mirror=mirror or OFFICIAL,
            sha256=sums,
            keep_archives=keep_archives,
        ):
            show(printable(line))


# --------------------------------------------------------------------------------------------------
# train and evaluate


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML config; see configs/.", metavar="CONFIG")],
    data: Annotated[
        Path, typer.Option(help="The folder that the config's paths are relative to.", metavar="DIR")
    ] = Path(),
    output: Annotated[
        Path | None,
        typer.Option(help="Where checkpoint, state and log go. [default: runs/NAME]", metavar="DIR"),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for cached features. [default: OUTPUT/cache]", metavar="DIR")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=0, help="Processes that share the work on a CPU; 0: one a core.", metavar="N")
    ] = 0,
    device: Annotated[
        str,
        typer.Option(
            help="auto (a CUDA GPU if there is one, else the CPU), cpu, cuda or mps.", metavar="NAME"
        ),
    ] = "auto",
) -> None:
    """Train a captioner, or go on with a run that stopped.

    On several GPUs: accelerate launch -m captioner train ...
    """
    with mistakes("fewer --processes, a smaller batch_pictures, decoder or encoder.size in the config"):
        from captioner_training.config import load_config
        from captioner_training.loop import train as run
        from captioner_training.workers import speaks

        settings = load_config(config)
        best = run(
            settings,
            data,
            output or Path("runs") / settings.name,
            cache_folder=cache,
            device=device,
            processes=processes or None,
        )
        if speaks():
            show(str(best))


@app.command()
def compare(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML config: what all runs share. [default: configs/compare.yaml, for Flickr8k]",
            metavar="[CONFIG]",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path, typer.Option(help="The folder that the config's paths are relative to.", metavar="DIR")
    ] = Path(),
    output: Annotated[Path, typer.Option(help="Where runs and report go.", metavar="DIR")] = Path(
        "runs/compare"
    ),
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="A config key and its values; may be repeated. [default: decoder.cell=rnn_tanh,gru,lstm and "
            "decoder.attention=none,dot,additive]",
            metavar="KEY=VALUE,…",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination.", metavar="N")] = 3,
    pictures: Annotated[
        int,
        typer.Option(min=0, help="Train on N random pictures of each source; 0: on all.", metavar="N"),
    ] = 0,
    validation_pictures: Annotated[
        int, typer.Option(min=0, help="Validate on N random pictures of each set; 0: on all.", metavar="N")
    ] = 0,
    jobs: Annotated[
        int, typer.Option(min=0, help="Runs at a time, a thread each; 0: one a core.", metavar="N")
    ] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for cached features. [default: OUTPUT/cache]", metavar="DIR")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto (a CUDA GPU if there is one, else the CPU), cpu, cuda or mps.", metavar="NAME"
        ),
    ] = "auto",
) -> None:
    """Train a small grid of models on equal terms and write a report about them.

    Every combination of the values of --vary is trained with several seeds, from scratch, all else equal. The
    report is OUTPUT/report.html. Interrupt it, and the same line goes on; what is finished is kept.

    Exit code: 0 if all runs finished; 1 if some failed (the report is about the others); 2 if nothing could
    be done; 130 after Ctrl-C.
    """
    with mistakes():
        from captioner_training import compare as comparing
        from captioner_training.config import load_config

        done = comparing.compare(
            load_config(config or comparing.default_config()),
            data,
            output,
            vary=vary or comparing.DEFAULT_VARY,
            seeds=seeds,
            pictures=pictures,
            validation_pictures=validation_pictures,
            jobs=jobs,
            device=device,
            cache_folder=cache,
            command=shlex.join(["captioner", *sys.argv[1:]]),
            say=show,
        )
        for run, why in done.failures.items():
            say(f"{run} failed: {why}")
        if done.report is not None:
            show(str(done.report))
    if done.failures:
        raise typer.Exit(FAILED if done.finished else UNUSABLE)


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
    """Make confidences mean something.

    Fits what makes confidences of probabilities, on the pictures of the config's validation sets with even
    ids, and reports how well that holds on those with odd ids.
    """
    with mistakes():
        from captioner_training.calibrate import calibrate as run
        from captioner_training.config import load_config

        for line in run(load_config(config), data, model, output):
            show(line)


@app.command()
def evaluate(
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Captions in COCO's format, or a folder made by captioner prepare; with --config the folder "
            "that its paths are relative to.",
            metavar="PATH",
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Which file of a prepared folder: train, val or test.", metavar="NAME")
    ] = "val",
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder or tar of the pictures; may be repeated. [default: as the captions say, or beside "
            "them]",
            metavar="PATH",
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
            help="Score these captions, in COCO's results format or another (docs/evaluation.md), instead of "
            "generating.",
            metavar="FILE",
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
    beam: Annotated[
        int | None, typer.Option(min=1, help="Width of the beam. [default: the model's]", metavar="N")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="See captioner caption --help.", metavar="X")
    ] = None,
    fit: Annotated[
        FitMode | None,
        typer.Option(
            help="squash, crop or letterbox the pictures. [default: as the model does]", metavar="HOW"
        ),
    ] = None,
    training: Annotated[
        list[Path] | None,
        typer.Option(
            help="Captions that the model was trained on, to count novel ones; may be repeated. "
            "[default: the sources of --config, or train.json of a prepared folder]",
            metavar="FILE",
        ),
    ] = None,
    published: Annotated[
        PublishedData,
        typer.Option(help="Published results to print beside: auto, flickr8k, flickr30k, coco or none."),
    ] = PublishedData.auto,
    spice: Annotated[
        bool | None,
        typer.Option("--spice/--no-spice", help="Run SPICE too. [default: if its models are there]"),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Measure, in the place of scores, whether attention and confidence mean anything.",
        ),
    ] = False,
    pictures: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --trust: of so many pictures, drawn at random, parts are hidden; 0 takes all. Each is "
            "encoded about 30 times. [default: 200]",
            metavar="N",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --trust: write reliability diagrams, .png, .svg or .pdf.", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Device = "auto",
) -> None:
    """Score captions: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

    All by the official code, with bootstrap intervals, beside published results; and what papers leave out.

    Either generates a caption for every picture of --data (once, with the model), or scores --results.

    With --trust it measures instead whether attention and confidence mean anything (docs/evaluation.md).
    """
    with mistakes():
        from captioner_training.scoring import Evaluation, evaluate_files

        chosen = {"beam": beam, "length_penalty": length_penalty}
        if trust:
            for name, given in {
                **{"results": results, "annotations": annotations, "save-results": save_results},
                **{"training": training, "spice": spice, "published": published.value != "auto" or None},
            }.items():
                if given is not None and given != []:
                    fail(f"--{name} is for scores, which --trust does not compute")
            if data is None:
                fail("give --data: pictures with captions in COCO's format")
            from captioner_training.trust import PICTURES
            from captioner_training.trust import trust as measure

            measured = measure(
                _load(model, device),
                data,
                images=images or [],
                split=split,
                highest=highest,
                config=config,
                fit=fit.value if fit else None,
                options={k: v for k, v in chosen.items() if v is not None},
                pictures=PICTURES if pictures is None else pictures,
                plot=plot,
                progress=sys.stderr.isatty(),
            )
            if as_json:
                found = {name: one.to_dict() for name, one in measured.items()}
                show(dumps(found if config is not None else next(iter(found.values())), indent=2))
            else:
                show("\n\n".join(one.format() for one in measured.values()))
            return
        for name, wish in {"pictures": pictures, "plot": plot}.items():
            if wish is not None:
                fail(f"--{name} needs --trust")
        for name, value in {
            **{"model": model, "data": data, "config": config, "images": images, "highest": highest},
            **{"save_results": save_results, "fit": fit, **chosen},
        }.items():
            if results is not None and value:
                fail(f"--{name.replace('_', '-')} is for generating, and --results has captions already")
        evaluations: dict[str, Evaluation]
        if results is not None:
            if annotations is None:
                fail("--results needs --annotations: the references in COCO's captions format")
            evaluation = evaluate_files(
                results, annotations, spice=spice, training=training or [], compare=published.value
            )
            evaluations = {evaluation.name: evaluation}
        elif data is None:
            fail("give --data (captions in COCO's format), or --results with --annotations")
        elif annotations is not None:
            fail("--annotations needs --results; the captions of pictures to generate for are --data")
        else:
            from captioner_training.evaluate import evaluate as run

            evaluations = run(
                _load(model, device),
                data,
                images=images or [],
                split=split,
                highest=highest,
                config=config,
                fit=fit.value if fit else None,
                save_results=save_results,
                options={k: v for k, v in chosen.items() if v is not None},
                spice=spice,
                training=training or [],
                compare=published.value,
                progress=sys.stderr.isatty(),
            )
        if as_json:
            records = {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
            for name, record in records.items():
                for warning in record["warnings"]:
                    say(f"{name}: {warning}")
            show(dumps(records if config is not None else next(iter(records.values())), indent=2))
            return
        show("\n\n".join(evaluation.format() for evaluation in evaluations.values()))


# --------------------------------------------------------------------------------------------------
# demo


@app.command()
def demo(
    model: Model = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Where to listen; 0: any free port. [default: the first free one from 7860]",
            metavar="N",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.", metavar="HOST")
    ] = "127.0.0.1",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")] = False,
    root_path: Annotated[
        str,
        typer.Option(help="Where a proxy shows the page: /captioner.", metavar="PATH", show_default=False),
    ] = "",
    ssl_certfile: Annotated[
        Path | None,
        typer.Option(
            help="With --ssl-keyfile: serve over TLS; else browsers lend other machines no camera.",
            metavar="FILE",
        ),
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="See --ssl-certfile.", metavar="FILE")] = None,
    max_megapixels: Annotated[
        float, typer.Option(help="Of a photo; larger ones are refused.", metavar="X")
    ] = 50.0,
    max_mb: Annotated[
        float, typer.Option(help="Of an uploaded file, in millions of bytes.", metavar="X")
    ] = 50.0,
    max_seconds: Annotated[float, typer.Option(help="Of a video.", metavar="X")] = 300.0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Open a page to try it: photos, words to touch, parts to box.

    The page asks nothing of other machines. It also has an API: see the link at its foot.
    """
    with mistakes("fewer --threads, or --device cpu"):
        try:
            from captioner_demo import Limits, serve
        except ImportError as error:
            fail(f'this needs {error.name}, which is not installed: pip install "captioner[demo]"')
        if threads:
            import torch

            torch.set_num_threads(threads)
        serve(
            model,
            host=host,
            port=port,
            device=device,
            limits=Limits(megapixels=max_megapixels, mb=max_mb, seconds=max_seconds),
            browser=not no_browser,
            root_path=root_path,
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
            say=show,
        )


if __name__ == "__main__":
    main()
