"""The app: tabs put together, mounted in FastAPI, or served on its own."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
# else, after each event, gradio makes a table of all that there were, for a page that is not served
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(10**9))

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from captioner import Captioner
from captioner.identity import BUILT_IN
from captioner_demo import about, folder, live, photo, video
from captioner_demo.common import Demo
from captioner_demo.engine import Engine
from captioner_demo.guard import Guard
from captioner_demo.limits import LimitError, Limits
from captioner_demo.look import HEADER, look

TABS: tuple[Any, ...] = (photo, video, folder, live, about)
"""The modules of the tabs, left to right; each has ``LABEL`` and ``tab(demo)``."""

WAITING = 200
"""Requests that may wait in the queue; further ones are told that the server is busy."""

SESSIONS = 500
"""Sessions that are kept: Gradio holds about 0.25 MB for each tab of a browser."""


def build(
    captioner: Captioner | Engine | None = None,
    limits: Limits | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    choose_models: bool = False,
    tabs: Sequence[Any] | None = None,
    waiting: int = WAITING,
    sessions: int = SESSIONS,
    workers: int = 8,
    cache_seconds: tuple[int, int] = (300, 1800),
) -> gr.Blocks:
    """Return the page as Gradio Blocks; `mount` and `serve` also give it its look and its guard.

    Args:
        captioner: the model, or an engine that is shared; None for the built-in model.
        limits: what one request may cost.
        path: of the model's file, for the about tab.
        choose_models: whether people may load other checkpoints of this machine by their path.
        tabs: modules of tabs; by default `TABS`.
        workers: requests that are worked on at a time.
        waiting: requests that may wait; further ones are refused as "queue is full".
        sessions: tabs of browsers whose state is kept; the one that was used longest ago goes first.
        cache_seconds: how often uploads are looked through, and after how long they are deleted.
    """
    if captioner is None:
        captioner, path = Captioner.load(), BUILT_IN
    engine = captioner if isinstance(captioner, Engine) else Engine(captioner)
    demo = Demo(
        engine, Path(path) if path is not None else None, limits or Limits(), choose_models, workers=workers
    )
    tabs = TABS if tabs is None else tabs
    with gr.Blocks(title="captioner", analytics_enabled=False, delete_cache=cache_seconds) as blocks:
        demo.model = gr.State("")
        gr.HTML(HEADER, apply_default_css=False, js_on_load=None)
        with gr.Tabs():
            for module in tabs:
                with gr.Tab(module.LABEL, id=module.LABEL.lower()):
                    module.tab(demo)
    blocks.state_session_capacity = sessions
    blocks.queue(max_size=waiting, default_concurrency_limit=demo.workers)
    blocks._queue.event_analytics = _Newest(1000 + 4 * waiting)
    blocks._queue.event_ids_to_events = _Newest(1000 + 4 * waiting)
    _steady(blocks)
    return blocks


class _Newest(dict[str, Any]):
    """What Gradio notes of each event: of the newest alone, many more than can wait or be worked on.

    It would note 10,000, and all in its first versions.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > self.most:
            del self[next(iter(self))]


class _Files(set[str]):
    """Names of temporary files, which one thread may add to while another goes through them.

    Gradio removes old files in a thread of its own, which an upload at that moment would end for good.
    """

    def __iter__(self) -> Iterator[str]:
        return iter([*set.__iter__(self)])


def _steady(blocks: gr.Blocks) -> None:
    steady = {id(files): _Files(files) for files in blocks.temp_file_sets}
    blocks.temp_file_sets = [steady[id(files)] for files in blocks.temp_file_sets]
    blocks.upload_file_set = steady.get(id(blocks.upload_file_set), blocks.upload_file_set)
    for block in blocks.blocks.values():
        files = getattr(block, "temp_files", None)
        if id(files) in steady:
            block.temp_files = steady[id(files)]


def forget(blocks: gr.Blocks, session: str) -> None:
    """Free what Gradio keeps of a call of the API that has had its answer; it would keep it like a tab."""
    queue = blocks._queue
    if queue.pending_event_ids_session.get(session):
        return  # it has asked for more
    queue.pending_event_ids_session.pop(session, None)
    queue.pending_messages_per_session.pop(session, None)
    with blocks.state_holder.lock:
        blocks.state_holder.session_data.pop(session, None)
        blocks.state_holder.time_last_used.pop(session, None)


def mount(
    app: FastAPI,
    path: str = "/",
    *,
    blocks: gr.Blocks | None = None,
    captioner: Captioner | Engine | None = None,
    limits: Limits | None = None,
    root_path: str | None = None,
    **options: Any,
) -> FastAPI:
    """Mount the page in a FastAPI app, with its look and its guard; return the app.

    Args:
        app: yours.
        path: where in it the page is.
        blocks: what `build` returned; built here if None.
        captioner, limits, options: of `build`.
        root_path: of the whole app behind a proxy that strips it: ``/tools/captioner``.
    """
    limits = limits or Limits()
    if blocks is None:
        blocks = build(captioner, limits, **options)
    blocks.has_launched = True  # else Gradio does not check the paths of files
    with contextlib.redirect_stdout(None):  # 6.0 prints a line
        return gr.mount_gradio_app(
            app,
            blocks,
            path=path,
            root_path=root_path,
            max_file_size=limits.bytes,
            show_error=True,
            ssr_mode=False,
            app_kwargs={
                "middleware": [Middleware(Guard, max_bytes=limits.bytes, answered=partial(forget, blocks))]
            },
            **look(),
        )


def serve(
    model: str | os.PathLike[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str = "auto",
    limits: Limits | None = None,
    browser: bool = True,
    root_path: str = "",
    ssl_certfile: str | os.PathLike[str] | None = None,
    ssl_keyfile: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: a checkpoint; None for the built-in model.
        host: address to listen on; 0.0.0.0 for all.
        port: None for the first free one from 7860.
        device: where the model runs.
        limits: what one request may cost.
        browser: open the page in a browser.
        root_path: where a proxy shows the page.
        ssl_certfile, ssl_keyfile: to serve over TLS, without which browsers lend no camera to
            another machine.
        say: is told the address.

    Raises:
        LimitError: the port is taken, a certificate is missing.
        CheckpointError: the model cannot be used.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # pages that are open hold a stream; that it is cut is no error to report
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise LimitError("TLS needs both --ssl-certfile and --ssl-keyfile")
    for file in (ssl_certfile, ssl_keyfile):
        if file is not None and not Path(file).is_file():
            raise LimitError(f"{file}: there is no such file")
    if root_path and not root_path.startswith("/"):
        raise LimitError(f"a root path begins with a slash, as in /captioner, not {root_path!r}")
    listening = listen(host, port)
    main = threading.current_thread() is threading.main_thread()
    if main:
        # uvicorn passes the signal on when it has ended; the folder must go then, too
        terminate = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = tempfile.mkdtemp(prefix="captioner-demo-")
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        captioner = Captioner.load(model, device=device)
        local = host in ("127.0.0.1", "localhost", "::1")
        blocks = build(captioner, limits, path=model or BUILT_IN, choose_models=local)
        app = mount(FastAPI(openapi_url=None), blocks=blocks, limits=limits, root_path=root_path or None)
        config = uvicorn.Config(
            app,
            log_level="warning",
            ssl_certfile=ssl_certfile,
            ssl_keyfile=None if ssl_keyfile is None else os.fspath(ssl_keyfile),
            timeout_graceful_shutdown=2,
        )
        server = Server(config)
        shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
        shown = f"[{shown}]" if ":" in shown else shown
        scheme = "https" if ssl_certfile else "http"
        address = f"{scheme}://{shown}:{listening.getsockname()[1]}/"
        say(f"captioner demo: {address} (Ctrl+C ends it)")
        if browser:
            threading.Thread(target=_open, args=(server, address), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    finally:
        if main:
            signal.signal(signal.SIGTERM, terminate)
        listening.close()
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            os.environ.pop("GRADIO_TEMP_DIR", None)
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


def _open(server: Any, address: str) -> None:
    """Open a browser when the server answers."""
    import time

    for _ in range(600):
        if server.started:
            webbrowser.open(address)
            return
        time.sleep(0.1)


def listen(host: str, port: int | None) -> socket.socket:
    """Return a listening socket.

    Raises:
        LimitError: the port is taken, or the address is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tried = [port] if port is not None else range(7860, 7960)
    problem: OSError | None = None
    for number in tried:
        found = socket.socket(family, socket.SOCK_STREAM)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((host, number))
        except (OSError, OverflowError) as error:
            found.close()
            if not isinstance(error, OSError):
                raise LimitError(f"{number} is not a port") from None
            problem = error
            continue
        found.listen(128)
        return found
    reason = problem.strerror if problem is not None else ""
    where = f"port {port}" if port is not None else "every port from 7860 to 7959"
    raise LimitError(f"cannot listen on {host}, {where}: {reason}; choose another with --port or --host")
