"""The model that comes with the package: it sees, it obeys, and it knows when there is nothing to see."""

from __future__ import annotations

import numpy as np
import pytest
from captioner_training import nothing
from gradio import media as gradio_media
from skimage import data

from captioner import Captioner
from captioner.checkpoint import read_header
from captioner.identity import BUILT_IN


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner.load(device="cpu")


@pytest.fixture(scope="module")
def man() -> np.ndarray:
    return np.stack([data.camera()] * 3, -1)  # 512 x 512, a man with a camera


@pytest.fixture(scope="module")
def motorcycle() -> np.ndarray:
    return data.stereo_motorcycle()[0]  # 500 x 741


def test_the_file_is_small_and_tells_what_it_is() -> None:
    assert BUILT_IN.stat().st_size <= 25_000_000
    header = read_header(BUILT_IN)
    assert header.calibration is not None
    assert set(header.summary["data"]) == {"flickr8k", "coco", "coco_lowres", "captioned"}
    assert all(source["note"] for source in header.summary["data"].values())


def test_it_names_what_it_sees(captioner: Captioner, man: np.ndarray, motorcycle: np.ndarray) -> None:
    first, second = captioner.caption_batch([man, motorcycle])
    assert "man" in first.text.split()
    assert {"camera", "tripod"} & set(first.text.split())
    assert "motorcycle" in second.text.split()
    assert first.sure
    assert second.sure


def test_it_names_what_hardly_stands_in_a_caption(captioner: Captioner) -> None:
    """Lions and cheetahs are no subject of people's captions; the encoder knows them."""
    for file, name in (("lion.jpg", "lion"), ("cheetah1.jpg", "cheetah"), ("cheetah.jpg", "cheetah")):
        caption = captioner.caption(gradio_media.get_image(file))
        assert name in caption.text.split(), caption.text
        assert caption.guesses[0].text == name
    assert {"coffee", "cup"} & set(captioner.caption(data.coffee()).text.split())


def test_boxed_halves_are_captioned_as_themselves(
    captioner: Captioner, man: np.ndarray, motorcycle: np.ndarray
) -> None:
    right = motorcycle[:, 120:620]
    both = np.concatenate((man[:500, :500], right), 1)
    features = captioner.encode(both)
    here = captioner.caption(features, region=(0, 0, 500, 500))
    there = captioner.caption(features, region=(500, 0, 1000, 500))
    # squashed to half its width the man may be taken for a woman, but for nothing else
    assert {"man", "woman", "person"} & set(here.text.split())
    assert "motorcycle" not in here.text.split()
    assert "motorcycle" in there.text.split()
    assert not {"man", "woman", "person"} & set(there.text.split())
    for caption, half in ((here, slice(0, 4)), (there, slice(4, 8))):
        assert caption.attention is not None
        cells = caption.attention.reshape(-1, 8, 8)
        np.testing.assert_allclose(cells[:, :, half].sum((1, 2)), 1, atol=1e-5)


def test_required_words_and_prefixes(captioner: Captioner, man: np.ndarray) -> None:
    features = captioner.encode(man)
    for options in ({"beam": 1}, {"beam": 4}, {"sample": True}):
        caption = captioner.caption(features, must=["bicycle"], prefix="an old", **options)
        assert caption.text.startswith("an old ")
        assert "bicycle" in caption.text.split()


def test_pictures_of_nothing_are_hedged(captioner: Captioner) -> None:
    """Another seed than the one that calibration uses."""
    hedged = {
        kind: sum(not c.sure for c in captioner.caption_batch(nothing.pictures(kind, 6, seed=5)))
        for kind in nothing.KINDS
    }
    assert sum(hedged.values()) >= 0.9 * 6 * len(hedged), hedged
    assert min(hedged.values()) >= 3, hedged
