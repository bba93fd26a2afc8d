from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("imagehash", reason='needs ImageHash: pip install "captioner[report]"')

from captioner.batch.alike import near_duplicates, perceptual_hash, photo, repeated, summary_lines
from captioner.images import Fit, Preprocess, load

PREPROCESS = Preprocess(size=256, fit="squash", mean=(127.0,) * 3, std=(128.0,) * 3, interpolation="bicubic")


@pytest.fixture(scope="module")
def photos() -> dict[str, Image.Image]:
    """Real ones of many kinds, none of which looks like another."""
    data = pytest.importorskip("skimage.data")
    names = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "clock", "page", "cell", "moon")
    return {
        name: Image.fromarray(np.asarray(getattr(data, name)(), np.uint8)).convert("RGB") for name in names
    }


def hashed(picture: Image.Image, preprocess: Preprocess = PREPROCESS) -> bytes | None:
    return perceptual_hash(*load(np.asarray(picture), preprocess))


def compressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=25)
    return Image.open(file).convert("RGB")


def cropped(picture: Image.Image) -> Image.Image:
    x, y = picture.width // 100, picture.height // 100
    return picture.crop((x, y, picture.width - x, picture.height - y))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "smaller": lambda picture: picture.resize((picture.width // 3, picture.height // 3)),
    "another shape": lambda picture: picture.resize((picture.width, picture.height * 3 // 4)),
    "compressed": compressed,
    "cropped": cropped,
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "brighter": lambda picture: picture.point([min(255, round(v * 1.1)) for v in range(256)] * 3),
}


def test_copies_are_found_and_other_pictures_are_not(photos: dict[str, Image.Image]) -> None:
    hashes = [(name, hashed(picture)) for name, picture in photos.items()]
    assert near_duplicates(hashes) == []
    for kind, change in COPIES.items():
        copies = [(f"{name} {kind}", hashed(change(picture))) for name, picture in photos.items()]
        found = near_duplicates([*hashes, *copies])
        assert sorted(found) == sorted([name, f"{name} {kind}"] for name in photos), kind


def test_the_largest_group_comes_first_and_files_stand_in_the_order_given() -> None:
    a, b = bytes(16), bytes([255] * 16)
    near = bytes([1]) + a[1:]
    found = near_duplicates([("x", b), ("c", a), ("y", b), ("a", near), ("b", a), ("alone", b"\x0f" * 16)])
    assert found == [["c", "a", "b"], ["x", "y"]]


def test_no_pictures_no_groups() -> None:
    assert near_duplicates([]) == []
    assert near_duplicates([("a", bytes(16)), ("b", None), ("c", None)]) == []


@pytest.mark.parametrize("distance", [0, 3, 7, 10, 15])
def test_all_pairs_are_found_as_by_comparing_each_with_each(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes: list[bytes] = []
    for _ in range(40):
        base = rng.integers(0, 2, 128, np.uint8)
        for _ in range(4):
            changed = base.copy()
            changed[rng.choice(64, rng.integers(0, 14), False)] ^= 1
            changed[64 + rng.choice(64, rng.integers(0, 14), False)] ^= 1
            hashes.append(np.packbits(changed).tobytes())
    groups = {i: {i} for i in range(len(hashes))}
    for i, j in combinations(range(len(hashes)), 2):
        differ = [
            (int.from_bytes(hashes[i][part], "big") ^ int.from_bytes(hashes[j][part], "big")).bit_count()
            for part in (slice(8), slice(8, 16))
        ]
        if differ[0] <= distance and differ[1] <= distance + 2:
            groups[i] |= groups[j]
            for k in groups[i]:
                groups[k] = groups[i]
    expected = {frozenset(map(str, group)) for group in groups.values() if len(group) > 1}
    found = near_duplicates(((str(i), value) for i, value in enumerate(hashes)), distance)
    assert {frozenset(group) for group in found} == expected
    assert sum(map(len, found)) == len(set().union(*expected)) if expected else not found


def test_without_numpy_2_bits_are_counted_with_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = [(str(i), np.random.default_rng(i // 2).bytes(16)) for i in range(20)]
    expected = near_duplicates(hashes)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert len(expected) == 10
    assert near_duplicates(hashes) == expected


@pytest.mark.parametrize("distance", [-1, 16])
def test_distances_that_make_no_sense(distance: int) -> None:
    with pytest.raises(ValueError, match=f"distance must be from 0 to 15 bits, not {distance}"):
        near_duplicates([], distance)


def test_thousands_take_a_moment() -> None:
    """Not with each with each: 20,000 pictures have 200 million pairs. (100,000 take 5 s.)"""
    rng = np.random.default_rng(1)
    hashes = [(str(i), rng.bytes(16)) for i in range(20_000)]
    hashes += [(f"copy of {name}", value) for name, value in hashes[:500]]
    found = near_duplicates(hashes)
    assert len(found) == 500
    assert all(len(group) == 2 for group in found)


def test_many_copies_of_one_picture() -> None:
    hashes = [(str(i), b"\x5a" * 16) for i in range(50_000)]
    (group,) = near_duplicates(hashes)
    assert len(group) == 50_000


def test_plain_pictures_have_no_hash() -> None:
    rng = np.random.default_rng(2)
    for colour in ((0, 0, 0), (255, 255, 255), (200, 30, 30)):
        plain = np.full((240, 320, 3), colour, np.uint8)
        noisy = np.clip(plain + rng.normal(0, 6, plain.shape), 0, 255).astype(np.uint8)
        assert hashed(Image.fromarray(plain)) is None
        assert hashed(Image.fromarray(noisy)) is None
        assert hashed(compressed(Image.fromarray(noisy))) is None
    faint = np.full((240, 320, 3), 128, np.uint8)
    faint[80:160, 100:220] = 160
    assert hashed(Image.fromarray(faint)) is not None


def test_the_hash_does_not_depend_on_how_the_picture_was_fitted(photos: dict[str, Image.Image]) -> None:
    letterbox = Preprocess(size=256, fit="letterbox", mean=(0.0,) * 3, std=(1.0,) * 3)
    for name in ("coffee", "rocket", "cell"):  # wide and tall
        found = near_duplicates([("a", hashed(photos[name])), ("b", hashed(photos[name], letterbox))])
        assert found == [["a", "b"]], name


def test_a_picture_without_the_bars() -> None:
    square = np.zeros((3, 100, 100), np.uint8)
    square[0, 25:75] = 255
    shown = photo(square, Fit("letterbox", 400, 200, (0.0, -100.0, 400.0, 300.0)))
    assert shown.size == (100, 50)
    assert np.asarray(shown).min(axis=(0, 1)).tolist() == [255, 0, 0]
    assert photo(square, None).size == (100, 100)


def test_captions_said_more_than_once() -> None:
    captions = ["a dog", "a cat", "a dog", "", "", "a man", "a cat", "a dog"]
    assert repeated(iter(captions)) == [("a dog", 3), ("a cat", 2)]
    assert repeated([]) == []


def test_the_end_of_a_run_says_it_in_two_lines() -> None:
    assert summary_lines([], []) == []
    assert summary_lines([["a", "b", "c"]], []) == ["3 pictures in a group look alike."]
    lines = summary_lines([["a", "b"]] * 1500, [("a dog", 1200), ("a cat", 2)])
    assert lines == [
        "3,000 pictures in 1,500 groups look alike.",
        "2 captions are said more than once, of 1,202 files; most often, 1,200 times, “a dog”.",
    ]
    assert summary_lines([], [("a dog", 5)]) == ["One caption is said of 5 files: “a dog”."]


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ImportError, match=r'needs ImageHash: pip install "captioner\[report\]"'):
        perceptual_hash(np.zeros((3, 8, 8), np.uint8))


def test_what_only_looks_over_results_imports_no_torch() -> None:
    code = (
        "import sys; from captioner.batch import alike, page; "
        "print({'torch', 'imagehash', 'scipy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
