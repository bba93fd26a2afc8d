"""Clips of a second, in the formats of MSVD and MSR-VTT: a square that goes left or right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from captioner import video

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 220)}
WAYS = ("left", "right")
SHORT = 3
"""Frames of the second clip of a set."""
KINDS = [(colour, way) for colour in COLOURS for way in WAYS]


def write_clip(
    path: Path,
    colour: str = "red",
    way: str = "right",
    *,
    seconds: float = 1.0,
    rate: float = 10.0,
    size: tuple[int, int] = (96, 64),
    start: int = 0,
) -> Path:
    """Write an MP4 or AVI, by suffix, of a square that crosses the picture, lower by ``start``."""
    cv2 = video._opencv("tests")  # as captioner does: what is imported first decides what FFmpeg says

    path.parent.mkdir(parents=True, exist_ok=True)
    code = {".mp4": "mp4v", ".avi": "MJPG"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), rate, size)
    assert writer.isOpened()
    for picture in draw_frames(colour, way, round(seconds * rate), size, start):
        writer.write(picture[..., ::-1].copy())
    writer.release()
    return path


def draw_frames(
    colour: str, way: str, count: int, size: tuple[int, int] = (96, 64), start: int = 0
) -> list[np.ndarray]:
    """Return RGB pictures."""
    width, height = size
    side = height // 3
    pictures = []
    for number in range(count):
        picture = np.full((height, width, 3), 240, np.uint8)
        share = number / max(1, count - 1)
        left = round((width - side) * (share if way == "right" else 1 - share))
        top = side // 2 + start
        picture[top : top + side, left : left + side] = COLOURS[colour]
        pictures.append(picture)
    return pictures


def captions(colour: str, way: str) -> list[str]:
    return [f"a {colour} square goes to the {way}", f"a {colour} square moves {way}"]


def write_set(folder: Path, count: int = 6, seconds: float = 1.0) -> Path:
    """Write AVI clips, one of ``SHORT`` frames, and ``clips.json``."""
    images, annotations = [], []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        name = f"{number}-{'-'.join(kind)}.avi"
        write_clip(folder / "clips" / name, *kind, seconds=SHORT / 10 if number == 1 else seconds)
        images.append({"id": number, "file_name": name})
        annotations += [{"image_id": number, "caption": c} for c in captions(*kind)]
    record = {"info": {"media": "video", "images": ["clips"]}, "images": images, "annotations": annotations}
    (folder / "clips.json").write_text(json.dumps(record))
    return folder


def write_msvd(folder: Path, count: int = 6) -> Path:
    """Write ``clips/NAME_0_1.avi`` and ``AllVideoDescriptions.txt``; return that file."""
    lines = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        name = f"abcdefghi{number:02d}_0_1"
        write_clip(folder / "clips" / f"{name}.avi", *kind, start=number)
        lines += [f"{name} {caption}" for caption in captions(*kind)]
    path = folder / "AllVideoDescriptions.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_msrvtt(folder: Path, splits: str = "train train train train validate validate test") -> Path:
    """Write ``clips/video0.mp4`` and so on, and ``train_val_videodatainfo.json``; return that file."""
    data: dict[str, Any] = {"videos": [], "sentences": []}
    for number, split in enumerate(splits.split()):
        kind = KINDS[number % len(KINDS)]
        name = f"video{number}"
        write_clip(folder / "clips" / f"{name}.mp4", *kind, start=number)
        data["videos"].append({"video_id": name, "split": split, "start time": 20.0, "end time": 21.0})
        data["sentences"] += [{"video_id": name, "caption": caption} for caption in captions(*kind)]
    path = folder / "train_val_videodatainfo.json"
    path.write_text(json.dumps(data))
    return path


def write_sound(path: Path) -> Path:
    """Write an MP4 without pictures."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_truncated(path: Path) -> Path:
    """Write an AVI of two seconds that ends in the middle."""
    write_clip(path, seconds=2.0)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path
