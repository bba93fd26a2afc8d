"""Clips made of photos: they move, and what is compared is what it is called."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captioner_training import metrics
from captioner_training.metrics import Scores
from conftest import make_header, make_tiny_model
from lively import make_lively_model, pictures
from PIL import Image

from captioner import Captioner
from captioner.encoder import join_frames
from captioner.search import SearchOptions, search

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import clips
import common


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    model = make_lively_model()
    with torch.no_grad():
        model.decoder.project.weight.mul_(6)
    return Captioner(model, make_header(model))


def photo(name: str = "chelsea") -> Image.Image:
    image = common.photos()[name]
    image.thumbnail((160, 160))
    return image


def apart(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def test_frames_pan_and_zoom_slowly() -> None:
    frames = clips.moving(photo(), random.Random(1))
    assert len(frames) == clips.FRAMES
    assert {frame.size for frame in frames} == {photo().size}
    steps = [apart(a, b) for a, b in itertools.pairwise(frames)]
    assert min(steps) > 0
    assert np.median(steps) < apart(frames[0], frames[-1])
    again = clips.moving(photo(), random.Random(1))
    assert [apart(a, b) for a, b in zip(frames, again, strict=True)] == [0] * len(frames)


def test_two_frames_are_blurred() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    frames = clips.moving(Image.fromarray(noise), random.Random(1))
    edges = [float(np.abs(np.diff(np.asarray(frame, float), axis=0)).mean()) for frame in frames]
    assert sum(value < 0.75 * np.median(edges) for value in edges) == 2


def test_some_frames_of_harder_clips_do_not_belong() -> None:
    frames, others = (clips.moving(photo(name), random.Random(1)) for name in ("chelsea", "coffee"))
    kinds = set()
    for seed in range(20):
        harder = clips.spoiled(frames, others, random.Random(seed))
        new = [i for i, (a, b) in enumerate(zip(frames, harder, strict=True)) if a is not b]
        assert new in ([0, 1], [8, 9])
        assert {frame.size for frame in harder} == {frames[0].size}
        light = [np.asarray(harder[i]).mean() for i in new]
        cut = light[0] > 40
        kinds.add((cut, new[0]))
        if not cut:  # the outermost is the darkest
            assert (light[0] < light[1]) == (new[0] == 0)
            assert max(light) < 25
    assert len(kinds) == 4


def test_probabilities_are_those_of_the_search(captioner: Captioner) -> None:
    frames = captioner.encode_batch(pictures(3))
    said = ["a dog runs", "the red bicycle", "a man rides in the street with a dog", "water"]
    found = clips.probabilities(captioner, frames, said)
    assert found.shape == (4, 3)
    model, penalty = captioner.model, captioner.defaults.length_penalty
    for row, text in enumerate(said):
        tokens = model.tokenizer.encode(text)
        options = SearchOptions(beam=1, max_length=len(tokens), no_repeat_ngram=0)
        given = search(model.decoder, model.memory(frames), options, prefixes=[tokens] * 3)
        total = [h[0].token_log_probabilities.sum() + h[0].log_probability for h in given]
        assert found[row] == pytest.approx(np.array(total) / (len(tokens) + 1) ** penalty, abs=1e-4)


def test_ways_to_look_at_several_frames(captioner: Captioner) -> None:
    frames = captioner.encode_batch([np.asarray(Image.fromarray(p).resize((64, 48))) for p in pictures(6)])
    clip = join_frames([frames[i] for i in range(6)], range(6))
    said = {"joint": captioner.caption(clip)}
    for name in ("mean", "factorised"):
        way = clips.over_frames(captioner, name)
        assert way.model.decoder.config.frames == name
        assert way.caption(frames[2]).text == captioner.caption(frames[2]).text
        said[name] = way.caption(clip)
    assert len({round(caption.log_probability, 3) for caption in said.values()}) == 3
    # uniform: every frame weighs the same
    assert said["factorised"].attention.sum(2) == pytest.approx(1 / 6, abs=1e-5)
    assert np.ptp(said["joint"].attention.sum(2)) > 0.05
    assert captioner.model.decoder.config.frames == "joint"  # as it was


def test_odd_frames_are_those_that_look_like_no_others(captioner: Captioner) -> None:
    one, other = (np.asarray(Image.fromarray(pictures(9)[i]).resize((64, 48))) for i in (0, 4))
    rng = np.random.default_rng(0)

    def near(picture: np.ndarray) -> np.ndarray:
        return (picture + rng.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)

    assert clips.typical(captioner.encode_batch([near(one) for _ in range(6)])) == [0, 1, 2, 3, 4, 5]
    features = captioner.encode_batch([near(one) for _ in range(5)] + [near(other)])
    data = features.data.clone()
    data[5] -= 0.99 * data[:5].mean(0)  # the tiny encoder finds all pictures much alike
    assert clips.typical(replace(features, data=data)) == [0, 1, 2, 3, 4]


def test_votes() -> None:
    assert clips.overlap("a dog runs", "a dog runs") == 1
    assert clips.overlap("a dog runs", "the cat sits") == 0
    assert clips.overlap("a dog runs", "a dog sits") == pytest.approx(2 * 3 / 10)
    captioner = Captioner(model := make_tiny_model(), make_header(model))
    votes = [
        ["a red car", "a dog runs in the street", "a dog runs in the grass", "a dog runs in the water"],
        ["a man rides a bicycle", "a man rides a bicycle", "the tree"],
    ]
    chosen = list(clips.by_cider(captioner, votes))
    assert "dog runs" in chosen[0]
    assert chosen[1] == "a man rides a bicycle"


class WordScorer:
    """Stands in for the metrics, which start Java: the share of a caption's words that references hold."""

    def __init__(self, references: Mapping[Any, Sequence[str]]) -> None:
        self.references = references

    def score(self, generated: Mapping[Any, str], **options: Any) -> Scores:
        assert list(generated) == list(self.references)
        each = {}
        for key, text in generated.items():
            known = " ".join(self.references[key]).split()
            each[key] = float(np.mean([word in known for word in text.split()] or [0]))
        mean = float(np.mean(list(each.values())))
        return Scores({"BLEU-4": mean, "CIDEr": mean}, {"CIDEr": each}, len(each), len(each))


def test_report(
    tmp_path: Path,
    captioner: Captioner,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["chelsea", "coffee", "rocket"]
    for name in names:
        photo(name).save(tmp_path / f"{name}.png")
    record = {
        "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(names)],
        "annotations": [
            {"id": 2 * i + k, "image_id": i, "caption": text}
            for i in range(3)
            for k, text in enumerate(("a cat sits on the grass", "the man and a red car"))
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(record))
    monkeypatch.setattr(metrics, "Scorer", WordScorer)
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: captioner)
    given = ["--annotations", str(tmp_path / "captions.json"), "--images", str(tmp_path)]
    saved = tmp_path / "said.jsonl"
    assert clips.main([*given, "--no-meteor", "--pictures", "2", "--timed", "1", "--save", str(saved)]) == 0

    out = capsys.readouterr().out
    for kind in clips.KINDS:
        assert f"captions, 2 clips of 10 frames, {kind}" in out
    rows = [line for line in out.splitlines() if line.startswith("  ") and "CIDEr  " not in line]
    assert len(rows) == 28
    assert all(float(row.split()[-1]) > 0 for row in rows)  # costs
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [line["kind"] for line in lines] == list(clips.KINDS) * 2
    for line in lines:
        said = line["said"]
        assert len(said[clips.AVERAGE]) == 10
        assert said["middle frame alone"] == said[clips.AVERAGE][5:6]
        means = {text: np.mean(fits) for text, fits in line["fits"].items()}
        assert means[said["agreement"][0]] == pytest.approx(max(means.values()), abs=1e-3)
        assert all(len(fits) == 10 for fits in line["fits"].values())
        assert set(said["joint"]) | set(said[clips.AVERAGE]) <= set(line["fits"])
    # what does not change from the first kind to the second was not looked at again, and is the same
    first, second = (lines[k]["said"][clips.AVERAGE] for k in (0, 1))
    assert first[2:8] == second[2:8]
