"""Checkpoints from strangers: they cannot run code, nor take memory or time by what their header claims."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_worker import EXAMPLES, ROOT, only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioner import checkpoint
from captioner.checkpoint import CheckpointError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import hostile

quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
Change = Callable[[dict[str, Any]], object]

_LOAD = """
import resource, sys, time
import numpy as np
from captioner import Captioner
from captioner.checkpoint import CheckpointError
from pathlib import Path
size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30,) * 2)
for path in sys.argv[1:]:
    begun = time.process_time()
    try:
        said = Captioner.load(path, device="cpu").caption(np.zeros((50, 300, 3), np.uint8), beam=1)
        print("LOADED", end="")
    except CheckpointError as error:
        assert str(error).isprintable() and path in str(error) and len(str(error)) < 5000
        print(f"refused in {time.process_time() - begun:.1f} s: {str(error)[-300:]}", end="")
    print(flush=True)
"""


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed(path: Path, change: Change) -> bytes:
    """Return the checkpoint with another description of the model."""
    header, body = split(path)
    described = json.loads(header["__metadata__"]["captioner"])
    change(described)
    header["__metadata__"]["captioner"] = json.dumps(described)
    return join(header, body)


def described_by(path: Path, text: str) -> bytes:
    header, body = split(path)
    header["__metadata__"]["captioner"] = text
    return join(header, body)


def tensors(path: Path, change: Change) -> bytes:
    header, body = split(path)
    change(header)
    return join(header, body)


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(key for key in header if key != "__metadata__")]


SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]


def bpe(**changes: Any) -> Change:
    """A BPE tokenizer in the library's JSON, as large as the tiny model's vocabulary."""
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "merges": []}
    model["vocab"] = {word: i for i, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(30))])}
    model.update(changes.pop("model", {}))
    data: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for i, word in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "decoder": None,
        "model": model,
        **changes,
    }
    return lambda d: d.update(tokenizer={"kind": "bpe", "model": data})


def setting(*keys: str, to: Any) -> Change:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


class Evil:
    """What would run if the file were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


def attacks(good: Path) -> dict[str, bytes]:
    """Return malicious checkpoints by what they try."""
    data = good.read_bytes()
    regex = {"type": "Split", "pattern": {"Regex": "(a+)+" * 5000}, "behavior": "Isolated", "invert": False}
    endless = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    made = {f"header of {n} bytes": struct.pack("<Q", n) + data[8:] for n in (10**8, 2**31, 2**60, 2**64 - 1)}
    made["pickle"] = pickle.dumps(Evil())
    made["pickle behind a header's length"] = struct.pack("<Q", 64) + pickle.dumps(Evil())
    made["lists 100,000 deep"] = described_by(good, "[" * 100_000)
    made["objects 100,000 deep"] = described_by(good, '{"a":' * 100_000 + "1" + "}" * 100_000)
    made["ten million lists"] = described_by(good, "[" + "[]," * 10_000_000 + "[]]")
    made["header 100,000 deep"] = join(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"")
    for key in ("hidden", "embedding", "cells", "attention_width"):
        for size in (10**9, 2**62, 10**30):
            made[f"{key} {size}"] = changed(good, setting("decoder", key, to=size))
    for key in ("words", "styles"):
        made[f"{key} 1e9"] = changed(good, setting("decoder", key, to=10**9))
    for size in (10**5, 10**9):
        made[f"pictures of {size}"] = changed(good, setting("preprocess", "size", to=size))
    made["resized to 1e6"] = changed(good, lambda d: d["preprocess"].update(fit="crop", resize=10**6))
    for key in ("beam", "max_length", "n_best"):
        made[f"{key} 1e9"] = changed(good, setting("search", key, to=10**9))
    made["frames of 1e9"] = changed(good, setting("frames", to={"cell": "gru", "width": 10**9}))
    made["positions 1e9"] = changed(good, setting("frames", to={"cell": "none", "positions": 10**9}))
    more = {f"t{i}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    made["100,000 tensors"] = tensors(good, lambda h: h.update(more))
    for kind in ("F64", "I64", "BOOL", "F8_E4M3", "C64", "U8", "X", "F4"):
        made[f"type {kind}"] = tensors(good, lambda h, kind=kind: first(h).update(dtype=kind))
    for shape in ([2**63, 0], [2**62, 4], [-1], [1.5], [2**32, 2**32], [1] * 100_000):
        made[f"shape {str(shape)[:30]}"] = tensors(good, lambda h, shape=shape: first(h).update(shape=shape))
    made["a huge shape of nothing"] = tensors(
        good, lambda h: h.update(z={"dtype": "F16", "shape": [2**62, 0], "data_offsets": [0, 0]})
    )
    made["overlapping"] = tensors(
        good, lambda h: [v.update(data_offsets=[0, 64]) for k, v in h.items() if k != "__metadata__"]
    )
    made["offsets beyond the end"] = tensors(good, lambda h: first(h).update(data_offsets=[0, 2**62]))
    made["a regular expression"] = changed(good, bpe(pre_tokenizer=regex))
    made["a normaliser that is none"] = changed(
        good, bpe(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    )
    made["padding to 1e9"] = changed(good, bpe(padding={**endless, "pad_type_id": 0, "pad_token": "<pad>"}))
    made["an id of 4e9"] = changed(
        good, bpe(model={"vocab": {**{word: i for i, word in enumerate(SPECIAL)}, "w": 2**32 - 1}})
    )
    made["merges of nothing"] = changed(good, bpe(model={"merges": [["w0", "zzz"]]}))
    made["another model"] = changed(good, bpe(model={"type": "Unigram", "vocab": [["<pad>", 0.0]] * 4}))
    made["a word of 4 million letters"] = changed(good, setting("tokenizer", "vocabulary", to=["x" * 2**22]))
    made["a million times a word"] = changed(good, setting("tokenizer", "vocabulary", to=["a"] * 10**6))
    made["a long encoder"] = changed(good, setting("encoder", to="x\n" * 10**6))
    made["a long version"] = changed(good, setting("format_version", to=10**4000))
    return made


def test_malicious_checkpoints(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One process, a gibibyte above where it began, captions with each that loads."""
    paths = {}
    for number, (name, data) in enumerate(attacks(tiny_checkpoint).items()):
        paths[name] = tmp_path / f"{number}.safetensors"
        paths[name].write_bytes(data)
    good = tmp_path / "good.safetensors"
    good.write_bytes(changed(tiny_checkpoint, bpe()))
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(good), *map(str, paths.values())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(paths), (lines[-1:], done.stderr[-2000:])
    assert lines[0] == "LOADED", lines[0]  # the attacks differ from this in one thing each
    for name, line in zip(paths, lines[1:], strict=True):
        assert line.startswith("refused in "), (name, line)
        assert float(line.split()[2]) < 8, (name, line)
    assert done.stderr == ""
    assert not (tmp_path / "hacked").exists()


@quick
@given(seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=3))
def test_fuzz_damaged_checkpoints(seeds: list[int], tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = tiny_checkpoint.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = data[: 8 + length]
    for seed in seeds:
        head = hostile.mutate(head, random.Random(seed))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(head + data[8 + length :])
    only(CheckpointError, lambda: checkpoint.read_header(path), path)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**18, 10**30])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(picks=st.lists(st.tuples(st.integers(0, 10**6), anything), min_size=1, max_size=2), drop=st.booleans())
def test_fuzz_descriptions(
    picks: list[tuple[int, Any]], drop: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Every value of the description becomes anything, or is missing."""
    header, body = split(tiny_checkpoint)
    described = json.loads(header["__metadata__"]["captioner"])

    def places(data: Any) -> list[tuple[Any, Any]]:
        found = []
        for key in list(data) if isinstance(data, dict) else range(len(data)):
            found.append((data, key))
            if isinstance(data[key], (dict, list)):
                found += places(data[key])
        return found

    for number, value in picks:
        among = places(described)
        container, key = among[number % len(among)]
        if drop:
            del container[key]
        else:
            container[key] = copy.deepcopy(value)
    header["__metadata__"]["captioner"] = json.dumps(described)
    path = tmp_path / "described.safetensors"
    path.write_bytes(join(header, body))
    only(CheckpointError, lambda: checkpoint.load(path), path)


def test_no_description_is_taken_by_weights_that_do_not_fit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "hidden.safetensors"
    path.write_bytes(changed(tiny_checkpoint, setting("decoder", "hidden", to=25)))
    with pytest.raises(CheckpointError, match="should have shape"):
        checkpoint.load(path)
