"""The scripts in examples/ do what they say, on real photos and with the built-in model."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from captioner import Captioner

EXAMPLES = Path(__file__).parents[1] / "examples"
media = pytest.importorskip("gradio.media")
PHOTOS = ("cheetah1.jpg", "lion.jpg", "tower.jpg")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner.load(device="cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in PHOTOS:
        shutil.copy(media.get_image(name), folder / name)
    (folder / "broken.jpg").write_text("no picture")
    return folder


PAGE = """<!DOCTYPE html><p>A lion &gt; <b>all</b>:
<img src="../photos/lion.jpg" width=300>
<img alt="" src="../photos/cheetah1.jpg"><img data-alt="x" src='/photos/cheetah1.jpg' />
<IMG SRC="../photos/broken.jpg"><img src="https://elsewhere.example/a.jpg"><img src="gone.jpg">
"""


def test_site_alt_text(photos: Path, captioner: Captioner, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "pages").mkdir(parents=True)
    photos.rename(site / "photos")
    page = site / "pages" / "index.html"
    page.write_text(PAGE)
    example = load("site_alt_text")
    left, problems = example.describe(site, captioner)
    assert [Path(path).name for path in left] == ["broken.jpg"]
    assert problems == []
    text = page.read_text()
    captions = re.findall(r'alt="([^"]+)"', text.replace('data-alt="x"', ""))
    assert len(captions) == 2
    assert "lion" in captions[0]
    assert "cheetah" in captions[1]
    assert text.replace(f' alt="{captions[0]}"', "").replace(f' alt="{captions[1]}"', "") == PAGE
    assert example.describe(site, captioner) == (left, [])
    assert page.read_text() == text


def test_site_with_a_page_that_is_not_utf8(photos: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (photos / "lion.jpg").rename(site / "lion.jpg")
    old = b"<p>caf\xe9 <img src=lion.jpg>\r\n"
    (site / "a.html").write_bytes(old)
    (site / "b.html").write_bytes("\ufeff<p>café <img src=lion.jpg>\r\n".encode())
    command = [sys.executable, EXAMPLES / "site_alt_text.py", site]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{site / 'a.html'}: this page is not UTF-8 and was left as it is; save it as UTF-8"
    ]
    assert (site / "a.html").read_bytes() == old
    text = (site / "b.html").read_bytes().decode()
    assert re.fullmatch('\ufeff<p>café <img src=lion.jpg alt="[a-z ]*lion[a-z ]*">\r\n', text)


def test_fine_tuning_dataset(photos: Path, captioner: Captioner, tmp_path: Path) -> None:
    data_set = tmp_path / "set"
    example = load("fine_tuning_dataset")
    assert example.make(photos, data_set, "my zoo", captioner, least=0.0) == 3
    rows = [json.loads(line) for line in (data_set / "metadata.jsonl").read_text().splitlines()]
    assert all(row["text"].startswith("my zoo, a") for row in rows)
    sizes = {(data_set / row["file_name"]).stat().st_size for row in rows}
    assert sizes == {(photos / name).stat().st_size for name in PHOTOS}
    assert example.make(photos, data_set, "my zoo", captioner, least=1.0) == 0


def test_photo_search(
    photos: Path, captioner: Captioner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("photo_search")
    library = example.open_library(tmp_path / "library.db")
    table = tmp_path / "library.jsonl"
    assert example.add(library, table, photos, captioner) == 3
    assert example.add(library, table, photos, captioner) == 0  # the broken one is tried again
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"{photos / 'broken.jpg'}: ") for line in lines] == [True, True]
    assert [Path(path).name for path, _ in example.find(library, "lions")] == ["lion.jpg"]
    assert list(example.find(library, 'elephant "*')) == []


def test_attention_maps(photos: Path, captioner: Captioner, tmp_path: Path) -> None:
    files = load("attention_maps").export(photos, tmp_path / "maps", captioner)
    assert sorted(path.name for path in files) == sorted(f"{name}.npz" for name in PHOTOS)
    arrays = np.load(files[0])
    words, height, width = arrays["attention"].shape
    assert words == len(arrays["words"]) == len(arrays["probability"])
    assert (height, width) == captioner.model.encoder.grid
    np.testing.assert_allclose(arrays["attention"].sum((1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_how_they_are_called(name: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"python examples/{name}" in done.stderr
