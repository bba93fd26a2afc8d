"""The live tab in a real browser whose camera shows a known film: needs Chromium and playwright."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captioner_demo import live, mount, photo
from captioner_demo.engine import Engine
from captioner_demo.live import Cameras
from fastapi import FastAPI
from gradio import media
from PIL import Image

from captioner.clips import Rolling
from captioner.overlay import colour, heat_map, scale
from demo.pages import accessible, opened, settled

LEND = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
FOREIGN = "--host-resolver-rules=MAP demo.example 127.0.0.1"
"""This machine under a name that browsers do not trust as they trust localhost."""
SIZE = (640, 480)
LIVE = ".cap-live"
START = ".cap-live [data-do=start]"
WORD = ".cap-live .cap-word"


def picture(name: str) -> Image.Image:
    return Image.open(media.get_image(name)).convert("RGB").resize(SIZE)


def film(path: Path, names: list[str], frames: int = 1) -> Path:
    """Write what Chromium plays, over and over, as the camera: JPEGs one after another."""
    with open(path, "wb") as file:
        for name in names:
            buffer = io.BytesIO()
            picture(name).save(buffer, "JPEG", quality=90)
            file.write(buffer.getvalue() * frames)
    return path


class Server:
    """The page with its cameras, and what it was sent."""

    def __init__(self, start: Callable[[Any], str], engine: Engine) -> None:
        made: list[Cameras] = []
        self.sent: list[tuple[float, float, bytes]] = []
        """When each picture was begun and done, and the picture."""
        self.at_once, self.most_at_once, self.pause = 0, 0, 0.0
        self.forgets = 0
        lock = threading.Lock()
        server = self

        class Watched(Cameras):
            def forget(self, key: str) -> None:
                server.forgets += 1
                super().forget(key)

            def look(self, key: str, engine: Engine, picture: bytes) -> Any:
                with lock:
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                begun = time.perf_counter()
                time.sleep(server.pause)
                try:
                    return super().look(key, engine, picture)
                finally:
                    with lock:
                        server.at_once -= 1
                        server.sent.append((begun, time.perf_counter(), picture))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(live, "AGAIN", 2.0)
            patch.setattr(live, "Cameras", lambda: made.append(Watched()) or made[-1])
            self.url = start(mount(FastAPI(), captioner=engine, tabs=(photo, live)))
        self.cameras = made[0]


@pytest.fixture(scope="module")
def server(start: Callable[[Any], str], engine: Engine) -> Server:
    return Server(start, engine)


@pytest.fixture(scope="module")
def cheetah(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser whose camera shows a cheetah."""
    path = film(tmp_path_factory.mktemp("film") / "cheetah.mjpeg", ["cheetah1.jpg"])
    browser = launch(*LEND, f"--use-file-for-fake-video-capture={path}")
    yield browser
    browser.close()


def said(page: Any) -> str:
    return " ".join(page.inner_text(f"{LIVE} .cap-sentence").split())


def count(page: Any) -> int:
    return int(page.get_attribute(LIVE, "data-count") or 0)


def wait_for_captions(page: Any, more: int) -> None:
    goal = count(page) + more
    page.wait_for_function(f"Number(document.querySelector('{LIVE}').dataset.count || 0) >= {goal}")


def forgotten(server: Server, page: Any) -> None:
    """Wait until the server has forgotten every camera.

    It was told to; a picture that was under way then brings one back for `live.IDLE` seconds.
    """
    for _ in range(600):
        if server.forgets and not len(server.cameras):
            return
        page.wait_for_timeout(100)
    raise AssertionError("the camera was not forgotten")


def trouble(page: Any) -> str:
    page.wait_for_selector(f"{LIVE} .cap-trouble:visible")
    assert page.get_attribute(LIVE, "data-state") == "off"
    return str(page.inner_text(f"{LIVE} .cap-trouble"))


def test_the_camera_is_captioned(cheetah: Any, server: Server, engine: Engine) -> None:
    with opened(cheetah, server.url, "Live") as page:
        server.sent.clear()
        page.click(START)
        page.wait_for_selector(WORD)
        _, _, data = server.sent[0]
        with Image.open(io.BytesIO(data)) as frame:
            assert frame.size == (384, 288)
            shown = np.asarray(frame.resize((64, 48)), float)
        real = np.asarray(picture("cheetah1.jpg").resize((64, 48)), float)
        assert np.abs(shown - real).mean() < np.abs(shown[:, ::-1] - real).mean() / 2  # sent unmirrored
        wait_for_captions(page, 2)
        assert said(page) == engine.captioner.caption(data).text
        assert page.get_attribute(f"{LIVE} video", "aria-label").endswith(said(page))
        assert "captions a second" in page.inner_text(f"{LIVE} .cap-rate")
        marked = set()
        for _ in range(600):  # one word after the other is marked
            marked.add(page.get_attribute(LIVE, "data-shown"))
            if len(marked - {""}) > 2:
                break
            page.wait_for_timeout(100)
        assert len(marked - {""}) > 2
        server.forgets = 0
        page.click(START)
        page.wait_for_selector(f"{LIVE}[data-state=off]")
        assert page.evaluate("document.querySelector('.cap-live video').srcObject") is None
        assert page.locator(WORD).count() == 0
        forgotten(server, page)
        number = len(server.sent)
        page.wait_for_timeout(500)
        assert len(server.sent) == number
        page.click(START)  # and can be started anew
        page.wait_for_selector(WORD)


def test_the_heat_is_where_the_attention_is_and_mirrored_with_the_preview(
    cheetah: Any, server: Server, engine: Engine
) -> None:
    with opened(cheetah, server.url, "Live") as page:
        server.sent.clear()
        page.click(START)
        page.wait_for_selector(WORD)
        assert page.get_attribute(f"{LIVE} [data-do=mirror]", "aria-pressed") == "true"
        page.click(f"{WORD} >> nth=1")
        wait_for_captions(page, 1)
        settled(page)
        caption = engine.captioner.caption(server.sent[0][2])
        width, height, pixels = page.evaluate(
            """() => { const c = document.querySelector(".cap-live canvas"), found = [];
            const w = c.width, h = c.height, p = c.getContext("2d").getImageData(0, 0, w, h).data;
            for (let y = 0; y < h; y += 9) for (let x = 0; x < w; x += 9)
            found.push(...p.slice(4 * (y * w + x), 4 * (y * w + x) + 4)); return [w, h, found]; }"""
        )
        assert width / height == pytest.approx(4 / 3, rel=0.01)
        attention = caption.words[1].attention
        assert attention is not None
        # the film stands still, so that each frame has the same attention
        heat = heat_map(attention[0], caption.grid, caption.fit, (width, height), top=scale(caption))[
            ::9, ::9
        ]
        drawn = np.array(pixels).reshape(*heat.shape, 4)
        visible = heat > 0.05
        assert visible.mean() > 0.1
        assert np.abs(drawn - colour(heat).astype(int))[visible].mean() < 6
        places = [page.locator(f"{LIVE} {name}").bounding_box() for name in ("video", "canvas", ".cap-view")]
        assert places[0] == pytest.approx(places[1], abs=1)
        assert places[0] == pytest.approx(places[2], abs=1)

        def seen(name: str) -> np.ndarray:
            """The screen with one of the two alone, the word's heat on black or the preview, 64 × 48."""
            other = {"video": "canvas", "canvas": "video"}[name]
            page.add_style_tag(content=f"{LIVE} {other} {{ visibility: hidden !important }}")
            settled(page)
            taken = Image.open(io.BytesIO(page.locator(f"{LIVE} .cap-view").screenshot())).convert("RGB")
            page.evaluate("document.head.lastElementChild.remove()")
            return np.asarray(taken.resize((64, 48)), float).mean(-1)

        expected = np.asarray(Image.fromarray(drawn[..., 3].astype(np.uint8)).resize((64, 48)), float)
        real = np.asarray(picture("cheetah1.jpg").resize((64, 48)), float).mean(-1)
        for truth, name in ((expected, "canvas"), (real, "video")):
            assert alike(seen(name), truth[:, ::-1]) > 0.9, name
            assert alike(seen(name), truth) < alike(seen(name), truth[:, ::-1]) - 0.03, name
        page.click(f"{LIVE} [data-do=mirror]")
        for truth, name in ((expected, "canvas"), (real, "video")):
            assert alike(seen(name), truth) > 0.9, name
            assert alike(seen(name), truth[:, ::-1]) < alike(seen(name), truth) - 0.03, name
        page.click(f"{LIVE} [data-do=heat]")
        assert seen("canvas")[6:-6, 6:-6].std() < 1  # without the round corners


def alike(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def test_a_word_that_was_touched_is_kept(cheetah: Any, server: Server) -> None:
    with opened(cheetah, server.url, "Live") as page:
        page.click(START)
        page.wait_for_selector(WORD)
        page.focus(f"{WORD} >> nth=1")
        page.keyboard.press("Enter")
        word = page.inner_text(f"{WORD} >> nth=1")
        wait_for_captions(page, 2)
        page.wait_for_timeout(600)  # longer than each word is marked
        assert page.get_attribute(LIVE, "data-shown") == "1"
        assert page.inner_text(f"{LIVE} .cap-cardtop strong") == word
        assert page.locator(f"{LIVE} .cap-alternative").count() > 2
        assert page.evaluate("document.activeElement.dataset.word") == "1"  # the focus stays
        page.keyboard.press("Enter")
        assert page.locator(f"{LIVE} .cap-cardtop").count() == 0
        page.wait_for_function(f"document.querySelector('{LIVE}').dataset.shown !== '1'")


def test_frames_are_dropped_and_captions_never_lag(cheetah: Any, server: Server) -> None:
    """A slow server is sent fewer pictures, one at a time, each of them as old as the first was."""
    with opened(cheetah, server.url, "Live") as page:
        server.pause = 0.6
        try:
            page.click(START)
            page.wait_for_selector(WORD)
            server.sent.clear()
            server.most_at_once = 0
            delays = []
            for _ in range(6):
                wait_for_captions(page, 1)
                delays.append(int(page.get_attribute(LIVE, "data-delay")))
        finally:
            server.pause = 0.0
        assert server.most_at_once == 1
        assert len(server.sent) <= 8  # of the hundred frames that the camera gave
        for (_, done, _), (begun, _, _) in zip(server.sent, server.sent[1:], strict=False):
            assert begun >= done
        assert delays[-1] < 2.5 * delays[0] + 300, delays


def test_a_server_that_takes_long_is_asked_once(cheetah: Any, server: Server) -> None:
    with opened(cheetah, server.url, "Live") as page:
        server.sent.clear()
        server.pause, server.most_at_once = 5.0, 0
        try:
            page.click(START)
            page.wait_for_selector(f"{LIVE} .cap-trouble:has-text('trying again')")
            page.wait_for_selector(WORD)  # the answer that was late is shown
            assert (len(server.sent), server.most_at_once) == (1, 1)
        finally:
            server.pause = 0.0
        wait_for_captions(page, 1)
        assert page.locator(f"{LIVE} .cap-trouble:visible").count() == 0


def test_another_scene_is_another_caption(launch: Callable[..., Any], server: Server, tmp_path: Path) -> None:
    path = film(tmp_path / "two.mjpeg", ["cheetah1.jpg", "tower.jpg"], 150)
    browser = launch(*LEND, f"--use-file-for-fake-video-capture={path}")
    try:
        with opened(browser, server.url, "Live") as page:
            page.click(START)
            page.wait_for_selector(WORD)
            first = said(page)
            page.wait_for_function(
                f"""(first) => {{ const s = document.querySelector('{LIVE} .cap-sentence').innerText;
                return s.trim() && s.split(/\\s+/).join(" ").trim() !== first; }}""",
                arg=first,
            )
    finally:
        browser.close()


def test_the_camera_is_given_back_when_the_tab_or_the_page_is_left(cheetah: Any, server: Server) -> None:
    with opened(cheetah, server.url, "Live") as page:
        server.forgets = 0
        page.click(START)
        page.wait_for_selector(WORD)
        page.click("button[role=tab]:has-text('Photo')")
        page.wait_for_function("document.querySelector('.cap-live')?.dataset.state !== 'on'")
        forgotten(server, page)
        page.click("button[role=tab]:has-text('Live')")
        page.click(START)
        page.wait_for_selector(WORD)
        assert len(server.cameras) >= 1
        server.forgets = 0
        page.goto("about:blank")
        forgotten(server, page)


def test_a_busy_server_is_told_and_asked_again(cheetah: Any, server: Server) -> None:
    with opened(cheetah, server.url, "Live") as page:
        refused: list[str] = []

        def refuse(route: Any) -> None:
            if "picture" not in (route.request.post_data or "") or len(refused) > 0:
                route.continue_()
                return
            refused.append(route.request.url)
            route.fulfill(status=503, json={"detail": "Queue is full. Please try again."})

        page.route("**/queue/join*", refuse)
        page.click(START)
        page.wait_for_selector(f"{LIVE} .cap-trouble:has-text('The server is busy')")
        page.wait_for_selector(WORD)
        assert len(refused) == 1
        assert page.locator(f"{LIVE} .cap-trouble:visible").count() == 0


def test_no_camera_is_told(launch: Callable[..., Any], server: Server) -> None:
    browser = launch()
    try:
        with opened(browser, server.url, "Live", permissions=["camera"]) as page:
            page.click(START)
            assert trouble(page).startswith("No camera was found.")
            assert page.inner_text(START) == "Start the camera"
    finally:
        browser.close()


def test_a_camera_that_is_not_lent_is_told(launch: Callable[..., Any], server: Server) -> None:
    browser = launch("--use-fake-device-for-media-stream", "--deny-permission-prompts")
    try:
        with opened(browser, server.url, "Live") as page:
            page.click(START)
            assert "does not lend this page the camera. Allow it" in trouble(page)
    finally:
        browser.close()


def test_plain_http_from_another_machine_is_told(launch: Callable[..., Any], server: Server) -> None:
    browser = launch(*LEND, FOREIGN)
    try:
        port = server.url.rpartition(":")[2]
        with opened(browser, f"http://demo.example:{port}", "Live") as page:
            page.click(START)
            line = trouble(page)
            assert f"open http://localhost:{port}/" in line
            assert "--ssl-certfile" in line
            assert "--ssl-keyfile" in line
            assert f"https://demo.example:{port}/" in line
    finally:
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_over_tls_another_machine_lends_its_camera(launch: Callable[..., Any], tmp_path: Path) -> None:
    browser = launch(*LEND, FOREIGN)
    try:
        with (
            served_over_tls(tmp_path) as port,
            opened(browser, f"https://demo.example:{port}", "Live", ignore_https_errors=True) as page,
        ):
            page.click(START)
            page.wait_for_selector(WORD)
    finally:
        browser.close()


@contextmanager
def served_over_tls(folder: Path) -> Iterator[str]:
    """Run ``captioner demo`` with a certificate of its own; give its port."""
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=demo.example "
        f"-keyout {folder}/key.pem -out {folder}/cert.pem",
        shell=True,
        check=True,
        capture_output=True,
    )
    command = ["demo", "--no-browser", "--port", "0", "--device", "cpu"]
    command += ["--ssl-certfile", f"{folder}/cert.pem", "--ssl-keyfile", f"{folder}/key.pem"]
    process = subprocess.Popen(
        [sys.executable, "-m", "captioner", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = None
        for line in process.stdout:
            found = re.search(r"https://127\.0\.0\.1:(\d+)/", line)
            if found:
                break
        assert found, "the server did not start"
        yield found[1]
    finally:
        process.terminate()
        process.wait(20)


def test_a_model_that_cannot_be_live_is_told_on_the_page(
    cheetah: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("the model reads frames in <b>both</b> directions")

    monkeypatch.setattr(Rolling, "__init__", refuse)
    with opened(cheetah, server.url, "Live") as page:
        page.click(START)
        assert trouble(page) == "The model reads frames in <b>both</b> directions."
        assert page.evaluate("document.querySelector('.cap-live video').srcObject") is None


@pytest.mark.parametrize(
    ("scheme", "width"), [("dark", 390), pytest.param("light", 1280, marks=pytest.mark.slow)]
)
def test_no_serious_violation_of_accessibility(cheetah: Any, server: Server, scheme: str, width: int) -> None:
    size = {"width": width, "height": 844}
    with opened(cheetah, server.url, "Live", color_scheme=scheme, viewport=size) as page:
        accessible(page, "off")
        page.click(START)
        page.wait_for_selector(WORD)
        page.click(f"{WORD} >> nth=1")
        accessible(page, "on")
