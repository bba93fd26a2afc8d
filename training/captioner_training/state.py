"""The state of a run: all that resuming needs, in one file that loads without running code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from captioner.files import write_atomically
from captioner.model import CaptionModel
from captioner_training.config import ConfigError, TrainingConfig
from captioner_training.optimisation import Average

_PATIENCE = 5.0
"""Seconds to wait for another run: what a killed one had started ends a moment after it."""

_FREE = ("save_minutes", "tensorboard", "compile")
"""Keys that may change between a stop and a resumption: they change no weight."""


class TrainingError(ValueError):
    """Training cannot go on; the message says where it stopped and what is kept."""


def save_state(
    path: Path,
    config: TrainingConfig,
    content: str,
    model: CaptionModel,
    optimiser: torch.optim.Optimizer,
    average: Average,
    progress: dict[str, Any],
) -> None:
    """Save what resuming needs, atomically.

    Raises:
        TrainingError: if the disk is full or the folder cannot be written to; the last state stays as it was.
    """
    buffer = BytesIO()
    torch.save(
        {
            "config": json.dumps(config.model_dump(), sort_keys=True),
            "content": content,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "average": average.state_dict(),
            "progress": dict(progress),
        },
        buffer,
    )
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise TrainingError(
            f"{path}: the state cannot be saved: {error.strerror or error}; what was saved before is whole: "
            "make room, and give the same command again"
        ) from None


def load_state(path: Path, config: TrainingConfig, content: str) -> dict[str, Any] | None:
    """Return the saved state; None if there is none yet.

    Its tensors are on the CPU; whoever takes them moves them. AdamW wants its step counts there: on a GPU it
    would wait for each of them at every step.

    Raises:
        ConfigError: if the state is of another config or other data, or cannot be read.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        saved = TrainingConfig.model_validate(json.loads(state["config"])).model_dump()
    except Exception as error:  # whatever a damaged file makes torch and pickle raise
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{path}: not a state that can be resumed ({reason}): {_ADVICE}") from None
    changed = [c for c in _differences(saved, config.model_dump()) if c.split(" ")[0] not in _FREE]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(f"{path} is of another config ({'; '.join(changed[:3])}{more}): {_ADVICE}")
    if state["content"] != content:
        raise ConfigError(
            f"{path} is of other data: its pictures, captions or vocabulary have changed since: {_ADVICE}"
        )
    return state


def take_weights(path: Path, state: dict[str, Any], model: CaptionModel) -> None:
    """Put a state's weights into the model.

    Raises:
        ConfigError: if they are of another model.
    """
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise ConfigError(
            f"{path} is of another model, as of another start.model ({line}): {_ADVICE}"
        ) from None


_ADVICE = "choose another --output, or delete that folder to start anew"


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Keep other runs out of a folder for a while, and remove what killed ones left half-written.

    Raises:
        TrainingError: if another run trains there. The system frees the lock of a process that has died.
    """
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise TrainingError(f"{output}: another run is training there; choose another --output") from None
    try:
        for name in ("state.pt", "model.safetensors", "log.jsonl"):
            for left in output.glob(f".{name}.*"):
                left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def forget_later(log: Path, epochs: int) -> None:
    """Keep the log's first lines: those of epochs that the state knows; others will be written again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        if len(lines) > epochs:
            write_atomically(log, "".join(lines[:epochs]).encode())


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Return ``key was …, is …`` for all that differs between two nested configs."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for name in sorted(old.keys() | new.keys())
            for line in _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for line in _differences(a, b, f"{key}.{i}")
        ]
    if old == new:
        return []
    if isinstance(old, (dict, list)) or isinstance(new, (dict, list)):
        return [f"{key} differs"]
    return [f"{key} was {old!r}, is {new!r}"]
