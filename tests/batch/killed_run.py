"""Batch runs with an engine that needs no model, killed at every step that touches the disk; see test_run.py.

    python killed_run.py FOLDER SUFFIX STRIDE ROUNDS

For every STRIDE-th step there is, a run is killed at it, another goes on, and what is there in the end must
be what a run leaves that nobody killed. Then, in so many rounds, runs are killed four times, at steps and
moments drawn at random. Prints how many steps were tried, and how many kills at random.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from captioner.batch import run as runs
from captioner.batch.journal import Journal
from captioner.batch.ledger import Ledger
from captioner.batch.run import Beside, Finished, Run
from captioner.batch.sidecars import Sidecars
from captioner.batch.sources import Source, find_sources

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


def engine(sources: Iterator[Source]) -> Iterator[Finished]:
    for source in sources:
        assert source.file is not None
        yield Finished({"path": source.path, **caption_of(Path(source.file).read_bytes())})


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


def execute(
    folder: Path, output: Path | None, journal: Path, beside: dict[str, Beside], last: int = 0
) -> Run:
    runs.COMMIT_FILES = 3
    if last:
        Journal.commit = counted(Journal.commit, last)  # type: ignore[method-assign]
        Ledger._write = torn(counted(Ledger._write, last), last)  # type: ignore[method-assign]
        os.replace = counted(os.replace, last)
        os.fsync = counted(os.fsync, last)
    with Journal(journal) as opened:
        run = Run(
            opened,
            "tiny",
            output=output,
            errors=journal.with_suffix(".errors.jsonl"),
            min_confidence=0.5,
            beside=beside,
        )
        for _ in run.run(find_sources([folder]), lambda: engine):
            pass
        run.finish()
        return run


def make_folder(folder: Path) -> None:
    folder.mkdir()
    for number in range(1, 11):
        (folder / f"{number:02}.jpg").write_text(f"pic {number}")
    (folder / "04.jpg").write_text("doubt")
    (folder / "07.jpg").write_text("bad")
    (folder / "05.txt").write_text("mine")


def contents(place: Path) -> dict[str, bytes]:
    """Return all files but the journal, by name; of Parquet the rows, for it tells who wrote it when."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.suffix == ".parquet":
            import pyarrow.parquet

            found[path.name] = repr(pyarrow.parquet.read_table(path).to_pylist()).encode()
        elif path.is_file() and not path.name.startswith("journal.j") and path.name != "journal":
            found[path.name] = path.read_bytes()
    return found


def compare(found: dict[str, bytes], expected: dict[str, bytes], what: str) -> None:
    for name in sorted(found.keys() | expected.keys()):
        assert found.get(name) == expected.get(name), (what, name, found.get(name), expected.get(name))


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


def trial(place: Path, suffix: str, *kills: int) -> int:
    """Make a folder, kill runs over it at these steps, and let one end; return how many were killed.

    A negative step is a moment: so many milliseconds after the run has begun SIGKILL comes.
    """
    place.mkdir()
    folder, out = place / "pictures", place / "out"
    make_folder(folder)
    out.mkdir()
    beside: dict[str, Beside] = {"sidecar": Sidecars("append")} if suffix in (".txt", ".jsonl") else {}
    output = None if suffix == ".txt" else out / f"out{suffix}"
    killed = 0
    for last in (*kills, 0):

        def once(last: int = last) -> None:
            os.chdir(place)
            if last < 0:
                signal.setitimer(signal.ITIMER_REAL, -last / 1000)  # SIGALRM kills as SIGKILL does
            execute(Path("pictures"), output, out / "journal", beside, max(0, last))

        code = in_child(once)
        assert code in ((0,) if last == 0 else (0, 9, -signal.SIGALRM)), code
        killed += code != 0
    return killed


def main() -> None:
    place, suffix, stride, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    trial(place / "whole", suffix)
    expected = contents(place / "whole")
    assert len(expected) > 12, expected.keys()
    for step in itertools.count(1, stride):
        here = place / str(step)
        killed = trial(here, suffix, step)
        compare(contents(here), expected, f"killed at step {step}")
        shutil.rmtree(here)
        if not killed:
            break
    draw = random.Random(suffix)
    kills = 0
    for round_ in range(rounds):
        here = place / f"random{round_}"
        kills += trial(
            here, suffix, *(draw.choice((draw.randrange(1, step), -draw.randrange(1, 30))) for _ in range(4))
        )
        compare(contents(here), expected, f"round {round_}")
        shutil.rmtree(here)
    print((step - 1) // stride, kills)


if __name__ == "__main__":
    main()
