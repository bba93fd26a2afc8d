"""What the tabs share: the engines, the limits, the chosen model, and how a mistake is told."""

from __future__ import annotations

import html
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from captioner import Captioner
from captioner_demo.engine import Engine
from captioner_demo.limits import LimitError, Limits

MODELS = 2
"""Loaded models that are kept beside the first."""


def photo_upload(**options: Any) -> gr.Image:
    """Return an upload of one picture that reaches Python as the path of the very file that was uploaded.

    `gr.Image` would open pictures with every decoder that Pillow has, and may store them anew; captioner
    reads them itself. (It is no subclass because Gradio writes a ``.pyi`` beside every subclass.)
    """
    upload = gr.Image(type="filepath", image_mode=None, **options)

    def path(payload: Any) -> Any:
        return None if payload is None else payload.path

    upload.preprocess = path  # type: ignore[method-assign]
    return upload


@dataclass(eq=False)
class Demo:
    """What a tab gets.

    Attributes:
        first: the engine of the model that the server was started with.
        path: of that model's file, if it is known.
        limits: what one request may cost.
        choose_models: whether people may load other checkpoints by their path.
        workers: requests that are worked on at a time; further ones wait in the queue.
        model: a `gr.State` with the chosen model ("" for the first); pass it to handlers that need an engine.
    """

    first: Engine
    path: Path | None = None
    limits: Limits = field(default_factory=Limits)
    choose_models: bool = False
    workers: int = 8
    model: Any = None
    _others: OrderedDict[str, Engine] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def engine(self, model: str = "") -> Engine:
        """Return the engine of a model: "" for the first, else the path of a checkpoint.

        Raises:
            LimitError: other models are not allowed here.
            CheckpointError: the file cannot be used.
        """
        if not model:
            return self.first
        if not self.choose_models:
            raise LimitError("other models can be chosen only on the machine that runs this page")
        with self._lock:
            engine = self._others.get(model)
            if engine is None:
                loaded = Captioner.load(Path(model), device=str(self.first.captioner.device))
                engine = self._others[model] = Engine(loaded)
            self._others.move_to_end(model)
            while len(self._others) > MODELS:
                self._others.popitem(last=False)[1].close()
            return engine

    @property
    def model_queue(self) -> dict[str, Any]:
        """Arguments for an event that uses the model: all of them share `workers` places."""
        return {"concurrency_limit": self.workers, "concurrency_id": "model"}

    @contextmanager
    def mistakes(self, *, plain: bool = False) -> Iterator[None]:
        """Tell the errors that people cause in one line, without a traceback.

        Args:
            plain: for the API, whose clients show text; the page shows HTML, so there it is escaped.
        """
        try:
            yield
        except ValueError as error:  # all of the project's own errors are ValueErrors
            line = " ".join(str(error).split())
            raise gr.Error(
                line if plain else html.escape(line), title="That did not work", print_exception=False
            ) from None


def endpoint(demo: Demo, function: Callable[..., Any], inputs: Sequence[Any], description: str) -> None:
    """Offer a function as a named endpoint that answers JSON; call it inside a hidden column.

    Args:
        demo: the demo.
        function: its name becomes the endpoint's.
        inputs: components, whose labels the API page shows.
        description: for the API page.
    """
    gr.Button(visible=False).click(
        function,
        list(inputs),
        gr.JSON(label="record"),
        api_name=function.__name__,
        api_description=description,
        **demo.model_queue,
    )


def on_load(what: str) -> str:
    """Return the script that a component runs when it is loaded; 'submit' is the event it triggers.

    When the script has begun, the component's element has ``data-ready``.
    """
    return (
        "(function go() { if (!window.captioner) { setTimeout(go, 20); return; } "
        f"window.captioner.{what}(element, trigger); element.dataset.ready = '{what}'; }}()); // 'submit'"
    )
