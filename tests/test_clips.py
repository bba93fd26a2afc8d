from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_header, sharpen
from lively import make_lively_model, pictures
from PIL import Image
from test_video import Camera, camera, write  # noqa: F401

from captioner import Captioner, ImageError, Segment, clips, video
from captioner.clips import Rolling
from captioner.frame_encoder import FrameConfig
from captioner.model import CaptionModel
from captioner.video import VideoError

SIZE = (64, 48)


def scenes(count: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """Pictures of one size of which the model says different things."""
    return [np.asarray(Image.fromarray(picture).resize(size)) for picture in pictures(count)]


def animation(path: Path, shown: list[np.ndarray], milliseconds: int | list[int] = 500) -> Path:
    """Write an animation that keeps pixels and times exactly, and needs no OpenCV."""
    first, *others = map(Image.fromarray, shown)
    first.save(path, save_all=True, append_images=others, duration=milliseconds, lossless=True)
    return path


def marked(shown: list[np.ndarray]) -> list[np.ndarray]:
    """Return the pictures with a pixel of its own each: Pillow makes one frame of equal neighbours."""
    result = [picture.copy() for picture in shown]
    for number, picture in enumerate(result):
        picture[0, 0] = number
    return result


def texts(segments: list[Segment] | tuple[Segment, ...]) -> list[str]:
    return [segment.caption.text for segment in segments]


def spans(segments: list[Segment] | tuple[Segment, ...]) -> list[tuple[float, float]]:
    return [(round(float(s.start), 3), round(float(s.end), 3)) for s in segments]


def moments(segments: list[Segment] | tuple[Segment, ...]) -> list[list[float]]:
    return [[round(float(t), 3) for t in segment.times] for segment in segments]


def exactly(segments: list[Segment] | tuple[Segment, ...]) -> list[tuple[object, ...]]:
    """Return what segments say, for comparisons to the last bit."""
    found = []
    for segment in segments:
        said = segment.caption
        facts = (segment.start, segment.end, said.text, said.log_probability, said.confidence)
        found.append((*facts, said.times.tolist(), said.attention.tobytes()))
    return found


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave neighbours apart that say the same."""
    monkeypatch.setattr(clips, "merge", list)


@cache
def captioner_of(**frames: object) -> Captioner:
    """A captioner whose words depend on the frames, with a frame encoder of that config, if any."""
    plain = make_lively_model()
    config = FrameConfig(**frames) if frames else None
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = CaptionModel(plain.encoder, plain.decoder.config, plain.tokenizer, config)
    with torch.no_grad():
        if config is None:
            model.decoder.load_state_dict(plain.decoder.state_dict())
        else:
            sharpen(model.decoder)
            model.decoder.project.weight[:, plain.encoder.width :] *= 8
        model.decoder.project.weight.mul_(6)
        model.decoder.initial.weight.mul_(3)
    return Captioner(model.eval(), replace(make_header(model), frames=config))


@pytest.fixture
def captioner() -> Captioner:
    """One for all tests, because a `Captioner` keeps no state."""
    return captioner_of()


# --------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize(
    ("milliseconds", "options", "expected"),
    [
        ([500] * 8, {"segment": 2}, [(0, 2), (2, 4)]),
        ([500] * 8 + [400], {"segment": 2}, [(0, 2), (2, 4.4)]),  # a rest of less than a quarter
        ([500] * 8 + [600], {"segment": 2}, [(0, 2), (2, 4), (4, 4.6)]),
        ([200, 200], {"segment": 2}, [(0, 0.4)]),
        ([500] * 9, {"segment": None}, [(0, 4.5)]),
        ([500] * 9, {"segment": 60}, [(0, 4.5)]),
        ([500] * 9, {"segment": 1, "start": 1, "end": 3.2}, [(1, 2), (2, 3.2)]),
        ([500] * 9, {"segment": 1, "start": 3.2}, [(3.2, 4.5)]),
        ([500] * 9, {"segment": 2, "start": 0.2, "end": 60}, [(0.2, 2.2), (2.2, 4.5)]),
        ([3000, 3000], {"segment": 1}, [(0, 3), (3, 6)]),  # windows without a frame belong to what is shown
        ([100, 3000, 500, 500], {"segment": 1}, [(0, 3), (3, 4.1)]),
    ],
)
@pytest.mark.usefixtures("apart")
def test_windows(
    tmp_path: Path, captioner: Captioner, milliseconds: list[int], options: dict, expected: list[tuple]
) -> None:
    clip = animation(tmp_path / "a.webp", scenes(len(milliseconds)), milliseconds)
    found = captioner.caption_video(clip, **options)
    assert spans(found.segments) == [pytest.approx(pair) for pair in expected]
    assert found.duration == pytest.approx(expected[-1][1])
    assert found.error is None
    # every frame that is sampled is in the segment of its time
    span = {name: value for name, value in options.items() if name != "segment"}
    sampled = [frame.time for frame in video.frames(clip, 0.5, **span)]
    assert list(itertools.chain(*(s.times.tolist() for s in found.segments))) == pytest.approx(sampled)
    assert all(s.start - 1e-6 <= s.times[0] <= s.times[-1] < s.end for s in found.segments)


@pytest.mark.usefixtures("apart")
def test_windows_are_those_of_the_module_for_videos(tmp_path: Path, captioner: Captioner) -> None:
    rng = np.random.default_rng(5)
    shown = scenes(20)
    for trial in range(8):
        clip = animation(tmp_path / f"{trial}.webp", shown[: int(rng.integers(5, 20))], 100)
        options = {"start": round(float(rng.uniform(0, 0.3)), 2), "end": float(rng.choice([0.43, 1.77, 9]))}
        length = float(rng.uniform(0.2, 1.5))
        found = captioner.caption_segments(clip, every=0.1, segment=length, beam=1, max_length=2, **options)
        expected = video.segments(clip, length, **options)
        assert spans(list(found)) == [pytest.approx(pair, abs=2e-3) for pair in expected]


def test_a_segment_says_what_its_frames_say_together(tmp_path: Path, captioner: Captioner) -> None:
    shown = scenes(20)
    clip = animation(tmp_path / "a.webp", shown, 250)
    found = captioner.caption_video(clip, every=0.25, segment=2, n_best=2)
    assert moments(found.segments) == [
        [0.25 * i for i in part] for part in (range(8), range(8, 16), range(16, 20))
    ]
    assert len(set(texts(found.segments))) == 3  # or the following would prove little
    for segment in found.segments:
        frames = [shown[round(float(t) / 0.25)] for t in segment.times]
        features = captioner.encode_frames(frames, segment.times.tolist())
        expected = captioner.caption(features, n_best=2)
        assert segment.caption.text == expected.text
        assert segment.caption.log_probability == pytest.approx(expected.log_probability, abs=1e-4)
        assert [c.text for c in segment.caption.n_best] == [c.text for c in expected.n_best]
        weights = segment.caption.attention
        assert weights.shape == (len(expected.words), len(frames), 4)
        assert weights.sum((1, 2)) == pytest.approx(np.ones(len(weights)), abs=1e-5)
        assert np.abs(weights - expected.attention).max() < 1e-4
        assert segment.caption.fit.width, segment.caption.fit.height == SIZE


def test_a_photo_is_a_clip_of_one_frame(tmp_path: Path, captioner: Captioner) -> None:
    Image.fromarray(scenes(1)[0]).save(tmp_path / "a.png")
    found = captioner.caption_video(tmp_path / "a.png")
    assert texts(found.segments) == [captioner.caption(tmp_path / "a.png").text]
    assert found.segments[0].times.tolist() == [0]


@pytest.mark.parametrize("most", [4, 5])
def test_of_long_segments_frames_are_left_out_evenly(
    tmp_path: Path, captioner: Captioner, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(clips, "MOST_FRAMES", most)
    for count in (1, 4, 5, 6, 13, 23):
        clip = animation(tmp_path / f"{count}.webp", scenes(count), 500)
        (times,) = moments(captioner.caption_video(clip, segment=None, beam=1, max_length=3).segments)
        assert times[0] == 0
        assert len(times) <= most
        assert len(times) > most / 2 or len(times) == count
        steps = set(np.diff(times))
        assert len(steps) <= 1  # evenly
        step = steps.pop() if steps else 0.5
        assert count / 2 - times[-1] <= step  # to the end


# --------------------------------------------------------------------------------------------------
# Shots


@pytest.fixture(scope="module")
def three_shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shots that begin at 0, 1.2 and 4.3 seconds, of 5 seconds, with something that moves in each."""
    shown = []
    for number in range(50):
        picture = np.full((72, 96, 3), (250, 10, 20) if number < 12 else (15, 200, 25), np.uint8)
        if number >= 43:
            picture[:] = (20, 30, 240)
        picture[20:40, number : number + 20] = 255
        shown.append(picture)
    return animation(tmp_path_factory.mktemp("shots") / "shots.webp", shown, 100)


@pytest.mark.usefixtures("apart")
def test_shots(three_shots: Path, captioner: Captioner) -> None:
    pytest.importorskip("scenedetect")

    def cut(**options: object) -> list[tuple[float, float]]:
        found = captioner.caption_video(three_shots, shots=True, every=0.1, beam=1, max_length=3, **options)
        for segment in found.segments:  # no frame of another shot
            assert segment.start - 1e-3 <= segment.times[0]
            assert segment.times[-1] < segment.end - 0.04
        return spans(found.segments)

    assert cut(segment=None) == [(0, 1.2), (1.2, 4.3), (4.3, 5)]
    assert cut(segment=5) == [(0, 1.2), (1.2, 4.3), (4.3, 5)]  # a shot is no rest, however short
    assert cut(segment=1.5) == [(0, 1.2), (1.2, 2.7), (2.7, 4.3), (4.3, 5)]  # but its own rest is
    assert cut(segment=1) == [(0, 1.2), (1.2, 2.2), (2.2, 3.2), (3.2, 4.3), (4.3, 5)]
    assert cut(segment=None, start=0.5, end=4.95) == [(0.5, 1.2), (1.2, 4.3), (4.3, 4.95)]


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("segment", [None, 5, 1.5])
def test_a_cut_just_before_the_end_is_none(
    three_shots: Path, captioner: Captioner, segment: float | None
) -> None:
    pytest.importorskip("scenedetect")
    options = {"shots": True, "every": 0.1, "segment": segment, "end": 4.8, "beam": 1, "max_length": 3}
    found = spans(captioner.caption_video(three_shots, **options).segments)
    assert found[0] == (0, 1.2)
    assert found[-1][1] == 4.8
    assert 4.3 not in [start for start, _ in found]


def test_shots_without_scenedetect(
    three_shots: Path, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(VideoError, match=r'PySceneDetect; pip install "captioner\[shots\]"'):
        captioner.caption_video(three_shots, shots=True)


# --------------------------------------------------------------------------------------------------
# As they come


def test_neighbours_that_say_the_same_are_one(tmp_path: Path, captioner: Captioner) -> None:
    one, other = scenes(2)
    clip = animation(tmp_path / "a.webp", marked([one] * 6 + [other] * 2 + [one] * 2), 500)
    said = [captioner.caption(picture).text for picture in (one, other)]
    assert said[0] != said[1]
    found = captioner.caption_video(clip, segment=1)
    assert texts(found.segments) == [said[0], said[1], said[0]]
    assert spans(found.segments) == [(0, 3), (3, 4), (4, 5)]
    assert moments(found.segments)[0] == [0, 0.5, 1, 1.5, 2, 2.5]
    weights = found.segments[0].caption.attention
    assert weights.shape[1:] == (6, 4)
    assert weights.sum((1, 2)) == pytest.approx(np.ones(len(weights)), abs=1e-5)


@pytest.mark.usefixtures("apart")
def test_what_does_not_change_is_looked_at_once(
    tmp_path: Path, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = scenes(2)
    clip = write(tmp_path / "a.mkv", [one] * 20 + [other] * 10 + [one] * 14, rate=2, codec="ffv1")
    looked: list[int] = []
    said: list[str] = []
    encode, caption = captioner.encode_pixels, captioner.caption
    monkeypatch.setattr(captioner, "encode_pixels", lambda p: looked.append(len(p)) or encode(p))
    monkeypatch.setattr(captioner, "caption", lambda *a, **o: said.append("") or caption(*a, **o))
    found = captioner.caption_video(clip, segment=2, n_best=2).segments
    assert sum(looked) == 3
    assert len(said) == 4  # the first, the other, half and half, the first again
    monkeypatch.setattr(clips, "_same", lambda one, other: False)
    expected = captioner.caption_video(clip, segment=2, n_best=2).segments
    assert sum(looked) == 3 + 44
    assert texts(found) == texts(expected)
    assert len(set(texts(found))) > 1
    assert (spans(found), moments(found)) == (spans(expected), moments(expected))
    for segment, as_before in zip(found, expected, strict=True):
        assert segment.caption.attention == pytest.approx(as_before.caption.attention, abs=1e-5)
        assert segment.caption.confidence == pytest.approx(as_before.caption.confidence, abs=1e-5)
        for hypothesis in segment.caption.n_best:
            assert hypothesis.times.tolist() == segment.times.tolist()


def test_segments_and_progress_come_while_the_clip_is_read(tmp_path: Path, captioner: Captioner) -> None:
    one, other = scenes(2)
    assert len({captioner.caption(picture, beam=1).text for picture in (one, other)}) == 2
    clip = animation(tmp_path / "a.webp", marked([one, one, other, other] * 30), 500)
    read: list[float] = []
    threads = threading.active_count()  # other tests may have left some
    found = captioner.caption_segments(clip, segment=1, progress=read.append, beam=1)
    assert read == []  # nothing is read before it is asked for
    first = next(found)
    assert (first.start, first.end) == (0, 1)
    assert 2 < read[-1] < 40
    assert spans([first, *found]) == [(i, i + 1) for i in range(60)]
    assert read == [pytest.approx(0.5 * i) for i in range(1, 121)]
    assert threading.active_count() < threads + 20

    read.clear()
    captioner.caption_video(clip, start=2, end=5.2, progress=read.append, beam=1)
    assert read[-1] == pytest.approx(5.2)
    assert max(read) <= 5.2


def test_giving_up_leaves_nothing_behind(tmp_path: Path, captioner: Captioner) -> None:
    clip = animation(tmp_path / "a.webp", scenes(40), 500)
    torch.set_num_threads(2)
    try:
        found = captioner.caption_segments(clip, segment=1, beam=1)
        next(found)
        found.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    with pytest.raises(StopIteration):
        next(found)


def test_results_do_not_depend_on_the_number_of_threads(tmp_path: Path, captioner: Captioner) -> None:
    clip = animation(tmp_path / "a.webp", scenes(24), 250)
    expected = exactly(captioner.caption_video(clip, segment=1, every=0.25).segments)
    assert len(expected) >= 5
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            found = captioner.caption_video(clip, segment=1, every=0.25)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        assert exactly(found.segments) == expected


def test_options_reach_every_segment(tmp_path: Path, captioner: Captioner) -> None:
    shown = scenes(8)
    clip = animation(tmp_path / "a.webp", shown, 500)
    found = captioner.caption_video(clip, segment=2, prefix="the man", must=["tree"], beam=2, max_length=8)
    assert all(text.startswith("the man") and "tree" in text.split() for text in texts(found.segments))
    assert all(segment.caption.words[0].given for segment in found.segments)

    half = (0, 0, SIZE[0] // 2, SIZE[1])
    found = captioner.caption_video(clip, segment=2, region=half)
    whole = captioner.caption_video(clip, segment=2)
    assert len(found.segments) == len(whole.segments) == 2
    for segment in found.segments:
        assert segment.caption.attention.reshape(-1, 4, 2, 2)[..., 1].max() == 0  # of all frames
    assert texts(found.segments) != texts(whole.segments)

    drawn = [texts(captioner.caption_video(clip, sample=True, seed=seed).segments) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_frame_encoder_reads_the_frames_in_order(tmp_path: Path) -> None:
    shown = scenes(6)
    there = animation(tmp_path / "there.webp", shown)
    back = animation(tmp_path / "back.webp", shown[::-1])
    for bidirectional in (False, True):
        moving = captioner_of(cell="gru", width=8, bidirectional=bidirectional)
        forth = moving.caption_video(there, segment=None).segments[0].caption
        frames = moving.encode_frames(shown, [0.5 * i for i in range(6)])
        assert forth.text == moving.caption(frames).text
        turned = moving.caption_video(back, segment=None).segments[0].caption
        assert forth.log_probability != pytest.approx(turned.log_probability, abs=1e-3)
    blind = captioner_of()
    values = [blind.caption_video(clip, segment=None).segments[0].caption for clip in (there, back)]
    assert values[0].log_probability == pytest.approx(values[1].log_probability, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# Mistakes and bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment must be more than 0 seconds, found 0"),
        ({"segment": float("nan")}, "segment must be more than 0 seconds, found nan"),
        ({"every": 0}, "every must be more than 0 seconds, found 0"),
        ({"every": float("inf")}, "every must be more than 0 seconds, found inf"),
        ({"start": -1}, "start must be 0 or more seconds"),
        ({"start": 3, "end": 2}, "end"),
        ({"beams": 3}, "unknown option 'beams'"),
        ({"must": ["zebra"]}, "the required word 'zebra' is not in the model's vocabulary"),
    ],
)
def test_mistakes_are_told_at_once(captioner: Captioner, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        captioner.caption_segments("no such file.mp4", **options)
    assert not isinstance(error.value, VideoError)
    assert "\n" not in str(error.value)


def test_a_region_beside_the_picture(tmp_path: Path, captioner: Captioner) -> None:
    clip = animation(tmp_path / "a.webp", scenes(3))
    with pytest.raises(ValueError, match="lies outside the photo"):
        captioner.caption_video(clip, region=(100, 0, 120, 20))


def test_of_a_truncated_file_the_beginning_is_captioned(tmp_path: Path, captioner: Captioner) -> None:
    shown = [picture for picture in scenes(8) for _ in range(10)]
    whole = write(tmp_path / "a.avi", shown, codec="mjpeg", gop=1)
    clip = tmp_path / "cut.avi"
    clip.write_bytes(whole.read_bytes()[: int(0.7 * whole.stat().st_size)])
    found = captioner.caption_video(clip, segment=1)
    expected = captioner.caption_video(whole, segment=1)
    assert expected.error is None
    assert found.error.startswith(f"{clip}: the file is truncated; nothing could be read after ")
    assert "\n" not in found.error
    assert len(found.segments) >= 3
    assert exactly(found.segments[:-1]) == exactly(expected.segments[: len(found.segments) - 1])
    # to the last frame that is there, which lasts a tenth of a second
    last = float(found.error.split(" after ")[1].split(" s;")[0])
    assert 4.5 < last < 6
    assert found.duration == pytest.approx(last + 0.1, abs=0.02)
    assert found.to_dict()["error"] == found.error

    received: list[Segment] = []
    with pytest.raises(VideoError, match="truncated"):
        received.extend(captioner.caption_segments(clip, segment=1))  # keeps what came before
    assert spans(received) == spans(found.segments)


def test_files_of_which_nothing_can_be_read(tmp_path: Path, captioner: Captioner) -> None:
    (tmp_path / "text.mp4").write_text("not a video\n" * 20)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4", "missing.mp4"):
        with pytest.raises(VideoError) as error:
            captioner.caption_video(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name))
        assert "\n" not in str(error.value)
    clip = animation(tmp_path / "a.webp", scenes(3))
    with pytest.raises(VideoError, match=r"the clip ends at 1\.50 s, before start=2"):
        captioner.caption_video(clip, start=2)


def test_photos_need_nothing_for_videos(tmp_path: Path, tiny_checkpoint: Path) -> None:
    Image.fromarray(scenes(1)[0]).save(tmp_path / "a.png")
    animation(tmp_path / "a.webp", scenes(3))
    code = """
        import sys
        from captioner import Captioner
        captioner = Captioner.load(sys.argv[1])
        captioner.caption(sys.argv[2])
        loaded = {name.partition(".")[0] for name in sys.modules}
        print(*(loaded & {"cv2", "av", "scenedetect", "gradio", "captioner_training", "captioner_demo"}))
        captioner.caption_video(sys.argv[3])
        print(*(name for name in ("cv2", "av", "scenedetect") if name in sys.modules))
    """
    paths = [tiny_checkpoint, tmp_path / "a.png", tmp_path / "a.webp"]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, paths)], capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "\n\n"


# --------------------------------------------------------------------------------------------------
# Live


def roll(
    captioner: Captioner, shown: list[np.ndarray], window: float = 4, **options: object
) -> list[Segment]:
    rolling = Rolling(captioner, window, **options)
    return [rolling.add(0.5 * number, picture) for number, picture in enumerate(shown)]


def test_a_live_caption_depends_on_the_past_alone() -> None:
    shown = scenes(12)
    for config in ({"cell": "gru"}, {"cell": "lstm", "over": "frames", "positions": 4}):
        moving = captioner_of(width=8, **config)
        first = roll(moving, shown[:9], beam=1)
        second = roll(moving, shown[:6] + shown[9:], beam=1)
        assert exactly(first[:6]) == exactly(second[:6])
        assert exactly(first[6:]) != exactly(second[6:])
        # and what the model knows of a frame does not change when later ones are there as well
        features = moving.encode_frames(shown)
        whole = moving.model.look(features.data, features.mask).cells.unflatten(1, (12, 4))
        past = moving.model.look(features.data[:, :5], features.mask[:, :5]).cells.unflatten(1, (5, 4))
        assert torch.allclose(whole[:, :5], past, atol=1e-5)
        # while it does know those before
        turned = roll(moving, [*shown[:5][::-1], shown[5]], beam=1)
        assert turned[-1].caption.log_probability != pytest.approx(first[5].caption.log_probability, abs=1e-3)


def test_a_rolling_caption_is_that_of_its_window(captioner: Captioner) -> None:
    shown = scenes(9)
    found = roll(captioner, shown, window=1.5)
    for number, segment in enumerate(found):
        places = range(max(0, number - 3), number + 1)
        assert moments([segment]) == [[0.5 * i for i in places]]
        assert spans([segment]) == [(0.5 * places[0], 0.5 * number)]
        features = captioner.encode_frames([shown[i] for i in places], [0.5 * i for i in places])
        expected = captioner.caption(features)
        assert segment.caption.text == expected.text
        assert segment.caption.log_probability == pytest.approx(expected.log_probability, abs=1e-4)
    assert len(set(texts(found))) > 2


def test_a_window_holds_so_many_frames_at_most(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "MOST_FRAMES", 3)
    found = roll(captioner, scenes(6), window=60, beam=1, max_length=3)
    assert moments(found)[-1] == [1.5, 2, 2.5]


def test_a_change_of_size_begins_anew(captioner: Captioner) -> None:
    small, large = scenes(3), scenes(2, (96, 80))
    found = roll(captioner, [*small, *large, small[0]])
    assert [len(segment.times) for segment in found] == [1, 2, 3, 1, 2, 1]
    assert (found[4].caption.fit.width, found[4].caption.fit.height) == (96, 80)
    assert found[3].caption.text == captioner.caption(large[0]).text


def test_mistakes_with_live_captions(captioner: Captioner) -> None:
    both = captioner_of(cell="lstm", width=8, bidirectional=True)
    message = "reads frames in both directions, which takes the whole clip"
    for make in (lambda: Rolling(both), lambda: both.caption_live("no such device")):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "'tiny'" in str(error.value)
        assert "\n" not in str(error.value)
    for options, expected in (
        ({"window": 0}, "window must be more than 0 seconds, found 0"),
        ({"window": float("nan")}, "window must be more"),
        ({"beams": 1}, "unknown option 'beams'"),
        ({"every": -1}, "every must be 0 or more"),
        ({"stall_seconds": 0}, "stall_seconds must be above 0"),
    ):
        with pytest.raises(ValueError, match=expected):
            captioner.caption_live("no such device", **options)

    rolling = Rolling(captioner)
    shown = scenes(3)
    rolling.add(1.0, shown[0])
    for moment in (1.0, 0.5):
        with pytest.raises(ValueError, match=rf"a frame at {moment:g} s came after one at 1 s"):
            rolling.add(moment, shown[1])
    with pytest.raises(ImageError):
        rolling.add(1.5, b"no picture")
    assert moments([rolling.add(2.0, shown[2])]) == [[1, 2]]  # mistakes leave no trace


def test_a_recording_is_captioned_live_to_its_end(tmp_path: Path, captioner: Captioner) -> None:
    clip = write(tmp_path / "a.mp4", [picture for picture in scenes(4) for _ in range(3)])  # 1.2 seconds
    found = list(captioner.caption_live(str(clip), every=0.3, window=0.5, beam=1))
    assert len(found) >= 2
    assert spans(found)[0] == (0, 0)
    assert found[-1].end >= 0.8
    assert all(before.end < after.end for before, after in itertools.pairwise(found))
    assert all(segment.end - segment.start <= 0.5 + 1e-6 for segment in found)
    with pytest.raises(VideoError, match="no such file"):
        next(captioner.caption_live(str(tmp_path / "missing.mp4")))


def test_a_camera_that_stalls(captioner: Captioner, camera: Callable[..., Camera]) -> None:  # noqa: F811
    found: list[Segment] = []
    address = camera(40, pause=0.02, stall=True).address
    with pytest.raises(VideoError, match=r"stalled: no frame for 0\.5 s") as error:
        found.extend(captioner.caption_live(address, every=0.1, stall_seconds=0.5, beam=1))
    assert found
    assert "secret" not in str(error.value)


def test_a_camera_that_is_given_up(captioner: Captioner, camera: Callable[..., Camera]) -> None:  # noqa: F811
    others = set(threading.enumerate())
    running = captioner.caption_live(camera(250, pause=0.02).address, every=0, beam=1)
    next(running)
    running.close()
    for _ in range(100):
        if not any(thread.name == "captioner-live" for thread in set(threading.enumerate()) - others):
            return
        time.sleep(0.05)
    raise AssertionError("the thread goes on")
