from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from captioner import checkpoint
from captioner.decoder import DecoderConfig
from captioner.encoder import Encoder
from captioner.model import CaptionModel
from captioner.tokenizer import WordTokenizer

LONGEST = (
    "training/test_loop.py",
    "batch/test_ray.py",
    "training/test_recipes.py",
    "demo/test_demo_live_browser.py",
    "training/test_workers.py",
    "demo/test_demo_video_browser.py",
    "demo/test_demo_sessions.py",
    "test_cli_video.py",
    "training/test_videos.py",
    "training/test_compare.py",
    "test_cli.py",
    "demo/test_demo_folder_browser.py",
    "demo/test_demo_browser.py",
    "hostile/test_hostile_corpus.py",
    "batch/test_cli_batch.py",
    "benchmarks/test_order.py",
)
"""Files that take a minute and more: they begin first, and the others fill the gaps at the end."""

TINY_WORDS = [
    "a",
    "the",
    "on",
    "in",
    "of",
    "with",
    "and",
    "is",
    "man",
    "woman",
    "dog",
    "cat",
    "bicycle",
    "car",
    "tree",
    "street",
    "red",
    "blue",
    "black",
    "white",
    "small",
    "large",
    "runs",
    "sits",
    "rides",
    "stands",
    "grass",
    "water",
    "table",
    "'s",
]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors are faster without a pool of threads, and results do not depend on their number."""
    torch.set_num_threads(1)


def make_tiny_model(**decoder: object) -> CaptionModel:
    """Random weights, the same every time; 64 pixels, a 2 x 2 grid, 34 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        encoder = Encoder("efficientnet_lite0")
        encoder = Encoder("efficientnet_lite0", preprocess=replace(encoder.preprocess, size=64))
        options = {"hidden": 24, "embedding": 16, "cells": 20, "attention_width": 12, **decoder}
        model = CaptionModel(encoder, DecoderConfig(**options), WordTokenizer(TINY_WORDS))
        sharpen(model.decoder)
    return model.eval()


def sharpen(decoder: torch.nn.Module) -> None:
    """Spread the weights of a random decoder, so that its words and attention depend on what it has seen."""
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("embedding.weight"):
                parameter.normal_(0, 1)
            elif parameter.dim() > 1 and not name.startswith("cell."):
                parameter.mul_(2)


def make_header(model: CaptionModel, **changes: object) -> checkpoint.Header:
    header = checkpoint.Header(
        name="tiny",
        encoder=model.encoder.name,
        preprocess=model.encoder.preprocess,
        decoder=model.decoder.config,
        tokenizer=model.tokenizer.to_dict(),
        search={"beam": 3, "max_length": 12},
        summary={"data": "none"},
    )
    return replace(header, **changes)


@pytest.fixture
def tiny_model() -> CaptionModel:
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny model; not to be changed."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    model = make_tiny_model()
    checkpoint.save(path, model, make_header(model))
    return path


# for the tests of pages


def chromium() -> str | None:
    """Return the path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium for all tests of a process: Playwright starts once in each."""
    path = chromium()
    if path is None:
        pytest.skip("no Chromium found: apt install chromium, or set CHROMIUM to its path")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"],
        )
        yield browser
        browser.close()


# for the tests of training, which alone import what they need


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the shapes, for tests that leave it as it is."""
    from shape_data import write_shapes

    return write_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature cache for all tests: they train on the same pictures with the same encoder."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate without Java."""
    from captioner_training import experiment
    from shape_data import QuickScorer

    monkeypatch.setattr(experiment, "Scorer", QuickScorer)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, name in enumerate(LONGEST) if path.endswith(f"/tests/{name}")), len(LONGEST))

    items.sort(key=rank)
