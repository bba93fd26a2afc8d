from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from captioner_demo.engine import Engine, display_photo
from gradio import media
from PIL import Image

from captioner import Captioner
from captioner.inputs import ImageError


def read(name: str) -> bytes:
    return Path(media.get_image(name)).read_bytes()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for a minute")


@pytest.fixture
def fresh(captioner: Captioner):
    engine = Engine(captioner)
    yield engine
    engine.close()


def test_it_gives_the_captioners_own_words(fresh: Engine, photo: str) -> None:
    look, caption = fresh.caption_photo(read("cheetah1.jpg"), beam=2)
    assert caption.text == fresh.captioner.caption(photo, beam=2).text
    assert (look.fit.width, look.fit.height) == Image.open(photo).size


def test_a_photo_is_looked_at_once(fresh: Engine) -> None:
    data = read("cheetah1.jpg")
    look, first = fresh.caption_photo(data, beam=1)
    again, _ = fresh.caption_photo(data, beam=1, prefix="two")
    assert again is look
    assert fresh.caption(look, beam=1).text == first.text
    assert fresh.caption(look, beam=1, region=(0, 0, 90, 90)).text
    assert fresh.look(data) is look
    assert fresh.encoded == 1


def test_the_cache_is_bounded(captioner: Captioner) -> None:
    engine = Engine(captioner, cache_bytes=700_000)  # about two photos of 330 kB and their displays
    keys = []
    for i in range(4):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), (i * 60, 0, 0)).save(buffer, "PNG")
        keys.append(engine.look(buffer.getvalue()).key)
    assert engine.recall(keys[0]) is None
    assert engine.recall(keys[-1]) is not None
    assert sum(look.nbytes for key in keys if (look := engine.recall(key))) <= 700_000
    engine.close()


def test_requests_that_wait_are_captioned_together_and_none_spoils_another(
    fresh: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = [read("cheetah1.jpg"), read("lion.jpg"), read("bus.png")]
    alone = [fresh.captioner.caption(photo, beam=1).text for photo in photos]
    gate, work = threading.Event(), fresh._work
    monkeypatch.setattr(fresh, "_work", lambda jobs: (gate.wait(60), work(jobs)))
    answers: dict[int, object] = {}

    def ask(i: int, **options: object) -> None:
        try:
            answers[i] = fresh.caption_photo(photos[i % 3], beam=1, **options)[1].text
        except ValueError as error:
            answers[i] = error

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    threads.append(threading.Thread(target=ask, args=(4,), kwargs={"region": (9, 9, 2, 2)}))
    threads[0].start()
    wait_for(lambda: fresh._thread is not None and not fresh._jobs)  # it is at work, the others wait
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: len(fresh._jobs) == 4)
    gate.set()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(4)] == [*alone, alone[0]]
    assert "empty" in str(answers[4])
    assert fresh.largest == 4


def test_what_is_no_photo_is_an_error_and_the_engine_goes_on(fresh: Engine) -> None:
    with pytest.raises(ImageError):
        fresh.caption_photo(b"no photo")
    with pytest.raises(ValueError, match="beam"):
        fresh.caption_photo(read("lion.jpg"), beam=0)
    assert fresh.caption_photo(read("lion.jpg"), beam=1)[1].text


def test_the_display_is_upright_and_small() -> None:
    picture = Image.new("RGB", (3000, 2000), "white")
    picture.paste((255, 0, 0), (0, 0, 1500, 1000))  # stored top left
    exif = Image.Exif()
    exif[0x0112] = 6  # as a person sees it, top right
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    shown = Image.open(io.BytesIO(display_photo(buffer.getvalue())))
    assert shown.size == (683, 1024)
    pixels = np.asarray(shown)
    assert (pixels[100, 600] - [254, 0, 0] < 9).all()
    assert pixels[100, 60].min() > 240


def test_a_closed_engine_says_so(captioner: Captioner) -> None:
    engine = Engine(captioner)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.caption_photo(read("lion.jpg"))
