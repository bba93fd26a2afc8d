"""TensorBoard logs: losses, gradient norms, learning rates, scores, and a few captioned pictures."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from captioner import overlay
from captioner.caption import Caption, Segment
from captioner.captioner import Captioner
from captioner.checkpoint import Header
from captioner.images import open_image
from captioner.model import CaptionModel
from captioner.search import SearchOptions
from captioner_training.clips import FRAMES, take_frames
from captioner_training.data import DataSet, Picture

FOLDER = "tensorboard"
"""Where the logs lie in a run's output folder."""

_WIDTH = 800


class Drawn(NamedTuple):
    """A validation picture as it is logged.

    name: of data set and picture, the same every time; text: the generated caption and people's, in
    Markdown; sheet: the picture with its attention, word by word.
    """

    name: str
    text: str
    sheet: Image.Image


class Tracker:
    """Writes what happens in training to ``OUTPUT/tensorboard``, or does nothing.

    Everything is logged by the number of steps done since training began, all stages counted.

    >>> with Tracker(output, first_step=0) as tracker:  # doctest: +SKIP
    ...     tracker.step(20, loss=3.1, gradient_norm=0.8, learning_rate=1e-3)
    ...     tracker.epoch(313, {"val": {"CIDEr": 0.57}})
    """

    def __init__(
        self, output: Path, *, enabled: bool = True, first: bool = True, first_step: int = 0
    ) -> None:
        """Open the log; it is made when something is logged.

        Args:
            output: folder of the run.
            enabled: as the config's ``tensorboard`` says.
            first: whether this is the first of the processes: the others log nothing.
            first_step: the number of steps done so far. A resumed run does some steps again; what an
                earlier one logged after this step disappears.
        """
        self._writer: Any = None
        if not (enabled and first):
            return
        if importlib.util.find_spec("tensorboard") is None:
            tqdm.write('no TensorBoard logs: pip install tensorboard, or set "tensorboard: false"')
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = output / FOLDER
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if any_logs(folder) else None)

    @property
    def active(self) -> bool:
        """Whether anything is written: drawing pictures pays only then."""
        return self._writer is not None

    def step(self, step: int, **values: float) -> None:
        """Log numbers after so many steps: ``loss=``, ``gradient_norm=``, ``learning_rate=``, …"""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, step)

    def epoch(self, step: int, scores: Mapping[str, Mapping[str, float]], **more: float) -> None:
        """Log the scores of each validation set, metric by metric, and numbers of the epoch."""
        if self._writer is not None:
            for data, metrics in scores.items():
                for metric, value in metrics.items():
                    self._writer.add_scalar(f"{metric}/{data}", value, step)
            for name, value in more.items():
                self._writer.add_scalar(f"epoch/{name}", value, step)
            self._writer.flush()

    def captions(self, step: int, drawn: Sequence[Drawn]) -> None:
        """Log pictures with captions and attention, what `draw` returned."""
        if self._writer is not None:
            for name, text, sheet in drawn:
                self._writer.file_writer.add_summary(_jpeg(name, sheet), step)
                self._writer.add_text(name, text, step)
            self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _jpeg(name: str, sheet: Image.Image) -> Any:
    """Return a summary with the picture: a PNG of photos, as ``add_image`` writes, is much larger."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    buffer = BytesIO()
    sheet.convert("RGB").save(buffer, "JPEG", quality=85)
    image = Summary.Image(
        height=sheet.height, width=sheet.width, colorspace=3, encoded_image_string=buffer.getvalue()
    )
    return Summary(value=[Summary.Value(tag=name, image=image)])


def any_logs(folder: Path) -> bool:
    """Return whether a run has logged there."""
    return any(folder.glob("events.out.tfevents.*"))


def draw(
    model: CaptionModel, data: DataSet, options: SearchOptions, count: int = 4, *, frames: int = FRAMES
) -> list[Drawn]:
    """Caption some pictures of a data set, the same ones every time, and draw where the model looked.

    The pictures are spread evenly over the set; of clips, at most so many ``frames`` are looked at. The model
    and training's random numbers stay as they are.
    """
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)
    header = Header(
        name=data.name,
        encoder=model.encoder.name,
        preprocess=model.encoder.preprocess,
        decoder=model.decoder.config,
        tokenizer=model.tokenizer.to_dict(),
        search=asdict(options),
    )
    captioner = Captioner(copy.deepcopy(model), header)  # which folds its encoder
    drawn = []
    for index in chosen:
        picture = data.pictures[index]
        with torch.random.fork_rng():
            caption, sheet = (_draw_clip if data.is_video else _draw_photo)(captioner, data, picture, frames)
        written = "\n".join(f"- {reference}" for reference in picture.captions)
        text = f"**{caption.text or '(no words)'}**\n\nPeople wrote:\n\n{written}"
        drawn.append(Drawn(f"{data.name}/{picture.id}", text, sheet))
    return drawn


def _draw_photo(
    captioner: Captioner, data: DataSet, picture: Picture, frames: int
) -> tuple[Caption, Image.Image]:
    photo = open_image(data.store.read(picture.file))
    caption = captioner.caption(photo)
    return caption, overlay.sheet(caption, photo, width=_WIDTH)


def _draw_clip(
    captioner: Captioner, data: DataSet, clip: Picture, frames: int
) -> tuple[Caption, Image.Image]:
    with data.store.as_file(clip.file) as path:
        taken = take_frames(path, frames, lambda image: image, clip.start, clip.end)
    times, seen = [time for time, _ in taken], [image for _, image in taken]
    caption = captioner.caption(captioner.encode_frames(seen, times))
    from captioner.video_overlay import frame_sheet

    return caption, frame_sheet(Segment(times[0], times[-1], caption), seen)
