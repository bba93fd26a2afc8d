"""Many people at once: no failure but an honest "busy", bounded memory, photos in one batch."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from captioner_demo import mount
from captioner_demo.engine import Engine
from fastapi import FastAPI
from gradio import media
from PIL import Image

from captioner import Captioner

META = {"_type": "gradio.FileData"}


def photos(count: int) -> list[bytes]:
    """Photos that differ, so that none is remembered."""
    lion = Image.open(media.get_image("lion.jpg")).convert("RGB")
    found = []
    for i in range(count):
        buffer = io.BytesIO()
        lion.crop((i, i % 7, lion.width, lion.height)).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def ask(client: httpx.Client, url: str, data: bytes) -> str:
    """Caption one photo over HTTP; return ``complete`` or what went wrong."""
    stored = client.post(f"{url}/gradio_api/upload", files={"files": ("x.jpg", data)}).json()[0]
    body = {"data": [{"path": stored, "meta": META}, 1, None, None, False]}
    begun = client.post(f"{url}/gradio_api/call/caption_photo", json=body)
    if begun.status_code != 200:
        return begun.text
    answer = client.get(f"{url}/gradio_api/call/caption_photo/{begun.json()['event_id']}").text
    return "complete" if "event: complete" in answer else answer


def crowd(url: str, people: int, seconds: float) -> tuple[Counter[str], float, list[float]]:
    """Let people ask one after another; return outcomes, seconds, and megabytes of memory over time."""
    outcomes: Counter[str] = Counter()
    given = photos(40)
    begun = time.perf_counter()

    def person(number: int) -> None:
        with httpx.Client(timeout=120) as client:
            turn = 0
            while time.perf_counter() - begun < seconds:
                outcomes[ask(client, url, given[(number * 7 + turn) % len(given)])] += 1
                turn += 1

    threads = [threading.Thread(target=person, args=(i,)) for i in range(people)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        memory.append(psutil.Process().memory_info().rss / 1e6)
        time.sleep(min(1.0, seconds / 10))
    return outcomes, time.perf_counter() - begun, memory


def honest(outcomes: Counter[str]) -> bool:
    return all(outcome == "complete" or "full" in outcome.lower() for outcome in outcomes)


def test_several_people_are_served_together(start: Callable[[Any], str], captioner: Captioner) -> None:
    engine = Engine(captioner, cache_bytes=1_000_000)
    url = start(mount(FastAPI(), captioner=engine))
    outcomes, _, _ = crowd(url, 6, 2.0)
    assert set(outcomes) == {"complete"}
    assert engine.largest > 1  # photos of several people went in one batch
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_a_batch_is_faster(start: Callable[[Any], str], captioner: Captioner, batch: int) -> None:
    """Prints how many photos a second 16 people get; run it with both to compare."""
    engine = Engine(captioner, batch=batch, cache_bytes=1_000_000)
    url = start(mount(FastAPI(), captioner=engine))
    crowd(url, 4, 2.0)
    outcomes, seconds, _ = crowd(url, 16, 25.0)
    print(f"batch {batch}: {outcomes['complete'] / seconds:.2f} photos a second, largest {engine.largest}")
    assert honest(outcomes)
    engine.close()


@pytest.mark.slow
def test_fifty_people_for_five_minutes(start: Callable[[Any], str], captioner: Captioner) -> None:
    engine = Engine(captioner)
    url = start(mount(FastAPI(), captioner=engine, cache_seconds=(20, 40), waiting=40, sessions=100))
    crowd(url, 8, 20.0)
    outcomes, seconds, memory = crowd(url, 50, 300.0)
    done = outcomes["complete"]
    print(f"{done} captions of {outcomes.total()} in {seconds:.0f} s, batches up to {engine.largest}")
    print(f"memory {memory[0]:.0f} to {memory[-1]:.0f} MB, at most {max(memory):.0f}")
    assert honest(outcomes), outcomes
    assert done > 300
    fifth = len(memory) // 5
    assert np.mean(memory[-fifth:]) < 1.15 * np.mean(memory[fifth : 2 * fifth])
    engine.close()


def test_the_benchmark_of_load_holds_when_small(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``captioner demo`` in a process of its own; no failure, and memory that does not grow."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import demo_load

    assert demo_load.main(["--clients", "8", "--seconds", "4", "--threads", "1"]) == 0
    told = capsys.readouterr().out
    assert "failures: 0 " in told
    assert int(told.split(" answers,")[0].split()[-1]) >= 8
    assert "upload to caption: median" in told


def test_the_benchmark_of_load_tells_refusals_from_failures(
    start: Callable[[Any], str], captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import demo_load

    engine = Engine(captioner, cache_bytes=1_000_000)
    url = start(mount(FastAPI(), captioner=engine, waiting=1, workers=1))
    crowd = demo_load.Crowd(url, photos(1))
    crowd.run(6, 1.0, psutil.Process())
    assert set(crowd.outcomes) == {"answer", "refusal"}  # the queue has one place
    wrong = demo_load.Crowd(url, [b"no photo"])
    assert wrong.ask(0) not in ("answer", "refusal")
    gone = demo_load.Crowd("http://127.0.0.1:9", photos(1))
    assert gone.ask(0).startswith("ConnectError")
    engine.close()
