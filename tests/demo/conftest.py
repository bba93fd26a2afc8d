from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason='the demo needs gradio: pip install "captioner[demo]"')

import uvicorn
from captioner_demo import Limits, mount
from captioner_demo.engine import Engine
from conftest import chromium
from fastapi import FastAPI
from gradio import media

from captioner import Captioner

LIMITS = Limits(megapixels=20, mb=4, seconds=60)


@pytest.fixture(scope="session")
def captioner() -> Captioner:
    return Captioner.load(device="cpu")


@pytest.fixture(scope="session")
def engine(captioner: Captioner) -> Iterator[Engine]:
    engine = Engine(captioner)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def limits() -> Limits:
    return LIMITS


@pytest.fixture(scope="session")
def photo() -> str:
    return media.get_image("cheetah1.jpg")


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Any], str]]:
    """Serve an ASGI app in a thread; return its address. Uploads go to a folder of the tests."""
    folder = tmp_path_factory.mktemp("uploads")
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def run(app: Any) -> str:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        for _ in range(2400):
            if server.started:
                return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            time.sleep(0.05)
        raise RuntimeError("the server did not start")

    yield run
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(5)
    if before is None:
        os.environ.pop("GRADIO_TEMP_DIR")
    else:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="session")
def uploads(start: Any) -> Path:
    return Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture(scope="session")
def url(start: Callable[[Any], str], engine: Engine) -> str:
    """The demo as it is served, at a port of its own."""
    return start(mount(FastAPI(), captioner=engine, limits=LIMITS, choose_models=True))


@pytest.fixture(scope="session")
def launch(browser: Any) -> Callable[..., Any]:
    """Start a further browser with arguments of one's own; whoever does closes it."""

    def another(*args: str) -> Any:
        return browser.browser_type.launch(executable_path=chromium(), args=["--no-sandbox", *args])

    return another
