from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from captioner_demo import about
from captioner_demo.common import Demo
from captioner_demo.engine import Engine
from captioner_demo.limits import LimitError

from captioner import Captioner
from captioner.identity import BUILT_IN


def test_the_cards_facts_are_told(engine: Engine) -> None:
    text = about.describe(Demo(engine, BUILT_IN))
    header = engine.captioner.header
    assert header.encoder in text
    assert f"{BUILT_IN.stat().st_size / 1e6:.1f} MB" in text
    for name, scores in header.summary["scores"].items():
        assert name in text
        assert f"{100 * scores['CIDEr']:.1f}" in text
    for entry in header.summary["data"].values():
        assert f"{entry['pictures']:,} pictures" in text
    assert "non-commercial" in text


def test_what_a_checkpoint_says_is_not_html(engine: Engine) -> None:
    nasty = "<script>alert(1)</script>"
    header = replace(
        engine.captioner.header,
        name=nasty,
        summary={"scores": {nasty: {nasty: 0.5}}, "data": {nasty: {"x": nasty, "n": 3}}, "licence": nasty},
    )
    assert "<script" not in about.facts(header, 1.0, 7)
    assert "<section" in about.facts(replace(header, summary={}), 1.0, 7)
    assert "<section" in about.facts(replace(header, summary={"scores": [1], "data": "x"}), 1.0, 7)


def test_another_model_is_chosen_by_its_path(captioner: Captioner, tmp_path: Path) -> None:
    demo = Demo(Engine(captioner), choose_models=True)
    key, text, line = about.choose(demo, f" {BUILT_IN} ")
    assert key == str(BUILT_IN)
    assert "MB" in text
    assert re.search("All tabs use", line)
    assert demo.engine(key) is demo.engine(key)
    assert demo.engine(key) is not demo.first
    with pytest.raises(ValueError, match=r"gone.safetensors"):
        about.choose(demo, str(tmp_path / "gone.safetensors"))
    text_file = tmp_path / "x.safetensors"
    text_file.write_text("hello")
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        about.choose(demo, str(text_file))
    assert about.choose(demo, "")[0] == ""


def test_other_machines_cannot_choose_a_path(captioner: Captioner) -> None:
    with pytest.raises(LimitError, match="on the machine"):
        about.choose(Demo(Engine(captioner)), "/etc/passwd")
