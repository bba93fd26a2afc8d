"""Several processes that train one model together: a share of every batch each, gradients summed.

Hugging Face accelerate carries device, precision and communication, so that ``accelerate launch`` starts the
processes on several GPUs or machines. On one machine's CPU `run_together` does: a process for each core is
about twice as fast as one process with as many threads, since the steps of a recurrent decoder are too small
to be split further.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

_PATIENCE = timedelta(hours=24)
"""How long processes wait for each other: one validates, or builds a cache, while the others wait."""


class Workers:
    """This process among its fellows; rank 0 validates, saves and speaks."""

    def __init__(self, device: str = "cpu", mixed_precision: str = "none") -> None:
        """Join the others, if this process was started as one of several.

        Args:
            device: ``cpu``, or any other for the one that accelerate chooses for this process; of a single
                process the device itself.
            mixed_precision: ``none`` or ``bf16``.

        Raises:
            ValueError: for a precision that the device does not offer.
        """
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
        kept = os.environ.get("ACCELERATE_TORCH_DEVICE")
        if not launched():
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
        threads = torch.get_num_threads()
        try:
            self.accelerator = Accelerator(
                cpu=device == "cpu",
                mixed_precision="no" if mixed_precision == "none" else mixed_precision,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
            )
        finally:
            torch.set_num_threads(threads)  # accelerate has its own idea of how many
            if kept is None:
                os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
            else:
                os.environ["ACCELERATE_TORCH_DEVICE"] = kept

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def count(self) -> int:
        """How many processes there are."""
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device = self.accelerator.device
        return torch.device("cpu") if device.type == "cpu" else device  # cpu:0 cannot be loaded to

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in mixed precision, if that was asked for."""
        return self.accelerator.autocast()

    def sum_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Replace every gradient by the sum over all processes, and return the sum of their losses.

        One sum over one flat tensor, and not DistributedDataParallel: its buckets change after the first
        step, and with them the order of additions, so that a resumed run would not end with the same bits.
        """
        if self.count == 1:
            return loss
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), loss.reshape(1).to(gradients[0].dtype)])
        flat = self.accelerator.reduce(flat, "sum")
        position = 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            size = gradient.numel()
            parameter.grad = flat[position : position + size].view_as(gradient)
            position += size
        return flat[-1]

    def any(self, condition: bool) -> bool:
        """Whether it holds for one of the processes."""
        if self.count == 1:
            return condition
        told = torch.tensor([float(condition)], device=self.device)
        return bool(self.accelerator.reduce(told, "sum").item() > 0)

    def tell(self, number: float) -> float:
        """Return the first process's number in all of them."""
        if self.count == 1:
            return number
        told = torch.tensor([number if self.first else 0.0], dtype=torch.float64, device=self.device)
        return float(self.accelerator.reduce(told, "sum").item())

    @contextmanager
    def all_cores(self) -> Iterator[None]:
        """Let this process use the threads of all of them, while the others wait for it."""
        own = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(max(own, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        try:
            yield
        finally:
            torch.set_num_threads(own)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.accelerator.wait_for_everyone()


def speaks() -> bool:
    """Whether this process is the one of all that tells the user something."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> bool:
    """Whether this process is already one of several, as started by ``accelerate launch``."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_together(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call ``work(*arguments)`` in ``count`` processes on this machine's CPU, one thread each.

    Raises:
        ValueError: with the message of the ValueError (a user's mistake) or OSError that one of them raised.
        KeyboardInterrupt: if the user stopped them.
    """
    if count == 1:
        work(*arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            spawn(_enter, (work, count, folder, arguments), nprocs=count)
        except (ProcessRaisedException, ProcessExitedException) as error:
            if (folder / "mistake").exists():
                raise ValueError((folder / "mistake").read_text(encoding="utf-8")) from None
            if (folder / "interrupted").exists():
                raise KeyboardInterrupt from None
            if isinstance(error, ProcessExitedException) and error.signal_name == "SIGKILL":
                raise ValueError(
                    "a training process was killed, as a system short of memory does; the last saved state "
                    "stays: give the same command again, with fewer --processes if memory is short"
                ) from None
            raise


def _enter(
    rank: int, work: Callable[..., None], count: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    if sys.platform.startswith("linux"):  # elsewhere it has another name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are all on this machine
    # they meet at a file: a port could be taken by somebody else
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", meeting, rank=rank, world_size=count, timeout=_PATIENCE)
    try:
        work(*arguments)
    except ValueError as error:
        (folder / "mistake").write_text(str(error), encoding="utf-8")
        sys.exit(1)
    except OSError as error:  # a full disk, say
        where = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        (folder / "mistake").write_text(where, encoding="utf-8")
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
