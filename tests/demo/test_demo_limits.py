from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from captioner_demo.limits import LimitError, Limits, beginning, pixel_size, read_photo, search_options
from PIL import Image

from captioner.inputs import ImageError
from demo.photo_data import bomb


def test_a_photo_within_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 20)).save(path)
    data = read_photo(path, Limits())
    assert data == path.read_bytes()
    assert pixel_size(data, "a.png") == (30, 20)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(60000, 60000))
    with pytest.raises(LimitError, match=r"bomb.png has 3600.0 megapixels; at most 50 are allowed here"):
        read_photo(path, Limits())


def test_too_many_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(path)
    with pytest.raises(LimitError, match=r"noise.png is larger than the 0.01 MB"):
        read_photo(path, Limits(mb=0.01))


@pytest.mark.parametrize(
    "content", [b"", b"hello, I am text", b"<svg onload='x'/>", b"\xff\xd8\xff", b"GIF89a"]
)
def test_what_is_no_photo_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_photo(path, Limits())
    assert "x.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.jpg: cannot be read"):
        read_photo(tmp_path / "gone.jpg", Limits())


@pytest.mark.parametrize("name", ["megapixels", "mb", "seconds", "files"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_must_be_above_0(name: str, value: float) -> None:
    with pytest.raises(LimitError, match=name):
        Limits(**{name: value})


def test_options() -> None:
    assert search_options() == {}
    assert search_options(3, 0.7, 2) == {"beam": 3, "length_penalty": 0.7, "n_best": 2}
    assert search_options(3.0) == {"beam": 3}
    assert search_options(2, None, 5) == {"beam": 5, "n_best": 5}


@pytest.mark.parametrize(
    "given",
    [
        (0,),
        (11,),
        (1e9,),
        (1.5,),
        (True,),
        ("4",),
        (float("nan"),),
        (4, 99.0),
        (4, "x"),
        (4, 1.0, 11),
        (4, float("nan")),
    ],
)
def test_impossible_options_are_one_line(given: tuple) -> None:
    with pytest.raises(LimitError) as caught:
        search_options(*given)
    assert "\n" not in str(caught.value)


def test_the_beginning_is_bounded() -> None:
    assert beginning(None) == ""
    assert beginning("  a \n dog ") == "a dog"
    with pytest.raises(LimitError, match="300"):
        beginning("a " * 200)
    with pytest.raises(LimitError, match="text"):
        beginning(["a"])
