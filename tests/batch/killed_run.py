"""Batch runs with an engine that needs no model, killed at every step that touches the disk; see test_run.py.

    python killed_run.py FOLDER KIND STRIDE ROUNDS

For every STRIDE-th step there is, a run is killed at it, another goes on, and what is there in the end must
be what a run leaves that nobody killed. Then, in so many rounds, runs are killed four times, at steps and
moments drawn at random. Prints how many steps were tried, and how many kills at random.

KIND is the suffix of a table, or what is written beside files: txt, alt-text, subtitles; or report.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

import captioner.subtitles  # noqa: F401  (once, and not in every process that is killed)
from captioner.batch import run as runs
from captioner.batch.journal import Journal
from captioner.batch.ledger import Ledger
from captioner.batch.page import preview, write_page
from captioner.batch.run import Beside, Engine, Finished, Run
from captioner.batch.sidecars import Sidecars, SubtitleFiles
from captioner.batch.sources import Source, find_sources
from captioner.images import Preprocess, load

STEPS = 0


def caption_of(data: bytes) -> dict[str, Any]:
    """Return a record by content; a file that begins with ``bad`` has an error."""
    text = data.decode()
    bad = text.startswith("bad")
    record: dict[str, Any] = {"schema": 1, "caption": "" if bad else f"a {text}"}
    if not bad:
        record.update(confidence=0.1 if "doubt" in text else 0.9, score=-1.0, log_probability=-2.0)
        record.update(finished=True, words=[], guesses=[])
    return {**record, "model": "m", "model_sha256": "0", "seconds": 0.0, "error": "damaged" if bad else None}


TEXTS = {f"{number:02}": f"pic {number}" for number in range(1, 11)} | {"04": "doubt", "07": "bad"}


def make_engine(kind: str) -> Engine:
    def engine(sources: Iterator[Source]) -> Iterator[Finished]:
        for source in sources:
            record = {"path": source.path, **caption_of(TEXTS[Path(source.path).stem].encode())}
            if kind == "subtitles" and record["caption"]:
                record["segments"] = [
                    {"start": at, "end": at + 2.0, "caption": f"{record['caption']}, {at}", "confidence": 0.9}
                    for at in (0.0, 2.0)
                ]
            yield Finished(record, look(source) if kind == "report" and record["caption"] else None)

    return engine


def look(source: Source) -> bytes:
    return preview(*load(source.open(), Preprocess(32, "squash", (127.0,) * 3, (128.0,) * 3)))


def beside_of(kind: str) -> dict[str, Beside]:
    if kind == "alt-text":
        from captioner.batch.metadata import AltText

        return {kind: AltText()}
    if kind == "subtitles":
        return {name: SubtitleFiles(name) for name in ("srt", "vtt")}
    return {"sidecar": Sidecars("append")} if kind in ("txt", ".jsonl") else {}


def counted(function: Callable[..., Any], last: int) -> Callable[..., Any]:
    """Count a step before a function is called and one after it; end at the last."""

    def step() -> None:
        global STEPS
        STEPS += 1
        if last == STEPS:
            os._exit(9)

    def call(*arguments: Any, **options: Any) -> Any:
        step()
        result = function(*arguments, **options)
        step()
        return result

    return call


def torn(function: Callable[..., Any], last: int) -> Callable[..., Any]:
    """Write half, count a step, and write the rest."""

    def write(self: Ledger, data: bytes) -> None:
        global STEPS
        if data and self._file is not None:
            STEPS += 1
            if last == STEPS:
                self._file.write(data[: len(data) // 2])
                os._exit(9)
        function(self, data)

    return write


def execute(kind: str, folder: Path, out: Path, last: int = 0) -> None:
    runs.COMMIT_FILES = 3
    if last:
        Journal.commit = counted(Journal.commit, last)  # type: ignore[method-assign]
        Ledger._write = torn(counted(Ledger._write, last), last)  # type: ignore[method-assign]
        os.replace = counted(os.replace, last)
        os.fsync = counted(os.fsync, last)
    with Journal(out / "journal") as opened:
        run = Run(
            opened,
            "tiny",
            output=None if kind == "txt" else out / f"out{kind if kind[0] == '.' else '.jsonl'}",
            errors=out / "journal.errors.jsonl",
            min_confidence=0.5,
            beside=beside_of(kind),
            looks=kind == "report",
        )
        for _ in run.run(find_sources([folder]), lambda: make_engine(kind)):
            pass
        run.finish()
        if kind == "report":
            write_page(out / "report.html", "all", opened.previews())


def make_folder(folder: Path) -> None:
    folder.mkdir()
    for number, name in enumerate(TEXTS):
        Image.new("RGB", (16, 12), (20 * number, 99, 9)).save(folder / f"{name}.jpg")
    (folder / "05.txt").write_text("mine")
    (folder / "06.srt").write_text("mine, too")


def contents(place: Path) -> dict[str, bytes]:
    """Return all files but the journal, by name; of Parquet the rows, for it tells who wrote it when."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.suffix == ".parquet":
            import pyarrow.parquet

            found[path.name] = repr(pyarrow.parquet.read_table(path).to_pylist()).encode()
        elif path.suffix == ".html":  # which names the place that it was written at
            found[path.name] = re.sub(rb'"key":"[0-9a-f]+"', b"", path.read_bytes())
        elif path.is_file() and not path.name.startswith("journal.j") and path.name != "journal":
            found[path.name] = path.read_bytes()
    return found


def compare(found: dict[str, bytes], expected: dict[str, bytes], what: str) -> None:
    for name in sorted(found.keys() | expected.keys()):
        one, other = found.get(name, b"nothing"), expected.get(name, b"nothing")
        assert one == other, (what, name, one[-1000:], other[-1000:])


def in_child(function: Callable[[], object]) -> int:
    """Run a function in a forked process; return its exit code."""
    child = os.fork()
    if not child:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trial(place: Path, kind: str, *kills: int) -> int:
    """Make a folder, kill runs over it at these steps, and let one end; return how many were killed.

    A negative step is a moment: so many milliseconds after the run has begun SIGKILL comes.
    """
    place.mkdir()
    folder, out = place / "pictures", place / "out"
    make_folder(folder)
    out.mkdir()
    killed = 0
    for last in (*kills, 0):

        def once(last: int = last) -> None:
            os.chdir(place)
            if last < 0:
                signal.setitimer(signal.ITIMER_REAL, -last / 1000)  # SIGALRM kills as SIGKILL does
            execute(kind, Path("pictures"), out, max(0, last))

        code = in_child(once)
        assert code in ((0,) if last == 0 else (0, 9, -signal.SIGALRM)), code
        killed += code != 0
    return killed


def main() -> None:
    place, kind, stride, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    trial(place / "whole", kind)
    expected = contents(place / "whole")
    assert len(expected) > 12, expected.keys()
    for step in itertools.count(1, stride):
        here = place / str(step)
        killed = trial(here, kind, step)
        compare(contents(here), expected, f"killed at step {step}")
        shutil.rmtree(here)
        if not killed:
            break
    draw = random.Random(kind)
    kills = 0
    for round_ in range(rounds):
        here = place / f"random{round_}"
        kills += trial(
            here, kind, *(draw.choice((draw.randrange(1, step), -draw.randrange(1, 12))) for _ in range(4))
        )
        compare(contents(here), expected, f"round {round_}")
        shutil.rmtree(here)
    print((step - 1) // stride, kills)


if __name__ == "__main__":
    main()
