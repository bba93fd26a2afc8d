"""The batch command: ``captioner caption FOLDER --output results.jsonl`` and what goes with it."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from captioner import identity
from captioner.batch.chunks import WorkersError
from captioner.batch.engines import Seeds, devices_engine, identity_of, local_engine, look_closely, ray_engine
from captioner.batch.journal import Journal
from captioner.batch.run import Beside, Engine, Run, Stopped, errors_of, is_list_of, journal_of
from captioner.batch.sources import Missing, Source, find_sources
from captioner.batch.tables import TableFormatError, check_output, image_id, to_json
from captioner.batch.watch import WatchError, is_settled
from captioner.console import FAILED, INTERRUPTED, STOPPED, TERMINATED, UNUSABLE, fail, say
from captioner.files import open_atomically, remove_leftovers
from captioner.inputs import printable

if TYPE_CHECKING:
    from captioner.captioner import Captioner
    from captioner.outputs import Progress

WORDS = "words around captions"
"""Under what the journal keeps --before and --after."""
COMPLAINTS = 20
"""How many errors are told as they come."""
SHOWN = 3
"""How many kinds of error are told at the end of a run with more."""


@dataclass
class Batch:
    """What the command line asks for.

    Attributes:
        paths, recursive, column: see `captioner.batch.sources.find_sources`.
        output: the table, or None.
        journal: or None for ``OUTPUT.journal``; without an output ``.captioner.journal`` in the folder of the
            first path.
        sidecars, alt_text, srt, vtt: what is written beside files.
        existing, before, after: see `captioner.batch.sidecars.Sidecars`.
        min_confidence, checksum: see `Run`.
        strict: whether a file that cannot be captioned makes the exit code 1.
        report: the contact sheet, or None.
        watch: go on as files arrive; poll: list the folders again and again to see that.
        ray, address, workers: see `captioner.batch.on_ray`.
        model, device, precision, threads: of the captioner.
        batch_size, clips, options: see `captioner.batch.caption_media`.
    """

    paths: Sequence[str]
    recursive: bool = False
    column: str | None = None
    output: Path | None = None
    journal: Path | None = None
    sidecars: bool = False
    alt_text: bool = False
    srt: bool = False
    vtt: bool = False
    existing: str = "keep"
    before: str = ""
    after: str = ""
    min_confidence: float = 0.0
    checksum: bool = False
    strict: bool = False
    report: Path | None = None
    watch: bool = False
    poll: bool = False
    ray: bool = False
    address: str | None = None
    workers: int | None = None
    model: Path | None = None
    device: str = "auto"
    precision: str = "float32"
    threads: int = 0
    batch_size: int = 32
    clips: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def find(self) -> Iterator[Source | Missing]:
        """Find the files."""
        return find_sources(self.paths, recursive=self.recursive, column=self.column)

    @property
    def place(self) -> Path:
        """What the journal and the file of errors are called after."""
        if self.output is not None:
            return self.output
        first = Path(self.paths[0])
        local = self.paths[0] != "-" and "://" not in self.paths[0]
        folder = first if first.is_dir() else first.parent if local and first.parent.is_dir() else Path()
        return folder / ".captioner"

    @property
    def errors(self) -> Path:
        """Where what could not be captioned is listed."""
        return errors_of(self.place)


def run_batch(batch: Batch) -> int:
    """Run the batch command; return its exit code, see ``docs/batch.md``."""
    if batch.output is not None:
        check_output(batch.output)
    if batch.report is not None:
        _check_report(batch.report)
    if batch.watch:
        for path in batch.paths:
            if not os.path.isdir(path):
                fail(f"{path}: --watch watches folders; give the folder that the files arrive in")
    beside = _beside(batch)
    checks = batch.sidecars or batch.srt or batch.vtt or _is_coco(batch)
    found = _checked(batch) if checks else None
    place = batch.place
    with Journal(batch.journal or journal_of(place)) as journal:
        run = Run(
            journal,
            identity_of(
                identity.fingerprint(batch.model or identity.BUILT_IN),
                batch.options,
                batch.clips,
                batch.precision,
            ),
            output=batch.output,
            errors=batch.errors,
            min_confidence=batch.min_confidence,
            use_checksum=batch.checksum,
            beside=beside,
            looks=batch.report is not None,
        )
        if batch.sidecars:  # for `captioner apply`
            journal.put(WORDS, {"before": batch.before, "after": batch.after})
        code = 0
        with _signals(run) as signalled:
            try:
                _caption(batch, run, found)
                if batch.watch and not run.stopping:
                    _watch(batch, run)
            except (Stopped, WatchError) as stop:
                say(f"stopped: {stop}; what was captioned is kept, and the same command goes on")
                code = STOPPED
            except WorkersError as error:
                if not run.has_results:
                    raise
                say(f"stopped: {error}; what was captioned is kept, and the same command goes on")
                code = STOPPED
            except KeyboardInterrupt:
                run.stop.set()
            try:
                run.finish()
                if batch.report is not None:
                    _report(batch, run, batch.report)
            except (Stopped, TableFormatError) as stop:
                if not code:
                    say(f"stopped: {stop}; what was captioned is kept, and the same command goes on")
                code = STOPPED
        _summarise(batch, run)
        if code:
            return code
        if batch.watch:  # which only a signal ends
            return TERMINATED if signal.SIGTERM in signalled else _code(batch, run)
        if run.stopping:
            say("interrupted; the same command goes on where it was")
            return TERMINATED if signal.SIGTERM in signalled else INTERRUPTED
        return _code(batch, run)


def _failures(batch: Batch, run: Run) -> int:
    """Count what could not be captioned; of a watched folder what stands at the end."""
    counts = run.counts
    return sum(1 for _ in run.failures()) if batch.watch else counts.failed + len(counts.missing)


def _code(batch: Batch, run: Run) -> int:
    counts, failures = run.counts, _failures(batch, run)
    if failures and not counts.captioned + counts.skipped:
        return UNUSABLE
    if not counts.seen and not batch.watch:
        fail("there was nothing to caption")
    return FAILED if failures and batch.strict else 0


def _is_coco(batch: Batch) -> bool:
    return batch.output is not None and batch.output.suffix.lower() == ".json"


def _checked(batch: Batch) -> list[Source | Missing]:
    """Find all files, and refuse to begin if two of them want the same file or id."""
    found = list(batch.find())
    sources = [item for item in found if isinstance(item, Source)]
    files = [source.path for source in sources if source.file is not None]
    for wanted, suffix in ((batch.sidecars, ".txt"), (batch.srt, ".srt"), (batch.vtt, ".vtt")):
        if wanted:
            _refuse_clashes(files, suffix)
    if _is_coco(batch):
        seen: dict[int | str, str] = {}
        for source in sources:
            other = seen.setdefault(image_id(source.path), source.path)
            if other != source.path:
                fail(
                    f"--output {batch.output}: {other} and {source.path} would have the same COCO id; "
                    "give .jsonl instead of .json, or rename one"
                )
    return found


def _refuse_clashes(files: Iterable[str], suffix: str) -> None:
    from captioner.batch.sidecars import clashes

    if suffix != ".txt":
        from captioner.inputs import VIDEO_SUFFIXES

        files = (path for path in files if os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES)
    lines = list(islice(clashes(files, suffix), 6))
    for line in lines[:5]:
        say(line)
    if lines:
        fail(f"nothing was captioned: rename these files, or do without {suffix} files beside them")


def _beside(batch: Batch) -> dict[str, Beside]:
    found: dict[str, Beside] = {}
    if batch.alt_text:
        from captioner.batch.metadata import AltText

        found["alt-text"] = AltText()
    if batch.sidecars:
        from captioner.batch.sidecars import Sidecars

        found["sidecar"] = Sidecars(batch.existing, batch.before, batch.after)
    for kind, wanted in (("srt", batch.srt), ("vtt", batch.vtt)):
        if wanted:
            from captioner.batch.sidecars import SubtitleFiles

            found[kind] = SubtitleFiles(kind, batch.existing)
    return found


@contextmanager
def _signals(run: Run) -> Iterator[list[int]]:
    """Let the first Ctrl-C, or SIGTERM, end what is in work, and the second end everything."""
    signalled: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if run.stopping:
            raise KeyboardInterrupt
        signalled.append(number)
        run.stop.set()
        say("finishing what is in work; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield signalled
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------


def _caption(
    batch: Batch,
    run: Run,
    found: Sequence[Source | Missing] | None,
    load: Callable[[], Captioner] | None = None,
) -> None:
    from captioner.outputs import Progress

    starts_watching = batch.watch and load is None
    load = load or (lambda: _load(batch))

    with Progress(None if found is None else len(found), dict(batch.clips)) as progress:
        run.tick = progress.reach
        complaints = itertools.count(1)

        def complain(reason: str) -> None:
            number = next(complaints)
            if number <= COMPLAINTS:
                progress.say(reason)
            elif number == COMPLAINTS + 1:
                progress.say(f"further errors: see {batch.errors}")

        run.complain = complain
        if found is None and progress.shown and _is_quick_to_list(batch.paths):
            threading.Thread(target=_count, args=(batch, progress), daemon=True).start()
        listed = batch.find() if found is None else iter(found)
        if "-" in batch.paths:
            listed = _until(lambda: run.stopping, listed)
        if starts_watching:
            listed = (item for item in listed if not _is_arriving(item, run))
        records = run.run(listed, lambda: _make_engine(batch, run, progress, load))
        for _ in records:
            pass


def _is_arriving(item: Source | Missing, run: Run) -> bool:
    """Tell whether the first look into a watched folder leaves this to the watching.

    A file that is still being copied; not one that is done, beside which something may be missing; and that
    a folder is empty.
    """
    if isinstance(item, Missing):
        return os.path.isdir(item.path) and os.access(item.path, os.R_OK | os.X_OK)
    return not run.knows(item.path) and not is_settled(item.path)


def _until(stopping: Callable[[], bool], items: Iterator[Any]) -> Iterator[Any]:
    """Yield items until there are no more or it is time to stop, also while nothing comes."""
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(16)  # some hold whole pictures

    def read() -> None:
        try:
            for item in items:
                waiting.put(("item", item))
        except BaseException as error:
            waiting.put(("error", error))
        waiting.put(("end", None))

    threading.Thread(target=read, daemon=True).start()
    while not stopping():
        with suppress(queue.Empty):
            what, item = waiting.get(timeout=0.2)
            if what == "end":
                return
            if what == "error":
                raise item
            yield item


def _is_quick_to_list(paths: Sequence[str]) -> bool:
    """Tell whether all can be listed twice: they are no streams, and on this machine."""
    streams = ("-", ".gz", ".tgz", ".bz2", ".xz")
    return not any("://" in path or path.lower().endswith(streams) for path in paths)


def _count(batch: Batch, progress: Progress) -> None:
    """Count the files for the bar, while they are captioned."""
    try:
        progress.expect(sum(1 for _ in batch.find()))
    except Exception:  # whoever captions them says what is wrong
        return


def _make_engine(batch: Batch, run: Run, progress: Progress, load: Callable[[], Captioner]) -> Engine:
    """Return what captions: this machine, or Ray."""
    options = dict(batch.options)
    if options.get("sample"):
        options["seed"] = Seeds(options.get("seed", 0))
    look = look_closely if batch.report is not None else None
    if batch.ray:
        return ray_engine(
            model=batch.model,
            options=options,
            clips=batch.clips,
            batch_size=batch.batch_size,
            precision=batch.precision,
            look=look,
            address=batch.address,
            workers=batch.workers,
        )
    from captioner.batch.on_devices import devices

    several = devices(batch.device)
    if len(several) > 1 and not batch.watch:
        return devices_engine(
            several,
            model=batch.model,
            options=options,
            clips=batch.clips,
            batch_size=batch.batch_size,
            precision=batch.precision,
            threads=batch.threads,
            look=look,
            stopping=run.stop.is_set,
        )
    captioner = load()

    def report(path: str, seconds: float) -> None:
        if run.stopping:  # a clip may take hours; what is captioned of it is kept
            raise KeyboardInterrupt
        progress.reading(path, seconds)

    return local_engine(
        captioner,
        batch_size=batch.batch_size,
        clips=batch.clips,
        progress=report,
        look=look,
        **options,
    )


def _load(batch: Batch) -> Captioner:
    """Load the model."""
    import torch

    from captioner.batch.on_devices import devices
    from captioner.captioner import Captioner

    if batch.threads:
        torch.set_num_threads(batch.threads)
    return Captioner.load(batch.model, device=devices(batch.device)[0], precision=batch.precision)


def _watch(batch: Batch, run: Run) -> None:
    """Go on as files arrive."""
    from captioner.batch.watch import watch

    kept: list[Captioner] = []

    def load() -> Captioner:
        if not kept:
            kept.append(_load(batch))
        return kept[0]

    say(f"watching {', '.join(batch.paths)}; Ctrl-C ends it")
    for paths in watch(
        batch.paths, batch.recursive, ignore=run.knows, force_polling=batch.poll, stop=run.stop
    ):
        # what has gone in the meantime is no error
        _caption(batch, run, [item for item in find_sources(paths) if isinstance(item, Source)], load)
        run.settle()


# ----------------------------------------------------------------------------------------------


def _check_report(path: Path) -> None:
    from importlib.util import find_spec

    from captioner.batch.page import is_page

    if path.suffix.lower() not in (".html", ".htm"):
        fail(f"--report {path}: expected a name that ends in .html")
    if not path.parent.is_dir():
        fail(f"--report {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        fail(f"--report {path}: the folder {path.parent} cannot be written to; choose another")
    alike = _alike_of(path)
    for file, ours in ((path, is_page(path)), (alike, is_list_of(["alike"], alike))):
        if not ours:
            fail(
                f"--report {path}: {file} exists and holds something else; move it away, or give another name"
            )
    if find_spec("imagehash") is None:
        fail('--report needs ImageHash for pictures that look alike: pip install "captioner[report]"')


def _alike_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.alike.jsonl")


def _report(batch: Batch, run: Run, path: Path) -> None:
    """Write the contact sheet, and a list of what looks alike beside it."""
    from captioner.batch.alike import near_duplicates, repeated, summary_lines
    from captioner.batch.page import write_page

    groups = near_duplicates(run.journal.likenesses())
    captions = (record["caption"] for _, record in run.journal.records())
    title = f"Captions of {', '.join(batch.paths[:3])}{', …' if len(batch.paths) > 3 else ''}"
    options = {"doubtful": batch.min_confidence} if batch.min_confidence else {}
    try:
        count = write_page(path, title, run.journal.previews(), groups, **options)
        alike = _alike_of(path)
        remove_leftovers(alike)
        if groups:
            with open_atomically(alike) as file:
                for group in groups:
                    file.write(f"{to_json({'alike': group})}\n".encode())
        else:
            alike.unlink(missing_ok=True)
    except OSError as error:
        raise Stopped(f"{error.filename or path}: {error.strerror or error}") from None
    say(f"{path} shows {_files(count)}")
    for line in summary_lines(groups, repeated(captions)):
        say(line)


def _summarise(batch: Batch, run: Run) -> None:
    counts = run.counts
    parts = [f"captioned {_files(counts.captioned)}"]
    if counts.skipped:
        parts.append(f"{_files(counts.skipped)} done before")
    if counts.looked:
        parts.append(f"{_files(counts.looked)} looked at once more for --report")
    failures = _failures(batch, run)
    if failures:
        parts.append(f"{_files(failures)} could not be: see {batch.errors}")
    say("; ".join(parts))
    if counts.doubtful and batch.output is not None:
        review = batch.output.with_name(f"{batch.output.stem}.review{batch.output.suffix}")
        say(f"{_files(counts.doubtful)} below --min-confidence {batch.min_confidence}: see {review}")
    if any(ledger.sorted_anew for ledger in run.ledgers) and not counts.doubtful:
        say(f"{batch.output} was sorted anew by --min-confidence {batch.min_confidence}")
    for ledger in run.ledgers:
        if ledger.moved is not None:
            say(f"{ledger.path} had been edited; that is now {ledger.moved}")
    for name, count in counts.written.items():
        if count:
            say(f"wrote {_WRITTEN[name]} {_files(count)}")
    if counts.kept:
        for path, reason in counts.kept[:SHOWN]:
            say(f"{path}: {reason}" if not reason.startswith(path) else reason)
        if len(counts.kept) > SHOWN:
            say(f"and {len(counts.kept) - SHOWN:,} more files beside which nothing was written")
    if failures > COMPLAINTS:
        kinds = Counter(error.removeprefix(f"{printable(path)}: ") for path, error in run.failures())
        for reason, count in kinds.most_common(SHOWN):
            say(f"{count:,} x {reason}")


_WRITTEN = {
    "sidecar": "text files beside",
    "alt-text": "alt text into",
    "srt": "subtitles (.srt) beside",
    "vtt": "subtitles (.vtt) beside",
}


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def apply(
    table: Path,
    *,
    sidecars: bool,
    alt_text: bool,
    existing: str,
    before: str,
    after: str,
    dry_run: bool,
    journal: Path | None,
) -> int:
    """Write the captions of an edited table; return the exit code. See `captioner.batch.apply.run_apply`."""
    from captioner.batch.apply import run_apply

    wish: dict[str, Any] = {"sidecars": sidecars, "alt_text": alt_text, "existing": existing}
    wish.update(before=before, after=after, dry_run=dry_run)
    place = journal or journal_of(table)
    if not place.exists():
        if journal is not None:
            fail(f"--journal {journal}: there is no such file")
        return run_apply(table, **wish)
    with Journal(place) as noted:
        words = noted.get(WORDS) or {}  # of the run, unless others are given
        if not alt_text or sidecars:
            wish.update(before=before or words.get("before", ""), after=after or words.get("after", ""))

        def note(path: str, output: str, target: Path, digest: str) -> None:
            noted.plan(path, output, target, digest)
            noted.commit()  # before it is written

        return run_apply(table, ours=noted.planned, note=note, **wish)
