"""Several processes that train one model together: a share of every batch each, gradients summed.

On a CPU a process for each core is about twice as fast as one process with as many threads: the steps of a
recurrent decoder are too small to be split further.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn


@dataclass(frozen=True)
class Workers:
    """This process among its fellows: ``rank`` of ``count``; rank 0 validates, saves and speaks."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by the sum over all processes."""
        if self.count == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        position = 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            size = gradient.numel()
            parameter.grad = flat[position : position + size].view_as(gradient)
            position += size

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, of one shape, in rank order."""
        if self.count == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(gathered, tensor)
        return gathered

    @contextmanager
    def all_cores(self) -> Iterator[None]:
        """Let this process use the threads of all of them, while the others wait for it."""
        own = torch.get_num_threads()
        torch.set_num_threads(max(own, self.count))
        try:
            yield
        finally:
            torch.set_num_threads(own)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


def run_together(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call ``work(workers, *arguments)`` in ``count`` processes, one thread each, until all are done.

    Raises:
        ValueError: with the message of the ValueError that one of them raised (a user's mistake).
        KeyboardInterrupt: if the user stopped them.
    """
    if count == 1:
        work(Workers(), *arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            spawn(_enter, (work, count, folder, arguments), nprocs=count)
        except (ProcessRaisedException, ProcessExitedException):
            if (folder / "mistake").exists():
                raise ValueError((folder / "mistake").read_text(encoding="utf-8")) from None
            if (folder / "interrupted").exists():
                raise KeyboardInterrupt from None
            raise


def _enter(
    rank: int, work: Callable[..., None], count: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are all on this machine
    meeting = (folder / "meeting").as_uri()
    # validation and cache building happen in one process while the others wait
    dist.init_process_group("gloo", meeting, rank=rank, world_size=count, timeout=timedelta(hours=24))
    try:
        work(Workers(rank, count), *arguments)
    except ValueError as error:
        (folder / "mistake").write_text(str(error), encoding="utf-8")
        sys.exit(1)
    except KeyboardInterrupt:
        (folder / "interrupted").touch()
        sys.exit(1)
    dist.destroy_process_group()


def _follow(parent: int) -> None:
    """End this process when its parent has gone: nothing would stop it, and it would go on writing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
