"""The COCO helper against a local server that drops connections."""

import hashlib
import http.server
import io
import json
import random
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from captioner_training import download as module
from captioner_training.download import SETS, Archive, DownloadError, download, fetch
from PIL import Image
from typer.testing import CliRunner

from captioner.cli import app


class Server:
    """Serves ``files`` and does to the next answers what ``faults`` says."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.asked: list[tuple[str, str | None]] = []
        self.tag = '"one"'
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        span = handler.headers.get("Range")
        self.asked.append((handler.path, span))
        fault = self.faults.pop(0) if self.faults else ""
        data = self.files.get(handler.path.lstrip("/"))
        if data is None or fault == "503":
            handler.send_error(404 if data is None else 503)
            return
        start = 0
        if span and fault != "no ranges" and handler.headers.get("If-Range", self.tag) == self.tag:
            start = int(span.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                handler.send_error(416)
                return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.send_header("ETag", self.tag)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.end_headers()
        body = data[start:]
        if fault == "drop":
            body = body[: len(body) // 2]
            handler.close_connection = True
        handler.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


DATA = random.Random(0).randbytes(300_000)


def test_a_dropped_connection_goes_on_where_it_was(server, tmp_path):
    server.files["a.zip"] = DATA
    server.faults = ["drop", "drop", "503", "drop"]
    fetch(f"{server.url}/a.zip", tmp_path / "a.zip", size=len(DATA), wait=0)
    assert (tmp_path / "a.zip").read_bytes() == DATA
    spans = [span for _, span in server.asked]
    assert spans[0] is None
    begins = [int(span.removeprefix("bytes=").rstrip("-")) for span in spans[1:] if span]
    assert begins == [150_000, 225_000, 225_000, 262_500]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]


def test_a_download_that_was_killed_goes_on(server, tmp_path):
    server.files["a.zip"] = DATA
    (tmp_path / "a.zip.part").write_bytes(DATA[:100_000])
    (tmp_path / "a.zip.part.json").write_text(json.dumps({"version": '"one"'}))
    fetch(f"{server.url}/a.zip", tmp_path / "a.zip", size=len(DATA), wait=0)
    assert (tmp_path / "a.zip").read_bytes() == DATA
    assert server.asked == [("/a.zip", "bytes=100000-")]


def test_one_that_was_killed_at_its_very_end_asks_for_nothing(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(DATA)
    fetch(f"{server.url}/a.zip", tmp_path / "a.zip", size=len(DATA), wait=0)
    assert (tmp_path / "a.zip").read_bytes() == DATA
    assert server.asked == []


def test_a_file_that_has_changed_is_fetched_anew(server, tmp_path):
    server.files["a.zip"] = DATA
    server.tag = '"two"'
    (tmp_path / "a.zip.part").write_bytes(b"old" * 1000)
    (tmp_path / "a.zip.part.json").write_text(json.dumps({"version": '"one"'}))
    fetch(f"{server.url}/a.zip", tmp_path / "a.zip", wait=0)
    assert (tmp_path / "a.zip").read_bytes() == DATA


def test_a_server_without_ranges(server, tmp_path):
    server.files["a.zip"] = DATA
    server.faults = ["drop", "no ranges"]
    fetch(f"{server.url}/a.zip", tmp_path / "a.zip", size=len(DATA), wait=0)
    assert (tmp_path / "a.zip").read_bytes() == DATA


def test_a_part_that_is_too_long_is_thrown_away(server, tmp_path):
    server.files["a.zip"] = DATA[:1000]
    (tmp_path / "a.zip.part").write_bytes(DATA)
    fetch(f"{server.url}/a.zip", tmp_path / "a.zip", wait=0)
    assert (tmp_path / "a.zip").read_bytes() == DATA[:1000]


def test_another_size_is_another_file(server, tmp_path):
    server.files["a.zip"] = DATA
    with pytest.raises(DownloadError, match=r"300,000 bytes instead of 300,001"):
        fetch(f"{server.url}/a.zip", tmp_path / "a.zip", size=300_001, wait=0)
    assert not (tmp_path / "a.zip").exists()


def test_no_room(server, tmp_path, monkeypatch):
    server.files["a.zip"] = DATA
    usage = type(shutil.disk_usage(tmp_path))(0, 0, 1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"0\.0 GB are needed, 0\.0 GB free; make room"):
        fetch(f"{server.url}/a.zip", tmp_path / "a.zip", wait=0)


# The whole set, with pictures of our own.


def make_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    small = Image.frombytes("RGB", (4, 4), random.Random(number).randbytes(48))
    small.resize((32, 32)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def coco(server, monkeypatch) -> Server:
    """A server of a COCO with six training and two validation pictures."""
    names = {"train": [f"{n:012}.jpg" for n in range(6)], "val": [f"{n:012}.jpg" for n in (7, 8)]}
    annotations: dict[str, bytes] = {"annotations/instances_val2017.json": b"{}"}
    for split, files in names.items():
        data = {
            "images": [{"id": int(f[:12]), "file_name": f} for f in files],
            "annotations": [
                {"id": n, "image_id": int(f[:12]), "caption": f"a {f}"} for n, f in enumerate(files)
            ],
        }
        annotations[f"annotations/captions_{split}2017.json"] = json.dumps(data).encode()
    contents = {
        "annotations/annotations_trainval2017.zip": make_zip(annotations),
        **{
            f"zips/{s}2017.zip": make_zip({f"{s}2017/{f}": picture(int(f[:12])) for f in names[s]})
            for s in names
        },
    }
    server.files.update(contents)
    sets = {
        part: Archive(a.path, len(contents[a.path]), hashlib.md5(contents[a.path]).hexdigest(), a.wanted)
        for part, a in SETS["coco2017"].items()
    }
    monkeypatch.setitem(SETS, "coco2017", sets)
    return server


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def test_coco_is_fetched_checked_unpacked_and_can_be_prepared(coco, tmp_path):
    coco.faults = ["drop", "", "drop"]
    lines = download("coco2017", tmp_path / "coco", mirror=coco.url, wait=0)
    assert tree(tmp_path / "coco") == {
        "annotations/captions_train2017.json",
        "annotations/captions_val2017.json",
        *(f"train2017/{n:012}.jpg" for n in range(6)),
        *(f"val2017/{n:012}.jpg" for n in (7, 8)),
    }
    assert (tmp_path / "coco" / "train2017" / f"{3:012}.jpg").read_bytes() == picture(3)
    asked = len(coco.asked)
    assert download("coco2017", tmp_path / "coco", mirror=coco.url, wait=0) == lines
    assert len(coco.asked) == asked  # nothing is fetched twice
    # the line that it prints for the next step does work
    words = lines[-1].removeprefix("Next: captioner ").split()
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "coco-prepared" / "report.json").read_text())
    assert [report["splits"][s]["pictures"] for s in ("train", "val", "test")] == [6, 2, 0]


def test_parts_and_archives_that_somebody_brought(coco, tmp_path):
    (tmp_path / "val2017.zip").write_bytes(coco.files["zips/val2017.zip"])
    arguments = [
        "download",
        "coco2017",
        "-o",
        tmp_path,
        "--part",
        "val",
        "--mirror",
        coco.url,
        "--keep-archives",
    ]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert coco.asked == []
    assert tree(tmp_path) == {"val2017.zip", *(f"val2017/{n:012}.jpg" for n in (7, 8))}


def test_an_interrupted_unpacking_is_finished(coco, tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / f"{7:012}.jpg.part").write_bytes(b"half")
    download("coco2017", tmp_path, parts=["val"], mirror=coco.url, wait=0)
    assert tree(tmp_path) == {f"val2017/{n:012}.jpg" for n in (7, 8)}


def test_checksums(coco, tmp_path):
    wrong = bytearray(coco.files["zips/val2017.zip"])
    wrong[60] ^= 1
    right, coco.files["zips/val2017.zip"] = coco.files["zips/val2017.zip"], bytes(wrong)
    with pytest.raises(DownloadError, match=r"val2017\.zip: its MD5 is \w+, not \w+: delete it"):
        download("coco2017", tmp_path, parts=["val"], mirror=coco.url, wait=0)
    (tmp_path / "val2017.zip").write_bytes(right)
    with pytest.raises(DownloadError, match="its SHA-256 is"):
        download("coco2017", tmp_path, parts=["val"], mirror=coco.url, sha256={"val2017.zip": "00" * 32})
    sums = {"val2017.zip": hashlib.sha256(right).hexdigest().upper()}
    download("coco2017", tmp_path, parts=["val"], mirror=coco.url, sha256=sums)
    with pytest.raises(DownloadError, match=r"--sha256 other\.zip: that is not fetched; val2017\.zip are"):
        download("coco2017", tmp_path, parts=["val"], mirror=coco.url, sha256={"other.zip": "00"})
    with pytest.raises(DownloadError, match=r"--sha256 val2017\.zip=abc: expected 64 hexadecimal digits"):
        download("coco2017", tmp_path, parts=["val"], mirror=coco.url, sha256={"val2017.zip": "abc"})
    with pytest.raises(DownloadError, match="--mirror example: expected an address"):
        download("coco2017", tmp_path, parts=["val"], mirror="example")


def test_damage_is_found_without_a_checksum(coco, tmp_path, monkeypatch):
    wrong = bytearray(coco.files["zips/val2017.zip"])
    wrong[80] ^= 1
    coco.files["zips/val2017.zip"] = bytes(wrong)
    monkeypatch.setitem(SETS["coco2017"], "val", Archive("zips/val2017.zip", len(wrong), None))
    with pytest.raises(DownloadError, match=r"val2017\.zip: damaged"):
        download("coco2017", tmp_path, parts=["val"], mirror=coco.url, wait=0)


@pytest.mark.parametrize("name", ["../out.jpg", "/tmp/out.jpg", "val2017/../../out.jpg", "C:/out.jpg"])
def test_nothing_is_written_outside_the_folder(coco, tmp_path, monkeypatch, name):
    data = make_zip({"val2017/a.jpg": b"1", name: b"2"})
    coco.files["zips/val2017.zip"] = data
    monkeypatch.setitem(SETS["coco2017"], "val", Archive("zips/val2017.zip", len(data), None))
    with pytest.raises(DownloadError, match="would lie outside"):
        download("coco2017", tmp_path / "in", parts=["val"], mirror=coco.url, wait=0)
    assert not (tmp_path / "out.jpg").exists()
    assert tree(tmp_path) == {"in/val2017.zip"}


def test_links_in_an_archive(coco, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("val2017/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
    coco.files["zips/val2017.zip"] = buffer.getvalue()
    monkeypatch.setitem(SETS["coco2017"], "val", Archive("zips/val2017.zip", len(buffer.getvalue()), None))
    with pytest.raises(DownloadError, match="is a link"):
        download("coco2017", tmp_path, parts=["val"], mirror=coco.url, wait=0)


def test_without_a_network_it_says_what_to_fetch_by_hand(coco, tmp_path):
    coco.httpd.shutdown()
    coco.httpd.server_close()
    with pytest.raises(DownloadError) as caught:
        download("coco2017", tmp_path, parts=["annotations", "val"], mirror=coco.url, wait=0)
    message = str(caught.value)
    assert "http://images.cocodataset.org/annotations/annotations_trainval2017.zip (0.0 GB)" in message
    assert "http://images.cocodataset.org/zips/val2017.zip" in message
    assert f"into {tmp_path}" in message
    assert "train2017.zip" not in message
    assert "\n" not in message


def test_a_server_that_lacks_it(coco, tmp_path):
    del coco.files["zips/val2017.zip"]
    with pytest.raises(DownloadError, match=r"the server answers 404 .*fetch by hand"):
        download("coco2017", tmp_path, parts=["val"], mirror=coco.url, wait=0)


def test_unknown_names(tmp_path):
    with pytest.raises(DownloadError, match="coco2015: no such set; there are coco2017, coco2014"):
        download("coco2015", tmp_path)
    with pytest.raises(
        DownloadError, match="test: coco2017 has no such part; there are annotations, val, train"
    ):
        download("coco2017", tmp_path, parts=["test"])
    result = CliRunner().invoke(app, ["download", "coco2017", "-o", str(tmp_path), "--part", "x"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_the_official_files():
    for name, archives in SETS.items():
        year = name.removeprefix("coco")
        assert archives.keys() == {"annotations", "val", "train"}
        for archive in archives.values():
            assert year in archive.name
            assert archive.md5 is None or len(archive.md5) == 32
