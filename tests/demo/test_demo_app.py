from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from captioner_demo import build, look, mount
from captioner_demo.app import listen
from captioner_demo.engine import Engine
from captioner_demo.limits import LimitError
from fastapi import FastAPI
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from demo.photo_data import bomb

META = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("client")))


def upload(url: str, data: bytes, name: str = "x.jpg") -> httpx.Response:
    return httpx.post(f"{url}/gradio_api/upload", files={"files": (name, data)}, timeout=60)


def call(
    url: str, path: Any, endpoint: str = "caption_photo", more: tuple[Any, ...] = (1, None, None, False)
) -> str:
    """Call an endpoint as any program may; return what comes back as text."""
    body = {"data": [{"path": path, "meta": META}, *more]}
    begun = httpx.post(f"{url}/gradio_api/call/{endpoint}", json=body, timeout=60)
    if begun.status_code != 200:
        return f"{begun.status_code} {begun.text}"
    return httpx.get(f"{url}/gradio_api/call/{endpoint}/{begun.json()['event_id']}", timeout=120).text


# --- the API --------------------------------------------------------------------------------------------


def test_caption_photo(client: Client, engine: Engine, photo: str) -> None:
    record = client.predict(handle_file(photo), beam=2, n_best=2, api_name="/caption_photo")
    expected = engine.captioner.caption(photo, beam=2, n_best=2).to_dict()
    assert record.keys() == expected.keys()
    assert record["caption"] == expected["caption"]
    assert [word["word"] for word in record["words"]] == [word["word"] for word in expected["words"]]
    assert record["words"][0].keys() == expected["words"][0].keys()
    assert len(record["n_best"]) == 2
    assert (
        "attention"
        in client.predict(handle_file(photo), attention=True, api_name="/caption_photo")["words"][0]
    )


def test_caption_region(client: Client, engine: Engine, photo: str) -> None:
    box = (10, 20, 110, 120)
    record = client.predict(handle_file(photo), *box, beam=1, api_name="/caption_region")
    assert record["caption"] == engine.captioner.caption(photo, region=box, beam=1).text


def test_continue_caption(client: Client, engine: Engine, photo: str) -> None:
    record = client.predict(handle_file(photo), "two dogs", beam=1, api_name="/continue_caption")
    assert record["caption"] == engine.captioner.caption(photo, prefix="two dogs", beam=1).text
    assert [word["given"] for word in record["words"][:3]] == [True, True, False]


def test_a_photo_is_looked_at_once_by_the_api_too(client: Client, engine: Engine, photo: str) -> None:
    client.predict(handle_file(photo), beam=1, api_name="/caption_photo")
    encoded = engine.encoded
    client.predict(handle_file(photo), "a", beam=1, api_name="/continue_caption")
    assert engine.encoded == encoded


def test_the_api_page_explains_itself(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    ours = {"/caption_photo", "/caption_region", "/continue_caption"}
    assert endpoints.keys() >= ours
    assert all(endpoint["description"] for endpoint in endpoints.values())
    for endpoint in (endpoints[name] for name in ours):
        assert "Caption.to_dict()" in endpoint["description"]
        assert all(":" in parameter["label"] for parameter in endpoint["parameters"])
    names = [p["parameter_name"] for p in endpoints["/caption_region"]["parameters"]]
    assert names[:5] == ["photo", "left", "top", "right", "bottom"]
    assert [p["parameter_has_default"] for p in endpoints["/caption_photo"]["parameters"]] == [False] + [
        True
    ] * 4


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("/caption_photo", {"beam": 99}, "beam must be from 1 to 10, not 99"),
        ("/caption_photo", {"n_best": 0}, "n_best must be from 1 to 10, not 0"),
        ("/caption_region", {"left": 5, "top": 5, "right": 2, "bottom": 9}, "empty"),
        ("/caption_region", {"left": 0, "top": 0, "right": None, "bottom": 9}, "a number for right"),
        ("/continue_caption", {"words": "a " * 400}, "300 characters"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(
    client: Client, photo: str, endpoint: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(AppError, match=message) as caught:
        client.predict(handle_file(photo), **arguments, api_name=endpoint)
    assert "Traceback" not in str(caught.value)


def test_a_region_of_a_turned_portrait_is_in_pixels_as_seen(
    client: Client, engine: Engine, tmp_path: Path
) -> None:
    picture = Image.effect_noise((1600, 1200), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    picture.save(path, exif=exif)
    record = client.predict(
        handle_file(str(path)), 0, 1000, 1200, 1600, beam=1, attention=True, api_name="/caption_region"
    )
    assert (record["fit"]["width"], record["fit"]["height"]) == (1200, 1600)
    rows = [max(row) for row in record["words"][0]["attention"][0]]
    assert max(rows[:5]) == 0  # 8 rows of 200 pixels: nothing above 1000 is seen
    assert min(rows[5:]) > 0


# --- abuse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../etc/passwd",
        "{uploads}/../x",
        "http://127.0.0.1:1/x.jpg",
        "file:///etc/passwd",
    ],
)
def test_only_uploads_can_be_captioned(url: str, uploads: Path, path: str) -> None:
    answer = call(url, path.replace("{uploads}", str(uploads)))
    assert answer.startswith("403")
    assert "upload the file first" in answer


def test_a_file_beside_the_uploads_is_not_read(url: str, uploads: Path, photo: str) -> None:
    beside = uploads.parent / "private.jpg"
    beside.write_bytes(Path(photo).read_bytes())
    assert call(url, str(beside)).startswith("403")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "{source}"]
)
def test_files_of_the_server_are_not_served(url: str, path: str) -> None:
    source = str(Path(__file__).resolve())
    answer = httpx.get(f"{url}/gradio_api/file={path.replace('{source}', source)}")
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text
    assert "import" not in answer.text


def test_an_upload_stays_in_its_folder(url: str, uploads: Path) -> None:
    answer = upload(url, b"x", "../../../evil<b>.jpg")
    (stored,) = answer.json()
    assert Path(stored).resolve().is_relative_to(uploads.resolve())
    assert "<" not in Path(stored).name


def test_too_large_an_upload_is_refused(url: str) -> None:
    answer = upload(url, b"x" * 4_200_000)
    assert answer.status_code == 413
    assert len(answer.text) < 200

    def endless() -> Any:
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.jpg"\r\n\r\n'
        for _ in range(80):
            yield b"x" * 100_000

    kind = {"content-type": "multipart/form-data; boundary=b"}
    with suppress(httpx.TransportError):  # the server may hang up before all was sent
        assert httpx.post(f"{url}/gradio_api/upload", content=endless(), headers=kind).status_code == 413


def test_too_large_a_body_is_refused(url: str) -> None:
    answer = httpx.post(f"{url}/gradio_api/call/caption_photo", json={"data": ["x" * 6_000_000]})
    assert answer.status_code == 413


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_refused(url: str, body: bytes) -> None:
    kind = {"content-type": "application/json"}
    answer = httpx.post(f"{url}/gradio_api/call/caption_photo", content=body, headers=kind)
    assert answer.status_code in (400, 422)


def refused(client: Client, path: Path) -> str:
    with pytest.raises(AppError) as caught:
        client.predict(handle_file(str(path)), api_name="/caption_photo")
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def test_too_many_pixels_are_refused(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(30000, 30000))
    assert "900.0 megapixels; at most 20 are allowed here" in refused(client, path)


@pytest.mark.parametrize(
    "data", [b"I am text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_photo_is_refused_in_one_line(client: Client, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    assert "x.jpg" in refused(client, path)


def test_an_uploaded_page_does_not_run(url: str) -> None:
    (stored,) = upload(url, b"<script>alert(1)</script>", "x.html").json()
    answer = httpx.get(f"{url}/gradio_api/file={stored}")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "attachment" in answer.headers.get("content-disposition", "") or answer.status_code != 200


def test_the_page_names_no_other_host(url: str) -> None:
    answer = httpx.get(url, timeout=60)
    assert "'self'" in answer.headers["content-security-policy"]
    assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]+', answer.text)
    assert "fonts.googleapis" not in re.sub(r"<script.*?</script>", "", answer.text, flags=re.DOTALL)


def test_a_full_queue_says_so(start: Callable[[Any], str], captioner: Any, photo: str) -> None:
    gate = threading.Event()

    class Slow(Engine):
        def caption_photo(self, data: bytes, **options: Any) -> Any:
            gate.wait(120)
            return super().caption_photo(data, **options)

    engine = Slow(captioner)
    url = start(mount(FastAPI(), captioner=engine, waiting=1, workers=1))
    (stored,) = upload(url, Path(photo).read_bytes()).json()
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(call(url, stored))) for _ in range(6)]
    try:
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for _ in range(1000):
            if any("full" in answer for answer in answers):
                break
            time.sleep(0.05)
    finally:
        gate.set()
        for thread in threads:
            thread.join()
        engine.close()
    full = [answer for answer in answers if "full" in answer.lower()]
    assert 1 <= len(full) <= 5
    assert any("complete" in answer for answer in answers)  # those that had a place were served


def test_uploads_are_deleted(start: Callable[[Any], str], engine: Engine, uploads: Path, photo: str) -> None:
    url = start(mount(FastAPI(), captioner=engine, cache_seconds=(1, 1)))
    (stored,) = upload(url, Path(photo).read_bytes()).json()
    assert Path(stored).is_file()
    for _ in range(600):
        if not Path(stored).is_file():
            break
        time.sleep(0.1)
    assert not Path(stored).is_file()


# --- mounting and serving -------------------------------------------------------------------------------


def test_it_can_be_mounted_beside_other_pages(
    start: Callable[[Any], str], engine: Engine, photo: str
) -> None:
    app = FastAPI()

    @app.get("/")
    def hello() -> dict[str, str]:
        return {"hello": "you"}

    url = start(mount(app, "/captioner", captioner=engine))
    assert httpx.get(url).json() == {"hello": "you"}
    assert "window.captionerRamp" in httpx.get(f"{url}/captioner/").text
    client = Client(f"{url}/captioner/", verbose=False)
    assert client.predict(handle_file(photo), beam=1, api_name="/caption_photo")["caption"]
    assert call(f"{url}/captioner", "/etc/passwd").startswith("403")


def test_what_the_page_relies_on_is_there(engine: Engine) -> None:
    """Runs on the lowest and the newest Gradio that are supported."""
    import inspect

    from gradio.route_utils import delete_files_created_by_app
    from gradio.utils import get_upload_folder

    def takes(function: Any, *names: str) -> bool:
        return set(names) <= set(inspect.signature(function).parameters)

    assert takes(gr.mount_gradio_app, "theme", "head", "app_kwargs", "max_file_size", "root_path")
    assert takes(gr.mount_gradio_app, "footer_links", "show_error", "ssr_mode")
    assert takes(gr.Blocks.launch, "theme", "head", "footer_links")
    assert takes(gr.Blocks, "delete_cache", "analytics_enabled")
    assert takes(gr.Blocks.queue, "max_size", "default_concurrency_limit")
    assert set(look()) == {"theme", "head", "footer_links"}
    assert not any(isinstance(font, gr.themes.GoogleFont) for font in look()["theme"]._font)
    # the tabs' components and events
    assert takes(gr.HTML, "js_on_load", "apply_default_css", "elem_id", "elem_classes", "visible")
    assert takes(gr.File, "file_count", "file_types", "type", "height")
    assert takes(gr.Image, "sources", "image_mode", "buttons", "type")
    assert takes(gr.State, "time_to_live")
    assert takes(gr.Error, "title", "print_exception")
    for event in (gr.HTML("").submit, gr.HTML("").stop, gr.Button("").click, gr.Slider().release):
        assert takes(event, "api_visibility", "concurrency_id", "trigger_mode", "show_progress", "js")
    assert callable(gr.Blocks.unload)
    assert gr.update(visible="hidden")["visible"] == "hidden"
    assert gr.EventData.__init__
    # what is cleaned up by hand
    assert isinstance(gr.HTML("").temp_files, set)
    assert callable(delete_files_created_by_app)
    assert get_upload_folder()
    blocks = build(engine)
    mount(FastAPI(), blocks=blocks)
    assert {"event_analytics", "event_ids_to_events", "pending_event_ids_session"} <= set(vars(blocks._queue))
    assert "pending_messages_per_session" in vars(blocks._queue)
    assert {"lock", "session_data", "time_last_used"} <= set(vars(blocks.state_holder))


def join(url: str, session: str, blocks: gr.Blocks, stored: str) -> httpx.Response:
    """Ask for a caption as a page does that has a session."""
    event = next(number for number, fn in blocks.fns.items() if fn.api_name == "caption_photo")
    data = [{"path": stored, "meta": META}, 1, None, None, False]
    body = {"data": data, "fn_index": event, "session_hash": session}
    return httpx.post(f"{url}/gradio_api/queue/join", json=body, timeout=60)


def finished(url: str, session: str) -> bool:
    """Wait for the answer to what a session asked; whether it is one."""
    address = f"{url}/gradio_api/queue/data?session_hash={session}"
    with httpx.stream("GET", address, timeout=60) as stream:
        for line in stream.iter_lines():
            if "process_completed" in line:
                return '"success":true' in line.replace(" ", "")
    return False


def test_sessions_are_bounded(start: Callable[[Any], str], engine: Engine, photo: str) -> None:
    blocks = build(engine, sessions=3)
    url = start(mount(FastAPI(), blocks=blocks))
    (stored,) = upload(url, Path(photo).read_bytes()).json()
    for number in range(5):
        assert join(url, f"tab{number}", blocks, stored).status_code == 200
        assert finished(url, f"tab{number}")
    assert set(blocks.state_holder.session_data) == {"tab2", "tab3", "tab4"}


def test_a_call_that_has_its_answer_leaves_nothing_behind(
    start: Callable[[Any], str], engine: Engine, photo: str
) -> None:
    blocks = build(engine)
    url = start(mount(FastAPI(), blocks=blocks))
    (stored,) = upload(url, Path(photo).read_bytes()).json()
    assert join(url, "tab", blocks, stored).status_code == 200
    assert finished(url, "tab")
    for path in (stored, stored, str(Path(stored).with_name("gone.jpg"))):  # the last is a mistake
        assert "event: " in call(url, path)
    for _ in range(600):  # it is forgotten when the answer has gone out
        if len(blocks.state_holder.session_data) == 1:
            break
        time.sleep(0.05)
    assert set(blocks.state_holder.session_data) == {"tab"}  # a page stays
    assert set(blocks._queue.pending_messages_per_session) == {"tab"}
    assert set(blocks._queue.pending_event_ids_session) <= {"tab"}


def test_what_is_noted_of_events_is_bounded(engine: Engine) -> None:
    queue = build(engine, waiting=1)._queue
    for noted in (queue.event_analytics, queue.event_ids_to_events):
        for number in range(3000):
            noted[str(number)] = {}
        assert list(noted)[-1] == "2999"
        assert len(noted) == 1004


def test_analytics_are_off(engine: Engine) -> None:
    assert build(engine).analytics_enabled is False


def test_listening(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LimitError, match=f"port {port}.*choose another with --port"):
            listen("127.0.0.1", port)
    with pytest.raises(LimitError, match="--host"):
        listen("203.0.113.1", 0)


def run(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "captioner", "demo", "--no-browser", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_command_serves_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = run("--port", "0", "--threads", "1")
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127.0.0.1:\d+/", line)
    assert found, process.communicate()[1]
    for _ in range(100):
        try:
            answer = httpx.get(found[0], timeout=60)
            break
        except httpx.TransportError:
            time.sleep(0.1)
    assert answer.status_code == 200
    assert list(tmp_path.glob("captioner-demo-*"))
    with httpx.stream(
        "GET", f"{found[0]}gradio_api/heartbeat/tab", timeout=60
    ) as stream:  # as a page that is open
        assert stream.status_code == 200
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert not list(tmp_path.glob("captioner-demo-*"))


def test_without_gradio_one_line_says_what_to_install(tmp_path: Path) -> None:
    """In a process of its own: here gradio is loaded."""
    code = "import sys; sys.modules['gradio'] = None; from captioner.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--no-browser"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    line = 'this needs gradio, which is not installed: pip install "captioner[demo]"'
    assert done.stderr.strip().endswith(line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-mb", "0"], "the limit on mb must be above 0"),
        (["--ssl-certfile", "c.pem"], "TLS needs both"),
        (["--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem"], "c.pem: there is no such file"),
        (["--root-path", "x"], "begins with a slash"),
        (["--model", "gone.safetensors"], "gone.safetensors"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments: list[str], message: str) -> None:
    from typer.testing import CliRunner

    from captioner.cli import app

    result = CliRunner().invoke(app, ["demo", "--no-browser", "--port", "0", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_old_files_are_removed_while_others_arrive(engine: Engine) -> None:
    blocks = build(engine)
    added_to = {id(getattr(block, "temp_files", None)) for block in blocks.blocks.values()}
    added_to.add(id(blocks.upload_file_set))
    assert len(blocks.temp_file_sets) > 1
    assert {
        id(files) for files in blocks.temp_file_sets
    } <= added_to  # what is gone through is what is added to
    for files in blocks.temp_file_sets:
        files.update({"a", "b"})
        for name in files:  # an ordinary set would end this with a RuntimeError
            files.add(f"{name}{name}")
        assert len(files) == 4
