"""One self-contained ``.safetensors`` file: weights, vocabulary, preprocessing, config, calibration.

The tensors are the model's state; everything else is one JSON text under the key ``captioner`` of the
file's metadata. No pickle anywhere. Floats are stored in 16 bits and used in 32.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner import tokenizer as tokenizers
from captioner.decoder import DecoderConfig
from captioner.encoder import Encoder, EncoderError
from captioner.images import Preprocess
from captioner.model import CaptionModel

FORMAT_VERSION = 1
_KEY = "captioner"
_TIED = "decoder.output.weight"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line that names the file, what was expected and what was found."""


@dataclass(frozen=True)
class Header:
    """Everything in a checkpoint that is not a tensor.

    Attributes:
        name: of the model.
        encoder: name of the encoder.
        preprocess: how pictures are prepared.
        decoder: shape of the decoder.
        tokenizer: what `captioner.tokenizer.from_dict` reads.
        calibration: what `captioner.calibration.Calibration.from_dict` reads; None if it was never fitted.
        search: default search options by name.
        summary: of the training: data, their terms, scores; free-form, for people.
    """

    name: str
    encoder: str
    preprocess: Preprocess
    decoder: DecoderConfig
    tokenizer: dict[str, Any]
    calibration: dict[str, Any] | None = None
    search: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "encoder": self.encoder,
            "preprocess": self.preprocess.to_dict(),
            "decoder": self.decoder.to_dict(),
            "tokenizer": self.tokenizer,
            "calibration": self.calibration,
            "search": self.search,
            "summary": self.summary,
        }


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash or a full disk leaves the old one or the new one, never a part.

    Raises:
        OSError: if it cannot be written; nothing is left behind then.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save(
    path: str | Path, model: CaptionModel, header: Header, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint.

    Args:
        path: ends in ``.safetensors``.
        model: its state is stored.
        header: the rest.
        tensors: replace some of the state, by name (averaged weights).

    Raises:
        OSError: if the file cannot be written.
    """
    from safetensors.torch import save as serialise

    state = {**model.state_dict(), **(tensors or {})}
    if header.decoder.tied:
        del state[_TIED]
    stored = {
        name: tensor.detach()
        .to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    text = json.dumps(header.to_dict(), ensure_ascii=False, separators=(",", ":"))
    write_atomically(Path(path), serialise(stored, {_KEY: text}))


def read_header(path: str | Path) -> Header:
    """Read the JSON part alone.

    Raises:
        CheckpointError: if the file is missing, damaged, or not one of captioner's.
    """
    return _read(Path(path))[0]


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[CaptionModel, Header]:
    """Load a model, in evaluation mode, with 32-bit weights.

    Raises:
        CheckpointError: if the file is missing, damaged, not one of captioner's, or its parts disagree.
    """
    path = Path(path)
    header, stored = _read(path)
    try:
        tokenizer = tokenizers.from_dict(header.tokenizer)
    except ValueError as error:
        raise CheckpointError(f"{path}: vocabulary: {error}") from None
    try:
        with torch.device("meta"):  # no time is spent on weights that are replaced at once
            encoder = Encoder(header.encoder, preprocess=header.preprocess)
            model = CaptionModel(encoder, header.decoder, tokenizer)
    except EncoderError as error:
        raise CheckpointError(f"{path}: {error}") from None
    expected = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if header.decoder.tied and "decoder.embedding.weight" in stored:
        stored[_TIED] = stored["decoder.embedding.weight"]
    rows = (
        stored["decoder.embedding.weight"].shape[0]
        if "decoder.embedding.weight" in stored
        else len(tokenizer)
    )
    if rows != len(tokenizer):
        raise CheckpointError(
            f"{path}: wrong vocabulary: it has {len(tokenizer)} tokens and the weights are for {rows}"
        )
    missing, surplus = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    if missing or surplus:
        what = f"lacks {min(missing)}" if missing else f"has {min(surplus)}, which the model has not"
        raise CheckpointError(f"{path}: the weights do not fit the config: the file {what}")
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} should have shape {tuple(tensor.shape)} and has {tuple(stored[name].shape)}"
            )
    full = {
        name: tensor.to(device, torch.float32 if tensor.is_floating_point() else None)
        for name, tensor in stored.items()
    }
    counters = {
        k: torch.zeros((), dtype=torch.long, device=device) for k in model.state_dict() if k not in full
    }
    model.load_state_dict({**full, **counters}, assign=True)
    if header.decoder.tied:
        model.decoder.output.weight = model.decoder.embedding.weight
    return model.eval(), header


def _read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give the .safetensors file in it")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of captioner")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged, or not a .safetensors file ({error})") from None
    try:
        data = json.loads(text)
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}; this captioner reads version {FORMAT_VERSION}: "
                "update captioner, or convert the file"
            )
        header = Header(
            name=data["name"],
            encoder=data["encoder"],
            preprocess=Preprocess.from_dict(data["preprocess"]),
            decoder=DecoderConfig.from_dict(data["decoder"]),
            tokenizer=data["tokenizer"],
            calibration=data["calibration"],
            search=data["search"],
            summary=data["summary"],
        )
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: its header lacks {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header cannot be used: {error}") from None
    return header, stored
