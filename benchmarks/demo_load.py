"""The demo under load: many clients at once against ``captioner demo`` in a process of its own.

Each client uploads a photo, asks for its caption over the HTTP API, waits for the answer, and goes on with
the next, each time as somebody new; no two uploads are equal, so that the server looks at each.
Printed are the answers, the refusals that say that the queue is full, and the failures; the median and the
95th percentile of the seconds from upload to caption; and the server's memory. Bars: no failure, and at the
end at most 1.15 times the memory after the first fifth of the time, when caches have filled.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import common
import httpx
import psutil
from PIL import Image

_PHOTOS = 20
"""Photos that differ to the eye; the uploads differ in a few bytes behind the picture."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return 0 if the bars hold."""
    parser = common.arguments(__doc__)
    parser.add_argument("--clients", type=common.positive, default=50)
    parser.add_argument("--seconds", type=common.positive, default=300)
    parser.add_argument("--threads", type=common.positive, default=2, help="of the server's model")
    options = parser.parse_args(arguments)
    common.print_machine(options.threads)
    with server(options.model, options.threads) as (url, process):
        crowd = Crowd(url, [encoded(image) for image in common.varied(_PHOTOS)])
        for _ in range(2):
            crowd.ask(0)  # before anything is counted
        crowd.clear()
        print(f"memory at the start: {megabytes(process):.0f} MB", flush=True)
        memory = crowd.run(options.clients, options.seconds, process)
    answers, refusals = crowd.outcomes["answer"], crowd.outcomes["refusal"]
    failures = crowd.outcomes.total() - answers - refusals
    for outcome, count in crowd.outcomes.most_common():
        if outcome not in ("answer", "refusal"):
            print(f"  {count} times: {outcome[:200]}")
    print(f"{options.clients} clients, {crowd.lasted:.0f} s: {answers} answers, {refusals} refusals")
    print(f"{answers / crowd.lasted:.2f} answers a second")
    if crowd.seconds:
        highest = sorted(crowd.seconds)[min(len(crowd.seconds) - 1, int(0.95 * len(crowd.seconds)))]
        print(
            f"upload to caption: median {statistics.median(crowd.seconds):.2f} s, 95 % within {highest:.2f} s"
        )
    holds = common.verdict("failures", failures, at_most=0) and answers > 0
    fifth = max(1, len(memory) // 5)
    early, late = statistics.mean(memory[fifth : 2 * fifth]), statistics.mean(memory[-fifth:])
    print(f"memory: at most {max(memory):.0f} MB")
    return 0 if common.verdict("memory, end / after a fifth", late / early, at_most=1.15) and holds else 1


class Crowd:
    """Clients and what became of their requests.

    Attributes:
        outcomes: how often each: ``answer``, ``refusal`` (the queue is full), or what went wrong.
        seconds: from upload to caption, of each answer.
        lasted: seconds from the first request to the last answer.
    """

    def __init__(self, url: str, photos: list[bytes]) -> None:
        self._url, self._photos, self._number = url, photos, itertools.count()
        self._lock = threading.Lock()
        self._client = httpx.Client(timeout=600)
        self.clear()

    def clear(self) -> None:
        """Forget what has been counted."""
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.lasted = 0.0

    def run(self, clients: int, seconds: float, process: psutil.Process) -> list[float]:
        """Let clients ask for so long; return the server's memory over time, in MB."""
        begun = time.perf_counter()

        def client(which: int) -> None:
            with httpx.Client(timeout=600) as connection:
                while time.perf_counter() - begun < seconds:
                    if self.ask(which, connection) != "answer":
                        time.sleep(1.0)  # as a person would, before trying again

        threads = [threading.Thread(target=client, args=(which,)) for which in range(clients)]
        for thread in threads:
            thread.start()
        memory, minute = [], 1
        while any(thread.is_alive() for thread in threads):
            memory.append(megabytes(process))
            if time.perf_counter() - begun > 60 * minute:
                answers = self.outcomes["answer"]
                print(f"  after {minute} min: {memory[-1]:.0f} MB, {answers} answers", flush=True)
                minute += 1
            time.sleep(min(1.0, seconds / 50))
        self.lasted = time.perf_counter() - begun
        return memory

    def ask(self, which: int, client: httpx.Client | None = None) -> str:
        """Caption one photo; return and count what became of it."""
        begun = time.perf_counter()
        try:
            outcome = self._ask(which, client or self._client)
        except httpx.HTTPError as error:
            outcome = f"{type(error).__name__}: {error}"
        with self._lock:
            self.outcomes[outcome] += 1
            if outcome == "answer":
                self.seconds.append(time.perf_counter() - begun)
        return outcome

    def _ask(self, which: int, client: httpx.Client) -> str:
        with self._lock:
            number = next(self._number)
        photo = self._photos[(which * 7 + number) % len(self._photos)] + b"%d" % number
        api = f"{self._url}/gradio_api"
        stored = client.post(f"{api}/upload", files={"files": ("photo.jpg", photo)})
        if stored.status_code != 200:
            return f"upload {stored.status_code}: {stored.text}"
        given = {"path": stored.json()[0], "meta": {"_type": "gradio.FileData"}}
        call = {"data": [given, None, None, None, False]}
        begun = client.post(f"{api}/call/caption_photo", json=call)
        if begun.status_code == 503 and "full" in begun.text.lower():
            return "refusal"
        if begun.status_code != 200:
            return f"call {begun.status_code}: {begun.text}"
        text = client.get(f"{api}/call/caption_photo/{begun.json()['event_id']}").text
        if "event: complete" in text and '"caption"' in text:
            return "answer"
        return "refusal" if "queue is full" in text.lower() else text


@contextlib.contextmanager
def server(model: Path | None, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """Run ``captioner demo`` on a free port; give its address and its process."""
    command = [sys.executable, "-c", "from captioner.cli import main; main()", "demo", "--no-browser"]
    command += ["--port", "0", "--device", "cpu", "--threads", str(threads)]
    if model is not None:
        command += ["--model", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"(http://[\d.]+:\d+)/", line):
                break
        else:
            raise common.wrong_use("the server did not start: " + " ".join(lines))
        wait_for(found[1])
        yield found[1], psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(url: str) -> None:
    """Wait until a server answers."""
    for _ in range(300):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=30).status_code == 200:
                return
        time.sleep(0.1)
    raise common.wrong_use(f"{url} does not answer")


def encoded(image: Image.Image) -> bytes:
    """Return a picture as a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def megabytes(process: psutil.Process) -> float:
    """Return what a process and its children hold, in MB."""
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 1e6


if __name__ == "__main__":
    sys.exit(main())
