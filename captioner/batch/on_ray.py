"""Captioning on a Ray cluster: the same records as on one machine, from as many as there are.

Ray Data carries it: one read task, which waits for work, and ``map_batches`` over a pool of actors that load
the model once each. What flows through Ray Data are the numbers of chunks (a batch of photos, or one video).
Their sources wait at a small actor, the desk, and are forgotten as soon as their records have arrived, so
that memory does not grow with the number of files. The caller's iterator is only advanced while there is
room for more.

Ray may run a chunk twice (a worker or a machine dies, a result is lost on the way); what arrives twice is
dropped here. If Ray gives up altogether, a new pool is started with what is unfinished.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner.batch.chunks import (
    DEADLY,
    Chunk,
    Record,
    WorkersError,
    caption_chunk,
    cut,
    facts_of,
    last_line,
    refuse,
)
from captioner.batch.sources import Source
from captioner.identity import BUILT_IN

AHEAD = 3
"""Chunks that wait or are in work, for each worker."""
DEATHS = 1
"""How many workers may die of a file that is alone in work, after one has died of its chunk."""
RESTARTS = 3
"""How often in a row Ray may fail without a single record before that is the end."""
LARGE_CHUNK = 4
"""Batches in a chunk with GPUs (one is computed, the next decoded) or many workers (less to tell)."""
MANY_WORKERS = 16
GPU_CORES = 8
"""CPU cores that a worker with a GPU takes at most, to decode."""


class ClusterError(WorkersError):
    """Ray cannot be used, or not any longer; one line that says what to do."""


def caption_on_ray(
    sources: Iterable[Source],
    *,
    model: Path | None = None,
    options: Mapping[str, Any] | None = None,
    clips: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    precision: str = "float32",
    look: Callable[..., Any] | None = None,
    address: str | None = None,
    workers: int | None = None,
) -> Iterator[Record]:
    """Caption sources on a Ray cluster and yield their records as they are finished, in any order.

    To stop early without losing what is in work, let ``sources`` end; closing the iterator drops it.

    Args:
        sources: what is to be captioned; advanced in the thread that asks for records, a few chunks ahead.
        model: a checkpoint on this machine, sent to the workers; None for the built-in one.
        options: of `captioner.batch.caption_media`, ``seed`` among them; must be picklable.
        clips: likewise, for videos.
        batch_size: photos that go through the network together.
        precision: of the encoder, see `Captioner.load`.
        look: what else is to be made of every photo, see `captioner.batch.caption_files`; must be picklable,
            and records have what it returned under ``looked``.
        address: of the cluster, ``host:port``; None for ``$RAY_ADDRESS``, else one that runs on this
            machine, else one that is started here and stopped at the end. If `ray.init` has been called,
            that cluster is used.
        workers: how many processes; None for one on every core, or on every GPU if there are any. More than
            there is room for wait until the cluster grows.

    Yields:
        for each source once what `captioner.batch.to_record` gives, without attention. What cannot be read,
        and what brings down the process that reads it, has an error.

    Raises:
        ClusterError: Ray is not installed, or the cluster cannot be reached, or fails again and again.
        CheckpointError: the checkpoint cannot be used.
        ValueError: for impossible options, with the first record asked for.
    """
    ray = import_ray()
    address = address or os.environ.get("RAY_ADDRESS") or None
    _check_address(address)
    file = Path(model) if model is not None else BUILT_IN
    setup: dict[str, Any] = {
        "options": dict(options or {}),
        "clips": dict(clips or {}),
        "look": look,
        "precision": precision,
        "batch_size": batch_size,
        "folder": os.getcwd(),
    }
    checkpoint = _check(file, setup["options"], precision)
    with _quiet(), _cluster(ray, address):
        room = _room(ray, workers)
        size = batch_size * (LARGE_CHUNK if room.gpus or room.workers >= MANY_WORKERS else 1)
        chunks = cut(sources, size, room.workers)
        setup.update(threads=room.cores, gpu=bool(room.gpus), checkpoint=ray.put(checkpoint))
        yield from _Run(ray, chunks, setup, room).records()


def import_ray() -> Any:
    """Import Ray Data so that it reports to nobody and prints nothing.

    Raises:
        ClusterError: it is not installed.
    """
    # read when ray is imported, and inherited by its workers
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # all that it would print to standard output of dead workers
    }.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ClusterError(
            f'Ray Data is needed ({error.name} is missing): pip install "captioner[ray]"'
        ) from None
    return ray


def _check(model: Path, options: dict[str, Any], precision: str) -> bytes:
    """Return the checkpoint's bytes; mistakes are found here, before a cluster is started or kept busy."""
    from captioner.captioner import Captioner
    from captioner.checkpoint import CheckpointError

    captioner = Captioner.load(model, device="cpu", precision=precision)
    captioner.check(**{name: value for name, value in options.items() if name not in _UNCHECKED})
    try:
        return model.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{model}: {error.strerror}") from None


_UNCHECKED = ("prefix", "region", "seed")


# --------------------------------------------------------------------------------------------------
# the cluster


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Ray Data reports about its work off the terminal; its log files have it."""
    handlers = logging.getLogger("ray.data").handlers
    console = [handler for handler in handlers if "file" not in type(handler).__name__.lower()]
    levels = [handler.level for handler in console]
    for handler in console:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for handler, level in zip(console, levels, strict=True):
            handler.setLevel(level)


@contextmanager
def _hushed() -> Iterator[None]:
    """Turn standard error off, also for Ray's C++, and keep Ray from replacing the handler of SIGTERM."""
    level = "RAY_BACKEND_LOG_LEVEL"
    chosen, handler = os.environ.get(level), signal.getsignal(signal.SIGTERM)
    os.environ.setdefault(level, "fatal")
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, AttributeError, ValueError):  # closed
        kept = None
    else:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    try:
        yield
    finally:
        if kept is not None:
            os.dup2(kept, 2)
            os.close(kept)
        if chosen is None:
            os.environ.pop(level, None)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start one for the time being; quietly."""
    if ray.is_initialized():
        yield
        return
    new = {} if address else {"include_dashboard": False}
    try:
        with _hushed():
            # without an address Ray looks for a cluster on this machine and starts one if there is none
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **new)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        if not address:
            raise ClusterError(f"Ray does not start: {last_line(error)}") from None
        raise ClusterError(
            f"{address}: the Ray cluster there cannot be used: {last_line(error)}; if it asks for a token, "
            "set RAY_AUTH_MODE=token here too"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str | None) -> None:
    """See quickly that somebody listens; Ray itself would try for a minute and print what it thinks."""
    if address is None or address in ("auto", "local"):
        return
    if "://" in address:
        raise ClusterError(
            f"{address}: give host:port of the cluster's head, from one of its machines; "
            'from elsewhere send the command there with "ray job submit"'
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"{address}: expected host:port of the cluster's head, for example 10.0.0.5:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClusterError(f"{address}: no Ray cluster answers there: {reason}") from None


@dataclass(frozen=True)
class _Room:
    """How many workers, and what each takes."""

    workers: int
    cores: int
    gpus: int


def _room(ray: Any, workers: int | None) -> _Room:
    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    if gpus:
        return _Room(workers or gpus, max(1, min(GPU_CORES, cores // gpus)), 1)
    return _Room(workers or max(1, cores), 1, 0)


# --------------------------------------------------------------------------------------------------
# what runs on other machines


class Desk:
    """Keeps the chunks that are in work, and knows how often each has been handed out. An asyncio actor."""

    def __init__(self) -> None:
        import asyncio

        self.order: list[int] = []
        self.chunks: dict[int, bytes] = {}
        self.handed_out: dict[int, int] = {}
        self.begun: dict[int, dict[int, int]] = {}
        self.closed = False
        self.news = asyncio.Condition()

    async def add(self, chunks: dict[int, bytes], done: list[int], closed: bool) -> None:
        """Take in new chunks, pickled, forget those that are done; ``closed`` if there will be no more."""
        for number in done:
            self.chunks.pop(number, None)
            self.handed_out.pop(number, None)
            self.begun.pop(number, None)
        self.chunks.update(chunks)
        self.order.extend(chunks)
        self.closed = closed
        async with self.news:
            self.news.notify_all()

    async def after(self, position: int) -> list[int]:
        """Return the numbers of the chunks from a position on, as soon as there is one; [] at the end."""
        async with self.news:
            await self.news.wait_for(lambda: len(self.order) > position or self.closed)
        return self.order[position:]

    async def take(self, number: int) -> tuple[bytes, int, set[int]] | None:
        """Return a chunk, how often it was handed out before, and which of its files bring workers down.

        None if it is done.
        """
        if number not in self.chunks:
            return None
        before = self.handed_out.get(number, 0)
        self.handed_out[number] = before + 1
        deadly = {i for i, times in self.begun.get(number, {}).items() if times >= DEATHS}
        return self.chunks[number], before, deadly

    async def begin(self, number: int, index: int) -> None:
        """Note that a worker begins a file of a chunk whose first worker has not come back."""
        files = self.begun.setdefault(number, {})
        files[index] = files.get(index, 0) + 1

    async def end(self, number: int, index: int) -> None:
        """Note that it has survived that file."""
        self.begun[number].pop(index, None)


class Worker:
    """Captions chunks; loads the model once. What `map_batches` makes actors of."""

    def __init__(self, desk: Any, setup: dict[str, Any]) -> None:
        import ray

        self.desk = desk
        self.setup = setup
        self.mistake: str | None = None
        try:
            self._load(ray.get(setup["checkpoint"]))
        except (ValueError, ImportError) as error:  # raised by the caller, in one line
            self.mistake = str(error)

    def _load(self, checkpoint: bytes) -> None:
        import torch

        from captioner.captioner import Captioner

        with contextlib.suppress(OSError):  # what is given as a relative path lies there, if anywhere
            os.chdir(self.setup["folder"])
        torch.set_num_threads(self.setup["threads"])
        device = "cuda" if self.setup["gpu"] and torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            file = Path(folder, "model.safetensors")
            file.write_bytes(checkpoint)
            self.captioner = Captioner.load(file, device=device, precision=self.setup["precision"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Caption the chunks with these numbers: ``number`` and, pickled, ``records``."""
        numbers = [int(number) for number in batch["number"]]
        return {"number": numbers, "records": [pickle.dumps(self._chunk(number)) for number in numbers]}

    def _chunk(self, number: int) -> list[Record] | str | None:
        """Return the records of a chunk, a user's mistake, or None if it is done already."""
        import ray

        if self.mistake is not None:
            return self.mistake
        taken = ray.get(self.desk.take.remote(number))
        if taken is None:
            return None
        pickled, before, deadly = taken
        try:
            chunk: Chunk = pickle.loads(pickled)
            if not before:
                try:
                    return self.caption(chunk)
                except (ValueError, ImportError):
                    raise
                except Exception:  # memory, or a bug; one by one it hits one file
                    pass
            return [self._alone(number, index, item, index in deadly) for index, item in enumerate(chunk)]
        except (ValueError, ImportError) as error:
            return str(error)

    def _alone(self, number: int, index: int, item: tuple[int, Source], deadly: bool) -> Record:
        """Caption one source of a chunk of which something is wrong; have it known while that lasts."""
        import ray

        if deadly:
            return self._refuse(item[1], DEADLY)
        ray.get(self.desk.begin.remote(number, index))
        try:
            (record,) = self.caption([item])
        except (ValueError, ImportError):
            raise
        except Exception as error:
            record = self._refuse(item[1], f"{type(error).__name__}: {last_line(error)}")
        ray.get(self.desk.end.remote(number, index))
        return record

    def caption(self, chunk: Chunk) -> list[Record]:
        """Return the records of a chunk's sources, in order."""
        more = {name: self.setup[name] for name in ("batch_size", "clips", "look")}
        return list(caption_chunk(self.captioner, chunk, self.setup["options"], **more))

    def _refuse(self, source: Source, reason: str) -> Record:
        return refuse(source, reason, facts_of(self.captioner), self.setup["look"])


# --------------------------------------------------------------------------------------------------
# the caller's side


@dataclass
class _Run:
    ray: Any
    chunks: Iterator[Chunk]
    setup: dict[str, Any]
    room: _Room
    in_work: dict[int, Chunk] = field(default_factory=dict)
    count: int = 0
    exhausted: bool = False

    def records(self) -> Iterator[Record]:
        failures = 0
        self._more()
        while self.in_work:
            try:
                for records in self._pool():
                    failures = 0
                    yield from records
            except self.ray.exceptions.RayError as error:
                failures += 1
                if failures > RESTARTS:
                    raise ClusterError(f"Ray gave up {failures} times: {last_line(error)}") from None

    def _more(self) -> dict[int, Chunk]:
        """Take in chunks until there are enough in work; return the new ones."""
        new = {}
        while not self.exhausted and len(self.in_work) < AHEAD * self.room.workers + 1:
            chunk = next(self.chunks, None)
            if chunk is None:
                self.exhausted = True
            else:
                new[self.count] = self.in_work[self.count] = chunk
                self.count += 1
        return new

    def _pool(self) -> Iterator[list[Record]]:
        """Start actors and caption with them what is in work and what comes; ends early if Ray fails."""
        ray = self.ray
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        desk = ray.remote(Desk).options(num_cpus=0, max_concurrency=1000, label_selector=here).remote()

        def send(chunks: dict[int, Chunk], done: list[int]) -> Any:
            pickled = {number: ray.cloudpickle.dumps(chunk) for number, chunk in chunks.items()}
            return desk.add.remote(pickled, done, self.exhausted)

        try:
            sent = send(self.in_work, [])
            for number, records in _stream(ray, desk, self.setup, self.room, here):
                if isinstance(records, str):
                    raise ValueError(records)
                if records is None or number not in self.in_work:
                    continue
                del self.in_work[number]
                ray.get(sent)  # has arrived long since, or raises what went wrong
                sent = send(self._more(), [number])
                yield records
        finally:
            ray.kill(desk)


def _stream(
    ray: Any, desk: Any, setup: dict[str, Any], room: _Room, here: dict[str, str]
) -> Iterator[tuple[int, Any]]:
    """Yield numbers of chunks with what became of them, as Ray Data gives them out."""
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Numbers(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            facts = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(lambda: _numbers(desk), facts)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of settings that it copies
        context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # every row goes on at once, instead of waiting for 128 MiB of them
    context.execution_no_progress_timeout_s = -1  # a long video, or a cluster that has no room yet
    with DataContext.current(context):
        data = ray.data.read_datasource(
            Numbers(),
            override_num_blocks=1,
            num_cpus=0,
            label_selector=here,
        ).map_batches(
            Worker,
            batch_size=1,
            compute=ActorPoolStrategy(size=room.workers),
            num_cpus=room.cores,
            num_gpus=room.gpus or None,
            fn_constructor_args=(desk, setup),
        )
        batches = data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for batch in batches:
        for number, records in zip(batch["number"].to_pylist(), batch["records"].to_pylist(), strict=True):
            yield number, pickle.loads(records)


def _numbers(desk: Any) -> Iterator[Any]:
    """Yield blocks of one number each, as they come in."""
    import pyarrow
    import ray

    position = 0
    while numbers := ray.get(desk.after.remote(position)):
        for number in numbers:
            yield pyarrow.table({"number": [number]})
        position += len(numbers)
