"""The Gradio demo of captioner: see what it sees, argue with it.

``captioner demo`` serves it; in Python::

    from captioner_demo import build, look, mount, serve

    build(captioner).launch(**look())       # Gradio's own server
    mount(FastAPI(), "/captioner")          # inside an app of yours, with the guard
    serve(port=7860)                        # what the command line does

How it is made
--------------
- ``engine.py``: one thread runs the network; photos of several people go in one batch; features are kept.
- ``limits.py``: what one request may cost, and the checks of what comes from outside.
- ``guard.py``: middleware before Gradio: paths, URLs, sizes, headers, no foreign hosts.
- ``page.py`` and ``static/``: HTML from plain data (escaped there), styles and scripts.
- ``look.py``: the theme, and what goes into the page's head. ``common.py``: what the tabs share.
  ``app.py``: `build`, `mount`, `serve`.
- one module a tab: ``photo.py``, ``video.py``, ``folder.py``, ``live.py``, ``about.py``; a tab's own styles
  and scripts are the files of ``static/`` that are called like it.

How a tab is added
------------------
A tab is a module with ``LABEL`` (its name on the page), ``tab(demo)``, and plain functions that do the work::

    LABEL = "Video"

    def caption_clip(engine: Engine, limits: Limits, path: str, …) -> tuple[Session, str]:
        ...                                     # tested without a browser; raises ValueErrors of one line

    def tab(demo: Demo) -> None:                # called inside the tab's ``with gr.Tab``
        ...                                     # components
        def uploaded(path: str, model: str) -> …:
            with demo.mistakes():               # a ValueError becomes one line on the page
                return caption_clip(demo.engine(model), demo.limits, path)
        button.click(uploaded, [upload, demo.model], [session, view],
                     api_visibility="private", **demo.model_queue)

Then it is added to ``TABS`` in ``app.py``. What to keep to:

- Handlers get `Demo.model` (a `gr.State`) as an input and ask `Demo.engine` for the engine of that model.
  ``engine.captioner`` is a `captioner.Captioner`, safe to call from threads; photos go through
  ``engine.caption_photo``, which batches and remembers.
- Events that run the model take ``**demo.model_queue``, so that all of them share the same places; the
  page's own events are ``api_visibility="private"``. Named endpoints are made with `common.endpoint` inside
  ``gr.Column(visible=False)``.
- What people see of a caption is HTML of `page` in a ``gr.HTML(value, js_on_load=on_load("explorer"),
  apply_default_css=False)`` (`common.on_load`). All words' attention goes with it. ``window.captioner`` in
  ``static/page.js`` has ``heat(canvas, weights, data, smooth)`` (one frame's H × W weights;
  `page.caption_data` makes ``data``), ``fit`` (a canvas' size), ``describe`` (a word's card), ``picker``
  (buttons with ``data-pick``) and ``download``.
- Gradio may replace the elements of a ``gr.HTML`` or only change their attributes when its value changes.
  So scripts listen on the component's ``element`` and find what they need anew; see ``renewed`` in
  ``page.js``.
- What is touched comes back as the component's ``submit`` event: ``event._data`` is the object that was
  given to ``trigger("submit", …)``. Anybody can send it: check it.
- Every text from outside goes through ``html.escape(page.clean(text))`` in Python and ``textContent`` in
  scripts.
- Small files for people go to the browser as ``{"name", "type", "base64"}`` (`photo.download`). Larger ones
  are written below ``gradio.utils.get_upload_folder()``: `delete_cache` and the server's end remove them.
- CSS classes begin with ``cap-`` and use the ``--cap-`` colours, which have a light and a dark value; rules
  go inside the nested block of ``page.css``, or Gradio's own win.
"""

from __future__ import annotations

from captioner_demo.app import build, mount, serve
from captioner_demo.limits import LimitError, Limits
from captioner_demo.look import look

__all__ = ["LimitError", "Limits", "build", "look", "mount", "serve"]
