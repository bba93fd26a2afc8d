"""The folder tab in a real browser: needs Chromium (Debian's package chromium) and playwright."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from captioner_demo import mount
from captioner_demo.engine import Engine
from captioner_demo.folder import EXAMPLES
from fastapi import FastAPI
from gradio import media

from demo.pages import accessible, opened, settled, until

CHOOSE = "#folder-intake [data-choose={}]"
DONE = "#folder-table tr.cap-done"
OPENED = "#folder-view .cap-word"
STOP = "#folder-table [data-do=stop]"
LIST = "#folder-table .cap-folder"
EVIL = "=1+1 <img src=x onerror=document.title='bad'>.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos in two folders, two of one name, and what is none."""
    root = tmp_path_factory.mktemp("data") / "trip"
    (root / "one").mkdir(parents=True)
    (root / "two").mkdir()
    for name in ("cheetah1.jpg", "lion.jpg"):
        shutil.copy(media.get_image(name), root / "one" / name)
    shutil.copy(media.get_image("tower.jpg"), root / "two" / "lion.jpg")
    shutil.copy(media.get_image("bus.png"), root / "two" / EVIL)
    (root / "one" / "broken.jpg").write_bytes(Path(media.get_image("lion.jpg")).read_bytes()[:3000])
    (root / "one" / "big.jpg").write_bytes(bytes(4_200_000))
    (root / "two" / "notes.txt").write_text("dear diary")
    shutil.copy(media.get_video("b.mp4"), root / "two" / "clip.mp4")
    (root / "two" / ".hidden").write_text("not even listed")
    return root


@pytest.fixture(scope="module")
def tab(browser: Any, url: str) -> Iterator[Any]:
    with opened(browser, url, "Folder") as page:
        yield page


@pytest.fixture
def page(tab: Any) -> Any:
    """The tab, opened once, with the list and not a photo."""
    if tab.locator(OPENED).count():
        back(tab)
    return tab


@pytest.fixture
def filled(page: Any, folder: Path) -> Any:
    """The tab with the folder's captions."""
    if "trip/one/cheetah1.jpg" not in lines(page):
        give(page, "folder", folder)
    return page


def give(page: Any, kind: str, what: Any, wait: bool = True) -> None:
    begin(page, lambda: page.set_input_files(CHOOSE.format(kind), what), wait)


def begin(page: Any, act: Callable[[], Any], wait: bool = True) -> None:
    """Do what begins a run; wait for its end, and not for what the run before has left on the page."""
    until(page, f"() => document.querySelector('{LIST}').dataset.state !== 'busy'")
    before = page.get_attribute(LIST, "data-run") or ""
    act()
    until(page, f"before => (document.querySelector('{LIST}').dataset.run || '') !== before", before)
    if wait:
        ended(page)


def ended(page: Any) -> str:
    """Wait until the run is over; return ``done`` or ``stopped``."""
    until(page, f"() => document.querySelector('{LIST}').dataset.state !== 'busy'")
    return str(page.get_attribute(LIST, "data-state"))


def back(page: Any) -> None:
    page.click("#folder-nav [data-step=back]")
    page.wait_for_selector(OPENED, state="detached")


def lines(page: Any) -> dict[str, str]:
    """Return what the table says of each file."""
    found = page.evaluate(
        """() => Array.from(document.querySelectorAll("#folder-table tbody tr"), (line) =>
        [line.querySelector("small").textContent, line.querySelector("th").firstChild.textContent])"""
    )
    return dict(found)


def saved(page: Any, kind: str, folder: Path) -> Path:
    with page.expect_download() as waited:
        page.click(f"#folder-{kind}")
    assert waited.value.suggested_filename == f"captions.{kind}"
    path = folder / waited.value.suggested_filename
    waited.value.save_as(path)
    return path


def test_the_table_fills_and_bad_files_stop_nothing(page: Any, engine: Engine, folder: Path) -> None:
    page.evaluate(
        """() => { window.counts = []; const body = document.querySelector("#folder-table");
        new MutationObserver(() => window.counts.push(body.querySelectorAll("tr.cap-waiting").length))
        .observe(body, {childList: true, subtree: true}); }"""
    )
    give(page, "folder", folder)
    said = lines(page)
    assert list(said) == [
        *("trip/one/big.jpg", "trip/one/broken.jpg", "trip/one/cheetah1.jpg", "trip/one/lion.jpg"),
        *(f"trip/two/{EVIL}", "trip/two/clip.mp4", "trip/two/lion.jpg", "trip/two/notes.txt"),
    ]
    for name in ("one/cheetah1.jpg", "one/lion.jpg", "two/lion.jpg", f"two/{EVIL}"):
        assert said[f"trip/{name}"] == engine.captioner.caption(str(folder / name)).text
    assert "4 MB" in said["trip/one/big.jpg"]
    assert "truncated" in said["trip/one/broken.jpg"]
    assert "video" in said["trip/two/clip.mp4"]
    assert "not a photo" in said["trip/two/notes.txt"]
    assert page.inner_text("#folder-table .cap-count") == "4 of 8 photos captioned, 4 could not be"
    counts = page.evaluate("window.counts")
    assert max(counts) == 8
    assert counts[-1] == 0
    assert page.title() != "bad"
    assert page.locator("#folder-table th img").count() == 0


def test_downloads_open(filled: Any, engine: Engine, folder: Path, tmp_path: Path) -> None:
    said = lines(filled)
    records = [json.loads(line) for line in saved(filled, "jsonl", tmp_path).read_text().splitlines()]
    assert [record["path"] for record in records] == list(said)
    good = [record["path"] for record in records if record["error"] is None]
    assert {record["path"]: record["caption"] for record in records if record["error"] is None} == {
        path: said[path] for path in good
    }
    assert records[0]["error"] == f"trip/one/big.jpg: {said['trip/one/big.jpg']}"
    with open(saved(filled, "csv", tmp_path), newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["path"] for line in table] == list(said)
    assert [line["caption"] for line in table] == [record["caption"] for record in records]
    with zipfile.ZipFile(saved(filled, "zip", tmp_path)) as archive:
        archive.extractall(tmp_path / "out")
    for path in good:
        text = tmp_path / "out" / re.sub(r'[<>:"|?*]', "_", path)
        assert text.with_suffix(".txt").read_text().strip() == said[path]
    assert len(list((tmp_path / "out").rglob("*.txt"))) == len(good)
    assert (tmp_path / "out/captions.jsonl").read_text() == (tmp_path / "captions.jsonl").read_text()


def test_a_row_shows_its_photo_with_words_and_attention(filled: Any, engine: Engine, folder: Path) -> None:
    page = filled
    page.locator(DONE).nth(0).click()
    page.wait_for_selector(OPENED)
    assert page.inner_text("#folder-view .cap-name") == "trip/one/cheetah1.jpg"
    assert not page.locator("#folder-table").is_visible()
    page.click(f"{OPENED}[data-word='1']")
    opacity = "getComputedStyle(document.querySelector('#folder-view canvas')).opacity"
    assert page.evaluate(opacity) == "1"
    page.click("#folder-nav [data-step=after]")
    page.wait_for_function(
        "document.querySelector('#folder-view .cap-name').innerText === 'trip/one/lion.jpg'"
    )
    assert page.inner_text("#folder-nav span") == "4 of 8"
    page.click("#folder-view .cap-tool[data-do=another]")
    page.wait_for_selector(OPENED, state="detached")
    assert page.locator("#folder-table").is_visible()


def test_other_words_are_kept_in_the_table_and_the_files(filled: Any, engine: Engine, tmp_path: Path) -> None:
    page = filled
    page.locator(DONE).nth(1).click()
    page.wait_for_selector(OPENED)
    page.click(f"{OPENED}[data-word='1']")
    page.fill("#folder-view .cap-own input", "robot")
    page.press("#folder-view .cap-own input", "Enter")
    page.wait_for_selector("#folder-view .cap-given")
    sentence = " ".join(page.inner_text("#folder-view .cap-sentence").split())
    assert sentence.split()[1] == "robot"
    back(page)
    line = page.locator(DONE).nth(1)
    page.wait_for_selector(f"{DONE}:has-text('your words')")
    assert line.locator("button").inner_text() == sentence
    assert sentence in saved(page, "jsonl", tmp_path).read_text()
    line.click()
    page.click("#folder-view [data-do=own]")
    page.wait_for_selector("#folder-view .cap-given", state="detached")
    back(page)
    page.wait_for_selector(f"{DONE}:has-text('your words')", state="detached")
    assert "robot" not in line.inner_text()


def test_by_keyboard(filled: Any) -> None:
    page = filled
    page.locator(f"{DONE} button").nth(0).focus()
    page.keyboard.press("ArrowDown")
    caption = page.evaluate("document.activeElement.textContent")
    assert caption == page.locator(f"{DONE} button").nth(1).inner_text()
    page.keyboard.press("Enter")
    page.wait_for_selector(OPENED)
    page.wait_for_function("document.activeElement.dataset.step === 'back'")
    for _ in range(2):  # to "Next"
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#folder-nav span').innerText === '5 of 8'")
    page.wait_for_function("document.activeElement.dataset.step === 'after'")
    page.focus("#folder-nav [data-step=back]")
    page.keyboard.press("Enter")
    page.wait_for_selector(OPENED, state="detached")
    page.wait_for_function("document.activeElement.closest('tr.cap-done')?.dataset.row === '4'")


def many(folder: Path) -> list[Path]:
    """Return 60 photos of which no two are alike, so that each is looked at."""
    photo = Path(media.get_image("cheetah1.jpg")).read_bytes()
    paths = [folder / f"{index}.jpg" for index in range(60)]
    for path in paths:
        path.write_bytes(photo + os.urandom(16))
    return paths


class Held:
    """An engine that captions a few photos, and the others only as they are let through."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, few: int = 6) -> None:
        self.begun = 0
        self.free = threading.Semaphore(few)
        real, lock = engine.caption_photo, threading.Lock()

        def held(data: bytes, **options: Any) -> Any:
            with lock:
                self.begun += 1
            assert self.free.acquire(timeout=60)
            return real(data, **options)

        monkeypatch.setattr(engine, "caption_photo", held)


def test_stop_keeps_what_is_there(
    page: Any, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(engine, monkeypatch)
    give(page, "files", many(tmp_path), wait=False)
    page.locator(DONE).first.click()  # what is there can be looked at while the rest is under way
    page.wait_for_selector(OPENED)
    back(page)
    page.click(STOP)
    settled(page)
    held.free.release(100)
    assert ended(page) == "stopped"
    assert page.inner_text("#folder-table .cap-count").startswith("Stopped: ")
    done, left = page.locator(DONE).count(), page.locator("#folder-table tr.cap-left").count()
    assert done + left == 60
    assert 1 <= done < 30
    lines = saved(page, "jsonl", tmp_path).read_text().splitlines()
    assert len(lines) == done
    assert held.begun < 30
    assert page.locator("#folder-intake .cap-drop").is_visible()  # and the next may come


def test_a_page_that_is_closed_leaves_no_work_behind(
    browser: Any, url: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(engine, monkeypatch)
    with opened(browser, url, "Folder") as page:
        give(page, "files", many(tmp_path), wait=False)
        page.wait_for_selector(DONE)
    begun = -1
    for _ in range(40):  # one photo every half second, until no other is begun for three seconds
        if begun == held.begun:
            break
        begun = held.begun
        for _ in range(6):
            held.free.release()
            time.sleep(0.5)
    assert held.begun < 60


def test_behind_a_proxy_that_strips_a_root_path(
    browser: Any, start: Callable[[Any], str], engine: Engine, photo: str
) -> None:
    inner = mount(FastAPI(), captioner=engine, root_path="/tools/captioner")

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith("/tools/captioner") or scope["path"] == "/favicon.ico"
            path = scope["path"].removeprefix("/tools/captioner") or "/"
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await inner(scope, receive, send)

    with opened(browser, start(proxy) + "/tools/captioner/", "Folder") as page:
        give(page, "files", photo)
        assert page.locator(DONE).count() == 1


DROP = """async (wrap) => {
  const bytes = await (await fetch(document.querySelector("#photo-examples img").src)).arrayBuffer();
  const carrier = new DataTransfer(), made = (name) => new File([bytes], name, {type: "image/jpeg"});
  for (const name of ["a.jpg", "b.jpg"]) carrier.items.add(made(name));
  const file = (path) => ({isFile: true, fullPath: path, file: (done) => done(made(path.split("/").pop()))});
  const folder = (inside) => ({isFile: false, createReader: () => {
    const parts = [[inside[0]], inside.slice(1), []]; // a reader gives a few at a time
    return {readEntries: (done) => done(parts.shift())}; }});
  const tree = folder([file("/trip/1.jpg"), folder([file("/trip/in/2.jpg")]), file("/trip/10.jpg")]);
  const own = DataTransferItem.prototype.webkitGetAsEntry;
  if (wrap) DataTransferItem.prototype.webkitGetAsEntry = () => tree;
  document.querySelector(".cap-drop").dispatchEvent(
    new DragEvent("drop", {dataTransfer: carrier, bubbles: true, cancelable: true}));
  DataTransferItem.prototype.webkitGetAsEntry = own; }"""
"""Browsers give folders only to people who drop them; so what they would give is made up."""


@pytest.mark.parametrize(
    ("wrap", "names"),
    [(False, ["a.jpg", "b.jpg"]), (True, ["trip/1.jpg", "trip/1.jpg", "trip/10.jpg", "trip/10.jpg"])],
)
def test_files_and_folders_are_dropped(page: Any, wrap: bool, names: list[str]) -> None:
    begin(page, lambda: page.evaluate(DROP, wrap))
    found = page.locator(f"{DONE} small:first-of-type").all_inner_texts()
    if wrap:  # two were dropped
        names = [*names, "trip/in/2.jpg", "trip/in/2.jpg"]
    assert found == names


def test_examples(page: Any) -> None:
    begin(page, lambda: page.click(CHOOSE.format("examples")))
    assert tuple(lines(page)) == EXAMPLES
    assert page.locator(DONE).count() == len(EXAMPLES)


def test_what_is_left_of_the_run_before_is_not_shown_again(page: Any, photo: str) -> None:
    """Gradio may draw the last feed once more when the next run has begun."""
    give(page, "files", photo)
    feed = page.inner_html("#folder-feed [data-item] >> xpath=..")
    begin(page, lambda: page.click(CHOOSE.format("examples")))
    page.evaluate(
        """html => { const part = document.querySelector("#folder-feed [data-item]").parentElement,
        own = part.innerHTML; part.innerHTML = html; window.restore = () => { part.innerHTML = own; }; }""",
        feed,
    )
    settled(page)
    assert tuple(lines(page)) == EXAMPLES
    page.evaluate("window.restore()")
    settled(page)
    assert tuple(lines(page)) == EXAMPLES
    give(page, "files", photo)  # and the next run is not held up
    assert list(lines(page)) == ["cheetah1.jpg"]


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("dark", 390),
        pytest.param("light", 1280, marks=pytest.mark.slow),
        pytest.param("light", 390, marks=pytest.mark.slow),
        pytest.param("dark", 1280, marks=pytest.mark.slow),
    ],
)
def test_no_serious_violation_of_accessibility(
    browser: Any, url: str, folder: Path, scheme: str, width: int
) -> None:
    with opened(
        browser, url, "Folder", color_scheme=scheme, viewport={"width": width, "height": 844}
    ) as page:
        accessible(page, "empty")
        give(page, "folder", folder)
        accessible(page, "filled")
        page.locator(DONE).nth(0).click()
        page.wait_for_selector(OPENED)
        page.click(f"{OPENED}[data-word='1']")
        accessible(page, "opened")
