"""Hundreds of tabs at once: memory is bounded, the server answers, sessions are freed."""

from __future__ import annotations

import asyncio
import gc
import os
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import psutil
import pytest
from captioner_demo import build, mount
from captioner_demo.app import SESSIONS
from captioner_demo.engine import Engine
from fastapi import FastAPI

from demo.pages import opened

META = {"_type": "gradio.FileData"}


async def tab(client: httpx.AsyncClient, url: str, session: str, call: dict[str, Any]) -> str:
    """Do what the page of a tab does: stay connected, ask for a caption; return the answer as text."""
    async with client.stream("GET", f"{url}/gradio_api/heartbeat/{session}") as beat:
        assert beat.status_code == 200
        joined = await client.post(f"{url}/gradio_api/queue/join", json={**call, "session_hash": session})
        if joined.status_code != 200:
            return joined.text
        data = f"{url}/gradio_api/queue/data?session_hash={session}"
        async with client.stream("GET", data) as stream:
            async for line in stream.aiter_lines():
                if "process_completed" in line:
                    return line
    return "no answer"


def run(work: Coroutine[Any, Any, list[str]]) -> list[str]:
    """Run it in a thread: playwright has a loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def upload(url: str, photo: str) -> str:
    files = {"files": ("x.jpg", Path(photo).read_bytes())}
    (stored,) = httpx.post(f"{url}/gradio_api/upload", files=files, timeout=60).json()
    return str(stored)


def megabytes() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss / 1e6)


@pytest.mark.parametrize(
    ("kept", "count"), [(10, 40), pytest.param(100, 300, marks=pytest.mark.slow, id="hundreds")]
)
def test_hundreds_of_tabs(
    start: Callable[[Any], str], engine: Engine, photo: str, kept: int, count: int
) -> None:
    """So many tabs at once, of which a few are kept."""
    blocks = build(engine, sessions=kept, waiting=count + 100)
    url = start(mount(FastAPI(), blocks=blocks))
    stored = upload(url, photo)
    event = next(number for number, fn in blocks.fns.items() if fn.api_name == "caption_photo")
    call = {"data": [{"path": stored, "meta": META}, 1, None, None, False], "fn_index": event}
    states: list[weakref.ref[Any]] = []

    async def tabs(first: int, count: int) -> list[str]:
        # no connection is used again: the server may close it at that very moment
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            return await asyncio.gather(*(tab(client, url, f"tab{first + i}", call) for i in range(count)))

    assert all('"success":true' in line for line in run(tabs(0, kept)))
    states += [weakref.ref(state) for state in blocks.state_holder.session_data.values()]
    assert len(states) == kept
    before = megabytes()
    begun = time.perf_counter()
    answers = run(tabs(kept, count))
    lasted = time.perf_counter() - begun
    assert all('"success":true' in line for line in answers)
    after = megabytes()
    print(f"{count} tabs answered in {lasted:.1f} s, {before:.0f} to {after:.0f} MB")
    assert len(blocks.state_holder.session_data) == kept
    gc.collect()
    assert not any(state() for state in states)  # the oldest have been freed
    assert after < before + 60  # for their connections; the state of 300 would be 60 MB more
    assert httpx.get(url, timeout=60).status_code == 200
    assert len(blocks._queue.event_ids_to_events) <= 1000 + 4 * (count + 100)


def test_a_session_costs_little(engine: Engine) -> None:
    """What Gradio keeps of each: at most so much, for as many as are kept."""
    import tracemalloc

    from gradio.state_holder import SessionState

    blocks = build(engine)
    SessionState(blocks)
    gc.collect()
    tracemalloc.start()
    try:
        kept = [SessionState(blocks) for _ in range(5)]
        each = tracemalloc.get_traced_memory()[0] / 1e6 / len(kept)
    finally:
        tracemalloc.stop()
    print(f"{each:.3f} MB a session, {SESSIONS * each:.0f} MB for {SESSIONS}")
    assert SESSIONS * each < 200


def test_many_tabs_of_a_browser(browser: Any, start: Callable[[Any], str], engine: Engine) -> None:
    """Each has its own photo, and goes on when others have come and gone.

    Each in a window of its own: Gradio holds a connection for each page, and browsers allow a window six.
    """
    blocks: gr.Blocks = build(engine, sessions=20)
    url = start(mount(FastAPI(), blocks=blocks))
    with opened(browser, url) as page:
        page.click("#photo-examples [data-pick='1']")
        page.wait_for_selector(".cap-word")
        sentence = page.inner_text(".cap-sentence")
        with ExitStack() as others:
            for _ in range(8):
                other = others.enter_context(opened(browser, url))
                other.click("#photo-examples [data-pick='0']")
                other.wait_for_selector(".cap-word")
                assert other.inner_text(".cap-sentence") != sentence
            assert len(blocks.state_holder.session_data) == 9
        sessions = blocks.state_holder.session_data
        for _ in range(600):  # the server notices at the next beat
            if sum(session.is_closed for session in sessions.values()) == 8:
                break
            time.sleep(0.1)
        assert sum(session.is_closed for session in sessions.values()) == 8
        page.click(".cap-word >> nth=1")
        page.locator("button.cap-alternative").first.click()
        page.wait_for_selector(".cap-given")  # its session is there


@pytest.mark.slow
def test_memory_levels_off_with_a_session_for_every_call(
    start: Callable[[Any], str], engine: Engine, photo: str
) -> None:
    """Five minutes, or as many as ``MINUTES`` says."""
    blocks = build(engine)
    url = start(mount(FastAPI(), blocks=blocks))
    stored = upload(url, photo)
    body = {"data": [{"path": stored, "meta": META}, 1, None, None, False]}
    seconds = 60 * float(os.environ.get("MINUTES", "5"))
    begun, calls, memory = time.perf_counter(), 0, []
    with httpx.Client(timeout=60) as client:
        while (now := time.perf_counter() - begun) < seconds:
            event = client.post(f"{url}/gradio_api/call/caption_photo", json=body).json()["event_id"]
            assert "event: complete" in client.get(f"{url}/gradio_api/call/caption_photo/{event}").text
            calls += 1
            if now > len(memory) * seconds / 20:
                memory.append(megabytes())
                print(f"{now:.0f} s, {calls} calls: {memory[-1]:.0f} MB", flush=True)
    assert memory[-1] < 1.05 * memory[4]  # after a fifth of the time
