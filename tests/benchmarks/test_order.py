"""Clips in which order decides: balanced, disjoint, and telling who reads the frames in time."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from captioner import video
from captioner.frame_encoder import FrameConfig

sys.path += [str(Path(__file__).parents[2] / "benchmarks")]
import order
from order import Clips, Variant


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return order.write_clips(folder, {"train": 60, "validation": 20, "test": 20})


def test_twins_are_balanced() -> None:
    counts = Counter()
    for _, twins in itertools.islice(order.all_twins(0), 1000):
        captions = [caption for caption, _ in twins.orders]
        for _, way in twins.orders:
            assert sorted(way) == list(range(len(twins.frames)))  # the same frames
        assert len(set(captions)) == len(captions)
        # whoever says the same of all twins is right at an order word exactly as often as chance
        chances = order.order_words(captions)
        assert chances
        assert set(chances.values()) == {1 / 3 if twins.kind == "jumps" else 1 / 2}
        rows = [caption.split() for caption in captions]
        for place in chances:
            assert len({row[place] for row in rows}) == len(rows)
        counts[twins.kind, len(twins.frames)] += 1
    assert {kind for kind, _ in counts} == set(order.KINDS)
    assert {frames for _, frames in counts} == {3, 4, 5, 6}


def test_order_words() -> None:
    assert order.order_words(["a disc moves up", "a disc moves down"]) == {3: 0.5}
    assert order.order_words(["x a y", "x b z", "x b y", "x b y"]) == {1: 0.75, 2: 0.75}


def test_files(written: dict[str, Path]) -> None:
    said: dict[str, set[str]] = {}
    for split, path in written.items():
        record = json.loads(path.read_text())
        captions = {row["image_id"]: row["caption"] for row in record["annotations"]}
        said[split] = set(captions.values())
        twins: dict[int, list[dict]] = {}
        for image in record["images"]:
            twins.setdefault(image["twins"], []).append(image)
        for images in twins.values():
            assert len(images) == (3 if images[0]["kind"] == "jumps" else 2)
            assert len({captions[image["id"]] for image in images}) == len(images)
        for images in list(twins.values())[:6]:
            clips = [list(video.frames(path.parent / image["file_name"], 0.5)) for image in images]
            assert all(frame.time == pytest.approx(0.5 * frame.index) for clip in clips for frame in clip)
            seen = [[frame.image.tobytes() for frame in clip] for clip in clips]
            for clip in seen[1:]:
                assert sorted(clip) == sorted(seen[0])
                assert clip != seen[0]
            assert len(set(seen[0])) == len(seen[0])  # noise: none is left out as a repetition
    for a, b in itertools.combinations(said.values(), 2):
        assert not a & b


def test_batches() -> None:
    frames = torch.arange(10.0)[:, None, None].expand(10, 4, 3).half()
    clips = Clips(frames, [3, 7, 10], ["a", "b", "c"], ["moves"] * 3, [{0: 0.5}, {0: 0.5}, {0: 0.25}])
    data, mask = clips.batch([1, 0])
    assert data.shape == (2, 4, 4, 3)
    assert data[:, :, 0, 0].tolist() == [[3, 4, 5, 6], [0, 1, 2, 0]]
    assert mask[:, :, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert clips.chance() == pytest.approx(1.25 / 3)


def test_only_who_reads_the_frames_learns_their_order(tmp_path: Path) -> None:
    """Even of clips that were trained on: twins look the same to the others."""
    torch.set_num_threads(1)
    path = order.write_clips(tmp_path, {"train": 100}, kinds=["turns"])["train"]
    encoder = order.make_encoder(path, size=64)
    clips = order.read_clips(path, encoder)
    assert clips.frames.shape[1:] == (4, order.COMPONENTS)
    # "red to blue" alone is learned in seconds
    short = [" ".join(caption.split()[-3:]) for caption in clips.captions]
    clips = replace(clips, captions=short, order=[{0: 0.5, 2: 0.5}] * len(clips))

    def learn(variant: Variant, epochs: int) -> order.Score:
        return order.evaluate(order.train(variant, encoder, clips, epochs, batch=8), clips)

    blind = learn(Variant("joint"), 5)
    assert blind.order <= 0.5
    reader = Variant("factorised", FrameConfig(cell="gru", width=64))
    few, many = learn(reader, 1), learn(reader, 14)
    assert few.order < 0.6
    assert many.order > 0.8
    assert many.exact > 0.75


def test_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = replace(order.SMALL, clips={"train": 24, "validation": 10, "test": 10}, epochs=1)
    monkeypatch.setattr(order, "SMALL", few)
    options = ["--small", "--processes", "1", "--folder", str(tmp_path), "--only"]
    assert order.main([*options, "gru over cells"]) == 0
    printed = capsys.readouterr().out
    assert "forward gru over cells, factorised, seed 0: 0.0 % exact" in printed
    assert "(chance at its order words: 50" in printed
    assert "where a stream is captioned live: forward gru over cells, factorised" in printed
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.webp")}
    assert order.main([*options, "nothing, mean"]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.webp")} == written
    assert "nothing, mean: most points above chance" in capsys.readouterr().out


def test_the_bars(capsys: pytest.CaptureFixture[str]) -> None:
    clips = Clips(torch.zeros(2, 1, 1), [1, 2], ["x"] * 2, ["moves"] * 2, [{0: 0.5}] * 2)
    blind, reader = Variant("joint"), Variant("factorised", FrameConfig(cell="gru"))

    def holds(blind_order: float, exact: float, small: bool = False) -> bool:
        found = {}
        for variant, right, place in ((blind, 0.3, blind_order), (reader, exact, 1.0)):
            score = order.Score(right, place, {"moves": (right, place)})
            found[variant] = [order.Result(score, score, 1.0)]
        return order.report(found, clips, small)

    assert holds(0.46, 0.96)
    assert not holds(0.44, 0.96)
    assert not holds(0.56, 0.96)
    assert not holds(0.5, 0.94)
    assert holds(0.3, 0.4, small=True)
    assert not holds(0.56, 0.4, small=True)
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_an_unknown_variant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        order.main(["--only", "transformer"])
    assert stop.value.code == 2
    assert "no variant has 'transformer' in its name" in capsys.readouterr().err
