"""A data set small enough to be learned by heart: coloured shapes with captions, and a config for it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from captioner_training.config import TrainingConfig
from captioner_training.metrics import Scores
from conftest import make_tiny_model
from PIL import Image, ImageDraw

from captioner.encoder import Encoder
from captioner.model import CaptionModel

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 220), "yellow": (240, 220, 30)}
GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
FORMS = ("circle", "square", "cross")
COMBINATIONS = [(c, f, g) for c in COLOURS for f in FORMS for g in GROUNDS]


def draw(colour: str, form: str, ground: str, size: int = 96) -> Image.Image:
    image = Image.new("RGB", (size, size), GROUNDS[ground])
    pen, low, high = ImageDraw.Draw(image), size // 5, size - size // 5
    if form == "circle":
        pen.ellipse((low, low, high, high), COLOURS[colour])
    elif form == "square":
        pen.rectangle((low, low, high, high), COLOURS[colour])
    else:
        third = size // 8
        pen.rectangle((size // 2 - third, 0, size // 2 + third, size), COLOURS[colour])
        pen.rectangle((0, size // 2 - third, size, size // 2 + third), COLOURS[colour])
    return image


def captions(colour: str, form: str, ground: str) -> list[str]:
    return [f"a {colour} {form} on a {ground} background", f"{colour} {form} on {ground}"]


def write_shapes(folder: Path, count: int = 24, *, tar: bool = False) -> Path:
    """Write ``count`` pictures, as ``pictures/`` or ``pictures.tar``, and ``shapes.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    encoded = {}
    for number, (colour, form, ground) in enumerate(COMBINATIONS[:count]):
        name = f"{colour}-{form}-{ground}.png"
        buffer = io.BytesIO()
        draw(colour, form, ground).save(buffer, "PNG")
        encoded[name] = buffer.getvalue()
        images.append({"id": 100 + number, "file_name": name, "set": form})
        annotations += [{"image_id": 100 + number, "caption": c} for c in captions(colour, form, ground)]
    if tar:
        write_tar(folder / "pictures.tar", encoded)
    else:
        (folder / "pictures").mkdir(exist_ok=True)
        for name, data in encoded.items():
            (folder / "pictures" / name).write_bytes(data)
    (folder / "shapes.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def stage(**changes: Any) -> dict[str, Any]:
    usual = {
        "name": "first",
        "sources": {"shapes": 1},
        "epochs": 1,
        "learning_rate": 3e-3,
        "batch_pictures": 8,
        "average": 0.9,
    }
    return {**usual, **changes}


def plain_config(stages: Sequence[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """Return what a YAML file would hold: a tiny model over the shapes."""

    def shapes() -> dict[str, Any]:
        return {"annotations": "shapes.json", "images": ["pictures"]}

    return {
        "name": "shapes",
        "seed": 3,
        "data": {"sources": {"shapes": shapes()}, "validation": {"shapes_val": shapes()}},
        "encoder": {"name": "efficientnet_lite0", "size": 64},
        "tokenizer": {"min_count": 1},
        "decoder": {"hidden": 48, "embedding": 24, "cells": 32, "attention_width": 16, "dropout": 0.1},
        "loss": {"label_smoothing": 0.0},
        "search": {"beam": 1, "max_length": 10},
        "tensorboard": False,
        "stages": list(stages or [stage()]),
        **changes,
    }


def make_config(stages: Sequence[dict[str, Any]] | None = None, **changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(plain_config(stages, **changes))


def make_seeing_model() -> CaptionModel:
    """Return a pretrained encoder with a random decoder: what it says depends on what it sees."""
    model = make_tiny_model()
    model.encoder.network.load_state_dict(Encoder("efficientnet_lite0", pretrained=True).network.state_dict())
    return model


class QuickScorer:
    """Stands in for the metrics, which start Java: CIDEr is the share of captions that are a reference."""

    def __init__(self, references: Mapping[Any, Sequence[str]]) -> None:
        self.references = references

    def score(self, generated: Mapping[Any, str], **options: Any) -> Scores:
        assert generated.keys() == self.references.keys()
        right = [caption in self.references[key] for key, caption in generated.items()]
        value = sum(right) / len(right)
        return Scores({"CIDEr": value}, {}, len(right), len(right))


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def state_of(output: Path) -> dict:
    return torch.load(output / "state.pt", weights_only=True)


def same(a: object, b: object) -> bool:
    """Compare nested states bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
