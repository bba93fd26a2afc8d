"""The folder tab in a real browser: needs Chromium (Debian's package chromium) and playwright."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from captioner_demo import mount
from captioner_demo.engine import Engine
from fastapi import FastAPI
from gradio import media

CHOOSE = "#folder-intake [data-choose={}]"
DONE = "#folder-table tr.cap-done"
OPENED = "#folder-view .cap-word"
STOP = "#folder-table [data-do=stop]"
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


def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """Open the tab, and see at the end that nothing was asked of another host and no script failed."""
    options = {"viewport": {"width": 1280, "height": 900}, **options}
    context = browser.new_context(accept_downloads=True, **options)
    page = context.new_page()
    page.set_default_timeout(60000)
    foreign, errors = [], []
    own = re.match(r"\w+://[^/]+/", url + "/")
    assert own
    page.on("request", lambda r: r.url.startswith((own[0], "data:", "blob:")) or foreign.append(r.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#photo-examples button")
    # Gradio puts tabs that do not fit a phone behind a menu
    name = page.locator("button[role=tab]:visible", has_text="Folder")
    if not name.count():
        page.click(".overflow-menu > button")
        name = page.locator(".overflow-dropdown button", has_text="Folder")
    name.first.click()
    page.wait_for_selector("#folder-intake .cap-drop")
    page.wait_for_timeout(200)
    yield page
    assert foreign == []
    assert errors == []
    context.close()


@pytest.fixture(scope="module")
def tab(browser: Any, url: str) -> Iterator[Any]:
    yield from opened(browser, url)


@pytest.fixture
def page(tab: Any) -> Any:
    """The tab, opened once, with the list and not a photo."""
    if tab.locator(OPENED).count():
        back(tab)
    return tab


@pytest.fixture
def filled(page: Any, folder: Path) -> Any:
    """The tab with the folder's captions."""
    if page.locator("#folder-table tbody tr").count() != 8:
        give(page, "folder", folder)
    return page


def give(page: Any, kind: str, what: Any, wait: bool = True) -> None:
    page.set_input_files(CHOOSE.format(kind), what)
    page.wait_for_selector(STOP)
    if wait:
        page.wait_for_selector(STOP, state="hidden", timeout=60000)


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
    assert line.locator("button").inner_text() == sentence
    assert "your words" in line.inner_text()
    assert sentence in saved(page, "jsonl", tmp_path).read_text()
    line.click()
    page.click("#folder-view [data-do=own]")
    page.wait_for_selector("#folder-view .cap-given", state="detached")
    back(page)
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


def many(folder: Path, least: int = 1) -> list[Path]:
    """Return 120 photos of which no two are alike, so that each is looked at."""
    photo = Path(media.get_image("cheetah1.jpg")).read_bytes()
    paths = [folder / f"{index}.jpg" for index in range(120)]
    for index, path in enumerate(paths):
        path.write_bytes(photo + bytes(index + least))
    return paths


def test_stop_keeps_what_is_there(page: Any, engine: Engine, tmp_path: Path) -> None:
    paths = many(tmp_path)
    encoded = engine.encoded
    give(page, "files", paths, wait=False)
    page.wait_for_selector(DONE)
    page.locator(DONE).first.click()  # what is there can be looked at while the rest is under way
    page.wait_for_selector(OPENED)
    back(page)
    page.click(STOP)
    page.wait_for_selector(STOP, state="hidden")
    assert page.inner_text("#folder-table .cap-count").startswith("Stopped: ")
    done, left = page.locator(DONE).count(), page.locator("#folder-table tr.cap-left").count()
    assert done + left == 120
    assert 1 <= done < 120
    page.wait_for_timeout(300)
    assert engine.encoded - encoded < 120
    lines = saved(page, "jsonl", tmp_path).read_text().splitlines()
    assert len(lines) == done
    assert page.locator("#folder-intake .cap-drop").is_visible()  # and the next may come


def test_a_page_that_is_closed_leaves_no_work_behind(
    browser: Any, url: str, engine: Engine, tmp_path: Path
) -> None:
    paths = many(tmp_path, 1000)
    for page in opened(browser, url):
        before = engine.encoded
        give(page, "files", paths, wait=False)
        page.wait_for_selector(DONE)
    for _ in range(100):
        seen = engine.encoded
        time.sleep(0.5)
        if engine.encoded == seen:
            break
    assert seen - before < 110


def test_behind_a_proxy_that_strips_a_root_path(
    browser: Any, start: Callable[[Any], str], engine: Engine, photo: str
) -> None:
    inner = mount(FastAPI(), captioner=engine, root_path="/tools/captioner")

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix("/tools/captioner") or "/"
            assert path != scope["path"]
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await inner(scope, receive, send)

    for page in opened(browser, start(proxy) + "/tools/captioner/"):
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
    page.evaluate(DROP, wrap)
    page.wait_for_function(
        "name => document.querySelector('#folder-table tr.cap-done small')?.textContent === name",
        arg=names[0],
    )
    page.wait_for_selector(STOP, state="hidden")
    found = page.locator(f"{DONE} small:first-of-type").all_inner_texts()
    if wrap:  # two were dropped
        names = [*names, "trip/in/2.jpg", "trip/in/2.jpg"]
    assert found == names


def test_examples(page: Any) -> None:
    page.click(CHOOSE.format("examples"))
    page.wait_for_function("document.querySelectorAll('#folder-table tr.cap-done').length === 6")
    page.wait_for_selector(STOP, state="hidden")
    assert "groot.jpeg" in lines(page)


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
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    ).Axe()
    for page in opened(browser, url, color_scheme=scheme, viewport={"width": width, "height": 844}):

        def check(where: str, page: Any = page) -> None:
            response = axe.run(page).response
            found = response["violations"]
            assert len(found) + len(response["passes"]) > 15  # it has looked
            serious = [
                (v["id"], [n["html"][:200] + " " + str(n.get("failureSummary"))[:300] for n in v["nodes"]])
                for v in found
                if v["impact"] in ("serious", "critical")
            ]
            assert serious == [], where
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out

        check("empty")
        give(page, "folder", folder)
        check("filled")
        page.locator(DONE).nth(0).click()
        page.wait_for_selector(OPENED)
        page.click(f"{OPENED}[data-word='1']")
        check("opened")
