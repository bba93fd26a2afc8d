"""Captioning on several devices of one machine: a process for each, with a model of its own.

Chunks of sources go to the processes, records come back in any order. A process that dies (of a decoder's
bug, or killed for want of memory) is replaced; what it had in work is done again, file by file, and a file of
which another dies becomes a record with an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.batch.chunks import (
    DEADLY,
    Chunk,
    Facts,
    Record,
    WorkersError,
    caption_chunk,
    cut,
    facts_of,
    last_line,
    refuse,
)
from captioner.batch.sources import Source

if TYPE_CHECKING:
    from captioner.captioner import Captioner

AHEAD = 2
"""Chunks that a process has at most: one is in work, the other waits."""
LARGE_CHUNK = 4
"""Batches in a chunk for a GPU: one is computed, the next decoded."""
DEATHS = 2
"""How many processes may die of a file, the second of it alone, before it is given up."""
STARTS = 3
"""How many processes in a row may die before they have begun."""
PATIENCE = 0.2
"""Seconds after which it is asked again whether a person has stopped the run."""


class DeviceError(WorkersError):
    """The processes cannot be used, or not any longer; one line that says why."""


def devices(names: str) -> list[str]:
    """Return the devices of ``--device`` in a batch: ``auto`` is every CUDA GPU if there are several.

    Args:
        names: one device, see `captioner.captioner.Captioner.load`, or several with commas between them.

    Raises:
        ValueError: one of them is unknown or not there, or named twice (but for ``cpu``).
    """
    import torch

    from captioner.captioner import choose_device

    if names == "auto":
        count = torch.cuda.device_count()
        return [f"cuda:{number}" for number in range(count)] if count > 1 else [names]
    chosen = [name.strip() for name in names.split(",")]
    found = [choose_device(name) for name in chosen]
    gpus = [(device.type, device.index or 0) for device in found if device.type != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise ValueError(f"--device {names}: a device is named twice")
    return chosen


def caption_on_devices(
    sources: Iterable[Source],
    devices: Sequence[str],
    *,
    model: Path | None = None,
    options: Mapping[str, Any] | None = None,
    clips: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    precision: str = "float32",
    threads: int = 0,
    look: Callable[..., Any] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Caption sources in a process for each device; yield records as they are finished, in any order.

    To stop early without losing what is in work, let ``sources`` end; closing the iterator drops it.

    Args:
        sources: what is to be captioned; advanced a few chunks ahead.
        devices: names, see `captioner.captioner.Captioner.load`; the CPU may be named more than once.
        model: a checkpoint; None for the built-in one.
        options: of `captioner.batch.caption_media`, ``seed`` among them; must be picklable.
        clips: likewise, for videos.
        batch_size: photos that go through the network together.
        precision: of the encoder, see `Captioner.load`.
        threads: of all processes together; 0 for one on every core.
        look: what else is to be made of every photo, see `captioner.batch.caption_files`; must be picklable,
            and records have what it returned under ``looked``.
        stopping: whether videos in work are to end where they are.

    Yields:
        for each source once what `captioner.batch.to_record` gives, without attention.

    Raises:
        DeviceError: processes end again and again.
        ValueError: for a checkpoint that cannot be used, a device that is not there or impossible options.
    """
    setup = {
        "model": model,
        "options": dict(options or {}),
        "more": {"batch_size": batch_size, "clips": dict(clips or {}), "look": look},
        "precision": precision,
        "threads": max(1, (threads or _cores()) // len(devices)),
    }
    size = batch_size * (1 if "cpu" in devices else LARGE_CHUNK)
    run = _Run(cut(sources, size, len(devices)), setup, devices, stopping)
    try:
        yield from run.records()
    finally:
        run.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------------------
# in a process of its own


@dataclass(frozen=True)
class _Mistake:
    """A user's mistake, found by a process."""

    line: str


def _work(setup: dict[str, Any], device: str, inbox: Connection, outbox: Connection, stop: Any) -> None:
    """Caption the chunks that come in, until there are no more or whoever sends them is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever sends the chunks decides
        signal.signal(number, signal.SIG_IGN)
    chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()

    def receive() -> None:  # so that the sender need not wait while something is captioned
        with contextlib.suppress(EOFError, OSError):
            while True:
                chunks.put(inbox.recv())
        os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    try:
        captioner = _load(setup, device)
    except Exception as error:  # a user's mistake, or a device that is busy, full or broken
        plain = isinstance(error, (ValueError, ImportError))
        outbox.send(_Mistake(str(error) if plain else f"{device}: {last_line(error)}"))
        return
    try:
        facts = facts_of(captioner)
        outbox.send(facts)
        while True:
            outbox.send(_caption(captioner, facts, chunks.get(), setup, stop))
    except (ValueError, ImportError) as error:
        outbox.send(_Mistake(str(error)))


def _load(setup: dict[str, Any], device: str) -> Captioner:
    import torch

    from captioner.captioner import Captioner

    torch.set_num_threads(setup["threads"])
    return Captioner.load(setup["model"], device=device, precision=setup["precision"])


def _caption(
    captioner: Captioner, facts: Facts, chunk: Chunk, setup: dict[str, Any], stop: Any
) -> list[Record] | None:
    """Return the records of a chunk; None if that failed, and its files are to be done one by one."""

    def report(path: str, seconds: float) -> None:
        if stop.value:  # a clip may take hours; what is captioned of it is kept
            raise KeyboardInterrupt

    records: list[Record] = []
    more = {**setup["more"], "progress": report}
    try:
        records.extend(caption_chunk(captioner, chunk, setup["options"], **more))
    except KeyboardInterrupt:
        pass
    except (ValueError, ImportError):
        raise
    except Exception as error:  # memory, or a bug
        if len(chunk) > 1:
            return None
        reason = f"{type(error).__name__}: {last_line(error)}"
        return [refuse(chunk[0][1], reason, facts, more["look"])]
    return records


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    """Keep Ctrl-C from processes that begin now, until they see to it themselves; here it comes later."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --------------------------------------------------------------------------------------------------
# the caller's side


@dataclass(eq=False)
class _Process:
    """A process, and the chunks that it has, in order."""

    device: str
    process: Any
    inbox: Connection
    outbox: Connection
    chunks: deque[Chunk] = field(default_factory=deque)
    facts: Facts | None = None

    def close(self, patience: float = 0.0) -> None:
        """End it; what it has in work is lost."""
        self.inbox.close()
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.outbox.close()


class _Run:
    def __init__(
        self,
        chunks: Iterator[Chunk],
        setup: dict[str, Any],
        devices: Sequence[str],
        stopping: Callable[[], bool],
    ) -> None:
        self.chunks, self.setup, self.devices, self.stopping = chunks, setup, devices, stopping
        self.context = get_context("spawn")  # CUDA does not survive a fork
        self.stop = self.context.RawValue(ctypes.c_bool, False)  # no lock that a dead process could hold
        self.processes: list[_Process | None] = [None] * len(devices)
        self.again: deque[Chunk] = deque()
        self.deaths: Counter[int] = Counter()
        self.unborn = 0

    def records(self) -> Iterator[Record]:
        """Yield records until there are no more chunks."""
        while True:
            self._feed()
            at_work = {item.outbox: item for item in self.processes if item is not None and item.chunks}
            if not at_work:
                return
            if self.stopping():
                self.stop.value = True
            heard = wait([*at_work], PATIENCE)
            for outbox, process in at_work.items():
                if outbox in heard:
                    yield from self._answer(process)

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            if process is not None:
                process.close(patience=0.0 if process.chunks else 2.0)

    def _feed(self) -> None:
        """Give everybody something to do, first one chunk each, then another."""
        for wanted in range(1, AHEAD + 1):
            for number, device in enumerate(self.devices):
                process = self.processes[number]
                if process is not None and len(process.chunks) >= wanted:
                    continue
                chunk = self.again.popleft() if self.again else next(self.chunks, None)
                if chunk is None:
                    return
                if process is None:
                    process = self.processes[number] = self._start(device)
                process.chunks.append(chunk)
                with contextlib.suppress(OSError):  # it has died, which is seen when it is asked
                    process.inbox.send(chunk)

    def _start(self, device: str) -> _Process:
        mine, inbox = self.context.Pipe(duplex=False)[::-1]
        outbox, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_work, args=(self.setup, device, inbox, theirs, self.stop), daemon=True
        )
        with _no_signals():
            process.start()
        inbox.close()
        theirs.close()  # so that its end is the end of what comes
        return _Process(device, process, mine, outbox)

    def _answer(self, process: _Process) -> Iterator[Record]:
        """Yield what a process has made of its first chunk."""
        try:
            answer = process.outbox.recv()
        except (EOFError, OSError):
            yield from self._bury(process)
            return
        if isinstance(answer, _Mistake):
            raise ValueError(answer.line)
        if process.facts is None:
            process.facts, self.unborn = answer, 0
            return
        chunk = process.chunks.popleft()
        if answer is None:
            self.again.extend([item] for item in chunk)
        else:
            yield from answer

    def _bury(self, process: _Process) -> Iterator[Record]:
        """Have the chunks of a process that has died done by others."""
        self.processes[self.processes.index(process)] = None
        process.close(patience=5.0)
        if process.facts is None:
            self.again.extend(process.chunks)
            self.unborn += 1
            if self.unborn == STARTS:
                raise DeviceError(
                    f"{process.device}: {STARTS} processes that were to caption there ended as they began "
                    f"(exit code {process.process.exitcode}); fewer devices need less memory"
                )
            return
        first, *others = process.chunks
        self.again.extend(others)
        self.deaths.update(number for number, _ in first)
        for number, source in first:
            if len(first) == 1 and self.deaths[number] == DEATHS:
                yield refuse(source, DEADLY, process.facts, self.setup["more"]["look"])
            else:
                self.again.append([(number, source)])
