"""Clips that tests need, made of photos that come with Gradio."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from gradio import media
from PIL import Image

SCENES = ("cheetah1.jpg", "bus.png")


def write_clip(path: Path, *, seconds: float = 3.0, rate: int = 10, codec: str = "libx264") -> Path:
    """Write a clip of two scenes, each of so many seconds, slowly moving; 160 × 120 pixels."""
    with av.open(
        str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}
    ) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.codec_context.gop_size = 5
        stream.codec_context.thread_count = 1
        for name in SCENES:
            photo = Image.open(media.get_image(name)).convert("RGB").resize((200, 150))
            for i in range(round(seconds * rate)):
                picture = np.ascontiguousarray(np.asarray(photo.crop((i % 40, 10, i % 40 + 160, 130))))
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """Write a file of a second of silence, without pictures."""
    with av.open(str(path), "w") as output:
        voice = output.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        silence.sample_rate = 16000
        output.mux(voice.encode(silence))
        output.mux(voice.encode())
    return path
