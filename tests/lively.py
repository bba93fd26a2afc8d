"""A tiny model whose words depend on the picture, and pictures for it to tell apart."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from conftest import make_header, make_tiny_model
from PIL import Image

from captioner import Captioner
from captioner.calibration import Calibration
from captioner.images import load
from captioner.model import CaptionModel


def pictures(count: int) -> list[np.ndarray]:
    """Patches of random colours, of many sizes and shapes; the same every time."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(count):
        height, width, rows, columns = (int(v) for v in rng.integers((20, 20, 1, 1), (200, 200, 7, 7)))
        patches = Image.fromarray(rng.integers(0, 256, (rows, columns, 3), np.uint8))
        made.append(np.asarray(patches.resize((width, height), int(rng.choice([0, 2])))))
    return made


def make_lively_model(**decoder: object) -> CaptionModel:
    """The tiny model with BatchNorm statistics of `pictures`; as drawn, it maps all pictures to about 0."""
    model = make_tiny_model(**decoder)
    with torch.no_grad():
        pixels = [load(picture, model.encoder.preprocess)[0] for picture in pictures(24)]
        batch = torch.from_numpy(np.stack(pixels)).float() / 128 - 1
        for module in model.encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train()
                module.momentum = 1.0
        model.encoder.network(batch)
    return model.eval()


@cache
def lively_captioner() -> Captioner:
    """One for all tests, because a `Captioner` keeps no state."""
    model = make_lively_model()
    return Captioner(model, make_header(model))


def make_calibration(width: int = 1280, directions: int = 4) -> Calibration:
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(width, directions)))[0] / np.linspace(0.5, 3, directions)
    return Calibration(
        word=(0.8, 0.3),
        caption=(0.5, 0.4, 0.05, 0.1, -0.2, -0.1, 0.03, 0.3, 0.1),
        mean=rng.normal(size=width),
        basis=basis,
        residual=2.5,
        shown=(1.0, 0.1, 0.2, -0.1, 0.05, -0.3, 0.04, 0.0, 0.0),
    )
