"""One self-contained ``.safetensors`` file: weights, vocabulary, preprocessing, config, calibration.

The tensors are the model's state; everything else is one JSON text under the key ``captioner`` of the
file's metadata. No pickle anywhere. Floats are stored in 16 bits and used in 32.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captioner import tokenizer as tokenizers
from captioner.calibration import Calibration
from captioner.decoder import DecoderConfig
from captioner.encoder import Encoder, EncoderError
from captioner.files import write_atomically
from captioner.frame_encoder import FrameConfig
from captioner.images import Preprocess
from captioner.inputs import one_line
from captioner.model import CaptionModel
from captioner.search import SearchOptions

FORMAT_VERSION = 1
_KEY = "captioner"
_TIED = "decoder.output.weight"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line that names the file, what was expected and what found."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Header:
    """Everything in a checkpoint that is not a tensor.

    Attributes:
        name: of the model.
        encoder: name of the encoder.
        preprocess: how pictures are prepared.
        decoder: shape of the decoder.
        tokenizer: what `captioner.tokenizer.from_dict` reads.
        calibration: the numbers of a `captioner.calibration.Calibration`; None if it was never fitted.
        search: default search options by name.
        summary: of the training: data, their terms, scores; free-form, for people.
        frames: shape of the frame encoder; None for none, and then the file does not mention it.
    """

    name: str
    encoder: str
    preprocess: Preprocess
    decoder: DecoderConfig
    tokenizer: dict[str, Any]
    calibration: dict[str, Any] | None = None
    search: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    frames: FrameConfig | None = None

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
            **({} if self.frames is None else {"frames": self.frames.to_dict()}),
        }


def save(
    path: str | Path, model: CaptionModel, header: Header, calibration: Calibration | None = None
) -> None:
    """Write a checkpoint.

    Args:
        path: ends in ``.safetensors``.
        model: its state is stored.
        header: the rest; its ``calibration`` is filled in from ``calibration``.
        calibration: what makes confidences of probabilities.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if a weight is not finite, or too large for 16 bits.
    """
    from safetensors.torch import save as serialise

    state = model.state_dict()
    if header.decoder.tied:
        del state[_TIED]
    if calibration is not None:
        header = replace(header, calibration=calibration.to_dict())
        state["calibration.mean"] = torch.from_numpy(calibration.mean)
        state["calibration.basis"] = torch.from_numpy(calibration.basis)
    stored = {
        name: tensor.detach()
        .to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite in 16 bits")
    text = json.dumps(header.to_dict(), ensure_ascii=False, separators=(",", ":"))
    write_atomically(Path(path), serialise(stored, {_KEY: text}))


def read_header(path: str | Path) -> Header:
    """Read the JSON part alone.

    Raises:
        CheckpointError: if the file is missing, damaged, or not one of captioner's.
    """
    return _read(Path(path))[0]


class Loaded(NamedTuple):
    """What a checkpoint holds."""

    model: CaptionModel
    header: Header
    calibration: Calibration | None


def load(path: str | Path, device: torch.device | str = "cpu") -> Loaded:
    """Load a model, in evaluation mode, with 32-bit weights.

    Raises:
        CheckpointError: if the file is missing, damaged, not one of captioner's, or its parts disagree.
    """
    path = Path(path)
    header, stored = _read(path)
    calibration = _calibration(path, header, stored)
    try:
        tokenizer = tokenizers.from_dict(header.tokenizer)
    except ValueError as error:
        raise CheckpointError(f"{path}: vocabulary: {error}") from None
    try:
        with torch.device("meta"), _Uninitialised():  # the weights are replaced at once
            encoder = Encoder(header.encoder, preprocess=header.preprocess)
            model = CaptionModel(encoder, header.decoder, tokenizer, header.frames)
    except EncoderError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (RuntimeError, TypeError) as error:  # widths beyond what torch can count
        raise CheckpointError(f"{path}: its config makes no model: {_line(error)}") from None
    if calibration is not None and (
        calibration.mean.shape != (encoder.width,) or calibration.basis.shape[:1] != (encoder.width,)
    ):
        raise CheckpointError(
            f"{path}: the calibration is not for features of width {encoder.width}: its mean has shape "
            f"{calibration.mean.shape} and its basis {calibration.basis.shape}"
        )
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
        floats = tensor.is_floating_point()
        if not stored[name].is_floating_point() if floats else stored[name].dtype != tensor.dtype:
            kind = "floats" if floats else str(tensor.dtype)
            raise CheckpointError(f"{path}: {name} should hold {kind} and holds {stored[name].dtype}")
    full = {}
    for name, tensor in stored.items():
        if not tensor.is_floating_point():
            known = range(len(tokenizers.SPECIAL), len(model.tokenizer))
            ids = tensor.tolist() if name.endswith(".tokens") else []
            if any(token not in known for token in ids) or len(set(ids)) < len(ids):
                raise CheckpointError(
                    f"{path}: damaged: {name} holds ids that the vocabulary has not, or twice"
                )
            full[name] = tensor.to(device)
            continue
        wide = tensor.to(torch.float32)
        if not wide.isfinite().all():
            raise CheckpointError(f"{path}: damaged: {name} holds numbers that are not finite")
        full[name] = wide.to(device)
    counters = {
        k: torch.zeros((), dtype=torch.long, device=device) for k in model.state_dict() if k not in full
    }
    model.load_state_dict({**full, **counters}, assign=True)
    if header.decoder.tied:
        model.decoder.output.weight = model.decoder.embedding.weight
    return Loaded(model.eval(), header, calibration)


class _Uninitialised(TorchFunctionMode):
    """Lets `torch.nn.init` do nothing: on the meta device it would import torch's compiler, for seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _calibration(path: Path, header: Header, stored: dict[str, Tensor]) -> Calibration | None:
    """Take the calibration's tensors out of ``stored`` and put it together."""
    if header.calibration is None:
        return None
    try:
        mean, basis = stored.pop("calibration.mean"), stored.pop("calibration.basis")
        return Calibration.from_parts(header.calibration, mean.double().numpy(), basis.double().numpy())
    except KeyError as error:
        raise CheckpointError(f"{path}: the calibration lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path}: is a folder; give the .safetensors file in it")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: is a device or a pipe, not a file")
        with open(path, "rb") as beginning:
            length = int.from_bytes(beginning.read(8), "little")
        if length > 2 * _LONGEST:
            raise CheckpointError(
                f"{path}: damaged, or not a .safetensors file (a header too large: {length} bytes)"
            )
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of captioner")
            if len(text) > _LONGEST or len(file.keys()) > _MOST_TENSORS:
                raise CheckpointError(
                    f"{path}: its header cannot be used: it has {len(text)} characters and"
                    f" {len(file.keys())} tensors; at most {_LONGEST} and {_MOST_TENSORS} can be read"
                )
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (OSError, ValueError) as error:  # ValueError: a path that cannot be
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: cannot be read: {_line(getattr(error, 'strerror', None) or error)}"
        ) from None
    except (RuntimeError, OverflowError, MemoryError) as error:  # torch's, of shapes that cannot be
        raise CheckpointError(f"{path}: damaged: {_line(error)}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged, or not a .safetensors file ({_line(error)})") from None
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("expected keys and values")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}; this captioner reads version {FORMAT_VERSION}: "
                "update captioner, or convert the file"
            )
        for key, kinds in _HEADER.items():
            if not isinstance(data[key], kinds):
                raise ValueError(f"{key} is of the wrong type: {data[key]!r:.80}")
        frames = data.pop("frames", None)
        if not isinstance(frames, (dict, type(None))):
            raise ValueError(f"frames is of the wrong type: {frames!r:.80}")
        if data.keys() - _HEADER.keys():
            raise ValueError(f"unknown key {min(data.keys() - _HEADER.keys())!r}")
        SearchOptions(**data["search"]).check()
        header = Header(
            name=data["name"],
            encoder=data["encoder"],
            preprocess=Preprocess.from_dict(data["preprocess"]),
            decoder=DecoderConfig.from_dict(data["decoder"]),
            tokenizer=data["tokenizer"],
            calibration=data["calibration"],
            search=data["search"],
            summary=data["summary"],
            frames=None if frames is None else FrameConfig.from_dict(frames),
        )
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: its header lacks {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header cannot be used: {_line(error)}") from None
    return header, stored


_LONGEST, _MOST_TENSORS = 2**24, 10_000
"""Characters and tensors: with more, the description takes far more memory than the weights."""
_HEADER: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "name": (str,),
    "encoder": (str,),
    "preprocess": (dict,),
    "decoder": (dict,),
    "tokenizer": (dict,),
    "calibration": (dict, type(None)),
    "search": (dict,),
    "summary": (dict,),
}


def _line(error: object) -> str:
    return " ".join(str(error).split())
