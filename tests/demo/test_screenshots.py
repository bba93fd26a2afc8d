"""The screenshots of the documents: made by these tests, of photos that may be shown.

``CAPTIONER_SCREENSHOTS=docs/images python -m pytest tests/demo/test_screenshots.py`` writes them anew.
The photos of coffee, cat and rocket come with scikit-image and are CC0; so is what ``photo.jpg`` and
``clip.mp4`` in ``docs/images`` show.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cv2", reason='needs OpenCV: pip install "captioner[video]"')
pytest.importorskip("skimage", reason="needs scikit-image: pip install scikit-image")

from captioner_demo import mount
from captioner_demo.engine import Engine
from fastapi import FastAPI
from PIL import Image

from demo.pages import opened, settled, until

IMAGES = Path(__file__).parents[2] / "docs/images"
MOST_BYTES = 300_000


@dataclass(frozen=True)
class Shot:
    """A screenshot: what is done on which tab, the window in CSS pixels, pixels for each of them."""

    tab: str
    act: Callable[[Any, Path], None]
    width: int
    height: int
    scheme: str = "light"
    scale: float = 1.5

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of the picture."""
        return round(self.width * self.scale), round(self.height * self.scale)


def photo(page: Any, folder: Path, word: str = "cup") -> None:
    page.set_input_files("#photo-upload input[type=file]", str(IMAGES / "photo.jpg"))
    page.click(f"#photo-view .cap-word:text-is('{word}')")
    page.wait_for_selector("#photo-upload input[type=file]", state="attached")


def video(page: Any, folder: Path) -> None:
    page.set_input_files("#video-upload input[type=file]", str(IMAGES / "clip.mp4"))
    page.wait_for_selector(".cap-clip .cap-word")
    until(page, "() => document.querySelector('.cap-clip video').readyState >= 2")
    page.click(".cap-block[data-segment='1']")
    page.click(".cap-clip .cap-word:text-is('cat')")
    until(
        page,
        "() => (v => !v.seeking && v.readyState >= 3)(document.querySelector('.cap-clip video'))",
    )
    until(page, "() => Array.from(document.querySelectorAll('.cap-frame img')).every((i) => i.complete)")


def photos(page: Any, folder: Path) -> None:
    page.set_input_files("#folder-intake [data-choose=folder]", str(folder))
    until(page, "() => document.querySelector('#folder-table .cap-folder').dataset.state === 'done'")


def nothing(page: Any, folder: Path) -> None:
    """The tab as it is when it is opened."""


SHOTS = {
    "demo_photo": Shot("Photo", photo, 1280, 850),
    "demo_dark": Shot("Photo", photo, 1280, 850, "dark"),
    "demo_video": Shot("Video", video, 1280, 1080),
    "demo_folder": Shot("Folder", photos, 1280, 790),
    "demo_phone": Shot("Photo", photo, 390, 844, "light", 2),
}


@pytest.fixture(scope="module")
def address(start: Callable[[Any], str], engine: Engine) -> str:
    return start(mount(FastAPI(), captioner=engine))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos, and a file that is none."""
    from skimage import data

    root = tmp_path_factory.mktemp("photos") / "holiday"
    root.mkdir()
    for name in ("coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).save(root / f"{name}.jpg", quality=92)
    Image.fromarray(data.chelsea()).save(root / "cat.jpg", quality=92)
    (root / "notes.txt").write_text("buy milk")
    return root


def take(browser: Any, address: str, folder: Path, shot: Shot) -> Iterator[Any]:
    """Open the page as the shot has it; yield it when nothing moves any more."""
    size = {"width": shot.width, "height": shot.height}
    options = {"viewport": size, "color_scheme": shot.scheme, "device_scale_factor": shot.scale}
    with opened(browser, address, shot.tab, **options) as page:
        shot.act(page, folder)
        page.mouse.move(2, 2)
        page.evaluate("scrollTo(0, 0)")
        settled(page)
        yield page


@pytest.mark.parametrize("name", SHOTS)
def test_the_page_is_shown(browser: Any, address: str, folder: Path, name: str) -> None:
    shot = SHOTS[name]
    for page in take(browser, address, folder, shot):
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        with Image.open(io.BytesIO(page.screenshot())) as picture:
            assert picture.size == shot.size
            place = os.environ.get("CAPTIONER_SCREENSHOTS")
            if place:
                picture.convert("RGB").save(Path(place) / f"{name}.webp", quality=86, method=6)


@pytest.mark.parametrize("name", SHOTS)
def test_the_documents_have_the_picture(name: str) -> None:
    path = IMAGES / f"{name}.webp"
    assert path.stat().st_size < MOST_BYTES
    with Image.open(path) as picture:
        assert picture.size == SHOTS[name].size
        assert not picture.getexif()
