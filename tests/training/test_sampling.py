"""Frames of clips, evenly spread; data sets of clips."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from captioner_training import clips
from captioner_training.clips import FRAMES, take_frames, trained_frames
from captioner_training.config import SourceConfig
from captioner_training.data import DataError, load_data_set
from clip_data import draw_frames, write_clip, write_sound, write_truncated
from conftest import make_header, make_tiny_model
from PIL import Image
from shape_data import write_tar

from captioner import video
from captioner.video import VideoError


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Four seconds of ten frames each."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.avi", seconds=4)


def left_of(image: np.ndarray) -> int:
    """Return where the square begins."""
    return int(np.argmax((image[len(image) // 3].astype(int) < 150).any(-1)))


def times_of(path, count, *span):
    return [time for time, _ in take_frames(path, count, lambda image: None, *span)]


@pytest.mark.parametrize("count", [1, 4, 7, 16, 40])
def test_frames_are_evenly_spread(clip, count):
    taken = take_frames(clip, count, left_of)
    known = [left_of(picture) for picture in draw_frames("red", "right", 40)]
    assert len(taken) == count
    for k, (time, left) in enumerate(taken):
        first = int(np.ceil(k * 40 / count - 1e-6))  # the first frame at or after k * 4 s / count
        assert time == pytest.approx(first / 10, abs=2e-3)
        assert abs(left - known[first]) <= 1


def test_of_a_part_the_frames_are_its_own(clip):
    assert times_of(clip, 4, 1.0, 3.0) == pytest.approx([1, 1.5, 2, 2.5], abs=2e-3)
    assert times_of(clip, 2, 3.0) == pytest.approx([3, 3.5], abs=2e-3)
    assert times_of(clip, 2, 3.0, 60.0) == pytest.approx([3, 3.5], abs=2e-3)  # the file ends before
    with pytest.raises(VideoError, match=r"ends at 4\.00 s"):
        times_of(clip, 2, 7.0, 9.0)


def test_a_clip_of_fewer_frames_gives_all(tmp_path):
    short = write_clip(tmp_path / "short.avi", seconds=0.3)
    assert times_of(short, 16) == pytest.approx([0, 0.1, 0.2], abs=2e-3)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    assert times_of(tmp_path / "photo.png", 16) == [0]


def test_a_clip_is_decoded_once_and_no_frame_is_prepared_in_vain(clip, monkeypatch):
    calls, seen = [], []
    frames = clips.frames
    monkeypatch.setattr(clips, "frames", lambda *a, **k: calls.append(1) or frames(*a, **k))
    take_frames(clip, 5, seen.append)
    assert (len(calls), len(seen)) == (1, 5)


@pytest.mark.parametrize("promised", [None, 0.2, 1.0, 3.9, 4.2, 9.0, 400.0])
def test_a_header_is_not_believed(clip, monkeypatch, promised):
    probe = clips.probe
    monkeypatch.setattr(clips, "probe", lambda path: replace(probe(path), duration=promised))
    looked = []
    taken = take_frames(clip, 8, looked.append)
    times = [time for time, _ in taken]
    assert len(times) == 8
    assert times[0] == 0
    # within a frame or two of every half second
    assert max(abs(time - k / 2) for k, time in enumerate(times)) <= 0.21
    assert len(looked) <= 40


def test_an_animation_of_unknown_length_is_spread_by_its_own_durations(tmp_path):
    pictures = [Image.fromarray(p) for p in draw_frames("blue", "left", 12)]
    durations = [100] * 10 + [1000, 1000]  # 3 seconds, two of them the last two pictures
    pictures[0].save(
        tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    assert times_of(tmp_path / "a.gif", 6) == pytest.approx([0, 0.5, 1.0, 2.0])  # nothing begins in between
    assert len(times_of(tmp_path / "a.gif", 12)) == 12  # all there are
    assert len(times_of(tmp_path / "a.gif", 30)) == 12


def test_memory_does_not_grow_with_the_clip(tmp_path, monkeypatch):
    long = write_clip(tmp_path / "long.avi", seconds=30)
    probe, most, alive = clips.probe, [0], set()
    monkeypatch.setattr(clips, "probe", lambda path: replace(probe(path), duration=None))

    class View:
        def __init__(self, image):
            alive.add(id(self))
            most[0] = max(most[0], len(alive))

        def __del__(self):
            alive.discard(id(self))

    assert len(take_frames(long, 4, View)) == 4
    assert most[0] <= 18


@pytest.mark.parametrize(
    ("write", "name", "reason"),
    [
        (write_truncated, "a.avi", "the file is truncated"),
        (write_sound, "a.mp4", "there is sound, but no pictures in it"),
        (lambda path: path.write_text("hello"), "a.mp4", "this is text, not a video"),
        (lambda path: None, "a.mp4", "no such file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, write, name, reason, capfd):
    write(tmp_path / name)
    with pytest.raises(VideoError, match=rf"{name}: .*{reason}"):
        take_frames(tmp_path / name, 8, left_of)
    assert capfd.readouterr() == ("", "")  # nor do libraries say anything


def test_a_checkpoint_tells_how_many_frames_it_was_trained_with():
    header = make_header(make_tiny_model())
    assert trained_frames(header) == FRAMES == 16
    assert trained_frames(replace(header, summary={"frames": 8})) == 8
    for odd in ("8", 0, True, None):
        assert trained_frames(replace(header, summary={"frames": odd})) == 16


# Data sets


def write_set(folder: Path, images: list[dict], **info: object) -> None:
    annotations = [{"id": i["id"], "image_id": i["id"], "caption": "a clip"} for i in images]
    record = {"info": {"images": ["clips"], **info}, "images": images, "annotations": annotations}
    (folder / "clips.json").write_text(json.dumps(record))


def load(folder: Path, **changes: object):
    return load_data_set("clips", SourceConfig(annotations="clips.json", **changes), folder)


def test_a_data_set_of_clips_knows_their_parts(tmp_path):
    write_clip(tmp_path / "clips" / "a.mp4")
    write_clip(tmp_path / "clips" / "b.mp4")
    write_set(
        tmp_path,
        [
            {"id": 1, "file_name": "a.mp4", "start": 2, "end": 4.5},
            {"id": 2, "file_name": "a.mp4", "start": 3.0},
            {"id": 3, "file_name": "b.mp4", "start": 60, "end": 70, "cut": True},
            {"id": 4, "file_name": "a.mp4"},
            {"id": 5, "file_name": "a.mp4", "start": 2, "end": 5, "cut": False},
        ],
        media="video",
    )
    data = load(tmp_path)
    assert (data.is_video, data.thing) == (True, "clip")
    assert [(p.start, p.end) for p in data.pictures] == [(2, 4.5), (3, None), (0, None), (0, None), (2, 5)]
    assert [bool(p.part) for p in data.pictures] == [True, True, False, False, True]
    assert len({p.file + p.part for p in data.pictures}) == 5


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ({"start": -1}, "-1 to None"),
        ({"start": 3, "end": 3}, "3 to 3"),
        ({"start": "0:03"}, "'0:03' and None"),
        ({"end": float("nan")}, "None and nan"),
        ({"start": True}, "True and None"),
    ],
)
def test_impossible_times_are_named(tmp_path, times, found):
    (tmp_path / "clips").mkdir()
    write_set(tmp_path, [{"id": 7, "file_name": "a.mp4", **times}], media="video")
    with pytest.raises(DataError, match=rf"clips\.json: a\.mp4 \(id 7\): start and end .* not {found}$"):
        load(tmp_path)


def test_the_same_part_twice_is_an_error(tmp_path):
    (tmp_path / "clips").mkdir()
    same = [{"id": n, "file_name": "a.mp4", "start": 1, "end": 2} for n in (4, 9)]
    write_set(tmp_path, same, media="video")
    with pytest.raises(DataError, match=r"a\.mp4 stands there twice, with the ids 4 and 9"):
        load(tmp_path)


def test_the_suffixes_tell_clips_where_nothing_else_does(tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.AVI", "c.gif"):
        (tmp_path / "clips" / name).touch()
    named = [{"id": n, "file_name": name} for n, name in enumerate(("a.mp4", "b.AVI", "c.gif"))]
    write_set(tmp_path, named[:2])
    assert load(tmp_path).is_video
    write_set(tmp_path, named)  # a GIF may be a picture
    assert not load(tmp_path).is_video
    write_set(tmp_path, named[:2], media="image")
    assert not load(tmp_path).is_video
    write_set(tmp_path, named, media="video")
    assert load(tmp_path).is_video


def test_a_clip_in_a_tar_is_read_as_a_file(tmp_path):
    raw = write_clip(tmp_path / "a.avi").read_bytes()
    write_tar(tmp_path / "clips.tar", {"in/a.avi": raw})
    write_set(tmp_path, [{"id": 1, "file_name": "in/a.avi"}], media="video")
    store = load(tmp_path, images=["clips.tar"]).store
    with store.as_file("in/a.avi") as path:
        assert path.read_bytes() == raw
        assert video.probe(path).width == 96
    assert not path.exists()
