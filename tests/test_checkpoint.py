import json
import os
import random
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_header, make_tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from captioner import checkpoint
from captioner.calibration import FEATURES, Calibration
from captioner.checkpoint import FORMAT_VERSION, CheckpointError, load, read_header, save
from captioner.decoder import DecoderConfig
from captioner.encoder import ENCODERS, Encoder
from captioner.images import Fit
from captioner.model import CaptionModel
from captioner.search import SearchOptions, search
from captioner.tokenizer import BpeTokenizer, WordTokenizer

FIT = Fit("squash", 64, 64, (0.0, 0.0, 64.0, 64.0))
PIXELS = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def say(model: CaptionModel) -> list[list[int]]:
    with torch.inference_mode():
        memory = model.memory(model.encode(PIXELS, [FIT] * 4))
    options = SearchOptions(beam=3, max_length=8)
    return [found[0].tokens for found in search(model.decoder, memory, options)]


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a checkpoint."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return load_file(path), json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["captioner"])


def refused(path: Path) -> str:
    """The one line of the error."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


# --------------------------------------------------------------------------------------------------
# There and back


def test_round_trip(tiny_model: CaptionModel, tiny_checkpoint: Path) -> None:
    model, header, calibration = load(tiny_checkpoint)
    assert calibration is None
    assert not model.training
    assert header == make_header(tiny_model)
    assert read_header(tiny_checkpoint) == header
    state = model.state_dict()
    assert state.keys() == tiny_model.state_dict().keys()
    for name, tensor in tiny_model.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor.half().to(tensor.dtype)), name  # rounded once, to 16 bits
    assert say(model) == say(tiny_model)
    with torch.inference_mode():
        seen = [m.encode(PIXELS, [FIT] * 4).data for m in (model, tiny_model)]
    torch.testing.assert_close(*seen, rtol=1e-2, atol=1e-2 * float(seen[1].abs().max()))


def test_saving_what_was_loaded_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, header, _ = load(tiny_checkpoint)
    save(tmp_path / "again.safetensors", model, header)
    assert (tmp_path / "again.safetensors").read_bytes() == tiny_checkpoint.read_bytes()


def test_it_is_one_file_of_16_bit_tensors_and_json(tiny_checkpoint: Path) -> None:
    assert [p.name for p in tiny_checkpoint.parent.iterdir()] == ["tiny.safetensors"]
    tensors, header = parts(tiny_checkpoint)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert header["format_version"] == FORMAT_VERSION
    assert header["tokenizer"]["vocabulary"][0] == "a"
    assert header["preprocess"]["size"] == 64
    assert b"pickle" not in tiny_checkpoint.read_bytes()[:100_000]
    assert stat.S_IMODE(tiny_checkpoint.stat().st_mode) == 0o644


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tied: bool, tmp_path: Path) -> None:
    model = make_tiny_model(tied=tied)
    path = tmp_path / "m.safetensors"
    save(path, model, make_header(model))
    assert ("decoder.output.weight" in parts(path)[0]) == (not tied)
    loaded = load(path).model
    assert (loaded.decoder.output.weight is loaded.decoder.embedding.weight) == tied
    with torch.no_grad():  # one changes with the other, still after the round trip
        loaded.decoder.embedding.weight[5] += 1
    same = torch.equal(loaded.decoder.output.weight, loaded.decoder.embedding.weight)
    assert same == tied
    assert say(load(path).model) == say(model)


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
@pytest.mark.parametrize("attention", ["dot", "none"])
def test_every_shape_of_decoder(cell: str, attention: str, tmp_path: Path) -> None:
    model = make_tiny_model(cell=cell, attention=attention, gate=False, deep_output=False)
    save(tmp_path / "m.safetensors", model, make_header(model))
    assert say(load(tmp_path / "m.safetensors").model) == say(model)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "regnet_y_400mf"])
def test_torchvisions_encoders(name: str, tmp_path: Path) -> None:
    preprocess = replace(ENCODERS[name]().preprocess, size=64, resize=64)
    encoder = Encoder(name, preprocess=preprocess)
    config = DecoderConfig(hidden=8, embedding=8, cells=8, attention_width=8)
    model = CaptionModel(encoder, config, WordTokenizer(["a", "dog"])).eval()
    save(tmp_path / "m.safetensors", model, make_header(model))
    loaded = load(tmp_path / "m.safetensors").model
    assert {p.device.type for p in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    with torch.inference_mode():
        found, expected = (m.encode(PIXELS, [FIT] * 4).data for m in (loaded, model))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_bpe_travels_along(tiny_model: CaptionModel, tmp_path: Path) -> None:
    tokenizer = BpeTokenizer.build(["a dog runs", "a cat sits"] * 3, size=40)
    model = CaptionModel(tiny_model.encoder, tiny_model.decoder.config, tokenizer).eval()
    save(tmp_path / "m.safetensors", model, make_header(model))
    loaded = load(tmp_path / "m.safetensors").model
    assert loaded.tokenizer.encode("a cat runs") == tokenizer.encode("a cat runs")
    assert say(loaded) == say(model)


def make_calibration(width: int = 1280) -> Calibration:
    rng = np.random.default_rng(0)
    return Calibration(
        word=(1.5, -0.25),
        caption=tuple(range(len(FEATURES) + 1)),
        mean=rng.normal(size=width),
        basis=rng.normal(size=(width, 4)),
        residual=2.5,
    )


def test_the_calibration_travels_along(tiny_model: CaptionModel, tmp_path: Path) -> None:
    path, calibration = tmp_path / "m.safetensors", make_calibration()
    save(path, tiny_model, make_header(tiny_model), calibration)
    model, header, loaded = load(path)
    assert header.calibration is not None
    assert loaded is not None
    assert (loaded.word, loaded.caption, loaded.residual) == (
        calibration.word,
        calibration.caption,
        calibration.residual,
    )
    np.testing.assert_allclose(loaded.mean, calibration.mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(loaded.basis, calibration.basis, rtol=1e-3, atol=1e-4)
    assert say(model) == say(tiny_model)


def test_a_calibration_that_does_not_fit(tiny_model: CaptionModel, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(path, tiny_model, make_header(tiny_model), make_calibration(width=640))
    assert "calibration" in refused(path)
    save(path, tiny_model, make_header(tiny_model), make_calibration())
    tensors, header = parts(path)
    del tensors["calibration.basis"]
    save_file(tensors, path, {"captioner": json.dumps(header)})
    assert "calibration" in refused(path)
    tensors, header = {**tensors, "calibration.basis": torch.zeros(1280, 4)}, {**header, "calibration": {}}
    save_file(tensors, path, {"captioner": json.dumps(header)})
    assert "calibration" in refused(path)


def test_loading_consumes_no_randomness(tiny_checkpoint: Path) -> None:
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    load(tiny_checkpoint)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


# --------------------------------------------------------------------------------------------------
# Files that cannot be used


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999])
def test_truncated_files(keep: float, tiny_checkpoint: Path, tmp_path: Path) -> None:
    raw = tiny_checkpoint.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(raw[: keep if isinstance(keep, int) else int(keep * len(raw))])
    assert "damaged, or not a .safetensors file" in refused(path)
    with pytest.raises(CheckpointError):
        read_header(path)


@pytest.mark.parametrize(
    "content",
    [
        random.Random(0).randbytes(5000),
        b"\0" * 5000,
        b"PK\x03\x04" + b"x" * 500,
        b"<html>\n<body>not found</body>\n</html>\n" * 9,
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_other_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bytes.safetensors"
    path.write_bytes(content)
    assert "damaged, or not a .safetensors file" in refused(path)


def test_bytes_damaged_in_the_middle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    raw = bytearray(tiny_checkpoint.read_bytes())
    raw[-20_000:-10_000] = random.Random(0).randbytes(10_000)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    assert "damaged: " in refused(path)
    assert "holds numbers that are not finite" in refused(path)


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    assert refused(path).endswith("a safetensors file, but not a checkpoint of captioner")
    save_file({"x": torch.zeros(3)}, path, {"format": "pt"})
    assert refused(path).endswith("a safetensors file, but not a checkpoint of captioner")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "model.pt"
    torch.save({"model": Evil()}, path)
    assert "not a .safetensors file" in refused(path)
    assert not (tmp_path / "ran").exists()


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    assert refused(tmp_path / "missing.safetensors").endswith("no such checkpoint")
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file" / "below.safetensors").endswith("no such checkpoint")
    assert "is a folder" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / ("x" * 300))
    assert "is a device" in refused(Path(os.devnull))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = tmp_path / "locked.safetensors"
    path.write_bytes(tiny_checkpoint.read_bytes())
    path.chmod(0)
    assert "cannot be read: Permission denied" in refused(path)


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def rewrite(source: Path, target: Path, change: Change) -> Path:
    tensors, header = parts(source)
    change(tensors, header)
    save_file(tensors, target, {"captioner": json.dumps(header)})
    return target


WEIGHTS: list[tuple[Change, str]] = [
    (
        lambda t, h: t.pop("decoder.gate.weight"),
        "the weights do not fit the config: the file lacks decoder.gate.weight",
    ),
    (lambda t, h: t.pop("decoder.embedding.weight"), "the file lacks decoder.embedding.weight"),
    (lambda t, h: t.update({"decoder.extra": torch.zeros(2)}), "has decoder.extra, which the model has not"),
    (
        lambda t, h: t.update({"decoder.gate.weight": torch.zeros(1, 23)}),
        r"decoder.gate.weight should have shape \(1, 24\) and has \(1, 23\)",
    ),
    (
        lambda t, h: t.update({"decoder.gate.weight": torch.zeros(1, 24, dtype=torch.int64)}),
        "decoder.gate.weight should hold floats and holds torch.int64",
    ),
    (
        lambda t, h: t.update({"decoder.gate.weight": torch.full((1, 24), torch.inf)}),
        "decoder.gate.weight holds numbers that are not finite",
    ),
    (
        lambda t, h: h["tokenizer"]["vocabulary"].pop(),
        "wrong vocabulary: it has 33 tokens and the weights are for 34",
    ),
    (lambda t, h: h["decoder"].update(hidden=25), "should have shape"),
    (lambda t, h: h["decoder"].update(hidden=10**30), "its config makes no model"),
    (lambda t, h: h["decoder"].update(attention="none"), "the file has decoder.attention"),
    (lambda t, h: h["decoder"].update(tied=False), "the file lacks decoder.output.weight"),
    (lambda t, h: h.update(encoder="efficientnet_lite2"), "the weights do not fit the config"),
]


@pytest.mark.parametrize(("change", "message"), WEIGHTS)
def test_weights_that_do_not_fit(change: Change, message: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert re.search(message, refused(rewrite(tiny_checkpoint, tmp_path / "m.safetensors", change)))


HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"format_version": 2}, "format version 2; this captioner reads version 1: update captioner"),
    ({"format_version": "1"}, "format version 1"),
    ({"format_version": None}, "format version None"),
    ({"name": None}, "its header cannot be used: name is of the wrong type: None"),
    ({"encoder": ["resnet50"]}, "encoder is of the wrong type"),
    ({"encoder": "resnet51"}, "unknown encoder 'resnet51'"),
    ({"preprocess": 3}, "preprocess is of the wrong type"),
    ({"preprocess": {"size": 64}}, "preprocess.fit: missing"),
    ({"decoder": None}, "decoder is of the wrong type"),
    ({"decoder": {"cell": "transformer"}}, "decoder.cell must be one of"),
    ({"decoder": {"heads": 3}}, "unknown key decoder.heads"),
    ({"tokenizer": ["a"]}, "tokenizer is of the wrong type"),
    ({"tokenizer": {"kind": "sentencepiece"}}, "vocabulary: unknown tokenizer kind 'sentencepiece'"),
    ({"tokenizer": {"kind": "word", "vocabulary": ["a", "a"]}}, "holds a word twice"),
    ({"calibration": 3}, "calibration is of the wrong type"),
    ({"calibration": {"word": 1}}, "calibration"),
    ({"search": [3]}, "search is of the wrong type"),
    ({"search": {"beams": 3}}, "beams"),
    ({"search": {"beam": 0}}, "beam must be from 1 to 1000, not 0"),
    ({"search": {"beam": "3"}}, "beam must be of type int, not '3'"),
    ({"summary": "trained"}, "summary is of the wrong type"),
    ({"colour": "red"}, "unknown key 'colour'"),
]


@pytest.mark.parametrize(("values", "message"), HEADERS)
def test_headers_that_cannot_be_used(
    values: dict[str, Any], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = rewrite(tiny_checkpoint, tmp_path / "m.safetensors", lambda t, h: h.update(values))
    assert message in refused(path)


@pytest.mark.parametrize("key", list(checkpoint._HEADER))
def test_headers_that_lack_a_key(key: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = rewrite(tiny_checkpoint, tmp_path / "m.safetensors", lambda t, h: h.pop(key))
    message = refused(path)
    assert f"its header lacks '{key}'" in message or "format version None" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"format_version": 1}'])
def test_headers_that_are_not_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"captioner": text})
    assert "its header" in refused(path)


# --------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace", "os.chmod"])
def test_a_write_that_fails_leaves_the_old_file(
    broken: str, tiny_model: CaptionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(OSError, match="No space left"):
        save(path, tiny_model, make_header(tiny_model))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_cannot_be_stored_leaves_the_old_file(tiny_model: CaptionModel, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        save(path, tiny_model, make_header(tiny_model, summary={"when": object()}))
    for value in (1e6, float("nan")):
        with torch.no_grad():
            tiny_model.decoder.gate.bias.fill_(value)
        with pytest.raises(ValueError, match=r"decoder.gate.bias holds numbers that are not finite"):
            save(path, tiny_model, make_header(tiny_model))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
