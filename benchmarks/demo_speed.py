"""The demo in a browser: from click to caption against the model alone, and from a word to its attention.

A server in this process, Chromium on its page (Debian's package chromium, playwright). In each round, in
turn: `Captioner.caption` called directly on a photo; a click on the same photo among the examples, until its
caption is on the screen; and the same for an upload. Nothing is remembered from one to the next. Bars: the
click takes at the median at most 150 ms more than the call; selecting a word shows its attention within
100 ms at the median. The browser itself measures from the click to the frame after it has drawn.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common

_SEEN = """(ready) => new Promise((done) => {
const view = document.querySelector("#photo-view");
new MutationObserver((_, watcher) => {
  if (!view.querySelector(".cap-word")) return;
  watcher.disconnect();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - window.begun), 0));
}).observe(view, {childList: true, subtree: true, attributes: true});
%s
})"""

_CLICK = (
    _SEEN
    % """window.begun = performance.now();
document.querySelector("#photo-examples [data-pick='1']").click();"""
)

_UPLOAD = (
    _SEEN
    % """const bytes = Uint8Array.from(atob(ready), (letter) => letter.charCodeAt(0));
const carrier = new DataTransfer(), input = document.querySelector("#photo-upload input[type=file]");
carrier.items.add(new File([bytes], "lion.jpg", {type: "image/jpeg"}));
input.files = carrier.files;
window.begun = performance.now();
input.dispatchEvent(new Event("change", {bubbles: true}));"""
)

_WORDS = """async (count) => {
const words = Array.from(document.querySelectorAll("#photo-view .cap-word")), times = [];
for (let i = 0; i < count; i++) {
  const begun = performance.now();
  words[i % words.length].click();
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  times.push(performance.now() - begun);
}
return times; }"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return 0 if the bars hold."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=common.positive, default=15)
    parser.add_argument("--words", type=common.positive, default=60, help="selections of words")
    parser.add_argument("--threads", type=common.positive, default=2, help="of the model")
    options = parser.parse_args(arguments)
    common.print_machine(options.threads)
    with tempfile.TemporaryDirectory(prefix="captioner-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        alone, click, upload, words = measure(options)
    for name, seconds in (
        ("the model alone", alone),
        ("click to caption", click),
        ("upload to caption", upload),
    ):
        print(
            f"{name}: median {1000 * statistics.median(seconds):.0f} ms, "
            f"{1000 * min(seconds):.0f} to {1000 * max(seconds):.0f}"
        )
    more = 1000 * (statistics.median(click) - statistics.median(alone))
    holds = common.verdict("click to caption more than the model alone, ms", more, at_most=150)
    slowest = sorted(words)[int(0.95 * (len(words) - 1))]
    print(f"a word: 95 % within {slowest:.0f} ms")
    return 0 if common.verdict("a word, median, ms", statistics.median(words), at_most=100) and holds else 1


def measure(options: Any) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return the seconds of the model alone, from a click and from an upload, and a word's milliseconds."""
    import torch
    import uvicorn
    from captioner_demo import mount
    from captioner_demo.engine import Engine
    from captioner_demo.photo import examples
    from fastapi import FastAPI

    from captioner import Captioner

    torch.set_num_threads(options.threads)
    engine = Engine(Captioner.load(options.model, device="cpu"), cache_bytes=1)  # keeps only the newest look
    app = mount(FastAPI(), captioner=engine)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    path = examples()[1]
    photo = base64.b64encode(Path(path).read_bytes()).decode()
    other = Path(examples()[0]).read_bytes()
    alone: list[float] = []
    click: list[float] = []
    upload: list[float] = []

    def forget() -> None:
        engine.look(other)

    def call() -> None:
        begun = time.perf_counter()
        engine.captioner.caption(path)
        alone.append(time.perf_counter() - begun)

    def in_page(page: Any, script: str, seconds: list[float]) -> None:
        forget()
        if page.locator("#photo-view [data-do=another]").count():
            page.click("#photo-view [data-do=another]")
            page.wait_for_selector("#photo-view .cap-word", state="detached")
        page.wait_for_selector("#photo-upload input[type=file]", state="attached")
        page.wait_for_timeout(200)
        seconds.append(page.evaluate(script, photo) / 1000)

    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)
        page.wait_for_selector("#photo-examples button")
        for number in range(options.rounds + 1):
            call()
            in_page(page, _CLICK, click)
            in_page(page, _UPLOAD, upload)
            if number == 0:  # does not count
                for seconds in (alone, click, upload):
                    seconds.clear()
        words = page.evaluate(_WORDS, options.words)
    server.should_exit = True
    thread.join(5)
    engine.close()
    return alone, click, upload, words


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium without a window; it ends with the context."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise common.wrong_use("playwright is needed: pip install playwright") from None
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("CHROMIUM") or next((p for name in names if (p := shutil.which(name))), None)
    if path is None:
        raise common.wrong_use("no Chromium found: apt install chromium, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    sys.exit(main())
