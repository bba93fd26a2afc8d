from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from captioner_demo import folder as tab
from captioner_demo.engine import Engine
from captioner_demo.limits import LimitError, Limits
from gradio import media
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from captioner.batch import caption_files, to_record
from captioner.batch.tables import COLUMNS
from demo.photo_data import bomb

GREEDY = {"beam": 1}
TOKEN = "0123456789abcdef"
NAMES = ("cheetah1.jpg", "lion.jpg", "tower.jpg", "bus.png")


@pytest.fixture
def photos() -> list[tab.Given]:
    return [tab.Given(f"trip/{name}", media.get_image(name)) for name in NAMES]


@pytest.fixture
def mixed(photos: list[tab.Given], tmp_path: Path) -> list[tab.Given]:
    """Photos with whatever lies beside photos: nothing of that is one."""
    lion = Path(media.get_image("lion.jpg")).read_bytes()
    contents = {
        "notes.jpg": b"dear diary",
        "empty.png": b"",
        "cut.jpg": lion[: len(lion) // 3],
        "bomb.png": bomb(40000, 40000),
        "big.jpg": lion + bytes(5_000_000),
    }
    bad = []
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        bad.append(tab.Given(f"trip/{name}", str(tmp_path / name)))
    bad.append(tab.Given("trip/clip.mp4", media.get_video("b.mp4")))
    bad.append(tab.Given("trip/gone.jpg", str(tmp_path / "gone.jpg")))
    bad.append(tab.Given("trip/sent.jpg", None, "trip/sent.jpg: it could not be uploaded"))
    return [photos[0], *bad[:4], photos[1], *bad[4:], photos[2]]


def run_of(engine: Engine, limits: Limits, files: list[tab.Given]) -> tab.Run:
    run = tab.Run(TOKEN, tuple(given.name for given in files), "a model", GREEDY)
    for _ in tab.fill(engine, limits, run, files):
        pass
    return run


@pytest.fixture(scope="module")
def run(engine: Engine, limits: Limits) -> tab.Run:
    """A run whose names do their worst."""
    names = ["=1+1.jpg", "a/x.jpg", "b/x.jpg", "a/x.png", "-2 ü.jpg"]
    files = [tab.Given(name, media.get_image("lion.jpg")) for name in names]
    return run_of(engine, limits, [*files, tab.Given("@bad.jpg", None, "@bad.jpg: broken")])


def items(feed: str) -> list[dict[str, Any]]:
    from html import unescape

    return [json.loads(unescape(text)) for text in re.findall(r'data-item="([^"]*)"', feed)]


# --- captions -------------------------------------------------------------------------------------------


def test_the_captions_are_those_of_the_command_line(
    engine: Engine, limits: Limits, photos: list[tab.Given]
) -> None:
    rows = list(tab.caption_photos(engine, limits, photos, GREEDY))
    paths = [str(given.path) for given in photos]
    expected = [found.caption for found in caption_files(engine.captioner, paths, **GREEDY)]
    assert [row.name for row in rows] == [given.name for given in photos]
    assert [row.caption and row.caption.text for row in rows] == [found and found.text for found in expected]
    assert all(row.error is None and row.thumb[:2] == b"\xff\xd8" for row in rows)


def test_bad_files_are_listed_with_reasons_and_stop_nothing(
    engine: Engine, limits: Limits, mixed: list[tab.Given]
) -> None:
    rows = {row.name: row for row in tab.caption_photos(engine, limits, mixed, GREEDY)}
    assert list(rows) == [given.name for given in mixed]
    good = {name for name, row in rows.items() if row.caption is not None}
    assert good == {f"trip/{name}" for name in NAMES[:3]}
    for name, row in rows.items():
        if name not in good:
            assert row.error is not None
            assert row.error.startswith(f"{name}")
            assert "\n" not in row.error
            assert "given bytes" not in row.error
    for name, reason in {
        "notes.jpg": "not a picture",
        "empty.png": "empty",
        "cut.jpg": "truncated",
        "bomb.png": "megapixels",
        "big.jpg": "4 MB",
        "clip.mp4": "video",
        "gone.jpg": "cannot be read",
        "sent.jpg": "could not be uploaded",
    }.items():
        assert reason in str(rows[f"trip/{name}"].error)


def test_rows_come_while_others_wait(engine: Engine, limits: Limits) -> None:
    """The first row is there before the last file is even looked at."""
    asked = []

    def files() -> Iterator[tab.Given]:
        for index in range(40):
            asked.append(index)
            yield tab.Given(f"{index}.jpg", media.get_image("lion.jpg"))

    rows = tab.caption_photos(engine, limits, files(), GREEDY)
    assert next(rows).name == "0.jpg"
    assert len(asked) < 10
    assert sum(1 for _ in rows) == 39


def test_an_error_that_nobody_foresaw_is_a_row(
    limits: Limits, photos: list[tab.Given], captioner: Any
) -> None:
    class Failing(Engine):
        def caption_photo(self, data: bytes, **options: Any) -> Any:
            if data == Path(media.get_image("lion.jpg")).read_bytes():
                raise RuntimeError("out of memory")
            return super().caption_photo(data, **options)

    engine = Failing(captioner)
    rows = list(tab.caption_photos(engine, limits, photos, GREEDY))
    engine.close()
    assert [row.caption is not None for row in rows] == [True, False, True, True]
    assert rows[1].error == "trip/lion.jpg: it could not be captioned"


def test_impossible_options_are_refused_before_any_file_is_read(engine: Engine, limits: Limits) -> None:
    with pytest.raises(ValueError, match="beam"):
        tab.caption_photos(engine, limits, iter([1 / 1]), {"beam": 0})  # type: ignore[list-item]


def test_the_feed_grows_and_tells_all(engine: Engine, limits: Limits, mixed: list[tab.Given]) -> None:
    run = tab.Run(TOKEN, tuple(given.name for given in mixed), "a model", GREEDY)
    feeds = list(tab.fill(engine, limits, run, mixed))
    assert all(after.startswith(before) for before, after in itertools.pairwise(feeds))
    first, *rows, end = items(feeds[-1])
    assert first == {"run": TOKEN, "names": list(run.names)}
    assert end == {"end": "done"}
    assert [row["row"] for row in rows] == list(range(len(mixed)))
    assert rows[0]["caption"] == run.rows[0].caption.text  # type: ignore[union-attr]
    assert rows[0]["folder"] == "trip"
    assert rows[1]["reason"].startswith("this is not a picture")


def test_a_stopped_run_keeps_what_it_has(engine: Engine, limits: Limits) -> None:
    files = [tab.Given(f"{index}.jpg", media.get_image("lion.jpg")) for index in range(60)]
    run = tab.Run(TOKEN, tuple(given.name for given in files), "a model", GREEDY)
    feeds = []
    for feed in tab.fill(engine, limits, run, files):
        feeds.append(feed)
        if run.rows:
            run.stop.set()
    assert 1 <= len(run.rows) < 60
    assert items(feeds[-1])[-1] == {"end": "stopped"}
    assert len(tab.to_jsonl(run).splitlines()) == len(run.rows)


def test_who_goes_away_leaves_no_work_behind(captioner: Any, limits: Limits, tmp_path: Path) -> None:
    """When a page is closed, Gradio forgets the generator."""
    engine = Engine(captioner, cache_bytes=1)  # each photo is looked at
    files = [tab.Given(f"{index}.jpg", media.get_image(NAMES[index % 4])) for index in range(200)]
    rows = tab.caption_photos(engine, limits, files, GREEDY)
    next(rows)
    del rows
    time.sleep(0.2)
    engine.close()  # waits for what is under way
    assert engine.encoded < 30


def test_a_folder_holds_up_a_single_photo_by_no_more_than_a_batch(captioner: Any, limits: Limits) -> None:
    engine = Engine(captioner, cache_bytes=1)
    files = [tab.Given(f"{index}.jpg", media.get_image(NAMES[index % 4])) for index in range(40)]
    done = []
    thread = threading.Thread(target=lambda: done.extend(tab.caption_photos(engine, limits, files, GREEDY)))
    thread.start()
    while engine.encoded < 4:
        time.sleep(0.01)
    before = engine.encoded
    engine.caption_photo(Path(media.get_image("groot.jpeg")).read_bytes(), **GREEDY)
    assert engine.encoded - before <= 4 * tab.TOGETHER
    thread.join()
    engine.close()
    assert len(done) == 40


# --- what comes from outside ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trip/lion.jpg", "trip/lion.jpg"),
        ("trip\\lion.jpg", "trip/lion.jpg"),
        ("../../etc/passwd", "etc/passwd"),
        ("/etc/passwd", "etc/passwd"),
        ("..", "photo"),
        ("", "photo"),
        (None, "photo"),
        (["x"], "photo"),
        ("a\nb\x00c\u202ed.jpg", "a_b_c_d.jpg"),
        ("./a//b/./c.jpg", "a/b/c.jpg"),
        ("\ud800.jpg", "_.jpg"),
        ("größe 😀.jpg", "größe 😀.jpg"),
    ],
)
def test_names_are_cleaned(name: Any, expected: str) -> None:
    assert tab.given_name(name) == expected


def test_only_uploads_are_read(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    photo = uploads / "lion.jpg"
    shutil.copy(media.get_image("lion.jpg"), photo)
    (tmp_path / "secret.jpg").write_bytes(photo.read_bytes())
    (uploads / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    paths = [photo, tmp_path / "secret.jpg", f"{uploads}/../secret.jpg", uploads / "link.jpg"]
    paths += ["/etc/passwd", "http://localhost/x.jpg", "file:///etc/passwd", "a\0b", uploads / "gone.jpg"]
    sent = [{"name": f"{index}.jpg", "path": str(path)} for index, path in enumerate(paths)]
    sent += [{"name": "9.jpg", "path": {"path": "/etc/passwd"}}, {"name": "10.jpg", "path": ["x"]}]
    files = tab.given_files(sent, Limits(), uploads)
    assert files[0] == tab.Given("0.jpg", str(photo))
    for given in files[1:]:
        assert given.path is None
        assert given.error is not None
        assert "upload" in given.error
        assert "/etc" not in given.error
        assert str(tmp_path) not in given.error


def test_too_many_files_and_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(bytes(600))
    item = {"name": "x.jpg", "path": str(tmp_path / "x.jpg")}
    with pytest.raises(LimitError, match="at most 3 photos"):
        tab.given_files([item] * 4, Limits(files=3), tmp_path)
    files = tab.given_files([item] * 40, Limits(mb=0.001), tmp_path)
    assert [given.error is None for given in files] == [True] * 33 + [False] * 7  # 20 kB in all
    assert "0.02 MB" in str(files[-1].error)
    for nothing in (None, [], "x", {"path": "x"}, ["x"], [1]):
        with pytest.raises(LimitError):
            tab.given_files(nothing, Limits(), tmp_path)


@pytest.mark.parametrize(
    ("why", "said"), [("video", "video"), ("big", "50 MB"), ("total", "1000 MB"), ("<b>", "uploaded")]
)
def test_what_the_page_did_not_upload_has_a_reason(why: str, said: str, tmp_path: Path) -> None:
    (given,) = tab.given_files([{"name": "x", "why": why}], Limits(), tmp_path)
    assert said in str(given.error)
    assert "<b>" not in str(given.error)


def test_a_run_is_stopped_even_before_it_begins() -> None:
    stops = tab.Stops(kept=2)
    stops.event(TOKEN).set()
    assert stops.event(TOKEN).is_set()
    assert not stops.event(TOKEN + "0").is_set()
    stops.event(TOKEN + "1")
    assert len(stops._events) == 2  # what nobody asks for is forgotten
    for bad in (None, "", "x", ["x"], "<script>0000000000", "0" * 1000):
        with pytest.raises(LimitError):
            stops.event(bad)


# --- files to take along --------------------------------------------------------------------------------


def unpacked(run: tab.Run, kind: str) -> bytes:
    file = tab.download(run, kind)
    assert file["name"] == f"captions.{kind}"
    return base64.b64decode(file["base64"])


def test_jsonl_holds_the_records(run: tab.Run) -> None:
    found = [json.loads(line) for line in unpacked(run, "jsonl").decode().splitlines()]
    expected = [json.loads(json.dumps(to_record(row.result, "a model"))) for row in run.rows]
    assert found == expected
    assert found[0]["seconds"] > 0
    assert found[0]["path"] == "=1+1.jpg"
    assert found[-1]["error"] == "@bad.jpg: broken"
    assert found[-1]["caption"] == ""


def test_csv_has_the_columns_of_the_command_line_and_no_formulas(run: tab.Run) -> None:
    data = unpacked(run, "csv")
    assert data.startswith(b"\xef\xbb\xbf")  # there is an ü in it
    header, *rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    assert tuple(header) == COLUMNS
    assert len(rows) == len(run.rows)
    for cell in (cell for row in rows for cell in row):
        # a negative number is one
        assert not cell.startswith(("=", "+", "@", "\t")), cell
        assert not cell.startswith("-") or float(cell) < 0
    first, last = dict(zip(header, rows[0], strict=True)), dict(zip(header, rows[-1], strict=True))
    assert first["path"] == "'=1+1.jpg"
    assert dict(zip(header, rows[4], strict=True))["path"] == "'-2 ü.jpg"
    assert last["error"] == "'@bad.jpg: broken"
    caption = run.rows[0].caption
    assert caption is not None
    assert first["caption"] == caption.text
    assert float(first["score"]) == pytest.approx(caption.score, rel=1e-5)
    assert [word["word"] for word in json.loads(first["words"])] == [word.text for word in caption.words]


def test_csv_of_plain_names_is_ascii(engine: Engine, limits: Limits, photos: list[tab.Given]) -> None:
    assert tab.to_csv(run_of(engine, limits, photos[:1])).startswith(b"path,caption,")


def test_zip_has_a_text_for_each_photo(run: tab.Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(unpacked(run, "zip"))) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"=1+1.txt", "a/x.txt", "a/x-2.txt", "b/x.txt", "-2 ü.txt", "captions.jsonl"}
    caption = run.rows[1].caption
    assert caption is not None
    assert (tmp_path / "a/x.txt").read_text() == f"{caption.text}\n"
    assert (tmp_path / "captions.jsonl").read_bytes() == tab.to_jsonl(run)


def test_members_are_valid_everywhere_and_no_two_alike() -> None:
    names = ["../../x.jpg", "X.JPG", "x", "/etc/passwd", "C:\\a\\con.jpg", "nul", "q?.jpg", "a. /b .jpg"]
    names += ["y.jpg", "y.txt/z.jpg", ".jpg", "y.jpg", "y-2.jpg"]
    found = tab.members(names)
    assert found == [
        *("x.txt", "X-2.txt", "x-3.txt", "etc/passwd.txt", "C_/a/_con.txt", "_nul.txt", "q_.txt"),
        *("a_/b .txt", "y-2.txt", "y.txt/z.txt", ".jpg.txt", "y-3.txt", "y-2-2.txt"),
    ]
    assert len({name.casefold() for name in found}) == len(found)
    for name in found:
        assert not Path(name).is_absolute()
        assert ".." not in Path(name).parts
        assert not re.search(r'[<>:"|?*\\\x00-\x1f]', name)


def test_an_unknown_download_is_refused(run: tab.Run) -> None:
    for kind in ("exe", "../x", ""):
        with pytest.raises(LimitError):
            tab.download(run, kind)
    with pytest.raises(LimitError, match="first"):
        tab.download(tab.Run(TOKEN, (), "m"), "csv")


# --- one photo of many ----------------------------------------------------------------------------------


def test_a_row_is_opened_and_its_words_are_changed(
    engine: Engine, limits: Limits, photos: list[tab.Given]
) -> None:
    run = run_of(engine, limits, [photos[0], tab.Given("bad.jpg", None, "bad.jpg: broken"), photos[1]])
    opened, text = tab.open_row(engine, limits, run, 2)
    assert 'class="cap-explorer"' in text
    assert "All photos" in text
    assert "Another photo" not in text
    own = run.rows[2].caption
    assert own is not None
    action = {"action": "choose", "word": 1, "text": "robot"}
    changed, text, feed = tab.act(engine, limits, run, opened, action)
    assert changed is not None
    caption = run.rows[2].caption
    assert caption is not None
    assert caption.text.split()[1] == "robot"
    assert items(feed)[-1]["caption"] == caption.text
    assert items(feed)[-1]["yours"] is True
    assert caption.text in tab.to_jsonl(run).decode()  # it counts in what is taken along
    again, text = tab.open_row(engine, limits, run, 2)
    assert "Its own words again" in text
    back, _, feed = tab.act(engine, limits, run, again, {"action": "own"})
    assert run.rows[2].caption is own
    assert items(feed)[-1]["yours"] is False
    assert back is not None
    box = {"action": "region", "left": 5, "top": 5, "right": 90, "bottom": 90}
    _, text, feed = tab.act(engine, limits, run, back, box)
    assert "the boxed part" in text
    assert (feed, run.rows[2].caption) == ("", own)  # a part's caption is none of the photo
    assert tab.act(engine, limits, run, back, {"action": "another"}) == (None, "", "")
    with pytest.raises(LimitError, match="broken"):
        tab.open_row(engine, limits, run, 1)
    for bad in (3, -1, "0", None, True):
        with pytest.raises(LimitError):
            tab.open_row(engine, limits, run, bad)


def test_steps_skip_what_has_no_caption(engine: Engine, limits: Limits, photos: list[tab.Given]) -> None:
    run = run_of(engine, limits, [photos[0], tab.Given("bad.jpg", None, "bad.jpg: broken"), photos[1]])
    first, last = tab.steps(run, 0), tab.steps(run, 2)
    assert 'data-step="before" disabled' in first
    assert 'data-step="after" data-pick="2"' in first
    assert 'data-step="before" data-pick="0"' in last
    assert "3 of 3" in last


def test_a_forgotten_photo_is_looked_at_again(captioner: Any, limits: Limits, tmp_path: Path) -> None:
    path = tmp_path / "lion.jpg"
    shutil.copy(media.get_image("lion.jpg"), path)
    engine = Engine(captioner)
    run = run_of(engine, limits, [tab.Given("lion.jpg", str(path))])
    engine._cache.clear()
    tab.open_row(engine, limits, run, 0)
    engine._cache.clear()
    path.unlink()
    with pytest.raises(LimitError, match="no longer kept"):
        tab.open_row(engine, limits, run, 0)
    engine.close()


# --- the API --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("client")))


def test_caption_folder(client: Client, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/lion.jpg").write_text("dear diary")
    paths = [media.get_image("cheetah1.jpg"), str(tmp_path / "one/lion.jpg"), media.get_image("lion.jpg")]
    records = client.predict([handle_file(path) for path in paths], beam=1, api_name="/caption_folder")
    assert [record["name"] for record in records] == ["cheetah1.jpg", "lion.jpg", "lion.jpg"]
    assert records[0]["caption"] == engine.captioner.caption(paths[0], beam=1).text
    expected = to_record(next(caption_files(engine.captioner, paths[:1])), "").keys()
    assert records[0].keys() == (expected - {"path"}) | {"name"}
    assert "not a picture" in records[1]["error"]
    assert records[2]["caption"] == engine.captioner.caption(paths[2], beam=1).text


def test_the_api_explains_and_refuses(client: Client, url: str) -> None:
    endpoint = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/caption_folder"]
    assert "docs/records.md" in endpoint["description"]
    assert all(":" in parameter["label"] for parameter in endpoint["parameters"])
    with pytest.raises(AppError, match="at least one photo"):
        client.predict([], api_name="/caption_folder")
    with pytest.raises(AppError, match="beam must be from 1 to 10"):
        client.predict([handle_file(media.get_image("lion.jpg"))], beam=99, api_name="/caption_folder")
    for path in ("/etc/passwd", "../../etc/passwd", "http://127.0.0.1:1/x.jpg"):
        body = {"data": [[{"path": path, "meta": {"_type": "gradio.FileData"}}], 1, None, None, False]}
        answer = httpx.post(f"{url}/gradio_api/call/caption_folder", json=body)
        assert answer.status_code == 403
        assert "only uploaded files" in answer.text
