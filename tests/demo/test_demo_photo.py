from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from captioner_demo import photo as tab
from captioner_demo.engine import Engine
from captioner_demo.limits import LimitError, Limits
from captioner_demo.page import clean
from PIL import Image

GREEDY = {"beam": 1}


@pytest.fixture
def session(engine: Engine, limits: Limits, photo: str) -> tab.Session:
    return tab.open_photo(engine, limits, photo, GREEDY)[0]


def act(engine: Engine, session: tab.Session, **action: Any) -> tuple[tab.Session, str]:
    found, text = tab.act(engine, Limits(), session, action)
    assert found is not None
    return found, text


def test_a_photo_is_opened(engine: Engine, limits: Limits, photo: str) -> None:
    session, text = tab.open_photo(engine, limits, photo, GREEDY)
    assert session.caption.text == engine.captioner.caption(photo, **GREEDY).text
    for word in session.caption.words:
        assert f">{clean(word.text)}</button>" in text
    assert "cheetah1.jpg" in text


def test_another_word_rewrites_the_rest_without_a_second_look(engine: Engine, session: tab.Session) -> None:
    encoded = engine.encoded
    changed, text = act(engine, session, action="choose", word=1, text="cat")
    assert changed.caption.text.split()[:2] == [session.caption.words[0].text, "cat"]
    assert changed.caption.text == engine.captioner.caption(session.path, prefix="a cat", **GREEDY).text
    assert changed.caption.words[1].given
    assert "Its own words again" in text
    own, _ = act(engine, changed, action="own")
    assert own.caption.text == session.caption.text
    assert engine.encoded == encoded


def test_a_word_that_it_does_not_know_is_kept_as_typed(engine: Engine, session: tab.Session) -> None:
    changed, text = act(engine, session, action="choose", word=0, text="<b>Zyzzyx</b>")
    assert changed.caption.words[0].text.lower().startswith("<b>") or "zyzzyx" in changed.caption.text.lower()
    assert "<b>" not in re.sub(r'"[^"]*"', "", text)


def test_a_region_is_captioned_and_kept_while_words_change(engine: Engine, session: tab.Session) -> None:
    region = (20.0, 10.0, 120.0, 90.0)
    boxed, text = act(engine, session, action="region", left=20, top=10, right=120, bottom=90)
    assert boxed.region == region
    assert boxed.caption.text == engine.captioner.caption(session.path, region=region, **GREEDY).text
    assert "the boxed part" in text
    chosen, _ = act(engine, boxed, action="choose", word=0, text="two")
    assert chosen.region == region
    assert (
        chosen.caption.text
        == engine.captioner.caption(session.path, region=region, prefix="two", **GREEDY).text
    )
    whole, _ = act(engine, chosen, action="whole")
    assert whole.region is None
    assert whole.caption.text == session.caption.text


def test_candidates_are_listed_and_chosen(engine: Engine, limits: Limits, photo: str) -> None:
    session, text = tab.open_photo(engine, limits, photo, {"beam": 3, "n_best": 3})
    assert len(session.ranked) == 3
    assert text.count('class="cap-candidate"') == 3
    second, text = act(engine, session, action="candidate", index=1)
    assert second.caption is session.ranked[1]
    assert re.search(r'data-candidate="1" aria-pressed="true"', text)


@pytest.mark.parametrize(
    "action",
    [
        {},
        {"action": "eval"},
        {"action": "choose"},
        {"action": "choose", "word": 999, "text": "x"},
        {"action": "choose", "word": -1, "text": "x"},
        {"action": "choose", "word": "0", "text": "x"},
        {"action": "choose", "word": 0, "text": ["x"]},
        {"action": "choose", "word": 0, "text": "  "},
        {"action": "choose", "word": 0, "text": "x" * 1000},
        {"action": "choose", "word": True, "text": "x"},
        {"action": "candidate", "index": 1},
        {"action": "candidate", "index": None},
        {"action": "region"},
        {"action": "region", "left": 0, "top": 0, "right": 0, "bottom": 0},
        {"action": "region", "left": 9e9, "top": 9e9, "right": 9.1e9, "bottom": 9.1e9},
        {"action": "region", "left": float("nan"), "top": 0, "right": 5, "bottom": 5},
        {"action": "region", "left": "0", "top": 0, "right": 5, "bottom": 5},
    ],
)
def test_what_a_browser_may_send_is_checked(
    engine: Engine, session: tab.Session, action: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        tab.act(engine, Limits(), session, action)


def test_a_new_photo_begins_anew(engine: Engine, session: tab.Session) -> None:
    assert tab.act(engine, Limits(), session, {"action": "another"}) == (None, "")


def test_a_forgotten_photo_is_looked_at_again_or_said_to_be_gone(
    captioner: Any, photo: str, tmp_path: Path
) -> None:
    engine = Engine(captioner)
    path = shutil.copy(photo, tmp_path / "p.jpg")
    session, _ = tab.open_photo(engine, Limits(), str(path), GREEDY)
    engine._cache.clear()
    assert act(engine, session, action="own")[0].caption.text == session.caption.text
    assert engine.encoded == 2
    engine._cache.clear()
    Path(path).unlink()
    with pytest.raises(LimitError, match="choose it again"):
        act(engine, session, action="own")
    engine.close()


def saved(engine: Engine, session: tab.Session, kind: str) -> tuple[str, bytes]:
    file = tab.download(engine, Limits(), session, kind)
    return file["name"], base64.b64decode(file["base64"])


def test_downloads_can_be_opened(engine: Engine, session: tab.Session) -> None:
    name, data = saved(engine, session, "text")
    assert (name, data.decode()) == ("cheetah1-caption.txt", session.caption.text + "\n")
    name, data = saved(engine, session, "json")
    record = json.loads(data)
    assert name == "cheetah1-caption.json"
    assert record["caption"] == session.caption.text
    assert len(record["words"][0]["attention"][0]) == session.caption.grid[0]
    name, data = saved(engine, session, "sheet")
    assert name.endswith(".png")
    assert Image.open(io.BytesIO(data)).width == 1200
    name, data = saved(engine, session, "animation")
    assert name.endswith(".webp")
    assert Image.open(io.BytesIO(data)).n_frames == len(session.caption.words) + 1
    with pytest.raises(LimitError):
        tab.download(engine, Limits(), session, "../x")


def test_the_name_of_a_download_is_harmless(engine: Engine, session: tab.Session) -> None:
    name, _ = saved(engine, replace(session, name='../<img src="x">.jpg'), "text")
    assert re.fullmatch(r"[\w.-]+", name)


def test_records_follow_the_schema(engine: Engine, limits: Limits, photo: str) -> None:
    record = tab.record(engine, limits, photo, n_best=2, beam=2)
    expected = engine.captioner.caption(photo, n_best=2, beam=2).to_dict()
    assert record.keys() == expected.keys()
    assert record["caption"] == expected["caption"]
    assert "attention" not in record["words"][0]
    assert "attention" in tab.record(engine, limits, photo, attention=True, beam=1)["words"][0]
    with pytest.raises(LimitError, match="give a photo"):
        tab.record(engine, limits, None)


def test_examples_come_with_gradio() -> None:
    text = tab.gallery(tab.examples())
    assert text.count("data-pick=") == len(tab.EXAMPLES)
    assert text.count('alt="Example') == len(tab.EXAMPLES)
    assert "/" not in re.sub(r"data:image/jpeg;base64,[^\"]*|</?\w+>|</", "", text)  # no path is told
